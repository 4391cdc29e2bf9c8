"""TFDS on a builder written here, in array_record, without TensorFlow or network."""

from __future__ import annotations

import pathlib
import pickle
import shutil
import sys
from typing import Any

import grain
import numpy as np
import pytest

from jaxzoo.data.source import batch, batch_indices, grain_batches, take
from jaxzoo.data.tfds import tfds_dataset

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


def image(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (64, 64), np.uint8)


class JaxzooToy(tfds.core.GeneratorBasedBuilder):
    """Forty records of every kind of feature."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="toy",
            license="CC0",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(64, 64), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "text": tfds.features.Text(),
                    "nested": {"weight": tfds.features.Scalar(np.float32)},
                    "list": tfds.features.Sequence(np.int32),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._records(0, 40), "test": self._records(40, 50)}

    def _records(self, low, high):
        for i in range(low, high):
            yield (
                i,
                {
                    "image": image(i),
                    "label": i % 10,
                    "text": f"n{i}",
                    "nested": {"weight": i / 4},
                    "list": [i, i],
                },
            )

    _generate_examples = _records


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    place = tmp_path_factory.mktemp("tfds")
    builder = JaxzooToy(data_dir=str(place), file_format="array_record")
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    return place


def identity(record) -> int:
    return int(record["text"][1:])


def test_records_and_features(folder) -> None:
    data = tfds_dataset("jaxzoo_toy", data_dir=folder)
    assert data.name == "jaxzoo_toy/1.0.0" and data.licence == "CC0"
    train = data.split("train")
    assert (len(train), len(data.split("test"))) == (40, 10)
    assert sorted(identity(train[i]) for i in range(40)) == list(range(40))
    for i in (0, 17):
        record = train[i]
        n = identity(record)
        assert np.array_equal(record["image"], image(n))
        assert record["label"] == n % 10 and record["label"].dtype == np.int64
        assert record["nested"]["weight"].dtype == np.float32
        assert record["nested"]["weight"] == n / 4
        assert record["list"].tolist() == [n, n] and record["list"].dtype == np.int32
    assert data.features["image"][:2] == ((64, 64), "uint8")
    assert data.features["label"][:3] == ((), "int64", (0, 9))
    assert data.features["text"].dtype == "object"
    assert data.features["list"].shape == (None,)
    assert data.features["nested"].dtype == "nested"
    assert "tensorflow" not in sys.modules


def test_splits_may_be_chosen_and_named(folder) -> None:
    data = tfds_dataset(
        "jaxzoo_toy",
        data_dir=folder,
        splits={"fit": "train[:75%]", "check": "train[75%:]+test"},
    )
    fit, check = data.split("fit"), data.split("check")
    assert (len(fit), len(check)) == (30, 20)
    ids = [identity(s[i]) for s in (fit, check) for i in range(len(s))]
    assert sorted(ids) == list(range(50))
    data = tfds_dataset("jaxzoo_toy", data_dir=folder, splits=["test"])
    assert list(data.splits) == ["test"]
    with pytest.raises(ValueError, match="'train'.*'test'"):
        data.split("train")


def test_take_batch_and_grain(folder) -> None:
    train = tfds_dataset("jaxzoo_toy", data_dir=folder).split("train")
    got = take(train, [3, 0])
    assert got["image"].shape == (2, 64, 64) and got["image"].dtype == np.uint8
    assert got["nested"]["weight"].dtype == np.float32
    assert got["text"].tolist() == [train[3]["text"], train[0]["text"]]
    it = iter(grain_batches(train, seed=5, batch_size=16))
    for t in range(4):
        ids = batch_indices(5, t, num_examples=40, batch_size=16)
        want = [train[int(i)]["text"] for i in ids]
        assert next(it)["text"].tolist() == want
        assert batch(train, 5, t, batch_size=16)["text"].tolist() == want
    ds: Any = grain.MapDataset.source(train).map(lambda r: {"y": r["label"]}).batch(8)
    assert ds[0]["y"].shape == (8,)
    copy = pickle.loads(pickle.dumps(train))
    assert copy[7]["text"] == train[7]["text"]


def test_index_out_of_range(folder) -> None:
    train = tfds_dataset("jaxzoo_toy", data_dir=folder).split("train")
    for i in (-1, 40):
        with pytest.raises(IndexError, match=rf"index={i} is not in \[0, 40\)"):
            train[i]


def test_unknown_names(folder) -> None:
    with pytest.raises(ValueError, match="'nope'.*'train', 'test'"):
        tfds_dataset("jaxzoo_toy", data_dir=folder, splits=["nope"])
    with pytest.raises(ValueError, match="'train' is one string"):
        tfds_dataset("jaxzoo_toy", data_dir=folder, splits="train")
    with pytest.raises(ValueError, match="'no_such_thing' is not a data set") as caught:
        tfds_dataset("no_such_thing", data_dir=folder)
    assert len(str(caught.value)) < 500


def test_unprepared_data_set_names_the_remedy_and_downloads_nothing(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="'mnist' is not prep.*download=True"):
        tfds_dataset("mnist", data_dir=tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_download_prepares_array_record(tmp_path, monkeypatch) -> None:
    calls = []
    real = tfds.builder

    def builder(name, data_dir, **kwargs):
        calls.append(kwargs)
        if any((tmp_path / name).glob("*")):
            return real(name, data_dir=data_dir)
        return JaxzooToy(data_dir=data_dir, **kwargs)

    monkeypatch.setattr(tfds, "builder", builder)
    data = tfds_dataset("jaxzoo_toy", data_dir=tmp_path, download=True)
    assert len(data.split("train")) == 40
    assert calls == [{}, {"file_format": "array_record"}]


def test_tfrecord_files_name_the_remedy(folder, tmp_path) -> None:
    place = tmp_path / "jaxzoo_toy"
    shutil.copytree(folder / "jaxzoo_toy", place)
    info = place / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for path in place.rglob("*.array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    with pytest.raises(ValueError, match="has no random access; prepare it again"):
        tfds_dataset("jaxzoo_toy", data_dir=tmp_path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_files_are_named(folder, tmp_path, damage) -> None:
    place = tmp_path / "jaxzoo_toy"
    shutil.copytree(folder / "jaxzoo_toy", place)
    (path,) = place.rglob("*train*")
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[100_000] ^= 1  # inside the images, which fill the first 196 kB
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    train = tfds_dataset("jaxzoo_toy", data_dir=tmp_path).split("train")
    with pytest.raises(ValueError, match="'train' of 'jaxzoo_toy'.*copy it") as caught:
        take(train, range(40))
    message = str(caught.value)
    assert len(message) < 500
    named = int(message.split("damaged at record ")[1].split(":")[0])
    if damage == "flip":
        assert named > 0 and 0 <= identity(train[0]) < 40  # the others can be read
        with pytest.raises(ValueError, match="hash mismatch"):
            train[named]


def test_missing_package_names_the_pip_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxzoo-papers\[tfds\]'"):
        tfds_dataset("mnist")
