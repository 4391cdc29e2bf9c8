"""Attention against torch's and jax.nn's: on the CPU, and with --device on a GPU.

Claims on the CPU (float32, causal, 2048 tokens, 8 heads of 64): forward and gradient
take at most 1.2 of the time of torch's scaled_dot_product_attention, and at most 64 MiB
of temporary memory, which grows by at most 2.2 per doubling of the length up to 8192.

    pip install -e ".[bench]"
    python -m experiments.bench.attention full             # a minute on 2 quiet cores
    python -m experiments.bench.attention full --device    # 10 minutes on a GPU
    python -m experiments.bench.attention quick            # a part of it, 3 minutes

With --device every case of `CHECKS` is compared with the definition first; then copy
and matmul rates are measured, blocks are tried for each head size and kernel, and with
the best G1 to G9 of `WORKLOADS` are timed against jax.nn (cuDNN and XLA) and torch.
Goals are claims where our kernel and the peer ran; those in TFLOP/s only on a Hopper
GPU. What cannot run is left out, with its reason. The record is
`experiments/results/bench/attention_DEVICE.json`; its "blocks" are to be written into
`pallas_kernels/attention/pallas_gpu.py`.

Measured on 2 cores without AVX-512, jax 0.12: 1.13 and 1.17 of torch's time; 28, 56 and
113 MiB at 2048, 4096 and 8192 tokens. On jax 0.10.2 it took 2.05 of torch's time. It
has not run on a GPU yet.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.bench import _attention_contestants as contestants
from experiments.bench import _attention_device as device
from experiments.bench._attention_calls import JAX, TORCH, Call, inputs
from experiments.bench._contest import OURS, hold
from jaxzoo.training.command import experiment
from jaxzoo.training.record import Report, Run

RATIO, MEMORY, GROWTH = 1.2, 64.0, 2.2


@dataclasses.dataclass(frozen=True)
class Config:
    device: bool = False
    """Times the GPU, not the CPU."""
    length: int = 2048
    """Tokens on the CPU; memory also for twice and four times as many."""
    samples: int = 9
    """Quiet ones of each contestant, on the CPU."""
    seconds: float = 0.2
    """Of one sample, on the CPU."""
    patience: float = 60.0
    """Seconds to wait for quiet, on the CPU."""
    noise: float = 0.12
    """Of a core, used by others."""
    only: tuple[str, ...] = tuple(f"G{n}" for n in range(1, 10))
    """Groups of workloads, on the GPU."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Head sizes for which blocks are tried, on the GPU."""
    blocks: tuple[tuple[int, int], ...] = tuple(
        (own, step) for own in (64, 128, 256) for step in (64, 128, 192)
    )
    """Positions that a block owns, and that it walks over at a time, on the GPU."""
    minutes: float = 8.5
    """No workload begins later than this, on the GPU."""
    record: bool = True
    """Also writes experiments/results/bench/attention_*.json."""


PRESETS = {
    "smoke": Config(
        length=256, samples=2, seconds=0.02, patience=0.5, only=("G9",), widths=(64,),
        blocks=((128, 64),), minutes=1.0, record=False,
    ),
    "quick": Config(
        device=True, only=("G2", "G4", "G9"), widths=(128,),
        blocks=((128, 64), (128, 128)), minutes=2.5, record=False,
    ),
    "full": Config(),
}  # fmt: skip


def main(config: Config, run: Run) -> Report:
    """Times this machine's CPU, or its GPU."""
    if config.device:
        return device.measure(config, run, device.gpu())
    return on_cpu(config, run)


def on_cpu(config: Config, run: Run) -> Report:
    """The time of forward and gradient against others', and their memory."""
    call = _call(config.length)
    shape = f"float32 causal, {call.length} tokens, 8 heads of 64"
    lengths = [call.length * times for times in (1, 2, 4)]
    return hold(
        config, run, "attention", shape, _contest(call, run), flat=_flat,
        bounds={TORCH: RATIO}, memory={n: temporary(n) for n in lengths},
        most=(MEMORY, GROWTH),
    )  # fmt: skip


def temporary(length: int) -> float:
    """MiB of temporary memory that forward and gradient take."""
    call = _call(length)
    arrays = jax.eval_shape(lambda: inputs(call)[0])
    analysis: Any = _both(call, "xla").lower(*arrays).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


def _call(length: int) -> Call:
    return Call(1, length, 8, 64, dtype="float32")


def _both(call: Call, name: str) -> Any:
    """`(q, k, v, d_out) -> (out, (dq, dk, dv))`, compiled at its first call."""
    function, beside = contestants.contestant(name, call, "xla")

    def both(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(lambda *args: function(*args, beside), q, k, v)
        return out, pull(d_out)

    return jax.jit(both)


def _contest(call: Call, run: Run) -> dict[str, Callable[[], Any]]:
    """Calls that wait for the output and the gradients, and give them."""
    arrays, _ = inputs(call)
    ours, theirs = (_both(call, name) for name in ("xla", JAX))
    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: jax.block_until_ready(ours(*arrays)),
        JAX: lambda: jax.block_until_ready(theirs(*arrays)),
    }
    try:
        calls[TORCH] = contestants.in_torch(call, arrays).both
    except ImportError:
        run.say("torch is not installed: there is no ratio to its time.")
    return calls


def _flat(name: str, value: Any) -> list[np.ndarray]:
    """out, dq, dk and dv as `[B, T, N, H]`."""
    out, gradients = value
    arrays = [np.asarray(x) for x in (out, *gradients)]
    return [x.swapaxes(1, 2) for x in arrays] if name == TORCH else arrays


if __name__ == "__main__":
    experiment(main, PRESETS)
