"""States of any optimizer in 8 bits, by the paper in float64 and over meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.nn.blockwise_quantization import dynamic_map
from jaxzoo.optim.blockwise_8bit_optim import (
    Quantized,
    StableEmbedding,
    adam8bit,
    blockwise_8bit,
    momentum8bit,
)
from jaxzoo.training.checkpoint import Checkpoints


def rounded(x, signed, block):
    """There and back in NumPy, of an array whose last axis is a multiple of a block."""
    blocks = x.reshape(-1, block).astype(np.float32)
    absmax = np.abs(blocks).max(1, keepdims=True)
    unit = blocks / np.where(absmax > 0, absmax, 1)
    values = dynamic_map(signed=signed).astype(np.float64)
    codes = np.argmin(np.abs(unit.astype(np.float64)[..., None] - values), axis=-1)
    if not signed:
        codes = np.maximum(codes, blocks > 0)  # what is not 0 is not stored as 0
    return (values[codes] * absmax).reshape(x.shape)


def test_adam_by_the_paper_in_float64():
    """Five steps of Algorithm 1: read the states, update, write them back."""
    rng = np.random.default_rng(2)
    start = rng.normal(size=(4, 16))
    mu = nu = np.zeros((4, 16))
    optimizer = blockwise_8bit(optax.scale_by_adam(b2=0.95), block_size=8, min_size=16)
    state = optimizer.init(jnp.asarray(start, jnp.float32))
    update = jax.jit(optimizer.update)
    for t in range(1, 6):
        g = (rng.normal(size=(4, 16)) * np.exp(rng.normal(size=(4, 16)))).astype("f4")
        mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * np.square(g, dtype="f8")
        expected = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - 0.95**t)) + 1e-8)
        mu, nu = rounded(mu, True, 8), rounded(nu, False, 8)
        direction, state = update(jnp.asarray(g), state)
        assert_allclose(direction, expected, rtol=3e-6, atol=1e-6)
        assert isinstance(state.inner.nu, Quantized)


def test_a_gradient_of_zero_after_a_small_one_takes_no_huge_step():
    """The mean is kept, so the mean square must not be lost beside its larger ones."""
    g = jnp.ones((16, 256)).at[:, 1:].set(1e-5)
    optimizer = blockwise_8bit(optax.scale_by_adam())
    _, state = optimizer.update(g, optimizer.init(g))
    updates: Any = optimizer.update(jnp.zeros_like(g), state)[0]
    assert np.all(updates > 0) and np.max(updates) < 1.0


def test_momentum_by_the_paper_in_float64():
    rng = np.random.default_rng(3)
    optimizer, m = momentum8bit(0.1, momentum=0.9), np.zeros((16, 256))
    params = jnp.zeros((16, 256))
    state: Any = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(3):
        g = rng.normal(size=m.shape).astype("f4")
        m = 0.9 * m + g
        updates, state = update(jnp.asarray(g), state, params)
        close = np.isclose(updates, -0.1 * m, rtol=1e-5, atol=1e-6)
        assert close.mean() > 0.999  # a number at a midpoint may fall on either side
        m = rounded(m, True, 256)


def test_small_arrays_are_left_to_optax_bit_for_bit():
    params = {"w": jnp.ones((16, 8)), "b": jnp.ones(8)}
    ours, theirs = adam8bit(0.1), optax.adam(0.1)
    states: Any = [ours.init(params), theirs.init(params)]
    for step in range(3):
        grads = jax.tree.map(lambda x, step=step: jnp.cos(x * (step + 1)), params)
        a, states[0] = ours.update(grads, states[0], params)
        b, states[1] = theirs.update(grads, states[1], params)
        jax.tree.map(assert_array_equal, a, b)


@pytest.mark.parametrize("make, whole", [(adam8bit, 8.0), (momentum8bit, 4.0)])
def test_the_state_has_a_quarter_of_the_bytes(make, whole):
    params = {"w": jnp.zeros((512, 512), jnp.bfloat16), "b": jnp.zeros(512)}
    state = jax.eval_shape(make(0.1).init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert size <= 0.27 * whole * (512 * 512 + 512)


def test_a_field_with_signs_among_the_non_negative_ones_is_not_passed_over():
    grads = [jax.random.normal(jax.random.key(i), (16, 256)) for i in range(3)]

    def last(**knobs) -> Any:
        optimizer = blockwise_8bit(optax.scale_by_adan(), **knobs)
        state, updates = optimizer.init(grads[0]), None
        update = jax.jit(optimizer.update)
        for g in grads:
            updates, state = update(g, state)
        return updates

    assert np.isnan(last()).any()
    assert np.isfinite(last(non_negative=("n",))).all()
    # A parameter of that name is none: its mean has signs, and takes the signed map.
    adam = blockwise_8bit(optax.scale_by_adam())
    tree = {"v": grads[0]}
    state: Any = jax.jit(adam.update)(tree, adam.init(tree))[1]
    assert np.isfinite(state.inner.mu["v"].absmax).all()


def mesh(*shape):
    axes = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=axes)


def test_states_shard_like_parameters_without_communication_and_are_restored(tmp_path):
    params = jax.random.normal(jax.random.key(0), (8, 1024))
    optimizer = adam8bit(0.1)

    def after(params, where):
        place = (lambda x: jax.device_put(x, where)) if where else jnp.asarray
        state = jax.tree.map(
            lambda x: place(x) if x.ndim == 2 else x, optimizer.init(params)
        )
        grads = place(jnp.sin(3.0 * params))
        step = jax.jit(optimizer.update)
        text = step.lower(grads, state, place(params)).compile().as_text() or ""
        for _ in range(3):
            updates, state = step(grads, state, place(params))
            params = optax.apply_updates(params, updates)
        return jax.block_until_ready((params, state)), text

    (whole, expected), _ = after(params, None)
    for where in (
        NamedSharding(mesh(8), P("x", None)),
        NamedSharding(mesh(2, 4), P("x", "y")),
    ):
        (got, state), text = after(params, where)
        assert_allclose(got, whole, atol=1e-6)
        words = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
        assert not any(word in text for word in words)
        mu = state[0].inner.mu
        for leaf in mu:
            assert leaf.sharding.is_equivalent_to(where, 2)
        assert (mu.codes != expected[0].inner.mu.codes).mean() < 1e-3
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
        checkpoints.wait()
        restored = checkpoints.restore(3, jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        assert_array_equal(a, b)


def test_the_stable_embedding_has_rows_of_mean_0_and_deviation_1():
    model = StableEmbedding(50, 32)
    params: Any = model.init(jax.random.key(0), jnp.arange(3))
    table = params["params"]["Embed_0"]["embedding"]
    assert table.shape == (50, 32)
    assert np.abs(table).max() <= np.sqrt(6 / (50 + 32))  # Xavier's bound
    x: Any = model.apply(params, jnp.arange(50).reshape(5, 10))
    assert x.shape == (5, 10, 32)
    assert_allclose(x.mean(-1), 0, atol=1e-5)
    assert_allclose(x.std(-1), 1, atol=1e-3)
