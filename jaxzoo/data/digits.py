"""scikit-learn's digits: 1,797 handwritten digits of 8 by 8 pixels."""

from __future__ import annotations

from typing import Literal

import numpy as np

from jaxzoo.data.source import Dataset, Feature, Source

__all__ = ["digits", "flat_digits"]

_TRAIN = 1_500
_VALIDATION = 300

_Pair = tuple[np.ndarray, np.ndarray]


def digits() -> Dataset:
    """Digits of 8 by 8 pixels: train 1,500, test 297.

    The split is by row: the first 1,500 rows of scikit-learn's file train, the last
    297 test. The file goes writer by writer, so most test digits come from other
    hands than the training digits, and classes are nearly, not exactly, balanced
    (146 to 153 in train, 27 to 33 in test).

    Returns:
      Splits "train" and "test" of image uint8 [8, 8, 1], 0..16, and label int32 [],
      0..9.

    >>> digits().split("train")
    Source(1500 records: image uint8 (8, 8, 1), label int32 ())
    >>> digits().split("train").arrays["label"][:5].tolist()
    [0, 1, 2, 3, 4]
    """
    # Here, since scikit-learn takes a second to import.
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    whole = Source(
        {
            "image": pixels.reshape(-1, 8, 8, 1).astype(np.uint8),
            "label": target.astype(np.int32),
        }
    )
    return Dataset(
        name="digits",
        splits={"train": whole[:_TRAIN], "test": whole[_TRAIN:]},
        description=(
            "The test part of UCI's Optical Recognition of Handwritten Digits as in "
            "scikit-learn; first 1,500 rows train, last 297 test."
        ),
        features={
            "image": Feature((8, 8, 1), "uint8", (0, 16), "ink in a 4x4 cell; NHWC"),
            "label": Feature((), "int32", (0, 9), "the digit"),
        },
        licence=(
            "CC-BY-4.0, E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten "
            "Digits, UCI Machine Learning Repository (1998); shipped by scikit-learn"
        ),
    )


def flat_digits(
    held_out: Literal["test", "validation"] = "test",
) -> tuple[_Pair, _Pair]:
    """Digits as rows of 64 numbers in [0, 1], for nets of dense layers.

    Args:
      held_out: "test" for the 297 of other hands; "validation" leaves those unseen,
        trains on the first 1,200 and holds out the last 300 of the training part, to
        choose settings by.

    Returns:
      `(x, label), (x, label)`, training part and held-out part: x float32 [n, 64],
      ink over 16; label int32 [n].

    Raises:
      ValueError: `held_out` is neither.

    >>> (x, label), (test, _) = flat_digits("validation")
    >>> x.shape, test.shape, float(x.max())
    ((1200, 64), (300, 64), 1.0)
    """
    if held_out not in ("test", "validation"):
        raise ValueError(f"'held_out' is {held_out!r}: 'test' or 'validation', please")
    data = digits()
    parts = [data.split(name).arrays for name in ("train", "test")]
    train, test = (
        (np.asarray(p["image"].reshape(-1, 64) / 16.0, np.float32), p["label"])
        for p in parts
    )
    if held_out == "test":
        return train, test
    x, label = train
    later = len(x) - _VALIDATION
    return (x[:later], label[:later]), (x[later:], label[later:])
