"""The selective scan for TPU in Pallas, for real A and Euler's rule.

Forward, a block of 256 tokens at a time: the state is [N, channels], one token is a few
vector operations on it, and softplus, D and the gate are applied to the block on the
way. Where a gradient follows, the states at the starts of blocks are kept.

Backward, from the last block to the first: the states of a block are made again from
the kept one, in scratch memory, and then it is walked back with the formulas of `xla`.
Every array moves once in each direction; nothing of T x D x N leaves the chip.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.operands import Given, Made, gradients
from pallas_kernels.selective_scan.terms import Inputs, Rule
from pallas_kernels.selective_scan.tpu_bodies import Task, backward_body, forward_body
from pallas_kernels.selective_scan.tpu_plan import LANES, Plan, plan_of

__all__ = ["backward", "forward", "forward_keeping", "unsupported"]

STATES = 256  # N at most
CHANNELS = 2**20  # N D at most: A, its gradient and the carry are in vector memory


def unsupported(rule: Rule, inputs: Inputs) -> str | None:
    """Why a call cannot run here.

    Args:
        rule: the static part.
        inputs: the arrays.

    Returns:
        One sentence, or None if the call can run.
    """
    if jnp.iscomplexobj(inputs.A):
        return "the TPU kernel takes real A, and this is complex"
    if rule.zoh:
        return "the TPU kernel discretizes by Euler's rule, and this is 'zoh'"
    kinds = {x.dtype for x in inputs if x is not None and x.dtype != bool}
    odd = [str(k) for k in kinds if k not in (jnp.float32, jnp.bfloat16)]
    if odd:
        return f"the TPU kernel takes float32 and bfloat16, and this has {odd[0]}"
    if 0 in inputs.u.shape or 0 in inputs.A.shape:
        return "the TPU kernel takes no empty arrays"
    states = inputs.A.shape[1]
    if states > STATES:
        return f"the TPU kernel takes N of at most {STATES}, and this is {states}"
    plan = plan_of(inputs)
    if plan.columns * plan.width * plan.rows > CHANNELS:
        return f"the TPU kernel takes N times D of at most {CHANNELS}"
    return None


def forward(
    rule: Rule, inputs: Inputs, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """The scan; equals `ref.scan` wherever `unsupported` gives None.

    Args:
        rule: the static part.
        inputs: the arrays.
        interpret: True or `pltpu.InterpretParams`: run without a TPU.

    Returns:
        `(y, end)`: `[B, T, G, P]` in the dtype of u, and `[B, G, N, P]` float32.
    """
    y, end, _ = _forward(rule, inputs, False, interpret)
    return y, end


def forward_keeping(
    rule: Rule, inputs: Inputs, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same, and the states at the starts of blocks, as `backward` takes them."""
    return _forward(rule, inputs, True, interpret)


def backward(
    rule: Rule,
    inputs: Inputs,
    kept: jax.Array,
    d_y: jax.Array,
    d_end: jax.Array,
    *,
    interpret: Any = False,
) -> Inputs:
    """The gradients of all inputs.

    Args:
        rule: the static part.
        inputs: those of the forward pass.
        kept: what `forward_keeping` gave.
        d_y: `[B, T, G, P]`.
        d_end: `[B, G, N, P]`.
        interpret: True or `pltpu.InterpretParams`: run without a TPU.

    Returns:
        A gradient for each array in its dtype; None for `resets`.
    """
    plan = plan_of(inputs)
    given = _given(plan, inputs)._replace(
        kept=kept, d_y=plan.by_token(d_y), d_end=plan.by_channel(d_end)
    )
    kinds = {
        "d_u": ("token", inputs.u.dtype),
        "d_delta": ("token", inputs.delta.dtype),
        **({} if inputs.z is None else {"d_z": ("token", inputs.z.dtype)}),
        "d_B": ("lane", jnp.float32),
        "d_C": ("lane", jnp.float32),
        "d_A": ("row", jnp.float32),
        "d_vectors": ("row vectors", jnp.float32),
        "d_start": ("last", jnp.float32),
    }
    room = (plan.size + 1, plan.rows, plan.width)
    body = functools.partial(backward_body, Task(plan, rule.softplus))
    made = _call(
        body, "selective_scan_backward", plan, given, kinds, [room], True, interpret
    )
    d_B, d_C = plan.from_lane(made.d_B), plan.from_lane(made.d_C)
    vectors = jnp.sum(made.d_vectors, axis=0)
    return gradients(plan, made, inputs, d_B, d_C, vectors)


