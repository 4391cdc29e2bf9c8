"""Log-probabilities of tokens from hidden states, without the logits of all tokens.

    l = hidden head                                       [T, V], never whole
    log p(target) = l_target - logsumexp(l)
    H = logsumexp(l) - E_p[l]                              entropy
    KL(p || q) = E_p[l - l'] - logsumexp(l) + logsumexp(l')

The vocabulary goes by in chunks: a pass keeps a running maximum and running sums, the
gradient makes each chunk of logits again. So memory is that of one chunk, [T, chunk],
where the logits would take [T, V] several times. Products accumulate in float32.

Under `axis_name` each device holds a part of the vocabulary, `head [D, V / n]`: devices
exchange three numbers per token, and targets are numbers in the whole vocabulary.

Cross-entropy, distillation and losses on preferences need nothing else of a model:

    logp, _ = token_logprobs(hidden, head, targets)
    loss = -jnp.mean(logp)
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental import checkify
from jaxtyping import Array, Float, Int

from jaxzoo.core.collectives import (
    AxisName,
    all_gather,
    axis_index,
    axis_size,
    psum,
    varying,
)
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["target_logprobs", "token_kl", "token_logprobs"]


@typed
def token_logprobs(
    hidden: Float[ArrayLike, "*batch d"],
    head: Float[ArrayLike, "d v"],
    targets: Int[ArrayLike, "*batch"],
    *,
    chunk: int = 1024,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "*batch"], dict[str, Array]]:
    """The log-probability of each target under softmax(hidden head).

    Args:
        hidden: `[..., D]`, what the head is applied to.
        head: `[D, V]`; with `axis_name` this device's columns, `[D, V / n]`.
        targets: integers in [0, V), `[...]`.
        chunk: columns of the head at a time, >= 1.
        axis_name: the axis of `jax.shard_map` that the vocabulary is split over.

    Returns:
        `(logp, aux)`: float32 `[...]` in nats. aux holds "entropy" of the prediction in
        nats, "top", the likeliest token (the first of equals, int32), and "logsumexp"
        of the logits, whose square z-loss punishes. What is not used costs nothing in
        the backward pass.

    Raises:
        ValueError: a target outside the vocabulary, where it can be looked at. Under
            `jax.jit` its log-probability is NaN and its gradient 0, and
            `jax.experimental.checkify.checkify` of a function that calls this one
            reports it.

    >>> hidden, head = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0, 2.0], [9.0] * 3])
    >>> logp, aux = token_logprobs(hidden, head, jnp.array([1]), chunk=2)
    >>> float(logp[0]), float(aux["entropy"][0]), int(aux["top"][0])
    (-1.4076, 0.8324, 2)
    """
    check_range("chunk", chunk, low=1)
    hidden, head, targets = (jnp.asarray(x) for x in (hidden, head, targets))
    size = head.shape[1] * axis_size(axis_name)
    inside = _check_targets(targets, size)
    tokens = varying(hidden.reshape(-1, hidden.shape[-1]), axis_name)
    own = (
        varying(targets.reshape(-1), axis_name) - axis_index(axis_name) * head.shape[1]
    )
    sums = _sums(tokens, varying(head, axis_name), own, min(chunk, head.shape[1]))
    total, share = _merge(sums.logsumexp, axis_name)
    logit = psum(sums.target, axis_name)
    entropy = total - psum(share * sums.mean, axis_name)
    top = _first_top(sums, head.shape[1], axis_name)
    shape = targets.shape
    logp = jnp.where(inside, (logit - total).reshape(shape), jnp.nan)
    aux = {"entropy": entropy, "top": top, "logsumexp": total}
    return logp, {name: x.reshape(shape) for name, x in aux.items()}


@typed
def target_logprobs(
    logits: Float[ArrayLike, "*batch v"], targets: Int[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """The log-probability of each target, where the logits are at hand.

    l_target - logsumexp(l): the probabilities of all tokens are made in the gradient
    alone, into the array that it is returned in.

    Args:
        logits: `[..., V]`.
        targets: integers in [0, V), `[...]`.

    Returns:
        float32 `[...]` in nats.

    Raises:
        ValueError: a target outside the vocabulary, as in `token_logprobs`.

    >>> target_logprobs(jnp.array([[9.0, 10.0, 11.0]]), jnp.array([1])).tolist()
    [-1.4076]
    """
    logits, targets = as_float32(logits), jnp.asarray(targets)
    inside = _check_targets(targets, logits.shape[-1])
    place = jnp.where(inside, targets, 0)[..., None]
    own = jnp.take_along_axis(logits, place, axis=-1)[..., 0]
    return jnp.where(inside, own - jax.nn.logsumexp(logits, axis=-1), jnp.nan)


@typed
def token_kl(
    hidden: Float[ArrayLike, "*batch d"],
    head: Float[ArrayLike, "d v"],
    reference_hidden: Float[ArrayLike, "*batch e"],
    reference_head: Float[ArrayLike, "e v"],
    *,
    chunk: int = 1024,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    """KL(p || q) of each token, p = softmax(hidden head), q that of the reference.

    Distillation of q into p by the reverse divergence; with the two in the other order
    it is the forward one. Both sides get gradients: `jax.lax.stop_gradient` keeps the
    reference still.

    Args:
        hidden: `[..., D]` of p.
        head: `[D, V]` of p; with `axis_name` this device's columns.
        reference_hidden: `[..., E]` of q.
        reference_head: `[E, V]` of q, split as `head`.
        chunk: columns at a time, >= 1.
        axis_name: the axis that the vocabulary is split over.

    Returns:
        float32 `[...]` in nats, >= 0 up to rounding.

    >>> hidden, head = jnp.array([[1.0]]), jnp.array([[0.0, 1.0]])
    >>> float(token_kl(hidden, head, hidden, 2.0 * head)[0])
    0.0826
    """
    check_range("chunk", chunk, low=1)
    arrays = [jnp.asarray(x) for x in (hidden, head, reference_hidden, reference_head)]
    shape, columns = arrays[0].shape[:-1], arrays[1].shape[1]
    arrays[0::2] = [x.reshape(-1, x.shape[-1]) for x in arrays[0::2]]
    arrays = [varying(x, axis_name) for x in arrays]
    own, other, gap = _pair_sums(*arrays, min(chunk, columns))
    total, share = _merge(own, axis_name)
    other_total, _ = _merge(other, axis_name)
    return (psum(share * gap, axis_name) - total + other_total).reshape(shape)


class _Sums(NamedTuple):
    """Of the columns of one device, each `[N]` for N tokens."""

    logsumexp: Array
    target: Array  # the target's logit, 0 if another device has it
    mean: Array  # E[l] under the softmax of these columns
    value: Array  # the largest logit
    top: Array  # its column


def _check_targets(targets: Array, size: int) -> Array:
    """Where targets are in the vocabulary; raises if they can be seen not to be."""
    inside = (targets >= 0) & (targets < size)
    if not isinstance(targets, Tracer):
        # By NumPy: inside `jax.jit` also what is computed of constants is a tracer.
        plain = np.asarray(targets)
        wrong = plain[(plain < 0) | (plain >= size)]
        if wrong.size:
            raise ValueError(
                f"argument 'targets' holds {wrong[0]}, expected integers from 0 to "
                f"{size - 1}, the columns of 'head'."
            )
    checkify.debug_check(
        jnp.all(inside), "argument 'targets' holds a token outside the vocabulary."
    )
    return inside


def _merge(logsumexp: Array, axis_name: AxisName) -> tuple[Array, Array]:
    """The logsumexp over all devices, and which share of the mass this one has."""
    if axis_name is None:
        return logsumexp, jnp.ones_like(logsumexp)
    # The largest cancels: no gradient has to pass through it.
    largest = jnp.max(all_gather(lax.stop_gradient(logsumexp)[None], axis_name), axis=0)
    total = jnp.log(psum(jnp.exp(logsumexp - largest), axis_name)) + _same(
        largest, axis_name
    )
    return total, jnp.exp(logsumexp - total)


def _same(x: Array, axis_name: AxisName) -> Array:
    """What all devices have, known to `shard_map` to be so."""
    return psum(jnp.where(axis_index(axis_name) == 0, x, 0.0), axis_name)


def _first_top(sums: _Sums, columns: int, axis_name: AxisName) -> Array:
    if axis_name is None:
        return sums.top
    values = all_gather(lax.stop_gradient(sums.value)[None], axis_name)
    device = jnp.argmax(values, axis=0)
    here = device == axis_index(axis_name)
    return psum(jnp.where(here, sums.top + device * columns, 0), axis_name)


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


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sums(hidden: Array, head: Array, targets: Array, chunk: int) -> _Sums:
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
    return _Sums(largest + jnp.log(mass), target, moment / mass, largest, top)


def _is_target(targets: Array, at: Array, chunk: int) -> Array:
    column = jnp.arange(chunk)
    here = (targets[:, None] - at[0]) == column[None]
    return here & (column >= at[1])[None]


def _sums_fwd(hidden: Array, head: Array, targets: Array, chunk: int) -> Any:
    sums = _sums(hidden, head, targets, chunk)
    return sums, (hidden, head, targets, sums.logsumexp, sums.mean)


def _sums_bwd(chunk: int, kept: Any, given: _Sums) -> Any:
    hidden, head, targets, total, mean = kept

    def of_chunk(logits: Array, at: Array) -> tuple[Array]:
        p = jnp.exp(logits - total[:, None])
        off = jnp.where(p > 0.0, logits - mean[:, None] + 1.0, 0.0)
        slope = p * (given.logsumexp[:, None] + given.mean[:, None] * off)
        here = _is_target(targets, at, chunk)
        return (slope + jnp.where(here, given.target[:, None], 0.0),)

    grads = _backwards(of_chunk, ((hidden, head),), chunk)
    return *grads[0], np.zeros(targets.shape, jax.dtypes.float0)


_sums.defvjp(_sums_fwd, _sums_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _pair_sums(
    hidden: Array, head: Array, other_hidden: Array, other_head: Array, chunk: int
) -> tuple[Array, Array, Array]:
    """Both logsumexps, and E_p[l - l'], of these columns."""
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
    sums = _pair_sums(*args)
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


_pair_sums.defvjp(_pair_fwd, _pair_bwd)


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
