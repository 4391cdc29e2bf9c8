"""The bound in float64, its ordering on a known model, and the three estimators."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax import lax
from numpy.testing import assert_allclose

from jaxzoo.core.stats import normal_log_prob
from jaxzoo.data.linear_gaussian import linear_gaussian
from jaxzoo.vae.iwae import (
    active_units,
    importance_log_likelihood,
    iwae_bound,
    iwae_loss,
    log_weights,
)
from jaxzoo.vae.vae import reparameterize

MODEL = linear_gaussian(jax.random.key(0))
X = MODEL.sample(jax.random.key(1), 8)[0]
LOG_W = 20 * np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def draw_weight(shift, detach=False):
    """A draw of log w per example, of an encoder `shift` away from the posterior."""
    mean, log_std = MODEL.posterior(X)
    mean, log_std = mean + shift[:1], log_std + shift[1:]
    stop = lax.stop_gradient if detach else lambda a: a

    def draw(key):
        z = reparameterize(key, mean, log_std)[0]
        return MODEL.log_joint(X, z) - normal_log_prob(z, stop(mean), stop(log_std))

    return draw


def test_bound_is_the_log_of_the_mean_weight():
    w = np.exp(LOG_W.astype(np.float64))
    assert_allclose(iwae_bound(LOG_W), np.log(w.mean(0)), rtol=1e-5)
    assert_allclose(iwae_bound(LOG_W.T, axis=1), np.log(w.mean(0)), rtol=1e-5)
    assert_allclose(iwae_bound(LOG_W[:1]), LOG_W[0], rtol=1e-6)  # k = 1: the ELBO
    # Not the weighted sum of log-weights that goes by this name elsewhere.
    elsewhere = (w / w.sum(0) * LOG_W).sum(0)
    assert np.all(elsewhere - np.asarray(iwae_bound(LOG_W)) > 0.5)


def test_bounds_are_ordered_and_tight_on_the_linear_gaussian_model():
    draw = draw_weight(jnp.full((2, 3), 0.3))
    log_w = log_weights(jax.random.key(2), draw, num_samples=20_000, chunk=2000)
    bounds = [
        iwae_bound(log_w.reshape(-1, k, 8), axis=1).mean() for k in (1, 5, 50, 5000)
    ]
    exact = MODEL.log_marginal(X).mean()
    assert bounds[0] < bounds[1] < bounds[2] < exact
    assert abs(bounds[3] - exact) < 0.02
    at_posterior = log_weights(
        jax.random.key(2), draw_weight(jnp.zeros((2, 3))), num_samples=5
    )
    for k in (1, 5):
        assert_allclose(iwae_bound(at_posterior[:k]), MODEL.log_marginal(X), atol=1e-4)


def test_loss_gradients_by_the_formula():
    """d loss / d log w: minus softmax, or its square for "dreg", over the batch."""
    w = np.exp(LOG_W.astype(np.float64))
    v = w / w.sum(0)
    for estimator, weight in (("iwae", v), ("stl", v), ("dreg", v**2)):
        (value, aux), gradient = jax.value_and_grad(iwae_loss, has_aux=True)(
            jnp.asarray(LOG_W), estimator=estimator
        )
        assert_allclose(gradient, -weight / 5, rtol=2e-5, atol=1e-12)
        assert_allclose(value, -np.log(w.mean(0)).mean(), rtol=1e-6)
        assert_allclose(aux["per_example"], np.log(w.mean(0)), rtol=1e-6)
        assert_allclose(aux["effective_samples"], 1 / (v**2).sum(0), rtol=1e-5)


def gradient_moments(estimator, k, shift, num):
    detach = estimator != "iwae"

    def loss(s, key):
        log_w = log_weights(key, draw_weight(s, detach), num_samples=k)
        return iwae_loss(log_w, estimator=estimator)[0]

    keys = jax.random.split(jax.random.fold_in(jax.random.key(k), num), num)
    draws = jax.jit(lambda s: lax.map(
        lambda key: jax.grad(loss)(s, key), keys, batch_size=1000
    ))(jnp.full((2, 3), shift))  # fmt: skip
    draws = np.asarray(draws, np.float64)
    return draws.mean(0), draws.var(0)


def score(first, second):
    """Largest difference of two means in standard errors."""
    (a, a_variance, a_num), (b, b_variance, b_num) = first, second
    return np.max(np.abs(a - b) / np.sqrt(a_variance / a_num + b_variance / b_num))


def test_stl_at_one_sample_and_dreg_at_five_are_unbiased_and_stl_at_five_is_not():
    num = 40_000
    runs = {
        (estimator, k): (*gradient_moments(estimator, k, 0.3, num), num)
        for estimator, k in [
            ("iwae", 1), ("stl", 1), ("iwae", 5), ("dreg", 5), ("stl", 5)
        ]
    }  # fmt: skip
    assert score(runs["stl", 1], runs["iwae", 1]) < 3
    assert score(runs["dreg", 5], runs["iwae", 5]) < 3
    assert runs["dreg", 5][1].sum() < runs["iwae", 5][1].sum()
    # Tucker et al.'s finding: the weights of STL leave a bias for k > 1.
    assert score(runs["stl", 5], runs["iwae", 5]) > 10


@pytest.mark.parametrize("estimator, k", [("stl", 1), ("stl", 5), ("dreg", 5)])
def test_their_variance_vanishes_at_the_true_posterior(estimator, k):
    mean, variance = gradient_moments(estimator, k, 0.0, 1000)
    assert variance.max() < 1e-9 and np.abs(mean).max() < 1e-4
    assert gradient_moments("iwae", k, 0.0, 1000)[1].min() > 1e-3


def test_chunks_change_nothing_but_memory():
    shift = jnp.full((2, 3), 0.3)

    def loss(shift, chunk):
        log_w = log_weights(
            jax.random.key(3), draw_weight(shift), num_samples=12, chunk=chunk
        )
        return iwae_loss(log_w)[0]

    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    whole = value_and_grad(shift, None)
    for chunk in (1, 5, 100):  # 5 leaves a rest of 2
        parts = value_and_grad(shift, chunk)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), parts, whole)


def test_five_thousand_samples_fit():
    """Temporary memory of a gradient step of a 784-pixel decoder, compiled, not run."""
    weight = jax.ShapeDtypeStruct((20, 784), jnp.float32)
    x = jax.ShapeDtypeStruct((32, 784), jnp.float32)

    def loss(weight, x, k, chunk):
        def draw(key):
            z = jax.random.normal(key, (32, 20))
            return jnp.sum(x * jnp.tanh(z @ weight), axis=-1)

        log_w = log_weights(jax.random.key(0), draw, num_samples=k, chunk=chunk)
        return iwae_loss(log_w)[0]

    def temporary(k, chunk):
        step = jax.jit(jax.grad(lambda w, x: loss(w, x, k, chunk)))
        analysis = step.lower(weight, x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    whole, chunked = temporary(5000, None), temporary(5000, 50)
    assert whole > 400e6  # 5000 x 32 x 784 floats
    assert chunked < 40e6
    assert temporary(50_000, 50) < chunked + 50e6  # log_w itself is 6 MB per copy


def test_masked_examples_are_inert():
    mask = jnp.array([True, False, True, True, False])
    spoilt = jnp.where(mask[None], LOG_W, jnp.nan)
    kept = jnp.asarray(LOG_W)[:, np.asarray(mask)]
    for estimator in ("iwae", "dreg"):

        def loss(log_w, where=None, estimator: Any = estimator):
            return iwae_loss(log_w, where=where, estimator=estimator)[0]

        value, gradient = jax.value_and_grad(loss)(spoilt, mask)
        expected, expected_gradient = jax.value_and_grad(loss)(kept)
        assert_allclose(value, expected, rtol=1e-6)
        assert_allclose(gradient[:, np.asarray(mask)], expected_gradient, rtol=1e-6)
        assert np.all(np.asarray(gradient)[:, ~np.asarray(mask)] == 0)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="argument 'axis' is 2"):
        iwae_bound(LOG_W, axis=2)
    with pytest.raises(ValueError, match="'estimator' is 'vimco'.*'iwae' or 'stl'"):
        iwae_loss(LOG_W, estimator=cast(Any, "vimco"))
    with pytest.raises(
        TypeError, match=r"argument 'where' has shape \(7,\), expected \(5,\)"
    ):
        iwae_loss(LOG_W, where=jnp.ones(7, bool))
    with pytest.raises(ValueError, match="argument 'num_samples' is 0"):
        log_weights(jax.random.key(0), lambda k: jnp.zeros(3), num_samples=0)
    with pytest.raises(ValueError, match="argument 'chunk' is 0"):
        log_weights(jax.random.key(0), lambda k: jnp.zeros(3), num_samples=2, chunk=0)
    with pytest.raises(ValueError, match="is 1, expected a number >= 2"):
        importance_log_likelihood(LOG_W[:1])


def test_importance_log_likelihood_covers_the_exact_value():
    """Over 200 repetitions about 68% lie within one standard error."""
    draw = draw_weight(jnp.full((2, 3), 0.3))
    log_w = log_weights(jax.random.key(5), draw, num_samples=200 * 500, chunk=5000)
    estimate, aux = importance_log_likelihood(log_w.reshape(200, 500, 8), axis=1)
    error = np.abs(estimate - jnp.broadcast_to(MODEL.log_marginal(X), estimate.shape))
    within = np.mean(error <= aux["stderr"])
    assert 0.62 < within < 0.74
    assert np.all(aux["effective_samples"] > 50) and np.all(
        aux["effective_samples"] <= 500
    )


def test_active_units_follow_the_variance_of_the_mean():
    scale = jnp.array([1.0, 0.2, 0.05, 0.0])
    mean = jax.random.normal(jax.random.key(0), (4000, 4)) * scale[None]
    assert active_units(mean).tolist() == [True, True, False, False]
    assert active_units(mean, threshold=0.1).tolist() == [True, False, False, False]


def test_two_stochastic_layers_by_scipy():
    """log p(x|z1) p(z1|z2) p(z2) - log q(z1|x) q(z2|z1), the chain of section 3."""
    from experiments.vae import iwae as experiment

    config = experiment.Config(stochastic_layers=2, latents=4, hidden=8)
    nets = experiment.networks(config, 6)
    params = experiment.init_params(nets, jax.random.key(0), 6)
    x = (jax.random.uniform(jax.random.key(1), (5, 6)) > 0.5).astype(jnp.float32)
    key = jax.random.key(2)
    value = experiment.log_weight(nets, params, x, key)

    def net(name, inputs):
        return nets[name].apply(params[name], inputs)

    def density(z, mean, log_std):
        return scipy.stats.norm.logpdf(z, mean, np.exp(log_std)).sum(-1)

    first, second = jax.random.split(key)
    q1 = net("encoder", x)
    z1 = reparameterize(first, *q1)[0]
    q2 = net("upper_encoder", z1)
    z2 = reparameterize(second, *q2)[0]
    p = np.asarray(jax.nn.sigmoid(net("decoder", z1)))
    expected = np.log(np.where(x == 1, p, 1 - p)).sum(-1)
    expected += density(z1, *net("lower_prior", z2)) + density(z2, 0.0, 0.0)
    expected -= density(z1, *q1) + density(z2, *q2)
    assert z2.shape == (5, 2)
    assert_allclose(value, expected, rtol=1e-5)
