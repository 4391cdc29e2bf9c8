"""Kinds of latents and what correlates them, against float64 NumPy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import mutual_info_score

from jaxzoo.vae.passive_variables import (
    averaged_mi,
    classify_latents,
    correlations,
    discretize,
    total_correlation_gap,
)


def codes(seed: int = 0, size: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Means and log stds of two active, two passive and two mixed latents.

    The fifth is active for a half of the data, the sixth has variance 1/2 for all.
    The means of the passive ones follow those of the active ones, 100 times smaller.
    """
    rng = np.random.default_rng(seed)
    a, b, e, f = rng.normal(size=(4, size))
    half = np.arange(size) % 2 == 0
    mean = np.stack([a, b, 0.01 * (a + b), 0.01 * a - 0.02 * b, e * half, f], axis=1)
    base = np.array([0.02, 0.05, 1.0, 0.97, 0.0, 0.5])
    variance = base[None] * np.exp(0.02 * rng.normal(size=(size, 6)))
    variance[:, 4] = np.where(half, 0.03, 1.0)
    return mean, 0.5 * np.log(variance)


def test_kinds_are_those_of_the_definition():
    mean, log_std = codes()
    kinds = classify_latents(mean, log_std)
    yes = [np.flatnonzero(np.asarray(k)).tolist() for k in kinds[:3]]
    assert yes == [[0, 1], [2, 3], [4, 5]]
    variance = np.exp(2.0 * log_std)
    assert_allclose(kinds.variance, variance.mean(axis=0), rtol=1e-5)
    assert_allclose(kinds.spread, variance.var(axis=0), rtol=1e-4)
    assert_allclose(kinds.mean_variance, mean.var(axis=0), rtol=1e-4)


def test_a_latent_that_is_passive_on_average_alone_is_mixed():
    """Its variance is 1 on average and never: only the spread tells."""
    variance = np.where(np.arange(100) % 2 == 0, 0.1, 1.9)[:, None]
    kinds = classify_latents(np.zeros((100, 1)), 0.5 * np.log(variance))
    assert bool(kinds.mixed[0]) and not bool(kinds.passive[0])
    wide = classify_latents(
        np.zeros((100, 1)), 0.5 * np.log(variance), largest_spread=1.0
    )
    assert bool(wide.passive[0])


def test_means_of_passive_latents_can_be_asked_to_be_constant():
    mean, log_std = codes()
    mean[:, 3] *= 20.0
    asked = classify_latents(mean, log_std, largest_mean_variance=0.05)
    assert_array_equal(np.flatnonzero(np.asarray(asked.passive)), [2])
    assert_array_equal(np.flatnonzero(np.asarray(asked.mixed)), [3, 4, 5])


def test_correlations_are_numpys():
    mean, _ = codes(1)
    expected = np.corrcoef(mean.T)
    assert_allclose(correlations(mean), expected, atol=1e-5)
    assert abs(expected[2, 0]) > 0.5  # though its means vary by 0.0002
    flat = np.concatenate([mean, np.ones((len(mean), 1))], axis=1)
    assert_allclose(correlations(flat)[6], np.eye(7)[6])


def test_sampled_correlations_are_those_of_many_draws():
    mean, log_std = codes(2, 200)
    rng = np.random.default_rng(3)
    draws = mean[None] + np.exp(log_std)[None] * rng.normal(size=(2000, 200, 6))
    expected = np.corrcoef(draws.reshape(-1, 6).T)
    exact = np.asarray(correlations(mean, log_std))
    assert_allclose(exact, expected, atol=0.01)  # 400,000 draws
    passive = np.abs(exact - np.eye(6))[[2, 3]]
    assert passive.max() < 0.05 < 0.5 < np.abs(correlations(mean)[2, 0])


@pytest.mark.parametrize("kept", [None, [0, 1, 4, 5]])
def test_the_gap_is_that_of_the_covariances(kept):
    mean, log_std = codes(4)
    rng = np.random.default_rng(5)
    mean += 1e-3 * rng.normal(size=mean.shape)  # else the passive are sums of others
    z = mean + np.exp(log_std) * rng.normal(size=mean.shape)
    where = None if kept is None else np.isin(np.arange(6), kept)
    gap, aux = total_correlation_gap(mean, z, where=where, ridge=0.0)
    expected = []
    for x in (mean, z):
        s = np.cov((x if kept is None else x[:, kept]).T)
        expected.append(0.5 * (np.log(np.diag(s)).sum() - np.linalg.slogdet(s)[1]))
    assert_allclose([aux["mean"], aux["sampled"]], expected, rtol=1e-3, atol=1e-5)
    assert_allclose(gap, expected[0] - expected[1], rtol=1e-3, atol=1e-5)
    assert gap > 3.0 if kept is None else abs(gap) < 0.02


def test_codes_that_are_sums_of_others_have_a_finite_gap():
    mean, _ = codes(6)
    value, slope = jax.value_and_grad(lambda m: total_correlation_gap(m, mean)[0])(
        jnp.asarray(mean, jnp.float32)
    )
    assert np.isfinite(value) and np.all(np.isfinite(slope))


def test_bins_are_those_of_a_histogram():
    x = np.random.default_rng(7).normal(size=(500, 3)).astype(np.float32)
    for j, own in enumerate(np.asarray(discretize(x)).T):
        edges = np.histogram(x[:, j], 20)[1]
        assert_array_equal(own, np.digitize(x[:, j], edges[:-1]) - 1)
    assert not np.any(np.asarray(discretize(np.ones((4, 2), np.float32))))


def test_averaged_information_is_scikit_learns():
    mean, _ = codes(8)
    levels = np.asarray(discretize(mean))
    score, aux = averaged_mi(levels)
    table = [[mutual_info_score(a, b) for a in levels.T] for b in levels.T]
    assert_allclose(aux["information"], table, rtol=1e-4, atol=1e-5)
    pairs = np.sum(table) - np.trace(table)
    assert_allclose(score, pairs / 30.0, rtol=1e-4)
    where = np.array([True, True, False, False, False, True])
    few = np.asarray(table)[np.ix_(where, where)]
    expected = (few.sum() - np.trace(few)) / 6.0
    assert_allclose(averaged_mi(levels, where=where)[0], expected, rtol=1e-4)
    assert float(averaged_mi(levels, where=np.arange(6) == 0)[0]) == 0.0


def test_bad_input_is_named():
    x = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="'tolerance' is -0.1"):
        classify_latents(x, x, tolerance=-0.1)
    with pytest.raises(ValueError, match="'largest_mean_variance' is -1.0"):
        classify_latents(x, x, largest_mean_variance=-1.0)
    with pytest.raises(ValueError, match="'num_bins' is 0"):
        discretize(x, num_bins=0)
    with pytest.raises(TypeError, match="'sampled'"):
        total_correlation_gap(x, jnp.zeros((4, 3)))
