"""The bound, its gradients and the sampler against sums over a corpus, in float64."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.vae.vod import priority_sample, renyi_bound, vod_objective


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def corpus(size: int, seed: int = 0):
    """log p(a|z), f_theta and f_phi of one question."""
    rng = np.random.default_rng(seed)
    log_p = -np.abs(rng.normal(size=size)) * 2.0
    f_theta = 1.5 * rng.normal(size=size)
    return log_p, f_theta, f_theta + rng.normal(size=size)


def as_arrays(*arrays: Any) -> Any:
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def weighted(log_p, f_theta, f_phi, s, alpha):
    """The self-normalised bound by loops; s need not have a sum of 1."""
    s = s / s.sum()
    zeta = np.exp(f_theta - f_phi)
    total = sum(a * b for a, b in zip(s, zeta, strict=True))
    w = [np.exp(a) * b / total for a, b in zip(log_p, zeta, strict=True)]
    if alpha == 1.0:
        return sum(a * np.log(b) for a, b in zip(s, w, strict=True))
    power = sum(a * b ** (1 - alpha) for a, b in zip(s, w, strict=True))
    return np.log(power) / (1 - alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_whole_corpus_gives_the_exact_bound(alpha):
    log_p, f_theta, f_phi = corpus(30)
    p, r = softmax(f_theta), softmax(f_phi)
    w = np.exp(log_p) * p / r
    exact = r @ np.log(w) if alpha == 1 else np.log(r @ w ** (1 - alpha)) / (1 - alpha)
    if alpha == 0.0:
        assert_allclose(exact, np.log(p @ np.exp(log_p)), rtol=1e-10)
    arrays = as_arrays(log_p, f_theta, f_phi)
    got = renyi_bound(*arrays, log_s=jax.nn.log_softmax(arrays[2]), alpha=alpha)
    assert_allclose(got, exact, rtol=1e-5)
    # Scores are known up to constants.
    shifted = (arrays[0], arrays[1] + 3.0, arrays[2] - 2.0, arrays[2] + 1.0)
    assert_allclose(renyi_bound(*shifted, alpha=alpha), exact, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_estimate_is_that_of_the_paper(alpha):
    log_p, f_theta, f_phi = corpus(6, 1)
    s = np.random.default_rng(2).uniform(0.1, 1.0, size=6)
    got = renyi_bound(*as_arrays(log_p, f_theta, f_phi, np.log(s)), alpha=alpha)
    assert_allclose(got, weighted(log_p, f_theta, f_phi, s, alpha), rtol=1e-5)
    got = renyi_bound(*as_arrays(log_p, f_theta, f_phi), alpha=alpha)
    assert_allclose(got, weighted(log_p, f_theta, f_phi, np.ones(6), alpha), rtol=1e-5)


def test_bounds_fall_with_alpha():
    for seed in range(20):
        arrays = as_arrays(*corpus(50, seed))
        log_s = jax.nn.log_softmax(arrays[2])
        bounds = [
            float(renyi_bound(*arrays, log_s=log_s, alpha=a))
            for a in (0.0, 0.25, 0.5, 0.75, 0.999, 1.0)
        ]
        assert all(a >= b - 1e-4 for a, b in itertools.pairwise(bounds))


def test_the_right_sampler_makes_all_bounds_one():
    log_p, f_theta, _ = corpus(40)
    arrays = as_arrays(log_p, f_theta, f_theta + log_p)
    exact = np.log(softmax(f_theta) @ np.exp(log_p))
    for alpha in (0.0, 0.5, 1.0):
        got = renyi_bound(*arrays, log_s=jax.nn.log_softmax(arrays[2]), alpha=alpha)
        assert_allclose(got, exact, rtol=1e-5)


@pytest.mark.parametrize("noise", ["exponential", "uniform"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_weighted_sums_have_no_bias(noise, count):
    """Also of the weights themselves, and of each document alone."""
    logits = jnp.array([2.0, 0.5, 0.0, -1.0, -0.5, 1.0])
    keys = jax.random.split(jax.random.key(0), 20000)
    index, log_s = jax.vmap(
        lambda key: priority_sample(key, logits, num_samples=count, noise=noise)
    )(keys)
    assert all(len(set(row)) == count for row in np.asarray(index)[:100].tolist())
    weights = jnp.exp(log_s)[..., None] * jax.nn.one_hot(index, 6)
    sums = np.asarray(jnp.sum(weights, axis=1), np.float64)
    error = sums.std(axis=0) / len(sums) ** 0.5
    assert np.all(np.abs(sums.mean(axis=0) - softmax(np.asarray(logits))) < 5 * error)


def test_weights_are_those_of_the_threshold():
    """K = 2 of 3: by the noise that the key gives."""
    logits, key = jnp.array([1.0, 0.0, -1.0]), jax.random.key(5)
    p = softmax(np.asarray(logits, np.float64))
    for noise in ("exponential", "uniform"):
        e = np.asarray(getattr(jax.random, noise)(key, (3,)), np.float64)
        order = np.argsort(-p / e)
        tau = (p / e)[order[2]]
        kept = p[order[:2]]
        expected = kept / (1 - np.exp(-kept / tau))
        expected = expected if noise == "exponential" else np.maximum(kept, tau)
        index, log_s = priority_sample(key, logits, num_samples=2, noise=noise)
        assert_array_equal(index, order[:2])
        assert_allclose(np.exp(log_s), expected, rtol=1e-5)


def test_all_documents_have_their_probabilities():
    logits = jax.random.normal(jax.random.key(1), (3, 7))
    index, log_s = priority_sample(jax.random.key(0), logits, num_samples=7)
    assert_array_equal(jnp.sort(index), jnp.tile(jnp.arange(7), (3, 1)))
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), index, axis=-1)
    assert_allclose(log_s, expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradients_of_reader_and_retriever_are_the_derivatives(alpha):
    arrays = as_arrays(*(np.stack([corpus(5, i)[j] for i in (0, 1)]) for j in range(3)))
    log_s = jax.random.normal(jax.random.key(0), (2, 5))

    def plain(log_p, f_theta):
        return -jnp.mean(renyi_bound(log_p, f_theta, arrays[2], log_s, alpha=alpha))

    def loss(log_p, f_theta):
        return vod_objective(log_p, f_theta, arrays[2], log_s, alpha=alpha)[0]

    assert_allclose(loss(*arrays[:2]), plain(*arrays[:2]), rtol=1e-6)
    got, expected = (jax.grad(f, (0, 1))(*arrays[:2]) for f in (loss, plain))
    assert_allclose(got[0], expected[0], atol=1e-6)
    assert_allclose(got[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_gradient_of_the_sampler_is_the_score_with_the_others_as_baseline(alpha):
    log_p, f_theta, f_phi = corpus(5, 3)
    s = np.random.default_rng(4).uniform(0.1, 1.0, size=5)
    whole = weighted(log_p, f_theta, f_phi, s, alpha)
    expected = np.zeros(5)
    for i in range(5):
        rest = np.arange(5) != i
        reward = whole - weighted(
            log_p[rest], f_theta[rest], f_phi[rest], s[rest], alpha
        )
        expected -= reward * (np.eye(5)[i] - s / s.sum())
    arrays = [x[None] for x in as_arrays(log_p, f_theta, f_phi, np.log(s))]

    def loss(f_phi):
        return vod_objective(*arrays[:2], f_phi=f_phi, log_s=arrays[3], alpha=alpha)[0]

    assert_allclose(jax.grad(loss)(arrays[2])[0], expected, atol=1e-5)


def test_a_sampler_that_is_trained_comes_near_to_the_posterior():
    """Of one question, by the bound's estimate from two documents at a time."""
    log_p, f_theta, _ = as_arrays(*corpus(6, 5))

    def step(f_phi, key):
        index, log_s = priority_sample(key, f_phi, num_samples=4)

        def loss(f_phi):
            arrays = [x[index][None] for x in (log_p, f_theta, f_phi)]
            return vod_objective(*arrays, log_s=log_s[None], alpha=0.0)[0]

        return f_phi - 0.02 * jax.grad(loss)(f_phi), None

    start = -f_theta
    end, _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(0), 2000))

    def elbo(f_phi):
        return renyi_bound(log_p, f_theta, f_phi, jax.nn.log_softmax(f_phi), alpha=1.0)

    assert np.isfinite(elbo(end)) and elbo(end) > elbo(start)


