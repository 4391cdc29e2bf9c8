"""The location-scale family, mean-field or with all correlations.

    z = C u + m,    u of mean 0 and variance 1 in each coordinate

C is diagonal (mean-field) or lower triangular, and its diagonal is phi(s), where phi is
a conditioner: s itself ("linear"), "softplus" or "exp". An approximate posterior:

    z = location_scale(u, m, s, lower)
    entropy = jnp.sum(log_scale(s)[0])                      # but for that of u

Numbers beyond `LIMIT` count as it, so that squares of squares and their slopes are
finite.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxzoo.core.typed import ArrayLike, as_float32, typed

__all__ = [
    "LIMIT",
    "Conditioner",
    "location_scale",
    "log_scale",
    "scale_matrix",
    "scale_slope",
]

LIMIT = 1e4
Conditioner = Literal["linear", "softplus", "exp"]


@typed
def location_scale(
    u: Float[ArrayLike, "*samples d"],
    location: Float[ArrayLike, " d"],
    diagonal: Float[ArrayLike, " d"],
    lower: Float[ArrayLike, "d d"] | None = None,
    *,
    conditioner: Conditioner = "softplus",
) -> Float[Array, "*samples d"]:
    """Reparameterised draws z = C u + m, with C_ii = phi(s_i).

    Args:
        u: noise of mean 0 and variance 1, `[..., d]`.
        location: m, `[d]`.
        diagonal: s, `[d]`.
        lower: below its diagonal the rest of C, `[d, d]`; what is on and above it does
            not matter. None: mean-field.
        conditioner: phi, which "softplus" and "exp" keep positive.

    Returns:
        float32 `[..., d]`. Numbers beyond 1e4 count as 1e4.

    >>> u, lower = jnp.array([[1.0, 2.0]]), jnp.array([[9.0, 9.0], [3.0, 9.0]])
    >>> location_scale(
    ...     u, jnp.zeros(2), jnp.array([1.0, 0.5]), lower, conditioner="linear"
    ... ).tolist()
    [[1.0, 4.0]]
    """
    u, location = _clipped(u), _clipped(location)
    scale = scale_matrix(diagonal, lower, conditioner=conditioner)
    return u @ scale.T + location.reshape((1,) * (u.ndim - 1) + (-1,))


@typed
def scale_matrix(
    diagonal: Float[ArrayLike, " d"],
    lower: Float[ArrayLike, "d d"] | None = None,
    *,
    conditioner: Conditioner = "softplus",
) -> Float[Array, "d d"]:
    """C of `location_scale`: phi(s) on the diagonal, and what is below it.

    Args:
        diagonal: s, `[d]`; of "exp" clipped to [-9, 9].
        lower: the rest of C, `[d, d]`, or None, as in `location_scale`.
        conditioner: phi.

    Returns:
        float32 `[d, d]`.

    >>> scale_matrix(jnp.array([0.0, 1.0]), 2.0 * jnp.ones((2, 2))).round(3).tolist()
    [[0.693, 0.0], [2.0, 1.313]]
    """
    scale = jnp.diag(_phi(_inside(diagonal, conditioner), conditioner))
    return scale if lower is None else scale + jnp.tril(_clipped(lower), -1)


@typed
def scale_slope(
    diagonal: Float[ArrayLike, " d"], *, conditioner: Conditioner = "softplus"
) -> Float[Array, " d"]:
    """phi'(s), by which the diagonal of C moves with its parameters.

    Args:
        diagonal: s, `[d]`.
        conditioner: phi.

    Returns:
        float32 `[d]`: 1, a sigmoid, or phi itself.

    >>> scale_slope(jnp.array([0.0, 1.0])).round(3).tolist()
    [0.5, 0.731]
    """
    s = _inside(diagonal, conditioner)
    if conditioner == "linear":
        return jnp.ones_like(s)
    return jax.nn.sigmoid(s) if conditioner == "softplus" else jnp.exp(s)


@typed
def log_scale(
    diagonal: Float[ArrayLike, " d"], *, conditioner: Conditioner = "softplus"
) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """log |phi(s)| and its derivative; summed they are the entropy and its gradient.

    Args:
        diagonal: s, `[d]`.
        conditioner: phi, of which less than 1e-4 counts as 1e-4, with a slope of 0.

    Returns:
        Both float32 `[d]`, the first in nats.

    >>> value, slope = log_scale(jnp.array([2.0, -4.0]), conditioner="linear")
    >>> value.round(3).tolist(), slope.tolist()
    ([0.693, 1.386], [0.5, -0.25])
    """
    s = _inside(diagonal, conditioner)
    if conditioner == "exp":
        return s, jnp.ones_like(s)
    phi = _phi(s, conditioner)
    is_large = jnp.abs(phi) > 1e-4
    slope = scale_slope(diagonal, conditioner=conditioner)
    slope = jnp.where(is_large, slope / jnp.where(is_large, phi, 1.0), 0.0)
    return jnp.log(jnp.maximum(jnp.abs(phi), 1e-4)), slope


def _clipped(x: ArrayLike) -> Array:
    return jnp.clip(as_float32(x), -LIMIT, LIMIT)


def _inside(diagonal: ArrayLike, conditioner: Conditioner) -> Array:
    # At 9 the exponential is near to the limit.
    s = _clipped(diagonal)
    return jnp.clip(s, -9.0, 9.0) if conditioner == "exp" else s


def _phi(s: Array, conditioner: Conditioner) -> Array:
    if conditioner == "linear":
        return s
    return jax.nn.softplus(s) if conditioner == "softplus" else jnp.exp(s)


def _parameters(key: Array):
    keys = jax.random.split(key)
    location, diagonal = jax.random.normal(keys[0], (2, 8))
    return location, diagonal, jax.random.normal(keys[1], (8, 8))


EXAMPLES = {
    location_scale: lambda key: (
        (jax.random.normal(jax.random.fold_in(key, 1), (5, 8)), *_parameters(key)),
        {},
    ),
    scale_matrix: lambda key: (_parameters(key)[1:], {}),
    scale_slope: lambda key: (_parameters(key)[1:2], {}),
    log_scale: lambda key: (_parameters(key)[1:2], {}),
}
