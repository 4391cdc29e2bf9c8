"""How the benches time, on a CPU with neighbours and on an accelerator of their own.

On the CPU contestants take turns in one process, and a sample counts where other
programs used less than `noise` of a core meanwhile. An accelerator works off a queue:
calls are sent without waiting for each other and the clock stops when the last is done,
so that what a call costs the host is hidden where the device takes longer.
"""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxzoo.training.record import Claim, environment

RESULTS = Path(__file__).parents[1] / "results" / "bench"
QUIET = 5  # samples that a claim needs

Call = Callable[[], Any]
Clock = Callable[[Call], float]

# Traced one at a time: tracing is Python, and some kernels read tables while they are
# traced. Compiling is not.
_TRACING = Lock()


def sample(call: Call, turns: int) -> tuple[float, float]:
    """Seconds per call, and the share of a core that others used meanwhile."""
    time.sleep(0.05)  # torch's threads spin a while after their work
    busy, own, begin = _busy(), time.process_time(), time.perf_counter()
    for _ in range(turns):
        call()
    wall = time.perf_counter() - begin
    others = _busy() - busy - (time.process_time() - own)
    return wall / turns, others / wall


def measure(
    calls: Mapping[str, Call],
    *,
    samples: int,
    seconds: float,
    patience: float,
    noise: float,
) -> dict[str, Any]:
    """Times contestants on the CPU in turn.

    Args:
        calls: the contestants, each of which waits for its own result.
        samples: quiet ones that are wanted of each.
        seconds: of one sample.
        patience: seconds to wait for quiet ones.
        noise: of a core used by others, above which a sample is not quiet.

    Returns:
        For each contestant `{"median", "min"}` in milliseconds, over the quiet samples
        where there are `QUIET` of each, else over all; under "quiet" how many there
        are of each, under "taken" how many were taken.
    """
    turns = {}
    for name, call in calls.items():
        call()
        turns[name] = max(1, int(seconds / sample(call, 3)[0]))
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    quiet = dict.fromkeys(calls, 0)
    begin = time.monotonic()
    while min(quiet.values()) < samples:
        for name, call in calls.items():
            taken[name].append(sample(call, turns[name]))
            quiet[name] += taken[name][-1][1] < noise
        if time.monotonic() - begin > patience:
            break
    count = len(next(iter(taken.values())))
    out: dict[str, Any] = {"quiet": min(quiet.values()), "taken": count}
    for name, pairs in taken.items():
        calm = [s for s, others in pairs if others < noise]
        times = calm if out["quiet"] >= QUIET else [s for s, _ in pairs]
        out[name] = {"median": 1e3 * np.median(times), "min": 1e3 * np.min(times)}
    return out


def queued(
    call: Call,
    *,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    seconds: float = 0.05,
    samples: int = 5,
    most: int = 200,
) -> float:
    """Seconds per call on an accelerator: the median over samples of many calls.

    Args:
        call: sends work and does not wait for it.
        wait: waits for the value of the last call, and so for all before it.
        seconds: of one sample.
        samples: how many.
        most: calls of one sample, at most.
    """

    def turn(count: int) -> float:
        begin, value = time.perf_counter(), None
        for _ in range(count):
            value = call()  # lets go of the value before, whose memory is used again
        wait(value)
        return (time.perf_counter() - begin) / count

    turn(1)
    once = turn(1)
    if once > 1:
        return once
    count = min(most, max(1, int(seconds / max(once, 1e-9))))
    return float(np.median([turn(count) for _ in range(samples)]))


class LeftOut(Exception):
    """What cannot run; the text is the reason."""


class Job(NamedTuple):
    """A function and the arrays that it is to be compiled for."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


def compiled(
    jobs: Mapping[Any, Job], *, memory: float = float("inf"), workers: int | None = None
) -> tuple[dict[Any, Callable[..., Any]], dict[Any, str]]:
    """Compiles many functions at once.

    Args:
        jobs: by any name.
        memory: bytes that temporaries and results may take.
        workers: threads; None: one for each core.

    Returns:
        `(programs, reasons)`: each job is in one of them.
    """

    def build(job: Job) -> Callable[..., Any] | str:
        try:
            with _TRACING:
                lowered = jax.jit(job.function).lower(*job.args)
            program = lowered.compile()
        except Exception as error:  # whatever it is, the other shapes are to be timed
            return reason(error)
        analysis: Any = program.memory_analysis()
        needs = 0.0
        if analysis is not None:
            needs = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        if needs > memory:
            return f"needs {needs / 2**30:.1f} GiB beside its arguments"
        return program

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        built = dict(zip(jobs, pool.map(build, jobs.values()), strict=True))
    programs = {name: x for name, x in built.items() if not isinstance(x, str)}
    return programs, {name: x for name, x in built.items() if isinstance(x, str)}


def reason(error: Exception) -> str:
    """An error in one line of at most 200 characters."""
    if isinstance(error, LeftOut):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def far(actual: Any, expected: Any) -> float:
    """The largest difference relative to the largest value; infinite for NaN."""
    error = float(_far(actual, expected))
    return error if np.isfinite(error) else float("inf")


def copy_rate(clock: Clock, size: int = 2**30) -> float:
    """Bytes per second, read and written, of a pass over `size` bytes.

    Random, as all inputs here: a GPU takes less power for zeros, and is faster.
    """
    x = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    step = jax.jit(lambda x: x + jnp.uint32(1))
    return 2 * size / clock(lambda: step(x))


def matmul_rate(clock: Clock, size: int = 8192) -> float:
    """FLOP/s of the product of two random square matrices in bfloat16."""
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    step = jax.jit(jnp.matmul)
    return 2 * size**3 / clock(lambda: step(a, b))


def dispatch(clock: Clock) -> float:
    """Seconds that the smallest call takes: no call is told faster than this."""
    step, x = jax.jit(lambda x: x + 1), jnp.zeros(())
    return clock(lambda: step(x))


def write_record(
    path: Path, config: Any, claims: Sequence[Claim], metrics: Mapping, **more: Any
) -> None:
    """Writes the record of a bench, with versions, device and commit.

    Args:
        path: `experiments/results/bench/NAME.json`.
        config: the settings, as a dict.
        claims: what was claimed.
        metrics: numbers by name.
        more: what else the record holds.
    """
    record = {
        "slug": path.stem,
        "topic": "bench",
        "config": config,
        "claims": [claim._asdict() for claim in claims],
        "metrics": dict(metrics),
        **more,
        **environment(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_plain(record), indent=2) + "\n")


@jax.jit
def _far(actual: Any, expected: Any) -> jax.Array:
    actual, expected = (jnp.asarray(x, jnp.float32) for x in (actual, expected))
    largest = jnp.maximum(jnp.max(jnp.abs(expected)), 1e-30)
    return jnp.max(jnp.abs(actual - expected)) / largest


def _busy() -> float:
    """Seconds that all cores have worked so far, for anybody."""
    words = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, soft = map(int, words[:7])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def _plain(value: Any) -> Any:
    """`value` in types that JSON has."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
