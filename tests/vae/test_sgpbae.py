"""The sparse Gaussian process prior and the potential against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose
from scipy.stats import multivariate_normal, norm

from jaxzoo.core.sgmcmc import init_sghmc, sghmc_step
from jaxzoo.core.stats import normal_log_prob
from jaxzoo.vae.sgpbae import (
    StochasticEncoder,
    encoder_loss,
    fitc_conditional,
    fitc_log_prob,
    gp_log_prior,
    sgpbae_potential,
)

LENGTHSCALE, VARIANCE, NOISE, JITTER = np.array([0.7, 1.5]), 1.3, 0.2, 1e-3


def process(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(7, 2)), rng.normal(size=(4, 2)), rng.normal(size=(4, 3))


def kernel(a: Any, b: Any) -> Any:
    """Pair by pair."""
    matrix = np.zeros((len(a), len(b)))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            square = np.sum(((x - y) / LENGTHSCALE) ** 2)
            matrix[i, j] = VARIANCE * np.exp(-0.5 * square)
    return matrix


def inner(s: Any) -> Any:
    return kernel(s, s) + JITTER * VARIANCE * np.eye(len(s))


HYPER = np.log(LENGTHSCALE), np.asarray(np.log(VARIANCE))


def test_the_conditional_is_that_of_the_values_at_the_inducing_inputs():
    t, s, v = process()
    u = np.linalg.cholesky(inner(s)) @ v
    weights = np.linalg.solve(inner(s), kernel(s, t)).T
    full = kernel(t, t) - weights @ kernel(s, t)
    mean, variance = fitc_conditional(t, s, v, *HYPER, jitter=JITTER)
    assert_allclose(mean, weights @ u, rtol=2e-4, atol=2e-5)
    assert_allclose(variance, np.diag(full), rtol=2e-4, atol=2e-5)


def test_over_inducing_values_latents_have_the_covariance_of_fitc():
    """By Bayes' rule at an arbitrary v: p(z) = p(z | v) p(v) / p(v | z)."""
    t, s, v = process(1)
    v = v[:, :1]
    low_rank = kernel(t, s) @ np.linalg.solve(inner(s), kernel(s, t))
    diagonal = np.diag(kernel(t, t) - low_rank) + NOISE
    z = np.random.default_rng(2).normal(size=(7, 1))
    normal: Any = multivariate_normal
    marginal = normal(np.zeros(7), low_rank + np.diag(diagonal))
    a = np.linalg.solve(np.linalg.cholesky(inner(s)), kernel(s, t))
    covariance = np.linalg.inv(np.eye(4) + (a / diagonal) @ a.T)
    mean = covariance @ (a / diagonal) @ z[:, 0]
    posterior = normal(mean, covariance)
    expected = marginal.logpdf(z[:, 0]) + posterior.logpdf(v[:, 0])
    noise = np.asarray(np.log(NOISE))
    given = fitc_log_prob(z, t, s, v, *HYPER, noise, jitter=JITTER)
    assert_allclose(jnp.sum(given) + norm.logpdf(v).sum(), expected, rtol=1e-4)


def test_with_inducing_inputs_at_all_points_the_process_is_exact():
    t, _, _ = process(3)
    v = np.random.default_rng(4).normal(size=(7, 2))
    mean, variance = fitc_conditional(t, t, v, *HYPER)
    root = np.linalg.cholesky(kernel(t, t) + 1e-4 * VARIANCE * np.eye(7))
    assert_allclose(mean, root @ v, atol=3e-3)
    assert np.all(np.asarray(variance) < 3e-4)


@pytest.mark.parametrize("inducing", ["normal", "uniform"])
def test_the_prior_is_normal_in_values_inputs_and_logarithms(inducing):
    _, s, v = process(5)
    log = np.asarray(np.log(NOISE))
    value = gp_log_prior(v, s, *HYPER, log, inducing=inducing)
    expected = norm.logpdf(v).sum() + norm.logpdf(HYPER[0], np.log(2.0)).sum()
    expected += norm.logpdf(HYPER[1:], np.log(0.05)).sum()
    expected += norm.logpdf(log, np.log(0.05))
    if inducing == "normal":
        expected += norm.logpdf(s).sum()
    assert_allclose(value, expected, rtol=1e-5)


