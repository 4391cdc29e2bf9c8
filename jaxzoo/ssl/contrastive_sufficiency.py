"""Contrastive losses, and how sufficient an encoder is that minimises them.

A contrastive loss asks a score S(x, z) to tell the pairs of a joint distribution from
pairs of its marginals. With many negatives its smallest value is minus a mutual
information, and with scores that see x and z through encoders alone it is minus that of
the codes. The excess of the one over the other is the sufficiency of the encoders:

    suff = I_f(x; z) - I_f(f(x); g(z))                           (lost information)
         = E_p(x)p(z) B_f(r(x, z), r'(f(x), g(z)))               (Bregman)
         = inf over S(f(x), g(z)) of R_f(S) - inf over S(x, z) of R_f(S)  (variational)

where r = p(x, z) / (p(x) p(z)), r' is that ratio of the codes, and B_f the Bregman
divergence of f: t log t for "kl" (InfoNCE), (t - 1)^2 / 2 for "chi_squared". Here are
tables of discrete x and z; the losses R_f of a batch of embeddings are `info_nce` and
`chi_squared_loss` in `jaxzoo.nn.contrastive`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "contrastive_sufficiency",
    "title": "A Statistical Theory of Contrastive Learning via Approximate Sufficient "
    "Statistics",
    "arxiv": "2503.17538",
    "year": 2025,
    "authors": "Licong Lin, Song Mei",
    "where": "The contrastive risks of f-divergences (as losses of batches in "
    "jaxzoo/nn/contrastive.py), the three forms of sufficiency, and the bound on "
    "downstream risk, for squared error.",
    "differs": "Encoders of both views may differ. The constant of the downstream "
    "bound is our own derivation: excess risk <= (B sqrt(2 suff) + eps)^2 for "
    "predictions within [-B, B]. The topic model of the paper is left out.",
}

__all__ = [
    "contrastive_risk",
    "downstream_bound",
    "f_information",
    "optimal_scores",
    "sufficiency",
]

Divergence = Literal["kl", "chi_squared"]
Joint = Float[ArrayLike, "x z"]


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
        joint: as for `f_information`.
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
        parts = [_bregman(r, one, product, divergence) for r in (ratio, coarse)]
    else:
        risks = (_scores(r, divergence) for r in (coarse, ratio))
        parts = [_risk(scores, p, divergence) for scores in risks]
    return parts[0] - parts[1]


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
        joint: as for `f_information`.
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


def _normalised(joint: ArrayLike) -> Array:
    joint = as_float32(joint)
    # First by the largest: the square of a tiny total would be 0 in the derivative.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(joint)))
    joint = joint / jnp.where(largest > 0, largest, 1.0)
    total = jnp.sum(joint)
    return joint / jnp.where(total > 0, total, 1.0)


def _ratio(p: Array) -> tuple[Array, Array]:
    """p(x, z) / (p(x) p(z)), and the product below."""
    product = jnp.sum(p, axis=1, keepdims=True) * jnp.sum(p, axis=0, keepdims=True)
    return p / jnp.where(product > 0, product, 1.0), product


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


def _joint(key: Array) -> Array:
    return jnp.exp(jax.random.normal(key, (8, 8)))


def _codes_example(key: Array):
    codes = jnp.arange(8) % 3
    return (_joint(key), codes, codes), {"num_codes": 3}


EXAMPLES = {
    f_information: lambda key: ((_joint(key),), {}),
    sufficiency: _codes_example,
    contrastive_risk: lambda key: (
        (jax.random.normal(key, (8, 8)), _joint(key)), {},
    ),
    optimal_scores: _codes_example,
    downstream_bound: lambda key: (
        tuple(jnp.square(jax.random.normal(key, (2, 8)))), {"bound": 2.0},
    ),
}  # fmt: skip
