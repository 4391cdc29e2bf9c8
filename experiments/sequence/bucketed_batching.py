"""Bucketed batching: what of speech batches is padding, and what decoding costs.

Claims: of log-normal utterances, random batches of a fixed size spend at least 40% of
their frames on padding and batches from two-dimensional buckets at most 10%, while the
mean batch is at least three times as large under the same cap on memory; and the time
of autoregressive decoding grows with the depth of the decoder.

    python -m experiments.sequence.bucketed_batching full    # 1 minute on 2 cores

Expected: 65% against 5%, and batches 5.8 times as large; of tokens 31% are padding, and
50% with 1-D buckets. Memory is that of activations in 24 + 24 layers of width 1024 in
half precision (Korthikanti et al., 2205.05198), with 8 frames of 10 ms to a position.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.sequence.bucketed_batching import (
    bucket_batches,
    bucket_bins,
    dynamic_batches,
    encdec_cost,
    fixed_batches,
    largest_batches,
    padding,
)
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    examples: int = 20_000
    median_seconds: float = 8.0
    spread: float = 0.7  # of the logarithm of the durations
    longest_seconds: float = 40.0
    tokens_per_second: float = 3.5
    rate_spread: float = 0.3  # of the logarithm of tokens per second
    cap: float = 40e9  # bytes of activations
    buckets: int = 30
    sub_buckets: int = 2
    depths: tuple[int, ...] = (1, 2, 4, 8)  # decoder layers that are timed
    width: int = 256
    frames: int = 64  # positions of the encoder, when timed
    tokens: int = 48
    repeats: int = 7

    def __post_init__(self):
        if self.seeds < 2 or len(self.depths) < 2 or 2 * self.buckets > self.examples:
            raise ValueError("seeds >= 2, two depths, and examples for buckets, please")


PRESETS = {
    "smoke": Config(
        seeds=2, examples=2000, buckets=20, depths=(1, 2), width=16, frames=8, tokens=4,
        repeats=2,
    ),
    "full": Config(),
}  # fmt: skip

LAYERS, WIDTH, HEADS = 24, 1024, 16


def utterances(config: Config, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames of 10 ms, and tokens."""
    rng = np.random.default_rng(seed)
    seconds = rng.lognormal(
        np.log(config.median_seconds), config.spread, config.examples
    )
    seconds = np.clip(seconds, 0.5, config.longest_seconds)
    rate = config.tokens_per_second * rng.lognormal(
        0, config.rate_spread, config.examples
    )
    tokens = np.maximum(np.round(seconds * rate), 1)
    return np.round(100 * seconds).astype(np.int32), tokens.astype(np.int32)


def memory(batch: Any, frames: Any, tokens: Any) -> Any:
    """Bytes of activations: 34 d per position and 5 per head and pair of positions."""
    t, u = frames / 8.0, tokens * 1.0
    encoder = 34 * WIDTH * t + 5 * HEADS * t * t
    # Attention to the encoder: queries, output and its norm, 11 d, and its own pairs.
    decoder = 45 * WIDTH * u + 5 * HEADS * (u * u + u * t)
    return batch * LAYERS * (encoder + decoder)


def sampled(config: Config, seed: int) -> dict[str, dict[str, Any]]:
    """What each sampler makes of one draw of utterances, its bins from another."""
    sample, (length, output) = utterances(config, 1000 + seed), utterances(config, seed)
    key = jax.random.key(seed)
    longest = [
        max(x.max(), y.max()) for x, y in zip(sample, (length, output), strict=True)
    ]
    search = functools.partial(largest_batches, memory, cap=config.cap)
    size = int(search(np.array([longest], np.int32))[0])
    batches = {
        "fixed size": fixed_batches(key, length, size=size),
        "frames capped": dynamic_batches(key, length, cap=size * int(longest[0])),
    }
    for name, subs in (("1-D buckets", 1), ("2-D buckets", config.sub_buckets)):
        bins = bucket_bins(*sample, buckets=config.buckets, sub_buckets=subs)
        batches[name] = bucket_batches(key, length, output, bins, search(bins))
    found = {}
    for name, batch in batches.items():
        frames, tokens = padding(length, batch), padding(output, batch)
        used = memory(frames["size"], frames["longest"], tokens["longest"])
        found[name] = {
            "frames": float(frames["padding"]),
            "tokens": float(tokens["padding"]),
            "mean_size": float(frames["mean_size"]),
            "left_out": float(jnp.mean(batch < 0)),
            "fullest": float(jnp.max(used)) / config.cap,
        }
    return found


