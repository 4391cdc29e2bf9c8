"""Meshes by the names of their axes, and where batches and states lie on them.

data     the batch is split; each device has the whole state
fsdp     the batch is split, and so is each large leaf of the state
tensor   each large leaf of the state is split; the batch is not
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxzoo.core.tree import named_leaves

__all__ = [
    "BATCH_AXES",
    "PlacementError",
    "Specs",
    "batch_shardings",
    "local",
    "make_mesh",
    "place",
    "put_batch",
    "state_shardings",
]

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # the batch is split over both
MIN_SIZE = 1024  # numbers in a leaf that is worth splitting


class PlacementError(ValueError):
    """A batch does not fit the mesh; the message names both."""


Specs = Callable[[str, tuple[int, ...]], P | None]


def make_mesh(text: str = "data=-1", devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor.

    Args:
        text: sizes by name, such as "data=4,fsdp=2"; an axis that is not named has size
            1, and -1 stands for all devices that are left.
        devices: what to make it of; None takes all devices of all processes.

    Returns:
        The mesh; GSPMD propagates shardings over all of its axes.

    Raises:
        ValueError: the text is not of that form, or does not fit the devices.

    >>> dict(make_mesh("fsdp=-1", jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        if not re.fullmatch(rf"({'|'.join(AXES)})=(-1|[1-9]\d*)", part.strip()):
            raise ValueError(
                f"mesh '{text}': '{part}' is not AXIS=SIZE with an axis of "
                f"{', '.join(AXES)} and a size of 1 or more, or -1 for the rest."
            )
        name, size = part.strip().split("=")
        sizes[name] = int(size)
    rest = len(devices) // math.prod(size for size in sizes.values() if size > 0)
    if list(sizes.values()).count(-1) == 1 and rest:
        sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if -1 in sizes.values() or math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh '{text}' does not fit {len(devices)} devices: the sizes have to "
            "multiply to that number, and one of them may be -1."
        )
    # Explicit axes, the default, would ask every model for shardings of its own.
    types = (AxisType.Auto,) * len(AXES)
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def state_shardings(mesh: Mesh, state: Any, specs: Specs | None = None) -> Any:
    """Where each leaf of a state lies: a tree of shardings.

    The largest dimension that fsdp divides is split over it, and the largest other one
    that tensor divides over that; small leaves and keys are whole on each device. The
    moments of an optimizer lie like their parameters, as they have their shapes.

    Args:
        mesh: as `make_mesh` makes it.
        state: a pytree of arrays or `jax.ShapeDtypeStruct`.
        specs: `(name, shape) -> PartitionSpec` for the leaves that want another place;
            None leaves a leaf to the rule. Names are paths, as "params/dense/kernel".
    """
    placed = []
    for name, leaf in named_leaves(state).items():
        spec = None if specs is None else specs(name, leaf.shape)
        placed.append(NamedSharding(mesh, _spec(mesh, leaf) if spec is None else spec))
    return jax.tree.unflatten(jax.tree.structure(state), placed)


def _spec(mesh: Mesh, leaf: Any) -> P:
    axes: list[str | None] = [None] * leaf.ndim
    if leaf.size >= MIN_SIZE and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        for axis in ("fsdp", "tensor"):
            fits = [
                (size, dimension)
                for dimension, size in enumerate(leaf.shape)
                if axes[dimension] is None and size % mesh.shape[axis] == 0
            ]
            if mesh.shape[axis] > 1 and fits:
                axes[max(fits)[1]] = axis
    return P(*axes)


def place(
    mesh: Mesh, state: Any, specs: Specs | None = None, *, reproducible: bool = False
) -> Any:
    """A state on the mesh, as fresh arrays.

    Args:
        mesh: as `make_mesh` makes it.
        state: a pytree of arrays, the same in every process; or a function without
            arguments that makes it, so that no device ever holds all of it.
        specs: as for `state_shardings`.
        reproducible: makes all of the state on each device first: the last bits of a
            random number depend on how large a part it is made in.
    """
    if callable(state):
        shardings = state_shardings(mesh, jax.eval_shape(state), specs)
        if not reproducible:
            return jax.jit(state, out_shardings=shardings)()
        whole = jax.jit(state, out_shardings=NamedSharding(mesh, P()))()
        return jax.jit(_copy, out_shardings=shardings)(whole)
    # By way of NumPy: other processes' devices take no array that lies on one of ours.
    keys = jax.tree.map(_key_impl, state)
    plain = jax.tree.map(_to_numpy, state)
    shardings = state_shardings(mesh, state, specs)

    def rebuild(plain: Any) -> Any:
        return jax.tree.map(_from_numpy, plain, keys)

    return jax.jit(rebuild, out_shardings=shardings)(plain)


def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _key_impl(leaf: Any) -> Any:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return str(jax.random.key_impl(leaf)) if is_key else ""


def _to_numpy(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _key_impl(leaf) else leaf)


def _from_numpy(leaf: Any, impl: str) -> jax.Array:
    return jax.random.wrap_key_data(leaf, impl=impl) if impl else jnp.copy(leaf)


def batch_shardings(mesh: Mesh, batch: Any, axis: int) -> Any:
    """Where each leaf of a batch lies: a tree of shardings.

    Args:
        mesh: as `make_mesh` makes it.
        batch: a pytree of arrays; a leaf without dimension `axis` is whole everywhere.
        axis: the dimension of the examples, split over data and fsdp.

    Raises:
        PlacementError: the examples cannot be split evenly; names the leaf.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def one(path: Any, leaf: Any) -> NamedSharding:
        if np.ndim(leaf) <= axis:
            return NamedSharding(mesh, P())
        if np.shape(leaf)[axis] % parts:
            name = jax.tree_util.keystr(path, simple=True, separator="/") or "the batch"
            raise PlacementError(
                f"{name} has {np.shape(leaf)[axis]} examples, which cannot be split "
                f"evenly over data x fsdp = {parts} devices: take a batch size that is "
                "a multiple of it, or a --mesh with smaller data and fsdp."
            )
        return NamedSharding(mesh, P(*[None] * axis, BATCH_AXES))

    return jax.tree_util.tree_map_with_path(one, batch)


