"""Scores of the VAE room's comparison against closed forms, SciPy and known codes."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.linalg import sqrtm

from experiments.vae._models import Size, models
from experiments.vae._scores import (
    dci,
    frechet_distance,
    infomec,
    kernel_distance,
    sap,
)


def grid(noise: float = 0.02, seed: int = 0):
    """Factors of 4, 3 and 5 levels, all combinations 12 times; codes that are them."""
    levels = np.stack(np.meshgrid(range(4), range(3), range(5)), -1).reshape(-1, 3)
    factors = np.tile(levels, (12, 1))
    rng = np.random.default_rng(seed)
    codes = factors / np.array([4.0, 3.0, 5.0]) + noise * rng.normal(size=factors.shape)
    return codes, factors, rng.uniform(size=len(factors)) < 0.25


def turned(codes: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same codes in random directions: nothing is lost, and nothing apart."""
    centred = (codes - codes.mean(0)) / codes.std(0)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return centred @ q


def test_frechet_distance_is_that_of_gaussians():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 4)), 2.0 * rng.normal(size=(40, 4)) + 1.0
    first, second = np.cov(x.T), np.cov(y.T)
    root = np.real(sqrtm(first @ second))
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2)
    expected += np.trace(first + second - 2.0 * root)
    assert_allclose(frechet_distance(x, y), expected, rtol=1e-8)
    assert_allclose(frechet_distance(x, x + 3.0), 36.0, rtol=1e-8)


def test_kernel_distance_is_a_double_sum_without_bias():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(5, 3)) + 0.5

    def mean(a, b, *, same):
        pairs = [
            (u @ v / 3.0 + 1.0) ** 3
            for i, u in enumerate(a)
            for j, v in enumerate(b)
            if not (same and i == j)
        ]
        return np.mean(pairs)

    expected = mean(x, x, same=True) + mean(y, y, same=True)
    expected -= 2.0 * mean(x, y, same=False)
    assert_allclose(kernel_distance(x, y), expected, rtol=1e-10)
    draws = rng.normal(size=(500, 2, 20, 3))
    values = [kernel_distance(*pair) for pair in draws]
    assert abs(np.mean(values)) < 4.0 * np.std(values) / np.sqrt(len(values))


def test_factors_as_codes_score_high_and_turned_ones_low():
    codes, factors, test = grid()
    known = [sap(codes, factors, test), *dci(codes, factors, test)]
    known += infomec(codes, factors, test)
    lost = [sap(turned(codes), factors, test), *dci(turned(codes), factors, test)]
    lost += infomec(turned(codes), factors, test)
    gap, disentangled, complete, informative, modular, explicit, compact = known
    assert gap > 0.35 and min(disentangled, complete, modular, compact) > 0.85
    assert informative > 0.98 and explicit > 0.5
    # Turned codes keep what a regression on all of them knows, and lose the axes.
    assert_allclose(lost[5], explicit, atol=0.1)
    for place in (0, 1, 2, 4, 6):
        assert lost[place] < known[place] - (0.1 if place == 0 else 0.25), place


def test_noise_says_nothing():
    _, factors, test = grid()
    noise = np.random.default_rng(1).normal(size=factors.shape)
    assert sap(noise, factors, test) < 0.1
    informative = dci(noise, factors, test)[2]
    assert informative < 0.45  # chance is the mean of 1/4, 1/3 and 1/5
    assert infomec(noise, factors, test)[1] < 0.05


@pytest.mark.parametrize("latents, hidden, pixels", [(16, 200, 784), (6, 64, 256)])
def test_all_models_have_as_many_parameters(latents, hidden, pixels):
    size = Size(pixels, latents, hidden, 100, 2)
    counts = {}
    for name, model in models(size).items():
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    for name, count in counts.items():
        assert abs(count / counts["vae"] - 1.0) <= 0.04, (name, count, counts["vae"])