def init_layers(key: jax.Array, layers: int, width: int, crossed: bool) -> Any:
    """Matrices of attention, of attention to the encoder, and of the MLP, stacked."""
    shapes = {"self": (4, width, width), "up": (width, 4 * width)}
    shapes["down"] = (4 * width, width)
    if crossed:
        shapes["cross"] = (4, width, width)
    pairs = zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)
    return {
        name: jax.random.normal(key, (layers, *shape)) * shape[-2] ** -0.5
        for key, (name, shape) in pairs
    }


def norm(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, where: Any = None) -> jax.Array:
    """Attention with heads of 16: `[B, T, D]`, `[B, S, D]`."""
    heads = [x.reshape(*x.shape[:2], -1, 16) for x in (q, k, v)]
    return jax.nn.dot_product_attention(*heads, mask=where).reshape(q.shape)


def mlp(layer: Any, x: jax.Array) -> jax.Array:
    return x + jax.nn.relu(norm(x) @ layer["up"]) @ layer["down"]


def encode(layers: Any, x: jax.Array) -> jax.Array:
    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        q, k, v, out = layer["self"]
        n = norm(x)
        return mlp(layer, x + attend(n @ q, n @ k, n @ v) @ out), None

    return norm(lax.scan(step, x, layers)[0])


def decode(layers: Any, embedding: jax.Array, memory: jax.Array, tokens: int) -> Any:
    """Greedy, token by token, with caches: `[B, tokens]`."""
    batch, _, width = memory.shape
    crossed = jnp.einsum("bsd,lide->libse", memory, layers["cross"][:, 1:3])
    depth = layers["up"].shape[0]
    cache = jnp.zeros((depth, 2, batch, tokens, width))

    def layer_step(carry: Any, inputs: Any) -> Any:
        x, place = carry
        layer, cache, crossed = inputs
        n = norm(x)
        new = jnp.stack([n @ layer["self"][1], n @ layer["self"][2]])
        cache = lax.dynamic_update_slice(cache, new, (0, 0, place, 0))
        seen = (jnp.arange(tokens) <= place)[None, None, None]
        x += attend(n @ layer["self"][0], cache[0], cache[1], seen) @ layer["self"][3]
        x += attend(norm(x) @ layer["cross"][0], *crossed) @ layer["cross"][3]
        return (mlp(layer, x), place), cache

    def token_step(carry: Any, place: jax.Array) -> Any:
        token, cache = carry
        x = embedding[token][:, None]
        (x, _), cache = lax.scan(layer_step, (x, place), (layers, cache, crossed))
        token = jnp.argmax(norm(x)[:, 0] @ embedding.T, axis=-1)
        return (token, cache), token

    start = jnp.zeros(batch, jnp.int32), cache
    return lax.scan(token_step, start, jnp.arange(tokens))[1].T


def timed(config: Config, encoder: int, decoder: int) -> tuple[float, float]:
    """Seconds of encoding and of decoding a batch of 4, the least of all repeats."""
    keys = jax.random.split(jax.random.key(0), 4)
    first = init_layers(keys[0], encoder, config.width, False)
    second = init_layers(keys[1], decoder, config.width, True)
    embedding = jax.random.normal(keys[2], (256, config.width))
    x = jax.random.normal(keys[3], (4, config.frames, config.width))
    encoding, decoding = jax.jit(encode), jax.jit(decode, static_argnums=3)
    states = encoding(first, x)
    jax.block_until_ready(decoding(second, embedding, states, config.tokens))
    seconds = []
    for _ in range(config.repeats):
        began = time.perf_counter()
        jax.block_until_ready(encoding(first, x))
        between = time.perf_counter()
        jax.block_until_ready(decoding(second, embedding, states, config.tokens))
        seconds.append((between - began, time.perf_counter() - between))
    return tuple(np.min(seconds, axis=0).tolist())


