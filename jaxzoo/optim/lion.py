"""Lion, sign momentum found by evolution, and the search over programs that found it.

    c = b1 m + (1 - b1) g
    p <- p - learning_rate (sign(c) + weight_decay p)
    m <- b2 m + (1 - b2) g                         # one buffer, half of Adam's

The search: an update rule is a straight-line program over the gradient, the weight, the
learning rate and two memories. `evolve` lets mutated programs compete on a cheap task:

    >>> print(LION)
    update = interp(g, m, 0.9)
    update = sign(update)
    m = interp(g, m, 0.99)
    a = multiply(w, 0.1)
    update = add(update, a)
    update = multiply(update, lr)

A program is two arrays, so mutation, pruning and evaluation are compiled once for all
programs, and `jax.vmap` goes over them.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxzoo.core.transform import (
    Mask,
    Number,
    Rate,
    descend,
    float32_zeros,
    in_float32,
    like,
)
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "lion",
    "title": "Symbolic Discovery of Optimization Algorithms",
    "arxiv": "2302.06675",
    "year": 2023,
    "authors": "Xiangning Chen, Chen Liang, Da Huang, Esteban Real, Kaiyuan Wang, Yao "
    "Liu, Hieu Pham, Xuanyi Dong, Thang Luong, Cho-Jui Hsieh, Yifeng Lu, Quoc V. Le",
    "where": "Algorithm 2 (Lion); section 2: programs, mutation, regularised "
    "evolution, abstract execution; the funnel is in the experiment.",
    "differs": "The optimizer is Optax's; weight decay is 0 by default, as in the "
    "authors' code, Optax has 1e-3. Their search is not released. Here a "
    "program is a fixed number of statements over 17 functions, two memories "
    "and three temporaries; theirs has 45 functions and any variables. "
    "Arguments are arrays of one shape, so that no program has a type error; "
    "divisors stay 1e-8 away from 0. The hash is of expressions, with "
    "constants to the last bit. Simplification by hand, hyperparameter tuning"
    " and restarts are left to the caller. The paper searches from AdamW with"
    " thousands of TPU days; the experiment from SGD, 3,000 children, as a "
    "start from AdamW would hold the claim by itself. Measured: 86% of the "
    "children are duplicates and cost nothing; two of three winners of the "
    "funnel beat SGD at its best learning rate on fresh seeds, the third does"
    " not (0.80, 0.81 and 0.90 against 0.89 nats), none finds momentum, and "
    "AdamW (0.61) and Lion (0.66) stay ahead. Without a bound on the weights "
    "evolution finds that equal logits of 1e20 have a float32 loss of 0. On "
    "Moby Dick, 300 steps, Lion is 1.3% behind AdamW if both are tuned (0.006"
    " and 0.01), but 14% at exactly a fifth of AdamW's best learning rate, "
    "which is too small for so few steps.",
}

__all__ = [
    "LION", "Program", "evolve", "lion", "run_program", "scale_by_lion", "simplify",
]  # fmt: skip

# The registers of a program, then the constant that each statement has of its own.
NAMES = ("g", "w", "lr", "m", "v", "update", "a", "b", "c")
CONSTANT = len(NAMES)
M, V, UPDATE, SPARE = (NAMES.index(name) for name in ("m", "v", "update", "a"))
PADDING = np.array([[0, SPARE, SPARE, SPARE]], np.int32)  # a = copy(a)
TINY = 1e-8

# Of two registers and the statement's constant, with how many of them each takes.
# Divisors stay 1e-8 away from 0, which is what Adam's epsilon is for.
FUNCTIONS: dict[str, tuple[int, Callable[[Any, Any, Any], Any]]] = {
    "copy": (1, lambda x, y, c: x),
    "abs": (1, lambda x, y, c: jnp.abs(x)),
    "sign": (1, lambda x, y, c: jnp.sign(x)),
    "square": (1, lambda x, y, c: x * x),
    "sqrt": (1, lambda x, y, c: jnp.sqrt(jnp.abs(x))),
    "exp": (1, lambda x, y, c: jnp.exp(x)),
    "log": (1, lambda x, y, c: jnp.log(jnp.abs(x) + TINY)),
    "sin": (1, lambda x, y, c: jnp.sin(x)),
    "tanh": (1, lambda x, y, c: jnp.tanh(x)),
    "norm": (1, lambda x, y, c: jnp.full_like(x, jnp.sqrt(jnp.sum(x * x)))),
    "add": (2, lambda x, y, c: x + y),
    "multiply": (2, lambda x, y, c: x * y),
    "maximum": (2, lambda x, y, c: jnp.maximum(x, y)),
    "minimum": (2, lambda x, y, c: jnp.minimum(x, y)),
    "subtract": (2, lambda x, y, c: x - y),
    "divide": (2, lambda x, y, c: x / (y + jnp.where(y < 0, -TINY, TINY))),
    "interp": (3, lambda x, y, c: (1 - c) * x + c * y),
}
WORDS = list(FUNCTIONS)
ARITY = np.array([arity for arity, _ in FUNCTIONS.values()], np.int32)
COMMUTES = np.array([w in ("add", "multiply", "maximum", "minimum") for w in WORDS])


class Program(NamedTuple):
    """An update rule: statement l is out = function(x, y) with a constant of its own.

    Attributes:
        code: int32 `[L, 4]`, rows (function, out, x, y).
        constants: `[L]`; argument number 9 of statement l, and the weight of `interp`.
    """

    code: Any
    constants: Any

    @classmethod
    def parse(cls, text: str, length: int = 16) -> "Program":
        """The program that a text like that of `str` describes, padded to `length`."""
        code = np.tile(PADDING, (length, 1))
        constants = np.zeros(length, np.float32)
        for row, line in enumerate(filter(None, map(str.strip, text.splitlines()))):
            out, word, *names = re.findall(r"[\w.+-]+", line)
            number = [name for name in names if name not in NAMES]
            constants[row] = float(number[-1]) if number else 0.0
            x, y = ([NAMES.index(n) if n in NAMES else CONSTANT for n in names] * 2)[:2]
            code[row] = WORDS.index(word), NAMES.index(out), x, y
        return cls(code, constants)

    def __str__(self) -> str:
        lines = []
        for row, number in zip(np.asarray(self.code), self.constants, strict=True):
            names = [*NAMES, f"{float(number):.4g}"]
            shown = [names[row[2]], names[row[3]], names[CONSTANT]][: ARITY[row[0]]]
            line = f"{NAMES[row[1]]} = {WORDS[row[0]]}({', '.join(shown)})"
            lines += [] if (row == PADDING[0]).all() else [line]
        return "\n".join(lines)


LION = Program.parse("""
    update = interp(g, m, 0.9)
    update = sign(update)
    m = interp(g, m, 0.99)
    a = multiply(w, 0.1)
    update = add(update, a)
    update = multiply(update, lr)
