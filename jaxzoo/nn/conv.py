"""A convolutional Gaussian encoder and its mirror image, for small images NHWC.

Strides of 2 with SAME padding halve the image rounding up; the decoder starts from the
size that the same number of halvings gives and crops what it has too much, so that any
height and width work.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["ConvDecoder", "ConvEncoder"]


class ConvEncoder(nn.Module):
    """Stride-2 convolutions and a dense layer: images to a diagonal Gaussian.

    Attributes:
        latents: dimension of the Gaussian.
        channels: of the convolutions; each halves the image.
        activation: after each convolution.
        dtype: compute dtype; parameters and the two outputs are float32.
    """

    latents: int
    channels: Sequence[int] = (32, 64)
    activation: Callable[[Array], Array] = nn.relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "... h w c"]
    ) -> tuple[Float[Array, "... latents"], Float[Array, "... latents"]]:
        """Returns the mean and the log standard deviation."""
        for width in self.channels:
            x = nn.Conv(width, (3, 3), strides=2, dtype=self.dtype)(x)
            x = self.activation(x)
        x = x.reshape(*x.shape[:-3], -1)
        x = nn.Dense(2 * self.latents, dtype=self.dtype)(x).astype(jnp.float32)
        mean, log_std = jnp.split(x, 2, axis=-1)
        return mean, log_std


class ConvDecoder(nn.Module):
    """A dense layer and stride-2 transposed convolutions: latents to image logits.

    Attributes:
        shape: height, width and channels of the image.
        channels: of the transposed convolutions, from the smallest image on.
        activation: before each convolution.
        dtype: compute dtype; parameters and the output are float32.
    """

    shape: tuple[int, int, int]
    channels: Sequence[int] = (64, 32)
    activation: Callable[[Array], Array] = nn.relu
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "... latents"]) -> Float[Array, "... h w c"]:
        height, width, outputs = self.shape
        factor = 2 ** len(self.channels)
        rows, columns = -(-height // factor), -(-width // factor)
        x = nn.Dense(rows * columns * self.channels[0], dtype=self.dtype)(z)
        x = x.reshape(*z.shape[:-1], rows, columns, self.channels[0])
        for out in (*self.channels[1:], outputs):
            x = self.activation(x)
            x = nn.ConvTranspose(out, (3, 3), strides=(2, 2), dtype=self.dtype)(x)
        return x[..., :height, :width, :].astype(jnp.float32)
