"""DPO: a policy is trained on preferences as if it were its own reward model.

    r(y) = beta (log pi(y) - log pi_ref(y))                       implicit reward
    loss = -log sigmoid(r(chosen) - r(rejected))

What goes in are log-probabilities of whole responses, the sum over the tokens of each,
prompt and padding left out (`jaxzoo.nn.token_logprobs`). The reference's are numbers: a
batch may bring them along, computed once.

    logp, _ = token_logprobs(hidden, head, targets)
    chosen, rejected = jnp.sum(jnp.where(response, logp, 0.0), axis=-1)
    loss, aux = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)

`loss` names what others have put in the place of the logistic loss of the margin. With
h the margin of log-ratios, c and r the log-ratios of chosen and rejected, s = sigmoid,
e = label_smoothing:

    sigmoid    -(1 - e) log s(b h) - e log s(-b h)               DPO; e: conservative
    robust     (-(1 - e) log s(b h) + e log s(-b h)) / (1 - 2 e)
    hinge      max(0, 1 - b h)                                   SLiC
    ipo        (h - 1 / (2 b))^2
    exo        KL((s(b h), s(-b h)) || (1 - e, e))
    nca        -log s(b c) - log s(-b c) / 2 - log s(-b r) / 2
    bco        -log s(b c - d) - log s(d - b r),  d the mean reward of the batch
    sppo       (c - 1 / (2 b))^2 + (r + 1 / (2 b))^2
    apo_zero   1 - s(b c) + s(b r)
    apo_down   s(b c) + 1 - s(b h)
    aot        as sigmoid, of the sorted c minus the sorted r
    discopop   (1 - m) (-log s(b h)) + m exp(-b h),  m = s(b h / 0.05)
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxzoo.core.collectives import AxisName, all_gather, axis_index, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "dpo",
    "title": "Direct Preference Optimization: Your Language Model is Secretly a Reward "
    "Model",
    "arxiv": "2305.18290",
    "year": 2023,
    "authors": "Rafael Rafailov, Archit Sharma, Eric Mitchell, Stefano Ermon, "
    "Christopher D. Manning, Chelsea Finn",
    "where": "Equations 4 and 5 (the optimal policy), 7 (the loss), 18 (rankings, "
    "appendix A.3); the gradient's weights in section 4.",
    "differs": "The losses beside the paper's are those of trl under the same names; "
    "log-ratios beyond 30 nats count as that for the forward KL. In the experiment a "
    "model of four letters' context learns to write e: at equal KL REINFORCE on a "
    "reward model of the same 1,024 pairs gets 0.37 +- 0.05 letters more per string: "
    "the paper's claim fails there. With runs at four values of beta only, and "
    "without mixtures between them, DPO had seemed 0.5 ahead, as REINFORCE's runs lay "
    "far apart in KL. Pairs of words and misspellings (codespell's list) stand in "
    "for human preferences; a byte transformer prefers the right spelling of words not "
    "shown in 88.8 % of them, from 88.1 +- 0.6 %, at 0.77 nats per byte of KL. No "
    "best-of-n or preferred-SFT baselines.",
}

__all__ = ["dpo_loss", "optimal_policy", "plackett_luce_loss"]

Kind = Literal[
    "sigmoid", "robust", "hinge", "ipo", "exo", "nca", "bco", "sppo", "apo_zero",
    "apo_down", "aot", "discopop",
]  # fmt: skip
Rows = Float[ArrayLike, " batch"]
Scalar = float | Float[Array, ""]  # an array may be traced, as by a sweep in vmap


@typed
def dpo_loss(
    policy_chosen: Rows,
    policy_rejected: Rows,
    reference_chosen: Rows | None = None,
    reference_rejected: Rows | None = None,
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    beta: Scalar = 0.1,
    loss: Kind = "sigmoid",
    label_smoothing: float = 0.0,
    divergence: Literal["reverse_kl", "forward_kl", "js"] = "reverse_kl",
    lengths: tuple[Rows, Rows] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean loss of pairs of responses, one of which is preferred.

    Args:
        policy_chosen: log pi(y) of the preferred responses, in nats, `[B]`.
        policy_rejected: of the others, `[B]`.
        reference_chosen: of the preferred ones under the reference policy; None counts
            as 0, which is DPO without a reference.
        reference_rejected: of the others; None counts as 0.
        where: True for the pairs that count.
        beta: > 0, the price of KL: small values let the policy go far. For "ipo" and
            "sppo" it is tau and 1 / eta.
        loss: see the head of this file. "ipo" sums log-probabilities, as its authors'
            code; trl's divides by lengths: give it `lengths`.
        label_smoothing: e in [0, 0.5), how often preferences are wrong. For "sigmoid",
            "robust", "exo" (where 0 counts as 0.001) and "aot".
        divergence: from the reference, what the implicit reward belongs to: log u for
            "reverse_kl", -1/u for "forward_kl", log(u / (1 + u)) for "js", u the ratio
            of probabilities. For losses of the margin h alone.
        lengths: how many tokens each chosen and each rejected response has, `([B],
            [B])`, > 0: log-probabilities become means over tokens. None: sums.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` that pairs are split over.

    Returns:
        `(value, aux)`: float32 scalar in nats; aux holds "per_example" `[B]` (for "aot"
        by rank, not by pair), the rewards "chosen" and "rejected" `[B]` in nats,
        "margin" `[B]`, their difference, "weight" `[B]`, sigmoid(-margin), how much the
        paper's gradient counts a pair, and "accuracy", the share of pairs whose margin
        is positive. Equals trl's losses of the same names, but "bco", whose d is a
        running mean there.

    Raises:
        ValueError: a number is out of range, or there is no such axis.

    >>> loss, aux = dpo_loss(
    ...     jnp.array([-4.0]), jnp.array([-9.0]), jnp.array([-5.0]), jnp.array([-6.0])
    ... )
    >>> float(loss), float(aux["margin"][0])  # -log sigmoid(0.1 (1 + 3))
    (0.513, 0.4)
    """
    check_range("beta", beta, above=0.0)
    check_range("label_smoothing", label_smoothing, low=0.0, below=0.5)
    keep = jnp.ones(policy_chosen.shape, bool) if where is None else jnp.asarray(where)
    chosen, rejected = (
        _ratio(policy, reference, length, keep)
        for policy, reference, length in (
            (policy_chosen, reference_chosen, lengths and lengths[0]),
            (policy_rejected, reference_rejected, lengths and lengths[1]),
        )
    )
    count = jnp.maximum(psum(jnp.sum(keep), axis_name), 1).astype(chosen.dtype)
    rewards = beta * chosen, beta * rejected
    gap = rewards[0] - rewards[1]
    if loss == "aot":
        margin, counted = _sorted_margin(chosen, rejected, keep, axis_name)
    else:
        slope = _SLOPES[divergence]
        margin, counted = slope(chosen) - slope(rejected), keep
    centre = psum(jnp.sum(sum(rewards)), axis_name) / (2.0 * count)
    each = _pair_loss(loss, margin, chosen, rejected, beta, label_smoothing, centre)
    each = jnp.where(counted, each, 0.0)
    aux = {
        "per_example": each,
        "chosen": rewards[0],
        "rejected": rewards[1],
        "margin": gap,
        "weight": jnp.where(keep, jax.nn.sigmoid(-gap), 0.0),
        "accuracy": psum(jnp.sum(keep & (gap > 0.0)), axis_name) / count,
    }
    return psum(jnp.sum(each), axis_name) / count, aux


