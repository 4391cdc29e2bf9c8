"""What frozen features know of the labels: a linear and a nearest-neighbour probe."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax

__all__ = ["knn_accuracy", "linear_accuracy"]


@functools.partial(jax.jit, static_argnames=("classes", "steps"))
def linear_accuracy(
    train, train_labels, test, test_labels, *, classes: int = 10, steps: int = 300
) -> jax.Array:
    """Test accuracy of multinomial logistic regression on standardised features.

    Args:
        train: features `[N, D]`.
        train_labels: `[N]`.
        test: features `[M, D]`.
        test_labels: `[M]`.
        classes: how many labels there are.
        steps: of Adam on the whole of `train`, with the rate falling to 0.
    """
    mean, std = jnp.mean(train, axis=0), jnp.std(train, axis=0)

    def standard(x):
        return (x - mean[None]) / (std[None] + 1e-6)

    x, one_hot = standard(train), jax.nn.one_hot(train_labels, classes)

    def loss(params):
        logits = x @ params["weight"] + params["bias"][None]
        penalty = 1e-4 * jnp.sum(jnp.square(params["weight"]))
        return jnp.mean(optax.softmax_cross_entropy(logits, one_hot)) + penalty

    optimizer = optax.adam(optax.linear_schedule(0.05, 0.0, steps))

    def step(_, carry):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    width = train.shape[1]
    params = {"weight": jnp.zeros((width, classes)), "bias": jnp.zeros(classes)}
    params, _ = lax.fori_loop(0, steps, step, (params, optimizer.init(params)))
    scores = standard(test) @ params["weight"] + params["bias"][None]
    return jnp.mean(jnp.argmax(scores, axis=1) == test_labels)


@functools.partial(jax.jit, static_argnames=("classes", "neighbours"))
def knn_accuracy(
    train, train_labels, test, test_labels, *, classes: int = 10, neighbours: int = 20
) -> jax.Array:
    """Test accuracy of a vote of the nearest training examples, by cosine.

    Args:
        train: features `[N, D]`.
        train_labels: `[N]`.
        test: features `[M, D]`.
        test_labels: `[M]`.
        classes: how many labels there are.
        neighbours: how many vote, each with its cosine as the weight.
    """
    centre = jnp.mean(train, axis=0)[None]

    def unit(x):
        x = x - centre
        return x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-6)

    neighbours = min(neighbours, len(train))
    cosines, index = lax.top_k(unit(test) @ unit(train).T, neighbours)
    votes = jax.nn.one_hot(train_labels[index], classes) * cosines[..., None]
    return jnp.mean(jnp.argmax(jnp.sum(votes, axis=1), axis=1) == test_labels)
