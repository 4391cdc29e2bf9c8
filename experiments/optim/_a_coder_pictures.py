"""Pictures of `a_coder`."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Figure, Run
from jaxzoo.training.seeds import stderr


def thin(trace: Any) -> tuple[np.ndarray, np.ndarray]:
    """At most 400 points, evenly spread over the logarithm of the passes."""
    last = len(trace.gap) - 1
    at = np.unique(np.geomspace(1, last + 1, 400).astype(int)) - 1
    return trace.passes[at], np.maximum(trace.gap[at], 1e-14)


def pictures(
    config: Any, run: Run, real: Any, passes: np.ndarray, nets: Any
) -> list[Figure]:
    """`passes` to the tolerance are `[correlations, 2, seeds]`."""
    figure, axes = panels(3, width=4.6)
    for color, (name, (ours, theirs)) in zip(COLORS, real.items(), strict=False):
        for trace, style, who in ((ours, "-", "A-CODER"), (theirs, ":", "CD")):
            axes[0].loglog(*thin(trace), style, color=color, label=f"{who}, {name}")
    k = np.array([10.0, 2.0 * config.cycles])
    axes[0].loglog(k, 3.0 / k**2, color="gray", lw=0.8, label="slope -2")
    axes[0].set(
        xlabel="passes over the coordinates", ylabel="optimality gap, L1", ylim=1e-12
    )
    condition = np.array([config.columns / (1 - c) for c in config.correlations])
    for color, name, index in zip(COLORS, ("A-CODER", "CD"), (0, 1), strict=False):
        values = passes[:, index]
        axes[1].errorbar(
            condition, values.mean(axis=1), [stderr(v) for v in values], color=color,
            marker="o", ms=4, capsize=3, label=name,
        )  # fmt: skip
    axes[1].set(
        xscale="log", yscale="log", xlabel="condition number, about",
        ylabel=f"passes to a gap of {config.tolerance:g}",
    )  # fmt: skip
    for color, (name, (ours, _)) in zip(COLORS, nets.items(), strict=False):
        cycle = np.arange(1, len(ours.gap) + 1)
        fall = np.log1p((0.4 * config.l2 / ours.lipschitz) ** 0.5)
        axes[2].semilogy(cycle, np.maximum(ours.gap, 1e-14), color=color, label=name)
        axes[2].semilogy(
            cycle, np.exp(-fall * cycle), ":", color=color, label="its theory"
        )
    axes[2].set(xlabel="cycle", ylabel="optimality gap, elastic net", ylim=1e-12)
    for ax in axes:
        ax.legend(frameon=False, fontsize=7)
    return [
        run.figure(
            "a_coder", figure, title="Acceleration of cyclic coordinates",
            caption="Left: L1-regularised least squares by A-CODER and by cyclic "
            "coordinate descent (CD). Middle: synthetic problems, mean and standard "
            f"error over {config.seeds} seeds. Right: elastic nets, and what the "
            "theory promises at the L that was found.",
        )
    ]  # fmt: skip
