"""I/O complexity of exact attention: words moved between a small cache and slow memory.

A machine has a cache of M words, and a slow memory without end. Arithmetic sees the
cache alone; what counts is how many words are loaded and stored. Attention of N tokens
of width d takes, up to a constant,

    N^2 d^2 / M      words for d^2 <= M <= N d    (FlashAttention's tiling is optimal)
    N^2 d / sqrt(M)  words for M < d^2            (as matrix products do: square tiles)

and no algorithm needs fewer. The programs below compute attention on a `Machine` that
counts, and refuses what does not fit. `transfers` has their counts in closed form.

With NumPy arrays a program runs in NumPy, in float64. With jax arrays it is traced step
by step, so that it can be jitted and differentiated where the sequence is short.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "attention_io_complexity",
    "title": "The I/O Complexity of Attention, or How Optimal is Flash Attention?",
    "arxiv": "2402.07443",
    "year": 2024,
    "authors": "Barna Saha, Christopher Ye",
    "where": "The two-level memory model, the bounds for large and for small caches, "
    "and the algorithms that attain them.",
    "differs": "lower_bound leaves out the constant, which is not given. "
    "FlashAttention has blocks of M / (4 d) keys as in its own paper, but the scores "
    "and row sums count against the cache too, so that blocks of queries are smaller; "
    "its output is divided by the row sums once, at the end. It moves 12.7 times the "
    "bound, beyond the factor of 8 that was asked for; with blocks as wide as the "
    "cache allows (tiling='widest') 7.3 times. The program for small caches finishes "
    "one block of rows before the next, and takes the softmax while it reads the "
    "scores.",
}

__all__ = [
    "Machine",
    "flash_attention",
    "lower_bound",
    "naive_attention",
    "small_cache_attention",
    "sweep",
    "transfers",
]

Tokens = Float[ArrayLike, "length width"]
Program = Literal["naive", "flash", "flash_widest", "small_cache"]
Counted = tuple[Tokens, dict[str, Int[ArrayLike, ""]]]


class Machine:
    """A cache of `words` words, a slow memory of named arrays, and what was moved.

    A tile takes the place of the tile of the same name: a result may overwrite its
    operand. What one instruction needs for itself are registers.

    >>> machine = Machine(5, x=np.arange(4.0), y=np.zeros(1))
    >>> machine.load("x", slice(0, 4))
    >>> machine.compute("y", lambda x: x.sum(keepdims=True), "x")
    >>> machine.store("y", slice(0, 1))
    >>> machine.slow["y"], machine.loads, machine.stores, machine.peak
    (array([6.]), 4, 1, 5)
    >>> machine.compute("z", lambda x: 2 * x, "x")
    Traceback (most recent call last):
        ...
    MemoryError: 'z' has 4 words, but 5 of 5 in the cache are taken.
    """

    def __init__(self, words: int, **slow: Any):
        self.words, self.slow, self.fast = words, slow, {}
        self.loads = self.stores = self.used = self.peak = 0

    def load(self, name: str, index: Any) -> None:
        """Copies a part of a slow array into the cache, under the array's name."""
        tile = self.slow[name][index]
        self._place(name, tile)
        self.loads += tile.size

    def compute(self, name: str, function: Callable[..., Any], *operands: str) -> None:
        """Puts into the cache what `function` makes of tiles that lie there."""
        self._place(name, function(*[self.fast[operand] for operand in operands]))

    def store(self, name: str, index: Any) -> None:
        """Copies a tile to a part of the slow array of its name; it stays cached."""
        tile, array = self.fast[name], self.slow[name]
        if isinstance(array, np.ndarray):
            array[index] = tile
        else:
            self.slow[name] = array.at[index].set(tile)
        self.stores += tile.size

    def free(self, *names: str) -> None:
        """Gives the words of tiles back."""
        for name in names:
            self.used -= self.fast.pop(name).size

    def _place(self, name: str, tile: Any) -> None:
        old = self.fast.get(name)
        used = self.used + tile.size - (0 if old is None else old.size)
        if used > self.words:
            raise MemoryError(
                f"'{name}' has {tile.size} words, but {self.used} of {self.words} in "
                "the cache are taken."
            )
        self.fast[name], self.used, self.peak = tile, used, max(self.peak, used)


