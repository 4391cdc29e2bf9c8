"""Sums, exchanges and sums over all pairs for devices that share a batch.

`axis_name=None` means that arrays are whole: then each function here gives back what it
got. A name means that the caller runs inside `jax.shard_map` or `jax.pmap`, and holds a
part of the batch.

Gradients are those of jax's own collectives. Under `shard_map` (with its `check_vma`)
they are those of the whole. Under `pmap`, and with `check_vma=False`, a gradient taken
inside is that of the sum of all devices' losses: average the parameters' gradients by
`jax.lax.pmean`, as is usual there.

Sums over pairs go one tile at a time: the columns travel round a ring of devices while
each device keeps its rows. The backward pass lets them travel once more and computes
each tile again; the gradient of a block travels with it and comes home complete. So a
device holds one tile of logits, [rows, rows] or [rows, chunk], however many there are.
A function of a tile takes two `Side`s and closes over nothing that wants a gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxzoo.core.typed import as_float32

__all__ = [
    "AxisName",
    "Side",
    "all_gather",
    "all_gather_same",
    "all_to_all",
    "axis_index",
    "axis_size",
    "masked_rows",
    "pair_sum",
    "per_device",
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


def all_gather_same(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """`all_gather` whose result `shard_map` knows to be the same on each device."""
    if not _is_manual(axis_name):
        return all_gather(x, axis_name)
    return lax.all_gather(x, axis_name, tiled=True, to="invarying")


def all_to_all(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """Row i of the first axis goes to device i; row j of the result is device j's.

    There are as many rows as devices, and one where arrays are whole.
    """
    axis_size(axis_name)
    return x if axis_name is None else lax.all_to_all(x, axis_name, 0, 0, tiled=True)


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


def per_device(tree: Tree, axis_name: AxisName) -> Tree:
    """`varying` for state that begins the same, where `jax.vmap` may name the axis.

    Under `vmap` no values have to be declared different.
    """
    axis_size(axis_name)
    return varying(tree, axis_name) if _is_manual(axis_name) else tree


class Side(NamedTuple):
    """The rows, or the columns, of the pairs.

    Attributes:
        features: pytree of float arrays `[b, ...]`; they get gradients.
        tags: pytree of arrays `[b, ...]` that get none, such as masks and numbers.
    """

    features: Any
    tags: Any = None


Block = Callable[[Side, Side], jax.Array]


def pair_sum(
    block: Block,
    rows: Side,
    columns: Side,
    *,
    axis_name: AxisName = None,
    chunk: int | None = None,
) -> jax.Array:
    """The sum over all pairs of a row of this device and a column of any device.

    Args:
        block: `(rows, columns) -> scalar`, the sum over the pairs of a tile.
        rows: one side, of this device.
        columns: the other side, of this device.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` that the batch is split
            over; None where it is whole. With a name there is no forward mode.
        chunk: columns per tile, a divisor of those of a device; None takes them all.

    Returns:
        A scalar, another one on each device: `psum` it.

    Raises:
        ValueError: `chunk` is no such divisor, or there is no such axis here.

    >>> products = lambda rows, columns: jnp.sum(rows.features @ columns.features.T)
    >>> float(pair_sum(products, Side(jnp.ones((4, 3))), Side(jnp.ones((2, 3)))))
    24.0
    """
    check_chunk(columns, chunk)
    if axis_name is None:
        return _tiles_sum(block, rows, columns, None, chunk)
    axis_size(axis_name)
    rows, columns = varying((rows, columns), axis_name)
    return _ring_sum(block, axis_name, chunk, rows, columns)


def masked_rows(x: Any, where: Any | None) -> jax.Array:
    """Features in float32, rows that do not count 0: those may have held NaN.

    Args:
        x: `[b, ...]` of any float dtype.
        where: `[b]`, True for the rows that count; None where all do.

    Returns:
        The same shape, float32, or float64 where `x` came as float64.

    >>> masked_rows(jnp.array([[1.0], [jnp.nan]]), jnp.array([True, False])).tolist()
    [[1.0], [0.0]]
    """
    x = as_float32(x)
    if where is None:
        return x
    mask = jnp.asarray(where).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.where(mask, x, 0.0)


def _is_manual(axis_name: AxisName) -> bool:
    """Whether it is an axis of `shard_map`: of `vmap`, older jax declares nothing."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return names is not None and set(names) <= set(manual)


def check_chunk(columns: Side, chunk: int | None) -> None:
    """Refuses chunks that do not divide the columns of a device."""
    count = jax.tree.leaves(columns.features)[0].shape[0]
    if chunk is not None and (chunk < 1 or count % chunk):
        raise ValueError(
            f"argument 'chunk' is {chunk}, expected a divisor of {count}, the columns "
            "that one device has."
        )


def over_tiles(step: Any, carry: Any, columns: Any, chunk: int | None) -> Any:
    """`lax.scan` of a step over chunks of the columns; its outputs in one piece."""
    if chunk is None:
        return step(carry, columns)
    tiles = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), columns)
    carry, out = lax.scan(jax.checkpoint(step), carry, tiles)
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _tiles_sum(
    block: Block, rows: Side, columns: Side, axis_name: AxisName, chunk: int | None
) -> jax.Array:
    if chunk is None:
        return block(rows, columns)
    dtype = jax.eval_shape(block, rows, columns).dtype

    def add(total: jax.Array, tile: Side) -> Any:
        return total + block(rows, tile), None

    zero = varying(jnp.zeros((), dtype), axis_name)
    return over_tiles(add, zero, columns, chunk)[0]


def visit_ring(hop: Any, carry: Any, traveller: Any, axis_name: AxisName) -> Any:
    """Visits every device: `hop(carry, traveller)` returns both anew."""

    def visit(state: Any, _: None) -> Any:
        carry, traveller = hop(*state)
        return (carry, shift(traveller, axis_name)), None

    state, _ = lax.scan(visit, (carry, traveller), length=axis_size(axis_name))
    return state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring_sum(
    block: Block, axis_name: AxisName, chunk: int | None, rows: Side, columns: Side
) -> jax.Array:
    def hop(total: jax.Array, columns: Side) -> Any:
        total += _tiles_sum(block, rows, columns, axis_name, chunk)
        return total, columns

    zero = jnp.zeros((), jax.eval_shape(block, rows, columns).dtype)
    return visit_ring(hop, varying(zero, axis_name), columns, axis_name)[0]


def _ring_sum_forward(
    block: Block, axis_name: AxisName, chunk: int | None, rows: Side, columns: Side
) -> Any:
    return _ring_sum(block, axis_name, chunk, rows, columns), (rows, columns)


def _ring_sum_backward(
    block: Block, axis_name: AxisName, chunk: int | None, saved: Any, weight: jax.Array
) -> Any:
    rows, columns = saved
    return ring_gradient(block, axis_name, chunk, rows, columns, weight)


_ring_sum.defvjp(_ring_sum_forward, _ring_sum_backward)


def ring_gradient(
    block: Block,
    axis_name: AxisName,
    chunk: int | None,
    rows: Side,
    columns: Side,
    weight: jax.Array,
) -> tuple[Side, Side]:
    """The gradients of the sum over devices of weight * `_ring_sum`.

    Each device adds, to the gradient that a block brings along, what its own rows do to
    it by its own weight: the exact transpose, also where the weights differ.
    """

    def tile(to_rows: Any, visited: tuple[Side, Any]) -> Any:
        columns, to_columns = visited

        def of_features(first: Any, second: Any) -> jax.Array:
            return block(Side(first, rows.tags), Side(second, columns.tags))

        _, pull = jax.vjp(of_features, rows.features, columns.features)
        first, second = pull(weight)
        return jax.tree.map(jnp.add, (to_rows, to_columns), (first, second))

    def hop(to_rows: Any, traveller: tuple[Side, Any]) -> Any:
        to_rows, to_columns = over_tiles(tile, to_rows, traveller, chunk)
        return to_rows, (traveller[0], to_columns)

    zeros = jax.tree.map(jnp.zeros_like, (rows.features, columns.features))
    to_rows, to_columns = varying(zeros, axis_name)
    to_rows, home = visit_ring(hop, to_rows, (columns, to_columns), axis_name)
    return Side(to_rows, None), Side(home[1], None)
