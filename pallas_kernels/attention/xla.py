"""Attention in plain XLA with memory linear in length, on every backend.

Over blocks j of keys, with a running maximum m, S = scale Q K^T:

    m' = max(m, max S_j),  l' = e^(m - m') l + sum e^(S_j - m'),
    o' = e^(m - m') o + e^(S_j - m') V_j;    at the end out = o / l, lse = m + log l

Only `out` and `lse` are kept. With P = e^(S - lse) computed again, tile by tile, the
inputs' changes make

    d lse = sum P dS,    d out = P dV + (P * dS) V - (d lse) out

What is written below is the transpose of this linear map: the gradient, one pass with
the five products of FlashAttention-2. Forward mode is its transpose in turn, by JAX;
second derivatives come from both.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.pattern import Extras, Pattern, needed
from pallas_kernels.attention.xla_tiles import (
    Keys,
    Queries,
    dropped,
    ids_meet,
    join,
    key_blocks,
    logits_of,
    places,
    product,
    product_t,
    query_blocks,
    split,
    tile_masks,
    transposed,
    wide,
    with_tiles,
)
from pallas_kernels.transpose import transpose_of

__all__ = ["attend"]

TILE = (256, 256)  # queries and keys of a tile
LARGEST = 2**23  # logits of a tile over all batch rows and heads, at most


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, jax.Array]:
    """Attention over blocks of keys; takes and equals what `ref.attend` does."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    rows, columns = _block_sizes(pattern, q, k)
    queries, keys = query_blocks(rows, q, extras), key_blocks(columns, k, v, extras)
    masks = functools.partial(tile_masks, pattern, extras, k.shape[2])

    def row(_: None, queries: Queries) -> Any:
        narrow = q.dtype == jnp.bfloat16  # scaled before, it would be rounded again
        scaled = queries.q if narrow else wide(queries.q) * pattern.scale

        def visit(carry: Any, keys: Keys, masked: bool) -> Any:
            top, total, out = carry
            products = product("bth,bsh->bts", scaled, keys.k)
            if narrow:
                products *= pattern.scale
            logits = logits_of(pattern, products, keys.bias)
            counts, kept = masks(queries, keys)
            if counts is not None and masked:
                logits = jnp.where(counts, logits, -jnp.inf)
            # `top` is finite, so that e^(-inf - top) is 0 where nothing counts.
            higher = jnp.maximum(top, jnp.max(logits, axis=-1))
            weights = jnp.exp(logits - higher[..., None])
            shrink = jnp.exp(top - higher)
            total = total * shrink + jnp.sum(weights, axis=-1)
            # Not in bfloat16: the gradient subtracts d_out * out from sums of the same
            # weights.
            weights = dropped(pattern, weights, kept)
            seen = product("bts,bsh->bth", weights, wide(keys.v))
            return higher, total, out * shrink[..., None] + seen

        def step(carry: Any, keys: Keys, masked: bool) -> Any:
            tile = functools.partial(visit, masked=masked)
            return _where(ids_meet(queries, keys), tile, carry, keys)

        shape = queries.q.shape
        if extras.sinks is None:
            top, total = jnp.full(shape[:-1], -1e30, dtype), jnp.zeros((), dtype)
        else:  # a key that has a logit and no value
            top = extras.sinks.astype(dtype)[None, ..., None]
            total = jnp.ones((), dtype)
        top, total = (jnp.broadcast_to(x, shape[:-1]) for x in (top, total))
        start = (top, total, jnp.zeros(shape, dtype))
        tiles = with_tiles(keys, queries, k.shape[2])
        top, total, out = _over_keys(pattern, k.shape[2], queries, tiles, step, start)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
        return None, (out / total[..., None], lse)

    _, (out, lse) = lax.scan(row, None, queries)
    return join(out, 3, q.shape), join(lse, 3, q.shape[:-1])


