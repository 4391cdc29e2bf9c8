"""AutoGen's bound against float64 NumPy, a beta-VAE, and exact log-likelihoods."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpy.testing import assert_allclose
from scipy.special import logsumexp
from scipy.stats import norm

from jaxzoo.core.stats import bernoulli_log_prob, normal_kl, normal_log_prob
from jaxzoo.nn.mlp import MLP, GaussianMLP
from jaxzoo.vae.autogen import (
    TextDecoder,
    TextEncoder,
    autogen_loss,
    autogen_objective,
    kl_annealing,
    word_dropout,
)


@pytest.mark.parametrize(("m", "weight"), [(0.0, 1.0), (1.0, 1.0), (2.5, 0.3)])
def test_the_loss_is_minus_the_bound(m, weight):
    rng = np.random.default_rng(0)
    log_p, kl = rng.normal(size=(2, 6))
    kept = np.arange(6) < 4
    loss, aux = autogen_loss(log_p, kl, where=kept, m=m, kl_weight=weight)
    bound = [(1 + m) * a - weight * b for a, b in zip(log_p, kl, strict=True)]
    assert_allclose(loss, -np.mean(bound[:4]), rtol=1e-6)
    assert_allclose(aux["per_example"][:4], -np.array(bound[:4]), rtol=1e-6)
    assert_allclose(aux["elbo"][:4], (log_p - kl)[:4], rtol=1e-5)


@pytest.mark.parametrize("kind", ["bernoulli", "normal"])
def test_gradients_are_those_of_a_beta_vae_times_one_plus_m(kind):
    m, keys = 3.0, jax.random.split(jax.random.key(0), 4)
    x = jax.random.uniform(keys[0], (9, 5))
    encoder, decoder = GaussianMLP(2, (7,)), MLP((7, 5))
    noise = jax.random.normal(keys[3], (9, 2))
    params = encoder.init(keys[1], x), decoder.init(keys[2], noise)
    log_prob = bernoulli_log_prob if kind == "bernoulli" else normal_log_prob

    def terms(params: Any) -> Any:
        moments: Any = encoder.apply(params[0], x)
        z = moments[0] + jnp.exp(moments[1]) * noise
        output: Any = decoder.apply(params[1], z)
        return log_prob(x, output), normal_kl(*moments)

    def beta_vae(params: Any) -> Any:
        log_p, kl = terms(params)
        return jnp.mean(kl / (1.0 + m) - log_p)

    own = jax.grad(lambda p: autogen_loss(*terms(p), m=m)[0])(params)
    own, other = (ravel_pytree(g)[0] for g in (own, jax.grad(beta_vae)(params)))
    difference = np.linalg.norm(own - (1.0 + m) * other)
    assert difference < 1e-5 * np.linalg.norm(own)


def linear_gaussian(draws: int, m: float) -> Any:
    """x = z + e, e ~ N(0, 1/4), z ~ N(0, 1), q(z|x) = N(x / 2, 1/4): not the best."""
    x, std = np.array([0.3, -1.2, 2.0]), 0.5
    z = x / 2 + 0.5 * np.random.default_rng(1).normal(size=(draws, 3))
    terms = (
        norm.logpdf(x, z, std), norm.logpdf(z, 0.0, 1.0), norm.logpdf(z, x / 2, 0.5),
    )  # fmt: skip
    exact = {
        "log_marginal": norm.logpdf(x, 0.0, np.sqrt(1.0 + std**2)),
        "log_reconstruction": norm.logpdf(x, x / 2, np.sqrt(0.25 + std**2)),
    }
    return autogen_objective(*terms, m=m), exact, terms


def test_the_objective_has_both_likelihoods():
    (estimate, aux), exact, _ = linear_gaussian(40_000, 2.0)
    for name, value in exact.items():
        assert_allclose(aux[name], value, atol=0.03)
    total = exact["log_marginal"] + 2.0 * exact["log_reconstruction"]
    assert np.all(np.abs(estimate - total) < 4 * np.asarray(aux["stderr"]))
    assert np.all(np.asarray(aux["stderr"]) < 0.05)
    assert np.all(aux["bound"] < total)


def test_the_bound_is_the_mean_of_minus_the_loss():
    (estimate, aux), _, (log_p, prior, posterior) = linear_gaussian(500, 2.0)
    # A sampled KL in the place of the analytic one.
    losses = autogen_loss(log_p.ravel(), (posterior - prior).ravel(), m=2.0)
    each = np.asarray(losses[1]["per_example"]).reshape(log_p.shape)
    assert_allclose(aux["bound"], -each.mean(axis=0), rtol=1e-4)
    assert np.all(aux["bound"] < estimate)
    w = log_p + prior - posterior
    first, second = np.asarray([logsumexp(a, axis=0) for a in (w, log_p)])
    expected = first + 2.0 * second - 3 * np.log(500)
    assert_allclose(estimate, expected, rtol=1e-5)


def test_the_standard_error_is_that_of_many_repetitions():
    z = np.random.default_rng(2).normal(size=(100, 2000))  # 100 draws, 2,000 times
    terms = norm.logpdf(1.0, z, 1.0), norm.logpdf(z), norm.logpdf(z, 0.0, 1.0)
    estimate, aux = autogen_objective(*terms, m=1.0)
    assert_allclose(np.mean(aux["stderr"]), np.std(estimate), rtol=0.05)


def test_more_weight_on_reconstruction_gives_a_larger_best_kl():
    """In closed form: x = a z + e, q(z|x) = N(b x, s^2); at the best s of the bound."""
    a, noise = 1.0, 0.5

    def bound(s: Any, m: float) -> Any:  # for x = 0, b = 0: spread alone
        log_p = -0.5 * a**2 * s**2 / noise**2
        kl = 0.5 * (s**2 - 1.0) - np.log(s)
        zeros = np.zeros_like(s)
        return -np.asarray(autogen_loss(log_p + zeros, kl, m=m)[1]["per_example"])

    grid = np.linspace(0.1, 1.0, 2000)
    for m in (0.0, 1.0, 4.0):
        best = grid[np.argmax(bound(grid, m))]
        assert_allclose(best, (1.0 + (1.0 + m) * a**2 / noise**2) ** -0.5, atol=2e-3)


def test_the_decoder_reads_the_past_alone_and_the_latent():
    decoder = TextDecoder(5, hidden=6, width=4)
    tokens = jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]])
    z = jax.random.normal(jax.random.key(0), (2, 3))
    params = decoder.init(jax.random.key(1), z, tokens)
    base, later, other = (
        np.asarray(decoder.apply(params, *args))
        for args in ((z, tokens), (z, tokens.at[:, 2].set(0)), (z + 1.0, tokens))
    )
    assert base.shape == (2, 4, 5)
    assert_allclose(later[:, :3], base[:, :3], atol=1e-6)
    assert np.all(np.abs(later[0, 3] - base[0, 3]) > 1e-6)
    assert np.all(np.abs(other[:, 0] - base[:, 0]).max(axis=-1) > 1e-3)


def test_the_lstm_is_that_of_its_equations():
    """One text, step by step, in float64."""
    encoder = TextEncoder(5, latents=2, hidden=3, width=4)
    tokens = np.array([[1, 4, 2]])
    params: Any = encoder.init(jax.random.key(0), tokens)
    weights = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    lstm, dense = weights["_LSTM_0"], weights["Dense_0"]
    h = c = np.zeros(3)
    for x in weights["Embed_0"]["embedding"][tokens[0]]:
        gates = x @ lstm["Dense_0"]["kernel"] + lstm["Dense_0"]["bias"]
        i, f, g, o = np.split(gates + h @ lstm["recurrent"], 4)
        i, f, o = (1.0 / (1.0 + np.exp(-a)) for a in (i, f + 1.0, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
    moments: Any = encoder.apply(params, tokens)
    expected = h @ dense["kernel"] + dense["bias"]
    assert_allclose(np.concatenate(moments, axis=1)[0], expected, rtol=1e-5, atol=1e-6)


def test_words_are_dropped_at_their_rate_and_the_weight_rises():
    tokens = np.tile(np.arange(10), (2000, 1))
    seen = np.asarray(word_dropout(jax.random.key(0), tokens, 10, rate=0.3))
    assert_allclose((seen == 10).mean(axis=0), 0.3, atol=0.05)
    assert np.all((seen == 10) | (seen == tokens))
    steps = np.array([0, 1, 4, 9])
    assert_allclose(kl_annealing(steps, warmup=4), [0.0, 0.25, 1.0, 1.0])


def test_bad_numbers_are_named():
    x = jnp.zeros(2)
    with pytest.raises(ValueError, match="'m' is -1.0"):
        autogen_loss(x, x, m=-1.0)
    with pytest.raises(ValueError, match="'kl_weight' is -0.5"):
        autogen_loss(x, x, kl_weight=-0.5)
    with pytest.raises(ValueError, match="'rate' is 1.5"):
        word_dropout(jax.random.key(0), jnp.zeros(2, jnp.int32), 3, rate=1.5)
    with pytest.raises(ValueError, match=r"'len\(log_likelihood\)' is 1"):
        autogen_objective(x[None], x[None], x[None])
    with pytest.raises(TypeError, match="'kl'"):
        autogen_loss(x, x[:, None])
