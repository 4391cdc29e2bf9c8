"""The real tasks that optimizers are compared on, and one training of a whole grid.

A grid is learning rates x seeds, trained at once: the seeds share nothing but the
compiled step, and the learning rate of each fit lies in its state
(`optax.inject_hyperparams`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments._batches import SeedBatches
from jaxzoo.data.digits import digits
from jaxzoo.data.fashion_mnist import fashion_mnist
from jaxzoo.data.source import Source
from jaxzoo.data.text import moby_dick
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.mlp import MLP
from jaxzoo.nn.transformer import Transformer
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.record import Run
from jaxzoo.training.step import init_state, update_step

Batch = dict[str, Any]


class Task(NamedTuple):
    """A model with its data.

    Attributes:
        name: of the task, for tables.
        init: `key -> params`.
        loss: `(params, key, batch) -> (loss, metrics)`; metrics has "loss".
        source: the training records.
        evaluate: `params -> {"loss", "accuracy"}` on held-out data; accuracy in %.
    """

    name: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, jax.Array, Batch], tuple[jax.Array, dict[str, jax.Array]]]
    source: Any
    evaluate: Callable[[Any], dict[str, jax.Array]]


def classifier(
    name: str, model: nn.Module, train: Source, test: Source, scale: float
) -> Task:
    """Cross-entropy of a model `images [B, H, W, C] -> logits`, pixels over `scale`."""
    held_out = {k: jnp.asarray(v) for k, v in test.arrays.items()}
    shape = train[0]["image"].shape

    def logits(params: Any, example: Batch) -> Any:
        return model.apply(params, example["image"].astype(jnp.float32) / scale)

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, *shape)))

    def loss(params, key, example):
        each = optax.softmax_cross_entropy_with_integer_labels(
            logits(params, example), example["label"]
        )
        value = jnp.mean(each)
        return value, {"loss": value}

    def evaluate(params):
        guess = logits(params, held_out)
        each = optax.softmax_cross_entropy_with_integer_labels(guess, held_out["label"])
        right = jnp.argmax(guess, -1) == held_out["label"]
        return {"loss": jnp.mean(each), "accuracy": 100 * jnp.mean(right)}

    return Task(name, init, loss, train, evaluate)


class FlatMLP(nn.Module):
    """An MLP of the pixels in a row."""

    features: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        flat = x.reshape(*x.shape[:-3], -1)
        return MLP(self.features, activation=self.activation)(flat)


class ConvNet(nn.Module):
    """3x3 convolutions of stride 2 and a dense layer; sides divisible by four.

    They are products with patches: kernels that differ from seed to seed make of a
    convolution a grouped one, which takes a CPU eight times as long.
    """

    channels: Sequence[int] = (16, 32)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.channels:
            height, breadth = x.shape[-3:-1]
            padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
            shifted = [
                padded[:, i : i + height : 2, j : j + breadth : 2]
                for i in range(3)
                for j in range(3)
            ]
            x = nn.relu(nn.Dense(width)(jnp.concatenate(shifted, -1)))
        return nn.Dense(10)(x.reshape(*x.shape[:-3], -1))


def digits_mlp(
    *,
    hidden: Sequence[int] = (64,),
    activation: Callable[[jax.Array], jax.Array] = nn.relu,
) -> Task:
    """8x8 digits: 1,437 train and 360 test images."""
    splits = [digits().split(name) for name in ("train", "test")]
    model = FlatMLP((*hidden, 10), activation)
    return classifier("digits MLP", model, splits[0], splits[1], 16.0)


def fashion_convnet(
    *, channels: Sequence[int] = (16, 32), held_out: int = 2000
) -> Task:
    """Fashion-MNIST: 10,000 train and 2,000 test images of 28x28."""
    train, test = (fashion_mnist().split(name) for name in ("train", "test"))
    some = test[np.arange(held_out)]
    return classifier("Fashion-MNIST ConvNet", ConvNet(channels), train, some, 255.0)


def byte_lm(
    *, width: int = 32, depth: int = 2, heads: int = 2, window: int = 64,
    held_out: int = 64,
) -> Task:  # fmt: skip
    """The bytes of Moby Dick by a small transformer; losses in nats per byte."""
    # Windows are short: the definition of attention compiles fastest.
    body = Transformer(width=width, depth=depth, heads=heads, implementation="ref")
    model = LanguageModel(256, width, body)
    data = moby_dick(window=window)
    rest = jnp.asarray(data.split("validation").arrays["token"][:held_out])

    def each(params: Any, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = token.astype(jnp.int32)
        outputs: Any = model.apply(params, tokens[:, :-1])
        logits = outputs[0]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses, jnp.argmax(logits, -1) == tokens[:, 1:]

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, window - 1), jnp.int32))

    def loss(params, key, example):
        value = jnp.mean(each(params, example["token"])[0])
        return value, {"loss": value}

    def evaluate(params):
        losses, right = each(params, rest)
        return {"loss": jnp.mean(losses), "accuracy": 100 * jnp.mean(right)}

    return Task("Moby Dick LM", init, loss, data.split("train"), evaluate)


def fit(
    run: Run,
    name: str,
    task: Task,
    optimizer: Callable[[Any], optax.GradientTransformation],
    learning_rates: Sequence[float],
    *,
    steps: int,
    batch_size: int,
    seeds: int = 3,
    log_every: int = 50,
    may_diverge: bool = False,
) -> tuple[dict[str, np.ndarray], Any, Any]:
    """Trains a grid of learning rates and seeds at once, and evaluates each fit.

    Args:
        run: the open run.
        name: of the fit in the run's record.
        task: what is learned; seed s has its own parameters and order of batches.
        optimizer: `learning_rate -> transformation`.
        learning_rates: L of them.
        steps: of each fit.
        batch_size: examples per step.
        seeds: S.
        log_every: steps between two lines of the record.
        may_diverge: a fit whose state is not finite stays where it was, and its loss
            is told as 1e4; otherwise the run stops at it.

    Returns:
        `(scores, params, opt_state)`: what `evaluate` gives, each `[L, S]`; the
        parameters and the optimizers' inner states, leaves `[L, S, ...]`. The history
        of the run holds "loss" `[log steps, L * S]`.
    """
    # The rates that count lie in the states.
    some = optax.inject_hyperparams(optimizer)(learning_rate=0.0)

    def start() -> Any:
        return start_grid(task, optimizer, learning_rates, seeds)

    batches = SeedBatches(task.source, seeds, batch_size)
    one = update_step(task.loss, some, reproducible=run.options.reproducible)
    every = jax.vmap(jax.vmap(one), (0, None))

    def step(state: Any, example: Batch) -> Any:
        new, metrics = every(state, example)
        if may_diverge:
            new["params"], new["opt_state"] = (
                _where_finite(new, new[k], state[k]) for k in ("params", "opt_state")
            )
            metrics = jax.tree.map(
                lambda x: jnp.nan_to_num(x, nan=1e4, posinf=1e4), metrics
            )
        return new, jax.tree.map(lambda x: x.reshape(-1), metrics)

    state = train(
        run, name, step, start, batches.at, num_steps=steps, show="loss", batch_axis=1,
        ids=batches.ids, log_every=log_every,
    )  # fmt: skip
    params, inner = local(state["params"]), local(state["opt_state"].inner_state)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    scores = jax.jit(lambda p: lax.map(task.evaluate, jax.tree.map(flat, p)))(params)
    shape = (len(learning_rates), seeds)
    scores = {k: np.asarray(v).reshape(shape) for k, v in scores.items()}
    return scores, params, inner


def start_grid(
    task: Task,
    optimizer: Callable[[Any], optax.GradientTransformation],
    learning_rates: Sequence[float],
    seeds: int,
    **more: Any,
) -> Any:
    """The states of a grid before the first step, leaves `[L, S, ...]`.

    Args:
        task: what is learned.
        optimizer: `learning_rate -> transformation`.
        learning_rates: L of them.
        seeds: S; those of one seed begin with the same parameters and key.
        **more: what each state holds besides, the same in all.
    """
    injected = optax.inject_hyperparams(optimizer)

    def one(rate: jax.Array, seed: jax.Array) -> Any:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        params = task.init(init_key)
        return {**init_state(run_key, params, injected(learning_rate=rate)), **more}

    over_seeds = jax.vmap(one, (None, 0))
    rates = jnp.asarray(learning_rates, jnp.float32)
    return jax.vmap(over_seeds, (0, None))(rates, jnp.arange(seeds))


def _where_finite(state: Any, new: Any, old: Any) -> Any:
    """`new` for the fits `[L, S]` all of whose floats are finite."""
    floats = [
        x
        for x in jax.tree.leaves((state["params"], state["opt_state"]))
        if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    each = [jnp.all(jnp.isfinite(x), axis=tuple(range(2, x.ndim))) for x in floats]
    is_good = functools.reduce(jnp.logical_and, each)

    def choose(n: jax.Array, o: jax.Array) -> jax.Array:
        return jnp.where(is_good.reshape(is_good.shape + (1,) * (n.ndim - 2)), n, o)

    return jax.tree.map(choose, new, old)


def best(scores: dict[str, np.ndarray], by: str = "loss") -> int:
    """The index of the learning rate whose mean score over seeds is best."""
    mean = np.nanmean(np.where(np.isfinite(scores[by]), scores[by], np.inf), axis=1)
    return int(np.argmin(mean) if by == "loss" else np.argmax(mean))