@typed
def naive_attention(
    q: Tokens, k: Tokens, v: Tokens, *, cache: int, scale: float = 1.0
) -> Counted:
    """Attention without tiles: one query against one key at a time.

    softmax(scale q k^T) v, whose scores and weights both go through slow memory

    Args:
        q: queries, `[N, d]`; entries beyond 1e15 in magnitude are clipped.
        k: keys, likewise.
        v: values, likewise.
        cache: M, in words, at least max(2 d + 1, 4); more of them do not help.
        scale: factor of the scores; 1.0 in the paper, d ** -0.5 in transformers.

    Returns:
        `(output, aux)`: `[N, d]`, float32 or better; aux counts words, "loads",
        "stores" and "peak", the most that lay in the cache at once.

    Raises:
        TypeError: the shapes differ.
        ValueError: `cache` is too small, or `scale` is NaN.

    >>> q = np.eye(2)
    >>> output, aux = naive_attention(q, q, q, cache=5)
    >>> output[0].tolist(), int(aux["loads"]), int(aux["stores"]), int(aux["peak"])
    ([0.7311, 0.2689], 32, 12, 5)
    """
    length, width = q.shape
    check_range("cache", cache, low=_least(width, "naive"))
    machine = _machine(cache, q, k, v, scale, ("a", length, length))
    tokens = [slice(t, t + 1) for t in range(length)]
    for row in tokens:
        machine.load("q", row)
        for column in tokens:
            machine.load("k", column)
            machine.compute("a", _scores, "q", "k")
            machine.store("a", (row, column))
        machine.free("q", "k", "a")
        for column in tokens:
            machine.load("a", (row, column))
            _update_sums(machine, first=column.start == 0)
        for column in tokens:
            machine.load("a", (row, column))
            machine.compute("a", _weights, "a", "m", "l")
            machine.store("a", (row, column))
        machine.free("m", "l", "a")
        for column in tokens:
            machine.load("a", (row, column))
            machine.load("v", column)
            _accumulate(machine, "o", _product, "a", "v", first=column.start == 0)
        machine.store("o", row)
        machine.free("a", "v", "o")
    return _result(machine)


@typed
def flash_attention(
    q: Tokens,
    k: Tokens,
    v: Tokens,
    *,
    cache: int,
    scale: float = 1.0,
    tiling: Literal["quarter", "widest"] = "quarter",
) -> Counted:
    """FlashAttention: keys and values stay in the cache while all queries go by.

    For each block of keys: o = o exp(m_old - m) + exp(s - m) v, with s = scale q k^T
    and m its largest so far; the last divides by l, the sum of the exp(s - m).

    Args:
        q: queries, `[N, d]`; entries beyond 1e15 in magnitude are clipped.
        k: keys, likewise.
        v: values, likewise.
        cache: M, in words, at least 4 d + 4.
        scale: factor of the scores; 1.0 in the paper, d ** -0.5 in transformers.
        tiling: "quarter" takes blocks of M / (4 d) keys, as FlashAttention's authors
            do, and queries in what remains; "widest" takes as many keys as leave room
            for one query, near M / (2 d).

    Returns:
        `(output, aux)` as of `naive_attention`.

    Raises:
        TypeError: the shapes differ.
        ValueError: `cache` is too small, `scale` is NaN, or there is no such tiling.

    >>> q = np.eye(2)
    >>> output, aux = flash_attention(q, q, q, cache=12)
    >>> output[0].tolist(), int(aux["loads"]), int(aux["stores"]), int(aux["peak"])
    ([0.7311, 0.2689], 24, 12, 12)
    """
    length, width = q.shape
    check_range("cache", cache, low=_least(width, "flash"))
    columns = int(_columns(np, cache, length, width, tiling))
    rows = (cache - 2 * columns * width) // (2 * width + columns + 3)
    machine = _machine(cache, q, k, v, scale, ("m", length, 1), ("l", length, 1))
    for column in _blocks(length, columns):
        first, last = column.start == 0, column.stop == length
        machine.load("k", column)
        machine.load("v", column)
        for row in _blocks(length, rows):
            machine.load("q", row)
            for name in () if first else ("o", "m", "l"):
                machine.load(name, row)
            machine.compute("a", _scores, "q", "k")
            _update_sums(machine, first=first)
            _accumulate(machine, "o", _product, "a", "v", first=first)
            if last:
                machine.compute("o", lambda o, total: o / total, "o", "l")
            for name in ("o",) if last else ("o", "m", "l"):
                machine.store(name, row)
            machine.free("q", "a", "o", "m", "l")
        machine.free("k", "v")
    return _result(machine)


