"""Fully Bayesian autoencoders whose latents follow a sparse Gaussian process.

    U = -(N / B) sum_n [log p(x_n | z_n, decoder) + log p(z_n | v, S, theta)]
        - log p(decoder) - log p(v, S, theta)

exp(-U) is sampled as a whole: latents z, decoder, inducing values and inputs S, kernel
hyper-parameters theta. An encoder of x and noise learns where such chains arrive.

    z = encoder.apply(phi, x, noise)                         # the chain starts here
    def u(s): likelihood = normal_log_prob(x, decode(s.decoder, s.z), log_std)
        gp = fitc_log_prob(s.z, t, s.inputs, s.values, *s.theta).sum(axis=1)
        prior = gp_log_prior(s.values, s.inputs, *s.theta) + weight_prior(s.decoder)
        return sgpbae_potential(likelihood, gp, prior, num_data=n)[0]
    state = sghmc_step(key, state, grad(u)(state.position), step_size=0.01)  # K times
    phi = phi - rate * grad(lambda phi: encoder_loss(codes(phi), state.position.z)[0])
"""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float

from jaxzoo.core.stats import normal_log_prob
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "sgpbae",
    "title": "Fully Bayesian Autoencoders with Latent Sparse Gaussian Processes",
    "arxiv": "2302.04534",
    "year": 2023,
    "authors": "Ba-Hien Tran, Babak Shahbaba, Stephan Mandt, Maurizio Filippone",
    "where": "The sparse Gaussian process prior, the potential, the stochastic encoder "
    "and its steps towards sampled latents.",
    "differs": "Details follow the released code; of the text, abstracts alone were at "
    "hand. As there, latents are sampled and the encoder learns from them; the first "
    "version of the text has the encoder's weights in the potential. That code's "
    "sampler multiplies gradients by N once more, a temperature of 1/N: not here. "
    "Priors have their constants, jitter is of the variance, S has no Strauss or "
    "determinantal prior; deep processes and other kernels are left out. In the "
    "experiment, variance and noise of the process are constants, as in that code: a "
    "sampled noise grew until it explained most of z. All clips are one batch, so that "
    "codes replace z in the burn-in only; always, the process did not follow z. The "
    "burn-in has a temperature of 0.1: chains that adapt their step run hot. Positions "
    "are those of seen frames of the clips that are fitted. Hidden frames have 0.42 of "
    "the error of what a VAE says of an unseen frame, but 0.80, at the bound, of that "
    "of its codes interpolated: 0.81 in the median, over 5 seeds.",
}

__all__ = [
    "StochasticEncoder", "encoder_loss", "fitc_conditional", "fitc_log_prob",
    "gp_log_prior", "sgpbae_potential",
]  # fmt: skip

Scalar = Float[ArrayLike, ""]
Scale = float | Scalar
Inputs = Float[ArrayLike, "points dims"]
Inducing = Float[ArrayLike, "inducing dims"]
Values = Float[ArrayLike, "inducing latents"]
PerDim = Float[ArrayLike, " dims"]


@typed
def fitc_conditional(
    inputs: Inputs, inducing_inputs: Inducing, values: Values, log_lengthscale: PerDim,
    log_variance: Scalar, *, jitter: Scale = 1e-4,
) -> tuple[Float[Array, "points latents"], Float[Array, " points"]]:  # fmt: skip
    """Moments of a Gaussian process at inputs, given its whitened inducing values.

    k(t, s) = variance exp(-sum_p (t_p - s_p)^2 / (2 lengthscale_p^2))
    L L' = k(S, S) + jitter variance I,   A = L^-1 k(S, T)
    mean = A' v,   variance_n = k(t_n, t_n) - sum_m A_mn^2

    The process at S is u = L v, v ~ N(0, I). Under FITC points are independent given u.

    Args:
        inputs: T, `[N, P]`, such as times. Beyond 1e6 they count as 1e6.
        inducing_inputs: S, `[M, P]`, likewise.
        values: v, `[M, D]`, one process per column, likewise.
        log_lengthscale: per input dimension, `[P]`; logarithms beyond 12 count as 12.
        log_variance: of the process, a scalar, likewise.
        jitter: > 0, of the variance; in float32 below 1e-5 roots may become NaN.

    Returns:
        `(mean, variance)`: `[N, D]` and, for all latents alike, `[N]`, >= 0.

    Raises:
        ValueError: `jitter` is not positive.

    The released code has jitter of 1e-6 in float64.

    >>> t, one = jnp.array([[0.0], [1.0]]), jnp.zeros(())
    >>> mean, variance = fitc_conditional(t, t[:1], jnp.ones((1, 1)), one[None], one)
    >>> mean[:, 0].tolist(), variance.tolist()  # e^-1/2, 1 - e^-1 at the second point
    ([1.0, 0.6065], [0.0001, 0.6322])
    """
    check_range("jitter", jitter, above=0.0)
    s, log_lengthscale = _limited(inducing_inputs), _limited(log_lengthscale, 12.0)
    # Correlations and a unit process: the variance would only scale the root.
    spread = jnp.eye(len(s), dtype=s.dtype) * as_float32(jitter)
    root = jnp.linalg.cholesky(_correlation(s, s, log_lengthscale) + spread)
    across = _correlation(s, _limited(inputs), log_lengthscale)
    weights = solve_triangular(root, across, lower=True)
    rest = jnp.maximum(1.0 - jnp.sum(jnp.square(weights), axis=0), 0.0)
    std = jnp.exp(0.5 * _limited(log_variance, 12.0))
    return std * (weights.T @ _limited(values)), jnp.square(std) * rest


