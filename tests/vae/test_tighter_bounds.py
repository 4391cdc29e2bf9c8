"""MIWAE, PIWAE and CIWAE in float64, and signal-to-noise ratios of known draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.vae.tighter_bounds import (
    ciwae_bound,
    directional_signal_to_noise_ratio,
    miwae_bound,
    piwae_losses,
    signal_to_noise_ratio,
)

LOG_W = 3 * np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
W = np.exp(LOG_W.astype(np.float64))


def test_miwae_is_the_mean_of_inner_bounds():
    expected = np.log(W.mean(1)).mean(0)
    assert_allclose(miwae_bound(LOG_W), expected, rtol=1e-5)
    for order, axis, outer_axis in [
        ((1, 0, 2), 0, 1),
        ((2, 0, 1), 2, 1),
        ((2, 1, 0), 1, -1),
    ]:
        moved = miwae_bound(LOG_W.transpose(order), axis=axis, outer_axis=outer_axis)
        assert_allclose(moved, expected, rtol=1e-5)
    # M = 1 is the IWAE, k = 1 the ELBO.
    assert_allclose(miwae_bound(LOG_W[:1]), np.log(W[0].mean(0)), rtol=1e-5)
    assert_allclose(miwae_bound(LOG_W[:, :1]), LOG_W[:, 0].mean(0), rtol=1e-5)


def test_bounds_are_ordered():
    flat = LOG_W.reshape(24, 5)
    elbo, iwae = LOG_W.mean((0, 1)), np.log(W.mean((0, 1)))
    miwae = np.asarray(miwae_bound(LOG_W))
    assert np.all(elbo < miwae) and np.all(miwae < iwae)
    combined = np.asarray(ciwae_bound(flat, beta=0.3))
    assert_allclose(combined, 0.3 * elbo + 0.7 * iwae, rtol=1e-5)
    assert_allclose(ciwae_bound(flat, beta=0.0), iwae, rtol=1e-5)
    assert_allclose(ciwae_bound(flat, beta=1.0), elbo, rtol=1e-4)


def test_piwae_gives_each_network_its_weights():
    """Generative: softmax over all M k. Inference: softmax over k, divided by M."""
    losses = piwae_losses(LOG_W)
    assert_allclose(losses.generative, -np.log(W.mean((0, 1))).mean(), rtol=1e-5)
    assert_allclose(losses.inference, -np.log(W.mean(1)).mean(), rtol=1e-5)
    generative = jax.grad(lambda w: piwae_losses(w).generative)(jnp.asarray(LOG_W))
    inference = jax.grad(lambda w: piwae_losses(w).inference)(jnp.asarray(LOG_W))
    assert_allclose(generative, -W / W.sum((0, 1)) / 5, rtol=1e-4, atol=1e-9)
    expected = -W / W.sum(1, keepdims=True) / 4 / 5
    assert_allclose(inference, expected, rtol=1e-4, atol=1e-9)
    swapped = piwae_losses(LOG_W.swapaxes(0, 1), axis=0, outer_axis=1)
    assert_allclose(swapped.inference, losses.inference, rtol=1e-6)


def test_signal_to_noise_of_known_draws():
    rng = np.random.default_rng(1)
    draws = np.array([3.0, -1.0, 0.0]) + rng.normal(size=(50_000, 3)) * [1.0, 2.0, 1.0]
    snr = signal_to_noise_ratio(draws.astype(np.float32))
    assert_allclose(snr, [3, 0.5, 0], atol=0.03)
    assert_allclose(
        signal_to_noise_ratio(draws.T.astype(np.float32), axis=1), snr, rtol=1e-5
    )
    constant = jnp.array([[2.0, 0.0], [2.0, 0.0]])
    assert signal_to_noise_ratio(constant).tolist() == [np.inf, 0.0]
    gradient = jax.grad(lambda g: jnp.sum(signal_to_noise_ratio(g)[1]))(constant)
    assert np.all(np.isfinite(gradient))


def test_directional_ratio_by_the_definition():
    draws = np.random.default_rng(2).normal(size=(200, 6)) + 0.5
    unit = draws.mean(0) / np.linalg.norm(draws.mean(0))
    along = draws @ unit
    across = draws - along[:, None] * unit
    each = np.abs(along) / np.linalg.norm(across, axis=1)
    ratio, aux = directional_signal_to_noise_ratio(draws.astype(np.float32))
    assert_allclose(ratio, each.mean(), rtol=1e-4)
    assert_allclose(aux["stderr"], each.std(ddof=1) / 200**0.5, rtol=1e-3)


def test_bad_arguments_are_named():
    with pytest.raises(
        ValueError, match="argument 'outer_axis' is 1, the same as 'axis'"
    ):
        miwae_bound(LOG_W, outer_axis=1)
    with pytest.raises(ValueError, match="argument 'axis' is 3"):
        piwae_losses(LOG_W, axis=3)
    with pytest.raises(ValueError, match="argument 'beta' is 1.5"):
        ciwae_bound(LOG_W[0], beta=1.5)
    with pytest.raises(ValueError, match=r"gradients.shape\[axis\]' is 1"):
        signal_to_noise_ratio(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"gradients.shape\[1\]' is 1"):
        directional_signal_to_noise_ratio(jnp.ones((3, 1)))
