"""UNIC: one student distilled from two teachers, with and without teacher dropping.

Claims: of two teachers that know different things about a digit (its remainder by 5;
whether it is below 5), teacher dropping lowers the gap between the student's losses for
the two, against no dropping; and linear probes on the student come within 2 points of
the teacher on each teacher's own task.

    python -m experiments.ssl.unic_distill full    # 8x8 digits, 3 seeds

Expected of `full`: the gap falls from 0.016 to 0.006; the student is ahead of the
teachers by 3 and 6 points, and tells the digit itself 6 points more often than the
better one of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.ssl._logistic import probe
from experiments.ssl._unic_distill_teachers import (
    TASKS,
    chosen,
    features,
    fit_teacher,
    images,
    labels,
    optimizer,
)
from jaxzoo.nn.feature_stats import FeatureStats
from jaxzoo.nn.vit import ViT
from jaxzoo.ssl.unic_distill import LadderOfProjectors, token_loss, unic_loss
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import init_state, update_step

KINDS = ("cls", "patch")
STATE = ("params", "opt_state", "step", "key")


@dataclasses.dataclass(frozen=True)
class Config:
    drops: tuple[float, ...] = (0.0, 0.5)  # p of teacher dropping; the claim needs both
    seeds: int = 3
    teacher_steps: int = 600
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 1e-3
    width: int = 32
    depth: int = 3
    hidden: int = 64  # of the ladder's projectors; the last is twice as wide

    def __post_init__(self):
        if self.seeds < 2 or 0.0 not in self.drops or len(self.drops) < 2:
            raise ValueError("seeds >= 2, and drops with 0 and one more, please")


PRESETS = {
    "smoke": Config(
        seeds=2, teacher_steps=10, steps=10, batch_size=16, width=8, depth=2, hidden=8
    ),
    "full": Config(),
}


def by_kind(features: Any) -> dict[str, Any]:
    return {"cls": features[:, 0], "patch": features[:, 1:]}


def standardized(stats, teachers) -> dict[str, dict[str, jax.Array]]:
    """What the student is to predict: `{teacher: {kind: features}}`."""
    return {
        name: {k: stats[name][k].standardize(x) for k, x in by_kind(features).items()}
        for name, features in teachers.items()
    }


def moved(stats, teachers, momentum) -> dict[str, dict[str, FeatureStats]]:
    """The statistics after a batch of the teachers' features."""
    return {
        name: {
            k: stats[name][k].update(x, momentum=momentum)
            for k, x in by_kind(features).items()
        }
        for name, features in teachers.items()
    }


def teacher_losses(ladder, params, targets, blocks) -> jax.Array:
    """Loss per example and teacher, in the order of `TASKS`: the mean of two kinds."""
    projected = ladder.apply(params, blocks)
    losses = []
    for name in TASKS:
        pairs = zip(projected[name], KINDS, strict=True)
        kinds = [token_loss(s, targets[name][kind]) for s, kind in pairs]
        losses.append((kinds[0] + kinds[1]) / 2)
    return jnp.stack(losses, axis=1)


