"""What is said of figures that were measured once per seed."""

from typing import Any

import numpy as np

__all__ = ["stderr"]


def stderr(values: Any) -> float:
    """Standard error of the mean of independent values: s / sqrt(n), s over n - 1.

    Args:
      values: `[n]`, n >= 2, one per seed.

    Raises:
      ValueError: fewer than two values, or more than one axis.

    >>> stderr([1.0, 2.0, 3.0])  # 1 / sqrt(3)
    0.577
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"'values' has shape {values.shape}: one axis with two values or more, "
            "please, since one value has no spread"
        )
    return float(values.std(ddof=1) / len(values) ** 0.5)