@typed
def fitc_log_prob(
    z: Float[ArrayLike, "points latents"], inputs: Inputs, inducing_inputs: Inducing,
    values: Values, log_lengthscale: PerDim, log_variance: Scalar, log_noise: Scalar,
    *, jitter: Scale = 1e-4,
) -> Float[Array, "points latents"]:  # fmt: skip
    """Log-density of each latent under FITC, given the inducing values.

    log N(z_nd; mean_nd, variance_n + noise), moments of `fitc_conditional`

    Over v ~ N(0, I) a column has the covariance Q + diag(k(T, T) - Q) + noise I, with
    Q = A' A. Series at the same inputs, such as clips, are columns too.

    Args:
        z: latents, `[N, D]`. Beyond 1e6 they count as 1e6.
        inputs: T; with the next four, to log_variance, as in `fitc_conditional`.
        inducing_inputs: S.
        values: v, whitened.
        log_lengthscale: per input dimension.
        log_variance: of the process.
        log_noise: of the variance of latents around the process, a scalar, up to 12.
        jitter: as there, > 0.

    Returns:
        Nats, `[N, D]`; terms of points without data are left out of a sum.

    Raises:
        ValueError: `jitter` is not positive.

    >>> t, zero, v = jnp.array([[0.0], [50.0]]), jnp.zeros(()), jnp.array([[2.0]])
    >>> z = jnp.array([[2.0], [2.0]])  # as the process, and where it is not known
    >>> fitc_log_prob(z, t, t[:1], v, zero[None], zero, zero)[:, 0].tolist()
    [-0.919, -2.2655]
    """
    mean, variance = fitc_conditional(
        inputs, inducing_inputs, values, log_lengthscale, log_variance, jitter=jitter
    )
    log_std = 0.5 * jnp.log(variance + jnp.exp(_limited(log_noise, 12.0)))
    log_std = jnp.broadcast_to(log_std[:, None], mean.shape)
    each = (a[..., None] for a in (_limited(z), mean, log_std))
    return normal_log_prob(*each)


@typed
def gp_log_prior(
    values: Values, inducing_inputs: Inducing, log_lengthscale: PerDim,
    log_variance: Scalar, log_noise: Scalar, *, lengthscale: Scale = 2.0,
    variance: Scale = 0.05, noise: Scale = 0.05,
    inducing: Literal["normal", "uniform"] = "normal",
) -> Float[Array, ""]:  # fmt: skip
    """Log-prior of all that the sparse Gaussian process has.

    log N(v; 0, I) + log N(S; 0, I) + sum_h log N(log h; log median_h, 1)

    Args:
        values: v, whitened inducing values, `[M, D]`. Beyond 1e6 all count as 1e6.
        inducing_inputs: S, `[M, P]`, in units in which inputs are about N(0, I).
        log_lengthscale: `[P]`.
        log_variance: a scalar.
        log_noise: a scalar.
        lengthscale: median of the lengthscales, > 0.
        variance: median of the variance of the process, > 0.
        noise: median of the variance around it, > 0.
        inducing: "uniform" leaves out the term of S.

    Returns:
        Nats, a float32 scalar. Densities of the hyper-parameters are those of their
        logarithms, in which a chain moves.

    Raises:
        ValueError: a median is not positive.

    The medians are those of the released code, which leaves out constants.

    >>> zero, one = jnp.zeros(()), jnp.zeros((1, 1))
    >>> knobs = {"lengthscale": 1.0, "variance": 1.0, "noise": 1.0}
    >>> float(gp_log_prior(one, one, one[0], zero, zero, **knobs))  # -5/2 log(2 pi)
    -4.5947
    """
    log_prior = jnp.sum(normal_log_prob(_limited(values)))
    if inducing == "normal":
        log_prior = log_prior + jnp.sum(normal_log_prob(_limited(inducing_inputs)))
    medians = {"lengthscale": lengthscale, "variance": variance, "noise": noise}
    logs = log_lengthscale, log_variance, log_noise
    for (name, median), log in zip(medians.items(), logs, strict=True):
        check_range(name, median, above=0.0)
        away = _limited(log).reshape(-1) - jnp.log(as_float32(median))
        log_prior = log_prior + normal_log_prob(away)
    return log_prior


