"""Attention against float64 NumPy, jax.nn, and its own definition."""

import functools
import itertools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import (
    Dropout,
    attention,
    pallas_tpu,
    shifted_groups,
    xla,
)

# Small blocks: short lengths have several, full, cut off and skipped ones.
xla.TILE = (16, 8)


# The oracle: one row at a time, from the definition.


def mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def kept(seed, head, t, s, rate):
    state = mix(int(seed[0]) ^ (head * 0x9E3779B1 % 2**32))
    state = mix(state ^ int(seed[1]) ^ (t * 0x85EBCA77 % 2**32))
    return mix(state ^ (s * 0xC2B2AE3D % 2**32)) >= round(rate * 2**32)


def oracle(q, k, v, d_out, d_lse, *, counts, bias, cap, scale, sinks, seed, rate):
    """Value and gradients; `counts` and `bias` are whole [B, N, T, S]."""
    (batch, length, heads, _), keys = q.shape, k.shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    grads = [np.zeros(x.shape) for x in (q, k, v, bias, sinks)]
    for b, n, t in np.ndindex(batch, heads, length):
        m = n // (heads // k.shape[2])
        raw = k[b, :, m] @ q[b, t, n] * scale + bias[b, n, t]
        logits, slope = raw, np.ones(keys)
        if cap is not None:
            logits = cap * np.tanh(raw / cap)
            slope = 1 - (logits / cap) ** 2
        seen = np.flatnonzero(counts[b, n, t])
        entries = np.append(logits[seen], sinks[n])
        entries = entries[entries > -np.inf]
        if not len(entries):
            continue
        lse[b, t, n] = entries.max() + np.log(np.exp(entries - entries.max()).sum())
        p = np.zeros(keys)
        p[seen] = np.exp(logits[seen] - lse[b, t, n])
        scaled = np.ones(keys)
        if seed is not None:
            row = [kept(seed, b * heads + n, t, s, rate) for s in range(keys)]
            scaled = np.array(row) / (1 - rate)
        out[b, t, n] = (p * scaled) @ v[b, :, m]
        d = d_out[b, t, n]
        grads[2][b, :, m] += np.outer(p * scaled, d)
        inner = d @ out[b, t, n] - d_lse[b, t, n]
        d_logits = p * (scaled * (v[b, :, m] @ d) - inner) * slope
        grads[0][b, t, n] = scale * d_logits @ k[b, :, m]
        grads[1][b, :, m] += scale * np.outer(d_logits, q[b, t, n])
        grads[3][b, n, t] = d_logits
        grads[4][n] -= np.exp(sinks[n] - lse[b, t, n]) * inner
    return out, lse, grads


class Case(NamedTuple):
    """What is static in a call; values are drawn."""

    shape: tuple[int, ...]  # B, T, S, N, K, H
    causal: bool
    window: Any
    segments: str
    bias: str
    mask: str
    cap: float | None
    sinks: bool
    rate: float
    dtype: str


CHOICES = {
    "shape": [
        (2, 21, 21, 4, 2, 8), (1, 16, 29, 2, 1, 5), (2, 1, 19, 2, 2, 4),
        (1, 13, 1, 3, 1, 8), (2, 0, 5, 2, 2, 4), (1, 9, 0, 2, 1, 4), (1, 1, 1, 1, 1, 1),
    ],
    "causal": [False, True],
    "window": [None, 3, (6, None), (0, 2)],
    "segments": ["none", "pair", "heads"],
    "bias": ["none", "row", "full"],
    "mask": ["none", "keys", "full"],
    "cap": [None, 2.0],
    "sinks": [False, True],
    "rate": [0.0, 0.3],
    "dtype": ["float32", "bfloat16", "float16"],
}  # fmt: skip


def covering() -> list[Case]:
    """Cases in which every pair of choices of two options occurs."""
    rng = np.random.default_rng(0)
    names = list(CHOICES)
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(CHOICES[a]))
        for j in range(len(CHOICES[b]))
    }
    cases = []
    while left:
        tries = []
        for _ in range(60):
            picks = [(n, int(rng.integers(len(CHOICES[n])))) for n in names]
            new = left & set(itertools.combinations(picks, 2))
            tries.append((len(new), picks, new))
        _, picks, new = max(tries, key=lambda entry: entry[0])
        left -= new
        cases.append(Case(*(CHOICES[n][i] for n, i in picks)))
    return cases


CASES = covering()


