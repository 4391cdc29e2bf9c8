"""The consciousness prior: a thought is about few elements of a large state.

    c_t = C(h_t, c_{t-1}, noise):  k (name, value) pairs, picked by attention from h_t
    V(c_{t-j}, h_t):               how well few elements of h_t follow from c_{t-j}

That few picks can predict well is a statement on the joint distribution of the
elements: its factors have few variables each, a sparse factor graph.

    scores = attend(params, h, memory)                         # [B, N], by anything
    names, values = conscious_state(scores, h, jax.random.gumbel(key, (B, N)), k=2)
    memory = remember(memory, values)                          # [B, M, 2, D]
    logits = predict(params, broadcast(names, values))         # [B, N, S]
    loss, aux = verifier_loss(logits, next_h, asked)           # asked: [B, N], 0 or 1
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "consciousness_prior",
    "title": "The Consciousness Prior",
    "arxiv": "1709.08568",
    "year": 2017,
    "authors": "Yoshua Bengio",
    "where": "The conscious state as a few (name, value) elements of a larger state "
    "(its C), the verifier network with an entropy term against trivial picks (its V), "
    "the memory of past conscious states, and the sparse factor graph.",
    "differs": "The paper is a proposal, to our knowledge without experiments, so "
    "form and constants are ours: Gumbel noise and straight-through names for its "
    "noisy hard attention, a sum of log-likelihoods with the batch's entropies for "
    "its verifier and mutual information, a shift register for its memory. Its full "
    "text was not at hand, only the abstract and the code and notes of "
    "github.com/AI-ON/TheConsciousnessPrior, whose selection, losses and mutual "
    "information are empty stubs; the notes predict h_{t+1} with squared errors, "
    "here elements are categorical. F and C's recurrence are the caller's. In the "
    "experiment h_t is the observed state, factors join two variables of h_t and one "
    "of h_{t+1}, all are queried in turn one step ahead, and scores depend on names "
    "alone; memory is unused, and the entropy term, a constant there, changes no "
    "pick. Random picks are new for every state. On other seeds, with Gumbel noise "
    "of scale 1, picks settled early and 0.73 to 0.93 were neighbours, 0.9 to 0.98 "
    "with scales of 3 or 4 and the noise off in the second half of training. Scores "
    "that depended on values had an excess of 0.02 nats with but 0.63 neighbours: "
    "which element is picked tells of those that are not.",
}

__all__ = [
    "ConsciousState",
    "broadcast",
    "conscious_state",
    "factor_log_probs",
    "remember",
    "verifier_loss",
]

LARGEST = 1e6  # of scores and logits: what is larger is as sure as this


class ConsciousState(NamedTuple):
    """What attention has picked, in the order of the picks.

    Attributes:
        names: `[..., k, N]`, each row 1 at the element picked, 0 elsewhere.
        values: `[..., k, D]`, of those elements.
    """

    names: Array
    values: Array


@typed
def conscious_state(
    scores: Float[ArrayLike, "*batch n"],
    values: Float[ArrayLike, "*batch n d"],
    noise: Float[ArrayLike, "*batch n"],
    *,
    k: int,
    temperature: float | Float[ArrayLike, ""] = 1.0,
) -> ConsciousState:
    """The k elements of highest score + noise, as (name, value) pairs.

    pick_j = argmax over n not yet picked of score_n + noise_n

    With Gumbel noise the picks are draws without replacement, each with probabilities
    softmax(scores) over what is left; with zeros they are the k highest.

    Gradient: straight through. Each name has the derivative of
    softmax((scores + noise) / temperature) over the elements that earlier picks left.

    Args:
        scores: of attention, `[..., N]`; beyond 1e6 they count as 1e6, like the noise.
        values: of all elements, `[..., N, D]`.
        noise: Gumbel draws to explore, zeros to exploit, `[..., N]`.
        k: how many, in [1, N]; the paper thinks of a handful.
        temperature: of the gradient alone, > 0.

    Returns:
        `ConsciousState(names [..., k, N], values [..., k, D])`, float32.

    Raises:
        ValueError: `k` or `temperature` is out of range.

    >>> h = jnp.array([[5.0], [6.0], [7.0]])
    >>> c = conscious_state(jnp.array([0.1, 0.9, 0.5]), h, jnp.zeros(3), k=2)
    >>> c.names.tolist(), c.values.tolist()
    ([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [[6.0], [7.0]])
    """
    size = scores.shape[-1]
    check_range("k", k, low=1, high=size)
    check_range("temperature", temperature, above=0.0)
    score = _limited(scores) + _limited(noise)
    logits = score / as_float32(temperature)
    is_left = jnp.ones(score.shape, bool)
    rows = []
    for _ in range(k):
        pick = jnp.argmax(jnp.where(is_left, score, -jnp.inf), axis=-1)
        hard = jax.nn.one_hot(pick, size, dtype=score.dtype)
        soft = jax.nn.softmax(jnp.where(is_left, logits, -jnp.inf), axis=-1)
        rows.append(hard + (soft - lax.stop_gradient(soft)))
        is_left &= hard == 0
    names = jnp.stack(rows, axis=-2)
    picked = jnp.einsum("...kn,...nd->...kd", names, as_float32(values))
    return ConsciousState(names, picked)


@typed
def broadcast(
    names: Float[ArrayLike, "*batch k n"], values: Float[ArrayLike, "*batch k d"]
) -> Float[Array, "*batch n d"]:
    """The picked values back at the places of their names, 0 elsewhere.

    out_nd = sum_j names_jn values_jd

    Args:
        names: `[..., k, N]`, of a `ConsciousState`.
        values: `[..., k, D]`, likewise.

    Returns:
        `[..., N, D]`, float32: what a network may see that sees the picks alone. A
        value of 0 is told from no value if values are one-hot or have a channel of 1.

    >>> names = jnp.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> broadcast(names, jnp.array([[6.0], [7.0]])).tolist()
    [[0.0], [6.0], [7.0]]
    """
    return jnp.einsum("...kn,...kd->...nd", as_float32(names), as_float32(values))


@typed
def remember(
    memory: Float[ArrayLike, "*batch m k d"], state: Float[ArrayLike, "*batch k d"]
) -> Float[Array, "*batch m k d"]:
    """The memory with a conscious state put in front; the oldest one is forgotten.

    m_t = (c_t, m_{t-1} without its last)

    Args:
        memory: past states, newest first, `[..., M, k, D]`; zeros at the start.
        state: names, values or both, joined on their last axis, `[..., k, D]`.

    Returns:
        `[..., M, k, D]`, float32; entry j is c_{t-j}.

    >>> memory = remember(jnp.zeros((3, 1, 1)), jnp.array([[4.0]]))
    >>> remember(memory, jnp.array([[5.0]])).ravel().tolist()
    [5.0, 4.0, 0.0]
    """
    front = as_float32(state)[..., None, :, :]
    return jnp.concatenate([front, as_float32(memory)[..., :-1, :, :]], axis=-3)


@typed
def verifier_loss(
    logits: Float[ArrayLike, "batch n s"],
    state: Float[ArrayLike, "batch n s"],
    asked: Float[ArrayLike, "batch n"],
    *,
    entropy_weight: float | Float[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """What a past thought predicts of the elements asked for, less how hard that is.

    mean_b sum_n asked_bn (-sum_s h_bns log p_bns - weight H_n),   p = softmax(logits)
    H_n = -sum_s q_ns log q_ns,   q_n = mean_b h_bn

    With weight 1 this is minus an estimate of the mutual information of the thought
    and the elements asked for. With 0 elements that never change are the best picks,
    and a learned state does best to become constant.

    Args:
        logits: of every element given c_{t-j}, `[B, N, S]`; beyond 1e6 they count so.
        state: h_t, each element a distribution over S values, `[B, N, S]`, in [0, 1].
        asked: weights of elements, 1 where one is predicted, in [0, 1], `[B, N]`.
        entropy_weight: >= 0.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "per_example" `[B]`, minus what
        the verifier V says of each, "nll" `[B, N]`, of all elements, and "entropy"
        `[N]`, H.

    Raises:
        ValueError: `entropy_weight` is negative.

    >>> h = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> loss, aux = verifier_loss(20.0 * h, h, jnp.ones((2, 1)))
    >>> float(loss), aux["entropy"].tolist()  # a bit is known: -log 2
    (-0.6931, [0.6931])
    """
    check_range("entropy_weight", entropy_weight, low=0.0)
    h, weights = (jnp.clip(as_float32(a), 0.0, 1.0) for a in (state, asked))
    nll = -jnp.sum(h * jax.nn.log_softmax(_limited(logits), axis=-1), axis=-1)
    mean = jnp.mean(h, axis=0)
    # The logarithm's slope at 0 is infinite: values that never came count 1e-12.
    entropy = -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-12)), axis=-1)
    gap = nll - as_float32(entropy_weight) * entropy[None]
    per_example = jnp.sum(weights * gap, axis=-1)
    aux = {"per_example": per_example, "nll": nll, "entropy": entropy}
    return jnp.mean(per_example), lax.stop_gradient(aux)


@typed
def factor_log_probs(
    state: Int[ArrayLike, "batch n"],
    neighbours: Int[ArrayLike, "n 2"],
    tables: Float[ArrayLike, "n s s s"],
) -> Float[Array, "batch n s"]:
    """The next state under a sparse factor graph: factors of three variables each.

    log p(h_{t+1,n} = v | h_t) = table_n[h_ta, h_tb, v] - log sum_v' exp(...),
    with (a, b) = neighbours_n

    Args:
        state: h_t, `[B, N]`, in [0, S).
        neighbours: the two elements of h_t in the factor of each of h_{t+1}, `[N, 2]`.
        tables: log-potentials, `[N, S, S, S]`, the last axis that of h_{t+1}; beyond
            1e6 they count so.

    Returns:
        `[B, N, S]`, float32, in nats.

    >>> tables = jnp.log(jnp.array([[[[1.0, 3.0], [1.0, 1.0]], [[1.0, 1.0]] * 2]]))
    >>> log_p = factor_log_probs(jnp.array([[0]]), jnp.array([[0, 0]]), tables)
    >>> jnp.exp(log_p).tolist()
    [[[0.25, 0.75]]]
    """
    picked = jnp.asarray(state)[:, jnp.asarray(neighbours)]
    rows = jnp.arange(len(neighbours))[None]
    logits = _limited(tables)[rows, picked[..., 0], picked[..., 1]]
    return jax.nn.log_softmax(logits, axis=-1)


def _limited(x: ArrayLike) -> Array:
    return jnp.clip(as_float32(x), -LARGEST, LARGEST)


def _state_example(key: Array):
    keys = jax.random.split(key, 3)
    values = jax.random.normal(keys[1], (8, 6, 3))
    noise = jax.random.gumbel(keys[2], (8, 6))
    return (jax.random.normal(keys[0], (8, 6)), values, noise), {"k": 2}


def _loss_example(key: Array):
    draws = jax.random.normal(key, (3, 8, 5, 3))
    asked = jax.nn.sigmoid(draws[2, ..., 0])
    return (draws[0], jax.nn.softmax(draws[1], axis=-1), asked), {}


def _graph_example(key: Array):
    state = jax.random.randint(key, (8, 8), 0, 3)
    neighbours = jnp.stack([jnp.arange(8), (jnp.arange(8) + 3) % 8], axis=1)
    return (state, neighbours, jax.random.normal(key, (8, 3, 3, 3))), {}


EXAMPLES = {
    conscious_state: _state_example,
    broadcast: lambda key: (tuple(jax.random.normal(key, (2, 8, 2, 4))), {}),
    remember: lambda key: (
        (jax.random.normal(key, (8, 3, 2, 4)), jax.random.normal(key, (8, 2, 4))),
        {},
    ),
    verifier_loss: _loss_example,
    factor_log_probs: _graph_example,
}
