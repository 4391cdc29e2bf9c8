"""Batch-coupled losses against the same in PyTorch, on the CPU, and their memory.

Claims: forward and backward of `siglip_loss` (1024 x 512) take at most 0.85 of
open_clip's time, of `info_nce` as NT-Xent (1024 x 256) at most 0.40 of lightly's, of
`vicreg_loss` (256 x 2048) at most 0.045 of lightly's; the ring of SigLIP needs at most
5 feature shards of temporary memory on each of 8 devices, linear in the batch.

    pip install -e ".[bench]"
    python -m experiments.bench.losses full    # a minute on 2 quiet cores

Measured: VICReg 0.03, NT-Xent 0.32 to 0.37, CLIP's softmax 0.45 to 0.60 and SigLIP 0.85
to 1.00 of PyTorch's time in ten runs; the last misses its goal. With AVX-512 the three
products of SigLIP take 16.6 of its 19 ms here and as long in PyTorch, so that 0.85 is
about the floor.

All contestants run in one process on the same inputs, in turn; values are compared
first. A sample counts where other programs used less than `noise` of a core meanwhile;
with fewer than 5 of them a ratio is told, and is no claim. What is not installed is
left out.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import _timing as timing
from experiments.ssl import _ring
from jaxzoo.nn.contrastive import info_nce
from jaxzoo.ssl.siglip import siglip_loss
from jaxzoo.ssl.vicreg import vicreg_loss
from jaxzoo.training.command import experiment
from jaxzoo.training.record import Claim, Report, Run

SHARDS = 5.0  # the bound on the ring's memory


@dataclasses.dataclass(frozen=True)
class Config:
    samples: int = 9
    seconds: float = 0.2  # of one sample
    patience: float = 60.0  # seconds in which a workload waits for quiet
    noise: float = 0.12  # of a core, used by others
    compiled: bool = True  # also times torch.compile
    record: bool = True  # also writes experiments/results/bench/losses.json


PRESETS = {
    "smoke": Config(
        samples=2, seconds=0.02, patience=0.5, compiled=False, record=False
    ),
    "full": Config(),
}


class Workload(NamedTuple):
    """One loss in both libraries.

    Attributes:
        name: of the row in the table.
        shape: of each of the two inputs.
        ours: `(x, y, s, b) -> scalar`.
        peer: makes the module of the peer, and says how it is called.
        goal: of our time over the peer's.
    """

    name: str
    shape: tuple[int, int]
    ours: Callable[..., jax.Array]
    peer: Callable[[], Callable[..., Any]]
    goal: float


def open_clip_siglip() -> Callable[..., Any]:
    from open_clip.loss import SigLipLoss  # pyright: ignore

    loss = SigLipLoss()
    return lambda x, y, s, b: loss(x, y, s.exp(), b)


def lightly_nt_xent() -> Callable[..., Any]:
    from lightly.loss import NTXentLoss  # pyright: ignore

    loss = NTXentLoss(temperature=0.5)
    return lambda x, y, s, b: loss(x, y)


def open_clip_softmax() -> Callable[..., Any]:
    from open_clip.loss import ClipLoss  # pyright: ignore

    loss = ClipLoss()
    return lambda x, y, s, b: loss(x, y, s.exp())


def lightly_vicreg() -> Callable[..., Any]:
    from lightly.loss import VICRegLoss  # pyright: ignore

    loss = VICRegLoss()
    return lambda x, y, s, b: loss(x, y)


def normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True))


def siglip(x, y, s, b) -> jax.Array:
    return siglip_loss(x, y, log_scale=s, bias=b)[0]


def nt_xent(x, y, s, b) -> jax.Array:
    # lightly normalises inside, so that ours does it under the clock too.
    x, y = normalised(x), normalised(y)
    return info_nce(x, y, log_scale=float(np.log(2)), negatives="both_views")[0]


def softmax(x, y, s, b) -> jax.Array:
    return info_nce(x, y, log_scale=s)[0]


def vicreg(x, y, s, b) -> jax.Array:
    return vicreg_loss(x, y)[0]


def workloads() -> Iterator[Workload]:
    yield Workload("SigLIP", (1024, 512), siglip, open_clip_siglip, 0.85)
    yield Workload("NT-Xent", (1024, 256), nt_xent, lightly_nt_xent, 0.40)
    yield Workload("CLIP softmax", (1024, 256), softmax, open_clip_softmax, 1.0)
    yield Workload("VICReg", (256, 2048), vicreg, lightly_vicreg, 0.045)


def inputs(shape: tuple[int, int]) -> list[np.ndarray]:
    """Two batches of unit rows, log of a scale of 10, a bias of -10."""
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return [*x, np.float32(np.log(10.0)), np.float32(-10.0)]  # pyright: ignore


def contestants(work: Workload, compiled: bool) -> dict[str, Callable[[], float]]:
    """Forward and backward of each, as calls that return the value."""
    arrays = [jnp.asarray(x) for x in inputs(work.shape)]
    step = jax.jit(jax.value_and_grad(work.ours, (0, 1, 2, 3)))

    def ours() -> float:
        return float(jax.block_until_ready(step(*arrays))[0])

    calls: dict[str, Callable[[], float]] = {"jaxzoo": ours}
    try:
        import torch  # pyright: ignore

        eager = work.peer()
    except ImportError:
        return calls
    torch.set_num_threads(os.cpu_count() or 1)
    tensors = [torch.tensor(x, requires_grad=True) for x in inputs(work.shape)]

    def run(loss: Callable[..., Any]) -> float:
        for tensor in tensors:
            tensor.grad = None
        value = loss(*tensors)
        value.backward()
        return float(value.detach())

    calls["torch"] = functools.partial(run, eager)
    if compiled:
        calls["torch.compile"] = functools.partial(run, torch.compile(eager))
    return calls


def measure(work: Workload, config: Config, run: Run) -> dict[str, Any]:
    """Median and least milliseconds of every contestant, and how many were quiet."""
    calls = contestants(work, config.compiled)
    values = {name: call() for name, call in calls.items()}
    for name, value in values.items():
        if not np.isclose(value, values["jaxzoo"], rtol=1e-4):
            raise ArithmeticError(
                f"{work.name}: {name} gives {value}, jaxzoo {values['jaxzoo']}."
            )
    out = timing.measure(
        calls, samples=config.samples, seconds=config.seconds,
        patience=config.patience, noise=config.noise,
    )  # fmt: skip
    run.say(f"{work.name}: {out['quiet']} quiet samples of {out.pop('taken')}")
    return out


def ratio_claim(work: Workload, measured: dict[str, Any]) -> Claim | None:
    """Our median over the peer's; None where nothing can be said."""
    if "torch" not in measured or measured["quiet"] < timing.QUIET:
        return None
    ratio = measured["jaxzoo"]["median"] / measured["torch"]["median"]
    rows, width = work.shape
    text = f"{work.name} {rows} x {width}: our time over PyTorch's, forward + backward"
    return Claim(text, ratio, f"<= {work.goal:g}", ratio <= work.goal)


