"""Activations that are finite for every finite input, with derivatives of any order."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["silu", "softplus"]


@jax.custom_jvp
def softplus(x: jax.Array) -> jax.Array:
    """log(1 + e^x), which neither overflows nor loses small values.

    Several times faster than jax.nn's on CPUs. Its derivative is written: that of an
    absolute value has none in turn at 0.
    """
    return jnp.maximum(x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@softplus.defjvp
def _softplus_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (dx,) = primals, tangents
    return softplus(x), dx * lax.logistic(x)


def silu(x: jax.Array) -> jax.Array:
    """x / (1 + e^-x)."""
    return x * lax.logistic(x)
