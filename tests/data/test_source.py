"""Source, Dataset, batches and their Grain form."""

from __future__ import annotations

import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any

import grain
import numpy as np
import pytest

from jaxzoo.data.source import (
    Dataset,
    Feature,
    Source,
    batch,
    batch_indices,
    grain_batches,
    take,
)


def small_source(n: int = 7) -> Source:
    return Source(
        {
            "x": np.arange(2 * n, dtype=np.float32).reshape(n, 2),
            "y": np.arange(n, dtype=np.int32),
            "s": np.array([f"caption {i}" for i in range(n)]),
        }
    )


class Records:
    """A random-access source that is no Source: nested, with bytes."""

    def __init__(self, n: int, together: bool = False) -> None:
        self.n = n
        if together:
            self.__dict__["__getitems__"] = lambda ids: [self[i] for i in ids]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        return {"y": np.int32(i), "b": b"z\0" * i, "n": {"f": np.full(3, i)}}


def run_python(arguments: list[str]) -> subprocess.CompletedProcess:
    root = str(pathlib.Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a
    )


# --- Source and Dataset -----------------------------------------------------------


def test_source_indexing_rule() -> None:
    source = small_source()
    record = source[3]
    assert record["y"] == 3 and record["s"] == "caption 3"
    np.testing.assert_array_equal(record["x"], [6, 7])
    assert isinstance(source[np.int64(2)], dict)
    assert isinstance(source[2:5], Source) and len(source[2:5]) == 3
    picked = source[np.array([6, 0, 1, 6])]
    assert isinstance(picked, Source)
    assert picked.arrays["y"].tolist() == [6, 0, 1, 6]
    assert [r["y"] for r in source] == list(range(7))
    assert len(source[[]]) == 0


@pytest.mark.parametrize("index", [-1, 7, 2**40, [0, -1], [7]])
def test_source_index_out_of_range(index) -> None:
    with pytest.raises(IndexError, match=r"\[0, 7\)"):
        small_source()[index]


@pytest.mark.parametrize("index", [[True, False], [0.0, 1.0], [[0], [1]]])
def test_source_index_of_wrong_kind(index) -> None:
    with pytest.raises(TypeError, match="1-D array of integers"):
        small_source()[index]


def test_source_is_immutable() -> None:
    mine = np.zeros(3)
    source = Source({"a": mine})
    mine[0] = 5
    assert source.arrays["a"][0] == 0
    for part in (
        source,
        source[1:],
        source[[0, 2]],
        pickle.loads(pickle.dumps(source)),
    ):
        with pytest.raises(ValueError, match="read-only"):
            part.arrays["a"][0] = 1
    with pytest.raises(TypeError):
        source.arrays["a"] = mine  # pyright: ignore[reportIndexIssue]
    # What is read-only already is not copied: memory maps stay on disk.
    assert np.shares_memory(source.arrays["a"], Source(source.arrays).arrays["a"])


@pytest.mark.parametrize(
    "arrays", [{}, {"a": np.zeros(3), "b": np.zeros(4)}, {"a": np.float32(1)}]
)
def test_source_needs_one_common_length(arrays) -> None:
    with pytest.raises(ValueError, match="leading length"):
        Source(arrays)


def test_source_repr_has_no_address_and_pickle_keeps_everything() -> None:
    source = small_source()
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source)
    assert repr(source).startswith("Source(7 records: x float32 (2,)")
    assert same(dict(copy.arrays), dict(source.arrays))


def test_unknown_split_names_those_that_exist() -> None:
    data = Dataset(
        "toy",
        {"train": small_source(), "test": small_source(3)},
        "",
        {"y": Feature((), "int32", (0, 6), "")},
        "",
    )
    assert len(data.split("test")) == 3
    with pytest.raises(ValueError, match="'valid'.*toy.*'train', 'test'"):
        data.split("valid")
    assert len(pickle.loads(pickle.dumps(data)).split("train")) == 7


# --- take and batch ---------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True])
def test_take_from_any_random_access_source(together) -> None:
    got = take(Records(6, together), np.array([5, 0, 2]))
    assert got["y"].tolist() == [5, 0, 2] and got["y"].dtype == np.int32
    # numpy's bytes type would drop the trailing zeros
    assert got["b"].tolist() == [b"z\0" * 5, b"", b"z\0z\0"]
    assert got["n"]["f"].tolist() == [[5] * 3, [0] * 3, [2] * 3]


def test_take_uses_getitems_where_it_exists() -> None:
    class Counted(Records):
        calls: list = []

        def __getitems__(self, ids):
            self.calls.append(list(ids))
            return [self[i] for i in ids]

    take(Counted(6), [4, 1])
    assert Counted.calls == [[4, 1]]