def pictures(config: Config, run: Run, found: Any, times: Any) -> list[Figure]:
    figure, (left, middle, right) = panels(3, width=4.4)
    names, places = list(found), np.arange(len(found))
    for i, label in enumerate(("frames", "tokens")):
        shares = [100 * found[name][label] for name in names]
        style: Any = {"color": COLORS[i], "label": label, "capsize": 3}
        errors = [stderr(s) for s in shares]
        left.bar(places + 0.4 * i - 0.2, np.mean(shares, 1), 0.38, yerr=errors, **style)
    left.hlines([10, 40], *left.get_xlim(), color="0.4", ls=":", lw=1)
    left.set(ylabel="padding, of all frames or tokens (%)")
    left.legend(frameon=False)
    sizes = [found[name]["mean_size"] for name in names]
    errors = [stderr(s) for s in sizes]
    middle.bar(places, np.mean(sizes, 1), 0.6, yerr=errors, color=COLORS[2], capsize=3)
    middle.set(ylabel="mean batch under the same cap\non memory (examples)")
    for ax in (left, middle):
        ax.set_xticks(places, [name.replace(" ", "\n", 1) for name in names])
    depths = np.array(config.depths)
    for i, part in enumerate(("encoding, 2 layers", "decoding")):
        y = [1e3 * times[d][i] for d in config.depths]
        right.plot(depths, y, marker="os"[i], color=COLORS[1 - i], label=part)
    right.set(xlabel="decoder layers", ylabel="least time of a batch of 4 (ms)", ylim=0)
    right.set_xticks(depths)
    right.legend(frameon=False)
    return [
        run.figure(
            "bucketed_batching", figure, title="Padding, batch size and decoding time",
            caption="Left: padding; dotted lines are the bounds for frames. "
            "Middle: mean batch. Means and standard errors over "
            f"{config.seeds} draws of {config.examples} utterances. Right: "
            f"{config.frames} positions encoded, {config.tokens} tokens decoded.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    draws = [sampled(config, seed) for seed in range(config.seeds)]
    found = {
        name: {field: np.array([d[name][field] for d in draws]) for field in fields}
        for name, fields in draws[0].items()
    }
    run.table(
        f"{config.examples} utterances, {config.seeds} draws",
        ("batches", "padding (%)", "of tokens (%)", "mean size", "fullest / cap"),
        [
            (
                name,
                *(f"{100 * r[field].mean():.1f}" for field in ("frames", "tokens")),
                *(f"{r[field].mean():.4g}" for field in ("mean_size", "fullest")),
            )
            for name, r in found.items()
        ],
    )
    times = {depth: timed(config, 2, depth) for depth in config.depths}
    logs = np.log(config.depths), np.log([times[d][1] for d in config.depths])
    exponent = float(np.polyfit(*logs, 1)[0])
    deepest = max(config.depths)
    even, moved = timed(config, deepest, deepest), timed(config, 2 * deepest - 1, 1)
    gain = sum(even) / sum(moved)
    fixed, two = found["fixed size"], found["2-D buckets"]
    ratio = two["mean_size"] / fixed["mean_size"]
    fullest = max(float(r["fullest"].max()) for r in found.values())
    least, most = float(fixed["frames"].min()), float(two["frames"].max())
    claims = [
        Claim(
            "share of padding in random batches of a fixed size, smallest of the draws",
            least, ">= 0.4", least >= 0.4, stderr(fixed["frames"]),
        ),
        Claim(
            "share of padding in batches from 2-D buckets, largest of the draws",
            most, "<= 0.1", most <= 0.1, stderr(two["frames"]),
        ),
        Claim(
            "mean batch from 2-D buckets over the fixed size, under the same cap on "
            "memory, smallest of the draws",
            float(ratio.min()), ">= 3", bool(ratio.min() >= 3), stderr(ratio),
        ),
        Claim(
            "memory of the fullest batch of all samplers, of the cap",
            fullest, "<= 1", fullest <= 1,
        ),
        Claim(
            "exponent of the decoding time in the depth of the decoder, from "
            f"{min(config.depths)} to {deepest} layers",
            exponent, ">= 0.7", exponent >= 0.7,
        ),
        Claim(
            f"time of {deepest} + {deepest} layers over that of {2 * deepest - 1} + 1, "
            "encoder and decoder",
            gain, "> 1", gain > 1,
        ),
    ]  # fmt: skip
    length, output = utterances(config, 0)
    cost = functools.partial(encdec_cost, length // 8, output, batch=128)
    layers = [{"encoder_layers": 48 - n, "decoder_layers": n} for n in (24, 4)]
    seconds = [float(jnp.sum(cost(**each)["seconds"])) for each in layers]
    metrics = {}
    for name, r in found.items():
        metrics |= {f"{name}/{field}": float(x.mean()) for field, x in r.items()}
    metrics |= {f"decoding_ms/{d}": 1e3 * times[d][1] for d in config.depths}
    metrics["cost_model/RTFx of 44 + 4 layers over 24 + 24"] = seconds[0] / seconds[1]
    return Report(claims, metrics, pictures(config, run, found, times))


if __name__ == "__main__":
    experiment(main, PRESETS)
