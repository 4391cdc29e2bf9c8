"""The closed form in float64 with SciPy's median filter, and its bound on a run."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose
from scipy.ndimage import median_filter
from scipy.optimize import minimize

from jaxzoo.optim.schedule_refinement import last_iterate_bound, refine_schedule


def norms(count=60, seed=0):
    """Falling, noisy, and rising at the end, with an outlier."""
    rng = np.random.default_rng(seed)
    t = np.arange(count) / count
    values = 1 + np.exp(-5 * t) + np.exp(8 * (t - 1)) + 0.2 * rng.uniform(size=count)
    values[count // 3] = 30
    return values.astype(np.float32)


def of_the_paper(g, power, tau):
    """Algorithm 1, a loop over steps."""
    g = g.astype(np.float64)
    width = 2 * (int(tau * len(g)) // 2) + 1
    pad = min(2 * width, len(g) - 1)
    longer = np.pad(g, (0, pad), mode="reflect")
    smooth = median_filter(longer, size=width, mode="nearest")[:-pad]
    w = smooth**-power
    eta = np.array([w[t] * sum(w[t + 1 :]) for t in range(len(w))])
    return eta / eta.max(), w, smooth


@pytest.mark.parametrize("kind, power", [("sgd", 2), ("adam", 1)])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.33])
def test_schedule_by_the_paper(kind, power, tau):
    g = norms()
    eta, w, smooth = of_the_paper(g, power, tau)
    schedule, aux = refine_schedule(g, kind=kind, tau=tau)
    assert_allclose(schedule, eta, atol=1e-6)
    assert_allclose(aux["smoothed"], smooth, rtol=1e-6)
    ratio = np.asarray(aux["weights"]) / w
    assert_allclose(ratio, ratio[0], rtol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_constant_norms_give_linear_decay(kind, size):
    schedule = refine_schedule(np.full(101, size, np.float32), kind=kind)[0]
    linear = optax.linear_schedule(1.0, 0.0, 100)(jnp.arange(101))
    assert_allclose(schedule, linear, atol=1e-6)


def test_falling_norms_give_warm_up_and_an_outlier_is_filtered_away():
    g = np.linspace(5, 1, 100, dtype=np.float32)
    assert 0 < np.argmax(refine_schedule(g, tau=0.0)[0]) < 99
    spoilt = g.copy()
    spoilt[40] = 1000
    with_filter = refine_schedule(spoilt)[0] - refine_schedule(g)[0]
    without = refine_schedule(spoilt, tau=0.0)[0] - refine_schedule(g, tau=0.0)[0]
    assert np.abs(with_filter).max() < 0.05 < np.abs(without).max()


@pytest.mark.parametrize("steps", [1, 7, 60, 501])
def test_it_stretches_to_any_length(steps):
    g = norms()
    schedule = refine_schedule(g)[0]
    stretched = refine_schedule(g, steps=steps)[0]
    assert stretched.shape == (steps,)
    places = np.linspace(0, 59, steps)
    assert_allclose(stretched, np.interp(places, np.arange(60), schedule), atol=1e-5)


def test_bound_by_the_paper_and_its_least_weights():
    g = norms(12)
    wide = g.astype(np.float64)

    def bound(w):
        return (2.5**2 + (w**2 * wide**2).sum()) / (2 * w.sum())

    def of_logs(x):
        w = np.exp(x)
        return bound(w), w * (w * wide**2 - bound(w)) / w.sum()

    w = np.random.default_rng(1).uniform(0.1, 1, 12)
    value = last_iterate_bound(jnp.asarray(w), g, distance=2.5)
    assert_allclose(value, bound(w), rtol=1e-6)
    found = minimize(of_logs, np.log(w), jac=True, tol=1e-9)
    ours = 2.5 * refine_schedule(g, tau=0.0)[1]["weights"]
    assert_allclose(ours, np.exp(found.x), rtol=1e-3)
    least = last_iterate_bound(ours, g, distance=2.5)
    assert_allclose(least, found.fun, rtol=1e-6)
    assert_allclose(least, 2.5 / np.sqrt((wide**-2).sum()), rtol=1e-6)


def test_no_random_weighting_has_a_lower_bound():
    g = norms()
    least = last_iterate_bound(refine_schedule(g, tau=0.0)[1]["weights"], g)
    rng = np.random.default_rng(2)
    for spread in (0.1, 1.0, 3.0):
        w = np.exp(spread * rng.normal(size=(50, 60)))
        w /= np.sqrt((w**2 * g**2).sum(1, keepdims=True))  # each in its best scale
        bounds = [last_iterate_bound(jnp.asarray(x), g) for x in w]
        assert least <= min(bounds)


def test_the_bound_holds_for_subgradient_descent():
    """f = |x| in several dimensions, with the schedule of the theorem."""
    rng = np.random.default_rng(3)
    scale = rng.uniform(0.5, 2, 5)
    start = rng.normal(size=5)
    for kind in ("refined", "random"):
        g = np.full(40, np.linalg.norm(scale), np.float32)  # of every subgradient
        w = np.asarray(refine_schedule(g, tau=0.0)[1]["weights"], np.float64)
        w = w * np.linalg.norm(start)
        if kind == "random":
            w = w * rng.uniform(0.2, 2, 40)
        x = start.copy()
        for t in range(39):
            eta = w[t] * w[t + 1 :].sum() / w.sum()
            x = x - eta * scale * np.sign(x)
        bound = last_iterate_bound(
            jnp.asarray(w), g, distance=float(np.linalg.norm(start))
        )
        assert (scale * np.abs(x)).sum() <= bound


def test_extremes():
    g = norms()
    g[5] = 0.0
    schedule, aux = refine_schedule(g, tau=0.0)
    assert_allclose(aux["smoothed"][5], 30e-9, rtol=1e-5)
    g[5] = 30e-9
    assert_allclose(schedule, of_the_paper(g, 2, 0.0)[0], atol=1e-6)
    assert np.all(np.isfinite(aux["weights"]))
    assert_allclose(refine_schedule(np.zeros(3, np.float32))[0], [1, 0.5, 0])
    assert np.isinf(last_iterate_bound(jnp.zeros(3), jnp.ones(3)))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'grad_norms' has one norm"):
        refine_schedule(np.ones(1, np.float32))
    with pytest.raises(ValueError, match="argument 'kind' is 'rms'"):
        refine_schedule(norms(), kind="rms")  # pyright: ignore
    with pytest.raises(ValueError, match="argument 'tau' is 1.5"):
        refine_schedule(norms(), tau=1.5)
    with pytest.raises(TypeError, match="argument 'grad_norms' is float32"):
        last_iterate_bound(jnp.ones(3), jnp.ones(4))
    with pytest.raises(ValueError, match="argument 'distance' is -1.0"):
        last_iterate_bound(jnp.ones(3), jnp.ones(3), distance=-1.0)
