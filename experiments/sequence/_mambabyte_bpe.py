"""Byte-pair encoding: a subword vocabulary of a text, and a text in it."""

from collections import Counter
from typing import NamedTuple

import numpy as np

__all__ = ["Vocabulary", "encode", "learn"]


class Vocabulary(NamedTuple):
    """Subwords, numbered after the 256 bytes.

    Attributes:
        merges: `[K, 2]`; subword 256 + i is the pair merges[i].
        words: the bytes of all 256 + K symbols.
    """

    merges: np.ndarray
    words: list[bytes]

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each symbol, int32."""
        return np.array([len(word) for word in self.words], np.int32)

    def table(self) -> np.ndarray:
        """The bytes of each symbol, `[256 + K, longest]`, with zeros after its end."""
        longest = max(map(len, self.words))
        rows = [list(word) + [0] * (longest - len(word)) for word in self.words]
        return np.array(rows, np.int32)


def learn(text: np.ndarray, size: int) -> Vocabulary:
    """The vocabulary that merges the commonest pair within words, again and again.

    Args:
        text: uint8 `[N]`.
        size: of the vocabulary, at least 256.
    """
    places = np.flatnonzero(_starts(text))
    counts = Counter(map(bytes, np.split(text, places[1:])))
    pieces = [np.frombuffer(word, np.uint8) for word in counts]
    lengths = [len(piece) for piece in pieces]
    symbols = np.concatenate(pieces).astype(np.int64)
    weights = np.repeat(np.array(list(counts.values()), float), lengths)
    starts = np.zeros(len(symbols), bool)
    starts[np.cumsum([0, *lengths[:-1]])] = True
    words, merges = [bytes([i]) for i in range(256)], []
    while len(words) < size:
        inside = ~starts[1:]
        pairs = (symbols[:-1] * size + symbols[1:])[inside]
        best = int(np.argmax(np.bincount(pairs, weights[1:][inside])))
        first, second = divmod(best, size)
        symbols, kept = _merge(symbols, starts, first, second, len(words))
        starts, weights = starts[kept], weights[kept]
        words.append(words[first] + words[second])
        merges.append((first, second))
    return Vocabulary(np.array(merges).reshape(-1, 2), words)


def encode(vocabulary: Vocabulary, text: np.ndarray) -> np.ndarray:
    """Symbols of a text, uint8 `[N]`: its pairs merged in the order of learning."""
    symbols, starts = text.astype(np.int64), _starts(text)
    for i, (first, second) in enumerate(vocabulary.merges):
        symbols, kept = _merge(symbols, starts, first, second, 256 + i)
        starts = starts[kept]
    return symbols.astype(np.int32)


def _starts(text: np.ndarray) -> np.ndarray:
    """Where words begin: letters with the space before them, or what is no letter."""
    lower = text | 32
    letter = ((lower >= 97) & (lower <= 122)) | (text >= 128)
    kind = np.where(letter, 1, np.where(text == 32, 2, 0))
    before = np.concatenate([[-1], kind[:-1]])
    joined = (kind == 1) & (before == 2)
    return ((kind != before) & ~joined) | (kind == 2)


def _merge(
    symbols: np.ndarray, starts: np.ndarray, first: int, second: int, new: int
) -> tuple[np.ndarray, np.ndarray]:
    """The symbols with `new` for each such pair, and which old places are left."""
    hit = np.zeros(len(symbols), bool)
    hit[:-1] = (symbols[:-1] == first) & (symbols[1:] == second) & ~starts[1:]
    if first == second:  # of a run every other pair
        place = np.arange(len(symbols))
        begin = np.maximum.accumulate(np.where(hit, -1, place))
        hit &= (place - begin) % 2 == 1
    kept = np.ones(len(symbols), bool)
    kept[1:] = ~hit[:-1]
    return np.where(hit, new, symbols)[kept], kept
