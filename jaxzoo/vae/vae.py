"""Auto-Encoding Variational Bayes: the evidence lower bound and how to sample it.

    log p(x) >= ELBO(x) = E_q(z|x)[log p(x|z)] - KL(q(z|x) || p(z))

A training step in four lines, with any encoder and decoder:

    mean, log_std = encode(params, x)                             # [B, D] each
    z = reparameterize(key, mean, log_std)                        # [1, B, D]
    log_likelihood = bernoulli_log_prob(x, decode(params, z))[0]  # [B]
    loss = -elbo(log_likelihood, normal_kl(mean, log_std)).mean()

That is the paper's estimator B (analytic KL). Estimator A puts the sampled ratio
`normal_log_prob(z, mean, log_std) - normal_log_prob(z)` in the place of the KL.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxzoo.core.stats import mean_where, normal_kl
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "vae",
    "title": "Auto-Encoding Variational Bayes",
    "arxiv": "1312.6114",
    "year": 2014,
    "authors": "Diederik P. Kingma, Max Welling",
    "where": "Sections 2.2-2.4, equations 3, 6, 7 and 10, appendices B and C; "
    "wake-sleep as in section 4.",
    "differs": "The bound is per example and in nats; the experiment trains with Adam "
    "where the paper uses Adagrad, on 8x8 digits where it uses MNIST and Frey faces.",
}

__all__ = [
    "WakeSleepLosses",
    "corrupt",
    "elbo",
    "latent_usage",
    "reparameterize",
    "score_function_elbo",
    "wake_sleep_losses",
]


@typed
def reparameterize(
    key: Key[Array, ""],
    mean: Float[ArrayLike, "*shape"],
    log_std: Float[ArrayLike, "*shape"],
    *,
    num_samples: int = 1,
) -> Float[Array, " num_samples *shape"]:
    """Samples of a diagonal Gaussian through which gradients flow (section 2.4).

    z = mean + exp(log_std) * eps,  eps ~ N(0, I)

    Args:
        key: a typed key, consumed.
        mean: means, `[..., D]`.
        log_std: log standard deviations, likewise. Codes that speak of `logvar` hold
            twice this.
        num_samples: K, how many draws.

    Returns:
        `[K, ..., D]` in the dtype of `mean`: the sample axis is always there, in front.

    Raises:
        ValueError: `num_samples` is below 1.

    >>> z = reparameterize(jax.random.key(0), jnp.zeros((8, 2)), jnp.zeros((8, 2)))
    >>> z.shape
    (1, 8, 2)
    """
    check_range("num_samples", num_samples, low=1)
    mean, log_std = jnp.asarray(mean), jnp.asarray(log_std)
    noise = jax.random.normal(key, (num_samples, *mean.shape), mean.dtype)
    # Beyond e^80 float32 ends: an encoder that runs away must not send NaN backwards.
    std = jnp.exp(jnp.minimum(log_std, 80.0)).astype(mean.dtype)
    return mean[None] + std[None] * noise


@typed
def elbo(
    log_likelihood: Float[ArrayLike, "*batch"],
    kl: Float[ArrayLike, "*batch"],
    *,
    beta: float | Float[ArrayLike, ""] = 1.0,
) -> Float[Array, "*batch"]:
    """The evidence lower bound per example (equations 3 and 7).

    log p(x|z) - beta KL(q(z|x) || p(z))

    Args:
        log_likelihood: log p(x|z) in nats, one per example (or per sample and example).
        kl: the divergence to the prior in nats, of the same shape; the analytic one or
            a sampled log q(z|x) - log p(z).
        beta: weight of the divergence, >= 0; 1 is the bound, 0 a plain auto-encoder.

    Returns:
        The bound in nats, float32. Higher is better: minimise its negative.

    Raises:
        ValueError: `beta` is negative or NaN.

    >>> elbo(jnp.array([-80.0]), jnp.array([20.0])).tolist()
    [-100.0]
    """
    check_range("beta", beta, low=0)
    log_likelihood, kl = as_float32(log_likelihood), as_float32(kl)
    return log_likelihood - jnp.asarray(beta, kl.dtype) * kl


@typed
def score_function_elbo(
    log_joint: Float[ArrayLike, "*shape"],
    log_posterior: Float[ArrayLike, "*shape"],
    *,
    baseline: float | Float[ArrayLike, ""] = 0.0,
) -> Float[Array, "*shape"]:
    """One-sample ELBO whose gradient is the score-function estimator, for comparison.

    value:     w = log p(x, z) - log q(z|x),  z ~ q held fixed
    Gradient:  d log p(x, z) + (w - baseline) d log q(z|x)

    It needs no derivative through z, so it serves discrete latents too; section 2.2
    names its high variance as the reason for reparameterisation.

    Args:
        log_joint: log p(x, z) in nats at a sample with `stop_gradient`.
        log_posterior: log q(z|x) in nats at the same sample.
        baseline: control variate in nats; any number that does not depend on z.

    Returns:
        The sampled bound in nats, float32, shaped like the arguments.

    Raises:
        ValueError: `baseline` is NaN.

    >>> joint, posterior = jnp.array([-3.0]), jnp.array([-1.0])
    >>> jax.grad(lambda q: score_function_elbo(joint, q).sum())(posterior).tolist()
    [-2.0]
    """
    check_range("baseline", baseline)
    log_joint, log_posterior = as_float32(log_joint), as_float32(log_posterior)
    stop = jax.lax.stop_gradient
    bound = log_joint - log_posterior
    weight = stop(bound - jnp.asarray(baseline, bound.dtype))
    # `surrogate - stop(surrogate)` is an exact zero that carries the gradient.
    surrogate = log_joint + weight * log_posterior
    return stop(bound) + (surrogate - stop(surrogate))


class WakeSleepLosses(NamedTuple):
    """float32 scalars in nats; each is for one network alone."""

    generative: Array
    recognition: Array


@typed
def wake_sleep_losses(
    wake_log_joint: Float[ArrayLike, " batch"],
    sleep_log_posterior: Float[ArrayLike, " dreams"],
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
) -> WakeSleepLosses:
    """The two objectives of the wake-sleep algorithm, the paper's baseline.

    generative  = -mean log p(x, z),  z ~ q(z|x) held fixed, x from the data
    recognition = -mean log q(z|x),   (x, z) dreamt by the model, held fixed

    Args:
        wake_log_joint: log p(x, z) per example of the batch, in nats.
        sleep_log_posterior: log q(z|x) per dream, in nats.
        where: True for the examples of the batch that count.

    Returns:
        `WakeSleepLosses`. Their sum is the loss of one joint step, as long as each
        argument depends on its own network alone.

    >>> wake_sleep_losses(jnp.array([-3.0]), jnp.array([-2.0, -4.0])).recognition
    Array(3., dtype=float32)
    """
    return WakeSleepLosses(
        generative=-mean_where(wake_log_joint, where),
        recognition=-mean_where(sleep_log_posterior),
    )


@typed
def corrupt(
    key: Key[Array, ""], x: Float[ArrayLike, "*shape"], *, rate: float = 0.3
) -> Float[Array, "*shape"]:
    """Masking noise of a denoising auto-encoder: each entry is set to 0 at `rate`.

    Encode the corrupted `x` and score the clean one; with `elbo(..., beta=0)` that is
    the denoising auto-encoder, with `beta=1` a denoising VAE.

    Args:
        key: a typed key, consumed.
        x: clean inputs.
        rate: probability that an entry is dropped, in [0, 1].

    Returns:
        The corrupted inputs, not rescaled.

    Raises:
        ValueError: `rate` is outside [0, 1].

    >>> corrupt(jax.random.key(0), jnp.ones(4), rate=1.0).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    check_range("rate", rate, low=0, high=1)
    x = jnp.asarray(x)
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x, jnp.zeros_like(x))


