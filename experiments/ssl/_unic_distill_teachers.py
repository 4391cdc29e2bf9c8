"""The two teachers of `unic_distill`, and the images that all learn from."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.data.digits import digits
from jaxzoo.data.source import batch_indices
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.record import Run
from jaxzoo.training.step import init_state, update_step

TASKS = {"remainder": 5, "half": 2}  # digit % 5 and digit // 5, with their classes


def labels(task: str, digit: np.ndarray) -> np.ndarray:
    return digit % 5 if task == "remainder" else digit // 5


def images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split `[N, 8, 8, 1]` in [0, 1], and their digits."""
    arrays = digits().split(split).arrays
    return arrays["image"] / np.float32(16), arrays["label"]


def optimizer(config: Any, steps: int) -> optax.GradientTransformation:
    """The paper's: AdamW, a short warm-up, a cosine."""
    warmup = max(1, steps // 20)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, steps)
    return optax.adamw(rate, b1=0.9, b2=0.99, weight_decay=3e-2)


def chosen(config: Any, num: int, t: int) -> list[np.ndarray]:
    """Rows of step t, one array per seed."""
    size = config.batch_size
    return [
        batch_indices(seed, t, num_examples=num, batch_size=size)
        for seed in range(config.seeds)
    ]


def fit_teacher(config: Any, run: Run, vit: Any, task: str) -> Any:
    """Trains one teacher per seed on a labelling of the digits, by cross-entropy."""
    x, digit = images("train")
    y = labels(task, digit)
    adamw = optimizer(config, config.teacher_steps)

    def loss(params, key, batch):
        tokens, _ = vit.apply(params["vit"], batch["image"])
        logits = tokens[:, 0] @ params["head"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        value = jnp.mean(losses)
        return value, {"cross_entropy": value}

    def start_one(seed):
        # Teachers of the two tasks start from different weights.
        keys = jax.random.split(jax.random.key(100 * TASKS[task] + seed), 2)
        params = {
            "vit": vit.init(keys[0], jnp.zeros((1, 8, 8, 1))),
            "head": jnp.zeros((config.width, TASKS[task])),
        }
        return init_state(keys[1], params, adamw)

    def batches(t):
        rows = np.stack(chosen(config, len(x), t))
        return {"image": x[rows], "label": y[rows]}

    step = update_step(loss, adamw, reproducible=run.options.reproducible)
    state = train(
        run, f"teacher_{task}", jax.vmap(step),
        lambda: jax.vmap(start_one)(jnp.arange(config.seeds)), batches,
        num_steps=config.teacher_steps, show="cross_entropy", batch_axis=1,
        ids=functools.partial(chosen, config, len(x)),
    )  # fmt: skip
    return local(state["params"])["vit"]


def features(vit: Any, params: Any, x: np.ndarray) -> np.ndarray:
    """Tokens after the last norm, of every seed: `[seeds, N, 1 + 16, width]`."""

    @jax.jit
    def one(params):
        return vit.apply(params, x)[0]

    return np.asarray(lax.map(one, params))
