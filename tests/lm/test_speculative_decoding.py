"""Distributions by enumeration, greedy texts by loops, and transformers with caches."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.speculative_decoding import (
    acceptance_rate,
    expected_tokens,
    speculative_decode,
    speed_up,
)
from jaxzoo.nn.draft_acceptance import speculative_accept, tree_accept
from jaxzoo.nn.generate import adjusted_log_probs
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.ngrams import ngram_log_probs
from jaxzoo.nn.transformer import Transformer
from tests.lm.draws import assert_drawn_from, logits, softmax

greedy = functools.partial(adjusted_log_probs, temperature=0.0)
SYMBOLS = 5


def model(table):
    """What follows depends on the last token; there is no state."""
    return lambda state, x: (jnp.asarray(table)[x], state)


# Numbers of drafts.


def test_the_papers_table_of_expected_tokens():
    table = {(0.6, 2): 1.96, (0.7, 3): 2.53, (0.8, 2): 2.44, (0.8, 5): 3.69}
    table |= {(0.9, 2): 2.71, (0.9, 10): 6.86}
    for (a, drafts), tokens in table.items():
        got = expected_tokens(np.full((), a, np.float32), drafts=drafts)
        assert_allclose(got, tokens, atol=0.005)
        assert_allclose(got, (1 - a ** (drafts + 1)) / (1 - a), rtol=1e-5)
    ends = expected_tokens(np.array([-1.0, 0.0, 1.0, 2.0], np.float32), drafts=4)
    assert_array_equal(ends, [1, 1, 5, 5])
    slope = jax.grad(lambda a: expected_tokens(a, drafts=4))
    assert_allclose(slope(jnp.array(1.0)), 1 + 2 + 3 + 4)


@pytest.mark.parametrize("cost", [0.0, 0.02, 0.3])
def test_best_number_of_drafts_by_search(cost):
    a = np.linspace(0, 0.99, 34)
    drafts = np.arange(65)[:, None]
    factors = (1 - a[None] ** (drafts + 1)) / (1 - a[None]) / (drafts * cost + 1)
    value, best = map(np.asarray, speed_up(a.astype(np.float32), cost_ratio=cost))
    assert_allclose(value, factors.max(0), rtol=1e-4)
    assert_allclose(factors[best, np.arange(34)], factors.max(0), rtol=1e-4)
    # Corollary 3.9: drafts pay where a > c, and at least (1 + a) / (1 + c).
    assert np.all(best[a < cost] == 0) and np.all(value[a < cost] == 1)
    pays = a > cost + 0.001
    assert np.all(value[pays] > 0.9999 * (1 + a[pays]) / (1 + cost))


# Decoding.


STATIC = ("num_tokens", "num_drafted", "adjust", "branches")


@functools.partial(jax.jit, static_argnames=STATIC)
def decode(
    key, p, q, prompt, num_tokens, num_drafted=3, adjust=None, lengths=None, branches=1
):
    return speculative_decode(
        key, model(p), model(q), prompt, target_state=(), draft_state=(),
        num_tokens=num_tokens, num_drafted=num_drafted, adjust=adjust, lengths=lengths,
        branches=branches,
    )  # fmt: skip


@pytest.mark.parametrize("branches", [1, 3])
def test_texts_have_the_distribution_of_the_target(branches):
    """All texts of three tokens, enumerated."""
    p, q = logits(0, 4, 4), logits(1, 4, 4)
    rows = 100_000
    prompt = np.tile([[1, 2]], (rows, 1))
    text, aux = decode(
        jax.random.key(0), p, q, prompt, 3, num_drafted=2, branches=branches
    )
    counts = np.zeros((4, 4, 4))
    np.add.at(counts, tuple(np.asarray(text).T), 1)
    p, q = softmax(p), softmax(q)
    probs = p[2][:, None, None] * p[:, :, None] * p[None]
    assert_drawn_from(counts, probs)
    # The draft writes other texts.
    wrong = q[2][:, None, None] * q[:, :, None] * q[None]
    assert np.abs(probs - wrong).sum() / 2 > 0.3
    assert np.all(aux["calls"] <= 3) and np.all(aux["rejected"] <= aux["calls"])


def test_tokens_per_call_are_those_of_the_formula():
    """The same p and q after every token: rates are independent."""
    p, q = (np.tile(logits(s, 1, 6), (6, 1)) for s in (3, 4))
    rate = acceptance_rate(p[0], q[0])
    for drafts in (1, 4):
        prompt = np.zeros((500, 2), int)
        _, aux = decode(jax.random.key(1), p, q, prompt, 60, num_drafted=drafts)
        calls, kept, rejected = (
            int(aux[k].sum()) for k in ("calls", "kept", "rejected")
        )
        assert_allclose(kept / (kept + rejected), rate, rtol=0.02)
        expected = expected_tokens(rate, drafts=drafts)
        assert_allclose(1 + kept / calls, expected, rtol=0.02)
        assert_allclose(aux["tokens_per_call"], 1 + aux["kept"] / aux["calls"])


def test_equal_models_and_models_that_never_agree():
    p, prompt = logits(0, SYMBOLS, SYMBOLS), np.zeros((3, 2), int)
    key = jax.random.key(0)
    for count in (8, 9):
        text, aux = decode(key, p, p, prompt, count, adjust=greedy)
        assert_array_equal(aux["calls"], -(-count // 4))
        assert_array_equal(aux["tokens_per_call"], 4)
        assert text.shape == (3, count)
    _, aux = decode(key, p, -p, prompt, 9, adjust=greedy)
    assert_array_equal(aux["calls"], 9)
    assert_array_equal(aux["rejected"], 9)


@pytest.mark.parametrize("drafts", [1, 5])
def test_greedy_texts_are_the_targets_whatever_is_drafted(drafts):
    p = logits(0, 64, 64)
    prompt = np.random.default_rng(0).integers(0, 64, (6, 4))
    lengths = np.array([4, 2, 3, 4, 3, 2])
    expected = [[row[n - 1]] for row, n in zip(prompt, lengths, strict=True)]
    for _ in range(20):
        expected = [[*row, np.argmax(p[row[-1]])] for row in expected]
    for noise in (0.0, 1.0, 3.0):
        q = p + noise * logits(1, 64, 64, scale=1.0)
        text, aux = decode(jax.random.key(0), p, q, prompt, 20, drafts, greedy, lengths)
        assert_array_equal(text, np.array(expected)[:, 1:])
    assert len(set(np.asarray(aux["kept"]).tolist())) > 1


def test_two_caches_are_rewound_row_by_row():
    """Against the target without any cache; prompts of different lengths."""
    prompt = np.random.default_rng(0).integers(0, 11, (4, 6)).astype(np.int32)
    lengths, count, drafts = np.array([6, 2, 4, 5]), 12, 3
    body = Transformer(8, depth=2, heads=2, implementation="ref")
    net = LanguageModel(11, 8, body, is_tied=False)
    # Larger than at first, or they repeat themselves.
    init = jax.jit(lambda key: jax.tree.map(lambda x: 3.0 * x, net.init(key, prompt)))
    params, others = (init(jax.random.key(seed)) for seed in (0, 1))

    def reader(params: Any):
        return lambda cache, x: net.apply(params, x, cache)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, draft_params, branches=1):
        cache = body.empty_cache(4, 6 + count + drafts)

        def draw(logits):
            return logits if branches > 1 else greedy(logits)

        def sure(cache, x):  # whatever is drafted, the target is greedy
            logits, cache = reader(params)(cache, x)
            return greedy(logits), cache

        return speculative_decode(
            jax.random.key(0), sure, reader(draft_params), prompt,
            target_state=cache, draft_state=cache, num_tokens=count,
            num_drafted=drafts, adjust=draw, lengths=lengths, branches=branches,
        )  # fmt: skip

    @jax.jit
    def whole(x):
        logits: Any = net.apply(params, x)
        return jnp.argmax(logits[0], axis=-1)

    known = np.pad(prompt, ((0, 0), (0, count)))
    for i in range(count):
        after = np.asarray(whole(known))
        for row, n in enumerate(lengths):
            known[row, n + i] = after[row, n + i - 1]
    expected = [known[r, n : n + count] for r, n in enumerate(lengths)]
    assert len(np.unique(expected)) > 3
    text, aux = run(params, params)
    assert_array_equal(text, expected)
    assert_array_equal(aux["calls"], 3)
    text, aux = run(params, others)
    assert_array_equal(text, expected)
    assert np.all(aux["rejected"] > 0) and len(set(aux["calls"].tolist())) > 1
    # Branches are drawn, and so are more often right than one of them.
    text, forked = run(params, params, 4)
    assert_array_equal(text, expected)
    assert np.all(forked["calls"] < count)


def test_states_are_rewound_by_a_function_of_the_callers():
    """A state that counts what it has read: it must know each token's place."""
    p = logits(0, 40, SYMBOLS)

    def placed(state, x):
        places = state[:, None] + 1 + jnp.arange(x.shape[1])[None]
        return jnp.asarray(p)[places], state + x.shape[1]

    def noisy(state, x):
        got, state = placed(state, x)
        return got + jnp.asarray(logits(1, SYMBOLS, SYMBOLS))[x], state

    @jax.jit
    def run(key):
        zero, prompt = jnp.zeros(3, jnp.int32), jnp.zeros((3, 4), jnp.int32)
        return speculative_decode(
            key, placed, noisy, prompt, target_state=zero, draft_state=zero,
            num_tokens=25, num_drafted=2, adjust=greedy,
            rewind=lambda state, rows, count: state - count,
        )  # fmt: skip

    text, aux = run(jax.random.key(0))
    assert_array_equal(text, np.tile(p[4:29].argmax(-1), (3, 1)))
    assert np.all(aux["rejected"] > 0) and np.all(aux["kept"] > 0)


