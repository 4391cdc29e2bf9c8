"""vmap of a kernel that has no rule for it: one longer batch, or a loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["folded"]


def folded(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel with a rule for vmap.

    The new axis joins the batch. Sinks, whose gradient is a sum over the batch, and
    dropout, which counts the rows of the batch, make it a loop.

    Args:
        kernel: takes `(q, k, v, extras, *others)`, of arrays that have the batch on
            their first axis, in `extras` perhaps of length 1, and gives such arrays.

    Returns:
        The same function.
    """
    call = jax.custom_batching.custom_vmap(kernel)

    @call.def_vmap
    def rule(size: int, is_batched: Any, *args: Any) -> Any:
        q, extras = args[0], args[3]
        batch = q.shape[1 if is_batched[0] else 0]
        if extras.sinks is not None or extras.seed is not None:
            leaves, tree = jax.tree.flatten(args)
            flags = jax.tree.leaves(is_batched)

            def one(index: jax.Array) -> Any:
                picked = [
                    x[index] if flag else x
                    for x, flag in zip(leaves, flags, strict=True)
                ]
                return kernel(*tree.unflatten(picked))

            out = jax.lax.map(one, jnp.arange(size))
        else:
            long = jax.tree.map(
                lambda x, flag: _join(x, flag, size, batch), args, tuple(is_batched)
            )
            out = jax.tree.map(
                lambda x: x.reshape(size, batch, *x.shape[1:]), call(*long)
            )
        return out, jax.tree.map(lambda _: True, out)

    return call


def _join(x: jax.Array, is_batched: bool, size: int, batch: int) -> jax.Array:
    """`[size, batch, ...]` or `[batch, ...]` as one batch."""
    if not is_batched:
        x = x[None]
    x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
    return x.reshape(size * batch, *x.shape[2:])
