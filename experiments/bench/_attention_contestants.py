"""One call of attention in each library, on the same arrays, and the time it takes."""

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import _timing as timing
from experiments.bench._attention_calls import (
    CUDNN,
    DECODE,
    FULL,
    PEERS,
    TORCH,
    Call,
    counts,
    inputs,
)
from pallas_kernels.attention import attention, decode_attention

WAYS = ("forward", "backward")
BOUND = 3e-2  # on what contestants may differ by, in half precision

Function = Callable[..., Any]
Seconds = dict[tuple[str, str], float]  # by contestant and way
Reasons = dict[Any, str]


def ours(call: Call, name: Any) -> Function:
    """`(q, k, v, beside) -> out` by one of our implementations."""

    def attend(q: Any, k: Any, v: Any, beside: dict[str, Any]) -> jax.Array:
        others = dict(beside)
        if call.drop:
            others["dropout"] = (call.drop, others.pop("key"))
        return attention(
            q, k, v, is_causal=call.causal, window=call.window,
            logit_softcap=call.softcap, implementation=name, **others,
        )  # fmt: skip

    return attend


def contestant(
    name: str, call: Call, own: str
) -> tuple[Function, dict[str, jax.Array]]:
    """`(q, k, v, beside) -> out` of one contestant, and what it needs beside them.

    Args:
        name: one of ours or of jax.nn's, or "full".
        call: what is called.
        own: the implementation that "full" is of, without the groups.
    """
    if name == FULL:
        return ours(call._replace(group=0), own), {}
    if name not in PEERS:
        return ours(call, name), inputs(call)[1]
    beside = {}
    if call.documents > 1:  # it has no segments, but a mask
        places = jnp.arange(call.length)
        beside["mask"] = counts(call, places[:, None], places[None])[None, None]

    def attend(q: Any, k: Any, v: Any, beside: dict[str, Any]) -> jax.Array:
        window: Any = call.window
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=call.causal, local_window_size=window,
            implementation="cudnn" if name == CUDNN else "xla", **beside,
        )  # fmt: skip

    return attend, beside


def halves(function: Function) -> tuple[Function, Function]:
    """The forward pass with what it keeps, and the gradient from that alone."""
    trees = []

    def keep(q: Any, k: Any, v: Any, beside: Any) -> tuple[Any, list[Any]]:
        out, pull = jax.vjp(lambda *args: function(*args, beside), q, k, v)
        leaves, tree = jax.tree.flatten(pull)
        trees.append(tree)
        return out, leaves

    def gradient(leaves: list[Any], d_out: Any) -> Any:
        return jax.tree.unflatten(trees[-1], leaves)(d_out)

    return keep, gradient


def paged(call: Call) -> tuple[Function, tuple[jax.Array, ...]]:
    """Decoding from a cache whose pages lie in any order, and its arguments."""
    (q, k, v, _), _ = inputs(call)
    count = call.keys // call.page
    places = jax.random.permutation(jax.random.key(2), call.batch * count)
    # Place p holds the page whose place is p.
    order, pages = jnp.argsort(places), places.reshape(call.batch, count)
    k, v = (x.reshape(-1, call.page, *x.shape[2:])[order] for x in (k, v))
    lengths = jnp.full((call.batch,), call.keys)

    def decode(q: Any, k: Any, v: Any, lengths: Any, pages: Any) -> jax.Array:
        return decode_attention(q, k, v, lengths, pages=pages)

    return decode, (q, k, v, lengths, pages)


