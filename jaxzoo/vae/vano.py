"""Variational autoencoding neural operators: a VAE whose data are functions.

    u(y) = D(z)(y) + white noise of variance beta,   z ~ N(0, I)

A function plus white noise has no density, but one relative to the noise alone, by
Cameron and Martin, in which sums over pixels have become integrals:

    log dP(u|z)/dV = <D(z), u> - 1/2 ||D(z)||^2,   <a, b> = sum_j w_j a(y_j) b(y_j)
    loss = -E_q [<D(z), u> - 1/2 ||D(z)||^2] + beta KL(q(z|u) || N(0, I))

w are weights of a quadrature on points y, so that loss, encoder and decoder are
(nearly) the same on every grid: train on one, encode and decode on another.

    w = trapezoid_weights(grid)                                             # [M]
    mean, log_std = VanoEncoder(8).apply(encoder_params, u, grid[:, None], w)
    decode = lambda z: VanoDecoder(8).apply(decoder_params, z, grid[:, None])
    loss, aux = vano_loss(key, decode, mean, log_std, u, w, beta=1e-3)
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxzoo.core.stats import normal_kl
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "vano",
    "title": "Variational Autoencoding Neural Operators",
    "arxiv": "2302.10351",
    "year": 2023,
    "authors": "Jacob H. Seidman, Georgios Kissas, George J. Pappas, Paris Perdikaris",
    "where": "Likelihood relative to white noise, objective with beta, encoders by "
    "functionals of u, linear and nonlinear (NOMAD) decoders, hypernetworks.",
    "differs": "The released code averages ||u - D||^2 / (2 ||u||^2) over points, "
    "Gauss-Legendre ones for random fields, with beta = 5e-6; here the likelihood of "
    "the text is the value, whose gradient for D is that of ||u - D||^2 / 2, by any "
    "quadrature. Its encoders take values at fixed points; here they take inner "
    "products with learned functions, so that they have no grid of their own. Its nets "
    "give log variances of q, here log standard deviations. The hypernetwork makes all "
    "weights of a net with one hidden layer; other nets are left out. The experiment "
    "has variances k^-2 (not k^-4), 4 latents (64), 8 waves (1): with k^-4 neither "
    "1 wave in 3,000 steps nor 8 in 2,000 found the fourth mode (40,000 steps there).",
}

__all__ = [
    "VanoDecoder",
    "VanoEncoder",
    "cameron_martin",
    "trapezoid_weights",
    "vano_loss",
]

LARGEST = 1e12  # the product of three stays a float32


@typed
def trapezoid_weights(grid: Float[ArrayLike, " points"]) -> Float[Array, " points"]:
    """Weights of the trapezoidal rule on a grid of one dimension.

    w_j = (y_(j+1) - y_(j-1)) / 2, with the ends standing for their missing neighbours

    Args:
        grid: M >= 2 points in rising order; their spaces may differ. For more
            dimensions take products, or weights of any other rule.

    Returns:
        float32 `[M]`, in units of the grid; their sum is its length.

    Raises:
        ValueError: there is one point.

    >>> trapezoid_weights(jnp.array([0.0, 1.0, 3.0])).tolist()
    [0.5, 1.5, 1.0]
    """
    check_range("grid.shape[0]", grid.shape[0], low=2)
    grid = as_float32(grid)
    half = 0.5 * grid[1:] - 0.5 * grid[:-1]
    return jnp.pad(half, (0, 1)) + jnp.pad(half, (1, 0))


@typed
def cameron_martin(
    prediction: Float[ArrayLike, "*batch points"],
    u: Float[ArrayLike, "*batch points"],
    weights: Float[ArrayLike, " points"],
) -> Float[Array, "*batch"]:
    """Log-density of u under D plus white noise, relative to white noise alone.

    sum_j w_j (D_j u_j - D_j^2 / 2) = (||u||^2 - ||u - D||^2) / 2

    It stays finite when u has the noise in it and the grid gets finer.

    Args:
        prediction: D on the points, `[..., M]`. Entries of all three count up to 1e12.
        u: the function, likewise.
        weights: of a quadrature on the points.

    Returns:
        Nats per function, float32, for noise of unit variance.

    >>> u, w = jnp.array([[1.0, 2.0]]), jnp.array([0.5, 0.5])
    >>> cameron_martin(u, u, w).tolist(), cameron_martin(0.0 * u, u, w).tolist()
    ([1.25], [0.0])
    """
    prediction, u, weights = (
        jnp.clip(as_float32(x), -LARGEST, LARGEST) for x in (prediction, u, weights)
    )
    return (prediction * u - 0.5 * jnp.square(prediction)) @ weights


@typed
def vano_loss(
    key: Key[Array, ""],
    decode: Callable[[Any], Any],
    mean: Float[ArrayLike, "batch latents"],
    log_std: Float[ArrayLike, "batch latents"],
    u: Float[ArrayLike, "batch points"],
    weights: Float[ArrayLike, " points"],
    *,
    num_samples: int = 4,
    beta: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The objective of VANO: minus the expected likelihood, plus beta times the KL.

    mean_b -1/S sum_s [<D(z_s), u> - ||D(z_s)||^2 / 2] + beta KL(q || N(0, I))

    beta is the variance of the noise: divided by it, the loss is minus the ELBO of
    D(z) + sqrt(beta) white noise.

    Args:
        key: a typed key, consumed.
        decode: D, `[S, B, D] -> [S, B, M]`, on the points of `u`.
        mean: of q(z|u), `[B, D]`.
        log_std: log standard deviation of q, likewise.
        u: functions on the points, `[B, M]`.
        weights: of a quadrature on the points, `[M]`.
        num_samples: S, draws of z per function; the released code has 16.
        beta: >= 0; the released code has 5e-6 for a likelihood over ||u||^2.

    Returns:
        `(loss, aux)`: float32 scalar; in aux "per_example", minus the loss of each
        function, "likelihood" and "kl", all `[B]` in nats (of unit noise).

    Raises:
        ValueError: a number is out of range.
        TypeError: `decode` returns another shape.

    With D = 0 and q = N(1, 1) there is the KL alone:

    >>> one = jnp.ones((1, 1))
    >>> loss, aux = vano_loss(
    ...     jax.random.key(0), lambda z: 0.0 * z, one, 0.0 * one, one, one[0], beta=0.5
    ... )
    >>> float(loss), aux["kl"].tolist()
    (0.25, [0.5])
    """
    check_range("num_samples", num_samples, low=1)
    check_range("beta", beta, low=0.0)
    mean, log_std, u = as_float32(mean), as_float32(log_std), as_float32(u)
    noise = jax.random.normal(key, (num_samples, *mean.shape), mean.dtype)
    # An encoder that runs away gives large draws, not infinite ones.
    std = jnp.exp(jnp.clip(log_std, -40.0, 40.0))
    prediction = decode(mean[None] + std[None] * noise)
    shape = (num_samples, *u.shape)
    if prediction.shape != shape:
        raise TypeError(
            f"argument 'decode' gives shape {prediction.shape}, expected {shape}."
        )
    repeated = jnp.broadcast_to(u[None], shape)
    likelihood = jnp.mean(cameron_martin(prediction, repeated, weights), axis=0)
    kl = normal_kl(mean, log_std)
    per_example = likelihood - beta * kl
    aux = {"per_example": per_example, "likelihood": likelihood, "kl": kl}
    return -jnp.mean(per_example), jax.lax.stop_gradient(aux)


