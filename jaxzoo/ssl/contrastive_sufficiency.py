"""Contrastive losses, and how sufficient an encoder is that minimises them.

A contrastive loss asks a score S(x, z) to tell the pairs of a joint distribution from
pairs of its marginals. With many negatives its smallest value is minus a mutual
information, and with scores that see x and z through encoders alone it is minus that of
the codes. The excess of the one over the other is the sufficiency of the encoders:

    suff = I_f(x; z) - I_f(f(x); g(z))                           (lost information)
         = E_p(x)p(z) B_f(r(x, z), r'(f(x), g(z)))               (Bregman)
         = inf over S(f(x), g(z)) of R_f(S) - inf over S(x, z) of R_f(S)  (variational)

where r = p(x, z) / (p(x) p(z)), r' is that ratio of the codes, and B_f the Bregman
divergence of f: t log t for "kl" (InfoNCE), (t - 1)^2 / 2 for "chi_squared".
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxzoo.core.collectives import (
    AxisName,
    Side,
    axis_index,
    masked_rows,
    pair_log_sums,
    psum,
    varying,
)
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "contrastive_sufficiency",
    "title": "A Statistical Theory of Contrastive Learning via Approximate Sufficient "
    "Statistics",
    "arxiv": "2503.17538",
    "year": 2025,
    "authors": "Licong Lin, Song Mei",
    "where": "The contrastive risks of f-divergences and the three forms of "
    "sufficiency, and the bound on downstream risk, for squared error.",
    "differs": "Encoders of both views may differ. The constant of the downstream "
    "bound is our own derivation: excess risk <= (B sqrt(2 suff) + eps)^2 for "
    "predictions within [-B, B]. The topic model of the paper is left out.",
}

__all__ = [
    "chi_squared_loss",
    "contrastive_risk",
    "downstream_bound",
    "f_information",
    "info_nce",
    "optimal_scores",
    "sufficiency",
]

Divergence = Literal["kl", "chi_squared"]
Scale = float | Float[ArrayLike, ""]
Joint = Float[ArrayLike, "x z"]


@typed
def info_nce(
    za: Float[ArrayLike, "batch width"],
    zb: Float[ArrayLike, "batch width"],
    *,
    log_scale: Scale = 0.0,
    negatives: Literal["other_view", "both_views"] = "other_view",
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The softmax contrastive loss, mean of both directions.

    -1/2n sum_i log softmax_j(s_ij)[i] + log softmax_j(s_ji)[i],
    s_ij = exp(log_scale) <za_i, zb_j>

    Embeddings are used as they come: normalise them before where cosines are meant.
    "other_view" is CLIP's loss, as open_clip computes it for a whole batch;
    "both_views" is SimCLR's NT-Xent, lightly's `NTXentLoss`, in which each of the 2n
    views meets the 2n - 1 others. Over a mesh the columns go round a ring of devices;
    gradients are by reverse mode alone there.

    Args:
        za: embeddings of the first view, one per row; over a mesh this device's.
        zb: embeddings of the second view; row i belongs to row i of `za`.
        log_scale: log of the inverse temperature, below 40; it gets a gradient.
        negatives: which views a view is told from.
        where: True for the pairs that count.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` over which the batch is
            split; None where it is whole.
        chunk: columns per tile of logits, a divisor of a device's rows; None takes all.

    Returns:
        `(loss, aux)` in nats, float32. `aux["per_example"]` is each pair's part,
        `aux["information"]` the bound log n - loss on the mutual information (for
        "both_views" log(2n - 1) - loss).

    Raises:
        TypeError: the two batches or widths differ.
        ValueError: a knob is out of range, or there is no such axis.

    >>> loss, aux = info_nce(jnp.eye(2), jnp.eye(2))
    >>> float(loss), float(aux["information"])
    (0.3133, 0.3799)
    """
    if isinstance(log_scale, float):
        check_range("log_scale", log_scale)
    if chunk is not None:
        check_range("chunk", chunk, low=1)
    za, zb = (masked_rows(x, where) for x in (za, zb))
    mask = jnp.ones(len(za), bool) if where is None else jnp.asarray(where)
    root = varying(jnp.sqrt(_scale(log_scale, za)), axis_name)
    # So that no product overflows; a bound on all logits would cost as much as one.
    za, zb = (jnp.clip(z * root, -1e13, 1e13) for z in (za, zb))
    own = jnp.sum(za * zb, axis=-1)
    both = negatives == "both_views"
    sums = _both_views if both else _other_view
    log_sums = sums(za, zb, where, axis_name, chunk)

    per_example = jnp.where(mask, 0.5 * (log_sums[0] + log_sums[1]) - own, 0.0)
    count = jnp.sum(mask).astype(za.dtype)
    total, count = psum((jnp.sum(per_example), count), axis_name)
    loss = total / jnp.maximum(count, 1)
    others = 2 * count - 1 if both else count
    information = jnp.log(jnp.maximum(others, 1)) - loss
    return loss, {"per_example": per_example, "information": information}