@attend.defjvp
def _attend_jvp(pattern: Pattern, primals: Any, tangents: Any) -> Any:
    out, lse = attend(pattern, *primals)
    extras = primals[3]
    # Ids, masks and seeds are integers: what came as their tangents says nothing.
    inputs = [wide(x) for x in (*tangents[:3], tangents[3].bias)]
    gradient = functools.partial(_gradient, pattern)
    d_out, d_lse = transpose_of(gradient, (*primals, lse), (out, lse), inputs)
    if extras.sinks is not None:
        share = jnp.exp(extras.sinks[None, ..., None] - _finite(lse))
        d_lse += share * tangents[3].sinks[None, ..., None]
    return (out, lse), (d_out - d_lse[..., None] * out, d_lse)


def _gradient(
    pattern: Pattern,
    saved: Any,
    changes: tuple[jax.Array, jax.Array],
    differentiable: bool,
) -> list[Any]:
    """The gradients of q, k, v and bias, all of them wide.

    Args:
        pattern: the static part.
        saved: q, k, v, extras, and lse as `attend` gives it.
        changes: the gradients of P V and of lse.
        differentiable: whether JAX can transpose and differentiate it, with memory
            linear in length. For that all blocks of keys are visited, to skip some.

    Returns:
        Arrays like q, k, v and bias; None where there is no bias.
    """
    # Wide, since the gradients of blocks are summed.
    (q, k, v), (extras, lse) = map(wide, saved[:3]), saved[3:]
    extras = extras._replace(bias=wide(extras.bias))
    rows, columns = _block_sizes(pattern, q, k)
    queries, keys = query_blocks(rows, q, extras), key_blocks(columns, k, v, extras)
    masks = functools.partial(tile_masks, pattern, extras, k.shape[2])
    of_rows = [split(x, 3, rows, q.shape[3]) for x in (_finite(lse), *changes)]

    def row(sums: Any, blocks: Any) -> Any:
        queries, (lse, d_out, d_lse) = blocks
        scaled = queries.q * pattern.scale
        scaled_t, d_out_t = transposed(scaled), transposed(d_out)

        def visit(_: Any, keys: Keys, masked: bool) -> Any:
            logits, back = jax.vjp(
                functools.partial(logits_of, pattern),
                product("bth,bsh->bts", scaled, keys.k),
                keys.bias,
            )
            counts, kept = masks(queries, keys)
            if counts is not None and masked:
                logits = jnp.where(counts, logits, -jnp.inf)
            weights = jnp.exp(logits - lse[..., None])
            d_weights = product("bth,bsh->bts", d_out, keys.v)
            d_logits = weights * (dropped(pattern, d_weights, kept) + d_lse[..., None])
            d_products, d_bias = back(d_logits)
            d_k = product_t(scaled_t, d_products)
            d_v = product_t(d_out_t, dropped(pattern, weights, kept))
            return product("bts,bsh->bth", d_products, keys.k), d_k, d_v, d_bias

        def step(carry: Any, keys: Keys, masked: bool = True) -> Any:
            inside = ids_meet(queries, keys)
            tile = functools.partial(visit, masked=masked)
            if differentiable:
                inside &= _in_window(pattern, queries, keys)
                tile = jax.checkpoint(tile)
            # Only what a tile adds goes through the condition: what goes through it
            # whole is copied.
            zeros = None if inside is True else _zeros_of(tile, None, keys)
            d_q, *parts = _where(inside, tile, zeros, keys)

            def add(whole: jax.Array, part: jax.Array) -> jax.Array:
                return whole.at[keys.index].add(part, mode="promise_in_bounds")

            return carry[0] + d_q, jax.tree.map(add, carry[1], parts)

        tiles = with_tiles(keys, queries, k.shape[2])
        d_bias = None if tiles.bias is None else jnp.zeros_like(tiles.bias)
        start = jnp.zeros_like(scaled), [*sums, d_bias]
        if differentiable:
            # Twice, around the tile and around the step, so that no tile is kept for
            # the way back, and none is made of zeros where one is skipped.
            step = jax.checkpoint(step)
            last, _ = lax.scan(lambda c, keys: (step(c, keys), None), start, tiles)
        else:
            last = _over_keys(pattern, k.shape[2], queries, tiles, step, start)
        d_q, (*sums, d_bias) = last
        return sums, (d_q, d_bias)

    zeros = jnp.zeros_like(keys.k).swapaxes(-1, -2)
    sums, (d_q, d_bias) = lax.scan(row, [zeros, zeros], (queries, of_rows))
    d_k, d_v = (join(x.swapaxes(-1, -2), 2, k.shape) for x in sums)
    if extras.bias is not None:
        of_row = jax.vmap(lambda x, whole: join(x, 4, whole.shape))
        d_bias = join(of_row(d_bias, queries.bias), 3, extras.bias.shape)
    return [join(d_q, 3, q.shape) * pattern.scale, d_k, d_v, d_bias]


