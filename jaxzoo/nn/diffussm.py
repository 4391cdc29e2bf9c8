"""DiffuSSM's backbone: a diffusion model of unpatched tokens without attention.

    net = DiffuSSM(width=64, depth=4, out=2, compress=2)
    y = net.apply(params, x, condition)      # [B, J, C], [B, E] -> [B, J, out]

The work grows linearly with the number of tokens, so that images need no patches: a
state space runs over the tokens from both ends, on a sequence `compress` times shorter,
and dense layers with a gate run on all tokens (Yan, Gu and Rush 2023, section 3.2). The
condition, a vector per image made of the time and the class, scales and shifts what
each block sees and adds, as in DiT.

Parameters are float32; `dtype` is what products compute in, while norms, filters and
the stream that blocks add to are float32. Blocks begin as the identity.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxzoo.nn.diagonal_ssm import DiagonalSSM

__all__ = ["DiffuSSM", "DiffuSSMBlock"]

_zeros = nn.initializers.zeros


class DiffuSSMBlock(nn.Module):
    """One block: an hourglass around a state space from both sides, and a gate.

        U_l = join_k gelu(W_up,k gelu(W_0 I_j)),  j = l M + k    (M times shorter)
        Y   = SSM(U), from both ends                             (2 D channels)
        I'_j = gelu(W_down,k Y_l)
        O_j = W_3 (gelu(W_2 I'_j) * gelu(W_1 I_j))

    I is the input after a norm, scaled and shifted by the condition; the block adds O,
    scaled by it.

    Attributes:
        width: of the tokens, D.
        compress: M, which divides the number of tokens and 2 D.
        states: pairs of states of each channel.
        dtype: compute dtype of products.
    """

    width: int
    compress: int = 2
    states: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b j d"], condition: Float[Array, "b e"]
    ) -> Float[Array, "b j d"]:
        """`[B, J, width]` to the same."""
        batch, tokens, width = x.shape
        channels, times = 2 * self.width, self.compress
        if times < 1 or tokens % times or channels % times:
            raise ValueError(
                f"argument 'compress' is {times}, expected a divisor of the {tokens} "
                f"tokens and of the {channels} channels."
            )
        steered = self._dense(3 * width, "condition", kernel_init=_zeros)(
            nn.silu(condition)
        )
        shift, scale, gain = jnp.split(steered[:, None].astype(jnp.float32), 3, axis=-1)
        inner = _norm("norm")(x) * (1 + scale) + shift
        y = nn.gelu(self._dense(width, "mix")(inner))
        y = y.reshape(batch, tokens // times, times, width)
        # A token's place among the M that are joined has a matrix of its own.
        up = self.param(
            "up", nn.initializers.lecun_normal(batch_axis=0),
            (times, width, channels // times),
        )  # fmt: skip
        y = nn.gelu(jnp.einsum("blkd,kde->blke", y, up.astype(y.dtype)))
        y = y.reshape(batch, tokens // times, channels)
        y = DiagonalSSM(
            channels, self.states, bidirectional=True, dtype=self.dtype, name="ssm"
        )(y)
        down = self.param(
            "down", nn.initializers.lecun_normal(batch_axis=0),
            (times, channels, width),
        )  # fmt: skip
        y = nn.gelu(jnp.einsum("ble,ked->blkd", y, down.astype(y.dtype)))
        y = y.reshape(batch, tokens, width)
        gate = nn.gelu(self._dense(channels, "gate")(inner))
        y = gate * nn.gelu(self._dense(channels, "value")(y))
        return x + gain * self._dense(width, "out")(y).astype(jnp.float32)

    def _dense(self, features: int, name: str, **kwargs: Any) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, name=name, **kwargs)


class DiffuSSM(nn.Module):
    """Blocks between two dense layers; the output begins at 0.

    Attributes:
        width: of the tokens in the blocks.
        depth: how many blocks, run under `lax.scan`.
        out: channels of the output; twice those of the input with a learned variance.
        compress: as in `DiffuSSMBlock`, like all that follow.
    """

    width: int
    depth: int
    out: int
    compress: int = 2
    states: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b j c"], condition: Float[Array, "b e"]
    ) -> Float[Array, "b j out"]:
        """The network's answer for each token.

        Args:
            x: `[B, J, C]`, the noised tokens of an image, row by row, unpatched.
            condition: `[B, E]`, of the time and the class.

        Returns:
            float32 `[B, J, out]`.
        """

        def one(block: DiffuSSMBlock, x: Array, _: None) -> tuple[Array, None]:
            return block(x, condition), None

        x = nn.Dense(self.width, dtype=self.dtype, name="in")(x).astype(jnp.float32)
        block = DiffuSSMBlock(
            self.width, self.compress, self.states, self.dtype, name="blocks"
        )
        run = nn.scan(
            one, variable_axes={"params": 0}, split_rngs={"params": True},
            length=self.depth,
        )  # fmt: skip
        x, _ = run(block, x, None)
        steered = nn.Dense(2 * self.width, kernel_init=_zeros, name="condition")(
            nn.silu(condition)
        )
        shift, scale = jnp.split(steered[:, None].astype(jnp.float32), 2, axis=-1)
        x = _norm("norm")(x) * (1 + scale) + shift
        return nn.Dense(self.out, kernel_init=_zeros, name="out")(x)


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(
        epsilon=1e-6, use_bias=False, use_scale=False, dtype=jnp.float32, name=name
    )
