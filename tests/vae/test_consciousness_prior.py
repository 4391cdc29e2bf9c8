"""Picks, verifier and factor graph against float64 NumPy and closed forms."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.vae.consciousness_prior import (
    broadcast,
    conscious_state,
    factor_log_probs,
    remember,
    verifier_loss,
)


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def test_picks_are_the_highest_with_their_names():
    rng = np.random.default_rng(0)
    scores, noise = rng.normal(size=(2, 4, 7))
    values = rng.normal(size=(4, 7, 2))
    names, picked = conscious_state(scores, values, noise, k=3)
    order = np.argsort(-(scores + noise), axis=-1)[:, :3]
    assert_array_equal(names, np.eye(7)[order])
    assert_allclose(picked, np.take_along_axis(values, order[..., None], 1), rtol=1e-6)
    sparse = np.zeros_like(values)
    for b, j in itertools.product(range(4), range(3)):
        sparse[b, order[b, j]] = values[b, order[b, j]]
    assert_allclose(broadcast(names, picked), sparse, rtol=1e-6)


def test_gumbel_noise_draws_without_replacement():
    scores = np.array([0.0, 1.0, -0.5])
    n = 20_000
    noise = jax.random.gumbel(jax.random.key(0), (n, 3))
    tiled = np.broadcast_to(scores, (n, 3)).astype(np.float32)
    names = conscious_state(tiled, jnp.zeros((n, 3, 1)), noise, k=2).names
    picks = np.asarray(names).argmax(axis=-1)
    p = softmax(scores)
    for i, j in itertools.permutations(range(3), 2):
        expected = p[i] * p[j] / (1.0 - p[i])
        found = np.mean((picks[:, 0] == i) & (picks[:, 1] == j))
        assert abs(found - expected) < 4.0 * (expected / n) ** 0.5


def test_names_learn_straight_through_what_earlier_picks_left():
    rng = np.random.default_rng(1)
    scores, noise, weights = rng.normal(size=(3, 5))
    values, temperature = rng.normal(size=(5, 1)), 0.7

    def total(scores: Any) -> Any:
        names, picked = conscious_state(
            scores, values, noise, k=2, temperature=temperature
        )
        return (names[1] * weights).sum() + picked[0, 0]

    # By hand: of a softmax p the derivative of p @ g is p * (g - p @ g).
    expected = np.zeros(5)
    left = scores + noise
    for g in (values[:, 0], weights):
        p = softmax(left / temperature)
        expected += p * (g - p @ g) / temperature
        left = np.where(left == left.max(), -np.inf, left)
    assert_allclose(jax.grad(total)(jnp.asarray(scores)), expected, rtol=1e-4)


def test_the_loss_is_its_formula():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(4, 3, 5))
    state = softmax(rng.normal(size=(4, 3, 5)))
    asked = (rng.random((4, 3)) < 0.5).astype(np.float32)
    per_example = np.zeros(4)
    for b, n in itertools.product(range(4), range(3)):
        q = state[:, n].mean(axis=0)
        nll = -(state[b, n] * np.log(softmax(logits[b, n]))).sum()
        per_example[b] += asked[b, n] * (nll + 0.6 * (q * np.log(q)).sum())
    loss, aux = verifier_loss(logits, state, asked, entropy_weight=0.6)
    assert_allclose(aux["per_example"], per_example, rtol=1e-5)
    assert_allclose(loss, per_example.mean(), rtol=1e-5)


def test_with_the_true_predictions_the_loss_is_minus_mutual_information():
    joint = np.array([[4, 1, 1], [0, 2, 4]]) / 12.0  # of a thought and an element
    counts = (12 * joint).astype(int)
    pairs = [p for p in np.ndindex(2, 3) for _ in range(counts[p])]
    thought, element = np.array(pairs).T
    conditional = joint / joint.sum(axis=1, keepdims=True)
    logits = np.log(np.maximum(conditional, 1e-9))[thought][:, None]
    loss = verifier_loss(logits, np.eye(3)[element][:, None], np.ones((12, 1)))[0]
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
    information = sum(p * np.log(p / q) for p, q in zip(
        joint[joint > 0], independent[joint > 0], strict=True))  # fmt: skip
    assert_allclose(loss, -information, rtol=1e-5)


def test_elements_that_never_change_are_no_longer_the_best_picks():
    """Two elements: a constant one, and a fair bit that is known at 90%."""
    bit = np.arange(20) % 2
    state = np.stack([np.tile([1.0, 0.0], (20, 1)), np.eye(2)[bit]], axis=1)
    guess = np.where(np.arange(20) < 18, bit, 1 - bit)
    known = np.log(np.where(np.eye(2)[guess] == 1, 0.9, 0.1))
    logits = np.stack([np.tile([10.0, -10.0], (20, 1)), known], axis=1)

    def losses(entropy_weight: float) -> Any:
        return [
            float(verifier_loss(logits, state, np.tile(row, (20, 1)),
                                entropy_weight=entropy_weight)[0])
            for row in np.eye(2)
        ]  # fmt: skip

    constant, informative = losses(1.0)
    assert informative < constant - 0.3
    constant, informative = losses(0.0)
    assert constant < informative - 0.3


def test_a_learned_state_is_kept_from_becoming_constant():
    state = jnp.array([[[0.6, 0.4]], [[0.4, 0.6]]])
    logits = jnp.log(state)

    def slope(entropy_weight: float) -> Any:
        """Of the loss, as all states move towards the first value."""

        def loss(shift: Any) -> Any:
            moved = state + shift * jnp.array([1.0, -1.0])[None, None]
            ones = jnp.ones((2, 1))
            return verifier_loss(logits, moved, ones, entropy_weight=entropy_weight)[0]

        return jax.grad(loss)(0.1)

    assert slope(0.0) < 1e-6 and slope(1.0) > 0.1


def test_factors_see_their_two_neighbours_alone():
    rng = np.random.default_rng(3)
    state = rng.integers(0, 3, (6, 4))
    neighbours = np.array([[1, 2], [0, 3], [3, 1], [0, 2]])
    tables = rng.normal(size=(4, 3, 3, 3))
    found = np.asarray(factor_log_probs(state, neighbours, tables))
    for b, n in np.ndindex(6, 4):
        a, c = state[b, neighbours[n]]
        assert_allclose(found[b, n], np.log(softmax(tables[n, a, c])), rtol=1e-4)
    other = state.copy()
    other[:, 0] = (other[:, 0] + 1) % 3
    changed = np.asarray(factor_log_probs(other, neighbours, tables)) != found
    assert_array_equal(changed.any(axis=(0, 2)), (neighbours == 0).any(axis=1))


def test_memory_holds_the_last_states_in_order():
    states = np.arange(12.0).reshape(4, 1, 3)  # of four steps, one pick each
    memory = jnp.zeros((2, 1, 3))
    for state in states:
        memory = remember(memory, state)
    assert_array_equal(memory, states[:1:-1])


def test_bad_numbers_are_named():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="'k' is 4"):
        conscious_state(x, x[..., None], x, k=4)
    with pytest.raises(ValueError, match="'temperature' is 0.0"):
        conscious_state(x, x[..., None], x, k=1, temperature=0.0)
    with pytest.raises(ValueError, match="'entropy_weight' is -1.0"):
        verifier_loss(x[..., None], x[..., None], x, entropy_weight=-1.0)
    with pytest.raises(TypeError, match="'noise'"):
        conscious_state(x, x[..., None], x[0], k=1)
