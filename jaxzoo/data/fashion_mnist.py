"""Fashion-MNIST: a shipped class-balanced part, and the whole from idx files."""

from __future__ import annotations

import hashlib
import sys
from os import PathLike
from pathlib import Path

import numpy as np

from jaxzoo.data.idx import read_idx
from jaxzoo.data.shipped import load_npz
from jaxzoo.data.source import Dataset, Feature, Source

__all__ = ["CLASSES", "fashion_mnist", "fashion_mnist_full"]

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_FEATURES = {
    "image": Feature(
        (28, 28, 1), "uint8", (0, 255), "grey level, 0 background to 255; NHWC"
    ),
    "label": Feature((), "int32", (0, 9), "index into CLASSES"),
}
_LICENCE = "MIT, Copyright (c) 2017 Zalando SE"

# file stem -> SHA-256 of the unpacked original: plain files carry no checksum of
# their own, and gzip's is 32 bits.
_IDX = {
    "train-images-idx3-ubyte": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
    ),
    "train-labels-idx1-ubyte": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
    ),
    "t10k-images-idx3-ubyte": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    ),
    "t10k-labels-idx1-ubyte": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
    ),
}
_FOLDERS = tuple(
    Path(prefix) / "share" / "datasets" / "fashion-mnist"
    for prefix in ("/usr", "/usr/local", sys.prefix)
)


def fashion_mnist() -> Dataset:
    """The shipped part: train 10,000 and test 2,000 images of clothing, 10 classes.

    It holds the first 1,000 (train) and 200 (test) images of each class of the
    original splits, in the original order.

    Returns:
      Splits "train" and "test" of image uint8 [28, 28, 1], 0..255, and label int32
      [], 0..9.

    Raises:
      FileNotFoundError: the shipped file is missing.
      ValueError: the shipped file is damaged.

    >>> data = fashion_mnist()
    >>> data.split("train")
    Source(10000 records: image uint8 (28, 28, 1), label int32 ())
    >>> CLASSES[data.split("test")[0]["label"]]
    'Ankle boot'
    """
    arrays = load_npz("fashion_mnist_12k.npz")
    return _dataset(
        "fashion_mnist",
        arrays["train_image"],
        arrays["train_label"],
        arrays["test_image"],
        arrays["test_label"],
        "Fashion-MNIST, the first 1,000 and 200 images of each class of its splits.",
    )


def fashion_mnist_full(folder: str | PathLike[str] | None = None) -> Dataset:
    """The whole of Fashion-MNIST: train 60,000 and test 10,000.

    Args:
      folder: where the four original idx files lie, plain or `.gz`; None looks where
        Debian's package dataset-fashion-mnist puts them.

    Returns:
      The splits and arrays of `fashion_mnist`, at full size.

    Raises:
      FileNotFoundError: a file is missing; the message says what to install.
      ValueError: a file is damaged or is not Fashion-MNIST's; the message names it.
    """
    paths = _find(folder)
    arrays = []
    for stem, digest in _IDX.items():
        array = read_idx(paths[stem], ndim=3 if "images" in stem else 1)
        header = np.array([0x800 + array.ndim, *array.shape], ">u4").tobytes()
        if hashlib.sha256(header + array.tobytes()).hexdigest() != digest:
            raise ValueError(
                f"{paths[stem]} does not hold Fashion-MNIST's {stem} (its SHA-256 "
                "differs); copy it again from the original or Debian's package."
            )
        arrays.append(array)
    train_image, train_label, test_image, test_label = arrays
    return _dataset(
        "fashion_mnist_full",
        train_image,
        train_label,
        test_image,
        test_label,
        "Fashion-MNIST, whole.",
    )


def _find(folder: str | PathLike[str] | None) -> dict[str, Path]:
    folders = _FOLDERS if folder is None else (Path(folder),)
    for place in folders:
        found = {
            stem: path
            for stem in _IDX
            for path in (place / stem, place / f"{stem}.gz")
            if path.is_file()
        }
        if len(found) == len(_IDX):
            return found
    raise FileNotFoundError(
        f"the idx files {', '.join(_IDX)} (plain or .gz) are not all in "
        f"{' or '.join(map(str, folders))}; run 'apt-get install dataset-fashion-mnist'"
        " or give the folder that holds them as folder=..."
    )


def _dataset(
    name: str,
    train_image: np.ndarray,
    train_label: np.ndarray,
    test_image: np.ndarray,
    test_label: np.ndarray,
    description: str,
) -> Dataset:
    splits = {
        split: Source({"image": image[..., None], "label": label.astype(np.int32)})
        for split, image, label in (
            ("train", train_image, train_label),
            ("test", test_image, test_label),
        )
    }
    return Dataset(name, splits, description, _FEATURES, _LICENCE)
