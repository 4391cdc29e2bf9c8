"""Known facts of each data set, and idx reading."""

from __future__ import annotations

import doctest
import gzip
import importlib
import pickle
import struct
from typing import Any

import grain
import numpy as np
import pytest

from jaxzoo.data import fashion_mnist as fashion
from jaxzoo.data.digits import digits
from jaxzoo.data.emoji import emoji
from jaxzoo.data.fashion_mnist import CLASSES, fashion_mnist, fashion_mnist_full
from jaxzoo.data.idx import read_idx
from jaxzoo.data.listops import listops
from jaxzoo.data.shipped import load_npz
from jaxzoo.data.source import batch
from jaxzoo.data.sprites import sprites
from jaxzoo.data.text import moby_dick, state_of_the_union

LOADERS = [fashion_mnist, digits, emoji, listops, moby_dick, sprites]
LOADERS += [state_of_the_union]
has_full = any(folder.is_dir() for folder in fashion._FOLDERS)
needs_full = pytest.mark.skipif(not has_full, reason="dataset-fashion-mnist is absent")


@pytest.mark.parametrize("load", LOADERS, ids=lambda f: f.__name__)
def test_features_tell_the_truth(load) -> None:
    data = load()
    assert data.name == load.__name__ and data.description and data.licence
    for split in map(data.split, data.splits):
        assert set(split.arrays) == set(data.features)
        for name, feature in data.features.items():
            array = split.arrays[name]
            assert array.shape[1:] == feature.shape
            assert array.dtype == np.dtype(feature.dtype)
            if feature.range:
                assert array.min() >= feature.range[0]
                assert array.max() <= feature.range[1]
            assert not array.flags.writeable
    again = pickle.loads(pickle.dumps(data))
    for split in data.splits:
        for name, array in data.split(split).arrays.items():
            assert np.array_equal(again.split(split).arrays[name], array)


@pytest.mark.parametrize("load", LOADERS, ids=lambda f: f.__name__)
def test_every_data_set_feeds_grain(load) -> None:
    source = load().split("train")
    b = batch(source, 0, 0, batch_size=4)
    ds: Any = grain.MapDataset.source(source).batch(4)
    assert {k: v.shape for k, v in ds[0].items()} == {k: v.shape for k, v in b.items()}


def test_fashion_mnist_facts() -> None:
    data = fashion_mnist()
    for split, each in (("train", 1000), ("test", 200)):
        labels = data.split(split).arrays["label"]
        assert np.bincount(labels).tolist() == [each] * 10
    assert data.split("train").arrays["label"][:8].tolist() == [9, 0, 0, 3, 0, 2, 7, 2]
    assert data.split("test").arrays["label"][:8].tolist() == [9, 2, 1, 1, 6, 1, 4, 6]
    images = data.split("train").arrays["image"]
    raw = load_npz("fashion_mnist_12k.npz")
    assert np.array_equal(images[..., 0], raw["train_image"])
    assert np.array_equal(data.split("test").arrays["image"][..., 0], raw["test_image"])
    assert images.min() == 0 and images.max() == 255
    assert 0.28 < images.mean() / 255 < 0.29  # the known mean of the whole: 0.2860
    assert len(CLASSES) == 10 and CLASSES[9] == "Ankle boot"


