"""The metric in float64, the density by quadrature, and curves that seek the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.core.mcmc import hmc
from jaxzoo.vae.geometric_vae import (
    bandwidth,
    curve_energy,
    geodesic,
    latent_metric,
    log_volume,
)

RNG = np.random.default_rng(0)
Z = RNG.normal(size=(6, 3)).astype(np.float32)
CENTROIDS = RNG.normal(size=(5, 3)).astype(np.float32)
LOG_STD = (0.4 * RNG.normal(size=(5, 3))).astype(np.float32)
KNOBS: dict[str, Any] = {"rho": 1.3, "regularizer": 0.02, "tau": 0.1}


def metric64(z, centroids, log_std, rho, regularizer, tau):
    """Of one point, with full matrices."""
    z, centroids, log_std = (np.asarray(x, np.float64) for x in (z, centroids, log_std))
    total = regularizer * np.exp(-tau * z @ z) * np.eye(len(z))
    for mean, scale in zip(centroids, log_std, strict=True):
        inverse = np.linalg.inv(np.diag(np.exp(scale) ** 2))
        total += inverse * np.exp(-(z - mean) @ inverse @ (z - mean) / rho**2)
    return total


def test_metric_and_volume_are_the_papers_sums():
    expected = np.stack([metric64(z, CENTROIDS, LOG_STD, **KNOBS) for z in Z])
    assert_allclose(
        latent_metric(Z, CENTROIDS, LOG_STD, **KNOBS), expected, rtol=2e-5, atol=1e-7
    )
    volume = 0.5 * np.log(np.linalg.det(expected))
    assert_allclose(log_volume(Z, CENTROIDS, LOG_STD, **KNOBS), volume, rtol=2e-5)


def test_far_from_the_data_only_the_regularizer_is_left():
    z = 1e3 * Z
    metric = latent_metric(z, CENTROIDS, LOG_STD, rho=1.0)
    assert_allclose(metric, np.broadcast_to(0.01 * np.eye(3), (6, 3, 3)), rtol=1e-5)
    # Where even that is no float32, its logarithm still is a number.
    volume = log_volume(z, CENTROIDS, LOG_STD, rho=1.0, tau=0.05)
    norm = np.sum(np.square(z.astype(np.float64)), axis=1)
    assert_allclose(volume, 1.5 * (np.log(0.01) - 0.05 * norm), rtol=1e-5)


def test_bandwidth_is_the_loneliest_centroids_distance():
    distance = np.linalg.norm(CENTROIDS[:, None] - CENTROIDS[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert_allclose(bandwidth(CENTROIDS), distance.min(1).max(), rtol=1e-6)
    assert_allclose(bandwidth(1e30 * CENTROIDS), 1e30 * distance.min(1).max(), 1e-6)


def test_chains_have_the_moments_of_the_density():
    """In one dimension, against quadrature; two unequal centroids, a heavy floor."""
    centroids, log_std = np.array([[-1.0], [1.5]]), np.log([[0.6], [0.9]])
    knobs: dict[str, Any] = {"rho": 1.2, "regularizer": 0.2, "tau": 0.3}
    grid = np.linspace(-8, 8, 4001)
    precision = np.exp(-2 * log_std)
    weight = precision * np.exp(-precision * (grid - centroids) ** 2 / 1.2**2)
    density = np.sqrt(weight.sum(0) + 0.2 * np.exp(-0.3 * grid**2))
    density /= density.sum()
    chart = [jnp.asarray(rows, jnp.float32) for rows in (centroids, log_std)]

    def density_of(z):
        return log_volume(z, *chart, **knobs)

    start = jnp.zeros((4000, 1))
    z, aux = hmc(jax.random.key(0), density_of, start, num_steps=60, step_size=0.2)
    z = np.asarray(z)[:, 0]
    for power in (1, 2, 4):
        exact = (density * grid**power).sum()
        error = (z**power).std() / len(z) ** 0.5
        assert abs((z**power).mean() - exact) < 4 * error, power
    assert float(aux["acceptance"].mean()) > 0.9
    # Coarse steps are refused more often, and do not bias.
    coarse = {"num_steps": 60, "num_leapfrog": 2, "step_size": 1.6}
    z, aux = hmc(jax.random.key(1), density_of, start, **coarse)
    z = np.asarray(z)[:, 0]
    assert 0.2 < float(aux["acceptance"].mean()) < 0.97
    exact = (density * grid**2).sum()
    assert abs((z**2).mean() - exact) < 4 * (z**2).std() / len(z) ** 0.5


@pytest.mark.parametrize("metric", ["inverse", "latent"])
def test_energy_is_the_discretised_integral(metric):
    curve = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    expected = []
    for points in curve.astype(np.float64):
        total = 0.0
        for a, b in zip(points[:-1], points[1:], strict=True):
            matrix = metric64((a + b) / 2, CENTROIDS, LOG_STD, **KNOBS)
            matrix = np.linalg.inv(matrix) if metric == "inverse" else matrix
            total += 3 / 2 * (b - a) @ matrix @ (b - a)
        expected.append(total)
    got = curve_energy(curve, CENTROIDS, LOG_STD, metric=metric, **KNOBS)
    assert_allclose(got, expected, rtol=5e-5)


def test_curves_bend_towards_the_data_or_away_from_it():
    """A ridge of centroids on a half circle; the ends are its ends."""
    angle = np.linspace(0, np.pi, 9)
    centroids = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    log_std = np.full_like(centroids, np.log(0.5))
    ends = centroids[:1], centroids[-1:]

    def geodesic_by(metric):
        def energy(curve):
            return curve_energy(curve, centroids, log_std, rho=0.6, metric=metric)

        return geodesic(energy, *ends, num_steps=300, num_points=13)

    curve, aux = geodesic_by("inverse")
    assert_allclose(curve[:, [0, -1]], np.stack([*ends], axis=1), atol=1e-6)
    assert float(aux["energy"][0]) < 0.6 * float(aux["straight_energy"][0])
    # The symmetric straight line is a saddle sideways only: up is downhill.
    assert float(curve[0, 6, 1]) > 0.5
    assert_allclose(
        aux["energy"], curve_energy(curve, centroids, log_std, rho=0.6), rtol=1e-4
    )
    around, aux = geodesic_by("latent")
    assert float(aux["energy"][0]) <= float(aux["straight_energy"][0])
    assert float(around[0, 6, 1]) < 0.1


def test_bad_numbers_are_named():
    for name, value in (("rho", 0.0), ("regularizer", 0.0), ("tau", -1.0)):
        with pytest.raises(ValueError, match=f"'{name}'"):
            log_volume(Z, CENTROIDS, LOG_STD, **{**KNOBS, name: value})
