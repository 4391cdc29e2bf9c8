"""Gammas from normals, by the rejection sampler of Marsaglia and Tsang (2000).

    h = (a - 1/3) (1 + e / sqrt(9a - 3))^3,   e ~ N(0, 1),   a >= 1

is nearly Gamma(a, 1), more so for larger a. The e that are accepted have the density
N(e; 0, 1) exp(log_ratio), smooth in a, and so for e > -sqrt(9a - 3)

    E_Gamma(a, 1)[f(z)] = E_N(0, 1)[f(h(e, a)) exp(log_ratio(e, a))]

    eps = jax.random.normal(key, alpha.shape)
    z, weight = gamma_h(eps, alpha), jnp.exp(gamma_log_ratio(eps, alpha))
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxzoo.core.typed import ArrayLike, as_float32, typed

__all__ = ["gamma_h", "gamma_log_ratio"]


@typed
def gamma_h(
    eps: Float[ArrayLike, "*batch"], alpha: Float[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """Marsaglia and Tsang's proposal for Gamma(alpha, 1).

    h = (alpha - 1/3) (1 + eps / sqrt(9 alpha - 3))^3

    Args:
        eps: standard normal where it is a proposal, `[...]`; above -sqrt(9 alpha - 3),
            below which all samples are rejected.
        alpha: shape, >= 1, `[...]`, clipped to [1, 1.1e6].

    Returns:
        float32 `[...]`.

    >>> gamma_h(jnp.array([0.0, 1.0]), jnp.array([4.0, 4.0])).round(4).tolist()
    [3.6667, 5.9342]
    """
    eps, alpha = as_float32(eps), clip_shape(alpha)
    return (alpha - 1.0 / 3.0) * (1.0 + _offset(eps, alpha)) ** 3


@typed
def gamma_log_ratio(
    eps: Float[ArrayLike, "*batch"], alpha: Float[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """log q(h) / r(h), of Gamma(alpha, 1) and what proposals are distributed by.

    log q(h(eps, alpha); alpha) + log |dh/deps| - log N(eps; 0, 1)

    Args:
        eps: of the proposal, `[...]`.
        alpha: shape, >= 1, `[...]`, clipped to [1, 1.1e6].

    Returns:
        float32 `[...]`, in nats; its derivative by `alpha` with `eps` held fixed is
        that of the log-density of accepted `eps`. At most log(1 / acceptance), 0.05 for
        alpha = 1.

    >>> eps, alpha = jnp.zeros(2), jnp.array([1.0, 100.0])
    >>> gamma_log_ratio(eps, alpha).round(4).tolist()
    [0.0495, 0.0003]
    """
    eps, alpha = as_float32(eps), clip_shape(alpha)
    # With d = alpha - 1/3 and h = d (1 + x)^3 the terms that are large cancel. Left are
    # log s(eps) = 3 d (log(1 + x) - x + x^2 / 2 - x^3 / 3) and log(1 / acceptance).
    x = _offset(eps, alpha)
    is_small = jnp.abs(x) < 0.6
    near, far = jnp.where(is_small, x, 0.0), jnp.where(is_small, 1.0, x)
    tail = jnp.zeros_like(x)
    for n in range(40, 3, -1):
        tail = (-1.0) ** (n + 1) / n + near * tail
    rest = jnp.log1p(far) - far + far**2 / 2.0 - far**3 / 3.0
    log_s = 3.0 * (alpha - 1.0 / 3.0) * jnp.where(is_small, near**4 * tail, rest)
    return log_s + _log_inverse_acceptance(alpha)


def clip_shape(alpha: ArrayLike) -> Array:
    """The shape in [1, 1.1e6]; at 1 itself its derivative is 1, not a tie's 1/2."""
    alpha = jnp.minimum(as_float32(alpha), 1.1e6)
    return jnp.where(alpha < 1.0, 1.0, alpha)


def _offset(eps: Array, alpha: Array) -> Array:
    """x of h = (alpha - 1/3) (1 + x)^3."""
    return jnp.clip(eps * lax.rsqrt(9.0 * alpha - 3.0), 1e-6 - 1.0, 1e4)


def _log_inverse_acceptance(alpha: Array) -> Array:
    """(alpha - 1/2) log d - d - gammaln(alpha) + log(2 pi) / 2, d = alpha - 1/3.

    By Binet's function, gammaln less Stirling's formula, and series: nothing cancels.
    """
    w = 1.0 / (2.0 * jnp.stack([alpha + i for i in range(6)]) + 1.0)
    steps = jnp.zeros_like(w)  # of Binet's function: arctanh(w) / w - 1
    for n in range(25, 1, -2):
        steps = jnp.square(w) * (1.0 / n + steps)
    y = 1.0 / (alpha + 6.0)
    binet = jnp.sum(steps, axis=0) + y / 12.0 - y**3 / 360.0 + y**5 / 1260.0
    y = 1.0 / (3.0 * alpha)
    tail = jnp.zeros_like(y)  # (y + log(1 - y)) / y
    for n in range(30, 1, -1):
        tail = y * (tail - 1.0 / n)
    return tail / 3.0 - 0.5 * jnp.log1p(-y) - binet


def _pair(key: Array):
    eps, alpha = jax.random.normal(key, (2, 8))
    return eps, 1.5 + 4.5 * jax.nn.sigmoid(alpha)


EXAMPLES = {
    gamma_h: lambda key: (_pair(key), {}),
    gamma_log_ratio: lambda key: (_pair(key), {}),
}
