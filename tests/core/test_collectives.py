"""The collectives: what they give, their gradients, and their errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.core.collectives import (
    all_gather,
    all_gather_same,
    all_to_all,
    axis_index,
    axis_size,
    per_device,
    psum,
    shift,
    varying,
)

ROWS: Any = P("d")


def over(devices, function, *arrays, out=ROWS):
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    specs = tuple(P("d") if a.ndim else P() for a in arrays)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)
    return jax.jit(mapped)(*arrays)


X = jnp.arange(16.0).reshape(8, 2)


def test_without_a_name_arrays_are_whole():
    same = (psum, all_gather, all_gather_same, all_to_all, shift, varying, per_device)
    for function in same:
        assert function(X, None) is X
    assert axis_size(None) == 1
    assert int(axis_index(None)) == 0


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_values(devices):
    parts = np.asarray(X).reshape(devices, -1, 2)
    total = over(devices, lambda x: psum(x, "d"), X, out=P())
    assert_array_equal(total, parts.sum(0))
    gathered = over(devices, lambda x: all_gather(x, "d")[None], X)
    assert_array_equal(gathered, np.stack([X] * devices))
    moved = over(devices, lambda x: shift(x, "d"), X)
    assert_array_equal(moved, np.roll(parts, -1, axis=0).reshape(8, 2))
    size = over(devices, lambda x: x * 0 + axis_size("d"), X)
    assert_array_equal(size, np.full((8, 2), devices))
    index = over(devices, lambda x: x[:, 0] * 0 + axis_index("d"), X)
    assert_array_equal(index, np.repeat(np.arange(devices), 8 // devices))


@pytest.mark.parametrize("devices", [2, 8])
def test_rows_are_exchanged_and_what_is_gathered_is_the_same_everywhere(devices):
    rows = jnp.arange(2.0 * devices * devices).reshape(devices * devices, 2)
    squares = np.asarray(rows).reshape(devices, devices, 2)
    sent = over(devices, lambda x: all_to_all(x, "d"), rows)
    assert_array_equal(sent, squares.transpose(1, 0, 2).reshape(rows.shape))
    assert_array_equal(over(devices, lambda x: all_gather_same(x, "d"), X, out=P()), X)

    def carried(x):
        start = per_device(jnp.zeros(2), "d")  # as x varies, the carry has to
        return jax.lax.scan(lambda c, row: (c + row, None), start, x)[0][None]

    total = np.asarray(X).reshape(devices, -1, 2).sum(1)
    assert_array_equal(over(devices, carried, X), total)


def test_the_axis_of_a_vmap_has_them_too():
    parts = X.reshape(4, 2, 2)

    def of_part(x):
        start = per_device(jnp.zeros(2), "d")
        return all_gather_same(x, "d"), start + psum(x[0], "d")

    gathered, total = jax.jit(jax.vmap(of_part, axis_name="d"))(parts)
    assert_array_equal(gathered, np.stack([X] * 4))
    assert_array_equal(total, np.stack([parts[:, 0].sum(0)] * 4))


@pytest.mark.parametrize("devices", [2, 8])
def test_a_ring_comes_home(devices):
    def around(x):
        def step(carry, _):
            return shift(carry, "d"), carry[0]

        return jax.lax.scan(step, x, length=devices)[0]

    assert_array_equal(over(devices, around, X), X)


@pytest.mark.parametrize("devices", [2, 8])
def test_the_gradient_of_what_is_the_same_everywhere_is_summed(devices):
    def loss(x, scale):
        return psum(jnp.sum(jnp.sin(x) * varying(scale, "d")), "d") ** 2

    def whole(x, scale):
        return jnp.sum(jnp.sin(x) * scale) ** 2

    scale = jnp.float32(0.3)
    expected = jax.grad(whole, (0, 1))(X, scale)
    inside = over(devices, jax.grad(loss, (0, 1)), X, scale, out=(P("d"), P()))
    for got, wanted in zip(inside, expected, strict=True):
        assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "function", [psum, all_gather, shift, varying], ids=lambda f: f.__name__
)
def test_an_axis_that_does_not_exist_is_named(function):
    with pytest.raises(ValueError, match="'axis_name' is 'rows', expected None"):
        function(X, "rows")
    with pytest.raises(ValueError, match="'axis_name' is 'rows'"):
        over(2, lambda x: function(x, "rows"), X)


def test_several_axes_at_once():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    axes = ("a", "b")

    def look(x):
        return shift(x, axes), psum(varying(x, axes), axes)

    mapped = jax.shard_map(look, mesh=mesh, in_specs=P(axes), out_specs=(P(axes), P()))
    moved, total = jax.jit(mapped)(X)
    assert_array_equal(moved, np.roll(np.asarray(X), -1, axis=0))
    assert_array_equal(total, np.asarray(X).sum(0, keepdims=True))
