"""Scores and densities with closed forms: of Gaussians, and of mixtures of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.core.mcmc import metropolis
from jaxzoo.vae.dae_score import (
    dae_loss,
    gaussian_reconstruction,
    hessian_hat,
    log_density_difference,
    rcae_loss,
    score_hat,
)

COVARIANCE = np.array([[1.0, 0.6], [0.6, 0.8]])


def linear(weights):
    weights = jnp.asarray(weights, jnp.float32)

    def reconstruct(x):
        return x @ weights.T

    return reconstruct


def rows(count=7, width=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def mixture(x, sigma):
    """The best r for halves of N(-1, 0.3^2) and N(1, 0.3^2), and the noisy score."""
    var = 0.09 + sigma**2
    second = 1.0 / (1.0 + np.exp(-2.0 * x / var))  # probability of the mode at 1
    score = ((2.0 * second - 1.0) - x) / var
    # The mean of the clean x by Bayes in each mode, weighed by its probability.
    means = [(m * sigma**2 + 0.09 * x) / var for m in (-1.0, 1.0)]
    return (1.0 - second) * means[0] + second * means[1], score


def test_denoising_loss_by_hand():
    x, sigma = rows(), 0.3
    noise = np.asarray(jax.random.normal(jax.random.key(3), x.shape), np.float64)
    expected = np.sum((np.tanh(x + sigma * noise) - x) ** 2, axis=1)
    loss, aux = dae_loss(jax.random.key(3), jnp.tanh, x, sigma=sigma)
    assert_allclose(loss, np.mean(expected), rtol=1e-5)
    assert_allclose(aux["per_example"], expected, rtol=1e-5)


def test_contractive_loss_by_hand():
    x, weights, sigma = rows(), np.array([[0.5, 0.2], [-0.1, 0.9]]), 0.3

    def reconstruct(x):
        return jnp.tanh(x @ jnp.asarray(weights, x.dtype).T)

    value = np.tanh(x @ weights.T)
    jacobian = (1.0 - value**2)[:, :, None] * weights[None]
    penalty = np.sum(jacobian**2, axis=(1, 2))
    error = np.sum((value - x) ** 2, axis=1)
    loss, aux = rcae_loss(reconstruct, x, sigma=sigma)
    assert_allclose(loss, np.mean(error + sigma**2 * penalty), rtol=1e-5)
    assert_allclose(aux["contraction"], np.mean(penalty), rtol=1e-5)
    assert_allclose(aux["reconstruction"], np.mean(error), rtol=1e-5)


def test_of_a_linear_reconstruction_both_losses_are_equal_for_any_noise():
    x = np.repeat(rows(4), 20_000, axis=0)
    reconstruct = linear([[0.5, 0.2], [-0.1, 0.9]])
    loss, aux = dae_loss(jax.random.key(0), reconstruct, x, sigma=1.5)
    stderr = float(jnp.std(aux["per_example"])) / len(x) ** 0.5
    exact, _ = rcae_loss(reconstruct, x[::20_000], sigma=1.5)
    assert abs(float(loss - exact)) < 4 * stderr


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_gaussians_have_a_linear_reconstruction(sigma):
    noisy = COVARIANCE + sigma**2 * np.eye(2)
    got = gaussian_reconstruction(COVARIANCE.astype(np.float32), sigma=sigma)
    assert_allclose(got, COVARIANCE @ np.linalg.inv(noisy), rtol=1e-4)
    # No other has a smaller loss: the slope of the loss that is exact for linear maps.
    x = np.linalg.cholesky(COVARIANCE).T * 2**0.5  # rows whose second moment is C

    def loss(weights):
        return rcae_loss(linear(weights), x.astype(np.float32), sigma=sigma)[0]

    with jax.default_matmul_precision("highest"):
        assert_allclose(jax.grad(loss)(got), np.zeros((2, 2)), atol=1e-4)
    x = rows()
    assert_allclose(
        score_hat(linear(got), x, sigma=sigma), -x @ np.linalg.inv(noisy), rtol=2e-2,
        atol=1e-3,
    )  # fmt: skip


def test_the_best_reconstruction_of_a_mixture_has_the_score_of_noisy_data():
    x = np.linspace(-2.0, 2.0, 41)[:, None]
    for sigma in (0.1, 0.5):
        best, score = mixture(x, sigma)

        def reconstruct(_, best=best):
            return jnp.asarray(best, jnp.float32)

        got = score_hat(reconstruct, x.astype(np.float32), sigma=sigma)
        assert_allclose(got, score, rtol=1e-3, atol=1e-3)


def test_hessian_and_curl():
    weights = gaussian_reconstruction(COVARIANCE.astype(np.float32), sigma=0.5)
    hessian, aux = hessian_hat(linear(weights), rows(), sigma=0.5)
    expected = -np.linalg.inv(COVARIANCE + 0.25 * np.eye(2))
    assert_allclose(hessian, np.tile(expected, (7, 1, 1)), rtol=1e-4)
    assert_allclose(aux["curl"], np.zeros(7), atol=1e-5)
    askew = np.array([[1.0, 0.5], [0.1, 2.0]])
    _, aux = hessian_hat(linear(askew), rows(), sigma=0.5)
    curl = np.linalg.norm(askew - askew.T) / np.linalg.norm(askew)
    assert_allclose(aux["curl"], np.full(7, curl), rtol=1e-5)


def test_differences_of_log_density_along_lines():
    x, y, sigma = rows(seed=1), rows(seed=2), 0.5
    weights = gaussian_reconstruction(COVARIANCE.astype(np.float32), sigma=sigma)
    inverse = np.linalg.inv(COVARIANCE + sigma**2 * np.eye(2))
    log_p = [-0.5 * np.einsum("bi,ij,bj->b", v, inverse, v) for v in (x, y)]
    for points in (1, 5):  # one is enough where the score is linear
        got = log_density_difference(
            linear(weights), x, y, sigma=sigma, num_points=points
        )
        assert_allclose(got, log_p[1] - log_p[0], rtol=1e-3, atol=1e-4)


def test_difference_of_a_mixture_from_mode_to_valley():
    sigma, var = 0.3, 0.18

    def reconstruct(x):
        return x + sigma**2 * (jnp.tanh(x / var) - x) / var

    x, y = np.array([[1.0], [0.0]], np.float32), np.array([[0.0], [-1.0]], np.float32)

    def log_p(x):
        return np.logaddexp(*(-((x - m) ** 2) / (2 * var) for m in (-1.0, 1.0)))

    got = log_density_difference(reconstruct, x, y, sigma=sigma, num_points=12)
    assert_allclose(got, (log_p(y) - log_p(x))[:, 0], rtol=1e-4)


def test_chains_have_the_moments_of_a_gaussian():
    sigma = 0.3
    target = COVARIANCE - sigma**2 * np.eye(2)  # noise makes it `COVARIANCE`
    weights = gaussian_reconstruction(target.astype(np.float32), sigma=sigma)
    ratio = functools.partial(log_density_difference, linear(weights), sigma=sigma)
    x, aux = metropolis(
        jax.random.key(0), ratio, jnp.zeros((400, 2)), step_size=1.2, num_steps=200
    )
    assert x.shape == (400, 2)
    assert_allclose(aux["mean"], np.zeros(2), atol=0.05)
    assert_allclose(aux["second_moment"], COVARIANCE, atol=0.06)
    assert 0.2 < float(jnp.mean(aux["acceptance"])) < 0.8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: score_hat(jnp.tanh, x, sigma=0.0), "'sigma' is 0"),
        (lambda x: rcae_loss(jnp.tanh, x, sigma=-1.0), "'sigma' is -1"),
        (
            lambda x: log_density_difference(jnp.tanh, x, x, num_points=0),
            "'num_points' is 0",
        ),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(rows())
