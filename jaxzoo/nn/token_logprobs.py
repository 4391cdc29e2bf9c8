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
from jaxzoo.nn.vocabulary_sums import (
    VocabularySums,
    vocabulary_pair_sums,
    vocabulary_sums,
)

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
    sums = vocabulary_sums(
        tokens, varying(head, axis_name), own, min(chunk, head.shape[1])
    )
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
    own, other, gap = vocabulary_pair_sums(*arrays, min(chunk, columns))
    total, share = _merge(own, axis_name)
    other_total, _ = _merge(other, axis_name)
    return (psum(share * gap, axis_name) - total + other_total).reshape(shape)


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


def _first_top(sums: VocabularySums, columns: int, axis_name: AxisName) -> Array:
    if axis_name is None:
        return sums.top
    values = all_gather(lax.stop_gradient(sums.value)[None], axis_name)
    device = jnp.argmax(values, axis=0)
    here = device == axis_index(axis_name)
    return psum(jnp.where(here, sums.top + device * columns, 0), axis_name)
