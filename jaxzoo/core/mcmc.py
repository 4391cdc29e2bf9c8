"""Markov chains that keep a distribution: Hamiltonian Monte Carlo and Metropolis.

Positions are rows, `[B, D]`, one chain each. A density is known up to a constant, as a
function of all rows at once; of Metropolis nothing but its ratio between two points is
asked. Chains by noisy gradients are in `jaxzoo.core.sgmcmc`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["hmc", "metropolis"]


@typed
def hmc(
    key: Key[Array, ""],
    log_density: Callable[[Array], Array],
    start: Float[ArrayLike, "batch dim"],
    *,
    num_steps: int = 100,
    num_leapfrog: int = 10,
    step_size: float | Float[Array, ""] = 0.01,
) -> tuple[Float[Array, "batch dim"], dict[str, Array]]:
    """Hamiltonian Monte Carlo with unit masses (Neal 2011, section 3).

    Momenta N(0, I); a proposal is accepted with probability min(1, exp(H_old - H_new)),
    H = -log_density(z) + ||momentum||^2 / 2

    Args:
        key: of momenta and acceptances.
        log_density: log p up to a constant, `[B, D]` to `[B]`, row by row.
        start: where chains begin, `[B, D]`.
        num_steps: proposals per chain, >= 1.
        num_leapfrog: leapfrog steps per proposal, >= 1.
        step_size: of a leapfrog step, > 0, in the unit of `start`.

    Returns:
        `(z, aux)`: the last states, float32; aux holds "acceptance" per chain, `[B]`.

    Raises:
        ValueError: a number is out of range.

    Gradient: the identity in `start`; forces and acceptances are constants.

    >>> z, _ = hmc(
    ...     jax.random.key(0), lambda z: -jnp.sum(jnp.square(z - 1.0), axis=1),
    ...     jnp.zeros((2000, 1)), num_steps=20, step_size=0.1,
    ... )
    >>> abs(float(z.mean()) - 1.0) < 0.05, abs(float(z.var()) - 0.5) < 0.05
    (True, True)
    """
    check_range("num_steps", num_steps, low=1)
    check_range("num_leapfrog", num_leapfrog, low=1)
    check_range("step_size", step_size, above=0.0)
    start = as_float32(start)
    force = jax.grad(lambda z: jnp.sum(log_density(z)))

    def leap(state: tuple[Array, Array], _: None) -> Any:
        z, half = state[0], state[1] + 0.5 * step_size * force(state[0])
        z = z + step_size * half
        return (z, half + 0.5 * step_size * force(z)), None

    def step(z: Array, key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key)
        before = jax.random.normal(keys[0], z.shape, z.dtype)
        (new, after), _ = lax.scan(leap, (z, before), None, num_leapfrog)
        kinetic = 0.5 * jnp.sum(jnp.square(before) - jnp.square(after), axis=1)
        gain = log_density(new) - log_density(z) + kinetic
        return _accept(keys[1], z, new, gain)

    keys = jax.random.split(key, num_steps)
    z, accepted = lax.scan(step, lax.stop_gradient(start), keys)
    z, acceptance = lax.stop_gradient((z, jnp.mean(accepted, axis=0)))
    # An exact zero that carries the gradient.
    return z + (start - lax.stop_gradient(start)), {"acceptance": acceptance}


@typed
def metropolis(
    key: Key[Array, ""],
    log_ratio: Callable[[Array, Array], Array],
    start: Float[ArrayLike, "batch dim"],
    *,
    num_steps: int = 100,
    step_size: float | Float[Array, ""] = 0.5,
) -> tuple[Float[Array, "batch dim"], dict[str, Array]]:
    """Metropolis' chains with Gaussian proposals, by nothing but ratios of a density.

    y = x + step_size e,  e ~ N(0, I);  x <- y with probability min(1, p(y) / p(x))

    Args:
        key: of proposals and acceptances.
        log_ratio: (x, y) to log p(y) - log p(x), two `[B, D]` to `[B]`, row by row.
        start: where chains begin, `[B, D]`.
        num_steps: proposals per chain, >= 1.
        step_size: standard deviation of proposals, > 0, in the unit of `start`.

    Returns:
        `(x, aux)`: the last states, float32; aux holds "acceptance" per chain, `[B]`,
        and over all chains and the second half of the steps "mean" `[D]` and
        "second_moment" `[D, D]`. In the moments entries beyond 1e15 count as 1e15.

    Raises:
        ValueError: a number is out of range.

    Gradient: the identity in `start`; acceptances and moments are constants.

    >>> def log_ratio(x, y):  # of N(0, 1)
    ...     return 0.5 * jnp.sum(x**2 - y**2, axis=1)
    >>> key, start = jax.random.key(0), jnp.zeros((500, 1))
    >>> _, aux = metropolis(key, log_ratio, start, step_size=2.0)
    >>> abs(float(aux["second_moment"][0, 0]) - 1.0) < 0.05
    True
    """
    check_range("num_steps", num_steps, low=1)
    check_range("step_size", step_size, above=0.0)
    start = as_float32(start)

    def step(x: Array, key: Array) -> Any:
        keys = jax.random.split(key)
        y = x + step_size * jax.random.normal(keys[0], x.shape, x.dtype)
        x, accepted = _accept(keys[1], x, y, log_ratio(x, y))
        near = jnp.clip(x, -1e15, 1e15)
        return x, (accepted, jnp.mean(near, axis=0), near.T @ near / len(x))

    keys = jax.random.split(key, num_steps)
    x, (accepted, mean, second) = lax.stop_gradient(
        lax.scan(step, lax.stop_gradient(start), keys)
    )
    half = num_steps // 2
    return x + (start - lax.stop_gradient(start)), {
        "acceptance": jnp.mean(accepted, axis=0),
        "mean": jnp.mean(mean[half:], axis=0),
        "second_moment": jnp.mean(second[half:], axis=0),
    }


def _accept(key: Array, old: Array, new: Array, gain: Array) -> tuple[Array, Array]:
    """Rows of `new` with probability exp(gain), of `old` otherwise; and which, as 0/1.

    A gain that is no number is refused.
    """
    uniform = jax.random.uniform(key, (len(old),), old.dtype)
    accepted = jnp.log(uniform) < gain
    return jnp.where(accepted[:, None], new, old), accepted.astype(old.dtype)


def _well(z: Array) -> Array:
    return -jnp.sum(jnp.sqrt(1.0 + jnp.square(jnp.clip(z, -1e15, 1e15))), axis=1)


def _well_ratio(x: Array, y: Array) -> Array:
    return _well(y) - _well(x)


def _example(key: Array, function: Callable[..., Array]):
    return jax.random.fold_in(key, 1), function, jax.random.normal(key, (8, 3))


EXAMPLES = {
    hmc: lambda key: (
        _example(key, _well),
        {"num_steps": 2, "num_leapfrog": 2, "step_size": 0.5},
    ),
    metropolis: lambda key: (_example(key, _well_ratio), {"num_steps": 4}),
}
