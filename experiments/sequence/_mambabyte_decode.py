"""Writing with a byte model: greedily, and with what a subword model drafts."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.sequence._mambabyte_bpe import Vocabulary, encode
from experiments.sequence._mambabyte_models import over_seeds
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.sequence.mambabyte import speculative_decode

__all__ = ["decoded", "drafter", "greedy", "reader", "state_bytes"]


def decoded(
    nets: dict[str, Any], params: dict[str, Any], vocabulary: Vocabulary,
    test: np.ndarray, *, prompts: int, prompt_tokens: int, written: int, drafted: int,
    words: int, betas: tuple[int, ...],
) -> tuple[np.ndarray, dict[int, Any]]:  # fmt: skip
    """What byte Mamba writes alone, and for each beta with what subword Mamba drafts.

    Args:
        nets: "mamba" and "subword".
        params: of both, of all seeds.
        vocabulary: the subwords.
        test: text that is cut into prompts.
        prompts: how many.
        prompt_tokens: of each, subwords for the one, and as many bytes for the other.
        written: bytes.
        drafted: bytes of a draft at most.
        words: its subwords.
        betas: as of `accept_draft`.

    Returns:
        Bytes `[seeds, prompts, written]`, and by beta the same with counts.
    """
    table, sizes = jnp.asarray(vocabulary.table()), jnp.asarray(vocabulary.sizes)
    tokens = encode(vocabulary, test)
    ends = np.cumsum(vocabulary.sizes[tokens])
    starts = (
        (2 * np.arange(prompts) + 1) * (len(tokens) - prompt_tokens) // (2 * prompts)
    )
    several = np.stack([tokens[s : s + prompt_tokens] for s in starts])
    # Both end at the same byte.
    places = ends[starts + prompt_tokens - 1]
    texts = np.stack([test[p - prompt_tokens : p] for p in places]).astype(np.int32)

    def empty(net: Any, params: Any) -> Any:
        one = jnp.zeros((1, 1), jnp.int32)
        cache = jax.eval_shape(lambda: net.apply(params, one)[1])
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)

    def one_seed(params: Any, drafting: Any) -> Any:
        read = reader(nets["mamba"], params)
        cache, none = empty(nets["mamba"], params), empty(nets["subword"], drafting)
        read_words = reader(nets["subword"], drafting)
        start, draft = drafter(read_words, table, sizes, words, drafted)

        def one(prompt: jax.Array, tokens: jax.Array) -> Any:
            def speculative(beta: int) -> Any:
                return speculative_decode(
                    read, draft, prompt, verify_state=cache,
                    draft_state=start(none, tokens), num_bytes=written,
                    num_drafted=drafted, beta=beta,
                )  # fmt: skip

            alone = greedy(read, cache, prompt, written)
            return alone, {beta: speculative(beta) for beta in betas}

        return jax.vmap(one)(jnp.asarray(texts), jnp.asarray(several))

    run = jax.jit(functools.partial(over_seeds, one_seed))
    return jax.device_get(run(params["mamba"], params["subword"]))


def state_bytes(net: Any, length: int) -> int:
    """Bytes of the arrays that are carried from one byte to the next."""
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    cache = None
    if hasattr(net.body, "empty_cache"):
        cache = jax.eval_shape(lambda: net.body.empty_cache(1, length))
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    _, cache = jax.eval_shape(net.apply, params, tokens, cache)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def reader(net: LanguageModel, params: Any) -> Callable[[Any, jax.Array], Any]:
    """Reads tokens `[K]` after a cache: what follows each, and the cache after them."""

    def read(cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        logits, cache = net.apply(params, tokens[None], cache)
        return logits[0], cache

    return read


def greedy(read: Callable[..., Any], cache: Any, prompt: jax.Array, count: int) -> Any:
    """The likeliest byte, one after the other, each by a step of its own."""
    logits, cache = read(cache, prompt)

    def step(carry: Any, _: Any) -> Any:
        cache, byte = carry
        logits, cache = read(cache, byte[None])
        return (cache, jnp.argmax(logits[0]).astype(jnp.int32)), byte

    first = cache, jnp.argmax(logits[-1]).astype(jnp.int32)
    return lax.scan(step, first, None, length=count)[1]


def drafter(
    read: Callable[..., Any], table: jax.Array, sizes: jax.Array, words: int, room: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Drafts the likeliest `words` subwords, at most `room` bytes of them.

    It goes on from the last subword that was kept whole. Of the bytes after that, which
    may end within a word, the next subwords must be a continuation: each is the
    likeliest of those that agree with them.

    Args:
        read: as `reader` makes it, of the subword model.
        table: the bytes of each subword, `[V, longest]`.
        sizes: how many they are.
        words: subwords of a draft.
        room: bytes of a draft.

    Returns:
        `start(cache, tokens) -> state` reads a prompt; `draft` is the argument of
        `speculative_decode`.
    """
    longest = table.shape[1]
    place = jnp.arange(longest)[None]

    def start(cache: Any, tokens: jax.Array) -> Any:
        logits, cache = read(cache, tokens)
        now = cache, logits[-1]
        steps = jax.tree.map(lambda x: jnp.stack([x] * (words + 1)), now)
        known = jnp.zeros(2 * longest + room + 2, jnp.int32)
        return steps, jnp.zeros(words + 1, jnp.int32), known, jnp.zeros((), jnp.int32)

    def step(carry: Any, _: Any) -> Any:
        (cache, scores), rest, left = carry
        agree = (table == rest[None, :longest]) | (place >= left)
        agree = jnp.all(agree | (place >= sizes[:, None]), axis=1)
        token = jnp.argmax(jnp.where(agree, scores, -jnp.inf))
        logits, after = read(cache, token[None])
        left = jnp.maximum(left - sizes[token], 0)
        rest = jnp.roll(rest, -sizes[token])
        return ((after, logits[0]), rest, left), ((cache, scores), token)

    def draft(state: Any, news: jax.Array, count: jax.Array) -> Any:
        # A cache before each subword of the last draft and after all, where they end,
        # and the bytes that are known to follow the first cache.
        steps, ends, known, have = state
        known = lax.dynamic_update_slice(known, news, (have,))
        # The last of the news is the byte model's own and was not drafted.
        whole = jnp.maximum(jnp.sum(ends <= have + count - 1) - 1, 0)
        known, have = jnp.roll(known, -ends[whole]), have + count - ends[whole]
        now = jax.tree.map(lambda x: x[whole], steps)
        carry, (steps, tokens) = lax.scan(step, (now, known, have), None, length=words)
        steps = jax.tree.map(
            lambda all, one: jnp.concatenate([all, one[None]]), steps, carry[0]
        )
        ends = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes[tokens])])
        there = ends[:-1, None] + place - have
        there = jnp.where((place < sizes[tokens][:, None]) & (there >= 0), there, room)
        drafted = jnp.full(room, -1, jnp.int32)
        drafted = drafted.at[there].set(table[tokens], mode="drop")
        return drafted, (steps, ends, known, have)

    return start, draft
