"""Speculative decoding: several tokens of a large model per call, drawn as if by one.

A small model drafts x_1 .. x_G from q, the large one scores them in one call, and

    x_i is kept with probability min(1, p(x_i) / q(x_i));
    the first that is not is drawn again from max(p - q, 0) / sum max(p - q, 0);
    if all are kept, one more comes from p.

Whatever q is, the tokens have the distribution p. A draft is kept with probability
a = sum min(p, q) = 1 - TV(p, q), so that a call of the large model gives, if the a of
successive tokens are independent,

    1 + a + .. + a^G = (1 - a^(G+1)) / (1 - a)

tokens. Two transformers with a cache each:

    text, aux = speculative_decode(
        key, target, draft, prompt, target_state=cache, draft_state=small_cache,
        num_tokens=64, adjust=functools.partial(adjusted_log_probs, temperature=0.7))

Rows of a batch keep different numbers of drafts: each goes on from its own length, and
what was read too much is forgotten by making the lengths of the caches smaller. With
`branches` the draft writes several continuations, a tree that begins in one place, of
which the first token that is kept decides who goes on (`tree_accept`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "speculative_decoding",
    "title": "Fast Inference from Transformers via Speculative Decoding",
    "arxiv": "2211.17192",
    "year": 2023,
    "authors": "Yaniv Leviathan, Matan Kalman, Yossi Matias",
    "where": "Algorithm 1, section 2.2 (adjusted p and q), theorem 3.5 and corollary "
    "3.6 (acceptance), equation 1, theorem 3.8 and section 3.5 (the best number of "
    "drafts), the n-gram drafts of section 3.6.",
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

__all__ = [
    "acceptance_rate",
    "adjusted_log_probs",
    "expected_tokens",
    "ngram_log_probs",
    "speculative_accept",
    "speculative_decode",
    "speed_up",
    "tree_accept",
]

_MOST = 64


@typed
def adjusted_log_probs(
    logits: Float[ArrayLike, "*batch vocabulary"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Float[Array, "*batch vocabulary"]:
    """What tokens are drawn from, so that every way of drawing is one from a softmax.

    log softmax(logits / temperature) over the `top_k` largest, -inf for the others

    Args:
        logits: `[..., V]`.
        temperature: >= 0; 0 is greedy, all of the probability on the largest.
        top_k: tokens that stay, of equal ones the first; None: all.

    Returns:
        Log probabilities in nats, float32 `[..., V]`.

    Raises:
        ValueError: a number is out of range.

    >>> logits = jnp.log(jnp.array([0.5, 0.1, 0.4]))
    >>> jnp.exp(adjusted_log_probs(logits, temperature=0.5, top_k=2)).tolist()
    [0.610, 0.0, 0.390]
    """
    check_range("temperature", temperature, low=0, below=float("inf"))
    if top_k is not None:
        check_range("top_k", top_k, low=1)
    logits = as_float32(logits)
    count = 1 if temperature == 0 else top_k
    if count is not None and count < logits.shape[-1]:
        _, best = jax.lax.top_k(logits, count)
        none = jnp.zeros(logits.shape, bool)
        keep = jnp.put_along_axis(none, best, True, axis=-1, inplace=False)
        logits = jnp.where(keep, logits, -jnp.inf)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # Less the largest first: a small temperature would send it to infinity.
    logits = (logits - jax.lax.stop_gradient(largest)) / (temperature or 1.0)
    return jax.nn.log_softmax(logits)


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
    log_p, log_q = _normalised(target_logits), _normalised(draft_logits)
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
def ngram_log_probs(
    text: Integer[ArrayLike, " length"],
    *,
    vocabulary: int,
    order: int = 2,
    pseudocount: float = 1.0,
) -> Float[Array, "..."]:
    """A draft that costs nothing: n-grams of a text, smoothed by those one shorter.

    p(x | c_1 c_2 ..) = (N(c x) + pseudocount p(x | c_2 ..)) / (N(c) + pseudocount)

    and p(x) by the same rule from uniform.

    Args:
        text: integers in [0, V), `[T]`.
        vocabulary: V.
        order: n, 2 for bigrams.
        pseudocount: what the shorter n-gram counts, > 0.

    Returns:
        log p, float32 `[V, .., V]` with n axes: contexts, oldest first, and the token.

    Raises:
        ValueError: a number is out of range.

    >>> table = ngram_log_probs(jnp.array([0, 1, 0, 1, 0]), vocabulary=2)
    >>> jnp.exp(table).tolist()  # p(0) = (3 + 0.5) / 6
    [[0.194, 0.806], [0.861, 0.139]]
    >>> draft = lambda state, tokens: (table[tokens], state)  # for `speculative_decode`
    """
    check_range("vocabulary", vocabulary, low=1)
    check_range("order", order, low=1)
    check_range("pseudocount", pseudocount, above=0, below=float("inf"))
    text, length = jnp.asarray(text), text.shape[0]
    probs = jnp.full((vocabulary,), 1 / vocabulary, jnp.float32)
    for n in range(1, order + 1):
        shape = (vocabulary,) * n
        grams = tuple(text[i : max(length - n + 1, 0) + i] for i in range(n))
        counts = jnp.zeros(shape, jnp.float32).at[grams].add(1.0, mode="drop")
        shorter = jnp.broadcast_to(probs, shape)
        total = jnp.sum(counts, axis=-1, keepdims=True)
        probs = (counts + pseudocount * shorter) / (total + pseudocount)
    return jnp.log(probs)


@typed
def speculative_accept(
    key: Key[Array, ""],
    target_logits: Float[ArrayLike, "*batch places vocabulary"],
    draft_logits: Float[ArrayLike, "*batch drafts vocabulary"],
    drafted: Integer[ArrayLike, "*batch drafts"],
) -> tuple[Int[Array, "*batch"], Int[Array, "*batch"]]:
    """How many drafts are kept, and the token after them: together drawn from p.

    Args:
        key: a typed key, consumed.
        target_logits: log p up to a constant, `[..., G + 1, V]`; place i follows the
            first i drafts.
        draft_logits: log q likewise, `[..., G, V]`, which the drafts were drawn from.
        drafted: `[..., G]`, in [0, V).

    Returns:
        Kept drafts, int32, 0 to G, and the next token, int32: drawn from normalised
        max(p - q, 0) after a rejection, and otherwise from p.

    Raises:
        ValueError: there is not one place more than drafts.

    >>> p, q = jnp.array([[0.0, 0.0, 1.0]] * 3), jnp.array([[0.5, 0.0, 0.5]] * 2)
    >>> kept, token = speculative_accept(
    ...     jax.random.key(0), jnp.log(p), jnp.log(q), jnp.array([2, 0]))
    >>> kept.item(), token.item()  # p(0) = 0
    (1, 2)
    """
    if target_logits.shape[-2] != drafted.shape[-1] + 1:
        raise ValueError(
            f"argument 'target_logits' has {target_logits.shape[-2]} places, expected "
            f"one more than the {drafted.shape[-1]} of 'drafted'."
        )
    accept_key, token_key = jax.random.split(key)
    log_p, log_q = _normalised(target_logits), _normalised(draft_logits)
    draft = jnp.asarray(drafted)[..., None]
    own_p = jnp.take_along_axis(log_p[..., :-1, :], draft, axis=-1)[..., 0]
    own_q = jnp.take_along_axis(log_q, draft, axis=-1)[..., 0]
    # Strictly less: u = 0 must not let a token through that the target never writes.
    log_u = jnp.log(jax.random.uniform(accept_key, drafted.shape, own_p.dtype))
    good = log_u < own_p - own_q
    kept = jnp.sum(jnp.cumprod(good.astype(jnp.int32), axis=-1), axis=-1)
    # After the last draft q is 0, and max(p - q, 0) is p.
    beyond = [(0, 0)] * (log_q.ndim - 2) + [(0, 1), (0, 0)]
    log_q = jnp.pad(log_q, beyond, constant_values=-jnp.inf)
    place = kept[..., None, None]
    log_p = jnp.take_along_axis(log_p, place, axis=-2)[..., 0, :]
    log_q = jnp.take_along_axis(log_q, place, axis=-2)[..., 0, :]
    token = jax.random.categorical(token_key, _residual(log_p, log_q))
    return kept.astype(jnp.int32), token.astype(jnp.int32)


@typed
def tree_accept(
    key: Key[Array, ""],
    target_logits: Float[ArrayLike, "*batch branches places vocabulary"],
    draft_logits: Float[ArrayLike, "*batch branches drafts vocabulary"],
    drafted: Integer[ArrayLike, "*batch branches drafts"],
) -> tuple[Int[Array, "*batch"], Int[Array, "*batch"], Int[Array, "*batch"]]:
    """How many drafts of which branch are kept, and the token after them: drawn from p.

    At each place the tokens of the branches that agree with what was kept are tried in
    turn, x with probability min(1, r(x) / q(x)): r is p at first, and after each that
    is not kept max(r - q, 0), normalised. If none is, the token comes from r.

    Args:
        key: a typed key, consumed.
        target_logits: log p up to a constant, `[..., K, G + 1, V]`; place i follows the
            first i drafts of that branch.
        draft_logits: log q likewise, `[..., K, G, V]`.
        drafted: `[..., K, G]` in [0, V), branches drawn independently of each other.

    Returns:
        Kept drafts, int32, 0 to G; the next token, int32; and a branch that begins with
        what was kept, int32.

    Raises:
        ValueError: there is not one place more than drafts.

    >>> p = jnp.array([[[0.0, 0.0, 1.0]] * 2] * 2)
    >>> q = jnp.array([[[0.5, 0.0, 0.5]]] * 2)
    >>> found = tree_accept(
    ...     jax.random.key(0), jnp.log(p), jnp.log(q), jnp.array([[0], [2]]))
    >>> [x.item() for x in found]  # p(0) = 0, and the second branch says 2
    [1, 2, 1]
    """
    if target_logits.shape[-2] != drafted.shape[-1] + 1:
        raise ValueError(
            f"argument 'target_logits' has {target_logits.shape[-2]} places, expected "
            f"one more than the {drafted.shape[-1]} of 'drafted'."
        )
    log_p, log_q = _normalised(target_logits), _normalised(draft_logits)
    tokens = jnp.asarray(drafted)
    *batch, branches, drafts = tokens.shape

    def one(key: Array, log_p: Array, log_q: Array, tokens: Array) -> Any:
        accept_key, token_key = jax.random.split(key)
        log_u = jnp.log(jax.random.uniform(accept_key, (drafts, branches), log_p.dtype))

        def place(carry: Any, i: Array) -> Any:
            agrees, is_open, kept = carry
            # Branches that agree have read the same: the first tells p and q of all.
            first = jnp.argmax(agrees)
            q = log_q[first, i]

            def candidate(carry: Any, k: Array) -> Any:
                left, found, token = carry
                x = tokens[k, i]
                is_tried = agrees[k] & is_open & ~found
                is_good = is_tried & (log_u[i, k] < left[x] - q[x])
                rest = jax.nn.log_softmax(_residual(left, q))
                left = jnp.where(is_tried & ~is_good, rest, left)
                return (left, found | is_good, jnp.where(is_good, x, token)), None

            start = log_p[first, i], jnp.zeros((), bool), jnp.zeros_like(tokens[0, 0])
            (left, found, token), _ = jax.lax.scan(
                candidate, start, jnp.arange(branches)
            )
            agrees = jnp.where(found, agrees & (tokens[:, i] == token), agrees)
            return (agrees, found, kept + found), (left, is_open)

        begin = jnp.ones(branches, bool), jnp.ones((), bool), jnp.zeros((), jnp.int32)
        (agrees, is_open, kept), (left, was_open) = jax.lax.scan(
            place, begin, jnp.arange(drafts)
        )
        branch = jnp.argmax(agrees)
        # The place where nobody was kept is the last that was open.
        last = jnp.where(is_open, log_p[branch, drafts], left[jnp.sum(was_open) - 1])
        token = jax.random.categorical(token_key, last)
        return kept, token.astype(jnp.int32), branch.astype(jnp.int32)

    for _ in batch:
        one = jax.vmap(one)
    return one(jax.random.split(key, tuple(batch)), log_p, log_q, tokens)


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
        adjust: logits `[..., V]` to logits, of both models: `adjusted_log_probs` with
            its numbers, or any other way of drawing. None: as they are.
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

    >>> counts = 9 * jnp.eye(4)[jnp.array([1, 2, 3, 0])]  # a model that counts
    >>> model = lambda state, tokens: (counts[tokens], state)
    >>> text, aux = speculative_decode(
    ...     jax.random.key(0), model, model, jnp.array([[0, 1]]), target_state=(),
    ...     draft_state=(), num_tokens=6, num_drafted=2,
    ...     adjust=lambda logits: adjusted_log_probs(logits, temperature=0.0))
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


def _normalised(logits: ArrayLike) -> Array:
    return jax.nn.log_softmax(as_float32(logits))


def _residual(log_p: Array, log_q: Array) -> Array:
    """log max(p - q, 0), and log p where nothing is left because p = q."""
    is_more = log_p > log_q
    gap = jnp.where(is_more, log_q - log_p, -1.0)
    left = jnp.where(is_more, log_p + jnp.log(-jnp.expm1(gap)), -jnp.inf)
    return jnp.where(jnp.any(is_more, axis=-1, keepdims=True), left, log_p)


def _sums(acceptance: ArrayLike, most: int) -> Array:
    """1 + a + .. + a^n for n = 0 to `most`, by Horner's rule: a = 1 is no exception."""
    a = as_float32(acceptance)
    a = jnp.where(a < 0, 0.0, jnp.where(a > 1, 1.0, a))
    one = jnp.ones_like(a)

    def step(total: Array, _: None) -> tuple[Array, Array]:
        return 1 + a * total, total

    last, sums = jax.lax.scan(step, one, None, length=most)
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