@functools.cache
def compiled(case: Case, implementation: Any):
    """Value and gradients of q, k, v, bias and sinks as one compiled function."""

    def call(floats, others, weights):
        kwargs = {k: x for k, x in {**floats, **others}.items() if k not in "qkv"}
        if "key" in kwargs:
            kwargs["dropout"] = Dropout(case.rate, kwargs.pop("key"))
        out, lse = attention(
            floats["q"], floats["k"], floats["v"], is_causal=case.causal,
            window=case.window, logit_softcap=case.cap, return_lse=True,
            implementation=implementation, **kwargs,
        )  # fmt: skip
        some = jnp.isfinite(lse)
        total = jnp.sum(weights[0] * out.astype(jnp.float32))
        return total + jnp.sum(jnp.where(some, weights[1] * lse, 0.0)), (out, lse)

    return jax.jit(jax.value_and_grad(call, has_aux=True))


def drawn(case: Case, seed: int):
    """Inputs of a case; some rows see nothing."""
    rng = np.random.default_rng(seed)
    batch, length, keys, heads, key_heads, width = case.shape
    size = rng.choice([0.3, 1.0, 4.0])

    def normal(*shape):
        return rng.normal(size=shape)

    floats = {
        "q": size * normal(batch, length, heads, width),
        "k": normal(batch, keys, key_heads, width),
        "v": normal(batch, keys, key_heads, width),
    }
    others: dict[str, Any] = {}
    if case.bias != "none":
        floats["bias"] = normal(
            *((1, heads, 1, keys) if case.bias == "row"
              else (batch, heads, length, keys))
        )  # fmt: skip
    if case.sinks:
        floats["sinks"] = normal(heads)
    floats = {n: jnp.asarray(x, case.dtype) for n, x in floats.items()}
    if case.mask == "keys":
        others["mask"] = rng.random((batch, 1, 1, keys)) < 0.7
    elif case.mask == "full":
        others["mask"] = rng.random((batch, heads, length, keys)) < 0.6
    if case.segments != "none":
        ids = [np.sort(rng.integers(0, 3, (batch, n)), 1) for n in (length, keys)]
        if case.segments == "heads":
            # As shifted groups: a query head and its key head have the same shift.
            shift = rng.integers(0, 2, key_heads)
            groups = np.repeat(shift, heads // key_heads)
            ids = [x[..., None] + s for x, s in zip(ids, (groups, shift), strict=True)]
        others["segment_ids"] = tuple(jnp.asarray(x, jnp.int32) for x in ids)
    if case.rate:
        others["key"] = jax.random.key(seed)
    # The gradient of the output comes in its dtype.
    d_out = jnp.asarray(normal(batch, length, heads, width), case.dtype)
    d_lse = jnp.asarray(normal(batch, length, heads), jnp.float32)
    return floats, others, (d_out.astype(jnp.float32), d_lse)


def expected(case: Case, floats, others, weights):
    batch, length, keys, heads, key_heads, width = case.shape
    whole = (batch, heads, length, keys)
    f64 = {n: np.asarray(x.astype(jnp.float32), np.float64) for n, x in floats.items()}
    rows, columns = np.arange(length)[:, None], np.arange(keys)[None]
    counts = np.broadcast_to(others.get("mask", np.True_), whole).copy()
    if case.causal:
        counts &= columns <= rows
    if case.window is not None:
        window = case.window if isinstance(case.window, tuple) else (case.window,) * 2
        left, right = (10**6 if side is None else side for side in window)
        counts &= (columns >= rows - left) & (columns <= rows + right)
    if "segment_ids" in others:
        ids, key_ids = (np.asarray(x) for x in others["segment_ids"])
        ids = ids if ids.ndim == 3 else ids[..., None]
        key_ids = key_ids if key_ids.ndim == 3 else key_ids[..., None]
        key_ids = np.repeat(key_ids, heads // key_ids.shape[2], axis=2)
        same = ids[:, :, None] == key_ids[:, None]
        counts &= same.transpose(0, 3, 1, 2)
    seed = jax.random.bits(others["key"], (2,)) if case.rate else None
    return oracle(
        f64["q"], f64["k"], f64["v"], *(np.float64(w) for w in weights), counts=counts,
        bias=np.broadcast_to(f64.get("bias", 0.0), whole), cap=case.cap,
        scale=width**-0.5, sinks=f64.get("sinks", np.full(heads, -np.inf)),
        seed=None if seed is None else np.asarray(seed), rate=case.rate,
    )  # fmt: skip


BOUND = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def close(actual, wanted, bound):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(finite, np.isfinite(actual))
    actual, wanted = actual[finite], wanted[finite]
    # Of order-one terms that cancel, the rounding stays.
    largest = np.abs(wanted).max(initial=0.03)
    assert np.abs(actual - wanted).max(initial=0.0) <= bound * largest


def check(case, implementation, seed):
    floats, others, weights = drawn(case, seed)
    (_, (out, lse)), got = compiled(case, implementation)(floats, others, weights)
    wanted_out, wanted_lse, grads = expected(case, floats, others, weights)
    bound = BOUND[case.dtype]
    assert out.dtype == case.dtype and lse.dtype == jnp.float32
    close(out, wanted_out, bound)
    close(lse, wanted_lse, bound)
    wanted = dict(zip(("q", "k", "v", "bias", "sinks"), grads, strict=True))
    for name, gradient in got.items():
        whole = wanted[name]
        if name == "bias" and case.bias == "row":
            whole = whole.sum((0, 2), keepdims=True)
        close(gradient, whole, bound)


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


def test_it_says_which_implementation_ran(monkeypatch, capsys):
    attention(*QKV)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    attention(*QKV)
    attention(*QKV, implementation="ref")
    attention(QKV[0], *QKV[1:, :, :0])
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    jax.eval_shape(attention, *QKV)
    jax.eval_shape(functools.partial(attention, bias=jnp.zeros((1, 1, 1, 1))), *QKV)
    said = capsys.readouterr().err.splitlines()
    starts = [
        "xla (there is no kernel for 'cpu'); q float32[2, 21, 4, 8], k [2, 21",
        "ref (asked for)",
        "ref (an axis has length 0",
        "pallas_tpu (the fastest here)",
        "xla (the TPU kernel takes no bias)",
    ]
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(f"attention: {start}")


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernels, interpreted, as the implementation that is chosen."""
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    for name in ("forward", "backward"):
        whole = functools.partial(getattr(pallas_tpu, name), interpret=True)
        monkeypatch.setattr(pallas_tpu, name, whole)


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


BAD = {
    "q 3": (lambda q, k, v: attention(q[0], k, v), TypeError, r"'q' is .*\[21, 4, 8\]"),
    "ints": (lambda q, k, v: attention(q.astype(int), k, v), TypeError, "'q' is int32"),
    "mixed": (
        lambda q, k, v: attention(q, k.astype(jnp.bfloat16), v), TypeError,
        "'k' is bfloat16.*expected float32",
    ),
    "heads": (
        lambda q, k, v: attention(q, k[:, :, :3], v[:, :, :3]), TypeError,
        "'k' .* divides the 4",
    ),
    "v": (lambda q, k, v: attention(q, k, v[:, :9]), TypeError, "'v' is .*as 'k' has"),
    "mask": (
        lambda q, k, v: attention(q, k, v, mask=jnp.ones((2, 21), bool)), TypeError,
        r"'mask' is bool\[2, 21\], expected \[B, N, T, S\] = \[2, 4, 21, 21\]",
    ),
    "mask floats": (
        lambda q, k, v: attention(q, k, v, mask=jnp.ones((1, 1, 21, 21))), TypeError,
        "'mask' is float32.*expected bool",
    ),
    "bias": (
        lambda q, k, v: attention(q, k, v, bias=jnp.ones((2, 4, 21, 20))), TypeError,
        "'bias' is float32",
    ),
    "ids": (
        lambda q, k, v: attention(q, k, v, segment_ids=jnp.ones((2, 20), int)),
        TypeError, "'segment_ids' is int32",
    ),
    "float ids": (
        lambda q, k, v: attention(q, k, v, segment_ids=jnp.ones((2, 21))), TypeError,
        "'segment_ids' is float32",
    ),
    "sinks": (
        lambda q, k, v: attention(q, k, v, sinks=jnp.ones(3)), TypeError, "'sinks'",
    ),
    "window": (
        lambda q, k, v: attention(q, k, v, window=0), ValueError, "'window' is 0",
    ),
    "window pair": (
        lambda q, k, v: attention(q, k, v, window=(-1, 2)), ValueError, "'window' is",
    ),
    "softcap": (
        lambda q, k, v: attention(q, k, v, logit_softcap=0.0), ValueError,
        "'logit_softcap' is 0.0",
    ),
    "scale": (
        lambda q, k, v: attention(q, k, v, scale=float("nan")), ValueError, "'scale'",
    ),
    "rate": (
        lambda q, k, v: attention(q, k, v, dropout=(1.0, jax.random.key(0))),
        ValueError, "'dropout' has rate 1.0",
    ),
    "raw key": (
        lambda q, k, v: attention(q, k, v, dropout=(0.1, jax.random.PRNGKey(0))),
        TypeError, "'dropout' is uint32",
    ),
    "name": (
        lambda q, k, v: attention(q, k, v, implementation=cast(Any, "cudnn")),
        ValueError,
        "'implementation' is 'cudnn', expected one of 'ref', 'xla'",
    ),
    "platform": (
        lambda q, k, v: attention(q, k, v, implementation="pallas_tpu"),
        NotImplementedError, "'pallas_tpu', but the TPU kernel does not run on 'cpu'",
    ),
    "group": (lambda *_: shifted_groups(8, 2, 3), ValueError, "'group' is 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(*QKV)
