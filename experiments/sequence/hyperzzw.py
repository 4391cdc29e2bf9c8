"""HyperZZW: a network without residual connections whose layers see the whole image.

Claims: each output of the first layer has a non-zero derivative by every pixel of the
image; a Terminator of 4 blocks without residual connections reaches at least 95% on
held-out digits, and is within 1.5 points of a residual ConvNet with as many parameters.

    python -m experiments.sequence.hyperzzw full    # 5 minutes on 2 cores

Expected: 96.7% against 97.8% of the ConvNet, and every pixel seen by every output, by
most of them noticeably; the bare product of the operator sees 15 of 64 pixels.
"""

import dataclasses
import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.data.digits import digits
from jaxzoo.data.source import batch_indices
from jaxzoo.sequence.hyperzzw import (
    SFNEBlock,
    Terminator,
    hyperzzw_global,
    slow_loss,
)
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 1.2e-2
    conv_rate: float = 5e-3  # of the ConvNet
    weight_decay: float = 0.05
    smoothing: float = 0.09  # of the labels, as in the released code
    width: int = 12
    depth: int = 4
    hidden: int = 16  # of the slow networks
    omega: float = 0.2
    conv_width: int = 28
    conv_depth: int = 3
    images: int = 4  # whose derivatives are looked at
    optimize: bool = True  # False compiles faster, and runs slower

    def __post_init__(self):
        if self.seeds < 2 or self.depth < 1 or self.steps < 4:
            raise ValueError("seeds >= 2, depth >= 1 and steps >= 4, please")


PRESETS = {
    "smoke": Config(
        seeds=2, steps=4, batch_size=8, width=4, depth=1, hidden=4, conv_width=12,
        conv_depth=1, images=1, optimize=False,
    ),
    "full": Config(),
}  # fmt: skip


class ConvNet(nn.Module):
    """Residual blocks of two convolutions each, with LayerNorm before either."""

    width: int
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(self.width, (3, 3))(x)
        for _ in range(self.depth):
            y = x
            for _ in range(2):
                y = nn.Conv(self.width, (3, 3))(nn.gelu(nn.LayerNorm()(y)))
            x = x + y
        return nn.Dense(10)(jnp.mean(nn.LayerNorm()(x), axis=(1, 2)))


