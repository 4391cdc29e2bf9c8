"""Accepted noise against its density, and gradients against quadrature in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import special, stats

from jaxzoo.vae.rsvi import (
    beta_sample,
    dirichlet_sample,
    gamma_h,
    gamma_log_ratio,
    gamma_sample,
    rsvi_expectation,
    rsvi_grad,
)


def transform(eps, a):
    return (a - 1 / 3) * (1 + eps / np.sqrt(9 * a - 3)) ** 3


def log_ratio(eps, a):
    """Of the densities of Gamma(a, 1) and of h(e), by its slope in e."""
    slope = (transform(eps + 1e-6, a) - transform(eps - 1e-6, a)) / 2e-6
    proposal = stats.norm.logpdf(eps) - np.log(slope)
    return stats.gamma.logpdf(transform(eps, a), a) - proposal


def grid(a):
    """Noise that is not always rejected, with the weight of each point."""
    eps = np.linspace(-min(np.sqrt(9 * a - 3), 9.0) + 1e-4, 9.0, 20_001)
    return eps, np.full(len(eps), eps[1] - eps[0])


@pytest.mark.parametrize("a", [1.0, 1.7, 6.0, 40.0])
def test_transformation_and_ratio_by_hand(a):
    eps = np.linspace(-1.0, 3.0, 9)
    shapes = np.full(9, a)
    assert_allclose(
        gamma_h(eps.astype(np.float32), shapes.astype(np.float32)),
        transform(eps, a), rtol=1e-5,
    )  # fmt: skip
    got = gamma_log_ratio(eps.astype(np.float32), shapes.astype(np.float32))
    assert_allclose(got, log_ratio(eps, a), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("a", [1.2, 3.0])
def test_path_and_correction_are_the_gradient_by_quadrature(a):
    """The expectation over accepted noise, point by point."""
    eps, weight = grid(a)
    with jax.enable_x64(True):
        e, shape = jnp.asarray(eps), jnp.asarray(a)

        def at(f, e):
            z = gamma_h(e, shape)
            slope = jax.grad(gamma_h, 1)(e, shape)
            path = jax.grad(f)(z) * slope
            return path, f(z) * jax.grad(gamma_log_ratio, 1)(e, shape)

        ratio = gamma_log_ratio(e, jnp.full(len(eps), a))
        density = weight * stats.norm.pdf(eps) * np.exp(np.asarray(ratio))
        assert_allclose(density.sum(), 1.0, rtol=1e-7)
        for f, exact in (
            (jnp.square, 2 * a + 1),
            (jnp.log, float(special.polygamma(1, a))),
        ):
            path, correction = jax.vmap(functools.partial(at, f))(e)
            total = density @ np.asarray(path + correction)
            assert_allclose(total, exact, rtol=1e-7)
            # The path alone is biased.
            assert abs(density @ np.asarray(path) - exact) > 2e-3 * exact


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


def test_gradient_of_the_mean_of_a_beta():
    def loss(a, b):
        z, aux = beta_sample(jax.random.key(0), a, b, 3, num_samples=20_000)
        return rsvi_expectation(z, aux["log_ratio"])[0]

    a, b = jnp.array(1.5), jnp.array(2.5)
    value, slopes = jax.value_and_grad(loss, (0, 1))(a, b)
    assert_allclose(value, 1.5 / 4.0, atol=0.01)
    assert_allclose(slopes, [2.5 / 16.0, -1.5 / 16.0], atol=0.01)


def test_shape_augmentation_takes_the_correction_away():
    """The root mean square of the ratio's slope, over accepted noise."""
    sizes = []
    for a in (1.5, 2.5, 6.5, 11.5):
        eps, weight = grid(a)
        e, shapes = (np.asarray(x, np.float32) for x in (eps, np.full(len(eps), a)))
        slope = jax.vmap(jax.grad(gamma_log_ratio, 1))(e, shapes)
        density = weight * stats.norm.pdf(eps) * np.exp(log_ratio(eps, a))
        sizes.append(float(density @ np.square(slope)))
    assert sizes[0] > 4 * sizes[1] > 16 * sizes[2] > 32 * sizes[3]


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
