"""Two towers for emoji and their captions, and how they are trained.

Functions take the settings of `experiments.ssl.siglip` as `config`.
"""

import functools
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxzoo.data.emoji import emoji
from jaxzoo.data.source import batch_indices
from jaxzoo.nn.contrastive import info_nce
from jaxzoo.nn.mlp import MLP
from jaxzoo.ssl.siglip import siglip_loss
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.record import Run
from jaxzoo.training.step import init_state, update_step


class ImageEncoder(nn.Module):
    """Patches of 4 x 4 through one layer each, then all of them through two."""

    hidden: int
    width: int

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        patches = image.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        x = nn.gelu(nn.Dense(32)(patches.reshape(-1, 64, 48)))
        return MLP((self.hidden, self.width), nn.gelu)(x.reshape(len(x), -1))


def bag(text: str, size: int) -> np.ndarray:
    """Counts of the words and letter triples of a caption, in hashed buckets."""
    words = text.lower().replace(":", " ").split()
    triples = [f"<{w}>"[i : i + 3] for w in words for i in range(len(w))]
    counts = np.zeros(size, np.uint8)
    for piece in words + triples:
        counts[zlib.crc32(piece.encode()) % size] += 1
    return counts


def load(config: Any, split: str) -> dict[str, Any]:
    arrays = emoji().split(split).arrays
    pixels = arrays["image"].reshape(len(arrays["image"]), -1)
    return {
        **arrays,
        "text": np.stack([bag(str(c), config.words) for c in arrays["caption"]]),
        "same": np.unique(pixels, axis=0, return_inverse=True)[1].reshape(-1),
    }


def unit(rows: jax.Array) -> jax.Array:
    return rows * jax.lax.rsqrt(jnp.sum(rows * rows, -1, keepdims=True) + 1e-8)


def image_rows(nets, params, image: jax.Array) -> jax.Array:
    return unit(nets["image"].apply(params["image"], image / 255.0 - 0.5))


def text_rows(nets, params, text: jax.Array) -> jax.Array:
    return unit(nets["text"].apply(params["text"], jnp.float32(text)))


def encode(nets, params, image: jax.Array, text: jax.Array) -> tuple[Any, Any]:
    """Rows of length 1 of both kinds."""
    return image_rows(nets, params, image), text_rows(nets, params, text)


def of_rows(kind: str, params, image: jax.Array, text: jax.Array) -> tuple[Any, Any]:
    """The loss of two batches of rows, and what to log."""
    if kind == "sigmoid":
        knobs = {"log_scale": params["log_scale"], "bias": params["bias"]}
        value = siglip_loss(image, text, **knobs)[0]
    else:
        value = info_nce(image, text, log_scale=params["log_scale"])[0]
    return value, {"loss": value, "scale": jnp.exp(params["log_scale"])}


def loss(kind: str, nets, data, params, _: jax.Array, ids: Any) -> tuple[Any, Any]:
    """Of a batch `[B, 2]`: which image, and whose caption it is shown with."""
    images, texts = data["image"][ids[:, 0]], data["text"][ids[:, 1]]
    return of_rows(kind, params, *encode(nets, params, images, texts))


def on_device(data) -> dict[str, jax.Array]:
    return {name: jnp.asarray(data[name]) for name in ("image", "text")}


def seed_keys(seed: Any) -> jax.Array:
    """For the image tower, the text tower or a head, and the steps."""
    return jax.random.split(jax.random.key(seed), 3)


def init_params(config: Any, kind: str, nets, seed: Any) -> dict[str, Any]:
    keys = seed_keys(seed)
    # Section 3.2 of the paper; the softmax loss starts as CLIP does.
    scale, bias = (10.0, -10.0) if kind == "sigmoid" else (1 / 0.07, 0.0)
    return {
        "image": nets["image"].init(keys[0], jnp.zeros((1, 32, 32, 3))),
        "text": nets["text"].init(keys[1], jnp.zeros((1, config.words))),
        "log_scale": jnp.log(jnp.float32(scale)),
        "bias": jnp.float32(bias),
    }


def pairs(config: Any, size: int, count: int, noise: float, t: int) -> np.ndarray:
    """Batch t of every seed; with `noise` some captions change their places."""
    rows = []
    for seed in range(config.seeds):
        ids = batch_indices(seed, t, num_examples=count, batch_size=size)
        rng = np.random.Generator(np.random.Philox(key=[seed, t]))
        swapped = np.flatnonzero(rng.random(size) < noise)
        captions = ids.copy()
        captions[swapped] = ids[np.roll(swapped, 1)]
        rows.append(np.stack([ids, captions], -1))
    return np.stack(rows)


def fit(run: Run, config: Any, name, seeds, init, objective, batches, ids, steps):
    """Trains what `init` makes of each seed, all at once; returns their parameters."""
    decayed = functools.partial(jax.tree.map, lambda x: jnp.ndim(x) > 1)
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, steps // 10, steps
        ),
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    step = update_step(objective, optimizer, reproducible=run.options.reproducible)

    def start():
        def one(seed):
            return init_state(seed_keys(seed)[2], init(seed), optimizer)

        return jax.vmap(one)(jnp.asarray(seeds))

    state = train(
        run, name, jax.vmap(step), start, batches, num_steps=steps, show="loss",
        batch_axis=1, ids=ids,
    )  # fmt: skip
    return local(state["params"])


def taken(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)
