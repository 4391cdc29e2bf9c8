"""How a call is cut for the TPU kernels, and how its arrays lie there.

    x, y, gate and their gradients   [B, T, L]     L = heads x P on the lanes
    b, c                             [B, G, T, N]
    dt, log_decay                    [B, L / W, T / Q, 8, Q], heads of a block as rows
    counts                           [B, T / Q, 1, Q]
    states                           [B, N, L]

A step of a grid is for one block of K chunks of Q tokens and one block of W lanes. For
widths P that divide 128 or are multiples of it, and heads that fill such blocks, no
array but b, c and the small ones is moved in memory; anything else is padded to that.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ssd.form import Inputs

__all__ = [
    "CHUNK",
    "ROWS",
    "Packed",
    "Plan",
    "of_groups",
    "of_rows",
    "of_state",
    "of_tokens",
    "pack",
    "plan",
    "state",
    "tokens",
]

CHUNK = 128  # Q: a tile of [Q, Q] fills the lanes
ROWS = 8  # the most heads of a block
BLOCK = 4  # K: chunks of a block
LANES = 128
CARRIED = 4 * 2**20  # bytes of states that are carried in vector memory


class Plan(NamedTuple):
    """The static part of a call.

    Attributes:
        sizes: B, T, G, R, P, N as they came.
        width: P, padded.
        heads: R, padded.
        states: N, padded.
        per_block: heads of a block of lanes.
        parts: each group's heads in so many parts, each with its states carried.
        across: blocks of lanes of a part.
        chunks: of a block of tokens.
        blocks: of tokens.
    """

    sizes: tuple[int, int, int, int, int, int]
    width: int
    heads: int
    states: int
    per_block: int
    parts: int
    across: int
    chunks: int
    blocks: int

    @property
    def lanes(self) -> int:
        """W, of a block."""
        return self.per_block * self.width

    @property
    def tokens(self) -> int:
        """Of a block."""
        return self.chunks * CHUNK

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Batch, part, block of tokens, block of lanes."""
        batch, groups = self.sizes[0], self.sizes[2]
        return batch, groups * self.parts, self.blocks, self.across


class Packed(NamedTuple):
    """The arrays of a call as the kernels take them; None as in `Inputs`."""

    x: Any
    dt: Any
    log_decay: Any
    b: Any
    c: Any
    skip: Any
    gate: Any
    state: Any
    counts: Any


def plan(inputs: Inputs) -> Plan:
    """Cut a call."""
    batch, length, groups, heads, width = inputs.x.shape
    states = inputs.b.shape[3]
    wide = _up(width, LANES) if width > LANES // 2 else max(32, _power(width))
    least = max(1, LANES // wide)
    many = _up(heads, least)
    twice = many % (2 * least) == 0 and 2 * least * wide <= 2 * LANES
    per_block = least * (1 + twice)
    deep, across = _up(states, 16), many // per_block
    parts = next(
        n
        for n in range(1, across + 1)
        if across % n == 0
        and (across // n * deep * per_block * wide * 4 <= CARRIED or n == across)
    )
    chunks = min(BLOCK, -(-length // CHUNK))
    return Plan(
        sizes=(batch, length, groups, heads, width, states),
        width=wide,
        heads=many,
        states=deep,
        per_block=per_block,
        parts=parts,
        across=across // parts,
        chunks=chunks,
        blocks=-(-length // (chunks * CHUNK)),
    )


def pack(cut: Plan, inputs: Inputs) -> Packed:
    """The arrays as the kernels take them; tokens beyond the end have dt = 0."""
    counts = None
    if inputs.fresh is not None:
        fresh = _pad(inputs.fresh, {1: cut.blocks * cut.tokens})
        fresh = fresh.reshape(fresh.shape[0], -1, 1, CHUNK).astype(jnp.int32)
        counts = jnp.cumsum(fresh, axis=3)
    skip = inputs.skip
    if skip is not None:
        skip = _pad(skip, {1: cut.heads, 2: cut.width}).reshape(1, -1)
    return Packed(
        x=tokens(cut, inputs.x),
        dt=rows(cut, inputs.dt),
        log_decay=rows(cut, inputs.log_decay),
        b=_by_group(cut, inputs.b),
        c=_by_group(cut, inputs.c),
        skip=skip,
        gate=None if inputs.gate is None else tokens(cut, inputs.gate),
        state=state(cut, inputs.state),
        counts=counts,
    )


def tokens(cut: Plan, x: jax.Array) -> jax.Array:
    """`[B, T, G, R, P]` to `[B, T, L]`."""
    x = _pad(x, {1: cut.blocks * cut.tokens, 3: cut.heads, 4: cut.width})
    return x.reshape(*x.shape[:2], -1)


def of_tokens(cut: Plan, x: jax.Array) -> jax.Array:
    """The inverse of `tokens`."""
    _, length, groups, heads, width, _ = cut.sizes
    x = x.reshape(*x.shape[:2], groups, cut.heads, cut.width)
    return x[:, :length, :, :heads, :width]


def state(cut: Plan, x: jax.Array) -> jax.Array:
    """`[B, G, R, P, N]` to `[B, N, L]`."""
    x = _pad(x, {2: cut.heads, 3: cut.width, 4: cut.states})
    return jnp.moveaxis(x, 4, 1).reshape(x.shape[0], cut.states, -1)


def of_state(cut: Plan, x: jax.Array) -> jax.Array:
    """The inverse of `state`."""
    _, _, groups, heads, width, states = cut.sizes
    x = x.reshape(x.shape[0], cut.states, groups, cut.heads, cut.width)
    return jnp.moveaxis(x, 1, 4)[:, :, :heads, :width, :states]


def rows(cut: Plan, x: jax.Array) -> jax.Array:
    """`[B, T, G, R]` to `[B, L / W, T / Q, 8, Q]`."""
    x = _pad(x, {1: cut.blocks * cut.tokens, 3: cut.heads})
    x = x.reshape(x.shape[0], -1, CHUNK, cut.grid[1] * cut.across, cut.per_block)
    return _pad(jnp.transpose(x, (0, 3, 1, 4, 2)), {3: ROWS})


def of_rows(cut: Plan, x: jax.Array) -> jax.Array:
    """The inverse of `rows`."""
    _, length, groups, heads, _, _ = cut.sizes
    x = jnp.transpose(x[:, :, :, : cut.per_block], (0, 2, 4, 1, 3))
    return x.reshape(x.shape[0], -1, groups, cut.heads)[:, :length, :, :heads]


def of_groups(cut: Plan, x: jax.Array) -> jax.Array:
    """`[B, G parts, T, N]`, a sum over parts, to `[B, T, G, N]`."""
    _, length, groups, _, _, states = cut.sizes
    x = x.reshape(x.shape[0], groups, cut.parts, *x.shape[2:]).sum(2)
    return jnp.moveaxis(x, 1, 2)[:, :length, :, :states]


def _by_group(cut: Plan, x: jax.Array) -> jax.Array:
    x = _pad(x, {1: cut.blocks * cut.tokens, 3: cut.states})
    return jnp.moveaxis(x, 2, 1)


def _pad(x: jax.Array, sizes: dict[int, int]) -> jax.Array:
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(more for _, more in widths) else x


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()
