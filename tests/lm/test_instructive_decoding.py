"""Instructive decoding against the paper's algorithm 1, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.instructive_decoding import (
    exact_match,
    instructive_decode,
    instructive_logits,
    label_adherence,
    noisy_instruction,
)
from jaxzoo.nn.generate import generate


@pytest.mark.parametrize("eps", [-0.2, 0.0, 0.3, 1.0])
def test_logits(eps):
    z, noisy = jax.random.normal(jax.random.key(0), (2, 5, 7))
    expected = np.asarray(z, np.float64) - eps * np.asarray(noisy, np.float64)
    assert_allclose(instructive_logits(z, noisy, eps=eps), expected, atol=1e-6)
    probs = np.exp(np.asarray(jax.nn.log_softmax(z), np.float64))
    other = np.exp(np.asarray(jax.nn.log_softmax(noisy), np.float64))
    expected = probs / other**eps  # a product of experts
    got = jax.nn.softmax(instructive_logits(z, noisy, eps=eps))
    assert_allclose(got, expected / expected.sum(-1, keepdims=True), rtol=1e-4)


def test_the_default_is_that_of_the_paper():
    z, noisy = jax.random.normal(jax.random.key(0), (2, 5, 7))
    assert_array_equal(
        instructive_logits(z, noisy), instructive_logits(z, noisy, eps=0.3)
    )


def test_barred_tokens_stay_barred():
    z, noisy = jnp.array([1.0, -jnp.inf]), jnp.array([2.0, -jnp.inf])
    assert instructive_logits(z, noisy, eps=0.5).tolist() == [0.0, -jnp.inf]
    assert instructive_logits(z, noisy, eps=0.0).tolist() == [1.0, -jnp.inf]


# Two prompts, two states.


def recurrent():
    keys = jax.random.split(jax.random.key(1), 3)
    read, keep, say = (jax.random.normal(k, (7, 7)) for k in keys)

    def model(state, tokens):
        def step(state, token):
            state = jnp.tanh(read[token] + state @ keep)
            return state, 2.0 * state @ say

        state, logits = jax.lax.scan(step, state, tokens.T)
        return jnp.swapaxes(logits, 0, 1), state

    exact = [np.asarray(x, np.float64) for x in (read, keep, say)]

    def step(state, token):
        state = np.tanh(exact[0][token] + state @ exact[1])
        return state, 2.0 * state @ exact[2]

    return model, step


def prompts(width, noisy_width):
    keys = jax.random.split(jax.random.key(2))
    return (
        jax.random.randint(keys[0], (8, width), 0, 7),
        jax.random.randint(keys[1], (8, noisy_width), 0, 7),
    )


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("widths", [(3, 2), (1, 4)])
def test_decoding_is_algorithm_1(temperature, widths):
    model, step = recurrent()
    prompt, noisy = prompts(*widths)
    start = jnp.zeros((8, 7))
    text, aux = instructive_decode(
        jax.random.key(3), model, prompt, noisy, state=start, noisy_state=start,
        num_tokens=6, eps=0.6, temperature=temperature,
    )  # fmt: skip
    found = []
    for tokens in (prompt, noisy):
        state, after = np.zeros((8, 7)), []
        for token in np.concatenate([tokens, text], axis=1).T:
            state, logits = step(state, token)
            after.append(logits)
        found.append(after[tokens.shape[1] - 1 : -1])
    differs = 0
    for i, (z, other) in enumerate(zip(*found, strict=True)):
        logits = z - 0.6 * other
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        own = log_p[np.arange(8), text[:, i]]
        assert_allclose(aux["log_prob"][:, i], own, atol=2e-3)
        if temperature == 0.0:
            assert_array_equal(text[:, i], logits.argmax(axis=-1))
            differs += (text[:, i] != z.argmax(axis=-1)).sum()
    assert temperature or differs > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_without_contrast_it_is_the_model_itself(temperature):
    model, _ = recurrent()
    prompt, noisy = prompts(3, 2)
    start = jnp.zeros((8, 7))
    knobs: dict[str, Any] = {"num_tokens": 6, "temperature": temperature}
    key = jax.random.key(4)
    plain, expected = generate(key, model, prompt, state=start, **knobs)
    text, aux = instructive_decode(
        key, model, prompt, noisy, state=start, noisy_state=start, eps=0.0, **knobs
    )
    assert_array_equal(text, plain)
    assert_allclose(aux["log_prob"], expected["log_prob"], rtol=1e-5, atol=1e-6)
    assert_allclose(aux["state"], expected["state"], rtol=1e-5, atol=1e-6)
    same, _ = instructive_decode(
        key, model, prompt, prompt, state=start, noisy_state=start, eps=0.4,
        num_tokens=6, temperature=0.0,
    )  # fmt: skip
    greedy, _ = generate(key, model, prompt, state=start, num_tokens=6, temperature=0.0)
    assert_array_equal(same, greedy)  # (1 - eps) z has its largest where z has


# Noisy instructions.


def test_some_words_in_another_order():
    instruction = jnp.tile(jnp.arange(10, 20), (200, 1))
    got = np.asarray(
        noisy_instruction(jax.random.key(0), instruction, kind="trunc_shuffle")
    )
    assert got.shape == (200, 6)  # floor(0.6 * 10)
    assert all(len(set(row)) == 6 and set(row) <= set(range(10, 20)) for row in got)
    assert len({tuple(row) for row in got}) > 190
    counts = np.bincount(got.ravel() - 10, minlength=10)
    assert np.abs(counts - 120).max() < 30  # 4.3 standard deviations of 6.9
    with_7 = noisy_instruction(
        jax.random.key(0), instruction[:, :9], kind="trunc_shuffle", keep=0.8
    )
    assert with_7.shape == (200, 7)


def test_words_of_a_list():
    instruction, words = jnp.zeros((1000, 4), int), jnp.array([3, 5, 8, 9])
    got = np.asarray(
        noisy_instruction(
            jax.random.key(0), instruction, kind="random_words", words=words,
            num_words=3,
        )
    )  # fmt: skip
    assert got.shape == (1000, 3)
    assert all(len(set(row)) == 3 and set(row) <= {3, 5, 8, 9} for row in got)
    assert len({tuple(row) for row in got}) == 24


def test_nothing_and_the_opposite():
    instruction = jax.random.randint(jax.random.key(1), (3, 4), 0, 9)
    key, meta = jax.random.key(0), jnp.array([7, 6])
    assert noisy_instruction(key, instruction, kind="null").shape == (3, 0)
    got = noisy_instruction(key, instruction, opposite=meta)
    assert_array_equal(got, [[7, 6]] * 3)
    got = noisy_instruction(key, instruction, opposite=meta, is_before=True)
    assert_array_equal(got[:, :2], [[7, 6]] * 3)
    assert_array_equal(got[:, 2:], instruction)


# Scores.


def test_scores_of_answers():
    answers = np.array([[1, 2, 3], [1, 2, 4], [0, 0, 0]])
    expected = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]])
    assert exact_match(answers, expected).tolist() == [True, False, False]
    where = np.array([[True, True, False]] * 3)
    assert exact_match(answers, expected, where=where).tolist() == [True, True, False]
    labels = np.stack([expected, expected + [0, 0, 1]], axis=1)
    assert label_adherence(answers, labels).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1.1}, "'keep' is 1.1"),
        ({"num_words": 0}, "'num_words' is 0"),
        ({"kind": "random_words"}, "'words' has 0"),
        ({"kind": "random_words", "words": jnp.arange(2), "num_words": 3}, "has 2"),
        ({"kind": "opposite"}, "'opposite' is None"),
        ({"kind": "nonsense"}, "'kind' is 'nonsense'"),
    ],
)
def test_what_is_missing_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        noisy_instruction(jax.random.key(0), jnp.arange(4), **change)


def test_bad_numbers_are_named():
    z = jnp.zeros(3)
    with pytest.raises(ValueError, match="'eps' is inf"):
        instructive_logits(z, z, eps=float("inf"))
    key, prompt = jax.random.key(0), jnp.ones((1, 2), int)
    model, _ = recurrent()
    knobs: dict[str, Any] = {"state": (), "noisy_state": (), "num_tokens": 2}
    with pytest.raises(ValueError, match="'eps' is nan"):
        instructive_decode(key, model, prompt, prompt, **knobs, eps=float("nan"))
    with pytest.raises(ValueError, match="'noisy_prompt' has no tokens"):
        instructive_decode(key, model, prompt, prompt[:, :0], **knobs)
