"""Eight workers, by `vmap` and over devices, for the compressed optimizers' tests."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

# Three leaves of sizes that no chunk ends with.
SHAPES = {"bias": (5,), "kernel": (17, 9), "scalar": ()}
STEPS = 6


def gradients(workers, shapes=SHAPES, steps=STEPS):
    """`[steps, workers, ...]`: a common part and each worker's own."""
    rng = np.random.default_rng(0)

    def leaf(shape):
        common = rng.normal(size=(steps, 1, *shape))
        return common + 0.5 * rng.normal(size=(steps, workers, *shape))

    return {name: leaf(shape) for name, shape in shapes.items()}


def zeros(shapes=SHAPES):
    return {name: jnp.zeros(shape) for name, shape in shapes.items()}


def flattened(tree, lead):
    return np.concatenate(
        [np.reshape(tree[n], (*np.shape(tree[n])[:lead], -1)) for n in sorted(tree)],
        axis=lead,
    )


def over_workers(direction, workers, grads):
    """The directions and the last state, workers being an axis of `vmap`."""
    state = jax.vmap(direction.init, None, axis_name="d", axis_size=workers)(
        jax.tree.map(lambda g: g[0, 0], grads)
    )
    update = jax.vmap(direction.update, axis_name="d")

    def step(state, grads):
        updates, state = update(grads, state)
        return state, updates

    return jax.jit(functools.partial(jax.lax.scan, step))(state, grads)


def mesh(devices=8):
    some = jax.devices()[:devices]
    return jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,), devices=some)


def sharded(direction, devices, spec, check_vma=True):
    """`init` and `update` of one step over real devices; gradients `[devices, ...]`."""
    knobs: Any = {"mesh": mesh(devices), "check_vma": check_vma}
    init = jax.shard_map(direction.init, in_specs=P(), out_specs=spec, **knobs)

    def update(grads, state):
        return direction.update(jax.tree.map(lambda g: g[0], grads), state)

    specs: Any = ((P("d"), spec), (P(), spec))
    update = jax.shard_map(update, in_specs=specs[0], out_specs=specs[1], **knobs)
    return jax.jit(init), jax.jit(update)
