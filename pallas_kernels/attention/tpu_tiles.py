"""Tiles for the TPU kernels: their sizes, which are visited, what counts in one.

The matrix of logits is cut into tiles of `rows` queries and `columns` keys. A kernel
that owns a block of queries walks over the blocks of keys from `first` to `last`, which
`ranges` finds beforehand from the window, the ids and the masks; what lies outside is
neither computed nor fetched. Arrays are padded to whole blocks.

On a TPU the last axis lies on 128 lanes, the one before it on 8 sublanes (32 for int8),
so blocks are multiples of these or whole axes. Vectors over positions, such as ids,
are stored as rows `[1, n]`; `column` turns one where it is needed upright.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention.pattern import Extras, Pattern, allowed, keep, needed

__all__ = [
    "LANES",
    "Scalars",
    "Sides",
    "Tile",
    "Tiling",
    "column",
    "kept",
    "pad",
    "ranges",
    "sides",
    "tiling",
    "visit",
]

LANES = 128
# Entries of a table of ranges: two tables of int32 have to fit into 1 MiB of SMEM.
TABLE = 2**15


class Tiling(NamedTuple):
    """How a call is cut; static."""

    pattern: Pattern
    queries: int  # T, without padding
    keys: int  # S
    heads: tuple[int, int]  # K, G
    rows: int  # queries of a tile
    columns: int  # keys of a tile

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks of queries, and of keys."""
        return pl.cdiv(self.queries, self.rows), pl.cdiv(self.keys, self.columns)


class Scalars(NamedTuple):
    """What the kernels read before they start; None where there is none."""

    first: Any  # int32, flat: the first block to visit for each block that is owned
    last: Any  # the last one; less than `first` if there is none
    seed: Any  # uint32 [2]
    sinks: Any  # float32 [N]


class Sides(NamedTuple):
    """What masks a tile, beside the window; None where there is none."""

    query_ids: Any  # int32 [B|1, K|1, G|1, 1, T]
    key_ids: Any  # int32 [B|1, K|1, 1, 1, S]
    query_mask: Any  # int32, as query_ids: a mask without an axis of keys
    key_mask: Any  # int32 [B|1, K|1, G|1, 1, S]: a mask without an axis of queries
    mask: Any  # int8 [B|1, K|1, G|1, T, S]


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


def pad(x: jax.Array, axis: int, block: int, value: Any = 0) -> jax.Array:
    """Lengthen an axis to a multiple of `block`, with `value` or "edge" values."""
    missing = -x.shape[axis] % block
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    if value == "edge":
        return jnp.pad(x, widths, mode="edge")
    return jnp.pad(x, widths, constant_values=value)


def sides(tiles: Tiling, extras: Extras) -> Sides:
    """Ids and masks as the kernels read them: integers, padded, vectors as rows."""
    query_ids, key_ids, mask = extras.query_ids, extras.key_ids, extras.mask
    if query_ids is None or key_ids is None:
        query_ids = key_ids = None
    else:
        # Padded with what is there, so that the bounds of a block stay narrow.
        query_ids = pad(query_ids, 3, tiles.rows, "edge")[:, :, :, None]
        key_ids = pad(key_ids, 2, tiles.columns, "edge")[:, :, None, None]
    query_mask = key_mask = None
    if mask is not None and mask.shape[4] == 1 and tiles.keys > 1:
        shape = (*mask.shape[:3], tiles.queries, 1)
        rows = jnp.swapaxes(jnp.broadcast_to(mask, shape), 3, 4)
        query_mask, mask = pad(rows.astype(jnp.int32), 4, tiles.rows), None
    elif mask is not None and mask.shape[3] == 1:
        rows = jnp.broadcast_to(mask, (*mask.shape[:4], tiles.keys))
        key_mask, mask = pad(rows.astype(jnp.int32), 4, tiles.columns), None
    elif mask is not None:
        mask = pad(pad(mask.astype(jnp.int8), 3, tiles.rows), 4, tiles.columns)
    return Sides(query_ids, key_ids, query_mask, key_mask, mask)


def ranges(
    tiles: Tiling, masks: Sides, by_keys: bool
) -> tuple[jax.Array, jax.Array, tuple[int, ...], int]:
    """Which blocks each block has to visit.

    Args:
        tiles: how the call is cut.
        masks: what `sides` gave.
        by_keys: a block of keys visits blocks of queries, else the other way round.

    Returns:
        `(first, last, shape, steps)`: int32 tables of `shape` `(B|1, K|1, G|1, n)`,
        flat; and the most blocks that any block can have to visit.
    """
    (rows, columns), (down, across) = (tiles.rows, tiles.columns), tiles.grid
    i, j = np.arange(down)[:, None] * rows, np.arange(across)[None] * columns
    last_row = np.minimum(i + rows, tiles.queries) - 1
    last_column = np.minimum(j + columns, tiles.keys) - 1
    window = needed(tiles.pattern, i, last_row, j, last_column)  # pyright: ignore
    window = np.broadcast_to(np.asarray(window), (down, across))
    axis = 0 if by_keys else 1
    low, high = _ends(np, window, axis)
    steps = max(1, int(np.max(high - low + 1)))

    parts = []
    if masks.query_ids is not None:
        ids, others = _blocks(masks.query_ids, rows), _blocks(masks.key_ids, columns)
        parts.append(ids.min(-1)[..., None] <= others.max(-1)[:, :, :, None])
        parts.append(ids.max(-1)[..., None] >= others.min(-1)[:, :, :, None])
    if masks.query_mask is not None:
        parts.append(_blocks(masks.query_mask, rows).any(-1)[..., None])
    if masks.key_mask is not None:
        parts.append(_blocks(masks.key_mask, columns).any(-1)[:, :, :, None])
    if masks.mask is not None:
        shape = (*masks.mask.shape[:3], down, rows, across, columns)
        parts.append(masks.mask.reshape(shape).any((4, 6)))
    if parts:
        table: Any = jnp.asarray(window)[None, None, None]
        for part in parts:
            table &= part
        for same in ((1, 2), 0):  # too many for the scalar memory: one for all heads
            if table.size // table.shape[4 - axis] > TABLE:
                table = table.any(same, keepdims=True)
        low, high = _ends(jnp, table, 3 + axis)
    else:
        low, high = (x[None, None, None] for x in (low, high))
    low, high = (jnp.asarray(x, jnp.int32) for x in (low, high))
    return low.reshape(-1), high.reshape(-1), low.shape, steps


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


def _ends(numpy: Any, table: Any, axis: int) -> tuple[Any, Any]:
    """The first and the last True along an axis; (0, -1) if there is none."""
    some, size = table.any(axis), table.shape[axis]
    last = size - 1 - numpy.argmax(numpy.flip(table, axis), axis)
    return numpy.argmax(table, axis), numpy.where(some, last, -1)


def _blocks(row: jax.Array, block: int) -> jax.Array:
    """`[..., 1, n]` to `[..., n / block, block]`."""
    return row.reshape(*row.shape[:3], row.shape[4] // block, block)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
