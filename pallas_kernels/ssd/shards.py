"""Sequences that are split over devices along time.

Each device computes once what its part does to any state that comes in, which is a
decay and the state that it ends with from zero:

    (decay, end):  state after = decay * state before + end

These pairs compose. They travel to the next device, and then from 1, 2, 4, ... devices
before, after which each device has the state before its part: log2(n) + 1 exchanges of
one state, where gathering all of them would take n - 1. The rest of the call is that of
a whole sequence with this initial state.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sharded import alike
from pallas_kernels.ssd import xla
from pallas_kernels.ssd.form import Inputs

__all__ = ["begins", "carried_in", "of_the_last"]


def begins(ids: jax.Array, axis_name: str | None) -> jax.Array:
    """Where the documents of this part begin.

    Args:
        ids: integers `[B, T]`, of this device.
        axis_name: the axis that time is split over; None: it is whole.

    Returns:
        bool `[B, T]`. The first token of all continues the initial state: False.
    """
    first = jnp.zeros_like(ids[:, :1], bool)
    if axis_name is not None:
        last = lax.ppermute(ids[:, -1:], axis_name, _hop(axis_name, 1))
        first = (last != ids[:, :1]) & (lax.axis_index(axis_name) > 0)
    return jnp.concatenate([first, ids[:, 1:] != ids[:, :-1]], axis=1)


def carried_in(inputs: Inputs, axis_name: str, chunk: int | None = None) -> jax.Array:
    """The state before the part of this device.

    Args:
        inputs: the part; its `state` is that before the first part, on every device.
        axis_name: the axis that time is split over.
        chunk: as in `xla.scan`.

    Returns:
        `[B, G, R, P, N]`. The gradient of what came in with `inputs.state` is exact
        under `jax.shard_map` with its `check_vma`.
    """
    first = lax.axis_index(axis_name) == 0
    zero = jnp.zeros_like(inputs.state)
    end = xla.end_state(alike(inputs._replace(state=zero)), chunk)
    decay = jnp.exp(jnp.sum(inputs.log_decay, axis=1))
    if inputs.fresh is not None:
        decay = jnp.where(jnp.any(inputs.fresh, axis=1)[:, None, None], 0.0, decay)

    decay, state = lax.ppermute((decay, end), axis_name, _hop(axis_name, 1))
    state = jnp.where(first, inputs.state, state)
    hop = 1
    while hop < lax.axis_size(axis_name):
        # Where nothing arrives there is zero, and nothing is to be added.
        others = lax.ppermute((decay, state), axis_name, _hop(axis_name, hop))
        state += decay[..., None, None] * others[1]
        decay *= others[0]
        hop *= 2
    return state


def of_the_last(state: jax.Array, axis_name: str) -> jax.Array:
    """The state after the last part, on every device."""
    last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1
    return lax.psum(jnp.where(last, state, 0.0), axis_name)


def _hop(axis_name: str, far: int) -> list[tuple[int, int]]:
    return [(i, i + far) for i in range(lax.axis_size(axis_name) - far)]
