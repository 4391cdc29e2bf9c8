"""Pictures of `unscented_autoencoder`."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import COLORS, image_grid, panels
from jaxzoo.training.record import Figure, Run

# The same parameters, those of the VAE, and the same loss: the points alone differ.
SAME = {"draws": "noise", "random": "sigma points", "pairs": "pairs of sigma points"}


def pictures(
    config: Any, run: Run, lines: Any, same: Any, images: Any, test: Any
) -> list[Figure]:
    figure, axes = panels(2, width=5.4)
    when = np.arange(config.checks) * config.steps // config.checks
    same = {label: same[k] for k, label in SAME.items()}
    for ax, series in zip(axes, (lines, same), strict=True):
        for i, (label, values) in enumerate(series.items()):
            spread = values.std(axis=0, ddof=1) / len(values) ** 0.5
            ax.errorbar(
                when, values.mean(axis=0), spread, color=COLORS[i], marker="osD^"[i],
                ms=4, capsize=3, label=label,
            )  # fmt: skip
        ax.set(xlabel="training step", yscale="log")
        ax.legend(frameon=False, fontsize=8)
    axes[0].set(ylabel="variance of the gradient (loss$^2$)", title="each its own loss")
    axes[1].set(title="one network, one loss")
    rows = [np.reshape(row, (-1, 8, 8)) for row in (test[: config.samples], *images)]
    grid = image_grid(rows, ["held out", "VAE", "UAE", "UAE, full"])
    return [
        run.figure(
            "variance", figure, title="Variance of the gradient",
            caption=f"Summed over parameters, over {config.draws} choices of "
            f"{config.points} points for one batch; means and standard errors over "
            f"{config.seeds} seeds. Left: networks as each loss trains them. Right: "
            "the VAE's network and ||x - mean of decoded points||^2.",
        ),
        run.figure(
            "samples", grid, title="Samples",
            caption="Decoded from a mixture of Gaussians fitted to the training codes, "
            "first seed.",
        ),
    ]  # fmt: skip
