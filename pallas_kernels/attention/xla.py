"""Attention in plain XLA with memory linear in length, on every backend.

Over blocks j of keys, with a running maximum m, S = scale Q K^T:

    m' = max(m, max S_j),  l' = e^(m - m') l + sum e^(S_j - m'),
    o' = e^(m - m') o + e^(S_j - m') V_j;    at the end out = o / l, lse = m + log l

Only `out` and `lse` are kept. The derivative is what a change of the inputs does, with
P = e^(S - lse) computed again block by block:

    d lse = sum P dS,    d out = P dV + (P * dS) V - (d lse) out

That is linear in the changes, so that JAX transposes it to the gradient: one pass, with
the five products of FlashAttention-2. Forward mode and second derivatives come from the
same rule.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.pattern import Extras, Pattern, allowed, keep, needed

__all__ = ["attend"]

TILE = (512, 256)  # queries and keys of a tile
LARGEST = 2**23  # logits of a tile over all batch rows and heads, at most


class Queries(NamedTuple):
    """A block of queries: what the outer scan visits."""

    index: jax.Array
    q: jax.Array
    ids: jax.Array | None
    bias: jax.Array | None  # of this block of queries, for all keys
    mask: jax.Array | None


class Keys(NamedTuple):
    """A block of keys with its tile of bias and mask: what the inner scan visits."""

    index: jax.Array
    k: jax.Array
    v: jax.Array
    ids: jax.Array | None
    bias: jax.Array | None
    mask: jax.Array | None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, jax.Array]:
    """Attention over blocks of keys; equals `ref.attend`.

    Args:
        pattern: scale, window, softcap and share of dropout.
        q: `[B, K, G, T, H]`.
        k: `[B, K, S, H]`.
        v: `[B, K, S, H]`.
        extras: bias, sinks, masks, ids and the seed of dropout.

    Returns:
        `(out, lse)`: `[B, K, G, T, H]` and `[B, K, G, T]`, both float32 (float64 for
        float64 inputs). A row that sees nothing has 0 and -inf.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    queries = _query_blocks(pattern, q, k, extras)
    keys = _key_blocks(pattern, q, k, v, extras)

    def row(_: None, queries: Queries) -> Any:
        def step(carry: Any, keys: Keys) -> Any:
            def visit(carry: Any) -> Any:
                top, total, out = carry
                logits = _logits(pattern, queries.q, keys.k, keys.bias)
                counts, kept = _tile_masks(pattern, extras, k.shape[2], queries, keys)
                if counts is not None:
                    logits = jnp.where(counts, logits, -jnp.inf)
                # `top` is finite, so that e^(-inf - top) is 0 where nothing counts.
                higher = jnp.maximum(top, jnp.max(logits, axis=-1))
                weights = jnp.exp(logits - higher[..., None])
                shrink = jnp.exp(top - higher)
                total = total * shrink + jnp.sum(weights, axis=-1)
                seen = _apply(_dropped(pattern, weights, kept), keys.v)
                return higher, total, out * shrink[..., None] + seen

            return _where_needed(pattern, queries, keys, visit, carry), None

        shape = queries.q.shape
        if extras.sinks is None:
            top, total = jnp.full(shape[:-1], -1e30, dtype), jnp.zeros((), dtype)
        else:  # a key that has a logit and no value
            top = extras.sinks.astype(dtype)[None, ..., None]
            total = jnp.ones((), dtype)
        top, total = (jnp.broadcast_to(x, shape[:-1]) for x in (top, total))
        start = (top, total, jnp.zeros(shape, dtype))
        (top, total, out), _ = lax.scan(step, start, _with_tiles(keys, queries))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
        return None, (out / total[..., None], lse)

    _, (out, lse) = lax.scan(row, None, queries)
    return _join(out, q.shape[3]), _join(lse, q.shape[3])


