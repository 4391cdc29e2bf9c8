"""What language models are trained on, and how they write."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.core.tree import named_leaves
from jaxzoo.nn.generate import generate
from jaxzoo.nn.language_model import LanguageModel, next_token_loss
from jaxzoo.nn.transformer import Transformer, partition_spec


def drawn(key, tokens=(2, 6)):
    keys = jax.random.split(key, 3)
    hidden = jax.random.normal(keys[0], (*tokens, 8))
    head = jax.random.normal(keys[1], (8, 20))
    return hidden, head, jax.random.randint(keys[2], tokens, 0, 20)


def test_loss_is_that_of_whole_logits(key):
    hidden, head, targets = drawn(key)
    where = jnp.arange(6)[None] < jnp.array([[6], [3]])
    loss, aux = next_token_loss(
        hidden, head, targets, where=where, z_loss=0.01, chunk=7
    )
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    total = np.log(np.exp(logits).sum(-1))
    own = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    mask = np.asarray(where)
    entropy, squared = (total - own)[mask].mean(), np.square(total)[mask].mean()
    np.testing.assert_allclose(loss, entropy + 0.01 * squared, rtol=1e-5)
    np.testing.assert_allclose(aux["cross_entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(aux["log_z_squared"], squared, rtol=1e-5)
    right = (logits.argmax(-1) == np.asarray(targets))[mask].mean()
    np.testing.assert_allclose(aux["accuracy"], right, rtol=1e-6)


def test_masked_tokens_may_hold_anything(key):
    hidden, head, targets = drawn(key)
    where = jnp.arange(6)[None] < jnp.array([[6], [3]])

    def loss(hidden, head, targets):
        return next_token_loss(hidden, head, targets, where=where, z_loss=0.1)[0]

    expected = jax.value_and_grad(loss, (0, 1))(hidden, head, targets)
    for spoilt in (jnp.nan, jnp.inf, 3e38):
        bad = jnp.where(where[..., None], hidden, spoilt)
        got = jax.value_and_grad(loss, (0, 1))(bad, head, jnp.where(where, targets, -7))
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_without_any_token_the_loss_is_zero(key):
    hidden, head, targets = drawn(key)

    def loss(hidden):
        where = jnp.zeros(targets.shape, bool)
        return next_token_loss(hidden, head, targets, where=where, z_loss=0.1)[0]

    value, slope = jax.value_and_grad(loss)(hidden)
    assert value == 0 and np.all(slope == 0)


def test_large_logits_have_finite_gradients(key):
    hidden, head, targets = drawn(key)
    for size in (1e4, -1e4):
        value, slope = jax.value_and_grad(
            lambda h: next_token_loss(h, head, targets, z_loss=1e-4)[0]
        )(size * hidden)
        assert np.isfinite(value) and np.all(np.isfinite(slope))
    with pytest.raises(ValueError, match="'z_loss' is -1.0"):
        next_token_loss(hidden, head, targets, z_loss=-1.0)


def tiny(**knobs):
    return LanguageModel(11, 16, Transformer(16, 2, 4, **knobs))


def test_embeddings_in_the_place_of_tokens(key):
    model, tokens = tiny(), jax.random.randint(key, (2, 5), 0, 11)
    params = model.init(key, tokens)
    sure, _ = model.apply(params, jax.nn.one_hot(tokens, 11))
    expected, _ = model.apply(params, tokens)
    np.testing.assert_allclose(sure, expected, atol=1e-5)


def test_greedy_text_is_that_of_reading_everything_again(key):
    model, prompt = tiny(), jax.random.randint(key, (3, 4), 0, 11)
    params = model.init(key, prompt)
    cache = model.body.empty_cache(3, 9)
    text, aux = jax.jit(
        lambda p: generate(
            key, lambda cache, x: model.apply(p, x, cache), prompt, state=cache,
            num_tokens=6, temperature=0.0,
        )
    )(params)  # fmt: skip
    whole = jnp.concatenate([prompt, text], axis=1)
    logits, _ = model.apply(params, whole[:, :-1])
    np.testing.assert_array_equal(text, jnp.argmax(logits[:, 3:], axis=-1))
    own = jax.nn.log_softmax(logits[:, 3:])
    own = jnp.take_along_axis(own, text[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(aux["log_prob"], own, atol=1e-4)
    assert np.all(aux["state"].lengths == 9)


def test_drawn_text_has_the_distribution_of_the_model():
    table = jnp.log(jnp.array([[0.7, 0.3], [0.2, 0.8]]))
    prompt = jnp.zeros((20_000, 1), jnp.int32)
    text, _ = generate(
        jax.random.key(3), lambda state, x: (table[x], state), prompt, state=(),
        num_tokens=2, temperature=0.5,
    )  # fmt: skip
    p = np.exp(2 * np.asarray(table, np.float64))
    p /= p.sum(-1, keepdims=True)
    both = np.array([p[0, i] * p[i, j] for i in (0, 1) for j in (0, 1)])
    got = np.bincount(np.asarray(text[:, 0] * 2 + text[:, 1]), minlength=4) / 20_000
    assert np.abs(got - both).max() < 4 * 0.5 / 20_000**0.5


def test_attention_by_argument(key):
    tokens = jax.random.randint(key, (2, 6), 0, 11)

    def plain(q, k, v, cache):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[-1] ** 0.5
        mask = jnp.tril(jnp.ones((6, 6), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        return jnp.einsum("bnts,bsnh->btnh", weights, v), cache

    params = tiny().init(key, tokens)
    expected, _ = tiny().apply(params, tokens)
    got, _ = tiny(attend=plain).apply(params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_frequencies_may_depend_on_the_place(key):
    tokens = jax.random.randint(key, (2, 6), 0, 11)
    params = tiny().init(key, tokens)
    base = 10000.0 ** (-jnp.arange(0, 4, 2) / 4)

    def of(places):
        return jnp.ones((*places.shape, 1)) * base[None, None]

    expected, _ = tiny().apply(params, tokens)
    got, _ = tiny(frequencies=of).apply(params, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_queries_and_keys_can_be_looked_at(key):
    tokens = jax.random.randint(key, (2, 6), 0, 11)
    params = tiny().init(key, tokens)
    assert set(params) == {"params"}
    outputs: Any = tiny().apply(params, tokens, mutable="intermediates")
    _, seen = outputs
    blocks = seen["intermediates"]["body"]["blocks"]
    assert blocks["queries"][0].shape == blocks["keys"][0].shape == (2, 2, 6, 4, 4)


def test_every_matrix_has_a_place_on_the_mesh(key):
    params = tiny().init(key, jnp.zeros((1, 2), jnp.int32))
    for name, leaf in named_leaves(params).items():
        spec = partition_spec(name, leaf.shape)
        assert (spec is None) == name.endswith("scale"), name
        if spec is not None:
            assert sorted(a for a in spec if a) == ["fsdp", "tensor"], name
