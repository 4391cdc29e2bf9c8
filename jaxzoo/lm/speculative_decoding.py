"""Speculative decoding: several tokens of a large model per call, drawn as if by one.

A small model drafts x_1 .. x_G from q, the large one scores them in one call, and

    x_i is kept with probability min(1, p(x_i) / q(x_i));
    the first that is not is drawn again from max(p - q, 0) / sum max(p - q, 0);
    if all are kept, one more comes from p.

Whatever q is, the tokens have the distribution p (`jaxzoo.nn.draft_acceptance`). A
draft is kept with probability a = sum min(p, q) = 1 - TV(p, q), so that a call of the
large model gives, if the a of successive tokens are independent, 1 + a + .. + a^G
tokens. Two transformers with a cache each:

    text, aux = speculative_decode(
        key, target, draft, prompt, target_state=cache, draft_state=small_cache,
        num_tokens=64, adjust=functools.partial(adjusted_log_probs, temperature=0.7))

Rows of a batch keep different numbers of drafts: each goes on from its own length, and
what was read too much is forgotten by making the lengths of the caches smaller. With
`branches` the draft writes several continuations, of which the first token that is kept
decides who goes on (`tree_accept`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed
from jaxzoo.nn.draft_acceptance import speculative_accept, tree_accept

PAPER = {
    "slug": "speculative_decoding",
    "title": "Fast Inference from Transformers via Speculative Decoding",
    "arxiv": "2211.17192",
    "year": 2023,
    "authors": "Yaniv Leviathan, Matan Kalman, Yossi Matias",
    "where": "Algorithm 1 (its step in jaxzoo.nn.draft_acceptance), section 2.2 "
    "(adjusted p and q, jaxzoo.nn.generate), theorem 3.5 and corollary 3.6 "
    "(acceptance), equation 1, theorem 3.8 and section 3.5 (the best number of "
    "drafts), the n-gram drafts of section 3.6 (jaxzoo.nn.ngrams).",
    "differs": "The paper's implementation is not published; this follows its text. "
    "In a round the first call of the draft reads two tokens, so that no call is spent "
    "on the last one that it wrote, and prompts have at least two. Trees of drafts, "
    "independent ones, are not the paper's but SpecInfer's (2305.09781). Neither "
    "lenience nor beam search; arithmetic operations (theorem 3.11) are not counted. "
    "The experiment has byte models of less than 0.1 million parameters "
    "on a novel, not T5-XXL, and counts calls, not seconds. For text that is sampled, "
    "acceptance and bytes per call are within 0.6 % of what E TV and the formula say. "
    "For greedy text they are not: drafts are kept up to 6 % less often, and a call "
    "writes up to 11 % fewer bytes, as rates of successive greedy bytes are far from "
    "independent.",
}

__all__ = ["acceptance_rate", "expected_tokens", "speculative_decode", "speed_up"]

_MOST = 64


@typed
def acceptance_rate(
    target_logits: Float[ArrayLike, "*batch vocabulary"],
    draft_logits: Float[ArrayLike, "*batch vocabulary"],
) -> Float[Array, "*batch"]:
    """The probability that a token drawn from the draft is kept.

    a = sum_x min(p(x), q(x)) = 1 - TV(p, q)

    Args:
        target_logits: log p up to a constant, `[..., V]`.
        draft_logits: log q likewise.

    Returns:
        float32 `[...]`, in [0, 1].

    >>> p, q = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, 0.2, 0.6])
    >>> acceptance_rate(jnp.log(p), jnp.log(q))
    Array(0.6, dtype=float32)
    """
    log_p = jax.nn.log_softmax(as_float32(target_logits))
    log_q = jax.nn.log_softmax(as_float32(draft_logits))
    return jnp.sum(jnp.exp(jnp.minimum(log_p, log_q)), axis=-1)


@typed
def expected_tokens(
    acceptance: Float[ArrayLike, "*batch"], *, drafts: int = 4
) -> Float[Array, "*batch"]:
    """Tokens per call of the target, if the rates of successive drafts are independent.

    (1 - a^(drafts + 1)) / (1 - a) = 1 + a + .. + a^drafts

    Args:
        acceptance: a in [0, 1]; what is outside counts as the nearest end.
        drafts: how many tokens are drafted for a call.

    Returns:
        float32, 1 to drafts + 1.

    >>> expected_tokens(jnp.array([0.0, 0.8, 1.0]), drafts=5).tolist()
    [1.0, 3.689, 6.0]
    """
    check_range("drafts", drafts, low=1)
    return _sums(acceptance, drafts)[-1]


@typed
def speed_up(
    acceptance: Float[ArrayLike, "*batch"], *, cost_ratio: float = 0.05
) -> tuple[Float[Array, "*batch"], Int[Array, "*batch"]]:
    """How much faster than one call for each token, with the best number of drafts.

    max_G expected_tokens(a, G) / (G cost_ratio + 1),  G = 0 to 64

    where the target takes no longer to score G + 1 tokens than to score one.

    Args:
        acceptance: a in [0, 1].
        cost_ratio: time of a call of the draft over that of the target, >= 0.

    Returns:
        The factor, float32, and G, int32; where no number pays, 1 and 0.

    >>> [x.item() for x in speed_up(jnp.array(0.8), cost_ratio=0.05)]
    [3.092, 8]
    """
    check_range("cost_ratio", cost_ratio, low=0, below=float("inf"))
    sums = _sums(acceptance, _MOST)
    count = jnp.arange(_MOST + 1, dtype=sums.dtype)
    count = count.reshape(-1, *[1] * (sums.ndim - 1))
    factors = sums / (count * cost_ratio + 1)
    best = jnp.argmax(factors, axis=0).astype(jnp.int32)
    return jnp.take_along_axis(factors, best[None], axis=0)[0], best


@typed
def speculative_decode(
    key: Key[Array, ""],
    target: Callable[[Any, Array], tuple[Array, Any]],
    draft: Callable[[Any, Array], tuple[Array, Any]],
    prompt: Integer[ArrayLike, "batch prompt"], *,
    target_state: Any, draft_state: Any, num_tokens: int, num_drafted: int = 4,
    branches: int = 1, lengths: Integer[ArrayLike, " batch"] | None = None,
    adjust: Callable[[Array], Array] | None = None,
    rewind: Callable[[Any, Array | None, Array], Any] | None = None,
) -> tuple[Int[Array, "batch num_tokens"], dict[str, Array]]:  # fmt: skip
    """Writes what the target would, several tokens for each of its calls.

    Each round calls the draft `num_drafted` times, first with two tokens and then with
    one, and the target once with num_drafted + 1.

    Args:
        key: a typed key, consumed.
        target: `(state, tokens [B, K]) -> (logits [B, K, V], state)` reads tokens and
            says what follows each.
        draft: likewise, of the same vocabulary.
        prompt: `[B, P]`, P >= 2.
        target_state: before the prompt: an empty cache. Caches need room for
            P + num_tokens + num_drafted tokens.
        draft_state: likewise.
        num_tokens: to write in each row.
        num_drafted: G, for each call of the target.
        branches: continuations that are drafted in each round; the target reads all of
            them in its one call, with as many copies of its state.
        lengths: `[B]`, 2 to P, where prompts are shorter and filled up at their ends.
        adjust: logits `[..., V]` to logits, of both models, such as
            `jaxzoo.nn.generate.adjusted_log_probs` with its numbers. None: as they are.
        rewind: `(state, rows [R], count [R]) -> state` takes these rows of a state, all
            if they are None, and forgets the last tokens of each. None: `count` off the
            `lengths`, `[B]` or `[depth, B]`, of a NamedTuple such as
            `jaxzoo.nn.transformer.KVCache`, whose other leaves have their rows on the
            same axis; a state without arrays stays.

    Returns:
        The tokens, int32 `[B, num_tokens]`, and of each row `[B]`: "calls" of the
        target, drafts that were "kept", calls that ended with one "rejected", and
        "tokens_per_call", which is 1 + kept / calls.

    Raises:
        ValueError: a number is below 1, the prompt has less than two tokens, or a state
            has no `lengths`.

    >>> counts = 99 * jnp.eye(4)[jnp.array([1, 2, 3, 0])]  # a model that counts
    >>> model = lambda state, tokens: (counts[tokens], state)
    >>> text, aux = speculative_decode(
    ...     jax.random.key(0), model, model, jnp.array([[0, 1]]), target_state=(),
    ...     draft_state=(), num_tokens=6, num_drafted=2)
    >>> text.tolist(), aux["calls"].tolist(), aux["tokens_per_call"].tolist()
    ([[2, 3, 0, 1, 2, 3]], [2], [3.0])
    """
    check_range("num_tokens", num_tokens, low=1)
    check_range("num_drafted", num_drafted, low=1)
    check_range("branches", branches, low=1)
    rows, width = prompt.shape
    if width < 2:
        raise ValueError(f"argument 'prompt' has {width} tokens, expected at least 2.")
    adjust, rewind = adjust or jnp.asarray, rewind or _shorten
    prompt = jnp.asarray(prompt).astype(jnp.int32)
    begin = jnp.full((rows,), width, jnp.int32)
    if lengths is not None:
        begin = jnp.clip(jnp.asarray(lengths).astype(jnp.int32), 2, width)
    # The target has read all but the last token, the draft all but the last two: its
    # last draft is never read, and so what both have to forget is the same.
    _, reader = target(target_state, prompt[:, :-1])
    writer = draft_state
    if width > 2:
        _, writer = draft(writer, prompt[:, :-2])
    states = tuple(rewind(x, None, width - begin) for x in (reader, writer))
    text = jnp.pad(prompt, ((0, 0), (0, num_tokens + num_drafted + 1)))
    each = jnp.arange(rows)
    row, place = each[:, None], jnp.arange(num_drafted + 1)[None]
    forked = jnp.repeat(each, branches)

    def by_branch(x: Array) -> Array:
        return x.reshape(rows, branches, *x.shape[1:])

    def draw(key: Array, logits: Array) -> tuple[Array, Array]:
        logits = adjust(logits[:, -1])
        return jax.random.categorical(key, logits).astype(jnp.int32), logits

    def write(carry: Any, key: Array) -> Any:
        state, token = carry
        logits, state = draft(state, token[:, None])
        token, logits = draw(key, logits)
        return (state, token), (token, logits)

    def one_round(carry: Any) -> Any:
        key, text, ends, states, aux = carry
        key, draft_key, accept_key = jax.random.split(key, 3)
        keys = jax.random.split(draft_key, num_drafted)
        last = text[row, ends[:, None] + jnp.array([[-2, -1]])]
        if branches > 1:
            none = jnp.zeros_like(forked)
            states = tuple(rewind(x, forked, none) for x in states)
            last = last[forked]
        reader, writer = states
        logits, writer = draft(writer, last)
        first = draw(keys[0], logits)
        (writer, _), rest = jax.lax.scan(write, (writer, first[0]), keys[1:])
        drafted, log_q = (
            jnp.moveaxis(jnp.concatenate([one[None], more]), 0, 1)
            for one, more in zip(first, rest, strict=True)
        )
        logits, reader = target(reader, jnp.concatenate([last[:, 1:], drafted], axis=1))
        chosen = None
        if branches == 1:
            kept, token = speculative_accept(accept_key, adjust(logits), log_q, drafted)
        else:
            parts = (by_branch(x) for x in (adjust(logits), log_q, drafted))
            kept, token, branch = tree_accept(accept_key, *parts)
            chosen = each * branches + branch
            drafted = drafted[chosen]
        news = jnp.pad(drafted, ((0, 0), (0, 1)))
        news = jnp.where(place == kept[:, None], token[:, None], news)
        text = text.at[row, ends[:, None] + place].set(news)
        # A row that is complete goes along and does not move.
        moved = jnp.minimum(kept + 1, begin + num_tokens - ends)
        count = num_drafted + 1 - moved
        states = tuple(rewind(x, chosen, count) for x in (reader, writer))
        rejected = (kept < num_drafted).astype(jnp.int32)
        more = {"calls": jnp.ones_like(kept), "kept": kept, "rejected": rejected}
        aux = {k: aux[k] + jnp.where(moved > 0, more[k], 0) for k in aux}
        return key, text, ends + moved, states, aux

    aux = dict.fromkeys(("calls", "kept", "rejected"), jnp.zeros_like(begin))
    carry: Any = (key, text, begin, states, aux)
    _, text, _, _, aux = jax.lax.while_loop(
        lambda carry: jnp.any(carry[2] < begin + num_tokens), one_round, carry
    )
    aux["tokens_per_call"] = 1 + aux["kept"] / aux["calls"].astype(jnp.float32)
    return text[row, begin[:, None] + jnp.arange(num_tokens)[None]], aux


def _sums(acceptance: ArrayLike, most: int) -> Array:
    """1 + a + .. + a^n for n = 0 to `most`, by Horner's rule: a = 1 is no exception."""
    a = as_float32(acceptance)
    a = jnp.where(a < 0, 0.0, jnp.where(a > 1, 1.0, a))

    def step(total: Array, _: None) -> tuple[Array, Array]:
        return 1 + a * total, total

    last, sums = jax.lax.scan(step, jnp.ones_like(a), None, length=most)
    return jnp.concatenate([sums, last[None]])


