"""What a TPU does at one step of the grid: a block of tokens of a block of channels.

Tokens go 16 at a time: that many rows are an aligned load in every dtype, and the loop
over them is unrolled.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan.operands import Given, Made
from pallas_kernels.selective_scan.tpu_plan import LANES, Plan

__all__ = ["Task", "backward_body", "forward_body"]

GROUP = 16


class Task(NamedTuple):
    """What is static in a kernel."""

    plan: Plan
    softplus: bool


def forward_body(task: Task, given: Given, made: Made, carry: Any) -> None:
    """y of the block; `carry` holds the states of all channels."""
    step, column = pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def _() -> None:
        carry[column] = given.start[...]

    if made.kept is not None:
        made.kept[...] = carry[column]
    A, skip = given.A[column], given.vectors[column, 0:1, :]

    def group(k: Any, h: jax.Array) -> jax.Array:
        rows = _Rows(task, given, k, step, column)
        B, C, marks = rows.lanes(given.B), rows.lanes(given.C), rows.marks()
        out = []
        for i in range(GROUP):
            h = _forgotten(h, marks, i)
            power = jnp.exp(rows.dt[i : i + 1] * A)
            h = power * h + rows.x[i : i + 1] * B[:, i : i + 1]
            out.append(jnp.sum(h * C[:, i : i + 1], axis=0, keepdims=True))
        y = jnp.concatenate(out, axis=0) + rows.u * skip
        if given.z is not None:
            z = rows.of(given.z)
            y = y * (z * lax.logistic(z))
        made.y[rows.place, :] = y.astype(made.y.dtype)
        return h

    h = lax.fori_loop(0, task.plan.size // GROUP, group, carry[column])
    carry[column] = h

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        made.end[...] = h


def backward_body(
    task: Task, given: Given, made: Made, carry: Any, states: Any
) -> None:
    """The gradients of the block, with the formulas of `xla`.

    Args:
        task: the static part.
        given: references.
        made: references.
        carry: the gradients of the states of all channels.
        states: room for those before the block's first token, and after each.
    """
    plan = task.plan
    step, column = pl.program_id(1), pl.program_id(2)
    block = plan.blocks - 1 - step

    @pl.when(step == 0)
    def _() -> None:
        carry[column] = given.d_end[...]
        made.d_A[column] = jnp.zeros(made.d_A.shape[1:], jnp.float32)
        made.d_vectors[column] = jnp.zeros(made.d_vectors.shape[1:], jnp.float32)

    @pl.when(lax.rem(column, plan.across) == 0)
    def _() -> None:
        made.d_B[...] = jnp.zeros_like(made.d_B)
        made.d_C[...] = jnp.zeros_like(made.d_C)

    A, skip = given.A[column], given.vectors[column, 0:1, :]
    states[0] = given.kept[...]

    def again(k: Any, h: jax.Array) -> jax.Array:
        rows = _Rows(task, given, k, block, column)
        B, marks = rows.lanes(given.B), rows.marks()
        for i in range(GROUP):
            h = _forgotten(h, marks, i)
            power = jnp.exp(rows.dt[i : i + 1] * A)
            h = power * h + rows.x[i : i + 1] * B[:, i : i + 1]
            states[k * GROUP + i + 1] = h
        return h

    groups = plan.size // GROUP
    lax.fori_loop(0, groups, again, given.kept[...])
    lane = lax.broadcasted_iota(jnp.int32, (plan.rows, LANES), 1)

    def group(k: Any, sums: Any) -> Any:
        k = groups - 1 - k
        rows = _Rows(task, given, k, block, column)
        g, d_A, d_skip, d_bias = sums
        B, C, marks = rows.lanes(given.B), rows.lanes(given.C), rows.marks()
        d_y = rows.of(given.d_y)
        slope = d_y
        if given.z is not None:
            z = rows.of(given.z)
            gate = lax.logistic(z)
            slope = d_y * (z * gate)
        tile = lax.div(k, LANES // GROUP)
        first = lax.rem(k, LANES // GROUP) * GROUP
        d_B, d_C = made.d_B[tile], made.d_C[tile]
        d_u: Any
        d_u, d_dt, inner = ([jnp.zeros(())] * GROUP for _ in range(3))
        for i in reversed(range(GROUP)):
            one = slice(i, i + 1)
            dy, x, dt = slope[one], rows.x[one], rows.dt[one]
            after = states[k * GROUP + i + 1]
            before = _forgotten(states[k * GROUP + i], marks, i)
            here = lane == first + i
            g = g + C[:, one] * dy
            d_C += jnp.where(here, jnp.sum(after * dy, axis=1, keepdims=True), 0.0)
            d_B += jnp.where(here, jnp.sum(g * x, axis=1, keepdims=True), 0.0)
            d_x = jnp.sum(g * B[:, one], axis=0, keepdims=True)
            g = g * jnp.exp(dt * A)
            q = g * before
            d_A += q * dt
            d_u[i] = d_x * dt
            d_dt[i] = d_x * rows.u[one] + jnp.sum(q * A, axis=0, keepdims=True)
            if given.z is not None:
                inner[i] = jnp.sum(after * C[:, one], axis=0, keepdims=True)
            g = _forgotten(g, marks, i)
        made.d_B[tile], made.d_C[tile] = d_B, d_C
        d_u = jnp.concatenate(d_u, axis=0) + slope * skip
        d_delta = rows.slope(jnp.concatenate(d_dt, axis=0))
        made.d_u[rows.place, :] = d_u.astype(made.d_u.dtype)
        made.d_delta[rows.place, :] = d_delta.astype(made.d_delta.dtype)
        if given.z is not None:
            whole = jnp.concatenate(inner, axis=0) + rows.u * skip
            d_z = d_y * whole * gate * (1.0 + z * (1.0 - gate))  # pyright: ignore
            made.d_z[rows.place, :] = d_z.astype(made.d_z.dtype)
        d_skip += jnp.sum(slope * rows.u, axis=0, keepdims=True)
        d_bias += jnp.sum(d_delta, axis=0, keepdims=True)
        return g, d_A, d_skip, d_bias

    row = jnp.zeros((1, plan.width), jnp.float32)
    start = (carry[column], jnp.zeros_like(A), row, row)
    g, d_A, d_skip, d_bias = lax.fori_loop(0, groups, group, start)
    carry[column] = g
    made.d_A[column] += d_A
    made.d_vectors[column, 0:1, :] += d_skip
    made.d_vectors[column, 1:2, :] += d_bias

    @pl.when(step == pl.num_programs(1) - 1)
    def _() -> None:
        made.d_start[...] = g


class _Rows:
    """The k-th 16 tokens of a block."""

    def __init__(
        self, task: Task, given: Given, k: Any, block: Any, column: Any
    ) -> None:
        # The numbers of the block come in: inside of a loop there is no grid.
        self.k, self.given, self.task = k, given, task
        self.place = pl.ds(pl.multiple_of(k * GROUP, GROUP), GROUP)
        self.u = self.of(given.u)
        bias = given.vectors[column, 1:2, :]
        self.raw = self.of(given.delta) + bias
        dt = self.raw
        if task.softplus:
            dt = jnp.maximum(dt, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(dt)))
        self.counts = None
        if task.plan.whole > task.plan.length:  # what is added changes nothing
            first = block * task.plan.size + k * GROUP
            tokens = first + lax.broadcasted_iota(jnp.int32, dt.shape, 0)
            self.counts = tokens < task.plan.length
            dt = jnp.where(self.counts, dt, 0.0)
        self.dt = dt
        self.x = dt * self.u

    def of(self, rows: Any) -> jax.Array:
        return rows[self.place, :].astype(jnp.float32)

    def slope(self, d_dt: jax.Array) -> jax.Array:
        """The gradient of delta."""
        if self.task.softplus:
            d_dt = d_dt * lax.logistic(self.raw)
        return d_dt if self.counts is None else jnp.where(self.counts, d_dt, 0.0)

    def lanes(self, x: Any) -> jax.Array:
        """B or C of the tokens, `[N, 128]`, the first of them on lane 0."""
        tile = x[lax.div(self.k, LANES // GROUP)].astype(jnp.float32)
        place = lax.rem(self.k, LANES // GROUP) * GROUP
        return pltpu.roll(tile, lax.rem(LANES - place, LANES), 1)

    def marks(self) -> jax.Array | None:
        return None if self.given.marks is None else self.lanes(self.given.marks)


def _forgotten(h: jax.Array, marks: jax.Array | None, i: int) -> jax.Array:
    """The state that token i finds."""
    if marks is None:
        return h
    return jnp.where(jnp.broadcast_to(marks[:1, i : i + 1], h.shape) > 0, 0.0, h)
