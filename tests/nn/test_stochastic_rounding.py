"""Rounding at random: unbiased, finite, keyed, and no small update is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.nn.stochastic_rounding import apply_updates_stochastic

apply_at_random = jax.jit(apply_updates_stochastic)


def test_rounding_at_random_hits_the_neighbours_in_proportion():
    """P(up) = distance from below / gap: within 4 deviations of a binomial."""
    size = 1 << 16
    for x in (1.0 + 0.3 / 128, -3.0 - 0.75 / 64, 1e-37, 0.0):
        params = {"w": jnp.zeros(size, jnp.bfloat16)}
        updates = {"w": jnp.full(size, x, jnp.float32)}
        new = apply_at_random(jax.random.key(5), params, updates)["w"]
        got = np.asarray(new.astype(jnp.float32), np.float64)
        values = np.unique(got)
        exact = float(np.float32(x))
        assert len(values) <= 2 and new.dtype == jnp.bfloat16
        assert values[0] <= exact <= values[-1]
        gap = values[-1] - values[0]
        up = (exact - values[0]) / gap if gap else 0.0
        error = abs(got.mean() - exact)
        assert error <= 4 * gap * np.sqrt(up * (1 - up) / size)


def test_what_is_not_finite_stays_and_what_is_finite_stays_finite():
    top = float(jnp.finfo(jnp.bfloat16).max)
    total = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 3.4e38, -3.4e38, top], jnp.float32)
    zeros = jnp.zeros(6, jnp.bfloat16)
    for seed in range(8):
        key = jax.random.key(seed)
        new = apply_at_random(key, [zeros], [total])[0].astype(jnp.float32)
        assert_array_equal(new[:2], total[:2])
        assert np.isnan(new[2])
        assert_array_equal(new[3:], [top, -top, top])


def test_rounding_is_keyed_and_the_same_on_every_mesh():
    key = jax.random.key(1)
    params = {"a": jnp.ones((8, 64), jnp.bfloat16), "b": jnp.ones((8, 64))}
    params["c"] = params["a"]
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), params)
    whole = apply_at_random(key, params, updates)
    other = apply_at_random(jax.random.key(2), params, updates)
    assert (whole["a"] != other["a"]).any() and (whole["a"] != whole["c"]).any()
    assert_allclose(whole["b"], 1.001, rtol=1e-6)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    for where in (P("x", None), P(None, "x")):
        sharding = NamedSharding(mesh, where)
        spread = jax.device_put((params, updates), sharding)
        got = apply_at_random(key, *spread)
        jax.tree.map(assert_array_equal, got, whole)


def test_small_updates_of_bfloat16_parameters_are_not_lost():
    """1,000 steps of 1e-4 from 1: nearest rounding never leaves 1."""
    start = jnp.ones(512, jnp.bfloat16)
    step = jnp.full(512, 1e-4, jnp.float32)

    def body(p, key):
        return apply_updates_stochastic(key, p, step), None

    p, _ = jax.lax.scan(body, start, jax.random.split(jax.random.key(0), 1000))
    assert_allclose(p.astype(jnp.float32).mean(), 1.1, atol=0.005)
    assert np.all(optax.apply_updates(start, step) == start)
