"""What the warpgroups of the GPU kernels do; `pallas_gpu` says what is computed.

Each body takes how the call is cut, the products, and three trees of references. Of
three warpgroups the last fetches and the others compute.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.gpu_tiles import (
    WHOLE,
    Beside,
    Cut,
    Ids,
    Place,
    dropped,
    logits,
    masked,
    place,
    spread,
    vector,
    walk,
)
from pallas_kernels.attention.tiles import LOG2E
from pallas_kernels.mosaic_gpu import Products, Ring, by_roles, full

__all__ = ["forward_body", "keys_body", "queries_body"]

START = -1e30  # where the running maximum starts


def forward_body(
    cut: Cut, mma: Products, operands: Any, results: Any, scratch: Any
) -> None:
    """Queries are owned: out and the log-sum-exp."""
    (q, k, v, beside), (out, lse) = operands, results
    own, here, lse_rows, turns, keys, values = scratch
    at, who = _of_queries(cut, beside), lax.axis_index("warpgroup")
    rows = cut.own // 2
    shape, row = (rows, cut.step), at.own + who * rows
    q_rows = own[0].at[who]

    def take_turns() -> None:
        plgpu.barrier_arrive(turns)
        plgpu.barrier_wait(turns)

    def step(is_masked: bool, j: jax.Array, sums: Any) -> Any:
        top, total, seen = sums
        k_block, *key_ids = keys.take(j - at.low)
        products = mma.fresh(q_rows, k_block.transpose((1, 0)), shape, take_turns)
        x, _ = logits(cut, products)
        if is_masked:
            ids = _ids(own[1:], who, key_ids)
            x = masked(cut, x, row, j * cut.step, ids)
        keys.release(j - at.low)
        after = jnp.maximum(top, x.max(axis=1))
        weights = jnp.exp2(x - spread(after, shape, 0))
        shrink = jnp.exp2(top - after)
        total = total * shrink + weights.sum(axis=1)
        seen *= spread(shrink, seen.shape, 0)
        weights = dropped(cut, weights, beside, at, row, j * cut.step)
        weights = weights.astype(v.dtype)
        take_turns()
        (v_block,) = values.take(j - at.low)
        seen = mma.onto(seen, weights, v_block)
        values.release(j - at.low)
        return after, total, seen

    def compute() -> None:
        keys.begin()
        values.begin()
        sources = [q.at[at.batch, pl.ds(row, rows), at.head]]
        if beside.ids is not None:
            sources.append(at.ids(beside.ids.queries, row, rows))
        _fetch(sources, own, here, who)
        top, total = jnp.float32(START), jnp.float32(0.0)
        if beside.sinks is not None:  # a key that has a logit and no value
            sink = beside.sinks[at.head] * LOG2E
            top = jnp.maximum(sink, START)
            total = jnp.where(sink > START, 1.0, 0.0)
        across = WHOLE.reduce(1)
        sums: Any = (full((rows,), top, across), full((rows,), total, across))
        sums = (*sums, full((rows, cut.width), 0.0, WHOLE))
        pl.when(who == 1)(take_turns)
        top, total, seen = walk(cut, at, beside, step, sums)
        pl.when(who == 0)(take_turns)
        some = total > 0
        safe = jnp.where(some, total, 1.0)
        lse_rows[who] = jnp.where(some, top * (1 / LOG2E) + jnp.log(safe), -jnp.inf)
        seen /= spread(safe, seen.shape, 0)
        to = (at.batch, pl.ds(row, rows), at.head)
        if out.dtype == q.dtype:
            q_rows[...] = seen.astype(q.dtype)
        else:
            out[to] = seen
        plgpu.commit_smem()
        if out.dtype == q.dtype:
            plgpu.copy_smem_to_gmem(q_rows, out.at[to])
        to = (at.batch, at.head, pl.ds(row, rows))
        plgpu.copy_smem_to_gmem(lse_rows.at[who], lse.at[to])
        plgpu.wait_smem_to_gmem(0)

    by_roles(compute, lambda: _fill_keys(cut, at, beside, k, v, keys, values))


def queries_body(
    cut: Cut, mma: Products, operands: Any, results: Any, scratch: Any
) -> None:
    """Queries are owned: dQ."""
    (q, k, v, d_out, lse, delta, beside), (dq,) = operands, results
    own, here, keys, values = scratch
    at, who = _of_queries(cut, beside), lax.axis_index("warpgroup")
    rows = cut.own // 2
    shape, row = (rows, cut.step), at.own + who * rows
    q_rows, d_rows, lse_rows, delta_rows = (x.at[who] for x in own[:4])

    def step(vectors: Any, is_masked: bool, j: jax.Array, total: Any) -> Any:
        lse, delta = vectors
        (v_block,) = values.take(j - at.low)
        d_weights = mma.fresh(d_rows, v_block.transpose((1, 0)), shape)
        values.release(j - at.low)
        d_weights = dropped(cut, d_weights, beside, at, row, j * cut.step)
        d_weights -= spread(delta, shape, 0)
        k_block, *key_ids = keys.take(j - at.low)
        x, slope = logits(cut, mma.fresh(q_rows, k_block.transpose((1, 0)), shape))
        if is_masked:
            ids = _ids(own[4:], who, key_ids)
            x = masked(cut, x, row, j * cut.step, ids)
        weights = jnp.exp2(x - spread(lse, shape, 0))
        d_logits = weights * d_weights
        if slope is not None:
            d_logits *= slope
        total = mma.onto(total, d_logits.astype(k.dtype), k_block)
        keys.release(j - at.low)
        return total

    def compute() -> None:
        keys.begin()
        values.begin()
        along = (at.batch, pl.ds(row, rows), at.head)
        of_head = (at.batch, at.head, pl.ds(row, rows))
        sources = [q.at[along], d_out.at[along], lse.at[of_head], delta.at[of_head]]
        if beside.ids is not None:
            sources.append(at.ids(beside.ids.queries, row, rows))
        _fetch(sources, own, here, who)
        vectors = vector(lse_rows, 0), vector(delta_rows, 0)
        total = full((rows, cut.width), 0.0, WHOLE)
        total = walk(cut, at, beside, functools.partial(step, vectors), total)
        q_rows[...] = (total * cut.tiles.pattern.scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_rows, dq.at[along])
        plgpu.wait_smem_to_gmem(0)

    by_roles(compute, lambda: _fill_keys(cut, at, beside, k, v, keys, values))


def keys_body(
    cut: Cut, mma: Products, operands: Any, results: Any, scratch: Any
) -> None:
    """Keys are owned: dV by the first warpgroup, dK by the second."""
    (q, k, v, d_out, lse, delta, beside), (dk, dv) = operands, results
    own, here, weights_here, handed, taken, queries, gradients = scratch
    groups, who = cut.tiles.heads[1], lax.axis_index("warpgroup")
    batch, key_head = lax.axis_index("batch"), lax.axis_index("head")
    k_rows, v_rows = (x.at[0] for x in own[:2])
    shape = (cut.own, cut.step)

    def of_group(group: Any) -> Place:
        return place(cut, beside, batch, key_head, group)

    first = of_group(0).own

    def weigh(at: Place, done: Any, is_masked: bool, i: jax.Array, total: Any) -> Any:
        now = done + i - at.low
        q_block, lse_block, *query_ids = queries.take(now)
        x, slope = logits(cut, mma.fresh(k_rows, q_block.transpose((1, 0)), shape))
        if is_masked:
            ids = None
            if query_ids:
                ids = Ids(vector(query_ids[0], 1), vector(own[2].at[0], 0))
            x = masked(cut, x, i * cut.step, at.own, ids)
        weights = jnp.exp2(x - spread(vector(lse_block, 1), shape, 1))
        queries.release(now)
        plgpu.barrier_wait(taken)
        handing = weights if slope is None else weights * slope
        weights_here[...] = handing.astype(weights_here.dtype)
        plgpu.barrier_arrive(handed)
        weights = dropped(cut, weights, beside, at, i * cut.step, at.own)
        d_block, _ = gradients.take(now)
        total = mma.onto(total, weights.astype(v.dtype), d_block)
        gradients.release(now)
        return total

    def differ(at: Place, done: Any, _: bool, i: jax.Array, total: Any) -> Any:
        now = done + i - at.low
        d_block, delta_block = gradients.take(now)
        d_weights = mma.fresh(v_rows, d_block.transpose((1, 0)), shape)
        d_weights = dropped(cut, d_weights, beside, at, i * cut.step, at.own)
        d_weights -= spread(vector(delta_block, 1), shape, 1)
        gradients.release(now)
        plgpu.barrier_wait(handed)
        weights = plgpu.load(weights_here, layout=WHOLE)
        plgpu.barrier_arrive(taken)
        q_block = queries.take(now)[0]
        d_logits = weights.astype(jnp.float32) * d_weights
        total = mma.onto(total, d_logits.astype(q.dtype), q_block)
        queries.release(now)
        return total

    def over_groups(step: Callable[..., Any]) -> jax.Array:
        def of(group: jax.Array, carry: Any) -> Any:
            done, total = carry
            at = of_group(group)
            total = walk(cut, at, beside, functools.partial(step, at, done), total)
            return done + at.high - at.low, total

        start = (jnp.int32(0), full((cut.own, cut.width), 0.0, WHOLE))
        return lax.fori_loop(0, groups, of, start)[1]

    def write(total: jax.Array, rows: Any, to: Any) -> None:
        rows[...] = total.astype(rows.dtype)
        plgpu.commit_smem()
        at = (batch, pl.ds(first, cut.own), key_head)
        plgpu.copy_smem_to_gmem(rows, to.at[at])
        plgpu.wait_smem_to_gmem(0)

    def compute() -> None:
        queries.begin()
        gradients.begin()
        plgpu.barrier_wait(here.at[0])

        @pl.when(who == 0)
        def _() -> None:
            total = over_groups(weigh)
            plgpu.barrier_wait(taken)  # the other has read the values, too
            write(total, v_rows, dv)

        @pl.when(who == 1)
        def _() -> None:
            plgpu.barrier_arrive(taken)
            total = over_groups(differ) * cut.tiles.pattern.scale
            write(total, k_rows, dk)

    def fetch() -> None:
        along = (batch, pl.ds(first, cut.own), key_head)
        sources = [k.at[along], v.at[along]]
        if beside.ids is not None:
            sources.append(of_group(0).ids(beside.ids.keys, first, cut.own))
        _copy(sources, own, here, 0)

        def fill(group: jax.Array, done: jax.Array) -> jax.Array:
            at = of_group(group)

            @pl.loop(at.low, at.high)
            def _(i: jax.Array) -> None:
                block = pl.ds(i * cut.step, cut.step)
                along, of_head = (batch, block, at.head), (batch, at.head, block)
                ids: list[Any] = []
                if beside.ids is not None:
                    ids.append(at.ids(beside.ids.queries, i * cut.step, cut.step))
                now = done + i - at.low
                queries.fill(now, q.at[along], lse.at[of_head], *ids)
                gradients.fill(now, d_out.at[along], delta.at[of_head])

            return done + at.high - at.low

        lax.fori_loop(0, groups, fill, jnp.int32(0))
        queries.end()
        gradients.end()

    by_roles(compute, fetch)


def _of_queries(cut: Cut, beside: Beside) -> Place:
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    groups = jnp.int32(cut.tiles.heads[1])
    key_head = lax.div(head, groups)
    return place(cut, beside, batch, key_head, head - key_head * groups)


def _fill_keys(
    cut: Cut, at: Place, beside: Beside, k: Any, v: Any, keys: Ring, values: Ring
) -> None:
    @pl.loop(at.low, at.high)
    def _(j: jax.Array) -> None:
        block = (at.batch, pl.ds(j * cut.step, cut.step), at.key_head)
        ids = []
        if beside.ids is not None:
            ids.append(at.ids(beside.ids.keys, j * cut.step, cut.step))
        keys.fill(j - at.low, k.at[block], *ids)
        values.fill(j - at.low, v.at[block])

    keys.end()
    values.end()


def _ids(own: Any, who: Any, walked: Any) -> Ids | None:
    """Of a tile whose queries are owned."""
    return Ids(vector(own[0].at[who], 0), vector(walked[0], 1)) if own else None


def _copy(sources: Any, buffers: Any, here: Any, at: Any) -> None:
    for source, buffer in zip(sources, buffers, strict=True):
        plgpu.copy_gmem_to_smem(source, buffer.at[at], here.at[at])


def _fetch(sources: Any, buffers: Any, here: Any, at: Any) -> None:
    _copy(sources, buffers, here, at)
    plgpu.barrier_wait(here.at[at])
