"""TVLARS against LARS and LAMB with warm-up, at a batch of most of the digits.

Claims: phi falls monotonically between its bounds; at batch 1024 and equal steps the
mean test accuracy of TVLARS over the learning rates that were tried is at most 0.5
points below that of LARS with warm-up and polynomial decay, and higher at the largest
of them.

    python -m experiments.optim.tvlars full    # 5 seeds: 1.5 minutes

Expected: the two are equal within the errors, 0.2 +- 0.2 points on average and -0.2 +-
0.5 at the largest learning rate, so that the exit status is 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from experiments.optim._tasks import digits_mlp, fit
from jaxzoo.optim.tvlars import time_varying_rate, tvlars
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr


@dataclasses.dataclass(frozen=True)
class Config:
    learning_rates: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
    steps: int = 120
    batch_size: int = 1024
    seeds: int = 5
    hidden: int = 64
    warmup: float = 0.2  # of the steps
    power: float = 2.0  # of the polynomial decay after it
    delay: float = 0.4  # of the steps
    lam: float = 12.0  # over the steps
    alpha: float = 1.0
    gamma_min: float = 4e-3
    weight_decay: float = 5e-4
    lamb_factor: float = 2e-3  # LAMB's learning rates are so many times those of LARS

    def __post_init__(self):
        if self.seeds < 2 or self.steps < 5 or not self.learning_rates:
            raise ValueError("seeds >= 2, steps >= 5, and learning_rates, please")


PRESETS = {
    "smoke": Config(
        learning_rates=(4.0, 32.0), steps=10, batch_size=64, seeds=2, hidden=16
    ),
    "full": Config(),
}  # fmt: skip


def rate_knobs(config: Config) -> dict[str, Any]:
    """The time-varying rate in steps."""
    return {
        "lam": config.lam / config.steps, "delay": config.delay * config.steps,
        "alpha": config.alpha, "gamma_min": config.gamma_min,
    }  # fmt: skip


def shapes(config: Config) -> dict[str, Callable[[Any], Any]]:
    """Schedules with 1 as their largest value."""
    warm = round(config.warmup * config.steps)
    decay = optax.polynomial_schedule(1.0, 0.0, config.power, config.steps - warm)
    parts = [optax.linear_schedule(0.0, 1.0, warm), decay]
    whole = optax.polynomial_schedule(1.0, 0.0, config.power, config.steps)
    return {"warm-up": optax.join_schedules(parts, [warm]), "decay": whole}


def optimizers(config: Config) -> dict[str, Callable[[Any], Any]]:
    """`learning_rate -> optimizer`; LARS and LAMB are Optax's."""
    with_warmup, decay = shapes(config)["warm-up"], shapes(config)["decay"]
    wd = config.weight_decay

    def ours(learning_rate: Any) -> Any:
        return tvlars(learning_rate, **rate_knobs(config), weight_decay=wd)

    def lars(shape: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda learning_rate: optax.lars(lambda t: learning_rate * shape(t), wd)

    def lamb(learning_rate: Any) -> Any:
        rate = config.lamb_factor * learning_rate
        return optax.lamb(lambda t: rate * with_warmup(t), weight_decay=wd)

    return {
        "TVLARS": ours, "LARS, warm-up": lars(with_warmup),
        "LARS, no warm-up": lars(decay), "LAMB, warm-up": lamb,
    }  # fmt: skip


def rate_claim(config: Config) -> Claim:
    """Every step of many settings: inside of the bounds, and no rise."""
    t = jnp.arange(1000)
    worst = -np.inf
    for lam in (1e-3, 1e-2, 0.1, 1.0):
        for delay in (0.0, 100.0, 500.0):
            for alpha in (0.1, 1.0, 2.0):
                knobs: dict[str, Any] = {
                    "lam": lam, "delay": delay, "alpha": alpha,
                    "gamma_min": config.gamma_min,
                }  # fmt: skip
                phi = np.asarray(time_varying_rate(t, **knobs), np.float64)
                top = 1 / (alpha + np.exp(-lam * delay)) + config.gamma_min
                broken = (
                    np.max(np.diff(phi)), np.max(phi) - top,
                    config.gamma_min - np.min(phi),
                )  # fmt: skip
                worst = max(worst, *broken)
    return Claim(
        "phi: its largest rise from step to step, or distance outside of [gamma_min, "
        "1 / (alpha + exp(-lam delay)) + gamma_min], over 36 settings",
        float(worst), "<= 1e-6", worst <= 1e-6,
    )  # fmt: skip


def pictures(config: Config, run: Run, accuracy: dict[str, Any]) -> list[Figure]:
    figure, axes = panels(3, width=4.6)
    t = np.arange(config.steps)
    phi = np.asarray(time_varying_rate(jnp.asarray(t), **rate_knobs(config)))
    axes[0].plot(t, phi, color=COLORS[0], label="TVLARS")
    for (name, shape), color in zip(shapes(config).items(), COLORS[1:], strict=False):
        label = "LARS, warm-up" if name == "warm-up" else "LARS, no warm-up"
        axes[0].plot(t, np.asarray(shape(jnp.asarray(t))), color=color, label=label)
    axes[0].set(xlabel="step", ylabel="factor of the learning rate")
    axes[0].legend(frameon=False)
    rates = np.asarray(config.learning_rates)
    for (name, values), color in zip(accuracy.items(), COLORS, strict=False):
        axes[1].errorbar(
            rates, values.mean(1), [stderr(v) for v in values], color=color,
            marker="o", ms=4, capsize=3, label=name,
        )  # fmt: skip
    axes[1].set(
        xscale="log", xlabel=f"learning rate (LAMB: times {config.lamb_factor:g})",
        ylabel="test accuracy (%)",
    )  # fmt: skip
    axes[1].legend(frameon=False)
    count = len(rates)
    largest = {}
    for name in accuracy:
        history = run.history(name)
        losses = np.asarray(history["loss"]).reshape(-1, count, config.seeds)
        largest[name] = (history["step"], np.maximum(losses[:, -1], 1e-6))
    curves(
        axes[2], largest, xlabel="step",
        ylabel=f"training loss at learning rate {rates[-1]:g} (nats)",
    )  # fmt: skip
    axes[2].set_yscale("log")
    return [
        run.figure(
            "tvlars", figure, title="A rate that starts high, without warm-up",
            caption=f"Left: the schedules. Middle: digits, batch {config.batch_size}, "
            f"{config.steps} steps. Right: the largest learning rate. Means and "
            f"standard errors over {config.seeds} seeds.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    task = digits_mlp(hidden=(config.hidden,))
    accuracy: dict[str, np.ndarray] = {}
    for name, make in optimizers(config).items():
        scores, _, _ = fit(
            run, name, task, make, config.learning_rates, steps=config.steps,
            batch_size=config.batch_size, seeds=config.seeds,
            log_every=max(1, config.steps // 30),
        )  # fmt: skip
        accuracy[name] = scores["accuracy"]
    ours, theirs = accuracy["TVLARS"], accuracy["LARS, warm-up"]
    mean = ours.mean(0) - theirs.mean(0)
    last = ours[-1] - theirs[-1]
    rates = config.learning_rates
    claims = [
        rate_claim(config),
        Claim(
            f"digits, batch {config.batch_size}: test accuracy of TVLARS minus LARS "
            f"with warm-up, mean over learning rates {rates[0]:g} to {rates[-1]:g} "
            "(points)",
            float(mean.mean()), ">= -0.5", float(mean.mean()) >= -0.5, stderr(mean),
        ),
        Claim(
            f"the same at the largest learning rate, {rates[-1]:g} (points)",
            float(last.mean()), "> 0", float(last.mean()) > 0, stderr(last),
        ),
    ]  # fmt: skip
    run.table(
        f"Test accuracy (%), {config.steps} steps, {config.seeds} seeds",
        ("optimizer", *(f"{r:g}" for r in rates)),
        [
            (n, *(f"{v.mean():.1f} ± {stderr(v):.1f}" for v in values))
            for n, values in accuracy.items()
        ],
    )
    metrics = {}
    for name, values in accuracy.items():
        metrics[f"{name}/mean accuracy"] = float(values.mean())
        metrics[f"{name}/best accuracy"] = float(values.mean(1).max())
        metrics[f"{name}/accuracy at the largest rate"] = float(values[-1].mean())
    return Report(claims, metrics, pictures(config, run, accuracy))


if __name__ == "__main__":
    experiment(main, PRESETS)
