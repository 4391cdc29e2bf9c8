"""Gradient variance of black-box variational inference: exact on quadratics, bounded.

A location-scale family z = C u + m, u with mean 0, variance 1 and kurtosis k in each
coordinate, is fitted to an energy f by stochastic gradients of

    F = E f(C u + m) - sum_i log C_ii,   g = 1/M sum_m grad f(C u_m + m) - grad entropy

where C is as in `jaxzoo.nn.location_scale`. For f(z) = (z - c)' H (z - c) / 2 with
mu <= H <= L everything has a closed form, and E |g|^2 has bounds on both sides: what is
paid for correlations is a factor of the dimension. In terms of F - F* this is the ABC
condition E |g|^2 <= 2 A (F - F*) + B |grad F|^2 + C of stochastic optimization.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed
from jaxzoo.nn.location_scale import (
    LIMIT,
    Conditioner,
    location_scale,
    log_scale,
    scale_matrix,
    scale_slope,
)

PAPER = {
    "slug": "bbvi_gradvar",
    "title": "Practical and Matching Gradient Variance Bounds for Black-Box "
    "Variational Bayesian Inference",
    "arxiv": "2303.10472",
    "year": 2023,
    "authors": "Kyurae Kim, Kaiwen Wu, Jisu Oh, Jacob R. Gardner",
    "where": "The location-scale family with linear and nonlinear conditioners, the "
    "ABC condition, and its upper and lower bounds, on quadratics.",
    "differs": "Both bounds are derived anew, for quadratic energies, where symmetric "
    "noise makes everything a finite sum: they are tighter than the paper's, which "
    "hold for all smooth energies and whose factor for mean-field grows like "
    "sqrt(d), where here it has no dimension. A triangle has half of the entries of a "
    "square, so the Cholesky exponent is 1 in large dimensions only (0.93 from 16 to "
    "512). The distance is that from the mode with no spread, as in the bounds: from "
    "the optimum, whose spread grows with d, also mean-field's E |g|^2 grows. A, B and "
    "C are fitted to random parameters, not those of a theorem. Convergence rates of "
    "stochastic descent, and data sets, are left out.",
}

__all__ = [
    "abc_fit",
    "second_moment_bounds",
    "second_moment_estimate",
    "second_moment_quadratic",
]


@typed
def second_moment_quadratic(
    precision: Float[ArrayLike, "d d"],
    offset: Float[ArrayLike, " d"],
    diagonal: Float[ArrayLike, " d"],
    lower: Float[ArrayLike, "d d"] | None = None,
    *,
    num_samples: int = 1,
    kurtosis: float = 3.0,
    conditioner: Conditioner = "softplus",
    with_entropy: bool = True,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """E |g|^2 of the gradient in (m, s, lower), in closed form for a quadratic energy.

    With a = H (m - c), A = H C and row sums over the entries of C that are parameters,

        Var_1 = |A|^2 + sum_ij P_ij (a_i^2 + |A_i|^2 + (k - 2) A_ij^2)
        E |g|^2 = |grad F|^2 + Var_1 / M,   P_ij = phi'(s_i)^2 on the diagonal, else 1

    Args:
        precision: H, symmetric, `[d, d]`.
        offset: m - c, from the mode to the location, `[d]`.
        diagonal: s, `[d]`.
        lower: as in `location_scale`; None: mean-field.
        num_samples: M, of which g is the mean.
        kurtosis: k = E u^4 of the noise, >= 1; 3 for a Gaussian, 1.8 if uniform.
        conditioner: phi.
        with_entropy: g is that of F, the entropy's exact; otherwise of E f.

    Returns:
        `(value, aux)`: E |g|^2; in aux "variance" of g, "gradient_squared" |E g|^2, and
        "objective": F up to a constant, or E f.

    Raises:
        ValueError: a number is out of range.

    >>> one = jnp.ones(1)  # f = z^2 / 2, z = u: the gradient in m is u, in s u^2 - 1
    >>> args = jnp.eye(1), 0 * one, one
    >>> value, aux = second_moment_quadratic(*args, conditioner="linear")
    >>> float(value), float(aux["gradient_squared"])
    (3.0, 0.0)
    """
    check_range("num_samples", num_samples, low=1)
    check_range("kurtosis", kurtosis, low=1.0, below=float("inf"))
    precision, offset = _clipped(precision), _clipped(offset)
    scale = scale_matrix(diagonal, lower, conditioner=conditioner)
    push, pull = precision @ offset, precision @ scale  # a and A
    slope = jnp.diag(scale_slope(diagonal, conditioner=conditioner))
    free = slope if lower is None else slope + jnp.tril(jnp.ones_like(scale), -1)
    rows = jnp.square(push) + jnp.sum(jnp.square(pull), axis=1)
    each = rows[:, None] + (kurtosis - 2.0) * jnp.square(pull)
    variance = jnp.sum(jnp.square(pull)) + jnp.sum(jnp.square(free) * each)
    variance /= num_samples

    logs, slopes = log_scale(diagonal, conditioner=conditioner)
    energy = 0.5 * (offset @ push + jnp.sum(scale * pull))
    objective = energy - with_entropy * jnp.sum(logs)
    mean = free * pull - with_entropy * jnp.diag(slopes)
    squared = jnp.sum(jnp.square(push)) + jnp.sum(jnp.square(mean))
    aux = {"variance": variance, "gradient_squared": squared, "objective": objective}
    return squared + variance, aux


@typed
def second_moment_bounds(
    precision: Float[ArrayLike, "d d"],
    offset: Float[ArrayLike, " d"],
    diagonal: Float[ArrayLike, " d"],
    lower: Float[ArrayLike, "d d"] | None = None,
    *,
    num_samples: int = 1,
    kurtosis: float = 3.0,
    conditioner: Conditioner = "softplus",
    with_entropy: bool = True,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What E |g|^2 lies between, by the distance and the extreme curvatures alone.

        |grad F|^2 + mu^2 D^2 / M  <=  E |g|^2  <=  |grad F|^2 + L^2 K D^2 / M

    D^2 = |m - c|^2 + |C|^2, K = max(k, 2) for mean-field, d + max(k, 2) - 1 otherwise.
    Where phi is not linear the scale may be stuck, and |C|^2 is in the place of the D^2
    on the left. The right side wants |phi'| <= 1: not "exp".

    Gradient: of all but the curvatures, which count as given.

    Args:
        precision: H > 0, symmetric, `[d, d]`; the rest as in `second_moment_quadratic`.
        offset: m - c.
        diagonal: s.
        lower: the rest of C, or None.
        num_samples: M.
        kurtosis: k, >= 1.
        conditioner: phi.
        with_entropy: g is that of F.

    Returns:
        The two sides. Infinity is the right one of "exp".

    Raises:
        ValueError: a number is out of range.

    >>> args = jnp.eye(1), jnp.zeros(1), jnp.ones(1)
    >>> low, high = second_moment_bounds(*args, conditioner="linear")
    >>> float(low), float(high)
    (1.0, 3.0)
    """
    _, aux = second_moment_quadratic(
        precision, offset, diagonal, lower, num_samples=num_samples, kurtosis=kurtosis,
        conditioner=conditioner, with_entropy=with_entropy,
    )  # fmt: skip
    precision, offset = _clipped(precision), _clipped(offset)
    scale = scale_matrix(diagonal, lower, conditioner=conditioner)
    curvature = jnp.linalg.eigvalsh(jax.lax.stop_gradient(precision))
    size = jnp.sum(jnp.square(scale))
    distance = size + jnp.sum(jnp.square(offset))
    factor = max(kurtosis, 2.0) + (0 if lower is None else len(scale) - 1)
    least = distance if conditioner == "linear" else size
    low = jnp.square(curvature[0]) * least / num_samples
    high = factor * jnp.square(curvature[-1]) * distance / num_samples
    high = jnp.inf * jnp.ones_like(high) if conditioner == "exp" else high
    return aux["gradient_squared"] + low, aux["gradient_squared"] + high


