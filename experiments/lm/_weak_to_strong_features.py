"""What stands in for pretraining in `weak_to_strong`: features of digits and texts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.data.text import moby_dick, state_of_the_union
from jaxzoo.nn.mlp import MLP
from jaxzoo.training.step import descend

__all__ = ["contrastive", "semantic"]


def contrastive(config: Any, key: Any, images: jax.Array) -> tuple[MLP, Any]:
    """An encoder that knows two views of a digit from those of others (SimCLR)."""
    keys = jax.random.split(key, 3)
    body = MLP((config.width, config.width), jax.nn.relu)
    head = MLP((config.width, 64), jax.nn.relu)
    first, second = jnp.zeros((1, 64)), jnp.zeros((1, config.width))
    params = (body.init(keys[0], first), head.init(keys[1], second))
    count = config.batch_size

    def moved(image: jax.Array, at: jax.Array) -> jax.Array:
        return lax.dynamic_slice(jnp.pad(image, 1), (at[0], at[1]), (8, 8)).ravel()

    def loss(params: Any, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        x = images[jax.random.randint(keys[0], (count,), 0, len(images))]
        x = jnp.concatenate([x, x]).reshape(-1, 8, 8)
        x = jax.vmap(moved)(x, jax.random.randint(keys[1], (2 * count, 2), 0, 3))
        x += 0.15 * jax.random.normal(keys[2], x.shape)
        hidden: Any = body.apply(params[0], x)
        z: Any = head.apply(params[1], jax.nn.relu(hidden))
        z = z / (jnp.linalg.norm(z, axis=1, keepdims=True) + 1e-6)
        logits = z[:count] @ z[count:].T / 0.2
        losses = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(losses(logits, jnp.arange(count)))

    return body, descend(loss, params, 2e-3, keys[2], config.pretraining)[0]


def semantic(config: Any) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Latent semantic analysis of pairs of bytes in texts of two books.

    Returns:
        For training and test: counts of bytes, features, and which book it is.
    """
    books = [f(window=config.window) for f in (moby_dick, state_of_the_union)]

    def half(split: str) -> np.ndarray:
        parts = [b.split(split).arrays["token"].astype(int) for b in books]
        return np.concatenate([x[:: max(1, len(x) // config.texts)] for x in parts])

    def counts(token: np.ndarray, kinds: int) -> np.ndarray:
        return np.stack([np.bincount(row % kinds, minlength=kinds) for row in token])

    tokens = [half("train"), half("test")]
    pairs = [np.log1p(counts(131 * t[:, :-1] + t[:, 1:], 1021)) for t in tokens]
    pairs = [x / (0.05 + (pairs[0] > 0).mean(0)) ** 0.5 for x in pairs]
    axes = np.linalg.eigh(pairs[0].T @ pairs[0])[1][:, -config.width :]
    strong = [jnp.asarray((x @ axes).astype(np.float32)) for x in pairs]
    raw = [jnp.asarray(counts(t, 256) / 1.0, jnp.float32) for t in tokens]
    kind = [jnp.asarray(np.arange(len(t)) >= len(t) / 2, jnp.int32) for t in tokens]
    return list(zip(raw, strong, kind, strict=True))
