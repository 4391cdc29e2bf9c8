"""Priors, potential and directions against float64 NumPy, SciPy and closed forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.stats import norm

from jaxzoo.core.divergences import random_directions
from jaxzoo.vae.bae_dswd import (
    GaussianPrior,
    bae_potential,
    continuous_bernoulli_log_prob,
    dswd,
    sample_weights,
)


def a_prior() -> Any:
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)}
    mean = {"a": rng.normal(size=(3, 2)), "b": np.array(0.5)}
    log_std = {"a": np.array(-0.7), "b": 0.3 * rng.normal(size=4)}
    return weights, GaussianPrior(mean, log_std)


def test_the_potential_is_minus_the_log_posterior():
    weights, prior = a_prior()
    expected = sum(
        norm.logpdf(w, prior.mean[k], np.exp(prior.log_std[k])).sum()
        for k, w in weights.items()
    )
    nats = np.array([-3.0, 1.0, -2.0])
    value, aux = bae_potential(weights, prior, nats, num_data=30)
    assert_allclose(value, -30 / 3 * nats.sum() - expected, rtol=1e-5)
    assert_allclose(aux["log_prior"], expected, rtol=1e-5)
    assert_allclose(aux["per_example"], -nats)


def test_draws_have_the_moments_of_the_prior_and_its_gradients():
    weights, prior = a_prior()
    key = jax.random.key(0)
    draws = sample_weights(key, prior, weights, num_samples=20_000)
    for k, w in draws.items():
        assert w.shape == (20_000, *weights[k].shape)
        assert_allclose(w.mean(axis=0), prior.mean[k] + 0.0 * weights[k], atol=0.05)
        std = np.exp(prior.log_std[k]) + 0.0 * weights[k]
        assert_allclose(np.asarray(w).std(axis=0), std, rtol=0.03)

    # d/d log_std of the sum of squares is 2 sum w (w - mean), by reparameterisation.
    def square(log_std: Any) -> Any:
        w = sample_weights(key, GaussianPrior(prior.mean, log_std), weights)
        return jnp.sum(jnp.square(w["b"]))

    b = sample_weights(key, prior, weights)["b"][0]
    gradient = jax.grad(square)(jax.tree.map(jnp.asarray, prior.log_std))["b"]
    assert_allclose(gradient, 2.0 * b * (b - prior.mean["b"]), rtol=1e-4)


def test_the_distance_at_directions_found_is_that_of_sorted_projections():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 7, 4))
    theta = random_directions(jax.random.key(0), dim=4, num_directions=5)
    value, aux = dswd(x, y, theta, num_steps=3)
    found = np.asarray(theta, np.float64) @ np.asarray(aux["matrix"], np.float64).T
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    assert_allclose(aux["directions"], found, rtol=1e-4, atol=1e-6)
    gaps = np.sort(x @ found.T, axis=0) - np.sort(y @ found.T, axis=0)
    assert_allclose(value, np.sqrt(np.mean(gaps**2)), rtol=1e-5)
    assert_allclose(aux["cosine"], np.abs(found @ found.T).mean(), rtol=1e-5)


def test_without_a_weight_the_distance_is_that_along_the_shift():
    """A shift by m is |m| along m, and |m| / sqrt(D) on average over the sphere."""
    x = jax.random.normal(jax.random.key(0), (16, 9))
    shift = jnp.zeros(9).at[2].set(4.0).at[5].set(-3.0)
    theta = random_directions(jax.random.key(1), dim=9, num_directions=40)
    value, aux = dswd(x, x + shift[None], theta, weight=0.0, num_steps=100)
    assert 0.98 * 5.0 < value <= 5.0001
    assert np.all(np.abs(aux["directions"] @ shift) > 0.95 * 5.0)


def test_the_weight_keeps_directions_apart():
    x = jax.random.normal(jax.random.key(0), (16, 9))
    theta = random_directions(jax.random.key(1), dim=9, num_directions=40)
    uniform = np.abs(theta @ theta.T).mean()
    y = x + jnp.full((1, 9), 5.0 / 3.0)
    results = {w: dswd(x, y, theta, weight=w, num_steps=100) for w in (0.0, 4.0, 100.0)}
    cosines = [float(aux["cosine"]) for _, aux in results.values()]
    values = [float(value) for value, _ in results.values()]
    assert cosines[0] > 0.95 and cosines[2] < uniform + 0.01
    assert cosines[0] > cosines[1] + 0.02 and cosines[1] > cosines[2]
    assert values[0] > values[1] > values[2]
    assert abs(values[2] - 5.0 / 3.0) < 0.3  # the sliced distance, |m| / sqrt(D)


def test_gradients_move_points_along_the_directions_found():
    """For points in order the distance is |mean shift|, its gradient known."""
    x = jax.random.normal(jax.random.key(0), (6, 3))
    y = x + jnp.array([[2.0, 0.0, 0.0]])
    theta = random_directions(jax.random.key(1), dim=3, num_directions=8)
    gradient, aux = jax.grad(lambda x: dswd(x, y, theta), has_aux=True)(x)
    found = np.asarray(aux["directions"], np.float64)
    value = np.sqrt(np.mean((2.0 * found[:, 0]) ** 2))
    expected = -2.0 * (found[:, :1] * found).mean(axis=0) / (6 * value)
    assert_allclose(gradient, np.tile(expected, (6, 1)), rtol=1e-4, atol=1e-6)


def test_the_likelihood_is_a_density():
    """exp(x l), over its integral by quadrature; a series is used below 0.1."""
    x, logits = np.linspace(0.0, 1.0, 5), (-30.0, -1.5, -0.05, 0.0, 0.0999, 0.1001, 8.0)
    for logit in logits:
        top = max(logit, 0.0)
        mass = quad(lambda x, a: np.exp(x * a[0] - a[1]), 0, 1, ((logit, top),))[0]
        found = continuous_bernoulli_log_prob(x[:, None], np.full((5, 1), logit))
        expected = x * logit - top - np.log(mass)
        assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_bad_arguments_are_named():
    x, theta = jnp.zeros((4, 2)), jnp.eye(2)
    with pytest.raises(ValueError, match="'weight' is -1.0"):
        dswd(x, x, theta, weight=-1.0)
    with pytest.raises(ValueError, match="'rate' is 0.0"):
        dswd(x, x, theta, rate=0.0)
    with pytest.raises(ValueError, match="'num_steps' is 0"):
        dswd(x, x, theta, num_steps=0)
    with pytest.raises(TypeError, match="'y'"):
        dswd(x, x[:3], theta)
    weights, prior = a_prior()
    wrong = GaussianPrior(prior.mean, {**prior.log_std, "b": np.zeros(3)})
    with pytest.raises(TypeError, match="'prior.log_std' is"):
        bae_potential(weights, wrong, np.zeros(2), num_data=3)
    with pytest.raises(TypeError, match="'prior.mean' is"):
        sample_weights(jax.random.key(0), prior._replace(mean=0.0), weights)
