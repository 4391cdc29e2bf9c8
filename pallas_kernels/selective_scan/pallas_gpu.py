"""The selective scan for Hopper GPUs in Pallas, for real A and Euler's rule.

Forward, 32 channels and 32 tokens at a time: the state of a channel is in the registers
of four threads, and softplus, D and the gate are applied on the way. Where a gradient
follows, the states at the starts of chunks are kept.

Backward, from the last chunk to the first, with the formulas of `xla`: the states of a
chunk are made again from the kept one, in shared memory every 8 tokens, and the 8 in
registers. The exponential of a decay is so computed once forward and, but for the last
8 tokens of a chunk, twice backward. The gradients of B and C are summed over the
channels of a block; the sums of blocks are added up outside, in an order that does not
change, as are those of A, D and delta_bias.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.selective_scan.gpu_bodies import backward_body, forward_body
from pallas_kernels.selective_scan.gpu_plan import (
    CHUNK,
    GROUP,
    STATES,
    WIDTH,
    Plan,
    Room,
    Task,
    plan_of,
)
from pallas_kernels.selective_scan.gpu_tokens import LOG2E
from pallas_kernels.selective_scan.operands import Given, Made, gradients
from pallas_kernels.selective_scan.terms import Inputs, Rule

__all__ = ["backward", "forward", "forward_keeping", "unsupported"]

# Bytes of shared memory for the arrays of a block: such that two blocks fit on a core,
# and one computes while the other waits; if that cannot be, such that one does.
SHARED = (109 * 2**10, 223 * 2**10)
MOST = 128  # N at most: B, C and the states of a chunk are in shared memory
KINDS = (jnp.float32, jnp.bfloat16, jnp.float16)


def unsupported(rule: Rule, inputs: Inputs) -> str | None:
    """Why a call cannot run here, if so: as `pallas_tpu.unsupported`."""
    if jnp.iscomplexobj(inputs.A):
        return "the GPU kernel takes real A, and this is complex"
    if rule.zoh:
        return "the GPU kernel discretizes by Euler's rule, and this is 'zoh'"
    kinds = {x.dtype for x in inputs if x is not None and x.dtype != bool}
    odd = [str(k) for k in kinds if k not in KINDS]
    if odd:
        return f"the GPU kernel takes floats of at most 32 bits, and this has {odd[0]}"
    if 0 in inputs.u.shape or 0 in inputs.A.shape:
        return "the GPU kernel takes no empty arrays"
    if inputs.A.shape[1] > MOST:
        states = inputs.A.shape[1]
        return f"the GPU kernel takes N of at most {MOST}, and this is {states}"
    return mosaic_gpu.unavailable()


def forward(
    rule: Rule, inputs: Inputs, *, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """The scan; equals `ref.scan` wherever `unsupported` gives None.

    As `pallas_tpu.forward`, but `interpret` is what `mosaic_gpu.simulator` gives; None:
    compile.
    """
    y, end, _ = _forward(rule, inputs, False, interpret)
    return y, end


def forward_keeping(
    rule: Rule, inputs: Inputs, *, interpret: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, and the states at the starts of chunks, as `backward` takes them."""
    return _forward(rule, inputs, True, interpret)


def backward(
    rule: Rule,
    inputs: Inputs,
    kept: jax.Array,
    d_y: jax.Array,
    d_end: jax.Array,
    *,
    interpret: Any = None,
) -> Inputs:
    """The gradients of all inputs: as `pallas_tpu.backward`."""

    @sequential_vmap
    def call(*arrays: Any) -> Inputs:
        return _backward(rule, interpret, *arrays)

    return call(inputs, kept, d_y, d_end)


