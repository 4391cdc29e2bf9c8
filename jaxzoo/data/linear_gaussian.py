"""The linear-Gaussian latent variable model: every bound on it has a known answer.

    z ~ N(prior_mean, I),   x | z ~ N(weight z + bias, noise_std^2 I)

The columns of `weight` are orthogonal, so that the true posterior is a diagonal
Gaussian, which a diagonal encoder can reach exactly. All densities are in nats.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxzoo.core.stats import normal_log_prob
from jaxzoo.core.typed import check_range, typed

__all__ = ["LinearGaussian", "linear_gaussian"]


class LinearGaussian(NamedTuple):
    """The model's parameters, a pytree; its methods are pure functions of them."""

    weight: Float[Array, "observed latents"]
    bias: Float[Array, " observed"]
    prior_mean: Float[Array, " latents"]
    log_noise_std: Float[Array, ""]

    def sample(self, key: Key[Array, ""], num_examples: int) -> tuple[Array, Array]:
        """Draws `(x [N, observed], z [N, latents])` from the model."""
        prior_key, noise_key = jax.random.split(key)
        z = jax.random.normal(prior_key, (num_examples, self.weight.shape[1]))
        z = z + self.prior_mean[None]
        noise = jax.random.normal(noise_key, (num_examples, self.weight.shape[0]))
        return self.decode(z) + jnp.exp(self.log_noise_std) * noise, z

    def decode(self, z: Float[Array, "... latents"]) -> Float[Array, "... observed"]:
        """The mean of x given z."""
        bias = jnp.expand_dims(self.bias, tuple(range(z.ndim - 1)))
        return z @ self.weight.T + bias

    def log_joint(
        self, x: Float[Array, "... observed"], z: Float[Array, "... latents"]
    ) -> Float[Array, "..."]:
        """log p(x, z) per example; `z [K, B, latents]` goes with `x [B, observed]`."""
        likelihood = normal_log_prob(x, self.decode(z), self.log_noise_std)
        return likelihood + normal_log_prob(z, self.prior_mean)

    def log_marginal(self, x: Float[Array, "... observed"]) -> Float[Array, "..."]:
        """The exact log p(x), by Bayes' rule at the posterior's mean."""
        mean, log_std = self.posterior(x)
        return self.log_joint(x, mean) - normal_log_prob(mean, mean, log_std)

    def posterior(self, x: Float[Array, "... observed"]) -> tuple[Array, Array]:
        """The exact p(z|x): means `[..., latents]` and log standard deviations."""
        variance = jnp.exp(2.0 * self.log_noise_std)
        precision = 1.0 + jnp.sum(jnp.square(self.weight), axis=0) / variance
        residual = x - jnp.broadcast_to(self.decode(self.prior_mean), x.shape)
        shift = residual @ (self.weight / (variance * precision)[None])
        mean = jnp.broadcast_to(self.prior_mean, shift.shape) + shift
        return mean, jnp.broadcast_to(-0.5 * jnp.log(precision), mean.shape)


@typed
def linear_gaussian(
    key: Key[Array, ""],
    *,
    observed: int = 8,
    latents: int = 3,
    noise_std: float = 0.5,
) -> LinearGaussian:
    """Draws a linear-Gaussian model with orthogonal columns of norms 0.5 to 2.

    Args:
        key: a typed key, consumed.
        observed: dimension of x, at least `latents`.
        latents: dimension of z, >= 1.
        noise_std: standard deviation of x given z, > 0.

    Returns:
        The model.

    Raises:
        ValueError: a size or the noise is out of range; names it.

    >>> model = linear_gaussian(jax.random.key(0))
    >>> x, z = model.sample(jax.random.key(1), 5)
    >>> x.shape, z.shape, model.log_marginal(x).shape
    ((5, 8), (5, 3), (5,))
    """
    check_range("latents", latents, low=1)
    check_range("observed", observed, low=latents)
    check_range("noise_std", noise_std, low=1e-6)
    weight_key, bias_key, prior_key = jax.random.split(key, 3)
    columns = jax.random.orthogonal(weight_key, observed)[:, :latents]
    norms = jnp.linspace(0.5, 2.0, latents)
    return LinearGaussian(
        weight=columns * norms[None],
        bias=jax.random.normal(bias_key, (observed,)),
        prior_mean=jax.random.normal(prior_key, (latents,)),
        log_noise_std=jnp.log(jnp.float32(noise_std)),
    )
