"""The picture of `small_scale_proxies`."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Figure, Run


def picture(
    config: Any, run: Run, found: Any, rates: np.ndarray, ahead: np.ndarray
) -> list[Figure]:
    figure, axes = panels(2)
    names = ["plain", "z-loss", "qk-norm, plain", "qk-norm, z-loss"]
    names += ["qk-norm, z-loss, muParam"] if config.mu_param else []
    for color, name in zip(COLORS, names, strict=False):
        for ax, kind in zip(axes, ("loss", "max_logit"), strict=True):
            y = found[name][kind]
            spread = y.std(axis=0, ddof=1) / len(y) ** 0.5
            ax.errorbar(
                rates, y.mean(0), spread, color=color, label=name, marker="o", ms=4,
                capsize=3,
            )  # fmt: skip
    axes[1].plot(rates, ahead, color="0.4", ls="--", label="plain, predicted")
    axes[0].axhline(
        found["plain"]["loss/before"].mean(), color="0.5", lw=0.8, label="untrained"
    )
    axes[0].set(ylabel="held-out loss (nats a byte)")
    axes[1].set(ylabel="largest attention logit", yscale="log")
    for ax in axes:
        ax.set(xlabel="learning rate", xscale="log")
    axes[1].legend(frameon=False, fontsize=8)
    return [
        run.figure(
            "sensitivity", figure, title="Sensitivity to the learning rate",
            caption=f"After {config.steps} steps, mean and standard error over "
            f"{config.seeds} seeds; dashed, the logits that smaller widths predict.",
        )
    ]  # fmt: skip
