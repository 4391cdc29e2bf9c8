"""Training on the answers that follow prompts: used by instructive_decoding and moi."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxzoo.nn.language_model import LanguageModel

__all__ = ["trained_on_answers"]


def trained_on_answers(
    model: LanguageModel, draw: Callable[[jax.Array], jax.Array], key: jax.Array, *,
    prompt: int, learning_rate: float, steps: int,
) -> tuple[Any, jax.Array]:  # fmt: skip
    """A model after Adam on fresh answers, the rate falling to 0 by a cosine.

    Args:
        model: of tokens.
        draw: `key -> [B, T]`, int32, prompts with the answers behind them.
        key: of the parameters, and of what is drawn.
        prompt: tokens before each answer; of them nothing is learned.
        learning_rate: at the start.
        steps: each with a batch of its own.

    Returns:
        `(params, loss)`: the loss is the mean of the last twenty steps, nats per token.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    init_key, key = jax.random.split(key)
    params = model.init(init_key, jnp.zeros((1, 4), jnp.int32))

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        tokens = draw(key)

        def loss(params: Any) -> jax.Array:
            outputs: Any = model.apply(params, tokens[:, :-1])
            return jnp.mean(
                optax.softmax_cross_entropy_with_integer_labels(
                    outputs[0][:, prompt - 1 :], tokens[:, prompt:]
                )
            )

        value, slope = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(key, steps)
    (params, _), losses = lax.scan(step, (params, optimizer.init(params)), keys)
    return params, jnp.mean(losses[-20:])
