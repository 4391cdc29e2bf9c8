"""DELLA's fusion, pooling, recurrence and bound against float64 NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import multivariate_normal

from jaxzoo.vae.della import (
    VariationalTransformer,
    della_loss,
    low_rank_fusion,
)


def test_fusion_is_a_product_of_two_sums_over_the_rank():
    rng = np.random.default_rng(0)
    v, z = rng.normal(size=(3, 4, 5)), rng.normal(size=(3, 2))
    of_v, of_z = rng.normal(size=(6, 5, 7)), rng.normal(size=(6, 2, 7))
    expected = np.zeros((3, 4, 7))
    for b in range(3):
        for t in range(4):
            left = sum(v[b, t] @ of_v[r] for r in range(6))
            expected[b, t] = left * sum(z[b] @ of_z[r] for r in range(6))
    got = low_rank_fusion(v, z, of_v, of_z)
    assert_allclose(got, expected, rtol=2e-5, atol=1e-4)
    # Without the latent there is nothing to attend to.
    assert not np.any(low_rank_fusion(v, 0 * z, of_v, of_z))


@functools.cache
def built(layer_wise: bool) -> Any:
    model = VariationalTransformer(
        5, width=8, depth=2, heads=2, latents=3, rank=2, layer_wise=layer_wise
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, 5)
    noise = jax.random.normal(jax.random.key(2), model.latent_shape(2))
    params = jax.jit(model.init)(jax.random.key(0), tokens, noise)
    # Away from zero biases, so that each has to stand in its place.
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(4)
    leaves = [a + 0.1 * np.float32(rng.normal(size=a.shape)) for a in leaves]
    params = jax.tree.unflatten(tree, leaves)
    return model, params, tokens, noise, jax.jit(model.apply)(params, tokens, noise)


def test_pooling_is_a_softmax_of_scores_in_each_layer():
    model, params, tokens, *_ = built(True)
    encode = jax.jit(
        lambda p: model.apply(p, tokens, method="encode", capture_intermediates=True)
    )
    pooled, kept = encode(params)
    for layer in range(2):
        (h,) = kept["intermediates"][f"blocks_{layer}"]["__call__"]
        h = np.asarray(h, np.float64)
        score = h @ np.asarray(params["params"]["pool"][layer], np.float64)
        cubic = np.sqrt(2 / np.pi) * (score + 0.044715 * score**3)
        weight = np.exp(0.5 * score * (1 + np.tanh(cubic)))
        expected = (weight[..., None] * h).sum(1) / weight.sum(1)[:, None]
        assert_allclose(pooled[layer], expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_minus_the_bound():
    rng = np.random.default_rng(2)
    log_p = rng.normal(size=4)
    mean, prior_mean, log_std, prior_log_std = rng.normal(size=(4, 3, 4, 2))
    s, t = np.exp(2 * log_std), np.exp(2 * prior_log_std)
    kl = 0.5 * (s / t + (mean - prior_mean) ** 2 / t - 1 + np.log(t / s)).sum(-1)
    kept = np.arange(4) < 3
    moments = mean, log_std, prior_mean, prior_log_std
    loss, aux = della_loss(log_p, *moments, where=kept, kl_weight=0.5)
    expected = 0.5 * kl.sum(0) - log_p
    assert_allclose(loss, expected[:3].mean(), rtol=1e-5)
    assert_allclose(aux["per_example"][:3], expected[:3], rtol=1e-5)
    assert_allclose(aux["kl"][:, :3], kl[:, :3], rtol=1e-5)
    assert_allclose(aux["elbo"][:3], (log_p - kl.sum(0))[:3], rtol=1e-5)


def test_the_kl_of_layers_is_that_of_all_latents_together():
    """A linear chain, z_2 given z_1, is one Gaussian of both: chain rule of KL."""
    rng = np.random.default_rng(3)
    a, b = 0.7, -0.4  # slopes of q(z_2|z_1, x) and p(z_2|z_1)
    z = rng.normal(size=(200_000, 1)) * 0.5 + 0.3  # of q(z_1|x) = N(0.3, 0.5^2)
    first = [np.full_like(z, c) for c in (0.3, np.log(0.5), 0.0, 0.0)]
    second = [a * z + 0.2, np.full_like(z, np.log(0.8)), b * z, 0 * z]
    moments = [np.stack(pair) for pair in zip(first, second, strict=True)]
    loss, _ = della_loss(np.zeros(len(z)), *moments)
    m = np.array([0.3, a * 0.3 + 0.2])
    s = np.array([[0.25, a * 0.25], [a * 0.25, a * a * 0.25 + 0.64]])
    t = np.array([[1.0, b], [b, b * b + 1.0]])
    inverse = np.linalg.inv(t)
    log_det = np.log(np.linalg.det(t) / np.linalg.det(s))
    whole = 0.5 * (np.trace(inverse @ s) + m @ inverse @ m - 2 + log_det)
    assert_allclose(loss, whole, rtol=0.01)
    normal: Any = multivariate_normal
    q, p = normal(m, s), normal(np.zeros(2), t)
    draws = q.rvs(200_000, random_state=rng)
    assert_allclose(whole, np.mean(q.logpdf(draws) - p.logpdf(draws)), rtol=0.02)


@pytest.mark.parametrize("layer_wise", [True, False])
def test_decoding_is_causal_and_reads_every_latent(layer_wise):
    model, params, tokens, noise, _ = built(layer_wise)

    def logits(tokens: Any, z: Any) -> Any:
        return model.apply(params, z, tokens, method="decode")

    run = jax.jit(logits)
    base = run(tokens, noise)
    later = run(tokens.at[:, 3].add(1) % 5, noise)
    assert_allclose(later[:, :4], base[:, :4], atol=1e-6)
    assert np.abs(later[:, 4] - base[:, 4]).max(axis=-1).min() > 1e-4
    for layer in range(len(noise)):
        # From the first letter on, whatever the layer of the latent.
        other = run(tokens, noise.at[layer].add(1.0))
        assert np.abs(other - base).max(axis=-1).min() > 1e-4


def test_latents_follow_the_recurrence():
    """s_l = tanh(W z_{l-1} + U s_{l-1}); q reads [pooled_l, s_l], p reads s_l."""
    model, params, tokens, noise, out = built(True)
    pooled: Any = jax.jit(lambda p: model.apply(p, tokens, method="encode"))(params)
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    z = s = np.zeros((2, 3))
    for layer in range(2):
        of_z, of_s = np.split(w[f"recurrent_{layer}"]["kernel"], 2)
        s = np.tanh(z @ of_z + s @ of_s)
        names = ("prior_mean", "prior_log_std"), ("mean", "log_std")
        heads = f"prior_heads_{layer}", f"posterior_heads_{layer}"
        inputs = s, np.concatenate([pooled[layer], s], axis=1)
        for (mean, log_std), head, x in zip(names, heads, inputs, strict=True):
            moments = x @ w[head]["kernel"] + w[head].get("bias", np.zeros(6))[None]
            moments = np.clip(moments, -5.0, 5.0)
            assert_allclose(out[mean][layer], moments[:, :3], rtol=1e-3, atol=1e-5)
            half = 0.5 * moments[:, 3:]  # what is given is the log of a variance
            assert_allclose(out[log_std][layer], half, rtol=1e-3, atol=1e-5)
        spread = np.exp(out["log_std"][layer]) * np.asarray(noise[layer])
        z = np.asarray(out["mean"][layer]) + spread
        assert_allclose(out["z"][layer], z, rtol=1e-4, atol=1e-5)


def test_the_prior_is_the_chain_without_a_text():
    model, params, _, noise, out = built(True)
    z = jax.jit(lambda p, e: model.apply(p, e, method="sample_prior"))(params, noise)
    # The first prior is standard; the next depends on the z before it.
    assert_allclose(z[0], noise[0], rtol=1e-6)
    assert not np.any(out["prior_mean"][0]) and not np.any(out["prior_log_std"][0])
    assert np.ptp(out["prior_mean"][1], axis=0).min() > 1e-5


def test_bad_arguments_are_named():
    x, m = jnp.zeros(2), jnp.zeros((3, 2, 4))
    with pytest.raises(ValueError, match="'kl_weight' is -0.5"):
        della_loss(x, m, m, m, m, kl_weight=-0.5)
    with pytest.raises(TypeError, match="'prior_mean'"):
        della_loss(x, m, m, m[:2], m)
    with pytest.raises(TypeError, match="'latent_weights'"):
        low_rank_fusion(m, m[:, 0], jnp.zeros((2, 4, 5)), jnp.zeros((3, 4, 5)))
