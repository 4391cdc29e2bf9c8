"""Masks by hand, both phases against the paper in float64, and the switch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxzoo.sparsity import step_nm as module
from jaxzoo.sparsity.step_nm import nm_mask, sr_ste_gradient, straight_through

step_nm: Any = module.step_nm
scale_by_step_nm: Any = module.scale_by_step_nm


def gradients(steps=6, shape=(3, 4)):
    return np.random.default_rng(0).normal(size=(steps, *shape))


def kept_by_hand(w, n, m, axis):
    """Group by group: the n largest."""
    rows = np.moveaxis(w, axis, -1)
    keep = np.zeros(rows.shape, bool)
    for index in np.ndindex(rows.shape[:-1]):
        for first in range(0, rows.shape[-1], m):
            group = np.abs(rows[index][first : first + m])
            for place in sorted(range(m), key=lambda i: -group[i])[:n]:
                keep[(*index, first + place)] = True
    return np.moveaxis(keep, -1, axis)


@pytest.mark.parametrize("n, m, axis", [(1, 8, 0), (2, 4, 1), (3, 4, -1), (4, 4, 0)])
def test_masks_keep_the_largest_of_each_group(n, m, axis):
    w = np.random.default_rng(1).normal(size=(8, 4)).astype(np.float32)
    w[:, 0] = 0.5  # ties
    keep = nm_mask(w, n=n, m=m, axis=axis)
    assert np.array_equal(keep, kept_by_hand(w, n, m, axis))
    assert np.all(
        nm_mask(np.zeros_like(w), n=n, m=m, axis=axis).sum() == w.size * n / m
    )


def test_gradients_go_straight_through():
    w = jnp.asarray(gradients(1, (8, 3))[0], jnp.float32)
    keep = nm_mask(w, n=1, m=8)
    value, gradient = jax.value_and_grad(
        lambda w: jnp.sum(jnp.sin(straight_through(w, n=1, m=8)))
    )(w)
    assert np.array_equal(straight_through(w, n=1, m=8), jnp.where(keep, w, 0.0))
    assert_allclose(value, jnp.sum(jnp.sin(jnp.where(keep, w, 0.0))), rtol=1e-6)
    # cos(0) = 1 where the weight is masked: it gets the gradient all the same.
    assert_allclose(gradient, jnp.cos(jnp.where(keep, w, 0.0)), rtol=1e-6)
    assert np.array_equal(straight_through(w, False, n=1, m=8), w)


def test_sr_ste_decays_what_is_masked_out():
    w, g = jnp.asarray(gradients(2, (4, 2)), jnp.float32)
    keep = nm_mask(w, n=2, m=4)
    expected = np.where(keep, g, g + 0.3 * w)
    assert_allclose(sr_ste_gradient(g, w, n=2, m=4, lam=0.3), expected, rtol=1e-6)


def of_the_paper(p, grads, *, lr, switch):
    """Adam for `switch` steps, then with the second moment of that time."""
    b1, b2, eps = 0.8, 0.9, 1e-8
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        if t <= switch:
            v = b2 * v + (1 - b2) * g * g
            v_hat = v / (1 - b2**t)
        p = p - lr * (m / (1 - b1**t)) / (np.sqrt(v_hat) + eps)
    return p


def follow(optimizer: Any, p, grads) -> tuple[Any, Any]:
    p, update = jnp.asarray(p, jnp.float32), jax.jit(optimizer.update)
    state, states = optimizer.init(p), []
    for g in jnp.asarray(grads, jnp.float32):
        updates, state = update(g, state, p)
        p = optax.apply_updates(p, updates)
        states.append(state[0])
    return p, states


def test_both_phases_are_the_papers():
    start, grads = np.random.default_rng(1).normal(size=(3, 4)), gradients()
    expected = of_the_paper(start, grads, lr=0.1, switch=3)
    got, states = follow(step_nm(0.1, b1=0.8, b2=0.9, latest=3), start, grads)
    assert_allclose(got, expected, rtol=2e-6, atol=2e-6)
    assert [int(s.switched_at) for s in states] == [0, 0, 3, 3, 3, 3]
    for state in states[3:]:
        assert np.array_equal(state.nu, states[2].nu)
    # Adam, whose second moment goes on, ends elsewhere.
    adam, _ = follow(optax.adam(0.1, 0.8, 0.9), start, grads)
    assert np.abs(adam - expected).max() > 1e-3


def test_before_the_switch_it_is_adam():
    start, grads = jnp.ones((3, 4)), gradients()
    ours, _ = follow(step_nm(0.1, weight_decay=0.2), start, grads)
    theirs, _ = follow(optax.adamw(0.1, weight_decay=0.2), start, grads)
    assert_allclose(ours, theirs, rtol=1e-6)


def test_it_switches_when_the_mean_change_of_the_window_is_small():
    b2, eps, window, steps = 0.5, 0.01, 4, 20
    grads = np.ones((steps, 5))
    v, changes, expected = np.zeros(5), [], 0
    for t, g in enumerate(grads, start=1):
        new = b2 * v + (1 - b2) * g * g
        changes.append(np.abs(new - v).mean())
        v = new
        if np.mean(changes[-window:]) < eps and t >= 2:
            expected = t
            break
    assert 4 < expected < steps
    knobs = {"b2": b2, "eps": eps, "window": window}
    _, states = follow(step_nm(0.1, earliest=2, **knobs), np.ones(5), grads)
    assert int(states[-1].switched_at) == expected
    late = step_nm(0.1, earliest=expected + 3, **knobs)
    assert int(follow(late, np.ones(5), grads)[1][-1].switched_at) == expected + 3
    early = step_nm(0.1, latest=2, **knobs)
    assert int(follow(early, np.ones(5), grads)[1][-1].switched_at) == 2


def test_bfloat16_gradients_keep_float32_state():
    g = jnp.ones(3, jnp.bfloat16)
    direction = scale_by_step_nm()
    updates, state = direction.update(g, direction.init(g))
    assert updates.dtype == jnp.bfloat16
    assert state.mu.dtype == state.nu.dtype == jnp.float32


@pytest.mark.parametrize(
    "name, call",
    [
        ("n", lambda w: nm_mask(w, n=5, m=4)),
        ("m", lambda w: nm_mask(w, n=1, m=3)),
        ("axis", lambda w: nm_mask(w, axis=2)),
        ("lam", lambda w: sr_ste_gradient(w, w, lam=-1.0)),
        ("b2", lambda w: step_nm(0.1, b2=1.0)),
        ("window", lambda w: step_nm(0.1, window=0)),
        ("latest", lambda w: step_nm(0.1, earliest=5, latest=4)),
    ],
)
def test_what_is_out_of_range_is_named(name, call):
    with pytest.raises(ValueError, match=f"'{name}'"):
        call(np.ones((4, 4)))
