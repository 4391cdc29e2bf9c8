"""Typed keys as the integers behind them, which is what Orbax can store, and back."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["is_key", "with_data", "wrap_key"]


def is_key(leaf: Any) -> bool:
    """Whether this is an array of typed keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def with_data(tree: Any, *, abstract: bool = False) -> Any:
    """The tree with typed keys as the integers behind them."""

    def one(leaf: Any) -> Any:
        if not is_key(leaf):
            return leaf
        if not abstract:
            return jax.random.key_data(leaf)
        data = jax.eval_shape(jax.random.key_data, leaf)
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def wrap_key(like: Any, leaf: Any) -> Any:
    """A leaf that was restored, as keys again where `like` is one."""
    if not is_key(like):
        return leaf
    impls = []  # an abstract key tells its kind under a trace alone
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(leaf, impl=impls[0])
