"""Chains against the exact stationary covariance of their linear recursion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from numpy.testing import assert_allclose

from jaxzoo.core.sgmcmc import init_sghmc, sghmc_step, sgld_step

RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(3, 3))
PRECISION = ROOT @ ROOT.T / 3 + 0.5 * np.eye(3)
CHAINS, STEPS = 4000, 300


def last_positions(step, start):
    """`CHAINS` chains of `STEPS` steps on U(x) = x' PRECISION x / 2."""

    @jax.jit
    @jax.vmap
    def chain(key):
        def body(state, key):
            return step(key, state), None

        return jax.lax.scan(body, start, jax.random.split(key, STEPS))[0]

    return chain(jax.random.split(jax.random.key(0), CHAINS))


def covariance_of(transition, noise):
    return scipy.linalg.solve_discrete_lyapunov(transition, noise)


def assert_covariance(x, expected):
    stderr = 4.5 * np.abs(expected).max() * (2.0 / CHAINS) ** 0.5
    assert_allclose(np.cov(np.asarray(x).T), expected, atol=stderr)
    assert_allclose(np.asarray(x).mean(0), 0.0, atol=4.5 * CHAINS**-0.5)


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_langevin_has_the_covariance_of_its_recursion(temperature):
    step_size, precision = 0.1, jnp.array(PRECISION)
    expected = covariance_of(
        np.eye(3) - step_size * PRECISION, 2 * step_size * temperature * np.eye(3)
    )

    def step(key, x):
        knobs = {"step_size": step_size, "temperature": temperature}
        return sgld_step(key, x, precision @ x, **knobs)

    assert_covariance(last_positions(step, jnp.zeros(3)), expected)


def stationary(step_size, friction):
    """(x, v) -> v' = (1 - friction) v - step^2 P x + noise, x' = x + v'."""
    eye, kick, kept = np.eye(3), step_size**2 * PRECISION, (1 - friction) * np.eye(3)
    transition = np.block([[eye - kick, kept], [-kick, kept]])
    variance = 2 * friction * step_size**2
    noise = variance * np.block([[eye, eye], [eye, eye]])
    return covariance_of(transition, noise)[:3, :3]


@pytest.mark.parametrize("friction", [0.2, 1.0])
def test_hamiltonian_has_the_covariance_of_its_recursion(friction):
    # Which is the target's, for small steps.
    assert_allclose(stationary(0.01, friction), np.linalg.inv(PRECISION), atol=1e-3)
    step_size, precision = 0.4, jnp.array(PRECISION)

    def step(key, state):
        gradient = precision @ state.position
        return sghmc_step(key, state, gradient, step_size=step_size, friction=friction)

    positions = last_positions(step, init_sghmc(jnp.zeros(3))).position
    assert_covariance(positions, stationary(step_size, friction))


def test_the_scale_is_that_of_springenberg_in_float64():
    gradients = RNG.normal(size=(20, 4)) * [0.1, 1.0, 10.0, 0.0]
    state = init_sghmc(jnp.zeros(4))
    window, mean, square = np.ones(4), np.ones(4), np.ones(4)
    position, momentum = np.zeros(4), np.zeros(4)
    for g in gradients:
        rate = 1 / (window + 1)
        window = 1 + window * (1 - mean**2 / square)
        mean = (1 - rate) * mean + rate * g
        square = (1 - rate) * square + rate * g**2
        momentum = 0.9 * momentum - 0.3**2 * g / np.sqrt(square)
        position = position + momentum
        state = sghmc_step(
            jax.random.key(0), state, jnp.array(g), step_size=0.3, friction=0.1,
            temperature=0.0, adapt=True,
        )  # fmt: skip
    assert_allclose(state.position, position, rtol=1e-4)
    assert_allclose(state.square[:3], square[:3], rtol=1e-4)
    assert np.isfinite(state.position).all()


def test_trees_of_any_structure_move_leaf_by_leaf():
    position = {"w": jnp.ones((2, 3)), "b": (jnp.zeros(2),)}
    state = init_sghmc(position)
    new = sghmc_step(jax.random.key(1), state, position, step_size=0.1)
    assert jax.tree.structure(new.position) == jax.tree.structure(position)
    moved = jnp.concatenate([x.ravel() for x in jax.tree.leaves(new.momentum)])
    assert len(np.unique(np.asarray(moved))) == 8  # no two entries share their noise


def test_bad_input_is_named():
    state = init_sghmc(jnp.zeros(2))
    with pytest.raises(TypeError, match="'gradient' has shapes"):
        sghmc_step(jax.random.key(0), state, jnp.zeros((2, 1)), step_size=0.1)
    with pytest.raises(ValueError, match="'friction' is 0"):
        sghmc_step(jax.random.key(0), state, jnp.zeros(2), step_size=0.1, friction=0.0)
    with pytest.raises(TypeError, match="'position' is list"):
        init_sghmc([1.0])
