"""A VAE whose KL follows a capacity that grows: factors enter the code one by one.

    loss = E -log p(x|z) + gamma |KL - C(t)|,   KL = E KL(q(z|x) || N(0, I))

A beta-VAE, -log p(x|z) + beta KL, is a narrow channel of Gaussians: what matters most
to reconstruction is sent. Here C rises from 0, so that details follow without its blur.

    mean, log_std = encode(x)                                        # [B, D]
    z = mean + jnp.exp(log_std) * eps
    nll = -bernoulli_log_prob(x, decode(z))                          # [B]
    C = capacity_at(step, max_capacity=25.0, warmup_steps=100_000)
    loss, aux = capacity_loss(nll, normal_kl(mean, log_std), C)
    trace = latent_kl(mean, log_std)               # [D], for activation_steps
    images = decode(traversals(mean[0], jnp.linspace(-3, 3, 7)))     # [D, 7, ...]
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key, Real

from jaxzoo.core.stats import normal_kl, normal_log_prob
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "beta_vae_capacity",
    "title": "Understanding disentangling in β-VAE",
    "arxiv": "1804.03599",
    "year": 2018,
    "authors": "Christopher P. Burgess, Irina Higgins, Arka Pal, Loic Matthey, Nick "
    "Watters, Guillaume Desjardins, Alexander Lerchner",
    "where": "Equation 8 and its schedule of C (section 5); the view of codes as "
    "Gaussian channels with overlapping posteriors (section 4), by sampling.",
    "differs": "Only the paper's beginning could be read here and no code of its "
    "authors was found: loss and schedule are those of disentanglement_lib, with a "
    "batch's mean KL inside the absolute value; 25 nats, 100,000 steps and gamma 1000 "
    "are assumptions. The overlap of posteriors is a matrix by sampling. The "
    "experiment has MLPs on 3,456 grey 16x16 sprites, C up to 7 nats (8.1 tell them "
    "apart) and gamma 30: with 1000 Adam saw the sign of KL - C alone, and the NLL at "
    "12 nats was above that of beta = 4. One claim fails: rotation has no latent, at "
    "9 nats neither, as 16x16 pixels show little of it. The MIG depends on whether "
    "the first two latents lie along x and y: with a capacity it was 0.03 to 0.41 "
    "over seeds tried.",
}

__all__ = [
    "activation_steps",
    "beta_vae_loss",
    "capacity_at",
    "capacity_loss",
    "latent_kl",
    "posterior_overlap",
    "traversals",
]


@typed
def capacity_at(
    step: Real[ArrayLike, ""] | int,
    *,
    max_capacity: float | Float[ArrayLike, ""] = 25.0,
    warmup_steps: int = 100_000,
) -> Float[Array, ""]:
    """The capacity of the code at a step: C = max_capacity min(1, step / warmup_steps).

    Args:
        step: of training, >= 0.
        max_capacity: C at the end, in nats, >= 0.
        warmup_steps: after which C no longer grows, > 0.

    Returns:
        C in nats, a float32 scalar.

    Raises:
        ValueError: a number is out of range.

    >>> float(capacity_at(25_000))
    6.25
    """
    check_range("max_capacity", max_capacity, low=0.0)
    check_range("warmup_steps", warmup_steps, low=1)
    share = jnp.clip(as_float32(step) / warmup_steps, 0.0, 1.0)
    return as_float32(max_capacity) * share


@typed
def capacity_loss(
    recon_nll: Float[ArrayLike, " batch"],
    kl: Float[ArrayLike, " batch"],
    capacity: float | Float[ArrayLike, ""],
    *,
    gamma: float | Float[ArrayLike, ""] = 1000.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Reconstruction, with the batch's mean KL held at a capacity (equation 8).

    mean_b recon_nll + gamma |mean_b kl - capacity|

    The mean comes before the absolute value, as in disentanglement_lib: examples may
    differ in what codes cost.

    Args:
        recon_nll: -log p(x|z) in nats, `[B]`.
        kl: KL(q(z|x) || p(z)) in nats, `[B]`.
        capacity: C in nats, such as `capacity_at(step)`.
        gamma: >= 0, above what a nat of code saves in reconstruction; else KL < C.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "reconstruction", "kl", "excess".

    Raises:
        ValueError: `gamma` is negative.

    >>> nll, kl = jnp.array([10.0, 20.0]), jnp.array([1.0, 4.0])
    >>> loss, aux = capacity_loss(nll, kl, 3.0, gamma=100.0)
    >>> float(loss), float(aux["excess"])
    (65.0, -0.5)
    """
    check_range("gamma", gamma, low=0.0)
    nll, rate = jnp.mean(as_float32(recon_nll)), jnp.mean(as_float32(kl))
    excess = rate - as_float32(capacity)
    loss = nll + as_float32(gamma) * jnp.abs(excess)
    aux = {"reconstruction": nll, "kl": rate, "excess": excess}
    return loss, lax.stop_gradient(aux)


