"""Variational Open-Domain: a retriever and a reader trained by a Renyi bound.

The document z that answers a question q is a latent variable among P of a corpus, with
p(z|q) = softmax f_theta, and K of them are drawn by r(z|q) = softmax f_phi. With
w = p(a|z, q) p(z|q) / r(z|q) for the answer a,

    L_alpha = log E_r[w^(1 - alpha)] / (1 - alpha), ELBO = L_1 <= L_alpha <= L_0 = log p

Neither softmax need be normalised: with zeta = exp(f_theta - f_phi) and the weights s_i
of the K documents (E sum_i s_i h(z_i) = E_r h),

    w_i = p(a|z_i, q) zeta_i / sum_j s_j zeta_j
    L = log sum_i s_i w_i^(1 - alpha) / (1 - alpha)

    index, log_s = priority_sample(key, f_phi, num_samples=8)              # [B, 8]
    def chosen(x):
        return jnp.take_along_axis(x, index, axis=-1)
    loss, aux = vod_objective(log_p, chosen(f_theta), chosen(f_phi), log_s, alpha=0.5)
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxzoo.core.stats import mean_where
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "vod",
    "title": "Variational Open-Domain Question Answering",
    "arxiv": "2210.06345",
    "year": 2023,
    "authors": "Valentin Lievin, Andreas Geert Motzfeldt, Ida Riis Jensen, Ole Winther",
    "where": "The Renyi bound and its self-normalised estimate with priority sampling, "
    "and the gradients of the released code.",
    "differs": "The value is the bound, whose gradients the released code has as "
    "losses of their own; as there, the sampler's leaves out what comes through zeta, "
    "and weights are scaled to a sum of 1. Priority sampling has exponential noise by "
    "default, as there; the paper's is a knob. A proposal apart from the sampler that "
    "is trained, and alpha above 1, are left out; the top-P documents, retriever and "
    "reader are the caller's. The experiment has random scores for 200 documents and "
    "measures bounds: nothing is trained on questions.",
}

__all__ = ["priority_sample", "renyi_bound", "vod_objective"]


@typed
def priority_sample(
    key: Key[Array, ""],
    logits: Float[ArrayLike, "*batch documents"],
    *,
    num_samples: int,
    noise: Literal["exponential", "uniform"] = "exponential",
) -> tuple[Int[Array, "*batch num_samples"], Float[Array, "*batch num_samples"]]:
    """Documents without replacement, and weights under which sums have no bias.

    The K largest of p_i / e_i stay, and tau is the next. Given tau each stays by itself
    with probability P(p_i / e_i > tau), over which p_i is divided:

        s_i = p_i / (1 - exp(-p_i / tau)) for exponential e, max(p_i, tau) for uniform

    Args:
        key: a typed key, consumed.
        logits: of p, up to a constant, `[..., P]`.
        num_samples: K, in [1, P]. All documents have their p as weights.
        noise: of e. "exponential" is the released code, and its documents are those of
            Gumbel top-K; "uniform" is priority sampling as it was published.

    Returns:
        `(index, log_s)`, `[..., K]`: the documents by falling priority, and the log of
        their weights, float32, whose sum is 1 on average.

    Raises:
        ValueError: `num_samples` is out of range.

    >>> logits = jnp.log(jnp.array([0.7, 0.2, 0.1]))
    >>> index, log_s = priority_sample(jax.random.key(0), logits, num_samples=3)
    >>> jnp.exp(log_s)[jnp.argsort(index)].round(4).tolist()
    [0.7, 0.2, 0.1]
    """
    logits = as_float32(logits)
    check_range("num_samples", num_samples, low=1, high=logits.shape[-1])
    log_p = jax.nn.log_softmax(logits, axis=-1)
    tiny = jnp.finfo(jnp.float32).tiny
    if noise == "exponential":
        e = jax.random.exponential(key, logits.shape)
    else:
        e = jax.random.uniform(key, logits.shape)
    priority = log_p - jnp.log(jnp.maximum(e, tiny)).astype(log_p.dtype)
    order = jnp.argsort(-priority, axis=-1)
    index = order[..., :num_samples].astype(jnp.int32)
    chosen = jnp.take_along_axis(log_p, index, axis=-1)
    if num_samples == logits.shape[-1]:
        return index, chosen
    following = order[..., num_samples : num_samples + 1]
    log_tau = jnp.take_along_axis(priority, following, axis=-1)
    if noise == "uniform":
        return index, jnp.maximum(chosen, log_tau)
    # Beyond the limits the probability of staying is 1, or what it is a ratio to.
    ratio = jnp.exp(jnp.clip(chosen - log_tau, -80.0, 20.0))
    return index, chosen - jnp.log(-jnp.expm1(-ratio))


@typed
def renyi_bound(
    log_p: Float[ArrayLike, "*batch documents"],
    f_theta: Float[ArrayLike, "*batch documents"],
    f_phi: Float[ArrayLike, "*batch documents"],
    log_s: Float[ArrayLike, "*batch documents"] | None = None,
    *,
    alpha: float = 0.0,
) -> Float[Array, "*batch"]:
    """The self-normalised estimate of L_alpha, per question, in nats.

    log sum_i s_i w_i^(1 - alpha) / (1 - alpha),   w_i = p_i zeta_i / sum_j s_j zeta_j

    Args:
        log_p: log p(a|z_i, q) of the documents that were drawn, `[..., K]`.
        f_theta: scores of the retriever, up to a constant, likewise.
        f_phi: scores that they were drawn by, up to a constant, likewise.
        log_s: log-weights by `priority_sample`, scaled here to a sum of 1 as in the
            released code. None: equal ones, of draws with replacement. With
            `log_softmax(f_phi)` of the whole corpus the bound is exact.
        alpha: in [0, 1]: 1 is the ELBO, 0 the log-marginal likelihood.

    Returns:
        float32 `[...]`. Higher is better.

    Raises:
        ValueError: `alpha` is out of range.

    >>> log_p, f = jnp.log(jnp.array([0.5, 0.1])), jnp.zeros(2)
    >>> [float(renyi_bound(log_p, f, f, alpha=a)) for a in (1.0, 0.5, 0.0)]
    [-1.4979, -1.3402, -1.204]
    """
    check_range("alpha", alpha, low=0.0, high=1.0)
    log_p, f_theta, f_phi = (as_float32(x) for x in (log_p, f_theta, f_phi))
    log_s = jnp.zeros_like(log_p) if log_s is None else as_float32(log_s)
    return _bound(log_p, f_theta, f_phi, log_s, None, alpha)


@typed
def vod_objective(
    log_p: Float[ArrayLike, "batch documents"],
    f_theta: Float[ArrayLike, "batch documents"],
    f_phi: Float[ArrayLike, "batch documents"],
    log_s: Float[ArrayLike, "batch documents"] | None = None,
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    alpha: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Minus the bound, with the gradients of the paper for reader, retriever, sampler.

    Gradient: of `log_p` and `f_theta` the derivative of the value; of `f_phi` a score
    function whose baseline is the bound without the document (`log_s` has none),

        -sum_i (L - L_without_i) (grad f(z_i) - sum_j s_j grad f(z_j))

    Args:
        log_p: log p(a|z_i, q), `[B, K]`, K >= 2.
        f_theta: as in `renyi_bound`, like all that follow.
        f_phi: scores of the sampler.
        log_s: log-weights, or None.
        where: questions that count, `[B]`; masked rows may hold anything.
        alpha: in [0, 1].

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "per_example", the bound;
        "log_marginal" and "elbo", those of alpha 0 and 1; and "effective_samples",
        1 / sum_i posterior_i^2, all `[B]`.

    Raises:
        ValueError: `alpha` is out of range, or K is 1.

    >>> log_p, f = jnp.log(jnp.array([[0.5, 0.1]])), jnp.zeros((1, 2))
    >>> loss, aux = vod_objective(log_p, f, f)
    >>> float(loss), aux["elbo"].tolist()
    (1.204, [-1.4979])
    """
    check_range("alpha", alpha, low=0.0, high=1.0)
    check_range("log_p.shape[1]", log_p.shape[1], low=2)
    log_p, f_theta, f_phi = (as_float32(x) for x in (log_p, f_theta, f_phi))
    log_s = jnp.zeros_like(log_p) if log_s is None else as_float32(log_s)
    if where is not None:
        # Masked rows are replaced first, so that they reach neither value nor gradient.
        mask = jnp.asarray(where)[:, None]
        log_p, f_theta, f_phi, log_s = (
            jnp.where(mask, x, 0.0) for x in (log_p, f_theta, f_phi, log_s)
        )
    stop = jax.lax.stop_gradient
    log_s = stop(log_s)
    fixed = (stop(log_p), stop(f_theta), stop(f_phi), log_s)
    bound = _bound(log_p, f_theta, fixed[2], log_s, None, alpha)

    count = log_p.shape[1]
    others = [_bound(*fixed, jnp.arange(count)[None] != i, alpha) for i in range(count)]
    reward = stop(bound)[:, None] - jnp.stack(others, axis=1)
    score = reward - jnp.sum(reward, axis=1, keepdims=True) * jax.nn.softmax(log_s)
    # 0, with the gradient of a sum of scores.
    steer = jnp.sum(score * (f_phi - fixed[2]), axis=1)
    posterior = jax.nn.softmax(log_s + fixed[0] + fixed[1] - fixed[2], axis=1)
    aux = {
        "per_example": stop(bound),
        "log_marginal": _bound(*fixed, None, 0.0),
        "elbo": _bound(*fixed, None, 1.0),
        "effective_samples": 1.0 / jnp.sum(jnp.square(posterior), axis=1),
    }
    return -mean_where(bound + steer, where), aux


