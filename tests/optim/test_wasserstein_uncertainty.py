"""Distances against SciPy, linear assignment and Gaussians; the search by its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.optimize import linear_sum_assignment

from jaxzoo.optim.wasserstein_uncertainty import (
    acquisition,
    sliced_w2,
    w2_1d,
    wu_go,
)


def quantiles(a, levels):
    return np.sort(a)[np.minimum((levels * len(a)).astype(int), len(a) - 1)]


def of_the_paper(a, b, points=200_000):
    """The integral over quantiles, in float64 at the middles of small intervals."""
    levels = (np.arange(points) + 0.5) / points
    return np.sqrt(np.mean((quantiles(a, levels) - quantiles(b, levels)) ** 2))


def samples(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("n, m", [(7, 7), (7, 5), (6, 4), (1, 9), (8, 4)])
def test_distance_is_the_integral_over_quantiles(n, m):
    a, b = samples(n), 2 * samples(m, seed=1) + 1
    assert_allclose(w2_1d(a, b), of_the_paper(a, b), rtol=1e-4)
    assert_allclose(w2_1d(b, a), w2_1d(a, b), rtol=1e-6)


def test_distance_is_that_of_the_best_assignment():
    a, b = samples(9), samples(9, seed=1)
    cost = (a[:, None].astype(np.float64) - b[None]) ** 2
    best = cost[linear_sum_assignment(cost)].mean() ** 0.5
    assert_allclose(w2_1d(a, b), best, rtol=1e-6)


def test_known_distances():
    a = samples(50)
    assert w2_1d(a, a[::-1]) == 0
    assert_allclose(w2_1d(a, a + 3.0), 3.0, rtol=1e-6)
    assert_allclose(w2_1d(a, np.repeat(a, 3)), 0.0, atol=1e-7)
    # Of Gaussians, (difference of means)^2 + (difference of deviations)^2.
    z = np.sort(samples(20_000))
    assert_allclose(w2_1d(z, 3.0 * z[::-1] + 1.0), np.sqrt(1.0 + 4.0), rtol=2e-2)


def test_the_gradient_pulls_along_the_coupling_and_is_0_at_0():
    a, b = np.array([3.0, 0.0], np.float32), np.array([1.0, 6.0], np.float32)
    gradient = jax.grad(w2_1d)(a, b)
    assert_allclose(gradient, np.array([-3.0, -1.0]) / (2 * np.sqrt(5)), rtol=1e-6)
    assert np.all(jax.grad(w2_1d)(a, a) == 0)


def test_sliced_distance():
    a = samples(12, 3)
    assert_allclose(sliced_w2(jax.random.key(0), a, a[::-1]), 0.0, atol=1e-6)
    shift = np.array(
        [1.0, 2.0, 2.0], np.float32
    )  # of length 3: 3 / sqrt(3) over all directions
    got = sliced_w2(jax.random.key(0), a, a + shift, num_projections=4000)
    assert_allclose(got, np.sqrt(3.0), rtol=0.03)
    line, other = samples(12, 1), samples(8, 1, seed=1)
    got = sliced_w2(jax.random.key(0), line, other)
    assert_allclose(got, w2_1d(line[:, 0], other[:, 0]), rtol=1e-5)


def test_uncertainty_is_the_distance_to_the_nearest_answer():
    made, seen = samples(5, 6), samples(4, 8, seed=1) + 0.5
    value, aux = acquisition(made, seen, kappa=1.7)
    nearest = [min(of_the_paper(m, s, 48_000) for s in seen) for m in made]
    assert_allclose(aux["uncertainty"], nearest, rtol=1e-4)
    assert_allclose(aux["mean"], made.mean(axis=1), rtol=1e-5)
    assert_allclose(value, aux["mean"] - 1.7 * aux["uncertainty"], rtol=1e-5, atol=1e-6)
    # What was seen is certain, and shapes count even where means agree.
    assert acquisition(seen[:1], seen)[1]["uncertainty"] == 0
    flat = np.full((1, 8), seen[0].mean())
    spread = acquisition(flat, seen[:1])[1]["uncertainty"]
    assert_allclose(spread, seen[:1].std(axis=1), rtol=1e-5)


def test_rows_that_were_not_evaluated_do_not_count():
    made, seen = samples(5, 6), samples(4, 8, seed=1)
    mask = np.array([True, False, True, False])
    spoilt = np.where(mask[:, None], seen, made[:4, :1])
    value, _ = acquisition(made, spoilt, evaluated=mask)
    assert_allclose(value, acquisition(made, seen[mask])[0], rtol=1e-6)


GRID = np.linspace(-2, 2, 17, dtype=np.float32)[:, None]


def bowl(key, theta):
    skewed = jax.random.exponential(key, (16,)) - 1.0
    return jnp.square(theta[0] - 1.0) + 0.1 * skewed


KAPPAS = (0.0, 2.0, 5.0)


@pytest.fixture(scope="module")
def searches():
    """Six searches for each kappa at once, compiled once: leaves `[kappas, 6, ...]`."""

    def one(kappa, key):
        return wu_go(key, bowl, GRID, num_evaluations=12, num_responses=16, kappa=kappa)

    every = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    keys = jax.random.split(jax.random.key(0), 6)
    return jax.device_get(jax.jit(every)(jnp.asarray(KAPPAS), keys))


def test_the_search_finds_the_bottom_of_a_bowl(searches):
    theta, aux = jax.tree.map(lambda leaf: leaf[1], searches)
    assert theta.shape == (6, 1)
    assert np.median(np.abs(theta - 1.0)) <= 0.25
    means = aux["responses"].mean(axis=2)
    for found, index, mean in zip(theta, aux["index"], means, strict=True):
        assert found == GRID[index[np.argmin(mean)]]
        assert len(set(index[:4])) == 4
    # The answers are those of the simulator at the points that were asked for.
    truth = (GRID[aux["index"], 0] - 1.0) ** 2
    assert np.abs(means - truth).max() < 0.15


def test_the_surrogate_has_learned_the_answers(searches):
    _, aux = jax.tree.map(lambda leaf: leaf[1], searches)
    truth = (GRID[:, 0] - 1.0) ** 2
    for index, mean, uncertainty in zip(
        aux["index"], aux["mean"], aux["uncertainty"], strict=True
    ):
        seen = np.unique(index)
        assert np.abs(mean[seen] - truth[seen]).mean() < 0.5
        assert uncertainty[seen].mean() < 0.5


def test_kappa_explores(searches):
    """With no reward for uncertainty fewer places are seen."""
    index = searches[1]["index"]
    seen = [np.mean([len(set(i)) for i in index[k]]) for k in (0, 2)]
    assert seen[1] > seen[0]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'num_initial' is 18, expected a number <= 1"):
        wu_go(jax.random.key(0), bowl, GRID, num_evaluations=20, num_initial=18)
    with pytest.raises(ValueError, match="argument 'kappa' is -1.0"):
        acquisition(samples(2, 3), samples(2, 3), kappa=-1.0)
    with pytest.raises(TypeError, match=r"argument 'b' is float32\[4,1\]"):
        w2_1d(samples(4), samples(4, 1))
    with pytest.raises(TypeError, match=r"argument 'b' is float32\[4,2\]"):
        sliced_w2(jax.random.key(0), samples(4, 3), samples(4, 2))
