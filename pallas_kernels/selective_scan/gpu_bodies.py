"""What a block of threads of the GPU kernels does; `pallas_gpu` says what is computed.

The recurrence goes 8 tokens at a time, with their states in registers. Each write to
shared memory is a meeting of all threads, so that what several tokens give is written
together.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import full
from pallas_kernels.selective_scan.gpu_plan import (
    CHUNK,
    CHUNK_OF,
    GROUP,
    STATE,
    STATES,
    WIDTH,
    Room,
    Task,
)
from pallas_kernels.selective_scan.gpu_tokens import (
    LN2,
    Block,
    Tokens,
    from_shared,
    group,
    joined,
    logistic,
    over_channels,
    put,
    wide,
)
from pallas_kernels.selective_scan.operands import Given, Made

__all__ = ["backward_body", "forward_body"]


def forward_body(task: Task, given: Given, made: Made, room: Room) -> None:
    """y, and the states at the starts of chunks if they are to be kept."""
    block, rows = Block(task, given, room.ring, False), room.rows
    block.parts(lambda n: put(room.carry, n, block.states(given.start, n)))

    def chunk(number: Any, arrays: dict[str, Any]) -> None:
        dt, u, _ = block.steps(number, arrays)
        rows["dt"][...] = dt
        rows["x"][...] = dt * u
        block.clear(rows["y"])

        def part(n: Any) -> None:
            tokens = Tokens(rows, arrays, n, block.rates(n))

            def forth(k: Any, h: jax.Array) -> jax.Array:
                h, steps = tokens.forth(k, h)
                block.add(rows["y"], group(k), steps.after * tokens.along("C", k))
                return h

            h = from_shared(room.carry, n)
            if made.kept is not None:
                made.kept[block.batch, number, block.column, n] = h
            put(room.carry, n, lax.fori_loop(0, CHUNK // GROUP, forth, h))

        block.parts(part)
        y = wide(rows["y"]) + wide(arrays["u"]) * block.skip
        if given.z is not None:
            z = wide(arrays["z"])
            y = y * (z * logistic(z))
        plgpu.wait_smem_to_gmem(0)
        room.out["y"][...] = y.astype(made.y.dtype)
        block.copy_out(room.out, made, number)

    block.walk(chunk)

    def last(n: Any) -> None:
        made.end[block.batch, block.column, n] = from_shared(room.carry, n)

    block.parts(last)


def backward_body(task: Task, given: Given, made: Made, room: Room) -> None:
    """The gradients, with the formulas of `xla`; chunks from the last to the first."""
    block, rows = Block(task, given, room.ring, True), room.rows
    kinds = 2 if given.z is None else 3  # of sums over states: of d_x, d_dt and y

    def first(n: Any) -> None:
        put(room.carry, n, block.states(given.d_end, n))
        room.d_A[n] = full((WIDTH, STATES), 0.0, STATE.reduce(1))

    block.parts(first)
    for i in range(2):
        room.sums[i] = full((GROUP, WIDTH), 0.0, CHUNK_OF)

    def chunk(number: Any, arrays: dict[str, Any]) -> None:
        _rows_before(block, rows, number, arrays)
        block.clear(rows["sums"])

        def part(n: Any) -> None:
            tokens = Tokens(rows, arrays, n, block.rates(n))
            _starts(room.starts, tokens, from_shared(arrays["kept"], n))

            def back(k: Any, carry: Any) -> Any:
                k = CHUNK // GROUP - 1 - k
                _, steps = tokens.forth(k, from_shared(room.starts, k))
                B, C = tokens.along("B", k), tokens.along("C", k)
                dy = tokens.row("slope", k)
                g, d_A = carry
                slope, gs, qs = C * dy, [g] * GROUP, [g] * GROUP
                for i in reversed(range(GROUP)):
                    gs[i] = g + slope[:, i : i + 1]
                    qs[i] = gs[i] * steps.power[:, i : i + 1]
                    g = tokens.kept(qs[i], k * GROUP + i)
                gradients, q = joined(gs), joined(qs) * steps.before
                at = number * (CHUNK // GROUP) + k
                both = joined([gradients * steps.x, steps.after * dy])
                at = block.batch, block.column, n, at
                made.d_BC[at] = over_channels(room.products, both)
                sums = (gradients * B, q * tokens.A, steps.after * C)[:kinds]
                block.add(rows["sums"], group(k, kinds), joined(list(sums)))
                return g, d_A + jnp.sum(q * steps.dt, axis=1)

            g = from_shared(room.carry, n)
            d_A = plgpu.load(room.d_A.at[n], layout=STATE.reduce(1))
            g, d_A = lax.fori_loop(0, CHUNK // GROUP, back, (g, d_A))
            put(room.carry, n, g)
            room.d_A[n] = d_A

        block.parts(part)
        plgpu.wait_smem_to_gmem(0)
        _rows_after(block, room, made, number, arrays)
        block.copy_out(room.out, made, number)

    block.walk(chunk)

    def last(n: Any) -> None:
        at = block.batch, block.column, n
        made.d_start[at] = from_shared(room.carry, n)
        made.d_A[at] = plgpu.load(room.d_A.at[n], layout=STATE.reduce(1))

    block.parts(last)
    for i in range(2):
        made.d_vectors[block.batch, block.column, i] = wide(room.sums.at[i])


def _starts(starts: Any, tokens: Tokens, h: jax.Array) -> None:
    """The states before each group of tokens, from that before the chunk."""

    def forth(k: Any, h: jax.Array) -> jax.Array:
        put(starts, k, h)
        return tokens.forth(k, h)[0]

    last = CHUNK // GROUP - 1
    put(starts, last, lax.fori_loop(0, last, forth, h))


def _rows_before(
    block: Block, rows: dict[str, Any], number: Any, arrays: dict[str, Any]
) -> None:
    """What the recurrence takes: step sizes, times u, and the gradient of C h."""
    dt, u, _ = block.steps(number, arrays)
    slope = wide(arrays["d_y"])
    if "z" in arrays:
        z = wide(arrays["z"])
        slope = slope * (z * logistic(z))
    rows["dt"][...] = dt
    rows["x"][...] = dt * u
    rows["slope"][...] = slope


def _rows_after(
    block: Block, room: Room, made: Made, number: Any, arrays: dict[str, Any]
) -> None:
    """What follows from its sums over states: the gradients of u, delta and z."""
    kinds, sums = 3 if "z" in arrays else 2, room.rows["sums"]

    def of_kind(i: int) -> jax.Array:
        places = range(i * GROUP, kinds * CHUNK, kinds * GROUP)
        return jnp.concatenate([wide(sums.at[pl.ds(x, GROUP)]) for x in places])

    dt, u, raw = block.steps(number, arrays)
    slope, d_x = wide(room.rows["slope"]), of_kind(0)
    d_u = d_x * dt + slope * block.skip
    d_delta = d_x * u + of_kind(1) * LN2
    if block.softplus:
        d_delta = d_delta * logistic(raw)
    d_delta = block.counted(d_delta, number)
    room.out["d_u"][...] = d_u.astype(made.d_u.dtype)
    room.out["d_delta"][...] = d_delta.astype(made.d_delta.dtype)
    if "z" in arrays:
        z, gate = wide(arrays["z"]), logistic(wide(arrays["z"]))
        d_gated = wide(arrays["d_y"]) * (of_kind(2) + u * block.skip)
        d_z = d_gated * gate * (1.0 + z * (1.0 - gate))
        room.out["d_z"][...] = d_z.astype(made.d_z.dtype)
    for i, more in enumerate((slope * u, d_delta)):
        total = wide(room.sums.at[i])
        for k in range(0, CHUNK, GROUP):
            total = total + more[k : k + GROUP]
        room.sums[i] = total