def test_take_from_a_source_gives_fresh_writeable_arrays() -> None:
    source = small_source()
    got = take(source, [1, 1, 4])
    got["x"][:] = -1
    assert source[1]["x"].tolist() == [2, 3] and got["y"].tolist() == [1, 1, 4]


def test_take_from_a_grain_dataset() -> None:
    ds = grain.MapDataset.source(small_source()).map(lambda r: {"z": r["y"] * 10})
    assert take(ds, [2, 6])["z"].tolist() == [20, 60]


def test_take_refuses() -> None:
    with pytest.raises(IndexError, match=r"\[0, 4\)"):
        take(Records(4), [4])
    with pytest.raises(IndexError, match=r"\[0, 4\)"):
        take(Records(4), [-1])
    with pytest.raises(TypeError, match="record 1 of the source is int"):
        take([5, 6], [1])
    with pytest.raises(ValueError, match="'n/f'.*shapes"):
        take([{"n": {"f": np.zeros(i)}} for i in range(3)], [0, 2])


def test_batch_is_take_of_indices_for_both_kinds() -> None:
    source, plain = small_source(), Records(7)
    for t in (0, 1, 5, 2**40):
        ids = batch_indices(3, t, num_examples=7, batch_size=5)
        assert batch(source, 3, t, batch_size=5)["y"].tolist() == ids.tolist()
        assert batch(plain, 3, t, batch_size=5)["y"].tolist() == ids.tolist()
    part = batch(source, 3, 1, batch_size=5, shard=(1, 2))
    assert part["y"].tolist() == batch(source, 3, 1, batch_size=5)["y"][1::2].tolist()


# --- Grain ------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [(0, 1), (2, 3)])
def test_grain_element_t_is_batch_t(shard) -> None:
    source = small_source()
    ds = grain_batches(source, seed=9, batch_size=5, shard=shard)
    it = iter(ds)
    for t in range(12):
        want = batch(source, 9, t, batch_size=5, shard=shard)
        assert same(next(it), want) and same(ds[t], want)
    far = iter(ds[2**39 :])
    assert same(next(far), batch(source, 9, 2**39, batch_size=5, shard=shard))


def test_grain_resumes_exactly() -> None:
    def new():
        return iter(grain_batches(small_source(), seed=1, batch_size=4))

    it = new()
    for _ in range(6):
        next(it)
    state = it.get_state()
    rest = [next(it) for _ in range(5)]
    other = new()
    other.set_state(state)
    assert all(same(next(other), want) for want in rest)
    it.set_state(state)
    assert same(next(it), rest[0])


def test_grain_length_and_early_errors() -> None:
    ds = grain_batches(small_source(), seed=1, batch_size=4, num_batches=3)
    assert len(ds) == 3 and len(list(ds.to_iter_dataset())) == 3
    with pytest.raises(ValueError, match="batch_size=0"):
        grain_batches(small_source(), seed=1, batch_size=0)
    with pytest.raises(ValueError, match="num_batches=0"):
        grain_batches(small_source(), seed=1, batch_size=1, num_batches=0)


def test_source_is_a_grain_source() -> None:
    source = small_source()
    loader = grain.DataLoader(
        data_source=source,
        sampler=grain.samplers.IndexSampler(7, shuffle=True, seed=0, num_epochs=1),
        operations=[grain.transforms.Batch(7)],
        worker_count=0,
    )
    assert sorted(next(iter(loader))["y"].tolist()) == list(range(7))
    shuffled = grain.MapDataset.source(source).shuffle(seed=1)
    assert sorted(r["y"].item() for r in shuffled) == list(range(7))


WORKERS = """
import numpy as np, grain
from jaxzoo.data.source import Source, batch, grain_batches
if __name__ == "__main__":
    source = Source({"y": np.arange(11)})
    ds = grain_batches(source, seed=2, batch_size=4, num_batches=6).to_iter_dataset()
    it = ds.mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    got = [b["y"].tolist() for b in it]
    assert got == [batch(source, 2, t, batch_size=4)["y"].tolist() for t in range(6)]
    print("equal")
"""


def test_two_grain_workers_give_the_same_batches(tmp_path) -> None:
    """In a process of its own: workers need a __main__ guard and unparsed flags."""
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    done = run_python([str(script)])
    assert "equal" in done.stdout, done.stderr[-2000:]


def test_import_is_light() -> None:
    code = (
        "import sys; from jaxzoo.data import source, shipped, idx, text, tfds;"
        "from jaxzoo.data import digits, emoji, fashion_mnist;"
        "heavy = {'jax', 'grain', 'sklearn', 'tensorflow', 'tensorflow_datasets'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = run_python(["-c", code])
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
