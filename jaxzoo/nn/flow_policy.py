"""The policy of a GFlowNet over small states, by dense layers.

net = FlowPolicy((num_latents, num_values))
logits, log_flow = net.apply(params, x, state)      # [B, D, V], [B]
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

__all__ = ["FlowPolicy"]


class FlowPolicy(nn.Module):
    """Logits of actions, in `shape`, and a log-flow, by dense layers of flat inputs.

    Attributes:
        shape: of the logits of one state: (D, V) for V values of D latents, (N - 1, K)
            for joins of N roots under K symbols.
        hidden: widths of the layers, each with a ReLU.
    """

    shape: tuple[int, int]
    hidden: tuple[int, ...] = (64, 64)

    @nn.compact
    def __call__(self, *inputs: Array) -> tuple[Array, Array]:
        """Arrays `[B, ...]` to logits `[B, *shape]` and log-flows `[B]`, nats."""
        y = jnp.concatenate([x.reshape(x.shape[0], -1) for x in inputs], axis=1)
        for width in self.hidden:
            y = nn.relu(nn.Dense(width)(y))
        out = nn.Dense(math.prod(self.shape) + 1)(y)
        return out[:, 1:].reshape(-1, *self.shape), out[:, 0]
