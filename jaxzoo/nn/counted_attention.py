"""Attention on a machine that counts what it moves in and out of a small cache.

The machine has a cache of M words, and a slow memory without end. Arithmetic sees the
cache alone; what counts is how many words are loaded and stored. It refuses what does
not fit. Two programs that are well known:

    output, aux = flash_attention(q, k, v, cache=4096)
    aux["loads"] + aux["stores"]                           # words moved

With NumPy arrays a program runs in NumPy, in float64. With jax arrays it is traced step
by step, so that it can be jitted and differentiated where the sequence is short.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["AttentionMachine", "Machine", "flash_attention", "naive_attention"]

Tokens = Float[ArrayLike, "length width"]
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


class AttentionMachine(Machine):
    """A machine with q times a scale, k, v and room for the output o in slow memory.

    Its tiles: "a", scores and then weights of some queries and keys; "m" and "l", the
    largest score and the sum of exp(a - m) of each query; and "o".
    """

    def __init__(
        self, cache: int, q: Any, k: Any, v: Any, scale: float,
        *scratch: tuple[str, int, int],
    ):  # fmt: skip
        check_range("scale", scale)
        host = all(isinstance(x, np.ndarray) for x in (q, k, v))
        xp: Any = np if host else jnp
        q, k, v = (x.astype(np.float64) if host else as_float32(x) for x in (q, k, v))
        # So that neither scores nor their gradients overflow in float32. The factor
        # moves no word: it could be applied after each load.
        q, k, v = (xp.clip(x, -1e15, 1e15) for x in (q * scale, k, v))
        slow = {name: xp.zeros(shape, q.dtype) for name, *shape in scratch}
        super().__init__(cache, q=q, k=k, v=v, o=xp.zeros_like(v), **slow)
        self.xp = xp

    def scores(self, *, first: bool = True) -> None:
        """a = q k^T, added to what is there unless it is the `first` of a sum."""
        self._accumulate("a", lambda q, k: q @ k.T, "q", "k", first=first)

    def update_sums(self, *, first: bool) -> None:
        """Scores "a" become exp(a - m); "m", "l" and a cached "o" follow."""
        xp = self.xp
        if first:
            self.compute("m", _largest, "a")
        else:
            self.compute("new", lambda m, a: xp.maximum(m, _largest(a)), "m", "a")
            self.compute("m", lambda m, new: xp.exp(m - new), "m", "new")
            for name in ("l", "o") if "o" in self.fast else ("l",):
                self.compute(name, lambda x, shrink: x * shrink, name, "m")
            self.compute("m", lambda new: new, "new")
            self.free("new")
        self.compute("a", lambda a, m: xp.exp(a - m), "a", "m")
        self._accumulate("l", lambda a: a.sum(axis=1, keepdims=True), "a", first=first)

    def weights(self) -> None:
        """Scores "a" become exp(a - m) / l."""
        exp = self.xp.exp
        self.compute("a", lambda a, m, total: exp(a - m) / total, "a", "m", "l")

    def output(self, *, first: bool) -> None:
        """o = a v, added to what is there unless it is the `first` of a sum."""
        self._accumulate("o", lambda a, v: a @ v, "a", "v", first=first)

    def result(self) -> Any:
        """The output and what was counted."""
        names = ("loads", "stores", "peak")
        return self.slow["o"], {n: self.xp.asarray(getattr(self, n)) for n in names}

    def _accumulate(self, name: str, term: Any, *operands: str, first: bool) -> None:
        if first:
            self.compute(name, term, *operands)
        else:
            self.compute(name, lambda old, *x: old + term(*x), name, *operands)


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
        scale: factor of the scores; d ** -0.5 in transformers.

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
    check_range("cache", cache, low=smallest_cache(width, "naive"))
    machine = AttentionMachine(cache, q, k, v, scale, ("a", length, length))
    tokens = [slice(t, t + 1) for t in range(length)]
    for row in tokens:
        machine.load("q", row)
        for column in tokens:
            machine.load("k", column)
            machine.scores()
            machine.store("a", (row, column))
        machine.free("q", "k", "a")
        for column in tokens:
            machine.load("a", (row, column))
            machine.update_sums(first=column.start == 0)
        for column in tokens:
            machine.load("a", (row, column))
            machine.weights()
            machine.store("a", (row, column))
        machine.free("m", "l", "a")
        for column in tokens:
            machine.load("a", (row, column))
            machine.load("v", column)
            machine.output(first=column.start == 0)
        machine.store("o", row)
        machine.free("a", "v", "o")
    return machine.result()


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
        q: as in `naive_attention`.
        k: likewise.
        v: likewise.
        cache: M, in words, at least 4 d + 4.
        scale: as in `naive_attention`.
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
    check_range("cache", cache, low=smallest_cache(width, "flash"))
    columns = int(key_block(np, cache, length, width, tiling))
    rows = (cache - 2 * columns * width) // (2 * width + columns + 3)
    machine = AttentionMachine(
        cache, q, k, v, scale, ("m", length, 1), ("l", length, 1)
    )
    for column in slices(length, columns):
        first, last = column.start == 0, column.stop == length
        machine.load("k", column)
        machine.load("v", column)
        for row in slices(length, rows):
            machine.load("q", row)
            for name in () if first else ("o", "m", "l"):
                machine.load(name, row)
            machine.scores()
            machine.update_sums(first=first)
            machine.output(first=first)
            if last:
                machine.compute("o", lambda o, total: o / total, "o", "l")
            for name in ("o",) if last else ("o", "m", "l"):
                machine.store(name, row)
            machine.free("q", "a", "o", "m", "l")
        machine.free("k", "v")
    return machine.result()


def slices(total: int, size: int) -> Iterator[slice]:
    """Slices of `size` that cover `total`, the last one shorter."""
    return (slice(i, min(i + size, total)) for i in range(0, total, size))


def smallest_cache(width: int, program: str) -> int:
    """Words that a program cannot do without: those of tiles of one token."""
    return max(2 * width + 1, 4) if program == "naive" else 4 * width + 4


def key_block(xp: Any, words: Any, length: int, width: int, tiling: str) -> Any:
    """Keys per block of FlashAttention: c with 2 c d + (2 d + c + 3) <= M."""
    columns = (words - 2 * width - 3) // (2 * width + 1)
    if tiling == "quarter":
        columns = xp.minimum(columns, xp.maximum(words // (4 * width), 1))
    return xp.minimum(columns, length)


def _largest(a: Any) -> Any:
    return a.max(axis=1, keepdims=True)


def _tokens(key: Array) -> Any:
    return tuple(jax.random.normal(key, (3, 2, 8)))


EXAMPLES = {
    naive_attention: lambda key: (_tokens(key), {"cache": 17}),
    flash_attention: lambda key: (_tokens(key), {"cache": 36}),
}
