"""Which drafts are kept, by enumeration, and what they are drawn from, by counting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.speculative_decoding import acceptance_rate
from jaxzoo.nn.draft_acceptance import speculative_accept, tree_accept
from jaxzoo.nn.generate import adjusted_log_probs
from jaxzoo.nn.ngrams import ngram_log_probs
from tests.lm.draws import assert_drawn_from, logits, softmax

greedy = functools.partial(adjusted_log_probs, temperature=0.0)
SYMBOLS = 5


def outcomes(p, q, drafted):
    """Probabilities of (kept, token), given the drafts: algorithm 1 in float64."""
    table, reach = np.zeros((len(drafted) + 1, p.shape[-1])), 1.0
    for i, x in enumerate(drafted):
        keep = min(1.0, p[i, x] / q[i, x])
        left = np.maximum(p[i] - q[i], 0)
        table[i] = reach * (1 - keep) * left / max(left.sum(), 1e-300)
        reach *= keep
    table[-1] = reach * p[-1]
    return table


@functools.partial(jax.jit, static_argnums=4)
def many(key, p, q, drafted, count):
    def whole(x):
        return jnp.broadcast_to(x, (count, *x.shape))

    return speculative_accept(key, whole(p), whole(q), whole(drafted))


@pytest.mark.parametrize("seed", range(4))
def test_kept_and_token_have_the_probabilities_of_the_algorithm(seed):
    p, q = logits(seed, 4, SYMBOLS), logits(seed + 9, 3, SYMBOLS)
    drafted = np.random.default_rng(seed).integers(0, SYMBOLS, 3)
    kept, token = many(jax.random.key(seed), p, q, drafted, 50_000)
    counts = np.zeros((4, SYMBOLS))
    np.add.at(counts, (np.asarray(kept), np.asarray(token)), 1)
    assert_drawn_from(counts, outcomes(softmax(p), softmax(q), drafted))


def test_a_token_that_the_draft_never_writes_and_one_that_the_target_never_does():
    with np.errstate(divide="ignore"):
        p = np.log(np.array([[0.7, 0.3, 0.0]] * 2, np.float32))
        q = np.log(np.array([[0.0, 0.4, 0.6]], np.float32))
    for x in (1, 2):
        kept, token = many(jax.random.key(x), p, q, np.array([x]), 20_000)
        counts = np.zeros((2, 3))
        np.add.at(counts, (np.asarray(kept), np.asarray(token)), 1)
        assert_drawn_from(counts, outcomes(np.exp(p), np.exp(q), [x]))
    # Nothing in common: p alone is left.
    p = np.where(np.arange(4) < 2, logits(0, 4), -np.inf).astype(np.float32)
    q = np.where(np.arange(4) < 2, -np.inf, 0).astype(np.float32)
    kept, token = many(
        jax.random.key(0), np.stack([p, p]), q[None], np.array([3]), 20_000
    )
    assert np.all(kept == 0)
    assert_drawn_from(np.bincount(token, minlength=4), softmax(p))


def test_equal_distributions_are_always_kept_and_nothing_is_nan():
    p = logits(0, 3, SYMBOLS)
    for shift in (0.0, 3.7):  # which is normalised away, but for rounding
        for x in range(SYMBOLS):
            kept, token = many(
                jax.random.key(x), p, p[:2] + np.float32(shift), np.array([x, x]), 4000
            )
            assert np.mean(kept) > 1.999
            assert np.all((token >= 0) & (token < SYMBOLS))
    accept = functools.partial(speculative_accept, jax.random.key(0))
    for size in (1e30, -1e30):  # one-hot
        kept, token = accept(size * p, size * p[:2], np.argmax(size * p, 1)[:2])
        assert kept == 2 and token == np.argmax(size * p[2])


def test_acceptance_rate_is_one_less_total_variation_and_what_is_measured():
    p, q = logits(0, 6, SYMBOLS), logits(1, 6, SYMBOLS)
    tv = np.abs(softmax(p) - softmax(q)).sum(-1) / 2
    assert_allclose(acceptance_rate(p, q), 1 - tv, rtol=1e-5)
    assert_allclose(acceptance_rate(p, p + 3), 1, rtol=1e-6)
    hot = greedy(p), greedy(q)
    assert_array_equal(acceptance_rate(*hot), p.argmax(-1) == q.argmax(-1))
    draw = jax.random.categorical(jax.random.key(0), q[0], shape=(50_000, 1))

    def one(key, x):
        return speculative_accept(key, p[[0, 0]], q[:1], x)[0]

    kept = jax.vmap(one)(jax.random.split(jax.random.key(1), 50_000), draw)
    assert_allclose(kept.mean(), 1 - tv[0], atol=5 * 0.5 / 50_000**0.5)


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_a_tree_keeps_as_often_as_its_candidates_allow(branches):
    """The first token: the chance that none of K draws is kept, by enumeration."""
    p, q = logits(5, 5), logits(6, 5)
    left, q_probs, refused = softmax(p), softmax(q), 1.0
    for _ in range(branches):
        kept = np.minimum(left, q_probs).sum()
        refused *= 1 - kept
        left = np.maximum(left - q_probs, 0)
        left /= left.sum()
    rows = 40_000
    keys = jax.random.split(jax.random.key(2))
    drafted = jax.random.categorical(keys[0], q, shape=(rows, branches, 1))
    target = np.broadcast_to(p, (rows, branches, 2, 5))
    draft = np.broadcast_to(q, (rows, branches, 1, 5))
    kept, token, branch = jax.jit(tree_accept)(keys[1], target, draft, drafted)
    assert abs(np.mean(kept == 0) - refused) < 4 * 0.5 / rows**0.5
    first = np.asarray(drafted)[np.arange(rows), branch, 0]
    first = np.where(kept == 1, first, token)
    assert_drawn_from(np.bincount(first, minlength=5).astype(float), softmax(p))


def test_the_branch_begins_with_what_was_kept():
    """A target that is sure of 1, 2, 3: branches leave that way at several places."""
    sure = np.full((3, 4, 5), -np.inf, np.float32)
    for place, token in enumerate((1, 2, 3, 4)):
        sure[:, place, token] = 0.0
    drafted = np.array([[1, 0, 3], [1, 2, 0], [0, 2, 3]])
    draft = np.zeros((3, 3, 5), np.float32)
    kept, token, branch = tree_accept(jax.random.key(0), sure, draft, drafted)
    assert (kept.item(), token.item(), branch.item()) == (2, 3, 1)
    drafted[1, 2] = 3
    kept, token, branch = tree_accept(jax.random.key(0), sure, draft, drafted)
    assert (kept.item(), token.item(), branch.item()) == (3, 4, 1)


# Drawing.


def test_adjusted_distributions():
    x = np.array([[1.0, 3.0, 3.0, 2.0, -1.0]], np.float32)
    for temperature in (0.1, 0.7, 3.0):
        got = adjusted_log_probs(x, temperature=temperature)
        assert_allclose(np.exp(got), softmax(x / temperature), rtol=1e-5)
    kept = adjusted_log_probs(x, top_k=2, temperature=0.5)
    assert_allclose(np.exp(kept), [[0, 0.5, 0.5, 0, 0]], rtol=1e-6)
    # Of equal logits the first stays.
    assert_array_equal(np.exp(adjusted_log_probs(x, top_k=1)), [[0, 1, 0, 0, 0]])
    assert_array_equal(np.exp(greedy(x)), [[0, 1, 0, 0, 0]])
    assert_allclose(adjusted_log_probs(x, top_k=99), adjusted_log_probs(x))
    cold = adjusted_log_probs(1e30 * x, temperature=1e-30)
    assert_allclose(np.exp(cold), [[0, 0.5, 0.5, 0, 0]])
    gradient = jax.grad(
        lambda x: adjusted_log_probs(x, top_k=3, temperature=0.5)[0, 1]
    )(x)
    p = softmax(np.array([3.0, 3.0, 2.0]) / 0.5)
    assert_allclose(gradient, [[0, 2 - 2 * p[0], -2 * p[1], -2 * p[2], 0]], atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngrams_by_counting(order):
    text = np.random.default_rng(0).integers(0, 4, 200)
    text[text == 3] = 0  # one symbol that never comes

    def prob(context, x):
        if context is None:
            return 1 / 4
        n = len(context) + 1
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        both, alone = grams.count((*context, x)), sum(g[:-1] == context for g in grams)
        shorter = context[1:] if context else None
        return (both + 0.5 * prob(shorter, x)) / (alone + 0.5)

    table = ngram_log_probs(text, vocabulary=4, order=order, pseudocount=0.5)
    assert table.shape == (4,) * order
    assert_allclose(np.exp(table).sum(-1), 1, rtol=1e-5)
    rng = np.random.default_rng(1)
    for entry in rng.integers(0, 4, (20, order)):
        *context, x = map(int, entry)
        expected = prob(tuple(context), x)
        assert_allclose(np.exp(table[tuple(entry)]), expected, rtol=1e-5)
    short = ngram_log_probs(text[:1], vocabulary=4, order=order, pseudocount=0.5)
    assert_allclose(np.exp(short).sum(-1), 1, rtol=1e-5)
