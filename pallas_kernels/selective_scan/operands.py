"""What the kernels for TPU and GPU take and give, each in the forms of its own plan."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.terms import Inputs

__all__ = ["Given", "Made", "gradients"]


class Given(NamedTuple):
    """Operands; None: not in this call."""

    u: Any
    delta: Any
    z: Any
    B: Any
    C: Any
    marks: Any  # 1 where the state is forgotten
    A: Any  # on GPUs in units of 1 / log 2
    vectors: Any  # rows D and delta_bias
    start: Any = None
    kept: Any = None
    d_y: Any = None
    d_end: Any = None


class Made(NamedTuple):
    """Results; None: not of this kernel."""

    y: Any = None
    end: Any = None
    kept: Any = None
    d_u: Any = None
    d_delta: Any = None
    d_z: Any = None
    d_B: Any = None
    d_C: Any = None
    d_BC: Any = None  # both in one, as GPUs sum them
    d_A: Any = None
    d_vectors: Any = None
    d_start: Any = None


def gradients(
    plan: Any, made: Made, inputs: Inputs, B: jax.Array, C: jax.Array, vectors: Any
) -> Inputs:
    """A gradient for each array in its dtype; None for `resets`.

    Args:
        plan: that of the kernel.
        made: what the kernel made, of each row of the batch.
        inputs: those of the call.
        B: its gradient, `[B, T, G, N]`.
        C: its gradient.
        vectors: summed over the batch, `[columns, rows, channels of a block]`: the
            first rows are those of D and delta_bias.
    """
    of_D, of_bias = (plan.from_vector(vectors[:, i]) for i in range(2))
    wide = Inputs(
        u=plan.from_token(made.d_u),
        delta=plan.from_token(made.d_delta),
        A=plan.from_channel(jnp.sum(made.d_A, axis=0)),
        B=B,
        C=C,
        D=of_D,
        z=None if inputs.z is None else plan.from_token(made.d_z),
        delta_bias=of_bias,
        start=plan.from_channel(made.d_start),
        resets=None,
    )

    def like(gradient: Any, x: Any) -> Any:
        return None if x is None or gradient is None else gradient.astype(x.dtype)

    return Inputs(*map(like, wide, inputs))
