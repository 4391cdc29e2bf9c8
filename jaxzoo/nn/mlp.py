"""Multi-layer perceptrons, and the Gaussian encoder and decoder made of them.

Parameters are float32; `dtype` is what the layers compute in. All leading axes are
batch: `[..., D]` in, `[..., features]` out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["MLP", "GaussianMLP"]


class MLP(nn.Module):
    """Dense layers with an activation between them, none after the last.

    Attributes:
        features: widths of the layers, the last one of the output.
        activation: between layers; the papers on variational bounds use tanh.
        bias_init: of the last layer, for instance the log-odds of the data's mean.
        dtype: compute dtype; parameters stay float32.
    """

    features: Sequence[int]
    activation: Callable[[Array], Array] = nn.tanh
    bias_init: nn.initializers.Initializer = nn.initializers.zeros_init()
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... features"]:
        for width in self.features[:-1]:
            x = self.activation(nn.Dense(width, dtype=self.dtype)(x))
        last = nn.Dense(self.features[-1], dtype=self.dtype, bias_init=self.bias_init)
        return last(x)


class GaussianMLP(nn.Module):
    """The parameters of a diagonal Gaussian given x: an encoder, or a prior of z1 | z2.

    Attributes:
        latents: dimension of the Gaussian.
        hidden: widths of the hidden layers.
        activation: after each hidden layer.
        dtype: compute dtype; the two outputs are float32.
    """

    latents: int
    hidden: Sequence[int]
    activation: Callable[[Array], Array] = nn.tanh
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "... d"]
    ) -> tuple[Float[Array, "... latents"], Float[Array, "... latents"]]:
        """Returns the mean and the log standard deviation."""
        body = MLP((*self.hidden, 2 * self.latents), self.activation, dtype=self.dtype)
        mean, log_std = jnp.split(body(x).astype(jnp.float32), 2, axis=-1)
        return mean, log_std
