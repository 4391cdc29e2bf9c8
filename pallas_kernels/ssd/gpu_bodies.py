"""What the warpgroups of the GPU kernels do; `pallas_gpu` says what is computed.

Each body takes how the call is cut, the products, and three trees of references. A
warpgroup asks for copies itself, a ring ahead of where it computes: what hides their
time, and that of products, is the other warpgroup on the same multiprocessor, of
another block of threads in the forward pass, of the same one for the gradient.

What a product reads from shared memory was written by a copy, or by the warpgroup
before a `commit_smem`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import Products, full
from pallas_kernels.ssd.gpu_layout import (
    CHUNK,
    DT_ACROSS,
    DT_DOWN,
    ENDS,
    INTO,
    SQUARE,
    TOTAL,
    Plan,
)
from pallas_kernels.ssd.gpu_tiles import (
    WHOLE,
    Walk,
    across,
    decays,
    down,
    later,
    load_state,
    place,
    row,
    spread,
    tile,
    weighted,
)

__all__ = ["backward_body", "forward_body", "states_body"]


def states_body(
    cut: Plan, mma: Products, operands: Any, results: Any, scratch: Any, *,
    is_reversed: bool,
) -> None:  # fmt: skip
    """States alone, or the gradients of states: at the end of a part, and by chunk."""
    (rows, wide, numbers, start), (end, states) = operands, results
    ring, rows_here, state_here = scratch
    at = place(cut)
    weights = INTO if is_reversed else ENDS

    def step(chunk: Any, blocks: Any, done: Callable[[], None], state: Any) -> Any:
        x, b, of = blocks
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before
        rows_here[...] = weighted(x, of, weights)
        if states is not None:
            state_here[...] = state.astype(states.dtype)
        plgpu.commit_smem()
        if states is not None:
            plgpu.copy_smem_to_gmem(state_here, states.at[at.batch, chunk, at.column])
        state *= down(of, TOTAL, state.shape)
        state = mma.onto(state, rows_here.transpose((1, 0)), b)
        done()
        return state

    if start is None:
        state = full((CHUNK, cut.states), 0.0, WHOLE)
    else:
        state = load_state(at, start)
    sources = functools.partial(at.sources, rows, (wide,), numbers)
    walk = Walk(at.first, at.count, ring, sources, is_reversed)
    state = walk.run(step, state)
    end[at.batch, at.part, at.column] = state
    plgpu.wait_smem_to_gmem(0)


def forward_body(
    cut: Plan, mma: Products, operands: Any, results: Any, scratch: Any
) -> None:
    """y, the state after each part and, for the gradient, those before all chunks."""
    (x, b, c, numbers, start, skip), (y, end, starts) = operands, results
    ring, state_here, rows_here, skip_here = scratch
    at = place(cut)
    sources = functools.partial(at.sources, x, (b, c), numbers)
    dtype = x.dtype
    if skip is not None:
        skip_row, barrier = skip_here
        plgpu.copy_gmem_to_smem(skip.at[at.batch, at.column], skip_row, barrier)
        plgpu.barrier_wait(barrier)

    def step(chunk: Any, blocks: Any, done: Callable[[], None], state: Any) -> Any:
        x_block, b_block, c_block, of = blocks
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the chunk before
        state_here[...] = state.astype(dtype)
        rows_here[...] = weighted(x_block, of, ENDS)
        plgpu.commit_smem()
        if starts is not None:
            plgpu.copy_smem_to_gmem(state_here, starts.at[at.batch, chunk, at.column])
        out = mma.fresh(c_block, state_here.transpose((1, 0)), SQUARE)
        out *= down(of, INTO)
        state *= down(of, TOTAL, state.shape)
        state = mma.onto(state, rows_here.transpose((1, 0)), b_block)
        scores = mma.fresh(c_block, b_block.transpose((1, 0)), SQUARE)
        scores *= decays(of, after=0) * across(of, DT_ACROSS)
        out = mma.onto(out, scores.astype(dtype), x_block)
        if skip is not None:
            out += tile(x_block) * spread(skip_here[0])
        done()
        rows_here[...] = out.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows_here, y.at[*at.tokens(chunk), at.column])
        return state

    state = load_state(at, start)
    state = Walk(at.first, at.count, ring, sources).run(step, state)
    end[at.batch, at.part, at.column] = state
    plgpu.wait_smem_to_gmem(0)


def backward_body(
    cut: Plan, mma: Products, operands: Any, results: Any, scratch: Any
) -> None:
    """The gradients of x, b and c, and sums for those of dt and of decays.

    A block of threads owns one chunk, and walks over columns that share b and c. One
    of its warpgroups looks at tokens j that are read, with tiles of [j, i]; the other
    at tokens i that read, with tiles of [i, j].
    """
    x, g, b, c, numbers, starts, d_states, skip = operands
    d_x, d_b, d_c, of_read, of_reading = results
    ring, own, here, memory, memory_of_reading = scratch
    b_here, c_here = own
    batch, chunk, block = (lax.axis_index(n) for n in ("batch", "chunk", "set"))
    first, who = block * cut.share, lax.axis_index("warpgroup")
    tokens = batch, pl.ds(chunk * CHUNK, CHUNK)
    dtype, wide = x.dtype, (CHUNK, cut.states)

    def sources(column: Any) -> tuple[Any, ...]:
        return (
            *(a.at[batch, chunk, column] for a in (starts, d_states)),
            *(a.at[*tokens, column] for a in (x, g)),
            numbers.at[batch, lax.div(column, jnp.int32(cut.per_head)), chunk],
            *([] if skip is None else [skip.at[batch, column]]),
        )

    def read(column: Any, blocks: Any, done: Callable[[], None], d_wide: Any) -> Any:
        _, d_block, x_block, g_block, of, *skip_row = blocks
        _, rows_here, sums_here = memory
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the column before
        scores = mma.fresh(b_here, c_here.transpose((1, 0)), SQUARE)
        d_weights = mma.fresh(x_block, g_block.transpose((1, 0)), SQUARE)
        left = decays(of, after=1)
        scores *= left
        weights = scores.astype(dtype)
        scores *= d_weights
        d_scores = (d_weights * left * down(of, DT_DOWN)).astype(dtype)
        sums_here[0] = scores.sum(axis=1)
        sums_here[1] = jnp.where(later(1, strictly=True), scores, 0.0).sum(axis=1)
        d_rows = mma.fresh(weights, g_block, SQUARE) * down(of, DT_DOWN)
        ends = mma.fresh(b_here, d_block.transpose((1, 0)), SQUARE)
        sums_here[2] = (ends * tile(x_block)).sum(axis=1)
        d_rows += ends * down(of, ENDS)
        if skip_row:
            d_rows += tile(g_block) * spread(skip_row[0])
        d_wide = mma.onto(d_wide, weighted(x_block, of, ENDS), d_block)
        d_wide = mma.onto(d_wide, d_scores, c_here)
        done()
        rows_here[...] = d_rows.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(rows_here, d_x.at[*tokens, column])
        plgpu.copy_smem_to_gmem(sums_here, of_read.at[batch, column, chunk])
        return d_wide

    def reading(column: Any, blocks: Any, done: Callable[[], None], d_wide: Any) -> Any:
        h_block, d_block, x_block, g_block, of, *_ = blocks
        _, sums_here = memory_of_reading
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the column before
        sums_here[0] = (tile(h_block) * tile(d_block)).sum(axis=1) * row(of, TOTAL)
        scores = mma.fresh(c_here, b_here.transpose((1, 0)), SQUARE)
        d_scores = mma.fresh(g_block, x_block.transpose((1, 0)), SQUARE)
        d_scores *= decays(of, after=0) * across(of, DT_ACROSS)
        scores = jnp.where(later(0, strictly=True), scores * d_scores, 0.0)
        sums = scores.sum(axis=1)
        into = mma.fresh(c_here, h_block.transpose((1, 0)), SQUARE)
        sums_here[1] = sums + (into * tile(g_block)).sum(axis=1) * row(of, INTO)
        d_wide = mma.onto(d_wide, weighted(g_block, of, INTO), h_block)
        d_wide = mma.onto(d_wide, d_scores.astype(dtype), b_here)
        done()
        plgpu.copy_smem_to_gmem(sums_here, of_reading.at[batch, column, chunk])
        return d_wide

    def run(step: Callable[..., Any], memory: Any, result: Any, *, fills: bool) -> None:
        plgpu.barrier_wait(here)
        walk = Walk(first, cut.share, ring, sources)
        d_wide = walk.run(step, full(wide, 0.0, WHOLE), fills=fills)
        memory[...] = d_wide.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory, result.at[*tokens, block])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(who == 0)
    def _() -> None:
        run(read, memory[0], d_b, fills=False)

    @pl.when(who == 1)
    def _() -> None:
        group = lax.div(block * cut.share, jnp.int32(cut.per_group))
        for source, to in zip((b, c), own, strict=True):
            plgpu.copy_gmem_to_smem(source.at[*tokens, group], to, here)
        run(reading, memory_of_reading[0], d_c, fills=True)
