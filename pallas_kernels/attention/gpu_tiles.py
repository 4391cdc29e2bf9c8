"""What a block of threads of the GPU kernels works on: its range, its tiles, its masks.

A block owns some queries (for out and dQ) or keys (for dK and dV) and walks over blocks
of the others, `first` to `last` of the tables of `tiles.ranges`. Tiles that lie
within the window are computed without a mask: `spans` cuts the walk for it.

In registers a tile is `[owned, walked]`; vectors over positions lie along its rows or
columns. Queries, keys and values are padded by nobody: a copy beyond the end of an axis
reads zeros and writes nothing. Vectors are padded to whole blocks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.pattern import Extras, allowed, keep
from pallas_kernels.attention.tiles import LOG2E, Sides, Tiling, ranges, sides

__all__ = [
    "WHOLE", "Beside", "Cut", "Ids", "Place", "cut", "dropped", "logits",
    "masked", "place", "spans", "spread", "vector", "walk",
]  # fmt: skip

NEVER = -2e30  # the logit of a pair that does not count
WHOLE = plgpu.Layout.WGMMA  # of a tile in registers


class Ids(NamedTuple):
    """Segments of queries and keys, and masks of either as segments of their own."""

    queries: Any  # int32 [B|1, K|1, G|1, T]
    keys: Any  # int32 [B|1, K|1, G|1, S]


class Beside(NamedTuple):
    """What a kernel reads beside queries, keys and values; None where there is none."""

    first: Any  # int32, flat: the first block to visit for each block that is owned
    last: Any  # the last one; less than `first` if there is none
    ids: Ids | None
    sinks: Any  # float32 [N]
    seed: Any  # uint32 [2]


class Cut(NamedTuple):
    """How a call is cut; static."""

    tiles: Tiling
    table: tuple[int, ...]  # (B|1, K|1, G|1, n) of the tables of ranges
    by_keys: bool  # whether a block of threads owns keys
    width: int  # H with its padding

    @property
    def own(self) -> int:
        """Positions that a block of threads owns."""
        return self.tiles.columns if self.by_keys else self.tiles.rows

    @property
    def step(self) -> int:
        """Positions of a block that is walked over."""
        return self.tiles.rows if self.by_keys else self.tiles.columns

    @property
    def blocks(self) -> int:
        """Blocks that are owned."""
        return self.tiles.grid[self.by_keys]


class Place(NamedTuple):
    """Where a block of threads stands: traced numbers."""

    batch: Any
    key_head: Any
    group: Any
    head: Any  # of queries
    own: Any  # the first position that it owns
    low: Any  # the first block to visit
    high: Any  # the one after the last

    def ids(self, ids: Any, start: Any, size: int) -> Any:
        """A reference to `size` of the ids from `start` on."""
        places = zip((self.batch, self.key_head, self.group), ids.shape, strict=False)
        return ids.at[*(i if n > 1 else 0 for i, n in places), pl.ds(start, size)]


def cut(
    tiles: Tiling, extras: Extras, width: int, *, by_keys: bool
) -> tuple[Cut, Beside]:
    """Cut a call, and bring what stands beside its arrays into the form of the kernels.

    Args:
        tiles: sizes.
        extras: no bias, no mask over pairs.
        width: of the heads, with padding.
        by_keys: whether the kernel owns keys.
    """
    masks = sides(tiles, extras)
    first, last, table, _ = ranges(tiles, masks, by_keys)
    sinks = extras.sinks
    if sinks is not None:
        sinks = sinks.reshape(-1).astype(jnp.float32)
    beside = Beside(first, last, _ids(tiles, masks), sinks, extras.seed)
    return Cut(tiles, table, by_keys, width), beside


def place(cut: Cut, beside: Beside, batch: Any, key_head: Any, group: Any) -> Place:
    """Where the block of threads of a head stands, from its index on axis "block"."""
    block = lax.axis_index("block")
    if not cut.by_keys:  # under a causal mask the longest first
        block = cut.blocks - 1 - block
    at: Any = 0
    for size, index in zip(cut.table, (batch, key_head, group, block), strict=True):
        at = at * size + (index if size > 1 else 0)
    head = key_head * cut.tiles.heads[1] + group
    own = block * cut.own
    low, high = beside.first[at], beside.last[at] + 1
    return Place(batch, key_head, group, head, own, low, jnp.maximum(low, high))


def spans(cut: Cut, at: Place, has_ids: bool) -> list[tuple[Any, Any, bool]]:
    """Parts `(start, stop, masked)` of the walk from `at.low` to `at.high`."""
    if has_ids:
        return [(at.low, at.high, True)]
    tiles, pattern = cut.tiles, cut.tiles.pattern
    before, after = pattern.left, pattern.right
    if cut.by_keys:
        before, after = after, before
    # Keys beyond the last are masked where they are walked over; those that are owned
    # are not written.
    ragged = not cut.by_keys and tiles.keys % cut.step > 0
    parts, start, stop = [], at.low, at.high
    if before is not None:
        missed = jnp.maximum(at.own + (cut.own - 1 - before), 0)
        start = jnp.clip(lax.div(missed + cut.step - 1, cut.step), at.low, at.high)
        parts.append((at.low, start, True))
    if after is not None:
        seen = jnp.maximum(at.own + (after + 1), 0)
        stop = jnp.minimum(stop, lax.div(seen, cut.step))
    if ragged:
        stop = jnp.minimum(stop, tiles.keys // cut.step)
    stop = jnp.maximum(start, stop)
    parts.append((start, stop, False))
    if after is not None or ragged:
        parts.append((stop, at.high, True))
    return parts


def walk(
    cut: Cut, at: Place, beside: Beside, step: Callable[..., Any], carry: Any
) -> Any:
    """Runs `step(is_masked, block, carry)` over what a place has to visit."""
    for start, stop, is_masked in spans(cut, at, beside.ids is not None):
        body = functools.partial(step, is_masked)
        carry = lax.fori_loop(start, stop, body, carry)
    return carry


def logits(cut: Cut, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Logits in units of log 2, and the derivative of the softcap."""
    pattern = cut.tiles.pattern
    if pattern.softcap is None:
        return products * (pattern.scale * LOG2E), None
    # tanh x = 1 - 2 / (1 + e^(2x)): the instruction for tanh knows 11 bits.
    twice = products * (2 * LOG2E * pattern.scale / pattern.softcap)
    bent = 1.0 - 2.0 / (1.0 + jnp.exp2(twice))
    return bent * (pattern.softcap * LOG2E), 1.0 - bent * bent


