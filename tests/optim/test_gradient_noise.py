"""The noise is Optax's, has the paper's variance, and comes after the clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.optim.gradient_noise import add_gradient_noise, noise_variance


def noises(optimizer, grads, steps):
    """The updates of some steps with the same gradients."""
    state, update, found = optimizer.init(grads), jax.jit(optimizer.update), []
    for _ in range(steps):
        updates, state = update(grads, state)
        found.append(updates)
    return found


def test_it_is_optaxs_noise_bit_for_bit():
    key = jax.random.key(3)
    grads = {"w": jnp.ones((4, 8)), "b": jnp.zeros(8)}
    ours = noises(add_gradient_noise(key, eta=0.3, gamma=0.55), grads, 4)
    theirs = noises(optax.add_noise(0.3, 0.55, key), grads, 4)
    jax.tree.map(assert_array_equal, ours, theirs)


@pytest.mark.parametrize("eta, gamma", [(0.01, 0.55), (1.0, 0.55), (0.3, 1.0)])
def test_the_variance_is_the_papers(eta, gamma):
    """200,000 draws: the standard error of a variance is 0.3 %."""
    optimizer = add_gradient_noise(jax.random.key(0), eta=eta, gamma=gamma)
    grads = jnp.full(200_000, 2.0)
    for t, updates in enumerate(noises(optimizer, grads, 4)):
        expected = eta / (1.0 + t) ** gamma
        noise = np.asarray(updates, np.float64) - 2.0
        assert_allclose(noise.var(), expected, rtol=0.015)
        assert abs(noise.mean()) < 4 * np.sqrt(expected / 200_000)
        assert_allclose(
            noise_variance(jnp.array(t), eta=eta, gamma=gamma), expected, rtol=1e-6
        )


def test_steps_entries_and_keys_have_noises_of_their_own():
    grads = {"a": jnp.zeros(4096), "b": jnp.zeros(4096)}
    first = noises(add_gradient_noise(jax.random.key(0), gamma=0.0), grads, 2)
    other = noises(add_gradient_noise(jax.random.key(1), gamma=0.0), grads, 1)
    rows = [x[k] for x in (*first, *other) for k in ("a", "b")]
    correlation = np.corrcoef(np.stack(rows)) - np.eye(len(rows))
    assert np.abs(correlation).max() < 5 / 64


def test_clipping_takes_nothing_from_the_noise():
    key = jax.random.key(2)
    grads = {"w": jnp.full((64, 64), 3.0)}  # of norm 192
    got = noises(add_gradient_noise(key, eta=1.0, max_norm=6.4), grads, 1)[0]["w"]
    assert_allclose(got.mean(), 0.1, atol=0.06)
    assert_allclose(got.var(), 1.0, rtol=0.1)
    small = {"w": jnp.full((64, 64), 0.01)}  # of norm 0.64
    clipped = noises(add_gradient_noise(key, max_norm=6.4), small, 1)[0]
    assert_array_equal(clipped["w"], noises(add_gradient_noise(key), small, 1)[0]["w"])


def test_no_noise_leaves_gradients_as_they_are():
    grads = jnp.linspace(-1.0, 1.0, 8)
    assert_array_equal(
        noises(add_gradient_noise(jax.random.key(0), eta=0.0), grads, 2)[1], grads
    )


def test_small_floats_get_the_float32_noise_rounded_once():
    grads = jnp.linspace(-1.0, 1.0, 64, dtype=jnp.bfloat16)
    optimizer = add_gradient_noise(jax.random.key(0))
    small = noises(optimizer, grads, 1)[0]
    exact = noises(optimizer, grads.astype(jnp.float32), 1)[0]
    assert small.dtype == jnp.bfloat16
    assert_array_equal(small, exact.astype(jnp.bfloat16))


def test_noise_is_the_same_on_every_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    optimizer = add_gradient_noise(jax.random.key(0), max_norm=1.0)
    grads = jnp.ones((8, 16))
    whole = noises(optimizer, grads, 2)
    for where in (P("data", None), P(None, "data")):
        spread = jax.device_put(grads, NamedSharding(mesh, where))
        for a, b in zip(noises(optimizer, spread, 2), whole, strict=True):
            assert_allclose(a, b, rtol=1e-6, atol=1e-7)


def test_seeds_under_vmap_have_keys_of_their_own():
    grads = jnp.zeros(8)

    def start(key):
        return add_gradient_noise(key).init(grads)

    keys = jax.random.split(jax.random.key(0), 3)
    update: Any = add_gradient_noise(keys[0]).update
    together = jax.vmap(lambda s: update(grads, s)[0])(jax.vmap(start)(keys))
    for key, got in zip(keys, together, strict=True):
        optimizer = add_gradient_noise(key)
        alone: Any = optimizer.update(grads, optimizer.init(grads))[0]
        assert_allclose(got, alone)


@pytest.mark.parametrize("name", ["eta", "gamma", "max_norm"])
def test_numbers_out_of_range_are_named(name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        add_gradient_noise(jax.random.key(0), **{name: -1.0})
