"""Generated loss, iterates and augmented batches against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.vae.generated_loss_vae import (
    augment_batch,
    generated_loss,
    iterate_mean,
    latent_collapse,
    nearest_distance,
    vae_loss,
)

RNG = np.random.default_rng(0)
IN, OUT, SPREAD = RNG.normal(size=(6, 2)), RNG.normal(size=(2, 6)), -1.0


def encode(x: Any, xp: Any = jnp) -> Any:
    mean = (x - 0.5) @ xp.asarray(IN, x.dtype)
    return mean, SPREAD + 0.3 * mean


def decode(z: Any, xp: Any = jnp) -> Any:
    return z @ xp.asarray(OUT, z.dtype)


def single(x: Any) -> Any:
    return np.asarray(x, np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def expected_loss(x: np.ndarray, eps: np.ndarray, beta: float) -> np.ndarray:
    """Per example, in float64, with the noise given."""
    mean, log_std = encode(x, np)
    p = sigmoid(decode(mean + np.exp(log_std) * eps, np))
    reconstruction = -np.sum(x * np.log(p) + (1.0 - x) * np.log(1.0 - p), axis=1)
    variance = np.exp(2.0 * log_std)
    kl = 0.5 * np.sum(mean**2 + variance - 1.0 - np.log(variance), axis=1)
    return reconstruction + beta * kl


def test_the_loss_is_that_of_a_vae():
    x = RNG.uniform(size=(5, 6))
    key = jax.random.key(1)
    eps = np.asarray(jax.random.normal(key, (5, 2)), np.float64)
    loss, aux = vae_loss(key, single(x), encode, decode, beta=2.0)
    expected = expected_loss(x, eps, 2.0)
    assert_allclose(aux["per_example"], expected, rtol=1e-5)
    assert_allclose(loss, expected.mean(), rtol=1e-5)
    parts = aux["reconstruction"] + 2.0 * aux["kl"]
    assert_allclose(parts, expected, rtol=1e-5)


def test_images_of_any_shape_have_the_loss_of_their_pixels():
    x = single(RNG.uniform(size=(5, 6)))
    key = jax.random.key(2)
    flat = vae_loss(key, x, encode, decode)[0]
    shaped = vae_loss(
        key, x.reshape(5, 3, 2), lambda a: encode(a.reshape(5, 6)),
        lambda z: decode(z).reshape(5, 3, 2),
    )[0]  # fmt: skip
    assert_allclose(shaped, flat, rtol=1e-6)


def test_the_generated_loss_is_the_loss_of_decoded_draws_of_the_prior():
    key = jax.random.key(3)
    loss, aux = generated_loss(key, encode, decode, latents=2, num_samples=4000)
    rng = np.random.default_rng(4)
    image = sigmoid(decode(rng.normal(size=(4000, 2)), np))
    expected = expected_loss(image, rng.normal(size=(4000, 2)), 1.0)
    error = np.hypot(float(aux["stderr"]), expected.std() / 4000**0.5)
    assert abs(float(loss) - expected.mean()) < 4.0 * error
    assert_allclose(aux["stderr"], expected.std() / 4000**0.5, rtol=0.1)


def test_iterates_are_decoded_means():
    x = RNG.uniform(size=(5, 6))
    turns = iterate_mean(single(x), encode, decode, num_iterations=4)
    expected = [x]
    for _ in range(4):
        expected.append(sigmoid(decode(encode(expected[-1], np)[0], np)))
    assert turns.shape == (5, 5, 6)
    assert_allclose(turns, expected, rtol=1e-4)


def test_iterates_of_a_linear_map_go_to_its_fixed_point():
    """With weight 2 the only one is 1/2, where the logit of x is 2 (x - 1/2)."""
    x = single([[0.99], [0.2]])
    turns = iterate_mean(
        x, lambda x: (x - 0.5, x), lambda z: 2.0 * z, num_iterations=60
    )
    assert_allclose(turns[-1], 0.5, atol=1e-4)
    apart = np.abs(np.asarray(turns)[:10, :, 0] - 0.5)
    assert np.all(np.diff(apart, axis=0) < 0.0)


def test_a_share_of_the_batch_is_replaced_row_by_row():
    x = jnp.zeros((4000, 2, 2))
    batch, aux = augment_batch(jax.random.key(5), x, x + 1.0, rate=0.3)
    replaced = np.asarray(aux["replaced"])
    assert abs(replaced.mean() - 0.3) < 4.0 * (0.21 / 4000) ** 0.5
    assert_array_equal(batch, np.broadcast_to(replaced[:, None, None], x.shape))
    for rate, share in ((0.0, 0.0), (1.0, 1.0)):
        edge = augment_batch(jax.random.key(6), x, x + 1.0, rate=rate)[0]
        assert_array_equal(edge, share)


def test_nothing_flows_back_through_variants():
    x = jnp.ones((8, 2))

    def total(x, variants):
        return jnp.sum(augment_batch(jax.random.key(7), x, variants)[0])

    of_x, of_variants = jax.grad(total, (0, 1))(x, 2.0 * x)
    assert 0 < of_x.sum() < 16 and not np.any(np.asarray(of_variants))


def test_distances_are_those_to_the_nearest():
    x, reference = RNG.normal(size=(7, 3, 2)), RNG.normal(size=(11, 3, 2))
    table = np.linalg.norm((x[:, None] - reference[None]).reshape(7, 11, 6), axis=2)
    distance, aux = nearest_distance(single(x), single(reference))
    assert_allclose(distance, table.min(axis=1), rtol=1e-5)
    assert_array_equal(aux["index"], table.argmin(axis=1))
    own = jnp.asarray(x, jnp.float32)
    slope = jax.grad(lambda a: jnp.sum(nearest_distance(a, own)[0]))(own)
    assert np.all(np.isfinite(slope))


def test_collapsed_latents_say_nothing():
    mean = np.stack([RNG.normal(size=500), 1e-3 * RNG.normal(size=500)], axis=1)
    log_std = np.stack([np.full(500, -2.0), np.full(500, 0.01)], axis=1)
    kl, aux = latent_collapse(mean, log_std)
    expected = 0.5 * (mean**2 + np.exp(2 * log_std) - 1.0) - log_std
    assert_allclose(kl, expected.mean(axis=0), rtol=1e-3, atol=1e-6)
    assert aux["collapsed"].tolist() == [False, True] and float(aux["share"]) == 0.5


def test_bad_input_is_named():
    x, key = jnp.zeros((2, 6)), jax.random.key(0)
    with pytest.raises(ValueError, match="'beta' is -1.0"):
        vae_loss(key, x, encode, decode, beta=-1.0)
    with pytest.raises(ValueError, match="'num_samples' is 1"):
        generated_loss(key, encode, decode, latents=2, num_samples=1)
    with pytest.raises(ValueError, match="'num_iterations' is 0"):
        iterate_mean(x, encode, decode, num_iterations=0)
    with pytest.raises(ValueError, match="'rate' is 1.5"):
        augment_batch(key, x, x, rate=1.5)
    with pytest.raises(TypeError, match="'reference'"):
        nearest_distance(x, x[:, :1])
