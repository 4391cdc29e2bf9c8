"""Pictures of `vicreg`."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Figure, Run
from jaxzoo.training.seeds import stderr


def pictures(config: Any, run: Run, accuracy: Any) -> list[Figure]:
    figure, axes = panels(2)
    labels = {"full": "full loss", "without_variance": "without the variance term"}
    history = {label: run.history(f"digits_{name}") for name, label in labels.items()}
    stds = {label: (h["step"], h["std"]) for label, h in history.items()}
    curves(
        axes[0], stds, xlabel="step",
        ylabel="std of an embedding's dimension\n(mean over dimensions)",
    )  # fmt: skip
    axes[0].set_yscale("log")
    names = ("pixels", "random encoder", "VICReg")
    rows = accuracy["fashion_mnist"]
    for i, kind in enumerate(("linear", "knn")):
        values = [rows[name][kind] for name in names]
        errors = [stderr(v) if len(v) > 1 else 0.0 for v in values]
        place = np.arange(3) + 0.36 * (i - 0.5)
        label = {"linear": "linear probe", "knn": "20 nearest neighbours"}[kind]
        means = [v.mean() for v in values]
        axes[1].bar(
            place, means, 0.34, yerr=errors, capsize=3, color=COLORS[i], label=label
        )
    low = min(v.min() for row in rows.values() for v in row.values())
    axes[1].set(
        xticks=np.arange(3), xticklabels=names, ylim=(max(0, low - 5), 100),
        ylabel="accuracy on Fashion-MNIST (%)",
    )  # fmt: skip
    axes[1].legend(frameon=False, loc="upper left", ncols=2)
    return [
        run.figure(
            "vicreg", figure, title="Collapse, and what the features know",
            caption="Left: spread of the embedding of training batches of digits. Right"
            ": probes on frozen features of held-out images; the axis does not start "
            f"at 0. Mean and standard error over {config.seeds} seeds.",
        )
    ]  # fmt: skip
