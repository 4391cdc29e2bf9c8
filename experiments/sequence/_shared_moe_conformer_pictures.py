"""Pictures of `shared_moe_conformer`."""

from typing import Any

import numpy as np

from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Figure, Run
from jaxzoo.training.seeds import stderr


def pictures(config: Any, run: Run, losses, rates, sizes, shares) -> Figure:
    figure, (left, middle, right) = panels(3, width=4.8)
    window = max(1, config.steps // 40)
    steps = np.arange(config.steps // window) * window + window

    def smooth(values: np.ndarray) -> np.ndarray:
        return values[: len(steps) * window].reshape(len(steps), window, -1).mean(1)

    lines = {name: (steps, smooth(each)) for name, each in losses.items()}
    curves(left, lines, xlabel="step", ylabel="CTC loss (nats per utterance)")
    left.set(yscale="log")
    for i, (name, each) in enumerate(rates.items()):
        style: Any = {"color": COLORS[i], "marker": "os^D"[i], "capsize": 4}
        mean, spread = [each.mean()], [stderr(each)]
        middle.errorbar([sizes[name]], mean, spread, ls="", label=name, **style)
    middle.set(xlabel="parameters of the encoder", ylabel="token error (%)", ylim=0)
    middle.legend(frameon=False)
    right.grid(False)
    drawn = right.imshow(100 * shares.mean(0), cmap="cividis", vmin=0, aspect="auto")
    right.set(
        xlabel="expert", ylabel="application of the block", title="shared experts"
    )
    right.set_xticks(
        range(shares.shape[2]), [str(i + 1) for i in range(shares.shape[2])]
    )
    right.set_yticks(
        range(shares.shape[1]), [str(i + 1) for i in range(shares.shape[1])]
    )
    figure.colorbar(drawn, ax=right, label="frames that it gets (%)")
    return run.figure(
        "shared_moe_conformer", figure, title="What sharing costs, and experts repay",
        caption="Training loss; token error on held-out utterances over parameters; "
        "whom the routers of the shared block's applications send frames to. Means and "
        f"standard errors over {config.seeds} seeds.",
    )  # fmt: skip
