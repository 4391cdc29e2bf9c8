"""One interface for all data: named arrays, and batch t as a function of (seed, t).

A `Source` holds named arrays with one leading axis and is a Grain random-access
source. A `Dataset` is a few of them, its splits. Nothing here keeps a cursor: which
examples make batch t follows from (seed, t) alone, so a run resumes exactly, and a
host can compute its share of a batch without asking the others.

This file needs numpy alone; Grain is imported by `grain_batches` when it is called.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from jaxzoo.data._order import MAX_STEP, batch_indices, checked_integer

if TYPE_CHECKING:
    import grain

__all__ = [
    "Dataset", "Feature", "RandomAccess", "Source", "batch", "batch_indices",
    "grain_batches", "take",
]  # fmt: skip


class RandomAccess(Protocol):
    """What a split must offer: a length, and one record (a dict) for each index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class Feature(NamedTuple):
    """What one array of a data set holds.

    Attributes:
      shape: shape of one record; None stands for a length that varies.
      dtype: numpy dtype as a string; "object" for bytes of any length.
      range: lowest and highest value that may occur, or None where it has no sense.
      meaning: one line on what the values are.
    """

    shape: tuple[int | None, ...]
    dtype: str
    range: tuple[float, float] | None
    meaning: str


class Dataset(NamedTuple):
    """A data set: its splits, and what a reader must know of them.

    Attributes:
      name: short name.
      splits: one random-access source for each split name.
      description: where the data come from, how the splits were cut.
      features: for each array its shape, dtype, range and meaning.
      licence: licence and the credit line that it asks for.
    """

    name: str
    splits: Mapping[str, RandomAccess]
    description: str
    features: Mapping[str, Feature]
    licence: str

    def split(self, name: str) -> Any:
        """The split called `name`; a ValueError names those that exist."""
        if name not in self.splits:
            raise ValueError(
                f"name={name!r} is not a split of {self.name}, which has "
                f"{', '.join(map(repr, self.splits))}."
            )
        return self.splits[name]


