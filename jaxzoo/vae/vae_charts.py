"""Mixtures of VAEs as an atlas: charts of a manifold, and descent along it.

    D_k(z) = T_k(z, 0),   E_k(x) = the first entries of T_k^-1(x),   E_k(D_k(z)) = z
    loss = -log sum_k alpha_k exp(ELBO_k(x))

T_k is an invertible flow: D_k is injective and its encoder needs no training. The
softmax of log alpha_k + ELBO_k says which chart a point belongs to. Later
`overlap_weights` take its place, then `riemannian_descent` solves inverse problems.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "vae_charts",
    "title": "Manifold Learning by Mixture Models of VAEs for Inverse Problems",
    "arxiv": "2303.15244",
    "year": 2024,
    "authors": "Giovanni S. Alberti, Johannes Hertrich, Matteo Santacesaria, Silvia "
    "Sciutto",
    "where": "Sections 3 and 4: architecture, losses, Riemannian descent.",
    "differs": "No learned flow of the latents. The first loss descends on the bound, "
    "the released code also through the responsibilities. Overlap weights are made for "
    "each batch, not once. One chart moves a point, in its coordinates, with a line "
    "search that makes descent monotone by itself; the released code averages charts, "
    "by default after a step in x. Circle and sphere only, no torus or digits; one VAE "
    "has the parameters of both charts. Of the sphere's seeds one misses the half.",
}

__all__ = [
    "Charts",
    "chart_elbo",
    "log_prior",
    "mixture_loss",
    "overlap_weights",
    "riemannian_descent",
]

LARGEST = 1e12  # its square is a float32, as are sums of many
HALVINGS = 8  # sizes of a step that are tried
LOW, FADE, TAIL = 0.05, 0.2, 100.0  # of the prior, as in the released code


@typed
def log_prior(z: Float[ArrayLike, "*batch latents"]) -> Float[Array, "*batch"]:
    """Log-density of the latents, up to a constant: about uniform in [-1, 1]^d.

    Per entry 0 up to |z| = 0.8, log of a line from 1 to 0.05 at |z| = 1, and from there
    log 0.05 - 100 (|z| - 1)

    Args:
        z: latents, `[..., d]`.

    Returns:
        Nats, float32.

    >>> log_prior(jnp.array([[0.5], [1.0], [1.1]])).tolist()
    [0.0, -2.9957, -12.9957]
    """
    size = jnp.abs(as_float32(z))
    line = LOW + (1.0 - LOW) / FADE * (1.0 - jnp.clip(size, 1.0 - FADE, 1.0))
    return jnp.sum(jnp.log(line) - TAIL * jnp.maximum(size - 1.0, 0.0), axis=-1)


@typed
def chart_elbo(
    x: Float[ArrayLike, "batch features"],
    reconstruction: Float[ArrayLike, "charts batch features"],
    z: Float[ArrayLike, "charts batch latents"],
    *,
    sigma_x: float = 0.01,
    sigma_z: float = 0.01,
) -> Float[Array, "charts batch"]:
    """Evidence lower bound of every chart, by one draw, up to constants.

    -||x - D_k(z)||^2 / (2 sigma_x^2) + log p(z) + d log sigma_z

    Args:
        x: points, `[B, n]`.
        reconstruction: D_k(z), `[K, B, n]`. Differences over sigma_x count up to 1e12.
        z: the draws E_k(x) + sigma_z noise, `[K, B, d]`.
        sigma_x: standard deviation of x given z, > 0.
        sigma_z: of z given x, > 0.

    Returns:
        Nats, float32 `[K, B]`.

    Raises:
        ValueError: a number is out of range.

    >>> x, z = jnp.array([[1.0]]), jnp.zeros((2, 1, 1))
    >>> elbo = chart_elbo(x, jnp.array([[[1.0]], [[0.0]]]), z, sigma_x=1.0, sigma_z=1.0)
    >>> elbo.ravel().tolist()
    [0.0, -0.5]
    """
    check_range("sigma_x", sigma_x, above=0.0)
    check_range("sigma_z", sigma_z, above=0.0)
    gap = (as_float32(x)[None] - as_float32(reconstruction)) / sigma_x
    square = jnp.sum(jnp.square(jnp.clip(gap, -LARGEST, LARGEST)), axis=2)
    return log_prior(z) - 0.5 * square + z.shape[2] * jnp.log(sigma_z)


@typed
def mixture_loss(
    elbo: Float[ArrayLike, "charts batch"], log_alpha: Float[ArrayLike, " charts"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The negative log-likelihood of the mixture, bounded chart by chart.

    -mean_b log sum_k alpha_k exp(ELBO_k(x_b))

    Args:
        elbo: by `chart_elbo`, `[K, B]`.
        log_alpha: log of the charts' weights, up to a constant.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "per_example", the loss of each
        point, `[B]`, and "responsibilities", `[K, B]`.

    >>> loss, aux = mixture_loss(jnp.log(jnp.array([[0.2], [0.6]])), jnp.zeros(2))
    >>> float(loss), aux["responsibilities"].ravel().tolist()  # -log 0.4
    (0.9163, [0.25, 0.75])
    """
    joint = jax.nn.log_softmax(as_float32(log_alpha))[:, None] + as_float32(elbo)
    loss = -jax.nn.logsumexp(joint, axis=0)
    aux = {"per_example": loss, "responsibilities": jax.nn.softmax(joint, axis=0)}
    return jnp.mean(loss), lax.stop_gradient(aux)


