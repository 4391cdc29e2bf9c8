"""The order of examples: which of them make batch t."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxzoo.data.source import batch_indices


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(1, 200),
    st.integers(1, 64),
    st.integers(1, 3),
)
def test_every_epoch_holds_every_example_once(seed, n, size, epochs) -> None:
    steps = -(-n * epochs // size)
    stream = np.concatenate(
        [batch_indices(seed, t, num_examples=n, batch_size=size) for t in range(steps)]
    )
    assert stream.dtype == np.int32 and len(stream) == steps * size
    for epoch in range(epochs):
        ids = stream[epoch * n : (epoch + 1) * n]
        assert np.array_equal(np.sort(ids), np.arange(n))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 300), st.integers(1, 300), st.data())
def test_shards_partition_the_batch(step, n, size, data) -> None:
    count = data.draw(st.integers(1, min(size, 9)))
    kwargs: Any = {"num_examples": n, "batch_size": size}
    whole = batch_indices(11, step, **kwargs)
    again = np.empty_like(whole)
    for i in range(count):
        again[i::count] = batch_indices(11, step, shard=(i, count), **kwargs)
    assert np.array_equal(whole, again)


def test_indices_are_pure_and_golden() -> None:
    """The figures pin the order: a change would break every resumed run."""
    kwargs: Any = {"num_examples": 10, "batch_size": 10}
    first = batch_indices(42, 0, **kwargs).tolist()
    second = batch_indices(42, 1, **kwargs).tolist()
    assert first == GOLDEN[0] and second == GOLDEN[1]
    batch_indices(42, 0, **kwargs)[:] = 0  # a caller's edit does not reach the cache
    assert batch_indices(42, 0, **kwargs).tolist() == first
    assert batch_indices(43, 0, **kwargs).tolist() != first


GOLDEN = (
    [7, 1, 6, 4, 3, 5, 9, 0, 2, 8],
    [4, 9, 5, 3, 0, 2, 7, 1, 6, 8],
)


def test_far_steps_are_exact() -> None:
    step, size, n = 2**40 - 1, 100_003, 7  # the position needs 57 bits
    ids = batch_indices(2**64 - 1, step, num_examples=n, batch_size=size)
    skip = -(step * size) % n
    rows = ids[skip:][: (size - skip) // n * n].reshape(-1, n)
    assert np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(n), (len(rows), 1)))


def test_permutation_looks_uniform() -> None:
    ids = [batch_indices(s, 0, num_examples=5, batch_size=1)[0] for s in range(2000)]
    counts = np.bincount(ids, minlength=5)
    # chi-square with 4 degrees of freedom; 23.5 is its 99.99 % point
    assert ((counts - 400) ** 2 / 400).sum() < 23.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": -1}, "step=-1"),
        ({"step": 2**40 + 1}, "step=1099511627777"),
        ({"step": 1.5}, r"step=1\.5 is not an integer"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard": (2, 2)}, "shard index=2"),
        ({"shard": (0, 0)}, "shard count=0"),
        ({"shard": (0, 5)}, "shard count=5"),
        ({"shard": 3}, "shard=3 is not a pair"),
    ],
)
def test_bad_arguments_are_named(changed, message) -> None:
    good: Any = {"seed": 0, "step": 0, "num_examples": 9, "batch_size": 4}
    with pytest.raises(ValueError, match=message):
        batch_indices(**{**good, **changed})
