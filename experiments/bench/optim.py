"""What a step of each optimizer costs: time, memory of its state, bytes on the wire.

One update of 25 million float32 parameters in 150 leaves, the gradient at hand, in
place (buffers are donated), against `optax.adamw` and PyTorch's AdamW in one process.

Claims: Optax's AdamW takes at most 1.1 of the time of PyTorch's fused one; Lion and
MARS at most 1.1 of Optax's AdamW, Lion no more than pytorch_optimizer's; block-wise
8-bit quantisation of 16.8 million numbers and an 8-bit Adam step at most twice what
bitsandbytes takes; 8-bit Adam's state at most 0.27 of Adam's; a step of 1-bit Adam
sends at most 1/28 of the bytes of a float32 all-reduce, one of deep gradient
compression at most 1/270, the least of its paper.

    pip install -e ".[bench]"
    python -m experiments.bench.optim full     # 4 minutes on 2 quiet cores

Measured on 2 cores with AVX-512, jax 0.12: AdamW 28.5 ms, 1.57 of PyTorch's fused one
(and 0.37 of its foreach), Lion 0.73 of AdamW and 0.38 of pytorch_optimizer's, MARS 2.5,
8-bit Adam 0.96 and quantisation 0.23 of bitsandbytes', 32 and 125 times fewer bytes.
DGC takes 2.7 s: XLA for CPUs sorts to find a quarter of the entries.

AdamW: XLA for CPUs writes the two moments and the parameters in three loops, which is
40 bytes per parameter where PyTorch's fused loop moves 28. With

    XLA_FLAGS=--xla_backend_extra_options=xla_cpu_use_multi_output_fusion

it is two loops, 36 bytes and 0.89 of the time. `jit` takes no such option for a single
function, so that nothing here can close the rest of the gap. MARS clips by a norm that
has to be known first, keeps the gradient and copies the one before: 1.6 times the bytes
of AdamW at the least.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench import _timing as timing
from experiments.optim.compare import optimizers
from jaxzoo.distributed.dgc import dgc
from jaxzoo.distributed.one_bit_adam import one_bit_adam
from jaxzoo.nn.blockwise_quantization import quantize_blockwise
from jaxzoo.optim.blockwise_8bit_optim import adam8bit
from jaxzoo.training.command import experiment
from jaxzoo.training.record import Claim, Report, Run

ADAMW, FUSED, FOREACH = "optax.adamw", "torch AdamW fused", "torch AdamW foreach"
LION, BNB = "pytorch_optimizer Lion", "bitsandbytes Adam8bit"
QUANTISE, BNB_QUANTISE = "quantize_blockwise", "bitsandbytes quantize_blockwise"
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Config:
    leaves: int = 150
    side: int = 410
    """Each leaf is `[side, side]`."""
    numbers: int = 16_777_216
    """Quantised."""
    workers: int = 8
    only: tuple[str, ...] = ()
    """Names of our optimizers; none: all."""
    samples: int = 7
    """Quiet ones of each contestant."""
    seconds: float = 0.15
    """Of one sample."""
    patience: float = 120.0
    """Seconds to wait for quiet."""
    noise: float = 0.12
    """Of a core, used by others."""
    record: bool = True
    """Also writes experiments/results/bench/optim_cpu.json."""


PRESETS = {
    "smoke": Config(
        leaves=2, side=64, numbers=8192, only=("lion", "adam8bit"), samples=2,
        seconds=0.01, patience=0.5, record=False,
    ),
    "full": Config(),
}  # fmt: skip


def leaves(config: Config, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (config.side, config.side)
    return [rng.normal(size=shape).astype(np.float32) for _ in range(config.leaves)]


def in_jax(config: Config, optimizer: Any, grads: list[Any]) -> tuple[Call, float]:
    """A step that keeps its state, and the bytes of state per parameter."""
    params = [jnp.asarray(x) for x in leaves(config, 0)]
    state = optimizer.init(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held = [params, state]

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1))

    def call() -> Any:
        held[:] = jax.block_until_ready(compiled(*held, grads))
        return held[0]

    return call, size / (config.leaves * config.side**2)


def in_torch(config: Config, run: Run) -> dict[str, Call]:
    """Steps of PyTorch's optimizers, of those that are installed."""
    try:
        import torch  # pyright: ignore
    except ImportError:
        run.say("torch is not installed: there is no ratio to its time.")
        return {}

    def step(make: Callable[..., Any], **kwargs: Any) -> Call:
        params = [torch.from_numpy(x).requires_grad_() for x in leaves(config, 0)]
        for param, grad in zip(params, leaves(config, 1), strict=True):
            param.grad = torch.from_numpy(grad)
        return make(params, lr=1e-3, weight_decay=1e-4, **kwargs).step

    calls = {
        FUSED: step(torch.optim.AdamW, fused=True),
        FOREACH: step(torch.optim.AdamW, foreach=True),
    }
    try:
        from pytorch_optimizer import Lion  # pyright: ignore

        calls[LION] = step(Lion)
    except ImportError:
        run.say("pytorch_optimizer is not installed: Lion has no peer.")
    try:
        import bitsandbytes  # pyright: ignore
    except ImportError:
        run.say("bitsandbytes is not installed: 8-bit state has no peer.")
        return calls
    numbers = torch.from_numpy(_numbers(config))
    quantise = bitsandbytes.functional.quantize_blockwise
    calls[BNB] = step(bitsandbytes.optim.AdamW8bit)
    calls[BNB_QUANTISE] = lambda: quantise(numbers, blocksize=256)
    return calls


