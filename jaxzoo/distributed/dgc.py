"""Deep gradient compression: the largest entries travel, the others wait.

Each worker keeps a momentum u and a sum v of what it has not sent, and sends those
entries of v, with their places, that are among the k largest of their tensor:

    u <- m u + clip(g),   v <- v + u                    momentum correction
    M = the k largest of |v|,   k = ceil((1 - sparsity) size)
    d = mean over workers of v at M                     the direction, on all of them
    u <- 0 at M,  v <- 0 at M                           momentum factor masking

In a warm-up the sparsity rises in stages, such as 75, 93.75, 98.4, 99.6 and 99.9 %. All
tensors travel in one `all_gather` of float32 values beside int32 places, eight bytes
for each entry that is sent.

    def step(params, state, batch):                          # inside jax.shard_map
        grads = jax.grad(loss)(varying(params, "data"), batch)   # of this device alone
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

Gradients come as they are on each device, not averaged: `varying`, of
`jaxzoo.core.collectives`, keeps `shard_map` from summing them. `init` runs inside too.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxzoo.core.collectives import (
    AxisName,
    all_gather_same,
    axis_size,
    per_device,
    psum,
)
from jaxzoo.core.typed import as_float32, check_range, typed

PAPER = {
    "slug": "dgc",
    "title": "Deep Gradient Compression: Reducing the Communication Bandwidth for "
    "Distributed Training",
    "arxiv": "1712.01887",
    "year": 2018,
    "authors": "Yujun Lin, Song Han, Huizi Mao, Yu Wang, William J. Dally",
    "where": "Momentum correction and momentum factor masking (algorithm 4), local "
    "gradient clipping (section 3.2), warm-up training (section 3.3).",
    "differs": "The k largest entries are found exactly, with a fixed k for each "
    "tensor and stage, as compiled programs want; the paper and the released code "
    "estimate a threshold from a sample, and so send about as many. Biases and scales "
    "of norms are sent like all else, one entry at least; the released code sends "
    "them dense. Momentum is heavy ball, without Nesterov's form; weight decay is "
    "decoupled. clip is the norm of the whole gradient; the released code clips "
    "tensor by tensor, if asked. Values and places travel in one message, four bytes "
    "each, without run lengths. The experiment has nets of 33,440 and 9,610 "
    "parameters, 8 workers simulated by vmap, and 99 % sparsity after a warm-up of 25 "
    "% of the steps. After 400 steps on the novel, at learning rates up to 0.3, the "
    "held-out loss was 3.7 % above dense momentum's; after 800, at rates up to 1, "
    "which both chose, it is 2.2 % below. With momentum factor masking little "
    "momentum is left while a quarter of the entries is sent, and larger rates are "
    "taken; on digits 0.3 in place of 0.1. That without momentum correction it is "
    "worse is a difference of 0.7 points, and factor masking makes as much.",
}

__all__ = ["DGCState", "dgc", "scale_by_dgc"]

Number = float | int | jax.Array | np.ndarray | np.generic
STAGES = (0.75, 0.9375, 0.984375, 0.996, 0.999)


class DGCState(NamedTuple):
    """The state of `scale_by_dgc`.

    Attributes:
        count: steps so far, int32, the same on all devices.
        momentum: u, all tensors in one row. It and the next are another one on each
            device: `P(axis)` in the specs of `jax.shard_map`; without compression both
            are the same, `P()`.
        residual: v after the step, what this worker has not sent.
        bytes_sent: by this device in the last step, in rings, float32.
    """

    count: jax.Array
    momentum: jax.Array
    residual: jax.Array
    bytes_sent: jax.Array


@typed
def scale_by_dgc(
    *,
    momentum: Number = 0.9,
    sparsities: Sequence[float] | float = STAGES,
    stage_steps: Number = 1000,
    clip: Number | None = None,
    factor_masking: bool = True,
    compression: Literal["top_k", "none"] = "top_k",
    axis_name: AxisName = None,
) -> optax.GradientTransformation:
    """The direction of deep gradient compression, of each device's own gradients.

    Args:
        momentum: m, in [0, 1).
        sparsities: of the stages, each in [0, 1): the share of a tensor's entries that
            is not sent; one entry is sent at least. The last one stays.
        stage_steps: how long each stage but the last is, > 0: an epoch in the paper.
        clip: the norm that the mean gradient is to keep to; each of n workers clips its
            own to clip / sqrt(n). None does not.
        factor_masking: False leaves u where v was sent.
        compression: "none" is momentum of the mean gradient, `optax.trace`, sent in
            float32.
        axis_name: the axis of `jax.shard_map`, or of `jax.vmap`, whose devices are the
            workers; None is a world of one, which compresses all the same.

    Returns:
        The transformation; its state is a `DGCState`. The same direction comes out on
        all devices.

    Raises:
        ValueError: a number is out of range, or there is no such axis.

    >>> direction = scale_by_dgc(sparsities=0.5)
    >>> state = direction.init(jnp.zeros(2))
    >>> for _ in range(2):
    ...     u, state = direction.update(jnp.array([3.0, -2.0]), state)
    >>> u.tolist(), state.residual.tolist()  # the second waited, and came with momentum
    ([0.0, -5.8], [3.0, 0.0])
    """
    check_range("momentum", momentum, low=0.0, below=1.0)
    check_range("stage_steps", stage_steps, above=0.0)
    stages = [float(sparsity) for sparsity in np.atleast_1d(sparsities)]
    for sparsity in stages:
        check_range("sparsities", sparsity, low=0.0, below=1.0)
    if clip is not None:
        check_range("clip", clip, above=0.0)
    knobs: Any = (momentum, stage_steps)  # annotations know no sums of `Number`s
    decay, length = knobs
    trace: Any = optax.trace(decay)

    def init(params: Any) -> DGCState:
        params = jax.tree.map(lambda p: jnp.zeros_like(as_float32(p)), params)
        flat = ravel_pytree(params)[0]
        zeros = jnp.zeros(flat.size, jnp.promote_types(flat.dtype, jnp.float32))
        own = (zeros, jnp.zeros_like(zeros))  # two buffers: states are donated
        if compression == "top_k":
            own = per_device(own, axis_name)
        return DGCState(jnp.int32(0), *own, jnp.float32(0.0))

    def clipped(flat: jax.Array, limit: Any) -> jax.Array:
        if clip is None:
            return flat
        # The largest entry first: the square of 1e30 is infinite.
        largest = jnp.maximum(jnp.max(jnp.abs(flat), initial=0.0), 1e-30)
        norm = largest * jnp.sqrt(jnp.sum(jnp.square(flat / largest)))
        return flat * jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))

    def dense(grads: Any, state: DGCState) -> tuple[Any, DGCState]:
        size = axis_size(axis_name)
        mean = jax.tree.map(lambda g: g / size, psum(grads, axis_name))
        flat, unravel = ravel_pytree(mean)
        if clip is not None:
            mean = unravel(clipped(flat, clip))
        past = optax.TraceState(unravel(state.momentum))
        u, _ = trace.update(mean, past)
        sent = jnp.float32(2.0 * flat.nbytes * (size - 1) / size)
        return u, state._replace(momentum=ravel_pytree(u)[0], bytes_sent=sent)

    def sparse(
        sizes: Sequence[int], sparsity: float, u: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, ...]:
        places = _largest(v, sizes, sparsity)
        size = axis_size(axis_name)
        values = v[places].astype(jnp.float32)
        bits = lax.bitcast_convert_type(values, jnp.int32)
        message = jnp.stack([bits, places], axis=1)
        every = all_gather_same(message, axis_name)
        values = lax.bitcast_convert_type(every[:, 0], jnp.float32).astype(v.dtype)
        mean = jnp.zeros(v.size, v.dtype).at[every[:, 1]].add(values) / size
        v = v.at[places].set(0.0)
        u = u.at[places].set(0.0) if factor_masking else u
        return mean, u, v, jnp.float32((size - 1.0) * message.nbytes)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        grads = jax.tree.map(as_float32, updates)
        flat, unravel = ravel_pytree(grads)
        sizes = [leaf.size for leaf in jax.tree.leaves(grads)]
        if compression == "none":
            mean, state = dense(grads, state)
        else:
            limit = None if clip is None else clip / axis_size(axis_name) ** 0.5
            u = decay * state.momentum + clipped(flat, limit)
            v = state.residual + u
            # All devices count alike, so all are in the same branch's collectives.
            stage = jnp.floor_divide(state.count, length).astype(jnp.int32)
            branches = [lambda u, v, s=s: sparse(sizes, s, u, v) for s in stages]
            mean, *own = lax.switch(stage, branches, u, v)
            mean, state = unravel(mean), DGCState(state.count, *own)
        state = state._replace(count=optax.safe_increment(state.count))
        return jax.tree.map(lambda u, g: u.astype(g.dtype), mean, updates), state

    return optax.GradientTransformation(init, update)


@typed
def dgc(
    learning_rate: Number | Callable[[Any], Any],
    *,
    momentum: Number = 0.9,
    sparsities: Sequence[float] | float = STAGES,
    stage_steps: Number = 1000,
    clip: Number | None = None,
    compression: Literal["top_k", "none"] = "top_k",
    axis_name: AxisName = None,
    weight_decay: Number = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:
    """Momentum SGD by deep gradient compression, to be called inside `jax.shard_map`.

    p <- p - learning_rate (mean of what was sent + weight_decay p)

    Args:
        learning_rate: >= 0, or a schedule.
        momentum: as for `scale_by_dgc`, and so the five that follow.
        sparsities: of the stages, each in [0, 1).
        stage_steps: how long each stage but the last is, > 0.
        clip: the norm that the mean gradient is to keep to, or None.
        compression: "top_k" or "none".
        axis_name: the axis of the workers; None is a world of one.
        weight_decay: decoupled, >= 0.
        mask: which parameters decay, as in `optax.add_decayed_weights`.

    Returns:
        The optimizer; the first entry of its state is a `DGCState`.

    Raises:
        ValueError: a number is out of range, or there is no such axis.

    >>> optimizer = dgc(0.2, sparsities=0.5)
    >>> p = jnp.array([3.0, -4.0])
    >>> state = optimizer.init(p)
    >>> for _ in range(30):
    ...     u, state = optimizer.update(p, state)
    ...     p = optax.apply_updates(p, u)
    >>> bool(jnp.all(jnp.abs(p) < 0.01))
    True
    """
    if not callable(learning_rate):
        check_range("learning_rate", learning_rate, low=0.0)
    check_range("weight_decay", weight_decay, low=0.0)
    direction = scale_by_dgc(
        momentum=momentum, sparsities=sparsities, stage_steps=stage_steps, clip=clip,
        compression=compression, axis_name=axis_name,
    )  # fmt: skip
    rate: Any = learning_rate  # Optax's annotations know no NumPy numbers
    decay: Any = weight_decay
    if isinstance(decay, float | int) and decay == 0:  # asks for no parameters
        return optax.chain(direction, optax.scale_by_learning_rate(rate))
    decayed = optax.add_decayed_weights(decay, mask)
    return optax.chain(direction, decayed, optax.scale_by_learning_rate(rate))


def _largest(v: jax.Array, sizes: Sequence[int], sparsity: float) -> jax.Array:
    """Places of the largest entries of each tensor, int32, in the row of all."""
    begin, places = 0, [jnp.zeros(0, jnp.int32)]
    for size in sizes:
        # The float error of 1 - sparsity must not send one entry more.
        count = min(size, max(1, math.ceil((1.0 - sparsity) * size - 1e-6)))
        top = lax.top_k(jnp.abs(v[begin : begin + size]), count)[1]
        places.append(begin + top.astype(jnp.int32))
        begin += size
    return jnp.concatenate(places)


EXAMPLES = {
    dgc: lambda key: (
        (1e-2,),
        {"sparsities": (0.5, 0.75), "stage_steps": 10, "clip": 1.0},
    ),
    scale_by_dgc: lambda key: ((), {"sparsities": (0.5, 0.75), "stage_steps": 2}),
}
