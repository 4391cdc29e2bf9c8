"""The ELBO and its gradients on a model whose answers are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose

from jaxzoo.core.stats import normal_kl, normal_log_prob
from jaxzoo.data.linear_gaussian import linear_gaussian
from jaxzoo.vae.vae import (
    corrupt,
    elbo,
    latent_usage,
    reparameterize,
    score_function_elbo,
    wake_sleep_losses,
)

MODEL = linear_gaussian(jax.random.key(0))
X = MODEL.sample(jax.random.key(1), 8)[0]
TRUE_MEAN, TRUE_LOG_STD = MODEL.posterior(X)


def test_the_linear_gaussian_model_itself():
    """Bayes' rule at any z, with densities written out in float64."""
    w, b, mu = (np.asarray(a, np.float64) for a in MODEL[:3])
    variance = np.exp(2 * float(MODEL.log_noise_std))
    x = np.asarray(X, np.float64)
    covariance = w @ w.T + variance * np.eye(8)
    residual = x - b - w @ mu
    quadratic = np.einsum("bi,ij,bj->b", residual, np.linalg.inv(covariance), residual)
    log_det = np.linalg.slogdet(2 * np.pi * covariance)[1]
    assert_allclose(MODEL.log_marginal(X), -0.5 * (quadratic + log_det), rtol=1e-5)
    z = jax.random.normal(jax.random.key(2), TRUE_MEAN.shape)
    log_posterior = normal_log_prob(z, TRUE_MEAN, TRUE_LOG_STD)
    assert_allclose(
        MODEL.log_joint(X, z) - log_posterior, MODEL.log_marginal(X), rtol=1e-5
    )


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_estimators_a_and_b_are_log_p_minus_the_divergence(shift):
    """ELBO = log p(x) - KL(q || posterior), which is 0 at the true posterior."""
    mean, log_std = TRUE_MEAN + shift, TRUE_LOG_STD + shift
    z = reparameterize(jax.random.key(3), mean, log_std, num_samples=20_000)
    log_joint = MODEL.log_joint(X, z)
    sampled_kl = normal_log_prob(z, mean, log_std) - normal_log_prob(
        z, MODEL.prior_mean
    )
    likelihood = log_joint - normal_log_prob(z, MODEL.prior_mean)
    estimator_a = elbo(likelihood, sampled_kl)
    prior = jnp.broadcast_to(MODEL.prior_mean, mean.shape)
    estimator_b = elbo(likelihood.mean(0), normal_kl(mean, log_std, prior))
    exact = MODEL.log_marginal(X) - normal_kl(mean, log_std, TRUE_MEAN, TRUE_LOG_STD)
    standard_error = np.std(estimator_a, axis=0) / 20_000**0.5
    assert np.all(np.abs(estimator_a.mean(0) - exact) <= 4 * standard_error + 1e-4)
    error_b = np.std(likelihood, axis=0) / 20_000**0.5
    assert np.all(np.abs(estimator_b - exact) <= 4 * error_b + 1e-4)
    if shift == 0:
        assert_allclose(
            estimator_a, jnp.broadcast_to(exact, estimator_a.shape), atol=1e-4
        )
    else:
        assert np.all(exact < MODEL.log_marginal(X))


def gradient_draws(kind, num=20_000, baseline=0.0):
    shift = jnp.full((2, 3), 0.2)

    def objective(s, key):
        mean, log_std = TRUE_MEAN + s[:1], TRUE_LOG_STD + s[1:]
        z = reparameterize(key, mean, log_std)[0]
        if kind == "pathwise":
            return jnp.mean(MODEL.log_joint(X, z) - normal_log_prob(z, mean, log_std))
        z = lax.stop_gradient(z)
        log_q = normal_log_prob(z, mean, log_std)
        return jnp.mean(
            score_function_elbo(MODEL.log_joint(X, z), log_q, baseline=baseline)
        )

    keys = jax.random.split(jax.random.key(4), num)
    return jax.jit(jax.vmap(jax.grad(objective), (None, 0)))(shift, keys)


def exact_gradient():
    def bound(s):
        q = (TRUE_MEAN + s[:1], TRUE_LOG_STD + s[1:])
        return -jnp.mean(normal_kl(*q, TRUE_MEAN, TRUE_LOG_STD))

    return jax.grad(bound)(jnp.full((2, 3), 0.2))


