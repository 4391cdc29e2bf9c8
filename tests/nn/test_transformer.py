"""The transformer against its equations in float64, cut anywhere, packed, cached."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.mamba import Mamba, MambaStack
from jaxzoo.nn.transformer import Transformer, rotary

WIDTH, LENGTH = 16, 6
BODIES = {
    "plain": Transformer(WIDTH, depth=2, heads=4),
    "grouped, normed": Transformer(
        WIDTH, depth=2, heads=4, key_heads=2, hidden=24, qk_norm=True, base=50.0
    ),
    "of all tokens": Transformer(WIDTH, depth=1, heads=2, is_causal=False),
}
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))


@functools.cache
def begun(name):
    """Parameters that differ from what they begin with, and the compiled function."""
    body = BODIES[name]
    leaves, tree = jax.tree.flatten(body.init(jax.random.key(1), X))
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        x + 0.2 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return tree.unflatten(moved), jax.jit(body.apply)


def normed(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def turned(x, base):
    """Pairs of features as complex numbers, turned by their position."""
    half = x.shape[-1] // 2
    speeds = base ** (-np.arange(half) / half)
    pairs = x[..., :half] + 1j * x[..., half:]
    pairs *= np.exp(1j * np.arange(len(x))[:, None, None] * speeds)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def oracle(x, params, body):
    """One sequence, head by head."""
    for layer in range(body.depth):
        p = jax.tree.map(lambda v, i=layer: v[i], params["blocks"])
        h = normed(x, p["norm_1"]["scale"])
        size, heads = body.width // body.heads, body.key_heads or body.heads
        q = (h @ p["query"]["kernel"]).reshape(len(x), body.heads, size)
        k = (h @ p["key"]["kernel"]).reshape(len(x), heads, size)
        v = (h @ p["value"]["kernel"]).reshape(len(x), heads, size)
        if body.qk_norm:
            q = normed(q, p["query_norm"]["scale"])
            k = normed(k, p["key_norm"]["scale"])
        q, k = turned(q, body.base), turned(k, body.base)
        mixed = np.zeros_like(q)
        for head in range(body.heads):
            own = head // (body.heads // heads)
            logits = q[:, head] @ k[:, own].T / np.sqrt(size)
            if body.is_causal:
                logits[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, own]
        x = x + mixed.reshape(len(x), -1) @ p["out"]["kernel"]
        h = normed(x, p["norm_2"]["scale"])
        gate = h @ p["gate"]["kernel"]
        up = gate / (1 + np.exp(-gate)) * (h @ p["up"]["kernel"])
        x = x + up @ p["down"]["kernel"]
    return normed(x, params["norm"]["scale"])


@pytest.mark.parametrize("name", BODIES)
def test_it_is_its_equations(name):
    params, apply = begun(name)
    y, cache = apply(params, X)
    exact = jax.tree.map(lambda v: np.asarray(v, np.float64), params["params"])
    for row in range(2):
        expected = oracle(np.asarray(X[row], np.float64), exact, BODIES[name])
        np.testing.assert_allclose(y[row], expected, rtol=2e-5, atol=2e-5)
    assert cache is None


@pytest.mark.parametrize("name", ["plain", "grouped, normed"])
def test_with_a_cache_it_is_the_whole_wherever_it_is_cut(name):
    params, apply = begun(name)
    whole, _ = apply(params, X)
    cache, parts = BODIES[name].empty_cache(2, LENGTH), []
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        part, cache = apply(params, X[:, start:stop], cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert cache.lengths.tolist() == [[6, 6]] * 2


def test_rows_of_a_cache_go_on_from_where_each_was_set_back():
    params, apply = begun("plain")
    body = BODIES["plain"]
    _, cache = apply(params, X[:, :4], body.empty_cache(2, LENGTH))
    back = jnp.broadcast_to(jnp.array([[3, 1]]), (2, 2))
    y, _ = apply(params, X[:, 4:5], cache._replace(lengths=back))
    for row, kept in ((0, 3), (1, 1)):
        tokens = jnp.concatenate([X[row, :kept], X[row, 4:5]])[None]
        whole, _ = body.apply(params, tokens)
        np.testing.assert_allclose(y[row, 0], whole[0, -1], rtol=1e-5, atol=1e-5)


def test_a_cache_without_room_is_nan_in_that_row_alone():
    params, apply = begun("plain")
    cache = BODIES["plain"].empty_cache(2, 4)
    lengths = jnp.broadcast_to(jnp.array([[0, 3]]), (2, 2))
    y, _ = apply(params, X[:, :2], cache._replace(lengths=lengths))
    assert bool(jnp.isfinite(y[0]).all())
    assert bool(jnp.isnan(y[1]).all())


def test_packed_documents_do_not_see_each_other():
    params, apply = begun("plain")
    ids = jnp.tile(jnp.array([0, 0, 1, 1, 1, 1]), (2, 1))
    packed, _ = apply(params, X, segment_ids=ids)
    # Rotations tell distances alone: a document may stand anywhere.
    second, _ = BODIES["plain"].apply(params, X[:, 2:])
    np.testing.assert_allclose(packed[:, 2:], second, rtol=1e-4, atol=1e-5)


def test_computing_again_changes_no_gradient():
    params, _ = begun("plain")

    def gradient(body):
        return jax.jit(jax.grad(lambda p: jnp.sum(body.apply(p, X)[0] ** 2 * X)))(
            params
        )

    plain = gradient(BODIES["plain"])
    again = gradient(Transformer(WIDTH, depth=2, heads=4, remat=True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_products_in_bfloat16_stay_near():
    params, apply = begun("grouped, normed")
    body = BODIES["grouped, normed"].clone(dtype=jnp.bfloat16)
    y, _ = body.apply(params, X)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, apply(params, X)[0], atol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transformer(WIDTH, 1, heads=3), "'heads' and 'key_heads' are 3"),
        (lambda: Transformer(WIDTH, 1, heads=16), "expected even"),
        (lambda: Transformer(WIDTH, 1, heads=4, base=1.0), "'base' is 1.0"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make().init(jax.random.key(0), X)


def test_a_cache_refuses_what_it_cannot_do():
    for body, extra, message in (
        (BODIES["of all tokens"], {}, "'is_causal'"),
        (BODIES["plain"], {"segment_ids": jnp.zeros((2, 6), int)}, "'segment_ids'"),
    ):
        params, knobs = body.init(jax.random.key(0), X), dict[str, Any](extra)
        with pytest.raises(ValueError, match=message):
            body.apply(params, X, body.empty_cache(2, 8), **knobs)


def test_rotary_may_interpolate():
    x = jax.random.normal(jax.random.key(3), (1, 1, 1, 8))
    half = rotary(rotary(x, jnp.array([[0.5]])), jnp.array([[0.5]]))
    np.testing.assert_allclose(half, rotary(x, jnp.array([[1]])), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "body",
    [Transformer(8, 1, heads=2), MambaStack(Mamba(8, states=2), 1)],
    ids=["transformer", "mamba"],
)
def test_a_language_model_is_embedding_body_head(body, is_tied):
    model = LanguageModel(11, 8, body, is_tied)
    tokens = jnp.array([[1, 10, 3], [0, 0, 7]])
    params: Any = model.init(jax.random.key(4), tokens)
    logits, _ = model.apply(params, tokens)
    own = params["params"]
    x = own["embedding"][tokens]
    y, _ = body.apply({"params": own["body"]}, x)
    head = own["embedding"].T / 8**0.5 if is_tied else own["head"]
    np.testing.assert_allclose(logits, y @ head, rtol=1e-5, atol=1e-5)
    hidden, _ = model.apply(params, tokens, method="hidden")
    np.testing.assert_allclose(hidden, y, rtol=1e-5, atol=1e-6)


def test_other_frequencies_and_a_scale_of_queries_and_keys():
    params, apply = begun("plain")
    plain, _ = apply(params, X)
    own = 10000.0 ** (-jnp.arange(2) / 2.0)
    same = BODIES["plain"].clone(frequencies=own)
    np.testing.assert_allclose(same.apply(params, X)[0], plain, rtol=1e-5, atol=1e-6)
    # Half the frequencies are the angles of half the positions, traced or not.
    x = jax.random.normal(jax.random.key(3), (1, 3, 1, 4))
    places = jnp.arange(3)[None]
    half = rotary(x, places / 2)
    np.testing.assert_allclose(rotary(x, places, frequencies=own / 2), half, rtol=1e-5)

    @jax.jit
    def moved(frequencies, scale):
        body = BODIES["plain"].clone(frequencies=frequencies, rope_scale=scale)
        return body.apply(params, X)[0]

    # A scale of queries and keys is one of both their matrices.
    louder = jax.tree_util.tree_map_with_path(
        lambda path, v: 1.2 * v if {"query", "key"} & {p.key for p in path} else v,
        params,
    )
    np.testing.assert_allclose(
        moved(own, 1.2), apply(louder, X)[0], rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(moved(own / 4, 1.0), plain, atol=1e-3)
    with pytest.raises(ValueError, match="'frequencies' has shape"):
        rotary(x, places, frequencies=own[:1])
