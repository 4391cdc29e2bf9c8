"""Multi-momentum: a running gradient of each cluster of the data, as control variate.

A batch has clusters in other shares than the data, and that is much of a gradient's
noise where clusters differ. With a buffer m_c for each cluster, a label or a k-means
cell, it can be taken out; what the clusters' own examples differ by remains:

    d   = g - sum_c (n_c / B) m_c + sum_c pi_c m_c       n_c of the batch's B examples
    m_c <- beta m_c + (1 - beta) g_c,  where n_c > 0     g_c, mean over those n_c
    E d = E g, whatever the buffers are, and with m_c = E g_c:  Var d = E Var(g | c) / B

pi_c is the share of cluster c in all examples seen so far. d goes into SGD with
momentum, quasi-hyperbolic momentum, or implicit gradient transport.

    def losses(p):                                        # of each cluster, over B
        return jax.ops.segment_sum(per_example(p, batch), cluster, C) / B

    by_cluster = jax.jacrev(losses)(params)               # one vmap over the clusters
    updates, state = optimizer.update(
        jax.tree.map(lambda g: g.sum(0), by_cluster), state, params,
        cluster_updates=by_cluster, counts=jnp.bincount(cluster, length=C))

The buffers' first axis is the clusters: sharded over devices, they are summed by one
all-reduce.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxzoo.core.transform import (
    Mask,
    Number,
    Rate,
    descend,
    float32_zeros,
    in_float32,
    like,
)
from jaxzoo.core.typed import ArrayLike, check_range, typed

PAPER = {
    "slug": "multi_momentum",
    "title": "Variance Reduction in Deep Learning: More Momentum is All You Need",
    "arxiv": "2111.11828",
    "year": 2021,
    "authors": "Lionel Tondji, Sergii Kashubin, Moustapha Cisse",
    "where": "The multi-momentum direction, and SGD with momentum, quasi-hyperbolic "
    "momentum and implicit gradient transport on top of it.",
    "differs": "Written from the abstract and a summary of the equations: neither the "
    "full text nor released code was at hand. A direction takes the buffers from "
    "before its batch, without which it would not be unbiased; a buffer takes the "
    "mean over its cluster's examples of the batch, and begins at 0 without "
    "correction. Shares of clusters may be given; those of the examples seen so far, "
    "the default, add their own sampling error: the mean of 4,000 directions was off "
    "by 2.9 times what chance gives, by 1.15 times with the shares given. Implicit "
    "gradient transport has a constant momentum, and its parameters are the points "
    "that gradients are taken at. Clusters are labels, given from outside; there is "
    "no k-means. The experiment is a logistic regression on 8 clusters in 20 "
    "dimensions, and a softmax regression on 8x8 digits with 20 % noisy labels, not "
    "CIFAR and ImageNet: there the training loss ends lower (0.974 against 1.000 nats "
    "over 5 seeds) and the held-out loss does not (0.618 against 0.609), with 85.7 "
    "against 85.3 % right.",
}

__all__ = ["MultiMomentumState", "multi_momentum", "scale_by_multi_momentum"]

Base = Literal["momentum", "qhm", "igt"]


class MultiMomentumState(NamedTuple):
    """The state of `scale_by_multi_momentum`.

    Attributes:
        momenta: m_c, leaves `[C, ...]`.
        seen: examples of each cluster so far, `[C]`.
        velocity: of the base.
    """

    momenta: Any
    seen: jax.Array
    velocity: Any


@typed
def scale_by_multi_momentum(
    *,
    n_clusters: int,
    beta: Number = 0.9,
    proportions: Float[ArrayLike, " clusters"] | None = None,
    base: Base = "momentum",
    momentum: Number = 0.9,
    nu: Number = 0.7,
) -> optax.GradientTransformationExtraArgs:
    """The direction of a variance-reduced gradient, in one of three momentum methods.

    "momentum": v <- momentum v + d,  u = v
    "qhm": v <- momentum v + (1 - momentum) d,  u = (1 - nu) d + nu v
    "igt": v <- momentum v + (1 - momentum) d,  u = v + r (v - v_before)

    with r = momentum / (1 - momentum). The parameters of "igt" are the points that
    gradients are taken at, p + r (p - p_before), p the iterates of u = v: there old
    gradients of a quadratic are those of now. Learning rates should change slowly.

    `update` takes two more arguments, `cluster_updates`, leaves `[C, ...]`: the sum of
    the gradients of cluster c's examples, over the batch size; and `counts` `[C]`, how
    many those are. Without them the whole batch is of cluster 0.

    Args:
        n_clusters: C, >= 1.
        beta: decay of the clusters' buffers, in [0, 1).
        proportions: pi `[C]`; None takes the shares of all examples seen so far.
        base: what is made of d.
        momentum: of the base, in [0, 1); 0 gives d itself.
        nu: weight of the velocity in "qhm", in [0, 1].

    Returns:
        The transformation; its state is a `MultiMomentumState`.

    Raises:
        ValueError: a number is out of range.
        TypeError: only one of `cluster_updates` and `counts` came.

    >>> direction = scale_by_multi_momentum(n_clusters=2, beta=0.0, momentum=0.0)
    >>> state = direction.init(jnp.zeros(1))
    >>> both, none = jnp.array([[1.0], [-1.0]]), jnp.zeros((1, 1))
    >>> _, state = direction.update(  # one example each, with gradients 2 and -2
    ...     jnp.zeros(1), state, cluster_updates=both, counts=jnp.array([1, 1])
    ... )
    >>> d, state = direction.update(  # two of the first: 2 - 2 + (3 * 2 - 2) / 4
    ...     2 * both[0], state, cluster_updates=jnp.concatenate([2 * both[:1], none]),
    ...     counts=jnp.array([2, 0])
    ... )
    >>> d.tolist()
    [1.0]
    """
    check_range("n_clusters", n_clusters, low=1)
    check_range("beta", beta, low=0.0, below=1.0)
    check_range("momentum", momentum, low=0.0, below=1.0)
    check_range("nu", nu, low=0.0, high=1.0)
    if proportions is not None and proportions.shape != (n_clusters,):
        raise ValueError(
            f"argument 'proportions' has {proportions.shape[0]} entries, expected "
            f"{n_clusters}, one for each cluster."
        )

    knobs: Any = (beta, momentum, nu)  # annotations know no sums of `Number`s
    keep, inertia, weight = knobs

    def init(params: Any) -> MultiMomentumState:
        zeros = float32_zeros(params)
        momenta = jax.tree.map(
            lambda p: jnp.zeros((n_clusters, *p.shape), p.dtype), zeros
        )
        return MultiMomentumState(momenta, jnp.zeros(n_clusters), zeros)

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        cluster_updates: Any = None,
        counts: Any = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        del params, extra
        if (cluster_updates is None) != (counts is None):
            raise TypeError("cluster_updates and counts come together, or not at all.")
        grads = in_float32(updates)
        if counts is None:
            first = jnp.arange(n_clusters) == 0
            counts = first.astype(jnp.float32)
            parts = jax.tree.map(lambda g: _outer(counts, g), grads)
        else:
            counts = jnp.asarray(counts).astype(jnp.float32)
            parts = in_float32(cluster_updates)

        batch = jnp.sum(counts)
        seen = state.seen + counts
        share = (
            seen / jnp.sum(seen) if proportions is None else jnp.asarray(proportions)
        )
        excess = share - counts / batch
        direction = jax.tree.map(
            lambda g, m: g + jnp.tensordot(excess.astype(m.dtype), m, 1),
            grads,
            state.momenta,
        )
        # A cluster that the batch does not meet keeps its buffer.
        decay = jnp.where(counts > 0, keep, 1.0)
        gain = (1.0 - decay) * batch / jnp.maximum(counts, 1.0)
        momenta = jax.tree.map(
            lambda m, p: _rows(decay, m) * m + _rows(gain, p) * p, state.momenta, parts
        )

        old = state.velocity
        fresh = 1.0 if base == "momentum" else 1.0 - inertia
        new = jax.tree.map(lambda v, d: inertia * v + fresh * d, old, direction)
        if base == "momentum":
            out = new
        elif base == "qhm":
            out = jax.tree.map(
                lambda d, v: (1.0 - weight) * d + weight * v, direction, new
            )
        else:
            ahead = inertia / (1.0 - inertia)
            out = jax.tree.map(lambda v, w: v + ahead * (v - w), new, old)
        return like(out, updates), MultiMomentumState(momenta, seen, new)

    return optax.GradientTransformationExtraArgs(init, update)


@typed
def multi_momentum(
    learning_rate: Rate,
    *,
    n_clusters: int,
    beta: Number = 0.9,
    proportions: Float[ArrayLike, " clusters"] | None = None,
    base: Base = "momentum",
    momentum: Number = 0.9,
    nu: Number = 0.7,
    weight_decay: Number = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Descent along gradients whose noise between clusters is taken out.

    p <- p - learning_rate (u + weight_decay p)

    Args:
        learning_rate: >= 0, or a schedule.
        n_clusters: as for `scale_by_multi_momentum`, and so the five that follow.
        beta: decay of the clusters' buffers, in [0, 1).
        proportions: shares of the clusters `[C]`, or None.
        base: "momentum", "qhm" or "igt".
        momentum: of the base, in [0, 1).
        nu: of "qhm", in [0, 1].
        weight_decay: decoupled, >= 0.
        mask: which parameters decay, as in `optax.add_decayed_weights`.

    Returns:
        The optimizer; its `update` takes `cluster_updates` and `counts`.

    Raises:
        ValueError: a number is out of range.

    >>> optimizer = multi_momentum(0.1, n_clusters=3)  # without clusters, momentum SGD
    >>> p = jnp.array([1.0])
    >>> u, state = optimizer.update(p, optimizer.init(p))
    >>> optimizer.update(p, state)[0].tolist()
    [-0.19]
    """
    direction = scale_by_multi_momentum(
        n_clusters=n_clusters,
        beta=beta,
        proportions=proportions,
        base=base,
        momentum=momentum,
        nu=nu,
    )
    return descend(direction, learning_rate, weight_decay=weight_decay, mask=mask)


def _rows(weight: Array, x: Array) -> Array:
    """A weight of each row, of as many dimensions as `x`."""
    return weight.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)


def _outer(weight: Array, x: Array) -> Array:
    return _rows(weight, x[None]) * x[None]


EXAMPLES = {
    multi_momentum: lambda key: ((1e-2,), {"n_clusters": 3}),
    scale_by_multi_momentum: lambda key: ((), {"n_clusters": 3}),
}
