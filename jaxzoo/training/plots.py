"""Pictures worth looking at: pure functions of what was recorded.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every axis has a
label with its unit, every mean over seeds its standard error.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

__all__ = ["COLORS", "curves", "image_grid", "panels"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def panels(count: int = 1, *, width: float = 5.2, height: float = 3.6):
    """A figure with `count` axes side by side, without a frame on top and right."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = [figure.add_subplot(1, count, index + 1) for index in range(count)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def curves(
    ax: Axes,
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    xlabel: str,
    ylabel: str,
    points: bool = False,
) -> None:
    """Draws mean and standard error over seeds of several series.

    Args:
        ax: where to draw.
        series: name to `(x [T], y [T, seeds])`.
        xlabel: label of the x axis, with its unit.
        ylabel: label of the y axis, with its unit.
        points: error bars at points instead of a band.
    """
    for (name, (x, y)), color in zip(series.items(), COLORS, strict=False):
        y = np.asarray(y, np.float64)
        mean = y.mean(axis=1)
        spread = y.std(axis=1, ddof=1) / np.sqrt(y.shape[1]) if y.shape[1] > 1 else None
        if points:
            ax.errorbar(
                x, mean, spread, color=color, label=name, marker="o", ms=4, capsize=3
            )
            continue
        ax.plot(x, mean, color=color, label=name)
        if spread is not None:
            ax.fill_between(
                x, mean - spread, mean + spread, color=color, alpha=0.25, linewidth=0
            )
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)


def image_grid(
    rows: Sequence[np.ndarray], labels: Sequence[str], *, cell: float = 0.62
) -> Figure:
    """Rows of images with a label before each row.

    Args:
        rows: per row `[N, height, width]` grey values in [0, 1], 0 drawn white.
        labels: one per row.
        cell: inches per image.

    Returns:
        The figure.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(cell * columns + 1.3, cell * len(rows)))
    grid = figure.add_gridspec(
        len(rows), columns, wspace=0.06, hspace=0.06, left=1.3 / (cell * columns + 1.3)
    )
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for j, image in enumerate(row):
            ax = figure.add_subplot(grid[i, j])
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if j == 0:
                ax.set_ylabel(
                    label, rotation=0, ha="right", va="center", fontsize=9, labelpad=6
                )
    return figure
