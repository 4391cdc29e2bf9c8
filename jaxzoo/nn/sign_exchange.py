"""The mean of what workers hold, sent as signs and a few scales, and what was not said.

Worker i of n sends x_i, and what its last message left over, as signs; each device is
also the server of one n-th of the vector, which averages and answers in the same way:

    c_i = C(x_i + e_i),   e_i <- x_i + e_i - c_i            to n servers, a chunk each
    s   = mean_i c_i + e,   mean = C(s),   e <- s - mean    back to all workers
    C(x) = mean|x| sign(x),   sign(0) = 1, a scale for each tensor

So a mean is one `all_to_all` and one `all_gather` of bytes: eight signs to a byte, then
the scales of the tensors that a chunk meets.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, UInt8

from jaxzoo.core.collectives import (
    AxisName,
    all_gather_same,
    all_to_all,
    axis_index,
    axis_size,
    per_device,
)
from jaxzoo.core.typed import ArrayLike, typed

# `no_errors` and `mean_of_signs` are called by optimizers inside of `jax.shard_map`,
# where each device holds another vector: what a batch that is split promises is not
# theirs.
__all__ = ["pack_signs", "unpack_signs"]


@typed
def pack_signs(x: Float[ArrayLike, "*batch n"]) -> UInt8[Array, "*batch bytes"]:
    """Signs of numbers, eight to a byte, the first in the highest bit.

    bit = 1 where x >= 0

    Args:
        x: numbers, `[..., n]`; NaN counts as negative.

    Returns:
        `[..., ceil(n / 8)]`; the last byte is filled up with 0.

    >>> pack_signs(jnp.array([1.0, -2.0, 0.0, 3.0])).tolist()  # 1011 0000
    [176]
    """
    return jnp.packbits(jnp.asarray(x) >= 0, axis=-1)


@typed
def unpack_signs(packed: UInt8[ArrayLike, "*batch bytes"]) -> Float[Array, "*batch n"]:
    """What `pack_signs` packed, as 1 and -1.

    Args:
        packed: `[..., bytes]`.

    Returns:
        float32 `[..., 8 * bytes]`.

    >>> unpack_signs(jnp.array([176], jnp.uint8))[:4].tolist()
    [1.0, -1.0, 1.0, 1.0]
    """
    return 2.0 * jnp.unpackbits(jnp.asarray(packed), axis=-1).astype(jnp.float32) - 1.0


def no_errors(tree: Any, *, axis_name: AxisName = None) -> tuple[Any, Any]:
    """What workers and servers have not sent before the first message: zeros.

    Args:
        tree: arrays as they will be sent.
        axis_name: the axis of `jax.shard_map`, or of `jax.vmap`, whose devices are the
            workers; None is a world of one.

    Returns:
        `[n * chunk]` of the worker and `[chunk]` of the server, at least float32, which
        become another one on each device: `P(axis)` in the specs of `jax.shard_map`.
        A chunk is whole bytes, and chunks hold all entries of the tree.

    >>> [error.shape for error in no_errors({"w": jnp.ones((3, 4)), "b": jnp.ones(3)})]
    [(16,), (16,)]
    """
    size = axis_size(axis_name)
    flat, _ = ravel_pytree(tree)
    dtype = jnp.promote_types(flat.dtype, jnp.float32)
    zeros = jnp.zeros(8 * math.ceil(flat.size / (8 * size)), dtype)
    return per_device((jnp.tile(zeros, size), zeros), axis_name)


def mean_of_signs(
    tree: Any,
    alive: Any,
    worker_error: jax.Array,
    server_error: jax.Array,
    *,
    power: int = 1,
    axis_name: AxisName = None,
) -> tuple[Any, jax.Array, jax.Array, float]:
    """The mean over devices in two messages of signs, and what they did not say.

    Args:
        tree: what this device has, a tree of float arrays.
        alive: booleans of the same tree, the same on each device; where False nothing
            is meant, since one bit cannot say 0, and nothing remembered.
        worker_error: what this worker has not sent, as from `no_errors`.
        server_error: what this server has not sent.
        power: a scale is mean(|x|^power)^(1 / power), of a tensor's living entries.
        axis_name: the axis of the workers; None is a world of one, which compresses all
            the same.

    Returns:
        The mean, the same on each device; both errors; the bytes that a device sends,
        in rings.

    >>> tree = {"w": jnp.array([1.0, 2.0])}
    >>> alive = {"w": jnp.ones(2, bool)}
    >>> mean, worker, server, _ = mean_of_signs(tree, alive, *no_errors(tree))
    >>> mean["w"].tolist(), worker[:2].tolist(), server[:2].tolist()
    ([1.5, 1.5], [-0.5, 0.5], [0.0, 0.0])
    """
    flat, unravel = ravel_pytree(tree)
    size, chunk = axis_size(axis_name), server_error.shape[0]
    sizes = [leaf.size for leaf in jax.tree.leaves(tree)]
    ends = np.cumsum(sizes, dtype=np.int64)
    fill = size * chunk - flat.size
    alive = jnp.pad(ravel_pytree(alive)[0], (0, fill)).reshape(size, chunk)
    # Scales of leaves that a chunk meets: a window into the list of them, of one width
    # for all. What fills the vector up counts as the last leaf.
    begin = chunk * np.arange(size)
    last = np.searchsorted(ends, begin + max(chunk - 1, 0), side="right")
    first = np.searchsorted(ends, begin, side="right")
    window = int(np.max(last - first)) + 1
    leaf = jnp.searchsorted(jnp.asarray(ends), jnp.arange(size * chunk), side="right")
    local = leaf.reshape(size, chunk) - jnp.asarray(first)[:, None]

    x = jnp.pad(flat, (0, fill)) + worker_error
    scale = _scales(x, leaf, alive.reshape(-1), ends.size + window, power)
    worker_error = _rest(x, scale[leaf], alive.reshape(-1))
    windows = jnp.asarray(first[:, None] + np.arange(window))
    message = _message(x.reshape(size, chunk), scale[windows])

    sign, scale = _read(all_to_all(message, axis_name), window)
    me = axis_index(axis_name)
    x = jnp.mean(sign * scale[:, local[me]], axis=0) + server_error
    scale = _scales(x, local[me], alive[me], window, power)
    server_error = _rest(x, scale[local[me]], alive[me])
    answer = _message(x.reshape(1, chunk), scale.reshape(1, window))

    sign, scale = _read(all_gather_same(answer, axis_name), window)
    mean = jnp.where(alive, sign * jnp.take_along_axis(scale, local, axis=1), 0.0)
    mean = unravel(mean.reshape(-1)[: flat.size].astype(flat.dtype))
    return mean, worker_error, server_error, 2.0 * (size - 1) * message.shape[1]


def _scales(
    x: jax.Array, leaf: jax.Array, alive: jax.Array, count: int, power: int
) -> jax.Array:
    """The power mean of the magnitudes in each leaf, in the float32 that is sent."""

    def total(y: jax.Array) -> jax.Array:
        y = jnp.where(alive, y, 0.0)
        return jax.ops.segment_sum(y, leaf, count, indices_are_sorted=True)

    number = jnp.maximum(total(jnp.ones_like(x)), 1.0)
    mean = (total(jnp.abs(x) ** power) / number) ** (1.0 / power)
    return mean.astype(jnp.float32)


def _rest(x: jax.Array, scale: jax.Array, alive: jax.Array) -> jax.Array:
    """What signs and scales do not say."""
    return jnp.where(alive, x - jnp.where(x >= 0, scale, -scale), 0.0)


def _message(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Rows of packed signs, each followed by the bytes of its scales."""
    tail = lax.bitcast_convert_type(scale, jnp.uint8).reshape(x.shape[0], -1)
    return jnp.concatenate([pack_signs(x), tail], axis=1)


def _read(message: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    cut = message.shape[1] - 4 * window
    tail = message[:, cut:].reshape(-1, window, 4)
    return unpack_signs(message[:, :cut]), lax.bitcast_convert_type(tail, jnp.float32)


EXAMPLES = {
    pack_signs: lambda key: ((jax.random.normal(key, (2, 16)),), {}),
    unpack_signs: lambda key: ((jax.random.bits(key, (2, 8), jnp.uint8),), {}),
}
