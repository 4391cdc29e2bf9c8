"""LSUV: a 30-layer ReLU net that Glorot's start cannot train.

Claims: after LSUV every layer's outputs have a variance in [0.9, 1.1], while the last
layer's is below 1e-3 with Glorot; in a budget where Glorot's start stays below 30 % of
held-out digits LSUV passes 85 %, each at its best learning rate.

    python -m experiments.optim.lsuv full

Expected, 90 s of CPU: variances within 0.04 of 1; 6e-10 in the last layer with Glorot;
86.5 +- 0.6 % with LSUV, 20.0 % with Glorot, 83.8 % with He.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.optim._tasks import FlatMLP, Task, best, classifier, fit
from jaxzoo.data.digits import digits
from jaxzoo.optim.lsuv import layer_variances, lsuv_init
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr

# Deviations of normal weights.
BASELINES = {
    "Glorot": lambda fan_in, fan_out: (2.0 / (fan_in + fan_out)) ** 0.5,
    "He": lambda fan_in, fan_out: (2.0 / fan_in) ** 0.5,
}


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 30
    width: int = 48
    init_batch: int = 1024  # that LSUV sees
    seeds: int = 3
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    steps: int = 1500
    batch_size: int = 64

    def __post_init__(self):
        if self.seeds < 2:
            raise ValueError("seeds >= 2, please")


PRESETS = {
    "smoke": Config(layers=3, width=8, seeds=2, learning_rates=(0.03,), steps=2),
    "full": Config(),
}


def network(config: Config) -> FlatMLP:
    return FlatMLP((*[config.width] * (config.layers - 1), 10), nn.relu)


def starts(config: Config, images: jax.Array) -> dict[str, Any]:
    """`key -> variables` of each way to begin."""
    model, some = network(config), images[: config.init_batch]

    def drawn(std: Any, key: jax.Array) -> Any:
        shapes = jax.eval_shape(model.init, key, some)
        leaves, tree = jax.tree.flatten(shapes)
        # One draw for all layers: a program for each takes long to compile.
        noise = jax.random.normal(key, (sum(x.size for x in leaves),))
        parts = jnp.split(noise, np.cumsum([x.size for x in leaves])[:-1])
        new = [
            std(*x.shape) * part.reshape(x.shape) if x.ndim == 2 else jnp.zeros(x.shape)
            for x, part in zip(leaves, parts, strict=True)
        ]
        return jax.tree.unflatten(tree, new)

    def of(std: Any) -> Any:
        return lambda key: drawn(std, key)

    every = {name: of(std) for name, std in BASELINES.items()}
    return {"LSUV": lambda key: lsuv_init(key, model, (some,))[0], **every}


def picture(
    config: Config, run: Run, variances: dict[str, np.ndarray], scores: dict[str, Any]
) -> Figure:
    figure, axes = panels(2)
    place = np.arange(1, config.layers + 1)
    for (name, values), color in zip(variances.items(), COLORS, strict=False):
        logs = np.log10(values)
        mean, spread = logs.mean(0), logs.std(0, ddof=1) / config.seeds**0.5
        axes[0].plot(place, 10**mean, color=color, label=name)
        axes[0].fill_between(
            place, 10 ** (mean - spread), 10 ** (mean + spread), color=color, alpha=0.25
        )
        rows = scores[name]["accuracy"]
        axes[1].errorbar(
            config.learning_rates, rows.mean(1), [stderr(r) for r in rows], color=color,
            marker="o", capsize=3, label=name,
        )  # fmt: skip
    axes[0].set(yscale="log", xlabel="layer", ylabel="variance of its outputs")
    axes[0].legend(frameon=False)
    axes[1].set(
        xscale="log", xlabel="learning rate of SGD",
        ylabel=f"held-out digits after {config.steps} steps (%)",
    )  # fmt: skip
    rates = config.learning_rates
    axes[1].set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes[1].minorticks_off()
    return run.figure(
        "lsuv", figure, title="A good start",
        caption=f"A {config.layers}-layer ReLU net on digits. Left: variance on the "
        "training images. Mean and standard error (left: of logarithms) over "
        f"{config.seeds} seeds.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    splits = [digits().split(name) for name in ("train", "test")]
    images, test = (jnp.asarray(s.arrays["image"] / np.float32(16)) for s in splits)
    task: Task = classifier(
        "digits, 30 layers", network(config), splits[0], splits[1], 16.0
    )
    variances, unseen, scores = {}, {}, {}
    for name, start in starts(config, images).items():

        def probe(key: jax.Array, start: Any = start) -> jax.Array:
            variables = start(key)
            found = [
                layer_variances(network(config), variables, (x,))
                for x in (images, test)
            ]
            return jnp.stack([jnp.stack(list(f.values())) for f in found])

        keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
        both = np.asarray(jax.jit(jax.vmap(probe))(keys))
        variances[name], unseen[name] = both[:, 0], both[:, 1]
        scores[name], _, _ = fit(
            run, name.lower(), task._replace(init=start), optax.sgd,
            config.learning_rates, steps=config.steps, batch_size=config.batch_size,
            seeds=config.seeds,
        )  # fmt: skip
    at = {name: best(value, "accuracy") for name, value in scores.items()}
    apart = float(np.abs(variances["LSUV"] - 1).max())
    last = float(variances["Glorot"][:, -1].max())
    ours, theirs = (scores[n]["accuracy"][at[n]] for n in ("LSUV", "Glorot"))
    claims = [
        Claim(
            f"LSUV, {config.layers} layers: largest |variance - 1| over layers and "
            f"seeds, on {len(images)} images, of which it saw {config.init_batch}",
            apart, "<= 0.1", apart <= 0.1,
        ),
        Claim(
            "Glorot: variance of the last layer, largest over seeds",
            last, "< 1e-3", last < 1e-3,
        ),
        Claim(
            f"LSUV: held-out digits, %, after {config.steps} steps of SGD, mean",
            float(ours.mean()), "> 85", bool(ours.mean() > 85), stderr(ours),
        ),
        Claim(
            "Glorot: the same",
            float(theirs.mean()), "< 30", bool(theirs.mean() < 30), stderr(theirs),
        ),
    ]  # fmt: skip
    rows, metrics = [], {}
    for name, value in scores.items():
        accuracy = value["accuracy"][at[name]]
        rate = config.learning_rates[at[name]]
        final = float(np.exp(np.log(variances[name][:, -1]).mean()))
        rows.append((name, f"{final:.2g}", f"{rate:g}", f"{accuracy.mean():.1f}"))
        metrics |= {
            f"{name}/variance of the last layer": final,
            f"{name}/accuracy": float(accuracy.mean()),
            f"{name}/learning rate": rate,
        }
    metrics["LSUV/largest |variance - 1| on other writers' digits"] = float(
        np.abs(unseen["LSUV"] - 1).max()
    )
    run.table(
        f"{config.layers} layers, best learning rate of {config.learning_rates}",
        ("start", "variance of the last layer", "learning rate", "held-out digits (%)"),
        rows,
    )
    return Report(claims, metrics, [picture(config, run, variances, scores)])


if __name__ == "__main__":
    experiment(main, PRESETS)
