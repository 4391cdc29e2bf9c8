"""What the TPU kernels compute in one chunk of Q tokens and one block of W lanes.

Lanes are (head, p). What is one number per head and token comes as rows [8, Q] and is
spread over lanes [Q, W], or gathered from them, by products with matrices of zeros and
ones; so are the sums of log decays (Mosaic has no running sum). A float32 is the exact
sum of three bfloat16, so three native products make such a product exact.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ssd.tpu_layout import CHUNK, ROWS, Plan

__all__ = ["Chunk", "cut_chunk", "dot", "gather", "inside", "lower", "sums", "upper"]

LANES = 128


class Chunk(NamedTuple):
    """One chunk.

    Attributes:
        x: float32 `[Q, W]`.
        xd: dt x, float32 `[Q, W]`.
        dt: `[Q, W]`.
        into: what is left at each token of the state before the chunk, `[Q, W]`.
        ends: what is left of each token in the state after it, `[Q, W]`.
        log_decay: rows `[8, Q]`.
        pairs: bool `[Q, Q]`: j <= i, in the same document.
    """

    x: jax.Array
    xd: jax.Array
    dt: jax.Array
    into: jax.Array
    ends: jax.Array
    log_decay: jax.Array
    pairs: jax.Array

    @property
    def total(self) -> jax.Array:
        """What is left after the chunk of the state before it, `[1, W]`."""
        return self.into[CHUNK - 1 :]


def cut_chunk(
    cut: Plan, x: jax.Array, dt: jax.Array, log_decay: jax.Array, counts: Any
) -> Chunk:
    """Prepare a chunk.

    Args:
        cut: the static part of the call.
        x: `[Q, W]`.
        dt: rows `[8, Q]`.
        log_decay: rows `[8, Q]`.
        counts: int32 `[1, Q]`, documents that have begun in this chunk, or None.
    """
    pairs = lower()
    first = last = None
    if counts is not None:
        column = jnp.broadcast_to(counts, (LANES, CHUNK)).T[:, :1]
        pairs &= column == counts
        first, last = column == 0, column == counts[:, CHUNK - 1 :]
    into = _spread(cut, _exp(sums(lower(), log_decay, 1, 1), first))
    ends = _spread(cut, _exp(sums(upper(), log_decay, 1, 1), last))
    lanes = _spread(cut, sums(_place(0) == _place(1), dt, 1, 1))
    x = x.astype(jnp.float32)
    return Chunk(x, x * lanes, lanes, into, ends, log_decay, pairs)


def inside(chunk: Chunk, head: int) -> jax.Array:
    """exp(S_ij) of a head, 0 where j is not before i or is of another document."""
    row = chunk.log_decay[head : head + 1]
    s = sums(jnp.where(lower(), row, 0.0), lower(strictly=True), 1, 0)
    return _exp(s, chunk.pairs)


def lower(*, strictly: bool = False) -> jax.Array:
    """bool `[Q, Q]`: the column is not after the row, or before it."""
    return _place(0) > _place(1) if strictly else _place(0) >= _place(1)


def upper() -> jax.Array:
    """bool `[Q, Q]`: the column is after the row."""
    return _place(1) > _place(0)


def gather(cut: Plan, x: jax.Array) -> jax.Array:
    """Sums over the lanes of each head: `[Q, W]` to rows `[8, Q]`."""
    return sums(_heads(cut), x, 1, 1)


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, dtype: Any) -> jax.Array:
    """A product of matrices in `dtype`, summed in float32."""
    exact = dtype == jnp.float32
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def sums(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The product of a float32 matrix and one of bools, either way round."""
    mask, x = (a, b) if a.dtype == bool else (b, a)
    ones = jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)
    total: Any = 0.0
    for _ in range(3):
        part = x.astype(jnp.bfloat16)
        pair = (ones, part) if a.dtype == bool else (part, ones)
        total += dot(*pair, a_axis, b_axis, jnp.bfloat16)
        x -= part.astype(jnp.float32)
    return total


def _heads(cut: Plan) -> jax.Array:
    """bool `[8, W]`: the lanes of each head."""
    shape = (ROWS, cut.lanes)
    lanes = lax.broadcasted_iota(jnp.int32, shape, 1)
    start = lax.broadcasted_iota(jnp.int32, shape, 0) * cut.width
    return (lanes >= start) & (lanes < start + cut.width)


def _spread(cut: Plan, x: jax.Array) -> jax.Array:
    """`[Q, 8]` to the lanes of each head."""
    return sums(x, _heads(cut), 1, 0)


def _exp(x: jax.Array, counts: jax.Array | None) -> jax.Array:
    if counts is None:
        return jnp.exp(x)
    return jnp.where(counts, jnp.exp(jnp.where(counts, x, 0.0)), 0.0)


def _place(axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis)
