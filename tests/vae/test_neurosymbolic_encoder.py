"""Programs, codes, loss and search of neurosymbolic encoders, against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.vae.neurosymbolic_encoder import (
    expand_structure,
    neurosymbolic_loss,
    run_program,
    sample_codes,
    trajectory_features,
)

MERE_HOLE = np.array([[-1, 0], [-2, 0], [-2, 0]])


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def test_features_are_those_of_each_step():
    x = np.cumsum(np.random.default_rng(0).normal(size=(3, 7, 2)), axis=1)
    expected = np.zeros((3, 5, 5))
    for b in range(3):
        for t in range(1, 6):
            before, after = (complex(*(x[b, s + 1] - x[b, s])) for s in (t - 1, t))
            turn = abs(np.angle(after / before))
            far = np.linalg.norm(x[b, t] - x[b, 0])
            expected[b, t - 1] = *x[b, t], abs(after), far, turn
    features = trajectory_features(x)
    assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    # Speed, distance and turn do not depend on the frame.
    turned = np.stack([3.0 - x[..., 1], x[..., 0]], axis=-1)
    assert_allclose(
        trajectory_features(turned)[..., 2:], features[..., 2:], rtol=1e-4, atol=1e-5
    )


def program(structure, features, fillers, weights, biases, window):
    """One trajectory and one leaf at a time."""
    logits = []
    for values, filler in zip(features, fillers, strict=True):
        leaves = []
        for i, (feature, fold) in enumerate(structure):
            if feature == -1:
                leaves.append(filler[i])
                continue
            one = values[:, feature]
            moving = np.convolve(one, np.ones(window) / window, "valid")
            folded = (one.mean(), moving[-1], moving.max())[fold]
            leaves.append(weights[i] * folded + biases[i])
        if structure[1][0] != -2:
            gate = sigmoid(leaves[0])
            leaves = [gate * leaves[1] + (1.0 - gate) * leaves[2]]
        logits.append(leaves[0])
    return np.array(logits)


def test_programs_are_run_as_they_are_written():
    rng = np.random.default_rng(1)
    arrays: Any = rng.normal(size=(6, 8, 4)), rng.normal(size=(6, 3))
    arrays += tuple(rng.normal(size=(2, 3)))
    structures = np.array(
        [
            [[2, 0], [-2, 0], [-2, 0]], [[3, 1], [-2, 0], [-2, 0]], MERE_HOLE,
            [[1, 2], [0, 0], [3, 1]], [[1, 2], [-1, 0], [2, 2]], [[-1, 0]] * 3,
        ]
    )  # fmt: skip
    call: Any = run_program
    run = jax.jit(jax.vmap(lambda s: call(s, *arrays, window=3)))
    for found, structure in zip(run(structures), structures, strict=True):
        assert_allclose(found, program(structure, *arrays, window=3), rtol=1e-4)


def test_a_sharp_if_is_a_choice():
    rng = np.random.default_rng(2)
    features, fillers = rng.normal(size=(50, 8, 2)), np.zeros((50, 3))
    weights, biases = np.array([1.0, 0.0, 0.0]), np.array([0.0, 9.0, -9.0])
    structure = np.array([[0, 0], [1, 0], [1, 0]])
    logits = run_program(structure, features, fillers, 1e4 * weights, biases)
    holds = features[..., 0].mean(axis=1) > 0.0
    assert np.mean((np.asarray(logits) > 0.0) == holds) > 0.97


def test_codes_have_the_odds_of_the_program_and_the_gradient_of_the_smooth_draw():
    logits = jnp.broadcast_to(jnp.array([0.0, 1.5]), (20_000, 2))
    codes, pullback = jax.vjp(lambda a: sample_codes(jax.random.key(0), a), logits)
    assert set(np.unique(codes)) == {0.0, 1.0}
    assert_allclose(np.mean(codes, axis=0), sigmoid(np.array([0.0, 1.5])), atol=0.015)
    gradient = np.asarray(pullback(jnp.ones_like(codes))[0]).mean(axis=0)
    e = np.random.default_rng(0).logistic(size=(400_000, 1))
    soft = sigmoid((e + np.array([0.0, 1.5])) / 0.5)
    assert_allclose(gradient, np.mean(soft * (1.0 - soft) / 0.5, axis=0), rtol=0.05)


def loss_inputs() -> Any:
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 2, size=(6, 2)).astype(float)
    logits, mean, log_std, read = rng.normal(size=(4, 6, 2))
    return rng.normal(size=6), 2.0 * logits, mean, 0.5 * log_std, read, codes


def test_the_loss_is_that_of_the_released_code():
    likelihood, logits, mean, log_std, read, codes = inputs = loss_inputs()
    p, a = sigmoid(logits), sigmoid(read)
    kl = np.mean(p * np.log(2 * p) + (1 - p) * np.log(2 - 2 * p), axis=0)
    each = 0.5 * (np.exp(2 * log_std) + mean**2 - 1.0) - log_std
    cross = -np.mean(codes * np.log(a) + (1 - codes) * np.log(1 - a), axis=0)
    knobs = {"capacity": 0.3, "capacity_weight": 7.0, "adversary_weight": 2.0}
    loss, aux = neurosymbolic_loss(*inputs, **knobs, free_bits=0.4)
    expected = -likelihood.mean() + np.maximum(each, 0.4).sum(axis=1).mean()
    expected += 7.0 * np.abs(0.3 - kl).sum() - 2.0 * cross.sum()
    assert_allclose(loss, expected, rtol=1e-5)
    assert_allclose(aux["program_kl"], kl, rtol=1e-4)
    assert_allclose(aux["adversary"], cross, rtol=1e-5)
    elbo = likelihood.mean() - each.sum(axis=1).mean() - kl.sum()
    assert_allclose(aux["elbo"], elbo, rtol=1e-5)


def test_programs_are_sure_as_far_as_the_capacity():
    """By descent on the logits, of which nothing else in the loss depends."""
    likelihood, logits, *rest = loss_inputs()

    @jax.jit
    def descend(logits, capacity):
        def loss(logits):
            return neurosymbolic_loss(likelihood, logits, *rest, capacity=capacity)[0]

        def step(logits, _):
            return logits - 0.02 * jax.grad(loss)(logits), None

        return neurosymbolic_loss(
            likelihood, jax.lax.scan(step, logits, None, 2000)[0], *rest
        )[1]["program_kl"]

    for capacity in (0.1, 0.5):
        found = descend(jnp.asarray(0.5 * logits, jnp.float32), capacity)
        assert_allclose(found, capacity, atol=0.03)


def test_expansion_reaches_every_program_once():
    expand = jax.jit(lambda s: expand_structure(s, num_features=2))
    frontier, programs = [MERE_HOLE], []
    while frontier:
        children, aux = jax.device_get(expand(frontier.pop()))
        for i in np.flatnonzero(aux["valid"]):
            (programs if aux["complete"][i] else frontier).append(children[i])
            leaves = int((children[i][:, 0] >= 0).sum())
            assert aux["cost"][i] == leaves + (children[i][1, 0] != -2)
    assert len(programs) == 6 + 6**3
    assert len({p.tobytes() for p in programs}) == len(programs)
    assert not expand(programs[0])[1]["valid"].any()


def test_bad_numbers_are_named():
    x: Any = np.zeros((2, 2, 2))
    call: Any = neurosymbolic_loss
    inputs = loss_inputs()
    with pytest.raises(ValueError, match=r"'x.shape\[1\]' is 2"):
        trajectory_features(x)
    with pytest.raises(ValueError, match="'window' is 3"):
        run_program(MERE_HOLE, x, np.zeros((2, 3)), np.ones(3), np.ones(3), window=3)
    with pytest.raises(ValueError, match="'capacity' is 0.7"):
        neurosymbolic_loss(*inputs, capacity=0.7)
    with pytest.raises(ValueError, match="'temperature' is 0.0"):
        sample_codes(jax.random.key(0), jnp.zeros((2, 1)), temperature=0.0)
    with pytest.raises(TypeError, match="'codes'"):
        call(*inputs[:5], inputs[5][:, :1])
