"""Pictures of `mae`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzoo.nn.vit import patchify, unpatchify
from jaxzoo.training.plots import COLORS, curves, image_grid, panels
from jaxzoo.training.record import Figure, Run
from jaxzoo.training.seeds import stderr

SHAPE = (28, 28, 1)  # of an image


def pictures(
    config: Any, run: Run, model: Any, params: Any, data: Any, scores: Any
) -> list[Figure]:
    x = data[1][0][:: max(1, len(data[1][0]) // 12)][:12]
    first = jax.tree.map(lambda p: p[0], params)
    prediction, masked, _ = jax.jit(model.reconstruct)(first, jax.random.key(3), x)
    true = patchify(jnp.asarray(x), config.patch)
    # Predictions are of normalised pixels: each patch's own mean and deviation, which
    # the model does not know, are put back to look at them.
    mean, std = true.mean(-1, keepdims=True), true.std(-1, keepdims=True, ddof=1)
    hidden = masked.mask[:, :, None]
    rows = [
        x,
        unpatchify(jnp.where(hidden, 0.5, true), SHAPE, config.patch),
        unpatchify(
            jnp.where(hidden, prediction * std + mean, true), SHAPE, config.patch
        ),
    ]
    grid = image_grid(
        [np.clip(r, 0, 1).reshape(-1, *SHAPE[:2]) for r in rows],
        ["image", "seen", "predicted"],
    )
    figure, (left, right) = panels(2)
    history = run.history("pretrain")
    line = {"pretraining": (history["step"], history["loss"])}
    curves(left, line, xlabel="step", ylabel="loss (variance of a patch = 1)")
    names = {"random": "random weights", "pretrained": "pretrained"}
    for i, ((start, name), color) in enumerate(
        zip(names.items(), COLORS, strict=False)
    ):
        keys = ("probe_all", "probe_few", "tuned")
        values = np.stack([scores[f"{start}/{key}"] for key in keys])
        spots = np.arange(3) + 0.12 * (2 * i - 1)
        spread = [stderr(v) for v in values]
        right.errorbar(
            spots, values.mean(1), spread, fmt="o", capsize=3, color=color, label=name
        )
    few_labels = f"{config.labels} labels"
    right.set_xticks(
        range(3),
        ["probe\nall labels", f"probe\n{few_labels}", f"fine-tuning\n{few_labels}"],
    )
    right.set(ylabel="held-out accuracy (%)")
    right.legend(frameon=False)
    return [
        run.figure(
            "training", figure, title="Pretraining and what it is good for",
            caption="Loss on hidden patches, and held-out accuracy of one ViT with "
            f"and without pretraining; mean and standard error over {config.seeds} "
            "seeds.",
        ),
        run.figure(
            "reconstructions", grid, title="Reconstructions",
            caption="Held-out images; the patches that the encoder saw; its prediction "
            "of the others, with each patch's true mean and contrast.",
        ),
    ]  # fmt: skip
