"""The sliced distance and its loss against optimal assignments and closed forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import linear_sum_assignment

from jaxzoo.core.divergences import random_directions, sliced_wasserstein
from jaxzoo.vae.swae import (
    SlicedAutoencoder,
    max_sliced_wasserstein,
    sample_prior,
    swae_loss,
)


def transport(a: Any, b: Any) -> float:
    """Squared distance of the best of all assignments on a line."""
    square = (a[:, None] - b[None]) ** 2
    return float(square[linear_sum_assignment(square)].mean())


def arrays(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=(4, 3))
    theta /= np.linalg.norm(theta, axis=1, keepdims=True)
    z, prior = rng.normal(size=(7, 3)) + 1.0, 0.5 * rng.normal(size=(7, 3))
    return rng.uniform(size=(7, 5)), 2.0 * rng.normal(size=(7, 5)), z, prior, theta


@pytest.mark.parametrize("cost", ["cross_entropy", "squared"])
def test_the_loss_is_that_of_the_paper(cost):
    x, logits, z, prior, theta = arrays()
    y = 1.0 / (1.0 + np.exp(-logits))
    errors = {
        "cross_entropy": -x * np.log(y) - (1 - x) * np.log(1 - y),
        "squared": (x - y) ** 2,
    }[cost]
    rebuilt = np.mean(errors + np.abs(x - y), axis=1)
    sliced = np.mean([transport(z @ t, prior @ t) for t in theta])
    loss, aux = swae_loss(x, logits, z, prior, theta, weight=3.0, cost=cost)
    assert_allclose(aux["per_example"], rebuilt, rtol=1e-5)
    assert_allclose(aux["sliced"], sliced, rtol=1e-5)
    assert_allclose(loss, rebuilt.mean() + 3.0 * sliced, rtol=1e-5)


def test_the_order_of_codes_and_draws_does_not_matter():
    x, logits, z, prior, theta = arrays(1)
    first = swae_loss(x, logits, z, prior, theta)[1]["sliced"]
    again = swae_loss(x, logits, z[::-1].copy(), prior, theta)[1]["sliced"]
    assert_allclose(again, first, rtol=1e-6)
    assert swae_loss(x, logits, z, z[::-1].copy(), theta)[1]["sliced"] < 1e-10


def test_codes_are_pulled_to_a_ring_by_the_loss():
    """By gradient descent on codes: from a blob off the middle to all of the circle."""
    x = jnp.zeros((64, 1))
    start = 0.5 + 0.2 * jax.random.normal(jax.random.key(0), (64, 2))

    @jax.jit
    def end(keys):
        def step(z, key):
            def loss(z):
                prior = sample_prior(key, num_samples=64)
                theta = random_directions(key, dim=2, num_directions=10)
                return swae_loss(x, x, z, prior, theta)[0]

            return z - 1.0 * jax.grad(loss)(z), None

        return jax.lax.scan(step, start, keys)[0]

    z = np.asarray(end(jax.random.split(jax.random.key(1), 100)))
    radius = np.linalg.norm(z, axis=1)
    assert np.quantile(np.abs(radius - 1.0), 0.9) < 0.3
    quarters = np.histogram(np.arctan2(z[:, 1], z[:, 0]), 4, (-np.pi, np.pi))[0]
    assert quarters.min() >= 10


def test_a_shift_costs_its_square_over_the_dimension():
    """Along the axes exactly; the largest along the shift, the whole square."""
    _, _, z, _, _ = arrays(2)
    shift = np.array([1.0, -2.0, 2.0])
    eye = np.eye(3)
    assert_allclose(sliced_wasserstein(z, z + shift, eye), 9.0 / 3.0, rtol=1e-5)
    value, aux = max_sliced_wasserstein(z, z + shift, eye, num_steps=50)
    assert_allclose(value, 9.0, rtol=1e-4)
    assert_allclose(np.abs(aux["direction"]), np.abs(shift) / 3.0, atol=1e-2)


def test_the_largest_slice_is_that_of_a_search():
    rng = np.random.default_rng(0)
    for _ in range(3):
        z, prior = rng.normal(size=(9, 2)) * (0.3, 2.0), rng.normal(size=(9, 2))
        angle = np.linspace(0.0, np.pi, 721)
        lines = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        every = [transport(z @ t, prior @ t) for t in lines]
        few = lines[::80]
        value, aux = max_sliced_wasserstein(z, prior, few)
        found = np.asarray(aux["direction"], np.float64)
        assert_allclose(np.linalg.norm(found), 1.0, rtol=1e-5)
        assert_allclose(value, transport(z @ found, prior @ found), rtol=1e-5)
        assert_allclose(value, max(every), rtol=1e-2)
        assert value >= max(every[::80]) - 1e-5


def test_the_gradient_of_the_largest_slice_is_that_along_its_line():
    _, _, z, prior, theta = (jnp.asarray(a, jnp.float32) for a in arrays(3))
    best = max_sliced_wasserstein(z, prior, theta)[1]["direction"]
    got = jax.grad(lambda z: max_sliced_wasserstein(z, prior, theta)[0])(z)
    first, second = (np.argsort(np.asarray(a @ best)) for a in (z, prior))
    expected = np.zeros((7, 3))
    for i, j in zip(first, second, strict=True):
        expected[i] = 2.0 / 7.0 * float((z[i] - prior[j]) @ best) * np.asarray(best)
    assert_allclose(got, expected, atol=1e-5)


def test_equal_samples_have_no_largest_slice():
    _, _, z, _, theta = arrays(4)
    value, aux = max_sliced_wasserstein(z, z, theta)
    assert value == 0.0 and np.all(np.isfinite(aux["direction"]))


def test_draws_of_the_priors():
    def draw(kind: Any, **knobs: Any) -> Any:
        key = jax.random.key(0)
        return np.asarray(sample_prior(key, num_samples=5000, kind=kind, **knobs))

    ring, square = draw("ring"), draw("square")
    radius = np.linalg.norm(ring, axis=1)
    assert abs(radius.mean() - 1.0) < 1e-3 and 0.009 < radius.std() < 0.011
    assert_allclose(np.cov(ring.T), 0.5 * np.eye(2), atol=0.03)
    assert np.abs(square).max() <= 1.0
    assert_allclose(np.cov(square.T), np.eye(2) / 3.0, atol=0.03)
    assert_allclose(np.cov(draw("normal", latents=3).T), np.eye(3), atol=0.1)
    curve = draw("curve", noise=0.0)
    t = 4.5 * np.pi * np.linalg.norm(curve, axis=1)
    expected = t[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1) / (4.5 * np.pi)
    assert_allclose(curve, expected, atol=1e-4)
    assert 1.5 * np.pi <= t.min() + 1e-4 and t.max() <= 4.5 * np.pi + 1e-4
    assert abs(t.mean() - 3.0 * np.pi) < 0.2


def test_the_autoencoder_is_its_two_halves():
    net = SlicedAutoencoder(latents=2, pixels=6, hidden=(5, 4))
    x = jax.random.normal(jax.random.key(0), (3, 6))
    params: Any = net.init(jax.random.key(1), x)
    outputs: Any = net.apply(params, x)
    assert outputs[0].shape == (3, 2) and outputs[1].shape == (3, 6)
    decoded: Any = net.apply(params, outputs[0], method="decode")
    assert_allclose(decoded, outputs[1], rtol=1e-6)
    widths = [params["params"][f"down_{i}"]["kernel"].shape for i in range(3)]
    assert widths == [(6, 5), (5, 4), (4, 2)]


def test_bad_numbers_are_named():
    x, z = jnp.zeros((2, 3)), jnp.zeros((2, 2))
    with pytest.raises(ValueError, match="'weight' is -1.0"):
        swae_loss(x, x, z, z, z, weight=-1.0)
    with pytest.raises(TypeError, match="'prior'"):
        swae_loss(x, x, z, z[:1], z)
    with pytest.raises(ValueError, match="'num_steps' is 0"):
        max_sliced_wasserstein(z, z, z, num_steps=0)
    with pytest.raises(ValueError, match="'latents' is 3"):
        sample_prior(jax.random.key(0), num_samples=2, latents=3)
    with pytest.raises(ValueError, match="'noise' is -0.1"):
        sample_prior(jax.random.key(0), num_samples=2, noise=-0.1)