def put_batch(
    mesh: Mesh, batch: Any, axis: int, rows: slice | None = None, total: int = 0
) -> Any:
    """A batch of NumPy arrays on the mesh.

    Args:
        mesh: as `make_mesh` makes it.
        batch: a pytree of arrays, the whole batch; with `rows`, that part of it.
        axis: the dimension of the examples.
        rows: which examples this process has; None for all.
        total: how many examples the whole batch has, where `rows` is given.
    """

    def whole(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = list(leaf.shape)
        if rows is not None and leaf.ndim > axis:
            shape[axis] = total
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    def one(leaf: Any, like: Any, sharding: NamedSharding) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            if rows is not None and leaf.ndim > axis:
                start, stop, _ = index[axis].indices(total)
                own = slice(start - rows.start, stop - rows.start)
                index = (*index[:axis], own, *index[axis + 1 :])
            return leaf[index]

        return jax.make_array_from_callback(like.shape, sharding, piece)

    batch = jax.tree.map(np.asarray, batch)
    like = jax.tree.map(whole, batch)
    return jax.tree.map(one, batch, like, batch_shardings(mesh, like, axis))


def local(tree: Any) -> Any:
    """A pytree that lies on a mesh, whole on one device of this process.

    What follows training, such as an evaluation, is then the same program in every
    process, and on every mesh.
    """
    leaves = jax.tree.leaves(tree)
    shardings = {leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array)}
    meshes = {s.mesh for s in shardings if isinstance(s, NamedSharding)}
    if not meshes:
        return tree
    whole = NamedSharding(meshes.pop(), P())
    keys = jax.tree.map(_key_impl, tree)

    def plain(tree: Any) -> Any:
        return jax.tree.map(lambda x, k: jax.random.key_data(x) if k else x, tree, keys)

    gathered = jax.jit(plain, out_shardings=whole)(tree)
    own = jax.tree.map(lambda leaf: leaf.addressable_data(0), gathered)
    return jax.tree.map(
        lambda x, k: jax.random.wrap_key_data(x, impl=k) if k else x, own, keys
    )
