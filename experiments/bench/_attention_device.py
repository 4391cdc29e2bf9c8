"""Attention on a GPU: right first, then its blocks, then its time against others'."""

import dataclasses
import functools
import importlib
import pprint
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import _timing as timing
from experiments.bench._attention_calls import (
    CHECKS,
    COPY,
    DECODE,
    FLOPS,
    WORKLOADS,
    Call,
    Workload,
    figures,
    inputs,
    moved,
    work,
)
from experiments.bench._attention_contestants import Reasons, Seconds, ours, timed
from jaxzoo.training.mesh import PlacementError
from jaxzoo.training.record import Claim, Report, Run
from pallas_kernels.attention import IMPLEMENTATIONS, xla
from pallas_kernels.attention.pattern import Extras, Pattern

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
KERNELS = {"out": "forward", "dq": "backward", "dkv": "backward"}  # of `BLOCKS`
TRIED = Call(1, 8192, 16, 128)  # with which blocks are tried

Blocks = dict[str, dict[int, tuple[int, int]]]
Found = dict[str, dict[str, dict[str, Any]]]  # by implementation and case


class Target(NamedTuple):
    """What is timed, and how.

    Attributes:
        name: of the device.
        own: the implementation that the goals are for.
        kernels: the module with its `forward`, `backward`, `unsupported` and `BLOCKS`;
            None where there is none.
        clock: as `timing.queued`.
        memory: bytes that one program may take.
    """

    name: str
    own: str
    kernels: Any
    clock: Callable[..., float]
    memory: float


