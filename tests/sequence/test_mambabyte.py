"""Ranks, drafts and noise against plain loops; Mamba and a transformer that verify."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from experiments.sequence._mambabyte_decode import greedy, reader
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.mamba import Mamba, MambaStack
from jaxzoo.nn.transformer import Transformer
from jaxzoo.sequence.mambabyte import (
    accept_draft,
    add_noise,
    bits_per_byte,
    speculative_decode,
)

VERSE = "“Call me Ishmael.” Some years ago—never mind how long precisely—\n" * 3
TEXT = np.frombuffer(VERSE.encode(), np.uint8)
seeds = st.integers(0, 2**31 - 1)


def drawn(seed, *shape, high=4):
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.int32)


def test_bits_are_the_same_for_bytes_and_for_subwords():
    """p = 2^-1, 2^-2, ..., which words multiply: the sum of the exponents, per byte."""
    exponents = np.arange(1, 9)
    each = (exponents * np.log(2)).astype(np.float32)
    assert_near = functools.partial(assert_allclose, rtol=1e-6)
    assert_near(bits_per_byte(each, np.ones(8, int)), exponents.sum() / 8)
    words = np.array([each[:3].sum(), each[3:4].sum(), each[4:].sum()])
    sizes = np.array([3, 1, 4])
    assert_near(bits_per_byte(words, sizes), exponents.sum() / 8)
    padded = np.append(words, np.float32(np.nan)), np.append(sizes, 99)
    mask = np.array([True, True, True, False])
    assert_near(bits_per_byte(*padded, where=mask), exponents.sum() / 8)
    assert bits_per_byte(words, sizes, where=np.zeros(3, bool)) == 0


def accepted(logits, drafted, beta):
    """By the place in a stable sort: of equal bytes the first comes first."""
    for i, byte in enumerate(drafted):
        order = list(np.argsort(-logits[i].astype(np.float64), kind="stable"))
        if byte not in order or order.index(byte) >= beta:
            break
    else:
        i = len(drafted)
    return i, int(np.argmax(logits[i]))


@functools.lru_cache
def accept(beta):
    return jax.jit(functools.partial(accept_draft, beta=beta))


@settings(max_examples=200, deadline=None)
@given(seeds, st.sampled_from([1, 2, 3, 5]))
def test_acceptance_by_sorting(seed, beta):
    logits = drawn(seed, 3, 6, 5, high=3).astype(np.float32)  # with many ties
    drafted = drawn(seed + 1, 3, 5, high=7) - 1  # some of which are no bytes
    drafted[0] = np.argmax(logits[0, :-1], axis=-1)
    got = accept(beta)(logits, drafted)
    expected = [accepted(*row, beta) for row in zip(logits, drafted, strict=True)]
    assert_array_equal(np.stack(got, axis=1), expected)


def test_acceptance_grows_with_beta():
    logits = np.random.default_rng(0).normal(size=(4000, 9, 16)).astype(np.float32)
    drafted = drawn(1, 4000, 8, high=16)
    kept = np.stack(
        [accept_draft(logits, drafted, beta=b)[0] for b in (1, 4, 12, 16)]
    ).mean(axis=1)
    assert np.all(np.diff(kept) > 0) and kept[-1] == 8
    # Ranks are uniform, and drafts are kept up to the first failure.
    assert_allclose(kept[2], sum(0.75**i for i in range(1, 9)), rtol=0.05)


# Models as tables: the next byte depends on the last three, drafts on the last one.

SYMBOLS = 5
TABLE = np.random.default_rng(0).normal(size=(SYMBOLS,) * 4).astype(np.float32)
GUESSES = drawn(1, SYMBOLS, 4, high=SYMBOLS + 1) - 1  # -1: no draft


def verify(state, x):
    text = jnp.concatenate([state, x])
    places = jnp.arange(len(x))
    logits = jnp.asarray(TABLE)[text[places + 1], text[places + 2], text[places + 3]]
    return logits, text[-3:]


def draft(last, news, count, *, guesses=GUESSES):
    last = jnp.where(count > 0, news[count - 1], last)
    return jnp.asarray(guesses)[last], last


def by_hand(prompt, count, beta, guesses=GUESSES):
    text, rounds, offered, kept = [0, 0, 0, *prompt], 0, 0, 0
    begin = len(text)
    while len(text) < begin + count:
        drafted = list(guesses[text[-1]])
        tried = text + [max(byte, 0) for byte in drafted]
        ends = [len(text) + i for i in range(len(drafted) + 1)]
        logits = np.stack([TABLE[tuple(tried[e - 3 : e])] for e in ends])
        some, choice = accepted(logits, drafted, beta)
        text += [*drafted[:some], choice]
        rounds, kept = rounds + 1, kept + some
        offered += sum(byte >= 0 for byte in drafted)
    counts = {"rounds": rounds, "offered": offered, "kept": kept}
    return text[begin : begin + count], counts


@functools.lru_cache
def decode(count, beta, drafts=4):
    def run(prompt, guesses):
        return speculative_decode(
            verify, functools.partial(draft, guesses=guesses), prompt,
            verify_state=jnp.zeros(3, jnp.int32), draft_state=prompt[-1],
            num_bytes=count, num_drafted=drafts, beta=beta,
        )  # fmt: skip

    return jax.jit(run)


@pytest.mark.parametrize("count", [1, 5, 23])
@pytest.mark.parametrize("beta", [1, 2, 4])
def test_decoding_by_hand(count, beta):
    for seed in range(8):
        prompt = drawn(seed, 3, high=SYMBOLS)
        text, aux = decode(count, beta)(prompt, GUESSES)
        expected, counts = by_hand(prompt, count, beta)
        assert_array_equal(text, expected)
        assert {name: int(x) for name, x in aux.items()} == counts


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_whatever_is_drafted_beta_1_writes_greedily(seed):
    guesses = drawn(seed, SYMBOLS, 4, high=SYMBOLS + 1) - 1
    prompt = drawn(seed + 1, 3, high=SYMBOLS)
    expected, _ = by_hand(prompt, 23, 1, np.full((SYMBOLS, 4), -1))
    assert_array_equal(decode(23, 1)(prompt, guesses)[0], expected)
    text, aux = decode(23, 4)(prompt, guesses)
    assert_array_equal(text, by_hand(prompt, 23, 4, guesses)[0])
    assert aux["kept"] <= aux["offered"]


def test_rounds_of_perfect_and_of_useless_drafts():
    def perfect(state, news, count):
        def follow(state, _):
            logits = jnp.asarray(TABLE)[state[0], state[1], state[2]]
            byte = jnp.argmax(logits).astype(jnp.int32)
            return jnp.append(state[1:], byte), byte

        # All of the draft was kept, and the news say so.
        state = jax.lax.fori_loop(
            0, count, lambda i, s: jnp.append(s[1:], news[i]), state
        )
        return jax.lax.scan(follow, state, None, length=4)[1], state

    none = np.full((SYMBOLS, 4), -1)
    prompt = drawn(5, 3, high=SYMBOLS)
    for count in (5, 24, 25, 26):
        _, aux = jax.jit(
            lambda prompt, count=count: speculative_decode(
                verify, perfect, prompt, verify_state=jnp.zeros(3, jnp.int32),
                draft_state=prompt, num_bytes=count, num_drafted=4, beta=1,
            )
        )(prompt)  # fmt: skip
        assert aux["rounds"] == -(-count // 5) and aux["kept"] == 4 * aux["rounds"]
    assert decode(23, 1)(prompt, none)[1]["rounds"] == 23


@pytest.mark.parametrize("kind", ["mamba", "transformer"])
def test_models_with_caches_verify(kind):
    """Drafts of a noisy oracle; the text is that of the model without any cache."""
    body = MambaStack(Mamba(8, states=4), 2)
    if kind == "transformer":
        body = Transformer(width=8, depth=2, heads=2)
    net = LanguageModel(11, 8, body, is_tied=False)
    prompt, count, drafts = drawn(3, 6, high=11), 30, 3
    params = net.init(jax.random.key(0), prompt[None])
    params = jax.tree.map(lambda x: 3.0 * x, params)  # or they repeat themselves
    whole = jax.jit(lambda tokens: jnp.argmax(net.apply(params, tokens)[0], axis=-1))
    text = np.pad(prompt, (0, count))
    for i in range(6, 6 + count):
        text[i] = whole(text[None])[0, i - 1]
    expected = text[6:]
    assert len(set(expected.tolist())) > 2
    read: Any = reader(net, params)
    if kind == "mamba":
        cache = jax.tree.map(jnp.zeros_like, read(None, prompt)[1])
    else:
        cache = body.empty_cache(1, 64)

    def noisy(end, news, count):
        del news
        end = end + count
        drafted = jax.lax.dynamic_slice_in_dim(jnp.asarray(hints), end, drafts)
        return drafted, end

    hints = np.pad(expected, (0, 8))
    hints[::4] = (hints[::4] + 1) % 11
    got, aux = jax.jit(
        lambda prompt: speculative_decode(
            read, noisy, prompt, verify_state=cache, draft_state=jnp.zeros((), int),
            num_bytes=count, num_drafted=drafts, beta=1,
        )
    )(prompt)  # fmt: skip
    assert_array_equal(got, expected)
    assert 0 < aux["kept"] < aux["offered"]
    if kind == "mamba":
        alone = jax.jit(lambda prompt: greedy(read, cache, prompt, count))(prompt)
        assert_array_equal(alone, expected)


# Noise.


@functools.lru_cache
def noise(kind, rate):
    return jax.jit(functools.partial(add_noise, kind=kind, rate=rate))


def noisy(kind, text=TEXT, rate=0.1, seed=0):
    out, length = noise(kind, rate)(jax.random.key(seed), text)
    assert not np.any(out[length:])
    return np.asarray(out)[:length].tobytes()


def test_case_and_antspeak_are_pythons():
    raw = TEXT.tobytes()
    assert noisy("uppercase") == raw.upper()  # of bytes: ASCII alone
    ants = b"".join(b" " + raw[i : i + 1].upper() for i in range(len(raw)))
    assert noisy("antspeak") == ants
    cased = noisy("random_case")
    assert cased.lower() == raw.lower() and cased.decode() != VERSE
    letters = [chr(b) for b in noisy("random_case", np.tile(TEXT, 50)) if b < 128]
    letters = [c for c in letters if c.isalpha()]
    share = np.mean([c.isupper() for c in letters])
    assert abs(share - 0.5) < 4 * (0.25 / len(letters)) ** 0.5


@functools.lru_cache
def often(kind, rate, draws=400):
    """What is left of the bytes 0, 1, ..., 100, again and again."""
    places = jnp.arange(101, dtype=jnp.uint8)
    run = jax.jit(jax.vmap(lambda key: add_noise(key, places, kind=kind, rate=rate)))
    out, lengths = map(np.asarray, run(jax.random.split(jax.random.key(1), draws)))
    return [row[:length].astype(int) for row, length in zip(out, lengths, strict=True)]


def test_drop_and_repeat():
    left = often("drop", 0.2)
    assert all(np.all(np.diff(row) > 0) for row in left)
    assert_allclose(np.mean([len(row) for row in left]), 0.8 * 101, rtol=0.01)
    more = often("repeat", 0.2)
    assert all(np.all(np.diff(row) >= 0) for row in more)
    counts = np.stack([np.bincount(row, minlength=101) for row in more])
    shares = [np.mean(counts == copies) for copies in (1, 2, 3, 4)]
    assert_allclose(shares, [0.8, 0.2 / 3, 0.2 / 3, 0.2 / 3], atol=0.01)
    # The draws of different bytes have nothing to do with each other.
    assert abs(np.corrcoef(counts[:, 0], counts[:, 1])[0, 1]) < 0.2
    assert noisy("drop", rate=1.0) == bytes(b for b in TEXT if b >= 128)
    every = np.bincount(often("repeat", 1.0)[0])
    assert len(every) == 101 and set(every) == {2, 3, 4}


def test_swap_exchanges_neighbours():
    moved = 0
    for out in often("swap", 0.3):
        i = 0
        while i < 101:
            if out[i] == i:
                i += 1
                continue
            assert (out[i], out[i + 1]) == (i + 1, i)
            moved, i = moved + 1, i + 2
    # Left to right: a byte that is not yet swapped begins a swap at the rate.
    assert_allclose(moved / (400 * 100), 0.3 / 1.3, atol=0.01)
    assert_array_equal(often("swap", 1.0)[0][:6], [1, 0, 3, 2, 5, 4])
    assert often("swap", 1.0)[0][-1] == 100  # it has no neighbour left


@pytest.mark.parametrize("kind", ["drop", "repeat", "swap"])
def test_longer_characters_stay_whole(kind):
    odd = [c for c in VERSE if ord(c) >= 128]
    for rate in (0.5, 1.0):
        damaged = noisy(kind, rate=rate).decode()
        assert [c for c in damaged if ord(c) >= 128] == odd
    assert noisy(kind, rate=0.0) == TEXT.tobytes()
    assert noisy(kind, TEXT[:0], 0.0) == b""


def test_bad_arguments_are_named():
    logits, drafted = np.zeros((3, 5), np.float32), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="'beta' is 0"):
        accept_draft(logits, drafted, beta=0)
    with pytest.raises(ValueError, match="'logits' has 3 places, .* the 3 of"):
        accept_draft(logits, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="'prompt' is empty"):
        speculative_decode(
            verify, draft, drafted[:0], verify_state=(), draft_state=(), num_bytes=1
        )
    with pytest.raises(ValueError, match="'rate' is 1.5"):
        add_noise(jax.random.key(0), TEXT, kind="drop", rate=1.5)
    with pytest.raises(TypeError, match="'text' is int32"):
        add_noise(jax.random.key(0), TEXT.astype(np.int32), kind="drop")
    with pytest.raises(TypeError, match="'num_bytes' is int32"):
        bits_per_byte(logits, drafted)