@typed
def chi_squared_loss(
    za: Float[ArrayLike, "batch width"],
    zb: Float[ArrayLike, "batch width"],
    *,
    log_scale: Scale = 0.0,
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The contrastive loss of the chi-squared divergence, mean of both directions.

    -mean_i s_ii + mean_ij s_ij + 1/4 mean_i Var_j(s_ij) + 1/4 mean_j Var_i(s_ij),
    s_ij = exp(log_scale) <za_i, zb_j>

    Scores are linear in each view, so that means and variances over a batch follow from
    its first two moments: no pair is ever formed, and a mesh exchanges width x width
    numbers whatever the batch.

    Args:
        za: embeddings of the first view, one per row; over a mesh this device's.
        zb: embeddings of the second view; row i belongs to row i of `za`.
        log_scale: log of a factor of all scores; it gets a gradient.
        where: True for the pairs that count.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` over which the batch is
            split; None where it is whole.

    Returns:
        `(loss, aux)`, float32; minus the loss estimates the chi-squared information.
        `aux["alignment"]` is the mean score of pairs less that of all, and
        `aux["spread"]` the variance terms.

    Raises:
        TypeError: the two batches or widths differ.
        ValueError: `log_scale` is NaN, or there is no such axis.

    >>> loss, aux = chi_squared_loss(jnp.eye(2), jnp.eye(2))
    >>> float(loss), float(aux["alignment"]), float(aux["spread"])
    (-0.375, 0.5, 0.125)
    """
    if isinstance(log_scale, float):
        check_range("log_scale", log_scale)
    za, zb = (masked_rows(x, where) for x in (za, zb))
    # Products of four entries: beyond 1e8 they would pass the end of float32.
    scaled = za * varying(_scale(log_scale, za), axis_name)
    za, zb = jnp.clip(scaled, -1e8, 1e8), jnp.clip(zb, -1e8, 1e8)
    mask = jnp.ones(len(za), bool) if where is None else jnp.asarray(where)
    weight = mask.astype(za.dtype)[:, None]
    count = jnp.maximum(psum(jnp.sum(weight), axis_name), 1)

    def mean(x: Array) -> Array:
        return psum(jnp.sum(x * weight, axis=0), axis_name) / count

    means = [mean(za), mean(zb)]
    za, zb = (
        x - varying(m, axis_name)[None] for x, m in zip((za, zb), means, strict=True)
    )
    weighted = (za * weight, zb * weight)
    moments = psum(
        [x.T @ y for x, y in zip(weighted, (za, zb), strict=True)], axis_name
    )
    cov_a, cov_b = (m / count for m in moments)
    # A row's scores vary by <za_i, zb_j - mean>: its own place enters by second moment.
    shared = jnp.sum(cov_a * cov_b)
    spread = 0.25 * (means[0] @ cov_b @ means[0] + means[1] @ cov_a @ means[1])
    spread += 0.5 * shared
    alignment = jnp.sum(mean(za * zb))
    return spread - alignment, {"alignment": alignment, "spread": spread}


@typed
def f_information(joint: Joint, *, divergence: Divergence = "kl") -> Float[Array, ""]:
    """The f-mutual information of two discrete variables.

    I_f(x; z) = sum_xz p(x) p(z) f(p(x, z) / (p(x) p(z)))

    Args:
        joint: probabilities of all pairs, or any multiple of them.
        divergence: "kl" gives the mutual information in nats; "chi_squared" has
            f(t) = (t - 1)^2 / 2, half of Pearson's.

    Returns:
        float32 scalar, >= 0.

    Raises:
        ValueError: the divergence is not one of the two.

    >>> float(f_information(jnp.eye(2))), float(f_information(jnp.ones((2, 2))))
    (0.6931, 0.0)
    """
    ratio, product = _ratio(_normalised(joint))
    return _bregman(ratio, jnp.ones_like(ratio), product, divergence)


@typed
def sufficiency(
    joint: Joint,
    codes: Int[ArrayLike, " x"],
    other_codes: Int[ArrayLike, " z"] | None = None,
    *,
    num_codes: int,
    divergence: Divergence = "kl",
    form: Literal["information", "bregman", "variational"] = "bregman",
) -> Float[Array, ""]:
    """How much of I_f(x; z) the codes of x, and of z, lose; 0 for sufficient ones.

    The three forms at the head of this file; they agree for any encoders.

    Args:
        joint: probabilities of all pairs, or any multiple of them.
        codes: f(x) of each x, in [0, num_codes).
        other_codes: g(z) of each z, likewise; None leaves z as it is.
        num_codes: how many codes there are.
        divergence: as for `f_information`.
        form: which of the three is computed; "bregman" has no cancellation.

    Returns:
        float32 scalar, >= 0; nats for "kl".

    Raises:
        ValueError: `num_codes` is below 1, or a name is not one of those.

    >>> float(sufficiency(jnp.eye(4), jnp.array([0, 0, 1, 1]), num_codes=2))
    0.6931
    """
    p = _normalised(joint)
    ratio, product = _ratio(p)
    coarse = _coarse_ratio(p, codes, other_codes, num_codes)
    if form == "bregman":
        return _bregman(ratio, coarse, product, divergence)
    if form == "information":
        one = jnp.ones_like(ratio)
        whole = _bregman(ratio, one, product, divergence)
        return whole - _bregman(coarse, one, product, divergence)
    of_codes, best = (_scores(r, divergence) for r in (coarse, ratio))
    return _risk(of_codes, p, divergence) - _risk(best, p, divergence)


@typed
def contrastive_risk(
    scores: Float[ArrayLike, "x z"], joint: Joint, *, divergence: Divergence = "kl"
) -> Float[Array, ""]:
    """The contrastive loss of a table of scores in the limit of many negatives.

    -E_p(x,z) S + E_p(x) inf_c E_p(z) f*(S - c) + c, which is
    "kl":          -E_p(x,z) S + E_p(x) log E_p(z) exp S,  InfoNCE less log n
    "chi_squared": -E_p(x,z) S + E_p(x) [E_p(z) S + Var_p(z)(S) / 2]

    Args:
        scores: S(x, z) of all pairs.
        joint: probabilities of all pairs, or any multiple of them.
        divergence: as for `f_information`.

    Returns:
        float32 scalar, at least -I_f(x; z).

    Raises:
        ValueError: the divergence is not one of the two.

    >>> float(contrastive_risk(jnp.zeros((2, 2)), jnp.eye(2)))
    0.0
    """
    scores = jnp.clip(as_float32(scores), -1e15, 1e15)
    return _risk(scores, _normalised(joint), divergence)


@typed
def optimal_scores(
    joint: Joint,
    codes: Int[ArrayLike, " x"],
    other_codes: Int[ArrayLike, " z"] | None = None,
    *,
    num_codes: int,
    divergence: Divergence = "kl",
) -> Float[Array, "x z"]:
    """The scores S(f(x), g(z)) of least contrastive risk: f'(r') up to a constant.

    Args:
        joint: as for `sufficiency`.
        codes: as for `sufficiency`.
        other_codes: as for `sufficiency`.
        num_codes: as for `sufficiency`.
        divergence: "kl" gives the log-ratio in nats, at least -100.

    Returns:
        float32 `[x, z]`.

    Raises:
        ValueError: `num_codes` is below 1, or the divergence is not one of the two.

    >>> joint, codes = jnp.eye(4), jnp.array([0, 0, 1, 1])
    >>> optimal_scores(joint, codes, codes, num_codes=2)[0].tolist()
    [0.6931, 0.6931, -100.0, -100.0]
    """
    coarse = _coarse_ratio(_normalised(joint), codes, other_codes, num_codes)
    return _scores(coarse, divergence)


@typed
def downstream_bound(
    suff: Float[ArrayLike, "*batch"],
    augmentation_error: Float[ArrayLike, "*batch"],
    *,
    bound: float = 1.0,
) -> Float[Array, "*batch"]:
    """No best head on the codes f(x) has a larger excess risk in squared error.

    E (E[y | f(x)] - E[y | x])^2 <= (B sqrt(2 suff) + eps)^2

    A head h(f(x)) may average a predictor g(z) over the second views that the codes
    expect: by Pinsker's inequality ("kl"), or by Cauchy and Schwarz ("chi_squared"), it
    is within B sqrt(2 suff) of the average over those that x has, in mean square.

    Args:
        suff: `sufficiency` of the codes, by either divergence.
        augmentation_error: eps, the root mean square of g(z) - E[y | x] over pairs, of
            any predictor g of the second view within [-B, B].
        bound: B.

    Returns:
        The bound on the excess risk, float32.

    Raises:
        ValueError: `bound` is negative.

    >>> downstream_bound(jnp.array([0.0, 0.02]), jnp.array([0.1, 0.1])).tolist()
    [0.01, 0.09]
    """
    check_range("bound", bound, low=0)
    suff, error = as_float32(suff), as_float32(augmentation_error)
    positive = suff > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, 2.0 * suff, 1.0)), 0.0)
    return jnp.square(jnp.clip(bound * root + error, -1e18, 1e18))


def _scale(log_scale: Any, like: Array) -> Array:
    return jnp.exp(jnp.minimum(jnp.asarray(log_scale, like.dtype), 40.0))


def _logits(rows: Side, columns: Side) -> Array:
    return _without(rows.features @ columns.features.T, rows.tags, columns.tags)


def _gram_logits(rows: Side, columns: Side) -> Array:
    """`_logits` where the columns are the rows: one product fewer in the gradient."""
    return _without(_gram(rows.features), rows.tags, columns.tags)


def _without(logits: Array, rows: dict, columns: dict) -> Array:
    """The logits of pairs that do not count put out of the way."""
    if "where" in columns:
        both = rows["where"][:, None] & columns["where"][None]
        logits = jnp.where(both, logits, -1e30)
    if "view" in rows:  # no view is told from itself
        own = rows["view"][:, None] == columns["view"][None]
        logits = jnp.where(own, -1e30, logits)
    return logits


def _other_view(za, zb, where, axis_name, chunk) -> tuple[Array, Array]:
    tags = {} if where is None else {"where": jnp.asarray(where)}
    knobs = {"axis_name": axis_name, "chunk": chunk}
    return pair_log_sums(_logits, Side(za, tags), Side(zb, tags), **knobs)


def _both_views(za, zb, where, axis_name, chunk) -> tuple[Array, Array]:
    # Of the four blocks of pairs that of (b, a) is that of (a, b), read by columns.
    of_a, of_b = _other_view(za, zb, where, axis_name, chunk)
    own_a, own_b = (_own_view(z, where, axis_name, chunk) for z in (za, zb))
    return jnp.logaddexp(of_a, own_a), jnp.logaddexp(of_b, own_b)


def _own_view(z, where, axis_name, chunk) -> Array:
    views = axis_index(axis_name) * len(z) + jnp.arange(len(z))
    tags = {"view": varying(views, axis_name)}
    if where is not None:
        tags["where"] = jnp.asarray(where)
    whole = axis_name is None and chunk is None
    logits = _gram_logits if whole else _logits
    knobs = {"axis_name": axis_name, "chunk": chunk}
    return pair_log_sums(logits, Side(z, tags), Side(z, tags), **knobs)[0]


@jax.custom_jvp
def _gram(z: Array) -> Array:
    return z @ z.T


@_gram.defjvp
def _gram_jvp(primals: Any, tangents: Any) -> Any:
    (z,), (dz,) = primals, tangents
    half = dz @ z.T  # transposed, (g + g.T) @ z: one product, where z @ z.T gives two
    return _gram(z), half + half.T


def _normalised(joint: ArrayLike) -> Array:
    joint = as_float32(joint)
    # First by the largest: the square of a tiny total would be 0 in the derivative.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(joint)))
    joint = joint / jnp.where(largest > 0, largest, 1.0)
    total = jnp.sum(joint)
    return joint / jnp.where(total > 0, total, 1.0)


def _divide(p: Array, product: Array) -> Array:
    return p / jnp.where(product > 0, product, 1.0)


def _ratio(p: Array) -> tuple[Array, Array]:
    """p(x, z) / (p(x) p(z)), and the product below."""
    product = jnp.sum(p, axis=1, keepdims=True) * jnp.sum(p, axis=0, keepdims=True)
    return _divide(p, product), product


def _coarse_ratio(
    p: Array, codes: ArrayLike, other_codes: ArrayLike | None, num_codes: int
) -> Array:
    """The ratio of the codes, at every (x, z)."""
    check_range("num_codes", num_codes, low=1)
    rows = jax.nn.one_hot(codes, num_codes, dtype=p.dtype)
    if other_codes is None:
        ratio, _ = _ratio(rows.T @ p)
        return rows @ ratio
    columns = jax.nn.one_hot(other_codes, num_codes, dtype=p.dtype)
    ratio, _ = _ratio(rows.T @ p @ columns)
    return rows @ ratio @ columns.T


def _log(x: Array) -> Array:
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -100.0)


def _bregman(
    ratio: Array, other: Array, product: Array, divergence: Divergence
) -> Array:
    """E_p(x)p(z) B_f(ratio, other)."""
    if divergence == "chi_squared":
        return 0.5 * jnp.sum(product * jnp.square(ratio - other))
    log_ratio = _log(ratio) - _log(other)
    return jnp.sum(product * (ratio * log_ratio - ratio + other))


def _scores(ratio: Array, divergence: Divergence) -> Array:
    return ratio - 1.0 if divergence == "chi_squared" else _log(ratio)


def _risk(scores: Array, p: Array, divergence: Divergence) -> Array:
    of_x, of_z = jnp.sum(p, axis=1), jnp.sum(p, axis=0)
    joined = jnp.sum(p * scores)
    if divergence == "kl":
        log_z = _log(of_z)[None]
        return jnp.sum(of_x * jax.nn.logsumexp(scores + log_z, axis=1)) - joined
    means = scores @ of_z
    variances = jnp.square(scores - means[:, None]) @ of_z
    return jnp.sum(of_x * (means + 0.5 * variances)) - joined


def _pair_example(key: Array):
    za, zb = jax.random.normal(key, (2, 16, 8))
    return (za, zb), {"log_scale": jnp.float32(0.3), "where": jnp.arange(16) < 13}


def _info_nce_example(key: Array):
    args, kwargs = _pair_example(key)
    return args, {**kwargs, "negatives": "both_views", "chunk": 2}


def _joint_example(key: Array):
    return jnp.exp(jax.random.normal(key, (8, 8)))


def _codes_example(key: Array):
    codes = jnp.arange(8) % 3
    return (_joint_example(key), codes, codes), {"num_codes": 3}


def _bound_example(key: Array):
    return tuple(jnp.square(jax.random.normal(key, (2, 8)))), {"bound": 2.0}


EXAMPLES = {
    info_nce: _info_nce_example,
    chi_squared_loss: _pair_example,
    f_information: lambda key: ((_joint_example(key),), {}),
    sufficiency: _codes_example,
    contrastive_risk: lambda key: (
        (jax.random.normal(key, (8, 8)), _joint_example(key)),
        {},
    ),
    optimal_scores: _codes_example,
    downstream_bound: _bound_example,
}