def test_what_vod_reports():
    log_p, f_theta, f_phi = (x[None] for x in as_arrays(*corpus(5)))
    log_s = jax.nn.log_softmax(f_phi)
    loss, aux = vod_objective(log_p, f_theta, f_phi, log_s, alpha=0.5)
    assert_allclose(loss, -aux["per_example"][0], rtol=1e-6)
    for name, alpha in (("elbo", 1.0), ("log_marginal", 0.0), ("per_example", 0.5)):
        expected = renyi_bound(log_p, f_theta, f_phi, log_s, alpha=alpha)
        assert_allclose(aux[name], expected, rtol=1e-5)
    posterior = softmax(np.asarray(log_p + f_theta)[0])
    assert_allclose(aux["effective_samples"], 1 / (posterior**2).sum(), rtol=1e-5)


def test_bad_numbers_are_named():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="'alpha' is 1.5"):
        vod_objective(x, x, x, alpha=1.5)
    with pytest.raises(ValueError, match="'alpha' is -0.5"):
        renyi_bound(x, x, x, alpha=-0.5)
    with pytest.raises(ValueError, match="'num_samples' is 4"):
        priority_sample(jax.random.key(0), x, num_samples=4)
    with pytest.raises(ValueError, match="is 1, expected a number >= 2"):
        vod_objective(x[:, :1], x[:, :1], x[:, :1])
