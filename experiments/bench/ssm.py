"""The scans: on the CPU against other scans, and with --device on a GPU.

Claims on the CPU (the selective scan of 1 x 2048 tokens, 256 channels of 16 states,
float32): forward and gradient take at most 0.12 of the time of mambapy's parallel scan
in PyTorch, and at most a third of that of `lax.scan` and of `associative_scan` with
JAX's own gradient; at most 9 MiB of temporary memory, which grows by at most 4.2 where
the length grows by 4, up to 32768.

    pip install -e ".[bench]"
    python -m experiments.bench.ssm full             # a minute on 2 quiet cores
    python -m experiments.bench.ssm full --device    # 10 minutes on a GPU

With --device both scans are compared with the definition first; then G10 to G13 of
`_ssm_device.WORKLOADS` are timed against XLA and, where it is installed,
jax-linear-attention. The record is `experiments/results/bench/ssm_DEVICE.json`. It has
not run on a GPU yet.

Measured on 2 cores with AVX-512, jax 0.12: 0.09 of mambapy's time, 0.11 of
associative_scan's and 0.30 of lax.scan's; without AVX-512 an earlier version took 0.12,
0.14 and 0.35 to 0.39. 5.9, 7.4 and 13.4 MiB at 2048, 8192 and 32768 tokens.

All contestants run in one process on the same inputs, in turn; values are compared
first. What is not installed is left out.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.bench import _ssm_device as device
from experiments.bench._attention_device import gpu
from experiments.bench._contest import OURS, hold
from jaxzoo.training.command import experiment
from jaxzoo.training.record import Report, Run
from pallas_kernels.selective_scan import selective_scan

SCAN, ASSOCIATIVE, TORCH = "lax.scan", "associative_scan", "mambapy"
BOUNDS = {TORCH: 0.12, SCAN: 1 / 3, ASSOCIATIVE: 1 / 3}
MEMORY, GROWTH = 9.0, 4.2


@dataclasses.dataclass(frozen=True)
class Config:
    device: bool = False
    """Times the GPU, not the CPU."""
    length: int = 2048
    """Tokens; memory also for 4 and 16 times as many."""
    channels: int = 256
    states: int = 16
    samples: int = 9
    """Quiet ones of each contestant."""
    seconds: float = 0.2
    """Of one sample."""
    patience: float = 60.0
    """Seconds to wait for quiet."""
    noise: float = 0.12
    """Of a core, used by others."""
    minutes: float = 8.5
    """No workload begins later than this, on the GPU."""
    record: bool = True
    """Also writes experiments/results/bench/ssm_*.json."""


PRESETS = {
    "smoke": Config(
        length=64, channels=16, states=4, samples=2, seconds=0.02, patience=0.5,
        record=False,
    ),
    "full": Config(),
}  # fmt: skip


class Inputs(NamedTuple):
    """Of a scan, and the gradient of its output."""

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    dy: Any


def inputs(config: Config, length: int) -> Inputs:
    """One sequence, with the rates and steps that a Mamba block begins with."""
    rng = np.random.default_rng(0)
    u, dy = rng.normal(size=(2, 1, length, config.channels))
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(0.1), u.shape))
    A = -np.tile(np.arange(1.0, config.states + 1), (config.channels, 1))
    B, C = rng.normal(size=(2, 1, length, config.states))
    return Inputs(*(np.float32(x) for x in (u, delta, A, B, C, dy)))


def associative(u: Any, delta: Any, A: Any, B: Any, C: Any) -> jax.Array:
    """The scan as a parallel prefix: all states at once."""

    def join(first: Any, second: Any) -> Any:
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay = jnp.exp(delta[..., None] * A[None, None])
    added = (delta * u)[..., None] * B[:, :, None]
    _, states = lax.associative_scan(join, (decay, added), axis=1)
    return jnp.einsum("btdn,btn->btd", states, C)


def both(scan: Callable[..., jax.Array]) -> Any:
    """`Inputs -> (y, gradients)`, compiled at its first call."""

    @jax.jit
    def run(given: Inputs) -> Any:
        y, back = jax.vjp(scan, *given[:5])
        return y, *back(given.dy)

    return run


def in_jax() -> dict[str, Any]:
    def ours(*args: Any) -> jax.Array:
        return selective_scan(*args, implementation="xla")

    def plain(*args: Any) -> jax.Array:
        return selective_scan(*args, implementation="ref")

    return {OURS: both(ours), SCAN: both(plain), ASSOCIATIVE: both(associative)}


def in_torch(given: Inputs) -> Callable[[], list[np.ndarray]]:
    """mambapy's scan, as its block calls it."""
    import torch  # pyright: ignore
    from mambapy.pscan import pscan  # pyright: ignore

    *leaves, dy = (torch.from_numpy(np.array(x)) for x in given)
    leaves = [x.requires_grad_() for x in leaves]
    u, delta, A, B, C = leaves

    def run() -> list[np.ndarray]:
        decay = torch.exp(delta.unsqueeze(-1) * A)
        added = delta.unsqueeze(-1) * B.unsqueeze(2) * u.unsqueeze(-1)
        y = (pscan(decay, added) @ C.unsqueeze(-1)).squeeze(3)
        gradients = torch.autograd.grad(y, leaves, dy)
        return [x.detach().numpy() for x in (y, *gradients)]

    return run


def temporary(config: Config, length: int) -> float:
    """MiB of temporary memory that forward and gradient take here."""
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, inputs(config, length)))
    analysis: Any = in_jax()[OURS].lower(shapes).compile().memory_analysis()
    return analysis.temp_size_in_bytes / 2**20


def contest(given: Inputs, run: Run) -> dict[str, Callable[[], Any]]:
    """Calls that wait for y and the gradients, and give them."""
    arrays = jax.tree.map(jnp.asarray, given)
    calls: dict[str, Callable[[], Any]] = {
        name: lambda function=function: jax.block_until_ready(function(arrays))
        for name, function in in_jax().items()
    }
    try:
        calls[TORCH] = in_torch(given)
    except ImportError:
        run.say("mambapy is not installed: there is no ratio to its time.")
    return calls


def main(config: Config, run: Run) -> Report:
    """Times this machine's CPU, or its GPU."""
    if config.device:
        return device.measure(config, run, gpu())
    lengths = [config.length * times for times in (1, 4, 16)]
    return hold(
        config, run, "ssm",
        f"{config.length} tokens, {config.channels} channels of {config.states}",
        contest(inputs(config, config.length), run), flat=lambda _, arrays: arrays,
        bounds=BOUNDS, memory={n: temporary(config, n) for n in lengths},
        most=(MEMORY, GROWTH),
    )  # fmt: skip


if __name__ == "__main__":
    experiment(main, PRESETS)
