"""The scans on a GPU: right first, then their time against XLA's, a peer's and floors.

G10 and G12 are timed beside jax-linear-attention where it is installed, and otherwise
held to the times that it publishes for the H100. G11 is the share of the floor of
exponentials, which the scan of Mamba-1 cannot beat; G13 the length from which SSD is
faster than attention.
"""

import dataclasses
import functools
import importlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import _timing as timing
from experiments.bench._attention_device import Target
from jaxzoo.training.record import Claim, Report, Run
from pallas_kernels.attention import attention
from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.ssd import ssd

WAYS = ("forward", "both")
PEER = "jax-linear-attention"
BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}
EXPONENTIALS = 132 * 16 * 1.755e9  # per second, of an H100
CROSSOVER = 2048  # tokens from which SSD is to be faster than attention


class Work(NamedTuple):
    """A call that is timed.

    Attributes:
        name: of the workload.
        kind: "selective_scan" or "ssd".
        sizes: B, T, D, N of the scan; B, T, H, N, P of ssd.
        dtype: of the inputs.
        published: the peer's milliseconds on an H100, by way.
        share: of the floor of exponentials that the forward pass is to reach, or None.
    """

    name: str
    kind: str
    sizes: tuple[int, ...]
    dtype: str = "bfloat16"
    published: Mapping[str, float] = {}
    share: float | None = None


SCAN, SSD = "selective_scan", "ssd"
WORKLOADS = (
    Work("G10", SCAN, (8, 2048, 1536, 16), published={"forward": 0.272, "both": 1.233}),
    Work("G10 wide", SCAN, (1, 4096, 8192, 16),
         published={"forward": 0.505, "both": 1.834}),
    Work("G10 float32", SCAN, (8, 2048, 1536, 16), "float32"),
    *(Work(f"G11 {n}", SCAN, (8, n, 2048, 16), share=0.4) for n in (2048, 8192, 65536)),
    Work("G12", SSD, (4, 4096, 24, 128, 64),
         published={"forward": 0.123, "both": 0.741}),
    Work("G12 long", SSD, (1, 65536, 16, 128, 128),
         published={"forward": 0.632, "both": 3.271}),
)  # fmt: skip
# Compared with the definition: odd lengths, tails, everything on.
CHECKS = (
    Work("plain", SCAN, (2, 256, 64, 16)),
    Work("odd", SCAN, (1, 77, 40, 5), "float32"),
    Work("plain", SSD, (2, 256, 2, 64, 64)),
    Work("odd", SSD, (1, 77, 3, 24, 20)),
)
LENGTHS = (512, 1024, 2048, 4096, 8192)  # of G13


def inputs(work: Work) -> tuple[jax.Array, ...]:
    """Random arrays of a call: u, delta, A, B, C, or those of ssd."""
    keys = jax.random.split(jax.random.key(0), 4)
    if work.kind == SCAN:
        batch, length, channels, states = work.sizes
        wide, rates = (batch, length, channels), jnp.arange(1.0, states + 1)
        A, narrow = -jnp.tile(rates, (channels, 1)), (batch, length, states)
    else:
        batch, length, heads, states, size = work.sizes
        wide, A = (batch, length, heads, size), -jnp.linspace(1.0, 16.0, heads)
        narrow = (batch, length, 1, states)
    steps = wide if work.kind == SCAN else wide[:3]
    low, high = np.log(1e-3), np.log(0.1)
    delta = jnp.exp(jax.random.uniform(keys[1], steps, minval=low, maxval=high))
    u = jax.random.normal(keys[0], wide)
    B, C = (jax.random.normal(k, narrow) for k in keys[2:])
    u, delta, B, C = (x.astype(work.dtype) for x in (u, delta, B, C))
    return u, delta, A, B, C


