"""The grid of a TPU kernel: which blocks of which arrays each of its steps works on.

    grid (batch, part of the heads, block of tokens, block of lanes)

The last two are walked in order. What is read or written at one end of the sequence
alone stays at one block for all other steps, so that nothing is moved there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ssd.tpu_layout import CHUNK, ROWS, Plan

__all__ = ["Operand", "call"]


class Operand(NamedTuple):
    """An array, or the shape and dtype of a result, and how it is cut.

    Attributes:
        kind: "tokens", "rows", "groups", "sums by part", "lanes", "counts", "starts",
            "at the start", "at the end" or "lanes at the end".
        array: it.
    """

    kind: str
    array: Any


def call(
    kernel: Callable[[Plan, dict, dict, dict], None],
    name: str,
    cut: Plan,
    operands: dict[str, Operand],
    results: dict[str, Operand],
    scratch: dict[str, tuple[int, ...]],
    *,
    is_reversed: bool,
    products: int,
    interpret: Any,
) -> dict[str, jax.Array]:
    """Run a kernel over its grid.

    Args:
        kernel: takes `(cut, operands, results, scratch)`, references by name.
        name: of the kernel, in profiles.
        cut: how the call is cut.
        operands: what is read.
        results: what is written.
        scratch: shapes of float32 buffers.
        is_reversed: the last block of tokens comes first.
        products: matrix products of a chunk.
        interpret: True or `pltpu.InterpretParams`: run without a TPU.

    Returns:
        The results by name. The cost that the compiler is told counts operands and
        results once.
    """

    def body(*refs: Any) -> None:
        places = iter(refs)
        named = [
            dict(zip(names, places, strict=False))
            for names in (list(operands), list(results), list(scratch))
        ]
        kernel(cut, *named)

    arrays = [x.array for x in operands.values()]
    varies = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    axes = jax.sharding.ManualAxisType(varying=frozenset().union(*varies))
    outputs = [
        jax.ShapeDtypeStruct(x.array.shape, x.array.dtype, manual_axis_type=axes)
        for x in results.values()
    ]
    batch, parts, blocks, across = cut.grid
    steps = batch * parts * blocks * across * cut.chunks
    area = max(CHUNK, cut.states) * cut.lanes
    out = pl.pallas_call(
        body,
        out_shape=outputs,
        grid=cut.grid,
        in_specs=[_spec(cut, x.kind, is_reversed) for x in operands.values()],
        out_specs=[_spec(cut, x.kind, is_reversed) for x in results.values()],
        scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * CHUNK * area * steps,
            transcendentals=cut.per_block * CHUNK * CHUNK * steps,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs)),
        ),
        interpret=interpret,
        name=name,
    )(*arrays)
    return dict(zip(results, out, strict=True))


def _spec(cut: Plan, kind: str, is_reversed: bool) -> pl.BlockSpec:
    across, last = cut.across, cut.blocks - 1
    shapes: dict[str, tuple[int | None, ...]] = {
        "tokens": (None, cut.tokens, cut.lanes),
        "rows": (None, None, cut.chunks, ROWS, CHUNK),
        "groups": (None, None, cut.tokens, cut.states),
        "sums by part": (None, None, cut.tokens, cut.states),
        "lanes": (1, cut.lanes),
        "counts": (None, cut.chunks, 1, CHUNK),
        "starts": (None, None, cut.states, cut.lanes),
        "at the start": (None, cut.states, cut.lanes),
        "at the end": (None, cut.states, cut.lanes),
        "lanes at the end": (None, 1, cut.lanes),
    }

    def index(b: Any, s: Any, i: Any, j: Any) -> tuple[Any, ...]:
        t = last - i if is_reversed else i
        lanes = s * across + j
        # Not //, which takes a sign that not every TPU has.
        group = jax.lax.div(s, jnp.int32(cut.parts))
        at_end = (b, 0, s * across + jnp.where(i == last, j, 0))
        return {
            "tokens": (b, t, lanes),
            "rows": (b, lanes, t, 0, 0),
            "groups": (b, group, t, 0),
            "sums by part": (b, s, t, 0),
            "lanes": (0, lanes),
            "counts": (b, t, 0, 0),
            "starts": (b, t, 0, lanes),
            "at the start": (b, 0, s * across + jnp.where(i == 0, j, across - 1)),
            "at the end": at_end,
            "lanes at the end": at_end,
        }[kind]

    return pl.BlockSpec(shapes[kind], index)
