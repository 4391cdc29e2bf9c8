"""English prose as bytes: a novel and sixty years of speeches."""

from __future__ import annotations

import operator
import re

import numpy as np

from jaxzoo.data.shipped import read_shipped
from jaxzoo.data.source import Dataset, Feature, Source

__all__ = ["LETTERS", "moby_dick", "moby_dick_letters", "state_of_the_union"]

LETTERS = 27
"""Symbols of `moby_dick_letters`: 0 is the space, 1 to 26 are a to z."""


def moby_dick(*, window: int = 256) -> Dataset:
    """Herman Melville's Moby Dick, 1,204,997 bytes from "CHAPTER 1. Loomings." on.

    Each split is a contiguous piece: the first 90 % of the bytes train, the next 5 %
    validation, the last 5 % test. The borders do not depend on `window`; each split
    drops its last bytes if they do not fill a window.

    Args:
      window: bytes in one record, at least 1 and at most the bytes of the smallest
        split.

    Returns:
      Splits "train", "validation" and "test" of token uint8 [window], UTF-8 bytes;
      `bytes(record["token"])` is the text. Windows do not overlap and stand in
      reading order.

    Raises:
      FileNotFoundError: the shipped file is missing.
      ValueError: `window` is out of range, or the shipped file is damaged.

    >>> data = moby_dick(window=64)
    >>> bytes(data.split("train")[0]["token"])[:20]
    b'CHAPTER 1. Loomings.'
    >>> [len(split) for split in data.splits.values()]
    [16945, 941, 941]
    """
    return _windows(
        "moby_dick",
        window,
        "Moby Dick; or, The Whale, by Herman Melville (1851), UTF-8 bytes.",
    )


def moby_dick_letters(split: str, length: int) -> np.ndarray:
    """Pieces of Moby Dick in 27 symbols, for models too small for bytes.

    Letters lose their case, and whatever lies between words becomes one space.

    Args:
      split: "train", "validation" or "test" of `moby_dick`.
      length: symbols of a piece, at least 1.

    Returns:
      int32 [N, length] in [0, `LETTERS`), in reading order.

    Raises:
      ValueError: there is no such split, or `length` is below 1.

    >>> piece = moby_dick_letters("train", 16)[0]
    >>> "".join(" abcdefghijklmnopqrstuvwxyz"[i] for i in piece)
    'chapter loomings'
    """
    if length < 1:
        raise ValueError(f"length={length} is not at least 1.")
    text = moby_dick(window=64).split(split).arrays["token"].tobytes().decode("latin")
    plain = re.sub("[^a-z]+", " ", text.lower()).encode()
    symbols = np.frombuffer(plain, np.uint8).astype(np.int32) % 32
    return symbols[: len(symbols) // length * length].reshape(-1, length)


def state_of_the_union(*, window: int = 256) -> Dataset:
    """US State of the Union addresses, 1961 to 2021, 2,143,140 bytes by year.

    As the order is by year, validation and test are the most recent speeches: a
    small honest shift in time. Cut as `moby_dick`, with the same arrays.

    Args:
      window: bytes in one record, at least 1 and at most the bytes of the smallest
        split.

    Returns:
      Splits "train", "validation" and "test" of token uint8 [window], UTF-8 bytes.

    Raises:
      FileNotFoundError: the shipped file is missing.
      ValueError: `window` is out of range, or the shipped file is damaged.

    >>> bytes(state_of_the_union().split("train")[0]["token"])[:43]
    b'To the Congress of the United States: Once '
    """
    return _windows(
        "state_of_the_union",
        window,
        "US State of the Union addresses, 1961 to 2021 in order of year, UTF-8 bytes.",
    )


def _windows(name: str, window: int, description: str) -> Dataset:
    tokens = np.frombuffer(read_shipped(f"{name}.txt"), np.uint8)
    total = len(tokens)
    borders = (0, total * 90 // 100, total * 95 // 100, total)
    smallest = min(b - a for a, b in zip(borders, borders[1:], strict=False))
    window = operator.index(window)
    if not 1 <= window <= smallest:
        raise ValueError(f"window={window} is not in [1, {smallest}].")
    splits = {}
    for i, split in enumerate(("train", "validation", "test")):
        piece = tokens[borders[i] : borders[i + 1]]
        whole = len(piece) // window * window
        splits[split] = Source({"token": piece[:whole].reshape(-1, window)})
    return Dataset(
        name=name,
        splits=splits,
        description=f"{description} Contiguous 90/5/5 % of the bytes.",
        features={"token": Feature((window,), "uint8", (0, 255), "UTF-8 bytes")},
        licence="public domain",
    )
