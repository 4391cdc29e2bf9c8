"""FastGen: each attention head keeps the part of its KV cache that it looks at.

A prompt is read with all keys. Then each head gets the cheapest of five policies under
which its attention map A loses at most 1 - T:

    C_0 special tokens; C_1 and punctuation; C_2 and the share r_f of tokens that got
    the most attention; C_3 and the last r_l P of the prompt's P tokens; C_4 all

and goes on by it: a new token enters the cache, attends, adds its attention to the
scores, and what the policy does not want is evicted for good. What `generate` takes:

    def model(cache, tokens):                                   # [B, t] -> [B, t, V]
        kinds = kind_of[tokens]                         # 0, SPECIAL or PUNCTUATION
        def attend(q, k, v, cache):
            if cache is None:                           # the prompt
                return prefill(q, k, v, kinds, slots=prompt + new)
            return decode_step(q, k, v, kinds, cache)
        body = Transformer(64, 4, 4, attend=attend)
        return LanguageModel(257, 64, body).apply(params, tokens, cache)

**Ragged caches in static shapes.** Policies are known at run time only: a program has
slots for all tokens in each head, and what is saved is counted, `positions >= 0`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed
from jaxzoo.nn.head_cache import slot_attention

PAPER = {
    "slug": "fastgen",
    "title": "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs",
    "arxiv": "2310.01801",
    "year": 2024,
    "authors": "Suyu Ge, Yunan Zhang, Liyuan Liu, Minjia Zhang, Jiawei Han, Jianfeng "
    "Gao",
    "where": "Sections 3.2 to 3.4 (equations 1 and 2, algorithms 1 and 2), and the "
    "fixed policies of section 5.1.",
    "differs": "The released repository holds no code. Equation 1 names no norm: here "
    "it is the total variation of the maps, mean over queries. A query's own key is "
    "there whatever the policy, in the profile and while decoding. The most frequent "
    "tokens are those of the whole prompt, also for its early queries; the window is a "
    "share of the prompt and does not grow, and both are rounded up. Grouped queries, "
    "which the paper leaves out, share a cache by the mean of their maps. Entries are "
    "counted in a cache that has slots for all: no memory is freed, and nothing is "
    "faster. In the experiment, small byte models, T = 0.95 costs nothing (0.006 % of "
    "the loss), but leaves 79 % of the entries and not 70 % (54 % at T = 0.9, as "
    "cheap); and one policy of windows and frequent tokens on all heads, with 81 %, is "
    "better by 0.002 nats. So little of a loss of 2.28 comes from far away (a window "
    "of 34 bytes costs 0.2 %) that keeping attention is no aim there.",
}

__all__ = [
    "POLICIES", "PUNCTUATION", "SPECIAL", "AdaptiveCache", "decode_step", "prefill",
    "profile_heads",
]  # fmt: skip

SPECIAL, PUNCTUATION = 1, 2  # kinds of tokens; all others are 0
POLICIES = (  # the paper's five, from the cheapest on, and then its fixed ones
    "special", "special+punctuation", "special+punctuation+frequent",
    "special+punctuation+frequent+local", "full",
    "local", "frequent", "frequent+local",
)  # fmt: skip
Ratio = Float[ArrayLike, ""] | float
Limits = tuple[Array, Array, Array]  # scores `[B, K, S]`, r_f and the window `[B, K]`


class AdaptiveCache(NamedTuple):
    """What each head has kept, in any order; of a stack with an axis of depth first."""

    keys: Array  # [B, K, S, H], rotated
    values: Array  # likewise
    positions: Array  # int32 [B, K, S], place in the text; -1: the slot is free
    kinds: Array  # int32 [B, K, S], 0, SPECIAL or PUNCTUATION
    scores: Array  # [B, K, S], attention that the token got from all queries so far
    policy: Array  # int32 [B, K], an index of POLICIES
    ratio: Array  # [B, K], r_f
    window: Array  # int32 [B, K], r_l P in tokens
    recovered: Array  # [B, K], attention on the prompt that the policy keeps, in [0, 1]
    lengths: Array  # int32 [B], tokens that were read


@typed
def profile_heads(
    attention: Float[ArrayLike, "batch heads length length"],
    kinds: Int[ArrayLike, "batch length"], *,
    recovery: Ratio = 0.95, frequent_ratio: Ratio = 0.3, local_ratio: Ratio = 0.3,
) -> tuple[Float[Array, "batch heads"], dict[str, Array]]:  # fmt: skip
    """The cheapest policy of each head that recovers its attention map (equation 1).

    min {c : lost_c <= 1 - T},   lost_c = mean_i sum_{j not in C_c, j != i} A_ij

    lost_c is the total variation between A and the softmax over the kept keys. A
    query's own key is always kept: it is at hand while the query attends.

    Args:
        attention: A, after the softmax, causal, `[B, N, T, T]`: queries, then keys.
        kinds: of the tokens, 0, SPECIAL or PUNCTUATION.
        recovery: the threshold T, in [0, 1]. At 1 nothing that was looked at is lost.
        frequent_ratio: r_f, in [0, 1], of the tokens so far, rounded up.
        local_ratio: r_l, in [0, 1], of the prompt's tokens, rounded up.

    Returns:
        `(recovered, aux)`: 1 - lost of the chosen policy, `[B, N]`, at least T up to
        rounding; aux has "policy" `[B, N]`, an index of POLICIES, "lost" `[B, N, 5]`,
        and "scores" `[B, N, T]`, the attention that each token got.

    Raises:
        ValueError: a ratio is out of range.

    >>> attention = 0.5 * jnp.eye(4).at[:, 0].add(1.0).at[0, 0].set(2.0)
    >>> kinds = jnp.array([[SPECIAL, 0, 0, 0]])  # all look at it and at themselves
    >>> recovered, aux = profile_heads(attention[None, None], kinds)
    >>> POLICIES[int(aux["policy"][0, 0])], recovered.tolist()
    ('special', [[1.0]])
    """
    check_range("recovery", recovery, low=0.0, high=1.0)
    check_range("frequent_ratio", frequent_ratio, low=0.0, high=1.0)
    check_range("local_ratio", local_ratio, low=0.0, high=1.0)
    attention, kinds = as_float32(attention), jnp.asarray(kinds)
    scores = jnp.sum(attention, axis=-2)
    heads, limits = scores.shape[:2], _limits(scores, frequent_ratio, local_ratio)
    lost = [_lost(attention, kinds, jnp.full(heads, c), limits) for c in range(5)]
    lost = jnp.stack(lost, axis=-1)
    # Of the lost and not of the kept: 1 - 1e-9 is 1 in float32.
    policy = jnp.argmax(lost <= 1.0 - recovery, axis=-1).astype(jnp.int32)
    own = jnp.take_along_axis(lost, policy[..., None], axis=-1)[..., 0]
    return 1.0 - own, {"policy": policy, "lost": lost, "scores": scores}


@typed
def prefill(
    q: Float[ArrayLike, "batch length heads width"],
    k: Float[ArrayLike, "batch length key_heads width"],
    v: Float[ArrayLike, "batch length key_heads width"],
    kinds: Int[ArrayLike, "batch length"], *,
    slots: int, recovery: Ratio = 0.95, frequent_ratio: Ratio = 0.3,
    local_ratio: Ratio = 0.3, policy: Int[ArrayLike, "batch key_heads"] | None = None,
) -> tuple[Float[Array, "batch length heads width"], AdaptiveCache]:  # fmt: skip
    """Attention over a prompt, and the cache that each head keeps of it (algorithm 1).

    Args:
        q: queries, rotated, `[B, P, N, H]`, with the limits of `slot_attention`.
        k: keys, `[B, P, K, H]`, K a divisor of N. Query heads that share a key head
            share its cache: their maps are averaged.
        v: values, likewise.
        kinds: of the tokens, 0, SPECIAL or PUNCTUATION.
        slots: of each head, used again after evictions: one more than it ever has
            entries, at most P plus the tokens to come. Keys that do not fit are NaN.
        recovery: T of `profile_heads`, as the ratios.
        frequent_ratio: r_f.
        local_ratio: r_l.
        policy: an index of POLICIES for each head, in the place of a profile.

    Returns:
        `(mixed, cache)`: attention among all keys, float32, and the cache.

    Raises:
        ValueError: a number is out of range, or K is no divisor of N.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
    >>> kinds, forced = jnp.array([[SPECIAL] + [0] * 7]), jnp.array([[5, 4]])
    >>> mixed, cache = prefill(q, k, v, kinds, slots=9, policy=forced)
    >>> jnp.sum(cache.positions >= 0, axis=-1).tolist()  # 0.3 of 8, and all
    [[3, 8]]
    """
    check_range("slots", slots, low=1)
    k, v = (jnp.moveaxis(as_float32(x), 2, 1) for x in (k, v))
    length = k.shape[2]
    visible = jnp.broadcast_to(jnp.tri(length, dtype=bool), (*k.shape[:3], length))
    mixed, attention = slot_attention(q, k, v, visible)
    ratios = {"frequent_ratio": frequent_ratio, "local_ratio": local_ratio}
    recovered, aux = profile_heads(attention, kinds, recovery=recovery, **ratios)
    scores, kinds = aux["scores"], jnp.asarray(kinds, jnp.int32)
    limits = _limits(scores, **ratios)
    if policy is not None:
        aux["policy"] = policy = jnp.asarray(policy, jnp.int32)
        check_range("policy", jnp.min(policy), low=0)
        check_range("policy", jnp.max(policy), high=len(POLICIES) - 1)
        recovered = 1.0 - _lost(attention, kinds, policy, limits)
    lengths = jnp.full(len(k), length, jnp.int32)
    kinds = jnp.broadcast_to(kinds[:, None], scores.shape)
    places = jnp.broadcast_to(jnp.arange(length)[None, None], scores.shape)
    keep = _kept(aux["policy"], kinds, places, lengths, limits)
    # A head whose entries do not fit must not go on with some of them.
    fits = (jnp.sum(keep, axis=-1) <= slots)[..., None, None]
    order = jnp.argsort(~keep, axis=-1)[..., :slots]

    def packed(x: Array, empty: int = 0) -> Array:
        index = order.reshape(order.shape + (1,) * (x.ndim - 3))
        room = [(0, 0), (0, 0), (0, max(slots - length, 0)), (0, 0)][: x.ndim]
        x = jnp.take_along_axis(x, index, axis=2)
        return jnp.pad(x, room, constant_values=empty)

    return mixed, AdaptiveCache(
        packed(jnp.where(fits, k, jnp.nan)), packed(v),
        packed(jnp.where(keep, places, -1), -1), packed(kinds), packed(scores),
        aux["policy"], *limits[1:], recovered, lengths,
    )  # fmt: skip


@typed
def decode_step(
    q: Float[ArrayLike, "batch 1 heads width"],
    k: Float[ArrayLike, "batch 1 key_heads width"],
    v: Float[ArrayLike, "batch 1 key_heads width"],
    kinds: Int[ArrayLike, "batch 1"], cache: AdaptiveCache,
) -> tuple[Float[Array, "batch 1 heads width"], AdaptiveCache]:  # fmt: skip
    """One more token: it enters, attends, and each head evicts (algorithm 2).

    Of n tokens so far the ceil(r_f n) with the largest sum of attention are frequent;
    local are those that the next token has at most r_l P before it.

    Args:
        q: its queries, rotated, `[B, 1, N, H]`.
        k: its keys, `[B, 1, K, H]`.
        v: its values, likewise.
        kinds: its kind, `[B, 1]`.
        cache: by `prefill` or this function.

    Returns:
        `(mixed, cache)`, float32. NaN in a head that had no free slot.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 1, 4))
    >>> kinds, forced = jnp.array([[SPECIAL] + [0] * 7]), jnp.array([[5]])
    >>> _, cache = prefill(q, k, v, kinds, slots=4, policy=forced)
    >>> _, new = decode_step(q[:, :1], k[:, :1], v[:, :1], kinds[:, 1:2], cache)
    >>> cache.positions.tolist(), new.positions.tolist()
    ([[[5, 6, 7, -1]]], [[[-1, 6, 7, 8]]])
    """
    k, v = (jnp.moveaxis(as_float32(x), 2, 1) for x in (k, v))
    is_taken = cache.positions >= 0
    slot = jnp.argmin(is_taken, axis=-1, keepdims=True)  # the first that is free
    is_new = jnp.arange(is_taken.shape[-1])[None, None] == slot
    k = jnp.where(jnp.all(is_taken, axis=-1)[..., None, None], jnp.nan, k)
    keys = jnp.where(is_new[..., None], k, cache.keys)
    values = jnp.where(is_new[..., None], v, cache.values)
    kind = jnp.where(is_new, jnp.asarray(kinds, jnp.int32)[:, None], cache.kinds)
    places = jnp.where(is_new, cache.lengths[:, None, None], cache.positions)
    mixed, attention = slot_attention(q, keys, values, (places >= 0)[:, :, None])
    scores = jnp.where(is_new, 0.0, cache.scores) + attention[:, :, 0]
    lengths, limits = cache.lengths + 1, (scores, cache.ratio, cache.window)
    keep = _kept(cache.policy, kind, places, lengths, limits)
    return mixed, cache._replace(
        keys=keys, values=values, positions=jnp.where(keep, places, -1), kinds=kind,
        scores=scores, lengths=lengths,
    )  # fmt: skip


def _has(part: str, policy: Array) -> Array:
    return jnp.array([part in name.split("+") for name in POLICIES])[policy][..., None]


def _kept(
    policy: Array, kinds: Array, positions: Array, lengths: Array, limits: Limits
) -> Array:
    """Which slots `[B, K, S]` stay when `lengths` tokens were read."""
    scores, ratio, window = limits
    order = jnp.argsort(jnp.where(positions >= 0, -scores, jnp.inf), axis=-1)
    rank = jnp.argsort(order, axis=-1)  # 0 for the largest score
    count = lengths[:, None, None]
    keep = _has("full", policy) | (_has("special", policy) & (kinds == SPECIAL))
    keep |= _has("punctuation", policy) & (kinds == PUNCTUATION)
    keep |= _has("frequent", policy) & (rank < _rounded_up(ratio[..., None] * count))
    keep |= _has("local", policy) & (positions >= count - window[..., None])
    return keep & (positions >= 0)


def _lost(attention: Array, kinds: Array, policy: Array, limits: Limits) -> Array:
    """Attention `[B, K]` of the mean query on keys that a policy does not keep."""
    (scores, _, window), length = limits, attention.shape[-1]
    places = jnp.broadcast_to(jnp.arange(length)[None, None], scores.shape)
    lengths, none = jnp.full(len(scores), length), (*limits[:2], jnp.zeros_like(window))
    columns = _kept(policy, kinds[:, None], places, lengths, none)
    distance = places[..., None] - places[:, :, None]
    near = _has("local", policy)[..., None] & (distance <= window[..., None, None])
    kept = columns[:, :, None] | near | (distance == 0)
    return jnp.sum(jnp.where(kept, 0.0, attention), axis=(-2, -1)) / length


def _limits(scores: Array, frequent_ratio: Ratio, local_ratio: Ratio) -> Limits:
    heads, length = scores.shape[:2], scores.shape[2]
    window = jnp.full(heads, _rounded_up(jnp.asarray(local_ratio) * length))
    return scores, jnp.full(heads, frequent_ratio, scores.dtype), window


def _rounded_up(x: Array) -> Array:
    # A little less, as 0.3 times 10 is above 3 in some dtypes.
    return jnp.ceil(x - 1e-4).astype(jnp.int32)


def _tokens(key: Array, length: int) -> tuple[Array, ...]:
    q, k, v = 1.5 * jax.random.normal(key, (3, 2, length, 4, 8))
    kinds = jnp.tile(jnp.array([1, 2] * 4), (2, 1))
    return q, k[:, :, :2], v[:, :, :2], kinds[:, :length]


def _profile_example(key: Array):
    logits = jax.random.normal(key, (2, 4, 8, 8))
    attention = jax.nn.softmax(jnp.where(jnp.tri(8, dtype=bool), logits, -99))
    return (attention, _tokens(key, 8)[3]), {"recovery": 0.6}


def _decode_example(key: Array):
    policy = jnp.array([[2, 3], [4, 1]])
    _, cache = prefill(*_tokens(jax.random.key(3), 8), slots=10, policy=policy)
    return (*_tokens(key, 1), cache), {}


EXAMPLES = {
    profile_heads: _profile_example,
    prefill: lambda key: (_tokens(key, 8), {"slots": 12, "recovery": 0.6}),
    decode_step: _decode_example,
}