def images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits `[N, 8, 8, 1]` of mean 0 and variance 1 or so, and their labels."""
    arrays = digits().split(split).arrays
    return (arrays["image"] - np.float32(4.9)) / np.float32(6.0), arrays["label"]


def terminator(config: Config) -> Any:
    block = {
        "local_sizes": (3, 5, 3, 5),
        "hidden": config.hidden,
        "layers": 1,
        "omega": config.omega,
        "groups": 4,
    }
    return Terminator(10, config.width, config.depth, block)


def cross_entropy(config: Config, logits: Any, labels: Any) -> jax.Array:
    wanted = optax.smooth_labels(jax.nn.one_hot(labels, 10), config.smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, wanted))


def fast_slow_loss(config: Config, net: Any, params, x, y) -> jax.Array:
    """Cross-entropy, and the slow loss of all pairs of blocks."""
    logits, first, others = net.apply(params, x)
    kernels = [first, *(others[i] for i in range(config.depth - 1))]
    pairs = itertools.combinations(kernels, 2)
    slow = [slow_loss(kernel, deeper)[0] for kernel, deeper in pairs]
    return cross_entropy(config, logits, y) + sum(slow)


def conv_loss(config: Config, net: Any, params, x, y) -> jax.Array:
    return cross_entropy(config, net.apply(params, x), y)


QUICK = {"xla_backend_optimization_level": 0}


def start(config: Config, net: Any) -> Any:
    """Parameters of all seeds."""

    def one(seed: jax.Array) -> Any:
        return net.init(jax.random.key(seed), jnp.zeros((2, 8, 8, 1)))

    # A few hundred draws: optimised, they would take longer to compile than to train.
    return jax.jit(jax.vmap(one), compiler_options=QUICK)(jnp.arange(config.seeds))


def fit(config: Config, objective: Any, rate: float, params: Any, over: Any) -> Any:
    """Trains all seeds in one program: parameters, and losses `[steps, seeds]`."""
    x, y = map(jnp.asarray, images("train"))
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, rate, config.steps // 10, config.steps),
        weight_decay=config.weight_decay,
        mask=functools.partial(jax.tree.map, lambda p: jnp.ndim(p) > 1),
    )
    rows = [
        [
            batch_indices(s, t, num_examples=len(x), batch_size=config.batch_size)
            for t in range(config.steps)
        ]
        for s in range(config.seeds)
    ]

    def one(inputs: Any) -> Any:
        def step(state: Any, ids: jax.Array) -> Any:
            params, opt_state = state
            loss, grads = jax.value_and_grad(objective)(params, x[ids], y[ids])
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        params, rows = inputs
        (params, _), losses = lax.scan(step, (params, optimizer.init(params)), rows)
        return params, losses

    inputs = params, jnp.asarray(rows, jnp.int32)
    options = None if config.optimize else QUICK
    trained, losses = jax.jit(over(one), compiler_options=options)(inputs)
    return trained, np.asarray(losses).T


def accuracy(net: Any, params: Any) -> np.ndarray:
    """Of the held-out digits, in one batch, in percent: `[seeds]`."""
    x, y = images("test")

    @jax.jit
    def right(params: Any) -> jax.Array:
        out = lax.map(lambda one: net.apply(one, x), params)
        logits = out[0] if isinstance(out, tuple) else out
        return jnp.mean(jnp.argmax(logits, -1) == y[None], axis=1)

    return 100 * np.asarray(right(params))


def influence(config: Config, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """|derivatives| of the first block, and of the bare global operator, by pixels.

    Returns:
        `[seeds, images, 8, 8, channels, 8, 8]` of the block: outputs, then pixels. Each
        image lies in a batch with the others. And of the operator, `[8, 8, 8, 8]`.
    """
    x = jnp.asarray(images("test")[0][: max(config.images, 2)])
    knobs = terminator(config).block
    block: Any = SFNEBlock(config.width, **knobs)

    def of_image(params: Any, i: jax.Array) -> jax.Array:
        def output(image: jax.Array) -> jax.Array:
            return block.apply(params, x.at[i].set(image))[0][i]

        return jax.jacrev(output)(x[i])[..., 0]

    def of_seed(params: Any) -> jax.Array:
        inner = {"params": params["params"]["first"]}
        return lax.map(lambda i: of_image(inner, i), jnp.arange(config.images))

    def operator(image: jax.Array) -> jax.Array:
        z = image.reshape(1, 8, 8, 1)
        return hyperzzw_global(z, z, kernel=jnp.ones((8, 8, 1)))[0, ..., 0]

    whole = jax.jit(lambda p: lax.map(of_seed, p))(params)
    bare = jax.jit(jax.jacrev(operator))(jnp.ones((8, 8)))
    return np.abs(np.asarray(whole)), np.abs(np.asarray(bare))


def count(params: Any, seeds: int) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params)) // seeds


def pictures(config: Config, run: Run, losses: Any, scores: Any, maps: Any) -> Figure:
    figure, axes = panels(4, width=3.9)
    window = max(1, config.steps // 50)
    steps = np.arange(config.steps // window) * window + window

    def smooth(values: np.ndarray) -> np.ndarray:
        return values[: len(steps) * window].reshape(len(steps), window, -1).mean(1)

    lines = {name: (steps, smooth(each)) for name, each in losses.items()}
    curves(axes[0], lines, xlabel="step", ylabel="training loss (nats)")
    for i, each in enumerate(scores.values()):
        spots = i + np.linspace(-0.1, 0.1, len(each))
        axes[1].plot(spots, each, "o", ms=4, color=COLORS[i], alpha=0.5)
        style: Any = {"color": COLORS[i], "capsize": 4, "marker": "s"}
        axes[1].errorbar([i], [each.mean()], [stderr(each)], **style)
    axes[1].set_xticks(range(len(scores)), list(scores))
    axes[1].set(ylabel="held-out accuracy (%)", xlim=(-0.5, len(scores) - 0.5))
    axes[1].axhline(95, color="0.4", ls=":", lw=1)
    whole, bare = maps
    shown = whole[0, 0, 3, 5].mean(0), bare[3, 5]
    titles = "first block", "global product alone"
    for ax, values, title in zip(axes[2:], shown, titles, strict=True):
        ax.grid(False)
        drawn = ax.imshow(values / values.max(), cmap="cividis", vmin=0, vmax=1)
        ax.set(xlabel="column of the pixel", ylabel="row of the pixel", title=title)
        label = "|derivative| of output (3, 5)\nof the largest"
        figure.colorbar(drawn, ax=ax, shrink=0.8, label=label)
    return run.figure(
        "hyperzzw", figure, title="A net without skips, and what its outputs see",
        caption="Training loss with the slow loss; accuracy on 297 held-out digits, "
        f"mean and standard error over {config.seeds} seeds, and the seeds; how much "
        "each pixel moves the first block's output at row 3 and column 5 (mean over "
        "channels), and that of the bare product, which sees a row and a column.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    nets = {"Terminator": terminator(config)}
    nets["ConvNet"] = ConvNet(config.conv_width, config.conv_depth)
    ways = {
        "Terminator": (fast_slow_loss, config.learning_rate, jax.vmap),
        # Mapped convolutions would be grouped ones, which a CPU is slow at.
        "ConvNet": (
            conv_loss, config.conv_rate, lambda one: functools.partial(lax.map, one)
        ),
    }  # fmt: skip
    params, losses, scores = {}, {}, {}
    for name, net in nets.items():
        objective, rate, over = ways[name]
        objective = functools.partial(objective, config, net)
        found = fit(config, objective, rate, start(config, net), over)
        params[name], losses[name] = found
        scores[name] = accuracy(net, params[name])
        for step in range(9, config.steps, 10):
            run.log(name, step + 1, {"loss": losses[name][step].mean()})
    sizes = {name: count(each, config.seeds) for name, each in params.items()}
    run.table(
        f"Held-out digits, {config.seeds} seeds",
        ("net", "parameters", "accuracy (%)"),
        [
            (name, f"{sizes[name]}", f"{each.mean():.2f} ± {stderr(each):.2f}")
            for name, each in scores.items()
        ],
    )
    whole, bare = maps = influence(config, params["Terminator"])
    seen = float(np.mean(whole != 0))
    largest = whole.max(axis=(-2, -1), keepdims=True)
    behind = scores["ConvNet"] - scores["Terminator"]
    least = float(scores["Terminator"].mean())
    ratio = sizes["ConvNet"] / sizes["Terminator"]
    claims = [
        Claim(
            f"pairs of an output of the first block and a pixel, of {whole.size}, with "
            "a derivative that is not 0, share",
            seen, "= 1", seen == 1,
        ),
        Claim(
            f"accuracy on held-out digits of {config.depth} blocks without residual "
            "connections, %",
            least, ">= 95", least >= 95, stderr(scores["Terminator"]),
        ),
        Claim(
            "accuracy of the residual ConvNet less that of the Terminator, points",
            float(behind.mean()), "<= 1.5", bool(behind.mean() <= 1.5), stderr(behind),
        ),
        Claim(
            "parameters of the ConvNet over those of the Terminator",
            ratio, ">= 1", ratio >= 1,
        ),
    ]  # fmt: skip
    metrics = {f"accuracy/{name}": float(each.mean()) for name, each in scores.items()}
    metrics |= {f"parameters/{name}": each for name, each in sizes.items()}
    metrics["seen/above 0.001 of the largest"] = float(np.mean(whole > 1e-3 * largest))
    metrics["seen/global product alone"] = float(np.mean(bare != 0))
    return Report(claims, metrics, [pictures(config, run, losses, scores, maps)])


if __name__ == "__main__":
    experiment(main, PRESETS)
