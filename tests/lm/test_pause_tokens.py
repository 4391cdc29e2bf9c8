"""Pause tokens against the paper's equations in float64, and what follows from them."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.pause_tokens import (
    finetune_append,
    insert_pause,
    pause_generate,
    pause_loss,
)
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer

PAUSE = 9


def summed(logits, tokens, first, pause):
    """The sum of the paper over k >= first, one term after the other, and its terms."""
    total, terms = 0.0, 0
    for row, text in zip(np.asarray(logits, np.float64), tokens, strict=True):
        for k in range(first, len(text) - 1):
            if text[k + 1] == pause:
                continue
            p = np.exp(row[k] - row[k].max())
            total -= np.log(p[text[k + 1]] / p.sum())
            terms += 1
    return total, terms


@pytest.mark.parametrize("columns", [9, 10])
def test_loss_of_pretraining_is_the_sum_of_the_paper(columns):
    keys = jax.random.split(jax.random.key(0), 3)
    text = jax.random.randint(keys[0], (4, 12), 0, 9)
    tokens, aux = insert_pause(keys[1], text, pause_token=PAUSE, rate=0.4)
    assert aux["is_pause"].any(axis=1).all()
    logits = 3.0 * jax.random.normal(keys[2], (4, 12, columns))
    loss, aux = pause_loss(logits[:, :-1], tokens[:, 1:], pause_token=PAUSE)
    total, terms = summed(logits, np.asarray(tokens), 0, PAUSE)
    assert aux["tokens"] == terms < 4 * 11
    assert_allclose(loss, total / terms, rtol=1e-5)


@pytest.mark.parametrize("pauses", [0, 1, 10])
def test_loss_of_fine_tuning_is_on_the_answer(pauses):
    keys = jax.random.split(jax.random.key(1), 3)
    prefix = jax.random.randint(keys[0], (3, 5), 0, 9)
    target = jax.random.randint(keys[1], (3, 2), 0, 9)
    tokens, where = finetune_append(prefix, target, pauses, pause_token=PAUSE)
    assert_array_equal(tokens[:, :5], prefix)
    assert_array_equal(tokens[:, 5:-2], np.full((3, pauses), PAUSE))
    assert_array_equal(tokens[:, -2:], target)
    assert where.sum() == target.size
    logits = jax.random.normal(keys[2], (*tokens.shape, 10))
    loss, aux = pause_loss(
        logits[:, :-1], tokens[:, 1:], pause_token=PAUSE, where=where
    )
    total, terms = summed(logits, np.asarray(tokens), 5 + pauses - 1, PAUSE)
    assert aux["tokens"] == terms == 6
    assert_allclose(loss, total / terms, rtol=1e-5)


def test_gradients_through_targets_that_are_pauses_are_exactly_zero():
    keys = jax.random.split(jax.random.key(2), 3)
    text = jax.random.randint(keys[0], (6, 20), 0, 9)
    tokens, _ = insert_pause(keys[1], text, pause_token=PAUSE, rate=0.3)
    logits = jax.random.normal(keys[2], (6, 19, 10))

    def value(logits):
        return pause_loss(logits, tokens[:, 1:], pause_token=PAUSE)[0]

    gradient = jax.grad(value)(logits)
    is_pause = tokens[:, 1:] == PAUSE
    assert is_pause.any()
    assert (gradient[is_pause] == 0.0).all()
    assert (gradient[~is_pause] != 0.0).any(axis=-1).all()
    spoilt = jnp.where(is_pause[..., None], jnp.nan, logits)
    assert_array_equal(jax.grad(value)(spoilt), gradient)


def test_nothing_but_pauses_is_a_loss_of_zero():
    logits, pauses = jnp.ones((2, 3, 4)), jnp.full((2, 3), 9)
    loss, aux = pause_loss(logits, pauses, pause_token=9)
    assert loss == 0.0 and aux["tokens"] == 0.0


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_text_is_there_in_order(rate):
    text = jnp.arange(100, 120).reshape(1, 20) + jnp.zeros((5, 1), int)
    whole, aux = insert_pause(
        jax.random.key(3), text, pause_token=PAUSE, rate=rate, is_trimmed=False
    )
    cut, _ = insert_pause(jax.random.key(3), text, pause_token=PAUSE, rate=rate)
    assert whole.shape == (5, 20 + round(20 * rate))
    assert_array_equal(cut, whole[:, :20])
    for row, source in zip(np.asarray(whole), np.asarray(aux["source"]), strict=True):
        assert_array_equal(row[row != PAUSE], text[0])
        assert (row == PAUSE).sum() == round(20 * rate)
        kept = row != PAUSE
        assert_array_equal(np.asarray(text[0])[source[kept]], row[kept])
        assert_array_equal(source, np.cumsum(kept) - kept)


def test_every_set_of_places_is_equally_likely():
    """Four tokens and two pauses: 15 sets of places, chi squared with 14 degrees."""
    text = jnp.broadcast_to(jnp.arange(4)[None], (6000, 4))
    _, aux = insert_pause(
        jax.random.key(4), text, pause_token=PAUSE, rate=0.5, is_trimmed=False
    )
    sets = [
        np.isin(np.arange(6), places) for places in itertools.combinations(range(6), 2)
    ]
    is_pause = np.asarray(aux["is_pause"])
    counts = np.array([(is_pause == s).all(axis=1).sum() for s in sets])
    assert counts.sum() == 6000
    assert np.sum((counts - 400) ** 2 / 400) < 36.1  # its 99.9 % point


def by_hand(model, params, prefix, pauses, number):
    """The whole sequence again for each token."""
    tokens = np.concatenate(
        [prefix, np.full((len(prefix), pauses), PAUSE)], axis=1
    ).astype(np.int32)
    for _ in range(number):
        logits = np.array(model.apply(params, jnp.asarray(tokens))[0][:, -1])
        logits[:, PAUSE] = -np.inf
        tokens = np.concatenate([tokens, logits.argmax(1)[:, None]], axis=1)
    return tokens[:, -number:]


@pytest.mark.parametrize("pauses", [0, 3])
def test_generation_with_a_cache_is_that_by_hand(pauses):
    body = Transformer(16, 2, 2, implementation="ref")
    model = LanguageModel(10, 16, body)
    keys = jax.random.split(jax.random.key(5))
    params: Any = model.init(keys[0], jnp.zeros((1, 4), jnp.int32))
    # The pause would be said first: its column is as large as the others can be.
    params["params"]["embedding"] *= 3.0
    prefix = jax.random.randint(keys[1], (4, 6), 0, 9)

    def decode(tokens, cache):
        cache = body.empty_cache(4, 6 + pauses + 5) if cache is None else cache
        return model.apply(params, tokens, cache)

    got, aux = pause_generate(decode, prefix, pauses, num_tokens=5, pause_token=PAUSE)
    assert_array_equal(got, by_hand(model, params, np.asarray(prefix), pauses, 5))
    assert (got != PAUSE).all()
    assert (aux["log_probs"] <= 0).all()
    one, _ = pause_generate(decode, prefix, pauses, num_tokens=1, pause_token=PAUSE)
    assert_array_equal(one, got[:, :1])


def test_pauses_are_read_before_the_answer():
    """A model that says how many tokens it has read says prefix and pauses."""

    def decode(tokens, cache):
        read = tokens.shape[1] + (0 if cache is None else cache)
        count = jnp.full(tokens.shape, read)
        return jax.nn.one_hot(count, 32), read

    prefix = jnp.ones((2, 4), int)
    got, _ = pause_generate(decode, prefix, 10, num_tokens=3, pause_token=31)
    assert_array_equal(got, [[14, 15, 16]] * 2)


def test_bad_numbers_are_named():
    text = jnp.ones((2, 3), int)
    with pytest.raises(ValueError, match="'num_pauses' is -1"):
        finetune_append(text, text, -1, pause_token=9)
    with pytest.raises(ValueError, match="'prefix' has no tokens"):
        finetune_append(text[:, :0], text, 1, pause_token=9)
    with pytest.raises(ValueError, match="'rate' is 1.5"):
        insert_pause(jax.random.key(0), text, pause_token=9, rate=1.5)
    with pytest.raises(ValueError, match="'pause_token' is 0"):
        pause_loss(jnp.ones((2, 3, 4)), text, pause_token=0)