@typed
def sgpbae_potential(
    log_likelihood: Float[ArrayLike, " batch"],
    latent_log_prob: Float[ArrayLike, " batch"],
    log_prior: Scalar,
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    num_data: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The potential whose exp(-U) is the posterior, from a batch.

    U = -(N / B) sum_n [log p(x_n | z_n) + log p(z_n | v, S, theta)] - log_prior

    Args:
        log_likelihood: per example, in nats, `[B]`. Beyond 1e30 it counts as 1e30.
        latent_log_prob: of `fitc_log_prob`, summed over latents, `[B]`, likewise.
        log_prior: of decoder weights and Gaussian process, a scalar, likewise.
        where: examples that are there; others may hold anything, even NaN.
        num_data: N, > 0; None for the whole data in one batch.

    Returns:
        `(potential, aux)`: float32 scalar; in aux "per_example", the negative sum in
        brackets, `[B]`, 0 where there is none.

    Raises:
        ValueError: `num_data` is below 1.

    >>> x, z = jnp.array([-1.0, -2.0]), jnp.array([-0.5, -0.5])
    >>> loss, aux = sgpbae_potential(x, z, jnp.array(-3.0), num_data=4)
    >>> float(loss), aux["per_example"].tolist()  # 2 (1.5 + 2.5) + 3
    (11.0, [1.5, 2.5])
    """
    if num_data is not None:
        check_range("num_data", num_data, low=1)
    there = jnp.ones(jnp.shape(log_likelihood), bool) if where is None else where
    terms = log_likelihood, latent_log_prob
    examples = -sum(_limited(jnp.where(there, a, 0.0), 1e30) for a in terms)
    examples, scale = jnp.asarray(examples), 1.0
    if num_data is not None:
        scale = num_data / jnp.maximum(jnp.sum(there), 1).astype(examples.dtype)
    loss = scale * jnp.sum(examples) - _limited(log_prior, 1e30)
    return loss, {"per_example": lax.stop_gradient(examples)}


@typed
def encoder_loss(
    codes: Float[ArrayLike, "batch latents"], z: Float[ArrayLike, "batch latents"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The encoder's loss: to go at once where the chain has gone from its codes.

    mean_bd (f(x_b, noise_b)_d - z_bd)^2

    Gradient: z, a state of the chain, is a constant.

    Args:
        codes: the encoder's, of the noise from which the chain began, `[B, D]`.
        z: latents after the chain's steps, `[B, D]`. Differences count up to 1e15.

    Returns:
        `(loss, aux)`: float32 scalar; in aux "per_example", means over latents, `[B]`.

    >>> loss, aux = encoder_loss(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2)))
    >>> float(loss), aux["per_example"].tolist()
    (2.5, [2.5])
    """
    away = _limited(as_float32(codes) - lax.stop_gradient(as_float32(z)), 1e15)
    costs = jnp.mean(jnp.square(away), axis=1)
    return jnp.mean(costs), {"per_example": lax.stop_gradient(costs)}


class StochasticEncoder(nn.Module):
    """Latents of x and noise: z = f([x, noise]), noise ~ N(0, I) in the shape of x."""

    latents: int
    hidden: Sequence[int]

    @nn.compact
    def __call__(
        self, x: Float[Array, "*b d"], noise: Float[Array, "*b d"]
    ) -> Float[Array, "*b latents"]:
        h = jnp.concatenate([x, noise], axis=-1)
        for width in self.hidden:
            h = nn.tanh(nn.Dense(width)(h))
        return nn.Dense(self.latents)(h)


def _limited(x: ArrayLike, largest: float = 1e6) -> Array:
    return jnp.clip(as_float32(x), -largest, largest)


def _correlation(a: Array, b: Array, log_lengthscale: Array) -> Array:
    # By differences: a^2 - 2ab + b^2 would lose the digits of close points.
    away = (a[:, None] - b[None]) * jnp.exp(-log_lengthscale)[None, None]
    return jnp.exp(-0.5 * jnp.sum(jnp.square(away), axis=-1))


def _example(key: Array):
    draws = jax.random.normal(key, (5, 8, 2))
    inducing = jnp.linspace(-1.5, 1.5, 4)[:, None] + 0.1 * draws[0, :4, :1]
    theta = 0.1 * draws[1, 0, :1], 0.1 * draws[1, 1, 0], -1.0 + 0.1 * draws[1, 2, 0]
    z, values = jnp.tile(draws[2], 4), jnp.tile(draws[4, :4], 4)
    return z, draws[3, :, :1], inducing, values, *theta


def _potential_example(key: Array):
    draws = jax.random.normal(key, (3, 8))
    return (*draws[:2], draws[2, 0]), {"where": jnp.arange(8) < 6, "num_data": 60}


EXAMPLES = {
    fitc_conditional: lambda key: (_example(key)[1:6], {}),
    fitc_log_prob: lambda key: (_example(key), {}),
    gp_log_prior: lambda key: ((*_example(key)[3:1:-1], *_example(key)[4:]), {}),
    sgpbae_potential: _potential_example,
    encoder_loss: lambda key: (tuple(jax.random.normal(key, (2, 8, 2))), {}),
}
