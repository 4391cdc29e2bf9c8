"""What operations need that run inside `jax.shard_map`."""

from typing import TypeVar

import jax

__all__ = ["alike", "check_axis"]

T = TypeVar("T")


def alike(arrays: T) -> T:
    """The same values, for `shard_map` different on every device where any of them is.

    A carry of `lax.scan` and the arguments of a `custom_vjp` have to be so. The
    gradient of what was the same everywhere is summed.

    Args:
        arrays: a tree of arrays.
    """
    leaves = jax.tree.leaves(arrays)
    varies = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    axes = frozenset().union(*varies)

    def one(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, arrays)


def check_axis(name: str) -> None:
    """Checks that an axis of this name is mapped here.

    Raises:
        ValueError: there is none.
    """
    try:
        jax.lax.axis_size(name)
    except NameError:
        raise ValueError(
            f"argument 'axis_name' is {name!r}, expected None, or an axis of the "
            "jax.shard_map that this is called in."
        ) from None
