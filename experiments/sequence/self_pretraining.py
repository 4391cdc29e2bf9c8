"""Self-pretraining: a transformer that denoises its inputs first learns more of them.

Claims: pretraining on the task's own training inputs raises a transformer's accuracy by
at least 5 points, on images as sequences of pixels and on ListOps, and shrinks its
distance to a state space model (S4D), which is pretrained too, by at least half. Both
are held against training from scratch with as many labelled steps, as in the paper, and
with as many steps in all.

    python -m experiments.sequence.self_pretraining full    # 4 minutes on 2 cores

Expected: no claim holds after so few steps; pretrained models are where those from
scratch are after as many labelled steps, or below, and the transformer is ahead of S4D.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._batches import SeedBatches
from experiments.sequence._self_pretraining_pictures import (
    PRETRAINED,
    S4D,
    SCRATCH,
    SHORT,
    TRANSFORMER,
    picture,
)
from jaxzoo.data.fashion_mnist import fashion_mnist
from jaxzoo.data.listops import SYMBOLS, listops
from jaxzoo.data.source import Source
from jaxzoo.nn.diagonal_ssm import DiagonalSSM, DiagonalStack
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer
from jaxzoo.sequence.self_pretraining import denoising_loss, hide_tokens
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import init_state, update_step

TASKS = PIXELS, LISTS = "pixels", "ListOps"


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    width: int = 32
    depth: int = 2
    heads: int = 2
    states: int = 16
    learning_rate: float = 3e-3
    pool: int = 1  # pixels of a side that are averaged: 2 leaves 196 of 784 tokens
    levels: int = 16  # of grey
    images: int = 2000  # to train on
    pixel_steps: tuple[int, int] = (250, 150)  # of pretraining and of fine-tuning
    pixel_batch: int = 4
    expressions: int = 2000
    list_steps: tuple[int, int] = (600, 300)
    list_batch: int = 16
    list_length: int = 48
    rate: float = 0.15  # of hidden tokens, on ListOps
    test_size: int = 600
    tasks: tuple[str, ...] = TASKS

    def __post_init__(self):
        if self.seeds < 2 or not set(self.tasks) <= set(TASKS) or not self.tasks:
            raise ValueError(f"seeds >= 2 and tasks of {', '.join(TASKS)}, please")
        if 28 % self.pool or self.images % 10:
            raise ValueError("a pool that divides 28, and images by tens, please")


PRESETS = {
    "smoke": Config(
        seeds=2, width=8, depth=1, states=2, pool=7, images=20,
        pixel_steps=(2, 2), expressions=20, list_steps=(2, 2), list_length=16,
        test_size=20, tasks=("pixels",),
    ),
    "full": Config(),
}  # fmt: skip


class Task(NamedTuple):
    """Tokens and labels, and how they are pretrained on."""

    name: str
    train: Any
    test: Any
    symbols: int  # how many; the mask is one more
    is_causal: bool  # the next token is predicted, otherwise those that are hidden
    steps: tuple[int, int]  # of pretraining and of fine-tuning
    batch: int


def pixels(config: Config) -> Task:
    """Fashion-MNIST as rows of grey levels."""
    data, side = fashion_mnist(), 28 // config.pool

    def tokens(name: str, count: int) -> Any:
        arrays = data.split(name).arrays
        # As many of each class: the images stand class by class, or mixed.
        order = np.argsort(arrays["label"], kind="stable").reshape(10, -1)
        rows = order[:, : count // 10].ravel()
        image = arrays["image"][rows].reshape(-1, side, config.pool, side, config.pool)
        grey = image.mean(axis=(2, 4)) / 256 * config.levels
        split = {"token": grey.astype(np.uint8).reshape(len(rows), -1)}
        return Source({**split, "label": arrays["label"][rows]})

    return Task(
        PIXELS, tokens("train", config.images), tokens("test", config.test_size),
        config.levels, True, config.pixel_steps, config.pixel_batch,
    )  # fmt: skip


def lists(config: Config) -> Task:
    data = listops(
        num_train=config.expressions, num_test=config.test_size,
        length=config.list_length,
    )  # fmt: skip
    return Task(
        LISTS, data.split("train"), data.split("test"), len(SYMBOLS), False,
        config.list_steps, config.list_batch,
    )  # fmt: skip


MAKERS = {PIXELS: pixels, LISTS: lists}


class Net(nn.Module):
    """A body of tokens with one head for the tokens and one for the label."""

    symbols: int
    width: int
    body: Any

    def setup(self) -> None:
        # One symbol more is the mask.
        self.model = LanguageModel(self.symbols + 1, self.width, self.body, False)
        self.classify = nn.Dense(10)

    def denoise(self, tokens: jax.Array) -> jax.Array:
        """Logits of the tokens, `[B, T, V + 1]`."""
        return self.model(tokens)[0]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the label, from the mean over the sequence, `[B, 10]`."""
        return self.classify(jnp.mean(self.model.hidden(tokens)[0], axis=1))

    def both(self, tokens: jax.Array) -> Any:
        return self.denoise(tokens), self(tokens)


def network(config: Config, kind: str, task: Task) -> Net:
    if kind == TRANSFORMER:
        body: Any = Transformer(
            config.width, config.depth, config.heads, is_causal=task.is_causal
        )
    else:
        block = DiagonalSSM(
            config.width, config.states, bidirectional=not task.is_causal
        )
        body = DiagonalStack(block, config.depth)
    return Net(task.symbols, config.width, body)


