"""Letters for `dpo`: a model of four letters' context, DPO against REINFORCE."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.data.text import moby_dick
from jaxzoo.lm.dpo import dpo_loss
from jaxzoo.training import step as training

LETTERS = 27  # the space and a to z
CONTEXT = 4  # letters that the small model sees


def letters() -> np.ndarray:
    """The training text of Moby Dick in 27 symbols, runs of others as one space."""
    text = moby_dick(window=64).split("train").arrays["token"].tobytes().decode("latin")
    plain = re.sub("[^a-z]+", " ", text.lower())
    return np.frombuffer(plain.encode(), np.uint8).astype(np.int32) % 32


def init_letters(key: jax.Array, outputs: int = LETTERS) -> dict[str, jax.Array]:
    keys = jax.random.split(key)
    inputs = CONTEXT * LETTERS
    return {
        "in": jax.random.normal(keys[0], (inputs, 64)) / CONTEXT**0.5,
        "out": jax.random.normal(keys[1], (64, outputs)) * 0.01,
    }


def letter_outputs(params: Any, before: jax.Array) -> jax.Array:
    """From the four letters before, `[..., 4]`."""
    hot = jax.nn.one_hot(before, LETTERS).reshape(*before.shape[:-1], -1)
    return jnp.tanh(hot @ params["in"]) @ params["out"]


def contexts(strings: jax.Array) -> jax.Array:
    """The four letters before each letter, spaces before the first, `[B, T, 4]`."""
    padded = jnp.pad(strings, ((0, 0), (CONTEXT, 0)))
    length = strings.shape[1]
    return jnp.stack([padded[:, i : i + length] for i in range(CONTEXT)], axis=-1)


def log_prob(params: Any, strings: jax.Array) -> jax.Array:
    """Of whole strings, `[B]`."""
    logits = letter_outputs(params, contexts(strings))
    return -jnp.sum(
        optax.softmax_cross_entropy_with_integer_labels(logits, strings), axis=-1
    )


def draw(key: jax.Array, params: Any, count: int, length: int) -> jax.Array:
    def step(before: jax.Array, key: jax.Array) -> Any:
        letter = jax.random.categorical(key, letter_outputs(params, before))
        return jnp.concatenate([before[:, 1:], letter[:, None]], axis=1), letter

    start = jnp.zeros((count, CONTEXT), jnp.int32)
    _, drawn = lax.scan(step, start, jax.random.split(key, length))
    return drawn.T


def true_reward(strings: jax.Array) -> jax.Array:
    """How many letters e."""
    return jnp.sum(strings == 5, axis=1).astype(jnp.float32)


def descend(loss: Any, params: Any, rate: Any, key: jax.Array, steps: int) -> Any:
    """Adam on `loss(params, key)` at one rate."""
    return training.descend(loss, params, optax.constant_schedule(rate), key, steps)


class Setting(NamedTuple):
    """What both ways begin with: a reference, and pairs drawn from it."""

    reference: Any
    chosen: jax.Array
    rejected: jax.Array


def setting(config: Any, text: jax.Array, key: jax.Array) -> Setting:
    keys = jax.random.split(key, 5)

    def likelihood(params: Any, key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (256,), 0, len(text) - config.length)
        windows = text[starts[:, None] + jnp.arange(config.length)[None]]
        return -jnp.mean(log_prob(params, windows))

    start = init_letters(keys[0])
    reference = descend(likelihood, start, 3e-3, keys[1], config.steps)
    pairs = draw(keys[2], reference, 2 * config.pairs, config.length)
    one, other = pairs[: config.pairs], pairs[config.pairs :]
    wins = jax.random.bernoulli(
        keys[3], jax.nn.sigmoid(true_reward(one) - true_reward(other))
    )
    chosen = jnp.where(wins[:, None], one, other)
    return Setting(reference, chosen, jnp.where(wins[:, None], other, one))


def some(config: Any, key: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    rows = jax.random.randint(key, (config.batch_size,), 0, len(arrays[0]))
    return [x[rows] for x in arrays]


def by_dpo(config: Any, given: Setting, beta: Any, rate: Any, key: jax.Array) -> Any:
    def loss(params: Any, key: jax.Array) -> jax.Array:
        pair = some(config, key, given.chosen, given.rejected)
        policy = [log_prob(params, x) for x in pair]
        reference = [log_prob(given.reference, x) for x in pair]
        # The grid of betas is traced: rewards are scaled outside, where it may be.
        scaled = [beta * x for x in (*policy, *reference)]
        return dpo_loss(*scaled, beta=1.0)[0]

    return descend(loss, given.reference, rate, key, config.steps)


def by_reinforce(
    config: Any, given: Setting, beta: Any, rate: Any, key: jax.Array
) -> Any:
    """A reward model of the same pairs, and policy gradients on reward less KL."""
    model_key, init_key, key = jax.random.split(key, 3)

    def learned(params: Any, strings: jax.Array) -> jax.Array:
        return jnp.sum(letter_outputs(params, contexts(strings))[..., 0], axis=1)

    def ranking(params: Any, key: jax.Array) -> jax.Array:
        chosen, rejected = some(config, key, given.chosen, given.rejected)
        margin = learned(params, chosen) - learned(params, rejected)
        return -jnp.mean(jax.nn.log_sigmoid(margin))

    start = init_letters(init_key, outputs=1)
    judge = descend(ranking, start, 3e-3, model_key, config.steps)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        strings = draw(key, params, config.batch_size, config.length)
        log_policy = log_prob(params, strings)
        spent = log_policy - log_prob(given.reference, strings)
        gain = lax.stop_gradient(learned(judge, strings) - beta * spent)
        return -jnp.mean((gain - jnp.mean(gain)) * log_policy)

    return descend(loss, given.reference, rate, key, config.steps)


def frontier_points(config: Any, way: Any) -> dict[str, np.ndarray]:
    """Reward and KL of the trained policies, `[seeds, betas, rates]`."""
    text = jnp.asarray(letters())

    def one(given: Setting, key: jax.Array, beta: Any, rate: Any) -> Any:
        policy = way(config, given, beta, rate, key)
        drawn = draw(jax.random.fold_in(key, 1), policy, config.samples, config.length)
        spent = log_prob(policy, drawn) - log_prob(given.reference, drawn)
        return {"reward": jnp.mean(true_reward(drawn)), "kl": jnp.mean(spent)}

    @jax.jit
    def every(text: jax.Array) -> Any:
        seeds = jnp.arange(config.seeds)
        keys = jax.vmap(jax.random.key)(seeds)
        given = lax.map(functools.partial(setting, config, text), keys)
        over = jax.vmap(one, (None, None, None, 0))
        over = jax.vmap(over, (None, None, 0, None))
        betas, rates = jnp.array(config.betas), jnp.array(config.learning_rates)
        later = jax.vmap(lambda k: jax.random.fold_in(k, 7))(keys)
        return jax.vmap(over, (0, 0, None, None))(given, later, betas, rates)

    return jax.device_get(every(text))


def most_at(points: dict[str, np.ndarray], levels: np.ndarray) -> np.ndarray:
    """The reward at each KL, `[seeds, levels]`, by policies and mixtures of two."""
    rows = []
    for kl, reward in zip(points["kl"], points["reward"], strict=True):
        order = np.argsort(kl, axis=None)
        hull: list[tuple[float, float]] = []  # the upper concave one
        for x, y in zip(kl.ravel()[order], reward.ravel()[order], strict=True):
            while len(hull) > 1 and _is_below(hull[-2], hull[-1], (x, y)):
                hull.pop()
            if not hull or y > hull[-1][1]:
                hull.append((float(x), float(y)))
        xs, ys = zip(*hull, strict=True)
        rows.append(np.interp(levels, xs, ys))
    return np.stack(rows)


def _is_below(a: Any, b: Any, c: Any) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])
