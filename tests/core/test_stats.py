"""Densities and log-means against scipy in float64, and what happens at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from jaxzoo.core.stats import (
    bernoulli_log_prob,
    log_mean_exp,
    mean_where,
    normal_kl,
    normal_log_prob,
)

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_normal_log_prob_is_scipys(axis):
    x, mean, log_std = draw(3, 5, 4)
    expected = scipy.stats.norm.logpdf(
        x.astype(np.float64), mean, np.exp(log_std.astype(np.float64))
    ).sum(axis)
    assert_allclose(normal_log_prob(x, mean, log_std, axis=axis), expected, rtol=1e-5)


def test_leading_axes_are_samples_for_either_argument():
    z, mean = draw(6, 5, 4), draw(5, 4)
    each = jnp.stack([normal_log_prob(sample, mean) for sample in z])
    assert_allclose(normal_log_prob(z, mean), each, rtol=1e-6)
    assert_allclose(normal_log_prob(mean, z), each, rtol=1e-6)
    logits = draw(6, 5, 4)
    each = jnp.stack([bernoulli_log_prob(mean > 0, sample) for sample in logits])
    assert_allclose(bernoulli_log_prob(mean > 0, logits), each, rtol=1e-6)


@pytest.mark.parametrize(
    "x, mean", [((8,), (8, 1)), ((8, 1), (8,)), ((4, 8), (4, 1)), ((8,), (1,))]
)
def test_axes_of_size_one_are_never_stretched(x, mean):
    with pytest.raises(TypeError, match=r"argument 'mean' has shape"):
        normal_log_prob(jnp.zeros(x), jnp.zeros(mean))
    with pytest.raises(TypeError, match=r"argument 'logits' has shape"):
        bernoulli_log_prob(jnp.zeros(x), jnp.zeros(mean))
    with pytest.raises(TypeError, match=r"argument 'log_std' has shape"):
        normal_kl(jnp.zeros(x), jnp.zeros(mean))


def test_bernoulli_log_prob_is_the_log_of_the_probability():
    logits = draw(5, 4).astype(np.float64)
    x = (draw(5, 4) > 0).astype(np.float64)
    p = scipy.special.expit(logits)
    expected = np.log(np.where(x == 1, p, 1 - p)).sum(-1)
    assert_allclose(
        bernoulli_log_prob(x.astype(np.float32), logits.astype(np.float32)),
        expected,
        rtol=1e-5,
    )
    images = jnp.ones((2, 3, 3, 1))
    assert bernoulli_log_prob(images, images, axis=(-3, -2, -1)).shape == (2,)
    gradient = jax.grad(lambda v: bernoulli_log_prob(x, v).sum())(jnp.asarray(logits))
    assert_allclose(gradient, x - p, atol=1e-6)


def test_normal_kl_is_the_integral():
    m, s, n, t = 0.3, 0.7, -0.4, 1.6
    grid = np.linspace(-12, 12, 200_001)
    p = scipy.stats.norm.logpdf(grid, m, s)
    q = scipy.stats.norm.logpdf(grid, n, t)
    expected = np.trapezoid(np.exp(p) * (p - q), grid)
    values = [np.array([v], np.float32) for v in (m, np.log(s), n, np.log(t))]
    assert_allclose(normal_kl(*values), expected, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(-10, 10))
def test_kl_is_nonnegative_and_zero_for_the_same(seed, scale):
    rng = np.random.default_rng(seed)
    mean, log_std, other_mean, other_log_std = scale * rng.normal(
        size=(4, 6, 3)
    ).astype(np.float32)
    assert np.all(normal_kl(mean, log_std, other_mean, other_log_std) >= 0)
    assert np.all(normal_kl(mean, log_std, mean, log_std) == 0)


def test_log_mean_exp_is_scipys_and_survives_empty_sums():
    x = 30 * draw(7, 5)
    expected = scipy.special.logsumexp(x.astype(np.float64), axis=0) - np.log(7)
    assert_allclose(log_mean_exp(x), expected, rtol=1e-6)
    x = jnp.array([[-jnp.inf, 0.0], [-jnp.inf, -jnp.inf]])
    value, gradient = jax.value_and_grad(lambda v: log_mean_exp(v)[1])(x)
    assert_allclose(value, -np.log(2), rtol=1e-6)
    assert_allclose(gradient, [[0, 1], [0, 0]])
    assert log_mean_exp(x)[0] == -jnp.inf
    assert np.all(np.isfinite(jax.grad(lambda v: log_mean_exp(v)[0])(x)))
    with pytest.raises(ValueError, match="'x' has no entries along axis 0"):
        log_mean_exp(jnp.zeros((0, 3)))


EXTREMES = [0.0, 1e-30, 40.0, 1e3, 1e4, 1e30, 3e38]


@pytest.mark.parametrize("size", EXTREMES)
@pytest.mark.parametrize(
    "function, count",
    [(normal_log_prob, 3), (bernoulli_log_prob, 2), (normal_kl, 4), (log_mean_exp, 1)],
)
def test_gradients_are_finite_for_every_finite_input(function, count, size):
    signs = np.array(np.meshgrid(*[[-1.0, 0.0, 1.0]] * count)).reshape(count, -1, 1)
    arguments = [jnp.asarray(size * s, jnp.float32) for s in signs]
    if function is bernoulli_log_prob:
        arguments[0] = jnp.asarray(0.5 + 0.5 * signs[0], jnp.float32)

    def total(*arguments):
        return jnp.sum(function(*arguments))

    for gradient in jax.grad(total, range(count))(*arguments):
        assert np.all(np.isfinite(gradient))
    if size <= 40:
        assert np.all(np.isfinite(function(*arguments)))


def test_mean_where_ignores_what_is_masked():
    x = jnp.array([1.0, jnp.nan, 3.0])
    mask = jnp.array([True, False, True])
    value, gradient = jax.value_and_grad(mean_where)(x, mask)
    assert value == 2.0
    assert_allclose(gradient, [0.5, 0, 0.5])
    assert mean_where(x, jnp.zeros(3, bool)) == 0
    assert_allclose(mean_where(jnp.array([1.0, 3.0])), 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_small_floats_are_summed_in_float32(dtype):
    x = jnp.full((4096,), 0.1, dtype)
    value = normal_log_prob(x, x, jnp.zeros_like(x))
    assert value.dtype == jnp.float32
    assert_allclose(value, -4096 * 0.5 * np.log(2 * np.pi), rtol=1e-6)
