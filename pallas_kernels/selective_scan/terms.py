"""What every implementation of the selective scan is made of.

Inside, the D channels stand as G groups of P, and the state as [N, P]: channels last,
so that they are what vector units run over.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.activations import silu, softplus

__all__ = [
    "Inputs",
    "Rule",
    "finished",
    "growth",
    "rates",
    "token",
    "wide",
    "widened",
]


class Rule(NamedTuple):
    """What is static in a call.

    Attributes:
        softplus: delta goes through it, after the bias.
        zoh: B is discretized exactly, not by Euler's rule.
        chunk: tokens between kept states in "xla"; None: chosen.
    """

    softplus: bool = False
    zoh: bool = False
    chunk: int | None = None


class Inputs(NamedTuple):
    """The arrays of a call; gradients come in the same form.

    Attributes:
        u: `[B, T, G, P]`.
        delta: `[B, T, G, P]`.
        A: `[G, N, P]`, real or complex.
        B: `[B, T, G, N]`.
        C: `[B, T, G, N]`.
        D: `[G, P]` or None.
        z: `[B, T, G, P]` or None.
        delta_bias: `[G, P]` or None.
        start: `[B, G, N, P]`, the state before the first token.
        resets: bool `[B, T]`: the state is forgotten before this token; or None.
    """

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any
    z: Any
    delta_bias: Any
    start: Any
    resets: Any


def wide(x: jax.Array | None) -> Any:
    """In float32 at least (complex64); None and bools stay."""
    if x is None or x.dtype == bool:
        return x
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def widened(inputs: Inputs) -> Inputs:
    """All arrays in one precision, and the start complex if A is."""
    arrays = Inputs(*map(wide, inputs))
    kinds = [x.dtype for x in arrays if x is not None and x.dtype != bool]
    double = any(k in (jnp.float64, jnp.complex128) for k in kinds)

    def one(x: jax.Array | None) -> Any:
        if x is None or x.dtype == bool or not double:
            return x
        return x.astype(jnp.promote_types(x.dtype, jnp.float64))

    arrays = Inputs(*map(one, arrays))
    kind = jnp.promote_types(arrays.start.dtype, arrays.A.dtype)
    return arrays._replace(start=arrays.start.astype(kind))


def rates(rule: Rule, delta: jax.Array, bias: jax.Array | None) -> jax.Array:
    """The step sizes of `[..., G, P]`, after bias and softplus."""
    if bias is not None:
        delta = delta + jnp.expand_dims(bias, tuple(range(delta.ndim - 2)))
    return softplus(delta) if rule.softplus else delta


def growth(x: jax.Array, power: jax.Array) -> jax.Array:
    """(e^x - 1) / x, by its series near 0, where also its derivatives are right.

    Args:
        x: real or complex.
        power: e^x.
    """
    near = jnp.abs(x) < 0.5
    small = jnp.where(near, x, 0.0)
    is_double = x.dtype in (jnp.float64, jnp.complex128)
    series = jnp.zeros_like(x)
    for k in range(15 if is_double else 9, -1, -1):
        series = series * small + 1 / math.factorial(k + 1)
    far = jnp.where(near, 1.0, x)
    # From 0.5 on the subtraction costs two bits at most.
    return jnp.where(near, series, (jnp.where(near, 1.0, power) - 1.0) / far)


def token(rule: Rule, A: jax.Array, h: jax.Array, x: Any) -> tuple[Any, Any]:
    """One step of the recurrence.

    Args:
        rule: the static part.
        A: `[G, N, P]`.
        h: the state, `[B, G, N, P]`.
        x: u and step sizes `[B, G, P]`, B and C `[B, G, N]`, resets `[B]` or None.

    Returns:
        The next state, and C h `[B, G, P]`: twice the real part, if it is complex.
    """
    u, dt, B, C, reset = x
    step = dt[:, :, None]
    exponent = step * A[None]
    power = jnp.exp(exponent)
    share = step * growth(exponent, power) if rule.zoh else step
    if reset is not None:  # not a decay of 0, as the state may be infinite
        h = jnp.where(reset[:, None, None, None], 0.0, h)
    h = power * h + share * u[:, :, None] * B[..., None]
    y = jnp.sum(C[..., None] * h, axis=2)
    return h, 2 * y.real if jnp.iscomplexobj(y) else y


def finished(inputs: Inputs, y: jax.Array) -> jax.Array:
    """(y + D u) silu(z); `inputs` are wide and have T, or one token, in front of G."""
    if inputs.D is not None:
        y = y + inputs.u * jnp.expand_dims(inputs.D, tuple(range(y.ndim - 2)))
    if inputs.z is not None:
        y = y * silu(inputs.z)
    return y
