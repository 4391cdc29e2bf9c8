"""Log-densities, divergences and log-space means, per example, in nats.

Every function takes any float dtype and computes in float32 (float64 where x64 is on).
Shapes follow one rule: arrays of one call are equal up to leading sample axes, so
`z [K, B, D]` goes with `mean [B, D]`, and `(n,)` against `(n, 1)` is a TypeError.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Real

from jaxzoo.core.typed import ArrayLike, as_float32, check_axis, check_trailing, typed

__all__ = [
    "bernoulli_log_prob",
    "log_mean_exp",
    "mean_where",
    "normal_kl",
    "normal_log_prob",
]


@typed
def normal_log_prob(
    x: Float[ArrayLike, "..."],
    mean: Float[ArrayLike, "..."] | float = 0.0,
    log_std: Float[ArrayLike, "..."] | float = 0.0,
    *,
    axis: int = -1,
) -> Float[Array, "..."]:
    """Log-density of a diagonal Gaussian, summed over the event axis.

    sum_d -0.5 ((x_d - mean_d) / std_d)^2 - log std_d - 0.5 log(2 pi)

    Args:
        x: points, `[..., D]`.
        mean: the Gaussian's mean, shaped like `x` up to leading axes; 0 by default.
        log_std: log of its standard deviation, likewise. Below -40 (std 4e-18) the
            quadratic term uses -40, so that it and its gradient stay finite.
        axis: the event axis.

    Returns:
        Log-density in nats, float32, without the event axis.

    Raises:
        TypeError: a shape does not fit; names the argument.

    >>> z = jnp.array([[0.0, 0.0], [1.0, -1.0]])
    >>> normal_log_prob(z).tolist()
    [-1.8379, -2.8379]
    >>> normal_log_prob(jnp.ones(8), jnp.ones((8, 1)))
    Traceback (most recent call last):
        ...
    TypeError: argument 'mean' has shape (8, 1), expected the shape of 'x', (8,), up \
