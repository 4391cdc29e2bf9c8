"""Von Mises-Fisher distributions, which are the normal ones of the sphere.

    z = sample_vmf(key, mean, kappa, num_samples=16)            # [B, d] to [B, 16, d]
    log_prob = vmf_log_prob(z[:, 0], mean, kappa)               # [B], in nats

Directions are scaled to unit length wherever they come in; a zero vector stays zero.
`vmf_log_prob` and `log_bessel` hold for concentrations from 0 to 1e30 and any
dimension, where a quotient of Bessel functions overflows at 90.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["log_bessel", "sample_vmf", "vmf_log_prob"]

DEBYE_FROM = 15.0  # where the expansion for large arguments reaches float32
NODES = 24  # of the integral in the gradient of a sample
TINY = 1e-20


@typed
def sample_vmf(
    key: Key[Array, ""],
    mean: Float[ArrayLike, "*batch d"],
    concentration: Float[ArrayLike, "*batch"],
    *,
    num_samples: int = 16,
) -> Float[Array, "*batch num_samples d"]:
    """Draws from von Mises-Fisher distributions, by Wood's rejection.

    z = w mean + sqrt(1 - w^2) v, with v uniform among the directions at right angles to
    the mean, and w of density proportional to (1 - w^2)^((d-3)/2) exp(kappa w).

    Gradient: unbiased for expectations. To the mean it is that of the formula; to the
    concentration it is implicit, dw/dkappa = -(dF/dkappa) / (dF/dw) of w's distribution
    function F. The derivative of Wood's proposal alone misses what rejection does.

    Args:
        key: a typed key, consumed.
        mean: mean directions, d of 2 or more; scaled to unit length here.
        concentration: kappa >= 0; 0 is the uniform distribution.
        num_samples: K.

    Returns:
        Unit vectors, `[*batch, K, d]`.

    Raises:
        ValueError: d is below 2, or `num_samples` below 1.

    >>> mean = jnp.array([1.0, 0.0, 0.0])
    >>> z = sample_vmf(jax.random.key(0), mean, jnp.float32(100.0), num_samples=1000)
    >>> z.shape, float(z[:, 0].mean())
    ((1000, 3), 0.99)
    """
    check_range("num_samples", num_samples, low=1)
    d = _dimension("mean", mean)
    mean, kappa = _unit(as_float32(mean))[..., None, :], as_float32(concentration)
    shape = (*kappa.shape, num_samples)
    kappa = jnp.broadcast_to(jnp.maximum(kappa, 0.0)[..., None], shape)
    radial_key, tangent_key = jax.random.split(key)
    below = _moved(_wood(radial_key, jax.lax.stop_gradient(kappa), d), kappa, d)
    noise = jax.random.normal(tangent_key, (*shape, d), kappa.dtype)
    mean = jnp.broadcast_to(mean, noise.shape)
    # Twice: what the first round leaves along the mean counts where it leaves little.
    tangent = _across(_across(noise, mean), mean)
    # below = 1 - w: near the mean, w itself has no digits left for it.
    along, across = 1.0 - below, jnp.sqrt(jnp.maximum(below * (2.0 - below), 1e-36))
    return along[..., None] * mean + across[..., None] * tangent


@typed
def vmf_log_prob(
    x: Float[ArrayLike, "*batch d"],
    mean: Float[ArrayLike, "*batch d"],
    concentration: Float[ArrayLike, "*batch"],
) -> Float[Array, "*batch"]:
    """Log-density of a von Mises-Fisher distribution on the unit sphere.

    log C(kappa) + kappa mean.x,
    C(kappa) = kappa^(d/2-1) / ((2 pi)^(d/2) I_(d/2-1)(kappa))

    Args:
        x: points, d of 2 or more; scaled to unit length here.
        mean: mean directions, likewise.
        concentration: kappa >= 0; 0 is the uniform distribution.

    Returns:
        float32, in nats per unit of area of the sphere.

    Raises:
        TypeError: shapes do not fit; names the argument.
        ValueError: d is below 2.

    >>> x = jnp.array([0.0, 0.0, 1.0])
    >>> float(vmf_log_prob(x, x, jnp.float32(0.0)))  # -log(4 pi)
    -2.531
    """
    d = _dimension("x", x)
    x, mean = _unit(as_float32(x)), _unit(as_float32(mean))
    kappa = jnp.maximum(as_float32(concentration), 0.0)
    # kappa (mean.x - 1), without the rounding of a cosine near 1.
    distance = -0.5 * kappa * jnp.sum(jnp.square(x - mean), axis=-1)
    return distance - 0.5 * d * math.log(2 * math.pi) - _log_scaled(kappa, d / 2 - 1)


@typed
def log_bessel(x: Float[ArrayLike, "..."], *, order: float) -> Float[Array, "..."]:
    """Log of the modified Bessel function of the first kind, log I_order(x).

    The power series for small x and order, Debye's uniform expansion elsewhere; the
    error is that of float32 in its terms, which are about as large as x and `order`.

    Args:
        x: arguments >= 0; below 1e-20 they count as 1e-20, where the logarithm of a
            positive order would leave the numbers.
        order: >= 0, for instance d/2 - 1.

    Returns:
        float32, shaped like `x`.

    Raises:
        ValueError: `order` is negative.

    >>> log_bessel(jnp.array([1.0, 1000.0]), order=0.0).tolist()
    [0.2359, 995.6]
    """
    check_range("order", order, low=0, high=1e9)
    x = jnp.maximum(as_float32(x), TINY)
    return _log_scaled(x, order) + x + order * jnp.log(x)


def _across(x: Array, mean: Array) -> Array:
    """The direction of `x` at right angles to a unit vector."""
    return _unit(x - jnp.sum(x * mean, axis=-1, keepdims=True) * mean)


def _unit(x: Array) -> Array:
    # The length does not matter: to divide by the largest entry first saves squares
    # that leave the numbers, and asks for no gradient.
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(top > 0, top, 1.0)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(square > 0, square, 1.0))


def _dimension(name: str, x: ArrayLike) -> int:
    if x.shape[-1] < 2:
        raise ValueError(
            f"argument '{name}' has dimension {x.shape[-1]}, expected 2 or more: a "
            "sphere of directions."
        )
    return x.shape[-1]


def _hypot(x: Array, y: float) -> Array:
    """sqrt(x^2 + y^2) whose squares stay in range, also in the gradient."""
    large, small = jnp.maximum(x, y), jnp.minimum(x, y)
    large = jnp.maximum(large, TINY)
    return large * jnp.sqrt(1.0 + jnp.square(small / large))


def _log_scaled(x: Array, order: float) -> Array:
    """log(I_order(x) exp(-x) x^-order): smooth at 0, and its slope is exact at 1e30."""
    p = _hypot(x, order)
    if order < DEBYE_FROM:
        p = jnp.maximum(p, DEBYE_FROM)
    q, inverse = jnp.square(order / p), 1.0 / p
    terms = (
        (3 - 5 * q) / 24,
        (81 + q * (-462 + q * 385)) / 1152,
        (30375 + q * (-369603 + q * (765765 - q * 425425))) / 414720,
        (4465125 + q * (-94121676 + q * (349922430 + q * (-446185740 + q * 185910725))))
        / 39813120,
    )
    series = inverse * (
        terms[0] + inverse * (terms[1] + inverse * (terms[2] + inverse * terms[3]))
    )
    large = jnp.log1p(series) - 0.5 * jnp.log(2 * math.pi * p)
    if order > 0:
        large += order * (order / (p + x)) - order * jnp.log(order + p)
    if order >= DEBYE_FROM:
        return large
    small_x = jnp.minimum(x, DEBYE_FROM)
    small = jnp.log(_power_series(jnp.square(small_x / DEBYE_FROM), order)) - small_x
    small -= order * math.log(2.0) + math.lgamma(order + 1.0)
    return jnp.where(_hypot(x, order) < DEBYE_FROM, small, large)


def _power_series(y: Array, order: float) -> Array:
    """sum_k (x^2/4)^k / (k! (order+1)_k), with x^2 = y DEBYE_FROM^2 and y <= 1."""
    coefficients = [1.0]
    for k in range(1, 30):
        ratio = DEBYE_FROM**2 / 4 / (k * (k + order))
        coefficients.append(coefficients[-1] * ratio)
    total = jnp.zeros_like(y)
    for coefficient in reversed(coefficients):
        total = total * y + coefficient
    return total


def _wood(key: Array, kappa: Array, d: int) -> Array:
    """Draws of 1 - w, one for each concentration."""
    b = (d - 1) / (2 * kappa + _hypot(2 * kappa, float(d - 1)))
    edge = 2 * b / (1 + b)  # 1 - x0 in Wood's letters

    def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        turn, below, done = carry
        keys = jax.random.split(jax.random.fold_in(key, turn), 3)
        radius, angle, chance = (
            jax.random.uniform(k, kappa.shape, kappa.dtype, minval=TINY) for k in keys
        )
        # Ulrich's beta((d-1)/2, (d-1)/2) from two uniform draws.
        radius = jnp.sqrt(1 - radius ** (2 / (d - 2))) if d > 2 else 1.0
        beta = 0.5 * (1 + radius * jnp.cos(2 * math.pi * angle))
        new = 2 * b * beta / (1 - (1 - b) * beta)
        share = (edge + (1 - edge) * new) / (edge * (2 - edge))
        accepted = kappa * (edge - new) + (d - 1) * jnp.log(share) >= jnp.log(chance)
        below = jnp.where(~done & accepted, new, below)
        return turn + 1, below, done | accepted

    start = (jnp.int32(0), jnp.zeros_like(kappa), kappa < 0)
    _, below, _ = jax.lax.while_loop(lambda c: ~jnp.all(c[2]), body, start)
    return below


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _moved(below: Array, kappa: Array, d: int) -> Array:
    """`below`, which was drawn for `kappa` and follows it where it moves."""
    return below


@_moved.defjvp
def _moved_jvp(d: int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """The tail of w's distribution: d(1 - w)/dkappa = -(dU/dkappa) / f(w), U = 1 - F.

    dU/dkappa is the integral over t from w to 1 of (t - E[w]) f(t). With
    t = 1 - (1 - w) u^2 the integrand is a polynomial times a smooth function for every
    d, and u in [0, 1] for every kappa: Gauss and Legendre's nodes do.
    """
    below, kappa = primals
    _, slope = jax.jvp(
        lambda k: _log_scaled(k, d / 2 - 1), (kappa,), (jnp.ones_like(kappa),)
    )  # E[w] - 1
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    total = jnp.zeros_like(below)
    for u, weight in zip(0.5 + 0.5 * nodes, weights, strict=True):
        share = (2 - below * u * u) / jnp.maximum(2 - below, 1e-6)
        density = kappa * below * (1 - u * u) + 0.5 * (d - 3) * jnp.log(share)
        total += (weight * u ** (d - 2)) * (-slope - below * u * u) * jnp.exp(density)
    # At kappa = 0 it is (1 - w^2) / (d - 1); twice that is never reached.
    rate = jnp.clip(below * total, 0.0, 2 * below * (2 - below) / (d - 1))
    return below, -rate * tangents[1]


def _vmf_example(key: Array):
    x, mean = jax.random.normal(key, (2, 8, 4))
    return (x, mean, 1.0 + 4.0 * jnp.abs(x[:, 0])), {}


def _sample_example(key: Array):
    _, mean, concentration = _vmf_example(key)[0]
    return (key, mean, concentration), {"num_samples": 3}


EXAMPLES = {
    sample_vmf: _sample_example,
    vmf_log_prob: _vmf_example,
    log_bessel: lambda key: (
        (jnp.exp(2.0 * jax.random.normal(key, (8,))),),
        {"order": 1.5},
    ),
}
