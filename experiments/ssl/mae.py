"""Masked autoencoders: a ViT that sees a quarter of an image learns what helps later.

Claims: masks are exact permutations and the encoder works on 25% of the patches; after
pretraining without labels a linear probe on the CLS token beats that of the same ViT
with random weights by 10 points or more, and fine-tuning on 100 labels beats training
from scratch on them.

    python -m experiments.ssl.mae full     # digits at 28x28, 3 seeds: 3 minutes
    python -m experiments.ssl.mae full --dataset fashion_mnist

Expected: 11 points more of a linear probe on all labels, 24 on 100 labels, and 19
points more of fine-tuning on 100 labels.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.ssl._logistic import probe
from experiments.ssl._mae_pictures import SHAPE, pictures
from jaxzoo.data.digits import digits
from jaxzoo.data.fashion_mnist import fashion_mnist
from jaxzoo.data.source import batch_indices
from jaxzoo.nn.vit import Transformer, ViT, patchify, sincos_2d
from jaxzoo.ssl.mae import MAEDecoder, mae_loss, random_masking
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import init_state, update_step


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["digits", "fashion_mnist"] = "digits"
    seeds: int = 3
    steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    patch: int = 7
    ratio: float = 0.75
    width: int = 64
    depth: int = 4
    decoder_width: int = 32
    decoder_depth: int = 1
    labels: int = 100  # of the fine-tuning
    tuning_steps: int = 200
    tuning_batch: int = 50
    tuning_rate: float = 1e-3  # the same with and without pretraining
    probe_examples: int = 3000  # at most, of the training images

    def __post_init__(self):
        if self.seeds < 2 or self.labels % 10 or self.tuning_batch > self.labels:
            raise ValueError(
                "seeds >= 2, labels in tens, tuning-batch <= labels, please"
            )


PRESETS = {
    "smoke": Config(
        seeds=2, steps=10, batch_size=16, width=8, depth=1, decoder_width=8, labels=20,
        tuning_steps=5, tuning_batch=10, probe_examples=200,
    ),
    "full": Config(),
}  # fmt: skip


class Model:
    """The encoder, the decoder, and what one does with them."""

    def __init__(self, config: Config):
        side = SHAPE[0] // config.patch
        self.config, self.patches = config, side * side
        self.vit: Any = ViT(config.patch, config.width, config.depth, heads=4)
        body = Transformer(config.decoder_depth, heads=4)
        self.decoder: Any = MAEDecoder(body, config.decoder_width, config.patch**2)
        self.positions = sincos_2d(side, side, config.decoder_width)

    def reconstruct(self, params, key, images):
        """Prediction for every patch, and the `Masking` that it was made under."""
        tokens = self.vit.apply(params["vit"], images, method="embed")
        masked = random_masking(key, tokens, ratio=self.config.ratio)
        codes, _ = self.vit.apply(params["vit"], masked.visible, method="encode")
        prediction = self.decoder.apply(
            params["decoder"], codes, masked.ids_restore, self.positions
        )
        return prediction, masked, codes

    def init(self, key):
        keys = jax.random.split(key, 3)
        images = jnp.zeros((1, *SHAPE))
        vit = self.vit.init(keys[0], images)
        tokens = jnp.zeros((1, self.patches, self.config.width))
        masked = random_masking(keys[2], tokens, ratio=self.config.ratio)
        codes = jnp.zeros((1, 1 + masked.visible.shape[1], self.config.width))
        ids = masked.ids_restore
        return {
            "vit": vit,
            "decoder": self.decoder.init(keys[1], codes, ids, self.positions),
        }

    def classify(self, params, images):
        tokens, _ = self.vit.apply(params["vit"], images)
        return tokens[:, 0] @ params["head"]


def images(config: Config, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 28, 28, 1]` in [0, 1] and labels; digits are enlarged from 8x8."""
    if config.dataset == "fashion_mnist":
        arrays = fashion_mnist().split(split).arrays
        return arrays["image"] / np.float32(255), arrays["label"]
    arrays = digits().split(split).arrays
    x = jnp.asarray(arrays["image"] / np.float32(16))
    return np.asarray(jax.image.resize(x, (len(x), *SHAPE), "linear")), arrays["label"]


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """The paper's: AdamW with beta_2 = 0.95, a warm-up, a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)
    return optax.adamw(schedule, b2=0.95, weight_decay=0.05)


def starts(config: Config, model: Model):
    """Weights before any training, one set per seed."""
    return jax.vmap(lambda s: model.init(jax.random.key(s)))(jnp.arange(config.seeds))


def pretrain(config: Config, run: Run, model: Model, x: np.ndarray) -> Any:
    adamw = optimizer(config.learning_rate, config.steps)

    def loss(params, key, batch):
        prediction, masked, _ = model.reconstruct(params, key, batch)
        value, _ = mae_loss(prediction, patchify(batch, config.patch), masked.mask)
        return value, {"loss": value}

    def start_one(params, seed):
        return init_state(jax.random.fold_in(jax.random.key(1), seed), params, adamw)

    def start():
        seeds = jnp.arange(config.seeds)
        return jax.vmap(start_one)(starts(config, model), seeds)

    def ids(t):
        size = config.batch_size
        return [
            batch_indices(seed, t, num_examples=len(x), batch_size=size)
            for seed in range(config.seeds)
        ]

    step = update_step(loss, adamw, reproducible=run.options.reproducible)
    state = train(
        run, "pretrain", jax.vmap(step), start, lambda t: x[np.stack(ids(t))],
        num_steps=config.steps, show="loss", batch_axis=1, ids=ids,
    )  # fmt: skip
    return local(state["params"])


def few(config: Config, y: np.ndarray) -> list[np.ndarray]:
    """The rows that have a label, as many of each class, other ones for each seed."""
    chosen = []
    for seed in range(config.seeds):
        order = np.random.default_rng(seed).permutation(len(y))
        rows = [order[y[order] == c][: config.labels // 10] for c in range(10)]
        chosen.append(np.concatenate(rows))
    return chosen


def tune(config: Config, run: Run, model: Model, vits: Any, x, y) -> Any:
    """Trains encoder and head on few labels, from each of the `[2 seeds]` weights."""
    adamw = optimizer(config.tuning_rate, config.tuning_steps)
    labelled = few(config, y)

    def loss(params, key, batch):
        logits = model.classify(params, batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        value = jnp.mean(losses)
        return value, {"cross_entropy": value}

    def start_one(vit, seed):
        params = {"vit": vit, "head": jnp.zeros((config.width, 10))}
        return init_state(jax.random.fold_in(jax.random.key(2), seed), params, adamw)

    def ids(t):
        size = config.tuning_batch
        rows = [
            rows[batch_indices(seed, t, num_examples=len(rows), batch_size=size)]
            for seed, rows in enumerate(labelled)
        ]
        return rows * 2

    def batches(t):
        rows = np.stack(ids(t))
        return {"image": x[rows], "label": y[rows]}

    step = update_step(loss, adamw, reproducible=run.options.reproducible)
    state = train(
        run, "tune", jax.vmap(step),
        lambda: jax.vmap(start_one)(vits, jnp.arange(2 * config.seeds)), batches,
        num_steps=config.tuning_steps, show="cross_entropy", batch_axis=1, ids=ids,
    )  # fmt: skip
    return local(state["params"])


def per_seed(function, params: Any, x: np.ndarray) -> np.ndarray:
    """`function(params of one seed, images)` of all seeds, 500 images at a time."""
    every = jax.jit(lambda params, part: lax.map(lambda p: function(p, part), params))
    parts = [every(params, x[i : i + 500]) for i in range(0, len(x), 500)]
    return np.concatenate([np.asarray(p) for p in parts], axis=1)


def probes(config: Config, model: Model, vits: Any, data) -> dict[str, np.ndarray]:
    """Linear probes on CLS with all labels and with few, in per cent, by weights."""
    (x, y), (test_x, test_y) = data

    def cls(vit, x):
        return model.vit.apply(vit, x)[0][:, 0]

    rows = np.random.default_rng(0).permutation(len(x))[: config.probe_examples]
    wanted = np.concatenate([rows, *few(config, y)])
    both = per_seed(cls, vits, np.concatenate([x[wanted], test_x]))
    each: dict[str, list[float]] = {"all": [], "few": []}
    for i, features in enumerate(both):
        seed, test = i % config.seeds, features[len(wanted) :]
        own = len(rows) + config.labels * seed + np.arange(config.labels)
        for name, used in (("all", np.arange(len(rows))), ("few", own)):
            answers = y[wanted[used]]
            each[name].append(probe(features[used], answers, test, test_y))
    return {name: np.array(values) for name, values in each.items()}


def masking_claims(config: Config, model: Model, params, x) -> list[Claim]:
    """What holds exactly, measured on real images."""
    first = jax.tree.map(lambda p: p[0], params)
    _, masked, codes = jax.jit(model.reconstruct)(first, jax.random.key(0), x)
    ids = np.sort(np.asarray(masked.ids_restore), axis=1)
    wrong = int(np.sum(ids != np.arange(model.patches)))
    part = (codes.shape[1] - 1) / model.patches
    target = int(model.patches * (1 - config.ratio)) / model.patches
    return [
        Claim(
            f"places of {len(x)} restored orders that differ from a permutation",
            wrong, "= 0", wrong == 0,
        ),
        Claim(
            f"patches that the encoder sees, of {model.patches}",
            part, f"= {target:.3g}", part == target,
        ),
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    model = Model(config)
    data = images(config, "train"), images(config, "test")
    (x, y), (test_x, test_y) = data
    params = pretrain(config, run, model, x)
    random = jax.jit(lambda: starts(config, model))()
    vits = jax.tree.map(
        lambda *pair: jnp.concatenate(pair), random["vit"], params["vit"]
    )
    found = {f"probe_{n}": v for n, v in probes(config, model, vits, data).items()}
    tuned = tune(config, run, model, vits, x, y)
    logits = per_seed(model.classify, tuned, test_x)
    found["tuned"] = 100 * np.mean(np.argmax(logits, -1) == test_y[None], axis=1)
    scores = {
        f"{start}/{name}": values[half * config.seeds :][: config.seeds]
        for name, values in found.items()
        for half, start in enumerate(("random", "pretrained"))
    }
    run.table(
        f"Held-out {config.dataset}, {config.seeds} seeds, %",
        ("", "accuracy"),
        [(n, f"{v.mean():.1f} ± {stderr(v):.1f}") for n, v in scores.items()],
    )
    claims = masking_claims(config, model, params, test_x)
    few_labels = f"{config.labels} labels"
    for text, name, least in (
        ("linear probe, all labels, pretrained minus random", "probe_all", 10),
        (f"linear probe, {few_labels}, pretrained minus random", "probe_few", 10),
        (f"fine-tuning on {few_labels} minus training from scratch", "tuned", 0),
    ):
        gain = scores[f"pretrained/{name}"] - scores[f"random/{name}"]
        mean = float(gain.mean())
        bound, holds = (f">= {least}", mean >= least) if least else ("> 0", mean > 0)
        text = f"{config.dataset}: {text}, points"
        claims.append(Claim(text, mean, bound, holds, stderr(gain)))
    metrics = {name: float(value.mean()) for name, value in scores.items()}
    metrics["pixels/all"] = probe(
        x[: config.probe_examples].reshape(-1, 784), y[: config.probe_examples],
        test_x.reshape(-1, 784), test_y,
    )  # fmt: skip
    return Report(claims, metrics, pictures(config, run, model, params, data, scores))


if __name__ == "__main__":
    experiment(main, PRESETS)
