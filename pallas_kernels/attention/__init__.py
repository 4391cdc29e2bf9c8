"""Attention whose memory is linear in length, and that drops in for `jax.nn`'s.

    out = attention(q, k, v, is_causal=True)             # [B, T, N, H]
    out = attention(q, k, v, segment_ids=ids, window=(1023, 0), sinks=sinks)

Names, layout and masks are those of `jax.nn.dot_product_attention`. `implementation`
says how: "ref" is the definition, "xla" runs on every backend and has derivatives of
any order in both modes, "pallas_tpu" and "pallas_gpu" (Hopper) are kernels with reverse
mode alone. None takes the best that can do the call; with PALLAS_KERNELS_LOG=1 in the
environment it says which one that is, and why no other. To compile for a machine that
is not there, set PALLAS_KERNELS_TARGET to "tpu" or "hopper".
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention import pallas_gpu, pallas_tpu, ref, xla
from pallas_kernels.attention.arguments import (
    Dropout,
    Window,
    check_arrays,
    drop_rate,
    finite,
    seed_of,
    segments,
    softcap_of,
    window_sides,
    wrong,
)
from pallas_kernels.attention.decode import decode_attention
from pallas_kernels.attention.pattern import Extras, Pattern
from pallas_kernels.dispatch import choose, named_in_forward_mode, reverse_alone

PAPER = {
    "slug": "flash_attention2",
    "title": "FlashAttention-2: Faster Attention with Better Parallelism and Work "
    "Partitioning",
    "arxiv": "2307.08691",
    "year": 2023,
    "authors": "Tri Dao",
    "where": "Algorithms 1 and 2: one pass over key blocks with a running maximum, "
    "divided once at the end; only out and log-sum-exp are kept; five products in the "
    "backward pass; section 3.1.1 (causal blocks), 3.1.2 (grouped queries).",
    "differs": "Biases, windows, segments, sinks, softcap and dropout are ours. In XLA "
    "algorithm 2 is written as a linear map, so that JAX makes forward mode of it by "
    "transposing. Nothing adds atomically: on TPUs and GPUs dQ has its own kernel.",
}

__all__ = ["Dropout", "attention", "decode_attention", "shifted_groups"]

Implementation = Literal["ref", "xla", "pallas_tpu", "pallas_gpu"]


def _with_gradient(kernels: Any) -> Callable:
    """What `ref.attend` is, by a module of kernels with `forward` and `backward`."""

    def alone(name: str, pattern: Pattern, *arrays: Any) -> Any:
        kernel = functools.partial(getattr(kernels, name), pattern)
        return reverse_alone("attention", kernel)(*arrays)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(pattern: Pattern, *arrays: Any) -> tuple[Array, Array]:
        return alone("forward", pattern, *arrays)

    def forward(pattern: Pattern, *arrays: Any) -> Any:
        out, lse = alone("forward", pattern, *arrays)
        return (out, lse), (*arrays, out, lse)

    def backward(pattern: Pattern, saved: Any, gradients: Any) -> Any:
        dq, dk, dv, _, d_sinks = alone("backward", pattern, *saved, *gradients)
        # Ids, masks and seeds are integers: None stands for no gradient.
        return dq, dk, dv, Extras(sinks=d_sinks)

    attend.defvjp(forward, backward)
    return named_in_forward_mode("attention", attend)


KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
IMPLEMENTATIONS: dict[str, Callable] = {"ref": ref.attend, "xla": xla.attend}
IMPLEMENTATIONS |= {name: _with_gradient(kernels) for name, kernels in KERNELS.items()}


def attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b s k h"],
    v: Float[Array, "b s k h"],
    *,
    bias: Float[Array, "#b #n #t #s"] | None = None,
    mask: Bool[Array, "#b #n #t #s"] | None = None,
    is_causal: bool = False,
    window: Window | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    logit_softcap: float | None = None,
    scale: float | None = None,
    sinks: Float[Array, " n"] | None = None,
    dropout: Dropout | tuple[float, Array] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Any:
    """softmax(softcap(scale Q K^T + bias)) V over the pairs that count.

    A pair (t, s) counts where the mask is True, s <= t if `is_causal`, s is within the
    window of t, and the segments agree; positions count from the first query and the
    first key, also where T and S differ. A query that no key counts for gets 0, and
    gradients of 0. Softmax and sums are float32, for float64 inputs float64.

    Args:
        q: `[B, T, N, H]`; any T and H, float32, bfloat16 or float16 (float64 in "ref"
            and "xla").
        k: `[B, S, K, H]`, of the same dtype; K divides N, and query head n reads key
            head n // (N / K).
        v: `[B, S, K, H]`, of the same dtype.
        bias: added to the scaled logits before the softcap; every axis may be 1.
        mask: True where a pair counts; every axis may be 1.
        is_causal: keys after the query do not count.
        window: (left, right) keys beside the query's own position that count, None for
            all on a side; a number is both. `local_window_size` of jax.nn.
        segment_ids: integers `[B, T]`, or a pair for queries `[B, T]` and keys
            `[B, S]`; a pair of tokens counts where they are equal. A third axis of N
            (keys: K) gives each head its own; B may be 1.
        logit_softcap: logits become c tanh(logits / c); > 0.
        scale: of the products; 1 / sqrt(H) by default.
        sinks: one logit per head of a key that has no value: what it takes is lost.
        dropout: `(rate, key)`: weights are dropped after the softmax, and the others
            scaled by 1 / (1 - rate).
        return_lse: also returns the log of each query's sum of exponentials.
        implementation: "ref", "xla", "pallas_tpu", "pallas_gpu", or None.

    Returns:
        `[B, T, N, H]` in the dtype of `q`; with `return_lse` also `[B, T, N]` float32,
        -inf where nothing counts.

    Raises:
        TypeError: a shape or a dtype does not fit; names the argument.
        ValueError: a knob is out of range.
        NotImplementedError: the implementation that is named cannot do the call.

    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 4))
    >>> out, lse = attention(q, k, v, is_causal=True, return_lse=True)
    >>> bool(jnp.allclose(out[:, 0], v[:, 0])), out.shape, lse.shape
    (True, (1, 5, 2, 4), (1, 5, 2))
    """
    check_arrays(q, k, v)
    batch, length, heads, width = q.shape
    key_heads = k.shape[2]
    groups = heads // key_heads
    left, right = window_sides(window)
    pattern = Pattern(
        scale=finite("scale", width**-0.5 if scale is None else scale),
        left=left,
        right=0 if is_causal else right,
        softcap=None if logit_softcap is None else softcap_of(logit_softcap),
        drop=0.0 if dropout is None else drop_rate(dropout[0]),
    )

    def pairs(name: str, x: Array | None) -> Array | None:
        if x is None:
            return None
        x = jnp.asarray(x)
        full = (batch, heads, length, k.shape[1])
        fits = zip(x.shape, full, strict=False)
        if x.ndim != 4 or any(a not in (1, b) for a, b in fits):
            raise wrong(name, x, f"[B, N, T, S] = {list(full)} or 1 in any place")
        if x.shape[1] == 1:
            return x[:, None]
        return x.reshape(x.shape[0], key_heads, groups, *x.shape[2:])

    if mask is not None and jnp.asarray(mask).dtype != bool:
        raise wrong("mask", jnp.asarray(mask), "bool; an additive mask goes to 'bias'")
    if bias is not None and not jnp.issubdtype(jnp.asarray(bias).dtype, jnp.floating):
        raise wrong("bias", jnp.asarray(bias), "floats; a mask of bools goes to 'mask'")
    query_ids, key_ids = segments(segment_ids, q, k)
    if sinks is not None:
        sinks = jnp.asarray(sinks)
        if sinks.shape != (heads,):
            raise wrong("sinks", sinks, f"[N] = [{heads}]")
        sinks = sinks.reshape(key_heads, groups).astype(
            jnp.promote_types(sinks.dtype, jnp.float32)
        )
    extras = Extras(
        bias=pairs("bias", bias),
        sinks=sinks,
        mask=pairs("mask", mask),
        query_ids=query_ids,
        key_ids=key_ids,
        seed=None if pattern.drop == 0 else seed_of(dropout),
    )
    heads_first = (
        q.reshape(batch, length, key_heads, groups, width).transpose(0, 2, 3, 1, 4),
        k.transpose(0, 2, 1, 3),
        v.transpose(0, 2, 1, 3),
    )
    arguments = (pattern, *heads_first, extras)
    attend = choose(
        "attention", implementation, IMPLEMENTATIONS, KERNELS, arguments,
        is_empty=0 in q.shape or 0 in k.shape,
        shapes=f"q {q.dtype}{list(q.shape)}, k {list(k.shape)}",
    )  # fmt: skip
    out, lse = attend(*arguments)
    out = out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)
    if not return_lse:
        return out
    return out, lse.transpose(0, 3, 1, 2).reshape(batch, length, heads)


def shifted_groups(
    length: int, num_heads: int, group: int, *, key_heads: int | None = None
) -> tuple[Int[Array, "1 t n"], Int[Array, "1 t k"]]:
    """LongLoRA's S2-attention as segments: half of the heads see groups moved by half.

    The first half of the heads attends within [0, G), [G, 2G), ...; the other half
    within [0, G/2), [G/2, 3G/2), ...: what wraps around in the released code's roll is
    cut there. Give it as `segment_ids`, with `is_causal=True` for language models.

    Args:
        length: T.
        num_heads: N, even.
        group: G, even, at least 2.
        key_heads: K; None: N. Even, so that no key head serves both halves.

    Returns:
        int32 ids of queries `[1, T, N]` and of keys `[1, T, K]`.

    Raises:
        ValueError: a number is out of range; names it.

    >>> ids, _ = shifted_groups(8, 2, 4)
    >>> ids[0, :, 0].tolist(), ids[0, :, 1].tolist()
    ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2])
    """
    key_heads = num_heads if key_heads is None else key_heads
    numbers = {"num_heads": num_heads, "group": group, "key_heads": key_heads}
    for name, number in numbers.items():
        if number < 2 or number % 2:
            raise ValueError(f"argument '{name}' is {number}, expected an even number.")
    places = jnp.arange(length)
    plain, moved = places // group, (places + group // 2) // group

    def of_heads(count: int) -> Array:
        halves = jnp.stack([plain, moved], axis=1)
        return jnp.repeat(halves, count // 2, axis=1)[None].astype(jnp.int32)

    return of_heads(num_heads), of_heads(key_heads)
