"""Monarch against NumPy's FFT and direct sums in float64, dense, sliding, sparse."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.sequence import flashfftconv
from jaxzoo.sequence.flashfftconv import (
    fft_conv,
    monarch_cost,
    monarch_fft,
)
from jaxzoo.training.cost import count


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def directly(u, k):
    """y[t] = sum_s k[s] u[t - s], one tap after the other, in float64."""
    y = np.zeros(u.shape)
    for s in range(min(len(k), u.shape[1])):
        y[:, s:] += k[s].astype(np.float64) * u[:, : u.shape[1] - s]
    return y


def with_zeroed_spectrum(u, k, factors, keep):
    """By NumPy's FFT of 4 M points, whose odd bins are the spectrum that is zeroed.

    Bin 4 j - 1 is the frequency of index j = j_1 + N_1 (j_2 + N_2 (j_3 + ...)); bin
    4 M - (4 j - 1) is its mirror image, and even bins say how a sequence of 2 M numbers
    wraps around. Wrapped with the sign changed, what is beyond 2 M belongs to it.
    """
    half = math.prod(factors)
    bins = np.zeros(4 * half)
    for j in range(half):
        rest, kept = j, True
        for size, few in zip(factors, keep, strict=True):
            rest, index = divmod(rest, size)
            kept &= index < (few + 1) // 2 or index >= size - few // 2
        bins[(4 * j - 1) % (4 * half)] = bins[(1 - 4 * j) % (4 * half)] = kept
    u, k = (np.fft.fft(x.astype(np.float64), 4 * half, axis=-2) for x in (u, k))
    y = np.fft.ifft(u * k * bins[:, None], axis=-2).real
    # The odd bins alone are those of half the sequence less the half that wraps.
    return 2 * y[:, : 2 * half]


def assert_near(actual, expected, rtol=1e-5):
    expected = np.asarray(expected)
    scale = np.abs(expected).max(initial=0.0)
    assert_allclose(actual, expected, rtol=0, atol=rtol * max(scale, 1e-30))


@functools.lru_cache
def compiled(**knobs):
    return jax.jit(functools.partial(fft_conv, **knobs))


@pytest.mark.parametrize(
    "factors",
    [
        None,
        (1,),
        (7,),
        (4, 4),
        (2, 8),
        (8, 3),
        (5, 1, 7),
        (4, 4, 4),
        (2, 3, 5),
        (2, 3, 2, 4),
    ],
)
@pytest.mark.parametrize("inverse", [False, True])
def test_transform_is_numpys(factors, inverse):
    n = 24 if factors is None else math.prod(factors)
    real, imag = normal(2, 3, 2, n)
    run = jax.jit(functools.partial(monarch_fft, factors=factors, inverse=inverse))
    got = run(real, imag)
    transform = np.fft.ifft if inverse else np.fft.fft
    expected = transform(real.astype(np.float64) + 1j * imag)
    assert_near(got[0], expected.real, 1e-6)
    assert_near(got[1], expected.imag, 1e-6)


@pytest.mark.parametrize("factors", [(64, 64), (16, 16, 16), (8, 8, 8, 8)])
def test_long_sequences_of_every_order(factors):
    u, k = normal(2, 4096, 2), normal(4096, 2, seed=1)
    spectra = (np.fft.rfft(x.astype(np.float64), 8192, axis=-2) for x in (u, k))
    expected = np.fft.irfft(math.prod(spectra), axis=-2)[:, :4096]
    assert_near(compiled(factors=factors)(u, k), expected)


# A few shapes, so that programs are compiled once; what is drawn are their numbers.
BUCKETS = [
    (1, 1, None), (1, 5, None), (2, 1, (2,)), (7, 7, (3, 3)), (16, 16, (4, 4)),
    (17, 5, None), (31, 31, (2, 4, 4)), (40, 8, (3, 3)), (40, 9, (9,)), (30, 40, None),
    (64, 3, (2, 2, 2)), (50, 20, (2, 3, 2, 2)),
]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(BUCKETS), st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e4])
)
def test_drawn_convolutions(bucket, seed, size):
    time, taps, factors = bucket
    rng = np.random.default_rng(seed)
    u, k = (rng.normal(size=s) * size for s in ((2, time, 3), (taps, 3)))
    u, k = (x.astype(np.float32) for x in (u, k))
    u[rng.random(u.shape) < 0.3] = 0.0
    assert_near(compiled(factors=factors)(u, k), directly(u, k))


def test_gates():
    u, before, after = normal(3, 2, 19, 4)
    k = normal(6, 4, seed=1)
    got = jax.jit(fft_conv)(u, k, pregate=before, postgate=after)
    assert_near(got, after * directly(u * before, k))


def test_gradients_are_correlations():
    """du = k backwards over dy, dk = u over dy, in float64 by shifted sums."""
    u, before, after, dy = normal(4, 2, 19, 3)
    k = normal(7, 3, seed=1)

    @jax.jit
    def gradients(u, k, before, after):
        def total(u, k, before, after):
            y = fft_conv(u, k, pregate=before, postgate=after, factors=(3, 3))
            return jnp.sum(y * dy)

        return jax.grad(total, (0, 1, 2, 3))(u, k, before, after)

    wide = [x.astype(np.float64) for x in (u, k, before, after, dy)]
    u64, k64, before64, after64, dy64 = wide
    flow = dy64 * after64
    into = directly(flow[:, ::-1].astype(np.float64), k64)[:, ::-1]
    gated = u64 * before64
    dk = [(flow[:, s:] * gated[:, : 19 - s]).sum((0, 1)) for s in range(len(k))]
    expected = into * before64, np.stack(dk), into * u64, dy64 * directly(gated, k64)
    for got, wanted in zip(gradients(u, k, before, after), expected, strict=True):
        assert_near(got, wanted)


def test_the_future_has_no_influence_and_late_taps_no_effect():
    u, k = normal(1, 20, 2), normal(30, 2, seed=1)
    y = compiled()(u, k)
    later = u.copy()
    later[:, 11:] = 1e3
    assert_allclose(compiled()(later, k)[:, :11], y[:, :11], atol=2e-3)  # of 1e3
    k[20:] = np.inf
    assert_array_equal(compiled()(u, k), y)


def test_a_delay_shifts():
    u, k = normal(2, 24, 2), np.zeros((12, 2), np.float32)
    k[9] = 1.0
    for factors in ((4, 6), (3, 4)):  # whole, and in two blocks
        y = compiled(factors=factors)(u, k)
        assert_near(y[:, 9:], u[:, :-9], 1e-6)
        assert_allclose(y[:, :9], 0, atol=1e-5)


@pytest.mark.parametrize(
    "factors, keep",
    [
        ((4, 4), (2, 4)), ((4, 4), (4, 2)), ((4, 4), (3, 1)), ((6, 3), (1, 3)),
        ((2, 3, 4), (1, 2, 3)), ((2, 2, 2, 3), (2, 1, 2, 2)), ((16,), (5,)),
    ],
)  # fmt: skip
def test_skipped_blocks_are_zeros_of_the_spectrum(factors, keep):
    half = math.prod(factors)
    u, k = normal(2, half, 3), normal(half - 3, 3, seed=1)
    got = compiled(factors=factors, keep=keep)(u, k)
    expected = with_zeroed_spectrum(u, k, factors, keep)
    assert_near(got, expected[:, :half])
    assert np.abs(got - directly(u, k)).max() > 0.1  # something was cut


def test_keeping_all_is_the_convolution():
    u, k = normal(2, 23, 3), normal(23, 3, seed=1)
    assert_near(compiled(factors=(5, 5), keep=(5, 5))(u, k), directly(u, k))


def test_keeping_the_last_factors_lowest_indices_is_a_low_pass_filter():
    t = np.arange(64)
    slow, fast = (np.cos(2 * np.pi * f * t / 64)[None, :, None] for f in (2, 25))
    k = np.zeros((64, 1), np.float32)
    k[0] = 1.0
    run = compiled(factors=(8, 8), keep=(8, 4))
    kept, cut = (run(x.astype(np.float32), k) for x in (slow, fast))
    inside = slice(8, 56)  # the ends of a cosine have all frequencies
    assert_allclose(kept[:, inside], slow[:, inside], atol=0.1)
    assert np.abs(cut[:, inside]).max() < 0.1


def products(function, *shapes):
    given_shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return count(jax.make_jaxpr(function)(*given_shapes)).matmul_flops


def test_flops_of_products_in_closed_form():
    """8 N_i per complex number and factor; half where in- or output is real."""
    n, width = 4096, 3
    for factors in ((64, 64), (16, 16, 16), (8, 8, 8, 8)):
        transform = functools.partial(monarch_fft, factors=factors)
        assert products(transform, (width, n), (width, n)) == 8 * n * width * sum(
            factors
        )
        conv = functools.partial(fft_conv, factors=factors)
        one = 8 * n * width * (sum(factors) - factors[0] / 2)
        assert products(conv, (2, n, width), (n, width)) == (2 * 2 + 1) * one


@pytest.mark.parametrize("rows", [1, 4, 8, 15, 16])
def test_flops_fall_by_the_share_that_is_skipped(rows):
    shapes = (1, 256, 4), (256, 4)
    whole = products(functools.partial(fft_conv, factors=(16, 16)), *shapes)
    conv = functools.partial(fft_conv, factors=(16, 16), keep=(rows, 16))
    assert products(conv, *shapes) / whole == rows / 16


def test_the_backward_pass_keeps_inputs_and_transforms_them_again():
    u, k = (4, 64, 4), (64, 4)

    def conv(u, k, before, after):
        return fft_conv(u, k, pregate=before, postgate=after, factors=(8, 8))

    def kept(batch):
        rows = jax.ShapeDtypeStruct((batch, *u[1:]), jnp.float32)
        arrays = rows, jax.ShapeDtypeStruct(k, jnp.float32), rows, rows
        leaves = jax.eval_shape(lambda *a: jax.vjp(conv, *a)[1], *arrays)
        return sum(x.size for x in jax.tree.leaves(leaves))

    # What does not grow with the batch are k and the matrices.
    assert kept(6) - kept(4) == 3 * 2 * math.prod(u[1:])
    forward = products(lambda u, k: fft_conv(u, k, factors=(8, 8)), u, k)
    both = products(
        jax.grad(lambda u, k: jnp.sum(fft_conv(u, k, factors=(8, 8)) ** 2), (0, 1)),
        u, k,
    )  # fmt: skip
    # 2 B + 1 transforms forward; backward all but the last once more, and 2 B + 1.
    assert both <= 3 * forward


def test_order_by_the_cost_model():
    lengths = 2 ** np.arange(8, 23)
    cost = monarch_cost(lengths)
    order = np.asarray(cost["order"])
    assert order[0] == 2 and order[-1] == 4 and np.all(np.diff(order) >= 0)
    assert_array_equal(order, [len(flashfftconv._factors(int(n))) for n in lengths])
    for n in (1, 2, 63, 64, 65, 4097, 40000):
        assert n <= math.prod(flashfftconv._factors(n)) < 1.2 * n + 4
    # By hand: 2 x 16 N sqrt(N) FLOPs, and 8 N bytes in either pass, one of them slow.
    seconds = 2 * 16 * 4096 * 64 / 234e12 + 8 * 4096 * (1 / 1.35e12 + 1 / 9.5e12)
    assert_allclose(cost["seconds"][0, 4], seconds, rtol=1e-5)
    small = monarch_cost(np.array([64]), unit=16)  # 8 x 8: not for the matrix units
    seconds = 2 * 16 * 64 * 8 / 17.6e12 + 8 * 64 * (1 / 1.35e12 + 1 / 9.5e12)
    assert_allclose(small["seconds"][0, 0], seconds, rtol=1e-5)


def test_extremes_and_small_floats():
    u, k = normal(2, 16, 2), normal(16, 2, seed=1)
    run = compiled(factors=(4, 4))
    small = run(jnp.asarray(u, jnp.bfloat16), jnp.asarray(k, jnp.float16))
    assert small.dtype == jnp.float32
    assert_near(run(u * 1e18, k * 1e18) / 1e36, directly(u, k))
    gradient = jax.jit(jax.grad(lambda u, k: run(u, k).sum(), (0, 1)))
    assert all(np.all(np.isfinite(g)) for g in gradient(u * 1e30, k * 1e30))


def test_bad_arguments_are_named():
    u, k = normal(2, 16, 2), normal(16, 2, seed=1)
    with pytest.raises(
        ValueError, match=r"'factors' is \(3, 5\), expected .* least 16"
    ):
        fft_conv(u, k, factors=(3, 5))
    with pytest.raises(ValueError, match=r"'factors' is \(\), expected"):
        fft_conv(u, k, factors=())
    with pytest.raises(ValueError, match=r"'factors' is \(-4, -4\), expected"):
        fft_conv(u, k, factors=(-4, -4))
    with pytest.raises(ValueError, match=r"'factors' is \(4, 5\), expected .* is 16"):
        monarch_fft(u[..., 0], u[..., 1], factors=(4, 5))
    with pytest.raises(ValueError, match=r"'keep' is \(4,\), expected"):
        fft_conv(u, k, factors=(4, 4), keep=(4,))
    with pytest.raises(ValueError, match=r"'keep' is \(5, 4\), expected"):
        fft_conv(u, k, factors=(4, 4), keep=(5, 4))
    with pytest.raises(TypeError, match=r"argument 'k' is float32\[16,1\]"):
        fft_conv(u, k[:, :1])
    with pytest.raises(TypeError, match=r"argument 'pregate' is float32\[2,16,1\]"):
        fft_conv(u, k, pregate=u[..., :1])
