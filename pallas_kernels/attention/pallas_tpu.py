"""Attention for TPU in Pallas: the forward pass and two kernels for the gradient.

Forward, a block of queries at a time over blocks j of keys, with a running maximum m:

    m' = max(m, max S_j),  l' = e^(m - m') l + sum e^(S_j - m'),
    o' = e^(m - m') o + e^(S_j - m') V_j;    at the end out = o / l, lse = m + log l

Backward, with P = e^(S - lse) computed again, D = rowsum(dO * O) - d_lse and, under a
softcap c, the logits S = c tanh(Z / c) of Z = scale Q K^T:

    dV = P^T dO,   dP = dO V^T,   dZ = P * (dP - D) * (1 - (S / c)^2)
    dQ = scale dZ K,   dK = scale dZ^T Q, summed over the query heads of a key head

One kernel owns blocks of queries (dQ), the other blocks of keys (dK and dV), with the
tile the other way up, so that neither adds to what another has written. Dropout keeps
pairs by `keep`; dV takes P, and dP is, with the dropped pairs at 0 and the others
divided by the share that is kept.

Inside, logits are in units of log 2, and what does not count is -2e30, below where the
maximum starts: its weight is 0 even in a row that sees nothing. Products are exact in
float32 (HIGHEST) for float32 inputs, native for bfloat16; all sums are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.attention.pattern import Extras, Pattern
from pallas_kernels.attention.tiles import LOG2E, Sides, Tiling, pad, row_sums, sides
from pallas_kernels.attention.tpu_call import call
from pallas_kernels.attention.tpu_tiles import (
    LANES,
    Scalars,
    column,
    dot,
    dropped,
    tile_logits,
    tiling,
    visit,
)

__all__ = ["backward", "forward", "unsupported"]

NEVER = -2e30  # the logit of a pair that does not count
START = -1e30  # where the running maximum starts


def unsupported(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> str | None:
    """Why a call cannot run here.

    Args:
        pattern: the static part.
        q: `[B, K, G, T, H]`.
        k: `[B, K, S, H]`.
        v: `[B, K, S, H]`.
        extras: the arrays beside them.

    Returns:
        One sentence, or None if the call can run.
    """
    kinds = {x.dtype for x in (q, k, v)}
    if len(kinds) > 1 or q.dtype not in (jnp.float32, jnp.bfloat16):
        names = ", ".join(str(x.dtype) for x in (q, k, v))
        return (
            "the TPU kernel takes q, k and v of one dtype, float32 or bfloat16, "
            f"and these are {names}"
        )
    if extras.bias is not None:
        return "the TPU kernel takes no bias"
    if min(q.size, k.size) == 0:
        return "the TPU kernel takes no empty arrays"
    if q.shape[-1] > 512:
        return f"the TPU kernel takes heads of at most 512, and this is {q.shape[-1]}"
    if pattern.tile is not None and any(x < 1 or x % LANES for x in pattern.tile):
        return f"the TPU kernel takes tiles of multiples of 128, not {pattern.tile}"
    return None


def forward(
    pattern: Pattern,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention; equals `ref.attend` wherever `unsupported` gives None.

    Args:
        pattern: scale, window, softcap, share of dropout and tile, by default chosen by
            dtype and H.
        q: `[B, K, G, T, H]`, float32 or bfloat16.
        k: `[B, K, S, H]`.
        v: `[B, K, S, H]`.
        extras: sinks, masks, ids and the seed of dropout.
        interpret: True or `pltpu.InterpretParams`: run without a TPU.

    Returns:
        `(out, lse)`: `[B, K, G, T, H]` in the dtype of `q`, but float32 with sinks, as
        their gradient would add up the rounding errors of all rows; `[B, K, G, T]` in
        float32. A row that sees nothing has 0 and -inf.
    """
    tiles = tiling(pattern, q, k, pattern.tile or _size(q, False))
    q, k, v = _whole_blocks(tiles, q, k, v)
    masks = sides(tiles, extras)
    width, length = q.shape[4], q.shape[3]
    rows = (tiles.rows, LANES)
    out, lse = call(
        _forward_kernel, "attention_forward", tiles, extras, by_keys=False,
        masks=masks, queries=(q,), keys=(k, v), vectors=(),
        results=[
            ("queries", q.shape, q.dtype if extras.sinks is None else jnp.float32),
            ("vectors", (*q.shape[:3], 1, length), jnp.float32),
        ],
        scratch=[rows, rows, (tiles.rows, width)],
        products=2, interpret=interpret,
    )  # fmt: skip
    return out[:, :, :, : tiles.queries], lse[:, :, :, 0, : tiles.queries]


