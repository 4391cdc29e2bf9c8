"""Draws against their moments, and the conditioners against formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.nn.location_scale import (
    location_scale,
    log_scale,
    scale_matrix,
    scale_slope,
)

PHI = {
    "linear": (lambda s: s, lambda s: np.ones_like(s)),
    "softplus": (lambda s: np.log1p(np.exp(s)), lambda s: 1 / (1 + np.exp(-s))),
    "exp": (np.exp, np.exp),
}


def parameters(size: int):
    rng = np.random.default_rng(0)
    location, diagonal = rng.normal(size=(2, size))
    return location, np.abs(diagonal) + 0.2, rng.normal(size=(size, size))


def test_draws_have_the_mean_and_the_covariance():
    location, diagonal, lower = (np.asarray(x, np.float32) for x in parameters(3))
    u = jax.random.normal(jax.random.key(1), (100_000, 3))
    z = location_scale(u, location, diagonal, lower, conditioner="softplus")
    scale = np.diag(np.log1p(np.exp(diagonal))) + np.tril(lower, -1)
    assert_allclose(np.mean(z, axis=0), location, atol=0.03)
    assert_allclose(np.cov(z.T), scale @ scale.T, atol=0.08)
    one = location_scale(u[0], location, diagonal, lower, conditioner="softplus")
    assert_allclose(one, scale @ u[0] + location, rtol=1e-5)


@pytest.mark.parametrize("conditioner", ["linear", "softplus", "exp"])
def test_the_conditioners_are_their_formulas(conditioner):
    phi, slope = PHI[conditioner]
    s, lower = np.linspace(-3.0, 3.0, 6), parameters(6)[2]
    diagonal, below = jnp.asarray(s, jnp.float32), jnp.asarray(lower, jnp.float32)
    expected = np.diag(phi(s)) + np.tril(lower, -1)
    got = scale_matrix(diagonal, below, conditioner=conditioner)
    assert_allclose(got, expected, rtol=1e-5)
    got = scale_matrix(diagonal, conditioner=conditioner)
    assert_allclose(got, np.diag(phi(s)), rtol=1e-5)
    got = scale_slope(diagonal, conditioner=conditioner)
    assert_allclose(got, slope(s), rtol=1e-5)
    value, log_slope = log_scale(diagonal, conditioner=conditioner)
    assert_allclose(value, np.log(np.abs(phi(s))), rtol=1e-5, atol=1e-6)
    assert_allclose(log_slope, slope(s) / phi(s), rtol=1e-5)


@pytest.mark.parametrize(("conditioner", "s"), [("linear", 5e-5), ("softplus", -20.0)])
def test_a_vanishing_scale_has_a_finite_log_and_no_slope(conditioner, s):
    value, slope = log_scale(jnp.array([s]), conditioner=conditioner)
    assert_allclose(value, np.log(1e-4), rtol=1e-6)
    assert slope.tolist() == [0.0]


def test_large_numbers_count_as_the_limit():
    far = jnp.array([1e30])
    assert scale_matrix(far, conditioner="linear").tolist() == [[1e4]]
    assert_allclose(scale_matrix(far, conditioner="exp"), np.exp([[9.0]]), rtol=1e-6)
    assert location_scale(jnp.zeros(1), far, far).tolist() == [1e4]
