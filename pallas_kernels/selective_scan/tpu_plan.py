"""How the arrays of a selective scan stand on a TPU, and in which blocks.

    grid (batch row, block of tokens, block of channels)

Channels are on lanes, states on sublanes. Blocks of tokens are walked in order, with
the state of every channel in scratch memory between them; blocks of channels come last,
so that B, C and their gradients, which all channels of a group share, move once.

B and C have 128 tokens on the lanes, `[B, G, T / 128, N, 128]`: as `[..., N]` they
would be padded to 128 lanes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.selective_scan.terms import Inputs

__all__ = ["LANES", "Plan", "plan_of"]

LANES = 128
ROOM = 2**23  # bytes of the states of a block, in the gradient


class Plan(NamedTuple):
    """The sizes of a call.

    Attributes:
        batch: B.
        length: T.
        groups: G.
        channels: P, of a group.
        states: N.
        size: tokens of a block.
        width: channels of a block.
        blocks: of tokens.
        across: blocks of channels of a group.
    """

    batch: int
    length: int
    groups: int
    channels: int
    states: int
    size: int
    width: int
    blocks: int
    across: int

    @property
    def rows(self) -> int:
        """N in whole sublanes."""
        return -(-self.states // 8) * 8

    @property
    def whole(self) -> int:
        """T in whole blocks."""
        return self.blocks * self.size

    @property
    def columns(self) -> int:
        """Blocks of channels of all groups."""
        return self.groups * self.across

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.blocks, self.columns

    def by_token(self, x: jax.Array) -> jax.Array:
        """`[B, T, G, P]` as `[B, T', D']`, with 0 in what is added."""
        extra = self.across * self.width - self.channels
        late = self.whole - self.length
        x = jnp.pad(x, ((0, 0), (0, late), (0, 0), (0, extra)))
        return x.reshape(self.batch, self.whole, self.columns * self.width)

    def from_token(self, x: jax.Array) -> jax.Array:
        x = x.reshape(self.batch, self.whole, self.groups, -1)
        return x[:, : self.length, :, : self.channels]

    def by_lane(self, x: jax.Array) -> jax.Array:
        """`[B, T, G, N]` as `[B, G, T' / 128, N', 128]`."""
        late, extra = self.whole - self.length, self.rows - self.states
        x = jnp.pad(x, ((0, 0), (0, late), (0, 0), (0, extra)))
        x = x.reshape(self.batch, -1, LANES, self.groups, self.rows)
        return x.transpose(0, 3, 1, 4, 2)

    def from_lane(self, x: jax.Array) -> jax.Array:
        x = x.transpose(0, 2, 4, 1, 3).reshape(
            self.batch, self.whole, self.groups, self.rows
        )
        return x[:, : self.length, :, : self.states]

    def by_channel(self, x: jax.Array) -> jax.Array:
        """`[..., G, N, P]` as `[..., columns, N', width]`, float32."""
        lead, extra = x.shape[:-3], self.across * self.width - self.channels
        x = x.astype(jnp.float32)
        add = [(0, 0)] * (x.ndim - 2) + [(0, self.rows - self.states), (0, extra)]
        x = jnp.pad(x, add)
        x = x.reshape(*lead, self.groups, self.rows, self.across, self.width)
        x = jnp.swapaxes(x, -3, -2)
        return x.reshape(*lead, self.columns, self.rows, self.width)

    def from_channel(self, x: jax.Array) -> jax.Array:
        lead = x.shape[:-3]
        x = x.reshape(*lead, self.groups, self.across, self.rows, self.width)
        x = jnp.swapaxes(x, -3, -2).reshape(*lead, self.groups, self.rows, -1)
        return x[..., : self.states, : self.channels]

    def vectors(self, *rows: jax.Array | None) -> jax.Array:
        """Arrays `[G, P]` as rows of `[columns, 8, width]`; None is 0."""
        extra = self.across * self.width - self.channels
        zero = jnp.zeros((self.groups, self.channels), jnp.float32)
        x = jnp.stack([zero if r is None else r.astype(jnp.float32) for r in rows])
        x = jnp.pad(x, ((0, 8 - len(rows)), (0, 0), (0, extra)))
        return x.reshape(8, self.columns, self.width).transpose(1, 0, 2)

    def from_vector(self, x: jax.Array) -> jax.Array:
        """One row, `[columns, width]`, as `[G, P]`."""
        return x.reshape(self.groups, -1)[:, : self.channels]

    def spec(self, kind: str, *, backwards: bool = False) -> pl.BlockSpec:
        """The blocks of an array.

        Args:
            kind: "token", "lane", "mark", "kept" (states by blocks of tokens), "first"
                or "last" (states of a batch row, for the first or last step over
                tokens), "all" (of every channel, for all batch rows) or "row" (of every
                channel, of a batch row).
            backwards: blocks of tokens are walked from the last to the first.
        """
        size, width, rows = self.size, self.width, self.rows
        end, across = self.blocks - 1, self.across
        tiles = size // LANES

        def at(step: Any) -> Any:
            return end - step if backwards else step

        last = self.columns - 1
        block, index = {
            "token": ((None, size, width), lambda b, j, d: (b, at(j), d)),
            "lane": (
                (None, None, tiles, rows, LANES),
                lambda b, j, d: (b, lax.div(d, across), at(j), 0, 0),
            ),
            "mark": ((None, tiles, 1, LANES), lambda b, j, d: (b, at(j), 0, 0)),
            "kept": (
                (None, None, None, rows, width),
                lambda b, j, d: (b, at(j), d, 0, 0),
            ),
            # Outside of their step they stay where they are, and do not move.
            "first": (
                (None, None, rows, width),
                lambda b, j, d: (b, jnp.where(j == 0, d, last), 0, 0),
            ),
            "last": (
                (None, None, rows, width),
                lambda b, j, d: (b, jnp.where(j == end, d, 0), 0, 0),
            ),
            "all": ((self.columns, rows, width), lambda b, j, d: (0, 0, 0)),
            "vectors": ((self.columns, 8, width), lambda b, j, d: (0, 0, 0)),
            "row": (
                (None, self.columns, rows, width), lambda b, j, d: (b, 0, 0, 0),
            ),
            "row vectors": (
                (None, self.columns, 8, width), lambda b, j, d: (b, 0, 0, 0),
            ),
        }[kind]  # fmt: skip
        return pl.BlockSpec(block, index)

    def shape(self, kind: str) -> tuple[int, ...]:
        """Of the array that `spec` is for."""
        states = (self.columns, self.rows, self.width)
        return {
            "token": (self.batch, self.whole, self.columns * self.width),
            "lane": (
                self.batch, self.groups, self.whole // LANES, self.rows, LANES,
            ),
            "kept": (self.batch, self.blocks, *states),
            "first": (self.batch, *states),
            "last": (self.batch, *states),
            "row": (self.batch, *states),
            "row vectors": (self.batch, self.columns, 8, self.width),
        }[kind]  # fmt: skip


def plan_of(inputs: Inputs) -> Plan:
    """The sizes of a call: blocks that are large, and fit with their states."""
    batch, length, groups, channels = inputs.u.shape
    states = inputs.A.shape[1]
    size = LANES if length <= LANES or states > LANES else 2 * LANES
    tiles = -(-channels // LANES)
    of_lanes = size * -(-states // 8) * 8 * LANES * 4
    most = max(1, min(4, ROOM // of_lanes))
    wide = max(k for k in range(1, most + 1) if tiles % k == 0)
    return Plan(
        batch=batch,
        length=length,
        groups=groups,
        channels=channels,
        states=states,
        size=size,
        width=wide * LANES,
        blocks=-(-length // size),
        across=tiles // wide,
    )
