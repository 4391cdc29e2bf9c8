"""Update rules as programs: what runs, prints, prunes and compares them.

An update rule is a straight-line program over the gradient, the weight, the learning
rate and two memories. `jaxzoo.nn.program_evolution` searches for good ones.

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
from jax import lax
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["ADAMW", "LION", "Program", "run_program", "simplify"]

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

# What the search of the paper began with: AdamW without its bias correction.
ADAMW = Program.parse("""
    m = interp(g, m, 0.9)
    a = square(g)
    v = interp(a, v, 0.999)
    b = sqrt(v)
    update = divide(m, b)
    c = multiply(w, 0.01)
    update = add(update, c)
    update = multiply(update, lr)
""")


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


EXAMPLES = {
    run_program: lambda key: (
        tuple(jax.random.normal(key, (4, 8))),
        {**_lion(key)._asdict(), "learning_rate": 0.01},
    ),
    simplify: lambda key: (_lion(key), {}),
}
