"""Passive latents of a VAE: correlated as means, uncorrelated as samples.

Over a data set each latent, by the variance sigma^2 of its posteriors, is

    active   sigma^2 near 0 for all data: it says something of each
    passive  sigma^2 near 1 for all data: it is the prior, and the decoder ignores it
    mixed    neither: active for a part of the data

Means of passive latents hardly vary, but how they vary still depends on x. Correlations
do not see the scale; in a sample z = mean + sigma eps the noise hides it all.

    kinds = classify_latents(mean, log_std)                     # of all data, [N, D]
    gap, aux = total_correlation_gap(mean, z)                   # z: a draw of each
    less, _ = total_correlation_gap(mean, z, where=~kinds.passive)
    score, _ = averaged_mi(discretize(mean), where=~kinds.passive)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxzoo.core.divergences import gaussian_total_correlation
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "passive_variables",
    "title": "Be More Active! Understanding the Differences between Mean and Sampled "
    "Representations of Variational Autoencoders",
    "arxiv": "2109.12679",
    "year": 2023,
    "authors": "Lisa Bonheme, Marek Grzes",
    "where": "Kinds of latents over several examples (section 3); total correlation "
    "and averaged mutual information with and without passive ones (section 4).",
    "differs": "Written from the abstract and the released code, whose thresholds and "
    "conventions these are; the sections could not be read. A ridge of 1e-6, the "
    "correlations of samples in closed form and a limit for the variance of passive "
    "means are additions. Left out: Wasserstein correlation, downstream tasks, "
    "effective rank, how all comes about in training. The experiment trains MLPs on "
    "3,000 small sprites and on digits, and has ten draws of each posterior. At the "
    "beta of the claims, 4, chosen on other seeds, all hold; but of 20 models with "
    "betas of 1, 2, 4 and 8 there are 6 in which one does not: latents that are not "
    "passive have a part of the gap, or one that counts as passive is a little active "
    "(means of variance 0.03) and correlates by more than 0.05 in samples.",
}

__all__ = [
    "LatentKinds",
    "averaged_mi",
    "classify_latents",
    "correlations",
    "discretize",
    "total_correlation_gap",
]

LARGEST = 1e15  # of what is squared and summed in float32


class LatentKinds(NamedTuple):
    """Of each latent its kind, one of three, and the figures that say so.

    Over the data: `variance`, the mean of sigma^2; `spread`, its variance;
    `mean_variance`, the variance of the posteriors' means.
    """

    active: Bool[Array, " latents"]
    passive: Bool[Array, " latents"]
    mixed: Bool[Array, " latents"]
    variance: Float[Array, " latents"]
    spread: Float[Array, " latents"]
    mean_variance: Float[Array, " latents"]


@typed
def classify_latents(
    mean: Float[ArrayLike, "data latents"],
    log_std: Float[ArrayLike, "data latents"],
    *,
    tolerance: float | Float[ArrayLike, ""] = 0.1,
    largest_spread: float | Float[ArrayLike, ""] = 0.1,
    largest_mean_variance: float | Float[ArrayLike, ""] | None = None,
) -> LatentKinds:
    """Which latents are active, passive or mixed over a data set.

    active:  E sigma^2 <= tolerance       and Var sigma^2 < largest_spread
    passive: |E sigma^2 - 1| <= tolerance and Var sigma^2 < largest_spread
    mixed:   all others, as in github.com/bonheml/tc_study; the defaults are its values

    Args:
        mean: of the posteriors, `[N, D]`; beyond 1e15 it counts as 1e15.
        log_std: log of their standard deviations, likewise, within [-20, 20].
        tolerance: >= 0, of the mean variance from 0 or 1.
        largest_spread: >= 0, of the variance over the data.
        largest_mean_variance: >= 0; a latent whose means vary by that is not passive.
            None: not asked, as in the released code.

    Returns:
        `LatentKinds`, all `[D]`.

    Raises:
        ValueError: a number is negative.

    >>> variance = jnp.array([[0.01, 1.0, 0.01], [0.02, 0.99, 1.0]])
    >>> kinds = classify_latents(jnp.zeros((2, 3)), 0.5 * jnp.log(variance))
    >>> kinds.active.tolist(), kinds.passive.tolist()
    ([True, False, False], [False, True, False])
    """
    check_range("tolerance", tolerance, low=0.0)
    check_range("largest_spread", largest_spread, low=0.0)
    each = _square(log_std)
    variance, spread = jnp.mean(each, axis=0), jnp.var(each, axis=0)
    mean_variance = jnp.mean(jnp.square(_centred(mean)), axis=0)
    tolerance = as_float32(tolerance)
    steady = spread < as_float32(largest_spread)
    active = steady & (variance <= tolerance)
    passive = steady & (jnp.abs(variance - 1.0) <= tolerance) & ~active
    if largest_mean_variance is not None:
        check_range("largest_mean_variance", largest_mean_variance, low=0.0)
        passive &= mean_variance < as_float32(largest_mean_variance)
    mixed = ~(active | passive)
    return LatentKinds(active, passive, mixed, variance, spread, mean_variance)


@typed
def correlations(
    mean: Float[ArrayLike, "data latents"],
    log_std: Float[ArrayLike, "data latents"] | None = None,
) -> Float[Array, "latents latents"]:
    """Correlations of means, or of samples in closed form: of infinitely many draws.

    R_ij = Cov(mean_i, mean_j) / (s_i s_j),   s_i^2 = Var mean_i [+ E sigma_i^2]

    Noise adds to variances alone: the correlations of a passive latent go to nothing.

    Args:
        mean: codes, `[N, D]`; beyond 1e15 they count as 1e15.
        log_std: log of the posteriors' standard deviations, within [-20, 20]; None: of
            `mean` as it is, be it means or draws.

    Returns:
        `[D, D]`, float32, in [-1, 1], 1 on the diagonal. A column that does not vary
        has 0 with all others.

    >>> mean = jnp.array([[1.0, 0.1], [-1.0, -0.1]])  # scales do not matter
    >>> float(correlations(mean)[0, 1])
    1.0
    >>> float(correlations(mean, jnp.array([[-9.0, 0.0]] * 2))[0, 1])
    0.0995
    """
    centred = _centred(mean)
    variance = jnp.mean(jnp.square(centred), axis=0)
    noisy = variance if log_std is None else variance + jnp.mean(_square(log_std), 0)
    flat = noisy <= 1e-30
    scale = jnp.sqrt(jnp.where(flat, 1.0, noisy))[None]
    scaled = jnp.where(flat[None], 0.0, centred / scale)
    together = jnp.einsum("ni,nj->ij", scaled, scaled) / len(centred)
    return jnp.where(jnp.eye(len(flat), dtype=bool), 1.0, together)


@typed
def total_correlation_gap(
    mean: Float[ArrayLike, "data latents"],
    sampled: Float[ArrayLike, "draws latents"],
    *,
    where: Bool[ArrayLike, " latents"] | None = None,
    ridge: float | Float[ArrayLike, ""] = 1e-6,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """By how much means are more correlated than samples.

    gap = TC(mean) - TC(sampled),   TC = (sum_i log S_ii - log det S) / 2

    S being the covariance, as in disentanglement_lib's gaussian_total_correlation.

    Args:
        mean: of the posteriors, `[N, D]`, N > D.
        sampled: draws of them, `[M, D]`, M > D; one each, or several.
        where: latents that count, `[D]`; None: all. `~kinds.passive` drops those.
        ridge: >= 0, added to the diagonal of the correlations, so that codes one of
            which is a sum of others have a finite value; 0 in the released code.

    Returns:
        `(gap, aux)`: float32 scalar in nats; in aux "mean" and "sampled", both TCs.

    Raises:
        ValueError: `ridge` is negative.

    >>> mean = jnp.array([[1.0, 0.1], [-1.0, -0.1], [1.0, 0.1], [-1.0, 0.0]])
    >>> noise = jnp.array([[0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, -1.0]])
    >>> gap, aux = total_correlation_gap(mean, mean + noise)
    >>> float(gap), float(aux["sampled"])
    (0.8494, 0.0029)
    """
    check_range("ridge", ridge, low=0.0)

    aux = {}
    for name, x in (("mean", mean), ("sampled", sampled)):
        # A column of zeros counts as uncorrelated with all others.
        kept = x if where is None else jnp.where(where[None], x, 0.0)
        aux[name] = gaussian_total_correlation(kept, ridge=ridge)
    return aux["mean"] - aux["sampled"], aux


@typed
def discretize(
    x: Float[ArrayLike, "data latents"], *, num_bins: int = 20
) -> Int[Array, "data latents"]:
    """Codes by bins of equal width, from each column's smallest to its largest.

    Args:
        x: codes, `[N, D]`; beyond 1e15 they count as 1e15.
        num_bins: how many, > 0; the released code has 20.

    Returns:
        Bins from 0 to `num_bins` - 1, int32 `[N, D]`; 0 where a column does not vary.

    Raises:
        ValueError: `num_bins` is not positive.

    >>> discretize(jnp.array([[0.0], [1.0], [2.5], [4.0]]), num_bins=4)[:, 0].tolist()
    [0, 1, 2, 3]
    """
    check_range("num_bins", num_bins, low=1)
    x = jnp.clip(as_float32(x), -LARGEST, LARGEST)
    low = jnp.min(x, axis=0, keepdims=True)
    width = jnp.max(x, axis=0, keepdims=True) - low
    share = (x - low) / jnp.where(width > 0.0, width, 1.0)
    return jnp.minimum(num_bins * share, num_bins - 1).astype(jnp.int32)


@typed
def averaged_mi(
    levels: Int[ArrayLike, "data latents"],
    *,
    where: Bool[ArrayLike, " latents"] | None = None,
    num_bins: int = 20,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean mutual information of pairs of discrete codes, from their joint histogram.

    mean over i != j of sum_ab p_ij(a, b) log p_ij(a, b) / (p_i(a) p_j(b))

    As in disentanglement_lib. It is too high by about (num_bins - 1)^2 / (2 N).

    Args:
        levels: bins of codes, from `discretize`, `[N, D]`, in [0, num_bins).
        where: latents that count, `[D]`; None: all.
        num_bins: how many, > 0. Memory is (D num_bins)^2 and N D num_bins.

    Returns:
        `(score, aux)`: float32 scalar in nats, 0 for fewer than two latents; in aux
        "information" `[D, D]`, with entropies on the diagonal.

    Raises:
        ValueError: `num_bins` is not positive.

    >>> levels = jnp.array([[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]])
    >>> score, aux = averaged_mi(levels, num_bins=2)  # a third of log 2
    >>> float(score), aux["information"][0].round(4).tolist()
    (0.231, [0.6931, 0.6931, 0.0])
    """
    check_range("num_bins", num_bins, low=1)
    size, latents = jnp.shape(levels)
    one_hot = jax.nn.one_hot(levels, num_bins, dtype=jnp.float32)
    joint = jnp.einsum("nia,njb->ijab", one_hot, one_hot) / size
    single = jnp.mean(one_hot, axis=0)
    apart = jnp.einsum("ia,jb->ijab", single, single)
    seen = joint > 0.0
    ratio = jnp.where(seen, joint, 1.0) / jnp.where(seen, apart, 1.0)
    information = jnp.sum(joint * jnp.log(ratio), axis=(2, 3))
    kept = jnp.ones(latents, bool) if where is None else jnp.asarray(where)
    pairs = kept[:, None] & kept[None] & ~jnp.eye(latents, dtype=bool)
    count = jnp.maximum(jnp.sum(pairs), 1).astype(information.dtype)
    score = jnp.sum(jnp.where(pairs, information, 0.0)) / count
    return score, {"information": information}


def _centred(x: ArrayLike) -> Array:
    x = jnp.clip(as_float32(x), -LARGEST, LARGEST)
    return x - jnp.mean(x, axis=0, keepdims=True)


def _square(log_std: ArrayLike) -> Array:
    """sigma^2; its square is float32."""
    return jnp.exp(2.0 * jnp.clip(as_float32(log_std), -20.0, 20.0))


def _posteriors(key: Array) -> tuple[Array, Array]:
    mean, log_std = jax.random.normal(key, (2, 16, 3))
    return mean, 0.3 * log_std


EXAMPLES = {
    classify_latents: lambda key: (_posteriors(key), {"largest_mean_variance": 0.5}),
    correlations: lambda key: (_posteriors(key), {}),
    total_correlation_gap: lambda key: (_posteriors(key), {"where": jnp.arange(3) < 2}),
    discretize: lambda key: (_posteriors(key)[:1], {"num_bins": 4}),
    averaged_mi: lambda key: ((jax.random.randint(key, (16, 3), 0, 20),), {}),
}
