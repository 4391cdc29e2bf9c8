"""Tiles of the matrix of logits, for every kernel: their sizes, and which are visited.

The matrix is cut into tiles of `rows` queries and `columns` keys. A kernel that owns a
block of queries walks over the blocks of keys from `first` to `last`, which `ranges`
finds beforehand from the window, the ids and the masks; what lies outside is neither
computed nor fetched. A kernel that owns keys walks over queries in the same way.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.pattern import Extras, Pattern, needed

__all__ = [
    "LOG2E", "TABLE", "Sides", "Tiling", "pad", "ranges", "row_sums", "sides",
]  # fmt: skip

# Exponentials are of base 2 in the kernels.
LOG2E = math.log2(math.e)

# Entries of a table of ranges: two tables of int32 have to fit into 1 MiB of the scalar
# memory of a TPU.
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
        return -(-self.queries // self.rows), -(-self.keys // self.columns)

    @property
    def pairs(self) -> int:
        """How many pairs of a head lie within the window."""
        left, right = self.pattern.left, self.pattern.right
        rows = np.arange(self.queries)
        start = 0 if left is None else np.maximum(0, rows - left)
        stop = self.keys if right is None else np.minimum(self.keys, rows + right + 1)
        return int(np.sum(np.maximum(0, stop - start) + 0 * rows))


class Sides(NamedTuple):
    """What masks a tile, beside the window; None where there is none."""

    query_ids: Any  # int32 [B|1, K|1, G|1, 1, T]
    key_ids: Any  # int32 [B|1, K|1, 1, 1, S]
    query_mask: Any  # int32, as query_ids: a mask without an axis of keys
    key_mask: Any  # int32 [B|1, K|1, G|1, 1, S]: a mask without an axis of queries
    mask: Any  # int8 [B|1, K|1, G|1, T, S]


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


def row_sums(
    extras: Extras, out: Any, lse: Any, d_out: Any, d_lse: Any
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What the gradient needs of each query before it walks over the pairs.

    Args:
        extras: sinks are read.
        out: of the forward pass, `[B, K, G, T, H]`.
        lse: of the forward pass, `[B, K, G, T]`.
        d_out: the gradient with respect to `out`.
        d_lse: that with respect to `lse`; None: zero. Ignored where `lse` is -inf.

    Returns:
        `lse` to base 2, 0 where nothing counts; the sum of `out * d_out` less `d_lse`;
        and the gradient of sinks, `[K, G]`, None without sinks.
    """
    seen = lse > -jnp.inf
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    if d_lse is not None:
        delta -= jnp.where(seen, d_lse.astype(jnp.float32), 0.0)
    d_sinks = None
    if extras.sinks is not None:
        share = jnp.exp(jnp.where(seen, extras.sinks[None, :, :, None] - lse, -jnp.inf))
        d_sinks = -jnp.sum(share * delta, axis=(0, 3)).astype(extras.sinks.dtype)
    return jnp.where(seen, lse, 0.0) * LOG2E, delta, d_sinks


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


def _ends(numpy: Any, table: Any, axis: int) -> tuple[Any, Any]:
    """The first and the last True along an axis; (0, -1) if there is none."""
    some, size = table.any(axis), table.shape[axis]
    last = size - 1 - numpy.argmax(numpy.flip(table, axis), axis)
    return numpy.argmax(table, axis), numpy.where(some, last, -1)


def _blocks(row: jax.Array, block: int) -> jax.Array:
    """`[..., 1, n]` to `[..., n / block, block]`."""
    return row.reshape(*row.shape[:3], row.shape[4] // block, block)
