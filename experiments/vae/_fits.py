"""What `compare` does with each model: a fit, its likelihood, features of samples."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.nn import sigmoid

from experiments.vae._models import Model
from jaxzoo.core.stats import bernoulli_log_prob, normal_log_prob
from jaxzoo.training.record import Run
from jaxzoo.training.step import descend
from jaxzoo.training.weights import load_weights, save_weights
from jaxzoo.vae.infovae import mutual_information
from jaxzoo.vae.iwae import active_units, importance_log_likelihood, log_weights

__all__ = ["classifier", "measure_images", "train"]


class Classifier(nn.Module):
    """Two strided convolutions; features of an image, and logits of its class."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x.reshape(-1, 28, 28, 1)
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        x = nn.tanh(nn.Dense(self.features)(x.reshape(len(x), -1)))
        return x, nn.Dense(10)(x)


def classifier(
    run: Run, data: list[Any], *, features: int, steps: int
) -> Callable[[Any], Any]:
    """Features by a network that is trained once per folder and read again."""
    net = Classifier(features)
    x, label = data[:2]

    def loss(params: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (min(64, len(x)),), 0, len(x))
        outputs: Any = net.apply(params, jnp.asarray(x)[rows])
        wanted = jnp.asarray(label)[rows]
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(outputs[1], wanted)
        )

    def trained() -> Any:
        start = net.init(jax.random.key(0), x[:1])
        return descend(loss, start, 3e-3, jax.random.key(1), steps)

    path = run.folder / "classifier.safetensors"
    if run.resumed and path.exists():
        params = load_weights(path, jax.eval_shape(trained))
    else:
        params = jax.jit(trained)()
        save_weights(path, params)
    outputs: Any = jax.jit(net.apply)(params, data[2])
    right = float(np.mean(np.argmax(outputs[1], axis=1) == data[3]))
    run.say(f"The classifier knows {right:.1%} of held-out images.")
    return lambda x: net.apply(params, x)[0]  # pyright: ignore[reportIndexIssue]


def train(model: Model, *, steps: int, rate: float, batch_size: int) -> Any:
    """A program from seeds and data to parameters, one seed after the other."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def one(seed: jax.Array, x: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(seed))
        params = model.init(keys[0])

        def step(carry: Any, turn: Any) -> Any:
            (params, state), (key, done) = carry, turn
            keys = jax.random.split(key)
            rows = jax.random.randint(keys[0], (batch_size,), 0, len(x))
            grads = jax.grad(model.loss)(params, keys[1], x[rows], done)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        turns = jax.random.split(keys[1], steps), jnp.arange(steps) / steps
        return lax.scan(step, (params, optimizer.init(params)), turns)[0][0]

    return jax.jit(lambda seeds, x: lax.map(lambda seed: one(seed, x), seeds))


def log_likelihood(
    model: Model, params: Any, key: jax.Array, x: jax.Array, draws: int
) -> tuple[jax.Array, jax.Array]:
    """Mean over images that were made binary, and the error of the sampling."""
    assert model.log_prior is not None
    log_prior = model.log_prior
    mean, log_std = model.encode(params, x)

    def log_weight(key: jax.Array) -> jax.Array:
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        likelihood = bernoulli_log_prob(x, model.decode(params, z))
        return likelihood + log_prior(params, z) - normal_log_prob(z, mean, log_std)

    log_w = log_weights(key, log_weight, num_samples=draws, chunk=10)
    estimate, aux = importance_log_likelihood(log_w)
    error = jnp.sqrt(jnp.sum(jnp.square(aux["stderr"]))) / len(estimate)
    return jnp.mean(estimate), error


def measure_images(
    model: Model, look: Any, params: Any, seed: jax.Array, x: Any, test: jax.Array,
    binary: jax.Array, *, draws: int,
) -> Any:  # fmt: skip
    """Figures of one fit, features of as many samples as `test` has, a few of these."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 3)
    codes = model.encode(params, test)
    error = jnp.square(test - sigmoid(model.decode(params, codes[0])))
    found = {
        "error": jnp.mean(jnp.sum(error, axis=1)),
        "active": jnp.sum(active_units(codes[0])),
        "information": mutual_information(keys[0], *codes)[0],
    }
    if model.log_prior is not None:
        pair = log_likelihood(model, params, keys[1], binary, draws)
        found |= dict(zip(("log_likelihood", "sampling_error"), pair, strict=True))
    z = model.draw(params, keys[2], model.encode(params, x), len(test))
    images = sigmoid(model.decode(params, z))
    return found, look(images), images[:8]