to leading axes.
    """
    x, mean, log_std = _aligned(x=x, mean=mean, log_std=log_std)
    axis = check_axis("axis", axis, x.ndim)
    square = jnp.square(_standardize(x, mean, log_std))
    terms = -0.5 * (square + math.log(2.0 * math.pi)) - log_std
    return jnp.sum(terms, axis=axis)


@typed
def bernoulli_log_prob(
    x: Real[ArrayLike, "..."] | Bool[ArrayLike, "..."],
    logits: Float[ArrayLike, "..."],
    *,
    axis: int | tuple[int, ...] = -1,
) -> Float[Array, "..."]:
    """Log-probability of binary events, from logits, summed over the event axes.

    sum_d x_d log sigmoid(l_d) + (1 - x_d) log sigmoid(-l_d)

    Args:
        x: outcomes in [0, 1], `[..., D]`; values between 0 and 1 give the negative
            cross-entropy, which is not a normalised density.
        logits: log-odds, shaped like `x` up to leading axes.
        axis: the event axis, or several: `(-3, -2, -1)` for images NHWC.

    Returns:
        Log-probability in nats, float32, without the event axes.

    Raises:
        TypeError: a shape does not fit; names the argument.

    >>> x, logits = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, -1e30]])
    >>> bernoulli_log_prob(x, logits).tolist()
    [-0.6931]
    """
    x, logits = _aligned(x=x, logits=logits)
    axes = (axis,) if isinstance(axis, int) else axis
    axes = tuple(check_axis("axis", a, x.ndim) for a in axes)
    # log(1 + e^l) without overflow; jax.nn.softplus is 2.5x slower on a CPU.
    softplus = jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return jnp.sum(x * logits - softplus, axis=axes)


@typed
def normal_kl(
    mean: Float[ArrayLike, "..."],
    log_std: Float[ArrayLike, "..."],
    other_mean: Float[ArrayLike, "..."] | float = 0.0,
    other_log_std: Float[ArrayLike, "..."] | float = 0.0,
    *,
    axis: int = -1,
) -> Float[Array, "..."]:
    """KL divergence between diagonal Gaussians, summed over the event axis.

    KL(N(m, s^2) || N(n, t^2)) = sum_d log(t/s) + (s^2 + (m - n)^2) / (2 t^2) - 1/2

    Args:
        mean: mean of the first Gaussian, `[..., D]`.
        log_std: log standard deviation of the first, likewise.
        other_mean: mean of the second; 0 by default.
        other_log_std: log standard deviation of the second; 0 by default, which makes
            the second N(0, I).
        axis: the event axis.

    Returns:
        The divergence in nats, float32, >= 0, without the event axis.

    Raises:
        TypeError: a shape does not fit; names the argument.

    >>> normal_kl(jnp.array([[1.0, 0.0]]), jnp.zeros((1, 2))).tolist()
    [0.5]
    """
    mean, log_std, other_mean, other_log_std = _aligned(
        mean=mean,
        log_std=log_std,
        other_mean=other_mean,
        other_log_std=other_log_std,
    )
    axis = check_axis("axis", axis, mean.ndim)
    log_ratio = 2.0 * (log_std - other_log_std)
    # expm1 keeps the difference exact where the two Gaussians nearly agree.
    spread = jnp.expm1(jnp.minimum(log_ratio, 80.0)) - log_ratio
    shift = jnp.square(_standardize(mean, other_mean, other_log_std))
    return 0.5 * jnp.sum(spread + shift, axis=axis)


@typed
def log_mean_exp(x: Float[ArrayLike, "..."], *, axis: int = 0) -> Float[Array, "..."]:
    """Log of the mean of exponentials over one axis: logsumexp(x) - log K.

    Args:
        x: log-values; -inf counts as a zero, also in the gradient.
        axis: the axis that is averaged, of size K.

    Returns:
        float32, `x`'s shape without `axis`.

    Raises:
        ValueError: `axis` is out of range or has no entries.

    >>> log_mean_exp(jnp.log(jnp.array([[1.0], [3.0]]))).tolist()
    [0.6931]
    """
    axis = check_axis("axis", axis, jnp.ndim(x))
    count = jnp.shape(x)[axis]
    if count == 0:
        raise ValueError(f"argument 'x' has no entries along axis {axis}.")
    x = as_float32(x)
    top = jax.lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.sum(jnp.exp(x - top), axis=axis)
    # where twice: the log of an empty sum must not send NaN into the gradient.
    empty = total == 0.0
    log_total = jnp.log(jnp.where(empty, 1.0, total)) + jnp.squeeze(top, axis)
    return jnp.where(empty, -jnp.inf, log_total - math.log(count))


@typed
def mean_where(
    x: Float[ArrayLike, "*shape"], where: Bool[ArrayLike, "*shape"] | None = None
) -> Float[Array, ""]:
    """Mean over the entries that count; masked entries may hold anything, even NaN.

    Args:
        x: values.
        where: True counts; None counts all. With no True at all the mean is 0.

    Returns:
        float32 scalar.

    >>> float(mean_where(jnp.array([1.0, jnp.nan]), jnp.array([True, False])))
    1.0
    """
    x = as_float32(x)
    if where is None:
        return jnp.mean(x)
    count = jnp.maximum(jnp.sum(where), 1).astype(x.dtype)
    return jnp.sum(jnp.where(where, x, 0.0)) / count


def _aligned(**arrays: ArrayLike | float) -> list[Array]:
    """The arrays in float32 with leading axes of size one where they lack samples."""
    ndim = len(check_trailing(**arrays))
    floats = [as_float32(x) for x in arrays.values()]
    return [jnp.expand_dims(x, tuple(range(ndim - x.ndim))) for x in floats]


def _standardize(x: Array, mean: Array, log_std: Array) -> Array:
    # The three limits keep the square and every product in its derivative below 1e37:
    # an encoder that runs away gives a bad value, not NaN in every parameter.
    difference = jnp.clip(x - mean, -1e18, 1e18)
    scaled = difference * jnp.exp(-jnp.clip(log_std, -40.0, 40.0))
    return jnp.clip(scaled, -1e18, 1e18)


def _normal_example(key: Array):
    x, mean, log_std = jax.random.normal(key, (3, 8, 4))
    return (x, mean, 0.3 * log_std), {}


def _bernoulli_example(key: Array):
    x, logits = jax.random.normal(key, (2, 8, 4))
    return (jax.nn.sigmoid(x), logits), {}


def _kl_example(key: Array):
    mean, log_std, other_mean, other_log_std = jax.random.normal(key, (4, 8, 4))
    return (mean, 0.3 * log_std, other_mean, 0.3 * other_log_std), {}


EXAMPLES = {
    normal_log_prob: _normal_example,
    bernoulli_log_prob: _bernoulli_example,
    normal_kl: _kl_example,
    log_mean_exp: lambda key: ((jax.random.normal(key, (5, 8)),), {}),
    mean_where: lambda key: (
        (jax.random.normal(key, (8,)),),
        {"where": jnp.arange(8) < 6},
    ),
}
