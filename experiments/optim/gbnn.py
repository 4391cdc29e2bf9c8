"""GBNN: a hidden layer trained by boosting against the same layer trained by Adam.

Claims: the merged network equals the additive expansion to 1e-5; its mean test score
over five tables is within 1 point of that of networks of the same size trained by Adam;
and without the half of its units that were trained last it is at most 2 points worse.

    python -m experiments.optim.gbnn full    # five tables, 3 seeds: 1 minute

Expected: outputs equal to 1e-6; 0.8 +- 0.6 points behind Adam, of which digits and iris
are the most, 1.6 and 2.3; 0.1 +- 0.2 points lost with half of the units.

A score is the accuracy in per cent, or 100 R^2 where the target is a number. Each seed
splits a table anew into 60% to train on, 20% to choose the shrinkage or the learning
rate with (one of four each, by the mean over seeds) and 20% to test.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn import datasets

from jaxzoo.optim.gbnn import Network, gbnn
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    parts: int = 20
    units: int = 5  # per part
    iterations: int = 30  # of L-BFGS per part
    shrinkages: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5)
    steps: int = 1500  # of Adam
    batch_size: int = 64
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    rows: int = 2000  # of a table at most
    tables: tuple[str, ...] = ("breast cancer", "wine", "digits", "diabetes", "iris")

    def __post_init__(self):
        if self.seeds < 2 or self.parts % 2 or not self.shrinkages:
            raise ValueError("seeds >= 2, an even number of parts, shrinkages, please")


PRESETS = {
    "smoke": Config(
        seeds=2, parts=4, units=2, iterations=5, shrinkages=(0.1, 0.5), steps=50,
        batch_size=16, learning_rates=(3e-3, 1e-2), rows=100,
        tables=("iris", "diabetes"),
    ),
    "full": Config(),
}  # fmt: skip


class Table(NamedTuple):
    """Rows in the order of each seed: those to train on, to choose by, and to test."""

    x: np.ndarray  # [seeds, N, D]
    y: np.ndarray  # [seeds, N]
    classes: int | None

    @property
    def ends(self) -> tuple[int, int]:
        rows = self.x.shape[1]
        return int(0.6 * rows), int(0.8 * rows)


def tables(config: Config) -> dict[str, Table]:
    """The tables, standardised by their training rows."""
    loaders: dict[str, tuple[Any, int | None]] = {
        "breast cancer": (datasets.load_breast_cancer, 2),
        "wine": (datasets.load_wine, 3),
        "digits": (datasets.load_digits, 10),
        "diabetes": (datasets.load_diabetes, None),
        "iris": (datasets.load_iris, 3),
    }
    found = {}
    for name in config.tables:
        load, classes = loaders[name]
        x, y = load(return_X_y=True)
        xs, ys = [], []
        for seed in range(config.seeds):
            order = np.random.default_rng(seed).permutation(len(y))[: config.rows]
            a, b = x[order].astype(np.float32), y[order]
            seen = a[: int(0.6 * len(b))]
            xs.append((a - seen.mean(axis=0)) / np.maximum(seen.std(axis=0), 1e-6))
            if classes is None:
                b = (b - b[: len(seen)].mean()) / b[: len(seen)].std()
            ys.append(b.astype(np.float32 if classes is None else np.int32))
        found[name] = Table(np.stack(xs), np.stack(ys), classes)
    return found


def score(table: Table, outputs: np.ndarray, rows: slice) -> np.ndarray:
    """Accuracy in per cent or 100 R^2, of outputs `[..., seeds, N, C]`."""
    f, y = outputs[..., rows, :], table.y[:, rows]
    if table.classes is None:
        spread = np.square(y - y.mean(axis=1, keepdims=True)).sum(axis=1)
        error = np.square(f[..., 0] - y).sum(axis=-1)
        return 100.0 * (1.0 - error / spread)
    guess = (f[..., 0] > 0).astype(int) if f.shape[-1] == 1 else f.argmax(axis=-1)
    return 100.0 * (guess == y).mean(axis=-1)


def over_grid(one: Any, rates: tuple[float, ...], table: Table) -> Any:
    """`one(rate, key, x, y)` for all rates and seeds, leaves `[rates, seeds, ...]`."""
    keys = jax.random.split(jax.random.key(0), len(table.x))
    every = jax.vmap(jax.vmap(one, (None, 0, 0, 0)), (0, None, None, None))
    return jax.device_get(jax.jit(every)(jnp.asarray(rates), keys, table.x, table.y))


def boosted(config: Config, table: Table) -> dict[str, np.ndarray]:
    """Outputs after each part, of half the parts, and of the merged networks."""
    end, _ = table.ends

    def one(rate: jax.Array, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        model, _ = gbnn(
            key, x[:end], y[:end], num_steps=config.parts, num_units=config.units,
            num_classes=table.classes, shrinkage=rate, num_iterations=config.iterations,
        )  # fmt: skip
        half = model.truncate(config.parts // 2 * config.units)
        each = jax.vmap(lambda part: part(x))(model.parts)
        staged = jnp.cumsum(model.rate.reshape(-1, 1, 1) * each, axis=0)
        return {
            "whole": model(x),
            "merged": model.merge()(x),
            "half": half.merge()(x),
            "staged": model.constant[None, None] + staged,
        }

    return over_grid(one, config.shrinkages, table)


def trained(config: Config, table: Table) -> np.ndarray:
    """Outputs of networks of the same size, by Adam on random batches."""
    end, _ = table.ends
    width, inputs = config.parts * config.units, table.x.shape[-1]
    outputs = table.classes or 1
    glorot = jax.nn.initializers.glorot_uniform()

    def loss(network: Network, x: jax.Array, y: jax.Array) -> jax.Array:
        f = network(x)
        if table.classes is None:
            return 0.5 * jnp.mean(jnp.square(f[:, 0] - y))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(f, y))

    def one(rate: jax.Array, key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        optimizer: Any = optax.adam(rate)
        first, second, drawing = jax.random.split(key, 3)
        network = Network(
            glorot(first, (inputs, width)), jnp.zeros(width),
            glorot(second, (width, outputs)), jnp.zeros(outputs),
        )  # fmt: skip

        def step(carry: Any, drawn: jax.Array) -> Any:
            network, state = carry
            gradient = jax.grad(loss)(network, x[drawn], y[drawn])
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(network, updates), state), None

        drawn = jax.random.randint(drawing, (config.steps, config.batch_size), 0, end)
        start = (network, optimizer.init(network))
        network = lax.scan(step, start, drawn)[0][0]
        f = network(x)
        return f[:, 1:] - f[:, :1] if outputs == 2 else f

    return over_grid(one, config.learning_rates, table)


def chosen(table: Table, outputs: np.ndarray) -> int:
    """The rate with the best mean score on the rows to choose by."""
    means = score(table, outputs, slice(*table.ends)).mean(axis=-1)
    return int(np.argmax(np.where(np.isfinite(means), means, -np.inf)))


def claims_of(difference: float, scores: dict[str, np.ndarray]) -> list[Claim]:
    """Scores are `[tables, seeds]`; errors are those of the means over seeds."""
    behind = (scores["adam"] - scores["whole"]).mean(axis=0)
    dropped = (scores["whole"] - scores["half"]).mean(axis=0)
    return [
        Claim(
            "largest difference of the merged network's outputs from the expansion's, "
            "over their largest, worst table, shrinkage and seed",
            difference, "<= 1e-5", difference <= 1e-5,
        ),
        Claim(
            "mean test score over the tables of Adam's networks minus that of boosted "
            "ones of the same size, points",
            float(behind.mean()), "<= 1", bool(behind.mean() <= 1.0),
            stderr(behind),
        ),
        Claim(
            "mean test score lost with the last half of the units, points",
            float(dropped.mean()), "<= 2", bool(dropped.mean() <= 2.0),
            stderr(dropped),
        ),
    ]  # fmt: skip


def pictures(config: Config, run: Run, found: Any, staged: Any) -> list[Figure]:
    figure, axes = panels(2, width=5.4)
    units = config.units * np.arange(1, config.parts + 1)
    series = {name: (units, values.T) for name, values in staged.items()}
    curves(
        axes[0], series, xlabel="hidden units kept, of those trained first",
        ylabel="test score (% or 100 R^2)",
    )  # fmt: skip
    place = np.arange(len(found))
    names = (("whole", "boosted"), ("half", "half of it"), ("adam", "Adam"))
    for shift, color, (key, label) in zip((-0.2, 0, 0.2), COLORS, names, strict=False):
        values = np.stack([scores[key] for scores in found.values()])
        axes[1].errorbar(
            place + shift, values.mean(axis=1), [stderr(v) for v in values],
            color=color, fmt="o", ms=5, capsize=3, label=label,
        )  # fmt: skip
    axes[1].set_xticks(place, list(found), rotation=15)
    axes[1].set(xlabel="table", ylabel="test score (% or 100 R^2)")
    axes[1].legend(frameon=False)
    return [
        run.figure(
            "gbnn", figure, title="A hidden layer by boosting",
            caption=f"{config.parts} parts of {config.units} units. Left: without the "
            "units trained last. Right: against a network of as many units by Adam. "
            f"Mean and standard error over {config.seeds} seeds.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    found, staged, rows, metrics, worst = {}, {}, [], {}, 0.0
    for name, table in tables(config).items():
        ours, adam = boosted(config, table), trained(config, table)
        error = np.abs(ours["merged"] - ours["whole"]).max(axis=(2, 3))
        size = np.abs(ours["whole"]).max(axis=(2, 3))
        worst = max(worst, float((error / size).max()))
        best, fastest = chosen(table, ours["whole"]), chosen(table, adam)
        test = functools.partial(score, table, rows=slice(table.ends[1], None))
        found[name] = {
            "whole": test(ours["whole"][best]),
            "half": test(ours["half"][best]),
            "adam": test(adam[fastest]),
        }
        stages = np.moveaxis(ours["staged"][best], 1, 0)  # [parts, seeds, N, C]
        staged[name] = test(stages).T
        means = [float(v.mean()) for v in found[name].values()]
        for key, value in zip(found[name], means, strict=True):
            metrics[f"{name}/{key}"] = value
        rates = config.shrinkages[best], config.learning_rates[fastest]
        rows.append((name, *(f"{m:.1f}" for m in means), *(f"{r:g}" for r in rates)))
        run.say(f"{name}: done")
    run.table(
        f"Test scores (% or 100 R^2), {config.parts * config.units} units",
        ("table", "boosted", "half of it", "Adam", "shrinkage", "learning rate"),
        rows,
    )
    scores = {
        key: np.stack([each[key] for each in found.values()])
        for key in ("whole", "half", "adam")
    }
    claims = claims_of(worst, scores)
    return Report(claims, metrics, pictures(config, run, found, staged))


if __name__ == "__main__":
    experiment(main, PRESETS)