@attend.defjvp
def _attend_jvp(pattern: Pattern, primals: Any, tangents: Any) -> Any:
    out, lse = attend(pattern, *primals)

    # Wide, since the gradients of blocks are summed. Ids, masks and seeds are integers:
    # what came as their tangents says nothing.
    extras = primals[3]._replace(bias=_wide(primals[3].bias))
    d_sinks, d_extras = tangents[3].sinks, Extras(bias=_wide(tangents[3].bias))
    (q, k, v), (dq, dk, dv) = (map(_wide, args[:3]) for args in (primals, tangents))
    queries = _query_blocks(pattern, q, k, extras)
    keys = _key_blocks(pattern, q, k, v, extras)
    d_queries = _query_blocks(pattern, dq, k, d_extras)
    d_keys = _key_blocks(pattern, q, dk, dv, d_extras)
    finite = jnp.where(jnp.isfinite(lse), lse, 0.0)  # of rows that see nothing: 0 * P
    sums = _split(finite, 3, queries.q.shape[4], queries.q.shape[0])

    def row(_: None, blocks: Any) -> Any:
        queries, d_queries, lse = blocks

        # Twice, so that no tile is kept for the way back, and none is made of zeros
        # where one is skipped.
        @jax.checkpoint
        def step(carry: Any, blocks: Any) -> Any:
            @jax.checkpoint
            def visit(carry: Any) -> Any:
                keys, d_keys = blocks
                logits, d_logits = jax.jvp(
                    functools.partial(_logits, pattern),
                    (queries.q, keys.k, keys.bias),
                    (d_queries.q, d_keys.k, d_keys.bias),
                )
                counts, kept = _tile_masks(pattern, extras, k.shape[2], queries, keys)
                if counts is not None:
                    logits = jnp.where(counts, logits, -jnp.inf)
                weights = jnp.exp(logits - lse[..., None])
                d_out, d_lse = carry
                d_lse += jnp.sum(weights * d_logits, axis=-1)
                weights = _dropped(pattern, weights, kept)
                d_out += _apply(weights, d_keys.v) + _apply(weights * d_logits, keys.v)
                return d_out, d_lse

            return _where_needed(pattern, queries, blocks[0], visit, carry), None

        start = (jnp.zeros(queries.q.shape, lse.dtype), jnp.zeros_like(lse))
        tiles = (_with_tiles(keys, queries), _with_tiles(d_keys, d_queries))
        changes, _ = lax.scan(step, start, tiles)
        return None, changes

    _, changes = lax.scan(row, None, (queries, d_queries, sums))
    d_out, d_lse = (_join(x, q.shape[3]) for x in changes)
    if extras.sinks is not None:
        share = jnp.exp(extras.sinks[None, ..., None] - finite)
        d_lse += share * d_sinks[None, ..., None]
    return (out, lse), (d_out - d_lse[..., None] * out, d_lse)


def _logits(
    pattern: Pattern, q: jax.Array, k: jax.Array, bias: jax.Array | None
) -> jax.Array:
    if q.dtype == jnp.bfloat16:
        logits = _product("bth,bsh->bts", q, k) * pattern.scale
    else:  # the queries are fewer than the logits
        logits = _product("bth,bsh->bts", _wide(q) * pattern.scale, k)
    if bias is not None:
        logits += bias.astype(logits.dtype)
    if pattern.softcap is not None:
        logits = pattern.softcap * jnp.tanh(logits / pattern.softcap)
    return logits


def _apply(weights: jax.Array, v: jax.Array) -> jax.Array:
    # Not in bfloat16: the gradient subtracts d_out * out from sums of the same weights.
    return _product("bts,bsh->bth", weights, v.astype(weights.dtype))


def _product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product with a float32 sum; float16 becomes float32, whose range it needs.

    The query heads of a key head are rows of one matrix: with an axis of their own XLA
    copies a tile to bring it next to the other rows.
    """
    shape = x.shape[:-1]
    x = x.reshape(shape[0] * shape[1], -1, x.shape[-1])
    y = y.reshape(-1, *y.shape[2:])
    if x.dtype == jnp.bfloat16:
        out = jnp.einsum(form, x, y, preferred_element_type=jnp.float32)
    else:
        out = jnp.einsum(form, _wide(x), _wide(y), precision="highest")
    return out.reshape(*shape, -1)


def _wide(x: Any) -> Any:
    return None if x is None else x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _dropped(pattern: Pattern, weights: jax.Array, kept: jax.Array | None) -> jax.Array:
    if kept is None:
        return weights
    return jnp.where(kept, weights / (1.0 - pattern.drop), 0.0)


def _tile_masks(
    pattern: Pattern, extras: Extras, length: int, queries: Queries, keys: Keys
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which pairs of a tile count, and which of them dropout keeps."""
    rows = _places(queries.index, queries.q).reshape(1, 1, 1, -1, 1)
    columns = _places(keys.index, keys.k).reshape(1, 1, 1, 1, -1)
    block = keys.k.shape[2]
    counts = allowed(
        pattern,
        rows,
        columns,
        mask=keys.mask,
        query_ids=None if queries.ids is None else queries.ids[..., None],
        key_ids=None if keys.ids is None else keys.ids[:, :, None, None],
        length=length if length % block else None,
    )
    if extras.seed is None:
        return counts, None
    heads = queries.q.shape[:3]
    head = jnp.arange(heads[0] * heads[1] * heads[2]).reshape(*heads, 1, 1)
    return counts, keep(extras.seed, head, rows, columns, pattern.drop)