@typed
def latent_usage(
    mean: Float[ArrayLike, "batch latents"],
    log_std: Float[ArrayLike, "batch latents"],
) -> dict[str, Float[Array, " latents"]]:
    """Which latents carry information: a report on posterior collapse.

    Args:
        mean: posterior means over a data set.
        log_std: posterior log standard deviations.

    Returns:
        Per latent: `kl`, the mean divergence to N(0, 1) in nats (0 = collapsed);
        `variance_of_mean`, Var_x(E_q[z]); `mean_variance`, E_x(Var_q[z]), which is 1
        for a latent that ignores x.

    >>> usage = latent_usage(jnp.array([[2.0, 0.0], [-2.0, 0.0]]), jnp.zeros((2, 2)))
    >>> usage["kl"].tolist()
    [2.0, 0.0]
    """
    mean, log_std = as_float32(mean), as_float32(log_std)
    per_latent = normal_kl(mean[..., None], log_std[..., None])
    return {
        "kl": jnp.mean(per_latent, axis=0),
        "variance_of_mean": jnp.var(mean, axis=0),
        "mean_variance": jnp.mean(jnp.exp(jnp.minimum(2.0 * log_std, 80.0)), axis=0),
    }


def _pair(key: Array, shape: tuple[int, ...] = (8,)):
    first, second = jax.random.normal(key, (2, *shape))
    return (first, second), {}


def _samples_example(key: Array):
    key, noise_key = jax.random.split(key)
    (mean, log_std), _ = _pair(key, (8, 3))
    return (noise_key, mean, 0.3 * log_std), {"num_samples": 2}


def _corrupt_example(key: Array):
    key, noise_key = jax.random.split(key)
    return (noise_key, jax.random.normal(key, (8, 3))), {"rate": 0.3}


EXAMPLES = {
    reparameterize: _samples_example,
    elbo: lambda key: (_pair(key)[0], {"beta": 0.5}),
    score_function_elbo: _pair,
    wake_sleep_losses: lambda key: (_pair(key)[0], {"where": jnp.arange(8) < 6}),
    corrupt: _corrupt_example,
    latent_usage: lambda key: _pair(key, (8, 3)),
}
