"""Ghost batches one by one in float64; Flax's batch norm; noise with the covariance."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxzoo.optim.ghost_batch_norm import (
    GhostBatchNorm,
    ghost_batch_norm,
    large_batch_sgd,
    noisy_mean,
)

RNG = np.random.default_rng(0)
IMAGES = (3.0 * RNG.normal(size=(12, 4, 4, 5)) + RNG.normal(size=5)).astype(np.float32)
ROWS = (2.0 * RNG.normal(size=(12, 5)) + 1.0).astype(np.float32)


def of_the_paper(x, mean, var, size, momentum=0.9, eps=1e-5):
    """Algorithm 1 in float64: small batches in sequence, as on a small machine."""
    x, outputs = x.astype(np.float64), []
    axes = tuple(range(x.ndim - 1))
    for start in range(0, len(x), size):
        part = x[start : start + size]
        m, v = part.mean(axes), part.var(axes)
        outputs.append((part - m) / np.sqrt(v + eps))
        mean, var = momentum * mean + (1 - momentum) * m, momentum * var + 0.1 * v
    return np.concatenate(outputs), mean, var


@pytest.mark.parametrize("x", [ROWS, IMAGES], ids=["rows", "images"])
@pytest.mark.parametrize("size", [1, 3, 4, 12])
def test_ghost_batches_in_sequence(x, size):
    start = np.linspace(-1, 1, 5), np.linspace(0.5, 2, 5)
    y, mean, var = of_the_paper(x, *start, size)
    got, aux = ghost_batch_norm(
        x, *(a.astype(np.float32) for a in start), ghost_size=size
    )
    assert_allclose(got, y, rtol=1e-4, atol=1e-4)
    assert_allclose(aux["mean"], mean, rtol=1e-5, atol=1e-6)
    assert_allclose(aux["var"], var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("x", [ROWS, IMAGES], ids=["rows", "images"])
def test_a_ghost_as_large_as_the_batch_is_flaxs_batch_norm(x):
    ours = GhostBatchNorm(ghost_size=12)
    theirs = nn.BatchNorm(use_running_average=False, momentum=0.9)
    variables: Any = theirs.init(jax.random.key(0), x)
    own = ours.init(jax.random.key(0), x)
    assert jax.tree.structure(variables) == jax.tree.structure(own)
    variables["params"]["scale"] += 0.5
    outputs = [m.apply(variables, x, mutable=["batch_stats"]) for m in (ours, theirs)]
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), *outputs)

    def loss(model, x):
        y, _ = model.apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(jnp.cos(y))

    gradients = [jax.grad(loss, argnums=1)(m, x) for m in (ours, theirs)]
    assert_allclose(*gradients, atol=1e-5)
    variables = {"params": variables["params"], **outputs[0][1]}
    models = (
        GhostBatchNorm(ghost_size=5, use_running_average=True),
        nn.BatchNorm(use_running_average=True),
    )
    evaluated: Any = [model.apply(variables, x) for model in models]
    assert_allclose(*evaluated, rtol=1e-4, atol=1e-5)


def test_other_ghost_batches_do_not_matter():
    changed = ROWS.copy()
    changed[4:] *= 100
    zeros, ones = np.zeros(5, np.float32), np.ones(5, np.float32)
    a, b = (
        ghost_batch_norm(x, zeros, ones, ghost_size=4)[0][:4] for x in (ROWS, changed)
    )
    assert_allclose(a, b, atol=1e-5)
    whole = ghost_batch_norm(changed, zeros, ones, ghost_size=12)[0][:4]
    assert np.abs(whole - a).max() > 0.5


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="'ghost_size' is 5"):
        ghost_batch_norm(ROWS, ROWS[0], ROWS[0], ghost_size=5)
    model = GhostBatchNorm(ghost_size=4, dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), ROWS[:1])  # any batch will do to start
    y: Any = model.apply(variables, ROWS, mutable=["batch_stats"])[0]
    assert y.dtype == jnp.bfloat16


def test_large_batch_sgd_by_the_paper():
    """Clipped, then momentum, then the small batch's rate times sqrt(B / b)."""
    rng, p, m = np.random.default_rng(1), np.zeros(6), np.zeros(6)
    optimizer = large_batch_sgd(0.1, batch_size=1024, base_size=64, max_norm=2.0)
    later = large_batch_sgd(lambda t: 0.1, batch_size=1024, base_size=64, max_norm=2.0)
    q: Any = jnp.zeros(6)
    updates: Any
    same: Any
    states: Any = [optimizer.init(q), later.init(q)]
    for _ in range(5):
        g = rng.normal(size=6) * rng.choice([0.1, 3.0])
        m = 0.9 * m + g * min(1.0, 2.0 / np.linalg.norm(g))
        p = p - 0.1 * 4.0 * m
        grads = jnp.asarray(g, jnp.float32)
        updates, states[0] = optimizer.update(grads, states[0], q)
        same, states[1] = later.update(grads, states[1], q)
        assert_allclose(updates, same, rtol=1e-6)
        q = optax.apply_updates(q, updates)
        assert_allclose(q, p, rtol=1e-5, atol=1e-6)


def test_noise_gives_a_large_batch_the_covariance_of_a_small_one():
    """64 gradients: the covariance of their noisy mean, by the formula."""
    each = jnp.asarray(RNG.normal(size=(64, 3)), jnp.float32)  # of zero mean, nearly
    std = float(np.sqrt(64 / 8 - 1))

    def gradient(key):
        def loss(w):
            return noisy_mean(key, each @ w, std=std)[0]

        return jax.grad(loss)(jnp.zeros(3))

    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(gradient))(keys), np.float64)
    g = np.asarray(each, np.float64)
    assert_allclose(drawn.mean(0), g.mean(0), atol=0.02)
    expected = std**2 * g.T @ g / 64**2
    assert_allclose(np.cov(drawn.T), expected, atol=0.05 * expected.max())
    # Draws of 8 of a population like these have second moments / 8: 1/8 - 1/64 of them.
    assert_allclose(expected, (1 / 8 - 1 / 64) * g.T @ g / 64, rtol=1e-6)


def test_the_noise_is_one_weight_per_example():
    losses = jnp.arange(5.0)
    loss, aux = noisy_mean(jax.random.key(1), losses, std=2.0)
    assert_allclose(loss, jnp.mean(aux["weight"] * losses), rtol=1e-6)
    assert len(set(aux["weight"].tolist())) == 5
    assert_allclose(noisy_mean(jax.random.key(1), losses, std=0.0)[0], 2.0)