@typed
def small_cache_attention(
    q: Tokens, k: Tokens, v: Tokens, *, cache: int, scale: float = 1.0
) -> Counted:
    """Attention by square tiles of near sqrt(M) x sqrt(M) of both matrix products.

    A tile of scores, and then one of the output, stays in the cache while the vectors
    that it is a sum of outer products of stream by. The scores go through slow memory.

    Args:
        q: queries, `[N, d]`; entries beyond 1e15 in magnitude are clipped.
        k: keys, likewise.
        v: values, likewise.
        cache: M, in words, at least 5; tiles have sides of sqrt(M + 4) - 2.
        scale: factor of the scores; 1.0 in the paper, d ** -0.5 in transformers.

    Returns:
        `(output, aux)` as of `naive_attention`.

    Raises:
        TypeError: the shapes differ.
        ValueError: `cache` is too small, or `scale` is NaN.

    >>> q = np.eye(2)
    >>> output, aux = small_cache_attention(q, q, q, cache=12)
    >>> output[0].tolist(), int(aux["loads"]), int(aux["stores"]), int(aux["peak"])
    ([0.7311, 0.2689], 16, 8, 12)
    """
    length, width = q.shape
    check_range("cache", cache, low=_least(width, "small_cache"))
    side = math.isqrt(cache + 4) - 2  # side^2 + 4 side <= cache
    machine = _machine(cache, q, k, v, scale, ("a", length, length))
    for row in _blocks(length, side):
        for column in _blocks(length, side):
            for t in _blocks(width, 1):
                machine.load("q", (row, t))
                machine.load("k", (column, t))
                _accumulate(machine, "a", _scores, "q", "k", first=t.start == 0)
            machine.free("q", "k")
            machine.store("a", (row, column))
            _update_sums(machine, first=column.start == 0)
            machine.free("a")
        for column in _blocks(width, side):
            for t in _blocks(length, 1):
                machine.load("a", (row, t))
                machine.load("v", (t, column))
                machine.compute("a", _weights, "a", "m", "l")
                _accumulate(machine, "o", _product, "a", "v", first=t.start == 0)
            machine.store("o", (row, column))
            machine.free("a", "v", "o")
        machine.free("m", "l")
    return _result(machine)


@typed
def transfers(
    cache: Int[ArrayLike, "*caches"], *, length: int, width: int, program: Program
) -> Float[ArrayLike, "*caches"]:
    """Loads and stores of a program in closed form, equal to what its machine counts.

    With T blocks of keys and U of the width:
    naive:                2 N^2 d + 5 N^2 + 2 N d
    flash, flash_widest:  N d (3 T + 1) + 4 N (T - 1)
    small_cache:          N d (3 T + 1) + N^2 (U + 1)

    Args:
        cache: M, in words.
        length: N, tokens.
        width: d.
        program: "flash" is the tiling "quarter".

    Returns:
        Words, infinite where the program does not fit in the cache. From NumPy arrays
        float64, exact up to 2^53; from jax arrays float32, which rounds beyond 2^24.

    Raises:
        ValueError: `length` or `width` is below 1, or there is no such program.

    >>> transfers(np.array([4, 12]), length=2, width=2, program="flash").tolist()
    [inf, 36.0]
    """
    check_range("length", length, low=1)
    check_range("width", width, low=1)
    xp, words = _words(cache)
    n, d = float(length), float(width)
    if program == "naive":
        count = xp.full_like(words, n * (2 * n * d + 5 * n + 2 * d))
    elif program == "small_cache":
        side = xp.maximum(xp.floor(xp.sqrt(words + 4)) - 2, 1.0)
        tiles = n * d * (3 * xp.ceil(n / side) + 1)
        count = tiles + n * n * (xp.ceil(d / side) + 1)
    else:
        tiling = "quarter" if program == "flash" else "widest"
        blocks = xp.ceil(n / xp.maximum(_columns(xp, words, length, width, tiling), 1))
        count = n * d * (3 * blocks + 1) + 4 * n * (blocks - 1)
    return xp.where(words >= _least(width, program), count, np.inf)


