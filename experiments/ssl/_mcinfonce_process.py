"""The controlled process of `mcinfonce`: ambiguous inputs with known posteriors.

Mean directions m are uniform on the sphere, kappa is a smooth function of m in a range
that the experiment's Config gives, x is an invertible network of m, and the latent is
drawn from p(z|x) = vMF(m, kappa). A positive has a latent z+ from vMF(z, 20), and its
input comes from p(x|z+), by importance resampling of many candidates.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.nn.von_mises_fisher import sample_vmf, vmf_log_prob

__all__ = ["data"]


def directions(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    x = jax.random.normal(key, shape)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Process:
    """The generative process of one seed; its methods are pure functions."""

    def __init__(self, config: Any, seed: jax.Array):
        self.config = config
        d = config.dimension
        keys = jax.random.split(jax.random.fold_in(jax.random.key(17), seed), 4)
        # Orthogonal layers and leaky rectifiers: no direction is lost.
        self.layers = jax.vmap(lambda k: jax.random.orthogonal(k, d))(
            jax.random.split(keys[0], 3)
        )
        self.first = 1.5 * jax.random.normal(keys[1], (d, 8))
        self.second = jax.random.normal(keys[2], (8,))
        raw = self._raw(directions(keys[3], (4096, d)))
        self.shift, self.scale = jnp.mean(raw), jnp.std(raw)

    def _raw(self, m: jax.Array) -> jax.Array:
        return jnp.tanh(m @ self.first) @ self.second

    def kappa(self, m: jax.Array) -> jax.Array:
        """Log-uniform over the range, about."""
        share = jax.scipy.stats.norm.cdf((self._raw(m) - self.shift) / self.scale)
        low, high = self.config.kappa_range
        return low * (high / low) ** share

    def observe(self, m: jax.Array) -> jax.Array:
        x = m * self.config.dimension**0.5
        for matrix in self.layers[:-1]:
            x = jax.nn.leaky_relu(x @ matrix, 0.3)
        return x @ self.layers[-1]

    def pairs(self, key: jax.Array, count: int) -> jax.Array:
        """Mean directions of inputs and of their positives, `[count, 2, d]`."""
        config = self.config
        keys = jax.random.split(key, 5)
        m = directions(keys[0], (count, config.dimension))
        z = sample_vmf(keys[1], m, self.kappa(m), num_samples=1)[:, 0]
        same = jnp.full(count, config.positive_kappa)
        z = sample_vmf(keys[2], z, same, num_samples=1)[:, 0]
        others = sample_vmf(keys[3], z, same, num_samples=config.candidates)
        point = jnp.broadcast_to(z[:, None], others.shape)
        log_weight = vmf_log_prob(point, others, self.kappa(others))
        log_weight -= config.positive_kappa * jnp.sum(point * others, axis=-1)
        chosen = jax.random.categorical(keys[4], log_weight, axis=1)
        other = jnp.take_along_axis(others, chosen[:, None, None], axis=1)[:, 0]
        return jnp.stack([m, other], axis=1)


def data(config: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Training pairs `[seeds, pairs, 2, d]`, and held-out inputs with their truth."""

    def one(seed: jax.Array):
        process = Process(config, seed)
        train_key, test_key = jax.random.split(jax.random.key(seed))
        chunks = jax.random.split(train_key, config.pairs // 1024)
        m = lax.map(lambda key: process.pairs(key, 1024), chunks)
        test = directions(test_key, (config.held_out, config.dimension))
        truth = {"mean": test, "kappa": process.kappa(test), "x": process.observe(test)}
        return process.observe(m).reshape(-1, 2, config.dimension), truth

    made = jax.jit(lambda seeds: lax.map(one, seeds))(jnp.arange(config.seeds))
    return jax.device_get(made)
