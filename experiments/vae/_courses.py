"""Courses of training as curves: used by autogen and della."""

from collections.abc import Iterable

import numpy as np

__all__ = ["courses"]


def courses(
    names: Iterable[str], values: np.ndarray, *, chunks: int = 20
) -> dict[str, tuple[list[float], np.ndarray]]:
    """By name steps and means over chunks of steps, `[chunks, seeds]`, for `curves`.

    Args:
        names: of the models.
        values: `[models, seeds, steps]`; of fewer steps than `chunks` there are two.
        chunks: how many.
    """
    steps = values.shape[2]
    parts = np.array_split(np.arange(steps), chunks if steps >= chunks else 2)
    where = [float(part.mean()) for part in parts]
    return {
        name: (where, np.stack([own[:, part].mean(axis=1) for part in parts]))
        for name, own in zip(names, values, strict=True)
    }
