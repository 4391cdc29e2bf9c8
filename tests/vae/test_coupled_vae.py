"""Primal, dual and semi-dual against float64 NumPy and Sinkhorn's algorithm."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import logsumexp
from scipy.stats import norm

from jaxzoo.vae.coupled_vae import (
    dual_loss,
    gaussian_cost,
    log_coupling,
    primal_loss,
    semi_dual_loss,
    soft_min,
)


def costs(seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=6), rng.normal(size=5), 4.0 * rng.uniform(size=(6, 5))


def sinkhorn(cost: Any, epsilon: float) -> tuple[Any, Any, Any, float]:
    """Potentials, plan and value, by scaling rows and columns in turn."""
    n, m = cost.shape
    f, g = np.zeros(n), np.zeros(m)
    for _ in range(5000):
        g = -epsilon * (logsumexp((f[:, None] - cost) / epsilon, axis=0) - np.log(n))
        f = -epsilon * (logsumexp((g[None] - cost) / epsilon, axis=1) - np.log(m))
    plan = np.exp((f[:, None] + g[None] - cost) / epsilon) / (n * m)
    divergence = np.sum(plan * np.log(plan * n * m))
    return f, g, plan, float(np.sum(plan * cost) + epsilon * divergence)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_losses_are_those_of_the_equations(epsilon):
    phi, psi, cost = costs()
    total, total_mass = 0.0, 0.0
    for i in range(6):
        for j in range(5):
            mass = np.exp((phi[i] + psi[j] - cost[i, j]) / epsilon)
            total += (phi[i] + psi[j] - epsilon * mass + epsilon) / 30
            total_mass += mass / 30
    loss, aux = dual_loss(phi, psi, cost, epsilon=epsilon)
    assert_allclose(loss, -total, rtol=1e-5)
    assert_allclose(aux["mass"], total_mass, rtol=1e-5)
    best = [
        -epsilon * np.log(np.mean(np.exp((psi - cost[i]) / epsilon))) for i in range(6)
    ]
    assert_allclose(soft_min(psi, cost, epsilon=epsilon), best, rtol=1e-5)
    loss, aux = semi_dual_loss(psi, cost, epsilon=epsilon)
    assert_allclose(loss, -(np.mean(best) + np.mean(psi)), rtol=1e-5)
    assert_allclose(aux["per_example"], best, rtol=1e-5)
    # The semi-dual is the dual at the best phi.
    assert_allclose(
        dual_loss(np.array(best), psi, cost, epsilon=epsilon)[0], loss, 1e-5
    )


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_at_sinkhorns_potentials_both_are_the_primal_and_do_not_move(epsilon):
    _, _, cost = costs(1)
    f, g, plan, value = sinkhorn(cost, epsilon)
    assert_allclose(-dual_loss(f, g, cost, epsilon=epsilon)[0], value, rtol=1e-5)
    assert_allclose(-semi_dual_loss(g, cost, epsilon=epsilon)[0], value, rtol=1e-5)
    assert_allclose(np.exp(log_coupling(g, cost, epsilon=epsilon)) / 6, plan, rtol=1e-4)
    # With the potential of the rows, as in the released code.
    loss = semi_dual_loss(f, cost.T, epsilon=epsilon)[0]
    assert_allclose(-loss, value, rtol=1e-5)
    arrays = [jnp.asarray(a, jnp.float32) for a in (f, g, cost)]
    slopes: Any = jax.grad(lambda *a: dual_loss(*a, epsilon=epsilon)[0], (0, 1, 2))(
        *arrays
    )
    assert np.all(np.abs(slopes[0]) < 1e-5) and np.all(np.abs(slopes[1]) < 1e-5)
    assert_allclose(slopes[2], -plan, rtol=1e-3)  # the decoder's: cost under pi
    slope = jax.grad(lambda c: semi_dual_loss(arrays[1], c, epsilon=epsilon)[0])(
        arrays[2]
    )
    assert_allclose(slope, -plan, rtol=1e-3)


def test_descent_on_the_semi_dual_makes_codes_draws_of_the_prior():
    _, psi, cost = costs(2)

    @jax.jit
    def end(psi):
        slope = jax.grad(lambda p: semi_dual_loss(p, jnp.asarray(cost, "f4"))[0])
        return jax.lax.fori_loop(0, 2000, lambda _, p: p - slope(p), psi)

    psi = end(jnp.asarray(psi, jnp.float32))
    # At psi = 0, the true posterior, some codes are taken more than others.
    free = np.mean(np.exp(log_coupling(jnp.zeros(5), cost)), axis=0)
    held = np.mean(np.exp(log_coupling(psi, cost)), axis=0)
    assert np.max(np.abs(free - 0.2)) > 0.05
    assert_allclose(held, 0.2, atol=1e-4)
    assert_allclose(-semi_dual_loss(psi, cost)[0], sinkhorn(cost, 1.0)[3], rtol=1e-5)


def test_every_potential_bounds_the_primal_of_every_coupling():
    rng = np.random.default_rng(3)
    _, _, cost = costs(3)
    plan = sinkhorn(4.0 * rng.uniform(size=(6, 5)), 1.0)[2]  # of other costs
    kl = np.sum(6 * plan * np.log(30 * plan), axis=1)
    primal = primal_loss(np.sum(6 * plan * cost, axis=1), kl, 0.0)[0]
    bounds = [
        -float(dual_loss(rng.normal(size=6), rng.normal(size=5), cost)[0])
        for _ in range(20)
    ]
    assert max(bounds) < sinkhorn(cost, 1.0)[3] < primal


def test_the_primal_without_its_penalty_is_a_vae():
    rng = np.random.default_rng(4)
    cost, kl = rng.normal(size=7), rng.gamma(2.0, size=7)
    loss, aux = primal_loss(cost, kl, 0.3, weight=0.0)
    assert_allclose(loss, np.mean(cost + kl), rtol=1e-5)
    loss, aux = primal_loss(cost, kl, 0.3, epsilon=2.0, weight=5.0)
    assert_allclose(loss, np.mean(cost + 2.0 * kl) + 1.5, rtol=1e-5)
    assert_allclose(aux["per_example"], cost + 2.0 * kl, rtol=1e-5)


def test_with_no_potential_the_soft_minimum_is_a_likelihood():
    """p(x) of z ~ N(0, 1), x ~ N(2 z, 0.5^2) is N(0, 4.25)."""
    z = jax.random.normal(jax.random.key(0), (20_000, 1))
    x = np.array([[-3.0], [0.0], [1.5]])
    cost = gaussian_cost(x, 2.0 * z, jnp.full_like(z, np.log(0.5)))
    expected = -norm.logpdf(x[:, 0], 0.0, 4.25**0.5)
    assert_allclose(soft_min(jnp.zeros(20_000), cost), expected, rtol=0.02)


def test_costs_are_log_densities_of_every_pair():
    rng = np.random.default_rng(5)
    x, (mean, log_std) = rng.normal(size=(4, 2)), rng.normal(size=(2, 3, 2))
    expected = -norm.logpdf(x[:, None], mean, np.exp(log_std)).sum(axis=2)
    assert_allclose(gaussian_cost(x, mean, log_std), expected, rtol=1e-5)


def test_potentials_that_are_much_too_high_come_back():
    phi, psi, cost = (jnp.asarray(a, jnp.float32) for a in costs(6))
    for height in (15.0, 30.0, 1e4):
        loss, slope = jax.value_and_grad(lambda p: dual_loss(p, psi, cost)[0])(
            phi + height
        )
        assert np.isfinite(loss) and loss > 0 and np.all(np.asarray(slope) > 0)


def test_bad_numbers_are_named():
    psi, cost = jnp.zeros(2), jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="'epsilon' is 0.0"):
        semi_dual_loss(psi, cost, epsilon=0.0)
    with pytest.raises(ValueError, match="'weight' is -1.0"):
        primal_loss(psi, psi, 0.0, weight=-1.0)
    with pytest.raises(TypeError, match="'cost'"):
        semi_dual_loss(psi, cost.T)
