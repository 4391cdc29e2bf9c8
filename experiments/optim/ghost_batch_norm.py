"""Large batches that generalise like small ones; weights that drift like log t.

Claims: at a constant learning rate a + b log t fits the distance of the weights from
their start with R^2 >= 0.95, and better than a + b sqrt t; a ghost batch as large as
the batch is ordinary batch norm; with as many updates, the learning rate times the root
of the ratio of batches and ghost batches, a large batch recovers at least 70 % of the
accuracy that it loses at the small batch's number of epochs. Each has its best learning
rate.

    python -m experiments.optim.ghost_batch_norm full

Expected, 50 s of CPU: R^2 of 0.987 for log t and 0.892 for sqrt t; 93.1 % with batches
of 16, 91.8 % with 256 at the same epochs, 94.4 % with as many updates.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.data.digits import digits
from jaxzoo.data.source import batch_indices
from jaxzoo.optim.ghost_batch_norm import GhostBatchNorm, large_batch_sgd
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr


@dataclasses.dataclass(frozen=True)
class Config:
    hidden: tuple[int, ...] = (64, 64)
    small: int = 16
    large: int = 256
    epochs: int = 12
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    seeds: int = 5
    walkers: int = 400
    walk_steps: int = 20_000

    def __post_init__(self):
        if self.seeds < 2 or self.large % self.small:
            raise ValueError("seeds >= 2, and a multiple of 'small' as 'large', please")


PRESETS = {
    "smoke": Config(
        hidden=(8,), small=32, large=256, epochs=1, learning_rates=(0.03,), seeds=2,
        walkers=8, walk_steps=200,
    ),
    "full": Config(),
}  # fmt: skip


class Net(nn.Module):
    hidden: tuple[int, ...]
    ghost_size: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = x.reshape(len(x), -1)
        for width in self.hidden:
            x = nn.Dense(width, use_bias=False)(x)
            norm = GhostBatchNorm(self.ghost_size, use_running_average=not train)
            x = nn.relu(norm(x))
        return nn.Dense(10)(x)


class Arm(NamedTuple):
    """One way to train: batch, ghost batch, batch of the learning rate, updates."""

    batch: int
    ghost: int
    base: int
    updates: int


def arms(config: Config) -> dict[str, Arm]:
    few, many = (
        config.epochs * len(digits().split("train")) // size
        for size in (config.large, config.small)
    )
    small, large = config.small, config.large
    return {
        "small batch": Arm(small, small, small, many),
        "large batch": Arm(large, large, large, few),
        "+ learning rate": Arm(large, large, small, few),
        "+ ghost batches": Arm(large, small, small, few),
        "+ as many updates": Arm(large, small, small, many),
    }


def fit(config: Config, arm: Arm) -> dict[str, np.ndarray]:
    """Accuracy `[rates, seeds]` and distances from the start `[rates, seeds, t]`."""
    train, test = (digits().split(name).arrays for name in ("train", "test"))
    images, labels = jnp.asarray(train["image"] / np.float32(16)), train["label"]
    held_out = jnp.asarray(test["image"] / np.float32(16))
    order = np.stack(
        [
            [
                batch_indices(s, t, num_examples=len(labels), batch_size=arm.batch)
                for t in range(arm.updates)
            ]
            for s in range(config.seeds)
        ]
    ).astype(np.int32)
    model, labels = Net(config.hidden, arm.ghost), jnp.asarray(labels)

    def loss(params: Any, stats: Any, rows: jax.Array) -> Any:
        variables = {"params": params, "batch_stats": stats}
        outputs: Any = model.apply(
            variables, images[rows], True, mutable=["batch_stats"]
        )
        each = optax.softmax_cross_entropy_with_integer_labels(outputs[0], labels[rows])
        return jnp.mean(each), outputs[1]["batch_stats"]

    def one(rate: jax.Array, seed: jax.Array, order: jax.Array) -> Any:
        start: Any = model.init(jax.random.key(seed), images[:1], True)
        optimizer = large_batch_sgd(rate, batch_size=arm.batch, base_size=arm.base)

        def step(carry: Any, rows: jax.Array) -> Any:
            params, stats, state = carry
            grads, stats = jax.grad(loss, has_aux=True)(params, stats, rows)
            updates, state = optimizer.update(grads, state, params)
            params: Any = optax.apply_updates(params, updates)
            moved = jax.tree.map(jnp.subtract, params, start["params"])
            return (params, stats, state), optax.tree.norm(moved)

        carry = (start["params"], start["batch_stats"], optimizer.init(start["params"]))
        (params, stats, _), distance = lax.scan(step, carry, order)
        variables = {"params": params, "batch_stats": stats}
        logits: Any = model.apply(variables, held_out, False)
        guess = jnp.argmax(logits, axis=1)
        return {"accuracy": 100 * jnp.mean(guess == test["label"]), "moved": distance}

    rates, seeds = jnp.asarray(config.learning_rates), jnp.arange(config.seeds)
    every = jax.vmap(jax.vmap(one, (None, 0, 0)), (0, None, None))
    return jax.tree.map(np.asarray, jax.jit(every)(rates, seeds, order))


def r_squared(x: np.ndarray, y: np.ndarray) -> float:
    """Of the line through (x, y) of least squares."""
    design = np.stack([np.ones_like(x), x], axis=1)
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(1 - (left**2).sum() / ((y - y.mean()) ** 2).sum())


def log_spaced(count: int) -> np.ndarray:
    return np.unique(np.geomspace(1, count, 60).astype(int))


def random_walks(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Mean distances of walkers, each on its own potential with independent steps.

    E (L(v) - L(w))^2 = |v - w|: the power is 1 in place of the 2 of the weights, and
    theory has log^2 t in place of log t.
    """
    half = 1000
    keys = jax.random.split(jax.random.key(0))
    slopes = jax.random.normal(keys[0], (config.walkers, 2 * half + 1))
    up = jax.nn.sigmoid(-slopes)
    each = jnp.arange(config.walkers)

    def step(place: jax.Array, key: jax.Array) -> Any:
        rises = jax.random.uniform(key, place.shape) < up[each, place]
        place = jnp.clip(place + jnp.where(rises, 1, -1), 0, 2 * half)
        return place, jnp.mean(jnp.abs(place - half))

    start = jnp.full(config.walkers, half)
    walk = jax.jit(lambda keys: lax.scan(step, start, keys)[1])
    moved = np.asarray(walk(jax.random.split(keys[1], config.walk_steps)))
    t = log_spaced(config.walk_steps)
    return t, moved[t - 1]