@typed
def plackett_luce_loss(
    policy: Float[ArrayLike, "batch ranks"],
    reference: Float[ArrayLike, "batch ranks"] | None = None,
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    beta: Scalar = 0.1,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """DPO of whole rankings: each response is chosen from those that are left.

    loss = -sum_k log softmax(r_k, ..., r_K)_k,   r_k = beta (log pi - log pi_ref)

    Args:
        policy: log pi(y_k) of K responses from best to worst, in nats, `[B, K]`.
        reference: of the same under the reference policy; None counts as 0.
        where: True for the rows that count.
        beta: > 0, as for `dpo_loss`.
        axis_name: as for `dpo_loss`.

    Returns:
        `(value, aux)`: the mean over rows; aux holds "per_example" `[B]` and "rewards"
        `[B, K]`. With K = 2 it is `dpo_loss`.

    Raises:
        ValueError: `beta` is out of range, or there is no such axis.

    >>> value, _ = plackett_luce_loss(jnp.zeros((1, 3)))
    >>> float(value)  # log 3!
    1.7918
    """
    check_range("beta", beta, above=0.0)
    keep = jnp.ones(policy.shape[:1], bool) if where is None else jnp.asarray(where)
    rewards = beta * _ratio(policy, reference, None, keep[:, None])
    left = jax.lax.cumlogsumexp(rewards, axis=1, reverse=True)
    each = jnp.where(keep, jnp.sum(left - rewards, axis=1), 0.0)
    count = jnp.maximum(psum(jnp.sum(keep), axis_name), 1).astype(each.dtype)
    value = psum(jnp.sum(each), axis_name) / count
    return value, {"per_example": each, "rewards": rewards}


@typed
def optimal_policy(
    log_reference: Float[ArrayLike, "*batch actions"],
    reward: Float[ArrayLike, "*batch actions"],
    *,
    beta: Scalar = 0.1,
) -> tuple[Float[Array, "*batch actions"], dict[str, Array]]:
    """The policy that earns most, less beta times its KL from the reference.

    log pi(y) = log pi_ref(y) + r(y) / beta - log Z

    Args:
        log_reference: log pi_ref over all responses, in nats; need not be normalised.
        reward: r of each response.
        beta: > 0.

    Returns:
        `(log_policy, aux)`: normalised; aux holds "reward" and "kl" of that policy,
        `[...]`, the point of the frontier that belongs to `beta`.

    Raises:
        ValueError: `beta` is out of range.

    >>> log_policy, aux = optimal_policy(jnp.zeros(2), jnp.array([1.0, 0.0]), beta=1.0)
    >>> jnp.exp(log_policy).tolist(), float(aux["reward"]), float(aux["kl"])
    ([0.7311, 0.2689], 0.7311, 0.1109)
    """
    check_range("beta", beta, above=0.0)
    start = jax.nn.log_softmax(as_float32(log_reference))
    reward = as_float32(reward)
    log_policy = jax.nn.log_softmax(start + reward / beta)
    policy = jnp.exp(log_policy)
    # What the policy never does costs nothing, though its log-ratio is infinite.
    gain = jnp.where(policy > 0.0, log_policy - start, 0.0)
    earned, spent = (jnp.sum(policy * x, axis=-1) for x in (reward, gain))
    return log_policy, {"reward": earned, "kl": spent}


def _ratio(policy: Any, reference: Any, length: Any, keep: Array) -> Array:
    """log pi - log pi_ref, 0 where masked; per token where there are lengths."""
    keep = jnp.broadcast_to(keep, policy.shape)
    ratio = jnp.where(keep, as_float32(policy), 0.0)
    if reference is not None:
        ratio = ratio - jnp.where(keep, as_float32(reference), 0.0)
    if length is not None:
        ratio = ratio / jnp.where(keep, jnp.maximum(as_float32(length), 1.0), 1.0)
    return ratio


# f'(u) of the divergence sum pi_ref f(pi / pi_ref), as a function of log u.
_SLOPES = {
    "reverse_kl": lambda ratio: ratio,
    # Beyond e^30 the loss of any margin is what it is, and nothing overflows.
    "forward_kl": lambda ratio: -jnp.exp(jnp.minimum(-ratio, 30.0)),
    "js": jax.nn.log_sigmoid,
}


def _sorted_margin(
    chosen: Array, rejected: Array, keep: Array, axis_name: AxisName
) -> tuple[Array, Array]:
    """This device's margins by rank, masked pairs last; and which of them count."""
    masked = all_gather(~keep, axis_name)

    def ordered(x: Array) -> Array:
        whole = all_gather(x, axis_name)
        return whole[jnp.lexsort((whole, masked))]  # by the mask first

    rows = chosen.shape[0]
    parts = ordered(chosen) - ordered(rejected), jnp.sort(masked)
    begin = axis_index(axis_name) * rows
    margin, last = (jax.lax.dynamic_slice_in_dim(x, begin, rows) for x in parts)
    return margin, ~last


def _pair_loss(
    loss: Kind, h: Array, c: Array, r: Array, b: Scalar, e: float, centre: Array
) -> Array:
    wins, loses = jax.nn.log_sigmoid(b * h), jax.nn.log_sigmoid(-b * h)
    if loss in ("sigmoid", "aot"):
        return -(1.0 - e) * wins - e * loses
    if loss == "robust":
        return (e * loses - (1.0 - e) * wins) / (1.0 - 2.0 * e)
    if loss == "hinge":
        return jax.nn.relu(1.0 - b * h)
    if loss == "ipo":
        return (h - 0.5 / b) ** 2
    if loss == "exo":
        e = e or 1e-3
        low, high = jnp.log(e), jnp.log1p(-e)
        return jnp.exp(wins) * (wins - high) + jnp.exp(loses) * (loses - low)
    if loss == "sppo":
        return (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2
    if loss == "apo_zero":
        return jax.nn.sigmoid(-b * c) + jax.nn.sigmoid(b * r)
    if loss == "apo_down":
        return jax.nn.sigmoid(b * c) + jax.nn.sigmoid(-b * (c - r))
    if loss == "discopop":
        mix = jax.nn.log_sigmoid(b * h / 0.05)
        return -wins * jnp.exp(mix - b * h / 0.05) + jnp.exp(mix - b * h)
    if loss == "bco":
        d = jax.lax.stop_gradient(centre)
        return -jax.nn.log_sigmoid(b * c - d) - jax.nn.log_sigmoid(d - b * r)
    up, down = jax.nn.log_sigmoid(b * c), jax.nn.log_sigmoid(-b * c)
    return -up - 0.5 * down - 0.5 * jax.nn.log_sigmoid(-b * r)  # nca


EXAMPLES = {
    dpo_loss: lambda key: (
        tuple(-20.0 + 2.0 * jax.random.normal(key, (4, 8))),
        {"where": jnp.arange(8) != 3, "label_smoothing": 0.1},
    ),
    plackett_luce_loss: lambda key: (
        tuple(-20.0 + 2.0 * jax.random.normal(key, (2, 8, 3))),
        {"where": jnp.arange(8) != 3},
    ),
    optimal_policy: lambda key: (
        tuple(jax.random.normal(key, (2, 2, 8))), {"beta": 0.5},
    ),
}  # fmt: skip