@typed
def second_moment_estimate(
    key: Key[Array, ""],
    energy: Callable[[Array], Array],
    location: Float[ArrayLike, " d"],
    diagonal: Float[ArrayLike, " d"],
    lower: Float[ArrayLike, "d d"] | None = None,
    *,
    num_draws: int = 1000,
    num_samples: int = 1,
    conditioner: Conditioner = "softplus",
    with_entropy: bool = True,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """E |g|^2 for any energy, by draws of the gradient with Gaussian noise.

    Args:
        key: a typed key, consumed.
        energy: z `[d]` to f, a scalar: minus the log of the joint density.
        location: m, `[d]`.
        diagonal: s, `[d]`.
        lower: as in `location_scale`.
        num_draws: of g, >= 2.
        num_samples: M, the samples in each.
        conditioner: phi.
        with_entropy: g is that of F, the entropy's exact; otherwise of E f.

    Returns:
        `(estimate, aux)`: the mean of |g|^2; in aux its "stderr", and without bias, so
        that they may be below 0, "gradient_squared", |E g|^2, and "variance".

    Raises:
        ValueError: a number is out of range.

    >>> energy, one = lambda z: 0.5 * jnp.sum(z * z), jnp.ones(1)
    >>> args = jax.random.key(0), energy, 0 * one, one
    >>> value, aux = second_moment_estimate(*args, num_draws=9999, conditioner="linear")
    >>> abs(float(value) - 3.0) < 4 * float(aux["stderr"])
    True
    """
    check_range("num_draws", num_draws, low=2)
    check_range("num_samples", num_samples, low=1)
    params = {"location": _clipped(location), "diagonal": _clipped(diagonal)}
    if lower is not None:
        params["lower"] = _clipped(lower)

    def objective(params: Any, u: Array) -> Array:
        z = location_scale(u, **params, conditioner=conditioner)
        logs, _ = log_scale(params["diagonal"], conditioner=conditioner)
        return jnp.mean(jax.vmap(energy)(z)) - with_entropy * jnp.sum(logs)

    def draw(key: Array) -> Array:
        shape, dtype = (num_samples, len(diagonal)), params["location"].dtype
        gradient = jax.grad(objective)(params, jax.random.normal(key, shape, dtype))
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])

    gradients = jax.lax.map(draw, jax.random.split(key, num_draws), batch_size=256)
    squares = jnp.sum(jnp.square(gradients), axis=1)
    value, mean = jnp.mean(squares), jnp.mean(gradients, axis=0)
    spread = jnp.mean(jnp.sum(jnp.square(gradients - mean[None]), axis=1))
    variance = spread * num_draws / (num_draws - 1)
    error = jax.lax.stop_gradient(jnp.std(squares, ddof=1)) / num_draws**0.5
    aux = {"stderr": error, "variance": variance, "gradient_squared": value - variance}
    return value, aux