@typed
def lower_bound(
    cache: Int[ArrayLike, "*caches"], *, length: int, width: int
) -> Float[ArrayLike, "*caches"]:
    """Words that any algorithm for exact attention moves, up to a constant.

    N^2 d^2 / M for M >= d^2, N^2 d / sqrt(M) below; at least N d, the output

    For M < d^2 this holds for algorithms that multiply matrices by inner products; for
    M >= d^2 also for fast matrix multiplication.

    Args:
        cache: M, in words, at least 1.
        length: N, tokens.
        width: d.

    Returns:
        Words: float64 from NumPy arrays, float32 from jax arrays.

    Raises:
        ValueError: `length` or `width` is below 1.

    >>> lower_bound(np.array([16, 64, 256]), length=1024, width=8).tolist()
    [2097152.0, 1048576.0, 262144.0]
    """
    check_range("length", length, low=1)
    check_range("width", width, low=1)
    xp, words = _words(cache)
    n, d = float(length), float(width)
    large, small = n * n * d * d / words, n * n * d / xp.sqrt(words)
    return xp.maximum(xp.where(words >= d * d, large, small), n * d)


@typed
def sweep(
    cache: Int[ArrayLike, " caches"], *, length: int, width: int
) -> dict[str, Float[ArrayLike, "..."]]:
    """Transfers of all programs against the size of the cache, with fitted exponents.

    slope of log words in log M, by least squares; -1 above d^2 and -1/2 below

    Args:
        cache: sizes M, in words, ascending.
        length: N, tokens.
        width: d.

    Returns:
        Words per size under "naive", "flash", "flash_widest", "small_cache" and
        "lower_bound"; the exponents "slope/flash" and "slope/flash_widest", over d^2 <=
        M <= N d, and "slope/small_cache", over M <= d^2, NaN where fewer than two sizes
        are there; "switch/flash" and "switch/flash_widest", the M from which that
        program moves fewer words than small_cache, between sizes by a straight line in
        logarithms, NaN where it never does.

    Raises:
        ValueError: `length` or `width` is below 1.

    >>> found = sweep(2 ** np.arange(8, 17), length=2**14, width=64)
    >>> float(found["slope/flash"]), float(found["slope/small_cache"])
    (-0.9985, -0.4348)
    >>> float(found["switch/flash"]) / 64**2
    3.3068
    """
    size = {"length": length, "width": width}
    programs: tuple[Program, ...] = ("naive", "flash", "flash_widest", "small_cache")
    found = {p: transfers(cache, program=p, **size) for p in programs}
    found["lower_bound"] = lower_bound(cache, **size)
    xp, words = _words(cache)
    square, small = width * width, found["small_cache"]
    for name in ("flash", "flash_widest"):
        large = (words >= square) & (words <= length * width)
        found[f"slope/{name}"] = _slope(xp, words, found[name], large)
        found[f"switch/{name}"] = _switch(xp, words, found[name], small)
    found["slope/small_cache"] = _slope(xp, words, small, words <= square)
    return found


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, total)) for i in range(0, total, size))


def _least(width: int, program: str) -> int:
    """Words that a program cannot do without: those of tiles of one token."""
    flash = 4 * width + 4
    least = {"naive": max(2 * width + 1, 4), "small_cache": 5}
    return least.get(program, flash)


