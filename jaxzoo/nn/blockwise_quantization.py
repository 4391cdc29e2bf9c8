"""Arrays in 8 bits: blocks of 256 numbers, each with a scale of its own.

    absmax_b = max over the block of |x|                       float32, one per block
    code_i   = argmin_c |map_c - x_i / absmax_b|               uint8
    x_i      ~ map[code_i] absmax_b

    codes, absmax = quantize_blockwise(x)
    x = dequantize_blockwise(codes, absmax)

`map` is the dynamic tree: seven decades below 1, each with twice as many equally spaced
values as the one before, and 0 and 1. An outlier spoils its own block alone.

Codes have the shape of the array, and so take its sharding. Where the last axis is a
multiple of the block, blocks lie along it and absmax `[..., n / block]` shards like the
array too; else blocks run over the flattened array, in the same order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["dequantize_blockwise", "quantize_blockwise"]

BLOCK = 256


@typed
def quantize_blockwise(
    x: Float[ArrayLike, "..."], *, signed: bool = True, block_size: int = BLOCK
) -> tuple[UInt8[Array, "..."], Float[Array, "..."]]:
    """Block by block, the nearest code of the dynamic map.

    code_i = argmin_c |map_c - x_i / absmax_b|, the smaller code of two as near

    Args:
        x: any shape.
        signed: False for numbers >= 0, which then have twice as many codes; a block
            with a negative number gets a scale of NaN.
        block_size: numbers per scale.

    Returns:
        `(codes, absmax)`: uint8 of the shape of `x`, and float32 `[..., n / block]`
        where the last axis n is a multiple of the block, else `[ceil(size / block)]`.
        A block that is not finite does not come back finite.

    Raises:
        ValueError: `block_size` is < 1.

    >>> codes, absmax = quantize_blockwise(jnp.array([0.0, -1.0, 2.0, 4.0]))
    >>> codes.tolist(), absmax.tolist()
    ([127, 53, 219, 255], [4.0])
    """
    check_range("block_size", block_size, low=1)
    x = as_float32(x)
    blocks = _blocks(x, block_size)
    # A maximum is no test for NaN: XLA's for CPUs passes some over.
    wrong = jnp.isnan(blocks) if signed else ~(blocks >= 0)
    largest = jnp.max(jnp.abs(blocks), axis=-1)
    absmax = jnp.where(jnp.any(wrong, axis=-1), jnp.nan, largest)
    unit = blocks / jnp.expand_dims(jnp.where(absmax > 0, absmax, 1.0), -1)
    bits = lax.bitcast_convert_type(unit.astype(jnp.float32), jnp.uint32)
    sign = bits >> 31
    cell = jnp.clip((bits >> 16) & 0x7FFF, _LOWEST, _HIGHEST) - _LOWEST
    if signed:
        cell += sign * (_HIGHEST - _LOWEST + 1)
    table = jnp.asarray(_cells(signed))
    # The low half of the bits carries into the code where it passes the midpoint.
    code = (table.at[cell].get(mode="promise_in_bounds") + (bits & 0xFFFF)) >> 16
    if signed:
        code ^= sign * 255
    flat = code.astype(jnp.uint8).reshape(-1)[: x.size]
    return flat.reshape(x.shape), absmax


@typed
def dequantize_blockwise(
    codes: UInt8[ArrayLike, "..."],
    absmax: Float[ArrayLike, "..."],
    *,
    signed: bool = True,
    block_size: int = BLOCK,
) -> Float[Array, "..."]:
    """map[code_i] absmax_b, the inverse of `quantize_blockwise` up to rounding.

    Args:
        codes: any shape.
        absmax: of the blocks, as `quantize_blockwise` gave them.
        signed: as it was given there.
        block_size: as it was given there.

    Returns:
        float32, of the shape of `codes`.

    Raises:
        ValueError: `block_size` is < 1.
        TypeError: `absmax` has not one number per block.

    >>> codes = jnp.array([127, 255], jnp.uint8)
    >>> dequantize_blockwise(codes, jnp.array([4.0])).tolist()
    [0.0, 4.0]
    """
    check_range("block_size", block_size, low=1)
    absmax, codes = as_float32(absmax), jnp.asarray(codes)
    blocks = _blocks(codes, block_size)
    if absmax.shape != blocks.shape[:-1]:
        raise TypeError(
            f"argument 'absmax' has shape {absmax.shape}, expected "
            f"{blocks.shape[:-1]}: one number for each block of 'codes'."
        )
    table = jnp.asarray(dynamic_map(signed=signed), absmax.dtype)
    unit = table.at[blocks.astype(jnp.int32)].get(mode="promise_in_bounds")
    flat = (unit * jnp.expand_dims(absmax, -1)).reshape(-1)[: codes.size]
    return flat.reshape(codes.shape)


@functools.cache
def dynamic_map(*, signed: bool = True) -> np.ndarray:
    """The 256 values in [-1, 1], or [0, 1], ascending: bit for bit bitsandbytes' map.

    Decade d = 0 .. 6 up to 10^(d - 6) has 2^d values of each sign, or 2^(d + 1), in the
    middles of equal parts of [0.1, 1]. With 0 and 1 they are 256; -1 is none of them.
    """
    values, one = [0.0, 1.0], np.float32(1)
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        # Edges as PyTorch's linspace rounds them: from both ends, one rounding each.
        step = np.float64((one - np.float32(0.1)) / np.float32(count))
        place = np.arange(count + 1)
        up, down = np.float32(0.1) + step * place, 1.0 - step * (count - place)
        edges = np.where(place < (count + 1) // 2, up, down).astype(np.float32)
        part = (edges[:-1] + edges[1:]) / np.float32(2)
        part = part * np.float32(10.0 ** (decade - 6))
        values += [*part, *(-part if signed else [])]
    return np.sort(np.array(values, np.float32))


# The nearest code by one look-up. Floats that share their sign, exponent and 7 leading
# bits of the fraction form a cell, and no cell has two midpoints of the map in it.
# Below 2^-23 everything is nearest to 0.
_LOWEST, _HIGHEST = (127 - 23) << 7, 127 << 7


@functools.cache
def _cells(signed: bool) -> np.ndarray:
    """Per cell (code << 16) + 2^16 - how many of its 2^16 floats have that code.

    The others have the next code: adding the low bits of a float carries there. The
    cells of negative floats follow, with 255 - code, which grows with |x| too.
    """
    values = dynamic_map(signed=signed).astype(np.float64)
    middles = (values[:-1] + values[1:]) / 2.0  # exact
    first = np.arange(_LOWEST, _HIGHEST + 1, dtype=np.uint32) << 16
    tables = []
    for sign in (1.0, -1.0)[: 1 + signed]:
        middle = np.sort(sign * middles)
        middle = middle[middle > 0]
        # The least floats of the codes: at a midpoint the smaller code of two counts.
        least = middle.astype(np.float32)
        is_short = least <= middle if sign > 0 else least < middle
        least = np.where(is_short, np.nextafter(least, np.float32(2)), least)
        bits = least.view(np.uint32).astype(np.int64)
        passed = np.searchsorted(bits, first, side="right")
        own = np.append(bits, 1 << 32)[passed] - first  # floats up to the next code
        code = 255 - len(bits) + passed
        tables.append((code << 16) + (1 << 16) - np.minimum(own, 1 << 16))
    return np.concatenate(tables).astype(np.uint32)


def _blocks(x: Array, block_size: int) -> Array:
    """`[..., n / block, block]`, or `[blocks, block]` of the flat array, padded."""
    if x.ndim and x.shape[-1] % block_size == 0:
        return x.reshape(*x.shape[:-1], -1, block_size)
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size)


EXAMPLES = {
    quantize_blockwise: lambda key: (
        (jax.random.normal(key, (8, 32)),), {"block_size": 16}
    ),
    dequantize_blockwise: lambda key: (
        (jax.random.bits(key, (8, 32), jnp.uint8),
         jax.random.uniform(key, (8, 2), minval=0.5)),
        {"block_size": 16},
    ),
}  # fmt: skip
