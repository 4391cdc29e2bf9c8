"""No host sync per step: what the training loop costs beside its compiled calls.

Claims: where a step takes 1 ms and is logged every 50 steps, `train` takes less than
5 % longer than the same compiled calls made back to back on a batch that is ready;
without a mesh and on a mesh of one device, with batches of 64 images and tiny ones.

    python -m experiments.bench.loop full    # 3 minutes

The step is a chain of small operations that XLA runs in one thread (`threads` in the
result), so that on 2 cores the host has one of its own, as it has beside a GPU or TPU.
`host us/step` is the CPU time that the loop adds, whether it overlaps or not.
"""

import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jaxzoo.data.fashion_mnist import fashion_mnist
from jaxzoo.data.source import Source, batch
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import make_mesh
from jaxzoo.training.options import Options
from jaxzoo.training.program import Batch, Loader, State, build
from jaxzoo.training.record import Claim, Report, Run, environment

RESULT = Path(__file__).parents[1] / "results" / "bench" / "loop.json"
CLAIMED, BOUND = 50, 5.0  # steps per log line, percent
WARM = 2  # calls before the clock starts: one compiles, one fills the queue


@dataclasses.dataclass(frozen=True)
class Config:
    milliseconds: float = 1.0  # of one step
    log_every: tuple[int, ...] = (10, 50, 200)
    steps: int = 600  # under the clock, in each repeat
    repeats: int = 7
    record: bool = True  # also writes experiments/results/bench/loop.json

    def __post_init__(self):
        if CLAIMED not in self.log_every:
            raise ValueError(f"log_every={self.log_every} lacks {CLAIMED}, the claim's")
        if min(self.steps, self.repeats, *self.log_every) < 1:
            raise ValueError("steps, repeats and log_every have to be 1 or more")


PRESETS = {
    "smoke": Config(log_every=(CLAIMED,), steps=200, repeats=3, record=False),
    "full": Config(),
}


class Case(NamedTuple):
    """One way to train: on which mesh, with which batches, how often it logs."""

    mesh: str
    batches: str
    log_every: int


class Seconds(NamedTuple):
    """What one step takes: by the clock, and of CPU time over all threads."""

    wall: float
    cpu: float


@functools.cache
def images() -> Source:
    """Images of 784 float32, in memory."""
    pixels = fashion_mnist().split("train").arrays["image"]
    return Source({"x": pixels.reshape(len(pixels), -1) / np.float32(255)})


def image_batch(t: int) -> Batch:
    """64 x 784 float32: 200 kB that are gathered, stacked and sent."""
    return batch(images(), 0, t, batch_size=64)


def tiny_batch(t: int) -> Batch:
    """8 x 1 float32."""
    return {"x": np.full((8, 1), t, np.float32)}


def mesh_of(case: Case) -> Mesh | None:
    """None, or a mesh of the first device."""
    return None if case.mesh == "none" else make_mesh("data=1", jax.devices()[:1])


MESHES = ("none", "one device")
BATCHES: dict[str, Callable[[int], Batch]] = {"images": image_batch, "tiny": tiny_batch}


def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    """A chain of `turns` small operations, each of which waits for the one before."""
    drift = 1 + jnp.mean(batch["x"])

    def turn(_: Any, w: jax.Array) -> jax.Array:
        # As fast for any number: a sine takes longer for a large one.
        return 0.5 * w + drift

    w = lax.fori_loop(0, state["turns"], turn, state["w"])
    return {**state, "w": w, "step": state["step"] + 1}, {"loss": jnp.mean(w)}


def start(turns: int) -> State:
    """The state at step 0."""
    zero = jnp.zeros((), jnp.int32)
    return {"w": jnp.ones(256), "turns": jnp.int32(turns), "step": zero}


def back_to_back(case: Case) -> Callable[[int, int], Seconds]:
    """The compiled calls of a case without a loop around them.

    Returns:
        `run(turns, calls)`: that many calls on a batch that is ready, and one wait.
    """
    mesh, size = mesh_of(case), case.log_every

    def put(value: Any, spec: P) -> Any:
        return jax.device_put(value, mesh and NamedSharding(mesh, spec))

    loader = Loader(mesh, BATCHES[case.batches], 0, None)
    call, _ = build(step, start(1), loader, specs=None, options=Options())
    ready = jax.device_put(loader.stacked(0, size))
    wishes = put(np.zeros((1, 2), np.int32), P(mesh.axis_names if mesh else None))

    def run(turns: int, calls: int) -> Seconds:
        state, bad = put(start(turns), P()), put(np.int32(-1), P())
        state, told = call(state, bad, ready, np.int32(0), wishes)
        jax.block_until_ready(told)
        began = time.perf_counter(), time.process_time()
        for index in range(calls):
            first = np.int32((1 + index) * size)
            state, told = call(state, told.bad, ready, first, wishes)
        jax.block_until_ready(told)
        return _since(*began, steps=calls * size)

    return run


