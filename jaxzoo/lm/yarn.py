"""YaRN: rotary frequencies by which a transformer reads further than it was trained.

With head size H, trained context L, scale s = (new context) / L, and for pair i

    f_i = base^(-2i/H)                   its frequency, radians per position
    r_i = L f_i / (2 pi)                 how often it turns within the trained context

the methods have other frequencies in the place of f_i:

    none           f_i
    interpolation  f_i / s                          positions are squeezed
    ntk            (base s^(H/(H-2)))^(-2i/H)       the fastest stays as it is
    yarn           (1 - g_i) f_i / s + g_i f_i      "NTK-by-parts": fast pairs stay, and
                                                    slow ones are squeezed
    g_i = clip((r_i - alpha) / (beta - alpha), 0, 1)

and YaRN multiplies queries and keys by sqrt(1/t) = 0.1 log s + 1, so that attention is
as sharp among more tokens. In front of a model that was trained without:

    frequencies, _ = rope_frequencies(4.0, width=16, trained_length=256)
    louder = attention_scale(4.0)
    body = Transformer(64, 2, 4, frequencies=frequencies, rope_scale=louder)

Dynamic scaling is `rope_frequencies(length / trained_length, ...)` of the current
length: scales below 1 count as 1.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "yarn",
    "title": "YaRN: Efficient Context Window Extension of Large Language Models",
    "arxiv": "2309.00071",
    "year": 2024,
    "authors": "Bowen Peng, Jeffrey Quesnelle, Honglu Fan, Enrico Shippole",
    "where": "Sections 2.3 and 3.1 (position interpolation, NTK-aware), 3.2 "
    "(NTK-by-parts and its ramp), 3.3 (dynamic scaling), 3.4 (the temperature).",
    "differs": "The default ramp is the released code's, linear in the pair between "
    "whole pairs; the paper's, linear in r, is `convention='paper'`. Where no pair "
    "turns alpha times the ramp is a step; the released one is 1 everywhere. Hugging "
    "Face's other knobs (mscale_all_dim, truncate=False), its dynamic NTK with factors "
    "above 1, and passkey retrieval are left out. The experiment trains small byte "
    "models on 128 bytes. There, without training, interpolation at 4x is worse than "
    "none (2.72 against 2.59 nats), as in all settings tried; YaRN is better than both "
    "(2.34; 2.45 with the paper's ramp), and costs 2.6 % within the trained context, "
    "not 2 % (5 % for a model trained for 500 steps); after 20 steps of tuning 0.7 % "
    "over the model as it was.",
}

__all__ = ["apply_rope", "attention_scale", "rope_frequencies"]


@typed
def rope_frequencies(
    scale: Float[ArrayLike, "*batch"] | float,
    *,
    width: int,
    trained_length: int,
    method: Literal["none", "interpolation", "ntk", "yarn"] = "yarn",
    base: float = 10000.0,
    alpha: float = 1.0,
    beta: float = 32.0,
    convention: Literal["released", "paper"] = "released",
) -> tuple[Float[Array, "*batch half"], dict[str, Array]]:
    """Radians by which each pair of features turns per position.

    yarn: (1 - g_i) f_i / s + g_i f_i,  f_i = base^(-2i/H)

    Args:
        scale: s, new context over trained context, a number or one per row, `[...]`;
            below 1 it counts as 1.
        width: H, features of a head that are turned: even, and above 2 for "ntk".
        trained_length: L, the context that the model was trained on, in tokens.
        method: see the head of this file.
        base: of the frequencies that the model was trained with, > 1.
        alpha: > 0; pairs that turn less often than this within L are interpolated.
        beta: > `alpha`; pairs that turn more often than this stay as they are.
        convention: of the ramp g. "paper" is linear in r, as above. "released" is
            linear in i, from the last pair with r >= beta (pair 0 if there is none) to
            the first with r <= alpha (pair H - 1 at most): the authors' code, and
            Hugging Face's "yarn" with its default `truncate`.

    Returns:
        `(frequencies, aux)`: float32 `[..., H/2]`; aux holds "rotations" `[H/2]`, r,
        and "ramp" `[H/2]`, g: 1 where a pair stays as it is.

    Raises:
        ValueError: a number is out of range.

    >>> knobs = {"width": 8, "trained_length": 256}
    >>> rope_frequencies(4.0, **knobs)[0].tolist()
    [1.0, 0.0625, 0.0025, 0.00025]
    >>> rope_frequencies(4.0, method="interpolation", **knobs)[0].tolist()
    [0.25, 0.025, 0.0025, 0.00025]
    >>> rope_frequencies(4.0, method="ntk", **knobs)[0].tolist()
    [1.0, 0.063, 0.00397, 0.00025]
    >>> rope_frequencies(128 / 256, **knobs)[0].tolist()  # a short text
    [1.0, 0.1, 0.01, 0.001]
    """
    check_range("width", width, low=4 if method == "ntk" else 2)
    check_range("trained_length", trained_length, low=1)
    check_range("base", base, above=1.0)
    check_range("alpha", alpha, above=0.0)
    check_range("beta", beta, above=alpha)
    if width % 2:
        raise ValueError(f"argument 'width' is {width}, expected an even number.")
    s = _at_least_one(scale)[..., None]
    place = np.arange(width // 2)
    plain = base ** (-2.0 * place / width)
    turns = trained_length * plain / (2.0 * math.pi)
    if convention == "paper":
        ramp = np.clip((turns - alpha) / (beta - alpha), 0.0, 1.0)
    else:
        first, last = (
            math.log(trained_length / (2.0 * math.pi * r)) * width / 2 / math.log(base)
            for r in (beta, alpha)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        # A step where both are one pair, or no pair turns alpha times.
        ramp = 1.0 - np.clip((place - first) / max(last - first, 1e-3), 0.0, 1.0)

    def row(x: np.ndarray) -> Array:
        return jnp.asarray(x, s.dtype).reshape(*[1] * (s.ndim - 1), -1)

    plain, ramp, turns = row(plain), row(ramp), jnp.asarray(turns, s.dtype)
    if method == "none":
        frequencies = plain * jnp.ones_like(s)
    elif method == "interpolation":
        frequencies = plain / s
    elif method == "ntk":
        frequencies = plain * jnp.exp(-jnp.log(s) * row(2.0 * place / (width - 2)))
    else:
        frequencies = (1.0 - ramp) * (plain / s) + ramp * plain
    return frequencies, {"rotations": turns, "ramp": ramp.ravel()}


@typed
def attention_scale(
    scale: Float[ArrayLike, "*batch"] | float, *, slope: float = 0.1
) -> Float[Array, "*batch"]:
    """What YaRN multiplies queries, and keys, by: logits by its square.

    sqrt(1/t) = slope log s + 1

    Args:
        scale: s, new context over trained context, `[...]`; below 1 it counts as 1.
        slope: 0.1 fitted Llama and Llama 2; 0 leaves the logits as they are.

    Returns:
        float32 `[...]`, at least 1 for a slope of at least 0; the authors' "mscale",
        Hugging Face's "attention_factor".

    Raises:
        ValueError: a number is out of range.

    >>> attention_scale(jnp.array([0.5, 1.0, 4.0])).round(4).tolist()
    [1.0, 1.0, 1.1386]
    """
    check_range("slope", slope)
    return slope * jnp.log(_at_least_one(scale)) + 1.0


@typed
def apply_rope(
    x: Float[ArrayLike, "batch length heads width"],
    positions: Int[ArrayLike, "batch length"] | Float[ArrayLike, "batch length"],
    frequencies: Float[ArrayLike, " half"] | Float[ArrayLike, "batch half"],
    *,
    scale: Float[ArrayLike, ""] | Float[ArrayLike, " batch"] | float = 1.0,
    pairing: Literal["halves", "neighbours"] = "halves",
) -> Float[Array, "batch length heads width"]:
    """Turns each pair of features of queries or keys by its position.

    (a, b) -> scale (a cos p f - b sin p f, b cos p f + a sin p f)

    Args:
        x: queries or keys, `[B, T, N, H]`.
        positions: p, `[B, T]`, from 0.
        frequencies: f, `[H/2]`, or `[B, H/2]` where each row has its own, as under
            dynamic scaling.
        scale: of the result, a number or one per row, as by `attention_scale`.
        pairing: which features are a pair: i and i + H/2 ("halves", GPT-NeoX and
            Hugging Face's Llama), or 2i and 2i + 1 ("neighbours", RoFormer and Meta's
            Llama).

    Returns:
        float32 `[B, T, N, H]`. Keys are to be kept as they were before it if the
        frequencies change from token to token.

    Raises:
        ValueError: there are not H/2 frequencies, or `scale` is NaN.

    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> y = apply_rope(x, jnp.array([[2]]), jnp.array([0.5]))  # cos 1, sin 1
    >>> y.round(4).ravel().tolist()
    [0.5403, 0.8415]
    """
    if isinstance(scale, float):
        check_range("scale", scale)
    x, f, scale = as_float32(x), as_float32(frequencies), as_float32(scale)
    if 2 * f.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"argument 'frequencies' has {f.shape[-1]} of them, expected half of the "
            f"{x.shape[-1]} features a head."
        )
    angles = as_float32(positions)[:, :, None] * f.reshape(-1, 1, f.shape[-1])
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    cos, sin = (scale.reshape(-1, 1, 1, 1) * v for v in (cos, sin))
    if pairing == "halves":
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    a, b = x[..., ::2], x[..., 1::2]
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.reshape(x.shape)


def _at_least_one(scale: ArrayLike | float) -> Array:
    if isinstance(scale, float):
        check_range("scale", scale, above=0.0)
    return jnp.maximum(as_float32(scale), 1.0)


def _queries(key: Array):
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (2, 8, 2, 8))
    positions = jnp.broadcast_to(jnp.arange(8)[None], (2, 8))
    return x, positions, jax.random.uniform(keys[1], (2, 4))


def _scales(key: Array) -> tuple[Array]:
    return (jax.random.uniform(key, (8,), minval=1.5, maxval=8.0),)


EXAMPLES = {
    rope_frequencies: lambda key: (
        _scales(key),
        {"width": 8, "trained_length": 64, "beta": 16.0},
    ),
    attention_scale: lambda key: (_scales(key), {}),
    apply_rope: lambda key: (_queries(key), {"scale": 1.1, "pairing": "neighbours"}),
}
