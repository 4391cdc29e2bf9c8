"""The scan of Mamba-2 for TPU in Pallas: a kernel forward and one for the gradient.

Both walk a grid of (batch, part of the heads, block of tokens, block of lanes), the
last two in order, with the states of all lanes of a part carried in vector memory. So b
and c are read once for all heads of a part, and their gradients summed before they are
written. Forward, each chunk of a block is as in `xla`, with the lanes of several heads
in one product where the heads share b and c.

For the gradient the forward pass keeps the states before blocks of tokens. Backward,
the last block first, the states before the chunks of a block are made again; then, the
last chunk first, with M = exp(S) * (c b^T), h the state before the chunk, g what comes
in for y and d' for the state after it (per head, and dt x as x):

    dM = g x^T,       dS = dM * M,     d(c b^T) = dM * exp(S), summed over heads
    dx = M^T g + e_end b d',           dh = e_into c^T g + e_total d'
    dc = d(c b^T) b + (e_into g) h^T,  db = d(c b^T)^T c + (e_end x) d'^T

The gradient of log_decay_k is the sum of all that has crossed from before k to k or
after: of dS_ij with j < k <= i, and likewise of what came in, went out or passed. Each
is summed as it stands; no sums are subtracted.

Products have float32 inputs, exact, for float32 arrays, and bfloat16 ones for bfloat16
arrays; states, decays and all sums are float32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ssd import tpu_layout as layout
from pallas_kernels.ssd.form import Inputs
from pallas_kernels.ssd.tpu_bodies import backward_body, forward_body
from pallas_kernels.ssd.tpu_call import Operand, call

__all__ = ["backward", "forward", "unsupported"]


def unsupported(inputs: Inputs) -> str | None:
    """Why a call cannot run here: one sentence, or None if it can."""
    arrays = [inputs.x, inputs.b, inputs.c, inputs.gate]
    kinds = {x.dtype for x in arrays if x is not None}
    if len(kinds) > 1 or inputs.x.dtype not in (jnp.float32, jnp.bfloat16):
        names = ", ".join(str(x.dtype) for x in arrays if x is not None)
        return (
            "the TPU kernel takes x, B, C and z of one dtype, float32 or bfloat16, "
            f"and these are {names}"
        )
    if inputs.dt.dtype != jnp.float32:
        return f"the TPU kernel sums in float32, and this call in {inputs.dt.dtype}"
    if min(inputs.x.size, inputs.b.size) == 0:
        return "the TPU kernel takes no empty arrays"
    width, states = inputs.x.shape[4], inputs.b.shape[3]
    if max(width, states) > 256:
        return (
            "the TPU kernel takes heads and states of at most 256, and these are "
            f"{width} and {states}"
        )
    return None


def forward(
    inputs: Inputs, *, keep: bool = False, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """All tokens; equals `ref.scan` wherever `unsupported` gives None.

    Args:
        inputs: the call.
        keep: also give what `backward` needs.
        interpret: True or `pltpu.InterpretParams`: run without a TPU.

    Returns:
        `(y, state, starts)`: `[B, T, G, R, P]` in the dtype of `x`, `[B, G, R, P, N]`
        float32, and the states before blocks of tokens, or None.
    """
    cut = layout.plan(inputs)
    packed = layout.pack(cut, inputs)
    sizes, dtype = packed.x.shape, packed.x.dtype
    results = {
        "y": Operand("tokens", jax.ShapeDtypeStruct(sizes, dtype)),
        "end": Operand("at the end", _float32(packed.state.shape)),
    }
    if keep:
        batch, deep, lanes = packed.state.shape
        starts = _float32((batch, cut.blocks, deep, lanes))
        results["starts"] = Operand("starts", starts)
    out = call(
        forward_body, "ssd_forward", cut, _operands(packed, "at the start"),
        results, {"states": (cut.across, cut.states, cut.lanes)},
        is_reversed=False, products=4, interpret=interpret,
    )  # fmt: skip
    y, end = layout.of_tokens(cut, out["y"]), layout.of_state(cut, out["end"])
    return y, end, out.get("starts")


def backward(
    inputs: Inputs,
    starts: jax.Array,
    d_y: jax.Array,
    d_state: jax.Array,
    *,
    interpret: Any = False,
) -> Inputs:
    """The gradient of `forward`.

    Args:
        inputs: as in `forward`.
        starts: what `forward` kept.
        d_y: the gradient with respect to `y`, `[B, T, G, R, P]`.
        d_state: that with respect to the last state.
        interpret: as in `forward`.

    Returns:
        The gradients in the dtypes of the inputs; None for `fresh`.
    """
    cut = layout.plan(inputs)
    packed = layout.pack(cut, inputs)
    dtype = packed.x.dtype
    d_y = layout.tokens(cut, d_y.astype(dtype))
    batch, parts, _, across = cut.grid
    by_part = _float32((batch, parts, cut.blocks * cut.tokens, cut.states))
    operands = _operands(packed, None)
    operands |= {
        "d_y": Operand("tokens", d_y),
        "starts": Operand("starts", starts),
        "d_end": Operand("at the start", layout.state(cut, d_state)),
    }
    results = {
        "x": Operand("tokens", jax.ShapeDtypeStruct(d_y.shape, dtype)),
        "dt": Operand("rows", _float32(packed.dt.shape)),
        "log_decay": Operand("rows", _float32(packed.dt.shape)),
        "b": Operand("sums by part", by_part),
        "c": Operand("sums by part", by_part),
        "d_state": Operand("at the end", _float32(packed.state.shape)),
    }
    scratch = {
        "states": (across, cut.states, cut.lanes),
        "inner": (cut.chunks, cut.states, cut.lanes),
    }
    if packed.gate is not None:
        results["gate"] = results["x"]
    if packed.skip is not None:
        lanes = packed.skip.shape[1]
        results["skip"] = Operand("lanes at the end", _float32((batch, 1, lanes)))
        scratch["skips"] = (across, 1, cut.lanes)
    out = call(
        backward_body, "ssd_backward", cut, operands, results, scratch,
        is_reversed=True, products=11, interpret=interpret,
    )  # fmt: skip
    skip = None
    if inputs.skip is not None:
        groups, heads, width = inputs.skip.shape
        skip = out["skip"].sum(0).reshape(groups, cut.heads, cut.width)
        skip = skip[:, :heads, :width]
    return Inputs(
        x=layout.of_tokens(cut, out["x"]),
        dt=layout.of_rows(cut, out["dt"]),
        log_decay=layout.of_rows(cut, out["log_decay"]),
        b=layout.of_groups(cut, out["b"]).astype(inputs.b.dtype),
        c=layout.of_groups(cut, out["c"]).astype(inputs.c.dtype),
        skip=skip,
        gate=None if inputs.gate is None else layout.of_tokens(cut, out["gate"]),
        state=layout.of_state(cut, out["d_state"]),
        fresh=None,
    )


def _operands(packed: layout.Packed, at_start: str | None) -> dict[str, Operand]:
    kinds = {
        "x": "tokens",
        "dt": "rows",
        "log_decay": "rows",
        "b": "groups",
        "c": "groups",
        "skip": "lanes",
        "gate": "tokens",
        "state": at_start,
        "counts": "counts",
    }
    given = packed._asdict().items()
    return {k: Operand(kinds[k], x) for k, x in given if kinds[k] and x is not None}  # pyright: ignore


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
