"""Mixture of Inputs against the paper's Dirichlet posterior, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.moi import moi_generate, moi_weights
from jaxzoo.nn.generate import generate


def posterior_mean(p, y, beta, count):
    """Prior Dir(H p), and beta + 1 - H counts of the drawn token: equations 2 to 5."""
    p = np.asarray(p, np.float64)
    inside = p[p > 0]
    h = -np.sum(inside * np.log(inside)) / np.log(count)
    concentration = h * p
    seen = np.zeros_like(p)
    seen[y] = beta + 1 - h
    return (concentration + seen) / np.sum(concentration + seen)


def as_released(p, y, beta, count):
    """The mixture as the authors compute it, of the `count` likeliest tokens."""
    best = np.argsort(-np.asarray(p))[:count]
    prior = np.asarray(p, np.float64)[best]
    prior = prior / prior.sum()
    h = -np.sum(prior * np.log(prior)) / np.log(count)
    w, one_hot = np.zeros(len(p)), np.zeros(len(p))
    w[best] = prior
    one_hot[y] = 1.0
    return (w + beta * one_hot) / (1 + beta) * h + one_hot * (1 - h)


def drawn(vocabulary=30):
    keys = jax.random.split(jax.random.key(0))
    logits = 2.0 * jax.random.normal(keys[0], (12, vocabulary))
    return logits, jax.random.randint(keys[1], (12,), 0, vocabulary)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0, 8.0])
def test_weights_are_the_posterior_mean(beta):
    logits, tokens = drawn()
    got, _ = moi_weights(logits, tokens, beta=beta, top_k=None)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    for row, probs, y in zip(got, p, tokens, strict=True):
        assert_allclose(row, posterior_mean(probs, y, beta, 30), atol=1e-6)


@pytest.mark.parametrize("top_k", [2, 5, 20])
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_weights_as_released(beta, top_k):
    logits, tokens = drawn()
    got, _ = moi_weights(logits, tokens, beta=beta, top_k=top_k)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    for row, probs, y in zip(got, p, tokens, strict=True):
        assert_allclose(row, as_released(probs, y, beta, top_k), atol=1e-6)


def test_the_default_is_the_released_code():
    logits, tokens = drawn()
    expected = moi_weights(logits, tokens, beta=1.0, top_k=20)
    assert_array_equal(moi_weights(logits, tokens)[0], expected[0])


def test_a_more_uncertain_model_gives_less_to_the_token():
    logits, tokens = drawn()
    own = []
    for heat in (1.0, 3.0, 30.0):
        weights, aux = moi_weights(logits / heat, tokens, beta=0.5)
        assert_allclose(jnp.sum(weights, axis=-1), 1.0, atol=1e-6)
        own.append(float(jnp.mean(aux["entropy"])))
    assert own[0] < own[1] < own[2] <= 1.0


def test_of_uniform_probabilities_beta_alone_decides():
    weights, aux = moi_weights(jnp.zeros((1, 4)), jnp.array([2]), beta=1.0)
    assert_allclose(aux["entropy"], 1.0, atol=1e-6)
    assert_allclose(weights, [[0.125, 0.125, 0.625, 0.125]], atol=1e-6)
    weights, _ = moi_weights(jnp.zeros((1, 4)), jnp.array([2]), beta=0.0)
    assert_allclose(weights, 0.25, atol=1e-6)


def test_certain_models_and_infinite_beta_give_the_token_itself():
    logits, tokens = drawn()
    one_hot = np.eye(30)[tokens]
    assert_array_equal(moi_weights(logits, tokens, beta=float("inf"))[0], one_hot)
    certain = jnp.where(jnp.arange(30)[None] == tokens[:, None], 0.0, -jnp.inf)
    for logits in (certain, 1e4 * one_hot.astype(np.float32)):
        weights, aux = moi_weights(logits, tokens, beta=0.0)
        assert_allclose(weights, one_hot, atol=1e-6)
        assert_allclose(aux["entropy"], 0.0, atol=1e-6)


def test_a_token_outside_the_likeliest_keeps_its_weight():
    logits, token = jnp.array([4.0, 3.0, 0.0, 0.0]), jnp.array(3)
    weights, aux = moi_weights(logits, token, beta=1.0, top_k=2)
    assert_allclose(weights[3], 1 - aux["entropy"] / 2, rtol=1e-6)
    assert_allclose(weights[2], 0.0)
    assert_allclose(jnp.sum(weights), 1.0, rtol=1e-6)


# Generation.


def small():
    """A recurrent model of 7 symbols, and the same in float64."""
    keys = jax.random.split(jax.random.key(1), 3)
    read, keep, say = (jax.random.normal(k, (7, 7)) for k in keys)

    def model(state, x):
        x = jax.nn.one_hot(x, 7) if x.ndim == 2 else x

        def step(state, x):
            state = jnp.tanh(x @ read + state @ keep)
            return state, 2.0 * state @ say

        state, logits = jax.lax.scan(step, state, jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(logits, 0, 1), state

    exact = [np.asarray(x, np.float64) for x in (read, keep, say)]

    def step(state, x):
        state = np.tanh(x @ exact[0] + state @ exact[1])
        logits = 2.0 * state @ exact[2]
        return state, logits

    return model, step, jnp.zeros((8, 7))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("prior_temperature", [1.0, 0.5])
@pytest.mark.parametrize("is_direct", [False, True])
def test_the_model_reads_mixtures_of_what_it_said(width, prior_temperature, is_direct):
    model, step, start = small()
    prompt = jax.random.randint(jax.random.key(2), (8, width), 0, 7)
    text, aux = moi_generate(
        jax.random.key(3), model, prompt, state=start, num_tokens=6, beta=0.3,
        temperature=0.9, prior_temperature=prior_temperature, top_k=None,
        is_direct=is_direct,
    )  # fmt: skip
    state, logits = np.zeros((8, 7)), np.zeros((8, 7))
    for place in range(width):
        state, logits = step(state, np.eye(7)[prompt[:, place]])
    for i in range(6):
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        own = log_p[np.arange(8), text[:, i]]
        assert_allclose(aux["log_prob"][:, i], own, atol=1e-3)
        heated = np.exp(logits / prior_temperature)
        prior = heated / heated.sum(axis=-1, keepdims=True)
        if not is_direct:
            pairs = zip(prior, text[:, i], strict=True)
            prior = np.stack([posterior_mean(p, y, 0.3, 7) for p, y in pairs])
        if i < 5:
            state, logits = step(state, prior)
    assert_allclose(aux["state"], state, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_infinite_beta_is_standard_sampling(temperature):
    model, _, start = small()
    prompt = jax.random.randint(jax.random.key(2), (8, 3), 0, 7)
    knobs = {"state": start, "num_tokens": 8, "temperature": temperature}
    key = jax.random.key(3)
    plain, expected = generate(key, model, prompt, **knobs)
    same, got = moi_generate(key, model, prompt, beta=float("inf"), **knobs)
    assert_array_equal(same, plain)
    assert_allclose(got["log_prob"], expected["log_prob"], atol=1e-5)
    # The first token is drawn from the prompt alone, and mixed for the second.
    other, mixed = moi_generate(key, model, prompt, beta=0.0, **knobs)
    assert_array_equal(other[:, 0], plain[:, 0])
    first, second = mixed["log_prob"][:, :2].T
    assert_allclose(first, expected["log_prob"][:, 0], atol=1e-5)
    assert not np.allclose(second, expected["log_prob"][:, 1], atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -0.1}, "'beta' is -0.1"),
        ({"beta": float("nan")}, "'beta' is nan"),
        ({"top_k": 0}, "'top_k' is 0"),
    ],
)
def test_bad_numbers_are_named(change, message):
    logits, tokens = drawn()
    with pytest.raises(ValueError, match=message):
        moi_weights(logits, tokens, **change)
    args: Any = (jax.random.key(0), lambda *x: x, jnp.ones((1, 2), int))
    knobs: dict[str, Any] = {"state": (), "num_tokens": 2}
    with pytest.raises(ValueError, match=message):
        moi_generate(*args, **knobs, **change)
    with pytest.raises(ValueError, match="'prior_temperature' is 0.0"):
        moi_generate(*args, **knobs, prior_temperature=0.0)
