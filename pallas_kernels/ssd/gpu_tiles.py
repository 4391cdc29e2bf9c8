"""What the bodies of the GPU kernels have in common: places, loops and tiles.

Tiles in registers are [64, 64] or, like states, [64, N]. Of what is one number for each
token, a row lies down the rows of a tile or across its columns.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import Ring
from pallas_kernels.ssd.gpu_layout import ACROSS, CHUNK, DOWN, SQUARE, Plan

__all__ = [
    "WHOLE", "Place", "Walk", "across", "decays", "down", "later", "load_state",
    "place", "row", "spread", "tile", "weighted",
]  # fmt: skip

WHOLE = plgpu.Layout.WGMMA  # of a tile in registers
NEVER = -1e30  # the log 2 of the weight of a pair that does not count


class Place(NamedTuple):
    """Where a block of threads stands that owns a column: traced numbers."""

    batch: Any
    part: Any
    column: Any
    head: Any
    group: Any
    first: Any  # chunk
    count: Any  # of chunks

    def tokens(self, chunk: Any) -> tuple[Any, Any]:
        """The first two indices of a chunk's tokens."""
        return self.batch, pl.ds(chunk * CHUNK, CHUNK)

    def sources(self, rows: Any, wide: Any, numbers: Any, chunk: Any) -> tuple:
        """What is copied for a chunk."""
        tokens = self.tokens(chunk)
        return (
            rows.at[*tokens, self.column],
            *(x.at[*tokens, self.group] for x in wide),
            numbers.at[self.batch, self.head, chunk],
        )


def place(cut: Plan) -> Place:
    """From the indices of a block of threads in the grid."""
    batch, part, column = (lax.axis_index(x) for x in ("batch", "part", "column"))
    first = part * cut.per_part
    return Place(
        batch, part, column,
        head=lax.div(column, jnp.int32(cut.per_head)),
        group=lax.div(column, jnp.int32(cut.per_group)),
        first=first,
        count=jnp.minimum(cut.per_part, cut.chunks - first),
    )  # fmt: skip


class Walk(NamedTuple):
    """A loop over blocks of global memory, which a ring is filled with ahead.

    Attributes:
        first: index of a block.
        count: of blocks.
        ring: its memory.
        sources: of an index: what is copied.
        is_reversed: whether the last comes first.
    """

    first: Any
    count: Any
    ring: Ring
    sources: Callable[[Any], tuple]
    is_reversed: bool = False

    def run(self, step: Callable[..., Any], carry: Any, *, fills: bool = True) -> Any:
        """Runs `step(index, blocks, done, carry)` and gives the last carry.

        Args:
            step: of one block; calls `done`, a `commit_smem` too, when it has read.
            carry: what it is given, and gives.
            fills: whether this warpgroup asks for the copies.
        """
        ring, stages = self.ring, self.ring.buffers[0].shape[0]

        def index(now: Any) -> Any:
            return self.first + (self.count - 1 - now if self.is_reversed else now)

        def fill(now: Any) -> None:
            ring.fill(now, *self.sources(index(now)))

        def advance(now: Any, carry: Any) -> Any:
            def done() -> None:
                plgpu.commit_smem()  # copies write by another proxy than loads read by
                ring.release(now)
                if fills:
                    pl.when(now + stages < self.count)(lambda: fill(now + stages))

            return step(index(now), ring.take(now), done, carry)

        ring.begin()
        for now in range(stages if fills else 0):
            pl.when(now < self.count)(functools.partial(fill, jnp.int32(now)))
        carry = lax.fori_loop(0, self.count, advance, carry)
        if fills:
            ring.end()
        return carry


def load_state(at: Place, states: Any) -> jax.Array:
    """That of a part, `[64, N]`."""
    here = states.at[at.batch, at.part, at.column]
    # Under `shard_map` the type of what is loaded from an array says so, and that of a
    # result does not, and a loop carries one type.
    return 1.0 * plgpu.load(here, layout=WHOLE, optimized=False)


def tile(x: Any) -> jax.Array:
    """A tile of shared memory in registers, float32."""
    return plgpu.load(x, layout=WHOLE).astype(jnp.float32)


def weighted(x: Any, of: Any, which: int) -> jax.Array:
    """A tile times a row of numbers that lies down its rows, in its own dtype."""
    return (tile(x) * down(of, which)).astype(x.dtype)


def row(of: Any, which: int) -> jax.Array:
    """A row of numbers that lies down the rows of tiles."""
    return plgpu.load(of.at[which], layout=WHOLE.reduce(1))


def down(of: Any, which: int, shape: tuple[int, int] = SQUARE) -> jax.Array:
    """A row of numbers down the rows of a tile, over all of it."""
    return lax.broadcast_in_dim(row(of, which), shape, [0])


def across(of: Any, which: int) -> jax.Array:
    """A row of numbers across the columns of a tile, over all of it."""
    return spread(of.at[which])


def spread(x: Any) -> jax.Array:
    """A vector of shared memory across the columns of a tile, over all of it."""
    vector = plgpu.load(x, layout=WHOLE.reduce(0))
    return lax.broadcast_in_dim(vector, SQUARE, [1])


def decays(of: Any, *, after: int) -> jax.Array:
    """What is left at a later token, which lies along axis `after`, of one before."""
    sums = down(of, DOWN) - across(of, ACROSS)
    sums = sums if after == 0 else -sums
    return jnp.exp2(jnp.where(later(after), sums, NEVER))


def later(after: int, *, strictly: bool = False) -> jax.Array:
    """bool `[64, 64]`: the token along axis `after` is not before the other one."""
    late, early = (
        plgpu.broadcasted_iota(jnp.int32, SQUARE, axis, layout=WHOLE)
        for axis in (after, 1 - after)
    )
    return late > early if strictly else late >= early
