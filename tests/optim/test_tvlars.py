"""The paper's algorithm in float64, and Optax's LARS where the two agree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxzoo.optim.tvlars import scale_by_tvlars, time_varying_rate, tvlars

KNOBS: Any = {"lam": 0.7, "delay": 2.0, "alpha": 0.5, "gamma_min": 0.02}


def phi(t, lam, delay, alpha, gamma_min):
    return 1 / (alpha + np.exp(lam * (t - delay))) + gamma_min


def trees():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (5, 3), "bias": (3,)}
    start = {k: 0.5 * rng.normal(size=s) for k, s in shapes.items()}
    grads = [{k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(5)]
    return start, grads


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run(optimizer, start, grads) -> Any:
    params: Any = float32(start)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for g in grads:
        updates, state = update(float32(g), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_five_steps_by_the_paper(decay, masked):
    start, grads = trees()
    rate, eta, momentum = 2.0, 0.05, 0.8
    w, m = dict(start), {k: 0.0 for k in start}
    for t, g in enumerate(grads):
        for k in w:
            wd = 0.0 if masked and k == "bias" else decay
            norm = np.linalg.norm(w[k])
            local = eta * norm / (np.linalg.norm(g[k]) + wd * norm)
            m[k] = momentum * m[k] + phi(t, **KNOBS) * local * (g[k] + wd * w[k])
            w[k] = w[k] - rate * m[k]
    optimizer = tvlars(
        rate, **KNOBS, trust_coefficient=eta, momentum=momentum, weight_decay=decay,
        mask={"kernel": True, "bias": False} if masked else None,
    )  # fmt: skip
    params = run(optimizer, start, grads)
    for k in w:
        assert_allclose(params[k], w[k], rtol=1e-5, atol=1e-6)


def test_without_decay_it_is_the_lars_of_optax_with_a_schedule():
    start, grads = trees()
    ours = tvlars(2.0, **KNOBS, trust_coefficient=0.05, weight_decay=0.0)

    def schedule(t):
        return 2.0 * time_varying_rate(t, **KNOBS)

    theirs = optax.lars(schedule, trust_coefficient=0.05)
    expected = run(theirs, start, grads)
    params = run(ours, start, grads)
    for k in start:
        assert_allclose(params[k], expected[k], rtol=1e-5, atol=1e-6)


def test_the_rate_by_the_paper_its_bounds_and_its_fall():
    t = np.arange(400)
    knobs: Any = {"lam": 0.05, "delay": 150.0, "alpha": 0.8, "gamma_min": 0.02}
    rate = time_varying_rate(jnp.asarray(t), **knobs)
    assert rate.dtype == jnp.float32
    assert_allclose(rate, phi(t, **knobs), rtol=1e-5)
    values = np.asarray(rate, np.float64)
    assert np.all(np.diff(values[:300]) < 0) and np.all(np.diff(values) <= 0)
    largest = 1 / (0.8 + np.exp(-0.05 * 150)) + 0.02
    assert_allclose(values[0], largest, rtol=1e-6)
    assert values.min() >= 0.02 * (1 - 1e-6)
    assert_allclose(time_varying_rate(jnp.int32(2**31 - 1), **knobs), 0.02, rtol=1e-6)


def test_steps_have_the_length_of_the_layer_whatever_the_gradients_are():
    start, grads = trees()
    direction: Any = scale_by_tvlars(**KNOBS, trust_coefficient=0.05)
    params = float32(start)
    for size in (1e-8, 1.0, 1e8):
        g = jax.tree.map(lambda x, s=size: s * x, float32(grads[0]))
        updates, _ = direction.update(g, direction.init(params), params)
        for k in start:
            wanted = 0.05 * phi(0, **KNOBS) * np.linalg.norm(start[k])
            assert_allclose(jnp.linalg.norm(updates[k]), wanted, rtol=1e-5)


def test_zeros_have_a_layer_wise_rate_of_one():
    direction: Any = scale_by_tvlars(**KNOBS, trust_coefficient=0.05)
    zero, one = jnp.zeros(3), jnp.ones(3)
    updates, _ = direction.update(one, direction.init(zero), zero)
    assert_allclose(updates, phi(0, **KNOBS), rtol=1e-6)
    updates, _ = direction.update(zero, direction.init(one), one)
    assert not np.any(updates)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="argument 'alpha' is 0.0"):
        tvlars(0.1, alpha=0.0)
    with pytest.raises(ValueError, match="argument 'lam' is -1.0"):
        scale_by_tvlars(lam=-1.0)
    with pytest.raises(ValueError, match="argument 'momentum' is 1.0"):
        tvlars(0.1, momentum=1.0)
    with pytest.raises(ValueError, match="argument 'gamma_min' is nan"):
        time_varying_rate(jnp.zeros(()), gamma_min=float("nan"))
    optimizer = tvlars(0.1)
    with pytest.raises(ValueError, match="params"):
        optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)))
