"""SigLIP with a locked image tower: texts learn to meet features that stay.

Functions take the settings of `experiments.ssl.siglip` as `config`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.ssl import _image_text as towers
from jaxzoo.data.augment import compose, flip, gaussian_noise
from jaxzoo.training.cost import count
from jaxzoo.training.record import Claim, Run

LOCKED, RANDOM = "sigmoid, locked tower", "sigmoid, locked random tower"


def locked_loss(nets, data, params, _: jax.Array, batch: Any) -> tuple[Any, Any]:
    """Of the rows of a locked tower, and the numbers of their captions."""
    text = towers.text_rows(nets, params, data["text"][batch["ids"]])
    return towers.of_rows("sigmoid", params, batch["image"], text)


def fit_towers(config: Any, run: Run, nets, data) -> Any:
    """An image tower per seed that tells the groups of emoji and knows no caption.

    Those of the paper and of its code are classifiers without their last layer, trained
    with augmentations, of other and more images; these see the images of the pairs.
    """
    names, labels = np.unique(data["group"], return_inverse=True)
    images, labels = jnp.asarray(data["image"]), jnp.asarray(labels)
    head = nn.Dense(len(names))
    views = compose(flip, functools.partial(gaussian_noise, std=0.1))

    def init(seed):
        one = head.init(towers.seed_keys(seed)[1], jnp.zeros((1, config.width)))
        tower = towers.init_params(config, "sigmoid", nets, seed)["image"]
        return {"image": tower, "head": one}

    def objective(params, key, ids):
        shown = views(key, images[ids] / 255.0) - 0.5
        features = nets["image"].apply(params["image"], shown)
        logits: Any = head.apply(params["head"], features)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, labels[ids])
        right = jnp.mean(jnp.argmax(logits, -1) == labels[ids])
        return jnp.mean(errors), {"loss": jnp.mean(errors), "accuracy": right}

    def ids(t: int) -> np.ndarray:
        return towers.pairs(config, max(config.batch_sizes), len(images), 0.0, t)[
            ..., 0
        ]

    seeds, steps = range(config.seeds), config.tower_steps
    params = towers.fit(run, config, "tower", seeds, init, objective, ids, ids, steps)
    return params["image"]


def fit_locked(config: Any, run: Run, nets, rows: np.ndarray, data) -> Any:
    """The text tower, the scale and the bias, to features `[fits, N, width]`.

    Texts go to the space of the features: the image side gets no head, as in the
    authors' code.
    """
    size, steps = max(zip(config.batch_sizes, config.steps, strict=True))
    seeds = np.arange(len(rows)) % config.seeds

    def init(seed):
        params = towers.init_params(config, "sigmoid", nets, seed)
        return {name: params[name] for name in ("text", "log_scale", "bias")}

    def ids(t: int) -> np.ndarray:
        return towers.pairs(config, size, rows.shape[1], 0.0, t)[seeds, :, 0]

    def batches(t: int) -> dict[str, np.ndarray]:
        chosen = ids(t)
        return {"ids": chosen, "image": np.take_along_axis(rows, chosen[..., None], 1)}

    objective = functools.partial(locked_loss, nets, towers.on_device(data))
    return towers.fit(
        run, config, "locked", seeds, init, objective, batches, ids, steps
    )


def locked_step(config: Any, nets, data, params, rows) -> tuple[float, float]:
    """What features in place of a tower change in a step of the largest batch.

    Args:
        config: the settings.
        nets: the two towers.
        data: the training pairs.
        params: of all parts, the image tower the locked one.
        rows: its features of all images, `[N, width]`.

    Returns:
        The largest relative error of the gradients that are left; and the
        floating-point operations of a step over those of one without a lock.
    """
    arrays, ids = towers.on_device(data), jnp.arange(max(config.batch_sizes))
    batch = {"ids": ids, "image": jnp.asarray(rows)[ids]}
    unlocked = functools.partial(towers.loss, "sigmoid", nets, arrays)

    def whole(params):
        return jax.grad(unlocked, has_aux=True)(
            params, jax.random.key(0), jnp.stack([ids, ids], -1)
        )[0]

    def rest(params):
        left = {name: params[name] for name in ("text", "log_scale", "bias")}
        objective = functools.partial(locked_loss, nets, arrays)
        return jax.grad(objective, has_aux=True)(left, jax.random.key(0), batch)[0]

    got, expected = jax.jit(lambda params: (rest(params), whole(params)))(params)
    errors = [
        jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y))
        for name, tree in got.items()
        for x, y in zip(*map(jax.tree.leaves, (tree, expected[name])), strict=True)
    ]
    flops = [count(jax.make_jaxpr(step)(params)).flops for step in (rest, whole)]
    return float(max(errors)), flops[0] / flops[1]


def lock(config: Any, run: Run, nets, data, begun) -> tuple[Any, list[Claim]]:
    """Both kinds of locked towers with their texts, by loss, batch and noise.

    Args:
        config: the settings.
        run: the open run.
        nets: the two towers.
        data: the training pairs.
        begun: parameters of every seed before training.
    """
    trained = fit_towers(config, run, nets, data)
    both = jax.tree.map(lambda *two: jnp.concatenate(two), trained, begun["image"])
    # Every image through every tower, once.
    one = jax.jit(
        lambda tower: towers.image_rows(nets, {"image": tower}, data["image"])
    )
    rows = np.asarray(jax.lax.map(one, both))
    params = {**fit_locked(config, run, nets, rows, data), "image": both}
    size, cut = max(config.batch_sizes), config.seeds
    fits = {
        (LOCKED, size, 0.0): towers.taken(params, np.s_[:cut]),
        (RANDOM, size, 0.0): towers.taken(params, np.s_[cut:]),
    }
    first = {**towers.taken(begun, 0), "image": towers.taken(both, 0)}
    error, share = locked_step(config, nets, data, first, rows[0])
    return fits, [
        Claim(
            "locked tower: largest relative error of the gradients with features "
            "precomputed, against the tower in the step",
            error, "<= 1e-5", error <= 1e-5,
        ),
        Claim(
            "locked tower: floating-point operations of loss and gradients over those "
            "without a lock",
            share, "<= 0.5", share <= 0.5,
        ),
    ]  # fmt: skip
