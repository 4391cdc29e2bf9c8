"""Attention by its definition, with all logits at once: what the others are held to."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.pattern import Extras, Pattern, allowed, keep

__all__ = ["attend"]


def attend(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> tuple[jax.Array, jax.Array]:
    """Attention with a matrix of T x S logits per head.

    Args:
        pattern: scale, window, softcap and share of dropout.
        q: `[B, K, G, T, H]`.
        k: `[B, K, S, H]`.
        v: `[B, K, S, H]`.
        extras: bias, sinks, masks, ids and the seed of dropout.

    Returns:
        `(out, lse)`: `[B, K, G, T, H]` and `[B, K, G, T]`, both float32 (float64 for
        float64 inputs). A row that sees nothing has 0 and -inf.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    batch, heads, groups, length, _ = q.shape
    logits = jnp.einsum("bkgth,bksh->bkgts", q, k, precision="highest") * pattern.scale
    if extras.bias is not None:
        logits += extras.bias.astype(dtype)
    if pattern.softcap is not None:
        logits = pattern.softcap * jnp.tanh(logits / pattern.softcap)
    rows = jnp.arange(length).reshape(1, 1, 1, -1, 1)
    columns = jnp.arange(k.shape[2]).reshape(1, 1, 1, 1, -1)
    queries, keys = extras.query_ids, extras.key_ids
    counts = allowed(
        pattern,
        rows,
        columns,
        mask=extras.mask,
        query_ids=None if queries is None else queries[..., None],
        key_ids=None if keys is None else keys[:, :, None, None],
    )
    if counts is None:
        counts = jnp.ones_like(logits, bool)
    counts = jnp.broadcast_to(counts, logits.shape)

    logits = jnp.where(counts, logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, initial=-1e30)
    if extras.sinks is not None:
        sinks = extras.sinks.astype(dtype)[None, :, :, None]
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    # Twice `where`: masked logits may be infinite, and must not reach the gradient.
    below = jnp.where(counts, logits - top[..., None], 0.0)
    weights = jnp.where(counts, jnp.exp(below), 0.0)
    total = jnp.sum(weights, axis=-1)
    if extras.sinks is not None:
        total += jnp.exp(sinks - top)  # pyright: ignore
    seen = total > 0
    safe = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
    weights /= safe[..., None]
    if extras.seed is not None:
        head = jnp.arange(batch * heads * groups).reshape(batch, heads, groups, 1, 1)
        kept = keep(extras.seed, head, rows, columns, pattern.drop)
        weights = jnp.where(kept, weights / (1.0 - pattern.drop), 0.0)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, v, precision="highest")
    return out, lse
