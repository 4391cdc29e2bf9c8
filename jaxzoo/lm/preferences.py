"""Losses on preferences that have no reference policy, or no pairs: ORPO, SimPO, KTO.

They take the log-probabilities of whole responses, as `dpo_loss` does; the losses that
share its pairs and its reference are names of its argument `loss`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxzoo.core.collectives import AxisName, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["kto_loss", "orpo_loss", "simpo_loss"]

Rows = Float[ArrayLike, " batch"]


@typed
def orpo_loss(
    chosen: Rows,
    rejected: Rows,
    chosen_lengths: Rows,
    rejected_lengths: Rows,
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    weight: float = 0.1,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """ORPO: likelihood of the chosen response, and the odds of it against the other.

    -log p_c - weight log sigmoid(log odds(p_c) - log odds(p_r)),  odds(p) = p / (1 - p)

    with p the geometric mean over the tokens of a response.

    Args:
        chosen: log pi of the preferred responses, summed over tokens, in nats, `[B]`.
        rejected: of the others.
        chosen_lengths: their tokens; below 1 counts as 1.
        rejected_lengths: their tokens; below 1 counts as 1.
        where: True for the pairs that count.
        weight: lambda >= 0 of arXiv 2403.07691 (`beta` in trl).
        axis_name: the axis that pairs are split over.

    Returns:
        `(value, aux)`: float32 scalar in nats; aux holds "per_example", "nll" and
        "log_odds" `[B]`, the difference of log odds.

    Raises:
        ValueError: `weight` is out of range, or there is no such axis.

    >>> value, aux = orpo_loss(*jnp.log(jnp.array([[[0.5]], [[0.2]]]))[:, 0],
    ...     jnp.ones(1), jnp.ones(1))
    >>> float(aux["log_odds"][0]), float(value)  # log 1 - log 0.25
    (1.3863, 0.7155)
    """
    check_range("weight", weight, low=0.0)
    keep = _kept(chosen, where)
    chosen, rejected = (
        _where(keep, x, -1.0) / _lengths(keep, length)
        for x, length in ((chosen, chosen_lengths), (rejected, rejected_lengths))
    )
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    each = -chosen - weight * jax.nn.log_sigmoid(log_odds)
    each = jnp.where(keep, each, 0.0)
    aux = {"per_example": each, "nll": -chosen, "log_odds": log_odds}
    return _mean(each, keep, axis_name), aux


@typed
def simpo_loss(
    chosen: Rows,
    rejected: Rows,
    chosen_lengths: Rows,
    rejected_lengths: Rows,
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    beta: float = 2.0,
    gamma: float = 1.0,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """SimPO: the mean log-probability of a token as reward, and a margin to reach.

    -log sigmoid(beta (log pi_c / |c| - log pi_r / |r|) - gamma)

    Args:
        chosen: log pi of the preferred responses, summed over tokens, in nats, `[B]`.
        rejected: of the others.
        chosen_lengths: their tokens; below 1 counts as 1.
        rejected_lengths: their tokens; below 1 counts as 1.
        where: True for the pairs that count.
        beta: > 0, of arXiv 2405.14734.
        gamma: >= 0, the margin of rewards; the authors' code takes it as gamma / beta.
        axis_name: the axis that pairs are split over.

    Returns:
        `(value, aux)`: float32 scalar in nats; aux holds "per_example" and "margin"
        `[B]`, of the rewards, before gamma is taken off.

    Raises:
        ValueError: a number is out of range, or there is no such axis.

    >>> value, aux = simpo_loss(
    ...     jnp.array([-2.0]), jnp.array([-9.0]), jnp.array([2.0]), jnp.array([3.0])
    ... )
    >>> float(aux["margin"][0]), float(value)  # 2 (-1 + 3)
    (4.0, 0.0486)
    """
    check_range("beta", beta, above=0.0)
    check_range("gamma", gamma, low=0.0)
    keep = _kept(chosen, where)
    chosen, rejected = (
        _where(keep, x, 0.0) / _lengths(keep, length)
        for x, length in ((chosen, chosen_lengths), (rejected, rejected_lengths))
    )
    margin = beta * (chosen - rejected)
    each = jnp.where(keep, -jax.nn.log_sigmoid(margin - gamma), 0.0)
    return _mean(each, keep, axis_name), {"per_example": each, "margin": margin}


@typed
def kto_loss(
    policy: Rows,
    reference: Rows,
    divergence: Rows,
    desirable: Bool[ArrayLike, " batch"],
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """KTO: single responses that are good or bad, with no pair.

    w_d (1 - sigmoid(r - z)) if desirable, else w_u (1 - sigmoid(z - r)),
    r = beta (log pi - log pi_ref),   z = beta max(0, mean divergence)

    Gradient: z is a constant for it.

    Args:
        policy: log pi of the responses, in nats, `[B]`.
        reference: of the same under the reference policy.
        divergence: an estimate of KL(pi || pi_ref) at the same prompts, `[B]`: the
            authors take the log-ratio of responses that belong to other prompts.
        desirable: True for good responses, `[B]`.
        where: True for the responses that count.
        beta: > 0, of arXiv 2402.01306.
        desirable_weight: w_d >= 0.
        undesirable_weight: w_u >= 0.
        axis_name: the axis that responses are split over.

    Returns:
        `(value, aux)`: float32 scalar, between 0 and the larger weight; aux holds
        "per_example" and "rewards" `[B]`, and "baseline", z.

    Raises:
        ValueError: a number is out of range, or there is no such axis.

    >>> value, aux = kto_loss(
    ...     jnp.array([-4.0, -9.0]), jnp.array([-6.0, -6.0]), jnp.array([0.5, -1.5]),
    ...     jnp.array([True, False]), beta=0.5
    ... )
    >>> aux["rewards"].tolist(), float(aux["baseline"]), float(value)
    ([1.0, -1.5], 0.0, 0.2257)
    """
    check_range("beta", beta, above=0.0)
    check_range("desirable_weight", desirable_weight, low=0.0)
    check_range("undesirable_weight", undesirable_weight, low=0.0)
    keep = _kept(policy, where)
    rewards = beta * (_where(keep, policy, 0.0) - _where(keep, reference, 0.0))
    mean = _mean(_where(keep, divergence, 0.0), keep, axis_name)
    baseline = jax.lax.stop_gradient(beta * jnp.maximum(mean, 0.0))
    gain = jnp.where(desirable, rewards - baseline, baseline - rewards)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    each = jnp.where(keep, weight * jax.nn.sigmoid(-gain), 0.0)
    aux = {"per_example": each, "rewards": rewards, "baseline": baseline}
    return _mean(each, keep, axis_name), aux


def _kept(rows: ArrayLike, where: ArrayLike | None) -> Array:
    return jnp.ones(rows.shape, bool) if where is None else jnp.asarray(where)


def _where(keep: Array, x: ArrayLike, other: float) -> Array:
    return jnp.where(keep, as_float32(x), other)


def _lengths(keep: Array, lengths: ArrayLike) -> Array:
    return _where(keep, jnp.maximum(as_float32(lengths), 1.0), 1.0)


def _mean(each: Array, keep: Array, axis_name: AxisName) -> Array:
    count = jnp.maximum(psum(jnp.sum(keep), axis_name), 1)
    return psum(jnp.sum(each), axis_name) / count.astype(each.dtype)


def _log_odds(log_p: Array) -> Array:
    """log p - log(1 - p), where p = 1 counts as the float32 below it."""
    log_p = jnp.minimum(log_p, -1e-7)
    small = log_p < -0.5  # each branch where it keeps its digits
    rest = jnp.where(
        small,
        jnp.log1p(-jnp.exp(jnp.where(small, log_p, -1.0))),
        jnp.log(-jnp.expm1(jnp.where(small, -1.0, log_p))),
    )
    return log_p - rest


def _four(key: Array) -> tuple[Array, ...]:
    first, second = jax.random.split(key)
    values = -20.0 + 2.0 * jax.random.normal(first, (2, 8))
    lengths = jax.random.randint(second, (2, 8), 3, 9).astype(values.dtype)
    return *values, *lengths


def _kto(key: Array) -> tuple[Array, ...]:
    values = jax.random.normal(key, (3, 8))
    return *values, jnp.arange(8) % 3 == 0


EXAMPLES = {
    orpo_loss: lambda key: (_four(key), {"where": jnp.arange(8) != 3}),
    simpo_loss: lambda key: (_four(key), {"where": jnp.arange(8) != 3}),
    kto_loss: lambda key: (_kto(key), {"where": jnp.arange(8) != 3, "beta": 0.5}),
}
