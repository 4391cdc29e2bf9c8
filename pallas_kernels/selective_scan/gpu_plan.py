"""How the GPU kernels cut a call, and the forms in which arrays come to them.

A block of 128 threads owns 32 channels of a row of the batch, and walks over chunks of
32 tokens. States go 16 at a time: four threads share a channel and have four each. An
array over tokens and channels is copied as it is, where its axes are whole tiles of 8
tokens and of 32 channels; a copy beyond its end reads zeros and writes nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import Ring
from pallas_kernels.selective_scan.terms import Inputs

__all__ = [
    "CHUNK", "CHUNK_OF", "GROUP", "SINGLE", "STATE", "STATES", "WIDTH",
    "Plan", "Room", "Task", "plan_of",
]  # fmt: skip

WIDTH = 32  # channels of a block
STATES = 16  # computed at a time
CHUNK = 32  # tokens between the states that are kept
GROUP = 8  # tokens whose states are in registers together


def _layout(*tiles: tuple[int, ...], warps: int, lanes: tuple[int, int]) -> Any:
    """Arrays in whole tiles, cut by warps, then by threads, each with some neighbours.

    Args:
        tiles: of a block of threads, of a warp, of a thread.
        warps: the axis of tiles of tiles that warps are along, from the end.
        lanes: those that threads of a warp are along.
    """
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiles), warp_dims=(warps,), lane_dims=lanes, vector_dim=-1
    )


# Of [channels, tokens, states]: a thread has four states of a channel, of all tokens.
STATE = _layout(
    (WIDTH, 1, STATES), (WIDTH // 4, 1, STATES), (4,), warps=-7, lanes=(-4, -2)
)
# Of [tokens, channels].
CHUNK_OF = _layout((GROUP, WIDTH), (GROUP // 4, WIDTH), (2,), warps=-5, lanes=(-3, -2))
# Of [sums, states]: of every 8 sums a thread has one state.
SINGLE = _layout((8, STATES), (2, STATES), (1,), warps=-5, lanes=(-3, -2))


class Plan(NamedTuple):
    """The sizes of a call."""

    batch: int
    length: int
    groups: int
    channels: int  # of a group
    states: int

    @property
    def across(self) -> int:
        """Blocks of channels of a group."""
        return -(-self.channels // WIDTH)

    @property
    def columns(self) -> int:
        """Blocks of channels."""
        return self.groups * self.across

    @property
    def parts(self) -> int:
        """Blocks of states."""
        return -(-self.states // STATES)

    @property
    def chunks(self) -> int:
        return -(-self.length // CHUNK)

    def by_token(self, x: jax.Array) -> jax.Array:
        """`[B, T, G, P]` in whole tiles of 8 tokens and 32 channels, as copies go."""
        late, more = -self.length % 8, -self.channels % WIDTH
        return jnp.pad(x, ((0, 0), (0, late), (0, 0), (0, more)))

    def from_token(self, x: jax.Array) -> jax.Array:
        return x[:, : self.length, :, : self.channels]

    def by_state(self, x: jax.Array) -> jax.Array:
        """`[B, T, G, N]` as `[B, G, parts, T', 16]`, float32."""
        late, more = -self.length % 8, -self.states % STATES
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, late), (0, 0), (0, more)))
        x = x.reshape(self.batch, -1, self.groups, self.parts, STATES)
        return x.transpose(0, 2, 3, 1, 4)

    def from_sums(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The gradients of B and C, `[B, T, G, N]`, of the sums of each block."""
        size = self.chunks * CHUNK
        x = x.reshape(self.batch, self.groups, self.across, self.parts, -1, 2, GROUP,
                      STATES)  # fmt: skip
        x = jnp.sum(x, axis=2).transpose(4, 0, 3, 5, 1, 2, 6)
        x = x.reshape(2, self.batch, size, self.groups, self.parts * STATES)
        d_B, d_C = x[:, :, : self.length, :, : self.states]
        return d_B, d_C

    def by_channel(self, x: jax.Array) -> jax.Array:
        """`[..., G, N, P]` as `[..., columns, parts, 32, 1, 16]`, float32."""
        lead = x.shape[:-3]
        more = (0, -self.states % STATES), (0, -self.channels % WIDTH)
        x = jnp.pad(x.astype(jnp.float32), ((0, 0),) * (len(lead) + 1) + more)
        x = x.reshape(*lead, self.groups, self.parts, STATES, self.across, WIDTH)
        x = jnp.moveaxis(x, (-2, -1), (-4, -2))
        return x.reshape(*lead, self.columns, *self.tile())

    def from_channel(self, x: jax.Array) -> jax.Array:
        """The other way, also without the axis of length 1."""
        lead = x.shape[: x.ndim - (5 if x.shape[-2] == 1 else 4)]
        x = x.reshape(*lead, self.groups, self.across, self.parts, WIDTH, STATES)
        x = jnp.moveaxis(x, (-4, -2), (-2, -1))
        x = x.reshape(*lead, self.groups, self.parts * STATES, self.across * WIDTH)
        return x[..., : self.states, : self.channels]

    def vectors(self, *rows: jax.Array | None) -> jax.Array:
        """Arrays `[G, P]` as `[columns, rows, 32]`, float32; None is 0."""
        zero = jnp.zeros((self.groups, self.channels), jnp.float32)
        x = jnp.stack([zero if r is None else r.astype(jnp.float32) for r in rows])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -self.channels % WIDTH)))
        return x.reshape(len(rows), self.columns, WIDTH).transpose(1, 0, 2)

    def from_vector(self, x: jax.Array) -> jax.Array:
        """One row, `[columns, 32]`, as `[G, P]`."""
        return x.reshape(self.groups, -1)[:, : self.channels]

    def marks(self, resets: jax.Array | None) -> jax.Array | None:
        """Bools `[B, T]` as int32 with rows of whole 16 bytes."""
        if resets is None:
            return None
        return jnp.pad(resets.astype(jnp.int32), ((0, 0), (0, -self.length % 8)))

    def tokens(self) -> tuple[int, ...]:
        """Of an array of `by_token`."""
        length = self.length + -self.length % 8
        return self.batch, length, self.groups, self.across * WIDTH

    def tile(self) -> tuple[int, ...]:
        """States of a block of channels, with an axis for tokens."""
        return self.parts, WIDTH, 1, STATES


class Task(NamedTuple):
    """What is static in a kernel."""

    plan: Plan
    softplus: bool


class Room(NamedTuple):
    """Shared memory; None: not of this kernel."""

    ring: Ring
    carry: Any  # states, or their gradients
    rows: Any  # by name, float32 [tokens, channels]
    out: Any  # by name, what is copied out
    starts: Any = None  # states before each group of tokens
    products: Any = None  # gradients of B and C, not yet summed over channels
    d_A: Any = None
    sums: Any = None  # of the gradients of D and delta_bias, by token of a group


def plan_of(inputs: Inputs) -> Plan:
    """The sizes of a call."""
    batch, length, groups, channels = inputs.u.shape
    return Plan(batch, length, groups, channels, inputs.A.shape[1])
