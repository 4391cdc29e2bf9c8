"""Both Mamba blocks against the equations in float64, cut anywhere, and packed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.nn.mamba import Cache, Mamba, Mamba2, MambaStack, causal_conv

WIDTH, LENGTH = 6, 7
BLOCKS = {
    "Mamba-1": Mamba(WIDTH, states=3, rank=2),
    "Mamba-2": Mamba2(WIDTH, heads=4, states=3, groups=2),
}
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))


@functools.cache
def begun(name):
    """Parameters of a block that differ from what they begin with, and its function."""
    block = BLOCKS[name]
    params = block.init(jax.random.key(1), X)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        x + 0.3 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return tree.unflatten(moved), jax.jit(block.apply)


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def convolved(u, p):
    out = np.zeros_like(u)
    for t in range(len(u)):
        for k in range(4):
            if t - 3 + k >= 0:
                out[t] += p["conv"][k] * u[t - 3 + k]
    return silu(out + p["conv_bias"])


def mamba1(x, p):
    """One sequence, token by token."""
    u, z = np.split(x @ p["in_proj"]["kernel"], 2, axis=-1)
    u = convolved(u, p)
    terms = u @ p["x_proj"]["kernel"]
    steps, b, c = terms[:, :2], terms[:, 2:5], terms[:, 5:]
    delta = softplus(steps @ p["dt_proj"]["kernel"] + p["dt_bias"])
    a, h, out = -np.exp(p["A_log"]), np.zeros((2 * WIDTH, 3)), []
    for t in range(len(x)):
        h = np.exp(delta[t][:, None] * a) * h + (delta[t] * u[t])[:, None] * b[t]
        out.append((h @ c[t] + p["D"] * u[t]) * silu(z[t]))
    return np.stack(out) @ p["out_proj"]["kernel"], h


def mamba2(x, p):
    z, u, dt = np.split(x @ p["in_proj"]["kernel"], [12, 36], axis=-1)
    u = convolved(u, p)
    heads = u[:, :12].reshape(len(x), 4, 3)
    b, c = (v.reshape(len(x), 2, 3) for v in (u[:, 12:18], u[:, 18:]))
    dt, a = softplus(dt + p["dt_bias"]), -np.exp(p["A_log"])
    h, out = np.zeros((4, 3, 3)), []
    for t in range(len(x)):
        own_b, own_c = (np.repeat(v[t], 2, axis=0) for v in (b, c))
        grown = dt[t][:, None, None] * heads[t][:, :, None] * own_b[:, None]
        h = np.exp(dt[t] * a)[:, None, None] * h + grown
        y = np.einsum("hpn,hn->hp", h, own_c) + p["D"][:, None] * heads[t]
        gated = (y.reshape(-1) * silu(z[t])).reshape(2, 6)
        gated /= np.sqrt((gated**2).mean(-1, keepdims=True) + 1e-5)
        out.append(gated.reshape(-1) * p["norm"])
    return np.stack(out) @ p["out_proj"]["kernel"], h


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_equations(name):
    params, apply = begun(name)
    y, cache = apply(params, X)
    exact = jax.tree.map(lambda v: np.asarray(v, np.float64), params["params"])
    for row in range(2):
        oracle = mamba1 if name == "Mamba-1" else mamba2
        expected, state = oracle(np.asarray(X[row], np.float64), exact)
        np.testing.assert_allclose(y[row], expected, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(cache.state[row], state, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_sequence_may_be_cut_anywhere(name):
    params, apply = begun(name)
    whole, end = apply(params, X)
    cache, parts = None, []
    for start, stop in ((0, 2), (2, 3), (3, 4), (4, 7)):
        part, cache = apply(params, X[:, start:stop], cache)
        parts.append(part)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_packed_documents_do_not_see_each_other(name):
    """An id that comes back is a new document; the last one goes on in the cache."""
    params, apply = begun(name)
    ids = jnp.tile(jnp.array([0, 0, 1, 1, 0, 0, 0]), (2, 1))
    packed, cache = apply(params, X, segment_ids=ids)
    alone = [apply(params, X[:, a:b]) for a, b in ((0, 2), (2, 4), (4, 7))]
    expected = jnp.concatenate([y for y, _ in alone], axis=1)
    np.testing.assert_allclose(packed, expected, rtol=1e-5, atol=1e-5)
    # The third document is shorter than the convolution: zeros are before it.
    np.testing.assert_allclose(cache.inputs, alone[2][1].inputs, atol=1e-5)
    np.testing.assert_allclose(cache.state, alone[2][1].state, rtol=1e-5, atol=1e-5)


def test_a_document_shorter_than_the_convolution_leaves_no_trace_of_others():
    x = jnp.arange(1.0, 4.0).reshape(1, 3, 1)
    kernel, bias = jnp.ones((3, 1)), jnp.zeros(1)
    y, before = causal_conv(x, kernel, bias, segment_ids=jnp.array([[0, 0, 1]]))
    assert y[0, :, 0].tolist() == [1.0, 3.0, 3.0]
    assert before[0, :, 0].tolist() == [0.0, 3.0]


def test_a_stack_is_its_blocks_in_turn():
    """Norm, block and sum, twice, then a norm; with the caches of the blocks."""
    stack = MambaStack(BLOCKS["Mamba-1"], 2)
    params = stack.init(jax.random.key(3), X)
    y, caches = jax.jit(stack.apply)(params, X)
    layers = params["params"]["layers"]
    x = X
    for i in range(2):
        own = jax.tree.map(lambda v, i=i: v[i], layers)
        normed = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
        part, cache = BLOCKS["Mamba-1"].apply({"params": own["mixer"]}, normed)
        for a, b in zip(caches, cache, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)
        x = x + part
    last = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, last, rtol=1e-5, atol=1e-5)
    more, _ = jax.jit(stack.apply)(params, X[:, :1], caches)
    assert more.shape == (2, 1, WIDTH)


def test_steps_and_decay_begin_as_in_the_released_code():
    begun: Any = Mamba(64).init(jax.random.key(0), jnp.ones((1, 1, 64)))
    params = begun["params"]
    steps = jax.nn.softplus(params["dt_bias"])
    assert 9e-4 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.11
    np.testing.assert_allclose(jnp.exp(params["A_log"][5]), np.arange(1, 17), rtol=1e-6)
    assert params["dt_proj"]["kernel"].shape == (4, 128)


def test_bfloat16_computes_in_it_and_remembers_in_float32():
    params, _ = begun("Mamba-1")
    block = BLOCKS["Mamba-1"].clone(dtype=jnp.bfloat16)
    y, cache = jax.jit(block.apply)(params, X)
    expected, _ = begun("Mamba-1")[1](params, X)
    assert y.dtype == jnp.bfloat16 and isinstance(cache, Cache)
    assert cache.state.dtype == jnp.float32
    assert (
        np.abs(np.asarray(y, np.float32) - expected).max()
        < 0.03 * jnp.abs(expected).max()
    )


def test_heads_divide_the_channels():
    with pytest.raises(ValueError, match="argument 'heads' is 5, expected a divisor"):
        Mamba2(WIDTH, heads=5).init(jax.random.key(0), X)