def _bound(
    log_p: Array, f_theta: Array, f_phi: Array, log_s: Array, keep: Array | None,
    alpha: float,
) -> Array:  # fmt: skip
    """`renyi_bound` of the documents of `keep`."""
    log_zeta = f_theta - f_phi
    if keep is not None:
        log_s = jnp.where(keep, log_s, -jnp.inf)
    log_s = jax.nn.log_softmax(log_s, axis=-1)
    total = jax.nn.logsumexp(log_s + log_zeta, axis=-1, keepdims=True)
    log_w = log_p + log_zeta - total
    if alpha == 1.0:
        return jnp.sum(jnp.exp(log_s) * log_w, axis=-1)
    return jax.nn.logsumexp(log_s + (1.0 - alpha) * log_w, axis=-1) / (1.0 - alpha)


def _scores(key: Array) -> tuple[Array, Array, Array, Array]:
    log_p, f_theta, f_phi, log_s = jax.random.normal(key, (4, 8, 5))
    return -jnp.square(log_p), f_theta, f_phi, log_s


EXAMPLES = {
    priority_sample: lambda key: (
        (key, jax.random.normal(key, (8, 9))), {"num_samples": 4},
    ),
    renyi_bound: lambda key: (_scores(key), {"alpha": 0.5}),
    vod_objective: lambda key: (
        _scores(key), {"alpha": 0.5, "where": jnp.arange(8) < 6},
    ),
}  # fmt: skip
