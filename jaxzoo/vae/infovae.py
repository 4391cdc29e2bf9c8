"""InfoVAE: a VAE that may be paid for mutual information, and MMD-VAE among them.

    loss = -E log p(x|z) + (1 - alpha) KL(q(z|x) || p(z))
           + (alpha + lam - 1) D(q(z) || p(z))

With D = KL it is the ELBO plus alpha I_q(x; z) less (lam - 1) KL(q(z) || p(z)); any
other strict divergence that samples can estimate has the same optimum. alpha = 0 and
lam = 1 is the ELBO itself, and alpha = 1 leaves of the KL nothing: the MMD-VAE.

    divergence = prior_divergence(key, z)                        # or "stein"
    kl = normal_kl(mean, log_std)                                # [B]
    loss, aux = infovae_loss(log_likelihood, kl, divergence, alpha=1.0, lam=100.0)

Adversarial, with a network that tells codes from draws of the prior:

    divergence, aux = adversarial_divergence(net(z), net(draws))  # encoder: minimise
    loss_of_net = aux["discriminator_loss"]                       # net: minimise
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jaxzoo.core.divergences import (
    gaussian_kernel,
    gaussian_total_correlation,
    mmd,
    squared_distances,
)
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "infovae",
    "title": "InfoVAE: Information Maximizing Variational Autoencoders",
    "arxiv": "1706.02262",
    "year": 2019,
    "authors": "Shengjia Zhao, Jiaming Song, Stefano Ermon",
    "where": "The objective with its two weights; MMD, Stein and adversarial "
    "divergences; mutual information, log-determinant and MMD as diagnostics.",
    "differs": "The KL comes from the caller, an array. The Stein discrepancy is the "
    "kernelised one by pairs, the adversarial divergence the discriminator's bound on "
    "Jensen-Shannon; MMD leaves out pairs of a point with itself, which the authors' "
    "MMD-VAE code keeps, and has that code's kernel width. The experiment has 2 "
    "latents and a masked network with two hidden layers on 8x8 digits, where the "
    "paper has a PixelCNN. Its code enters by weights that start at 0: with random "
    "ones, of a hidden layer or of the logits, the ELBO model kept 0.7 to 1.7 nats on "
    "other seeds, at nearly the same bound, and larger hidden layers did not lower it. "
    "So the collapse there is one of training from 0, not of the optimum alone.",
}

__all__ = [
    "adversarial_divergence",
    "infovae_loss",
    "log_det_covariance",
    "mutual_information",
    "prior_divergence",
]

LARGEST = 1e8  # of codes whose products are summed
LARGEST_LOG_STD = 40.0


@typed
def infovae_loss(
    log_likelihood: Float[ArrayLike, " batch"],
    kl: Float[ArrayLike, " batch"],
    divergence: Float[ArrayLike, ""],
    *,
    alpha: float | Float[ArrayLike, ""] = 0.0,
    lam: float | Float[ArrayLike, ""] = 1000.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean of -log p(x|z) + (1 - alpha) KL(q(z|x) || p(z)), and a weighted divergence.

    mean_b [-log p(x_b|z_b) + (1 - alpha) KL_b] + (alpha + lam - 1) D(q(z) || p(z))

    Args:
        log_likelihood: log p(x|z) of a draw from q(z|x), nats, `[B]`.
        kl: KL(q(z|x) || p(z)), nats, `[B]`.
        divergence: D, a scalar, such as `prior_divergence` of the batch's codes.
        alpha: <= 1, the preference for mutual information: 0 has none, 1 drops the KL.
        lam: >= 0, with alpha + lam >= 1; 1000 with alpha 0 is the paper's for digits.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "per_example" `[B]`, without the
        divergence, and "regularizer", the divergence times its weight.

    Raises:
        ValueError: `alpha` or `lam` is out of range.

    >>> arrays = jnp.array([-80.0, -90.0]), jnp.array([4.0, 2.0]), jnp.array(0.5)
    >>> [float(infovae_loss(*arrays, alpha=a, lam=11.0)[0]) for a in (0.0, 1.0)]
    [93.0, 90.5]
    """
    check_range("alpha", alpha, high=1.0)
    check_range("lam", lam, low=0.0)
    if isinstance(alpha, float) and isinstance(lam, float):
        check_range("lam", lam, low=1.0 - alpha)
    alpha, lam = as_float32(alpha), as_float32(lam)
    per_example = (1.0 - alpha) * as_float32(kl) - as_float32(log_likelihood)
    regularizer = (alpha + lam - 1.0) * as_float32(divergence)
    aux = {"per_example": per_example, "regularizer": regularizer}
    return jnp.mean(per_example) + regularizer, aux