def memory_claims(memory: dict[str, Any]) -> list[Claim]:
    shards = [memory["shards"][b] for b in sorted(memory["shards"], key=int)]
    spread = max(shards) / min(shards)
    return [
        Claim(
            "SigLIP ring on 8 devices, width 512: temporary memory in feature shards",
            max(shards), f"<= {SHARDS:g}", max(shards) <= SHARDS,
        ),
        Claim(
            "its shards at the largest batch over those at the smallest, or inverse",
            spread, "<= 1.1", spread <= 1.1,
        ),
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    """Times every workload; the memory of the ring needs no quiet machine."""
    metrics: dict[str, float] = {"load_before": os.getloadavg()[0]}
    claims, rows = [], []
    for work in workloads():
        measured = measure(work, config, run)
        if claim := ratio_claim(work, measured):
            claims.append(claim)
        for name, times in measured.items():
            if name == "quiet":
                metrics[f"{work.name}/quiet"] = times
                continue
            metrics |= {f"{work.name}/{name}/{k}_ms": t for k, t in times.items()}
            ratio = measured["jaxzoo"]["median"] / times["median"]
            cells = (f"{times['median']:.2f}", f"{times['min']:.2f}", f"{ratio:.2f}")
            rows.append((f"{work.name}, {name}", *cells, str(measured["quiet"])))
    head = ("", "median (ms)", "min (ms)", "ours / it", "quiet")
    run.table("Forward + backward on the CPU", head, rows)
    memory = _ring.measure("shards")
    claims += memory_claims(memory)
    metrics |= {f"shards/batch_{b}": s for b, s in memory["shards"].items()}
    metrics |= {f"gathered/batch_{b}": s for b, s in memory["gathered_shards"].items()}
    if config.record:
        path = timing.RESULTS / "losses.json"
        timing.write_record(path, dataclasses.asdict(config), claims, metrics)
    return Report(claims, metrics, [])


if __name__ == "__main__":
    experiment(main, PRESETS)
