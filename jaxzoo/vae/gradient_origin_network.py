"""Gradient origin networks: a decoder whose own gradient is its encoder.

    z = -s d/dz0 L(x, F(z0)) at z0 = 0,        loss = L(x, F(z))

The loss is differentiated through the step too, so that F learns to be a good decoder
and to have a telling gradient at the origin; there are no other parameters.

    def decode(z):                                       # [B, D] -> [B, ...]
        return net.apply(params, z)

    loss, aux = gon_loss(decode, x, latents=32)          # aux["z"], aux["output"]

The variational form puts (mean, log_std) = moments(z0) and a draw between z0 and F, and
takes the negative ELBO for L; its samples are F of N(0, I). The implicit form is a
`Siren` of coordinates and z, without a hypernetwork: any resolution can be decoded.

    decode = lambda z: siren.apply(params, siren.grid(8, 8), z)       # [B, 64, 1]
    finer = siren.apply(params, siren.grid(16, 16), aux["z"])         # [B, 256, 1]
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxzoo.core.stats import normal_kl
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "gradient_origin_network",
    "title": "Gradient Origin Networks",
    "arxiv": "2007.02798",
    "year": 2021,
    "authors": "Sam Bond-Taylor, Chris G. Willcocks",
    "where": "Section 3 (equations 6 and 7, variational GON, implicit GON).",
    "differs": "The step is the derivative of a sum over pixels, as in the text; the "
    "released code's is of a mean over pixels and batch, which its batch norms undo, "
    "and there are no batch norms here. The experiment has dense layers on 8x8 digits, "
    "and a SIREN that steps by the mean over pixels. There the error is no more than "
    "tied with the autoencoder's, 0.99 +- 0.03 of it; enlarging the SIREN's 8x8 output "
    "does better than decoding in 16x16; and the variational form uses 1.3 nats.",
}

__all__ = ["Siren", "gon_latent", "gon_loss", "variational_gon_loss"]

Likelihood = Literal["square", "bernoulli"]
LARGEST = 1e9  # of a difference: its square, summed, stays in float32


@typed
def gon_latent(
    decode: Callable[[Any], Any],
    x: Float[ArrayLike, "batch ..."],
    *,
    latents: int,
    likelihood: Likelihood = "square",
    step_size: float = 1.0,
) -> tuple[Float[Array, "batch latents"], dict[str, Array]]:
    """Latents of x by one gradient step from the origin.

    z = -s d/dz0 L(x, F(z0)) at z0 = 0
    square:     L = sum_i (x_i - F_i)^2
    bernoulli:  L = sum_i log(1 + exp F_i) - x_i F_i

    Args:
        decode: F, `[B, latents] -> [B, ...]` in the shape of `x`, each row by itself;
            logits for "bernoulli".
        x: data; for "bernoulli" what is outside [0, 1] counts as the nearest end.
        latents: D.
        likelihood: the loss L.
        step_size: s, > 0. The released code's L is a mean over batch and pixels, of
            one channel s = 1 / (B H W); its batch norms undo that.

    Returns:
        `(z, aux)`: float32 `[B, D]`, and `aux["per_example"]`, L at the origin.

    Raises:
        ValueError: a number is out of range, or F has not the shape of x.

    Of a linear decoder z = 2 s W^T (x - b), a step of transposed weights:

    >>> w = jnp.array([[1.0, 0.0], [2.0, 1.0]])
    >>> z, aux = gon_latent(lambda z: z @ w.T, jnp.array([[1.0, 3.0]]), latents=2)
    >>> z.tolist(), aux["per_example"].tolist()
    ([[14.0, 6.0]], [10.0])
    """
    check_range("latents", latents, low=1)
    check_range("step_size", step_size, above=0.0)
    x = as_float32(x)

    def total(z: Array) -> tuple[Array, Array]:
        loss = _loss(x, decode(z), likelihood)
        return jnp.sum(loss), loss

    origin = jnp.zeros((x.shape[0], latents), x.dtype)
    gradient, loss = jax.grad(total, has_aux=True)(origin)
    return -step_size * gradient, {"per_example": loss}


@typed
def gon_loss(
    decode: Callable[[Any], Any],
    x: Float[ArrayLike, "batch ..."],
    *,
    latents: int,
    likelihood: Likelihood = "square",
    step_size: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Reconstruction loss of a gradient origin network (equation 7).

    mean_b L(x_b, F(z_b)),  z = `gon_latent` of x, through which gradients pass

    Args:
        decode: F, as for `gon_latent`.
        x: data.
        latents: D.
        likelihood: the loss L, of both the step and the value.
        step_size: s, > 0.

    Returns:
        `(loss, aux)`: float32 scalar, a sum over entries of x and a mean over
        examples; `aux["per_example"]`, `aux["z"]`, `aux["output"]`, F(z), and
        `aux["origin"]`, L at the origin per example.

    Raises:
        ValueError: a number is out of range, or F has not the shape of x.

    >>> w = jnp.array([[0.5], [0.5]])
    >>> loss, aux = gon_loss(lambda z: z @ w.T, jnp.array([[1.0, 3.0]]), latents=1)
    >>> float(loss), aux["z"].tolist()  # 2 w w^T is the projection on w
    (2.0, [[4.0]])
    """
    x = as_float32(x)
    z, aux = gon_latent(
        decode, x, latents=latents, likelihood=likelihood, step_size=step_size
    )
    output = decode(z)
    loss = _loss(x, output, likelihood)
    found = {"per_example": loss, "z": z, "output": output}
    found["origin"] = aux["per_example"]
    return jnp.mean(loss), jax.lax.stop_gradient(found)


