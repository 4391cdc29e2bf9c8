"""Distances between points, as rows of an array, and which rows stand for all.

Everything takes any float dtype and computes in float32 (float64 where x64 is on).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["distances", "k_medoids"]


@typed
def distances(
    x: Float[ArrayLike, "n d"], y: Float[ArrayLike, "m d"]
) -> Float[Array, "n m"]:
    """Euclidean distance of every row of `x` to every row of `y`, for rows of any size.

    Args:
        x: points, `[N, D]`.
        y: points, `[M, D]`.

    Returns:
        |x_i - y_j|, `[N, M]`, float32. Of equal rows the gradient is 0, and where a
        distance is below 1e-22 of the largest entry it counts as 0.

    Raises:
        TypeError: the rows differ in length; names the argument.

    >>> distances(jnp.zeros((1, 2)), jnp.array([[3e30, 4e30]])).tolist()
    [[5e+30]]
    """
    x, y = as_float32(x), as_float32(y)
    size = jnp.maximum(jnp.max(jnp.abs(x)), jnp.max(jnp.abs(y)))
    scale = lax.stop_gradient(jnp.where(size > 0.0, size, 1.0))
    squares = jnp.sum(jnp.square(x[:, None] / scale - y[None] / scale), axis=2)
    apart = squares > 0.0  # the root has no derivative at 0
    return scale * jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)


@typed
def k_medoids(
    x: Float[ArrayLike, "n d"], *, num_medoids: int = 100
) -> Int[Array, " num_medoids"]:
    """Which points stand for all of them: k-medoids, without random numbers.

    It starts at the points with the smallest sum of distances to all others. Then in
    turn each point joins its nearest medoid, and each cluster's member with the
    smallest sum of distances to the others becomes its medoid, until none changes.

    Args:
        x: points, `[N, D]`; memory is N^2.
        num_medoids: K, 1..N.

    Returns:
        K indices into `x`.

    Raises:
        ValueError: `num_medoids` is not in 1..N.

    >>> x = jnp.array([[0.0], [1.0], [2.0], [9.0], [10.0], [11.0]])
    >>> sorted(k_medoids(x, num_medoids=2).tolist())
    [1, 4]
    """
    check_range("num_medoids", num_medoids, low=1, high=jnp.shape(x)[0])
    distance = distances(x, x)
    columns = jnp.arange(num_medoids)

    def nearer(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        medoids, _ = carry
        belongs = jnp.argmin(distance[:, medoids], axis=1)
        member = belongs[:, None] == columns[None]
        cost = jnp.where(member, distance @ member.astype(distance.dtype), jnp.inf)
        best = jnp.argmin(cost, axis=0)
        better = cost[best, columns] < cost[medoids, columns]
        return jnp.where(better, best, medoids), jnp.any(better)

    start = jnp.argsort(jnp.sum(distance, axis=1))[:num_medoids]
    return lax.while_loop(lambda carry: carry[1], nearer, (start, jnp.array(True)))[0]


def _two_samples(key: Array):
    x, y = jax.random.normal(key, (2, 8, 3))
    return x, 0.5 * y + 1.0


EXAMPLES = {
    distances: lambda key: (_two_samples(key), {}),
    k_medoids: lambda key: ((jax.random.normal(key, (8, 3)),), {"num_medoids": 3}),
}
