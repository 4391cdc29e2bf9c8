"""The nearest of 256 values, exactly; bitsandbytes' codes; states of any optimizer."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.optim.blockwise_8bit_optim import (
    Quantized,
    StableEmbedding,
    adam8bit,
    apply_updates_stochastic,
    blockwise_8bit,
    dequantize_blockwise,
    dynamic_map,
    momentum8bit,
    quantize_blockwise,
)
from jaxzoo.training.checkpoint import Checkpoints

GOLDEN = Path(__file__).parents[1] / "golden" / "blockwise_8bit_optim.npz"
quantize = jax.jit(quantize_blockwise, static_argnames=("signed", "block_size"))
dequantize = jax.jit(dequantize_blockwise, static_argnames=("signed", "block_size"))
apply_at_random = jax.jit(apply_updates_stochastic)
maps = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@functools.cache
def golden(name, signed):
    with np.load(GOLDEN) as stored:
        return stored[f"{name}_{'signed' if signed else 'unsigned'}"]


def nearest(unit, signed):
    """Codes by the paper's definition, in float64; the smaller of two as near."""
    values = dynamic_map(signed=signed).astype(np.float64)
    distance = np.abs(unit.astype(np.float64)[..., None] - values)
    return np.argmin(distance, axis=-1)


def rounded(x, signed, block):
    """There and back in NumPy, of an array whose last axis is a multiple of a block."""
    blocks = x.reshape(-1, block).astype(np.float32)
    absmax = np.abs(blocks).max(1, keepdims=True)
    unit = blocks / np.where(absmax > 0, absmax, 1)
    codes = nearest(unit, signed)
    if not signed:
        codes = np.maximum(codes, blocks > 0)  # what is not 0 is not stored as 0
    values = dynamic_map(signed=signed).astype(np.float64)[codes]
    return (values * absmax).reshape(x.shape)


@maps
def test_the_map_is_the_papers_and_bitsandbytes(signed):
    values = dynamic_map(signed=signed)
    assert_array_equal(values, golden("map", signed))
    for decade in range(7):
        high = 10.0 ** (decade - 6)
        some = values[(values > high / 10) & (values < high)]
        count = 2**decade * (1 if signed else 2)
        assert_allclose(
            some, high * (0.1 + 0.9 * (np.arange(count) + 0.5) / count), rtol=2e-7
        )
    assert {0.0, 1.0} < set(values.tolist()) and len(set(values)) == 256


@maps
def test_codes_and_scales_are_those_of_bitsandbytes(signed):
    codes, absmax = quantize(golden("x", signed), signed=signed)
    assert_array_equal(codes, golden("codes", signed))
    assert_array_equal(absmax, golden("absmax", signed))


@maps
def test_no_number_gets_any_but_the_nearest_code(signed):
    """Midpoints of the map and the floats next to them among others."""
    values = dynamic_map(signed=signed).astype(np.float64)
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    some = np.exp(rng.uniform(-20, 0, 4000)) * rng.choice([-1, 1], 4000)
    unit = np.concatenate(
        [
            middle,
            np.nextafter(middle, np.float32(2)),
            np.nextafter(middle, np.float32(-2)),
            some.astype(np.float32),
            np.array([1, -1, 0.0, -0.0, 1e-38, 1e-45], np.float32),
        ]
    )
    if not signed:
        unit = np.abs(unit)
    ones = np.ones((len(unit), 1), np.float32)
    x = np.concatenate([ones, unit[:, None]], axis=1)  # so that the scale is 1
    codes, absmax = quantize(x, signed=signed, block_size=2)
    assert_array_equal(absmax, ones)
    assert_array_equal(codes[:, 1], nearest(unit, signed))


def test_an_outlier_spoils_its_own_block_alone():
    x = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    spoilt = x.copy()
    spoilt[3, 300] = 1e6
    a, b = quantize(x)[0], quantize(spoilt)[0]
    changed = np.array(a != b)
    assert changed[3, 256:].sum() > 200
    changed[3, 256:] = False
    assert not changed.any()


@pytest.mark.parametrize("shape", [(3, 512), (2, 5, 256), (700,), (9, 100), (2, 3, 40)])
def test_blocks_run_over_the_flat_array_in_any_shape(shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    codes, absmax = quantize(x)
    flat_codes, flat_absmax = quantize(x.reshape(-1))
    assert codes.shape == shape and codes.dtype == jnp.uint8
    assert_array_equal(codes.reshape(-1), flat_codes)
    assert_array_equal(absmax.reshape(-1), flat_absmax)
    back = dequantize(codes, absmax)
    assert back.shape == shape
    scale = np.repeat(np.asarray(flat_absmax), 256)[: x.size].reshape(shape)
    assert np.all(np.abs(back - x) <= 0.0071 * scale)  # half a step of the top decade
    with pytest.raises(TypeError, match="'absmax'"):
        dequantize_blockwise(codes, absmax[..., :-1])


def test_what_is_not_finite_or_has_the_wrong_sign_shows():
    x = np.ones((4, 256), np.float32)
    x[0, 3], x[1, 3], x[2, 3] = np.nan, np.inf, -np.inf
    back = dequantize(*quantize(x))
    assert np.isnan(back[:3]).any(axis=1).all() and np.all(back[3] == 1)
    x = np.ones((2, 256), np.float32)
    x[0, 3], x[1, 3] = -0.5, -0.0
    codes, absmax = quantize(x, signed=False)
    back = dequantize(codes, absmax, signed=False)
    assert np.isnan(back[0]).all() and back[1, 3] == 0


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
    for where in (P("x", None), P(None, "x")):
        sharding = NamedSharding(mesh(8), where)
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
