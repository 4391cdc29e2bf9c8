"""Sums over a vocabulary that goes by in chunks, with the gradients of the whole.

Logits are l = hidden head, `[N, D]` times `[D, V]`. A pass keeps a running maximum and
running sums; the gradient makes each chunk of logits again. So memory is that of one
chunk, [N, chunk]. Products accumulate in float32. What the sums are for, and how those
of several devices meet, is in `jaxzoo.nn.token_logprobs`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxzoo.core.collectives import varying
from jaxzoo.core.typed import as_float32

__all__ = ["VocabularySums", "vocabulary_pair_sums", "vocabulary_sums"]


class VocabularySums(NamedTuple):
    """Of the columns of one device, each `[N]` for N tokens."""

    logsumexp: Array
    target: Array  # the target's logit, 0 if another device has it
    mean: Array  # E[l] under the softmax of these columns
    value: Array  # the largest logit
    top: Array  # its column


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def vocabulary_sums(
    hidden: Array, head: Array, targets: Array, chunk: int
) -> VocabularySums:
    """`VocabularySums` of these columns, from the first of which `targets` [N] count.

    A target that is no column here has a logit of 0. `chunk` is at most V. Gradient:
    of all but the largest logit and its column.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    zeros = _like(jnp.zeros(hidden.shape[0], wide), hidden, head)
    place = _like(jnp.zeros(hidden.shape[0], jnp.int32), hidden, head)

    def step(carry: Any, at: Array) -> Any:
        largest, mass, moment, target, top = carry
        logits, _ = _logits(hidden, head, at, chunk)
        value, index = jnp.max(logits, axis=1), jnp.argmax(logits, axis=1)
        new = jnp.maximum(largest, value)
        weight = jnp.exp(logits - new[:, None])
        finite = jnp.where(jnp.isneginf(logits), 0.0, logits)
        # Before the first chunk the largest is -inf, and its sums are 0.
        old = jnp.where(jnp.isneginf(largest), 0.0, jnp.exp(largest - new))
        mass = mass * old + jnp.sum(weight, axis=1)
        moment = moment * old + jnp.sum(weight * finite, axis=1)
        is_target = _is_target(targets, at, chunk)
        target = target + jnp.sum(jnp.where(is_target, finite, 0.0), axis=1)
        top = jnp.where(value > largest, at[0] + index.astype(jnp.int32), top)
        return (new, mass, moment, target, top), None

    start = (zeros - jnp.inf, zeros, zeros, zeros, place)
    (largest, mass, moment, target, top), _ = lax.scan(
        step, start, _chunks(head.shape[1], chunk)
    )
    return VocabularySums(largest + jnp.log(mass), target, moment / mass, largest, top)


def _is_target(targets: Array, at: Array, chunk: int) -> Array:
    column = jnp.arange(chunk)
    here = (targets[:, None] - at[0]) == column[None]
    return here & (column >= at[1])[None]


def _sums_fwd(hidden: Array, head: Array, targets: Array, chunk: int) -> Any:
    sums = vocabulary_sums(hidden, head, targets, chunk)
    return sums, (hidden, head, targets, sums.logsumexp, sums.mean)


def _sums_bwd(chunk: int, kept: Any, given: VocabularySums) -> Any:
    hidden, head, targets, total, mean = kept

    def of_chunk(logits: Array, at: Array) -> tuple[Array]:
        p = jnp.exp(logits - total[:, None])
        off = jnp.where(p > 0.0, logits - mean[:, None] + 1.0, 0.0)
        slope = p * (given.logsumexp[:, None] + given.mean[:, None] * off)
        here = _is_target(targets, at, chunk)
        return (slope + jnp.where(here, given.target[:, None], 0.0),)

    grads = _backwards(of_chunk, ((hidden, head),), chunk)
    return *grads[0], np.zeros(targets.shape, jax.dtypes.float0)


