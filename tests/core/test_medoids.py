"""Distances and kernels of them against float64, medoids against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
from numpy.testing import assert_allclose

from jaxzoo.core.divergences import (
    gaussian_kernel,
    inverse_multiquadratic_kernel,
    squared_distances,
)
from jaxzoo.core.medoids import distances, k_medoids

RNG = np.random.default_rng(0)
X, Y = (RNG.normal(size=(n, 3)).astype(np.float32) for n in (7, 5))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_distances_are_scipys_for_rows_of_any_size(size):
    x, y = np.float32(size) * X, np.float32(size) * Y
    expected = scipy.spatial.distance.cdist(x.astype(np.float64), y.astype(np.float64))
    assert_allclose(distances(x, y), expected, rtol=1e-6)
    if size == 1.0:
        assert_allclose(squared_distances(x, y), expected**2, rtol=1e-6)


def test_the_distance_of_equal_points_has_no_gradient():
    x = jnp.array(X)
    gradient = jax.grad(lambda x: jnp.sum(distances(x, jnp.array(X))))(x)
    apart = X[:, None].astype(np.float64) - X[None]
    length = np.linalg.norm(apart, axis=2, keepdims=True) + np.eye(7)[..., None]
    assert_allclose(gradient, (apart / length).sum(1), rtol=1e-5, atol=1e-6)


def test_small_distances_far_from_the_origin_are_exact():
    x = jnp.array([[4000.0, 0.0]])
    assert squared_distances(x, x + 0.125).tolist() == [[0.03125]]


def test_kernels_are_their_formulas():
    squares = np.array([0.0, 0.5, 40.0], np.float32)
    assert_allclose(
        gaussian_kernel(squares, width=1.5), np.exp(-squares / 4.5), rtol=1e-6
    )
    expected = sum(s * 6.0 / (s * 6.0 + squares) for s in (0.1, 2.0))
    got = inverse_multiquadratic_kernel(squares, scale=6.0, factors=(0.1, 2.0))
    assert_allclose(got, expected, rtol=1e-6)


def test_medoids_are_the_most_central_members_of_their_clusters():
    mean = RNG.normal(size=(40, 3)).astype(np.float32)
    distance = np.linalg.norm(mean[:, None] - mean[None], axis=2).astype(np.float64)
    for count in (1, 2, 7):
        found = np.asarray(k_medoids(jnp.array(mean), num_medoids=count))
        assert len(set(found.tolist())) == count
        belongs = distance[:, found].argmin(1)
        for k, medoid in enumerate(found):
            members = np.flatnonzero(belongs == k)
            inside = distance[np.ix_(members, members)].sum(1)
            own = inside[members.tolist().index(medoid)]
            assert own <= inside.min() + 1e-6
        start = distance.sum(1).argsort()[:count]
        spread = distance[:, found].min(1).sum()
        assert spread <= distance[:, start].min(1).sum() + 1e-6


def test_bad_numbers_are_named():
    for count in (0, 8):
        with pytest.raises(ValueError, match="'num_medoids'"):
            k_medoids(X, num_medoids=count)
    with pytest.raises(ValueError, match="'width'"):
        gaussian_kernel(X, width=0.0)
