"""The order of examples: which of them make batch t. Import it from `source`."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np

__all__ = ["MAX_STEP", "batch_indices", "checked_integer"]

MAX_STEP = 2**40
MAX_BATCH = 2**23  # with MAX_STEP this keeps every epoch number below 2**64


def batch_indices(
    seed: int,
    step: int,
    *,
    num_examples: int,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Which examples make batch `step`: a pure function of its arguments.

    Row j of batch t stands at position p = t * batch_size + j of an endless stream;
    its epoch is p // num_examples and its example is
    `permutation[epoch][p % num_examples]`. So every epoch holds each example exactly
    once and batches run over its edges. The permutation is the stable argsort of
    Philox's raw 64-bit words under the key (seed, epoch); numpy keeps raw words equal
    over its versions, which it does not promise for `Generator.permutation`.

    Args:
      seed: integer in [0, 2**64).
      step: integer in [0, 2**40].
      num_examples: length of the source, in [1, 2**31).
      batch_size: rows of the whole batch over all hosts, in [1, 2**23]; may exceed
        num_examples.
      shard: (index, count): only the rows `[index::count]` of the batch, for process
        `index` of `count`. All shards together are the whole batch.

    Returns:
      int32 [batch_size] (or this shard's part), values in [0, num_examples).

    Raises:
      ValueError: an argument is out of range; the message names it.

    >>> batch_indices(0, 0, num_examples=5, batch_size=3).tolist()
    [0, 2, 1]
    >>> batch_indices(0, 1, num_examples=5, batch_size=3).tolist()
    [4, 3, 3]
    """
    seed = checked_integer("seed", seed, 0, 2**64 - 1)
    step = checked_integer("step", step, 0, MAX_STEP)
    num_examples = checked_integer("num_examples", num_examples, 1, 2**31 - 1)
    batch_size = checked_integer("batch_size", batch_size, 1, MAX_BATCH)
    if not (isinstance(shard, tuple) and len(shard) == 2):
        raise ValueError(f"shard={shard!r} is not a pair (index, count).")
    index, count = shard
    count = checked_integer("shard count", count, 1, batch_size)
    index = checked_integer("shard index", index, 0, count - 1)

    # Python integers: step * batch_size passes 2**53, where floats lose units.
    epoch, start = divmod(step * batch_size, num_examples)
    rows = np.empty(batch_size, np.int32)
    filled = 0
    while filled < batch_size:
        piece = _permutation(seed, epoch, num_examples)[start:][: batch_size - filled]
        rows[filled : filled + len(piece)] = piece
        filled, epoch, start = filled + len(piece), epoch + 1, 0
    return rows[index::count]


def checked_integer(name: str, value: Any, low: int, high: int) -> int:
    """`value` as a Python int; a ValueError names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} is not an integer.") from None
    if not low <= number <= high:
        raise ValueError(f"{name}={number} is not in [{low}, {high}].")
    return number


@functools.lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    key = np.array([seed, epoch], np.uint64)
    words = np.random.Philox(key=key).random_raw(num_examples)
    order = np.argsort(words, kind="stable").astype(np.int32)
    order.flags.writeable = False  # the cache hands the same array out again
    return order
