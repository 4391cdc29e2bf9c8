"""The ring is exact whatever a device does with its part of the result."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from jaxzoo.core.collectives import Side, pair_sum
from jaxzoo.nn.pair_log_sums import pair_log_sums

ROWS: Any = P("d")
A, B = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)


def products(rows, columns):
    return rows.features @ columns.features.T


def squares(rows, columns):
    tile = jnp.square(products(rows, columns))
    # A tag that stays with its row: pairs of equal number do not count.
    own = rows.tags[:, None] == columns.tags[None]
    return jnp.sum(jnp.where(own, 0.0, tile))


def over(devices, function, check_vma=True):
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    knobs = {"mesh": mesh, "in_specs": (ROWS, ROWS), "check_vma": check_vma}
    return jax.jit(jax.shard_map(function, out_specs=ROWS, **knobs))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("check_vma", [True, False])
def test_sums_that_devices_weigh_differently(devices, chunk, check_vma):
    """Each device gives another cotangent; a block meets all of them on its way."""
    weights = jnp.cos(jnp.arange(1.0, devices + 1))

    def of_device(a, b):
        ids = jax.lax.axis_index("d") * len(a) + jnp.arange(len(a))
        sides = Side(a, ids), Side(b, ids)
        return pair_sum(squares, *sides, axis_name="d", chunk=chunk)[None]

    def split(a, b):
        return jnp.sum(weights * over(devices, of_device, check_vma)(a, b))

    def whole(a, b):
        tile = jnp.where(jnp.eye(16, dtype=bool), 0.0, jnp.square(a @ b.T))
        return jnp.sum(weights * tile.reshape(devices, -1).sum(1))

    got, expected = (jax.value_and_grad(f, (0, 1))(A, B) for f in (split, whole))
    assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-4)
    for a, b in zip(got[1], expected[1], strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("devices", [0, 1, 2, 8])
def test_log_sums_of_rows_and_of_columns(devices, chunk):
    """Against float64; 0 devices stands for a batch that is whole."""
    first, second = np.random.default_rng(1).normal(size=(2, 16))

    def of_device(a, b):
        knobs = {"axis_name": "d" if devices else None, "chunk": chunk}
        return jnp.stack(pair_log_sums(products, Side(a), Side(b), **knobs), 1)

    def total(a, b):
        sums = over(devices, of_device)(a, b) if devices else of_device(a, b)
        return jnp.sum(sums * np.stack([first, second], 1)), sums

    got, sums = jax.grad(total, (0, 1), has_aux=True)(30 * A, B)
    tile = 30 * A.astype(np.float64) @ B.T
    rows, columns = (np.logaddexp.reduce(tile, axis) for axis in (1, 0))
    assert_allclose(sums, np.stack([rows, columns], 1), rtol=1e-5, atol=1e-4)
    slope = first[:, None] * np.exp(tile - rows[:, None])
    slope += second * np.exp(tile - columns)
    for a, b in zip(got, (slope @ B, slope.T @ (30 * A)), strict=True):
        assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_bad_knobs_are_named():
    for chunk in (0, -2, 5, 32):
        with pytest.raises(ValueError, match=f"'chunk' is {chunk}, expected a divisor"):
            pair_log_sums(products, Side(A), Side(B), chunk=chunk)
    with pytest.raises(ValueError, match="'axis_name' is 'e', expected None"):
        pair_log_sums(products, Side(A), Side(B), axis_name="e")
    with pytest.raises(ValueError, match="'axis_name' is 'e', expected None"):
        pair_sum(squares, Side(A), Side(B), axis_name="e")
