"""Kernels as functions of coordinates: a small network makes one of any size.

    net = SlowNet(features=16, grid=(8, 8))
    kernel = net.apply(net.init(key))              # [8, 8, 16]
    params = net.init(key, context)
    kernels = net.apply(params, context)           # [B, 8, 8, 16] of [B, 8, 8, D]

A large kernel needs no more weights than a small one, but for a bias per place.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["SlowNet"]

_zeros, _ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
_Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.lecun_uniform())


class SlowNet(nn.Module):
    """Coordinates to a hyper-kernel: linear layers, each times a sine of coordinates.

    h_0 = sin(A_0 c),  h_i = sin(A_i c) (B_i h_(i-1)) + bias(c),  out = C h

    With a context, h_i is renormalised, and times what a layer makes of the context.

    Attributes:
        features: channels of the kernel.
        grid: its size, one number per coordinate; coordinates go from -1 to 1.
        hidden: width of the layers.
        layers: how many.
        omega: of the sines; some 0.2 for 8 points, in proportion to the points.
        dtype: compute dtype of layers.
    """

    features: int
    grid: tuple[int, ...]
    hidden: int = 32
    layers: int = 2
    omega: float = 1.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, context: Float[Array, "b ... d"] | None = None) -> Array:
        """`[*grid, features]`; of a context `[B, *grid, D]` one per example."""
        axes = [np.linspace(-1, 1, size) for size in self.grid]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.float32)
        width, init = self.hidden * (self.layers + 1), _frequencies(self)
        sines = nn.Dense(width, name="sines", kernel_init=init)(jnp.asarray(points))
        x, *waves = jnp.split(jnp.sin(sines)[None], self.layers + 1, axis=-1)
        bias = self.param("bias", _zeros, self.grid)[None, ..., None]
        layer = functools.partial(_Dense, self.hidden, dtype=self.dtype)
        for i, wave in enumerate(waves):
            x = layer(name=f"slow_{i}", bias_init=_ones)(x)
            x = wave * x.astype(jnp.float32) + bias
            if context is not None:
                # Gradients pass by the second term alone.
                unit = _unit(x, tuple(range(1, x.ndim - 1)))
                x = jax.lax.stop_gradient(x) + 0.1 * unit
                scale = layer(name=f"fast_{i}", bias_init=_ones)
                x = x * scale(context).astype(jnp.float32)
        variance = 1.0 / math.prod(self.grid)
        small = nn.initializers.variance_scaling(variance, "fan_in", "uniform")
        x = nn.Dense(self.features, name="out", dtype=self.dtype, kernel_init=small)(x)
        return (x[0] if context is None else x).astype(jnp.float32)


def _unit(x: Array, axes: tuple[int, ...]) -> Array:
    square = jnp.sum(x * x, axis=axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def _frequencies(net: SlowNet) -> Any:
    """Weights of coordinates: uniform, times 2 pi omega and Gamma(6 / (i + 1))."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        # Half of a chi-square variable: a sampler of Gamma is slow to compile.
        normal = jax.random.normal(key, (13, *shape), dtype)
        layer = np.arange(shape[1]) // net.hidden
        freedom = np.round(12 / (layer + 1))
        counts = jnp.asarray(np.arange(12)[:, None] < freedom).reshape(12, 1, -1)
        gamma = jnp.sum(normal[1:] ** 2, axis=0, where=counts)
        uniform = jax.scipy.special.erf(normal[0] / math.sqrt(2))  # from -1 to 1
        return math.pi * net.omega * gamma * uniform / math.sqrt(shape[0])

    return init
