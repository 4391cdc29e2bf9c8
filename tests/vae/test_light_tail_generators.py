"""Bounds on the tails of generators against NumPy, exact tails and samples."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from jaxzoo.nn.mlp import MLP
from jaxzoo.vae.light_tail_generators import (
    concentration_check,
    exponential_tail_bound,
    extreme_quantile,
    gaussian_tail_bound,
    hill_estimator,
    lipschitz_bound,
    log_sampler_lipschitz,
)


def test_the_bound_on_a_network_is_the_product_of_its_layers_norms():
    net = MLP((7, 5, 2), activation=nn.relu)
    z = jax.random.normal(jax.random.key(0), (200, 3))
    params: Any = net.init(jax.random.key(1), z)
    expected = 1.0
    for layer in params["params"].values():
        matrix = np.asarray(layer["kernel"], np.float64)
        expected *= np.sqrt(np.linalg.eigvalsh(matrix.T @ matrix)[-1])
    bound = float(lipschitz_bound(params))
    assert_allclose(bound, expected, rtol=1e-5)
    jacobians = jax.vmap(jax.jacobian(lambda z: net.apply(params, z)))(z)
    norms = np.linalg.norm(np.asarray(jacobians), ord=2, axis=(1, 2))
    assert norms.max() <= bound  # and any other point's too
    assert norms.max() > 0.2 * bound


def test_the_sampler_is_one_map_of_all_noises():
    """Linear steps of one factor each: the Jacobian's norm is the bound itself."""
    rng = np.random.default_rng(0)
    growth, noise = rng.uniform(0.5, 1.5, 6), rng.uniform(0.0, 1.0, 6)
    turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0] for _ in growth]
    blocks = [np.eye(3)]
    for a, turn, s in zip(growth, turns, noise, strict=True):
        blocks = [a * turn @ block for block in blocks] + [s * np.eye(3)]
    exact = np.linalg.norm(np.concatenate(blocks, axis=1), ord=2)
    assert_allclose(np.exp(log_sampler_lipschitz(growth, noise)), exact, rtol=1e-5)


def test_a_sampler_too_steep_for_float32_has_a_logarithm():
    growth = np.full(100, 10.0)
    assert_allclose(
        log_sampler_lipschitz(growth, 0.0 * growth), 100 * np.log(10), rtol=1e-6
    )


def test_bounds_are_those_of_the_theorems():
    t = np.linspace(0.0, 9.0, 10)
    assert_allclose(
        gaussian_tail_bound(t, 1.7, curvature=0.4),
        2.0 * np.exp(-0.4 * t**2 / (2.0 * 1.7**2)), rtol=1e-5, atol=1e-30,
    )  # fmt: skip
    assert_allclose(
        exponential_tail_bound(t, 1.7, poincare=3.0),
        6.0 * np.exp(-t / (1.7 * np.sqrt(3.0))), rtol=1e-5,
    )  # fmt: skip


def test_bounds_are_above_exact_tails_and_not_far():
    """Linear statistics of each latent law, whose tails are known."""
    t = np.linspace(0.1, 5.0, 50)
    exact = 2.0 * stats.norm.sf(t / 1.5)
    bound = np.asarray(gaussian_tail_bound(t, 1.5))
    assert np.all(exact <= bound)
    # With a constant smaller by a fifth it would not be one.
    assert np.any(exact > np.asarray(gaussian_tail_bound(t, 0.8 * 1.5)))
    # One coordinate of the sphere of radius R in R^D: its square is R^2 times a beta.
    dim, radius = 5, 2.0
    inside = np.minimum(t / radius, 1.0) ** 2
    exact = stats.beta.sf(inside, 0.5, 0.5 * (dim - 1))
    curvature = (dim - 2) / radius**2
    assert np.all(exact <= np.asarray(gaussian_tail_bound(t, 1.0, curvature=curvature)))
    exact = np.exp(-t / 0.7)  # Laplace of scale 0.7
    bound = np.asarray(exponential_tail_bound(t, 1.0, poincare=4.0 * 0.7**2))
    assert np.all(exact <= bound)


