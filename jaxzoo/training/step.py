"""One step of training as a pure function, whole or in virtual shards."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxzoo.training.mesh import BATCH_AXES

__all__ = ["descend", "init_state", "update_step"]

State = dict[str, Any]
Batch = Any  # a pytree of arrays
Metrics = dict[str, Any]
Loss = Callable[[Any, jax.Array, Batch], tuple[jax.Array, Metrics]]

VIRTUAL_SHARDS = 8


def init_state(
    key: jax.Array, params: Any, optimizer: optax.GradientTransformation
) -> State:
    """The state before the first step; `jax.vmap` it over keys for several seeds."""
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "key": key,
    }


def descend(
    loss: Callable[[Any, jax.Array], jax.Array], params: Any,
    rate: float | optax.Schedule, key: jax.Array, steps: int,
) -> Any:  # fmt: skip
    """Parameters after Adam on `loss(params, key)`, its rate falling to 0 by a cosine.

    For fits inside one jitted program, under `vmap` or `lax.map` over seeds, that need
    no checkpoints. A schedule of rates is taken as it is.
    """
    schedule = rate if callable(rate) else optax.cosine_decay_schedule(rate, steps)
    optimizer = optax.adam(schedule)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    return lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


def update_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, reproducible: bool = False
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """One optimizer step as a pure function of (state, batch).

    Args:
        loss: maps `(params, key, batch)` to a scalar and a dict of scalars to log.
        optimizer: any optax transformation.
        reproducible: the same bits on every mesh that splits the batch over 2, 4 or 8
            devices. The batch is cut into eight virtual shards, each with the key
            `fold_in(key, shard)`; their gradients and metrics are averaged by one fixed
            tree of sums, and every device makes the whole update. The loss and its
            metrics have to be means over examples.

    Returns:
        `step(state, batch) -> (state, metrics)`, for `train`; `jax.vmap` it over seeds.
    """

    def gradient(params: Any, key: jax.Array, batch: Batch) -> tuple[Any, Metrics]:
        return jax.grad(loss, has_aux=True)(params, key, batch)

    def update(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state["key"], state["step"])
        if reproducible:
            grads, metrics = _over_virtual_shards(gradient, state["params"], key, batch)
            updated = _on_every_device(update)
        else:
            grads, metrics = gradient(state["params"], key, batch)
            updated = update
        params, opt_state = updated(state["params"], state["opt_state"], grads)
        new_state = {
            "params": params,
            "opt_state": opt_state,
            "step": state["step"] + 1,
            "key": state["key"],
        }
        return new_state, metrics

    return step


def _over_virtual_shards(
    gradient: Callable[..., Any], params: Any, key: jax.Array, batch: Batch
) -> Any:
    """The mean of `gradient` over the shards of a batch, added in a fixed order."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    if VIRTUAL_SHARDS % parts:
        raise ValueError(
            f"reproducible=True cuts a batch into {VIRTUAL_SHARDS} virtual shards, "
            f"which cannot be spread over data x fsdp = {parts} devices."
        )
    count = VIRTUAL_SHARDS // parts

    def one(params: Any, key: jax.Array, shard: Any, batch: Batch) -> Any:
        return gradient(params, jax.random.fold_in(key, shard), batch)

    def on_device(params: Any, key: jax.Array, batch: Batch) -> Any:
        first = lax.axis_index(BATCH_AXES) * count if mesh.shape else jnp.int32(0)
        split = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)

        def part(i: Any) -> Batch:
            return jax.tree.map(lambda x: x[i], split)

        def body(i: jax.Array, results: Any) -> Any:
            result = one(params, key, first + i, part(i))
            return jax.tree.map(lambda all, x: all.at[i].set(x), results, result)

        shapes = jax.eval_shape(lambda: one(params, key, first, part(0)))
        empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), shapes)
        total = lax.fori_loop(0, _uncounted(count, first), body, empty)
        while jax.tree.leaves(total)[0].shape[0] > 1:
            total = jax.tree.map(lambda x: x[::2] + x[1::2], total)
        total = jax.tree.map(lambda x: x[0], total)
        # Neighbours first, as above: sums over 1, 2 and 4 devices are the same tree.
        for distance in (1, 2, 4):
            if distance < parts:
                swap = [(i, i ^ distance) for i in range(parts)]
                other = lax.ppermute(total, BATCH_AXES, swap)
                total = jax.tree.map(jnp.add, total, other)
        return jax.tree.map(lambda x: x / VIRTUAL_SHARDS, total)

    for leaf in jax.tree.leaves(batch):
        if leaf.ndim == 0 or leaf.shape[0] % VIRTUAL_SHARDS:
            raise ValueError(
                f"reproducible=True cuts a batch into {VIRTUAL_SHARDS} virtual shards: "
                f"a leaf of shape {leaf.shape} has no such number of equal parts."
            )
    if not mesh.shape:
        return on_device(params, key, batch)
    specs = (P(), P(), P(BATCH_AXES))
    mapped = jax.shard_map(on_device, in_specs=specs, out_specs=P(), check_vma=False)
    return mapped(params, key, batch)


def _uncounted(turns: int, index: jax.Array) -> jax.Array:
    """`turns`, but the compiler does not know it.

    What stands in the body of a loop is fused with nothing outside it. So the loop is
    the same program on each mesh, unless the compiler takes it apart for being short.
    """
    return turns + (index < 0).astype(jnp.int32)  # an index is never below 0


def _on_every_device(update: Callable[..., Any]) -> Callable[..., Any]:
    """`update` of whole arrays, in a loop of one turn; see `_uncounted` for why."""

    def whole(params: Any, opt_state: Any, grads: Any) -> Any:
        index = lax.axis_index(BATCH_AXES) if mesh.shape else jnp.int32(0)

        def body(i: jax.Array, carry: Any) -> Any:
            # What does not depend on the turn would be moved out of the loop.
            now = jax.tree.map(lambda g: jnp.where(i == 0, g, 0), grads)
            return update(*carry, now)

        return lax.fori_loop(0, _uncounted(1, index), body, (params, opt_state))

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.shape:
        return whole
    return jax.shard_map(whole, in_specs=P(), out_specs=P(), check_vma=False)