def _pair(key: Array) -> list[Array]:
    return [jax.random.normal(k, (8, 5)) for k in jax.random.split(key)]


def _drafts(key: Array) -> Any:
    logits = jax.random.normal(key, (2, 8, 4, 5))
    drafted = jax.random.randint(key, (8, 3), 0, 5)
    return (key, logits[0], logits[1, :, :-1], drafted), {}


def _written(key: Array) -> Any:
    tables = jax.random.normal(jax.random.key(1), (2, 5, 5))
    models = [lambda state, x, t=t: (t[x], state) for t in tables]
    prompt = jax.random.randint(key, (8, 3), 0, 5)
    sizes = {"num_tokens": 7, "num_drafted": 3}
    return (key, *models, prompt), {"target_state": (), "draft_state": (), **sizes}


def _tree(key: Array) -> Any:
    logits = jax.random.normal(key, (2, 8, 1, 4, 5))
    target, draft = jnp.tile(logits, (1, 1, 3, 1, 1))
    return (
        key,
        target,
        draft[..., :-1, :],
        jax.random.randint(key, (8, 3, 3), 0, 5),
    ), {}


EXAMPLES = {
    acceptance_rate: lambda key: (tuple(_pair(key)), {}),
    adjusted_log_probs: lambda key: ((_pair(key)[0],), {"temperature": 0.7}),
    expected_tokens: lambda key: ((jax.random.uniform(key, (8,)),), {}),
    ngram_log_probs: lambda key: (
        (jax.random.randint(key, (40,), 0, 5),), {"vocabulary": 5, "order": 3}
    ),
    speculative_accept: _drafts,
    speculative_decode: _written,
    speed_up: lambda key: ((jax.random.uniform(key, (8,), minval=0.3),), {}),
    tree_accept: _tree,
}  # fmt: skip