vocabulary_sums.defvjp(_sums_fwd, _sums_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def vocabulary_pair_sums(
    hidden: Array, head: Array, other_hidden: Array, other_head: Array, chunk: int
) -> tuple[Array, Array, Array]:
    """Both logsumexps and E_p[l - l'], each `[N]`, of these columns.

    l' are the other logits, p = softmax(l). `chunk` is at most V. Gradient: of all.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    zeros = _like(jnp.zeros(hidden.shape[0], wide), hidden, head)

    def step(carry: Any, at: Array) -> Any:
        (largest, mass, gap), (other_largest, other_mass) = carry
        logits, _ = _logits(hidden, head, at, chunk)
        other, _ = _logits(other_hidden, other_head, at, chunk)
        new = jnp.maximum(largest, jnp.max(logits, axis=1))
        weight = jnp.exp(logits - new[:, None])
        old = jnp.where(jnp.isneginf(largest), 0.0, jnp.exp(largest - new))
        difference = jnp.where(jnp.isneginf(logits), 0.0, logits - other)
        gap = gap * old + jnp.sum(weight * difference, axis=1)
        mass = mass * old + jnp.sum(weight, axis=1)
        newer = jnp.maximum(other_largest, jnp.max(other, axis=1))
        shrunk = jnp.exp(other_largest - newer)
        shrunk = jnp.where(jnp.isneginf(other_largest), 0.0, shrunk)
        more = jnp.sum(jnp.exp(other - newer[:, None]), axis=1)
        return ((new, mass, gap), (newer, other_mass * shrunk + more)), None

    start = ((zeros - jnp.inf, zeros, zeros), (zeros - jnp.inf, zeros))
    ((largest, mass, gap), (other_largest, other_mass)), _ = lax.scan(
        step, start, _chunks(head.shape[1], chunk)
    )
    own = largest + jnp.log(mass)
    return own, other_largest + jnp.log(other_mass), gap / mass


def _pair_fwd(*args: Any) -> Any:
    sums = vocabulary_pair_sums(*args)
    return sums, (args[:4], sums)


def _pair_bwd(chunk: int, kept: Any, given: tuple[Array, Array, Array]) -> Any:
    arrays, (total, other_total, gap) = kept
    d_own, d_other, d_gap = (g[:, None] for g in given)

    def of_chunk(logits: Array, other: Array, at: Array) -> tuple[Array, Array]:
        p, q = jnp.exp(logits - total[:, None]), jnp.exp(other - other_total[:, None])
        off = jnp.where(p > 0.0, logits - other - gap[:, None] + 1.0, 0.0)
        return p * (d_own + d_gap * off), q * d_other - p * d_gap

    grads = _backwards(of_chunk, (arrays[:2], arrays[2:]), chunk)
    return *grads[0], *grads[1]


vocabulary_pair_sums.defvjp(_pair_fwd, _pair_bwd)


def _chunks(columns: int, chunk: int) -> Array:
    """(first column, columns that an earlier chunk had) of each chunk."""
    begins = np.arange(0, columns, chunk)
    first = np.minimum(begins, columns - chunk)
    return jnp.asarray(np.stack([first, begins - first], axis=1), jnp.int32)


def _logits(hidden: Array, head: Array, at: Array, chunk: int) -> tuple[Array, Array]:
    """Logits of one chunk, -inf where they were counted before; and the columns."""
    part = lax.dynamic_slice_in_dim(head, at[0], chunk, axis=1)
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.matmul(hidden, part, preferred_element_type=wide)
    old = jnp.arange(chunk) < at[1]
    return jnp.where(old[None], -jnp.inf, logits), part


def _backwards(
    of_chunk: Callable[..., tuple[Array, ...]],
    pairs: tuple[tuple[Array, Array], ...],
    chunk: int,
) -> list[tuple[Array, Array]]:
    """Gradients of (hidden, head) pairs from those of each chunk of logits."""

    def step(carry: Any, at: Array) -> Any:
        made = [_logits(*pair, at, chunk) for pair in pairs]
        slopes = of_chunk(*(logits for logits, _ in made), at)
        new = []
        for (d_hidden, d_head), (hidden, _), (_, part), slope in zip(
            carry, pairs, made, slopes, strict=True
        ):
            # Products in the dtype of the model, as in its own layers.
            slope = slope.astype(hidden.dtype)
            d_hidden += jnp.matmul(slope, part.T, preferred_element_type=d_hidden.dtype)
            more = jnp.matmul(hidden.T, slope, preferred_element_type=d_head.dtype)
            before = lax.dynamic_slice_in_dim(d_head, at[0], chunk, axis=1)
            d_head = lax.dynamic_update_slice_in_dim(
                d_head, before + more, at[0], axis=1
            )
            new.append((d_hidden, d_head))
        return new, None

    start = [
        tuple(_like(jnp.zeros_like(as_float32(x)), *pair) for x in pair)
        for pair in pairs
    ]
    sums, _ = lax.scan(step, start, _chunks(pairs[0][1].shape[1], chunk))
    return [
        (d_hidden.astype(hidden.dtype), d_head.astype(head.dtype))
        for (d_hidden, d_head), (hidden, head) in zip(sums, pairs, strict=True)
    ]


def _like(x: Array, *others: Array) -> Array:
    """`x`, which varies over the same mesh axes as the others do."""
    names: set[str] = set()
    for other in others:
        names |= set(jax.typeof(other).manual_axis_type.varying)
    return varying(x, tuple(sorted(names)) or None)
