"""Sigma points and their losses against float64 NumPy, SciPy and scikit-learn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.linalg import sqrtm
from sklearn.mixture import GaussianMixture

from jaxzoo.vae.unscented_autoencoder import (
    TriangularEncoder,
    sample_mixture,
    sigma_points,
    uae_loss,
)


def gaussians(rows: int = 3, size: int = 4, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, size)), rng.normal(size=(rows, size, size))


@pytest.mark.parametrize("kappa", [1e-3, 2.0, -0.5])
def test_points_have_the_mean_and_the_covariance(kappa):
    mean, factor = gaussians()
    with jax.enable_x64(True):
        points, weights = (
            np.asarray(a) for a in sigma_points(mean, factor, kappa=kappa)
        )
    assert points.shape == (3, 9, 4)
    assert_allclose(weights.sum(), 1.0, rtol=1e-12)
    assert_allclose(np.einsum("k,bkd->bd", weights, points), mean, atol=1e-12)
    apart = points - mean[:, None]
    covariance = np.einsum("k,bkd,bke->bde", weights, apart, apart)
    assert_allclose(covariance, factor @ factor.transpose(0, 2, 1), atol=1e-12)


def test_points_lie_on_the_columns_of_the_factor():
    mean, factor = gaussians(size=2)
    with jax.enable_x64(True):
        points = np.asarray(sigma_points(mean, factor, kappa=1.0)[0])
    for row in range(3):
        first, second = (3.0**0.5 * factor[row, :, i] for i in (0, 1))
        expected = mean[row] + np.array([0 * first, first, second, -first, -second])
        assert_allclose(points[row], expected, rtol=1e-12)


def test_weighted_points_give_expectations_of_quadratics():
    mean, factor = gaussians(seed=1)
    rng = np.random.default_rng(2)
    form, slope = rng.normal(size=(4, 4)), rng.normal(size=4)
    covariance = factor @ factor.transpose(0, 2, 1)
    # E z^T A z + b^T z = m^T A m + tr(A C) + b^T m
    exact = np.einsum("bi,ij,bj->b", mean, form, mean) + mean @ slope
    exact += np.einsum("ij,bji->b", form, covariance)
    with jax.enable_x64(True):
        points, weights = (np.asarray(a) for a in sigma_points(mean, factor))
    values = np.einsum("bki,ij,bkj->bk", points, form, points) + points @ slope
    assert_allclose(values @ weights, exact, rtol=1e-10)


def decode(z: jax.Array) -> jax.Array:
    wide = jnp.linspace(-1.0, 1.5, 12).reshape(4, 3)
    return jnp.tanh(z @ wide) + jnp.square(z[:, :3])


def test_loss_of_all_points_is_that_of_the_equations():
    mean, factor = gaussians(seed=3)
    factor *= 0.4
    x = np.random.default_rng(4).normal(size=(3, 3))
    knobs: Any = {"kappa": 1.5, "weight": 0.3, "penalty": 0.2}

    @jax.jit
    def loss(*arrays):
        return uae_loss(jax.random.key(0), decode, *arrays, num_points=None, **knobs)

    got, aux = loss(x, mean, factor)
    wide = np.linspace(-1.0, 1.5, 12).reshape(4, 3)
    total = []
    for m, f, row in zip(mean, factor, x, strict=True):
        points = [m] + [m + s * 5.5**0.5 * f[:, i] for s in (1, -1) for i in range(4)]
        image = np.zeros(3)
        for k, z in enumerate(points):
            weight = 1.5 if k == 0 else 0.5  # kappa for the mean, 1/2 for the others
            image += weight / 5.5 * (np.tanh(z @ wide) + z[:3] ** 2)
        slope = wide @ (1 - np.tanh(m @ wide) ** 2) + np.r_[2 * m[:3], 0.0]
        smooth = np.sum(slope**2) * max(np.diag(f @ f.T))
        wasserstein = np.sum(m**2) + np.sum((f - np.eye(4)) ** 2)
        total.append(np.sum((row - image) ** 2) + 0.3 * wasserstein + 0.2 * smooth)
    assert_allclose(aux["per_example"], total, rtol=2e-5)
    assert_allclose(got, np.mean(total), rtol=2e-5)


def test_wasserstein_term_is_the_distance_where_the_factor_is_symmetric():
    mean, factor = gaussians(seed=5)
    x = np.zeros((3, 3))

    @jax.jit
    def distance(*gaussian):
        return uae_loss(jax.random.key(0), decode, x, *gaussian)[1]["wasserstein"]

    covariance = factor @ factor.transpose(0, 2, 1)
    root = np.stack([np.real(sqrtm(c)) for c in covariance])
    trace = np.trace(covariance + np.eye(4) - 2 * root, axis1=1, axis2=2)
    exact = np.sum(mean**2, axis=1) + trace
    assert_allclose(distance(mean, root), exact, rtol=1e-4)
    assert np.all(distance(mean, np.linalg.cholesky(covariance)) > 1.01 * exact)


def test_the_wasserstein_term_pulls_to_the_standard_normal():
    def nothing(z):
        return 0.0 * z[:, :3]

    def loss(mean, factor):
        knobs: Any = {"weight": 1.0, "penalty": 0.0}
        x = jnp.zeros((1, 3))
        return uae_loss(jax.random.key(0), nothing, x, mean, factor, **knobs)[0]

    assert loss(jnp.zeros((1, 4)), jnp.eye(4)[None]) == 0.0
    arrays = jnp.full((1, 4), 2.0), 0.25 * jnp.eye(4)[None]
    by_mean, by_factor = jax.jit(jax.grad(loss, (0, 1)))(*arrays)
    assert_allclose(by_mean, np.full((1, 4), 4.0), rtol=1e-6)
    assert_allclose(by_factor[0], -1.5 * np.eye(4), atol=1e-6)


def test_all_points_need_no_key_and_pairs_cancel_what_is_linear():
    mean, factor = gaussians(rows=5)
    x = np.zeros((5, 3))

    def linear(z):
        return z @ jnp.linspace(0.0, 1.0, 12).reshape(4, 3)

    @jax.jit
    def values(key):
        kinds: Any = ({"num_points": None}, {"num_points": 4, "method": "pairs"}, {})
        found = [uae_loss(key, linear, x, mean, factor, **knobs)[1] for knobs in kinds]
        return jnp.stack([aux["reconstruction"] for aux in found])

    spread = np.std([values(jax.random.key(i)) for i in range(8)], axis=0)
    assert np.all(spread[:2] < 1e-4) and np.all(spread[2] > 0.1)


def test_points_that_are_chosen_are_sigma_points_with_equal_chances():
    mean, factor = gaussians(rows=1, size=2)
    points = np.asarray(sigma_points(mean, factor)[0][0])
    seen = []

    def spy(z):
        seen.append(z)
        return z

    def chosen(method: Any) -> Any:
        rows = np.repeat(mean, 4000, axis=0), np.repeat(factor, 4000, axis=0)
        x = np.zeros((4000, 2))
        seen.clear()
        uae_loss(
            jax.random.key(1), spy, x, *rows, num_points=2, method=method, penalty=0.0
        )
        apart = np.abs(np.asarray(seen[0])[:, None] - points[None]).sum(axis=2)
        assert apart.min(axis=1).max() < 1e-5
        return apart.argmin(axis=1).reshape(4000, 2)

    share = np.bincount(chosen("random").ravel(), minlength=5) / 8000
    assert_allclose(share, 0.2, atol=5 * (0.16 / 8000) ** 0.5)
    pairs = chosen("pairs")
    assert np.all(pairs[:, 1] == pairs[:, 0] + 2) and set(pairs[:, 0]) == {1, 2}


def test_mixture_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0]])
    shape = np.array([[1.0, 0.4], [0.0, 0.7]])
    z = rng.normal(size=(600, 2)) @ shape + np.repeat(centres, (100, 200, 300), axis=0)

    @jax.jit
    def fit(z):
        key = jax.random.key(0)
        return sample_mixture(key, z, num_samples=20_000, num_components=3)

    samples, aux = fit(z)
    ridge = 1e-3 * z.var(axis=0).mean()
    peer: Any = GaussianMixture(3, means_init=centres, reg_covar=ridge, tol=1e-8).fit(z)
    order = np.argsort(np.asarray(aux["weights"]))
    other = np.argsort(peer.weights_)
    assert_allclose(aux["weights"][order], peer.weights_[other], atol=1e-3)
    assert_allclose(aux["means"][order], peer.means_[other], atol=1e-2)
    covariance = aux["factors"] @ jnp.swapaxes(aux["factors"], 1, 2)
    assert_allclose(covariance[order], peer.covariances_[other], atol=2e-2)
    error = z.std(axis=0) / 20_000**0.5
    assert np.all(np.abs(np.asarray(samples).mean(axis=0) - z.mean(axis=0)) < 5 * error)
    assert_allclose(np.cov(samples.T), np.cov(z.T), rtol=0.05)


def test_the_encoder_gives_triangular_factors_of_full_covariances():
    encoder = TriangularEncoder(latents=3, hidden=(5,))
    x = jax.random.normal(jax.random.key(0), (4, 6))
    params = encoder.init(jax.random.key(1), x)
    outputs: Any = encoder.apply(params, x)
    mean, factor = outputs
    assert mean.shape == (4, 3) and factor.shape == (4, 3, 3)
    assert np.all(np.triu(factor, 1) == 0) and np.all(np.tril(factor, -1)[:, 1, 0] != 0)
    std = np.asarray(jnp.diagonal(factor, axis1=1, axis2=2))
    assert np.all(std > 0)
    assert np.all(np.abs(factor[:, 2, 1]) < std[:, 2] * std[:, 1])


def test_bad_numbers_are_named():
    mean, factor = jnp.zeros((2, 4)), jnp.zeros((2, 4, 4))
    key, x = jax.random.key(0), jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="'kappa' is -4.0"):
        sigma_points(mean, factor, kappa=-4.0)
    with pytest.raises(ValueError, match="'num_points' is 3, expected pairs"):
        uae_loss(key, decode, x, mean, factor, num_points=3, method="pairs")
    with pytest.raises(ValueError, match="'weight' is -1.0"):
        uae_loss(key, decode, x, mean, factor, weight=-1.0)
    with pytest.raises(ValueError, match="'decode' gave shape"):
        uae_loss(key, decode, jnp.zeros((2, 5)), mean, factor)
    with pytest.raises(ValueError, match="'num_components' is 3"):
        sample_mixture(key, mean, num_samples=1, num_components=3)