@needs_full
def test_fashion_mnist_full_contains_the_shipped_part() -> None:
    full, part = fashion_mnist_full(), fashion_mnist()
    for split, size, each in (("train", 60_000, 1000), ("test", 10_000, 200)):
        source = full.split(split)
        labels = source.arrays["label"]
        assert len(source) == size
        assert np.bincount(labels).tolist() == [size // 10] * 10
        first = [np.flatnonzero(labels == c)[:each] for c in range(10)]
        chosen = source[np.sort(np.concatenate(first))]
        for name in ("image", "label"):
            assert np.array_equal(chosen.arrays[name], part.split(split).arrays[name])
    assert abs(full.split("train").arrays["image"].mean() / 255 - 0.2860) < 1e-4


@needs_full
def test_fashion_mnist_full_plain_gz_mixed_and_damaged(tmp_path) -> None:
    found = fashion._find(None)
    for stem, path in found.items():
        raw = gzip.decompress(path.read_bytes())
        if "train" in stem:
            (tmp_path / stem).write_bytes(raw)
        else:
            (tmp_path / f"{stem}.gz").write_bytes(path.read_bytes())
    assert len(fashion_mnist_full(tmp_path).split("train")) == 60_000
    victim = tmp_path / "train-images-idx3-ubyte"
    raw = bytearray(victim.read_bytes())
    raw[30_000_000] ^= 1  # the plain format has no checksum: only ours sees this
    victim.write_bytes(raw)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte.*copy it again"):
        fashion_mnist_full(tmp_path)


def test_fashion_mnist_full_says_what_to_install(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fash.*folder"):
        fashion_mnist_full(tmp_path)
    monkeypatch.setattr(fashion, "_FOLDERS", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(FileNotFoundError, match="/a or .*/b; run"):
        fashion_mnist_full()


def test_fashion_mnist_full_refuses_another_data_set(tmp_path) -> None:
    for stem in fashion._IDX:
        shape = (2, 28, 28) if "images" in stem else (2,)
        write_idx(tmp_path / stem, np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="does not hold Fashion-MNIST's train-images"):
        fashion_mnist_full(tmp_path)


def test_digits_facts() -> None:
    data = digits()
    train, test = data.split("train"), data.split("test")
    assert (len(train), len(test)) == (1500, 297)
    assert train.arrays["label"][:12].tolist() == [*range(10), 0, 1]
    counts = np.bincount(train.arrays["label"])
    assert (counts.min(), counts.max()) == (146, 153)
    counts = np.bincount(test.arrays["label"])
    assert (counts.min(), counts.max()) == (27, 33)
    assert train.arrays["image"].max() == 16
    assert train[0]["image"][0, :, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_emoji_facts() -> None:
    data = emoji()
    train, test = data.split("train"), data.split("test")
    assert len(train) + len(test) == 1911
    assert 0.17 < len(test) / 1911 < 0.23
    both = [{im.tobytes() for im in s.arrays["image"]} for s in (train, test)]
    assert not both[0] & both[1], "an image stands in both splits"
    assert len(both[0] | both[1]) == 1878
    captions = [*train.arrays["caption"], *test.arrays["caption"]]
    assert len(set(captions)) == 1911 and "red heart" in captions
    assert len(set(train.arrays["group"])) == 10
    flags = [c for c in captions if c.startswith("flag: ")]
    assert "flag: norway" in flags
    assert "\0" not in "".join(captions)


def test_text_facts() -> None:
    for load, total, start in (
        (moby_dick, 1_204_997, b"CHAPTER 1. Loomings.\n\nCall me Ishmael."),
        (state_of_the_union, 2_143_140, b"To the Congress of the United States: "),
    ):
        data = load()
        train = data.split("train").arrays["token"]
        assert train.tobytes().startswith(start)
        assert [len(s) for s in data.splits.values()] == [
            int(total * 0.90) // 256,
            (int(total * 0.95) - int(total * 0.90)) // 256,
            (total - int(total * 0.95)) // 256,
        ]
        assert list(data.splits) == ["train", "validation", "test"]


def test_text_windows_tile_the_splits_whatever_their_size() -> None:
    long = moby_dick(window=1000)
    for window in (1, 7, 1024):
        data = moby_dick(window=window)
        for name in data.splits:
            a = data.split(name).arrays["token"].tobytes()
            b = long.split(name).arrays["token"].tobytes()
            n = min(len(a), len(b))
            assert a[:n] == b[:n] and n > len(a) - 1100
    whole = b"".join(
        bytes(moby_dick(window=1).split(name).arrays["token"]) for name in long.splits
    )
    assert len(whole) == 1_204_997 and whole.endswith(b"five thousand years ago.\n")


@pytest.mark.parametrize("window", [0, -3, 60_251])
def test_text_window_out_of_range(window) -> None:
    with pytest.raises(ValueError, match=rf"window={window} is not in \[1, 60250\]"):
        moby_dick(window=window)


# --- idx --------------------------------------------------------------------------


def idx_bytes(array: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.tobytes()


def write_idx(path, array, packed: bool = False):
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return path


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(5,), (4, 3, 2), (0, 3, 2), (300, 28, 28)])
def test_idx_round_trip(tmp_path, packed, shape) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    got = read_idx(write_idx(tmp_path / "f", array, packed), ndim=len(shape))
    assert got.dtype == np.uint8 and np.array_equal(got, array)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:9], "ends within its header"),
        (lambda c: b"", "ends within its header"),
        (lambda c: c[:-1], "need 40 bytes, not only 39"),
        (lambda c: c + b"\0", "need 40 bytes, not more"),
        (lambda c: b"\0\0\x0d\x03" + c[4:], "magic is 00000d03, expected 00000803"),
        (lambda c: b"\0\0\x08\x01" + c[4:], "magic is 00000801, expected 00000803"),
        (
            lambda c: c[:4] + b"\xff" * 12 + c[16:],
            "more than it can hold|need [0-9]{29} bytes",
        ),
    ],
)
def test_idx_damage_is_named(tmp_path, packed, change, message) -> None:
    content = change(idx_bytes(np.arange(24, dtype=np.uint8).reshape(4, 3, 2)))
    path = tmp_path / "damaged-idx3"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=message) as caught:
        read_idx(path, ndim=3)
    assert str(path) in str(caught.value) and "again" in str(caught.value)


def test_idx_gzip_bits_and_cuts(tmp_path) -> None:
    """Every flipped bit and every cut gives the right array or a ValueError."""
    array = np.random.default_rng(1).integers(0, 9, (40, 4, 4), np.uint8)
    path = write_idx(tmp_path / "f.gz", array, packed=True)
    good = path.read_bytes()
    seen = 0
    rng = np.random.default_rng(2)
    for i in rng.integers(0, 8 * len(good), 150).tolist():
        bad = bytearray(good)
        bad[i // 8] ^= 1 << i % 8
        path.write_bytes(bad)
        try:
            assert np.array_equal(read_idx(path, ndim=3), array)
        except ValueError as error:
            assert str(path) in str(error)
            seen += 1
    assert seen > 130  # the rest are gzip header bits without meaning
    for cut in rng.integers(0, len(good), 40).tolist():
        path.write_bytes(good[:cut])
        with pytest.raises(ValueError, match="not a whole idx file"):
            read_idx(path, ndim=3)


@pytest.mark.parametrize(
    "module",
    "_order source shipped idx digits emoji fashion_mnist listops sprites text "
    "tfds".split(),
)
def test_doctests(module) -> None:
    result = doctest.testmod(importlib.import_module(f"jaxzoo.data.{module}"))
    assert result.failed == 0