def _columns(xp: Any, words: Any, length: int, width: int, tiling: str) -> Any:
    """Keys per block of FlashAttention: c with 2 c d + (2 d + c + 3) <= M."""
    columns = (words - 2 * width - 3) // (2 * width + 1)
    if tiling == "quarter":
        columns = xp.minimum(columns, xp.maximum(words // (4 * width), 1))
    return xp.minimum(columns, length)


def _machine(
    cache: int, q: Any, k: Any, v: Any, scale: float, *scratch: tuple[str, int, int]
) -> Machine:
    check_range("scale", scale)
    host = all(isinstance(x, np.ndarray) for x in (q, k, v))
    if host:
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    else:
        q, k, v = (as_float32(x) for x in (q, k, v))
    xp: Any = np if host else jnp
    # So that neither scores nor their gradients overflow in float32. The factor moves
    # no word: it could be applied after each load.
    q, k, v = (xp.clip(x, -1e15, 1e15) for x in (q * scale, k, v))
    slow = {name: xp.zeros(shape, q.dtype) for name, *shape in scratch}
    return Machine(cache, q=q, k=k, v=v, o=xp.zeros_like(v), **slow)


def _result(machine: Machine) -> Any:
    output = machine.slow["o"]
    xp: Any = np if isinstance(output, np.ndarray) else jnp
    counts = {n: xp.asarray(getattr(machine, n)) for n in ("loads", "stores", "peak")}
    return output, counts


def _accumulate(
    machine: Machine, name: str, product: Any, *operands: str, first: bool
) -> None:
    if first:
        machine.compute(name, product, *operands)
    else:
        machine.compute(name, lambda o, *x: o + product(*x), name, *operands)


def _update_sums(machine: Machine, *, first: bool) -> None:
    """Scores "a" become exp(a - m); "m", "l" and a cached "o" follow."""
    if first:
        machine.compute("m", _largest, "a")
    else:
        machine.compute("new", _larger, "m", "a")
        machine.compute("m", _exp_difference, "m", "new")
        for name in ("l", "o") if "o" in machine.fast else ("l",):
            machine.compute(name, lambda x, shrink: x * shrink, name, "m")
        machine.compute("m", lambda new: new, "new")
        machine.free("new")
    machine.compute("a", _exp_difference, "a", "m")
    _accumulate(machine, "l", lambda a: a.sum(axis=1, keepdims=True), "a", first=first)


def _scores(q: Any, k: Any) -> Any:
    return q @ k.T


def _product(a: Any, v: Any) -> Any:
    return a @ v


def _largest(a: Any) -> Any:
    return a.max(axis=1, keepdims=True)


def _larger(m: Any, a: Any) -> Any:
    return (np if isinstance(a, np.ndarray) else jnp).maximum(m, _largest(a))


def _exp_difference(a: Any, m: Any) -> Any:
    return (np if isinstance(a, np.ndarray) else jnp).exp(a - m)


def _weights(a: Any, m: Any, total: Any) -> Any:
    return _exp_difference(a, m) / total


def _words(cache: Any) -> tuple[Any, Any]:
    """The module that computes, and the sizes as floats in it."""
    if isinstance(cache, np.ndarray):
        return np, cache.astype(np.float64)
    return jnp, cache.astype(jnp.float32)


def _slope(xp: Any, words: Any, count: Any, keep: Any) -> Any:
    keep = keep & xp.isfinite(count)
    x, y = (xp.log(xp.where(keep, value, 1.0)) for value in (words, count))
    total = xp.maximum(keep.sum(), 1)
    x, y = (xp.where(keep, value - value.sum() / total, 0.0) for value in (x, y))
    squares = (x * x).sum()
    fitted = (x * y).sum() / xp.where(squares > 0, squares, 1.0)
    return xp.where(squares > 0, fitted, np.nan)


def _switch(xp: Any, words: Any, count: Any, other: Any) -> Any:
    """Where `count` falls below `other` for the first time."""
    both = xp.isfinite(count) & xp.isfinite(other)
    gap = xp.log(xp.where(both, count, 1.0)) - xp.log(xp.where(both, other, 1.0))
    below = both & (gap <= 0)
    after = xp.argmax(below)
    before = xp.maximum(after - 1, 0)
    drop = gap[before] - gap[after]
    between = both[before] & (drop > 0)
    share = xp.where(between, gap[before] / xp.where(between, drop, 1.0), 1.0)
    x = xp.log(words)
    found = xp.exp(x[before] + share * (x[after] - x[before]))
    return xp.where(below.any(), found, np.nan)


def _tokens(key: Array):
    return tuple(jax.random.normal(key, (3, 2, 8)))


_SIZES = jnp.array([20, 40, 60, 64, 80, 128, 200, 256])
_KNOBS = {"length": 64, "width": 8}

EXAMPLES = {
    naive_attention: lambda key: (_tokens(key), {"cache": 17}),
    flash_attention: lambda key: (_tokens(key), {"cache": 36}),
    small_cache_attention: lambda key: (_tokens(key), {"cache": 21}),
    transfers: lambda key: ((_SIZES,), {**_KNOBS, "program": "small_cache"}),
    lower_bound: lambda key: ((_SIZES,), _KNOBS),
    sweep: lambda key: ((_SIZES[1:],), _KNOBS),
}
