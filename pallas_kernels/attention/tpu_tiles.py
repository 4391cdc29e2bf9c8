"""Tiles on a TPU: where a kernel stands, and what counts in its tile.

On a TPU the last axis lies on 128 lanes, the one before it on 8 sublanes (32 for int8),
so blocks are multiples of these or whole axes; arrays are padded to whole blocks.
Vectors over positions, such as ids, are stored as rows `[1, n]`; `column` turns one
where it is needed upright.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.pattern import Pattern, allowed, keep
from pallas_kernels.attention.tiles import LOG2E, Sides, Tiling

__all__ = [
    "LANES",
    "Scalars",
    "Tile",
    "column",
    "dot",
    "dropped",
    "kept",
    "tile_logits",
    "tiling",
    "visit",
]

LANES = 128


class Scalars(NamedTuple):
    """What the kernels read before they start; None where there is none."""

    first: Any  # int32, flat: the first block to visit for each block that is owned
    last: Any  # the last one; less than `first` if there is none
    seed: Any  # uint32 [2]
    sinks: Any  # float32 [N]


class Tile(NamedTuple):
    """Where a kernel stands: traced block numbers, and whether keys go down."""

    batch: Any
    head: Any
    group: Any
    row: Any  # number of the block of queries
    column: Any  # of keys
    keys_down: bool  # the tile is [columns, rows]


def tiling(pattern: Pattern, q: jax.Array, k: jax.Array, size: tuple[int, int]) -> Any:
    """Cut a call into tiles of at most `size`, smaller ones for short sequences.

    Args:
        pattern: the static part of the call.
        q: `[B, K, G, T, H]`.
        k: `[B, K, S, H]`.
        size: queries and keys of a tile, multiples of 128.

    Returns:
        `Tiling`.
    """
    rows, columns = size
    queries, keys = q.shape[3], k.shape[2]
    # A single block may be a whole axis, then a multiple of 32 is enough.
    rows = min(rows, _up(queries, LANES if queries > LANES else 32))
    columns = min(columns, _up(keys, LANES))
    return Tiling(pattern, queries, keys, (q.shape[1], q.shape[2]), rows, columns)


def visit(
    tiles: Tiling,
    here: jax.Array,
    tile: Tile,
    masks: Sides,
    compute: Callable[[jax.Array | None], None],
) -> None:
    """Compute a tile if it is one to visit, with its mask if it needs one.

    Args:
        tiles: how the call is cut.
        here: whether the tile is to be visited.
        tile: where the kernel stands.
        masks: references to the blocks of this tile.
        compute: takes the mask of the tile, None if all of its pairs count.
    """
    pattern = tiles.pattern
    first_row, first_column = tile.row * tiles.rows, tile.column * tiles.columns
    cut = False  # by the window or the end of the keys
    if pattern.left is not None:
        cut |= first_column < first_row + tiles.rows - 1 - pattern.left
    if pattern.right is not None:
        cut |= first_column + tiles.columns - 1 > first_row + pattern.right
    if tiles.keys % tiles.columns:
        cut |= tile.column == tiles.grid[1] - 1
    if any(x is not None for x in masks):
        cut = True

    def masked() -> None:
        compute(_counts(tiles, tile, masks))

    def whole() -> None:
        compute(None)

    if isinstance(cut, bool):
        pl.when(here)(masked if cut else whole)
    else:
        pl.when(here & cut)(masked)
        pl.when(here & ~cut)(whole)


def kept(tiles: Tiling, tile: Tile, seed: Any) -> jax.Array:
    """Which pairs of a tile dropout keeps."""
    heads, groups = tiles.heads
    head = (tile.batch * heads + tile.head) * groups + tile.group
    return keep(
        (seed[0], seed[1]),  # pyright: ignore
        head,
        *_positions(tiles, tile),
        tiles.pattern.drop,
    )


def column(row: jax.Array) -> jax.Array:
    """`[1, n]` to `[n, 1]`, of 32 bits."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _counts(tiles: Tiling, tile: Tile, masks: Sides) -> jax.Array | None:
    """Which pairs of a tile count, shaped as the tile or as a row or column of it."""

    def queries(x: Any) -> jax.Array:
        return x[...] if tile.keys_down else column(x[...])

    def keys(x: Any) -> jax.Array:
        return column(x[...]) if tile.keys_down else x[...]

    mask = None
    if masks.query_mask is not None:
        mask = queries(masks.query_mask) != 0
    elif masks.key_mask is not None:
        mask = keys(masks.key_mask) != 0
    elif masks.mask is not None:
        mask = masks.mask[...].astype(jnp.int32)
        mask = (mask.T if tile.keys_down else mask) != 0
    rows, columns = _positions(tiles, tile)
    has_ids = masks.query_ids is not None
    return allowed(
        tiles.pattern,
        rows,
        columns,
        mask=mask,
        query_ids=queries(masks.query_ids) if has_ids else None,
        key_ids=keys(masks.key_ids) if has_ids else None,
        length=tiles.keys if tiles.keys % tiles.columns else None,
    )


def _positions(tiles: Tiling, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Positions of a tile's queries and keys, one of them upright."""

    def along(start: Any, size: int, down: bool) -> jax.Array:
        shape = (size, 1) if down else (1, size)
        return start * size + lax.broadcasted_iota(jnp.int32, shape, 1 - down)

    return (
        along(tile.row, tiles.rows, not tile.keys_down),
        along(tile.column, tiles.columns, tile.keys_down),
    )


def tile_logits(
    pattern: Pattern, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Logits in units of log 2, and the derivative of the softcap."""
    products, cap = dot(a, b, 1, 1), pattern.softcap
    if cap is None:
        return products * (pattern.scale * LOG2E), None
    bent = jnp.tanh(products * (pattern.scale / cap))
    return bent * (cap * LOG2E), 1.0 - bent * bent


def dropped(tiles: Tiling, tile: Tile, scalars: Scalars, x: jax.Array) -> jax.Array:
    """A tile with the dropped pairs at 0 and the others divided by the kept share."""
    share = 1.0 - tiles.pattern.drop
    return jnp.where(kept(tiles, tile, scalars.seed), x * (1.0 / share), 0.0)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The product over these axes, exact of float32, native of bfloat16."""
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
