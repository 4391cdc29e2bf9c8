"""The selective scan by its definition, token after token: what others are held to."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.selective_scan.terms import (
    Inputs,
    Rule,
    finished,
    rates,
    token,
    widened,
)

__all__ = ["scan"]


def scan(rule: Rule, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The recurrence as one `lax.scan`.

    Args:
        rule: the static part.
        inputs: the arrays.

    Returns:
        `(y, end)`: `[B, T, G, P]` and `[B, G, N, P]`, float32 (float64 for float64
        inputs); `end` is complex if A is.
    """
    inputs = widened(inputs)
    dt = rates(rule, inputs.delta, inputs.delta_bias)
    tokens: Any = (inputs.u, dt, inputs.B, inputs.C, inputs.resets)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    step = functools.partial(token, rule, inputs.A)
    end, y = lax.scan(step, inputs.start, tokens)
    return finished(inputs, jnp.moveaxis(y, 0, 1)), end
