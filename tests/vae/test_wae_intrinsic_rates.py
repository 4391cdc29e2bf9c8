"""Dimensions, rates and data of known dimension against NumPy and known answers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from jaxzoo.vae.wae_intrinsic_rates import (
    covering_dimension,
    manifold_data,
    rate_fit,
    two_nn_dimension,
)


def cube(seed: int, count: int, dim: int) -> Any:
    return np.random.default_rng(seed).uniform(-1.0, 1.0, (count, dim))


def test_the_map_is_smooth_and_keeps_its_scale_in_any_space():
    z = np.concatenate([cube(0, 1, 3), cube(1, 1, 3)])
    gap = np.sum((z[0] - z[1]) ** 2)

    @jax.jit
    def squares(keys: Any) -> Any:
        def one(key: Any) -> Any:
            x = manifold_data(key, z, features=8, frequency=1.5)
            return jnp.sum(x[0] ** 2), jnp.sum((x[0] - x[1]) ** 2)

        return jax.vmap(one)(keys)

    own, apart = squares(jax.random.split(jax.random.key(0), 4000))
    assert_allclose(np.mean(own), 1.0, atol=0.02)
    assert_allclose(np.mean(apart), 2.0 - 2.0 * np.exp(-1.125 * gap), rtol=0.05)
    wide = manifold_data(jax.random.key(1), z, features=5000, frequency=1.5)
    assert_allclose(np.sum(np.square(wide), axis=1), 1.0, atol=0.1)


def test_one_key_is_one_map_of_as_many_dimensions_as_it_is_given():
    key = jax.random.key(0)
    z = cube(0, 5, 2)
    x = manifold_data(key, z, features=9)
    assert_allclose(manifold_data(key, z[:2], features=9), x[:2], rtol=1e-6)
    jacobian = jax.jacobian(lambda z: manifold_data(key, z[None], features=9)[0])
    assert np.linalg.matrix_rank(np.asarray(jacobian(jnp.asarray(z[0])))) == 2


def test_nearest_neighbours_are_those_of_numpy():
    x = np.random.default_rng(0).normal(size=(40, 3))
    gaps = np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)
    expected = 39.0 / np.sum(np.log(gaps[:, 2] / gaps[:, 1]))
    assert_allclose(two_nn_dimension(x), expected, rtol=1e-4)


def test_covers_are_those_of_numpy():
    x = np.random.default_rng(0).normal(size=(40, 3))
    centres, radii = [0], []
    for _ in range(12):
        gaps = np.linalg.norm(x[:, None] - x[centres][None], axis=2).min(axis=1)
        radii.append(gaps.max())
        centres.append(int(gaps.argmax()))
    dimension, aux = covering_dimension(x, first=3, last=12)
    assert_allclose(aux["radii"], radii, rtol=1e-5)
    slope = np.polyfit(np.log(np.arange(3, 13)), np.log(radii[2:]), 1)[0]
    assert_allclose(dimension, -1.0 / slope, rtol=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_estimates_see_the_dimension_of_the_set_not_of_the_space(dim):
    z = cube(dim, 1500, dim)
    x = manifold_data(jax.random.key(0), z, features=30)
    nearest, covered = jax.jit(lambda x: (two_nn_dimension(x), covering_dimension(x)))(
        x
    )
    assert_allclose(nearest, dim, rtol=0.12)
    assert_allclose(covered[0], dim, rtol=0.25)


def test_lines_are_those_of_scipy():
    rng = np.random.default_rng(0)
    sizes = np.array([100.0, 200.0, 400.0, 1600.0, 3200.0])
    risks = 3.0 * sizes**-0.25 * np.exp(0.1 * rng.normal(size=5)) + 0.5
    slope, aux = rate_fit(sizes, risks, reference=0.5)
    expected: Any = stats.linregress(np.log(sizes), np.log(risks - 0.5))
    assert_allclose(slope, expected.slope, rtol=1e-4)
    assert_allclose(aux["intercept"], expected.intercept, rtol=1e-4)
    assert_allclose(aux["stderr"], expected.stderr, rtol=1e-3)


def test_the_reference_is_what_makes_a_rate_of_risks_that_level_off():
    sizes = 100.0 * 2.0 ** np.arange(6)
    risks = 0.2 + 3.0 * sizes**-0.25
    assert_allclose(rate_fit(sizes, risks, reference=0.2)[0], -0.25, rtol=1e-4)
    assert rate_fit(sizes, risks)[0] > -0.2


def test_bad_arguments_are_named():
    x = jnp.zeros((5, 2))
    with pytest.raises(ValueError, match=r"'len\(x\)' is 2"):
        two_nn_dimension(x[:2])
    with pytest.raises(ValueError, match="'last' is 6"):
        covering_dimension(x, first=2, last=6)
    with pytest.raises(ValueError, match="'first' is 0"):
        covering_dimension(x, first=0, last=4)
    with pytest.raises(ValueError, match="'features' is 0"):
        manifold_data(jax.random.key(0), x, features=0)
    with pytest.raises(ValueError, match="'frequency' is 0.0"):
        manifold_data(jax.random.key(0), x, frequency=0.0)
    with pytest.raises(ValueError, match="'reference' is nan"):
        rate_fit(x[:, 0], x[:, 0], reference=float("nan"))
    with pytest.raises(TypeError, match="'risks'"):
        rate_fit(x[:, 0], x[:3, 0])
