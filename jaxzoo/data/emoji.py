"""Emoji: 1,911 real pairs of a small image and a caption."""

from __future__ import annotations

import hashlib

import numpy as np

from jaxzoo.data.shipped import load_npz
from jaxzoo.data.source import Dataset, Feature, Source

__all__ = ["emoji"]


def emoji() -> Dataset:
    """Emoji as image-text pairs: about 80 % train, 20 % test.

    A pair is in the test split when the SHA-256 of its pixels, read as an integer, is
    a multiple of 5. So the split needs no seed, and equal images fall on one side:
    43 images are pixel for pixel equal to another one (flags of territories under
    their state's flag, families), with different captions.

    Beyond those, flags, clock faces, keycaps and people in several professions differ
    by few pixels, across the splits too. Report retrieval also without the groups
    "Flags" and "Symbols": `source[np.flatnonzero(~np.isin(source.arrays["group"],
    ["Flags", "Symbols"]))]`.

    Returns:
      Splits "train" and "test" of image uint8 [32, 32, 3], 0..255, and the strings
      caption, keywords (separated by spaces) and group (10 categories).

    Raises:
      FileNotFoundError: the shipped file is missing.
      ValueError: the shipped file is damaged.

    >>> train = emoji().split("train")
    >>> train.arrays["image"].shape[1:], str(train[0]["caption"])
    ((32, 32, 3), 'keycap: 0')
    """
    whole = Source(load_npz("emoji32.npz"))
    hashes = [hashlib.sha256(image.tobytes()) for image in whole.arrays["image"]]
    is_test = np.array([int(h.hexdigest(), 16) % 5 == 0 for h in hashes])
    widths = {name: array.dtype.str for name, array in whole.arrays.items()}
    return Dataset(
        name="emoji",
        splits={
            "train": whole[np.flatnonzero(~is_test)],
            "test": whole[np.flatnonzero(is_test)],
        },
        description=(
            "Twemoji graphics at 32x32 on white, with the English captions, keywords "
            "and groups of emojibase; split by a hash of the pixels."
        ),
        features={
            "image": Feature((32, 32, 3), "uint8", (0, 255), "sRGB on white; NHWC"),
            "caption": Feature((), widths["caption"], None, "English name"),
            "keywords": Feature((), widths["keywords"], None, "separated by spaces"),
            "group": Feature((), widths["group"], None, "one of 10 categories"),
        },
        licence=(
            "graphics CC-BY-4.0, Copyright Twitter, Inc and other contributors "
            "(Twemoji; resized, put on white); captions, keywords and groups MIT, "
            "Copyright (c) 2017 Miles Johnson (emojibase)"
        ),
    )
