"""The arrays of one call, as every implementation takes them."""

from typing import NamedTuple

import jax

__all__ = ["Inputs"]


class Inputs(NamedTuple):
    """A call in its normal form: heads `[G, R]` by their group, R heads to a group.

    With `s = 0` where `fresh` and `exp(log_decay)` elsewhere,

        state = s state + dt x b^T,    y = (state c + skip x) silu(gate).

    Attributes:
        x: `[B, T, G, R, P]`.
        dt: `[B, T, G, R]`, float32 or float64: what the sums are made in.
        log_decay: like `dt`.
        b: `[B, T, G, N]`.
        c: `[B, T, G, N]`.
        skip: `[G, R, P]` of the dtype of `dt`, or None.
        gate: like `x`, or None.
        state: `[B, G, R, P, N]` of the dtype of `dt`, before the first token.
        fresh: bool `[B, T]`, True where a token begins a document; None: nowhere.
    """

    x: jax.Array
    dt: jax.Array
    log_decay: jax.Array
    b: jax.Array
    c: jax.Array
    skip: jax.Array | None
    gate: jax.Array | None
    state: jax.Array
    fresh: jax.Array | None
