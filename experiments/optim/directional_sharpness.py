"""Directional sharpness of optimizers on a small transformer, at the same iterates.

Claims, on bytes of Moby Dick, at iterates that SGD with momentum went through and at
others of Adam: the median directional sharpness of SGD's update is at least 5 times
that of Adam's; clipping the largest 10% of the gradient's coordinates makes SGD's at
least 3 times smaller, and lets its best step take more off the loss.

    python -m experiments.optim.directional_sharpness full    # 3 seeds: 2 minutes

Expected: the order of the paper, less far apart, so that the exit status is 1. SGD is
2.8 times as sharp as Adam, 1.6 times as sharp as with clipping, which lets the best
step take 1.4 times as much off the loss.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.optim._tasks import Task, byte_lm
from jaxzoo.optim.directional_sharpness import (
    coordinate_clip,
    directional_sharpness,
    loss_along,
)
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr

PATHS = ("SGD", "Adam")  # whose iterates are looked at


@dataclasses.dataclass(frozen=True)
class Config:
    sgd_rate: float = 1.0
    adam_rate: float = 1e-2
    fraction: float = 0.1  # of the coordinates that are clipped
    looks: int = 6  # iterates of a path
    every: int = 40  # steps between them
    batch_size: int = 16
    probe_size: int = 16  # windows that curvature and losses are measured on
    lengths: int = 16  # steps that are tried along each update
    seeds: int = 3
    width: int = 32
    depth: int = 2
    window: int = 64

    def __post_init__(self):
        if self.seeds < 2 or self.looks < 1 or self.lengths < 2:
            raise ValueError("seeds >= 2, looks and lengths >= 2, please")


PRESETS = {
    "smoke": Config(
        looks=1, every=3, batch_size=2, probe_size=2, lengths=3, seeds=2, width=16,
        depth=1, window=16,
    ),
    "full": Config(),
}  # fmt: skip


def evened(updates: Any, params: Any = None) -> Any:
    """Each array has the length that it would have with entries of 1."""
    del params
    return jax.tree.map(
        lambda u: u * u.size**0.5 / jnp.maximum(jnp.linalg.norm(u), 1e-30), updates
    )


def directions(fraction: float) -> dict[str, optax.GradientTransformation]:
    """What the optimizers add to the parameters, up to a positive factor."""
    momentum, clip = optax.ema(0.9), coordinate_clip(fraction=fraction)
    adafactor = (
        optax.scale_by_factored_rms(min_dim_size_to_factor=8),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
    )
    parts: dict[str, tuple[Any, ...]] = {
        "SGD": (momentum,),
        "SGD, clipped": (clip, momentum),
        "normalised": (momentum, optax.stateless(evened)),
        "sign": (momentum, optax.scale_by_sign()),
        "Adafactor": adafactor,
        "Adam": (optax.scale_by_adam(),),
        "Adam, clipped": (optax.scale_by_adam(), clip),
    }
    return {k: optax.chain(*v, optax.scale(-1.0)) for k, v in parts.items()}


@functools.partial(jax.jit, static_argnames=("config", "task"))
def follow(
    config: Config, task: Task, path: Any, rate: Any, token: Any, probe: Any
) -> Any:
    """Trains by the optimizer of a place, and asks all of them where they would go.

    Returns, of each seed, look and direction: the sharpness, the losses along it, what
    the best step takes off; and the loss at each look.
    """
    optimizers = directions(config.fraction)
    lengths = jnp.geomspace(1e-2, 3.0, config.lengths)

    def loss(params: Any, token: jax.Array) -> jax.Array:
        return task.loss(params, jax.random.key(0), {"token": token})[0]

    def probed(params: Any) -> jax.Array:
        return loss(params, probe)

    def one(seed: jax.Array) -> Any:
        key = jax.random.key(seed)

        def step(carry: Any, t: jax.Array) -> Any:
            params, states, _ = carry
            chosen = jax.random.randint(
                jax.random.fold_in(key, t), (config.batch_size,), 0, len(token)
            )
            slope = jax.grad(loss)(params, token[chosen])
            pairs = {
                k: o.update(slope, states[k], params) for k, o in optimizers.items()
            }
            states = {k: pair[1] for k, pair in pairs.items()}
            updates = jax.tree.map(
                lambda *u: jnp.stack(u), *(pair[0] for pair in pairs.values())
            )
            moved = jax.tree.map(lambda p, u: p + rate * u[path], params, updates)
            return (moved, states, (params, updates)), None

        def look(carry: Any, ts: jax.Array) -> Any:
            carry, _ = lax.scan(step, carry, ts)
            # Updates belong to the parameters that their last gradient came from.
            params, updates = carry[2]

            def measure(update: Any) -> Any:
                losses, aux = loss_along(probed, params, update, lengths)
                sharpness = directional_sharpness(probed, params, update)
                return sharpness, losses, aux["reduction"]

            return carry, (*lax.map(measure, updates), probed(params))

        params = task.init(jax.random.fold_in(key, 10**6))
        states = {k: o.init(params) for k, o in optimizers.items()}
        zeros = jax.tree.map(lambda p: jnp.zeros((len(optimizers), *p.shape)), params)
        times = jnp.arange(config.looks * config.every).reshape(config.looks, -1)
        return lax.scan(look, (params, states, (params, zeros)), times)[1]

    return lax.map(one, jnp.arange(config.seeds))


def pictures(config: Config, run: Run, found: dict[str, Any]) -> list[Figure]:
    names = list(directions(config.fraction))
    figure, axes = panels(3, width=5.0)
    for shift, (path, (sharpness, _, reduction, _)) in zip(
        (-0.15, 0.15), found.items(), strict=True
    ):
        color = COLORS[PATHS.index(path)]
        for axis, values in ((axes[0], sharpness), (axes[1], reduction)):
            by_seed = np.median(values, axis=1)  # [seeds, directions]
            axis.errorbar(
                np.arange(len(names)) + shift, by_seed.mean(0),
                [stderr(v) for v in by_seed.T], color=color, marker="o", ls="none",
                capsize=3, label=f"iterates of {path}",
            )  # fmt: skip
    for axis, label in (
        (axes[0], "directional sharpness (nats)"),
        (axes[1], "loss that the best step takes off (nats)"),
    ):
        axis.set(yscale="log", ylabel=label, xlabel="update", xticks=range(len(names)))
        axis.set_xticklabels([n.replace(", ", ",\n") for n in names], fontsize=8)
        axis.legend(frameon=False)
    lengths = np.geomspace(1e-2, 3.0, config.lengths)
    _, losses, _, start = found["SGD"]
    for name, color in zip(names, COLORS, strict=True):
        change = losses[:, -1, names.index(name)] - start[:, -1, None]
        axes[2].errorbar(
            lengths, change.mean(0), [stderr(v) for v in change.T], color=color,
            label=name, capsize=2,
        )  # fmt: skip
    low = (losses[:, -1] - start[:, -1, None, None]).mean(0).min()
    axes[2].set(
        xscale="log", ylim=(1.5 * low, -2.0 * low), xlabel="length of the step",
        ylabel="change of the loss (nats), last iterate of SGD",
    )  # fmt: skip
    axes[2].legend(frameon=False, fontsize=8, loc="upper left")
    return [
        run.figure(
            "directional_sharpness", figure, title="Where optimizers want to go",
            caption="Left: curvature along the update of each optimizer. Middle: the "
            "loss that its best step takes off. Both are medians over iterates. Right: "
            "the landscape along the updates. Means and standard errors over "
            f"{config.seeds} seeds.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    task = byte_lm(width=config.width, depth=config.depth, window=config.window)
    token = jnp.asarray(task.source.arrays["token"])
    rows = np.linspace(0, len(token) - 1, config.probe_size).astype(int)
    found = {}
    names = list(directions(config.fraction))
    for path, rate in zip(PATHS, (config.sgd_rate, config.adam_rate), strict=True):
        place = names.index(path)
        measured = follow(config, task, place, rate, token, token[rows])
        found[path] = [np.asarray(x) for x in measured]
        run.say(f"{path}: probe loss {found[path][3].mean(0).round(2)}")

    def seeds_of(which: int, name: str) -> np.ndarray:
        """Medians over the iterates of both paths, one per seed."""
        both = np.concatenate([found[path][which] for path in PATHS], axis=1)
        return np.median(both[:, :, names.index(name)], axis=1)

    def over(which: int, first: str, second: str) -> tuple[float, float]:
        """A ratio of medians over all iterates and seeds, and its error over seeds."""
        both = np.concatenate([found[path][which] for path in PATHS], axis=1)
        medians = np.median(both, axis=(0, 1))
        by_seed = seeds_of(which, first) / seeds_of(which, second)
        a, b = (medians[names.index(name)] for name in (first, second))
        return float(a / b), stderr(by_seed)

    sharp, clipped, lower = (
        over(0, "SGD", "Adam"), over(0, "SGD", "SGD, clipped"),
        over(2, "SGD, clipped", "SGD"),
    )  # fmt: skip
    share = f"{100 * config.fraction:g}%"
    claims = [
        Claim(
            "median directional sharpness of SGD's updates over that of Adam's",
            sharp[0], ">= 5", sharp[0] >= 5, sharp[1],
        ),
        Claim(
            f"the same of SGD's over SGD's with the largest {share} of the gradient's "
            "coordinates clipped", clipped[0], ">= 3", clipped[0] >= 3, clipped[1],
        ),
        Claim(
            "median loss that the best step takes off: SGD's with clipping over SGD's",
            lower[0], "> 1", lower[0] > 1, lower[1],
        ),
    ]  # fmt: skip
    metrics, table = {}, []
    for name in names:
        row = [name]
        for path in PATHS:
            for which, label in ((0, "sharpness"), (2, "reduction")):
                values = found[path][which][:, :, names.index(name)]
                metrics[f"{path} path/{name}/{label}"] = float(np.median(values))
                row.append(f"{np.median(values):.3g}")
        table.append(tuple(row))
    for path in PATHS:
        metrics[f"{path} path/last loss"] = float(found[path][3][:, -1].mean())
        first = np.median(found[path][0][:, 0], axis=0)
        ratio = first[names.index("SGD")] / first[names.index("Adam")]
        metrics[f"{path} path/first look/SGD over Adam"] = float(ratio)
    run.table(
        f"Medians over {config.looks} iterates and {config.seeds} seeds",
        ("update", *(f"{p} path: {w}" for p in PATHS for w in ("sharpness", "gain"))),
        table,
    )
    return Report(claims, metrics, pictures(config, run, found))


if __name__ == "__main__":
    experiment(main, PRESETS)
