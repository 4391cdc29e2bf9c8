"""Attention over caches of which each head keeps entries of its own.

A head has S slots, `[B, K, S, H]`, in any order and not all in use. What decides about
evictions looks at how much attention an entry got, so maps are returned as well:

    mixed, maps = slot_attention(q, keys, values, positions[:, :, None] >= 0)
    scores += jnp.sum(maps, axis=-2)                            # [B, K, S]
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["cache_bytes", "slot_attention"]


@typed
def slot_attention(
    q: Float[ArrayLike, "batch length heads width"],
    k: Float[ArrayLike, "batch key_heads slots width"],
    v: Float[ArrayLike, "batch key_heads slots width"],
    visible: Bool[ArrayLike, "batch key_heads length slots"],
) -> tuple[
    Float[Array, "batch length heads width"],
    Float[Array, "batch key_heads length slots"],
]:
    """Attention, and its map per key head: the mean over the query heads that share it.

    mixed_t = sum_s a_ts v_s,  a_t = softmax over the visible s of q_t . k_s / sqrt(H)

    Args:
        q: queries, `[B, T, N, H]`; in them and in keys numbers beyond 1e5 count as
            1e5, and logits beyond 1e7 as 1e7.
        k: keys, `[B, K, S, H]`, K a divisor of N: query head n reads n // (N / K).
        v: values, likewise.
        visible: True for the slots that a query may read. One that may read none gets
            the mean over all of them.

    Returns:
        `(mixed, maps)`, float32 `[B, T, N, H]` and `[B, K, T, S]`.

    Raises:
        ValueError: K is no divisor of N.

    >>> q, k = jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 3, 1))
    >>> v, visible = jnp.array([2.0, 4.0, 9.0]), jnp.array([[[[True, True, False]]]])
    >>> mixed, maps = slot_attention(q, k, v.reshape(k.shape), visible)
    >>> mixed.ravel().tolist(), maps.ravel().tolist()
    ([3.0], [0.5, 0.5, 0.0])
    """
    if q.shape[2] % k.shape[1]:
        raise ValueError(
            f"argument 'q' has {q.shape[2]} heads, expected a multiple of those of "
            f"'k', {k.shape[1]}."
        )
    q, k, v = jnp.moveaxis(as_float32(q), 2, 1), as_float32(k), as_float32(v)
    # The limits keep products of extreme numbers, and their gradients, finite.
    grouped = jnp.clip(q, -1e5, 1e5).reshape(*k.shape[:2], -1, *q.shape[2:])
    logits = jnp.einsum("bkgth,bksh->bkgts", grouped, jnp.clip(k, -1e5, 1e5))
    # A program may compute a logit twice, apart by its rounding: exp must not see that.
    logits = jnp.clip(logits / math.sqrt(q.shape[-1]), -1e7, 1e7)
    visible = jnp.asarray(visible)[:, :, None]
    logits = jnp.where(visible, logits, jnp.finfo(logits.dtype).min / 2)
    weights = jax.nn.softmax(logits, axis=-1)
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights, v).reshape(q.shape)
    return jnp.moveaxis(mixed, 1, 2), jnp.mean(weights, axis=2)


@typed
def cache_bytes(
    entries: Int[ArrayLike, "*heads"], *, width: int, itemsize: int = 2
) -> Float[Array, ""]:
    """What keys and values take, without scores and positions: 2 H itemsize entries.

    Args:
        entries: of each head, as by `jnp.sum(positions >= 0, axis=-1)`.
        width: H, features of a head.
        itemsize: bytes of a number.

    Returns:
        Bytes of all heads, float32 scalar.

    Raises:
        ValueError: a number is below 1.

    >>> float(cache_bytes(jnp.array([3, 8]), width=64))
    2816.0
    """
    check_range("width", width, low=1)
    check_range("itemsize", itemsize, low=1)
    return 2.0 * width * itemsize * jnp.sum(jnp.asarray(entries, jnp.float32))


def _attention_example(key: Array):
    q, k, v = jax.random.normal(key, (3, 2, 8, 4, 8))
    k, v = (jnp.moveaxis(x[:, :, :2], 2, 1) for x in (k, v))
    visible = jnp.broadcast_to(jnp.tri(8, dtype=bool), (2, 2, 8, 8))
    return (q, k, v, visible), {}


EXAMPLES = {
    slot_attention: _attention_example,
    cache_bytes: lambda key: ((jax.random.randint(key, (2, 8), 0, 9),), {"width": 16}),
}
