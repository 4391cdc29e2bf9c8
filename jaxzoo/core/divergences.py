"""Distances between samples: by kernels and by slices; total correlation.

Rows are points, `x [N, D]` and `y [M, D]`; every point of a sample has equal weight.
Everything takes any float dtype and computes in float32 (float64 where x64 is on).
Entropic transport is in `jaxzoo.core.sinkhorn`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = [
    "gaussian_kernel",
    "gaussian_total_correlation",
    "inverse_multiquadratic_kernel",
    "mmd",
    "random_directions",
    "sliced_wasserstein",
    "squared_distances",
]


@typed
def squared_distances(
    x: Float[ArrayLike, "n d"], y: Float[ArrayLike, "m d"]
) -> Float[Array, "n m"]:
    """Squared Euclidean distance of every row of `x` to every row of `y`.

    Args:
        x: points, `[N, D]`.
        y: points, `[M, D]`.

    Returns:
        |x_i - y_j|^2, `[N, M]`, float32; differences beyond 1e18 count as 1e18.

    Raises:
        TypeError: the rows differ in length; names the argument.

    >>> squared_distances(jnp.zeros((1, 2)), jnp.array([[3.0, 4.0]])).tolist()
    [[25.0]]
    """
    # Differences, not |x|^2 + |y|^2 - 2xy, which loses small distances to rounding;
    # XLA fuses them into the sum, so that [N, M, D] is never stored.
    difference = as_float32(x)[:, None] - as_float32(y)[None]
    limit = 1e18 / math.sqrt(max(1, jnp.shape(x)[1]))
    return jnp.sum(jnp.square(jnp.clip(difference, -limit, limit)), axis=-1)


@typed
def gaussian_kernel(
    squares: Float[ArrayLike, "..."], *, width: float | Float[ArrayLike, ""] = 1.0
) -> Float[Array, "..."]:
    """The Gaussian (RBF) kernel: exp(-square / (2 width^2)).

    Args:
        squares: squared distances, >= 0, of any shape.
        width: standard deviation of the bell, > 0, in the points' unit.

    Returns:
        The kernel's values in (0, 1], float32, shaped like `squares`.

    Raises:
        ValueError: `width` is not positive.

    >>> gaussian_kernel(jnp.array([0.0, 2.0])).tolist()
    [1.0, 0.3679]
    """
    check_range("width", width, above=0.0)
    return jnp.exp(-as_float32(squares) / (2.0 * jnp.square(as_float32(width))))


@typed
def inverse_multiquadratic_kernel(
    squares: Float[ArrayLike, "..."],
    *,
    scale: float | Float[ArrayLike, ""] = 1.0,
    factors: tuple[Any, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
) -> Float[Array, "..."]:
    """A sum of inverse multiquadratic kernels: sum_s s C / (s C + square).

    Its tails are heavy: points far from all others are still pulled. Wasserstein
    auto-encoders take C = 2 D sigma^2, the mean squared distance of two draws from
    N(0, sigma^2 I) in D dimensions, and these seven factors.

    Args:
        squares: squared distances, >= 0, of any shape.
        scale: C, > 0, in the unit of `squares`.
        factors: the s, each > 0.

    Returns:
        The kernel's values in (0, number of factors], float32, shaped like `squares`.

    Raises:
        ValueError: `scale` or one of `factors` is not positive.

    >>> inverse_multiquadratic_kernel(jnp.array([0.0, 3.0]), factors=(1.0,)).tolist()
    [1.0, 0.25]
    """
    check_range("scale", scale, above=0.0)
    for factor in factors:
        check_range("factors", factor, above=0.0)
    squares, scale = as_float32(squares), as_float32(scale)
    return jnp.asarray(sum(s * scale / (s * scale + squares) for s in factors))


@typed
def mmd(
    x: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "m d"],
    kernel: Callable[[Array], Array] = gaussian_kernel,
    *,
    unbiased: bool = True,
) -> Float[Array, ""]:
    """Squared maximum mean discrepancy between two samples (Gretton et al. 2012).

    MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)

    Args:
        x: points, `[N, D]`.
        y: points, `[M, D]`.
        kernel: function of squared distances, such as `gaussian_kernel` or
            `functools.partial(inverse_multiquadratic_kernel, scale=2.0 * D)`.
        unbiased: the U-statistic, whose pairs are of different points: its mean is
            MMD^2, and 0 for equal distributions, so that single values fall below 0.
            False keeps each point's pair with itself: >= 0, and too large by O(1/N).

    Returns:
        The estimate, a float32 scalar.

    Raises:
        ValueError: `unbiased`, and a sample has fewer than two points.

    >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[0.0], [2.0]])
    >>> round(float(mmd(x, x, unbiased=False)), 6)
    0.0
    >>> float(mmd(x, y))
    -0.4323
    """
    own = []
    for name, points in (("x", x), ("y", y)):
        values, count = kernel(squared_distances(points, points)), len(points)
        if unbiased:
            if count < 2:
                raise ValueError(
                    f"argument '{name}' has {count} points, expected >= 2."
                )
            others = jnp.where(jnp.eye(count, dtype=bool), 0.0, values)
            own.append(jnp.sum(others) / (count * (count - 1)))
        else:
            own.append(jnp.mean(values))
    return own[0] + own[1] - 2.0 * jnp.mean(kernel(squared_distances(x, y)))


@typed
def random_directions(
    key: Key[Array, ""], *, dim: int, num_directions: int = 50
) -> Float[Array, "directions dim"]:
    """Unit vectors that are uniform on the sphere, to project samples on.

    Args:
        key: a typed key.
        dim: D, the length of a row, > 0.
        num_directions: L, how many, > 0.

    Returns:
        Rows of length 1, `[L, D]`, float32.

    Raises:
        ValueError: `dim` or `num_directions` is not positive.

    >>> rows = random_directions(jax.random.key(0), dim=3, num_directions=5)
    >>> rows.shape, bool(jnp.allclose(jnp.linalg.norm(rows, axis=1), 1.0))
    ((5, 3), True)
    """
    check_range("dim", dim, low=1)
    check_range("num_directions", num_directions, low=1)
    normal = jax.random.normal(key, (num_directions, dim))
    return normal / jnp.linalg.norm(normal, axis=1, keepdims=True)


@typed
def sliced_wasserstein(
    x: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "n d"],
    directions: Float[ArrayLike, "l d"],
    *,
    p: int = 2,
) -> Float[Array, ""]:
    """Sliced Wasserstein distance to the power p (Bonneel et al. 2015, section 2).

    SW_p^p = mean_l mean_i |sort(x theta_l)_i - sort(y theta_l)_i|^p

    Args:
        x: points, `[N, D]`.
        y: as many points.
        directions: unit vectors theta, `[L, D]`: see `random_directions`.
        p: the order, >= 1; 2 for squared distances.

    Returns:
        SW_p^p, >= 0, a float32 scalar, in the points' unit to the power p. For
        N(0, I) against N(m, I) it tends to |m|^2 / D with p = 2.

    Raises:
        ValueError: `p` is below 1.
        TypeError: the samples differ in shape; names the argument.

    >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[4.0], [3.0]])
    >>> float(sliced_wasserstein(x, y, jnp.ones((1, 1))))
    9.0
    """
    check_range("p", p, low=1)
    # Within these limits products and powers are float32 numbers.
    limit = 10.0 ** (36 // max(2, p))
    directions = jnp.clip(as_float32(directions), -2.0, 2.0)
    ranked = [
        jnp.sort(jnp.clip(as_float32(points), -limit, limit) @ directions.T, axis=0)
        for points in (x, y)
    ]
    difference = jnp.clip(ranked[0] - ranked[1], -limit, limit)
    powers = jnp.abs(difference) if p % 2 else difference
    return jnp.mean(powers**p)


@typed
def gaussian_total_correlation(
    x: Float[ArrayLike, "n d"], *, ridge: float | Float[ArrayLike, ""] = 0.0
) -> Float[Array, ""]:
    """Total correlation of the Gaussian that has the sample's covariance.

    TC = (sum_i log S_ii - log det S) / 2 = -log det(correlations) / 2

    Args:
        x: points, `[N, D]`, N > D for a covariance that can be inverted.
        ridge: >= 0, added to the diagonal of the correlations.

    Returns:
        The total correlation in nats, >= 0 and 0 for uncorrelated columns, a float32
        scalar. Columns that do not vary count as uncorrelated with all others.

    Raises:
        ValueError: `ridge` is negative.

    >>> x = jnp.array([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [2.0, 2.0]])
    >>> float(gaussian_total_correlation(x))
    0.1100
    """
    check_range("ridge", ridge, low=0.0)
    x = jnp.clip(as_float32(x), -1e15, 1e15)
    centred = x - jnp.mean(x, axis=0, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=0)
    # where twice: a column without variance has no direction and no gradient.
    flat = variance <= 1e-30
    scaled = centred / jnp.sqrt(jnp.where(flat, 1.0, variance))[None]
    scaled = jnp.where(flat[None], 0.0, scaled)
    correlation = jnp.einsum("ni,nj->ij", scaled, scaled) / len(x)
    eye = jnp.eye(x.shape[1], dtype=bool)
    correlation = jnp.where(eye, 1.0 + as_float32(ridge), correlation)
    return -0.5 * jnp.linalg.slogdet(correlation)[1]


def _two_samples(key: Array):
    keys = jax.random.split(key)
    x, y = jax.random.normal(keys[0], (8, 3)), jax.random.normal(keys[1], (8, 3))
    return x, 0.5 * y + 1.0


def _sliced_example(key: Array):
    x, y = _two_samples(key)
    return (x, y, random_directions(key, dim=3, num_directions=4)), {}


EXAMPLES = {
    squared_distances: lambda key: (_two_samples(key), {}),
    gaussian_kernel: lambda key: ((jax.random.uniform(key, (8, 2)),), {"width": 0.5}),
    inverse_multiquadratic_kernel: lambda key: (
        (jax.random.uniform(key, (8, 2)),),
        {"factors": (0.5, 2.0)},
    ),
    mmd: lambda key: ((*_two_samples(key), gaussian_kernel), {"unbiased": True}),
    random_directions: lambda key: ((key,), {"dim": 3, "num_directions": 4}),
    sliced_wasserstein: _sliced_example,
    gaussian_total_correlation: lambda key: (
        (jax.random.normal(key, (16, 3)),),
        {"ridge": 0.01},
    ),
}
