"""Models of bytes and of subwords: their training, and what a text costs them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.mamba import Mamba, MambaStack
from jaxzoo.nn.transformer import Transformer
from jaxzoo.sequence.mambabyte import bits_per_byte
from jaxzoo.training.cost import Cost, count
from jaxzoo.training.step import init_state, update_step

__all__ = [
    "Model", "cost_of_step", "mamba", "over_seeds", "text_bits", "trainer",
    "transformer",
]  # fmt: skip

NEWLINE = 10  # what every text is read after


class Model(NamedTuple):
    """What is trained, and on what.

    Attributes:
        net: the language model.
        rows: sequences in a batch.
        length: tokens that each of them predicts.
        learning_rate: the largest.
    """

    net: LanguageModel
    rows: int
    length: int
    learning_rate: float


def mamba(vocabulary: int, width: int, depth: int, states: int) -> LanguageModel:
    body = MambaStack(Mamba(width, states=states), depth)
    return LanguageModel(vocabulary, width, body)


def transformer(vocabulary: int, width: int, depth: int, heads: int) -> LanguageModel:
    body = Transformer(width=width, depth=depth, heads=heads)
    return LanguageModel(vocabulary, width, body)


def trainer(model: Model, steps: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The state of one seed at step 0, and its step."""

    def loss(params: Any, key: jax.Array, tokens: jax.Array) -> Any:
        logits, _ = model.net.apply(params, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        value = jnp.mean(losses)
        return value, {"loss": value}

    schedule = optax.warmup_cosine_decay_schedule(
        0.0, model.learning_rate, max(steps // 10, 1), steps, model.learning_rate / 20
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1)
    )

    def init(seed: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(seed))
        tokens = jnp.zeros((1, 4), jnp.int32)
        return init_state(keys[1], model.net.init(keys[0], tokens), optimizer)

    return init, update_step(loss, optimizer)


def over_seeds(function: Callable[..., Any], *arguments: Any) -> Any:
    """One seed after the other: on a CPU faster than batched products."""
    return lax.map(lambda each: function(*each), arguments)


def cost_of_step(model: Model) -> Cost:
    """FLOPs of a training step of one seed, every elementwise operation among them."""
    init, step = trainer(model, 100)
    batch = jax.ShapeDtypeStruct((model.rows, model.length + 1), jnp.int32)
    return count(jax.make_jaxpr(step)(jax.eval_shape(init, 0), batch))


def text_bits(
    model: Model, params: Any, texts: dict[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Bits per byte of texts, each `(tokens, bytes of each)`: `[seeds]`.

    A token is predicted from those before it in its window; windows overlap by half,
    and only the first of a text predicts its first half, too.
    """
    length, half = model.length, model.length // 2
    windows, masks, sizes, owners = [], [], [], []
    for name, (tokens, size) in texts.items():
        pad = -len(tokens) % half + half
        counts = np.arange(len(tokens) + pad) < len(tokens)
        tokens = np.pad(np.concatenate([[NEWLINE], tokens]), (0, pad))
        size = np.pad(size, (0, pad))
        for start in range(0, len(size) - half, half):
            here = slice(start, start + length)
            mask = counts[here].copy()
            mask[:half] &= start == 0
            windows.append(tokens[start : start + length + 1])
            masks.append(mask)
            sizes.append(size[here])
            owners.append(name)
    group = min(16, len(windows))
    extra = -len(windows) % group
    tokens = np.stack(windows + [windows[0]] * extra).astype(np.int32)
    grouped = jnp.asarray(tokens.reshape(-1, group, length + 1))

    @jax.jit
    def losses(params: Any, grouped: jax.Array) -> jax.Array:
        def some(params: Any, tokens: jax.Array) -> jax.Array:
            logits, _ = model.net.apply(params, tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, tokens[:, 1:]
            )

        def all_groups(params: Any) -> jax.Array:
            return lax.map(lambda tokens: some(params, tokens), grouped)

        return over_seeds(all_groups, params)

    found = losses(params, grouped)
    nll = np.asarray(found).reshape(found.shape[0], -1, length)[:, : len(windows)]
    owner, mask, size = np.array(owners), np.stack(masks), np.stack(sizes)
    bits = {}
    for name in texts:
        own = owner == name
        bits[name] = np.array(
            [bits_per_byte(x[own], size[own], where=mask[own]) for x in nll]
        )
    return bits
