"""Objective, divergences and diagnostics against float64 loops and closed forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

from jaxzoo.vae.infovae import (
    adversarial_divergence,
    infovae_loss,
    log_det_covariance,
    mutual_information,
    prior_divergence,
)


def codes(rows: int = 7, latents: int = 3, seed: int = 0) -> np.ndarray:
    return 0.5 + np.random.default_rng(seed).normal(size=(rows, latents))


@pytest.mark.parametrize(("alpha", "lam"), [(0.0, 1.0), (1.0, 7.0), (-0.5, 3.0)])
def test_loss_is_the_objective(alpha, lam):
    rng = np.random.default_rng(1)
    log_p, kl, divergence = rng.normal(size=5) - 80, rng.uniform(1, 9, 5), np.array(0.7)
    with jax.enable_x64(True):
        loss, aux = infovae_loss(log_p, kl, divergence, alpha=alpha, lam=lam)
    expected = np.mean(-log_p + (1 - alpha) * kl) + (alpha + lam - 1) * 0.7
    assert_allclose(loss, expected, rtol=1e-12)
    parts = np.asarray(aux["per_example"]).mean() + np.asarray(aux["regularizer"])
    assert_allclose(parts, expected, rtol=1e-12)


def test_the_elbo_has_no_divergence_and_mmd_vae_no_kl():
    log_p, kl = jnp.array([-80.0, -85.0]), jnp.array([3.0, 4.0])
    slopes = jax.grad(lambda *a: infovae_loss(*a, alpha=0.0, lam=1.0)[0], (1, 2))
    assert [g.tolist() for g in slopes(log_p, kl, jnp.array(2.0))] == [[0.5, 0.5], 0.0]
    slopes = jax.grad(lambda *a: infovae_loss(*a, alpha=1.0, lam=5.0)[0], (1, 2))
    assert [g.tolist() for g in slopes(log_p, kl, jnp.array(2.0))] == [[0.0, 0.0], 5.0]


@pytest.mark.parametrize("width", [None, 0.8])
def test_mmd_is_that_of_loops_over_pairs(width):
    z, key = codes(), jax.random.key(3)
    with jax.enable_x64(True):
        prior = np.asarray(jax.random.normal(key, z.shape, jnp.float64))
        got = prior_divergence(key, z, width=width)
    # The released code's kernel is exp(-mean(square) / D): squares over D^2.
    scale = 9.0 if width is None else 2 * 0.8**2

    def mean(a, b, skip):
        pairs = [(i, j) for i in range(7) for j in range(7) if i != j or not skip]
        return np.mean([np.exp(-np.sum((a[i] - b[j]) ** 2) / scale) for i, j in pairs])

    expected = mean(z, z, True) + mean(prior, prior, True) - 2 * mean(z, prior, False)
    assert_allclose(got, expected, rtol=1e-10)


def test_stein_discrepancy_is_that_of_derivatives_of_the_kernel():
    z, width = codes(rows=5), 1.3

    def kernel(a, b):
        return jnp.exp(-jnp.sum((a - b) ** 2) / (2 * width**2))

    def pair(a, b):
        mixed = jax.jacfwd(jax.grad(kernel, 0), 1)(a, b)
        total = jnp.trace(mixed) + kernel(a, b) * jnp.dot(a, b)
        return total - a @ jax.grad(kernel, 1)(a, b) - b @ jax.grad(kernel)(a, b)

    with jax.enable_x64(True):
        each = jax.jit(jax.vmap(jax.vmap(pair, (None, 0)), (0, None)))(z, z)
        got = prior_divergence(jax.random.key(0), z, method="stein", width=width)
    off = np.asarray(each)[~np.eye(5, dtype=bool)]
    assert_allclose(got, off.mean(), rtol=1e-10)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_divergences_of_a_shifted_prior_are_the_closed_forms(shift):
    z = np.random.default_rng(4).normal(size=(1500, 2))
    z[:, 0] += shift
    width = 1.2
    # Differences of two points are N(m, 2 I), under which E k is a Gaussian integral.
    same = (1 + 2 / width**2) ** -1.0
    apart = same * np.exp(-(shift**2) / (2 * (width**2 + 2)))
    exact: Any = {"stein": shift**2 * same, "mmd": 2 * same - 2 * apart}
    for method, value in exact.items():
        got = prior_divergence(jax.random.key(5), z, method=method, width=width)
        assert_allclose(got, value, rtol=0.05, atol=0.004)


def test_the_best_discriminator_sees_the_jensen_shannon_divergence():
    """Of N(1, 1) to N(0, 1), at quantiles."""
    y = norm.ppf((np.arange(4000) + 0.5) / 4000)
    z, grid = y + 1.0, np.linspace(-9.0, 10.0, 4001)
    q, p = norm.pdf(grid, 1.0), norm.pdf(grid)
    middle = np.log((p + q) / 2)
    exact = 0.5 * np.sum(q * (np.log(q) - middle) + p * (np.log(p) - middle))
    exact *= grid[1] - grid[0]

    def seen(slope, offset):
        # log q(x) / p(x) = x - 1/2
        return adversarial_divergence(slope * z - offset, slope * y - offset)

    best, aux = seen(1.0, 0.5)
    assert_allclose(best, exact, rtol=1e-3)
    assert aux["discriminator_loss"] == -best
    for slope, offset in ((0.5, 0.5), (2.0, 1.0), (1.0, 0.0), (-1.0, 0.5)):
        assert seen(slope, offset)[0] < best - 1e-3


def test_mutual_information_is_that_of_loops_and_of_quadrature():
    rng = np.random.default_rng(6)
    mean, log_std = 1.5 * rng.normal(size=(4, 1)), rng.normal(size=(4, 1)) / 3
    std, key = np.exp(log_std), jax.random.key(7)
    with jax.enable_x64(True):
        got = mutual_information(key, mean, log_std)[0]
        own = jax.random.split(key, 1)[0]
        z = mean + std * np.asarray(jax.random.normal(own, (4, 1), jnp.float64))
    log_q = norm.logpdf(z, mean.T, std.T)  # [n, m]
    expected = np.diag(log_q) - logsumexp(log_q, axis=1) + np.log(4)
    assert_allclose(got, expected.mean(), rtol=1e-10)

    grid = np.linspace(-9.0, 9.0, 3001)
    each = norm.pdf(grid[None], mean, std)
    inside = each * (np.log(each + 1e-300) - np.log(each.mean(axis=0) + 1e-300))
    exact = inside.sum() / 4 * (grid[1] - grid[0])
    many, aux = mutual_information(key, mean, log_std, num_samples=20_000)
    assert abs(many - exact) < 4 * aux["stderr"] < 0.02


def test_mutual_information_is_0_for_one_posterior_and_log_n_for_codes_apart():
    zero, key = np.zeros((6, 2)), jax.random.key(0)
    assert_allclose(mutual_information(key, zero + 3.0, zero)[0], 0.0, atol=1e-6)
    apart = np.arange(6.0)[:, None] * np.array([[50.0, 0.0]])
    assert_allclose(mutual_information(key, apart, zero)[0], np.log(6), rtol=1e-6)


def test_log_determinant_is_that_of_numpy():
    z: Any = codes(rows=40) @ np.array([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0, 0, 0.1]])
    with jax.enable_x64(True):
        got = log_det_covariance(z, ridge=0.0)
        moved = log_det_covariance(3.0 * z + 1.0, ridge=0.0)
    covariance: Any = np.cov(z, rowvar=False, bias=True)
    assert_allclose(got, np.linalg.slogdet(covariance)[1], rtol=1e-9)
    assert_allclose(moved - got, 6 * np.log(3.0), rtol=1e-9)
    # It is the volume that the entropy of a Gaussian has, up to constants.
    entropy = multivariate_normal(np.zeros(3), covariance).entropy()
    assert_allclose(got, 2 * entropy - 3 * (1 + np.log(2 * np.pi)), rtol=1e-9)


def test_bad_numbers_are_named():
    arrays: Any = np.zeros(3), np.zeros(3), np.zeros(())
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'alpha' is 1.5"):
        infovae_loss(*arrays, alpha=1.5)
    with pytest.raises(ValueError, match="'lam' is -1.0"):
        infovae_loss(*arrays, lam=-1.0)
    with pytest.raises(ValueError, match="'lam' is 0.5"):
        infovae_loss(*arrays, alpha=0.0, lam=0.5)
    with pytest.raises(ValueError, match="'width' is 0.0"):
        prior_divergence(key, np.zeros((3, 2)), width=0.0)
    with pytest.raises(ValueError, match="is 1, expected a number >= 2"):
        prior_divergence(key, np.zeros((1, 2)))
