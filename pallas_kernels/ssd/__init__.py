"""The scan of Mamba-2 (state space duality, SSD), in memory linear in length.

    y = ssd(x, dt, A, B, C, D=D, z=z)                       # [B, T, H, P]
    y, state = ssd(..., initial_state=state, segment_ids=ids, return_final_state=True)
    y, state = step(state, x, dt, A, B, C)                  # one token, to decode

`implementation` says how: "ref" is the recurrence token by token, "xla" has matrix
products over chunks, runs on every backend and has derivatives of any order in both
modes, "pallas_tpu" and "pallas_gpu" (Hopper) are kernels with reverse mode alone. None
takes the best that can do the call; with PALLAS_KERNELS_LOG=1 in the environment it
says which one that is, and why no other. To compile for a machine that is not there,
set PALLAS_KERNELS_TARGET to "tpu" or "hopper".

Source: Dao and Gu, "Transformers are SSMs", https://arxiv.org/abs/2405.21060, section 6
and listing 1; names and layout are those of `mamba_chunk_scan_combined` in its released
code, whose `seq_idx` is `segment_ids` here.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import choose, named_in_forward_mode, reverse_alone
from pallas_kernels.sharded import alike, check_axis
from pallas_kernels.ssd import pallas_gpu, pallas_tpu, ref, shards, xla
from pallas_kernels.ssd.arguments import (
    fits,
    normal,
    shared,
    sizes,
    wrong,
)
from pallas_kernels.ssd.form import Inputs

__all__ = ["ssd", "step"]

Implementation = Literal["ref", "xla", "pallas_tpu", "pallas_gpu"]


def _with_gradient(kernels: Any) -> Callable:
    """What `ref.scan` is, by a module of kernels with `forward` and `backward`."""

    def alone(function: Callable, *arrays: Any) -> Any:
        return reverse_alone("ssd", function)(*arrays)

    def run(inputs: Inputs, keep: bool) -> Any:
        return alone(lambda x: kernels.forward(x, keep=keep), inputs)

    @jax.custom_vjp
    def scan(inputs: Inputs) -> tuple[Array, Array]:
        y, state, _ = run(inputs, False)
        return y, state

    def forward(inputs: Inputs) -> Any:
        y, state, starts = run(inputs, True)
        return (y, state), (inputs, starts)

    def backward(saved: Any, gradients: Any) -> Any:
        return (alone(kernels.backward, *saved, *gradients),)

    scan.defvjp(forward, backward)
    named = named_in_forward_mode("ssd", scan)

    def call(inputs: Inputs, chunk: int | None) -> Any:
        del chunk  # the kernel has its own
        return named(inputs)

    return call


KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
IMPLEMENTATIONS: dict[str, Callable] = {"ref": ref.scan, "xla": xla.scan}
IMPLEMENTATIONS |= {name: _with_gradient(kernels) for name, kernels in KERNELS.items()}


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    *,
    D: Float[Array, " h"] | Float[Array, "h p"] | None = None,
    z: Float[Array, "b t h p"] | None = None,
    dt_bias: Float[Array, " h"] | None = None,
    dt_softplus: bool = False,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    return_final_state: bool = False,
    chunk: int | None = None,
    axis_name: str | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """state = exp(dt A) state + dt x B^T,  y = (state C + D x) silu(z), along time.

    Sums are float32 (float64 if an input is), with the states between chunks as all
    that is kept for the gradient.

    Args:
        x: `[B, T, H, P]`, any float dtype; H heads of width P.
        dt: `[B, T, H]`: step sizes, not below 0 after `dt_bias` and `dt_softplus`.
        A: `[H]`, below 0 for a state that decays; 0 and above are allowed.
        B: `[B, T, G, N]`; G divides H, and head h reads group h // (H / G).
        C: `[B, T, G, N]`.
        D: `[H]` or `[H, P]`, of the skip connection; None: there is none.
        z: `[B, T, H, P]`, of the gate; None: there is none.
        dt_bias: `[H]`, added to `dt` first.
        dt_softplus: dt becomes log(1 + exp(dt)).
        initial_state: `[B, H, P, N]`, before the first token, whose document it is a
            part of; None: zero.
        segment_ids: integers `[B, T]`. Where they change, a document begins, and the
            state starts from zero.
        return_final_state: also returns the state after the last token.
        chunk: tokens of a chunk of "xla", at least 1; None: 64. The others have none,
            or their own.
        axis_name: an axis of `jax.shard_map` that T is split over; `initial_state` and
            the final state are then those of the whole sequence, on every device.
        implementation: "ref", "xla", "pallas_tpu", "pallas_gpu" or None.

    Returns:
        `[B, T, H, P]` in the dtype of `x`; with `return_final_state` also
        `[B, H, P, N]` float32 (float64 if an input is).

    Raises:
        TypeError: a shape or a dtype does not fit; names the argument.
        ValueError: a knob is out of range.
        NotImplementedError: the implementation that is named cannot do the call.

    Half of the state is left after each step; dt is 1, B and C are 1:

    >>> ones = jnp.ones((1, 4, 1, 1))
    >>> y = ssd(ones, ones[..., 0], jnp.log(jnp.array([0.5])), ones, ones)
    >>> y[0, :, 0, 0].round(4).tolist()
    [1.0, 1.5, 1.75, 1.875]
    >>> ids = jnp.array([[0, 0, 1, 1]])
    >>> half = jnp.log(jnp.array([0.5]))
    >>> y, state = ssd(
    ...     ones, ones[..., 0], half, ones, ones, segment_ids=ids,
    ...     initial_state=jnp.full((1, 1, 1, 1), 4.0), return_final_state=True,
    ... )
    >>> y[0, :, 0, 0].round(4).tolist(), state.round(4).item()
    ([3.0, 2.5, 1.0, 1.5], 1.5)
    """
    batch, length, heads, width = sizes(x, ("x", 4, "[B, T, H, P]"))
    fits("dt", dt, (batch, length, heads))
    groups, states = sizes(B, ("B", 4, "[B, T, G, N]"))[2:]
    fits("B", B, (batch, length, groups, states))
    if chunk is not None and chunk < 1:
        raise ValueError(f"argument 'chunk' is {chunk}, expected at least 1.")
    if axis_name is not None:
        check_axis(axis_name)
    shared(x, A, B, C, D, z, dt_bias, initial_state)
    fresh = None
    if segment_ids is not None:
        ids = jnp.asarray(segment_ids)
        is_integer = jnp.issubdtype(ids.dtype, jnp.integer)
        if ids.shape != (batch, length) or not is_integer:
            raise wrong("segment_ids", ids, f"integers [{batch}, {length}]")
        fresh = shards.begins(ids, axis_name)

    inputs = normal(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, fresh)
    inputs = alike(inputs)
    if axis_name is not None:
        inputs = inputs._replace(state=shards.carried_in(inputs, axis_name, chunk))
    scan = choose(
        "ssd", implementation, IMPLEMENTATIONS, KERNELS, (inputs,),
        is_empty=0 in x.shape or 0 in B.shape,
        shapes=f"x {x.dtype}{list(x.shape)}, B {list(B.shape)}",
    )  # fmt: skip
    y, state = scan(inputs, chunk)
    y = y.reshape(x.shape).astype(x.dtype)
    if not return_final_state:
        return y
    state = state.reshape(batch, heads, width, states)
    return y, state if axis_name is None else shards.of_the_last(state, axis_name)


def step(
    state: Float[Array, "b h p n"],
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    *,
    D: Float[Array, " h"] | Float[Array, "h p"] | None = None,
    z: Float[Array, "b h p"] | None = None,
    dt_bias: Float[Array, " h"] | None = None,
    dt_softplus: bool = False,
    reset: Bool[Array, " b"] | None = None,
) -> tuple[Array, Array]:
    """One token of `ssd`, to decode with a state of a size that does not grow.

    Args:
        state: `[B, H, P, N]`, float32, before the token.
        x: `[B, H, P]`.
        dt: `[B, H]`.
        A: `[H]`.
        B: `[B, G, N]`.
        C: `[B, G, N]`.
        D: as in `ssd`.
        z: `[B, H, P]`.
        dt_bias: as in `ssd`.
        dt_softplus: as in `ssd`.
        reset: bool `[B]`, True where the token begins a document.

    Returns:
        `(y, state)`: `[B, H, P]` in the dtype of `x`, and `[B, H, P, N]` float32.

    Raises:
        TypeError: a shape or a dtype does not fit; names the argument.

    >>> one = jnp.ones((1, 1, 1))
    >>> half = jnp.log(jnp.array([0.5]))
    >>> y, state = step(jnp.full((1, 1, 1, 1), 4.0), one, one[..., 0], half, one, one)
    >>> y.round(4).item(), state.round(4).item()
    (3.0, 3.0)
    """
    batch, heads, width = sizes(x, ("x", 3, "[B, H, P]"))
    fits("dt", dt, (batch, heads))
    groups, states = sizes(B, ("B", 3, "[B, G, N]"))[1:]
    fits("B", B, (batch, groups, states))
    shared(x, A, B, C, D, z, dt_bias, state, of_state="state")
    if reset is not None and (reset.shape != (batch,) or reset.dtype != bool):
        raise wrong("reset", reset, f"bool [{batch}]")
    inputs = normal(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, reset)
    after, y = ref.advance(inputs)
    return y.reshape(x.shape).astype(x.dtype), after.reshape(state.shape)
