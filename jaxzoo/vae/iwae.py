"""Importance Weighted Autoencoders: tighter bounds from k samples.

    L_k(x) = E[ log 1/k sum_i w_i ],   w_i = p(x, z_i) / q(z_i | x)
    ELBO = L_1 <= L_k <= L_{k+1} <= log p(x)

Everything here works on `log_w`, the log importance weights with the samples on the
first axis, `[k, batch]`. `log_weights` makes them from a function of one key, which
knows the model; the rest does not.

    def sample(key):                        # one draw of log w per example, [B]
        z = reparameterize(key, mean, log_std)[0]
        return log_joint(x, z) - normal_log_prob(z, mean, log_std)

    log_w = log_weights(key, sample, num_samples=50, chunk=10)        # [50, B]
    loss, aux = iwae_loss(log_w)

**Three gradient estimators for the inference network.** "iwae" is the derivative of the
bound. "stl" (sticking the landing) and "dreg" (doubly reparameterised) drop the term
that comes through the parameters of q's density and keep the path through z: for them
build `log_w` with `normal_log_prob(z, stop(mean), stop(log_std))`, where `stop` is
`jax.lax.stop_gradient`. "stl" then weighs the paths by the normalised weights and is
unbiased for k = 1; "dreg" weighs them by their squares and is unbiased for every k. The
generative network always wants "iwae" or "stl", so that "dreg" comes as a second loss,
as in the released code of that paper.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxzoo.core.stats import log_mean_exp, mean_where
from jaxzoo.core.typed import ArrayLike, as_float32, check_axis, check_range, typed

PAPER = {
    "slug": "iwae",
    "title": "Importance Weighted Autoencoders",
    "arxiv": "1509.00519",
    "year": 2016,
    "authors": "Yuri Burda, Roger Grosse, Ruslan Salakhutdinov",
    "where": "Sections 3 and 5 (equations 8, 13 and 14; active units). STL: Roeder et "
    "al., arXiv 1703.09194. DReG: Tucker et al., arXiv 1810.04152, equation 8.",
    "differs": "The released code returns gradients, never the bound; here the bound "
    "is the value, and autodiff gives the same gradient. The experiment trains on 8x8 "
    "digits (full) or 10,000 Fashion-MNIST images (demo), not on MNIST or Omniglot.",
}

__all__ = [
    "active_units",
    "importance_log_likelihood",
    "iwae_bound",
    "iwae_loss",
    "log_weights",
]


@typed
def iwae_bound(log_w: Float[ArrayLike, "..."], *, axis: int = 0) -> Float[Array, "..."]:
    """THE importance-weighted bound, per example (equation 8).

    L_k = logsumexp_i(log w_i) - log k

    With k = 1 it is the sampled ELBO. Other libraries return the sum of weighted
    log-weights under this name: right gradient, but not a bound.

    Args:
        log_w: log p(x, z_i) - log q(z_i | x) in nats, `[k, ...]`.
        axis: where the k samples lie. Mind it: on `[k, batch]`, `axis=1` would average
            the weights of different examples, which bounds nothing.

    Returns:
        The bound in nats, float32, without `axis`. Higher is better.

    Raises:
        ValueError: `axis` is out of range.

    With k = 2 samples of 3 examples the bound has 3 entries; 2 entries betray that the
    wrong axis was averaged:

    >>> log_w = jnp.array([[-90.0, -80.0, -70.0], [-92.0, -80.0, -75.0]])
    >>> iwae_bound(log_w).tolist()
    [-90.57, -80.0, -70.69]
    >>> iwae_bound(log_w, axis=1).shape
    (2,)
    """
    return log_mean_exp(log_w, axis=axis)


@typed
def iwae_loss(
    log_w: Float[ArrayLike, "..."],
    *,
    axis: int = 0,
    where: Bool[ArrayLike, "..."] | None = None,
    estimator: Literal["iwae", "stl", "dreg"] = "iwae",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Negative bound, averaged over examples, whose gradient is the estimator's.

    value     -mean_b L_k(x_b)
    gradient  -mean_b sum_i v_ib d log w_ib, with v = softmax(log w) over the samples
              for "iwae" (the derivative) and "stl", v = softmax(log w)^2 for "dreg"

    "stl" and "dreg" want `log_w` without the density's own parameter gradient (see the
    module's head); given that, they differ in v alone. The value is the same for all.

    Args:
        log_w: log importance weights in nats, `[k, ...]`.
        axis: where the k samples lie.
        where: True for the examples that count, in the shape of `log_w` without `axis`;
            masked columns may hold anything.
        estimator: "iwae", the derivative of the bound; "stl"; or "dreg", for the
            inference network only.

    Returns:
        `(loss, aux)`: float32 scalar in nats; `aux["per_example"]` is the bound and
        `aux["effective_samples"]` is 1 / sum_i softmax(log w)_i^2, in [1, k].

    Raises:
        ValueError: `axis` is out of range, or the estimator is not one of the three.
        TypeError: `where` does not have the shape of the bound.

    >>> loss, aux = iwae_loss(jnp.array([[-90.0], [-92.0]]))
    >>> float(loss), aux["effective_samples"].tolist()
    (90.57, [1.27])
    """
    axis = check_axis("axis", axis, jnp.ndim(log_w))
    log_w = as_float32(log_w)
    if where is not None:
        shape = log_w.shape[:axis] + log_w.shape[axis + 1 :]
        if where.shape != shape:
            raise TypeError(
                f"argument 'where' has shape {where.shape}, expected {shape}, that of "
                f"'log_w' without axis {axis}."
            )
        # Masked weights are replaced before the exponentials, so that what they hold
        # reaches neither the value nor the gradient.
        log_w = jnp.where(jnp.expand_dims(where, axis), log_w, 0.0)
    stop = jax.lax.stop_gradient
    bound = log_mean_exp(log_w, axis=axis)
    # k w_i / sum w, not jax.nn.softmax: it shares its sum with the bound above.
    top = jnp.expand_dims(bound + math.log(log_w.shape[axis]), axis)
    squares = jnp.square(stop(jnp.exp(log_w - top)))
    aux = {
        "per_example": stop(bound),
        "effective_samples": 1.0 / jnp.sum(squares, axis=axis),
    }
    if estimator == "dreg":
        paths = jnp.sum(squares * log_w, axis=axis)
        bound = stop(bound) + (paths - stop(paths))
    return -mean_where(bound, where), aux


