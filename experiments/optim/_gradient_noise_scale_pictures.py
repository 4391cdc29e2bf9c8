"""Pictures of `gradient_noise_scale`."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from jaxzoo.optim.gradient_noise_scale import optimal_learning_rate
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Figure, Run
from jaxzoo.training.seeds import stderr


def pictures(
    config: Any, run: Run, found: Any, fitted: Any, probed: Any
) -> list[Figure]:
    sizes = np.asarray(config.batch_sizes, np.float64)
    steps, best_rates = found
    b_crit, aux = fitted
    figure, axes = panels(3, width=4.4)
    errors = np.array([stderr(s) for s in steps])
    axes[0].errorbar(
        steps.mean(1), sizes * steps.mean(1), xerr=errors, yerr=sizes * errors,
        color=COLORS[0], marker="o", ls="none", capsize=3, label="best learning rate",
    )  # fmt: skip
    batch = np.geomspace(sizes[0], sizes[-1], 100)
    line = float(aux["min_steps"]) + float(aux["min_examples"]) / batch
    axes[0].plot(
        line, batch * line, color=COLORS[1],
        label=f"hyperbola, B_crit = {float(b_crit):.0f}",
    )  # fmt: skip
    for s, b in zip(steps.mean(1), config.batch_sizes, strict=True):
        axes[0].annotate(f"{b}", (s, b * s), (5, 4), textcoords="offset points")
    axes[0].set(
        xscale="log", yscale="log", xlabel="steps", ylabel="examples",
        title=f"to a training loss of {config.target:g} nats, by batch size",
    )  # fmt: skip
    for axis in (axes[0].xaxis, axes[0].yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes[0].legend(frameon=False)
    estimates, simple, noise = probed
    count = estimates.shape[1]
    middle = np.median(estimates, axis=0)
    axes[1].plot(
        np.arange(count) + 1, middle, color=COLORS[5],
        label="B_simple, estimated (median)",
    )  # fmt: skip
    places = np.arange(1, 11) * count / 10
    for name, values, color in (
        ("B_simple, exact", simple, COLORS[0]), ("B_noise, exact", noise, COLORS[2]),
    ):  # fmt: skip
        spread = [stderr(v) for v in values.T]
        axes[1].errorbar(
            places, values.mean(0), spread, color=color, marker="o", ms=4, capsize=3,
            label=name,
        )  # fmt: skip
    axes[1].axhline(float(b_crit), color=COLORS[1], ls="--", label="B_crit of the fit")
    axes[1].set(
        yscale="log", ylim=(1, 3000), xlabel="step", ylabel="noise scale (examples)"
    )
    axes[1].legend(frameon=False, loc="upper left")
    axes[2].plot(sizes, best_rates, color=COLORS[0], marker="o", label="best of grid")
    largest = max(best_rates)
    curve = [
        optimal_learning_rate(
            jnp.asarray(b_crit), batch_size=int(b), lr_max=float(largest)
        )
        for b in config.batch_sizes
    ]
    axes[2].plot(sizes, curve, color=COLORS[1], label="lr_max / (1 + B_crit / B)")
    axes[2].set(
        xscale="log", yscale="log", xlabel="batch size (examples)",
        ylabel="learning rate of SGD",
    )  # fmt: skip
    axes[2].legend(frameon=False)
    return [
        run.figure(
            "gradient_noise_scale", figure, title="What a batch size is worth",
            caption="Left: steps and examples to one loss, and the fitted hyperbola. "
            f"Middle: noise scales along a run at batch {config.probe_batch}. Right: "
            "the best learning rate of each batch size. Means and standard errors over "
            f"{config.seeds} seeds.",
        )
    ]  # fmt: skip
