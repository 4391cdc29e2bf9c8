"""Attention in float64 NumPy, from its definition, and the cases drawn for it."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import Dropout, attention

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