def test_both_gradients_are_unbiased_and_the_pathwise_one_has_less_variance():
    variances = {}
    for kind, baseline in (("pathwise", 0.0), ("score", 0.0), ("score", -9.0)):
        draws = np.asarray(gradient_draws(kind, baseline=baseline), np.float64)
        standard_error = draws.std(0) / len(draws) ** 0.5
        score = np.abs(draws.mean(0) - exact_gradient()) / standard_error
        assert score.max() < 3.5, (kind, baseline, score)
        variances[kind, baseline] = draws.var(0).sum()
    assert variances["score", 0.0] > 10 * variances["pathwise", 0.0]
    assert variances["score", -9.0] < 0.5 * variances["score", 0.0]


def test_score_function_value_is_the_sampled_bound_and_reaches_both_arguments():
    joint, posterior = jnp.array([-3.0, 1e4]), jnp.array([-1.0, 2.0])
    assert_allclose(score_function_elbo(joint, posterior), joint - posterior)
    by_joint, by_posterior = jax.grad(
        lambda j, q: score_function_elbo(j, q, baseline=0.5).sum(), (0, 1)
    )(joint, posterior)
    assert_allclose(by_joint, [1, 1])
    assert_allclose(by_posterior, joint - posterior - 0.5)


def test_reparameterize_moments_and_gradients():
    mean, log_std = jnp.array([[1.0, -2.0]]), jnp.log(jnp.array([[0.5, 2.0]]))
    z = reparameterize(jax.random.key(0), mean, log_std, num_samples=100_000)
    assert z.shape == (100_000, 1, 2)
    assert_allclose(z.mean(0), mean, atol=0.03)
    assert_allclose(z.std(0), jnp.exp(log_std), rtol=0.02)
    noise = (z[0] - mean) / jnp.exp(log_std)
    by_mean, by_log_std = jax.grad(
        lambda m, s: reparameterize(jax.random.key(0), m, s, num_samples=100_000)[
            0
        ].sum(),
        (0, 1),
    )(mean, log_std)
    assert_allclose(by_mean, jnp.ones((1, 2)))
    assert_allclose(by_log_std, noise * jnp.exp(log_std), rtol=1e-5)
    with pytest.raises(ValueError, match="argument 'num_samples' is 0"):
        reparameterize(jax.random.key(0), mean, log_std, num_samples=0)
    with pytest.raises(TypeError, match="argument 'log_std'"):
        reparameterize(jax.random.key(0), mean, log_std[0])


def test_elbo_weighs_the_divergence():
    likelihood, kl = jnp.array([-80.0, -1.0]), jnp.array([20.0, 3.0])
    assert_allclose(elbo(likelihood, kl, beta=2.0), [-120, -7])
    assert_allclose(jax.jit(elbo)(likelihood, kl, beta=jnp.float32(0.5)), [-90, -2.5])
    with pytest.raises(ValueError, match="argument 'beta' is -1"):
        elbo(likelihood, kl, beta=-1.0)
    with pytest.raises(TypeError, match="argument 'kl'"):
        elbo(likelihood, kl[:, None])


def test_wake_sleep_masks_examples_and_keeps_the_networks_apart():
    joint, dreams = jnp.array([-3.0, jnp.nan]), jnp.array([-2.0, -4.0])
    mask = jnp.array([True, False])
    losses = wake_sleep_losses(joint, dreams, where=mask)
    assert_allclose(losses, (3.0, 3.0))
    by_joint, by_dreams = jax.grad(
        lambda j, d: wake_sleep_losses(j, d, where=mask).generative, (0, 1)
    )(joint, dreams)
    assert_allclose(by_joint, [-1, 0])
    assert_allclose(by_dreams, [0, 0])


def test_corrupt_drops_at_its_rate_and_leaves_the_rest():
    x = jnp.arange(1.0, 10_001.0)
    noisy = corrupt(jax.random.key(0), x, rate=0.3)
    kept = noisy != 0
    assert_allclose(kept.mean(), 0.7, atol=0.015)
    assert np.array_equal(noisy[kept], x[kept])
    with pytest.raises(ValueError, match="argument 'rate' is 1.5"):
        corrupt(jax.random.key(0), x, rate=1.5)


def test_latent_usage_tells_a_collapsed_latent():
    mean = jnp.stack([jnp.array([2.0, -2.0, 2.0, -2.0]), jnp.zeros(4)], axis=1)
    log_std = jnp.stack([jnp.full(4, np.log(0.1)), jnp.zeros(4)], axis=1)
    usage = latent_usage(mean, log_std)
    assert_allclose(usage["kl"], [0.5 * (4 + 0.01 - 1) - np.log(0.1), 0], rtol=1e-5)
    assert_allclose(usage["variance_of_mean"], [4, 0])
    assert_allclose(usage["mean_variance"], [0.01, 1], rtol=1e-5)