def test_bad_arguments_are_named():
    p, q = logits(0, 4, SYMBOLS), logits(1, 3, SYMBOLS)
    key, table = jax.random.key(0), model(logits(0, SYMBOLS, SYMBOLS))
    with pytest.raises(ValueError, match="'target_logits' has 3 places, .* the 3 of"):
        speculative_accept(key, p[:3], q, np.zeros(3, int))
    with pytest.raises(ValueError, match="'target_logits' has 3 places, .* the 3 of"):
        tree_accept(key, p[None, :3], q[None], np.zeros((1, 3), int))
    with pytest.raises(TypeError, match=r"argument 'draft_logits' is float32\[3,4\]"):
        speculative_accept(key, p, q[:, :4], np.zeros(3, int))
    with pytest.raises(ValueError, match="'temperature' is -1.0"):
        adjusted_log_probs(p, temperature=-1.0)
    with pytest.raises(ValueError, match="'pseudocount' is 0.0"):
        ngram_log_probs(np.zeros(3, int), vocabulary=2, pseudocount=0.0)
    states: Any = {"target_state": (), "draft_state": (), "num_tokens": 1}
    with pytest.raises(ValueError, match="'prompt' has 1 tokens"):
        speculative_decode(key, table, table, np.zeros((2, 1), int), **states)
    with pytest.raises(ValueError, match="'rewind' is None, expected a function"):
        states |= {"target_state": jnp.zeros(2)}
        speculative_decode(key, table, table, np.zeros((2, 3), int), **states)
