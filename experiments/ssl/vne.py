"""VNE: entropy of representations keeps two views from agreeing on a single vector.

Claims: the entropy is log d for an orthonormal set, 0 for a collapsed one, and never
above log rank; on digits I-VNE+ keeps the effective rank exp(S) of the held-out
embedding above d/2, while alpha = 0 lets it fall below 1.5; in a classifier the
effective rank of the hidden layer rises with a positive alpha and falls with a negative
one.

    python -m experiments.ssl.vne full    # 8x8 digits, 3 seeds: 3 minutes on 2 cores

Expected: effective ranks of 17.6 of 32 at the authors' alpha and 1.0 at alpha = 0.

The entropy is one of the whole batch: with `--reproducible` it is that of each of the
eight virtual shards, which is another objective.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments._batches import SeedBatches
from experiments.ssl._probes import linear_accuracy
from jaxzoo.data.augment import compose, gaussian_noise, random_resized_crop
from jaxzoo.data.augment_color import color_jitter
from jaxzoo.data.digits import digits
from jaxzoo.nn.mlp import MLP
from jaxzoo.ssl.vne import i_vne_plus, vne, vne_regularised
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import init_state, update_step

VIEWS = compose(
    functools.partial(random_resized_crop, scale=(0.6, 1.0)),
    functools.partial(color_jitter, saturation=0.0, hue=0.0),
    functools.partial(gaussian_noise, std=0.1),
)


@dataclasses.dataclass(frozen=True)
class Config:
    alphas: tuple[float, ...] = (0.0, 0.24, 1.0)  # of I-VNE+; 0.24 is the authors'
    signs: tuple[float, ...] = (-0.1, 0.0, 0.1)  # alpha of the classifier
    seeds: int = 3
    steps: int = 2000  # the effective rank grows slowly at the authors' alpha
    batch_size: int = 128
    learning_rate: float = 2e-3
    hidden: int = 128
    features: int = 32  # d

    def __post_init__(self):
        if self.seeds < 2 or not {0.0, 0.24} <= set(self.alphas) or not self.signs:
            raise ValueError("seeds >= 2, and alphas with 0 and 0.24, please")


PRESETS = {
    "smoke": Config(
        alphas=(0.0, 0.24), signs=(-0.1, 0.1), seeds=2, steps=10, batch_size=16,
        hidden=16, features=8,
    ),
    "full": Config(),
}  # fmt: skip


def encoder(config: Config) -> MLP:
    return MLP((config.hidden, config.features), activation=jax.nn.relu)


def pixels(images: Any) -> Any:
    return images.reshape(*images.shape[:-3], -1)


def encode(config: Config, params: Any, x: jax.Array) -> Any:
    return encoder(config).apply(params["encoder"], x)


def agree(config: Config, alpha: float, params, key, example):
    """I-VNE+ of two views of a batch."""
    grey = example["image"].astype(jnp.float32) / 16.0

    def branch(key):
        return encode(config, params, pixels(VIEWS(key, grey)))

    za, zb = jax.vmap(branch)(jax.random.split(key))
    value, aux = i_vne_plus(za, zb, alpha=alpha)
    return value, {"loss": value, **aux}


def classify(config: Config, alpha: float, params, key, example):
    """Cross-entropy of a linear layer on the features, minus alpha times entropy."""
    grey = pixels(example["image"].astype(jnp.float32) / 16.0)
    features = encode(config, params, grey)
    logits = features @ params["head"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])
    value, aux = vne_regularised(features, jnp.mean(losses), alpha=alpha)
    return value, {"loss": value, "effective_rank": aux["effective_rank"]}


def init_params(config: Config, key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key)
    head = jax.random.normal(keys[1], (config.features, 10)) / config.features**0.5
    return {"encoder": encoder(config).init(keys[0], jnp.zeros((1, 64))), "head": head}


def fit(config: Config, run: Run, name: str, loss: Any) -> Any:
    """Trains all seeds at once; the parameters of each, stacked."""
    batches = SeedBatches(digits().split("train"), config.seeds, config.batch_size)
    optimizer = optax.adam(config.learning_rate)

    def start_one(seed):
        init_key, run_key = jax.random.split(jax.random.key(seed))
        return init_state(run_key, init_params(config, init_key), optimizer)

    def start():
        return jax.vmap(start_one)(jnp.arange(config.seeds))

    step = update_step(loss, optimizer, reproducible=run.options.reproducible)
    state = train(
        run, name, jax.vmap(step), start, batches.at, num_steps=config.steps,
        show="loss", batch_axis=1, ids=batches.ids,
    )  # fmt: skip
    return local(state["params"])


def evaluate(config: Config, params: Any) -> dict[str, np.ndarray]:
    """Entropy, spectrum and linear probe of the features of clean images, per seed."""
    splits = [digits().split(name).arrays for name in ("train", "test")]
    x, y = (jnp.asarray(pixels(a["image"]) / np.float32(16)) for a in splits)
    x_label, y_label = (jnp.asarray(a["label"]) for a in splits)

    def one(params):
        features = [encode(config, params, a) for a in (x, y)]
        entropy, aux = vne(features[1])
        accuracy = linear_accuracy(features[0], x_label, features[1], y_label)
        return {"entropy": entropy, "accuracy": 100 * accuracy, **aux}

    return jax.device_get(jax.jit(lambda p: lax.map(one, p))(params))


def closed_form_claims(config: Config) -> list[Claim]:
    """The entropy of sets whose spectrum is known."""
    d, keys = config.features, jax.random.split(jax.random.key(0), config.seeds)

    def of_seed(key):
        noise = jax.random.normal(key, (d, d))
        orthonormal = jnp.linalg.qr(noise)[0]
        even = jnp.abs(vne(orthonormal)[0] - jnp.log(d))
        collapsed = jnp.abs(vne(jnp.tile(noise[:1], (4 * d, 1)))[0])
        excess = []
        for rank in (1, 2, d // 2):
            low = jax.random.normal(key, (3 * d, rank)) @ noise[:rank]
            excess.append(vne(low)[0] - jnp.log(rank))
        return jnp.maximum(even, collapsed), jnp.max(jnp.stack(excess))

    error, excess = (float(jnp.max(a)) for a in lax.map(of_seed, keys))
    return [
        Claim(
            f"|S - log d| of {d} orthonormal vectors and |S| of a collapsed set, worst "
            "seed, nats",
            error, "<= 1e-4", error <= 1e-4,
        ),
        Claim(
            "S - log rank of random sets of low rank, largest, nats",
            excess, "<= 1e-4", excess <= 1e-4,
        ),
    ]  # fmt: skip


def training_claims(config: Config, agreed: Any, classified: Any) -> list[Claim]:
    ranks = {alpha: r["effective_rank"] for alpha, r in agreed.items()}
    kept, lost = float(ranks[0.24].min()), float(ranks[0.0].max())
    half = config.features / 2
    by_sign = [classified[a]["effective_rank"] for a in sorted(config.signs)]
    steps = np.stack([b - a for a, b in zip(by_sign, by_sign[1:], strict=False)])
    least = steps.mean(axis=1).argmin()
    step = float(steps[least].mean())
    return [
        Claim(
            "digits, I-VNE+ with alpha = 0.24: effective rank of the held-out "
            f"embedding in {config.features} dimensions, smallest over seeds",
            kept, f"> {half:g}", kept > half,
        ),
        Claim(
            "digits, alpha = 0: the same, largest over seeds",
            lost, "< 1.5", lost < 1.5,
        ),
        Claim(
            "digits, classifier: smallest step of the features' effective rank from "
            f"one alpha to the next of {', '.join(map(str, sorted(config.signs)))}",
            step, "> 0", step > 0, stderr(steps[least]),
        ),
    ]  # fmt: skip


def pictures(config: Config, run: Run, agreed: Any, classified: Any) -> list[Figure]:
    figure, axes = panels(3, width=4.4)
    history = {alpha: run.history(f"agree_{alpha:g}") for alpha in config.alphas}
    series = {
        f"alpha = {a:g}": (h["step"], h["effective_rank"]) for a, h in history.items()
    }
    curves(axes[0], series, xlabel="step", ylabel="effective rank of a training batch")
    axes[0].legend(frameon=False, loc="center right")
    place = np.arange(1, config.features + 1)
    spectra = {
        f"alpha = {a:g}": (place, np.maximum(r["eigenvalues"][:, ::-1].T, 1e-9))
        for a, r in agreed.items()
    }
    curves(
        axes[1], spectra, xlabel="eigenvalue, sorted",
        ylabel="share of the eigenvalue (held out)",
    )  # fmt: skip
    axes[1].set_yscale("log")
    values = [classified[a]["effective_rank"] for a in sorted(config.signs)]
    axes[2].errorbar(
        sorted(config.signs), [v.mean() for v in values], [stderr(v) for v in values],
        color=COLORS[0], marker="o", capsize=3,
    )  # fmt: skip
    axes[2].set(
        xticks=sorted(config.signs),
        xlabel="alpha of the classifier's regulariser",
        ylabel="effective rank of held-out features",
    )
    return [
        run.figure(
            "vne", figure, title="Entropy against collapse",
            caption="Left and middle: I-VNE+ on digits, its effective rank and its "
            "spectrum. Right: a classifier whose features are to have more entropy, or "
            f"less. Mean and standard error over {config.seeds} seeds.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    claims = closed_form_claims(config)
    agreed, classified = {}, {}
    for alpha in config.alphas:
        loss = functools.partial(agree, config, alpha)
        params = fit(config, run, f"agree_{alpha:g}", loss)
        agreed[alpha] = evaluate(config, params)
    for alpha in config.signs:
        loss = functools.partial(classify, config, alpha)
        params = fit(config, run, f"classify_{alpha:g}", loss)
        classified[alpha] = evaluate(config, params)
    claims += training_claims(config, agreed, classified)
    rows, metrics = [], {}
    for kind, results in (("I-VNE+", agreed), ("classifier", classified)):
        for alpha, r in results.items():
            names = ("effective_rank", "isotropy", "accuracy")
            means = [float(r[name].mean()) for name in names]
            rows.append((kind, f"{alpha:g}", *(f"{m:.2f}" for m in means)))
            metrics |= {
                f"{kind}/{alpha:g}/{n}": m for n, m in zip(names, means, strict=True)
            }
    run.table(
        f"Held-out digits, d = {config.features}, {config.seeds} seeds",
        ("loss", "alpha", "effective rank", "isotropy", "linear probe (%)"),
        rows,
    )
    return Report(claims, metrics, pictures(config, run, agreed, classified))


if __name__ == "__main__":
    experiment(main, PRESETS)
