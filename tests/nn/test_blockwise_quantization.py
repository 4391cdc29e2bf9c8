"""The nearest of 256 values, exactly; bitsandbytes' codes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.nn.blockwise_quantization import (
    dequantize_blockwise,
    dynamic_map,
    quantize_blockwise,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "blockwise_8bit_optim.npz"
quantize = jax.jit(quantize_blockwise, static_argnames=("signed", "block_size"))
dequantize = jax.jit(dequantize_blockwise, static_argnames=("signed", "block_size"))
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