def in_the_loop(case: Case, turns: int, calls: int) -> Seconds:
    """`train` on the same step, from when its queue is full.

    The batch of a call is asked for when the call before the last is over and logged:
    between two of these moments lie whole calls.
    """
    stamps = []

    def batches(t: int) -> Batch:
        if t % case.log_every == 0:
            stamps.append((time.perf_counter(), time.process_time()))
        return BATCHES[case.batches](t)

    total = WARM + calls + 1
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        run = Run(
            Path(folder), topic="bench", slug="loop", title="The loop",
            preset="full", config=Config(), mesh=mesh_of(case),
        )  # fmt: skip
        # Drawn as on a terminal, which costs more than plain lines.
        run.console = Console(file=nowhere, force_terminal=True)
        train(
            run, "fit", step, start(turns), batches, num_steps=total * case.log_every,
            log_every=case.log_every, save_every=1e9, show="loss",
        )  # fmt: skip
    end, begin = stamps[WARM + calls], stamps[WARM]
    steps = calls * case.log_every
    return Seconds((end[0] - begin[0]) / steps, (end[1] - begin[1]) / steps)


def _since(wall: float, cpu: float, steps: int) -> Seconds:
    now = time.perf_counter(), time.process_time()
    return Seconds((now[0] - wall) / steps, (now[1] - cpu) / steps)


def calibrate(milliseconds: float) -> int:
    """How many turns of the chain take that long."""
    run, turns = back_to_back(Case("none", "tiny", CLAIMED)), 1000
    for _ in range(3):  # a clock that speeds up under load
        wall = min(run(turns, 4).wall for _ in range(3))
        turns = max(1, round(turns * milliseconds / 1e3 / wall))
    return turns


Pairs = list[tuple[Seconds, Seconds]]  # of the calls alone, and of the loop


def measure(cases: list[Case], config: Config, run: Run) -> dict[Case, Pairs]:
    """Repeats of all cases in turn: what else runs here now and then meets them all."""
    turns = calibrate(config.milliseconds)
    alone = {case: back_to_back(case) for case in cases}
    found: dict[Case, Pairs] = {case: [] for case in cases}
    with run.progress("repeats", 0, config.repeats, None) as progress:
        for index in range(config.repeats):
            for case in cases:
                calls = -(-config.steps // case.log_every)
                bare = alone[case](turns, calls)
                found[case].append((bare, in_the_loop(case, turns, calls)))
            progress.update(index + 1, {})
    return found


def summary(pairs: Pairs) -> dict[str, float]:
    """Medians, with the standard error of the overhead's mean."""
    overhead = [100 * (loop.wall / bare.wall - 1) for bare, loop in pairs]
    return {
        "overhead_percent": float(np.median(overhead)),
        "stderr": float(np.std(overhead) / max(1, len(overhead) - 1) ** 0.5),
        "step_ms": 1e3 * float(np.median([bare.wall for bare, _ in pairs])),
        "host_us_per_step": 1e6 * float(np.median([b.cpu - a.cpu for a, b in pairs])),
        "threads": float(np.median([bare.cpu / bare.wall for bare, _ in pairs])),
    }


def main(config: Config, run: Run) -> Report:
    """Measures every case, prints a table and claims what holds every 50 steps."""
    cases = [Case(m, b, n) for m in MESHES for b in BATCHES for n in config.log_every]
    before = os.getloadavg()[0]
    pairs = measure(cases, config, run)
    found = {case: summary(pairs[case]) for case in cases}
    run.table(
        "train against its compiled calls alone",
        ("mesh, batches", "log every", "step (ms)", "overhead (%)", "host us/step"),
        [_row(case, measured) for case, measured in found.items()],
    )
    claims = [_claim(c, m) for c, m in found.items() if c.log_every == CLAIMED]
    metrics = {
        f"{case.mesh}/{case.batches}/log{case.log_every}/{name}": value
        for case, measured in found.items()
        for name, value in measured.items()
    }
    metrics["load_before"] = before  # processes that wanted a core, over a minute
    if config.record:
        _write(config, claims, metrics)
    return Report(claims, metrics)


def _row(case: Case, measured: dict[str, float]) -> tuple[str, ...]:
    overhead = f"{measured['overhead_percent']:.1f} ± {measured['stderr']:.1f}"
    numbers = f"{measured['step_ms']:.2f}", overhead
    head = f"{case.mesh}, {case.batches}", str(case.log_every)
    return (*head, *numbers, f"{measured['host_us_per_step']:.0f}")


def _claim(case: Case, measured: dict[str, float]) -> Claim:
    overhead = measured["overhead_percent"]
    return Claim(
        f"overhead in percent, mesh {case.mesh}, {case.batches}, logged every "
        f"{CLAIMED} steps of {measured['step_ms']:.2f} ms",
        overhead, f"< {BOUND:g}", overhead < BOUND, measured["stderr"],
    )  # fmt: skip


def _write(config: Config, claims: list[Claim], metrics: dict[str, float]) -> None:
    record = {
        "slug": "loop",
        "topic": "bench",
        "config": dataclasses.asdict(config),
        "claims": [claim._asdict() for claim in claims],
        "metrics": metrics,
        **environment(),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    experiment(main, PRESETS)