def _where_needed(
    pattern: Pattern, queries: Queries, keys: Keys, visit: Any, carry: Any
) -> Any:
    """`visit(carry)`, or `carry` where no pair of the tile can count."""
    rows, columns = _places(queries.index, queries.q), _places(keys.index, keys.k)
    inside = needed(pattern, rows[0], rows[-1], columns[0], columns[-1])
    if queries.ids is not None and keys.ids is not None:
        ids = keys.ids[:, :, None]
        above = jnp.min(queries.ids, axis=-1) <= jnp.max(ids, axis=-1)
        below = jnp.min(ids, axis=-1) <= jnp.max(queries.ids, axis=-1)
        inside &= jnp.any(above & below)
    if inside is True:
        return visit(carry)
    return lax.cond(inside, visit, lambda carry: carry, carry)


def _places(index: jax.Array, block: jax.Array) -> jax.Array:
    """Positions in the whole sequence of the rows of a block `[..., rows, H]`."""
    return index * block.shape[-2] + jnp.arange(block.shape[-2])


def _block_sizes(pattern: Pattern, q: jax.Array, k: jax.Array) -> tuple[int, int]:
    """Rows of a block of queries and of keys; blocks of about equal size."""
    rows, columns = pattern.tile or TILE
    heads = q.shape[0] * q.shape[1] * q.shape[2]
    while not pattern.tile and heads * rows * columns > LARGEST and columns > 64:
        rows, columns = columns, rows // 2
    row_blocks, key_blocks = -(-q.shape[3] // rows), -(-k.shape[2] // columns)
    return -(-q.shape[3] // row_blocks), -(-k.shape[2] // key_blocks)


def _query_blocks(
    pattern: Pattern, q: jax.Array, k: jax.Array, extras: Extras
) -> Queries:
    rows, _ = _block_sizes(pattern, q, k)
    count = -(-q.shape[3] // rows)
    ids, bias, mask = (
        _split(x, 3, rows, count) for x in (extras.query_ids, extras.bias, extras.mask)
    )
    return Queries(jnp.arange(count), _split(q, 3, rows, count), ids, bias, mask)


def _key_blocks(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> Keys:
    _, columns = _block_sizes(pattern, q, k)
    count = -(-k.shape[2] // columns)
    k, v, ids = (_split(x, 2, columns, count) for x in (k, v, extras.key_ids))
    return Keys(jnp.arange(count), k, v, ids, None, None)


def _with_tiles(keys: Keys, queries: Queries) -> Keys:
    """The blocks of keys, each with its tile of the bias and the mask of a row."""
    count, columns = keys.k.shape[0], keys.k.shape[-2]
    bias, mask = (_split(x, 4, columns, count) for x in (queries.bias, queries.mask))
    return keys._replace(bias=bias, mask=mask)


def _split(x: Any, axis: int, block: int, count: int) -> Any:
    """`count` blocks of an axis on a new first one; an axis of length 1 is repeated."""
    if x is None:
        return None
    if x.shape[axis] == 1:
        return jnp.broadcast_to(x[None], (count, *x.shape))
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * block - x.shape[axis])
    # The last id again, so that the padding widens no block's range of ids.
    mode = "edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant"
    x = jnp.pad(x, widths, mode=mode)
    x = x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_split` on axis 3, without the padding."""
    x = jnp.moveaxis(x, 0, 3)
    x = x.reshape(*x.shape[:3], -1, *x.shape[5:])
    return x[:, :, :, :length]
