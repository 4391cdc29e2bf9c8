"""Updates of bfloat16 parameters that are rounded at random, and so do not stall.

    params = apply_updates_stochastic(key, params, updates)  # optax.apply_updates

Rounded to nearest, an update below half a gap of bfloat16, 1 / 512 to 1 / 256 of the
parameter, is lost, however often it comes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from jaxzoo.core.transform import in_float32
from jaxzoo.core.typed import ArrayLike, typed

__all__ = ["apply_updates_stochastic"]


@typed
def apply_updates_stochastic(
    key: Key[Array, ""],
    params: PyTree[Float[ArrayLike, "..."]],
    updates: PyTree[Float[ArrayLike, "..."]],
) -> Any:
    """p + u, rounded up or down at random, so that bfloat16 parameters do not stall.

    E[result] = p + u, both neighbours of p + u in bfloat16 in proportion to nearness

    Args:
        key: a typed key; the result is the same on every mesh.
        params: bfloat16 arrays are rounded so; others as by `optax.apply_updates`.
        updates: of the same tree.

    Returns:
        The new parameters, in their own dtypes. What is finite in float32 stays finite;
        infinity and NaN stay what they are.

    >>> p = {"w": jnp.ones(4096, jnp.bfloat16)}
    >>> new = apply_updates_stochastic(jax.random.key(0), p, {"w": p["w"] / 1024})
    >>> sorted(set(new["w"].tolist())), round(float(jnp.mean(new["w"] - 1) * 1024))
    ([1.0, 1.0078125], 1)
    """
    leaves, tree = jax.tree.flatten(optax.apply_updates(in_float32(params), updates))
    new = []
    for i, (p, total) in enumerate(zip(jax.tree.leaves(params), leaves, strict=True)):
        if p.dtype == jnp.bfloat16:
            new.append(_to_bfloat16(jax.random.fold_in(key, i), total))
        else:
            new.append(total.astype(p.dtype))
    return jax.tree.unflatten(tree, new)


def _to_bfloat16(key: Array, x: Array) -> Array:
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)

    def upper(bits: Array) -> Array:
        half = (bits >> 16).astype(jnp.uint16)
        return lax.bitcast_convert_type(half, jnp.bfloat16)

    up = upper(bits + noise)
    # Beyond the largest bfloat16 there is but one neighbour that is finite.
    rounded = jnp.where(jnp.isfinite(up), up, upper(bits))
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


EXAMPLES = {
    apply_updates_stochastic: lambda key: (
        (key, {"w": jnp.ones((8, 4), jnp.bfloat16)}, {"w": 1e-3 * jnp.ones((8, 4))}),
        {},
    ),
}