@typed
def log_weights(
    key: Key[Array, ""],
    sample: Callable[[Array], Array],
    *,
    num_samples: int,
    chunk: int | None = None,
) -> Float[Array, "num_samples ..."]:
    """Stacks k draws of the log importance weights, over chunks of k if asked.

    Draw i uses `fold_in(key, i)`, so that the result does not depend on `chunk`. With a
    chunk the draws of one chunk are made at a time, and made again in the backward
    pass: memory for activations is that of `chunk` samples whatever k is, and k = 5,000
    fits where the whole would not.

    Args:
        key: a typed key, consumed.
        sample: maps a key to log w of one draw per example, `[batch]`, in nats.
        num_samples: k.
        chunk: how many draws at a time; None makes all at once.

    Returns:
        `[k, batch]`, ready for `iwae_bound` and `iwae_loss`.

    Raises:
        ValueError: `num_samples` or `chunk` is below 1.

    >>> draw = lambda key: jax.random.normal(key, (3,))
    >>> log_weights(jax.random.key(0), draw, num_samples=5, chunk=2).shape
    (5, 3)
    """
    check_range("num_samples", num_samples, low=1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_samples))
    if chunk is None:
        return jax.vmap(sample)(keys)
    check_range("chunk", chunk, low=1)
    return jax.lax.map(jax.checkpoint(sample), keys, batch_size=chunk)


@typed
def importance_log_likelihood(
    log_w: Float[ArrayLike, "..."], *, axis: int = 0
) -> tuple[Float[Array, "..."], dict[str, Array]]:
    """Importance-sampled log p(x) per example, with its standard error.

    The estimate is L_k with a large k, as the paper evaluates (k = 5,000); it lies
    below log p(x) by about half its squared standard error.

    Args:
        log_w: log importance weights in nats, `[k, ...]`, k of 2 or more.
        axis: where the k samples lie.

    Returns:
        `(estimate, aux)` in nats, without `axis`; `aux["stderr"]` is the standard error
        by the delta method, std(w) / (mean(w) sqrt(k)), and `aux["effective_samples"]`
        says how many of the k samples carry the estimate.

    Raises:
        ValueError: `axis` is out of range or holds fewer than 2 samples.

    >>> estimate, aux = importance_log_likelihood(jnp.log(jnp.array([1.0, 3.0])))
    >>> float(estimate), float(aux["stderr"])
    (0.6931, 0.5)
    """
    axis = check_axis("axis", axis, jnp.ndim(log_w))
    count = jnp.shape(log_w)[axis]
    check_range("log_w.shape[axis]", count, low=2)
    log_w = as_float32(log_w)
    estimate = log_mean_exp(log_w, axis=axis)
    relative = jnp.exp(log_w - jnp.expand_dims(estimate, axis))  # w / mean(w)
    variance = jnp.var(relative, axis=axis, ddof=1)
    aux = {
        # The root has no derivative at 0, where all weights agree.
        "stderr": jnp.sqrt(jax.lax.stop_gradient(variance) / count),
        "effective_samples": count / jnp.mean(jnp.square(relative), axis=axis),
    }
    return estimate, aux


@typed
def active_units(
    posterior_mean: Float[ArrayLike, "batch latents"], *, threshold: float = 0.01
) -> Bool[Array, " latents"]:
    """Which latent units depend on the input (section 5.2).

    Var_x(E_q(z|x)[z]) > threshold

    Args:
        posterior_mean: E_q[z] for many examples.
        threshold: the paper's 0.01.

    Returns:
        One bool per latent; their sum is the paper's number of active units.

    Raises:
        ValueError: `threshold` is negative.

    >>> active_units(jnp.array([[1.0, 0.05], [-1.0, -0.05]])).tolist()
    [True, False]
    """
    check_range("threshold", threshold, low=0)
    return jnp.var(as_float32(posterior_mean), axis=0) > threshold


def _log_w_example(key: Array):
    return (3.0 * jax.random.normal(key, (5, 8)),), {}


def _log_weights_example(key: Array):
    def sample(draw_key: Array) -> Array:
        return jax.random.normal(draw_key, (8,))

    return (key, sample), {"num_samples": 5, "chunk": 2}


EXAMPLES = {
    iwae_bound: _log_w_example,
    iwae_loss: lambda key: (_log_w_example(key)[0], {"where": jnp.arange(8) < 6}),
    log_weights: _log_weights_example,
    importance_log_likelihood: _log_w_example,
    active_units: lambda key: ((jax.random.normal(key, (8, 4)),), {}),
}
