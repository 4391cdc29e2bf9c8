"""Pictures of `pretrain`."""

import numpy as np

from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Figure, Run


def picture(
    run: Run, looks: list[tuple[float, float]], goals: dict[str, float]
) -> Figure:
    history = run.history("model")
    figure, axes = panels(2, width=5.2)
    axes[0].plot(
        history["step"], history["bits per byte"], color=COLORS[5], label="training"
    )
    steps, minutes, bits = np.array(looks).T
    axes[0].plot(steps, bits, "o-", ms=4, color=COLORS[0], label="validation")
    axes[1].plot(minutes, bits, "o-", ms=4, color=COLORS[0], label="validation")
    for ax, x in zip(axes, ("training steps", "minutes"), strict=True):
        for i, (name, value) in enumerate(goals.items()):
            ax.axhline(value, color=COLORS[i + 1], ls="--", lw=1, label=name)
        ax.set(xlabel=x, ylabel="bits per byte", ylim=(None, min(6.0, max(bits) + 0.2)))
        ax.legend(frameon=False, fontsize=8)
    return run.figure(
        "pretrain", figure, title="Bits per byte of a novel",
        caption="Training: means over 50 steps. Validation: text that is not trained "
        "on, of which each byte is told at least half a window before. Minutes are "
        "those of training, without validation.",
    )  # fmt: skip
