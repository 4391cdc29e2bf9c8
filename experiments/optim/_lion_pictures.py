"""Pictures of `lion`."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Figure, Run
from jaxzoo.training.seeds import stderr


def pictures(
    config: Any, run: Run, lm: dict[str, Any], aux: Any, losses: dict[str, Any]
) -> list[Figure]:
    figure, axes = panels(3, width=4.4)
    series, seeds = {}, config.seeds
    for (name, factor), at in zip(
        (("AdamW", 1.0), ("Lion", 0.2)), lm["at"], strict=True
    ):
        history = run.history(f"lm_{name.lower()}")
        columns = slice(at * seeds, (at + 1) * seeds)
        label = f"{name}, lr {factor * config.rates[at]:g}"
        series[label] = (history["step"], history["loss"][:, columns])
    curves(axes[0], series, xlabel="step", ylabel="training loss (nats per byte)")
    born = np.arange(1, config.children + 1)
    found = {"best program so far": (born, aux["best"].T)}
    curves(axes[1], found, xlabel="children", ylabel="validation loss (nats)")
    names, height = list(losses), [v.mean() for v in losses.values()]
    axes[2].bar(
        names, height, yerr=[stderr(v) for v in losses.values()], capsize=3,
        color=[COLORS[0 if n in ("SGD", "AdamW", "Lion") else 1] for n in names],
    )  # fmt: skip
    axes[2].tick_params(axis="x", rotation=30)
    axes[2].set(xlabel="update rule", ylabel="test loss of the proxy task (nats)")
    return [
        run.figure(
            "lion", figure, title="Lion, and rules found by evolution",
            caption="Left: language model of Moby Dick. Middle: evolution from SGD, "
            f"mean and standard error of {config.searches} searches. Right: the rules "
            f"on fresh seeds, mean and standard error of {config.fresh_seeds}.",
        )
    ]  # fmt: skip
