"""FlashFFTConv: long convolutions as a few matrix products per token.

A Fourier transform of M = N_1 ... N_p points is one product with a small Fourier matrix
per factor, and a phase between them: with n = n_1 M / N_1 + r and k = k_1 + N_1 q

    X[k] = sum_r e(r q N_1 / M) e(r k_1 / M) sum_{n_1} e(n_1 k_1 / N_1) x[n_1, r]

where e(a) = exp(-2 pi i a), and the sum over r is again a transform, of M / N_1 points.
That is 8 M (N_1 + ... + N_p) FLOPs, more than a fast transform needs, but all of them
in matrix products. The frequencies come in another order, which a convolution need not
undo. A causal one of T <= M tokens takes no transform of 2 T points:

    y[t] + i y[t + M] = e(t / 4M) IFFT(FFT(u e(-t / 4M)) FFT(k e(-t / 4M)))

as e(-1/4) = i takes what wraps around into the imaginary part. The phases are part of
the first matrix and its twiddle, and cost nothing. Where the kernel is shorter than the
sequence, blocks of M tokens slide (the paper's partial convolution): the imaginary part
of one block falls into the next.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "flashfftconv",
    "title": "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor "
    "Cores",
    "arxiv": "2311.05908",
    "year": 2024,
    "authors": "Daniel Y. Fu, Hermann Kumbong, Eric Nguyen, Christopher Ré",
    "where": "Section 3: the Monarch decomposition of order p, recomputation, the cost "
    "model, partial and frequency-sparse convolutions.",
    "differs": "Real input becomes half as many complex numbers by a phase that turns "
    "wrapping around into an imaginary part, not by pairing even with odd samples: "
    "nothing has to be unpacked. The spectrum is that of odd multiples of half a bin, "
    "without mirror images, of which any block may be skipped; the released example "
    "zeroes a tail of the usual one. Kept ranges lie around frequency 0. Fusion is "
    "left to XLA. jax.checkpoint recomputes, which has a forward mode too. Products "
    "are in float32 by default. The cost model counts a slow pass for the input and "
    "for each factor whose part of the sequence does not fit on the chip.",
}

__all__ = ["fft_conv", "monarch_cost", "monarch_fft"]

Precision = Literal["highest", "high", "default"]
Tokens = Float[ArrayLike, "batch time channels"]
Sizes = tuple[int, ...]


@typed
def monarch_fft(
    real: Float[ArrayLike, "*batch n"],
    imag: Float[ArrayLike, "*batch n"],
    *,
    factors: Sizes | None = None,
    inverse: bool = False,
    precision: Precision = "highest",
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]:
    """The discrete Fourier transform as one matrix product per factor.

    X[k] = sum_n x[n] exp(-2 pi i n k / N);  inverse: with +, and divided by N

    Args:
        real: real parts, transformed along the last axis.
        imag: imaginary parts, of the same shape.
        factors: N_1, ..., N_p, at least 1, whose product is N. One factor is the dense
            matrix; it takes 8 N (N_1 + ... + N_p) FLOPs. None: two, near sqrt(N).
        inverse: transforms back.
        precision: of products, as jax.lax.Precision; only the first is float32's.

    Returns:
        `(real, imag)`, float32, in the usual order of frequencies: equals jnp.fft.fft.

    Raises:
        ValueError: the product of `factors` is not N.
        TypeError: the shapes differ.

    >>> real, imag = monarch_fft(jnp.arange(3.0), jnp.zeros(3), factors=(1, 3))
    >>> real.tolist(), imag.tolist()
    ([3.0, -1.5, -1.5], [0.0, 0.8660, -0.8660])
    """
    n = real.shape[-1]
    if factors is None:
        small = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
        factors = n // small, small
    if not factors or min(factors) < 1 or math.prod(factors) != n:
        expected = f"numbers whose product is {n}"
        raise ValueError(f"argument 'factors' is {factors}, expected {expected}.")
    # The conjugate's transform, conjugated: swapping the parts is both at once.
    parts = (imag, real) if inverse else (real, imag)
    x = jnp.stack([as_float32(part).reshape(-1, n).T for part in parts])
    x = _transform(x[None], factors, factors, 0.0, precision)
    # From (k_1, ..., k_p) to k = k_1 + N_1 (k_2 + N_2 (k_3 + ...)).
    x = x.reshape(*factors, *x.shape[2:])
    x = x.transpose(*reversed(range(len(factors))), len(factors), len(factors) + 1)
    x = x.reshape(n, 2, -1).transpose(1, 2, 0).reshape(2, *real.shape)
    return (x[1] / n, x[0] / n) if inverse else (x[0], x[1])


@typed
def fft_conv(
    u: Tokens,
    k: Float[ArrayLike, "taps channels"],
    *,
    pregate: Tokens | None = None,
    postgate: Tokens | None = None,
    factors: Sizes | None = None,
    keep: Sizes | None = None,
    precision: Precision = "highest",
) -> Float[Array, "batch time channels"]:
    """Causal convolution with a kernel per channel, gated before and after.

    y[t] = postgate[t] sum_{s <= t} k[s] (u pregate)[t - s]

    Args:
        u: inputs, `[B, T, D]`.
        k: kernels, `[K, D]`; taps beyond the T-th have no effect.
        pregate: factor of the inputs, `[B, T, D]`.
        postgate: factor of the result, likewise.
        factors: N_1, ..., N_p of M, the tokens of a block, at least min(K, T). Blocks
            below T slide. None: by `monarch_cost`, for min(K, T) tokens or some 64.
        keep: frequency-sparse: of each factor, how many indices are kept, 1 to N_i;
            M is then at least T. Index j_1 + N_1 (j_2 + N_2 (...)) = j of the kernel's
            spectrum stands for j - 1/4 cycles in M tokens. It is kept where each j_i is
            one of the keep_i nearest to 0 modulo N_i (0, -1, 1, -2, ...), else it is
            zero: such a kernel has 2 M taps, and comes again with its sign changed.
            keep_1 shortens all products, keep_p, a low-pass filter, its factor's alone.
        precision: of the products, as jax.lax.Precision.

    Returns:
        `[B, T, D]`, float32. A backward pass keeps the inputs, to transform them again.

    Raises:
        ValueError: the product of `factors` is too small, or `keep` does not fit them.
        TypeError: shapes do not fit.

    >>> u = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 4, 1)
    >>> k = jnp.array([[1.0], [10.0]])
    >>> fft_conv(u, k).ravel().tolist()
    [1.0, 12.0, 23.0, 34.0]
    >>> fft_conv(u, k, factors=(2, 2), keep=(2, 1)).ravel().tolist()
    [-0.1805, 8.4274, 26.5255, 37.4431]
    """
    time = u.shape[1]
    least = min(k.shape[0], time) if keep is None else time
    if factors is None:
        factors = _factors(min(max(least, 64), max(time, 1)))
    if not factors or min(factors) < 1 or math.prod(factors) < least:
        expected = f"numbers >= 1 whose product is at least {least}"
        raise ValueError(f"argument 'factors' is {factors}, expected {expected}.")
    keep = factors if keep is None else keep
    pairs = zip(keep, factors, strict=False)
    if len(keep) != len(factors) or not all(1 <= few <= size for few, size in pairs):
        expected = f"a number from 1 to each of {factors}"
        raise ValueError(f"argument 'keep' is {keep}, expected {expected}.")
    run = functools.partial(_convolve, factors, keep, precision)
    return jax.checkpoint(run)(u, k[:time], pregate, postgate)


@typed
def monarch_cost(
    length: Int[ArrayLike, "..."],
    *,
    unit: int = 16,
    matrix_rate: float = 234e12,
    other_rate: float = 17.6e12,
    on_chip: float = 131072.0,
    on_chip_rate: float = 9.5e12,
    memory_rate: float = 1.35e12,
) -> dict[str, Array]:
    """Seconds per sequence by the paper's cost model, and the order that it chooses.

    sum_i 16 N N_i / rate(N_i) + 8 N / bandwidth(i),  N_i = N^(1/p)

    Args:
        length: N, tokens, at least 1.
        unit: the narrowest product that matrix units take.
        matrix_rate: FLOP/s of products as wide as `unit`. The defaults are about those
            of an A100 in half precision.
        other_rate: FLOP/s of narrower ones.
        on_chip: bytes that need not leave the chip. Pass i works on parts of
            N^((p - i + 1) / p) complex numbers of 4 bytes.
        on_chip_rate: bytes per second of a pass over parts that fit, after the first.
        memory_rate: bytes per second of the other passes.

    Returns:
        "seconds" `[3, ...]` of the orders 2, 3 and 4, and "order", int32, the cheapest.

    Raises:
        ValueError: a rate is below 0 or NaN, or `unit` is below 1.

    >>> monarch_cost(jnp.array([1024, 4096, 2**20]))["order"].tolist()
    [2, 3, 4]
    """
    check_range("unit", unit, low=1)
    rates = {"matrix_rate": matrix_rate, "other_rate": other_rate, "on_chip": on_chip}
    rates |= {"on_chip_rate": on_chip_rate, "memory_rate": memory_rate}
    for name, value in rates.items():
        check_range(name, value, low=0.0)
    n, each = as_float32(length), []
    for order in (2, 3, 4):
        size = n ** (1.0 / order)
        # A root such as 15.99999 is 16.
        rate = jnp.where(size > unit - 1e-3, matrix_rate, other_rate)
        seconds = order * 16 * n * size / rate + 8 * n / memory_rate
        for done in range(1, order):
            fits = 4 * n / size**done <= on_chip
            seconds += 8 * n / jnp.where(fits, on_chip_rate, memory_rate)
        each.append(seconds)
    seconds = jnp.stack(each)
    return {"seconds": seconds, "order": jnp.argmin(seconds, axis=0) + 2}


def _factors(length: int) -> tuple[int, ...]:
    """Factors of a little more than `length`: powers of 2, and what is left of it."""
    order = 2 + (length >= 4096) + (length > 32768)  # as `monarch_cost` has it
    size = 2 ** round(math.log2(length) / order)
    return -(-length // size ** (order - 1)), *[size] * (order - 1)


def _convolve(
    factors: Sizes, keep: Sizes, precision: str, u: Any, k: Any, before: Any, after: Any
) -> Array:
    u, k = as_float32(u), as_float32(k)
    u = u if before is None else u * as_float32(before)
    (batch, time, width), block = u.shape, math.prod(factors)
    blocks = max(-(-time // block), 1)
    u = jnp.pad(u, ((0, 0), (0, blocks * block - time), (0, 0)))
    u = u.reshape(batch * blocks, 1, block, width)
    k = jnp.pad(k, ((0, block - k.shape[0]), (0, 0)))[None, None]
    u, k = (_transform(x, factors, keep, 0.25, precision) for x in (u, k / block))
    y = _times(u, k[:, :, 0], k[:, :, 1], 2)
    y = _back(y, factors, keep, 1 if blocks == 1 else 2, precision)
    y = y.reshape(batch, blocks, -1, block, width)
    if blocks > 1:  # what a block leaves behind falls into the next
        beyond = jnp.pad(y[:, :-1, 1], ((0, 0), (1, 0), (0, 0), (0, 0)))
        y = y[:, :, 0] + beyond
    y = y.reshape(batch, blocks * block, width)[:, :time]
    return y if after is None else y * as_float32(after)


def _transform(x: Array, factors: Sizes, keep: Sizes, turn: float, precision: str):
    """Spectrum `[batch, kept, 2, width]` of `[batch, 1 or 2 parts, M, width]`."""
    (batch, parts, _, width), done = x.shape, 1
    for size, few, rest, matrix, phase in _stages(factors, keep, turn):
        matrix = matrix.astype(x.dtype)[:, :, :parts].reshape(2 * few, parts * size)
        x = x.reshape(batch, done, parts * size, rest * width)
        x = jnp.einsum("ij,bdjr->bdir", matrix, x, precision=precision)
        x = x.reshape(batch, done, few, 2, rest, width)
        x = _times(x, *phase.astype(x.dtype), 3) if rest > 1 else x
        done, parts = done * few, 2
    return x.reshape(batch, done, 2, width)


def _back(x: Array, factors: Sizes, keep: Sizes, parts: int, precision: str) -> Array:
    """The adjoint of a transform with a quarter turn: `[batch, parts, M, width]`."""
    batch, done, _, width = x.shape
    stages = _stages(factors, keep, 0.25)
    for size, few, rest, matrix, phase in reversed(stages):
        done //= few
        x = x.reshape(batch, done, few, 2, rest, width)
        cos, sin = phase.astype(x.dtype)
        x = _times(x, cos, -sin, 3) if rest > 1 else x
        # The last product makes the parts that are asked for.
        made = parts if matrix is stages[0][3] else 2
        matrix = matrix.astype(x.dtype)[:, :, :made].reshape(2 * few, made * size)
        x = x.reshape(batch, done, 2 * few, rest * width)
        x = jnp.einsum("ij,bdir->bdjr", matrix, x, precision=precision)
    return x.reshape(batch, parts, -1, width)


@functools.lru_cache(maxsize=32)
def _stages(factors: Sizes, keep: Sizes, turn: float) -> list[Any]:
    """Per factor: size, what is kept, what is left, and in float64 matrix and twiddle.

    A matrix `[kept, 2 out, 2 in, size]` and a twiddle `[2, 1, 1, kept, rest, 1]` are of
    complex numbers; the axes of 2 are real and imaginary parts.
    """
    stages, rest = [], math.prod(factors)
    for place, (size, few) in enumerate(zip(factors, keep, strict=True)):
        rest //= size
        index = np.arange(size)
        k = np.r_[index[: (few + 1) // 2], index[size - few // 2 :]][:, None]
        k = k - (turn if place == 0 else 0.0)
        wave = np.exp(-2j * np.pi * k * index / size)
        cos, sin = wave.real, wave.imag
        matrix = np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)
        phase = np.exp(-2j * np.pi * k * np.arange(rest) / (size * rest))
        phase = np.stack([phase.real, phase.imag])[:, None, None, ..., None]
        stages.append((size, few, rest, matrix, phase))
    return stages


def _times(x: Array, real: Any, imag: Any, axis: int) -> Array:
    """Complex product; the parts of `x` are on `axis`, which the others do not have."""
    a, b = (jax.lax.index_in_dim(x, part, axis, keepdims=False) for part in (0, 1))
    return jnp.stack([a * real - b * imag, a * imag + b * real], axis=axis)


def _signals(key: Array) -> Any:
    u, before, after = jax.random.normal(key, (3, 8, 24, 2))
    knobs = {"pregate": before, "postgate": after, "factors": (6, 4), "keep": (4, 3)}
    return (u, u[0, :10] + 1.0), knobs


EXAMPLES = {
    monarch_fft: lambda key: (
        tuple(jax.random.normal(key, (2, 8, 12))), {"factors": (3, 4)}
    ),
    fft_conv: _signals,
    monarch_cost: lambda key: ((jnp.array([64, 1024, 2**16, 2**20]),), {}),
}  # fmt: skip
