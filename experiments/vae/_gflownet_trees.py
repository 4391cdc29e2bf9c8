"""A policy over the trees of a random grammar, for `gflownet_em`."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxzoo.nn.flow_policy import FlowPolicy
from jaxzoo.training.step import descend
from jaxzoo.vae.gflownet_em import balance_loss, sample_trees


def all_trees(config: Any) -> tuple[np.ndarray, np.ndarray]:
    """Actions of all ways to build trees, `[ways, N - 1]`, and the tree of each."""
    length, size = config.length, config.symbols
    ways, trees = [], []
    places = itertools.product(*(range(n - 1) for n in range(length, 1, -1)))
    symbols = list(itertools.product(range(size), repeat=length - 2))
    for at, chosen in itertools.product(places, symbols):
        spans, joined = [(i, i + 1) for i in range(length)], []
        for i, symbol in zip(at, (*chosen, 0), strict=True):
            spans[i : i + 2] = [(spans[i][0], spans[i + 1][1])]
            joined.append((*spans[i], symbol))
        steps = zip(at, (*chosen, 0), strict=True)
        ways.append([i * size + symbol for i, symbol in steps])
        trees.append(tuple(sorted(joined)))
    number = {tree: i for i, tree in enumerate(dict.fromkeys(trees))}
    return np.array(ways), np.array([number[tree] for tree in trees])


def parse(config: Any, key: jax.Array) -> dict[str, jax.Array]:
    """A policy over the trees of a random grammar, against the exact posterior."""
    keys = jax.random.split(key, 5)
    size, length = config.symbols, config.length
    net = FlowPolicy((length - 1, size), (config.hidden, config.hidden))
    grammar = 2.0 * jax.random.normal(keys[0], (size, size**2 + config.words))

    def look(params: Any, roots: jax.Array) -> Any:
        return net.apply(params, jax.nn.one_hot(roots, config.words + size + 1))

    def build(key: jax.Array, params: Any, words: jax.Array, **knobs: Any) -> Any:
        def policy(roots: jax.Array) -> Any:
            return look(params, roots)

        return sample_trees(key, policy, grammar, words, **knobs)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        shape = (config.batch_size, length)
        words = jax.random.randint(keys[0], shape, 0, config.words)
        log_joint, way = build(keys[1], params, words, explore=config.explore)
        decay = config.decay
        way = way.log_flow, way.log_pf, log_joint, way.log_pb
        return balance_loss(*way, decay=decay)[0]

    start = jax.random.randint(keys[1], (config.tested, length), 0, config.words)
    params: Any = net.init(keys[2], jnp.zeros((1, length, config.words + size + 1)))
    params = descend(loss, params, config.learning_rate, keys[3], config.tree_steps)
    ways, trees = all_trees(config)
    actions = jnp.tile(jnp.asarray(ways), (config.tested, 1))
    words = jnp.repeat(start, len(ways), axis=0)
    log_joint, way = build(keys[4], params, words, actions=actions)
    chance = jnp.exp(jnp.sum(way.log_pf, axis=1)).reshape(config.tested, -1)
    back = jnp.exp(jnp.sum(way.log_pb, axis=1)).reshape(config.tested, -1)
    posterior = back * jax.nn.softmax(log_joint.reshape(config.tested, -1), axis=1)
    posterior /= jnp.sum(posterior, axis=1, keepdims=True)
    member = jnp.asarray(trees[:, None] == np.arange(trees.max() + 1), chance.dtype)
    gap = jnp.abs((chance - posterior) @ member)
    entropy = jax.scipy.special.entr(posterior @ member)
    return {
        "trees": jnp.mean(0.5 * jnp.sum(gap, axis=1)),
        "tree_entropy": jnp.mean(jnp.sum(entropy, axis=1)),
    }
