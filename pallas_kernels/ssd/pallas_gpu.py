"""The scan of Mamba-2 for Hopper GPUs in Pallas: forward, and kernels for the gradient.

Lanes of P are cut into columns of 64, which share no sum but that of the gradients of b
and c. Forward, a block of threads owns one column and walks over chunks of 64 tokens,
its state carried in registers; each chunk is as in `xla`. For the gradient it keeps the
states before chunks, in the dtype of x: there they are inputs of products alone.

Backward, a first kernel walks from the last chunk to the first and keeps the gradients
d' of the states after chunks. With them all chunks are free of each other: in a second
kernel a block of threads owns one chunk, and walks over columns that share b and c.
With L = exp(S), M = L * (c b^T) * dt_j, g what comes in for y and h the state before a
chunk,

    dx = M^T g + e_end b d',           Z = L * (g x^T) * dt_j
    db = Z^T c + e_end x d',           dc = Z b + e_into g h

where e_end has dt in it. What stands for pairs of tokens is made twice, as [i, j] and
as [j, i]: a product that has it on its left takes it from registers.

The gradient of log_decay_k is the sum of all that has crossed from before k to k or
after. Of a pair Z_ij (c b^T)_ij has, for all k from j + 1 to i: so the kernel gives,
for each token, what it has read and what was read of it, the diagonal left out, and
sums of their differences from k on, as far as anything of k is left, are what is
sought. They are made outside, with what came in, went out and passed.

Where there are fewer columns than a machine can run at once, time is cut into parts,
and one more kernel makes what each part adds to the state after it.

No two blocks of threads add to one sum, and each run gives the same bits. Products have
inputs in the dtype of x; states, decays and sums are float32. So
float16 overflows where a state or a weight is beyond 65504.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.activations import silu
from pallas_kernels.ssd import gpu_layout as layout
from pallas_kernels.ssd.form import Inputs
from pallas_kernels.ssd.gpu_bodies import backward_body, forward_body, states_body
from pallas_kernels.ssd.gpu_call import NUMBERS, SKIP, call, float32, tile
from pallas_kernels.ssd.gpu_layout import CHUNK, SQUARE, Numbers, Plan

__all__ = ["backward", "forward", "unsupported"]


def unsupported(inputs: Inputs) -> str | None:
    """Why a call cannot run here: one sentence, or None if it can."""
    arrays = [inputs.x, inputs.b, inputs.c, inputs.gate]
    kinds = {x.dtype for x in arrays if x is not None}
    if len(kinds) > 1 or inputs.x.dtype not in (jnp.bfloat16, jnp.float16):
        names = ", ".join(str(x.dtype) for x in arrays if x is not None)
        return (
            "the GPU kernel takes x, B, C and z of one dtype, bfloat16 or float16, "
            f"and these are {names}"
        )
    if inputs.dt.dtype != jnp.float32:
        return f"the GPU kernel sums in float32, and this call in {inputs.dt.dtype}"
    if min(inputs.x.size, inputs.b.size) == 0:
        return "the GPU kernel takes no empty arrays"
    states = inputs.b.shape[3]
    if states > 128:
        return f"the GPU kernel takes states of at most 128, and this is {states}"
    return mosaic_gpu.unavailable()


def forward(
    inputs: Inputs, *, keep: bool = False, interpret: Any = None
) -> tuple[jax.Array, jax.Array, Any]:
    """All tokens; equals `ref.scan` wherever `unsupported` gives None.

    Args:
        inputs: the call.
        keep: also give what `backward` needs.
        interpret: what `mosaic_gpu.simulator` gives; None: compile.

    Returns:
        `(y, state, kept)`: `[B, T, G, R, P]` in the dtype of `x`, `[B, G, R, P, N]`
        float32, and the states before chunks with y before its gate, or None.
    """
    cut = layout.plan(inputs)
    numbers = layout.numbers(inputs)
    x = layout.columns(cut, inputs.x)
    b, c = (layout.wide(cut, a) for a in (inputs.b, inputs.c))
    (batch, _, columns, _), dtype = x.shape, x.dtype
    start = layout.state(cut, inputs.state)
    start = _between(cut, start, (x, b), numbers, interpret, is_reversed=False)
    wide, starts = (CHUNK, cut.states), None
    if keep:
        starts = (batch, cut.chunks, columns, *wide)
        starts = jax.ShapeDtypeStruct(starts, dtype)
    skip = layout.lanes(cut, inputs.skip)
    y, end, starts = call(
        forward_body, cut, (x, b, c, numbers.packed, start, skip),
        results=(jax.ShapeDtypeStruct(x.shape, dtype), float32(start.shape), starts),
        ring=(tile(SQUARE, dtype), tile(wide, dtype), tile(wide, dtype), NUMBERS),
        scratch=(
            mosaic_gpu.swizzled(wide, dtype),
            mosaic_gpu.swizzled(SQUARE, dtype),
            None if skip is None else (plgpu.SMEM(*SKIP[1:]), plgpu.Barrier()),
        ),
        products=4, interpret=interpret,
    )  # fmt: skip
    y, end = layout.of_columns(cut, y), layout.of_state(cut, end[:, -1])
    if inputs.gate is None:
        return y, end, (starts, None) if keep else None
    return _gated(y, inputs.gate), end, (starts, y) if keep else None


def backward(
    inputs: Inputs,
    kept: Any,
    d_y: jax.Array,
    d_state: jax.Array,
    *,
    interpret: Any = None,
) -> Inputs:
    """The gradient of `forward`, of what it kept: as `pallas_tpu.backward`."""
    cut = layout.plan(inputs)
    numbers = layout.numbers(inputs)
    (starts, y), dtype = kept, inputs.x.dtype
    d_y, d_gate, d_skip = d_y.astype(dtype), None, None
    if inputs.gate is not None:
        d_y, d_gate = jax.vjp(_gated, y, inputs.gate)[1](d_y)
    if inputs.skip is not None:
        d_skip = jnp.einsum(
            "btgrp,btgrp->grp", d_y, inputs.x, preferred_element_type=jnp.float32
        )
    x, g = (layout.columns(cut, a) for a in (inputs.x, d_y))
    b, c = (layout.wide(cut, a) for a in (inputs.b, inputs.c))
    after = layout.state(cut, d_state)
    after = _between(cut, after, (g, c), numbers, interpret, is_reversed=True)
    before, d_states = _states(
        cut, (g, c, numbers.packed, after), interpret, is_reversed=True, keep=True
    )
    (batch, length, columns, _), wide = x.shape, (CHUNK, cut.states)
    sets, sums = columns // cut.share, (batch, columns, cut.chunks)
    skip, own = layout.lanes(cut, inputs.skip), mosaic_gpu.swizzled(wide, dtype)
    d_wide = jax.ShapeDtypeStruct((batch, length, sets, cut.states), dtype)
    d_x, d_b, d_c, of_read, of_reading = call(
        backward_body, cut, (x, g, b, c, numbers.packed, starts, d_states, skip),
        results=(
            jax.ShapeDtypeStruct(x.shape, dtype),
            d_wide,
            d_wide,
            float32((*sums, 3, CHUNK)),
            float32((*sums, 2, CHUNK)),
        ),
        ring=(
            *(tile(wide, dtype),) * 2,
            *(tile(SQUARE, dtype),) * 2,
            NUMBERS,
            *(() if skip is None else (SKIP,)),
        ),
        scratch=(
            (own, own),
            plgpu.Barrier(num_arrivals=2),
            (
                own,
                mosaic_gpu.swizzled(SQUARE, dtype),
                plgpu.SMEM((3, CHUNK), jnp.float32),
            ),
            (own, plgpu.SMEM((2, CHUNK), jnp.float32)),
        ),
        products=14, interpret=interpret,
        grid={"chunk": cut.chunks, "set": sets}, warpgroups=2,
    )  # fmt: skip
    sums = jnp.concatenate([of_read, of_reading], axis=3)
    d_dt, d_log_decay = _by_token(cut, numbers, sums)
    return Inputs(
        x=layout.of_columns(cut, d_x),
        dt=d_dt.reshape(inputs.dt.shape),
        log_decay=d_log_decay.reshape(inputs.dt.shape),
        b=layout.of_wide(cut, d_b),
        c=layout.of_wide(cut, d_c),
        skip=d_skip,
        gate=d_gate,
        state=layout.of_state(cut, before[:, 0]),
        fresh=None,
    )


def _states(
    cut: Plan, operands: Any, interpret: Any, *, is_reversed: bool, keep: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """What `states_body` gives: `[B, parts, J, 64, N]`, and by chunk if `keep`."""
    x = operands[0]
    (batch, _, columns, _), dtype = x.shape, x.dtype
    wide = (CHUNK, cut.states)
    kept = jax.ShapeDtypeStruct((batch, cut.chunks, columns, *wide), dtype)
    return call(
        functools.partial(states_body, is_reversed=is_reversed), cut, operands,
        results=(
            float32((batch, cut.parts, columns, *wide)), kept if keep else None
        ),
        ring=(tile(SQUARE, dtype), tile(wide, dtype), NUMBERS),
        scratch=(
            mosaic_gpu.swizzled(SQUARE, dtype),
            mosaic_gpu.swizzled(wide, dtype) if keep else None,
        ),
        products=1, interpret=interpret,
    )  # fmt: skip


def _between(
    cut: Plan, outer: jax.Array, arrays: Any, numbers: Numbers, interpret: Any, *,
    is_reversed: bool,
) -> jax.Array:  # fmt: skip
    """The states before all parts, or the gradients of those after them.

    Args:
        cut: how the call is cut.
        outer: that of the first part, or of the last one, `[B, J, 64, N]`.
        arrays: x and b, or g and c.
        numbers: of the call.
        interpret: as in `forward`.
        is_reversed: whether they are gradients.

    Returns:
        `[B, parts, J, 64, N]`.
    """
    if cut.parts == 1:
        return outer[:, None]
    operands = (*arrays, numbers.packed, None)
    added, _ = _states(cut, operands, interpret, is_reversed=is_reversed)
    left = layout.by_part(cut, numbers)

    def pass_on(state: jax.Array, part: Any) -> Any:
        added, left = part
        return left[..., None, None] * state + added, state

    parts = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (added, left))
    states = lax.scan(pass_on, outer, parts, reverse=is_reversed)[1]
    return jnp.moveaxis(states, 0, 1)


def _by_token(
    cut: Plan, numbers: Numbers, sums: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of dt and log_decay, `[B, T, heads]`.

    Args:
        cut: how the call is cut.
        numbers: of the call.
        sums: what the kernel gave, `[B, J, chunks, 5, 64]`.
    """
    batch, heads = numbers.dt.shape[:2]
    sums = sums.reshape(batch, heads, cut.per_head, *sums.shape[2:]).sum(axis=2)
    inside, lost, ends, passing, gained = (sums[..., i, :] for i in range(5))
    ends *= numbers.left
    out = ends * numbers.dt
    # Over a document that begins later the differences cancel, but for their rounding,
    # which would reach those before: so each is summed by itself.
    begun = jnp.cumsum(~numbers.counts, 3)
    since = jnp.triu(begun[..., :, None] == begun[..., None, :])
    crossing = (gained - lost * numbers.dt)[..., None, :]
    d_log_decay = jnp.where(since, crossing, 0.0).sum(axis=-1)
    d_log_decay += jnp.cumsum(out, 3) - out + passing.sum(axis=3, keepdims=True)
    d_log_decay = jnp.where(numbers.counts, d_log_decay, 0.0)

    def by_token(x: jax.Array) -> jax.Array:
        return x.reshape(batch, heads, -1)[..., : cut.sizes[1]].swapaxes(1, 2)

    return by_token(inside + ends), by_token(d_log_decay)


def _gated(y: jax.Array, gate: jax.Array) -> jax.Array:
    product = y.astype(jnp.float32) * silu(gate.astype(jnp.float32))
    return product.astype(y.dtype)