def function(work: Work, name: str) -> Callable[..., jax.Array]:
    """`(u, delta, A, B, C) -> y` of one contestant.

    Raises:
        ImportError: the peer is not installed.
    """
    if name != PEER:
        scan: Any = selective_scan if work.kind == SCAN else ssd
        return functools.partial(scan, implementation=name)
    peer: Any = importlib.import_module("jla.ops").linear_attention

    def theirs(u: Any, delta: Any, A: Any, B: Any, C: Any) -> jax.Array:
        if work.kind == SCAN:
            return peer("mamba1", C, B, u, dt=delta, a=A, impl="mosaic_gpu")[0]
        heads = u.shape[2]
        B, C = (jnp.repeat(x, heads, axis=2) for x in (B, C))
        decay = delta.astype(jnp.float32) * A.reshape(1, 1, -1)
        return peer("simple_gla", C, B, u * delta[..., None], g=decay, scale=1.0,
                    impl="mosaic_gpu")[0]  # fmt: skip

    return theirs


def both(work: Work, name: str) -> Callable[..., Any]:
    """y and all gradients."""
    own = function(work, name)

    def run(d_y: Any, *arrays: Any) -> Any:
        y, back = jax.vjp(own, *arrays)
        return y, back(d_y.astype(y.dtype))

    return run


def check(target: Target, checks: Sequence[Work]) -> dict[str, Any]:
    """How far values and gradients are from the definition, by case."""
    found = {}
    for work in checks:
        arrays = inputs(work)
        try:
            got, wanted = (
                jax.tree.leaves(jax.jit(both(work, name))(arrays[0], *arrays))
                for name in (_own(work, target), "ref")
            )
            error = max(map(timing.far, got, wanted))
            held = {"error": error, "holds": error <= BOUNDS[work.dtype]}
            found[f"{work.kind} {work.name}"] = held
        except Exception as problem:
            found[f"{work.kind} {work.name}"] = {"reason": timing.reason(problem)}
    return found


def timed(target: Target, work: Work) -> tuple[dict[Any, float], dict[Any, str]]:
    """Seconds by contestant and way, and why others are missing."""
    arrays, jobs, seconds = inputs(work), {}, {}
    reasons: dict[Any, str] = {}
    for name in dict.fromkeys((_own(work, target), "xla", PEER)):
        try:
            jobs[name, "forward"] = timing.Job(function(work, name), arrays)
            jobs[name, "both"] = timing.Job(both(work, name), (arrays[0], *arrays))
        except Exception as problem:
            reasons |= dict.fromkeys(((name, w) for w in WAYS), timing.reason(problem))
    programs, failed = timing.compiled(jobs, memory=target.memory)
    reasons |= failed
    first = None
    for key, program in programs.items():
        try:
            call = functools.partial(program, *jobs[key].args)
            if key[1] == "forward":
                value = np.asarray(call()[:2, :256], np.float32)
                first = value if first is None else first
                if (error := timing.far(value, first)) > 3e-2:
                    raise ArithmeticError(f"differs from the first by {error:.2g}")
            seconds[key] = target.clock(call)
        except Exception as problem:
            reasons[key] = timing.reason(problem)
    return seconds, reasons


def claims_of(target: Target, work: Work, seconds: Mapping[Any, float]) -> list[Claim]:
    """Against XLA, the peer and the floor, where both ran."""
    own, claims = _own(work, target), []
    hopper = bool(re.search(r"H[128]00|H20\b", target.name))
    for way in WAYS:
        mine = seconds.get((own, way))
        if mine is None:
            continue
        others = {"XLA": seconds.get(("xla", way)), PEER: seconds.get((PEER, way))}
        if others[PEER] is None and hopper and way in work.published:
            others[f"{PEER}, as published for the H100"] = 1e-3 * work.published[way]
        for name, theirs in others.items():
            if theirs is not None and not (name == "XLA" and own == "xla"):
                text = f"{work.name}, {way}: our time over that of {name}"
                claims.append(Claim(text, mine / theirs, "<= 1", mine <= theirs))
        if work.share and way == "forward" and hopper:
            floor = np.prod(work.sizes, dtype=float) / EXPONENTIALS
            text = f"{work.name}, forward: the floor of exponentials over our time"
            bound = f">= {work.share:g}"
            claims.append(Claim(text, floor / mine, bound, floor / mine >= work.share))
    return claims


