"""Pictures of `vae_charts`."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Figure, Run
from jaxzoo.training.seeds import stderr

SHAPES = {2: "circle", 3: "sphere"}  # by the dimension of the space


def pictures(config: Any, run: Run, results: dict[int, Any]) -> list[Figure]:
    figure, axes = panels(2 * len(results), width=3.6)
    for pair, (features, found) in zip(
        np.reshape(axes, (-1, 2)), results.items(), strict=True
    ):
        for kind, ax in enumerate(pair):
            x, chart = found["samples"][kind, 0], found["chart"][kind, 0]
            front = x[:, 2] > 0 if features == 3 else np.full(len(x), True)
            for k in range(config.charts):
                rows = x[front & (chart == k)]
                ax.plot(
                    *rows[:, :2].T, "o^sD"[k % 4], ms=2, color=COLORS[k],
                    label=f"samples, chart {k + 1}" if len(rows) else None,
                )  # fmt: skip
            if kind:
                for i in range(min(4, config.starts)):
                    path = found["path"][kind, 0, :, i]
                    ax.plot(*path[:, :2].T, color="k", lw=1)
                    ax.plot(*path[-1, :2], "*", color=COLORS[4], mec="k", ms=9)
            title = f"{SHAPES[features]}, " + ("charts" if kind else "one VAE")
            ax.set(title=title, xlabel="first coordinate", ylabel="second coordinate")
            ax.set(aspect="equal", xlim=(-1.5, 1.5), ylim=(-1.4, 1.9))
            ax.legend(frameon=False, fontsize=7, loc="upper right")
    lines, (left, right) = panels(2)
    for i, (features, found) in enumerate(results.items()):
        for kind, name in enumerate(("one VAE", "charts")):
            values = found["distance"][kind]
            left.bar(i + 0.4 * kind, values.mean(), 0.36, yerr=stderr(values),
                     color=COLORS[kind], capsize=4,
                     label=name if i == 0 else None)  # fmt: skip
            left.plot([i + 0.4 * kind] * len(values), values, "k.", ms=4)
            mean = found["objective"][kind].mean(axis=2)
            spread = mean.std(axis=0, ddof=1) / len(mean) ** 0.5
            right.errorbar(
                np.arange(mean.shape[1]) + 0.3 * kind, mean.mean(axis=0), spread,
                color=COLORS[kind], fmt="-" if i == 0 else "--", errorevery=5,
                capsize=2,
                label=f"{SHAPES[features]}, {name}",
            )  # fmt: skip
    left.set(xticks=0.2 + np.arange(len(results)), yscale="log",
             xticklabels=[SHAPES[n] for n in results],
             ylabel="mean distance of samples to the manifold")  # fmt: skip
    right.set(xlabel="step of Riemannian descent", yscale="log",
              ylabel="mean data term $\\|Ax-y\\|^2/2$")  # fmt: skip
    left.legend(frameon=False)
    right.legend(frameon=False, fontsize=8)
    return [
        run.figure(
            "samples", figure, title="Samples of one VAE and of a mixture of charts",
            caption="First seed; of the sphere the half in front. Lines are four ways "
            "of Riemannian descent, stars their ends.",
        ),
        run.figure(
            "distances", lines, title="Distance to the manifold, and descent",
            caption=f"Means and standard errors over {config.seeds} seeds; dots are "
            "seeds.",
        ),
    ]  # fmt: skip
