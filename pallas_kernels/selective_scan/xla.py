"""The selective scan in plain XLA, in chunks of tokens, on every backend.

Only the states at the starts of chunks are kept. The gradient walks over the chunks
from the last to the first, and makes the states h_t of a chunk again. With p_t the
decay e^(dt_t A), and g_t the gradient of h_t,

    g_t = C_t dy_t + p_(t+1) g_(t+1),    q_t = g_t p_t h_(t-1)
    dC_t = sum_d h_t dy_t,   dB_t = sum_d g_t dt_t u_t,   dx_t = sum_n g_t B_t
    du_t = dx_t dt_t,   d dt_t = dx_t u_t + sum_n q_t A,   dA = sum_t q_t dt_t

That is for Euler's rule and real A; the exact rule and complex A have the gradient that
JAX makes of a chunk, with the same memory. Forward mode, and second derivatives of
all of them, are made by JAX too.
"""

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
from pallas_kernels.transpose import transpose_of

__all__ = ["scan"]

BYTES = 2**20  # of a chunk's states, which the gradient passes over several times


def scan(rule: Rule, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The recurrence over chunks; takes and equals what `ref.scan` does."""
    inputs = widened(inputs)
    length = inputs.u.shape[1]
    size = max(1, min(rule.chunk or _chunk(inputs.start, length), length))
    dt = rates(rule, inputs.delta, inputs.delta_bias)

    def chunks(x: jax.Array) -> jax.Array:
        """[T, B, ...] as [chunk, token, B, ...]; a step size of 0 changes nothing."""
        x = jnp.moveaxis(x, 1, 0)
        x = jnp.pad(x, [(0, -length % size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    tokens: Any = (inputs.u, dt, inputs.B, inputs.C, inputs.resets)
    tokens = jax.tree.map(chunks, tokens)
    written = not (rule.zoh or jnp.iscomplexobj(inputs.A))
    end, y = (_scan if written else _plain)(rule, inputs.A, inputs.start, tokens)
    y = jnp.moveaxis(y.reshape(-1, *y.shape[2:])[:length], 0, 1)
    return finished(inputs, y), end


def _chunk(state: jax.Array, length: int) -> int:
    """Tokens whose states stay in a core's cache, in chunks of equal lengths.

    At least 16 of them, as the first state of each chunk is kept, and at most 64.
    """
    tokens = min(max(BYTES // (state.size * state.dtype.itemsize), 16), 64)
    return -(-length // -(-length // tokens))


def _plain(rule: Rule, A: jax.Array, start: jax.Array, tokens: Any) -> Any:
    """What JAX can differentiate: the last state, and C h of all tokens.

    Of a chunk its first state is kept; while it is differentiated, of a token its own.
    """
    remade = functools.partial(jax.checkpoint, prevent_cse=False)

    @remade
    def one(h: jax.Array, A: jax.Array, x: Any) -> Any:
        return token(rule, A, h, x)

    @remade
    def chunk(h: jax.Array, A: jax.Array, xs: Any) -> Any:
        return lax.scan(lambda h, x: one(h, A, x), h, xs)

    return lax.scan(lambda h, xs: chunk(h, A, xs), start, tokens)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _scan(rule: Rule, A: jax.Array, start: jax.Array, tokens: Any) -> Any:
    return _forward(rule, A, start, tokens)[0]


def _forward(rule: Rule, A: jax.Array, start: jax.Array, tokens: Any) -> Any:
    """What `_plain` gives, and the states at the starts of chunks."""

    def chunk(h: jax.Array, tokens: Any) -> Any:
        end, y = lax.scan(functools.partial(token, rule, A), h, tokens)
        return end, (y, h)

    end, (y, starts) = lax.scan(chunk, start, tokens)
    return (end, y), starts


@_scan.defjvp
def _scan_jvp(rule: Rule, primals: Any, tangents: Any) -> Any:
    outputs, starts = _forward(rule, *primals)
    A, start, tokens = tangents
    changes = (A, start, tokens[:4])  # not those of resets, which are bools
    gradient = functools.partial(_gradient, rule)
    return outputs, transpose_of(gradient, (*primals, starts), outputs, changes)


def _gradient(rule: Rule, saved: Any, changes: Any, differentiable: bool) -> Any:
    """The gradients of A, start, u, dt, B and C.

    Args:
        rule: the static part.
        saved: A, start, tokens, and the states at the starts of chunks.
        changes: the gradients of the last state and of y.
        differentiable: whether JAX is to transpose or differentiate it: then it is
            what JAX makes of `_plain`.
    """
    A, start, (*tokens, resets), starts = saved
    if differentiable:

        def plain(A: jax.Array, start: jax.Array, *tokens: jax.Array) -> Any:
            return _plain(rule, A, start, (*tokens, resets))

        dA, d_start, *d_tokens = jax.vjp(plain, A, start, *tokens)[1](changes)
        return dA, d_start, d_tokens

    def chunk(carry: Any, xs: Any) -> Any:
        g, dA = carry
        h, (u, dt, B, C, reset), dy = xs
        power = jnp.exp(dt[:, :, :, None] * A[None, None])
        x = dt * u

        def forth(t: Any, carry: Any) -> Any:
            h, after = carry
            h = power[t] * kept(h, reset if reset is None else reset[t])
            h = h + x[t][:, :, None] * B[t][..., None]
            return h, after.at[t].set(h)

        def back(step: Any, carry: Any) -> Any:
            t = size - 1 - step
            g, gs = carry
            g = g + C[t][..., None] * dy[t][:, :, None]
            gs = gs.at[t].set(g)
            return kept(power[t] * g, reset if reset is None else reset[t]), gs

        size, empty = len(power), jnp.zeros_like(power)
        # Loops that index: under vmap a scan would move its axis to the front of
        # `power` and of the states, the largest arrays here.
        _, after = lax.fori_loop(0, size, forth, (h, empty))
        g, gs = lax.fori_loop(0, size, back, (g, empty))
        before = kept(jnp.concatenate([h[None], after[:-1]]), reset)
        q = gs * power * before
        dC = jnp.einsum("tbgnp,tbgp->tbgn", after, dy)
        dB = jnp.einsum("tbgnp,tbgp->tbgn", gs, x)
        dx = jnp.sum(gs * B[..., None], axis=3)
        d_dt = dx * u + jnp.sum(q * A[None, None], axis=3)
        dA = dA + jnp.sum(q * dt[:, :, :, None], axis=(0, 1))
        return (g, dA), (dx * dt, d_dt, dB, dC)

    def kept(h: jax.Array, reset: jax.Array | None) -> jax.Array:
        return h if reset is None else jnp.where(reset[..., None, None, None], 0.0, h)

    d_end, dy = changes
    (d_start, dA), d_tokens = lax.scan(
        chunk,
        (d_end, jnp.zeros_like(A)),
        (starts, (*tokens, resets), dy),
        reverse=True,
    )
    return dA, d_start, d_tokens