def _backward(
    rule: Rule, interpret: Any, inputs: Inputs, kept: Any, d_y: Any, d_end: Any
) -> Inputs:
    plan = plan_of(inputs)
    given = _given(plan, inputs)._replace(
        kept=kept, d_y=plan.by_token(d_y), d_end=plan.by_channel(d_end)
    )
    tokens, states = plan.tokens(), (plan.batch, plan.columns, *plan.tile())
    gates = {} if inputs.z is None else {"d_z": (tokens, inputs.z.dtype)}
    groups = plan.chunks * (CHUNK // GROUP)
    sums = (plan.batch, plan.columns, plan.parts, groups, 2 * GROUP, STATES)
    results = {
        "d_u": (tokens, inputs.u.dtype),
        "d_delta": (tokens, inputs.delta.dtype),
        **gates,
        "d_BC": (sums, jnp.float32),
        "d_A": (sums[:3] + (WIDTH, STATES), jnp.float32),
        "d_vectors": ((plan.batch, plan.columns, 2, GROUP, WIDTH), jnp.float32),
        "d_start": (states, jnp.float32),
    }
    rows = {"dt": 1, "x": 1, "slope": 1, "sums": 3 if gates else 2}
    more = {
        "starts": plgpu.SMEM((CHUNK // GROUP, WIDTH, 1, STATES), jnp.float32),
        # A row more keeps neighbouring channels in other banks.
        "products": plgpu.SMEM((WIDTH, 2 * GROUP + 1, STATES), jnp.float32),
        "d_A": plgpu.SMEM((plan.parts, WIDTH, STATES), jnp.float32),
        "sums": plgpu.SMEM((2, GROUP, WIDTH), jnp.float32),
    }
    task = Task(plan, rule.softplus)
    made = _call(backward_body, "selective_scan_backward", task, given, results, rows,
                 more, interpret)  # fmt: skip
    d_B, d_C = plan.from_sums(made.d_BC)
    vectors = jnp.sum(made.d_vectors, axis=(0, 3))
    return gradients(plan, made, inputs, d_B, d_C, vectors)


def _forward(rule: Rule, inputs: Inputs, keep: bool, interpret: Any) -> Any:
    @sequential_vmap
    def call(inputs: Inputs) -> Any:
        plan = plan_of(inputs)
        start = plan.by_channel(inputs.start)
        given = _given(plan, inputs)._replace(start=start)
        states = (plan.columns, *plan.tile())
        kept = (plan.batch, plan.chunks, *states)
        results = {
            "y": (plan.tokens(), inputs.u.dtype),
            "end": ((plan.batch, *states), jnp.float32),
            **({"kept": (kept, jnp.float32)} if keep else {}),
        }
        task = Task(plan, rule.softplus)
        made = _call(forward_body, "selective_scan", task, given, results,
                     {"dt": 1, "x": 1, "y": 1}, {}, interpret)  # fmt: skip
        return plan.from_token(made.y), plan.from_channel(made.end), made.kept

    return call(inputs)


def _given(plan: Plan, inputs: Inputs) -> Given:
    return Given(
        u=plan.by_token(inputs.u),
        delta=plan.by_token(inputs.delta),
        z=None if inputs.z is None else plan.by_token(inputs.z),
        B=plan.by_state(inputs.B),
        C=plan.by_state(inputs.C),
        marks=plan.marks(inputs.resets),
        A=plan.by_channel(inputs.A) * LOG2E,
        vectors=plan.vectors(inputs.D, inputs.delta_bias),
    )


def _call(
    body: Callable[..., None], name: str, task: Task, given: Given,
    results: dict[str, tuple[tuple[int, ...], Any]], rows: dict[str, int],
    more: dict[str, Any], interpret: Any,
) -> Made:  # fmt: skip
    """Run a kernel; `rows` and `more` are in shared memory, beside a ring."""
    plan = task.plan
    passes = 1 if body is forward_body else 3
    elements = plan.batch * plan.length * plan.columns * math.prod(plan.tile())
    shapes = {k: jax.ShapeDtypeStruct(*x) for k, x in results.items()}
    moved = [*jax.tree.leaves(given), *shapes.values()]
    out = {k: plgpu.SMEM((CHUNK, WIDTH), shapes[k].dtype)
           for k in ("y", "d_u", "d_delta", "d_z") if k in shapes}  # fmt: skip
    beside = {
        "carry": plgpu.SMEM(plan.tile(), jnp.float32),
        "rows": {
            k: plgpu.SMEM((n * CHUNK, WIDTH), jnp.float32) for k, n in rows.items()
        },
        "out": out,
        **more,
    }
    room = Room(ring=_ring(plan, given, _bytes(beside)), **beside)
    return mosaic_gpu.call(
        functools.partial(body, task), given, name=name, results=Made(**shapes),
        scratch=room, grid={"batch": plan.batch, "column": plan.columns}, warpgroups=1,
        cost=pl.CostEstimate(
            flops=6 * passes * elements,
            transcendentals=min(2, passes) * elements,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=interpret,
    )  # fmt: skip


def _ring(plan: Plan, given: Given, beside: int) -> mosaic_gpu.Ring:
    """Memory for what is walked over, in the order of `gpu_tokens.WALKED`.

    Args:
        plan: the sizes.
        given: the operands.
        beside: the bytes of what else is in shared memory.
    """
    rows, states = (CHUNK, WIDTH), (plan.parts, CHUNK, STATES)
    sizes = (
        (given.u, rows), (given.delta, rows), (given.z, rows), (given.d_y, rows),
        (given.B, states), (given.C, states), (given.marks, (CHUNK,)),
        (given.kept, plan.tile()),
    )  # fmt: skip
    buffers = [(plgpu.SMEM, size, x.dtype) for x, size in sizes if x is not None]
    stage = _bytes([jax.ShapeDtypeStruct(*x[1:]) for x in buffers])
    fits = (n for most in SHARED for n in (2, 1) if beside + n * stage <= most)
    return mosaic_gpu.ring(next(fits, 1), 1, *buffers)


def _bytes(arrays: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
