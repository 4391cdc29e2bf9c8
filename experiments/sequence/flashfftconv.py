"""FlashFFTConv: FFT convolution by matrix products: dense, sliding, frequency-sparse.

Claims: for orders 2, 3 and 4 the output and the gradients equal those of NumPy's FFT in
float64; a short kernel over sliding blocks too; skipping blocks equals convolving with
the zeroed spectrum, and saves the share of the FLOPs that is skipped; FLOPs grow as
N^(1 + 1/p); and a backward pass keeps the inputs alone.

    python -m experiments.sequence.flashfftconv full    # 2 minutes on 2 cores

Expected: errors below 1e-6. A table has FLOPs, bytes and time of the compiled programs
beside jnp.fft: a CPU has no matrix units, and gains nothing.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzoo.sequence.flashfftconv import fft_conv, monarch_cost
from jaxzoo.training.command import experiment
from jaxzoo.training.cost import count
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run

ORDERS = (2, 3, 4)


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    side: int = 8  # tokens are side ** 4, which has factors of every order
    batch: int = 2
    channels: int = 8
    taps: int = 250  # of the kernel that slides
    largest: int = 22  # log2 of the longest sequence whose FLOPs are counted
    timed: tuple[int, ...] = (1024, 4096, 16384)
    repeats: int = 9

    def __post_init__(self):
        if self.seeds < 2 or self.side < 2 or self.largest < 13 or not self.timed:
            raise ValueError(
                "seeds, side >= 2, largest >= 13 and a timed length, please"
            )

    @property
    def length(self) -> int:
        return self.side**4


PRESETS = {
    "smoke": Config(
        seeds=2, side=2, taps=3, largest=13, timed=(64,), repeats=2, channels=2
    ),
    "full": Config(),
}  # fmt: skip


def factors(length: int, order: int) -> tuple[int, ...]:
    """Equal factors, or powers of 2 as equal as they can be."""
    bits = round(math.log2(length))
    return tuple(2 ** ((bits + i) // order) for i in range(order))


def signals(config: Config, seed: int, taps: int) -> list[np.ndarray]:
    """Inputs, a kernel, two gates and a cotangent."""
    rng = np.random.default_rng(seed)
    tokens = (config.batch, config.length, config.channels)
    shapes = [tokens, (taps, config.channels), tokens, tokens, tokens]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def by_fft(xp: Any, u: Any, k: Any) -> Any:
    n = 2 * u.shape[1]
    spectra = xp.fft.rfft(u, n, axis=1) * xp.fft.rfft(k, n, axis=0)[None]
    return xp.fft.irfft(spectra, n, axis=1)[:, : u.shape[1]]


def with_gradients(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Output and gradients in float64: correlations are convolutions back in time."""
    u, k, before, after, dy = (x.astype(np.float64) for x in arrays)
    gated, flow = u * before, dy * after
    plain = by_fft(np, gated, k)
    into = by_fft(np, flow[:, ::-1], k)[:, ::-1]
    n = 2 * u.shape[1]
    spectra = np.fft.rfft(flow, n, axis=1) * np.fft.rfft(gated, n, axis=1).conj()
    dk = np.fft.irfft(spectra.sum(0), n, axis=0)[: len(k)]
    return [after * plain, into * before, dk, into * u, plain * dy]


def errors(config: Config, taps: int, factors: tuple[int, ...]) -> np.ndarray:
    """Largest relative error of output and gradients, per seed."""

    @jax.jit
    def ours(u, k, before, after, dy):
        def conv(u, k, before, after):
            return fft_conv(u, k, pregate=before, postgate=after, factors=factors)

        y, back = jax.vjp(conv, u, k, before, after)
        return y, *back(dy)

    def of_seed(seed: int) -> float:
        arrays = signals(config, seed, taps)
        pairs = zip(ours(*arrays), with_gradients(arrays), strict=True)
        return max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs)

    return np.array([of_seed(seed) for seed in range(config.seeds)])


