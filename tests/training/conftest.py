"""A run to write into, and a fit small enough to be interrupted at every call."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxzoo.training.loop import train
from jaxzoo.training.record import Run
from jaxzoo.training.step import init_state, update_step

NUM_STEPS, LOG_EVERY = 23, 5  # the last call is shorter than the others


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = NUM_STEPS
    rates: tuple[float, ...] = (0.1, 0.2)
    name: str = "tiny"


def quadratic(params, key, batch):
    """A noisy quadratic; its metrics show which step, batch and key were used."""
    noise = jax.random.normal(key, params["w"].shape)
    value = jnp.sum((params["w"] - batch["x"] + 0.1 * noise) ** 2)
    return value, {"loss": value, "t": batch["t"], "noise": noise[0]}


def batch_at(t: int):
    x = np.random.default_rng(t).normal(size=3).astype(np.float32)
    return {"x": x, "t": np.float32(t)}


class Fit:
    """The same fit again and again; `before(t)` is called where batch t is made."""

    optimizer = optax.adam(0.1)
    _undisturbed: ClassVar = {}

    def __init__(self, seeds: int | None = None):
        self.seeds = seeds
        self.step = update_step(quadratic, self.optimizer)
        if seeds is not None:
            self.step = jax.vmap(self.step)

    def state(self):
        def start(key):
            return init_state(key, {"w": jnp.ones(3)}, self.optimizer)

        if self.seeds is None:
            return start(jax.random.key(7))
        return jax.vmap(start)(jax.random.split(jax.random.key(7), self.seeds))

    def batches(self, t: int):
        batch = batch_at(t)
        if self.seeds is None:
            return batch
        # Each seed sees other data.
        return jax.tree.map(
            lambda a: np.stack([a + s for s in range(self.seeds or 0)]), batch
        )

    def __call__(self, run: Run, before=lambda t: None, name="fit", **knobs):
        def batches(t):
            before(t)
            return self.batches(t)

        knobs = {"num_steps": NUM_STEPS, "log_every": LOG_EVERY, **knobs}
        return train(run, name, self.step, self.state(), batches, **knobs)

    def undisturbed(self, open_run):
        """The last state and the bytes of metrics.jsonl of a run left alone."""
        if self.seeds not in self._undisturbed:
            state = self(run := open_run("undisturbed"))
            metrics = (run.folder / "metrics.jsonl").read_bytes()
            self._undisturbed[self.seeds] = state, metrics
        return self._undisturbed[self.seeds]


@pytest.fixture
def open_run(tmp_path):
    """`open_run()` opens the run in tmp_path/run, again and again."""

    def open_one(folder: Path | str = "run", *, fresh=False, preset="full", **settings):
        return Run(
            tmp_path / folder,
            topic="toy",
            slug="tiny",
            title="Tiny",
            preset=preset,
            config=Config(**settings),
            fresh=fresh,
        )

    return open_one


@pytest.fixture(params=[None, 3], ids=["one", "vmap"])
def fit(request):
    return Fit(request.param)


@pytest.fixture
def single():
    return Fit()