def applied(net: Net, params: Any, tokens: Any, method: str | None = None) -> Any:
    return net.apply(params, tokens, method=method)


def pretrain_loss(config: Config, net: Net, task: Task, params, key, example):
    """Of the next token, or of hidden ones; what fills up a row does not count."""
    tokens = example["token"].astype(jnp.int32)
    if task.is_causal:
        logits = applied(net, params, tokens, "denoise")
        value, aux = denoising_loss(logits[:, :-1], tokens[:, 1:])
    else:
        seen, hidden = hide_tokens(
            key, tokens, rate=config.rate, vocabulary=task.symbols, where=tokens > 0
        )
        logits = applied(net, params, seen, "denoise")
        value, aux = denoising_loss(logits, tokens, where=hidden)
    return value, {"loss": value, "right, %": 100 * aux["accuracy"]}


def label_loss(net: Net, params, _, example):
    logits = applied(net, params, example["token"].astype(jnp.int32))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, example["label"])
    right = jnp.mean(jnp.argmax(logits, axis=-1) == example["label"])
    return jnp.mean(losses), {"loss": jnp.mean(losses), "right, %": 100 * right}


def fit(
    config: Config, run: Run, name: str, task: Task, loss: Any, params: Any, steps: int
) -> Any:
    """Trains all seeds at once from their parameters; a new optimizer each time."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(steps // 10, 1), steps
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    batches = SeedBatches(task.train, config.seeds, task.batch)

    def start(seed: Any, params: Any) -> Any:
        return init_state(jax.random.key(seed), params, optimizer)

    step = update_step(loss, optimizer, reproducible=run.options.reproducible)
    state = train(
        run, name, jax.vmap(step),
        lambda: jax.vmap(start)(jnp.arange(config.seeds), params), batches.at,
        num_steps=steps, show="right, %", batch_axis=1,
    )  # fmt: skip
    return local(state["params"])


def tested(config: Config, net: Net, params: Any, task: Task) -> np.ndarray:
    """Right labels on the test split, %, per seed."""
    tokens = jnp.asarray(task.test.arrays["token"], jnp.int32)
    parts = tokens.reshape(-1, min(len(tokens), 50), tokens.shape[1])

    @jax.jit
    def one(params: Any) -> jax.Array:
        return jax.lax.map(lambda x: jnp.argmax(applied(net, params, x), -1), parts)

    found = np.array(jax.lax.map(one, params)).reshape(config.seeds, -1)
    return 100 * (found == task.test.arrays["label"][None]).mean(axis=1)


def measured(config: Config, run: Run, task: Task, kind: str) -> dict[str, np.ndarray]:
    """Test accuracy of both ways, which have the same steps in all."""
    net = network(config, kind, task)
    example = np.zeros((1, task.train.arrays["token"].shape[1]), np.int32)

    def init(seed: Any) -> Any:
        return net.init(jax.random.key(100 + seed), example, method="both")

    start = jax.vmap(init)(jnp.arange(config.seeds))
    before, after = task.steps

    labelled = functools.partial(label_loss, net)
    denoised = functools.partial(pretrain_loss, config, net, task)
    name = f"{task.name} {kind}"
    short, scratch = (
        fit(config, run, f"{name} scratch {steps}", task, labelled, start, steps)
        for steps in (after, before + after)
    )
    pretrained = fit(config, run, f"{name} pretrain", task, denoised, start, before)
    tuned = fit(config, run, f"{name} tune", task, labelled, pretrained, after)
    return {
        SHORT: tested(config, net, short, task),
        SCRATCH: tested(config, net, scratch, task),
        PRETRAINED: tested(config, net, tuned, task),
    }


def claims_of(
    name: str, right: dict[str, dict[str, np.ndarray]], way: str
) -> list[Claim]:
    ours, other = right[TRANSFORMER], right[S4D]
    raised = ours[PRETRAINED] - ours[way]
    left = other[PRETRAINED] - ours[PRETRAINED]
    gap, half = float(left.mean()), float((other[way] - ours[way]).mean()) / 2
    return [
        Claim(
            f"{name}: test accuracy of the pretrained transformer above that {way}, "
            "points",
            float(raised.mean()), ">= 5", bool(raised.mean() >= 5), stderr(raised),
        ),
        Claim(
            f"{name}: points that the transformer is behind S4D, both pretrained; it "
            f"was twice the bound {way}",
            gap, f"<= {half:.2f}", half > 0 and gap <= half, stderr(left),
        ),
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    right: dict[str, Any] = {}
    for name in config.tasks:
        task = MAKERS[name](config)
        right[task.name] = {
            kind: measured(config, run, task, kind) for kind in (TRANSFORMER, S4D)
        }
    pairs = [(name, way) for name in right for way in (SHORT, SCRATCH)]
    claims = [c for name, way in pairs for c in claims_of(name, right[name], way)]
    rows, metrics = [], {}
    for name, by_kind in right.items():
        for kind, ways in by_kind.items():
            rows.append(
                (
                    name,
                    kind,
                    *(f"{v.mean():.1f} ± {stderr(v):.1f}" for v in ways.values()),
                )
            )
            metrics |= {
                f"{name}/{kind}/{way}": float(v.mean()) for way, v in ways.items()
            }
    run.table("Test accuracy, %", ("task", "model", SHORT, SCRATCH, PRETRAINED), rows)
    return Report(claims, metrics, [picture(config, run, right)])


if __name__ == "__main__":
    experiment(main, PRESETS)
