"""Seq-VCR: keeping the layers of a small transformer from collapsing on products.

Claims: on 3x3-digit multiplication a small transformer that is trained with Seq-VCR has
a matrix entropy, at the layer where it is least, that is 20% higher or more than
without, and its answers are no less accurate.

    python -m experiments.lm.seq_vcr full    # 3 seeds: 3 minutes on 2 cores

Expected: the first claim does not hold. Entropy is higher with Seq-VCR in the first two
of four layers, and 7 % lower at the last, where it is least; it was so too with the
regulariser on the second layer in place of the third.

A line is "abc*def=", two pause tokens, and the six digits of the product. Accuracy is
that of each digit after the right ones, and of whole answers.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from jaxzoo.lm.seq_vcr import add_pause_tokens, matrix_entropy, seq_vcr
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import init_state, update_step

Method = Literal["plain", "seq_vcr"]
METHODS: tuple[Method, ...] = ("plain", "seq_vcr")
TIMES, EQUALS, PAUSE = 10, 11, 12  # after the ten digits
TOKENS, DIGITS = 13, 6
FOLD = 20  # one pair of factors in twenty is held out


@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 4
    width: int = 48
    heads: int = 3
    regularised_layer: int = 3  # of 4: the last but one
    projection: int = 96  # features that the regulariser sees
    pauses: int = 2
    seeds: int = 3
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3
    held_out: int = 500

    def __post_init__(self):
        if self.seeds < 2 or self.width % self.heads:
            raise ValueError("seeds >= 2, width divisible by heads, please")
        if not 1 <= self.regularised_layer <= self.layers:
            raise ValueError("regularised-layer from 1 to layers, please")


PRESETS = {
    "smoke": Config(
        layers=2, width=16, heads=2, regularised_layer=1, projection=16, seeds=2,
        steps=20, batch_size=16, held_out=32,
    ),
    "full": Config(),
}  # fmt: skip


class Transformer(nn.Module):
    """A decoder-only transformer; the states after every block come along."""

    config: Config

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch length"]):
        config, length = self.config, tokens.shape[1]
        place = self.param("place", nn.initializers.normal(0.02), (32, config.width))
        x = nn.Embed(TOKENS, config.width)(tokens) + place[None, :length]
        mask = nn.make_causal_mask(tokens)
        states = []
        for _ in range(config.layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(config.heads)(y, mask=mask)
            y = nn.Dense(4 * config.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(config.width)(nn.gelu(y))
            states.append(x)
        seen = states[config.regularised_layer - 1]
        projected = nn.Dense(config.projection)(seen)
        return nn.Dense(TOKENS)(nn.LayerNorm()(x)), jnp.stack(states), projected


def digits(numbers: np.ndarray, count: int) -> np.ndarray:
    powers = 10 ** np.arange(count - 1, -1, -1)
    return numbers[:, None] // powers[None, :] % 10


def lines(factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Questions `[B, 8]` and answers `[B, 6]` of pairs of factors `[B, 2]`."""
    first, second = factors.T
    mark = np.ones((len(factors), 1), np.int64)
    question = [digits(first, 3), TIMES * mark, digits(second, 3), EQUALS * mark]
    answer = digits(first * second, DIGITS)
    return np.concatenate(question, 1).astype(np.int32), answer.astype(np.int32)


def training_factors(config: Config, seed: int, t: int) -> np.ndarray:
    factors = np.random.default_rng([seed, t]).integers(
        100, 999, (config.batch_size, 2)
    )
    factors[:, 1] += factors.sum(1) % FOLD == 0  # the held-out ones
    return factors


def held_out_factors(config: Config) -> np.ndarray:
    factors = np.random.default_rng(0).integers(100, 1000, (40 * config.held_out, 2))
    return factors[factors.sum(1) % FOLD == 0][: config.held_out]


def whole(config: Config, question: jax.Array, answer: jax.Array) -> jax.Array:
    paused = add_pause_tokens(question, num_pauses=config.pauses, pause_token=PAUSE)
    return jnp.concatenate([paused, answer], axis=1)


def loss(config: Config, method: Method, net, params, key: jax.Array, batch):
    """Next-token loss of the answers, with the regulariser or without."""
    question, answer = batch["question"], batch["answer"]
    logits, _, projected = net.apply(params, whole(config, question, answer)[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, -DIGITS:], answer
    )
    value = jnp.mean(losses)
    metrics = {"answer_loss": value}
    if method == "seq_vcr":
        regulariser, aux = seq_vcr(projected)
        value += regulariser
        metrics |= {"regulariser": regulariser, "std": aux["std"]}
    return value, metrics