def _over_keys(
    pattern: Pattern,
    length: int,
    queries: Queries,
    keys: Keys,
    step: Callable,
    carry: Any,
) -> Any:
    """`step(carry, block, masked)` over the blocks of keys that the window needs.

    Where the window covers the whole tile, and nothing else masks, `masked` is False:
    on a CPU a mask costs half as much as a product.
    """
    rows = places(queries.index, queries.q)
    count, block = keys.k.shape[0], keys.k.shape[-2]
    first, last = 0, count
    if pattern.left is not None:
        first = jnp.maximum(0, (rows[0] - pattern.left) // block)
    if pattern.right is not None:
        last = jnp.minimum(count, (rows[-1] + pattern.right) // block + 1)
    ranges = [(first, last, True)]
    if queries.ids is None and keys.mask is None and length % block == 0:
        whole, cut = first, last
        if pattern.left is not None:  # the first that is whole, rounded up
            whole = jnp.clip(-((pattern.left - rows[-1]) // block), first, last)
        if pattern.right is not None:
            cut = jnp.clip((rows[0] + pattern.right + 1) // block, whole, last)
        ranges = [(first, whole, True), (whole, cut, False), (cut, last, True)]

    def body(masked: bool, index: jax.Array, carry: Any) -> Any:
        at_index = functools.partial(
            lax.dynamic_index_in_dim, index=index, keepdims=False
        )
        return step(carry, jax.tree.map(at_index, keys), masked)

    for start, stop, masked in ranges:
        if start is not stop:
            carry = lax.fori_loop(start, stop, functools.partial(body, masked), carry)
    return carry


def _in_window(pattern: Pattern, queries: Queries, keys: Keys) -> jax.Array | bool:
    rows, columns = places(queries.index, queries.q), places(keys.index, keys.k)
    return needed(pattern, rows[0], rows[-1], columns[0], columns[-1])


def _where(inside: jax.Array | bool, tile: Callable, carry: Any, keys: Keys) -> Any:
    """`tile(carry, keys)`, or `carry` where no pair of the tile can count."""
    if inside is True:
        return tile(carry, keys)
    return lax.cond(inside, tile, lambda carry, _: carry, carry, keys)


def _zeros_of(function: Callable, *args: Any) -> Any:
    """Zeros of the shapes that a function gives."""
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _finite(lse: jax.Array) -> jax.Array:
    """Of rows that see nothing 0: their weights are e^-inf with any number."""
    return jnp.where(jnp.isfinite(lse), lse, 0.0)


def _block_sizes(pattern: Pattern, q: jax.Array, k: jax.Array) -> tuple[int, int]:
    """Rows of a block of queries and of keys; blocks of about equal size."""
    rows, columns = pattern.tile or TILE
    heads = q.shape[0] * q.shape[1] * q.shape[2]
    while not pattern.tile and heads * rows * columns > LARGEST and columns > 64:
        rows, columns = columns, rows // 2
    row_blocks, key_blocks = -(-q.shape[3] // rows), -(-k.shape[2] // columns)
    return -(-q.shape[3] // row_blocks), -(-k.shape[2] // key_blocks)