def _numbers(config: Config) -> np.ndarray:
    return np.random.default_rng(2).normal(size=config.numbers).astype(np.float32)


def sent(config: Config, optimizer: Any, size: int = 2**20) -> float:
    """Bytes of a step of compressed training over those of a float32 all-reduce.

    Tests read the same count from the collectives of the compiled program.
    """
    workers = config.workers

    def steps(key: jax.Array) -> jax.Array:
        params = jnp.zeros(size)
        state = optimizer.init(params)
        for _ in range(2):  # the first is that of the warm-up
            key, own = jax.random.split(key)
            grads = jax.random.normal(own, (size,))
            _, state = optimizer.update(grads, state, params)
        return _bytes_sent(state)

    keys = jax.random.split(jax.random.key(0), workers)
    counts = jax.jit(jax.vmap(steps, axis_name="data"))(keys)
    dense = 2 * 4 * size * (workers - 1) / workers
    return float(counts[0]) / dense


def _bytes_sent(state: Any) -> jax.Array:
    pairs = jax.tree_util.tree_leaves_with_path(state)
    return next(leaf for path, leaf in pairs if "bytes_sent" in str(path[-1]))


def ratios(times: dict[str, float]) -> list[tuple[str, float, float]]:
    """What is claimed of times: a sentence, the ratio and its bound."""
    pairs = [
        ("step of AdamW: optax over PyTorch's fused", ADAMW, FUSED, 1.1),
        ("step: lion over optax.adamw", "lion", ADAMW, 1.1),
        ("step: mars over optax.adamw", "mars", ADAMW, 1.1),
        ("step: lion over pytorch_optimizer's", "lion", LION, 1.0),
        ("8-bit quantisation: ours over bitsandbytes'", QUANTISE, BNB_QUANTISE, 2.0),
        ("step: adam8bit over bitsandbytes' AdamW8bit", "adam8bit", BNB, 2.0),
    ]
    return [
        (text, times[ours] / times[other], bound)
        for text, ours, other, bound in pairs
        if ours in times and other in times
    ]


def main(config: Config, run: Run) -> Report:
    names = {k: v for k, v in optimizers().items() if k in (config.only or (k,))}
    calls: dict[str, Call] = {}
    state: dict[str, float] = {}
    grads = [jnp.asarray(x) for x in leaves(config, 1)]
    for name, optimizer in {ADAMW: optax.adamw, **names}.items():
        calls[name], state[name] = in_jax(config, optimizer(1e-3), grads)
    numbers = jnp.asarray(_numbers(config))
    quantise = jax.jit(lambda x: quantize_blockwise(x, block_size=256))
    calls[QUANTISE] = lambda: jax.block_until_ready(quantise(numbers))
    calls |= in_torch(config, run)
    measured = timing.measure(
        calls, samples=config.samples, seconds=config.seconds,
        patience=config.patience, noise=config.noise,
    )  # fmt: skip
    quiet = measured["quiet"]
    times = {name: measured[name]["median"] for name in calls}
    claims = []
    if quiet >= timing.QUIET:
        claims = [
            Claim(text, ratio, f"<= {bound:g}", ratio <= bound)
            for text, ratio, bound in ratios(times)
        ]
    _, with_8bit = in_jax(config, adam8bit(1e-3), grads)
    share = with_8bit / state[ADAMW]
    claims.append(
        Claim("state of adam8bit over Adam's", share, "<= 0.27", share <= 0.27)
    )
    compressed = {
        "1-bit Adam": (one_bit_adam(1e-3, warmup=1, axis_name="data"), 28),
        "deep gradient compression": (
            dgc(1e-3, sparsities=0.999, axis_name="data"),
            270,
        ),
    }
    metrics: dict[str, float] = {"quiet": quiet, "load_before": os.getloadavg()[0]}
    for name, (optimizer, least) in compressed.items():
        cut = 1 / sent(config, optimizer)
        metrics[f"{name}/cut"] = cut
        text = f"{name}, {config.workers} workers: float32 bytes over those sent"
        claims.append(Claim(text, cut, f">= {least}", cut >= least))
    rows = []
    for name in calls:
        median, base = times[name], times[ADAMW]
        metrics |= {
            f"{name}/median_ms": median,
            f"{name}/min_ms": measured[name]["min"],
        }
        metrics |= {f"{name}/state_bytes": state[name]} if name in state else {}
        of_torch = f"{median / times[FOREACH]:.2f}" if FOREACH in times else ""
        rows.append(
            (
                name, f"{median:.1f}", f"{median / base:.2f}", of_torch,
                f"{state[name]:.2f}" if name in state else "",
            )
        )  # fmt: skip
    size = config.leaves * config.side**2
    run.table(
        f"{size / 1e6:.1f} M parameters, {quiet} quiet samples",
        ("", "median (ms)", f"of {ADAMW}", f"of {FOREACH}", "state (B/parameter)"),
        rows,
    )
    if config.record:
        path = timing.RESULTS / "optim_cpu.json"
        flags = os.environ.get("XLA_FLAGS", "")
        settings = dataclasses.asdict(config)
        timing.write_record(path, settings, claims, metrics, xla_flags=flags)
    return Report(claims, metrics, [])


if __name__ == "__main__":
    experiment(main, PRESETS)
