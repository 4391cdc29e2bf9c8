"""The losses of Wasserstein autoencoders against float64 NumPy and their optima."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import norm

from jaxzoo.vae.wae import (
    LatentDiscriminator,
    WassersteinEncoder,
    discriminator_loss,
    latent_mmd,
    sample_prior,
    wae_gan_loss,
    wae_mmd_loss,
)


def samples(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 6, 5))
    return x, y, 0.5 * rng.normal(size=(6, 3)) + 1.0, 1.5 * rng.normal(size=(4, 3))


def penalty(z: Any, prior: Any, sigma: float) -> float:
    """Pair by pair, as Algorithm 2 has it."""

    def kernel(a: Any, b: Any) -> float:
        base, square = 2.0 * len(a) * sigma**2, np.sum((a - b) ** 2)
        scales = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
        return sum(s * base / (s * base + square) for s in scales)

    total = 0.0
    for points in (z, prior):
        n = len(points)
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        total += sum(kernel(points[i], points[j]) for i, j in pairs) / (n * (n - 1))
    return total - 2.0 * np.mean([kernel(a, b) for a in z for b in prior])


@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_the_penalty_is_that_of_the_algorithm(sigma):
    _, _, z, prior = samples()
    assert_allclose(
        latent_mmd(z, prior, sigma=sigma), penalty(z, prior, sigma), rtol=1e-5
    )


def test_the_penalty_is_zero_on_average_where_codes_follow_the_prior():
    @jax.jit
    def values(keys):
        def one(key):
            z, prior = jax.random.normal(key, (2, 8, 2))
            return latent_mmd(z, prior), latent_mmd(z + 0.5, prior)

        return jax.lax.map(one, keys, batch_size=100)

    same, moved = (
        np.asarray(a) for a in values(jax.random.split(jax.random.key(0), 3000))
    )
    error = same.std() / len(same) ** 0.5
    # With each point's pair with itself the mean would be some 60 errors above 0.
    assert abs(same.mean()) < 4 * error and moved.mean() > 10 * error
    assert same.min() < 0.0


@pytest.mark.parametrize("cost", ["squared", "norm", "absolute"])
def test_losses_are_those_of_the_algorithms(cost):
    x, y, z, prior = samples(1)
    costs = {
        "squared": np.sum((x - y) ** 2, axis=1),
        "norm": np.sqrt(np.sum((x - y) ** 2, axis=1)),
        "absolute": np.sum(np.abs(x - y), axis=1),
    }[cost]
    loss, aux = wae_mmd_loss(x, y, z, prior, weight=3.0, sigma=1.5, cost=cost)
    expected = costs.mean() + 3.0 * penalty(z, prior, 1.5)
    assert_allclose(loss, expected, rtol=1e-5)
    assert_allclose(aux["mmd"], penalty(z, prior, 1.5), rtol=1e-5)
    assert_allclose(aux["per_example"], costs, rtol=1e-5)
    d = 1.0 / (1.0 + np.exp(-z[:, 0]))
    loss, aux = wae_gan_loss(x, y, z[:, 0], weight=3.0, cost=cost)
    assert_allclose(loss, costs.mean() - 3.0 * np.log(d).mean(), rtol=1e-5)
    assert_allclose(aux["matching"], -np.log(d), rtol=1e-5)
    e = 1.0 / (1.0 + np.exp(-prior[:, 0]))
    expected = -np.log(e).mean() - np.log(1.0 - d).mean()
    assert_allclose(discriminator_loss(prior[:, 0], z[:, 0])[0], expected, rtol=1e-5)


def test_images_have_the_cost_of_their_pixels():
    x, y, _, _ = samples(2)
    first, second = (a[:, :4].reshape(6, 2, 2, 1) for a in (x, y))
    costs = wae_gan_loss(first, second, np.zeros(6))[1]["per_example"]
    assert_allclose(costs, np.sum((x - y)[:, :4] ** 2, axis=1), rtol=1e-5)


def test_codes_are_pulled_to_the_prior_by_the_loss():
    """By gradient descent on the codes, whose cost does not depend on them."""
    x = jnp.zeros((64, 1))
    start = 2.0 + 0.2 * jax.random.normal(jax.random.key(0), (64, 2))

    @jax.jit
    def end(keys):
        def step(z, key):
            def loss(z):
                prior = sample_prior(key, num_samples=64, latents=2)
                return wae_mmd_loss(x, x, z, prior)[0]

            return z - 0.5 * jax.grad(loss)(z), None

        return jax.lax.scan(step, start, keys)[0]

    z = np.asarray(end(jax.random.split(jax.random.key(1), 400)))
    # Tails are heavy: one code may be on its way yet.
    low, middle, high = np.quantile(z, (0.25, 0.5, 0.75), axis=0)
    assert np.all(np.abs(middle) < 0.3)
    assert_allclose(high - low, norm.ppf(0.75) - norm.ppf(0.25), rtol=0.3)


def test_the_encoder_learns_most_where_the_discriminator_is_sure():
    x = jnp.zeros((2, 1))

    def loss(logits):
        return wae_gan_loss(x, x, logits, weight=4.0)[0]

    # -weight sigmoid(-logit) / batch; of log(1 - D) the first would be -4e-9.
    gradient = jax.grad(loss)(jnp.array([-20.0, 20.0]))
    assert_allclose(gradient, [-2.0, -4.1e-9], rtol=0.01)


def test_the_best_discriminator_is_the_ratio_of_densities():
    """On a grid, by weights: the loss is least at log p/q, 2 (log 2 - JS)."""
    grid = np.linspace(-6.0, 8.0, 2000)
    p, q = norm.pdf(grid), norm.pdf(grid, 1.0, 1.5)
    rng = np.random.default_rng(0)
    prior, codes = rng.normal(size=20_000), 1.0 + 1.5 * rng.normal(size=20_000)

    def best(z: Any) -> Any:
        return norm.logpdf(z) - norm.logpdf(z, 1.0, 1.5)

    half = 0.5 * (p + q)
    js = 0.5 * np.trapezoid(p * np.log(p / half) + q * np.log(q / half), grid)
    loss = float(discriminator_loss(best(prior), best(codes))[0])
    assert_allclose(loss, 2.0 * (np.log(2.0) - js), atol=0.02)
    for other in (0.5, 1.5):
        args = other * best(prior), other * best(codes)
        assert discriminator_loss(*args)[0] > loss + 0.01


def test_an_untaught_discriminator_can_know_the_prior():
    z = jax.random.normal(jax.random.key(0), (5, 3))
    plain, told = LatentDiscriminator((4,)), LatentDiscriminator((4,), sigma=2.0)
    params = plain.init(jax.random.key(1), z)
    outputs: Any = [np.asarray(net.apply(params, z)) for net in (plain, told)]
    expected = norm.logpdf(np.asarray(z), 0.0, 2.0).sum(axis=1)
    assert_allclose(outputs[1] - outputs[0], expected, rtol=1e-4)


def test_encoders_with_and_without_noise():
    x = jax.random.normal(jax.random.key(0), (4, 6))
    plain, noisy = (
        WassersteinEncoder(3, (5,), k) for k in ("deterministic", "gaussian")
    )
    params = noisy.init(jax.random.key(1), x)
    outputs: Any = noisy.apply(params, x)
    assert outputs[0].shape == outputs[1].shape == (4, 3) and np.all(outputs[1] > 0)
    shared = {k: params["params"][k] for k in ("Dense_0", "Dense_1")}
    others: Any = plain.apply({"params": shared}, x)
    assert_allclose(others[0], outputs[0], rtol=1e-6)
    assert np.all(np.asarray(others[1]) == 0)


def test_draws_of_the_prior():
    key = jax.random.key(0)
    z = sample_prior(key, num_samples=20_000, latents=3, sigma=2.0)
    assert_allclose(np.cov(z.T), 4.0 * np.eye(3), atol=0.15)
    assert np.all(np.abs(np.asarray(z).mean(axis=0)) < 0.06)


def test_bad_numbers_are_named():
    x, z = jnp.zeros((2, 3)), jnp.zeros((2, 2))
    unknown: Any = "cubic"
    with pytest.raises(ValueError, match="'weight' is -1.0"):
        wae_mmd_loss(x, x, z, z, weight=-1.0)
    with pytest.raises(ValueError, match="'sigma' is 0.0"):
        latent_mmd(z, z, sigma=0.0)
    with pytest.raises(ValueError, match=r"'len\(prior\)' is 1"):
        latent_mmd(z, z[:1])
    with pytest.raises(ValueError, match="'cost'"):
        wae_gan_loss(x, x, z[:, 0], cost=unknown)
    with pytest.raises(TypeError, match="'reconstruction'"):
        wae_mmd_loss(x, x[:, :1], z, z)
