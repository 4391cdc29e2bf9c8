"""The losses against float64 NumPy, and what capacity does against known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import integrate
from scipy.special import logsumexp
from scipy.stats import norm

from jaxzoo.vae.beta_vae_capacity import (
    activation_steps,
    beta_vae_loss,
    capacity_at,
    capacity_loss,
    latent_kl,
    posterior_overlap,
    traversals,
)


def test_losses_are_those_of_the_equations():
    rng = np.random.default_rng(0)
    nll, kl = 50.0 + 9.0 * rng.normal(size=7), rng.gamma(3.0, size=7)
    for capacity in (1.0, 9.0):
        loss, aux = capacity_loss(nll, kl, capacity, gamma=30.0)
        expected = nll.mean() + 30.0 * abs(kl.mean() - capacity)
        assert_allclose(loss, expected, rtol=1e-5)
        assert_allclose(aux["excess"], kl.mean() - capacity, rtol=1e-5)
        assert_allclose(aux["reconstruction"], nll.mean(), rtol=1e-5)
    loss, aux = beta_vae_loss(nll, kl, beta=3.0)
    assert_allclose(loss, np.mean(nll + 3.0 * kl), rtol=1e-5)
    assert_allclose(aux["per_example"], nll + 3.0 * kl, rtol=1e-5)


def test_below_the_capacity_the_kl_is_pulled_up_and_above_it_down():
    kl = jnp.array([0.0, 6.0])  # mean 3: one example may have more than the other

    def slope(capacity):
        return jax.grad(lambda k: capacity_loss(kl, k, capacity, gamma=10.0)[0])(kl)

    # Of a plain beta-VAE both would be +5.
    assert slope(4.0).tolist() == [-5.0, -5.0]
    assert slope(2.0).tolist() == [5.0, 5.0]


def test_the_capacity_rises_in_a_straight_line_and_stays():
    steps = np.array([0, 25, 50, 100, 1000])
    found = [
        float(capacity_at(int(s), max_capacity=8.0, warmup_steps=100)) for s in steps
    ]
    assert_allclose(found, [0.0, 2.0, 4.0, 8.0, 8.0], rtol=1e-6)


def test_the_kl_of_latents_is_the_integral():
    rng = np.random.default_rng(1)
    mean, log_std = rng.normal(size=(4, 3)), 0.4 * rng.normal(size=(4, 3))
    expected = np.zeros(3)
    for n in range(4):
        for d in range(3):
            at = mean[n, d], np.exp(log_std[n, d])

            def integrand(z, at=at):
                return norm.pdf(z, *at) * (norm.logpdf(z, *at) - norm.logpdf(z))

            expected[d] += integrate.quad(integrand, -12.0, 12.0)[0] / 4
    assert_allclose(latent_kl(mean, log_std), expected, rtol=1e-5)


def test_a_linear_vae_gives_its_capacity_to_the_larger_variance_first():
    """Two numbers of variance 9 and 1, coded apart: rates are those of water-filling.

    Of a channel of rate R the mean squared error is variance exp(-2 R), and the least
    sum at a total of C has R_i = log(s_i^2 / w) / 2 or 0, of a common level w.
    """
    variances, total = jnp.array([9.0, 1.0]), 1.6

    @jax.jit
    def rates(capacities):
        def loss(rate, capacity):
            nll = 0.5 * jnp.sum(variances * jnp.exp(-2.0 * rate))[None] / 0.04
            return capacity_loss(nll, jnp.sum(rate)[None], capacity, gamma=500.0)[0]

        def step(rate, capacity):
            lower = rate - 1e-5 * jax.grad(loss)(rate, capacity)
            return jnp.maximum(lower, 0.0), rate  # no KL is below 0

        return jax.lax.scan(step, jnp.zeros(2), capacities)[1]

    steps = np.arange(20_000)
    capacities = np.minimum(total, total * steps / 15_000, dtype="f4")
    traces = np.asarray(rates(capacities))
    level = np.sqrt(9.0 * np.exp(-2.0 * total))  # both are used: w^2 = 9 exp(-2 C)
    expected = 0.5 * np.log(np.array([9.0, 1.0]) / level)
    assert_allclose(traces[-1], expected, atol=0.02)
    first, second = np.asarray(activation_steps(traces, threshold=0.1))
    # The second starts where C is log(9) / 2 = 1.1 nats; it reaches 0.1 at 1.3.
    assert first < 1_500 and 10_000 < second < 13_000


def test_activation_is_when_the_kl_comes_to_stay():
    traces = np.array([[0.0, 0.2, 0.0], [0.3, 0.0, 0.05], [0.2, 0.4, 0.1]])
    assert activation_steps(traces, threshold=0.1).tolist() == [1, 2, 3]


def test_overlap_is_the_posterior_of_the_example_given_a_code():
    mean = np.array([[-1.0], [0.5], [2.0]])
    log_std = np.log(np.array([[0.5], [1.0], [0.7]]))
    overlap, aux = posterior_overlap(
        jax.random.key(0), mean, log_std, num_samples=20_000
    )
    expected, information = np.zeros((3, 3)), np.zeros(3)
    grid = np.linspace(-8.0, 8.0, 4001)
    log_q = norm.logpdf(grid, mean, np.exp(log_std))
    log_total = logsumexp(log_q, axis=0)
    for n in range(3):
        q = np.exp(log_q[n])
        for m in range(3):
            expected[n, m] = np.trapezoid(q * np.exp(log_q[m] - log_total), grid)
        gain = log_q[n] - log_total + np.log(3.0)
        information[n] = np.trapezoid(q * gain, grid)
    assert_allclose(overlap, expected, atol=0.01)
    assert_allclose(aux["information"], information, atol=0.02)


def test_less_capacity_makes_neighbours_alike_first():
    """Wider posteriors on a line: what is confused with an example lies beside it."""
    mean, key = jnp.arange(8.0)[:, None], jax.random.key(0)
    rates, costs = [], []
    for std in (0.1, 0.6, 3.0):
        log_std = jnp.full((8, 1), np.log(std))
        overlap, aux = posterior_overlap(key, mean, log_std, num_samples=500)
        assert_allclose(np.sum(overlap, axis=1), 1.0, rtol=1e-5)
        rates.append(float(np.mean(aux["information"])))
        apart = np.square(np.arange(8)[:, None] - np.arange(8)[None])
        costs.append(float(np.mean(np.sum(overlap * apart, axis=1))))
    assert_allclose(rates[0], np.log(8.0), rtol=1e-3)
    assert rates[0] > rates[1] > rates[2] and costs[0] < costs[1] < costs[2]
    # Shuffled along the line, data cost more at the same rate.
    assert 1.5 * costs[1] < np.mean(apart) / 4


def test_traversals_change_one_latent_at_a_time():
    z = traversals(jnp.array([5.0, 6.0, 7.0]), jnp.array([-1.0, 1.0]))
    assert z.shape == (3, 2, 3)
    assert z[1].tolist() == [[5.0, -1.0, 7.0], [5.0, 1.0, 7.0]]


def test_bad_numbers_are_named():
    ones = jnp.ones(2)
    with pytest.raises(ValueError, match="'gamma' is -1.0"):
        capacity_loss(ones, ones, 1.0, gamma=-1.0)
    with pytest.raises(ValueError, match="'beta' is -1.0"):
        beta_vae_loss(ones, ones, beta=-1.0)
    with pytest.raises(ValueError, match="'max_capacity' is -2.0"):
        capacity_at(3, max_capacity=-2.0)
    with pytest.raises(ValueError, match="'warmup_steps' is 0"):
        capacity_at(3, warmup_steps=0)
    with pytest.raises(TypeError, match="'kl'"):
        capacity_loss(ones, jnp.ones((2, 1)), 1.0)
