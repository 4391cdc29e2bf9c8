"""Gradients on the linear-Gaussian model, against closed forms: used by vae and iwae.

The encoder is the true posterior plus a shift, the same for all examples, of its means
and of its log standard deviations: `shift [2, latents]`, 0 at the optimum.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxzoo.core.stats import normal_kl
from jaxzoo.data.linear_gaussian import LinearGaussian, linear_gaussian

# (model, x, mean, log_std of the encoder, key) -> scalar
Objective = Callable[
    [LinearGaussian, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array
]


class Moments(NamedTuple):
    """Of a gradient, per seed and parameter: `[seeds, 2, latents]`."""

    mean: jax.Array
    variance: jax.Array
    draws: int


class Setting(NamedTuple):
    """A model, examples drawn from it, and a key for what comes next."""

    model: LinearGaussian
    x: jax.Array
    key: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def settings(seeds: int) -> Setting:
    """One setting of 64 examples per seed, stacked: to `lax.map` over."""

    def one_seed(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        model = linear_gaussian(keys[0])
        return Setting(model, model.sample(keys[1], 64)[0], keys[2])

    return lax.map(one_seed, jnp.arange(seeds))


def shifted_posterior(model: LinearGaussian, x: jax.Array, shift: jax.Array):
    """Mean and log standard deviation of the encoder."""
    mean, log_std = model.posterior(x)
    return mean + shift[:1], log_std + shift[1:]


@functools.partial(jax.jit, static_argnums=(0, 2))
def gradient_moments(
    objective: Objective, stacked: Setting, draws: int, offset: float
) -> Moments:
    """Mean and variance of the gradient of `objective` by the shift, at `offset`.

    It is compiled once per object `objective`: keep it for several offsets.
    """

    def one_seed(setting):
        model, x, key = setting.model, setting.x[:8], setting.key
        shift = jnp.full((2, model.weight.shape[1]), offset)

        def at(shift, key):
            return objective(model, x, *shifted_posterior(model, x, shift), key)

        keys = jax.random.split(key, draws)
        gradients = lax.map(lambda k: jax.grad(at)(shift, k), keys, batch_size=500)
        return gradients.mean(0), gradients.var(0, ddof=1)

    mean, variance = lax.map(one_seed, stacked)
    return Moments(mean, variance, draws)


@jax.jit
def exact_moments(stacked: Setting, offset: float) -> Moments:
    """The gradient of -ELBO without sampling: that of KL(encoder || posterior)."""

    def one_seed(setting):
        model, x = setting.model, setting.x[:8]

        def divergence(shift):
            q = shifted_posterior(model, x, shift)
            return jnp.mean(normal_kl(*q, *model.posterior(x)))

        return jax.grad(divergence)(jnp.full((2, model.weight.shape[1]), offset))

    gradient = lax.map(one_seed, stacked)
    return Moments(gradient, jnp.zeros_like(gradient), 1)


def score(first: Moments, second: Moments) -> float:
    """Largest difference of two means over parameters, in standard errors.

    The scores of the seeds are added up first, so that one number per parameter is left
    and three standard errors are rare by chance.
    """
    error = first.variance / first.draws + second.variance / second.draws
    scores = (first.mean - second.mean) / jnp.sqrt(error)
    return float(jnp.max(jnp.abs(scores.sum(0))) / len(scores) ** 0.5)