def ordinary_claim() -> Claim:
    """Against Flax, forward and back."""
    x = 3.0 * jax.random.normal(jax.random.key(0), (256, 32)) + 1.0
    ours = GhostBatchNorm(256)
    theirs = nn.BatchNorm(use_running_average=False, momentum=0.9)
    variables = ours.init(jax.random.key(0), x)

    def both(model: Any) -> Any:
        def value(x: jax.Array) -> Any:
            y, stats = model.apply(variables, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, stats)

        return jax.grad(value, has_aux=True)(x)

    apart = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))), both(ours), both(theirs)
    )
    largest = max(jax.tree.leaves(apart))
    return Claim(
        "ghost batch = batch: largest departure of outputs, gradient and running "
        "statistics from Flax's batch norm",
        largest, "<= 1e-5", largest <= 1e-5,
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    results = {name: fit(config, arm) for name, arm in arms(config).items()}
    best = {k: int(r["accuracy"].mean(1).argmax()) for k, r in results.items()}
    accuracy = {k: r["accuracy"][best[k]] for k, r in results.items()}
    moved = results["small batch"]["moved"][best["small batch"]]
    t = log_spaced(moved.shape[1])
    logs = np.array([r_squared(np.log(t), y[t - 1]) for y in moved])
    roots = np.array([r_squared(np.sqrt(t), y[t - 1]) for y in moved])
    gap = accuracy["small batch"].mean() - accuracy["large batch"].mean()
    gained = accuracy["+ as many updates"].mean() - accuracy["large batch"].mean()
    share = 100 * float(gained / gap) if gap > 0 else float("nan")
    claims = [
        ordinary_claim(),
        Claim(
            "small batch at a constant rate: R^2 of a + b log t for the distance from "
            "the start",
            float(logs.mean()), ">= 0.95", bool(logs.mean() >= 0.95), stderr(logs),
        ),
        Claim(
            "the same minus R^2 of a + b sqrt t",
            float((logs - roots).mean()), "> 0", bool((logs - roots).mean() > 0),
            stderr(logs - roots),
        ),
        Claim(
            f"batch of {config.large} for {config.small}: share of the lost accuracy "
            "that comes back, %",
            share, ">= 70", bool(gap > 0 and share >= 70),
        ),
    ]  # fmt: skip
    steps, walked = random_walks(config)
    metrics: dict[str, float | int | str] = {
        "weights/R^2 of log t": float(logs.mean()),
        "weights/R^2 of sqrt t": float(roots.mean()),
        "random potential/R^2 of log^2 t": r_squared(np.log(steps) ** 2, walked),
        "random potential/R^2 of sqrt t": r_squared(np.sqrt(steps), walked),
    }
    rows = []
    for name, arm in arms(config).items():
        rate = config.learning_rates[best[name]]
        mean, error = accuracy[name].mean(), stderr(accuracy[name])
        cells = (arm.batch, arm.ghost, arm.updates, f"{rate:g}")
        rows.append((name, *map(str, cells), f"{mean:.1f} +- {error:.1f}"))
        metrics[f"accuracy/{name}"] = float(mean)
    run.table(
        f"Held-out digits, {config.seeds} seeds",
        ("training", "batch", "ghost", "updates", "learning rate", "accuracy (%)"),
        rows,
    )
    return Report(claims, metrics, [picture(config, run, accuracy, t, moved)])


def picture(
    config: Config, run: Run, accuracy: Any, t: np.ndarray, moved: np.ndarray
) -> Figure:
    figure, axes = panels(2)
    curves(
        axes[0], {"small batch": (t, moved[:, t - 1].T)}, xlabel="update",
        ylabel="distance of the weights from their start",
    )  # fmt: skip
    mean = moved[:, t - 1].mean(0)
    for f, name, color in ((np.log, "log t", 1), (np.sqrt, "sqrt t", 2)):
        slope, offset = np.polyfit(f(t), mean, 1)
        axes[0].plot(t, offset + slope * f(t), "--", color=COLORS[color], label=name)
    axes[0].set_xscale("log")
    axes[0].legend(frameon=False)
    place = np.arange(len(accuracy))
    axes[1].errorbar(
        place, [a.mean() for a in accuracy.values()],
        [stderr(a) for a in accuracy.values()], fmt="o", capsize=3, color=COLORS[0],
    )  # fmt: skip
    axes[1].set(ylabel="held-out digits (%)")
    axes[1].set_xticks(place, list(accuracy), rotation=20, ha="right")
    return run.figure(
        "ghost_batch_norm", figure, title="Train longer",
        caption="Left: distance of the weights from their start, and its two fits. "
        "Right: accuracy, each step added to the ones before it. Mean and standard "
        f"error over {config.seeds} seeds.",
    )  # fmt: skip


if __name__ == "__main__":
    experiment(main, PRESETS)