def gpu() -> Target:
    """The GPU of this machine.

    Raises:
        PlacementError: there is none.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        raise PlacementError(
            f"--device needs a GPU, and jax sees '{device.platform}' alone: install "
            "'jax[cuda13]' where there is a GPU, or leave --device out for the CPU."
        )
    own, kernels = "pallas_gpu", None
    if own in IMPLEMENTATIONS:
        kernels = importlib.import_module(f"pallas_kernels.attention.{own}")
    limit = (device.memory_stats() or {}).get("bytes_limit", 2**34)
    return Target(device.device_kind, own, kernels, timing.queued, 0.6 * limit)


def measure(
    config: Any, run: Run, target: Target, *, cases: Mapping[str, Call] = CHECKS,
    workloads: Sequence[Workload] = WORKLOADS, tried: Call = TRIED,
) -> Report:  # fmt: skip
    """Everything that --device does.

    Args:
        config: of `experiments.bench.attention`.
        run: the open run.
        target: what is timed.
        cases: calls that are compared with the definition.
        workloads: calls that are timed.
        tried: the call with which blocks are tried.
    """
    begin, clock = time.monotonic(), target.clock
    if target.kernels is None:
        run.say(
            f"There is no '{target.own}' in pallas_kernels.attention: no blocks are "
            "tried, no goal is claimed, and XLA and the peers are timed alone."
        )
    checks = check(target, cases)
    copy, matmul = timing.copy_rate(clock), timing.matmul_rate(clock)
    metrics = {"copy/TB_s": copy / 1e12, "matmul/TFLOP_s": matmul / 1e12}
    metrics["dispatch/us"] = 1e6 * timing.dispatch(clock)
    run.say(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    blocks, tries = sweep(target, config, tried)
    run.say(f"BLOCKS = {pprint.pformat(blocks)}")
    claims, reasons = check_claims(target, checks), {}
    more = {"blocks": blocks, "tries": tries, "reasons": reasons}
    more |= {"checks": {"attention": checks}}

    def record(folder: Any) -> None:
        name = re.sub(r"\W+", "_", target.name).strip("_").lower()
        path, settings = folder / f"attention_{name}.json", dataclasses.asdict(config)
        timing.write_record(path, settings, claims, metrics, **more)

    ratios, missing, rows = [], 0, []
    chosen = [x for x in workloads if x.name.split()[0] in config.only]
    for each in chosen:
        own = _own(each, target)
        seconds: Seconds = {}
        if time.monotonic() - begin < 60 * config.minutes:
            seconds, why = timed(
                each.call, _names(each, target), own=target.own, clock=clock,
                memory=target.memory,
            )  # fmt: skip
            reasons |= {f"{each.name}, {w}, {name}": x for (name, w), x in why.items()}
        else:
            reasons[each.name] = f"the {config.minutes:g} minutes were over"
        missing += (own, "forward") not in seconds
        claims += goal_claims(each, target, seconds, copy)
        for (name, way), taken in seconds.items():
            told = figures(each.call, name, way, taken, copy, matmul)
            metrics |= {f"{each.name}/{way}/{name}/{k}": x for k, x in told.items()}
            share = taken / seconds.get((own, way), np.nan)
            cells = [f"{x:.3g}" for x in (*told.values(), share)]
            rows.append((f"{each.name}, {way}, {name}", *cells))
            if name == "xla" and own != name and share > 0:
                ratios.append(1 / share)
        record(run.folder)  # what there is, should the time here end
    head = ("", "ms", "TFLOP/s or TB/s", "of the measured rate", "its time / ours")
    run.table(target.name, head, rows)
    for name, why in reasons.items():
        run.say(f"{name} is left out: {why}")
    text = f"workloads of {len(chosen)} that {target.own} did not run"
    claims.append(Claim(text, missing, "<= 0", missing == 0))
    if ratios:
        text = f"{target.own} over XLA at its slowest shape: time"
        claims.append(Claim(text, max(ratios), "<= 1", max(ratios) <= 1))
    for folder in (run.folder, *([timing.RESULTS] if config.record else [])):
        record(folder)
    return Report(claims, metrics, [])


def check(target: Target, cases: Mapping[str, Call]) -> Found:
    """How far ours and XLA are from the definition, by implementation and case."""
    names = [n for n in dict.fromkeys((target.own, "xla")) if n in IMPLEMENTATIONS]
    given = {case: inputs(call) for case, call in cases.items()}
    jobs = {
        (case, name): timing.Job(_output_and_gradients(call, name), given[case])
        for case, call in cases.items()
        for name in (*names, "ref")
    }
    programs, reasons = timing.compiled(jobs, memory=target.memory)
    found: Found = {name: {} for name in names}
    for case, call in cases.items():
        for name in names:
            try:
                got, wanted = (
                    _program(programs, reasons, (case, n))(*given[case])
                    for n in (name, "ref")
                )
                error = max(map(timing.far, got, wanted))
                held = {"error": error, "holds": error <= BOUNDS[call.dtype]}
                found[name][case] = held
            except Exception as problem:
                found[name][case] = {"reason": timing.reason(problem)}
    return found


def check_claims(target: Target, checks: Mapping[str, Any]) -> list[Claim]:
    claims = []
    for name, found in checks.items():
        ran = {case: entry for case, entry in found.items() if "error" in entry}
        wrong = [case for case, entry in ran.items() if not entry["holds"]]
        text = f"{name} on {target.name}: cases of {len(ran)} that are not the "
        text += "definition's" + (f" ({', '.join(wrong)})" if wrong else "")
        claims.append(Claim(text, len(wrong), "<= 0", bool(ran) and not wrong))
    return claims


def sweep(target: Target, config: Any, call: Call) -> tuple[Blocks, dict[str, str]]:
    """The fastest blocks of each kernel and head size, and what became of each pair.

    A kernel is tried within its whole pass, the others as they are. A pair that gives
    other numbers than XLA is not taken. The best ones are used from here on.
    """
    kernels, best, tries = target.kernels, {}, {}
    if kernels is None:
        return best, tries
    for width in config.widths:
        given, wanted = _passes(call._replace(width=width))
        jobs = {}
        for kind, way in KERNELS.items():
            for pair in dict.fromkeys((kernels.BLOCKS[kind][width], *config.blocks)):
                function = functools.partial(_tried, kernels, kind, pair)
                jobs[kind, pair] = timing.Job(function, given[way])
        programs, reasons = timing.compiled(jobs, memory=target.memory)
        taken: dict[str, dict[Any, float]] = {kind: {} for kind in KERNELS}
        for kind, pair in jobs:
            args, label = given[KERNELS[kind]], f"{kind} {width} {pair}"
            try:
                program = _program(programs, reasons, (kind, pair))
                error = max(map(timing.far, program(*args), wanted[KERNELS[kind]]))
                if error > BOUNDS["bfloat16"]:
                    raise ArithmeticError(f"differs from XLA by {error:.2g}")
                taken[kind][pair] = target.clock(functools.partial(program, *args))
                tries[label] = f"{1e3 * taken[kind][pair]:.4g} ms"
            except Exception as problem:
                tries[label] = timing.reason(problem)
        for kind, times in taken.items():
            if times:
                pair = min(times, key=times.__getitem__)
                best.setdefault(kind, {})[width] = kernels.BLOCKS[kind][width] = pair
    return best, tries


def goal_claims(
    each: Workload, target: Target, seconds: Seconds, copy: float
) -> list[Claim]:
    """The goals whose contestants ran; TFLOP/s are goals on Hopper."""
    claims = []
    for way, of, bound in each.goals:
        mine, theirs = (seconds.get((n, way)) for n in (_own(each, target), of))
        if mine is None:
            continue
        if of == FLOPS:
            if not re.search(r"H[128]00|H20\b", target.name):
                continue
            measured, what = work(each.call, way) / mine / 1e12, of
        elif of == COPY:
            measured, what = moved(each.call) / mine / copy, "share of the copy rate"
        elif theirs is None:
            continue
        else:
            measured, what = theirs / mine, f"speed over {of}"
        text = f"{each.name}, {way}: {what}"
        claims.append(Claim(text, measured, f">= {bound:g}", measured >= bound))
    return claims


def _own(each: Workload, target: Target) -> str:
    return DECODE if each.call.page else target.own


def _names(each: Workload, target: Target) -> list[str]:
    """The contestants: ours, XLA and the peers."""
    others = each.peers if each.call.page else ("xla", *each.peers)
    return list(dict.fromkeys((_own(each, target), *others)))


def _output_and_gradients(call: Call, name: str) -> Callable[..., list[jax.Array]]:
    """`((q, k, v, d_out), beside)` to out and the gradients of q, k, v and sinks."""
    function = ours(call, name)

    def both(arrays: Any, beside: dict[str, Any]) -> list[jax.Array]:
        q, k, v, d_out = arrays
        sinks = {n: x for n, x in beside.items() if n == "sinks"}

        def attend(q: Any, k: Any, v: Any, sinks: Any) -> jax.Array:
            return function(q, k, v, {**beside, **sinks})

        out, pull = jax.vjp(attend, q, k, v, sinks)
        return jax.tree.leaves((out, pull(d_out)))

    return both


def _passes(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernels of each way take, and what XLA makes of it."""
    (q, k, v, d_out), _ = inputs(call)
    q, k, v, d_out = (x.transpose(0, 2, 1, 3) for x in (q, k, v, d_out))
    q, d_out = q[:, :, None], d_out[:, :, None]
    pattern = Pattern(call.width**-0.5, right=0)

    @jax.jit
    def whole(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        attend = functools.partial(xla.attend, pattern, extras=Extras())
        (out, lse), back = jax.vjp(attend, q, k, v)
        gradients = back((d_out.astype(out.dtype), jnp.zeros_like(lse)))
        return out.astype(q.dtype), lse, gradients

    out, lse, gradients = whole(q, k, v, d_out)
    given = {"forward": (q, k, v), "backward": (q, k, v, out, lse, d_out)}
    return given, {"forward": (out, lse), "backward": gradients}


def _tried(kernels: Any, kind: str, pair: tuple[int, int], *args: Any) -> Any:
    """A pass of the kernels, traced with a pair of blocks for one of them."""
    q, k, v, *saved = args
    pattern, before = Pattern(q.shape[-1] ** -0.5, right=0), kernels.BLOCKS[kind]
    if why := kernels.unsupported(pattern, q, k, v, Extras()):
        raise NotImplementedError(why)
    kernels.BLOCKS[kind] = {**before, q.shape[-1]: pair}
    try:
        if KERNELS[kind] == "forward":
            return kernels.forward(pattern, q, k, v, Extras())
        return kernels.backward(pattern, q, k, v, Extras(), *saved, None)[:3]
    finally:
        kernels.BLOCKS[kind] = before


def _program(programs: Mapping[Any, Any], reasons: Reasons, key: Any) -> Any:
    if key in reasons:
        raise timing.LeftOut(reasons[key])
    return programs[key]