class Source:
    """Named arrays with one common leading axis; immutable.

    `source[3]` is one record, `{name: array[3]}`; a slice or a 1-D array of integers
    gives a smaller `Source`. `take` gives a batch as a plain dict. Integers count
    from 0 and never from the end, since a negative id is a bug in a sampler.

    A writeable array is copied, a read-only one (a memory map, another Source's
    array) is shared, so nobody can change a source behind its back.

    >>> source = Source({"x": np.arange(6.0).reshape(3, 2), "y": [0, 1, 0]})
    >>> source
    Source(3 records: x float64 (2,), y int64 ())
    >>> source[1]["x"]
    array([2., 3.])
    >>> source[1:].arrays["y"]
    array([1, 0])
    """

    __slots__ = ("_arrays", "_length")

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        """Builds a source.

        Args:
          arrays: name -> array-like [N, ...], any dtypes, the same N for all.

        Raises:
          ValueError: there is no array, a scalar, or two different lengths.
        """
        frozen = {name: _frozen(array) for name, array in arrays.items()}
        lengths = {n: len(a) if a.ndim else None for n, a in frozen.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise ValueError(
                f"arrays has leading lengths {lengths}, expected at least one array "
                "and one common leading length."
            )
        self._arrays = frozen
        self._length = next(len(a) for a in frozen.values())

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The whole arrays by name, read-only."""
        return MappingProxyType(self._arrays)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Source({name: a[index] for name, a in self._arrays.items()})
        if np.ndim(index):
            return Source({n: _sealed(a) for n, a in self._gather(index).items()})
        i = operator.index(index)
        if not 0 <= i < self._length:
            raise IndexError(f"index={i} is not in [0, {self._length}).")
        return {name: array[i] for name, array in self._arrays.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(self._length))

    def __repr__(self) -> str:
        # Grain compares the repr of a source when it restores an iterator, so it
        # must say nothing of addresses.
        parts = [f"{n} {a.dtype} {a.shape[1:]}" for n, a in self._arrays.items()]
        return f"Source({self._length} records: {', '.join(parts)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Source, (self._arrays,)

    def _gather(self, indices: Any) -> dict[str, np.ndarray]:
        """Fresh writeable arrays of the records `indices`."""
        ids = np.asarray(indices)
        if ids.size == 0:
            ids = ids.astype(np.int64)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise TypeError(
                f"indices has dtype {ids.dtype} and shape {ids.shape}, expected a 1-D "
                "array of integers."
            )
        if ids.size and not (0 <= ids.min() and ids.max() < self._length):
            raise IndexError(
                f"indices reach from {ids.min()} to {ids.max()}, expected values in "
                f"[0, {self._length})."
            )
        return {name: array[ids] for name, array in self._arrays.items()}


def take(source: RandomAccess, indices: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Stacks the records `indices` of any random-access source.

    Args:
      source: a `Source`, a TFDS data source, a `grain.MapDataset`, or anything with
        integer indexing whose records are dicts; `__getitems__` is used if it exists.
      indices: integers [B] in [0, len(source)).

    Returns:
      name -> array [B, ...], fresh and writeable; nested dicts stay nested, and bytes
      become an object array, as numpy's own bytes type drops trailing zeros.

    Raises:
      IndexError: an index is out of range.
      TypeError: a record is not a dict.
      ValueError: a field has different shapes in the records, so it cannot be stacked.

    >>> take(Source({"y": np.array([5, 6, 7], np.int32)}), [2, 0])
    {'y': array([7, 5], dtype=int32)}
    """
    if isinstance(source, Source):
        return source._gather(indices)
    ids = [operator.index(i) for i in indices]
    if not ids or not (0 <= min(ids) and max(ids) < len(source)):
        raise IndexError(
            f"indices={ids[:8]} (at most 8 shown) must be at least one integer in "
            f"[0, {len(source)})."
        )
    together = getattr(source, "__getitems__", None)
    records = together(ids) if together else [source[i] for i in ids]
    for i, record in zip(ids, records, strict=True):
        if not isinstance(record, Mapping):
            raise TypeError(
                f"record {i} of the source is {type(record).__name__}, expected a dict."
            )
    return _stack(records, "")


def batch(
    source: RandomAccess, seed: int, step: int, *,
    batch_size: int, shard: tuple[int, int] = (0, 1),
) -> dict[str, Any]:  # fmt: skip
    """Batch `step` of a source: `take(source, batch_indices(seed, step, ...))`.

    Args:
      source: any random-access source of dicts.
      seed: integer in [0, 2**64).
      step: integer in [0, 2**40].
      batch_size: rows over all hosts, at least 1.
      shard: (index, count) of this process; it gets the rows `[index::count]`.

    Returns:
      name -> array [batch_size, ...], or this shard's rows of it.

    Raises:
      ValueError: an argument is out of range; the message names it.

    >>> batch(Source({"y": np.arange(5)}), 0, 1, batch_size=3)["y"].tolist()
    [4, 3, 3]
    """
    ids = batch_indices(
        seed, step, num_examples=len(source), batch_size=batch_size, shard=shard
    )
    return take(source, ids)


def grain_batches(
    source: RandomAccess, *, seed: int, batch_size: int,
    shard: tuple[int, int] = (0, 1), num_batches: int | None = None,
) -> grain.MapDataset:  # fmt: skip
    """A Grain data set whose element t is `batch(source, seed, t)`.

    Go on with Grain's own verbs: `iter(ds)` has `get_state` and `set_state`,
    `ds.map(f)`, `ds[first_step:]`, `ds.to_iter_dataset(...).mp_prefetch(...)`. Order
    and content do not depend on the number of threads or workers.

    Args:
      source: any random-access source of dicts; must pickle where workers are used.
      seed: integer in [0, 2**64).
      batch_size: rows over all hosts, at least 1.
      shard: (index, count) of this process; it gets the rows `[index::count]`.
      num_batches: length, in [1, 2**40]; None for the largest, an endless stream in
        practice (MapDataset starts again at 0 past its end).

    Returns:
      A `grain.MapDataset` of dicts.

    Raises:
      ValueError: an argument is out of range; the message names it.

    >>> it = iter(grain_batches(Source({"y": np.arange(5)}), seed=0, batch_size=3))
    >>> next(it)["y"].tolist(), next(it)["y"].tolist()
    ([0, 2, 1], [4, 3, 3])
    """
    import grain
    from absl import flags

    # Grain's worker processes read absl flags and refuse unparsed ones, which is what
    # every program that does not start through absl.app has.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    length = MAX_STEP if num_batches is None else num_batches
    length = checked_integer("num_batches", length, 1, MAX_STEP)
    options = {"seed": seed, "batch_size": batch_size, "shard": shard}
    # A wrong argument must fail here, not in a prefetch thread.
    batch_indices(step=0, num_examples=len(source), **options)
    return grain.MapDataset.source(_Batches(source, length, options))


class _Batches:
    """Random access to whole batches, computed when asked for."""

    def __init__(self, source: RandomAccess, length: int, options: dict) -> None:
        self._source, self._length, self._options = source, length, options

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return batch(self._source, step=index, **self._options)

    def __repr__(self) -> str:
        return f"_Batches({self._source!r}, {self._length}, {self._options})"


def _sealed(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def _frozen(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return _sealed(array.copy()) if array.flags.writeable else array


def _stack(values: Sequence[Any], path: str) -> Any:
    first = values[0]
    if isinstance(first, Mapping):
        return {k: _stack([v[k] for v in values], f"{path}/{k}") for k in first}
    if isinstance(first, bytes):
        return np.array(values, dtype=object)
    shapes = sorted({np.shape(value) for value in values})
    if len(shapes) > 1:
        raise ValueError(
            f"field {path[1:]!r} has the shapes {shapes} in one batch; map the records "
            "to one shape first."
        )
    return np.stack(values)