def fit(config: Config, run: Run, net) -> dict[str, Any]:
    """Trains with and without from the same start, all seeds at once."""

    def batches(t: int) -> dict[str, np.ndarray]:
        made = [lines(training_factors(config, s, t)) for s in range(config.seeds)]
        questions, answers = zip(*made, strict=True)
        return {"question": np.stack(questions), "answer": np.stack(answers)}

    def ids(t: int) -> list[np.ndarray]:
        pairs = [training_factors(config, s, t) for s in range(config.seeds)]
        return [1000 * pair[:, 0] + pair[:, 1] for pair in pairs]

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 10, config.steps
    )
    optimizer = optax.adamw(schedule, weight_decay=0.01)

    def init(seed: jax.Array):
        keys = jax.random.split(jax.random.key(seed))
        params = net.init(keys[0], jnp.zeros((1, 8), jnp.int32))
        return init_state(keys[1], params, optimizer)

    def start():
        return jax.vmap(init)(jnp.arange(config.seeds))

    fits = {}
    for method in METHODS:
        step = update_step(
            functools.partial(loss, config, method, net), optimizer,
            reproducible=run.options.reproducible,
        )  # fmt: skip
        state = train(
            run, method, jax.vmap(step), start, batches, num_steps=config.steps,
            show="answer_loss", batch_axis=1, ids=ids,
        )  # fmt: skip
        fits[method] = local(state["params"])
    return fits


def evaluate(config: Config, net, question, answer, params) -> dict[str, jax.Array]:
    """Held-out figures of one seed."""
    tokens = whole(config, question, answer)[:, :-1]
    logits, states, _ = net.apply(params, tokens)
    # All digits right after the right ones: then a model that writes alone is right.
    right = jnp.argmax(logits[:, -DIGITS:], axis=-1) == answer
    entropy = matrix_entropy(states).mean(1)
    return {
        "digit_accuracy": jnp.mean(right),
        "exact": jnp.mean(jnp.all(right, axis=1)),
        "by_digit": jnp.mean(right, axis=0),
        "entropy": entropy,
        "least_entropy": jnp.min(entropy),
    }


def spread(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), stderr(values)


def pictures(config: Config, run: Run, results) -> list[Figure]:
    figure, (left, right) = panels(2)
    layers = np.arange(1, config.layers + 1)
    names = {"plain": "without", "seq_vcr": "with Seq-VCR"}
    curves(
        left, {names[m]: (layers, r["entropy"].T) for m, r in results.items()},
        xlabel="layer", ylabel="matrix entropy (nats)", points=True,
    )  # fmt: skip
    left.set(xticks=layers)
    curves(
        right,
        {
            names[m]: (np.arange(1, DIGITS + 1), r["by_digit"].T)
            for m, r in results.items()
        },
        xlabel="digit of the answer, from the left",
        ylabel="accuracy (1)",
        points=True,
    )
    right.axhline(0.1, color=COLORS[-1], ls=":", lw=1)
    return [
        run.figure(
            "entropy", figure, title="Entropy of the layers and accuracy of the digits",
            caption=f"{config.held_out} held-out products; mean and standard error "
            f"over {config.seeds} seeds. Dotted: a digit at random.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    net = Transformer(config)
    fits = fit(config, run, net)
    question, answer = lines(held_out_factors(config))
    one = functools.partial(evaluate, config, net, question, answer)
    every_seed = jax.jit(lambda params: jax.lax.map(one, params))
    results = {m: jax.device_get(every_seed(params)) for m, params in fits.items()}
    plain, regularised = results["plain"], results["seq_vcr"]
    gain, gain_error = spread(
        regularised["least_entropy"] / plain["least_entropy"] - 1.0
    )
    better, better_error = spread(
        regularised["digit_accuracy"] - plain["digit_accuracy"]
    )
    claims = [
        Claim(
            "matrix entropy at the layer where it is least: share by which Seq-VCR's "
            "is higher",
            gain, ">= 0.2", gain >= 0.2, gain_error,
        ),
        Claim(
            "digit accuracy of the answers with Seq-VCR minus without",
            better, ">= 0", better >= 0, better_error,
        ),
    ]  # fmt: skip
    metrics = {
        f"{m}/{name}": float(r[name].mean())
        for m, r in results.items()
        for name in ("least_entropy", "digit_accuracy", "exact")
    }
    run.table(
        f"{config.held_out} held-out products, {config.seeds} seeds",
        ("training", "least entropy (nats)", "digits right", "answers right"),
        [
            (m, *(f"{r[k].mean():.3f}" for k in ("least_entropy", "digit_accuracy",
                                                 "exact")))
            for m, r in results.items()
        ],
    )  # fmt: skip
    return Report(claims, metrics, pictures(config, run, results))


if __name__ == "__main__":
    experiment(main, PRESETS)
