"""Schedule refinement: linear decay, and what gradient norms make of it.

Claims: constant norms give the linear decay; no weighting of 1000 random ones has a
lower bound on the last iterate than the refined one; on five convex logistic problems
the loss of the last iterate is lower with linear decay than with a constant learning
rate and with 1/sqrt(t), each at its best learning rate, on at least four.

    python -m experiments.optim.schedule_refinement full     # 5 seeds: half a minute

Expected: linear decay is best of the three on all but wine, whose classes a plane tells
apart. Refining the schedule from the norms of that run helps on wine alone, and hurts
on digits (0.078 nats against 0.006), where the norms of late batches vanish.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine

from jaxzoo.data.digits import digits
from jaxzoo.optim.schedule_refinement import last_iterate_bound, refine_schedule
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr

Data = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 1000
    batch_size: int = 16
    learning_rates: tuple[float, ...] = tuple(2.0**k for k in range(-10, 7))
    seeds: int = 5
    tau: float = 0.1
    weightings: int = 1000

    def __post_init__(self):
        if self.seeds < 2 or self.steps < 10 or len(self.learning_rates) < 3:
            raise ValueError("seeds >= 2, steps >= 10, 3 learning_rates, please")


PRESETS = {
    "smoke": Config(
        steps=100, learning_rates=(0.01, 0.1, 1.0), seeds=2, weightings=50
    ),
    "full": Config(),
}  # fmt: skip


def problems() -> dict[str, Data]:
    """Standardised features `[N, D]` with a one for the bias, and classes `[N]`."""
    found: dict[str, Any] = {}
    for name, load in (
        ("iris", load_iris), ("wine", load_wine), ("breast cancer", load_breast_cancer),
    ):  # fmt: skip
        found[name] = load(return_X_y=True)
    x, progression = map(np.asarray, load_diabetes(return_X_y=True))
    found["diabetes"] = x, (progression > np.median(progression)).astype(int)
    train = digits().split("train").arrays
    found["digits"] = train["image"].reshape(-1, 64).astype(float), train["label"]

    def prepare(x: np.ndarray, y: np.ndarray) -> Data:
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        return x.astype(np.float32), y.astype(np.int32)

    return {name: prepare(*pair) for name, pair in found.items()}


def baselines(steps: int) -> dict[str, Callable[[Any], Any]]:
    """Schedules that everyone knows, all with 1 as their largest value."""
    drops: Any = {steps * k // 3: 0.1 for k in (1, 2)}
    return {
        "linear": optax.linear_schedule(1.0, 0.0, steps - 1),
        "constant": optax.constant_schedule(1.0),
        "1/sqrt(t)": lambda t: 1.0 / jnp.sqrt(t + 1.0),
        "1/t": lambda t: 1.0 / (t + 1.0),
        "step": optax.piecewise_constant_schedule(1.0, drops),
        "cosine": optax.cosine_decay_schedule(1.0, steps - 1),
    }


def mean_loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    each = optax.softmax_cross_entropy_with_integer_labels(x @ w, y)
    return jnp.mean(each)


@functools.partial(jax.jit, static_argnames=("config", "classes"))
def descend(
    config: Config, schedules: jax.Array, x: jax.Array, y: jax.Array, classes: int
) -> tuple[jax.Array, jax.Array]:
    """SGD with every schedule `[K, seeds, T]` and learning rate.

    Returns the last iterate's loss over all data, `[K, rates, seeds]`, and the norms of
    the gradients along the runs, `[K, rates, seeds, T]`.
    """

    def one(schedule: jax.Array, rate: jax.Array, seed: jax.Array) -> Any:
        key = jax.random.key(seed)

        def step(w: jax.Array, t: jax.Array) -> Any:
            chosen = jax.random.randint(
                jax.random.fold_in(key, t), (config.batch_size,), 0, len(x)
            )
            slope = jax.grad(mean_loss)(w, x[chosen], y[chosen])
            w = w - rate * schedule[t] * slope
            return w, jnp.linalg.norm(slope)

        start = jnp.zeros((x.shape[1], classes))
        w, norms = lax.scan(step, start, jnp.arange(config.steps))
        return mean_loss(w, x, y), norms

    over_seeds = jax.vmap(one, (0, None, 0))
    over_rates = jax.vmap(over_seeds, (None, 0, None))
    over_schedules = jax.vmap(over_rates, (0, None, None))
    rates = jnp.asarray(config.learning_rates, jnp.float32)
    return over_schedules(schedules, rates, jnp.arange(config.seeds))


def bound_claims(config: Config, norms: np.ndarray) -> list[Claim]:
    """Constant norms, and the bound at norms of a run against random weightings."""
    flat, _ = refine_schedule(jnp.full(config.steps, 0.7), tau=config.tau)
    linear = baselines(config.steps)["linear"](jnp.arange(config.steps))
    gap = float(jnp.max(jnp.abs(flat - linear)))
    _, aux = refine_schedule(norms, tau=0.0)
    refined = float(last_iterate_bound(aux["weights"], norms))

    def random_bound(key: jax.Array, i: jax.Array) -> jax.Array:
        # From near the refined weights, or the uniform ones, to far from either.
        spread = 10.0 ** jax.random.uniform(key, (), minval=-1.0, maxval=0.5)
        centre = jnp.where(i % 2 == 0, jnp.log(aux["weights"]), 0.0)
        noise = jax.random.normal(jax.random.fold_in(key, 1), norms.shape)
        w = jnp.exp(centre + spread * noise)
        w = w / jnp.linalg.norm(w * norms)  # the factor that is best for it
        return last_iterate_bound(w, norms)

    keys = jax.random.split(jax.random.key(0), config.weightings)
    drawn = jax.jit(jax.vmap(random_bound))(keys, jnp.arange(config.weightings))
    ratio = float(refined / jnp.min(drawn))
    return [
        Claim(
            "constant norms: largest distance of the refined schedule from linear "
            "decay", gap, "<= 1e-6", gap <= 1e-6,
        ),
        Claim(
            "bound on the last iterate at the refined weights, over the least of "
            f"{config.weightings} random weightings, each in its best scale (norms of "
            "a run on diabetes, which never vanish)", ratio, "<= 1", ratio <= 1,
        ),
    ]  # fmt: skip


def pictures(
    config: Config, run: Run, final: Any, tuned: Any, norms: Any, refined: Any
) -> list[Figure]:
    figure, axes = panels(3, width=4.6)
    place = np.arange(config.steps) + 1
    curves(
        axes[0],
        {name: (place, np.asarray(value).T) for name, value in refined.items()},
        xlabel="step", ylabel="refined schedule",
    )  # fmt: skip
    axes[0].plot(place, 1 - place / config.steps, color="black", ls=":", lw=1)
    rates = np.asarray(config.learning_rates)
    for (name, losses), color in zip(final["digits"].items(), COLORS, strict=True):
        mean = losses.mean(1)
        spread = [stderr(row) for row in losses]
        axes[1].errorbar(rates, mean, spread, color=color, capsize=2, label=name)
    lowest = min(v.mean(1).min() for v in final["digits"].values())
    axes[1].set(
        xscale="log", yscale="log", ylim=(lowest / 1.3, 3.0),
        xlabel="learning rate", ylabel="loss of the last iterate, digits (nats)",
    )  # fmt: skip
    axes[1].legend(frameon=False, fontsize=8)
    names = list(tuned)
    for k, schedule in enumerate(s for s in final["digits"] if s != "linear"):
        excess = [
            tuned[n][schedule] / tuned[n]["linear"].mean() for n in names
        ]  # per seed
        axes[2].errorbar(
            np.arange(len(names)) + 0.12 * (k - 2.5),
            [e.mean() for e in excess], [stderr(e) for e in excess],
            color=COLORS[k + 1], marker="o", ms=4, ls="none", capsize=2, label=schedule,
        )  # fmt: skip
    axes[2].axhline(1.0, color=COLORS[0])
    axes[2].set(
        yscale="log", xticks=np.arange(len(names)),
        ylabel="last loss over that of linear decay, both tuned", xlabel="problem",
    )  # fmt: skip
    axes[2].set_xticklabels([name.replace(" ", "\n") for name in names])
    axes[2].legend(frameon=False, fontsize=8)
    return [
        run.figure(
            "schedule_refinement", figure, title="Schedules for the last iterate",
            caption="Left: schedules refined from the norms of a run with linear decay "
            "(dotted). Middle: loss by learning rate. Right: loss at the best learning "
            f"rate. Means and standard errors over {config.seeds} seeds.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    times = jnp.arange(config.steps)
    known = {
        name: np.broadcast_to(np.asarray(s(times)), (config.seeds, config.steps))
        for name, s in baselines(config.steps).items()
    }
    final: dict[str, Any] = {}
    tuned: dict[str, Any] = {}
    norms: dict[str, np.ndarray] = {}
    refined: dict[str, np.ndarray] = {}
    rates: dict[str, Any] = {}
    for name, (x, y) in problems().items():
        classes = int(y.max()) + 1
        arrays = jnp.asarray(x), jnp.asarray(y)
        stacked = jnp.asarray(np.stack(list(known.values())), jnp.float32)
        losses, logged = (
            np.asarray(a) for a in descend(config, stacked, *arrays, classes)
        )
        best = int(np.argmin(losses[0].mean(1)))  # of linear decay
        norms[name] = logged[0, best]
        again = [refine_schedule(g, tau=config.tau)[0] for g in norms[name]]
        refined[name] = np.stack(again)
        second = jnp.asarray(refined[name])[None]
        last = np.asarray(descend(config, second, *arrays, classes)[0])
        losses = np.concatenate([losses, last])
        final[name] = dict(zip([*known, "refined"], losses, strict=True))
        places = {k: int(np.argmin(v.mean(1))) for k, v in final[name].items()}
        tuned[name] = {k: final[name][k][i] for k, i in places.items()}
        rates[name] = {k: config.learning_rates[i] for k, i in places.items()}
    schedules = [*known, "refined"]
    run.table(
        f"Loss of the last iterate at the best learning rate, {config.seeds} seeds",
        ("problem", *schedules),
        [
            (n, *(f"{tuned[n][s].mean():.4f} at {rates[n][s]:.3g}" for s in schedules))
            for n in tuned
        ],
    )
    rivals = ("constant", "1/sqrt(t)")
    won = sum(
        all(r["linear"].mean() < r[s].mean() for s in rivals) for r in tuned.values()
    )
    claims = bound_claims(config, norms["diabetes"][0])
    claims.append(
        Claim(
            f"of {len(tuned)} logistic problems, those where the last loss of linear "
            "decay is below those of a constant rate and of 1/sqrt(t), all tuned",
            won, ">= 4", won >= 4,
        )
    )  # fmt: skip
    metrics = {f"{n}/{s}": float(tuned[n][s].mean()) for n in tuned for s in schedules}
    metrics["refined below linear, problems"] = sum(
        r["refined"].mean() < r["linear"].mean() for r in tuned.values()
    )
    return Report(claims, metrics, pictures(config, run, final, tuned, norms, refined))


if __name__ == "__main__":
    experiment(main, PRESETS)
