"""Draws against their distributions, and gradients against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import special, stats

from jaxzoo.vae.rsvi import (
    beta_sample,
    dirichlet_sample,
    gamma_sample,
    rsvi_expectation,
    rsvi_grad,
)


@pytest.mark.parametrize(("a", "boost"), [(1.5, 0), (0.3, 1), (0.3, 5), (4.0, 10)])
def test_draws_are_gammas(a, boost):
    z, aux = gamma_sample(
        jax.random.key(boost), jnp.array([a]), boost, num_samples=20_000
    )
    assert stats.kstest(np.asarray(z[:, 0]), "gamma", args=(a,)).pvalue > 1e-3
    assert_allclose(jnp.exp(aux["log_z"]), z, rtol=1e-4, atol=1e-29)


@pytest.mark.parametrize("boost", [0, 1, 5])
def test_unbiased_for_gammas(boost):
    alpha = jnp.array([1.4, 3.0])
    f = {"log": lambda z: jnp.log(z).sum(), "square": lambda z: jnp.square(z).sum()}
    exact = {"log": special.polygamma(1, alpha), "square": 2 * alpha + 1}
    for i, name in enumerate(f):
        slope, aux = rsvi_grad(jax.random.key(i), f[name], alpha, boost, 20_000)
        assert np.all(np.abs(slope - exact[name]) < 4 * aux["stderr"])
    # One gamma's correction meets what the other one adds to f: noise, but no bias.


def test_unbiased_for_dirichlets_with_small_concentrations():
    alpha = jnp.array([0.5, 2.0, 1.0])

    def f(z):
        return jnp.sum(jnp.array([1.0, -1.0, 0.5]) * jnp.square(z))

    def exact(a):
        total = jnp.sum(a)
        squares = a * (a + 1.0) / (total * (total + 1.0))
        return jnp.sum(jnp.array([1.0, -1.0, 0.5]) * squares)

    slope, aux = rsvi_grad(
        jax.random.key(0), f, alpha, 1, 20_000, distribution="dirichlet"
    )
    assert np.all(np.abs(slope - jax.grad(exact)(alpha)) < 4 * aux["stderr"])


def test_expectation_has_the_same_gradient():
    key, alpha = jax.random.key(2), jnp.array([1.2, 2.0])

    def loss(alpha):
        z, aux = gamma_sample(key, alpha, 1, num_samples=20_000)
        values = jnp.sum(jnp.log(z), axis=1)
        return rsvi_expectation(values, jnp.sum(aux["log_ratio"], axis=1))[0]

    value, slope = jax.value_and_grad(loss)(alpha)
    assert_allclose(value, special.digamma(alpha).sum(), atol=0.05)
    assert_allclose(slope, special.polygamma(1, alpha), atol=0.06)


def test_the_smallest_shape_without_a_boost_has_its_whole_gradient():
    slope, aux = rsvi_grad(jax.random.key(5), jnp.sum, jnp.ones(2), 0, 20_000)
    assert np.all(np.abs(slope - 1.0) < 4 * aux["stderr"])


def test_gradient_of_the_mean_of_a_beta():
    def loss(a, b):
        z, aux = beta_sample(jax.random.key(0), a, b, 3, num_samples=20_000)
        return rsvi_expectation(z, aux["log_ratio"])[0]

    a, b = jnp.array(1.5), jnp.array(2.5)
    value, slopes = jax.value_and_grad(loss, (0, 1))(a, b)
    assert_allclose(value, 1.5 / 4.0, atol=0.01)
    assert_allclose(slopes, [2.5 / 16.0, -1.5 / 16.0], atol=0.01)


def test_dirichlet_weights_sum_to_one_where_gammas_underflow():
    alpha = jnp.array([1e-3, 1e-3, 1e-3])
    z, aux = dirichlet_sample(jax.random.key(0), alpha, 2, num_samples=50)
    assert_allclose(z.sum(-1), np.ones(50), rtol=1e-5)
    assert np.isfinite(aux["log_z"]).all() and np.isfinite(aux["log_ratio"]).all()


def test_bad_numbers_are_named():
    key, alpha = jax.random.key(0), jnp.array([0.5])
    with pytest.raises(ValueError, match="'boost' is 0"):
        gamma_sample(key, alpha, 0)
    with pytest.raises(ValueError, match="'boost' is -1"):
        rsvi_grad(key, jnp.sum, alpha, -1)
    with pytest.raises(ValueError, match="'num_samples' is 0"):
        dirichlet_sample(key, alpha, num_samples=0)