def zeroed(u: np.ndarray, k: np.ndarray, factors: Any, keep: Any) -> np.ndarray:
    """By NumPy's FFT of 4 M points, whose odd bins are the spectrum of `fft_conv`."""
    half = math.prod(factors)
    j, kept = np.arange(half), np.ones(half, bool)
    for size, few in zip(factors, keep, strict=True):
        j, index = np.divmod(j, size)
        kept &= (index < (few + 1) // 2) | (index >= size - few // 2)
    bins = np.zeros(4 * half)
    places = 4 * np.flatnonzero(kept) - 1
    bins[places] = bins[-places] = 2.0  # the odd bins alone are half of the signal
    u, k = (np.fft.fft(x.astype(np.float64), 4 * half, axis=-2) for x in (u, k))
    return np.fft.ifft(u * k * bins[:, None], axis=-2).real[:, :half]


def sparse_errors(config: Config) -> dict[str, np.ndarray]:
    """Relative error against the zeroed spectrum, `{kept: [seeds]}`."""
    found = {}
    for order in ORDERS:
        sizes = factors(config.length, order)
        first = (max(sizes[0] // 4, 1), *sizes[1:])
        last = (*sizes[:-1], max(sizes[-1] // 2, 1))
        for keep in (first, last, tuple(-(-2 * size // 3) for size in sizes)):
            run = jax.jit(functools.partial(fft_conv, factors=sizes, keep=keep))

            def of_seed(seed: int, run=run, sizes=sizes, keep=keep) -> float:
                u, k, *_ = signals(config, seed, config.length)
                expected = zeroed(u, k, sizes, keep)
                return np.abs(run(u, k) - expected).max() / np.abs(expected).max()

            name = " x ".join(
                f"{few}/{size}" for few, size in zip(keep, sizes, strict=True)
            )
            found[name] = np.array([of_seed(seed) for seed in range(config.seeds)])
    return found


def flops(config: Config, length: int, **knobs: Any) -> float:
    """FLOPs of the matrix products in one forward pass, counted in the jaxpr."""
    shapes = ((config.batch, length, config.channels), (length, config.channels))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    conv = functools.partial(fft_conv, **knobs)
    return count(jax.make_jaxpr(conv)(*arrays)).matmul_flops


def kept(config: Config, batch: int) -> int:
    """Bytes that a backward pass holds on to."""
    tokens = jax.ShapeDtypeStruct((batch, config.length, config.channels), jnp.float32)
    kernel = jax.ShapeDtypeStruct(tokens.shape[1:], jnp.float32)
    sizes = factors(config.length, 2)

    def conv(u, k, before, after):
        return fft_conv(u, k, pregate=before, postgate=after, factors=sizes)

    back = jax.eval_shape(
        lambda *x: jax.vjp(conv, *x)[1], tokens, kernel, tokens, tokens
    )
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(back))


def programs(config: Config, run: Run) -> dict[str, float]:
    """FLOPs, bytes and time of compiled programs, beside jnp.fft."""
    rows, metrics = [], {}
    for length in config.timed:
        rng = np.random.default_rng(0)
        u = rng.normal(size=(config.batch, length, config.channels)).astype(np.float32)
        named: dict[str, Callable] = {"jnp.fft": functools.partial(by_fft, jnp)}
        for order in ORDERS:
            sizes = factors(length, order)
            named[f"order {order}"] = functools.partial(fft_conv, factors=sizes)
        for name, conv in named.items():
            program: Any = jax.jit(conv).lower(u, u[0]).compile()
            cost, memory = program.cost_analysis(), program.memory_analysis()
            seconds = []
            for _ in range(config.repeats):
                began = time.perf_counter()
                jax.block_until_ready(program(u, u[0]))
                seconds.append(time.perf_counter() - began)
            counts = (cost["flops"], cost["bytes accessed"], memory.temp_size_in_bytes)
            got = *(x / 1e6 for x in counts), 1e3 * float(np.median(seconds))
            units = ("MFLOP", "MB", "MB of temporaries", "ms")
            pairs = zip(units, got, strict=True)
            metrics |= {f"{name}/{length}/{unit}": value for unit, value in pairs}
            rows.append((f"{name}, {length}", *(f"{x:.3g}" for x in got)))
    run.table(
        f"Compiled for {jax.default_backend()}, as its compiler counts: "
        f"{config.batch} x tokens x {config.channels}, forward",
        ("program, tokens", "MFLOP", "bytes (MB)", "temporaries (MB)", "median ms"),
        rows,
    )
    return metrics


def pictures(config: Config, run: Run, lengths, counted, shares) -> list[Figure]:
    figure, (left, middle, right) = panels(3, width=4.4)
    per = config.batch * config.channels
    for order, color, mark in zip(ORDERS, COLORS, "osD", strict=False):
        style: Any = {
            "color": color,
            "marker": mark,
            "ms": 4,
            "label": f"order {order}",
        }
        x = np.array(lengths[order])
        left.plot(x, np.array(counted[order]) / (per * x), **style)
        x = 2 ** np.arange(8, 23)
        seconds = np.asarray(monarch_cost(x)["seconds"])[order - 2]
        right.plot(x, 1e12 * seconds / x, **style)
    x = np.array(lengths[2])
    ffts = 5 * (2 + 1 / config.batch) * np.log2(2 * x)  # the kernel's serves the batch
    left.plot(x, ffts, color="0.4", ls="--", label="FFTs of 2 T points")
    left.set(
        xscale="log", yscale="log", xlabel="length T (tokens)",
        ylabel="FLOPs of products\n(per token and channel)",
    )  # fmt: skip
    for i, (name, (skipped, done)) in enumerate(shares.items()):
        middle.plot(skipped, done, marker="os"[i], ms=4, label=name, color=COLORS[i])
    middle.plot([0, 1], [1, 0], color="0.4", ls="--", label="1 - share skipped")
    middle.set(
        xlabel="share of the spectrum that is skipped (1)",
        ylabel="FLOPs of products,\nof those without skipping (1)",
    )
    right.set(
        xscale="log", yscale="log", xlabel="length N (tokens)",
        ylabel="cost model, A100\n(ps per token)",
    )  # fmt: skip
    for ax in (left, middle, right):
        ax.legend(frameon=False, fontsize=8)
    return [
        run.figure(
            "flashfftconv", figure, title="FLOPs, skipped blocks and the cost model",
            caption="Left: counted FLOPs, transforms of input, kernel and output. "
            "Middle: what skipping saves if the first or the last factor has fewer "
            "indices. Right: the paper's model of an A100; an order pays from factors "
            "of 16, as wide as the matrix units. All are counts.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    n, sparse = config.length, sparse_errors(config)
    dense = {f"order {p}": errors(config, n, factors(n, p)) for p in ORDERS}
    block = 2 ** math.ceil(math.log2(config.taps))
    slid = errors(config, config.taps, factors(block, 2))
    cases = dense | {f"{config.taps} taps, sliding": slid} | sparse
    run.table(
        "Largest relative error",
        ("case", *(f"seed {seed}" for seed in range(config.seeds))),
        [(name, *(f"{e:.1e}" for e in each)) for name, each in cases.items()],
    )
    lengths = {
        p: [2**b for b in range(8, config.largest + 1) if b % p == 0] for p in ORDERS
    }
    counted = {
        p: [flops(config, n, factors=factors(n, p)) for n in lengths[p]] for p in ORDERS
    }
    logs = {p: (np.log(lengths[p]), np.log(counted[p])) for p in ORDERS}
    slopes = {p: float(np.polyfit(*logs[p], 1)[0]) for p in ORDERS}
    off = max(abs(slope - 1 - 1 / p) for p, slope in slopes.items())
    shares, whole = {}, flops(config, 4096, factors=(64, 64))
    for name in ("first", "last"):
        keeps = [(few, 64) for few in range(4, 65, 12)]
        keeps = keeps if name == "first" else [keep[::-1] for keep in keeps]
        done = [flops(config, 4096, factors=(64, 64), keep=x) / whole for x in keeps]
        shares[f"fewer of the {name} factor"] = (
            [1 - a * b / 4096 for a, b in keeps],
            done,
        )
    skipped, done = shares["fewer of the first factor"]
    cut = max(abs(1 - d - s) for s, d in zip(skipped, done, strict=True))
    tokens = 4 * config.length * config.channels
    grown = (kept(config, 4) - kept(config, 2)) / (2 * 3 * tokens)
    largest, worst = (max(e.max() for e in x.values()) for x in (dense, sparse))
    claims = [
        Claim(
            f"largest relative error of output and gradients, {config.length} tokens, "
            "orders 2, 3 and 4",
            float(largest), "<= 1e-5", bool(largest <= 1e-5),
        ),
        Claim(
            f"the same of {config.taps} taps over sliding blocks",
            float(slid.max()), "<= 1e-5", float(slid.max()) <= 1e-5,
        ),
        Claim(
            "skipped blocks against the zeroed spectrum, largest relative error",
            float(worst), "<= 1e-5", bool(worst <= 1e-5),
        ),
        Claim(
            "FLOPs saved by skipping indices of the first factor, less the share that "
            "is skipped, largest",
            cut, "<= 1e-6", cut <= 1e-6,
        ),
        Claim(
            "exponent of the FLOPs in the length, less 1 + 1/p, largest of the orders",
            off, "<= 0.05", off <= 0.05,
        ),
        Claim(
            "bytes kept for the backward pass per example, of those of input and gates",
            grown, "<= 1", grown <= 1,
        ),
    ]  # fmt: skip
    metrics = {f"slope/{p}": s for p, s in slopes.items()} | programs(config, run)
    return Report(claims, metrics, pictures(config, run, lengths, counted, shares))


if __name__ == "__main__":
    experiment(main, PRESETS)
