"""Which pairs of a query and a key count: one description for all implementations.

`Pattern` is what the compiler knows, `Extras` the arrays. Both are made by
`attention` and read by every implementation, whole or tile by tile: `allowed` and
`keep` take the positions of any tile, so that all of them mask and drop the same pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Extras", "Pattern", "allowed", "keep", "needed"]


class Pattern(NamedTuple):
    """The static part; hashable.

    Attributes:
        scale: factor of the products of queries and keys.
        left: a query at t sees keys from t - left on; None: from the first on.
        right: it sees keys up to t + right; None: up to the last.
        softcap: logits become softcap * tanh(logits / softcap); None: they stay.
        drop: the share of pairs dropped, in [0, 1).
        tile: queries and keys of a tile; None: what the implementation finds best.
    """

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float | None = None
    drop: float = 0.0
    tile: tuple[int, int] | None = None


class Extras(NamedTuple):
    """The arrays beside queries, keys and values; None where there is none.

    Heads come first, as `[K, G]`: N = K * G query heads share K heads of keys.

    Attributes:
        bias: float `[B|1, K|1, G|1, T|1, S|1]`, added to the scaled logits.
        sinks: float32 `[K, G]`, the logit of a key without value.
        mask: bool, shaped like `bias`; True: the pair counts.
        query_ids: int32 `[B|1, K|1, G|1, T]`, see `key_ids`.
        key_ids: int32 `[B|1, K|1, S]`; a pair counts where the two ids are equal.
        seed: uint32 `[2]`, of dropout.
    """

    bias: jax.Array | None = None
    sinks: jax.Array | None = None
    mask: jax.Array | None = None
    query_ids: jax.Array | None = None
    key_ids: jax.Array | None = None
    seed: jax.Array | None = None


def allowed(
    pattern: Pattern,
    rows: jax.Array,
    columns: jax.Array,
    *,
    mask: jax.Array | None = None,
    query_ids: jax.Array | None = None,
    key_ids: jax.Array | None = None,
    length: int | None = None,
) -> jax.Array | None:
    """Which pairs of a tile count.

    Args:
        pattern: the static part.
        rows: positions of the queries, `[..., t, 1]`.
        columns: positions of the keys, `[..., 1, s]`.
        mask: bool, `[..., t|1, s|1]`.
        query_ids: `[..., t, 1]`.
        key_ids: `[..., 1, s]`.
        length: keys at this position and beyond do not exist; None: all do.

    Returns:
        bool, of the shape that all of these broadcast to; None if every pair counts.
    """
    parts = []
    if pattern.left is not None:
        parts.append(columns >= rows - pattern.left)
    if pattern.right is not None:
        parts.append(columns <= rows + pattern.right)
    if length is not None:
        parts.append(columns < length)
    if query_ids is not None and key_ids is not None:
        parts.append(query_ids == key_ids)
    if mask is not None:
        parts.append(mask)
    total = None
    for part in parts:
        total = part if total is None else total & part
    return total


def needed(
    pattern: Pattern,
    first_row: jax.Array,
    last_row: jax.Array,
    first_column: jax.Array,
    last_column: jax.Array,
) -> jax.Array | bool:
    """Whether any pair of a tile lies within the window; bounds are inclusive."""
    inside = True
    if pattern.left is not None:
        inside &= last_column >= first_row - pattern.left
    if pattern.right is not None:
        inside &= first_column <= last_row + pattern.right
    return inside


def keep(
    seed: jax.Array, head: jax.Array, rows: jax.Array, columns: jax.Array, drop: float
) -> jax.Array:
    """Which pairs dropout keeps: a hash of the seed and the place of the pair.

    It depends on nothing else, so that any tiling drops the same pairs.

    Args:
        seed: uint32 `[2]`, or a pair of scalars.
        head: number of batch row and head, `(b N + n)`, broadcastable.
        rows: positions of the queries, broadcastable.
        columns: positions of the keys, broadcastable.
        drop: probability of being dropped, in [0, 1).

    Returns:
        bool, of the shape that `head`, `rows` and `columns` broadcast to.
    """
    head, rows, columns = (
        lax.convert_element_type(x, jnp.uint32) for x in (head, rows, columns)
    )
    state = _mix(seed[0] ^ (head * jnp.uint32(0x9E3779B1)))
    state = _mix(state ^ seed[1] ^ (rows * jnp.uint32(0x85EBCA77)))
    state = _mix(state ^ (columns * jnp.uint32(0xC2B2AE3D)))
    return state >= jnp.uint32(min(round(drop * 2**32), 2**32 - 1))


def _mix(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3: every bit of the input moves every other one."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