def distil(config: Config, run: Run, nets, x, teachers):
    """Trains a student per drop and seed, all at once: `[drops, seeds, ...]`.

    The teachers are frozen and images are not augmented, so that `teachers` holds
    their features of all training images, `[seeds, N, 17, width]` by name.

    Returns:
        The students' parameters and the statistics of their teachers' features.
    """
    vit, ladder = nets
    adamw = optimizer(config, config.steps)
    momentum = optax.cosine_decay_schedule(1.0, config.steps, alpha=0.001)

    def loss(params, key, batch):
        _, blocks = vit.apply(params["vit"], batch["image"])
        losses = teacher_losses(ladder, params["ladder"], batch["targets"], blocks)
        value, aux = unic_loss(losses, key=key, drop=batch["drop"][0])
        names = {f"loss_{n}": aux["per_teacher"][i] for i, n in enumerate(TASKS)}
        kept = {f"kept_{n}": aux["kept"][i] for i, n in enumerate(TASKS)}
        return value, {"loss": value, **names, **kept}

    inner = update_step(loss, adamw, reproducible=run.options.reproducible)

    def step(state, batch):
        targets = standardized(state["stats"], batch["teachers"])
        part = {"image": batch["image"], "targets": targets, "drop": batch["drop"]}
        new, metrics = inner({name: state[name] for name in STATE}, part)
        weight = momentum(state["step"])
        stats = moved(state["stats"], batch["teachers"], weight)
        return {**new, "stats": stats}, metrics

    def start_one(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        backbone = vit.init(keys[0], jnp.zeros((1, 8, 8, 1)))
        _, blocks = vit.apply(backbone, jnp.zeros((1, 8, 8, 1)))
        params = {"vit": backbone, "ladder": ladder.init(keys[1], blocks)}
        stats = {
            name: {kind: FeatureStats.start(config.width) for kind in KINDS}
            for name in TASKS
        }
        return {**init_state(keys[2], params, adamw), "stats": stats}

    copies = len(config.drops)

    def start():
        # The same start, batches and random numbers for each p.
        return jax.vmap(start_one)(jnp.tile(jnp.arange(config.seeds), copies))

    def ids(t):
        return chosen(config, len(x), t) * copies

    def batches(t):
        rows = ids(t)
        each = {
            name: np.stack([f[i % config.seeds][r] for i, r in enumerate(rows)])
            for name, f in teachers.items()
        }
        # One p per example, all the same, since a batch may be cut.
        drop = np.repeat(np.array(config.drops, np.float32), config.seeds)
        drop = np.tile(drop[:, None], (1, config.batch_size))
        return {"image": x[np.stack(rows)], "teachers": each, "drop": drop}

    state = train(
        run, "students", jax.vmap(step), start, batches, num_steps=config.steps,
        show="loss", batch_axis=1, ids=ids,
    )  # fmt: skip
    return local((state["params"], state["stats"]))


def probes(of_train: np.ndarray, of_test: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy on each task, and on the digit, from CLS: `{task: [seeds]}`."""
    train_digit, test_digit = images("train")[1], images("test")[1]
    answers = {
        name: (labels(name, train_digit), labels(name, test_digit)) for name in TASKS
    }
    answers["digit"] = (train_digit, test_digit)
    pairs = list(zip(of_train[:, :, 0], of_test[:, :, 0], strict=True))
    return {
        name: np.array([probe(a, y, b, test_y) for a, b in pairs])
        for name, (y, test_y) in answers.items()
    }


def held_out(nets, trained, x, teachers) -> np.ndarray:
    """Loss of each student for each teacher on test images: `[students, teachers]`."""
    vit, ladder = nets

    def one(inputs):
        params, stats, own = inputs
        _, blocks = vit.apply(params["vit"], x)
        targets = standardized(stats, own)
        return jnp.mean(teacher_losses(ladder, params["ladder"], targets, blocks), 0)

    copies = len(jax.tree.leaves(trained)[0]) // len(next(iter(teachers.values())))
    own = {name: np.concatenate([f] * copies) for name, f in teachers.items()}
    return np.asarray(jax.jit(lambda inputs: lax.map(one, inputs))((*trained, own)))


def pictures(config: Config, run: Run, scores) -> list[Figure]:
    figure, (left, right) = panels(2)
    history = run.history("students")
    each = [history[f"loss_{name}"] for name in TASKS]
    gap = np.abs(each[0] - each[1]).reshape(-1, len(config.drops), config.seeds)
    lines = {
        f"p = {drop:g}": (history["step"], gap[:, i])
        for i, drop in enumerate(config.drops)
    }
    curves(
        left, lines, xlabel="step",
        ylabel="gap of the two teachers' losses (training)",
    )  # fmt: skip
    left.set_ylim(bottom=0)
    names = list(scores)
    tasks = ["remainder", "half", "digit"]
    for i, (name, color) in enumerate(zip(names, COLORS, strict=False)):
        values = np.stack([scores[name][task] for task in tasks])
        spots = np.arange(len(tasks)) + 0.18 * (i - (len(names) - 1) / 2)
        spread = [stderr(v) for v in values]
        right.errorbar(
            spots, values.mean(1), spread, fmt="o", capsize=3, color=color, label=name
        )
    right.set_xticks(range(len(tasks)), ["digit mod 5", "digit < 5", "digit"])
    right.set(xlabel="what the probe is asked", ylabel="held-out accuracy (%)")
    right.legend(frameon=False)
    seeds = f"mean and standard error over {config.seeds} seeds"
    return [
        run.figure(
            "distillation", figure, title="Two teachers, one student",
            caption="Left: how far apart the losses for the two teachers are, with and "
            "without teacher dropping. Right: linear probes on CLS of each teacher and "
            f"of the students; {seeds}.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    vit: Any = ViT(patch=2, width=config.width, depth=config.depth, heads=4)
    ladder: Any = LadderOfProjectors(
        dict.fromkeys(TASKS, config.width), config.hidden, 2 * config.hidden
    )
    (x, _), (test_x, _) = images("train"), images("test")
    known = {task: fit_teacher(config, run, vit, task) for task in TASKS}
    of_train = {task: features(vit, params, x) for task, params in known.items()}
    of_test = {task: features(vit, params, test_x) for task, params in known.items()}
    scores = {
        f"teacher: {task}": probes(of_train[task], of_test[task]) for task in TASKS
    }
    trained = distil(config, run, (vit, ladder), x, of_train)
    shape = (len(config.drops), config.seeds, len(TASKS))
    losses = held_out((vit, ladder), trained, test_x, of_test).reshape(shape)
    seen = [features(vit, trained[0]["vit"], part) for part in (x, test_x)]
    gaps, metrics = {}, {}
    for i, drop in enumerate(config.drops):
        gaps[drop] = losses[i].max(1) - losses[i].min(1)
        own = slice(i * config.seeds, (i + 1) * config.seeds)
        scores[f"student p = {drop:g}"] = probes(seen[0][own], seen[1][own])
        for j, task in enumerate(TASKS):
            metrics[f"p{drop:g}/loss_{task}"] = losses[i, :, j].mean()
        metrics[f"p{drop:g}/gap"] = gaps[drop].mean()
    run.table(
        f"Linear probes on held-out digits, {config.seeds} seeds, %",
        ("features of", "digit mod 5", "digit < 5", "digit"),
        [
            (name, *(f"{v.mean():.1f} ± {stderr(v):.1f}" for v in of.values()))
            for name, of in scores.items()
        ],
    )
    for name, of in scores.items():
        short = name.replace(": ", "_").replace(" = ", "").replace(" ", "_")
        metrics |= {f"{short}/{task}": v.mean() for task, v in of.items()}
    most = max(config.drops)
    lower = gaps[most] - gaps[0.0]
    claims = [
        Claim(
            f"digits: gap of the two teachers' held-out losses with teacher dropping "
            f"p = {most:g} minus that without",
            float(lower.mean()), "< 0", bool(lower.mean() < 0), stderr(lower),
        )
    ]  # fmt: skip
    for task in TASKS:
        lead = scores[f"student p = {most:g}"][task] - scores[f"teacher: {task}"][task]
        claims.append(
            Claim(
                f"digits: probe of the student on the task '{task}' minus that of its "
                "teacher, points",
                float(lead.mean()), ">= -2", bool(lead.mean() >= -2), stderr(lead),
            )
        )  # fmt: skip
    return Report(claims, metrics, pictures(config, run, scores))


if __name__ == "__main__":
    experiment(main, PRESETS)
