"""Stochastic-gradient Markov chains: samples from exp(-U) by noisy gradients of U.

U is a potential in nats, such as -log p(data, parameters); its gradient may be
estimated on a batch, scaled to the whole data. Positions are any pytree of arrays.
Many chains are a `vmap` over keys and states.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxzoo.core.typed import as_float32, check_range, typed

__all__ = ["SGHMCState", "init_sghmc", "sghmc_step", "sgld_step"]


class SGHMCState(NamedTuple):
    """Where a chain is, and what it has learned of the gradient's scale.

    `momentum` is the last move. `window`, `mean` and `square` are per entry: over how
    many steps gradients are averaged, their mean, and the mean of their squares.
    """

    position: Any
    momentum: Any
    window: Any
    mean: Any
    square: Any


@typed
def sgld_step(
    key: Key[Array, ""],
    position: Any,
    gradient: Any,
    *,
    step_size: float | Float[Array, ""],
    temperature: float | Float[Array, ""] = 1.0,
) -> Any:
    """One step of stochastic-gradient Langevin dynamics (Welling and Teh 2011, eq. 4).

    x <- x - step_size dU/dx + sqrt(2 step_size temperature) N(0, I)

    Args:
        key: a typed key.
        position: pytree of float arrays.
        gradient: dU/dx at `position`, of the same structure and shapes.
        step_size: > 0; the bias of the chain's distribution falls with it.
        temperature: >= 0: samples of exp(-U / temperature), 0 descends.

    Returns:
        The next position, float32, structured like `position`.

    Raises:
        TypeError: `position` is no tree of float arrays, or `gradient` differs from it.
        ValueError: a number is out of range; names it.

    >>> x = jnp.array([1.0, -2.0])
    >>> sgld_step(jax.random.key(0), x, x, step_size=0.1, temperature=0.0).tolist()
    [0.9, -1.8]
    """
    check_range("step_size", step_size, above=0.0)
    check_range("temperature", temperature, low=0.0)
    position = _floats("position", position)
    gradient = _floats("gradient", gradient, position)
    scale = jnp.sqrt(2.0 * as_float32(step_size) * temperature)
    noise = _normal_like(key, position)
    return jax.tree.map(
        lambda x, g, n: x - step_size * g + scale * n, position, gradient, noise
    )


@typed
def init_sghmc(position: Any) -> SGHMCState:
    """A chain at rest, for `sghmc_step`.

    Args:
        position: pytree of float arrays.

    Returns:
        The state: momentum 0, and a scale of the gradient of 1.

    Raises:
        TypeError: `position` is no tree of float arrays.

    >>> init_sghmc(jnp.ones(2)).momentum.tolist()
    [0.0, 0.0]
    """
    position = _floats("position", position)
    zeros, ones = (jax.tree.map(f, position) for f in (jnp.zeros_like, jnp.ones_like))
    return SGHMCState(position, zeros, ones, ones, ones)


@typed
def sghmc_step(
    key: Key[Array, ""],
    state: SGHMCState,
    gradient: Any,
    *,
    step_size: float | Float[Array, ""],
    friction: float | Float[Array, ""] = 0.05,
    temperature: float | Float[Array, ""] = 1.0,
    adapt: bool = False,
) -> SGHMCState:
    """One step of stochastic-gradient Hamiltonian Monte Carlo.

    v <- (1 - friction) v - step_size^2 m dU/dx
         + step_size sqrt(2 friction m temperature) N(0, I)
    x <- x + v,   m = 1 / sqrt(square)

    Chen et al. (2014, eq. 15, with eta = step_size^2 and alpha = friction), with the
    scale of Springenberg et al. (2016): `square` is the mean of squared gradients over
    a window that grows where gradients are noise. The noise of a batch's gradient is
    not subtracted.

    Args:
        key: a typed key.
        state: from `init_sghmc` or the last step.
        gradient: dU/dx at `state.position`, of the same structure and shapes.
        step_size: > 0, in units of the position, times the gradient's scale if adapted.
        friction: in (0, 1]; 1 forgets the momentum at once, which is Langevin dynamics
            with a step of step_size^2.
        temperature: >= 0: samples of exp(-U / temperature), 0 descends.
        adapt: follow the gradient's scale; for a burn-in, since a chain that changes
            its own scale does not keep the distribution.

    Returns:
        The next state.

    Raises:
        TypeError: `gradient` differs from the position.
        ValueError: a number is out of range; names it.

    >>> state = init_sghmc(jnp.array([1.0]))
    >>> cold = {"step_size": 0.5, "friction": 0.1, "temperature": 0.0}
    >>> state = sghmc_step(jax.random.key(0), state, state.position, **cold)
    >>> state.position.tolist(), state.momentum.tolist()
    ([0.75], [-0.25])
    """
    check_range("step_size", step_size, above=0.0)
    check_range("friction", friction, above=0.0, high=1.0)
    check_range("temperature", temperature, low=0.0)
    gradient = _floats("gradient", gradient, state.position)
    gradient = jax.tree.map(lambda g: jnp.clip(g, -1e15, 1e15), gradient)
    window, mean, square = state.window, state.mean, state.square
    if adapt:
        rate = jax.tree.map(lambda w: 1.0 / (w + 1.0), window)
        window = jax.tree.map(
            lambda w, g, s: 1.0 + w * (1.0 - jnp.square(g) / s), window, mean, square
        )
        mean = jax.tree.map(lambda r, m, g: m + r * (g - m), rate, mean, gradient)
        square = jax.tree.map(
            # Above 0, where a gradient has always been 0.
            lambda r, s, g: jnp.maximum(s + r * (jnp.square(g) - s), 1e-16),
            rate, square, gradient,
        )  # fmt: skip
    step_size, friction = as_float32(step_size), as_float32(friction)
    refreshed = 2.0 * friction * temperature
    momentum = jax.tree.map(
        lambda v, g, s, n: (1.0 - friction) * v
        - jnp.square(step_size) * g / jnp.sqrt(s)
        + step_size * jnp.sqrt(refreshed / jnp.sqrt(s)) * n,
        state.momentum, gradient, square, _normal_like(key, gradient),
    )  # fmt: skip
    position = jax.tree.map(jnp.add, state.position, momentum)
    return SGHMCState(position, momentum, window, mean, square)


def _floats(argument: str, tree: Any, like: Any = None) -> Any:
    """The tree in float32, after a look at its leaves and their shapes."""
    leaves = jax.tree.leaves(tree)
    is_fine = bool(leaves) and all(
        isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        for x in leaves
    )
    if not is_fine:
        raise TypeError(
            f"argument '{argument}' is {type(tree).__name__}, expected a pytree of "
            "float arrays."
        )
    if like is not None:
        shapes, wanted = (jax.tree.map(jnp.shape, t) for t in (tree, like))
        if shapes != wanted:
            raise TypeError(
                f"argument '{argument}' has shapes {shapes}, expected {wanted}."
            )
    return jax.tree.map(as_float32, tree)


def _normal_like(key: Array, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return structure.unflatten(
        [jax.random.normal(k, x.shape, x.dtype) for k, x in pairs]
    )


def _langevin_example(key: Array):
    position, gradient = jax.random.normal(key, (2, 8, 2))
    return (key, position, gradient), {"step_size": 0.1}


def _hamiltonian_example(key: Array):
    position, gradient = jax.random.normal(key, (2, 8, 2))
    knobs = {"step_size": 0.1, "friction": 0.2, "adapt": True}
    return (key, init_sghmc(position), gradient), knobs


EXAMPLES = {
    sgld_step: _langevin_example,
    init_sghmc: lambda key: ((jax.random.normal(key, (8, 2)),), {}),
    sghmc_step: _hamiltonian_example,
}
