"""MambaByte: language models of bytes, measured in bits, drafted by a subword model.

The model is Mamba on 256 symbols, without a tokenizer:

    model = LanguageModel(256, width, MambaStack(Mamba(width), depth))

`bits_per_byte` compares it with models of other tokens. One byte at a time is slow: a
subword model drafts some, and the byte model reads them all in one parallel scan.
`accept_draft` keeps those before the first that is not among its beta likeliest, and
puts its own choice there; `speculative_decode` repeats it. `add_noise` damages texts,
which should cost a model without a tokenizer less.

A scan cannot forget what is rejected, nor does it know its state after what is kept. So
the state stays behind: it moves by whole blocks of num_drafted + 1 bytes, once they are
certain, and what follows is scanned again with each draft. Shapes are fixed, and any
model with a cache can verify.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key, UInt8

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "mambabyte",
    "title": "MambaByte: Token-free Selective State Space Model",
    "arxiv": "2401.13660",
    "year": 2024,
    "authors": "Junxiong Wang, Tushaar Gangavarapu, Jing Nathan Yan, Alexander M. Rush",
    "where": "The byte model, speculative decoding with a subword draft, and the "
    "synthetic noise of the experiments on robustness.",
    "differs": "A rejected byte is replaced, and drafting goes on, with subwords that "
    "agree with the bytes since the last whole one; the paper's byte model first "
    "writes up to a boundary. The state moves by blocks; the paper's kernel resumes "
    "from any. Antspeak is ByT5's without the last space; noise spares bytes from 128 "
    "on. There is no patch-based baseline. The experiment has models of 0.1 million "
    "parameters on a novel: random casing costs byte Mamba 0.93 times the bits that it "
    "costs subword Mamba, not 0.7 or less (0.17 times as a rise of the perplexity per "
    "word, which is exponential in bits); antspeak, drops, repeats and swaps cost it "
    "more bits than subword Mamba.",
}

__all__ = ["accept_draft", "add_noise", "bits_per_byte", "speculative_decode"]

Noise = Literal["antspeak", "drop", "random_case", "repeat", "swap", "uppercase"]


@typed
def bits_per_byte(
    nll: Float[ArrayLike, "*tokens"],
    num_bytes: Integer[ArrayLike, "*tokens"],
    *,
    where: Bool[ArrayLike, "*tokens"] | None = None,
) -> Float[Array, ""]:
    """What a text costs under a model of any tokens, in bits for each of its bytes.

    sum_i nll_i / (ln 2 sum_i bytes_i)

    Args:
        nll: -ln p of each token given those before, in nats.
        num_bytes: how many bytes of the text each token stands for; 1 for byte models.
        where: tokens that count; None: all.

    Returns:
        A number >= 0; 8 is a byte at random, and 0 what no byte at all costs.

    >>> bits_per_byte(jnp.log(jnp.array([4.0, 64.0])), jnp.array([1, 3]))  # 2 + 6 bits
    Array(2., dtype=float32)
    """
    nll, size = as_float32(nll), jnp.asarray(num_bytes).astype(jnp.float32)
    if where is not None:
        nll, size = jnp.where(where, nll, 0), jnp.where(where, size, 0)
    return jnp.sum(nll) / (
        math.log(2) * jnp.maximum(jnp.sum(size), 1).astype(nll.dtype)
    )


@typed
def accept_draft(
    logits: Float[ArrayLike, "*batch places vocabulary"],
    drafted: Int[ArrayLike, "*batch drafts"],
    *,
    beta: int = 3,
) -> tuple[Int[Array, "*batch"], Int[Array, "*batch"]]:
    """How many drafted bytes are kept, and the byte model's own choice after them.

    kept = the first i with rank(drafted_i) > beta;  choice = argmax logits_kept

    Args:
        logits: `[..., M + 1, V]` of the byte model; those at place i are of the byte
            that follows the first i drafts.
        drafted: `[..., M]`; what is not in [0, V) is never kept, so that -1 fills up a
            draft which is shorter.
        beta: the largest rank that is kept; 1 keeps the model's own choices alone. The
            likeliest byte has rank 1, and of equal ones the smallest comes first.

    Returns:
        Kept bytes, int32, 0 to M, and the choice, int32: the text goes on with both.

    Raises:
        ValueError: `beta` is below 1, or there is not one place more than drafts.

    >>> logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]))
    >>> [x.item() for x in accept_draft(logits, jnp.array([0, 0]), beta=2)]
    [1, 2]
    >>> [x.item() for x in accept_draft(logits, jnp.array([1, 2]), beta=2)]
    [2, 0]
    """
    check_range("beta", beta, low=1)
    if logits.shape[-2] != drafted.shape[-1] + 1:
        raise ValueError(
            f"argument 'logits' has {logits.shape[-2]} places, expected one more than "
            f"the {drafted.shape[-1]} of 'drafted'."
        )
    logits, draft = as_float32(logits), jnp.asarray(drafted)[..., None]
    symbol = jnp.arange(logits.shape[-1]).reshape((1,) * drafted.ndim + (-1,))
    scores, real = logits[..., :-1, :], (draft >= 0) & (draft < logits.shape[-1])
    own = jnp.take_along_axis(scores, jnp.where(real, draft, 0), axis=-1)
    before = (scores > own) | ((scores == own) & (symbol < draft))
    good = real[..., 0] & (jnp.sum(before, axis=-1) < beta)
    kept = jnp.sum(jnp.cumprod(good.astype(jnp.int32), axis=-1), axis=-1)
    choices = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    choice = jnp.take_along_axis(choices, kept[..., None], axis=-1)[..., 0]
    return kept.astype(jnp.int32), choice


@typed
def speculative_decode(
    verify: Callable[[Any, Array], tuple[Array, Any]],
    draft: Callable[[Any, Array, Array], tuple[Array, Any]],
    prompt: Integer[ArrayLike, " prompt"], *, verify_state: Any, draft_state: Any,
    num_bytes: int, num_drafted: int = 8, beta: int = 3,
) -> tuple[Int[Array, " num_bytes"], dict[str, Array]]:  # fmt: skip
    """Writes what the byte model would, up to its beta best, several bytes at a time.

    With beta = 1 the text is that of greedy decoding, whatever is drafted. `jax.vmap`
    over prompts decodes a batch.

    Args:
        verify: `(state, bytes [K]) -> (logits [K, V], state)` reads bytes, in one scan,
            and says what follows each. It is called with K = 2 num_drafted + 1 for
            logits and with num_drafted + 1 to move on; what it says of a byte must not
            depend on those after it.
        draft: `(state, news [num_drafted + 1], count) -> (drafted [num_drafted],
            state)` is told the bytes that were added since its last call, the first
            `count` of `news`: those that were kept, and one more. It drafts what
            follows, int32; -1 is no byte.
        prompt: bytes before those that are written, at least one.
        verify_state: before the prompt, with the structure that `verify` returns.
        draft_state: after the prompt, with the structure that `draft` returns. The
            first call has no news.
        num_bytes: to write.
        num_drafted: M, how many bytes are drafted at most.
        beta: as for `accept_draft`.

    Returns:
        The bytes, int32 `[num_bytes]`, and "rounds", how often the byte model was asked
        for logits; "offered", bytes that were drafted; "kept", those that were kept.

    Raises:
        ValueError: a number is below 1, or the prompt is empty.

    >>> after = jnp.array([1, 2, 3, 0])  # a model that counts, and a draft that adds 1
    >>> def verify(state, x): return jax.nn.one_hot(after[x], 4), state
    >>> def draft(last, news, count):
    ...     last = jnp.where(count > 0, news[count - 1], last)
    ...     return last + 1 + jnp.arange(2), last
    >>> text, aux = speculative_decode(
    ...     verify, draft, jnp.array([0]), verify_state=(), draft_state=0, num_bytes=7,
    ...     num_drafted=2, beta=1)
    >>> text.tolist(), aux["rounds"].item(), aux["kept"].item()
    ([1, 2, 3, 0, 1, 2, 3], 3, 4)
    """
    sizes = {"num_bytes": num_bytes, "num_drafted": num_drafted, "beta": beta}
    for name, value in sizes.items():
        check_range(name, value, low=1)
    if prompt.shape[0] < 1:
        raise ValueError("argument 'prompt' is empty, expected at least one byte.")
    known = jnp.asarray(prompt).astype(jnp.int32)
    if prompt.shape[0] > 1:
        verify_state = verify(verify_state, known[:-1])[1]
    size = num_drafted + 1
    text = jnp.zeros(1 + num_bytes + 2 * size, jnp.int32).at[0].set(known[-1])
    part = jax.lax.dynamic_slice_in_dim

    def one_round(carry: Any) -> Any:
        # Of `text` the first `end` bytes are certain, and `start` are in the state.
        text, start, end, fresh, states, aux = carry
        reader, writer = states
        news = part(text, end - fresh, size)
        drafted, writer = draft(writer, news, fresh)
        text = jax.lax.dynamic_update_slice(text, jnp.maximum(drafted, 0), (end,))
        logits, _ = verify(reader, part(text, start, 2 * size - 1))
        logits = part(logits, end - 1 - start, size)
        kept, choice = accept_draft(logits, drafted, beta=beta)
        text, end = text.at[end + kept].set(choice), end + kept + 1
        full = end - start > size  # the last byte stays out: its logits come next
        block = part(text, start, size)
        reader = jax.lax.cond(full, lambda: verify(reader, block)[1], lambda: reader)
        counts = {"rounds": 1, "offered": jnp.sum(drafted >= 0), "kept": kept}
        aux = {name: aux[name] + counts[name] for name in aux}
        start = start + size * full.astype(jnp.int32)
        return text, start, end, kept + 1, (reader, writer), aux

    zero = jnp.zeros((), jnp.int32)
    aux = dict.fromkeys(("rounds", "offered", "kept"), zero)
    first = (text, zero, zero + 1, zero, (verify_state, draft_state), aux)
    last = jax.lax.while_loop(lambda carry: carry[2] <= num_bytes, one_round, first)
    return last[0][1 : 1 + num_bytes], last[-1]


@typed
def add_noise(
    key: Key[Array, ""], text: UInt8[ArrayLike, " bytes"], *, kind: Noise,
    rate: float = 0.1,
) -> tuple[UInt8[Array, " room"], Int[Array, ""]]:  # fmt: skip
    """Damages a text as ByT5 and MambaByte do, byte by byte.

    Args:
        key: a typed key, consumed.
        text: uint8 `[T]`. Bytes from 128 on, parts of longer characters, stay.
        kind: "random_case" draws the case of every letter, "uppercase" makes all large;
            "antspeak" does too, and puts a space before each byte; "drop" removes
            bytes, "repeat" adds one to three copies, "swap" exchanges a byte with the
            next one, from left to right, no byte twice.
        rate: probability per byte, 0 to 1, of the last three.

    Returns:
        uint8 `[room]`, with zeros after its end, and the number of its bytes, int32.
        The room is T; 2 T for "antspeak", 4 T for "repeat".

    Raises:
        ValueError: `rate` is not in [0, 1].

    >>> text = jnp.frombuffer(b"an owl", jnp.uint8)
    >>> bytes(add_noise(jax.random.key(0), text, kind="antspeak")[0].tolist())
    b' A N   O W L'
    >>> noisy, length = add_noise(jax.random.key(3), text, kind="drop", rate=0.5)
    >>> bytes(noisy.tolist()), length.item()
    (b'wl\\x00\\x00\\x00\\x00', 2)
    """
    check_range("rate", rate, low=0, high=1)
    text, length = jnp.asarray(text), text.shape[0]
    small = (text >= 97) & (text <= 122)
    letter = small | ((text >= 65) & (text <= 90))
    large = jnp.where(small, text - 32, text).astype(jnp.uint8)
    rate = 0.5 if kind == "random_case" else rate
    key, copies_key = jax.random.split(key)
    draw = jax.random.bernoulli(key, rate, (length,))
    here = draw & (text < 128)
    match kind:
        case "uppercase":
            text = large
        case "random_case":
            text = jnp.where(letter, large + 32 * draw.astype(jnp.uint8), text)
        case "antspeak":
            text = jnp.stack([jnp.full_like(large, 32), large], axis=1).reshape(-1)
        case "swap":
            place = jnp.arange(length)
            # In a run of draws those at even places count; the others overlap.
            begin = jax.lax.cummax(jnp.where(here, -1, place), axis=0)
            ahead = jnp.roll(text, -1)
            fits = (ahead < 128) & (place < length - 1)
            first = here & ((place - begin) % 2 == 1) & fits
            second = jnp.roll(first, 1)
            text = jnp.where(first, ahead, jnp.where(second, jnp.roll(text, 1), text))
        case "drop":
            return _spread(text, 1 - here.astype(jnp.int32), length)
        case "repeat":
            more = jax.random.randint(copies_key, (length,), 1, 4)
            return _spread(text, 1 + jnp.where(here, more, 0), 4 * length)
    return text, jnp.full((), text.shape[0], jnp.int32)


def _spread(text: Array, copies: Array, room: int) -> tuple[Array, Array]:
    """Each byte as often as `copies` says, one after the other; then zeros."""
    ends, place = jnp.cumsum(copies), jnp.arange(room)
    source = jnp.searchsorted(ends, place, side="right")
    filled = text[jnp.minimum(source, text.shape[0] - 1)]
    length = jnp.sum(copies).astype(jnp.int32)
    return jnp.where(place < length, filled, 0).astype(jnp.uint8), length


def _read(state: Array, x: Array) -> tuple[Array, Array]:
    """A linear recurrence of four symbols."""

    def step(state: Array, symbol: Array) -> tuple[Array, Array]:
        state = 0.5 * state + symbol
        return state, jnp.cos(state * jnp.arange(5.0, 9.0))

    state, logits = jax.lax.scan(step, state, x)
    return logits, state


def _write(state: Array, news: Array, count: Array) -> tuple[Array, Array]:
    return (news[0] + jnp.arange(3)) % 4, state + count


def _spoken(key: Array) -> Any:
    states = {"verify_state": jnp.zeros(()), "draft_state": jnp.zeros((), jnp.int32)}
    prompt = jax.random.randint(key, (3,), 0, 4)
    return (_read, _write, prompt), states | {"num_bytes": 9, "num_drafted": 3}


EXAMPLES = {
    bits_per_byte: lambda key: (
        (jax.random.uniform(key, (8, 3)), jnp.arange(1, 25).reshape(8, 3)),
        {"where": jnp.arange(24).reshape(8, 3) % 5 > 0},
    ),
    accept_draft: lambda key: (
        (jax.random.normal(key, (8, 4, 5)), jnp.arange(24).reshape(8, 3) % 5), {}
    ),
    speculative_decode: _spoken,
    add_noise: lambda key: ((key, jnp.arange(40, dtype=jnp.uint8)), {"kind": "repeat"}),
}  # fmt: skip
