"""Sums and exchanges over the devices that share a batch.

`axis_name=None` means that arrays are whole: then each function here gives back what it
got. A name means that the caller runs inside `jax.shard_map` or `jax.pmap`, and holds a
part of the batch.

Gradients are those of jax's own collectives. Under `shard_map` (with its `check_vma`)
they are those of the whole. Under `pmap`, and with `check_vma=False`, a gradient taken
inside is that of the sum of all devices' losses: average the parameters' gradients by
`jax.lax.pmean`, as is usual there.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "AxisName",
    "all_gather",
    "axis_index",
    "axis_size",
    "psum",
    "shift",
    "varying",
]

AxisName = str | tuple[str, ...] | None
Tree = TypeVar("Tree")


def axis_size(axis_name: AxisName) -> int:
    """How many devices share the batch; 1 where arrays are whole.

    Raises:
        ValueError: there is no such axis here.
    """
    if axis_name is None:
        return 1
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"argument 'axis_name' is {axis_name!r}, expected None, or an axis of the "
            "jax.shard_map or jax.pmap that this is called in."
        ) from None


def axis_index(axis_name: AxisName) -> jax.Array:
    """Which of the parts this device holds, int32; 0 where arrays are whole."""
    if axis_size(axis_name) == 1:
        return jnp.int32(0)
    assert axis_name is not None
    return lax.axis_index(axis_name)


def psum(tree: Tree, axis_name: AxisName) -> Tree:
    """The sum over all devices, on each of them."""
    axis_size(axis_name)
    return tree if axis_name is None else lax.psum(tree, axis_name)


def all_gather(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The parts of all devices one after the other along the first axis."""
    axis_size(axis_name)
    return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)


def shift(tree: Tree, axis_name: AxisName) -> Tree:
    """What the next device of the ring has: after as many as there are, one's own."""
    size = axis_size(axis_name)
    if axis_name is None:
        return tree
    ring = [((device + 1) % size, device) for device in range(size)]
    return lax.ppermute(tree, axis_name, ring)


def varying(tree: Tree, axis_name: AxisName) -> Tree:
    """The same values, which `shard_map` may take for different on each device.

    A carry of `lax.scan`, and the arguments of a `custom_vjp`, have to be so if what
    they meet is. The gradient of what was the same everywhere is summed.
    """
    axis_size(axis_name)
    if axis_name is None:
        return tree
    names = (axis_name,) if isinstance(axis_name, str) else axis_name

    def one(x: jax.Array) -> jax.Array:
        known = jax.typeof(x).manual_axis_type.varying
        missing = tuple(name for name in names if name not in known)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree)
