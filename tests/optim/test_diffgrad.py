"""Steps against the paper in float64, and the bounds of the friction."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxzoo.optim import diffgrad as module

diffgrad: Any = module.diffgrad
scale_by_diffgrad: Any = module.scale_by_diffgrad

FRICTIONS = {
    "absolute": lambda d: 1 / (1 + np.exp(-np.abs(d))),
    "signed": lambda d: 1 / (1 + np.exp(-d)),
    "unclipped": np.abs,
}


def gradients(steps=5, scale=1.0):
    return scale * np.random.default_rng(0).normal(size=(steps, 3, 4))


def of_the_paper(p, grads, *, lr, friction, decay):
    b1, b2, eps = 0.8, 0.9, 1e-8
    m = v = last = np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - lr * (FRICTIONS[friction](last - g) * step + decay * p)
        last = g
    return p


def follow(optimizer: Any, p, grads) -> Any:
    p, update = jnp.asarray(p, jnp.float32), jax.jit(optimizer.update)
    state = optimizer.init(p)
    for g in jnp.asarray(grads, jnp.float32):
        updates, state = update(g, state, p)
        p = optax.apply_updates(p, updates)
    return p


@pytest.mark.parametrize("friction", FRICTIONS)
def test_five_steps_are_the_papers(friction):
    start, grads = np.random.default_rng(1).normal(size=(3, 4)), gradients()
    expected = of_the_paper(start, grads, lr=0.1, friction=friction, decay=0.2)
    optimizer = diffgrad(0.1, b1=0.8, b2=0.9, friction=friction, weight_decay=0.2)
    assert_allclose(follow(optimizer, start, grads), expected, rtol=2e-6, atol=2e-6)
    adam = optax.adamw(0.1, 0.8, 0.9, weight_decay=0.2)
    assert np.abs(follow(adam, start, grads) - expected).max() > 0.01


def test_a_constant_gradient_gives_half_of_adams_step():
    g = jnp.array([1e-3, -2.0, 300.0])
    ours, adam = scale_by_diffgrad(), optax.scale_by_adam()
    state, of_adam = ours.init(g), adam.init(g)
    for step in range(4):
        updates, state = ours.update(g, state)
        plain, of_adam = adam.update(g, of_adam)
        if step:  # before the first, the gradient counts as 0
            assert np.array_equal(updates, 0.5 * jnp.asarray(plain))
    assert_allclose(state.previous, g)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e4])
def test_the_friction_lies_between_a_half_and_one(scale):
    ours, adam = scale_by_diffgrad(), optax.scale_by_adam()
    grads = jnp.asarray(gradients(4, scale), jnp.float32)
    state, of_adam = ours.init(grads[0]), adam.init(grads[0])
    for g in grads:
        updates, state = ours.update(g, state)
        plain, of_adam = adam.update(g, of_adam)
        size, most = np.abs(updates), np.abs(jnp.asarray(plain))
        assert np.all(size >= 0.5 * most) and np.all(size <= most)


def test_a_step_that_grows_and_one_that_falls_have_one_friction_unless_signed():
    start = jnp.zeros(2)
    for friction, same in (("absolute", True), ("signed", False)):
        direction = scale_by_diffgrad(b1=0.0, b2=0.0, friction=friction)
        _, state = direction.update(jnp.array([2.0, 2.0]), direction.init(start))
        updates, _ = direction.update(jnp.array([1.0, 3.0]), state)
        assert bool(jnp.allclose(updates[0], updates[1])) is same


def test_bfloat16_gradients_keep_float32_state():
    g = jnp.ones(3, jnp.bfloat16)
    optimizer = diffgrad(0.1)
    updates, state = optimizer.update(g, optimizer.init(g))
    assert updates.dtype == jnp.bfloat16
    floats = [x for x in jax.tree.leaves(state) if x.ndim]
    assert floats and all(x.dtype == jnp.float32 for x in floats)


@pytest.mark.parametrize(
    "name, value", [("b1", 1.0), ("b2", -0.1), ("eps", -1.0), ("friction", "none")]
)
def test_what_is_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"'{name}'"):
        diffgrad(0.1, **{name: value})
