"""How a call is cut for the GPU kernels, and how its arrays lie there.

    x, y and their gradients    [B, T, J, 64]    J columns of 64 lanes of a head
    b, c                        [B, T, G, N]
    numbers of a token          [B, heads, chunks, rows, 64], float32
    states                      [B, J, 64, N]

A block of threads owns one column, which nothing but b, c and its head's numbers tie to
the others, and walks over chunks of 64 tokens. Where P is 64 or a multiple of it, and N
is 64 or 128, no array but the small ones is moved in memory; anything else is padded to
that. Time is cut into parts where there are too few columns to fill the machine.

Decays are in units of log 2. Those of less than 2^-160, and those at the beginnings of
documents, are set to it: whatever is multiplied by it is 0 in float32, and sums over a
chunk keep their digits.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.ssd.form import Inputs

__all__ = [
    "ACROSS",
    "CHUNK",
    "DOWN",
    "DT_ACROSS",
    "DT_DOWN",
    "ENDS",
    "INTO",
    "SQUARE",
    "TOTAL",
    "Numbers",
    "Plan",
    "by_part",
    "columns",
    "lanes",
    "numbers",
    "of_columns",
    "of_state",
    "of_wide",
    "plan",
    "state",
    "wide",
]

CHUNK = 64  # tokens of a chunk, and lanes of a column
SQUARE = (CHUNK, CHUNK)
# Rows of `Numbers.packed`. One load has one layout, so that what is read along both
# axes of tiles stands there twice.
DOWN, ACROSS, DT_DOWN, DT_ACROSS, INTO, ENDS, TOTAL = range(7)
FILL = 264  # blocks of threads that an H100 is filled with, two per multiprocessor
SHORTEST = 8  # chunks of a part
LEAST = -160.0  # the log 2 of what is nothing


class Plan(NamedTuple):
    """The static part of a call.

    Attributes:
        sizes: B, T, G, R, P, N as they came.
        states: N, padded.
        per_part: chunks of a part, the last of which may have fewer.
        share: columns of a group for which one block of threads sums gradients of b, c.
    """

    sizes: tuple[int, int, int, int, int, int]
    states: int
    per_part: int
    share: int

    @property
    def chunks(self) -> int:
        """Of all tokens."""
        return -(-self.sizes[1] // CHUNK)

    @property
    def parts(self) -> int:
        """Of time."""
        return -(-self.chunks // self.per_part)

    @property
    def per_head(self) -> int:
        """Columns of a head."""
        return -(-self.sizes[4] // CHUNK)

    @property
    def per_group(self) -> int:
        """Columns of a group."""
        return self.sizes[3] * self.per_head

    @property
    def columns(self) -> int:
        """Of all heads."""
        return self.sizes[2] * self.per_group


class Numbers(NamedTuple):
    """What is one number per head and token, all float32 `[B, heads, chunks, 64]`.

    Attributes:
        packed: `[B, heads, chunks, 7, 64]`: the sum of log decays up to a token, twice;
            dt, twice; what is left at a token of the state before its chunk; what of
            the token is left after the chunk, times dt; and what is left after the
            chunk of the state before it, repeated.
        dt: as it came.
        left: what of a token is left after its chunk.
        counts: bool, whether the decay of a token is not nothing.
    """

    packed: jax.Array
    dt: jax.Array
    left: jax.Array
    counts: jax.Array


def plan(inputs: Inputs) -> Plan:
    """Cut a call."""
    batch, length, groups, heads, width = inputs.x.shape
    states = inputs.b.shape[3]
    whole = Plan(
        sizes=(batch, length, groups, heads, width, states),
        states=64 if states <= 64 else 128,
        per_part=1,
        share=1,
    )
    parts = FILL // (batch * whole.columns)
    parts = max(1, min(parts, whole.chunks // SHORTEST))
    blocks, group = batch * whole.chunks * whole.columns, whole.per_group
    shares = [n for n in range(1, group + 1) if group % n == 0 and blocks >= n * FILL]
    per_part = -(-whole.chunks // parts)
    return whole._replace(per_part=per_part, share=max(shares, default=1))


def numbers(inputs: Inputs) -> Numbers:
    """Steps and decays."""
    log_decay = jnp.maximum(inputs.log_decay * math.log2(math.e), LEAST)
    counts = log_decay > LEAST
    if inputs.fresh is not None:
        counts &= ~inputs.fresh[..., None, None]
    log_decay = jnp.where(counts, log_decay, LEAST)

    def by_chunk(x: jax.Array) -> jax.Array:
        batch, length = x.shape[:2]
        x = x.reshape(batch, length, -1).swapaxes(1, 2)
        x = _pad(x, 2, CHUNK)
        return x.reshape(*x.shape[:2], -1, CHUNK)

    dt, log_decay, counts = (by_chunk(x) for x in (inputs.dt, log_decay, counts))
    sums = jnp.cumsum(log_decay, axis=-1)
    last = sums[..., -1:]
    left, total = jnp.exp2(last - sums), jnp.broadcast_to(jnp.exp2(last), sums.shape)
    rows = [sums, sums, dt, dt, jnp.exp2(sums), left * dt, total]
    return Numbers(jnp.stack(rows, axis=3), dt, left, counts)


def by_part(cut: Plan, of: Numbers) -> jax.Array:
    """What is left after each part of the state before it, `[B, parts, J]`."""
    sums = of.packed[..., 0, -1]
    missing = cut.parts * cut.per_part - cut.chunks
    sums = jnp.pad(sums, ((0, 0), (0, 0), (0, missing)))
    total = jnp.exp2(sums.reshape(*sums.shape[:2], cut.parts, -1).sum(-1))
    return jnp.repeat(total, cut.per_head, axis=1).swapaxes(1, 2)


def columns(cut: Plan, x: jax.Array) -> jax.Array:
    """`[B, T, G, R, P]` to `[B, T, J, 64]`."""
    x = _pad(_pad(x, 4, CHUNK), 1, 8)  # copies come in tiles of 8 rows
    return x.reshape(*x.shape[:2], cut.columns, CHUNK)


def of_columns(cut: Plan, x: jax.Array) -> jax.Array:
    """The inverse of `columns`."""
    batch, length, groups, heads, width, _ = cut.sizes
    x = x.reshape(batch, -1, groups, heads, cut.per_head * CHUNK)
    return x[:, :length, ..., :width]


def wide(cut: Plan, x: jax.Array) -> jax.Array:
    """`[B, T, G, N]` with N padded."""
    return _pad(_pad(x, 3, cut.states), 1, 8)


def of_wide(cut: Plan, x: jax.Array) -> jax.Array:
    """The sums `[B, T, G, N]` of `[B, T, sets, N]`, padded."""
    batch, length, groups, _, _, states = cut.sizes
    total = x.reshape(batch, x.shape[1], groups, -1, cut.states).astype(jnp.float32)
    return total.sum(3)[:, :length, :, :states].astype(x.dtype)


def lanes(cut: Plan, skip: jax.Array | None) -> jax.Array | None:
    """`[G, R, P]` to `[B, J, 64]`."""
    if skip is None:
        return None
    rows = _pad(skip, 2, CHUNK).reshape(cut.columns, CHUNK)
    return jnp.broadcast_to(rows, (cut.sizes[0], *rows.shape))


def state(cut: Plan, x: jax.Array) -> jax.Array:
    """`[B, G, R, P, N]` to `[B, J, 64, N]`."""
    x = _pad(_pad(x, 3, CHUNK), 4, cut.states)
    return x.reshape(x.shape[0], cut.columns, CHUNK, cut.states)


def of_state(cut: Plan, x: jax.Array) -> jax.Array:
    """The inverse of `state`."""
    batch, _, groups, heads, width, states = cut.sizes
    x = x.reshape(batch, groups, heads, cut.per_head * CHUNK, cut.states)
    return x[..., :width, :states]


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths) if widths[axis][1] else x