@typed
def beta_vae_loss(
    recon_nll: Float[ArrayLike, " batch"],
    kl: Float[ArrayLike, " batch"],
    *,
    beta: float | Float[ArrayLike, ""] = 4.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of a beta-VAE: mean_b recon_nll + beta kl; a VAE's with beta = 1.

    Args:
        recon_nll: -log p(x|z) in nats, `[B]`.
        kl: KL(q(z|x) || p(z)) in nats, `[B]`.
        beta: >= 0.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "per_example" `[B]`, and the
        scalars "reconstruction" and "kl".

    Raises:
        ValueError: `beta` is negative.

    >>> nll, kl = jnp.array([10.0, 20.0]), jnp.array([1.0, 4.0])
    >>> float(beta_vae_loss(nll, kl)[0])
    25.0
    """
    check_range("beta", beta, low=0.0)
    nll, kl = as_float32(recon_nll), as_float32(kl)
    each = nll + as_float32(beta) * kl
    aux = {"per_example": each, "reconstruction": jnp.mean(nll), "kl": jnp.mean(kl)}
    return jnp.mean(each), lax.stop_gradient(aux)


@typed
def latent_kl(
    mean: Float[ArrayLike, "batch latents"], log_std: Float[ArrayLike, "batch latents"]
) -> Float[Array, " latents"]:
    """What each latent costs: mean_b KL(N(mean_bd, std_bd^2) || N(0, 1)).

    Args:
        mean: of the posteriors, `[B, D]`.
        log_std: log of their standard deviations, likewise.

    Returns:
        Nats, >= 0, `[D]`, float32, 0 for latents not in use; their sum is the KL.

    >>> latent_kl(jnp.array([[1.0, 0.0], [3.0, 0.0]]), jnp.zeros((2, 2))).tolist()
    [2.5, 0.0]
    """
    each = normal_kl(as_float32(mean)[..., None], as_float32(log_std)[..., None])
    return jnp.mean(each, axis=0)


@typed
def activation_steps(
    traces: Float[ArrayLike, "times latents"],
    *,
    threshold: float | Float[ArrayLike, ""] = 0.1,
) -> Int[Array, " latents"]:
    """When each latent enters the code: from when on its KL stays above a level.

    A latent that comes and goes, as some do early on, counts from its return.

    Args:
        traces: of `latent_kl` over training, `[T, D]`, nats.
        threshold: nats, >= 0.

    Returns:
        Indices in 0 .. T, `[D]`, int32: T for a latent that is below it at the end.

    Raises:
        ValueError: `threshold` is negative.

    >>> activation_steps(jnp.array([[0.0, 0.0], [0.5, 0.0], [0.9, 0.2]])).tolist()
    [1, 2]
    """
    check_range("threshold", threshold, low=0.0)
    traces = as_float32(traces)
    below = traces <= as_float32(threshold)
    times = jnp.arange(1, len(traces) + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(below, times[:, None], 0), axis=0)


@typed
def posterior_overlap(
    key: Key[Array, ""],
    mean: Float[ArrayLike, "data latents"],
    log_std: Float[ArrayLike, "data latents"],
    *,
    num_samples: int = 16,
) -> tuple[Float[Array, "data data"], dict[str, Array]]:
    """For which example a code may be taken: the channel that posteriors make.

    A_nm = E q(z|x_m) / sum_k q(z|x_k),   z ~ q(z|x_n)

    Of a narrow channel the loss is least where codes that overlap are of images alike:
    mean_n sum_m A_nm |x_n - x_m|^2.

    Args:
        key: a typed key, consumed.
        mean: of N posteriors, `[N, D]`.
        log_std: log of their standard deviations, likewise; for noise in [-40, 40].
        num_samples: codes drawn per example; memory is that of one.

    Returns:
        `(A, aux)`: `[N, N]`, float32, rows of sum 1; in aux "information" `[N]`, nats:
        what codes tell of their example, <= log N, whose mean is the channel's rate
        I(z; n), with its "stderr".

    Raises:
        ValueError: `num_samples` is not positive.

    >>> mean = jnp.array([[-9.0], [9.0]])
    >>> a, aux = posterior_overlap(jax.random.key(0), mean, jnp.zeros((2, 1)))
    >>> a.round(4).tolist(), aux["information"].round(4).tolist()
    ([[1.0, 0.0], [0.0, 1.0]], [0.6931, 0.6931])
    """
    check_range("num_samples", num_samples, low=1)
    mean, log_std = as_float32(mean), as_float32(log_std)
    std = jnp.exp(jnp.clip(log_std, -40.0, 40.0))

    def one(key: Array) -> tuple[Array, Array]:
        z = mean + std * jax.random.normal(key, mean.shape, mean.dtype)
        # Every code under every posterior: [N, 1, D] against [N, D].
        repeated = jnp.repeat(z[:, None], len(mean), axis=1)
        log_q = normal_log_prob(repeated, mean, log_std)
        log_share = jax.nn.log_softmax(log_q, axis=1)
        return jnp.exp(log_share), jnp.diagonal(log_share) + math.log(len(mean))

    draws = lax.map(jax.checkpoint(one), jax.random.split(key, num_samples))
    overlap, information = (jnp.mean(a, axis=0) for a in draws)
    spread = jnp.std(draws[1]) / math.sqrt(draws[1].size)
    return overlap, lax.stop_gradient({"information": information, "stderr": spread})


@typed
def traversals(
    mean: Float[ArrayLike, " latents"], values: Float[ArrayLike, " steps"]
) -> Float[Array, "latents steps latents"]:
    """Codes in which one latent after the other takes the given values.

    Args:
        mean: the code that they start from, `[D]`.
        values: such as `linspace(-3, 3, 7)`, `[V]`.

    Returns:
        `[D, V, D]`, float32: entry `[d, v]` is `mean` with `values[v]` in place d.

    >>> traversals(jnp.array([5.0, 6.0]), jnp.array([0.0, 1.0]))[0].tolist()
    [[0.0, 6.0], [1.0, 6.0]]
    """
    mean, values = as_float32(mean), as_float32(values)
    own = jnp.eye(len(mean), dtype=bool)[:, None]
    return jnp.where(own, values[None, :, None], mean[None, None])


def _posteriors(key: Array) -> tuple[Array, Array]:
    return jax.random.normal(key, (8, 3)), 0.1 * jnp.arange(24.0).reshape(8, 3) - 2.0


def _loss_example(key: Array):
    nll, kl = jax.random.uniform(key, (2, 8))
    return 40.0 + 10.0 * nll, 4.0 + kl


EXAMPLES = {
    capacity_at: lambda key: ((jnp.int32(30),), {"warmup_steps": 100}),
    capacity_loss: lambda key: ((*_loss_example(key), 3.0), {"gamma": 20.0}),
    beta_vae_loss: lambda key: (_loss_example(key), {}),
    latent_kl: lambda key: (_posteriors(key), {}),
    activation_steps: lambda key: ((jax.random.uniform(key, (8, 3)),), {}),
    posterior_overlap: lambda key: ((key, *_posteriors(key)), {"num_samples": 2}),
    traversals: lambda key: (tuple(jax.random.normal(key, (2, 8))), {}),
}
