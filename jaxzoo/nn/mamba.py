"""Mamba blocks: a short causal convolution, a selective scan, a gate.

    block = Mamba(64)                                       # or Mamba2(64, heads=2)
    y, cache = block.apply(params, x)                       # [B, T, 64]
    y, cache = block.apply(params, x[:, :1], cache)         # one token more

A cache is what a block remembers of the tokens before: the last inputs of the
convolution and the state of the scan, as large after ten tokens as after a million. A
sequence may be cut anywhere: the outputs are those of the whole.

Parameters are float32 and begin as in github.com/state-spaces/mamba; `dtype` is what
products compute in, while states, steps and norms are float32.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.selective_scan import selective_scan
from pallas_kernels.selective_scan import step as selective_step
from pallas_kernels.ssd import ssd
from pallas_kernels.ssd import step as ssd_step

__all__ = ["Cache", "Mamba", "Mamba2", "MambaStack", "causal_conv"]


class Cache(NamedTuple):
    """What a block remembers.

    Attributes:
        inputs: `[B, W - 1, E]`, the last inputs of the convolution of width W.
        state: of the scan, float32.
    """

    inputs: Array
    state: Array


def causal_conv(
    x: Float[Array, "b t e"],
    kernel: Float[Array, "w e"],
    bias: Float[Array, " e"],
    *,
    before: Float[Array, "b v e"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t e"], Float[Array, "b v e"]]:
    """Each channel's convolution with its own kernel, over this token and those before.

    y_t = bias + sum_k kernel_k x_(t - W + 1 + k)

    Args:
        x: `[B, T, E]`.
        kernel: `[W, E]`; the last row meets the token itself.
        bias: `[E]`.
        before: the W - 1 tokens before, of the document that the first token continues;
            None: zeros.
        segment_ids: integers `[B, T]`; where they change a document begins, which does
            not see the one before.

    Returns:
        `[B, T, E]`, and `before` for the tokens that come next.

    >>> x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
    >>> y, before = causal_conv(x, jnp.array([[10.0], [1.0]]), jnp.zeros(1))
    >>> y[0, :, 0].tolist(), before.tolist()
    ([1.0, 12.0, 23.0, 34.0], [[[4.0]]])
    """
    width, length = len(kernel), x.shape[1]
    if before is None:
        before = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    tokens = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    runs = None
    if segment_ids is not None:
        change = segment_ids[:, 1:] != segment_ids[:, :-1]
        runs = jnp.pad(jnp.cumsum(change, axis=1), ((0, 0), (width, 0)))
    taps = kernel.astype(x.dtype).reshape(width, 1, 1, -1)
    y = bias.astype(x.dtype).reshape(1, 1, -1)
    for k in range(width):
        part = tokens[:, k : k + length]
        if runs is not None:
            same = runs[:, k : k + length] == runs[:, width - 1 :]
            part = jnp.where(same[..., None], part, 0)
        y = y + taps[k] * part
    after = tokens[:, length:]
    if runs is not None:
        same = runs[:, length:] == runs[:, -1:]
        after = jnp.where(same[..., None], after, 0)
    return y, after


class Mamba(nn.Module):
    """The block of Mamba-1 (figure 3 of the paper): `[B, T, width]` to the same.

    Attributes:
        width: of the input.
        states: N, numbers of state per channel.
        expand: channels of the scan per channel of the input.
        conv: width of the convolution.
        rank: of the map to the steps; None: width / 16, rounded up.
        dtype: compute dtype of products.
        implementation: of the scan; None: the best.
    """

    width: int
    states: int = 16
    expand: int = 2
    conv: int = 4
    rank: int | None = None
    dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        cache: Cache | None = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Returns the output, and what to give with the tokens that come next."""
        channels = self.expand * self.width
        u, z = jnp.split(_dense(self, 2 * channels, "in_proj")(x), 2, axis=-1)
        u, inputs = _convolve(self, u, cache, segment_ids)
        rank = self.rank or -(-self.width // 16)
        terms = _dense(self, rank + 2 * self.states, "x_proj")(u)
        steps, b, c = jnp.split(terms, [rank, rank + self.states], axis=-1)
        delta = nn.Dense(
            channels, use_bias=False, kernel_init=_uniform(rank**-0.5), name="dt_proj",
            dtype=self.dtype,
        )(steps)  # fmt: skip
        A = -jnp.exp(self.param("A_log", _first_numbers, (channels, self.states)))
        knobs = {
            "D": self.param("D", nn.initializers.ones, (channels,)),
            "delta_bias": self.param("dt_bias", _step_bias, (channels,)),
            "delta_softplus": True,
        }
        if x.shape[1] == 1 and cache is not None:
            u, delta, b, c, z = (v[:, 0] for v in (u, delta, b, c, z))
            y, state = selective_step(cache.state, u, delta, A, b, c, z=z, **knobs)
            y = y[:, None]
        else:
            y, state = selective_scan(
                u, delta, A, b, c, z=z, **knobs, segment_ids=segment_ids,
                initial_state=None if cache is None else cache.state,
                return_final_state=True, implementation=self.implementation,
            )  # fmt: skip
        return _dense(self, self.width, "out_proj")(y), Cache(inputs, state)


class Mamba2(nn.Module):
    """The block of Mamba-2 (section 7 of "Transformers are SSMs"), likewise.

    Attributes:
        width: of the input.
        heads: of the scan, a divisor of `expand * width`.
        states: N, numbers of state per channel.
        groups: of heads that share B and C, a divisor of `heads`.
        expand: channels of the scan per channel of the input.
        conv: width of the convolution.
        dtype: compute dtype of products.
        implementation: of the scan; None: the best.
    """

    width: int
    heads: int
    states: int = 128
    groups: int = 1
    expand: int = 2
    conv: int = 4
    dtype: Any = jnp.float32
    implementation: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        cache: Cache | None = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Cache]:
        """Returns the output, and what to give with the tokens that come next."""
        channels, terms = self.expand * self.width, self.groups * self.states
        if channels % self.heads:
            raise ValueError(
                f"argument 'heads' is {self.heads}, expected a divisor of the "
                f"{channels} channels."
            )
        both = _dense(self, 2 * channels + 2 * terms + self.heads, "in_proj")(x)
        z, u, dt = jnp.split(both, [channels, 2 * channels + 2 * terms], axis=-1)
        u, inputs = _convolve(self, u, cache, segment_ids)
        u, b, c = jnp.split(u, [channels, channels + terms], axis=-1)
        u = u.reshape(*u.shape[:2], self.heads, -1)
        b, c = (v.reshape(*v.shape[:2], self.groups, self.states) for v in (b, c))
        A = -jnp.exp(self.param("A_log", _log_uniform(1.0, 16.0), (self.heads,)))
        knobs = {
            "D": self.param("D", nn.initializers.ones, (self.heads,)),
            "dt_bias": self.param("dt_bias", _step_bias, (self.heads,)),
            "dt_softplus": True,
        }
        if x.shape[1] == 1 and cache is not None:
            u, dt, b, c = (v[:, 0] for v in (u, dt, b, c))
            y, state = ssd_step(cache.state, u, dt, A, b, c, **knobs)
        else:
            y, state = ssd(
                u, dt, A, b, c, **knobs, segment_ids=segment_ids,
                initial_state=None if cache is None else cache.state,
                return_final_state=True, implementation=self.implementation,
            )  # fmt: skip
        gated = y.reshape(z.shape).astype(jnp.float32) * nn.silu(z.astype(jnp.float32))
        grouped = gated.reshape(*z.shape[:2], self.groups, -1)
        normed = nn.RMSNorm(epsilon=1e-5, use_scale=False)(grouped).reshape(z.shape)
        scale = self.param("norm", nn.initializers.ones, (channels,))
        y = _dense(self, self.width, "out_proj")(
            (normed * scale.reshape(1, 1, -1)).astype(self.dtype)
        )
        return y, Cache(inputs, state)


