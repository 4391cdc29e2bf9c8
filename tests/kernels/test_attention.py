"""Attention against float64 NumPy, jax.nn, and its own definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import CASES, check
from hypothesis import given, settings
from hypothesis import strategies as st
from running import interpret

from pallas_kernels.attention import (
    Dropout,
    attention,
    pallas_tpu,
    shifted_groups,
    xla,
)

# Small blocks: short lengths have several, full, cut off and skipped ones.
xla.TILE = (16, 8)


def every_pair(**_: Any) -> str:
    return f"{len(CASES)} cases in which every pair of options occurs"


@pytest.mark.stage(
    "attention", "xla", "oracle", lambda: f"320 inputs drawn for {every_pair()}"
)
@settings(max_examples=320, deadline=None, derandomize=True)
@given(st.integers(0, len(CASES) - 1), st.integers(0, 2**31 - 1))
def test_xla_is_the_oracle(number, seed):
    check(CASES[number], "xla", seed)


@pytest.mark.stage("attention", "ref", "oracle", every_pair)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_ref_is_the_oracle(number):
    check(CASES[number], "ref", number)


QKV = jax.random.normal(jax.random.key(0), (3, 2, 21, 4, 8))


def few_heads(x):
    return x[:, :, :2]


@pytest.mark.parametrize("implementation", ["ref", "xla"])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"is_causal": True},
        {"local_window_size": 3},
        {"is_causal": True, "local_window_size": (4, 1)},
        {"bias": True, "mask": True, "scale": 0.3},
    ],
    ids=" ".join,
)
def test_it_drops_in_for_jax_nn(implementation, words):
    q, k, v = QKV[0], *map(few_heads, QKV[1:])
    theirs, ours = dict(words), dict(words)
    if "bias" in words:
        theirs["bias"] = jax.random.normal(jax.random.key(1), (2, 4, 21, 21))
        theirs["mask"] = jnp.tile(jnp.arange(21) % 4 != 1, (2, 4, 21, 1))
        ours |= theirs
    if "local_window_size" in ours:
        ours["window"] = ours.pop("local_window_size")
    wanted = jax.nn.dot_product_attention(q, k, v, **theirs)
    got = attention(q, k, v, implementation=implementation, **ours)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_causal_counts_from_the_first_of_both_as_in_jax_nn():
    q, k, v = QKV[0, :, :9], *map(few_heads, QKV[1:])
    wanted = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    got = attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def everything(implementation):
    """A scalar of float arguments with every option on."""
    ids = jnp.sort(jax.random.randint(jax.random.key(2), (2, 21), 0, 3), axis=1)
    knobs = {
        "mask": jax.random.bernoulli(jax.random.key(3), 0.8, (1, 4, 21, 21)),
        "dropout": (0.2, jax.random.key(4)),
        "implementation": implementation,
    }

    def value(q, k, v, bias, sinks):
        out, lse = attention(
            q, k, v, bias=bias, sinks=sinks, window=(12, 3), segment_ids=ids,
            logit_softcap=3.0, return_lse=True, **knobs,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    bias = jax.random.normal(jax.random.key(5), (2, 4, 1, 21))
    return value, (QKV[0], *map(few_heads, QKV[1:]), bias, jnp.arange(4.0))


def test_forward_mode_and_second_derivatives_are_those_of_the_definition():
    blocks, args = everything("xla")
    whole, _ = everything("ref")
    tangents = tuple(jnp.sin(3 * x) for x in args)

    def both(function):
        value, change = jax.jvp(function, args, tangents)
        slopes = jax.grad(function, tuple(range(5)))

        def along(*args):  # the product of the Hessian with the tangents
            return sum(map(jnp.vdot, slopes(*args), tangents))

        reverse = jax.grad(along, tuple(range(5)))(*args)
        forward = jax.jvp(slopes, args, tangents)[1]
        return value, change, reverse, forward

    for a, b in zip(
        *(jax.tree.leaves(jax.jit(lambda f=f: both(f))()) for f in (blocks, whole)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_vmap_jit_and_remat_change_nothing():
    function, args = everything("xla")
    alone = jax.grad(function)(*args)
    assert jnp.allclose(jax.jit(jax.grad(jax.checkpoint(function)))(*args), alone)
    stacked = [jnp.stack([x, x / 2]) for x in args]
    together = jax.vmap(jax.grad(function))(*stacked)
    halves = jax.grad(function)(*(x / 2 for x in args))
    np.testing.assert_allclose(together, jnp.stack([alone, halves]), atol=2e-6)


def test_rows_that_see_nothing_are_zero_with_zero_gradient():
    mask = (jnp.arange(21) % 3 != 0)[None, None, :, None]  # whole rows
    implementation: Any
    for implementation in ("ref", "xla"):

        def total(q, k, v, implementation=implementation):
            out, lse = attention(
                q, k, v, mask=mask, return_lse=True, implementation=implementation
            )
            return jnp.sum(out) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0)), out

        (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*QKV)
        assert not np.any(out[:, ::3]) and np.all(out[:, 1] != 0)
        assert not np.any(grads[0][:, ::3])
        assert all(np.all(np.isfinite(g)) for g in grads)


def test_masked_values_may_be_anything():
    q, k, v = QKV
    k, v = k.at[:, 5].set(jnp.inf), v.at[:, 5].set(1e30)
    mask = (jnp.arange(21) != 5)[None, None, None]
    got = attention(q, k.at[:, 5].set(1e30), v, mask=mask)
    wanted = attention(*(jnp.delete(x, 5, 1) for x in (q, k, v)))
    np.testing.assert_allclose(np.delete(got, 5, 1), wanted, rtol=1e-5, atol=1e-6)


def test_float16_logits_beyond_its_range():
    q, k, v = (100 * QKV[0], 100 * QKV[1], QKV[2])
    out = attention(*(x.astype(jnp.float16) for x in (q, k, v)))
    wanted = attention(*(x.astype(jnp.float16).astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, rtol=2e-3, atol=2e-3)


def test_dropout_drops_its_share_and_keeps_the_mean():
    q, k = jnp.zeros((1, 64, 4, 4)), jnp.zeros((1, 500, 4, 4))
    out = attention(q, k, jnp.ones_like(k), dropout=(0.3, jax.random.key(0)))
    # Mean of 500 weights, each 0 or 1 / 0.7.
    assert abs(out.mean() - 1) < 4 * (0.3 / 0.7 / 500 / 256) ** 0.5
    assert 0.7 < out[..., 0].std() / (0.3 / 0.7 / 500) ** 0.5 < 1.3
    other = attention(q, k, jnp.ones_like(k), dropout=(0.3, jax.random.key(1)))
    assert np.mean(out[..., 0] == other[..., 0]) < 0.2
    zero = attention(*QKV, dropout=Dropout(0.0, jax.random.key(0)))
    np.testing.assert_array_equal(zero, attention(*QKV))


def test_shifted_groups_are_rolls_of_half_the_heads():
    ids = shifted_groups(16, 4, 8, key_heads=2)
    q, k, v = QKV[0, :, :16], *(few_heads(x)[:, :16] for x in QKV[1:])
    got = attention(q, k, v, is_causal=True, segment_ids=ids)

    def grouped(x):  # of one key head and its queries, length 8 each
        return x.reshape(-1, 8, *x.shape[2:])

    plain = attention(*map(grouped, (q[:, :, :2], k[:, :, :1], v[:, :, :1])),
                      is_causal=True).reshape(2, 16, 2, 8)  # fmt: skip
    np.testing.assert_allclose(got[:, :, :2], plain, atol=1e-6)
    moved = [jnp.roll(x, -4, axis=1) for x in (q[:, :, 2:], k[:, :, 1:], v[:, :, 1:])]
    # What the roll wraps around: the last four of the last group are the first four.
    wrap = jnp.tile(jnp.array([[0] * 8, [0] * 4 + [1] * 4]), (2, 1))
    rolled = attention(*map(grouped, moved), is_causal=True, segment_ids=wrap)
    rolled = jnp.roll(rolled.reshape(2, 16, 2, 8), 4, axis=1)
    np.testing.assert_allclose(got[:, :, 2:], rolled, atol=1e-6)


def temporary(length, **knobs):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, **knobs) ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes


def test_memory_is_linear_in_length():
    short, long = (temporary(n, is_causal=True) for n in (512, 2048))
    assert long < 4.2 * short
    assert long < temporary(2048, is_causal=True, implementation="ref") / 10


def test_tiles_outside_of_the_window_are_skipped():
    def poisoned(window):
        """Keys from 16 on are NaN: they leak where a tile is touched at all."""
        k = QKV[1].at[:, 16:].set(jnp.nan)
        return attention(QKV[0], k, QKV[2], window=window)

    assert np.all(np.isfinite(poisoned((None, 0))[:, :16]))
    assert np.all(np.isfinite(poisoned((2, 1))[:, :8]))


@pytest.fixture
def interpreted(monkeypatch):
    interpret(monkeypatch, pallas_tpu)


def test_the_tpu_kernels_are_behind_the_same_call(interpreted):
    ids = jnp.sort(jax.random.randint(jax.random.key(2), (2, 21), 0, 3), axis=1)
    knobs = {"segment_ids": ids, "window": (9, 2), "logit_softcap": 2.0}
    knobs |= {"dropout": (0.2, jax.random.key(4)), "return_lse": True}

    def total(q, k, v, sinks, implementation: Any):
        out, lse = attention(
            q, k, v, sinks=sinks, implementation=implementation, **knobs
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)

    args = (QKV[0], *map(few_heads, QKV[1:]), jnp.arange(4.0))
    both = [
        jax.jit(
            jax.value_and_grad(total, (0, 1, 2, 3), has_aux=True), static_argnums=4
        )(*args, name)
        for name in (None, "xla")
    ]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_what_the_tpu_kernels_lack_is_said_and_names_xla(interpreted):
    def total(q):
        return jnp.sum(attention(q, *QKV[1:], implementation="pallas_tpu") ** 2)

    with pytest.raises(NotImplementedError, match='implementation="xla" has them'):
        jax.jvp(jax.grad(total), (QKV[0],), (QKV[0],))
    with pytest.raises(NotImplementedError, match='implementation="xla" has them'):
        jax.jvp(total, (QKV[0],), (QKV[0],))
    with pytest.raises(TypeError, match="forward-mode"):  # from the compiler
        jax.jvp(jax.jit(total), (QKV[0],), (QKV[0],))