def test_what_is_counted():
    rng = np.random.default_rng(0)
    values, t = rng.normal(1.0, 2.0, 500), np.array([0.5, 2.0, 4.0, 50.0])
    bound = np.array([2.0, 1.0, 0.0, 0.0])
    margin, aux = concentration_check(values, t, bound)
    gaps = np.abs(values - values.mean())
    expected = np.array([np.mean(gaps > a) for a in t])
    assert_allclose(aux["frequency"], expected, rtol=1e-5)
    assert_allclose(margin, bound - expected, rtol=1e-5, atol=1e-6)
    assert margin[2] < 0.0  # a bound that is broken is seen to be
    least = np.asarray(aux["subgaussian"])
    assert least[3] == 0.0
    again = 2.0 * np.exp(-(t[:3] ** 2) / (2.0 * least[:3] ** 2))
    assert_allclose(again, expected[:3], rtol=1e-4)


def test_normal_latents_keep_the_bound_and_heavy_ones_break_it():
    """The same ReLU network, of known constant, on normal and on t(2) latents."""
    net = MLP((16, 1), activation=nn.relu)
    keys = jax.random.split(jax.random.key(0), 3)
    params = net.init(keys[0], jnp.zeros((1, 4)))
    t = jnp.linspace(0.1, 8.0, 40) * lipschitz_bound(params)
    bound = gaussian_tail_bound(t, lipschitz_bound(params))

    @jax.jit
    def margins(z: Any) -> Any:
        output: Any = net.apply(params, z)
        return concentration_check(output[:, 0], t, bound)[0]

    size = (50_000, 4)
    assert float(margins(jax.random.normal(keys[1], size)).min()) >= 0.0
    assert float(margins(jax.random.t(keys[2], 2.0, size)).min()) < -1e-4


def test_the_tail_index_is_that_of_the_law():
    rng = np.random.default_rng(0)
    x = rng.pareto(2.0, 50) + 1.0
    ranked = np.sort(x)[::-1]
    expected = np.mean(np.log(ranked[:9] / ranked[9]))
    assert_allclose(hill_estimator(-x, num_tail=9), expected, rtol=1e-5)
    # (k / (N p))^index from the 10th: 9 of 50 samples are above it.
    quantile = ranked[9] * (9 / (50 * 0.001)) ** expected
    got = extreme_quantile(x, level=0.999, num_tail=9)
    assert_allclose(got, quantile, rtol=1e-4)
    pareto = rng.pareto(2.0, 100_000) + 1.0
    assert_allclose(hill_estimator(pareto, num_tail=10_000), 0.5, atol=0.02)
    assert_allclose(extreme_quantile(pareto, num_tail=10_000), 100.0, rtol=0.15)
    heavy = rng.standard_t(2.0, 100_000)
    assert_allclose(hill_estimator(heavy, num_tail=500), 0.5, atol=0.08)
    light = rng.normal(size=100_000)
    assert hill_estimator(light, num_tail=500) < 0.15


def test_bad_arguments_are_named():
    x, t = jnp.ones(4), jnp.ones(2)
    with pytest.raises(ValueError, match="'params' has kernels of shapes"):
        lipschitz_bound({"kernel": jnp.ones((3, 3, 2, 2))})
    with pytest.raises(ValueError, match="'params'"):
        lipschitz_bound({"bias": x})
    with pytest.raises(ValueError, match="'num_tail' is 4"):
        hill_estimator(x, num_tail=4)
    with pytest.raises(ValueError, match="'level' is 1.0"):
        extreme_quantile(x, level=1.0, num_tail=2)
    with pytest.raises(ValueError, match="'lipschitz' is 0.0"):
        gaussian_tail_bound(t, 0.0)
    with pytest.raises(ValueError, match="'curvature' is -1.0"):
        gaussian_tail_bound(t, 1.0, curvature=-1.0)
    with pytest.raises(ValueError, match="'poincare' is 0.0"):
        exponential_tail_bound(t, 1.0, poincare=0.0)
    with pytest.raises(TypeError, match="'bound'"):
        concentration_check(x, t, x)