class MambaStack(nn.Module):
    """Blocks with a norm before and a path around each, and a norm after the last.

    The blocks run under `lax.scan`, parameters and caches stacked on their first axis.

    Attributes:
        block: one of the blocks above.
        depth: how many.
    """

    block: Any
    depth: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        cache: Any = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns the output, and the caches of all blocks."""
        layers = nn.scan(
            _Residual, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=(0, nn.broadcast), length=self.depth,  # pyright: ignore
        )  # fmt: skip
        x, cache = layers(self.block, name="layers")(x, cache, segment_ids)
        return nn.RMSNorm(epsilon=1e-5)(x), cache


class _Residual(nn.Module):
    block: Any

    @nn.compact
    def __call__(self, x: Array, cache: Any, segment_ids: Array | None) -> Any:
        # Float32, whatever the products compute in: rounding would add up over blocks.
        normed = nn.RMSNorm(epsilon=1e-5)(x)
        y, cache = self.block.copy(name="mixer", parent=self)(
            normed, cache, segment_ids=segment_ids
        )
        return x + y.astype(x.dtype), cache


def _dense(self: Any, features: int, name: str) -> nn.Dense:
    return nn.Dense(
        features, use_bias=False, dtype=self.dtype, name=name, kernel_init=_like_torch
    )


def _convolve(self: Any, u: Array, cache: Cache | None, segment_ids: Any) -> Any:
    """The block's convolution and SiLU, and the inputs to remember."""
    shape, init = (self.conv, u.shape[-1]), _uniform(self.conv**-0.5)
    u, inputs = causal_conv(
        u, self.param("conv", init, shape), self.param("conv_bias", init, shape[1:]),
        before=None if cache is None else cache.inputs, segment_ids=segment_ids,
    )  # fmt: skip
    return nn.silu(u), inputs


def _uniform(bound: float) -> Any:
    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _like_torch(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return _uniform(shape[0] ** -0.5)(key, shape, dtype)


def _first_numbers(key: Array, shape: tuple[int, int]) -> Array:
    """log(1), ..., log(N) for each channel: S4D-Real."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1.0, shape[1] + 1)), shape)


def _log_uniform(low: float, high: float) -> Any:
    def init(key: Array, shape: tuple[int, ...]) -> Array:
        return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=high))

    return init


def _step_bias(key: Array, shape: tuple[int, ...]) -> Array:
    """Steps from 0.001 to 0.1 after the softplus, uniform in their logarithm."""
    low, high = math.log(1e-3), math.log(0.1)
    steps = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
    return steps + jnp.log(-jnp.expm1(-steps))
