"""8-bit optimizer states: blocks of 256 numbers, each with a scale of its own.

    absmax_b = max over the block of |x|                       float32, one per block
    code_i   = argmin_c |map_c - x_i / absmax_b|               uint8
    x_i      ~ map[code_i] absmax_b

`map` is the dynamic tree: seven decades below 1, each with twice as many equally spaced
values as the one before, and 0 and 1. An outlier spoils its own block alone.

    optimizer = adam8bit(1e-3)                               # optax.adam, 2 bytes of 8
    optimizer = blockwise_8bit(optax.lion(1e-4))             # any transformation
    params = apply_updates_stochastic(key, params, updates)  # bfloat16 parameters

Codes have the shape of the parameter, and so take its sharding. Where the last axis is
a multiple of the block, blocks lie along it and absmax `[..., n / block]` shards like
the parameter too; else blocks run over the flattened array, in the same order.
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from jaxzoo.core.transform import Mask, Number, Rate, descend, in_float32, like
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "blockwise_8bit_optim",
    "title": "8-bit Optimizers via Block-wise Quantization",
    "arxiv": "2110.02861",
    "year": 2022,
    "authors": "Tim Dettmers, Mike Lewis, Sam Shleifer, Luke Zettlemoyer",
    "where": "Section 1.3 (dynamic tree quantization), 2.1 (block-wise), 2.2 (the "
    "unsigned map), 2.3 (the stable embedding layer).",
    "differs": "Blocks of 256 numbers, as in bitsandbytes today, not 2048. Codes are "
    "nearest to x / absmax, with -0.993 as the lowest code of the signed map: some "
    "kernels of bitsandbytes search as if it were -1, and its kernel for CPUs is not "
    "exact near 0. A mean square above 0 is never stored as 0, which bitsandbytes and "
    "the paper allow: without this Adam on digits, where whole blocks have gradients "
    "of exactly 0 in some steps, was not finite after 19 steps. bitsandbytes keeps "
    "the sign of a mean that rounds to 0, we do not. The embedding's 32-bit moments "
    "are left to optax.multi_transform. Stochastic rounding of bfloat16 parameters is "
    "not in the paper. In the experiment the LM ended 0.3 % and the digits net 1.2 +- "
    "1.0 % below 32-bit Adam's loss (5 seeds), so that the claim of 1 % fails for "
    "digits, in favour of 8 bits.",
}

__all__ = [
    "BlockwiseState",
    "Quantized",
    "StableEmbedding",
    "adam8bit",
    "apply_updates_stochastic",
    "blockwise_8bit",
    "dequantize_blockwise",
    "momentum8bit",
    "quantize_blockwise",
]

BLOCK = 256
MIN_SIZE = 4096


class Quantized(NamedTuple):
    """An array as codes and one scale per block.

    Attributes:
        codes: uint8, of the array's shape.
        absmax: float32, `[..., n / block]`, or `[blocks]` of the flat array.
    """

    codes: Array
    absmax: Array


class BlockwiseState(NamedTuple):
    """The state of `blockwise_8bit`.

    Attributes:
        inner: that of the transformation inside, large moments as `Quantized`.
    """

    inner: Any


def blockwise_8bit(
    inner: optax.GradientTransformation,
    *,
    block_size: int = BLOCK,
    min_size: int = MIN_SIZE,
    non_negative: Collection[str] = ("nu", "v"),
) -> optax.GradientTransformationExtraArgs:
    """Any transformation, its large float32 moments kept in 8 bits between steps.

    Args:
        inner: what computes the updates, in float32.
        block_size: numbers per scale.
        min_size: arrays with fewer numbers stay in float32.
        non_negative: fields of `inner`'s state without negative values; they take the
            unsigned map, and what is above 0 stays so. One that does hold a negative
            value becomes NaN, so that the mistake shows: `optax.adan`, whose `v` has a
            sign, needs ("n",).

    Returns:
        A transformation with `BlockwiseState`; updates in the gradients' dtype.

    Raises:
        ValueError: a number is out of range.

    >>> optimizer = blockwise_8bit(optax.scale_by_adam())
    >>> state = optimizer.init(jnp.zeros((64, 256)))
    >>> state.inner.mu.codes.shape, state.inner.mu.absmax.shape
    ((64, 256), (64, 1))
    """
    check_range("block_size", block_size, low=1)
    check_range("min_size", min_size, low=1)
    transformation = optax.with_extra_args_support(inner)

    def is_signed(path: Any) -> bool:
        # Fields of a state alone: a parameter called "v" is a key of a dict.
        names = {p.name for p in path if isinstance(p, jax.tree_util.GetAttrKey)}
        return not names & set(non_negative)

    def pack(path: Any, leaf: Any) -> Any:
        if leaf.dtype != jnp.float32 or leaf.size < min_size:
            return leaf
        signed = is_signed(path)
        codes, absmax = quantize_blockwise(leaf, signed=signed, block_size=block_size)
        if not signed:
            # Stored as 0, it would let mean / sqrt(mean square) explode in the next
            # step whose gradient is 0.
            codes = jnp.maximum(codes, (leaf > 0).astype(jnp.uint8))
        return Quantized(codes, absmax)

    def unpack(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Quantized):
            return leaf
        signed = is_signed(path)
        return dequantize_blockwise(*leaf, signed=signed, block_size=block_size)

    def stored(state: Any) -> BlockwiseState:
        return BlockwiseState(jax.tree_util.tree_map_with_path(pack, state))

    def init(params: Any) -> BlockwiseState:
        return stored(transformation.init(in_float32(params)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        whole = jax.tree_util.tree_map_with_path(
            unpack, state.inner, is_leaf=lambda x: isinstance(x, Quantized)
        )
        params = None if params is None else in_float32(params)
        new, whole = transformation.update(in_float32(updates), whole, params, **extra)
        return like(new, updates), stored(whole)

    return optax.GradientTransformationExtraArgs(init, update)


def adam8bit(
    learning_rate: Rate,
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    weight_decay: Number = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with 8-bit moments in blocks of 256; arrays below 4096 keep 32 bits.

    Args:
        learning_rate: >= 0, or a schedule.
        b1: decay of the mean, in [0, 1).
        b2: decay of the mean square, in [0, 1).
        eps: > 0, added to the root.
        weight_decay: >= 0, decoupled: AdamW.
        mask: the parameters that decay.

    Returns:
        An optimizer whose state has 0.26 of the bytes of `optax.adam`'s.

    Raises:
        ValueError: a number is out of range.

    >>> optimizer = adam8bit(0.1)
    >>> p = jnp.zeros((64, 256))
    >>> optimizer.update(p + 2.0, optimizer.init(p), p)[0][0, 0]
    Array(-0.1, dtype=float32)
    """
    check_range("b1", b1, low=0.0, below=1.0)
    check_range("b2", b2, low=0.0, below=1.0)
    check_range("eps", eps, above=0.0)
    decays: Any = (b1, b2, eps)
    direction = blockwise_8bit(optax.scale_by_adam(*decays))
    return descend(direction, learning_rate, weight_decay=weight_decay, mask=mask)


