"""One token of the selective scan, for decoding."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from pallas_kernels.selective_scan.checks import checked, rule_of
from pallas_kernels.selective_scan.terms import finished, rates, token, widened

__all__ = ["step"]


def step(
    state: Inexact[Array, "b d n"],
    u: Float[Array, "b d"],
    delta: Float[Array, "b d"],
    A: Inexact[Array, "d n"],
    B: Inexact[Array, "b n"] | Inexact[Array, "b g n"],
    C: Inexact[Array, "b n"] | Inexact[Array, "b g n"],
    *,
    D: Float[Array, " d"] | None = None,
    z: Float[Array, "b d"] | None = None,
    delta_bias: Float[Array, " d"] | None = None,
    delta_softplus: bool = False,
    discretization: str = "euler",
    reset: Bool[Array, " b"] | None = None,
) -> tuple[Array, Array]:
    """The next output and state: one token of `selective_scan`.

    Equals `selective_state_update` of the released code, which has no `reset` and
    writes the state in place.

    Args:
        state: `[B, D, N]`, float32 (complex64 if A is complex).
        u: `[B, D]`.
        delta: `[B, D]`, step sizes before bias and softplus.
        A: `[D, N]`, real or complex; negative real parts forget.
        B: `[B, N]`, or `[B, G, N]` with G a divisor of D.
        C: like `B`.
        D: `[D]`: D u is added to the output.
        z: `[B, D]`: the output is multiplied by silu(z).
        delta_bias: `[D]`, added to `delta`.
        delta_softplus: softplus of `delta`, after the bias.
        discretization: "euler" or "zoh", as in `selective_scan`.
        reset: True where a new document begins: the state is forgotten first.

    Returns:
        `(y, state)`: `[B, D]` in the dtype of `u`, and `[B, D, N]`.

    Raises:
        TypeError: a shape or a dtype does not fit; names the argument.
        ValueError: `discretization` is neither.

    >>> one = jnp.ones((1, 1))
    >>> y, state = step(one[..., None], 3 * one, one, -one, one, 2 * one)
    >>> round(float(state[0, 0, 0]), 4), round(float(y[0, 0]), 4)  # e^-1 + 3
    (3.3679, 6.7358)
    """
    rule = rule_of(delta_softplus, discretization)
    given = checked(
        u, delta, A, B, C, D, z, delta_bias, state, reset, state="state", mark="reset"
    )
    inputs: Any = widened(given)
    dt = rates(rule, inputs.delta, inputs.delta_bias)
    xs = (inputs.u, dt, inputs.B, inputs.C, inputs.resets)
    after, y = token(rule, inputs.A, inputs.start, xs)
    y = finished(inputs, y).reshape(u.shape).astype(u.dtype)
    return y, jnp.swapaxes(after, -1, -2).reshape(state.shape)
