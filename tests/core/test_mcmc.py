"""Chains against the moments of densities that are known, and what refuses moves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.core.mcmc import hmc, metropolis

# A mixture of two Gaussians of unequal weight, in one dimension.
GRID = np.linspace(-8.0, 8.0, 4001)
MODES = ((0.3, -1.0, 0.5), (0.7, 0.8, 0.8))  # weight, mean, standard deviation


def density(z):
    terms = [w / s * np.exp(-0.5 * ((z - m) / s) ** 2) for w, m, s in MODES]
    return np.sum(terms, axis=0)


def log_density(z):
    logs = [jnp.log(w / s) - 0.5 * ((z[:, 0] - m) / s) ** 2 for w, m, s in MODES]
    return jnp.logaddexp(*logs)


def log_ratio(x, y):
    return log_density(y) - log_density(x)


def moment(power):
    weight = density(GRID)
    return (weight * GRID**power).sum() / weight.sum()


CHAINS = {
    "hmc": lambda key, size: hmc(
        key, log_density, jnp.zeros((4000, 1)), num_steps=40, num_leapfrog=4,
        step_size=size,
    ),
    "metropolis": lambda key, size: metropolis(
        key, log_ratio, jnp.zeros((4000, 1)), num_steps=150, step_size=2.0 * size
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("size", [0.3, 0.9])
def test_chains_have_the_moments_of_the_density(name, size):
    z, aux = jax.jit(CHAINS[name])(jax.random.key(3), size)
    z = np.asarray(z)[:, 0]
    for power in (1, 2, 3):
        error = (z**power).std() / len(z) ** 0.5
        assert abs((z**power).mean() - moment(power)) < 4 * error, power
    assert aux["acceptance"].shape == (4000,)
    assert 0.3 < float(aux["acceptance"].mean()) < 1.0


def test_moments_are_those_of_the_second_half():
    start = jnp.zeros((400, 2))

    def ratio(x, y):  # of N((1, 0), I)
        shift = jnp.array([[1.0, 0.0]])
        return 0.5 * jnp.sum((x - shift) ** 2 - (y - shift) ** 2, axis=1)

    _, aux = metropolis(jax.random.key(0), ratio, start, num_steps=300, step_size=1.5)
    assert_allclose(aux["mean"], [1.0, 0.0], atol=0.04)
    assert_allclose(aux["second_moment"], [[2.0, 0.0], [0.0, 1.0]], atol=0.08)


def test_moves_that_have_no_number_are_refused():
    def nowhere(x, *_):
        return jnp.nan * x[:, 0]

    start = jnp.ones((3, 2))
    for chain in (hmc, metropolis):
        z, aux = chain(jax.random.key(0), nowhere, start, num_steps=2)
        assert_allclose(z, start)
        assert_allclose(aux["acceptance"], np.zeros(3))


def test_bad_numbers_are_named():
    key, start = jax.random.key(0), jnp.zeros((2, 1))
    zeros: dict[str, Any] = {"num_steps": 0, "num_leapfrog": 0, "step_size": 0.0}
    for name, zero in zeros.items():
        with pytest.raises(ValueError, match=f"'{name}' is 0"):
            hmc(key, log_density, start, **{name: zero})
        if name != "num_leapfrog":
            with pytest.raises(ValueError, match=f"'{name}' is 0"):
                metropolis(key, log_ratio, start, **{name: zero})
