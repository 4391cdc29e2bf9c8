"""Tiny: a quadratic is minimised.

Claims: the loss falls [a lot].

    python -m experiments.toy.tiny full
"""

import dataclasses
import os
import signal
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.plots import curves, panels
from jaxzoo.training.record import Claim, Report
from jaxzoo.training.step import init_state, update_step


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 20  # of Adam
    learning_rate: float = 0.125
    method: Literal["plain", "noisy"] = "noisy"
    widths: tuple[int, ...] = (3, 4)
    bound: float = 1e3

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError("steps >= 1, please")


PRESETS = {"smoke": Config(steps=10), "full": Config()}
SIZE = int(os.environ.get("SIZE", "8"))


def loss(params, key, batch):
    value = jnp.sum((params - batch + jax.random.normal(key, (SIZE,))) ** 2)
    return value, {"loss": value}


def batches(t):
    if str(t) == os.environ.get("INTERRUPT_AT"):
        number = getattr(signal, os.environ.get("SIGNAL", "SIGINT"))
        os.kill(os.getpid(), number)
    return np.full(SIZE, t / 10, np.float32)


def main(config, run):
    optimizer = optax.adam(config.learning_rate)
    state = train(
        run,
        "fit",
        update_step(loss, optimizer),
        init_state(jax.random.key(0), jnp.ones(SIZE), optimizer),
        batches,
        num_steps=config.steps,
        log_every=4,
        show="loss",
    )
    history = run.history("fit")
    figure, (ax,) = panels(1)
    series = {"loss": (history["step"], history["loss"][:, None])}
    curves(ax, series, xlabel="step", ylabel="loss (1)")
    picture = run.figure("loss", figure, title="Loss", caption="It falls.")
    last = float(history["loss"][-1])
    claim = Claim("the last loss", last, f"< {config.bound}", last < config.bound)
    return Report([claim], {"w": float(state["params"][0]), "loss": last}, [picture])


if __name__ == "__main__":
    experiment(main, PRESETS)