def _forward(rule: Rule, inputs: Inputs, keep: bool, interpret: Any) -> Any:
    plan = plan_of(inputs)
    kinds = {
        "y": ("token", inputs.u.dtype),
        "end": ("last", jnp.float32),
        **({"kept": ("kept", jnp.float32)} if keep else {}),
    }
    body = functools.partial(forward_body, Task(plan, rule.softplus))
    made = _call(
        body, "selective_scan", plan, _given(plan, inputs), kinds, [], False, interpret
    )
    return plan.from_token(made.y), plan.from_channel(made.end), made.kept


def _given(plan: Plan, inputs: Inputs) -> Given:
    marks = None
    if inputs.resets is not None:
        late = ((0, 0), (0, plan.whole - plan.length))
        marks = jnp.pad(inputs.resets.astype(jnp.float32), late)
        marks = marks.reshape(plan.batch, -1, 1, LANES)
    return Given(
        u=plan.by_token(inputs.u),
        delta=plan.by_token(inputs.delta),
        z=None if inputs.z is None else plan.by_token(inputs.z),
        B=plan.by_lane(inputs.B),
        C=plan.by_lane(inputs.C),
        marks=marks,
        A=plan.by_channel(inputs.A),
        vectors=plan.vectors(inputs.D, inputs.delta_bias),
        start=plan.by_channel(inputs.start),
    )


def _call(
    body: Callable[..., None],
    name: str,
    plan: Plan,
    given: Given,
    kinds: dict[str, tuple[str, Any]],
    room: list[tuple[int, ...]],
    backwards: bool,
    interpret: Any,
) -> Made:
    """Run a kernel over the grid; `kinds` are those of its results, and their dtypes.

    The cost that the compiler is told counts every operand and result once: so they do
    move.
    """
    names = list(kinds)
    of_given = (
        *("token",) * 3, *("lane",) * 2, "mark", "all", "vectors", "first",
        "kept", "token", "first",
    )  # fmt: skip
    if backwards:
        given = given._replace(start=None)
    specs = [
        None if x is None else plan.spec(kind, backwards=backwards)
        for kind, x in zip(of_given, given, strict=True)
    ]
    varies = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(given)]
    axes = jax.sharding.ManualAxisType(varying=frozenset().union(*varies))
    results = [
        jax.ShapeDtypeStruct(plan.shape(kind), dtype, manual_axis_type=axes)
        for kind, dtype in kinds.values()
    ]

    def run(given: Given, *refs: Any) -> None:
        made = Made(**dict(zip(names, refs, strict=False)))
        body(given, made, *refs[len(names) :])

    carry = (plan.columns, plan.rows, plan.width)
    passes = 3 if backwards else 1
    elements = plan.batch * plan.whole * plan.columns * plan.width * plan.rows
    leaves = [*jax.tree.leaves(given), *results]
    made = pl.pallas_call(
        run,
        out_shape=results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=plan.grid,
            in_specs=[Given(*specs)],
            out_specs=[plan.spec(k, backwards=backwards) for k, _ in kinds.values()],
            scratch_shapes=[pltpu.VMEM(x, jnp.float32) for x in (carry, *room)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_room(plan, [carry, *room]),
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * passes * elements,
            transcendentals=min(2, passes) * elements,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in leaves),
        ),
        interpret=interpret,
        name=name,
    )(given)
    return Made(**dict(zip(names, made, strict=True)))


def _room(plan: Plan, scratch: list[tuple[int, ...]]) -> int | None:
    """Vector memory to ask for; None where the usual 16 MiB do."""
    rows = plan.size * plan.width * 4
    lanes = plan.size * plan.rows * 4
    states = plan.columns * plan.rows * plan.width * 4
    blocks = 2 * (8 * rows + 4 * lanes + 2 * states)
    total = blocks + sum(4 * math.prod(x) for x in scratch)
    return None if total < 12 * 2**20 else total + 8 * 2**20