def crossover(target: Target, lengths: Sequence[int]) -> tuple[dict[str, float], Any]:
    """G13: forward milliseconds of both by length, and where SSD begins to win."""
    metrics, wins = {}, []
    for length in lengths:
        work = Work("G13", SSD, (2, length, 16, 128, 64))
        q = jax.random.normal(jax.random.key(1), (2, length, 16, 64), jnp.bfloat16)
        calls: Any = (
            (functools.partial(attention, is_causal=True), (q, q, q)),
            (function(work, _own(work, target)), inputs(work)),
        )
        times = [
            target.clock(functools.partial(jax.jit(call), *args))
            for call, args in calls
        ]
        for name, seconds in zip(("attention", SSD), times, strict=True):
            metrics[f"G13 {length}/{name}/ms"] = 1e3 * seconds
        wins.append(times[1] < times[0])
    # From where on it wins at every length that was tried.
    lost = [n for n, won in zip(lengths, wins, strict=True) if not won]
    later = [n for n in lengths if n > max(lost, default=0)]
    first = min(later, default=float("inf"))
    text = "G13: tokens from which SSD is faster than attention, forward"
    return metrics, Claim(text, first, f"<= {CROSSOVER}", first <= CROSSOVER)


def measure(
    config: Any,
    run: Run,
    target: Target,
    *,
    checks: Sequence[Work] = CHECKS,
    workloads: Sequence[Work] = WORKLOADS,
    lengths: Sequence[int] = LENGTHS,
) -> Report:
    """Everything that --device does.

    Args:
        config: of `experiments.bench.ssm`.
        run: the open run.
        target: what is timed; its `own` is the implementation of both scans.
        checks: calls that are compared with the definition.
        workloads: calls that are timed.
        lengths: of G13.
    """
    begin, found = time.monotonic(), check(target, checks)
    wrong = [case for case, entry in found.items() if not entry.get("holds")]
    text = f"cases of {len(found)} that are not the definition's"
    text += f" ({', '.join(wrong)})" if wrong else ""
    claims = [Claim(text, len(wrong), "<= 0", not wrong)]
    copy = timing.copy_rate(target.clock)
    metrics: dict[str, float] = {"copy/TB_s": copy / 1e12}
    reasons, rows = {}, []
    for work in workloads:
        if time.monotonic() - begin > 60 * config.minutes:
            reasons[work.name] = f"the {config.minutes:g} minutes were over"
            continue
        seconds, why = timed(target, work)
        reasons |= {f"{work.name}, {way}, {name}": x for (name, way), x in why.items()}
        claims += claims_of(target, work, seconds)
        for (name, way), taken in seconds.items():
            metrics[f"{work.name}/{way}/{name}/ms"] = 1e3 * taken
            share = taken / seconds.get((_own(work, target), way), np.nan)
            rows.append((work.name, way, name, f"{1e3 * taken:.3g}", f"{share:.3g}"))
    if lengths:
        more, claim = crossover(target, lengths)
        metrics, claims = metrics | more, [*claims, claim]
    run.table(target.name, ("workload", "way", "by", "ms", "its time / ours"), rows)
    for name, why in reasons.items():
        run.say(f"{name} is left out: {why}")
    name = re.sub(r"\W+", "_", target.name).strip("_").lower()
    for folder in (run.folder, *([timing.RESULTS] if config.record else [])):
        timing.write_record(
            folder / f"ssm_{name}.json", dataclasses.asdict(config), claims, metrics,
            reasons=reasons, checks=found,
        )  # fmt: skip
    return Report(claims, metrics, [])


def _own(work: Work, target: Target) -> str:
    """The kernel; what it does not take, as float32 in ssd, is XLA's."""
    takes = work.kind == SCAN or work.dtype != "float32"
    return target.own if takes else "xla"
