"""Entropic optimal transport between samples, differentiated at its fixed point.

Rows are points; every point of a sample has equal weight. Everything takes any float
dtype and computes in float32 (float64 where x64 is on).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxzoo.core.divergences import squared_distances
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["sinkhorn", "sinkhorn_divergence"]


@typed
def sinkhorn(
    cost: Float[ArrayLike, "n m"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 0.1,
    num_iterations: int = 200,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Entropic optimal transport between equal weights (Cuturi 2013), in log-space.

    OT = min over couplings P of <P, cost> + epsilon KL(P || 1/(N M))

    with the rows of P summing to 1/N and its columns to 1/M. Iterations scale rows
    and columns in turn. Gradients do not go through them: the fixed point is
    differentiated implicitly, so that they are those of the converged solution at the
    cost of one linear system of N unknowns.

    Args:
        cost: `[N, M]`, such as `squared_distances(x, y)`.
        epsilon: strength of the entropy, > 0, in the unit of `cost`. Iterations needed
            grow as max(cost) / epsilon.
        num_iterations: how often rows and columns are scaled, > 0.

    Returns:
        `(value, aux)`: OT, a float32 scalar in the unit of `cost`, and "plan" `[N, M]`,
        "row_potential" `[N]` with mean 0, "column_potential" `[M]`, "error": by how
        much the rows' weights are missed in total, 0 when converged.

    Raises:
        ValueError: `epsilon` or `num_iterations` is not positive.

    >>> value, aux = sinkhorn(jnp.array([[0.0, 1.0], [1.0, 0.0]]))
    >>> float(value), aux["plan"].tolist()
    (0.0693, [[0.5, 0.0], [0.0, 0.5]])
    """
    check_range("epsilon", epsilon, above=0.0)
    check_range("num_iterations", num_iterations, low=1)
    cost, epsilon = jnp.clip(as_float32(cost), -1e18, 1e18), as_float32(epsilon)
    log_n, log_m = (math.log(size) for size in cost.shape)

    def columns(f: Array) -> Array:
        return -epsilon * (jax.nn.logsumexp((f[:, None] - cost) / epsilon, 0) - log_n)

    def rows(g: Array) -> Array:
        return -epsilon * (jax.nn.logsumexp((g[None] - cost) / epsilon, 1) - log_m)

    def change(f: Array) -> Array:
        # Potentials are free up to a constant: with mean 0 the solution is one.
        scaled = rows(columns(f))
        return f - (scaled - jnp.mean(scaled))

    def solve(change: Callable[[Array], Array], start: Array) -> Array:
        def step(f: Array, _: None) -> tuple[Array, None]:
            return f - change(f), None

        return jax.lax.scan(step, start, None, num_iterations)[0]

    def solve_linear(linear: Callable[[Array], Array], y: Array) -> Array:
        # The ridge is for plans so sharp that rows and columns hold each other alone.
        matrix = jax.jacobian(linear)(y)
        ridge = 10.0 * jnp.finfo(y.dtype).eps * jnp.eye(len(y), dtype=y.dtype)
        return jnp.linalg.solve(matrix + ridge, y)

    f = jax.lax.custom_root(change, jnp.zeros(cost.shape[0]), solve, solve_linear)
    g = columns(f)
    log_plan = (f[:, None] + g[None] - cost) / epsilon - log_n - log_m
    plan = jnp.exp(jnp.minimum(log_plan, 0.0))  # rounding apart it is
    # The dual: at the fixed point its derivative in f and g is 0.
    value = jnp.mean(f) + jnp.mean(g)
    error = jnp.sum(jnp.abs(jnp.sum(plan, axis=1) - 1.0 / cost.shape[0]))
    aux = {"plan": plan, "row_potential": f, "column_potential": g, "error": error}
    return value, aux


@typed
def sinkhorn_divergence(
    x: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "m d"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 0.1,
    num_iterations: int = 200,
) -> Float[Array, ""]:
    """Entropic transport without its bias (Genevay et al. 2018), squared distances.

    S(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2

    Args:
        x: points, `[N, D]`.
        y: points, `[M, D]`.
        epsilon: strength of the entropy, > 0, in squared units of the points.
        num_iterations: see `sinkhorn`.

    Returns:
        S >= 0, 0 for equal samples, a float32 scalar: W_2^2 for small `epsilon`, half
        an MMD^2 for large.

    Raises:
        ValueError: `epsilon` or `num_iterations` is not positive.

    >>> x = jnp.array([[0.0], [1.0]])
    >>> round(float(sinkhorn_divergence(x, x)), 6), float(sinkhorn_divergence(x, x + 2))
    (0.0, 4.0)
    """
    x, y = as_float32(x), as_float32(y)

    def transport(a: Array, b: Array) -> Array:
        cost = squared_distances(a, b)
        return sinkhorn(cost, epsilon=epsilon, num_iterations=num_iterations)[0]

    return transport(x, y) - 0.5 * (transport(x, x) + transport(y, y))


def _two_samples(key: Array):
    x, y = jax.random.normal(key, (2, 8, 3))
    return x, 0.5 * y + 1.0


def _cost_example(key: Array):
    return (squared_distances(*_two_samples(key)),), {"epsilon": 1.0}


EXAMPLES = {
    sinkhorn: _cost_example,
    sinkhorn_divergence: lambda key: (_two_samples(key), {"epsilon": 1.0}),
}
