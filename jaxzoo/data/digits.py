"""scikit-learn's digits: 1,797 handwritten digits of 8 by 8 pixels."""

from __future__ import annotations

import numpy as np

from jaxzoo.data.source import Dataset, Feature, Source

__all__ = ["digits"]

_TRAIN = 1_500


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