def momentum8bit(
    learning_rate: Rate,
    *,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD whose momentum m <- momentum m + g is kept in 8 bits, as in `adam8bit`.

    Args:
        learning_rate: >= 0, or a schedule.
        momentum: in [0, 1).
        weight_decay: >= 0, decoupled.
        mask: the parameters that decay.

    Returns:
        An optimizer whose state has 0.26 of the bytes of `optax.sgd`'s.

    Raises:
        ValueError: a number is out of range.

    >>> optimizer = momentum8bit(0.1)
    >>> p = jnp.zeros((64, 256))
    >>> optimizer.update(p + 2.0, optimizer.init(p), p)[0][0, 0]
    Array(-0.2, dtype=float32)
    """
    check_range("momentum", momentum, low=0.0, below=1.0)
    decay: Any = momentum
    direction = blockwise_8bit(optax.trace(decay))
    return descend(direction, learning_rate, weight_decay=weight_decay, mask=mask)


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


@typed
def apply_updates_stochastic(
    key: Key[Array, ""],
    params: PyTree[Float[ArrayLike, "..."]],
    updates: PyTree[Float[ArrayLike, "..."]],
) -> Any:
    """p + u, rounded up or down at random, so that bfloat16 parameters do not stall.

    E[result] = p + u, both neighbours of p + u in bfloat16 in proportion to nearness

    Args:
        key: a typed key; the result is the same on every mesh.
        params: bfloat16 arrays are rounded so; others as by `optax.apply_updates`.
        updates: of the same tree.

    Returns:
        The new parameters, in their own dtypes. What is finite in float32 stays finite;
        infinity and NaN stay what they are.

    >>> p = {"w": jnp.ones(4096, jnp.bfloat16)}
    >>> new = apply_updates_stochastic(jax.random.key(0), p, {"w": p["w"] / 1024})
    >>> sorted(set(new["w"].tolist())), round(float(jnp.mean(new["w"] - 1) * 1024))
    ([1.0, 1.0078125], 1)
    """
    leaves, tree = jax.tree.flatten(optax.apply_updates(in_float32(params), updates))
    new = []
    for i, (p, total) in enumerate(zip(jax.tree.leaves(params), leaves, strict=True)):
        if p.dtype == jnp.bfloat16:
            new.append(_to_bfloat16(jax.random.fold_in(key, i), total))
        else:
            new.append(total.astype(p.dtype))
    return jax.tree.unflatten(tree, new)


class StableEmbedding(nn.Module):
    """Xavier-uniform embedding and a LayerNorm, which keep its gradients small.

    The paper keeps its moments in 32 bits, as `optax.multi_transform` can.

    Attributes:
        vocabulary: how many symbols.
        width: of the vectors.
        dtype: of the computation; parameters are float32.
    """

    vocabulary: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... d"]:
        start = nn.initializers.xavier_uniform()
        x = nn.Embed(self.vocabulary, self.width, embedding_init=start)(tokens)
        return nn.LayerNorm(dtype=self.dtype)(x)


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

        def code(bits: np.ndarray, sign: float = sign) -> np.ndarray:
            x = sign * bits.view(np.float32).astype(np.float64)
            found = np.searchsorted(middles, x, side="left")
            return found if sign > 0 else 255 - found

        low, high = np.zeros_like(first), np.full_like(first, 1 << 16)
        start = code(first)
        for _ in range(17):  # bisection; low = high = 2^16 if no float has the next
            middle = (low + high) // 2
            after = code(first + np.minimum(middle, 0xFFFF)) > start
            low = np.where(after | (middle == high), low, middle + 1)
            high = np.where(after, middle, high)
        tables.append((start.astype(np.uint32) << 16) + ((1 << 16) - high))
    return np.concatenate(tables)


def _blocks(x: Array, block_size: int) -> Array:
    """`[..., n / block, block]`, or `[blocks, block]` of the flat array, padded."""
    if x.ndim and x.shape[-1] % block_size == 0:
        return x.reshape(*x.shape[:-1], -1, block_size)
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size)


def _to_bfloat16(key: Array, x: Array) -> Array:
    x = x.astype(jnp.float32)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)

    def upper(bits: Array) -> Array:
        half = (bits >> 16).astype(jnp.uint16)
        return lax.bitcast_convert_type(half, jnp.bfloat16)

    up = upper(bits + noise)
    # Beyond the largest bfloat16 there is but one neighbour that is finite.
    rounded = jnp.where(jnp.isfinite(up), up, upper(bits))
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


EXAMPLES = {
    blockwise_8bit: lambda key: (
        (optax.scale_by_adam(),),
        {"min_size": 16, "block_size": 8},
    ),
    adam8bit: lambda key: ((0.01,), {}),
    momentum8bit: lambda key: ((0.01,), {}),
    quantize_blockwise: lambda key: (
        (jax.random.normal(key, (8, 32)),),
        {"block_size": 16},
    ),
    dequantize_blockwise: lambda key: (
        (
            jax.random.bits(key, (8, 32), jnp.uint8),
            jax.random.uniform(key, (8, 2), minval=0.5),
        ),
        {"block_size": 16},
    ),
    apply_updates_stochastic: lambda key: (
        (
            key,
            {"w": jnp.ones((8, 4), jnp.bfloat16)},
            {"w": 1e-3 * jnp.ones((8, 4))},
        ),
        {},
    ),
}
