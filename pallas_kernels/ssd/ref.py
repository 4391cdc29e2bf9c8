"""The recurrence by its definition, token by token: what the others are held to."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activations import silu
from pallas_kernels.ssd.form import Inputs

__all__ = ["advance", "scan"]


def scan(inputs: Inputs, chunk: int | None = None) -> tuple[jax.Array, jax.Array]:
    """All tokens of a call, one after the other.

    Args:
        inputs: the call.
        chunk: not used: there are no chunks.

    Returns:
        `(y, state)`: `[B, T, G, R, P]` and, after the last token, `[B, G, R, P, N]`,
        both in the dtype of `dt`.
    """
    del chunk
    tokens = inputs._replace(skip=None, state=None)  # pyright: ignore
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)

    def step(state: jax.Array, token: Inputs) -> tuple[jax.Array, jax.Array]:
        return advance(token._replace(skip=inputs.skip, state=state))

    state, y = lax.scan(step, inputs.state, tokens)
    return jnp.moveaxis(y, 0, 1), state


def advance(token: Inputs) -> tuple[jax.Array, jax.Array]:
    """One token.

    Args:
        token: a call without its axis of time.

    Returns:
        `(state, y)`: `[B, G, R, P, N]` and `[B, G, R, P]`.
    """
    dtype = token.dt.dtype
    x, b, c = (a.astype(dtype) for a in (token.x, token.b, token.c))
    decay = jnp.exp(token.log_decay)
    if token.fresh is not None:
        decay = jnp.where(token.fresh[:, None, None], 0.0, decay)
    added = (token.dt[..., None] * x)[..., None] * b[:, :, None, None]
    state = decay[..., None, None] * token.state + added
    y = jnp.einsum("bgrpn,bgn->bgrp", state, c, precision=lax.Precision.HIGHEST)
    if token.skip is not None:
        y += token.skip[None] * x
    if token.gate is not None:
        y *= silu(token.gate.astype(dtype))
    return state, y
