"""Sprites: one white shape on black, drawn from five known factors."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike

from jaxzoo.data.source import Dataset, Feature, Source

__all__ = ["FACTORS", "SHAPES", "draw_sprites", "flat_sprites", "sprites"]

SHAPES = ("square", "ellipse", "heart")

FACTORS = {
    "shape": np.arange(3),
    "scale": np.linspace(0.13, 0.21, 3),
    "angle": np.arange(6) * np.pi / 12,  # a square turned by 90 degrees is itself
    "x": np.linspace(0.3, 0.7, 8),
    "y": np.linspace(0.3, 0.7, 8),
}
"""The values of each factor; lengths in image widths, angles in radians."""

_SAMPLES = 3  # points along each side of a pixel


def draw_sprites(
    shape: ArrayLike,
    scale: ArrayLike,
    angle: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    *,
    size: int = 16,
) -> np.ndarray:
    """Draws one image for each entry of five equally long arrays.

    Args:
      shape: integer [N], index into `SHAPES`.
      scale: [N], half the side of the square, in image widths; the other shapes have
        about its area.
      angle: [N], radians, counter-clockwise.
      x: [N], the centre, from 0 at the left to 1 at the right edge.
      y: [N], the centre, from 0 at the upper to 1 at the lower edge.
      size: pixels along each side, at least 1.

    Returns:
      uint8 [N, size, size], 0 to 255: how much of a pixel is covered, by 3x3 points.

    Raises:
      ValueError: `size` is below 1, a shape is unknown, or arrays differ in length.

    >>> one = draw_sprites([0], [0.25], [0.0], [0.5], [0.5], size=4)
    >>> one[0].tolist()
    [[0, 0, 0, 0], [0, 255, 255, 0], [0, 255, 255, 0], [0, 0, 0, 0]]
    """
    columns = [np.asarray(a) for a in (shape, scale, angle, x, y)]
    if size < 1:
        raise ValueError(f"size={size} is not at least 1.")
    if any(c.shape != columns[0].shape or c.ndim != 1 for c in columns):
        raise ValueError(
            f"The arrays have shapes {[c.shape for c in columns]}, expected one length."
        )
    if not np.isin(columns[0], range(len(SHAPES))).all():
        raise ValueError(f"shape has an entry outside 0..{len(SHAPES) - 1}.")
    points = (np.arange(size * _SAMPLES) + 0.5) / (size * _SAMPLES)
    inside = np.empty((len(columns[0]), len(points), len(points)), bool)
    for kind in range(len(SHAPES)):
        rows = columns[0] == kind
        scale, angle, x, y = (c[rows, None, None] for c in columns[1:])
        right, up = points[None, None] - x, y - points[None, :, None]
        u = (np.cos(angle) * right + np.sin(angle) * up) / scale
        v = (np.cos(angle) * up - np.sin(angle) * right) / scale
        inside[rows] = _is_inside(kind, u, v)
    covered = inside.reshape(-1, size, _SAMPLES, size, _SAMPLES).mean((2, 4))
    return np.round(255.0 * covered).astype(np.uint8)


def _is_inside(kind: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points, in units of the scale from the centre, are of the shape."""
    if kind == 0:
        return np.maximum(abs(u), abs(v)) <= 1.0
    if kind == 1:
        return (u / 1.4) ** 2 + (v / 0.8) ** 2 <= 1.0
    # The curve (a^2 + b^2 - 1)^3 = a^2 b^3, which is a heart, moved to its middle.
    a, b = u, v + 0.1
    return (a**2 + b**2 - 1.0) ** 3 <= a**2 * b**3


def sprites(*, size: int = 16, seed: int = 0) -> Dataset:
    """All 3,456 combinations of five factors: train 3,000, test 456.

    A little sister of dSprites (Matthey et al. 2017), drawn by `draw_sprites`: every
    combination of the values in `FACTORS` once, in an order drawn from `seed`.

    Args:
      size: pixels along each side, at least 1.
      seed: integer >= 0, of the order and with it of the split.

    Returns:
      Splits "train" and "test" of image uint8 [size, size, 1] and factors int32 [5],
      indices into the values of `FACTORS`, in its order.

    Raises:
      ValueError: `size` is below 1.

    >>> record = sprites().split("train")[0]
    >>> record["image"].shape, dict(zip(FACTORS, record["factors"].tolist()))
    ((16, 16, 1), {'shape': 1, 'scale': 0, 'angle': 3, 'x': 7, 'y': 5})
    """
    levels = [range(len(values)) for values in FACTORS.values()]
    factors = np.array(list(itertools.product(*levels)), np.int32)
    factors = np.random.default_rng(seed).permutation(factors)
    values = [v[i] for v, i in zip(FACTORS.values(), factors.T, strict=True)]
    image = draw_sprites(*values, size=size)[..., None]
    whole = Source({"image": image, "factors": factors})
    highest = max(map(len, levels)) - 1
    return Dataset(
        name="sprites",
        splits={"train": whole[:3000], "test": whole[3000:]},
        description=f"Every combination of factors once, in an order of seed {seed}.",
        features={
            "image": Feature((size, size, 1), "uint8", (0, 255), "coverage; NHWC"),
            "factors": Feature((5,), "int32", (0, highest), "indices into FACTORS"),
        },
        licence="drawn by jaxzoo, Apache-2.0",
    )


def flat_sprites(*, is_upright: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """All sprites of both splits as rows of 256 numbers, and their factors.

    Args:
      is_upright: only those of angle 0, without that factor: 576 of four.

    Returns:
      `(x, factors)`: float32 [3456, 256], grey from 0 to 1; int32 [3456, 5], in the
      order of `FACTORS`.

    >>> x, factors = flat_sprites(is_upright=True)
    >>> x.shape, factors.max(axis=0).tolist()
    ((576, 256), [2, 2, 7, 7])
    """
    whole = sprites()
    both = [whole.split(name).arrays for name in ("train", "test")]
    image, factors = (
        np.concatenate([part[name] for part in both]) for name in ("image", "factors")
    )
    x = image.reshape(len(image), -1).astype(np.float32) / np.float32(255.0)
    if not is_upright:
        return x, factors
    place = list(FACTORS).index("angle")
    chosen = factors[:, place] == 0
    return x[chosen], np.delete(factors[chosen], place, axis=1)
