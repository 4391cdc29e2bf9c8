"""Mamba's selective scan, with memory linear in length, whole or split over devices.

    y = selective_scan(u, delta, A, B, C, D=D, z=z, delta_softplus=True)   # [B, T, D]
    y, state = step(state, u, delta, A, B, C, D=D)                         # one token

`implementation` says how: "ref" is the definition, "xla" runs on every backend and has
derivatives of any order in both modes, "pallas_tpu" and "pallas_gpu" are kernels (for
TPU and for Hopper) with reverse mode alone. None takes the best that can do the call;
with PALLAS_KERNELS_LOG=1 in the environment it says which one that is, and why no
other. To compile for a machine that is not there, set PALLAS_KERNELS_TARGET to "tpu" or
"hopper".
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, Int

from pallas_kernels.dispatch import choose, named_in_forward_mode, reverse_alone
from pallas_kernels.selective_scan import pallas_gpu, pallas_tpu, ref, shards, xla
from pallas_kernels.selective_scan.checks import checked, rule_of
from pallas_kernels.selective_scan.decode import step
from pallas_kernels.selective_scan.terms import Inputs, Rule, rates, wide
from pallas_kernels.sharded import alike, check_axis

__all__ = ["selective_scan", "step"]

Implementation = Literal["ref", "xla", "pallas_tpu", "pallas_gpu"]


def _with_gradient(kernels: Any) -> Callable:
    """What `ref.scan` is, by a module of kernels with `forward` and `backward`."""

    def alone(name: str, rule: Rule, *arrays: Any) -> Any:
        kernel = functools.partial(getattr(kernels, name), rule)
        return reverse_alone("selective_scan", kernel)(*arrays)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def scan(rule: Rule, inputs: Inputs) -> tuple[Array, Array]:
        return alone("forward", rule, inputs)

    def forward(rule: Rule, inputs: Inputs) -> Any:
        y, end, starts = alone("forward_keeping", rule, inputs)
        return (y, end), (inputs, starts)

    def backward(rule: Rule, saved: Any, gradients: Any) -> Any:
        # Resets are bools: None stands for no gradient.
        return (alone("backward", rule, *saved, *gradients),)

    scan.defvjp(forward, backward)
    return named_in_forward_mode("selective_scan", scan)


KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
IMPLEMENTATIONS: dict[str, Callable] = {"ref": ref.scan, "xla": xla.scan}
IMPLEMENTATIONS |= {name: _with_gradient(kernels) for name, kernels in KERNELS.items()}


def selective_scan(
    u: Float[Array, "b t d"],
    delta: Float[Array, "b t d"],
    A: Inexact[Array, "d n"],
    B: Inexact[Array, "b t n"] | Inexact[Array, "b t g n"],
    C: Inexact[Array, "b t n"] | Inexact[Array, "b t g n"],
    *,
    D: Float[Array, " d"] | None = None,
    z: Float[Array, "b t d"] | None = None,
    delta_bias: Float[Array, " d"] | None = None,
    delta_softplus: bool = False,
    initial_state: Inexact[Array, "b d n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    return_final_state: bool = False,
    discretization: Literal["euler", "zoh"] = "euler",
    chunk: int | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """The linear recurrence of Mamba, whose coefficients depend on the token.

        h_t = e^(delta_t A) h_(t-1) + delta_t B_t u_t
        y_t = (C_t h_t + D u_t) silu(z_t)

    Equals `selective_scan_fn` of github.com/state-spaces/mamba, with tokens before
    channels; its `cu_seqlens` are `segment_ids` here.

    Args:
        u: `[B, T, D]`; any D, N and T.
        delta: `[B, T, D]`, step sizes before bias and softplus.
        A: `[D, N]`, real or complex; negative real parts forget. If it is complex, y
            has twice the real part of C h, as in the released code.
        B: `[B, T, N]`, or `[B, T, G, N]` with G a divisor of D: channel d has group
            d // (D / G). Complex only if A is.
        C: like `B`.
        D: `[D]`, a path around the state.
        z: `[B, T, D]`, gates.
        delta_bias: `[D]`, added to `delta`.
        delta_softplus: softplus of `delta`, after the bias.
        initial_state: `[B, D, N]`, what the first token finds; 0 by default.
        segment_ids: integers `[B, T]`: the state is forgotten where they change.
        return_final_state: also returns the state after the last token.
        discretization: "euler" multiplies B by delta, as the released code does; "zoh"
            by (e^(delta A) - 1) / A, exact for a u that is constant over a step.
        chunk: tokens between the states that "xla" keeps for the gradient.
        axis_name: the axis of `jax.shard_map` that T is split over, in order; None:
            the sequence is whole. Then `initial_state` is that of the whole, the same
            on every device, and so is the final state.
        implementation: "ref", "xla", "pallas_tpu", "pallas_gpu" or None.

    Returns:
        `[B, T, D]` in the dtype of `u`; with `return_final_state` also `[B, D, N]`,
        float32 (complex64 if A is complex).

    Raises:
        TypeError: a shape or a dtype does not fit; names the argument.
        ValueError: a knob is out of range, or there is no such axis here.
        NotImplementedError: the implementation that is named cannot do the call.

    >>> one = jnp.ones((1, 3, 1))
    >>> y, end = selective_scan(
    ...     one, one, -jnp.ones((1, 1)), one, 2 * one, return_final_state=True
    ... )
    >>> y[0, :, 0].round(4).tolist(), end.shape  # 2 (1 + e^-1 + e^-2 + ...)
    ([2.0, 2.7358, 3.0064], (1, 1, 1))
    """
    rule = rule_of(delta_softplus, discretization, chunk)
    inputs = checked(
        u, delta, A, B, C, D, z, delta_bias, initial_state, segment_ids,
        state="initial_state", mark="segment_ids",
    )  # fmt: skip
    if axis_name is not None:
        check_axis(axis_name)
    if segment_ids is not None:
        resets = shards.resets_of(inputs.resets, axis_name)
        inputs = inputs._replace(resets=resets)
    inputs = alike(inputs)
    chosen = choose(
        "selective_scan", implementation, IMPLEMENTATIONS, KERNELS, (rule, inputs),
        is_empty=0 in inputs.u.shape or 0 in inputs.A.shape,
        shapes=f"u {inputs.u.dtype}{list(jnp.shape(u))}, A {list(jnp.shape(A))}",
    )  # fmt: skip
    if axis_name is not None:
        inputs = _from_before(rule, inputs, chosen, axis_name)
    y, end = chosen(rule, inputs)
    y = y.reshape(jnp.shape(u)).astype(inputs.u.dtype)
    if not return_final_state:
        return y
    end = end if axis_name is None else shards.end_of_all(end, axis_name)
    return y, jnp.swapaxes(end, -1, -2).reshape(jnp.shape(u)[0], *jnp.shape(A))


def _from_before(rule: Rule, inputs: Inputs, scan: Callable, axis_name: str) -> Inputs:
    """The inputs with the state that the devices before leave as their start."""
    _, end = scan(rule, inputs._replace(start=jnp.zeros_like(inputs.start), z=None))
    bias = wide(inputs.delta_bias)
    dt = rates(rule, wide(inputs.delta), bias)
    total = jnp.sum(dt, axis=1)[:, :, None] * wide(inputs.A)[None]
    decay = jnp.exp(total)
    if inputs.resets is not None:
        kept = ~jnp.any(inputs.resets, axis=1)[:, None, None, None]
        decay = jnp.where(kept, decay, 0.0)
    initial = inputs.start.astype(end.dtype)
    start = shards.start_of(decay.astype(end.dtype), end, initial, axis_name)
    return inputs._replace(start=start)