def backward(
    pattern: Pattern,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None,
    *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    """The gradient of `forward`.

    Args:
        pattern: as in `forward`.
        q: as in `forward`.
        k: as in `forward`.
        v: as in `forward`.
        extras: as in `forward`.
        out: what it gave, `[B, K, G, T, H]`.
        lse: what it gave, `[B, K, G, T]`.
        d_out: the gradient with respect to `out`.
        d_lse: that with respect to `lse`; None: zero. Ignored where `lse` is -inf.
        interpret: as in `forward`.

    Returns:
        `(dq, dk, dv, d_bias, d_sinks)` in the dtypes of the inputs; `d_bias` is None,
        and `d_sinks` `[K, G]`, None without sinks.
    """
    tiles = tiling(pattern, q, k, pattern.tile or _size(q, True))
    masks = sides(tiles, extras)
    lse, delta, d_sinks = row_sums(extras, out, lse, d_out, d_lse)
    lse, delta = (pad(x[:, :, :, None], 4, tiles.rows) for x in (lse, delta))
    dtype = q.dtype
    q, k, v = _whole_blocks(tiles, q, k, v)
    d_out = pad(d_out.astype(dtype), 3, tiles.rows)
    width = q.shape[4]
    rows, columns = (tiles.rows, LANES), (tiles.columns, width)
    (dq,) = call(
        _queries_kernel, "attention_dq", tiles, extras, by_keys=False,
        masks=masks, queries=(q, d_out), keys=(k, v), vectors=(lse, delta),
        results=[("queries", q.shape, dtype)],
        scratch=[rows, rows, (tiles.rows, width)],
        products=3, interpret=interpret,
    )  # fmt: skip
    dk, dv = call(
        _keys_kernel, "attention_dkv", tiles, extras, by_keys=True,
        masks=masks, queries=(q, d_out), keys=(k, v), vectors=(lse, delta),
        results=[("keys", k.shape, dtype), ("keys", v.shape, dtype)],
        scratch=[columns, columns],
        products=4, interpret=interpret,
    )  # fmt: skip
    dk, dv = dk[:, :, : tiles.keys], dv[:, :, : tiles.keys]
    return dq[:, :, :, : tiles.queries], dk, dv, None, d_sinks


def _forward_kernel(
    tiles: Tiling, place: Callable[..., Any], scalars: Scalars, masks: Sides,
    queries: Any, keys: Any, vectors: Any, results: Any, scratch: Any,
) -> None:  # fmt: skip
    (q,), (k, v), (out, lse), (top, total, sums) = queries, keys, results, scratch
    del vectors
    tile, here, begins, ends = place(scalars)

    @pl.when(begins)
    def _() -> None:
        start, one = jnp.float32(START), jnp.float32(0.0)
        if scalars.sinks is not None:  # a key that has a logit and no value
            heads, groups = tiles.heads
            sink = scalars.sinks[tile.head * groups + tile.group] * LOG2E
            start = jnp.maximum(sink, START)
            one = jnp.where(sink > START, 1.0, 0.0)
        top[...] = jnp.full(top.shape, start)
        total[...] = jnp.full(total.shape, one)
        sums[...] = jnp.zeros_like(sums)

    def compute(counts: jax.Array | None) -> None:
        logits, _ = tile_logits(tiles.pattern, q[...], k[...])
        if counts is not None:
            logits = jnp.where(counts, logits, NEVER)
        before = top[:, :1]
        after = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights, shrink = jnp.exp2(logits - after), jnp.exp2(before - after)
        top[...] = jnp.broadcast_to(after, top.shape)
        added = total[:, :1] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        total[...] = jnp.broadcast_to(added, total.shape)
        if scalars.seed is not None:
            weights = dropped(tiles, tile, scalars, weights)
        sums[...] = sums[...] * shrink + dot(weights.astype(v.dtype), v[...], 1, 0)

    visit(tiles, here, tile, masks, compute)

    @pl.when(ends)
    def _() -> None:
        some = total[...] > 0
        safe = jnp.where(some, total[...], 1.0)
        out[...] = (sums[...] / safe[:, :1]).astype(out.dtype)
        each = jnp.where(some, top[...] / LOG2E + jnp.log(safe), -jnp.inf)
        lse[...] = each.T[:1]


def _queries_kernel(
    tiles: Tiling, place: Callable[..., Any], scalars: Scalars, masks: Sides,
    queries: Any, keys: Any, vectors: Any, results: Any, scratch: Any,
) -> None:  # fmt: skip
    (q, d_out), (k, v), (dq,) = queries, keys, results
    lse, delta, sums = scratch
    tile, here, begins, ends = place(scalars)

    @pl.when(begins)
    def _() -> None:
        for upright, row in zip((lse, delta), vectors, strict=True):
            upright[...] = jnp.broadcast_to(column(row[...]), upright.shape)
        sums[...] = jnp.zeros_like(sums)

    def compute(counts: jax.Array | None) -> None:
        logits, slope = tile_logits(tiles.pattern, q[...], k[...])
        if counts is not None:
            logits = jnp.where(counts, logits, NEVER)
        weights = jnp.exp2(logits - lse[:, :1])
        d_weights = dot(d_out[...], v[...], 1, 1)
        if scalars.seed is not None:
            d_weights = dropped(tiles, tile, scalars, d_weights)
        d_logits = weights * (d_weights - delta[:, :1])
        if slope is not None:
            d_logits *= slope
        sums[...] += dot(d_logits.astype(k.dtype), k[...], 1, 0)

    visit(tiles, here, tile, masks, compute)

    @pl.when(ends)
    def _() -> None:
        dq[...] = (sums[...] * tiles.pattern.scale).astype(dq.dtype)


def _keys_kernel(
    tiles: Tiling, place: Callable[..., Any], scalars: Scalars, masks: Sides,
    queries: Any, keys: Any, vectors: Any, results: Any, scratch: Any,
) -> None:  # fmt: skip
    (q, d_out), (k, v), (lse, delta) = queries, keys, vectors
    (dk, dv), (k_sums, v_sums) = results, scratch
    tile, here, begins, ends = place(scalars)

    @pl.when(begins)
    def _() -> None:
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    def compute(counts: jax.Array | None) -> None:
        logits, slope = tile_logits(tiles.pattern, k[...], q[...])
        if counts is not None:
            logits = jnp.where(counts, logits, NEVER)
        weights = jnp.exp2(logits - lse[...])
        d_weights, seen = dot(v[...], d_out[...], 1, 1), weights
        if scalars.seed is not None:
            seen, d_weights = (
                dropped(tiles, tile, scalars, x) for x in (weights, d_weights)
            )
        v_sums[...] += dot(seen.astype(v.dtype), d_out[...], 1, 0)
        d_logits = weights * (d_weights - delta[...])
        if slope is not None:
            d_logits *= slope
        k_sums[...] += dot(d_logits.astype(q.dtype), q[...], 1, 0)

    visit(tiles, here, tile, masks, compute)

    @pl.when(ends)
    def _() -> None:
        dk[...] = (k_sums[...] * tiles.pattern.scale).astype(dk.dtype)
        dv[...] = v_sums[...].astype(dv.dtype)


def _whole_blocks(tiles: Tiling, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    q, (k, v) = pad(q, 3, tiles.rows), (pad(x, 2, tiles.columns) for x in (k, v))
    return q, k, v


def _size(q: jax.Array, is_gradient: bool) -> tuple[int, int]:
    """Queries and keys of a tile.

    As large as fits, with every kind of mask, into the 16 MiB of vector memory that a
    kernel is given on a v5e, and compiles in seconds: a tile of float32 takes six
    products in bfloat16, all unrolled.
    """
    width, is_float32 = q.shape[4], q.dtype == jnp.float32
    if is_float32:
        side = 512 if width <= 128 and not is_gradient else 256
        return side, side
    if width <= 128:
        return 1024, 512 if is_gradient else 1024
    return 512, 512
