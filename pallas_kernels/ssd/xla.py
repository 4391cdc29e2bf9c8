"""The recurrence as matrix products over chunks of Q tokens, on every backend.

With S_ij = log_decay_{j+1} + ... + log_decay_i and h the state before the chunk,

    y_i = sum_{j <= i} exp(S_ij) (c_i . b_j) dt_j x_j + exp(S_i,start) h c_i
    h'  = exp(S_end,start) h + sum_j exp(S_end,j) dt_j x_j b_j^T

Every S is a sum of its own terms, made as a product with a triangle of ones. As the
difference of two running sums it would lose digits after a strong decay, and so would
its gradient, in which terms far larger than the result would cancel.

The scan over chunks keeps the states between chunks, and no more: what is inside of a
chunk is computed again for the gradient. Derivatives are JAX's, of any order.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activations import silu
from pallas_kernels.ssd.form import Inputs

__all__ = ["CHUNK", "end_state", "scan"]

CHUNK = 64  # within a chunk the work grows with Q, between chunks with N P / Q


def scan(inputs: Inputs, chunk: int | None = None) -> tuple[jax.Array, jax.Array]:
    """All tokens of a call, chunk by chunk; equals `ref.scan`.

    Args:
        inputs: the call.
        chunk: tokens of a chunk; None: 64.

    Returns:
        `(y, state)` as `ref.scan`.
    """
    state, y = _over_chunks(_both, inputs, chunk)
    y = jnp.moveaxis(y, 0, 1)
    y = y.reshape(y.shape[0], -1, *y.shape[3:])[:, : inputs.x.shape[1]]
    return y, state


def end_state(inputs: Inputs, chunk: int | None = None) -> jax.Array:
    """The state after the last token, without any y.

    Args:
        inputs: the call; `c`, `skip` and `gate` are not read.
        chunk: as in `scan`.

    Returns:
        `[B, G, R, P, N]`, as that of `ref.scan`.
    """
    inputs = inputs._replace(c=None, skip=None, gate=None)  # pyright: ignore

    def advance(tokens: Inputs) -> tuple[jax.Array, None]:
        return _advance(tokens, _ends(tokens)), None

    return _over_chunks(advance, inputs, chunk)[0]


def _over_chunks(
    body: Callable[[Inputs], tuple[jax.Array, jax.Array | None]],
    inputs: Inputs,
    chunk: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Scan `body` over chunks; `fresh` becomes a count of the documents in the chunk.

    Tokens that fill up the last chunk have dt = 0 and do not decay anything.
    """
    length = inputs.x.shape[1]
    size = min(CHUNK if chunk is None else chunk, length)

    def cut(x: jax.Array) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, -length % size)
        if widths[1][1]:
            x = jnp.pad(x, widths)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    chunks = jax.tree.map(cut, inputs._replace(skip=None, state=None))  # pyright: ignore
    if chunks.fresh is not None:
        counts = jnp.cumsum(chunks.fresh.astype(jnp.int32), axis=2)
        chunks = chunks._replace(fresh=counts)

    @jax.checkpoint
    def step(
        carry: tuple[jax.Array, jax.Array | None], tokens: Inputs
    ) -> tuple[tuple[jax.Array, jax.Array | None], jax.Array | None]:
        state, skip = carry
        state, y = body(tokens._replace(skip=skip, state=state))
        return (state, skip), y

    (state, _), y = lax.scan(step, (inputs.state, inputs.skip), chunks)
    return state, y


def _both(tokens: Inputs) -> tuple[jax.Array, jax.Array]:
    ends = _ends(tokens)
    dtype = tokens.dt.dtype
    x, b, c = (a.astype(dtype) for a in (tokens.x, tokens.b, tokens.c))
    size = x.shape[1]
    after = jnp.tri(size, dtype=dtype)  # [i, k]: k <= i
    before = jnp.tri(size, k=-1, dtype=dtype)  # [k, j]: j < k
    log_decay = jnp.moveaxis(tokens.log_decay, 1, 3)[..., None, :]
    sums = _dot("bgrik,kj->bgrij", log_decay * after[None, None, None], before)
    pairs = jnp.tri(size, dtype=bool)[None]
    if tokens.fresh is not None:
        pairs &= tokens.fresh[:, :, None] == tokens.fresh[:, None]
    weights = _exp(sums, pairs[:, None, None])
    weights *= _dot("bign,bjgn->bgij", c, b)[:, :, None]
    y = _dot("bgrij,bjgrp->bigrp", weights, tokens.dt[..., None] * x)

    sums = _dot("ik,bkgr->bigr", after, tokens.log_decay)
    first = jnp.ones((1, 1), bool) if tokens.fresh is None else tokens.fresh == 0
    kept = _exp(sums, first[..., None, None])
    y += kept[..., None] * _dot("bign,bgrpn->bigrp", c, tokens.state)
    if tokens.skip is not None:
        y += tokens.skip[None, None] * x
    if tokens.gate is not None:
        y *= silu(tokens.gate.astype(dtype))
    return _advance(tokens, ends), y


def _ends(tokens: Inputs) -> jax.Array:
    """What is left of each token at the end of the chunk, times dt: `[b, j, g, r]`."""
    size = tokens.dt.shape[1]
    later = jnp.tri(size, k=-1, dtype=tokens.dt.dtype).T  # [j, k]: k > j
    sums = _dot("jk,bkgr->bjgr", later, tokens.log_decay)
    counts = tokens.fresh
    last = jnp.ones((1, 1), bool) if counts is None else counts == counts[:, -1:]
    return _exp(sums, last[..., None, None]) * tokens.dt


def _advance(tokens: Inputs, ends: jax.Array) -> jax.Array:
    """The state after a chunk."""
    dtype = tokens.dt.dtype
    sums = jnp.sum(tokens.log_decay, axis=1)
    counts = tokens.fresh
    one = jnp.ones((1,), bool) if counts is None else counts[:, -1] == 0
    kept = _exp(sums, one[:, None, None])[..., None, None] * tokens.state
    added = ends[..., None] * tokens.x.astype(dtype)
    return kept + _dot("bjgrp,bjgn->bgrpn", added, tokens.b.astype(dtype))


def _exp(sums: jax.Array, counts: jax.Array) -> jax.Array:
    """exp where it counts, 0 elsewhere; twice `where`, for the gradient."""
    return jnp.where(counts, jnp.exp(jnp.where(counts, sums, 0.0)), 0.0)


def _dot(form: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(form, a, b, precision=lax.Precision.HIGHEST)