def timed(
    call: Call,
    names: Sequence[str],
    *,
    own: str,
    clock: Callable[..., float],
    memory: float,
) -> tuple[Seconds, Reasons]:
    """Times contestants forward and backward.

    Args:
        call: what is called.
        names: of the contestants; the others' numbers are compared with the first's.
        own: the implementation that "full" is of.
        clock: as `timing.queued`.
        memory: bytes that one program may take.

    Returns:
        `(seconds, reasons)` by contestant and way: each is in one of them.
    """
    arrays, _ = inputs(call)
    jobs: dict[Any, timing.Job] = {}
    reasons: Reasons = {}
    ways = WAYS[:1] if call.page else WAYS
    for name in names:
        try:
            jobs |= {} if name == TORCH else _jobs(name, call, own, arrays)
        except Exception as problem:
            reasons |= dict.fromkeys(((name, w) for w in ways), timing.reason(problem))
    programs, failed = timing.compiled(jobs, memory=memory)
    for (name, way), why in failed.items():
        reasons[name, "backward" if way == "keep" else way] = why
    seconds: Seconds = {}
    first = None
    for name in names:
        for way in ways:
            if (name, way) in reasons:
                continue
            try:
                if name == TORCH:
                    torch = in_torch(call, arrays)
                    send, wait = getattr(torch, way), torch.wait
                else:
                    send = _sender(programs, jobs, name, way)
                    wait = jax.block_until_ready
                if way == "forward" and name != FULL:
                    value = _some(name, send())
                    first = value if first is None else first
                    if (error := timing.far(value, first)) > BOUND:
                        raise ArithmeticError(f"differs from the first by {error:.2g}")
                seconds[name, way] = clock(send, wait=wait)
            except Exception as problem:
                reasons[name, way] = timing.reason(problem)
    return seconds, reasons


class Torch(NamedTuple):
    """A call in PyTorch; arrays are `[B, N, T, H]` there.

    Attributes:
        forward: gives the output, and keeps nothing.
        backward: gives the gradients, from a forward pass made before.
        both: makes both, and gives the output and the gradients.
        wait: waits for the device.
    """

    forward: Callable[[], Any]
    backward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any]


def in_torch(call: Call, arrays: tuple[jax.Array, ...]) -> Torch:
    """The call in PyTorch, on the same numbers.

    Raises:
        ImportError: torch is not installed.
    """
    torch: Any = importlib.import_module("torch")
    sdpa = importlib.import_module("torch.nn.functional").scaled_dot_product_attention
    torch.set_num_threads(os.cpu_count() or 1)
    q, k, v, d_out = (torch.from_dlpack(x).transpose(1, 2).contiguous() for x in arrays)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask = None
    if call.window is not None or call.documents > 1:
        places = torch.arange(call.length, device=q.device)
        mask = counts(call, places[:, None], places[None])[None, None]
    knobs = {"attn_mask": mask, "is_causal": call.causal and mask is None}
    if call.key_heads:
        knobs["enable_gqa"] = True

    def whole() -> Any:
        return sdpa(q, k, v, **knobs)

    def forward() -> Any:
        with torch.no_grad():
            return whole()

    def gradients(out: Any, **more: Any) -> Any:
        return torch.autograd.grad(out, (q, k, v), d_out, **more)

    kept: list[Any] = []

    def backward() -> Any:
        if not kept:
            kept.append(whole())
        return gradients(kept[0], retain_graph=True)

    def both() -> Any:
        out = whole()
        return out.detach(), gradients(out)

    def wait(_: Any) -> None:
        if q.is_cuda:
            torch.cuda.synchronize()

    return Torch(forward, backward, both, wait)


def _jobs(
    name: str, call: Call, own: str, arrays: tuple[jax.Array, ...]
) -> dict[tuple[str, str], timing.Job]:
    if name == DECODE:
        return {(name, "forward"): timing.Job(*paged(call))}
    function, beside = contestant(name, call, own)
    args = (*arrays[:3], beside)
    jobs = {(name, "forward"): timing.Job(function, args)}
    if call.page:
        return jobs
    keep, gradient = halves(function)
    _, kept = jax.eval_shape(keep, *args)
    jobs[name, "keep"] = timing.Job(keep, args)
    jobs[name, "backward"] = timing.Job(gradient, (kept, arrays[3]))
    return jobs


def _sender(
    programs: Mapping[Any, Any], jobs: Mapping[Any, timing.Job], name: str, way: str
) -> Callable[[], Any]:
    """Sends one call; backward, from what one forward pass has kept."""
    if way == "forward":
        return functools.partial(programs[name, way], *jobs[name, way].args)
    _, kept = programs[name, "keep"](*jobs[name, "keep"].args)
    return functools.partial(programs[name, way], kept, jobs[name, way].args[1])


def _some(name: str, out: Any) -> np.ndarray:
    """A few rows of an output `[B, T, N, H]`, in torch `[B, N, T, H]`."""
    out = out.transpose(1, 2) if name == TORCH else out
    some = out[:4, :: max(1, out.shape[1] // 64)]
    return some.float().cpu().numpy() if name == TORCH else np.asarray(some, np.float32)