@typed
def overlap_weights(
    elbo: Float[ArrayLike, "charts batch"],
    z: Float[ArrayLike, "charts batch latents"],
    *,
    scale: float = 1.5,
) -> Float[Array, "charts batch"]:
    """Responsibilities under which points near a chart's border go to others too.

    max_g softmax_k(ELBO_k + [k = g] (log p(scale z_g) - log p(z_g))), scaled to sum 1

    Args:
        elbo: with log alpha added where charts have weights, `[K, B]`.
        z: latents of the points by chart, `[K, B, d]`.
        scale: above 1: how far beyond its points a chart shall reach.

    Returns:
        float32 `[K, B]`; the loss is minus the ELBOs' average under them, fixed.

    Raises:
        ValueError: `scale` is not above 1.

    >>> z = jnp.array([[[0.9]], [[0.0]]])  # near the border of the better chart
    >>> overlap_weights(jnp.array([[0.0], [-5.0]]), z).round(3).ravel().tolist()
    [0.498, 0.502]
    """
    check_range("scale", scale, above=1.0)
    elbo, z = as_float32(elbo), as_float32(z)
    away = log_prior(scale * z) - log_prior(z)
    itself = jnp.eye(len(elbo), dtype=elbo.dtype)[:, :, None]
    logits = jax.nn.log_softmax(elbo[None] + itself * away[None], axis=1)
    return jax.nn.softmax(jnp.max(logits, axis=0), axis=0)


@typed
def riemannian_descent(
    encode: Callable[[Any], Any],
    decode: Callable[[Any], Any],
    elbo: Callable[[Any], Any],
    objective: Callable[[Any], Any],
    x: Float[ArrayLike, "batch features"],
    *,
    num_steps: int = 100,
    step_size: float = 0.1,
) -> tuple[Float[Array, "batch features"], dict[str, Array]]:
    """Minimises a function over the manifold, switching charts by responsibility.

    z = E_k(x),  x <- D_k(z - s (J^T J)^-1 grad_z f(D_k(z))),  J = dD_k/dz

    k is the chart with the largest ELBO, s the largest of step_size / 2^i that lowers
    f, i < 8; where none does the next chart is tried; where no chart does x stays.

    Args:
        encode: `[B, n] -> [K, B, d]`, each row by itself, as in all four.
        decode: `[K, B, d] -> [K, B, n]`.
        elbo: `[B, n] -> [K, B]`, with log alpha if charts have weights.
        objective: f, `[B, n] -> [B]`, such as ||A x - y||^2 / 2.
        x: starts, `[B, n]`; the first value is that of their best chart's D_k(E_k(x)).
        num_steps: >= 1.
        step_size: s, > 0.

    Returns:
        `(x, aux)`: the last points; in aux "objective", `[num_steps + 1, B]`, which
        never rises, "path", `[num_steps + 1, B, n]`, and "chart", `[num_steps, B]`.

    Raises:
        ValueError: a number is out of range.

    Gradient: the identity in `x`; how far the points move is a constant.

    >>> x, aux = riemannian_descent(
    ...     lambda x: x[None, :, :1], lambda z: jnp.concatenate([z, 0.0 * z], axis=2),
    ...     lambda x: x.T[:1], lambda x: jnp.sum((x - 1.0) ** 2, axis=1) / 2,
    ...     jnp.array([[3.0, 2.0]]), num_steps=1, step_size=1.0,
    ... )
    >>> x.tolist(), aux["objective"].ravel().tolist()
    ([[1.0, 0.0]], [2.5, 0.5])
    """
    check_range("num_steps", num_steps, low=1)
    check_range("step_size", step_size, above=0.0)
    start = as_float32(x)
    fixed, rows = lax.stop_gradient(start), jnp.arange(len(start))
    sizes = step_size * 0.5 ** jnp.arange(HALVINGS, dtype=start.dtype)

    def step(carry: tuple[Array, Array], _: None) -> Any:
        x, value = carry
        z = encode(x)
        basis = jnp.eye(z.shape[2], dtype=z.dtype)
        along = jnp.broadcast_to(basis[:, None, None], (len(basis), *z.shape))
        j = jax.vmap(lambda t: jax.jvp(decode, (z,), (t,))[1])(along)  # [d, K, B, n]
        metric = jnp.einsum("ikbn,jkbn->kbij", j, j) + 1e-6 * basis[None, None]
        slope = jax.grad(lambda z: jnp.sum(jax.vmap(objective)(decode(z))))(z)
        move = jnp.linalg.solve(metric, slope[..., None])[..., 0]
        tried = jax.vmap(lambda s: decode(z - s * move))(sizes)  # [S, K, B, n]
        values = jax.vmap(jax.vmap(objective))(tried)
        # Charts by responsibility, in each the largest step first.
        order = jnp.argsort(-elbo(x), axis=0)
        lower = jnp.moveaxis(values < value[None, None], 0, 1)  # [K, S, B]
        lower = jnp.take_along_axis(lower, order[:, None], axis=0).reshape(-1, len(x))
        best, moves = jnp.argmax(lower, axis=0), jnp.any(lower, axis=0)
        chart, size = order[best // HALVINGS, rows], best % HALVINGS
        x = jnp.where(moves[:, None], tried[size, chart, rows], x)
        value = jnp.where(moves, values[size, chart, rows], value)
        return (x, value), ((x, value), chart)

    first = decode(encode(fixed))[jnp.argmax(elbo(fixed), axis=0), rows]
    begin = first, objective(first)
    (end, _), (rest, chart) = lax.scan(step, begin, None, num_steps)
    rest = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), begin, rest)
    aux = {"objective": rest[1], "path": rest[0], "chart": chart}
    return lax.stop_gradient(end) + (start - fixed), lax.stop_gradient(aux)


