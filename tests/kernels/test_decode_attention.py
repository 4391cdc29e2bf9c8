"""Attention to a cache is attention to the tokens that are in it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import attention, decode, decode_attention

decode.BLOCK = 8

Q = jax.random.normal(jax.random.key(0), (3, 2, 4, 8))
K, V = jax.random.normal(jax.random.key(1), (2, 3, 29, 2, 8))
LENGTHS = jnp.array([29, 2, 13])
SINKS = jnp.array([0.3, -1.0, 2.0, 0.0])


def wanted(q, k, v, lengths, *, window=None, **knobs):
    rows = []
    for row, (count, size) in enumerate(zip(lengths, [q.shape[1]] * 3, strict=True)):
        # The query's position is counted from the first token, as the keys' are.
        places = np.arange(count - size, count)[:, None]
        keys = np.arange(count)[None]
        mask = keys <= places
        if window is not None:
            mask &= keys >= places - window
        rows.append(
            attention(
                q[row : row + 1], k[row : row + 1, :count], v[row : row + 1, :count],
                mask=jnp.asarray(mask)[None, None], return_lse=True,
                implementation="ref", **knobs,
            )
        )  # fmt: skip
    return [jnp.concatenate(x) for x in zip(*rows, strict=True)]


def paged(cache, size, key):
    """The cache in shuffled pages, with NaN in those that nobody has."""
    batch, length = cache.shape[:2]
    count = -(-length // size)
    padded = jnp.pad(cache, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    places = jax.random.permutation(key, batch * count + 4)[: batch * count]
    pool = jnp.full((batch * count + 4, size, *cache.shape[2:]), jnp.nan)
    pool = pool.at[places].set(padded.reshape(-1, size, *cache.shape[2:]))
    return pool, places.reshape(batch, count)


@pytest.mark.parametrize("page", [None, 1, 4, 16])
@pytest.mark.parametrize(
    "knobs",
    [{}, {"window": 5}, {"sinks": SINKS}, {"logit_softcap": 1.5, "scale": 0.7}],
    ids=lambda knobs: "_".join(knobs) or "plain",
)
def test_it_is_attention_to_the_tokens(page, knobs):
    expected = wanted(Q, K, V, LENGTHS.tolist(), **knobs)
    # What lies behind a row's end is not read.
    behind = jnp.arange(29)[None, :, None, None] >= LENGTHS[:, None, None, None]
    k, v = (jnp.where(behind, jnp.nan, x) for x in (K, V))
    extra: dict[str, Any] = {}
    if page is not None:
        (k, pages), (v, _) = (paged(x, page, jax.random.key(2)) for x in (k, v))
        used = jnp.arange(pages.shape[1])[None] * page < LENGTHS[:, None]
        extra["pages"] = jnp.where(used, pages, -1)
    got = jax.jit(lambda q, k, v: decode_attention(
        q, k, v, LENGTHS, return_lse=True, **extra, **knobs
    ))(Q, k, v)  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_rows_not_in_use_are_zero_and_half_precision_is_summed_in_float32():
    lengths = jnp.array([0, 1, 13])
    out, lse = decode_attention(Q, K, V, lengths, return_lse=True)
    assert not np.any(out[0]) and np.all(np.isneginf(lse[0]))
    assert not np.any(out[1, 0]) and np.all(out[1, 1] != 0)  # before the first token
    q, k, v = (x.astype(jnp.bfloat16) for x in (Q, K, V))
    small = decode_attention(q, k, v, jnp.array([29, 29, 29]))
    exact = decode_attention(Q, K, V, jnp.array([29, 29, 29]))
    assert small.dtype == jnp.bfloat16
    np.testing.assert_allclose(small.astype(jnp.float32), exact, atol=3e-2)


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="'k_cache' is bfloat16.*expected float32"):
        decode_attention(Q, K.astype(jnp.bfloat16), V, LENGTHS)
    with pytest.raises(TypeError, match=r"'v_cache' is .*as 'k_cache' has"):
        decode_attention(Q, K, V[:, :3], LENGTHS)
    with pytest.raises(TypeError, match="'k_cache' .*heads that divide the 3"):
        decode_attention(Q[:, :, :3], K, V, LENGTHS)
    with pytest.raises(TypeError, match=r"'lengths' is int32\[2\], expected"):
        decode_attention(Q, K, V, LENGTHS[:2])
    with pytest.raises(TypeError, match=r"'pages' is int32\[3\], expected"):
        decode_attention(Q, K, V, LENGTHS, pages=LENGTHS)
    with pytest.raises(TypeError, match="'sinks'"):
        decode_attention(Q, K, V, LENGTHS, sinks=SINKS[:2])
    with pytest.raises(ValueError, match="'window' is 0"):
        decode_attention(Q, K, V, LENGTHS, window=0)