class VanoEncoder(nn.Module):
    """q(z|u) from inner products of u with learned functions, on any grid.

    Attributes:
        latents: dimension of z.
        functionals: how many inner products <u, f_i>; f is an MLP of y.
        hidden: width of the hidden layers.
        frequencies: of waves that y is encoded by; 0 takes y as it is.
        scale: what u is divided by before the MLP, about its size.
    """

    latents: int
    functionals: int = 16
    hidden: int = 64
    frequencies: int = 1
    scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "... m"],
        y: Float[Array, "m q"],
        weights: Float[Array, " m"],
    ) -> tuple[Float[Array, "... latents"], Float[Array, "... latents"]]:
        """Mean and log standard deviation, `[..., latents]`."""
        functions = _mlp(self, "f", _waves(y, self.frequencies), self.functionals)
        inner = u @ (weights[:, None] / self.scale * functions)
        both = nn.Dense(2 * self.latents, name="skip")(inner)
        both = both + _mlp(self, "q", inner, 2 * self.latents)
        mean, log_std = jnp.split(both, 2, axis=-1)
        return mean, log_std


class VanoDecoder(nn.Module):
    """D(z), a function of y, by one of three ways.

    "linear": sum_i z_i b_i(y), b an MLP of y; it spans `latents` functions.
    "nomad":  an MLP of z and y.
    "hyper":  an MLP of y with one hidden layer, whose weights are an MLP of z.

    Attributes:
        latents: dimension of z.
        kind: one of the three.
        hidden: width of the hidden layers.
        frequencies: of waves that y is encoded by; 0 takes y as it is.
    """

    latents: int
    kind: Literal["linear", "nomad", "hyper"] = "linear"
    hidden: int = 64
    frequencies: int = 1

    @nn.compact
    def __call__(
        self, z: Float[Array, "... d"], y: Float[Array, "m q"]
    ) -> Float[Array, "... m"]:
        """`[..., latents]` and `[M, Q]` to `[..., M]`."""
        waves = _waves(y, self.frequencies)
        if self.kind == "linear":
            return z @ _mlp(self, "b", waves, self.latents).T
        if self.kind == "nomad":
            shape = (*z.shape[:-1], len(y))
            z = jnp.broadcast_to(z[..., None, :], (*shape, z.shape[-1]))
            waves = jnp.broadcast_to(waves, (*shape, waves.shape[-1]))
            both = jnp.concatenate([z, waves], axis=-1)
            return _mlp(self, "D", both, 1)[..., 0]
        if self.kind != "hyper":
            raise ValueError(
                f"argument 'kind' is {self.kind!r}, expected 'linear', 'nomad' or "
                "'hyper'."
            )
        inputs, width = waves.shape[-1], self.hidden
        made = _mlp(self, "weights", z, width * (inputs + 2))
        ends = [width * inputs, width * (inputs + 1)]
        first, bias, last = jnp.split(made, ends, axis=-1)
        first = first.reshape(*z.shape[:-1], inputs, width)
        hidden = nn.gelu(waves @ first + bias[..., None, :])
        return (hidden @ last[..., None])[..., 0] / width**0.5


