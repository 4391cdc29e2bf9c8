"""MCInfoNCE: contrastive learning of posteriors on the sphere, not of points.

    encoder   q(z|x) = vMF(mean(x), kappa(x)), a von Mises-Fisher distribution
    loss      -log mean_k exp(c z_k.z_k+) / (exp(c z_k.z_k+) + mean_m exp(c z_k.z_km-))

Samples z, z+ and z- come from the posteriors of an input, of its positive and of the
negatives. Where inputs are ambiguous, kappa(x) finds how much.

    z = sample_vmf(first_key, mean, kappa, num_samples=16)              # [B, 16, d]
    other = sample_vmf(second_key, other_mean, other_kappa, num_samples=16)
    loss, aux = mcinfonce(z, other, concentration=20.0)

`sample_vmf` is that of `jaxzoo.nn.von_mises_fisher`. Directions are scaled to unit
length wherever they come in; a zero vector stays zero. Everything is in nats.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxzoo.core.collectives import AxisName, all_gather, axis_index, axis_size, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "mcinfonce",
    "title": "Probabilistic Contrastive Learning Recovers the Correct Aleatoric "
    "Uncertainty of Ambiguous Inputs",
    "arxiv": "2302.02865",
    "year": 2023,
    "authors": "Michael Kirchhof, Enkelejda Kasneci, Seong Joon Oh",
    "where": "Section 3 (generative process, MCInfoNCE), section 4.1 (controlled "
    "experiment) and 4.4 (credible intervals for retrieval); the posteriors are those "
    "of jaxzoo/nn/von_mises_fisher.py.",
    "differs": "The released code weighs the negatives by 1/M and the positive by 1, "
    "the paper both by 1/(M+1): `convention`. Negatives are the other rows of the "
    "batch unless given. Gradients of the samples to the concentration are exact "
    "(implicit); the released code drops the term of the rejection.",
}

__all__ = ["credible_retrieval", "mcinfonce"]


@typed
def mcinfonce(
    z: Float[ArrayLike, "batch samples d"],
    positive: Float[ArrayLike, "batch samples d"],
    negative: Float[ArrayLike, "batch negatives samples d"] | None = None,
    *,
    concentration: Float[ArrayLike, ""] | float = 16.0,
    convention: Literal["official", "paper"] = "official",
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """InfoNCE of posterior samples, averaged inside the logarithm.

    per example  -log mean_k exp(c p_k) / (v exp(c p_k) + w sum_m exp(c n_km))

    p_k and n_km are the cosines of sample k with those of the positive and the
    negatives. "official": v = 1, w = 1/M, the released code; "paper": v = w = 1/(M+1),
    whose value lies below 0 where the positives stand out.

    Args:
        z: samples of each row's posterior; scaled to unit length here.
        positive: samples of its positive's posterior, likewise.
        negative: samples of M negatives per row; None takes the positives of all other
            rows that count, those of other devices among them.
        concentration: c, the positives' concentration around each other in the latent
            space; a number or a learned scalar.
        convention: see above.
        where: True for the rows that count, as rows and as negatives; masked rows may
            hold anything. With none at all the loss is 0.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` that the batch is split
            over; None where arrays are whole.

    Returns:
        `(loss, aux)`: float32 scalar in nats; `aux["per_example"]` and
        `aux["positive_cosine"]`, the mean p_k, per row.

    Raises:
        TypeError: shapes do not fit; names the argument.
        ValueError: there is one row and no negative, or no such axis.

    >>> z = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> loss, aux = mcinfonce(z, z, concentration=1.0)
    >>> float(loss), aux["positive_cosine"].tolist()
    (0.3133, [1.0, 1.0])
    """
    if not isinstance(concentration, jax.Array):
        check_range("concentration", float(concentration), low=0)
    rows = z.shape[0]
    if negative is None and rows * axis_size(axis_name) < 2:
        raise ValueError(
            "argument 'z' has 1 row, expected 2 or more where no 'negative' is given: "
            "the other rows are the negatives."
        )
    counts = jnp.ones(rows, bool) if where is None else jnp.asarray(where)
    z, positive = _rows(z, counts), _rows(positive, counts)
    cosine = jnp.sum(z * positive, axis=-1)  # [B, K]
    if negative is None:
        pool, known = all_gather(positive, axis_name), all_gather(counts, axis_name)
        own = axis_index(axis_name) * rows + jnp.arange(rows)
        valid = known[None, :] & (jnp.arange(len(known))[None, :] != own[:, None])
        others = jnp.einsum("bkd,nkd->bkn", z, pool)
    else:
        valid = jnp.ones(negative.shape[:2], bool)
        others = jnp.einsum("bkd,bmkd->bkm", z, _rows(negative, counts))
    scale = as_float32(concentration)
    total = jnp.maximum(jnp.sum(valid, axis=1), 1)[:, None].astype(z.dtype)
    logits = jnp.where(valid[:, None, :], scale * others, -jnp.inf)
    if convention == "official":
        logits = logits - jnp.log(total)[:, :, None]
    top = scale * cosine
    both = jnp.concatenate([top[..., None], logits], axis=-1)
    ratio = top - jax.nn.logsumexp(both, axis=-1)
    if convention == "paper":
        ratio = ratio + jnp.log1p(total)
    samples = z.shape[1]
    per_example = math.log(samples) - jax.nn.logsumexp(ratio, axis=1)
    per_example = jnp.where(counts, per_example, 0.0)
    count = jnp.maximum(psum(jnp.sum(counts), axis_name), 1).astype(z.dtype)
    loss = psum(jnp.sum(per_example), axis_name) / count
    aux = {"per_example": per_example, "positive_cosine": jnp.mean(cosine, axis=1)}
    return loss, jax.lax.stop_gradient(aux)


@typed
def credible_retrieval(
    samples: Float[ArrayLike, "queries samples d"],
    mean: Float[ArrayLike, "queries d"],
    database: Float[ArrayLike, "entries d"],
    *,
    level: float = 0.95,
) -> Bool[Array, "queries entries"]:
    """Which entries lie in the credible region of each query's posterior.

    The region is the cap around the mean that holds `level` of the samples: entry n is
    retrieved where mean.n >= the (1 - level) quantile of mean.z_k.

    Args:
        samples: posterior samples of each query; scaled to unit length here.
        mean: mean direction of each query, likewise.
        database: means of the entries to retrieve from, likewise.
        level: probability of the region, in [0, 1].

    Returns:
        One bool per query and entry.

    Raises:
        TypeError: shapes do not fit; names the argument.
        ValueError: `level` is out of range.

    >>> mean, entries = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.1], [0.0, 1.0]])
    >>> samples = jnp.array([[[1.0, 0.2], [1.0, -0.2]]])
    >>> credible_retrieval(samples, mean, entries).tolist()
    [[True, False]]
    """
    check_range("level", level, low=0, high=1)
    samples, mean, database = (
        _unit(as_float32(value)) for value in (samples, mean, database)
    )
    cosine = jnp.sum(samples * mean[:, None, :], axis=-1)
    edge = jnp.quantile(cosine, 1.0 - level, axis=1)
    return mean @ database.T >= edge[:, None]


def _rows(x: ArrayLike, counts: Array) -> Array:
    """Unit vectors, zero where the row does not count."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    return _unit(jnp.where(counts.reshape(shape), as_float32(x), 0.0))


def _unit(x: Array) -> Array:
    # The length does not matter: to divide by the largest entry first saves squares
    # that leave the numbers, and asks for no gradient.
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(top > 0, top, 1.0)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(square > 0, square, 1.0))


def _samples_example(key: Array):
    z, noise = jax.random.normal(key, (2, 8, 3, 4))
    return (z, z + 0.5 * noise), {"concentration": 4.0, "where": jnp.arange(8) < 6}


def _retrieval_example(key: Array):
    samples = jax.random.normal(key, (8, 5, 4))
    return (samples, jnp.mean(samples, axis=1), samples[:, 0]), {}


EXAMPLES = {mcinfonce: _samples_example, credible_retrieval: _retrieval_example}