def _shorten(state: Any, rows: Array | None, count: Array) -> Any:
    if not jax.tree.leaves(state):
        return state
    if not hasattr(state, "lengths"):
        raise ValueError(
            "argument 'rewind' is None, expected a function for a state without "
            "'lengths'."
        )
    axis = state.lengths.ndim - 1
    if rows is not None:
        state = jax.tree.map(lambda x: jnp.take(x, rows, axis=axis), state)
    lengths = state.lengths
    return state._replace(lengths=lengths - jnp.broadcast_to(count, lengths.shape))


def _written(key: Array) -> Any:
    tables = jax.random.normal(jax.random.key(1), (2, 5, 5))
    models = [lambda state, x, t=t: (t[x], state) for t in tables]
    prompt = jax.random.randint(key, (8, 3), 0, 5)
    sizes = {"num_tokens": 7, "num_drafted": 3}
    return (key, *models, prompt), {"target_state": (), "draft_state": (), **sizes}


EXAMPLES = {
    acceptance_rate: lambda key: (tuple(jax.random.normal(key, (2, 8, 5))), {}),
    expected_tokens: lambda key: ((jax.random.uniform(key, (8,)),), {}),
    speculative_decode: _written,
    speed_up: lambda key: ((jax.random.uniform(key, (8,), minval=0.3),), {}),
}
