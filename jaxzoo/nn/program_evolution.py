"""Regularised evolution of update rules: mutated programs compete on a cheap task.

    best, aux = evolve(key, fitness, **start._asdict())      # fitness: less is better

Programs are those of `jaxzoo.nn.update_programs`. All is one `lax.scan`, which
`jax.vmap` over keys runs several times.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed
from jaxzoo.nn.update_programs import (
    CONSTANT,
    FUNCTIONS,
    LION,
    PADDING,
    Program,
    simplify,
)

__all__ = ["evolve"]


@typed
def evolve(
    key: Key[Array, ""],
    fitness: Callable[..., Any],
    *,
    code: Int[ArrayLike, "statements 4"],
    constants: Float[ArrayLike, " statements"],
    population: int = 100,
    tournament: int = 10,
    children: int = 1000,
) -> tuple[Program, dict[str, Array]]:
    """Regularised evolution: the best of a few has a mutated child, the oldest dies.

    A new statement is drawn evenly, its constant from N(0, 1); a modified one gets
    another argument, or its constant times 2^N(0, 1). A child whose hash was seen
    before is not evaluated again.

    Args:
        key: a typed key.
        fitness: `Program -> scalar`, less is better, NaN is worst; traced once.
        code: of the program that all begin with.
        constants: of that program.
        population: programs alive.
        tournament: of which the best is the parent.
        children: how many are born.

    Returns:
        `(program, aux)`: the best one ever, simplified. aux holds the last population,
        "code", "constants" and "fitness"; "best" `[children]`, the best fitness so far;
        and "evaluated", the number of programs that were.

    >>> fitness = lambda program: jnp.abs(program.constants.sum() - 3.0)
    >>> best, aux = evolve(jax.random.key(0), fitness, **LION._asdict())
    >>> bool(fitness(best) < 0.1), int(aux["evaluated"]) < 1001
    (True, True)
    """
    check_range("population", population, low=1)
    check_range("tournament", tournament, low=1)
    check_range("children", children, low=1)

    def score(program: Program) -> Array:
        value = jnp.asarray(fitness(program), jnp.float32)
        return jnp.where(jnp.isnan(value), jnp.inf, value)

    def step(carry: Any, told: Any) -> Any:
        pool, values, hashes, known, best, least = carry
        (pick, change), t = jax.random.split(told[0]), told[1]
        some = jax.random.randint(pick, (tournament,), 0, population)
        parent = some[jnp.argmin(values[some])]
        child = _mutate(change, pool.code[parent], pool.constants[parent])
        plain, aux = simplify(*child)
        # Hashes that are not yet there have the fitness NaN.
        same = jnp.all(hashes == aux["hash"][None], axis=1) & ~jnp.isnan(known)
        old = jnp.any(same)
        value = lax.cond(old, lambda: known[jnp.argmax(same)], lambda: score(plain))
        hashes, known = hashes.at[t].set(aux["hash"]), known.at[t].set(value)
        pool = jax.tree.map(lambda x, y: x.at[t % population].set(y), pool, child)
        values = values.at[t % population].set(value)
        best = jax.tree.map(lambda x, y: jnp.where(value < least, y, x), best, plain)
        least = jnp.minimum(value, least)
        return (pool, values, hashes, known, best, least), (least, ~old)

    start = Program(jnp.asarray(code, jnp.int32), as_float32(constants))
    first, aux = simplify(*start)
    value, slots = score(first), children + 1
    pool = jax.tree.map(lambda x: jnp.stack([x] * population), start)
    hashes = jnp.zeros((slots, 2), jnp.uint32).at[0].set(aux["hash"])
    known = jnp.full(slots, jnp.nan).at[0].set(value)
    carry = (pool, jnp.full(population, value), hashes, known, first, value)
    told = jax.random.split(key, children), jnp.arange(1, slots)
    (pool, values, _, _, best, _), (history, new) = lax.scan(step, carry, told)
    aux = {**pool._asdict(), "fitness": values, "best": history}
    return best, {**aux, "evaluated": jnp.sum(new) + 1}


def _mutate(key: Array, code: Array, constants: Array) -> Program:
    """Inserts, deletes or modifies a statement; a full program gets no insertion."""
    length, place = len(code), jnp.arange(len(code))
    count = jnp.sum(jnp.any(code != PADDING, axis=1))
    keys = jax.random.split(key, 5)
    kind = jax.random.randint(keys[0], (), 0, 3)  # insert, delete, modify
    kind = jnp.where(count == 0, 0, jnp.where((kind == 0) & (count == length), 2, kind))
    at = jax.random.randint(keys[1], (), 0, count + (kind == 0))
    most = jnp.array([len(FUNCTIONS), CONSTANT, CONSTANT + 1, CONSTANT + 1])
    fresh = jax.random.randint(keys[2], (4,), 0, most).astype(code.dtype)
    noise = jax.random.normal(keys[3], (), constants.dtype)
    part = jax.random.randint(keys[4], (), 2, 5)  # what is modified: x, y or constant
    # Which of the old statements comes to stand where; none comes to the end.
    source = jnp.stack([place - (place > at), place + (place >= at), place])[kind]
    code = jnp.concatenate([code, PADDING])[source]
    constants = jnp.append(constants, 0.0)[source]
    here, is_new, is_changed = place == at, kind == 0, kind == 2
    replaced = is_new | (is_changed & (jnp.arange(4) == part))
    code = jnp.where(here[:, None] & replaced[None], fresh[None], code)
    number = jnp.where(is_new, noise, constants * jnp.exp2(noise))
    here = here & (is_new | (is_changed & (part == 4)))
    return Program(code, jnp.where(here, number, constants))


def _gap(program: Program) -> Array:
    return jnp.sum(jnp.abs(program.constants - 1.0))


def _start() -> Program:
    noise = 0.05 * jax.random.uniform(jax.random.key(0), (8,))
    return Program(jnp.asarray(LION.code[:8]), LION.constants[:8] - noise)


EXAMPLES = {
    evolve: lambda key: (
        (key, _gap),
        {"population": 4, "tournament": 2, "children": 8, **_start()._asdict()},
    ),
}