def masked(cut: Cut, x: jax.Array, row: Any, column: Any, ids: Ids | None) -> jax.Array:
    """Logits of a tile with `NEVER` where a pair does not count.

    Args:
        cut: how the call is cut.
        x: the logits, `[owned, walked]`.
        row: position of the first query.
        column: position of the first key.
        ids: vectors in registers, of the queries and keys.
    """
    rows, columns = _positions(cut, x.shape, row, column)
    of: dict[str, Any] = {}
    if ids is not None:
        of["query_ids"] = spread(ids.queries, x.shape, int(cut.by_keys))
        of["key_ids"] = spread(ids.keys, x.shape, 1 - int(cut.by_keys))
    ragged = not cut.by_keys and cut.tiles.keys % cut.tiles.columns > 0
    length = cut.tiles.keys if ragged else None
    mask = allowed(cut.tiles.pattern, rows, columns, length=length, **of)
    return x if mask is None else jnp.where(mask, x, NEVER)


def dropped(
    cut: Cut, x: jax.Array, beside: Beside, at: Place, row: Any, column: Any
) -> jax.Array:
    """A tile with the pairs that dropout drops at 0, and the others scaled."""
    if beside.seed is None:
        return x
    drop = cut.tiles.pattern.drop
    rows, columns = _positions(cut, x.shape, row, column)
    heads, groups = cut.tiles.heads
    head = at.batch * (heads * groups) + at.head
    seed: Any = (beside.seed[0], beside.seed[1])
    return jnp.where(keep(seed, head, rows, columns, drop), x * (1 / (1 - drop)), 0.0)


def vector(x: Any, axis: int) -> jax.Array:
    """A vector of shared memory in registers, to lie along an axis of tiles."""
    return plgpu.load(x, layout=WHOLE.reduce(1 - axis))


def spread(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A vector along an axis of a tile, over all of it."""
    return lax.broadcast_in_dim(x, shape, [axis])


def _positions(
    cut: Cut, shape: tuple[int, ...], row: Any, column: Any
) -> tuple[jax.Array, jax.Array]:
    down, across = (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WHOLE) for axis in (0, 1)
    )
    rows, columns = (across, down) if cut.by_keys else (down, across)
    return rows + row, columns + column


def _ids(tiles: Tiling, masks: Sides) -> Ids | None:
    """Ids as vectors; what a mask leaves out gets a segment of its own."""
    queries, keys = masks.query_ids, masks.key_ids
    if queries is None and masks.query_mask is None and masks.key_mask is None:
        return None
    if queries is None:
        down, across = tiles.grid
        queries = jnp.zeros((1, 1, 1, 1, down * tiles.rows), jnp.int32)
        keys = jnp.zeros((1, 1, 1, 1, across * tiles.columns), jnp.int32)
    # One for each side, so that they differ, and at the end of the range of ids.
    lowest = jnp.iinfo(jnp.int32).min
    if masks.query_mask is not None:
        queries = jnp.where(masks.query_mask != 0, queries, lowest)
    if masks.key_mask is not None:
        keys = jnp.where(masks.key_mask != 0, keys, lowest + 1)
    return Ids(queries[:, :, :, 0], keys[:, :, :, 0])