def _mlp(module: nn.Module, name: str, x: Array, outputs: int) -> Array:
    """Two hidden layers and an output, in `module`."""
    for i in range(2):
        x = nn.gelu(nn.Dense(module.hidden, name=f"{name}_{i}")(x))
    return nn.Dense(outputs, name=f"{name}_out")(x)


def _waves(y: Array, frequencies: int) -> Array:
    """Cosines and sines of 2 pi k y, k = 1..frequencies, `[M, 2 frequencies Q]`."""
    if frequencies == 0:
        return y
    turns = 2.0 * jnp.pi * jnp.arange(1, frequencies + 1, dtype=y.dtype)
    angles = (y[:, :, None] * turns[None, None]).reshape(len(y), -1)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def _functions(key: Array, *shapes: tuple[int, ...]) -> list[Array]:
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def _loss_example(key: Array):
    basis = jnp.sin(jnp.arange(24.0).reshape(3, 8))

    def decode(z: Array) -> Array:
        return z @ basis.astype(z.dtype)

    key, draw_key = jax.random.split(key)
    mean, log_std, u = _functions(key, (8, 3), (8, 3), (8, 8))
    weights = jnp.full((8,), 0.125)
    args = (draw_key, decode, mean, 0.3 * log_std, u, weights)
    return args, {"num_samples": 2, "beta": 0.1}


EXAMPLES = {
    cameron_martin: lambda key: (tuple(_functions(key, (8, 5), (8, 5), (5,))), {}),
    trapezoid_weights: lambda key: ((jnp.sort(jax.random.uniform(key, (8,))),), {}),
    vano_loss: _loss_example,
}