@typed
def prior_divergence(
    key: Key[Array, ""],
    z: Float[ArrayLike, "batch latents"],
    *,
    method: Literal["mmd", "stein"] = "mmd",
    width: float | None = None,
) -> Float[Array, ""]:
    """How far codes are from N(0, I), by a Gaussian kernel k; 0 on average if not.

    mmd    E k(z, z') + E k(y, y') - 2 E k(z, y), with as many y from the prior
    stein  E k(z, z') (z.z' + D/w^2 - |z - z'|^2 (1/w^2 + 1/w^4))

    The second is the kernelised Stein discrepancy, whose score of the prior is -z; it
    needs no draws. Both are over pairs of different points, and may fall below 0.

    Args:
        key: a typed key, for y; not used by "stein".
        z: codes, a draw of each posterior, `[B, D]`; "stein" counts up to 1e8.
        method: "mmd" or "stein".
        width: w of the kernel exp(-|z - z'|^2 / (2 w^2)), > 0; None: D / sqrt(2), the
            released code's.

    Returns:
        The squared discrepancy, a float32 scalar.

    Raises:
        ValueError: `width` is not positive, or there are fewer than two codes.

    >>> z = 3.0 + jax.random.normal(jax.random.key(1), (100, 2))
    >>> both = [
    ...     prior_divergence(jax.random.key(0), z, method=name)
    ...     for name in ("mmd", "stein")
    ... ]
    >>> both[0] > 0.5, both[1] > 4.0
    (Array(True, dtype=bool), Array(True, dtype=bool))
    """
    z = as_float32(z)
    size, latents = z.shape
    check_range("z.shape[0]", size, low=2)
    width = latents / math.sqrt(2.0) if width is None else width
    check_range("width", width, above=0.0)
    if method == "mmd":
        prior = jax.random.normal(key, z.shape, z.dtype)
        return mmd(z, prior, functools.partial(gaussian_kernel, width=width))
    z = jnp.clip(z, -LARGEST, LARGEST)
    squares = squared_distances(z, z)
    precision = 1.0 / width**2
    inner = jnp.einsum("id,jd->ij", z, z)
    each = inner + latents * precision - squares * (precision + precision**2)
    each = gaussian_kernel(squares, width=width) * each
    others = jnp.where(jnp.eye(size, dtype=bool), 0.0, each)
    return jnp.sum(others) / (size * (size - 1))