@typed
def variational_gon_loss(
    key: Key[Array, ""],
    decode: Callable[[Any], Any],
    moments: Callable[[Any], Any],
    x: Float[ArrayLike, "batch ..."],
    *,
    latents: int,
    likelihood: Likelihood = "bernoulli",
    step_size: float = 1.0,
    beta: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Negative ELBO of the variational form, at a step of its own from the origin.

    J(z0) = L(x, F(mean + exp(log_std) noise)) + beta KL(N(mean, std^2) || N(0, I)),
    mean, log_std = moments(z0);  loss = mean_b J(-s dJ/dz0 at z0 = 0)

    with other noise in the second J, as in the released code.

    Args:
        key: a typed key, consumed.
        decode: F, `[B, D] -> [B, ...]`; logits for "bernoulli".
        moments: `[B, D] -> (mean, log_std)`, each `[B, D]`; affine in the paper.
        x: data.
        latents: D.
        likelihood: L, nats for "bernoulli".
        step_size: s, > 0; the released code's is 1 / B.
        beta: weight of the divergence, >= 0.

    Returns:
        `(loss, aux)`: float32 scalar; `aux["per_example"]`, `aux["z"]`, the latents
        before `moments`, `aux["output"]`, `aux["mean"]`, `aux["log_std"]`, and
        `aux["kl"]` per example in nats.

    Raises:
        ValueError: a number is out of range, or F has not the shape of x.

    >>> loss, aux = variational_gon_loss(
    ...     jax.random.key(0), lambda z: 0.0 * z, lambda z: (z + 1.0, 0.0 * z),
    ...     jnp.array([[1.0]]), latents=1, step_size=0.5,
    ... )
    >>> float(loss), aux["mean"].tolist()  # log 2, and half of 0.5^2
    (0.8181, [[0.5]])
    """
    check_range("latents", latents, low=1)
    check_range("step_size", step_size, above=0.0)
    check_range("beta", beta, low=0)
    x = as_float32(x)

    def objective(z: Array, noise: Array) -> tuple[Array, dict[str, Array]]:
        mean, log_std = moments(z)
        std = jnp.exp(jnp.clip(log_std, -40.0, 40.0))
        output = decode(mean + std * noise)
        kl = normal_kl(mean, log_std)
        loss = _loss(x, output, likelihood) + beta * kl
        aux = {"output": output, "mean": mean, "log_std": log_std, "kl": kl}
        return jnp.sum(loss), aux | {"per_example": loss}

    noise = jax.random.normal(key, (2, x.shape[0], latents), x.dtype)
    origin = jnp.zeros(noise.shape[1:], x.dtype)
    gradient, _ = jax.grad(objective, has_aux=True)(origin, noise[0])
    z = -step_size * gradient
    _, aux = objective(z, noise[1])
    loss = jnp.mean(aux["per_example"])
    return loss, jax.lax.stop_gradient(aux | {"z": z})


class Siren(nn.Module):
    """Values at coordinates, given z: sines of dense layers of both at once.

    Attributes:
        features: widths of the sine layers.
        outputs: values at each point.
        frequency: omega of all sines: 30 by Sitzmann et al., arXiv 2006.09661, whose
            initialisation this is; coordinates lie in [-1, 1].
    """

    features: tuple[int, ...] = (64, 64, 64)
    outputs: int = 1
    frequency: float = 30.0

    @nn.compact
    def __call__(
        self, points: Float[Array, "points axes"], z: Float[Array, "batch latents"]
    ) -> Float[Array, "batch points outputs"]:
        count, batch = points.shape[0], z.shape[0]
        at = jnp.broadcast_to(points[None], (batch, *points.shape))
        code = jnp.broadcast_to(z[:, None], (batch, count, z.shape[1]))
        y = jnp.concatenate([at, code], axis=-1)
        for i, width in enumerate(self.features):
            fan_in = y.shape[-1]
            bound = 1 / fan_in if i == 0 else math.sqrt(6 / fan_in) / self.frequency
            dense = nn.Dense(width, kernel_init=_uniform(bound))
            y = jnp.sin(self.frequency * dense(y))
        bound = math.sqrt(6 / y.shape[-1]) / self.frequency
        return nn.Dense(self.outputs, kernel_init=_uniform(bound))(y)

    @nn.nowrap
    def grid(self, height: int, width: int) -> Array:
        """Centres of pixels in the square [-1, 1]^2, by row, `[height width, 2]`."""
        rows, columns = (2 * (np.arange(n) + 0.5) / n - 1 for n in (height, width))
        grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
        return jnp.asarray(grid.reshape(-1, 2), jnp.float32)


def _uniform(bound: float) -> Any:
    def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _loss(x: Array, output: Array, likelihood: Likelihood) -> Array:
    """Sum over the entries of each example."""
    if output.shape != x.shape:
        raise ValueError(
            f"argument 'decode' returns {list(output.shape)}, expected the shape of "
            f"'x', {list(x.shape)}."
        )
    axes = tuple(range(1, x.ndim))
    if likelihood == "square":
        difference = jnp.clip(x - output, -LARGEST, LARGEST)
        return jnp.sum(jnp.square(difference), axis=axes)
    x = jnp.clip(x, 0.0, 1.0)
    return jnp.sum(jax.nn.softplus(output) - x * output, axis=axes)


def _images(key: Array) -> Array:
    return jax.random.uniform(key, (8, 3, 2), minval=0.1, maxval=0.9)


def _decode(z: Array) -> Array:
    weights = jnp.cos(jnp.arange(4.0 * 6.0, dtype=z.dtype)).reshape(4, 6)
    return jnp.tanh(0.7 * z @ weights + 0.2).reshape(-1, 3, 2)


def _moments(z: Array) -> tuple[Array, Array]:
    return 0.5 * z + 0.1, 0.1 * z - 0.5


_KNOBS = {"latents": 4, "step_size": 0.3}
EXAMPLES = {
    gon_latent: lambda key: ((_decode, _images(key)), {"latents": 4}),
    gon_loss: lambda key: ((_decode, _images(key)), _KNOBS),
    variational_gon_loss: lambda key: (
        (key, _decode, _moments, _images(key)), _KNOBS,
    ),
}  # fmt: skip
