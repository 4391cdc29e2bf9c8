"""The picture of `self_pretraining`, and the names of what it compares."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Figure, Run
from jaxzoo.training.seeds import stderr

TRANSFORMER, S4D = "transformer", "S4D"
SHORT, SCRATCH = "from scratch, as many labelled steps", "from scratch, as many in all"
PRETRAINED = "self-pretrained"


def picture(config: Any, run: Run, right: dict[str, Any]) -> Figure:
    figure, axes = panels(len(right), width=4.2)
    for ax, (name, by_kind) in zip(axes, right.items(), strict=True):
        for i, way in enumerate((SHORT, SCRATCH, PRETRAINED)):
            values = [by_kind[kind][way] for kind in (TRANSFORMER, S4D)]
            ax.bar(
                np.arange(2) + 0.27 * (i - 1), [v.mean() for v in values], 0.25,
                yerr=[stderr(v) for v in values], capsize=3, color=COLORS[i], label=way,
            )  # fmt: skip
        ax.set(title=name, xticks=[0, 1], ylabel="test accuracy, %")
        ax.set_xticklabels([TRANSFORMER, S4D])
        ax.grid(axis="x", visible=False)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
        frameon=False,
    )  # fmt: skip
    return run.figure(
        "self_pretraining", figure, title="From scratch, and after denoising",
        caption="The same inputs and the same number of steps in all. Mean and "
        f"standard error over {config.seeds} seeds.",
    )  # fmt: skip
