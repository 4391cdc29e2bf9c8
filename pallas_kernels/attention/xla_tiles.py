"""What attention in plain XLA does with a tile: a block of queries against one of keys.

The last block of either side is padded. Tiles are `[B, K, G, rows, columns]`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.pattern import Extras, Pattern, allowed, keep

__all__ = [
    "Keys", "Queries", "dropped", "ids_meet", "join", "key_blocks", "logits_of",
    "places", "product", "product_t", "query_blocks", "split", "tile_masks",
    "transposed", "wide", "with_tiles",
]  # fmt: skip


class Queries(NamedTuple):
    """A block of queries."""

    index: jax.Array
    q: jax.Array
    ids: jax.Array | None
    bias: jax.Array | None  # of this block of queries, for all keys
    mask: jax.Array | None


class Keys(NamedTuple):
    """A block of keys with its tile of bias and mask."""

    index: jax.Array
    k: jax.Array
    v: jax.Array
    ids: jax.Array | None
    bias: jax.Array | None
    mask: jax.Array | None


def query_blocks(rows: int, q: jax.Array, extras: Extras) -> Queries:
    """All blocks of queries, on a new first axis."""
    q, ids, bias, mask = (
        split(x, 3, rows, q.shape[3])
        for x in (q, extras.query_ids, extras.bias, extras.mask)
    )
    return Queries(jnp.arange(q.shape[0]), q, ids, bias, mask)


def key_blocks(columns: int, k: jax.Array, v: jax.Array, extras: Extras) -> Keys:
    """All blocks of keys, on a new first axis, still without tiles."""
    k, v, ids = (split(x, 2, columns, k.shape[2]) for x in (k, v, extras.key_ids))
    return Keys(jnp.arange(k.shape[0]), k, v, ids, None, None)


def with_tiles(keys: Keys, queries: Queries, length: int) -> Keys:
    """The blocks of keys, each with its tile of the bias and the mask of a row."""
    bias, mask = (
        split(x, 4, keys.k.shape[-2], length) for x in (queries.bias, queries.mask)
    )
    return keys._replace(bias=bias, mask=mask)


def split(x: Any, axis: int, block: int, length: int) -> Any:
    """Blocks of an axis on a new first one; an axis of length 1 is repeated.

    Args:
        x: an array, or None.
        axis: which has `length` entries, or 1.
        block: entries of a block.
        length: of the axis, if it is not 1.

    Returns:
        `[blocks, ..., block, ...]`, padded with zeros, ids with the last id; or None.
    """
    if x is None:
        return None
    count = -(-length // block)
    if x.shape[axis] == 1:
        return jnp.broadcast_to(x[None], (count, *x.shape))
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * block - length)
    # The last id again, so that the padding widens no block's range of ids.
    mode = "edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant"
    x = jnp.pad(x, widths, mode=mode)
    x = x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def join(blocks: Any, axis: int, shape: tuple[int, ...]) -> Any:
    """The transpose of `split`: blocks in a row, repeated ones summed.

    Args:
        blocks: `[blocks, ..., block, ...]`, or None.
        axis: of what was split.
        shape: of what was split.

    Returns:
        An array of this shape, without the padding; or None.
    """
    if blocks is None:
        return None
    if shape[axis] == 1:
        return jnp.sum(blocks, axis=0)
    x = jnp.moveaxis(blocks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, shape[axis], axis=axis)


def logits_of(
    pattern: Pattern, products: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """The logits of a tile from its scaled products."""
    logits = products if bias is None else products + bias.astype(products.dtype)
    if pattern.softcap is not None:
        logits = pattern.softcap * jnp.tanh(logits / pattern.softcap)
    return logits


def product(form: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product with a float32 sum; float16 becomes float32, whose range it needs.

    The query heads of a key head are rows of one matrix: with an axis of their own XLA
    copies a tile to bring it next to the other rows.

    Args:
        form: of an einsum over `[heads, rows, columns]`.
        x: of queries, `[B, K, G, rows, columns]`.
        y: of keys, `[B, K, rows, columns]`.

    Returns:
        `[B, K, G, rows, columns]`.
    """
    shape = x.shape[:-1]
    x = x.reshape(shape[0] * shape[1], -1, x.shape[-1])
    y = y.reshape(-1, *y.shape[2:])
    if x.dtype == jnp.bfloat16:
        out = jnp.einsum(form, x, y, preferred_element_type=jnp.float32)
    else:
        out = jnp.einsum(form, wide(x), wide(y), precision="highest")
    return out.reshape(*shape, -1)


def transposed(x: jax.Array) -> jax.Array:
    """The rows of a block of queries as columns: `[B, K, H, G * rows]`."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1]).swapaxes(-1, -2)


def product_t(x: jax.Array, tile: jax.Array) -> jax.Array:
    """A product of `transposed` queries and a tile, `[B, K, H, columns]`.

    XLA's CPU backend takes twice as long where the sum is over the rows of both.
    """
    tile = tile.reshape(*tile.shape[:2], -1, tile.shape[-1])
    return jnp.einsum("bkht,bkts->bkhs", x, tile, precision="highest")


def wide(x: Any) -> Any:
    """In float32 at least."""
    return None if x is None else x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dropped(pattern: Pattern, weights: jax.Array, kept: jax.Array | None) -> jax.Array:
    """Weights after dropout; it is its own transpose."""
    if kept is None:
        return weights
    return jnp.where(kept, weights / (1.0 - pattern.drop), 0.0)


def tile_masks(
    pattern: Pattern, extras: Extras, length: int, queries: Queries, keys: Keys
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which pairs of a tile count, and which of them dropout keeps; None: all."""
    rows = places(queries.index, queries.q).reshape(1, 1, 1, -1, 1)
    columns = places(keys.index, keys.k).reshape(1, 1, 1, 1, -1)
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


def ids_meet(queries: Queries, keys: Keys) -> jax.Array | bool:
    """Whether two ids of a tile can be equal."""
    if queries.ids is None or keys.ids is None:
        return True
    ids = keys.ids[:, :, None]
    above = jnp.min(queries.ids, axis=-1) <= jnp.max(ids, axis=-1)
    below = jnp.min(ids, axis=-1) <= jnp.max(queries.ids, axis=-1)
    return jnp.any(above & below)


def places(index: jax.Array, block: jax.Array) -> jax.Array:
    """Positions in the whole sequence of the rows of a block `[..., rows, H]`."""
    return index * block.shape[-2] + jnp.arange(block.shape[-2])
