"""Attention of a few new tokens to a cache of keys and values, plain or in pages."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

__all__ = ["decode_attention"]

BLOCK = 256  # cached tokens of a step


def decode_attention(
    q: Float[Array, "b t n h"],
    k_cache: Float[Array, "b s k h"] | Float[Array, "p page k h"],
    v_cache: Float[Array, "b s k h"] | Float[Array, "p page k h"],
    lengths: Int[Array, " b"],
    *,
    pages: Int[Array, "b m"] | None = None,
    window: int | None = None,
    logit_softcap: float | None = None,
    scale: float | None = None,
    sinks: Float[Array, " n"] | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal attention of the last T tokens of each sequence to all of its tokens.

    The tokens of `q` are in the cache already: row b holds `lengths[b]` tokens, and
    query t stands at position lengths[b] - T + t. What the cache holds beyond is not
    read, NaN or not; a step stops at the longest row. There is no gradient.

    Args:
        q: `[B, T, N, H]`.
        k_cache: `[B, S, K, H]`; with `pages` `[P, page, K, H]`, shared by all rows.
        v_cache: shaped like `k_cache`.
        lengths: tokens of each row, the T of `q` among them; 0 for a row not in use.
        pages: which pages a row has, in order: token s lies in page `pages[b, s //
            page]`, at s % page; -1 behind the last.
        window: a query sees this many keys before its own, > 0; None: all.
        logit_softcap: as in `attention`.
        scale: as in `attention`.
        sinks: as in `attention`.
        return_lse: also returns the log of each query's sum of exponentials.

    Returns:
        `[B, T, N, H]` in the dtype of `q`, 0 for queries before the first token; with
        `return_lse` also `[B, T, N]` float32, -inf there.

    Raises:
        TypeError: a shape or a dtype does not fit; names the argument.
        ValueError: a knob is out of range.

    >>> q, k, v = jnp.ones((2, 1, 2, 4)), jnp.ones((2, 8, 1, 4)), jnp.ones((2, 8, 1, 4))
    >>> decode_attention(q, k, v, jnp.array([3, 0]))[:, 0, 0, 0].tolist()
    [1.0, 0.0]
    """
    _check(q, k_cache, v_cache, lengths, pages, sinks)
    if window is not None and window < 1:
        raise ValueError(f"argument 'window' is {window}, expected above 0.")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"argument 'logit_softcap' is {logit_softcap}, expected > 0.")
    batch, count, heads, width = q.shape
    key_heads = k_cache.shape[2]
    groups = heads // key_heads
    factor = width**-0.5 if scale is None else scale
    rows = q.reshape(batch, count, key_heads, groups, width)
    # Positions of the queries, [B, T].
    places = lengths[:, None] - count + jnp.arange(count)[None]
    block = _block_size(k_cache, pages)

    def read(cache: Array, step: Array) -> tuple[Array, Array]:
        """Some cached tokens `[B, block, K, H]` and their positions `[block]`."""
        if pages is None:
            start = jnp.minimum(step * block, cache.shape[1] - block)
            here = start + jnp.arange(block)
            # At the end a step reads some of the step before again, and masks it.
            here = jnp.where(here >= step * block, here, cache.shape[1])
            return lax.dynamic_slice_in_dim(cache, start, block, axis=1), here
        size = cache.shape[1]
        start = jnp.minimum(step * (block // size), pages.shape[1] - block // size)
        which = lax.dynamic_slice_in_dim(pages, start, block // size, axis=1)
        tokens = cache[jnp.maximum(which, 0)].reshape(batch, block, *cache.shape[2:])
        here = start * size + jnp.arange(block)
        return tokens, jnp.where(here >= step * block, here, pages.shape[1] * size)

    def visit(step: Array, carry: tuple[Array, Array, Array]):
        top, total, out = carry
        keys, here = read(k_cache, step)
        exists = here[None] < lengths[:, None]
        counts = here[None, None] <= places[..., None]
        counts &= exists[:, None]
        if window is not None:
            counts &= here[None, None] >= places[..., None] - window
        exists = exists[..., None, None]
        keys = jnp.where(exists, keys, 0)
        values = jnp.where(exists, read(v_cache, step)[0], 0)
        logits = jnp.einsum(
            "btkgh,bskh->bkgts", rows, keys, preferred_element_type=jnp.float32
        )
        logits *= factor
        if logit_softcap is not None:
            logits = logit_softcap * jnp.tanh(logits / logit_softcap)
        logits = jnp.where(counts[:, None, None], logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - higher[..., None])
        shrink = jnp.exp(top - higher)
        seen = jnp.einsum("bkgts,bskh->bkgth", weights, values.astype(jnp.float32))
        total = total * shrink + jnp.sum(weights, axis=-1)
        return higher, total, out * shrink[..., None] + seen

    shape = (batch, key_heads, groups, count)
    top, total = jnp.full(shape, -1e30), jnp.zeros(shape)
    if sinks is not None:
        logit = sinks.astype(jnp.float32).reshape(1, key_heads, groups, 1)
        top, total = jnp.broadcast_to(logit, shape), jnp.ones(shape)
    first = jnp.zeros((), jnp.int32)
    if window is not None:  # rows that are not in use see nothing
        oldest = jnp.min(jnp.where(lengths > 0, places[:, 0] - window, 2**30))
        first = jnp.clip(oldest, 0) // block
    last = (jnp.max(lengths, initial=0) + block - 1) // block
    start = (top, total, jnp.zeros((*shape, width)))
    top, total, out = lax.fori_loop(first, last, visit, start)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    out = jnp.moveaxis(out / safe[..., None], 3, 1).reshape(q.shape).astype(q.dtype)
    if not return_lse:
        return out
    lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
    return out, jnp.moveaxis(lse, 3, 1).reshape(batch, count, heads)


def _block_size(cache: Array, pages: Array | None) -> int:
    if pages is None:
        return max(1, min(BLOCK, cache.shape[1]))
    each = max(1, min(BLOCK // cache.shape[1], pages.shape[1]))
    return each * cache.shape[1]


def _check(q, k_cache, v_cache, lengths, pages, sinks) -> None:
    def wrong(name: str, x: Array, expected: str) -> TypeError:
        came = f"{x.dtype}{list(x.shape)}"
        return TypeError(f"argument '{name}' is {came}, expected {expected}.")

    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise wrong(name, x, "floats with 4 axes")
        if x.dtype != q.dtype:
            raise wrong(name, x, f"{q.dtype}, as 'q' has")
    batch, _, heads, width = q.shape
    if k_cache.shape[3] != width or (pages is None and k_cache.shape[0] != batch):
        first = "pages" if pages is not None else batch
        raise wrong("k_cache", k_cache, f"[{first}, S, K, {width}], to fit 'q'")
    if v_cache.shape != k_cache.shape:
        raise wrong("v_cache", v_cache, f"{list(k_cache.shape)}, as 'k_cache' has")
    if k_cache.shape[2] == 0 or heads % k_cache.shape[2]:
        raise wrong("k_cache", k_cache, f"heads that divide the {heads} of 'q'")
    integer = jnp.issubdtype(lengths.dtype, jnp.integer)
    if lengths.shape != (batch,) or not integer:
        raise wrong("lengths", lengths, f"integers [{batch}]")
    if pages is not None and (pages.ndim != 2 or pages.shape[0] != batch):
        raise wrong("pages", pages, f"integers [{batch}, m]")
    if sinks is not None and sinks.shape != (heads,):
        raise wrong("sinks", sinks, f"[{heads}]")