""")


def scale_by_lion(
    *, b1: Number = 0.9, b2: Number = 0.99
) -> optax.GradientTransformation:
    """sign(b1 m + (1 - b1) g): Optax's, with its momentum in float32.

    Args:
        b1: weight of the momentum in the step, in [0, 1).
        b2: weight of the momentum in the next momentum, in (0, 1).

    Returns:
        A transformation whose state is one buffer of the parameters' shape.

    Raises:
        ValueError: a number is out of range.

    >>> direction = scale_by_lion()
    >>> g = jnp.array([3.0, -0.1, 0.0])
    >>> direction.update(g, direction.init(g))[0].tolist()
    [1.0, -1.0, 0.0]
    """
    check_range("b1", b1, low=0.0, below=1.0)
    check_range("b2", b2, above=0.0, below=1.0)
    rates: Any = {"b1": b1, "b2": b2}
    inner, share = optax.scale_by_lion(**rates), rates["b1"] / rates["b2"]

    def init(params: Any) -> Any:
        return inner.init(float32_zeros(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        g = in_float32(updates)
        _, state = inner.update(g, state, params)
        # Optax's direction in terms of the new momentum. As a function of the old one
        # it makes XLA copy that before it is overwritten: twice the time on a CPU.
        direction = jax.tree.map(
            lambda m, g: jnp.sign(share * m + (1.0 - share) * g), state.mu, g
        )
        return like(direction, updates), state

    return optax.GradientTransformation(init, update)


def lion(
    learning_rate: Rate, *, b1: Number = 0.9, b2: Number = 0.99,
    weight_decay: Number = 0.0, mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """Lion: every coordinate moves by the learning rate, and decays.

    The authors take a learning rate 3 to 10 times below AdamW's, and a weight decay as
    many times above.

    Args:
        learning_rate: >= 0, or a schedule of the step.
        b1: as for `scale_by_lion`.
        b2: as for `scale_by_lion`.
        weight_decay: decoupled, >= 0; the authors' code has 0 as its default.
        mask: the parameters that decay, as in `optax.add_decayed_weights`.

    Returns:
        An Optax optimizer, equal to `optax.lion` on float32 parameters, but where
        b1 m + (1 - b1) g is 0 up to rounding.

    Raises:
        ValueError: a number is out of range.

    >>> optimizer = lion(0.01)
    >>> g = jnp.array([3.0, -0.1])
    >>> optimizer.update(g, optimizer.init(g))[0].tolist()
    [-0.01, 0.01]
    """
    direction = scale_by_lion(b1=b1, b2=b2)
    return descend(direction, learning_rate, weight_decay=weight_decay, mask=mask)


@typed
def run_program(
    g: Float[ArrayLike, "*shape"],
    w: Float[ArrayLike, "*shape"],
    m: Float[ArrayLike, "*shape"],
    v: Float[ArrayLike, "*shape"],
    *,
    code: Int[ArrayLike, "statements 4"],
    constants: Float[ArrayLike, " statements"],
    learning_rate: Float[ArrayLike, ""] | float,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]]:
    """One step of an update rule that is a program; the weight then loses the update.

    Args:
        g: gradient, any shape.
        w: weight.
        m: first memory, 0 before the first step.
        v: second memory, likewise.
        code: of the program, as in `Program`.
        constants: of the program.
        learning_rate: what the program finds in "lr", >= 0.

    Returns:
        `(update, m, v)`, float32.

    Raises:
        ValueError: the learning rate is out of range.

    >>> g, zero = jnp.array([3.0, -0.1]), jnp.zeros(2)
    >>> update, m, v = run_program(
    ...     g, zero, zero, zero, **LION._asdict(), learning_rate=0.01
    ... )
    >>> update.tolist(), m.tolist()
    ([0.01, -0.01], [0.03, -0.001])
    """
    check_range("learning_rate", learning_rate, low=0.0)
    g, w, m, v = (as_float32(x) for x in (g, w, m, v))
    zero, numbers = jnp.zeros_like(g), as_float32(constants).astype(g.dtype)
    rate = jnp.full_like(g, learning_rate)
    registers = jnp.stack([g, w, rate, m, v] + [zero] * (CONSTANT - 4))
    branches = [function for _, function in FUNCTIONS.values()]

    def execute(registers: Array, statement: Any) -> Any:
        (function, out, x, y), number = statement
        registers = registers.at[CONSTANT].set(number)
        value = lax.switch(function, branches, registers[x], registers[y], number)
        return registers.at[out].set(value), None

    registers, _ = lax.scan(execute, registers, (jnp.asarray(code), numbers))
    return registers[UPDATE], registers[M], registers[V]


@typed
def simplify(
    code: Int[ArrayLike, "statements 4"], constants: Float[ArrayLike, " statements"]
) -> tuple[Program, dict[str, Array]]:
    """Abstract execution: a program without redundant statements, and its fingerprint.

    A statement is redundant if no update depends on it, of this step or, by way of a
    memory, of a later one. The fingerprint is a hash of the expressions that the
    memories and the update are: other names, or another order, do not change it.

    Args:
        code: of the program, as in `Program`.
        constants: of the program.

    Returns:
        `(program, aux)`: of the same length, padded at the end. aux holds "hash",
        uint32 `[2]`, and "statements", how many there are.

    >>> rule = Program.parse("b = sin(g)\\nupdate = multiply(lr, g)\\nm = abs(w)", 4)
    >>> program, aux = simplify(*rule)
    >>> print(program)
    update = multiply(lr, g)
    >>> other = simplify(*Program.parse("a = multiply(g, lr)\\nupdate = copy(a)"))[1]
    >>> bool((other["hash"] == aux["hash"]).all())
    True
    """
    code, constants = jnp.asarray(code, jnp.int32), as_float32(constants)
    place = jnp.arange(CONSTANT + 1)
    arity = jnp.asarray(ARITY)[code[:, 0]]

    def backwards(live: Array, statement: Any) -> Any:
        (function, out, x, y), arity = statement
        counts = live[out] & ~((function == 0) & (out == x))
        live = live & ~(counts & (place == out))
        reads = (place == x) | ((arity > 1) & (place == y))
        return live | (counts & reads), counts

    def liveness(needed: Array) -> Any:
        return lax.scan(backwards, needed, (code, arity), reverse=True)

    needed = place == UPDATE
    for _ in range(2):  # each memory may turn out to be needed by the other
        needed = needed | (liveness(needed)[0] & ((place == M) | (place == V)))
    keep = liveness(needed)[1]
    order, rest = jnp.argsort(~keep, stable=True), jnp.arange(len(code)) >= keep.sum()
    code = jnp.where(rest[:, None], jnp.asarray(PADDING), code[order])
    constants = jnp.where(rest, 0.0, constants[order])
    aux = {"hash": _hash(code, constants), "statements": jnp.sum(keep)}
    return Program(code, constants), aux


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


def _hash(code: Array, constants: Array) -> Array:
    """A hash, in two lanes, of the expressions that update and memories are."""
    symbols = jnp.arange(1, 2 * CONSTANT + 3, dtype=jnp.uint32).reshape(-1, 2)
    # What was not written is 0, whatever its name.
    symbols = symbols.at[UPDATE:].set(0) * jnp.uint32(0x9E3779B1)
    bits = lax.bitcast_convert_type(constants.astype(jnp.float32), jnp.uint32)

    def step(symbols: Array, statement: Any) -> Any:
        (function, out, x, y), number, arity, commutes = statement
        symbols = symbols.at[CONSTANT].set(_mix(number, jnp.full(2, 7, jnp.uint32)))
        x, y = symbols[x], symbols[y]
        first = jnp.where(commutes, jnp.minimum(x, y), x)
        second = jnp.where(commutes, jnp.maximum(x, y), y) * (arity > 1)
        value = _mix(function.astype(jnp.uint32), _mix(first, second))
        value = _mix(value, symbols[CONSTANT] * (arity > 2))
        value = jnp.where(function == 0, x, value)  # a copy is what it copies
        return symbols.at[out].set(value), None

    facts = (jnp.asarray(table)[code[:, 0]] for table in (ARITY, COMMUTES))
    symbols, _ = lax.scan(step, symbols, (code, bits, *facts))
    return _mix(_mix(symbols[UPDATE], symbols[M]), symbols[V])


def _mix(first: Array, second: Array) -> Array:
    odd = jnp.array([0x85EBCA77, 0xC2B2AE3D], jnp.uint32)
    mixed = (first ^ (second * odd + jnp.uint32(0x27D4EB2F))) * odd[::-1]
    return mixed ^ (mixed >> 15) * odd


def _lion(key: Array, length: int = 8) -> Program:
    noise = 0.05 * jax.random.uniform(key, (length,))
    return Program(jnp.asarray(LION.code[:length]), LION.constants[:length] - noise)


def _gap(program: Program) -> Array:
    return jnp.sum(jnp.abs(program.constants - 1.0))


EXAMPLES = {
    scale_by_lion: lambda key: ((), {}),
    lion: lambda key: ((0.01,), {}),
    run_program: lambda key: (
        tuple(jax.random.normal(key, (4, 8))),
        {**_lion(key)._asdict(), "learning_rate": 0.01},
    ),
    simplify: lambda key: (_lion(key), {}),
    evolve: lambda key: (
        (key, _gap),
        dict(population=4, tournament=2, children=8)
        | _lion(jax.random.key(0))._asdict(),
    ),
}
