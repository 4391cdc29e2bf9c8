"""Distances of samples and the inequality of WAEs against SciPy and closed forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import linear_sum_assignment

from jaxzoo.vae.wae_error_propagation import (
    bound_terms,
    contaminate,
    histogram_tv,
    wasserstein1,
)


def transport(x: Any, y: Any) -> float:
    cost = np.linalg.norm(x[:, None] - y[None], axis=2)
    return float(cost[linear_sum_assignment(cost)].mean())


@pytest.mark.parametrize("size", [1, 2, 40])
def test_assignments_are_those_of_scipy(size):
    one = jax.jit(wasserstein1)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(2, size, 3))
        if seed == 5:  # ties everywhere
            x, y = np.round(x), np.round(y)
        distance, aux = one(x.astype(np.float32), y.astype(np.float32))
        assert_allclose(distance, transport(x, y), rtol=1e-5, atol=1e-6)
        assert sorted(aux["index"].tolist()) == list(range(size))


def test_on_a_line_and_for_moved_samples_the_distance_is_known():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 50, 1))
    expected = np.abs(np.sort(x[:, 0]) - np.sort(y[:, 0])).mean()
    assert_allclose(wasserstein1(x, y)[0], expected, rtol=1e-5)
    x = rng.normal(size=(30, 2))
    moved = rng.permutation(x) + np.array([[3.0, 4.0]])
    assert_allclose(wasserstein1(x, moved)[0], 5.0, rtol=1e-5)
    assert float(wasserstein1(x, rng.permutation(x))[0]) == 0.0


def linear_model(seed: int) -> Any:
    """Data, codes, draws and what a linear decoder makes of them."""
    rng = np.random.default_rng(seed)
    x, z = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    encoder, decoder = rng.normal(size=(3, 2)), rng.normal(size=(2, 3))
    codes = x @ encoder
    return x, codes @ decoder, codes, z, z @ decoder, np.linalg.norm(decoder, ord=2)


def test_the_terms_are_those_of_the_inequality():
    x, reconstruction, codes, z, generated, lipschitz = linear_model(0)
    error = np.linalg.norm(x - reconstruction, axis=1).mean()
    args = x, reconstruction, codes, z, generated
    bound, aux = bound_terms(*args, np.asarray(lipschitz))
    assert_allclose(aux["reconstruction"], error, rtol=1e-5)
    assert_allclose(aux["latent"], transport(codes, z), rtol=1e-5)
    assert_allclose(aux["realised"], transport(x, generated), rtol=1e-5)
    assert_allclose(bound, error + lipschitz * transport(codes, z), rtol=1e-5)
    slack = bound - aux["realised"]
    assert_allclose(aux["slack"], slack, rtol=1e-5)


def test_the_inequality_holds_and_needs_both_terms():
    one = jax.jit(bound_terms)
    broken = []
    for seed in range(10):
        *args, lipschitz = linear_model(seed)
        bound, aux = one(*args, np.asarray(lipschitz))
        assert aux["slack"] >= 0.0
        broken.append(aux["realised"] > aux["reconstruction"])
        # Data that the decoder gives back: the codes' distance is all there is.
        args[0] = args[1]
        bound, aux = one(*args, np.asarray(lipschitz))
        assert aux["reconstruction"] == 0.0 and 0.0 < aux["realised"] <= bound
    assert any(broken)


def test_gradients_are_those_of_the_best_assignment():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 12, 2)).astype(np.float32)
    gradient = jax.grad(lambda x: wasserstein1(x, y)[0])(x)
    partners = y[np.asarray(wasserstein1(x, y)[1]["index"])]
    away = (x - partners) / np.linalg.norm(x - partners, axis=1, keepdims=True)
    assert_allclose(gradient, away / 12, rtol=1e-4, atol=1e-6)


def test_histograms_are_shared_between_neighbours():
    rng = np.random.default_rng(0)
    x, y = rng.uniform(-1.5, 1.5, size=(2, 30, 2))

    def histogram(points: Any) -> Any:
        counts = np.zeros((5, 5))
        for a, b in np.clip(points, -1.0, 1.0) * 2.0 + 2.0:
            for i in range(5):
                for j in range(5):
                    share = max(0.0, 1.0 - abs(a - i)) * max(0.0, 1.0 - abs(b - j))
                    counts[i, j] += share / len(points)
        return counts

    expected = 0.5 * np.abs(histogram(x) - histogram(y)).sum()
    assert_allclose(histogram_tv(x, y, bins=5), expected, rtol=1e-5)
    assert float(histogram_tv(x, x, bins=5)) == 0.0
    assert_allclose(histogram_tv(x * 0.0 - 1.0, y * 0.0 + 1.0), 1.0, rtol=1e-6)


def test_contamination_moves_the_law_in_proportion():
    rng = np.random.default_rng(0)
    x, bad = rng.normal(size=(20_000, 1)), rng.normal(size=(20_000, 1)) + 5.0
    for fraction in (0.0, 0.1, 0.3):
        key = jax.random.key(1)
        rows, aux = contaminate(key, x, bad, fraction=fraction)
        rows, chosen = np.asarray(rows), np.asarray(aux["is_adversary"])
        assert_allclose(chosen.mean(), fraction, atol=0.01)
        assert_allclose(rows, np.where(chosen[:, None], bad, x), rtol=1e-6)
        moved = np.abs(np.sort(rows[:, 0]) - np.sort(x[:, 0])).mean()
        assert_allclose(moved, 5.0 * fraction, atol=0.05)
        # TV(N(0, 1), N(5, 1)) = 0.988, and histograms blur it a little.
        tv = histogram_tv(rows, x, low=-4.0, high=9.0, bins=14)
        assert_allclose(tv, 0.97 * fraction, atol=0.02)


def test_bad_arguments_are_named():
    x, z = jnp.zeros((4, 3)), jnp.zeros((4, 2))
    with pytest.raises(TypeError, match="'y'"):
        wasserstein1(x, x[:2])
    with pytest.raises(TypeError, match="'prior'"):
        bound_terms(x, x, z, x, x, jnp.array(1.0))
    with pytest.raises(ValueError, match="'lipschitz' is -1.0"):
        bound_terms(x, x, z, z, x, jnp.array(-1.0))
    with pytest.raises(ValueError, match="'high' is -1.0"):
        histogram_tv(x, x, low=0.0, high=-1.0)
    with pytest.raises(ValueError, match="'bins' is 1"):
        histogram_tv(x, x, bins=1)
    with pytest.raises(ValueError, match="'fraction' is 1.5"):
        contaminate(jax.random.key(0), x, x, fraction=1.5)
