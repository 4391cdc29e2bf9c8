"""Time-invariant diagonal state spaces: S4D, and a diagonal linear RNN.

    y = DiagonalSSM(64).apply(params, x)                      # [B, T, 64], causal
    y = DiagonalSSM(64, bidirectional=True).apply(params, x)  # sees both sides

Each channel has its own filter, the sum of N decaying waves, as long as the sequence:
the whole is a convolution by FFT. `nn.mamba` has the form whose filter depends on the
tokens.
"""

import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

__all__ = ["DiagonalSSM", "DiagonalStack", "fft_conv", "waves"]


def waves(
    rates: Complex[Array, "d n"], weights: Complex[Array, "d n"], length: int
) -> Float[Array, "t d"]:
    """The filter of each channel: K_t = 2 Re sum_n weights_n e^(rates_n t).

    The 2 stands for the other half of N pairs of conjugates.

    Args:
        rates: `[D, N]`, real parts <= 0; per token.
        weights: `[D, N]`.
        length: T, at least 1.

    Returns:
        float32 `[T, D]`.

    Raises:
        ValueError: `length` is below 1.

    >>> one = jnp.ones((1, 1))
    >>> waves(jnp.log(0.5) * one + 0j, 0.5 * one + 0j, 3)[:, 0].round(4).tolist()
    [1.0, 0.5, 0.25]
    """
    if length < 1:
        raise ValueError(f"argument 'length' is {length}, expected at least 1.")
    # e^(r (q s + p)) = e^(r q s) e^(r p): 2 sqrt(T) exponentials in place of T.
    size = math.isqrt(length - 1) + 1
    count = -(-length // size)
    near = jnp.exp(rates[None] * jnp.arange(size).reshape(-1, 1, 1))
    far = jnp.exp(rates[None] * (size * jnp.arange(count)).reshape(-1, 1, 1))
    both = jnp.einsum("qdn,pdn->qpd", far * weights[None], near)
    return 2 * both.real.reshape(count * size, -1)[:length]


def fft_conv(x: Float[Array, "b t d"], kernel: Float[Array, "t d"]) -> Array:
    """Each channel's causal convolution with a filter as long as the sequence.

    y_t = sum_(s <= t) kernel_(t - s) x_s

    Args:
        x: `[B, T, D]`.
        kernel: `[T, D]`.

    Returns:
        float32 `[B, T, D]`.

    >>> x = jnp.arange(1.0, 4.0).reshape(1, 3, 1)
    >>> fft_conv(x, jnp.array([[1.0], [10.0], [0.0]])).round(3).ravel().tolist()
    [1.0, 12.0, 23.0]
    """
    length = x.shape[1]
    # Twice as long, so that nothing wraps around.
    spectrum = jnp.fft.rfft(x.astype(jnp.float32), 2 * length, axis=1)
    own = jnp.fft.rfft(kernel.astype(jnp.float32), 2 * length, axis=0)
    return jnp.fft.irfft(spectrum * own[None], 2 * length, axis=1)[:, :length]


class DiagonalSSM(nn.Module):
    """A filter per channel, a GELU, and a gated product that mixes the channels.

    "s4d" is S4D-Lin with the zero-order hold, as in github.com/state-spaces/s4: rates
    delta (-1/2 + i pi n), input (e^rate - 1) / a. "dlr" has the rates themselves as
    parameters, with frequencies spread over the half circle, and input 1.

    Attributes:
        width: of the input, D.
        states: N, pairs of conjugate states per channel.
        kind: "s4d" or "dlr".
        bidirectional: a second filter runs from the end.
        dtype: compute dtype of the products; filters are float32.
    """

    width: int
    states: int = 32
    kind: Literal["s4d", "dlr"] = "s4d"
    bidirectional: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """`[B, T, width]` to the same."""
        y = fft_conv(x, self._filter("", x.shape[1]))
        if self.bidirectional:
            # From the next token on: its own is the first filter's.
            later = jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0)))
            back = fft_conv(later[:, ::-1], self._filter("back_", x.shape[1]))
            y = y + back[:, ::-1]
        skip = self.param("D", nn.initializers.normal(1.0), (self.width,))
        y = nn.gelu(y + skip.reshape(1, 1, -1) * x.astype(jnp.float32))
        both = nn.Dense(2 * self.width, dtype=self.dtype, name="out")(y)
        value, gate = jnp.split(both, 2, axis=-1)
        return value * nn.sigmoid(gate)

    def _filter(self, name: str, length: int) -> Array:
        if self.kind not in ("s4d", "dlr"):
            raise ValueError(
                f"argument 'kind' is {self.kind!r}, expected 's4d' or 'dlr'."
            )
        shape = (self.width, self.states)
        step = jnp.exp(self.param(f"{name}log_step", _log_step, (self.width, 1)))
        decay = jnp.exp(self.param(f"{name}log_decay", _log_half, shape))
        turn = jnp.pi * jnp.arange(self.states)
        if self.kind == "dlr":
            turn = turn / self.states
        turn = self.param(f"{name}turn", lambda _: jnp.broadcast_to(turn, shape))
        pair = self.param(f"{name}C", nn.initializers.normal(0.5**0.5), (*shape, 2))
        weights = jax.lax.complex(pair[..., 0], pair[..., 1])
        if self.kind == "dlr":
            rates = jax.lax.complex(-step * decay, turn)
            return waves(rates, weights / self.states, length)
        a = jax.lax.complex(-decay, turn)
        rates = step * a
        return waves(rates, weights * jnp.expm1(rates) / a, length)


class DiagonalStack(nn.Module):
    """Blocks with a norm before and a path around each, and a norm after the last.

    A body for `language_model.LanguageModel`; it has no cache and no segments.

    Attributes:
        block: a `DiagonalSSM`.
        depth: how many, run under `lax.scan`.
    """

    block: DiagonalSSM
    depth: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], cache: None = None, *, segment_ids: None = None
    ) -> tuple[Float[Array, "b t d"], None]:
        """Returns the output, and None."""
        if cache is not None or segment_ids is not None:
            raise ValueError(
                "arguments 'cache' and 'segment_ids' have to be None: a filter runs "
                "over the whole sequence."
            )
        layers = nn.scan(
            _Residual, variable_axes={"params": 0}, split_rngs={"params": True},
            length=self.depth,
        )  # fmt: skip
        x, _ = layers(self.block, name="layers")(x, None)
        return nn.RMSNorm(epsilon=1e-5)(x), None


class _Residual(nn.Module):
    block: DiagonalSSM

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        normed = nn.RMSNorm(epsilon=1e-5)(x)
        y = self.block.copy(name="mixer", parent=self)(normed)
        return x + y.astype(x.dtype), None


def _log_step(key: Array, shape: tuple[int, ...]) -> Array:
    """Steps from 0.001 to 0.1, uniform in their logarithm."""
    return jax.random.uniform(
        key, shape, minval=math.log(1e-3), maxval=math.log(0.1)
    )  # fmt: skip


def _log_half(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.full(shape, math.log(0.5))
