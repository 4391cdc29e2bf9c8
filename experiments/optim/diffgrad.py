"""diffGrad: Adam with a friction where the gradient hardly changes.

Claims: the friction xi lies in [0.5, 1), and a constant gradient gives exactly half of
Adam's step; on the paper's three one-dimensional non-convex functions the final value
is at most Adam's on at least two; on digits the accuracy is within a point of Adam's.

    python -m experiments.optim.diffgrad full    # 8x8 digits, 3 seeds: half a minute

Expected: friction in [0.5, 0.998]; two functions of three, 0 against 0.05 and 0.0001
against 0.85; accuracy 0.4 points above Adam's.

The functions are descended as in the authors' notebook: from -1, learning rate 0.1, b1
= 0.95, 300 steps. The first has its minimum at -0.3 beside a higher one at 0.2, the
second a slope of -40 before a wavy valley, the third a sharp and deep one at 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.optim._tasks import best, digits_mlp, fit
from jaxzoo.optim.diffgrad import diffgrad, scale_by_diffgrad
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr


@dataclasses.dataclass(frozen=True)
class Config:
    start: float = -1.0
    rate: float = 0.1
    b1: float = 0.95
    iterations: int = 300
    seeds: int = 3
    steps: int = 500
    batch_size: int = 64
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)

    def __post_init__(self):
        if self.seeds < 2:
            raise ValueError("at least two seeds, please")


PRESETS = {
    "smoke": Config(iterations=30, seeds=2, steps=5, batch_size=8, rates=(1e-2,)),
    "full": Config(),
}


def two_bowls(x: jax.Array) -> jax.Array:
    return jnp.where(x <= 0.0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


def slope_and_waves(x: jax.Array) -> jax.Array:
    waves = x**3 + x * jnp.sin(8.0 * x) + 0.85
    return jnp.where(x <= -0.9, -40.0 * x - 35.15, waves)


def three_wedges(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    inside = jnp.where(size <= 0.4, 0.875 * size, 0.75 - size)
    return jnp.where(size <= 0.5, inside, x**2)


FUNCTIONS = {"F1": two_bowls, "F2": slope_and_waves, "F3": three_wedges}


def ours(learning_rate: Any, *, b1: float = 0.9) -> Any:
    return diffgrad(learning_rate, b1=b1)


def adam(learning_rate: Any, *, b1: float = 0.9) -> Any:
    return optax.adam(learning_rate, b1=b1)


KINDS = {"diffGrad": ours, "Adam": adam}


def path(config: Config, function: Any, optimizer: Any) -> np.ndarray:
    """Where a descent is at each step, the start included."""

    def step(carry: Any, _: None) -> Any:
        x, state = carry
        updates, state = optimizer.update(jax.grad(function)(x), state, x)
        return (optax.apply_updates(x, updates), state), x

    x = jnp.float32(config.start)
    carry = (x, optimizer.init(x))
    return np.asarray(lax.scan(step, carry, length=config.iterations + 1)[1])


def friction_claims(config: Config) -> list[Claim]:
    """The bounds of xi on random gradients, and the step at a constant one."""
    direction, reference = scale_by_diffgrad(), optax.scale_by_adam()

    def frictions(grads: jax.Array) -> jax.Array:
        def step(carry: Any, g: jax.Array) -> Any:
            state, plain = carry
            updates, state = direction.update(g, state)
            steps, plain = reference.update(g, plain)
            return (state, plain), jnp.asarray(updates) / jnp.asarray(steps)

        carry = (direction.init(grads[0]), reference.init(grads[0]))
        return lax.scan(step, carry, grads)[1]

    noise = jax.random.normal(jax.random.key(0), (config.seeds, 50, 1000))
    xi = lax.map(frictions, noise)
    level = jnp.broadcast_to(noise[:, :1], noise.shape)
    still = float(jnp.max(jnp.abs(lax.map(frictions, level)[:, 1:] - 0.5)))
    low, high = float(xi.min()), float(xi.max())
    return [
        Claim("least friction on random gradients", low, ">= 0.5", low >= 0.5),
        Claim("largest friction on random gradients", high, "< 1", high < 1),
        Claim(
            "constant gradient: |step over Adam's - 1/2|, largest from the second step",
            still, "<= 0", still <= 0,
        ),
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    claims = friction_claims(config)
    metrics: dict[str, float] = {}
    paths, finals = {}, {}
    for name, function in FUNCTIONS.items():
        for kind, make in KINDS.items():
            x = path(config, function, make(config.rate, b1=config.b1))
            values = np.asarray(jax.vmap(function)(jnp.asarray(x)))
            paths[name, kind], finals[name, kind] = values, float(values[-1])
            metrics[f"{name}/{kind}/final_value"] = finals[name, kind]
            metrics[f"{name}/{kind}/final_x"] = float(x[-1])
            metrics[f"{name}/{kind}/largest_x"] = float(x.max())
    wins = sum(finals[n, "diffGrad"] <= finals[n, "Adam"] for n in FUNCTIONS)
    claims.append(
        Claim(
            "functions of three on which diffGrad's final value is at most Adam's",
            wins, ">= 2", wins >= 2,
        )
    )  # fmt: skip
    task, accuracy = digits_mlp(), {}
    for kind, make in KINDS.items():
        scores, _, _ = fit(
            run, f"digits_{kind}", task, make, config.rates, steps=config.steps,
            batch_size=config.batch_size, seeds=config.seeds, log_every=100,
        )  # fmt: skip
        at = best(scores)
        accuracy[kind] = scores["accuracy"][at]
        metrics[f"digits/{kind}/accuracy"] = float(scores["accuracy"][at].mean())
        metrics[f"digits/{kind}/loss"] = float(scores["loss"][at].mean())
        metrics[f"digits/{kind}/learning_rate"] = config.rates[at]
    gap = accuracy["diffGrad"] - accuracy["Adam"]
    mean = float(gap.mean())
    claims.append(
        Claim(
            "digits: test accuracy of diffGrad minus Adam's, each at its best learning "
            "rate, points",
            mean, ">= -1", mean >= -1, stderr(gap),
        )
    )  # fmt: skip
    run.table(
        f"Values after {config.iterations} steps from {config.start:g}",
        ("function", *KINDS),
        [(n, *(f"{finals[n, k]:.5f}" for k in KINDS)) for n in FUNCTIONS],
    )
    return Report(claims, metrics, pictures(config, run, paths))


def pictures(config: Config, run: Run, paths: dict[Any, np.ndarray]) -> list[Figure]:
    figure, axes = panels(3, width=4.2)
    steps = np.arange(config.iterations + 1)
    for ax, name in zip(axes, FUNCTIONS, strict=True):
        series = {kind: (steps, paths[name, kind][:, None]) for kind in KINDS}
        curves(ax, series, xlabel="step", ylabel=f"value of {name}")
    return [
        run.figure(
            "diffgrad", figure, title="Three non-convex functions",
            caption=f"From {config.start:g} with learning rate {config.rate:g} and b1 "
            f"= {config.b1:g}, as in the authors' notebook; no randomness.",
        )
    ]  # fmt: skip


if __name__ == "__main__":
    experiment(main, PRESETS)
