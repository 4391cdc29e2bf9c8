"""I/O complexity of exact attention: words moved between a small cache and slow memory.

A machine has a cache of M words, and a slow memory without end. Arithmetic sees the
cache alone; what counts is how many words are loaded and stored. Attention of N tokens
of width d takes, up to a constant,

    N^2 d^2 / M      words for d^2 <= M <= N d    (FlashAttention's tiling is optimal)
    N^2 d / sqrt(M)  words for M < d^2            (as matrix products do: square tiles)

and no algorithm needs fewer. The program for small caches is below, FlashAttention and
one without tiles are in `jaxzoo.nn.counted_attention`: each computes attention on a
machine that counts. `transfers` has their counts in closed form.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, check_range, typed
from jaxzoo.nn.counted_attention import (
    AttentionMachine,
    Counted,
    Tokens,
    key_block,
    slices,
    smallest_cache,
)

PAPER = {
    "slug": "attention_io_complexity",
    "title": "The I/O Complexity of Attention, or How Optimal is Flash Attention?",
    "arxiv": "2402.07443",
    "year": 2024,
    "authors": "Barna Saha, Christopher Ye",
    "where": "The two-level memory model, the bounds for large and for small caches, "
    "and the algorithms that attain them (FlashAttention and the machine: "
    "jaxzoo.nn.counted_attention).",
    "differs": "lower_bound leaves out the constant, which is not given. "
    "FlashAttention has blocks of M / (4 d) keys as in its own paper, but the scores "
    "and row sums count against the cache too, so that blocks of queries are smaller; "
    "its output is divided by the row sums once, at the end. It moves 12.7 times the "
    "bound, beyond the factor of 8 that was asked for; with blocks as wide as the "
    "cache allows (tiling='widest') 7.3 times. The program for small caches finishes "
    "one block of rows before the next, and takes the softmax while it reads the "
    "scores.",
}

__all__ = ["lower_bound", "small_cache_attention", "sweep", "transfers"]

Program = Literal["naive", "flash", "flash_widest", "small_cache"]
_LEAST = 5  # words that square tiles cannot do without


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
        `(output, aux)`: `[N, d]`, float32 or better; aux counts words, "loads",
        "stores" and "peak", the most that lay in the cache at once.

    Raises:
        TypeError: the shapes differ.
        ValueError: `cache` is too small, or `scale` is NaN.

    >>> q = np.eye(2)
    >>> output, aux = small_cache_attention(q, q, q, cache=12)
    >>> output[0].tolist(), int(aux["loads"]), int(aux["stores"]), int(aux["peak"])
    ([0.7311, 0.2689], 16, 8, 12)
    """
    length, width = q.shape
    check_range("cache", cache, low=_LEAST)
    side = math.isqrt(cache + 4) - 2  # side^2 + 4 side <= cache
    machine = AttentionMachine(cache, q, k, v, scale, ("a", length, length))
    for row in slices(length, side):
        for column in slices(length, side):
            for t in slices(width, 1):
                machine.load("q", (row, t))
                machine.load("k", (column, t))
                machine.scores(first=t.start == 0)
            machine.free("q", "k")
            machine.store("a", (row, column))
            machine.update_sums(first=column.start == 0)
            machine.free("a")
        for column in slices(width, side):
            for t in slices(length, 1):
                machine.load("a", (row, t))
                machine.load("v", (t, column))
                machine.weights()
                machine.output(first=t.start == 0)
            machine.store("o", (row, column))
            machine.free("a", "v", "o")
        machine.free("m", "l")
    return machine.result()


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
        blocks = xp.ceil(n / xp.maximum(key_block(xp, words, length, width, tiling), 1))
        count = n * d * (3 * blocks + 1) + 4 * n * (blocks - 1)
    least = _LEAST if program == "small_cache" else smallest_cache(width, program)
    return xp.where(words >= least, count, np.inf)


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


def _tokens(key: Array) -> Any:
    return tuple(jax.random.normal(key, (3, 2, 8))), {"cache": 21}


_SIZES = jnp.array([20, 40, 60, 64, 80, 128, 200, 256])
_KNOBS = {"length": 64, "width": 8}

EXAMPLES = {
    small_cache_attention: _tokens,
    transfers: lambda key: ((_SIZES,), {**_KNOBS, "program": "small_cache"}),
    lower_bound: lambda key: ((_SIZES,), _KNOBS),
    sweep: lambda key: ((_SIZES[1:],), _KNOBS),
}