@typed
def adversarial_divergence(
    logits: Float[ArrayLike, " batch"], prior_logits: Float[ArrayLike, " draws"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Jensen-Shannon divergence of codes to the prior, as a discriminator sees it.

    JS >= log 2 + E_q log sigmoid(l(z)) / 2 + E_p log sigmoid(-l(y)) / 2

    with equality for l = log q(z) / p(z), to which the discriminator rises.

    Args:
        logits: l, the log-odds that a code is one, `[B]`.
        prior_logits: the same of draws from the prior, `[M]`.

    Returns:
        `(divergence, aux)`: float32 scalar <= log 2 nats, which the encoder makes
        small; aux["discriminator_loss"] is its negative, which the discriminator does.

    >>> divergence, aux = adversarial_divergence(jnp.zeros(3), jnp.zeros(2))
    >>> float(divergence)
    0.0
    """
    told = jnp.mean(jax.nn.log_sigmoid(as_float32(logits)))
    told += jnp.mean(jax.nn.log_sigmoid(-as_float32(prior_logits)))
    divergence = math.log(2.0) + 0.5 * told
    return divergence, {"discriminator_loss": -divergence}


@typed
def mutual_information(
    key: Key[Array, ""],
    mean: Float[ArrayLike, "data latents"],
    log_std: Float[ArrayLike, "data latents"],
    *,
    num_samples: int = 1,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """I_q(x; z) of diagonal Gaussian posteriors, with q(z) their mean over the data.

    I = E_n E_q(z|x_n) [log q(z|x_n) - log 1/N sum_m q(z|x_m)], in [0, log N]

    Args:
        key: a typed key, consumed.
        mean: of the posteriors, `[N, D]`.
        log_std: log of their standard deviations, likewise; limited to [-40, 40].
        num_samples: draws of z per example; memory is that of one, N^2 D.

    Returns:
        `(information, aux)`: float32 scalar in nats; aux["stderr"] is its standard
        error over examples and draws.

    Raises:
        ValueError: `num_samples` is below 1.

    >>> mean = jnp.array([[-9.0], [9.0]])
    >>> float(mutual_information(jax.random.key(0), mean, jnp.zeros((2, 1)))[0])
    0.6931
    """
    check_range("num_samples", num_samples, low=1)
    mean = as_float32(mean)
    log_std = jnp.clip(as_float32(log_std), -LARGEST_LOG_STD, LARGEST_LOG_STD)
    size = len(mean)

    def one(key: Array) -> Array:
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        away = mean[:, None] - mean[None] + (jnp.exp(log_std) * noise)[:, None]
        # Within these limits squares are float32 numbers, and so are gradients.
        away = jnp.clip(away, -1e18, 1e18) * jnp.exp(-log_std)[None]
        squares = jnp.square(jnp.clip(away, -1e18, 1e18))
        log_q = -jnp.sum(0.5 * squares + log_std[None], axis=2)
        own = -jnp.sum(0.5 * jnp.square(noise) + log_std, axis=1)
        return own - jax.nn.logsumexp(log_q, axis=1) + math.log(size)

    draws = lax.map(jax.checkpoint(one), jax.random.split(key, num_samples))
    stderr = jnp.std(lax.stop_gradient(draws)) / math.sqrt(draws.size)
    return jnp.mean(draws), {"stderr": stderr}


@typed
def log_det_covariance(
    z: Float[ArrayLike, "data latents"], *, ridge: float = 1e-6
) -> Float[Array, ""]:
    """Log-determinant of the codes' covariance, which of the prior N(0, I) is 0.

    log det C = sum_d log C_dd + log det(correlations)

    Args:
        z: codes of many examples, a draw of each posterior, `[N, D]`; up to 1e15.
        ridge: >= 0, added to variances and to the diagonal of the correlations.

    Returns:
        Nats, a float32 scalar: below 0 where q(z) has too little volume.

    Raises:
        ValueError: `ridge` is negative.

    >>> z = jnp.array([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    >>> round(float(log_det_covariance(z)), 3)  # log 4
    1.386
    """
    check_range("ridge", ridge, low=0.0)
    z = jnp.clip(as_float32(z), -1e15, 1e15)
    variance = jnp.mean(jnp.square(z - jnp.mean(z, axis=0, keepdims=True)), axis=0)
    dependence = gaussian_total_correlation(z, ridge=ridge)
    return jnp.sum(jnp.log(variance + ridge)) - 2.0 * dependence


def _loss_example(key: Array):
    log_likelihood, kl = jax.random.normal(key, (2, 8))
    return (log_likelihood - 9.0, kl + 3.0, jnp.array(0.5)), {"alpha": 0.5, "lam": 3.0}


def _information_example(key: Array):
    mean, log_std = jax.random.normal(key, (2, 8, 3))
    return (key, mean, 0.3 * log_std), {"num_samples": 2}


EXAMPLES = {
    adversarial_divergence: lambda key: (tuple(jax.random.normal(key, (2, 8))), {}),
    infovae_loss: _loss_example,
    log_det_covariance: lambda key: ((jax.random.normal(key, (8, 3)),), {}),
    mutual_information: _information_example,
    prior_divergence: lambda key: (
        (key, 1.0 + jax.random.normal(key, (8, 3))),
        {"method": "stein", "width": 1.5},
    ),
}