class Charts(nn.Module):
    """K injective decoders and their left inverses: flows after zero padding."""

    charts: int  # K
    latents: int  # d, below `features`
    features: int  # n >= 2
    layers: int = 10  # couplings; after each the coordinates are turned by half
    hidden: int = 64  # width of the couplings' networks

    def setup(self):
        half, hidden = self.features // 2, self.hidden
        out = 2 * (self.features - half)

        def array(name: str, size: float, *shape: int) -> Array:
            init = nn.initializers.normal(size)
            return self.param(name, init, (self.layers, self.charts, *shape))

        inner = array("inner", half**-0.5, half, hidden), array("bias", 0.5, 1, hidden)
        outer = array("outer", 0.3 * hidden**-0.5, hidden, out)
        self.nets = (*inner, outer, array("shift", 0.1, 1, out))

    def decode(self, z: Float[Array, "k b d"]) -> Float[Array, "k b n"]:
        """D_k(z), `[K, B, d] -> [K, B, n]`."""
        zeros = ((0, 0), (0, 0), (0, self.features - self.latents))
        return lax.scan(_layer, jnp.pad(z, zeros), self.nets)[0]

    def encode(self, x: Float[Array, "*k b n"]) -> Float[Array, "k b d"]:
        """E_k(x), `[B, n] -> [K, B, d]`, or of other points by chart, `[K, B, n]`."""
        x = jnp.broadcast_to(x, (self.charts, *x.shape[-2:]))
        back = partial(_layer, inverse=True)
        return lax.scan(back, x, self.nets, reverse=True)[0][..., : self.latents]

    def stretch(self, z: Array, beside: Array, sigma_x: float) -> Array:
        """Lipschitz term: mean ||D_k(z) - D_k(beside)||^2 / sigma_x^2, where z is from
        the prior and beside = z + sigma_z noise."""
        x, y = jnp.split(self.decode(jnp.concatenate([z, beside], 1)), 2, axis=1)
        return jnp.mean(jnp.sum(jnp.square((x - y) / sigma_x), axis=2))


def _layer(x: Array, net: Any, *, inverse: bool = False) -> tuple[Array, None]:
    inner, bias, outer, shift = net
    half = inner.shape[-2]
    x = jnp.roll(x, half, axis=-1) if inverse else x
    first, second = jnp.split(x, [half], axis=-1)
    made = jnp.tanh(first @ inner + bias) @ outer + shift
    log_scale, shift = jnp.split(made, 2, axis=-1)
    scale = jnp.exp(jnp.tanh(log_scale))
    second = (second - shift) / scale if inverse else second * scale + shift
    x = jnp.concatenate([first, second], axis=-1)
    return x if inverse else jnp.roll(x, -half, axis=-1), None


def _normal(key: Array, *shapes: tuple[int, ...]) -> list[Array]:
    keys = jax.random.split(key, len(shapes))
    return [0.7 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


EXAMPLES = {
    chart_elbo: lambda key: (_normal(key, (8, 3), (2, 8, 3), (2, 8, 2)), {}),
    log_prior: lambda key: (_normal(key, (8, 2)), {}),
    mixture_loss: lambda key: (_normal(key, (3, 8), (3,)), {}),
    overlap_weights: lambda key: (_normal(key, (3, 8), (3, 8, 2)), {}),
    riemannian_descent: lambda key: ((
        lambda x: jnp.stack([x[:, :2], x[:, :2]]),
        lambda z: jnp.concatenate([z, z[..., :1] - z[..., 1:]], axis=-1),
        lambda x: jnp.stack([x[:, 0], -x[:, 0]]),
        lambda x: 0.5 * jnp.sum(jnp.square(x - 1.0), axis=1),
        _normal(key, (8, 3))[0],
    ), {"num_steps": 2, "step_size": 0.5}),
}  # fmt: skip
