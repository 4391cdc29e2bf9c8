"""The selective scan over a sequence that is split over devices.

The state after a part is linear in the state before it: with P the product of the
decays of the part, and E its end state from zero,

    end = P start + E,    (P1, E1) then (P2, E2) = (P1 P2, P2 E1 + E2)

Each device computes its (P, E) once, the devices compose them in a logarithmic number
of exchanges of [B, D, N], and each then scans its part from the right state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["begins", "end_of_all", "resets_of", "start_of"]


def resets_of(segment_ids: jax.Array, axis_name: str | None) -> jax.Array:
    """Where the segment is not that of the token before, bool `[B, T]`.

    The first token of the sequence continues the initial state.
    """
    first = segment_ids[:, :1]
    before = first
    if axis_name is not None:
        count = lax.axis_size(axis_name)
        there = [(i, i + 1) for i in range(count - 1)]
        before = lax.ppermute(segment_ids[:, -1:], axis_name, there)
        before = jnp.where(begins(axis_name), first, before)
    before = jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    return segment_ids != before


def begins(axis_name: str) -> jax.Array:
    """Whether this device has the first part."""
    return lax.axis_index(axis_name) == 0


def start_of(
    decay: jax.Array, end: jax.Array, initial: jax.Array, axis_name: str
) -> jax.Array:
    """The state before this device's part.

    Args:
        decay: P of this device.
        end: E of this device, of the same shape.
        initial: the state before the first part, the same on every device.
        axis_name: the axis of `jax.shard_map` that the sequence is split over.
    """
    count, own = lax.axis_size(axis_name), lax.axis_index(axis_name)

    def earlier(x: jax.Array, distance: int) -> jax.Array:
        """What the device `distance` before this one has; 0 where there is none."""
        there = [(i, i + distance) for i in range(count - distance)]
        return lax.ppermute(x, axis_name, there)

    end = jnp.where(own == 0, decay * initial + end, end)
    distance = 1
    while distance < count:
        decay_before, end_before = (earlier(x, distance) for x in (decay, end))
        within = own >= distance  # others have begun from `initial` already
        end = end + jnp.where(within, decay * end_before, 0.0)
        decay = jnp.where(within, decay * decay_before, decay)
        distance *= 2
    before = earlier(end, 1) if count > 1 else end
    return jnp.where(own == 0, initial, before)


def end_of_all(end: jax.Array, axis_name: str) -> Any:
    """The state after the last part, on every device."""
    last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
    return lax.psum(jnp.where(last, end, 0.0), axis_name)
