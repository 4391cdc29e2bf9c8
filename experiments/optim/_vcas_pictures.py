"""Pictures of `vcas`."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import curves, panels
from jaxzoo.training.record import Figure, Run


def pictures(
    run: Run, config: Any, rate: int, *, layers: int, tau: float
) -> list[Figure]:
    history = run.history("vcas")
    some = slice(rate * config.seeds, (rate + 1) * config.seeds)
    steps = np.asarray(history["step"]) * config.every

    def series(name):
        return steps, np.asarray(history[name])[:, some]

    figure, axes = panels(3, width=4.4)
    names = {f"rho of layer {i + 1}": series(f"rho_{i}") for i in range(layers)}
    names |= {f"nu of layer {i + 1}": series(f"nu_{i}") for i in range(layers)}
    curves(axes[0], names, xlabel="step", ylabel="share kept")
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set(ylim=(0, 1.05))
    excess = {"examples": series("act"), "tokens": series("weight")}
    curves(axes[1], excess, xlabel="step", ylabel="added variance, share of SGD's")
    axes[1].axhline(tau, color="black", linestyle="--", linewidth=1)
    axes[1].set_yscale("symlog", linthresh=0.01)
    curves(
        axes[2], {"VCAS": series("flops")}, xlabel="step",
        ylabel="backward FLOPs, share of exact passes'",
    )  # fmt: skip
    axes[2].axhline(1.0, color="black", linestyle="--", linewidth=1, label="exact")
    axes[2].legend(frameon=False)
    caption = (
        "Left: the shares of examples (rho) and of what is left of them for the weight "
        "gradient (nu). Middle: what the controller measured, and its aim tau. Right: "
        "the cost, measuring included. Mean and standard error over "
        f"{config.seeds} seeds."
    )
    title = "Sampling the backward pass as far as the noise of SGD hides it"
    return [run.figure("vcas", figure, title=title, caption=caption)]