def test_a_batch_stands_for_the_data():
    rng = np.random.default_rng(6)
    likelihood, latent = rng.normal(size=(2, 9))
    prior = np.asarray(-1.5)
    whole = sgpbae_potential(likelihood, latent, prior)[0]
    assert_allclose(whole, 1.5 - likelihood.sum() - latent.sum(), rtol=1e-5)
    batches = [
        sgpbae_potential(likelihood, latent, prior, where=i % 3 == k, num_data=9)[0]
        for i in [np.arange(9)]
        for k in range(3)
    ]
    assert_allclose(np.mean(batches), whole, rtol=1e-5)
    missing = np.where(np.arange(9) < 4, likelihood, np.nan)
    value, aux = sgpbae_potential(
        missing, latent, prior, where=np.arange(9) < 4, num_data=9
    )
    expected = 1.5 - 9 / 4 * (likelihood + latent)[:4].sum()
    assert_allclose(value, expected, rtol=1e-5)
    assert_allclose(aux["per_example"][4:], 0.0)


def test_a_chain_on_the_potential_has_the_exact_posterior():
    """A linear decoder: x = 2 z + noise, so that z and v are normal given x."""
    t, s, _ = process(7)
    t, s, std = t[:4], s[:2], 0.5
    x = np.random.default_rng(8).normal(size=(4, 1))
    a = np.linalg.solve(np.linalg.cholesky(inner(s)), kernel(s, t))
    diagonal = VARIANCE - np.square(a).sum(axis=0) + NOISE
    covariance = a.T @ a + np.diag(diagonal)
    gain = 2.0 * covariance @ np.linalg.inv(4.0 * covariance + std**2 * np.eye(4))
    mean, left = gain @ x, covariance - 2.0 * gain @ covariance
    noise = np.asarray(np.log(NOISE))

    def potential(p):
        likelihood = normal_log_prob(jnp.asarray(x), 2.0 * p["z"], jnp.log(std))
        latent = fitc_log_prob(p["z"], t, s, p["v"], *HYPER, noise, jitter=JITTER)
        prior = jnp.sum(normal_log_prob(p["v"]))
        return sgpbae_potential(likelihood, latent[:, 0], prior)[0]

    @jax.jit
    def chains(keys):
        def chain(key):
            start = init_sghmc({"z": jnp.zeros((4, 1)), "v": jnp.zeros((2, 1))})

            def step(state, key):
                gradient = jax.grad(potential)(state.position)
                state = sghmc_step(key, state, gradient, step_size=0.05, friction=0.1)
                return state, state.position["z"][:, 0]

            return lax.scan(step, start, jax.random.split(key, 1500))[1][500::10]

        return jax.vmap(chain)(keys)

    z = np.asarray(chains(jax.random.split(jax.random.key(0), 100))).reshape(-1, 4)
    assert_allclose(z.mean(axis=0), mean[:, 0], atol=0.05)
    assert_allclose(np.cov(z.T), left, atol=0.02)


def test_the_encoder_goes_to_the_latents_and_they_stay():
    rng = np.random.default_rng(9)
    codes, z = (jnp.asarray(a, jnp.float32) for a in rng.normal(size=(2, 5, 3)))
    value, aux = encoder_loss(codes, z)
    assert_allclose(value, np.mean(np.square(codes - z)), rtol=1e-5)
    assert_allclose(jnp.mean(aux["per_example"]), value, rtol=1e-6)
    gradient = jax.grad(lambda *a: encoder_loss(*a)[0], (0, 1))(codes, z)
    assert_allclose(gradient[0], 2.0 * (codes - z) / 15, rtol=1e-5)
    assert not np.any(gradient[1])


def test_noise_makes_different_latents_of_one_input():
    encoder = StochasticEncoder(2, (8,))
    x = jnp.ones((4, 3))
    noise = jax.random.normal(jax.random.key(0), (4, 3))
    params = encoder.init(jax.random.key(1), x, noise)
    z: Any = encoder.apply(params, x, noise)
    assert z.shape == (4, 2) and np.all(np.std(z, axis=0) > 0.01)


def test_bad_arguments_are_named():
    t, s, v = process()
    with pytest.raises(ValueError, match="'jitter' is 0.0"):
        fitc_conditional(t, s, v, *HYPER, jitter=0.0)
    with pytest.raises(ValueError, match="'noise' is -1.0"):
        gp_log_prior(v, s, *HYPER, HYPER[1], noise=-1.0)
    with pytest.raises(ValueError, match="'num_data' is 0"):
        sgpbae_potential(v[0], v[0], HYPER[1], num_data=0)
    with pytest.raises(TypeError, match="'inducing_inputs'"):
        fitc_conditional(t, s[:, :1], v, *HYPER)