@typed
def abc_fit(
    second_moment: Float[ArrayLike, " points"],
    gap: Float[ArrayLike, " points"],
    gradient_squared: Float[ArrayLike, " points"],
) -> tuple[Float[Array, " 3"], dict[str, Array]]:
    """The ABC condition of a set of points: an upper and a lower bound of one form.

    low (2 A gap + B |grad F|^2 + C)  <=  E |g|^2  <=  2 A gap + B |grad F|^2 + C

    A, B, C >= 0 by least squares of the ratio to E |g|^2, then scaled until the right
    side holds at every point; `low` is the largest number for which the left one does.

    Args:
        second_moment: E |g|^2 > 0 at different parameters, `[points]`.
        gap: F - F* >= 0 at them, likewise.
        gradient_squared: |grad F|^2, likewise.

    Returns:
        `(coefficients, aux)`: A, B and C, `[3]`, those of a tie with the fewest; in aux
        "low" in [0, 1], 1 if both sides meet, and "per_example", the right, `[points]`.

    >>> gap, squared = jnp.array([1.0, 2.0, 4.0, 1.0]), jnp.array([1.0, 3.0, 2.0, 5.0])
    >>> found, aux = abc_fit(6.0 * gap + squared + 2.0, gap, squared)
    >>> found.round(3).tolist(), float(aux["low"].round(3))
    ([3.0, 1.0, 2.0], 1.0)
    """
    columns = [2.0 * as_float32(gap), as_float32(gradient_squared)]
    columns += [jnp.ones_like(columns[0]), as_float32(second_moment)]
    table = jnp.stack(columns, axis=1)
    # In units of the largest of each column: squares neither vanish nor overflow.
    sizes = jax.lax.stop_gradient(jnp.max(jnp.abs(table), axis=0))
    sizes = jnp.where(sizes > 0.0, sizes, 1.0)
    target = table[:, 3] / sizes[3]
    target = jnp.where(target > 1e-12, target, 1.0)
    rows = table[:, :3] / sizes[None, :3] / target[:, None]
    gram, right = rows.T @ rows / len(rows), jnp.mean(rows, axis=0)

    def solved(used: Array) -> tuple[Array, Array]:
        # Least squares of some of the columns; the others have coefficients of 0.
        matrix = used[:, None] * used[None] * gram + jnp.diag(1.0 - used + 1e-7)
        found = jnp.maximum(used * jnp.linalg.solve(matrix, used * right), 0.0)
        return found, jnp.mean(jnp.square(rows @ found - 1.0))

    sets = jnp.array([[i >> j & 1 for j in range(3)] for i in range(1, 8)], rows.dtype)
    found, errors = jax.vmap(solved)(sets)
    best = found[jnp.argmin(errors)]
    ratios = rows @ best
    coefficients = sizes[3] * (best / jnp.min(ratios) / sizes[:3])
    low = jnp.min(ratios) / jnp.max(ratios)
    return coefficients, {"low": low, "per_example": table[:, :3] @ coefficients}


def _clipped(x: ArrayLike) -> Array:
    return jnp.clip(as_float32(x), -LIMIT, LIMIT)


def _quadratic(key: Array):
    root, lower = jax.random.normal(key, (2, 8, 8))
    offset, diagonal = jax.random.normal(jax.random.fold_in(key, 1), (2, 8))
    return root @ root.T / 8.0 + jnp.eye(8), offset, diagonal, lower


EXAMPLES = {
    second_moment_quadratic: lambda key: (_quadratic(key), {"num_samples": 3}),
    second_moment_bounds: lambda key: (_quadratic(key), {"kurtosis": 1.8}),
    second_moment_estimate: lambda key: (
        (key, lambda z: 0.5 * jnp.sum(jnp.square(z)), *_quadratic(key)[1:]),
        {"num_draws": 16, "num_samples": 2},
    ),
    abc_fit: lambda key: ((*jax.random.uniform(key, (3, 8), minval=0.1),), {}),
}
