"""Text from a model with a state, one token at a time.

    def model(cache, tokens):                      # [B, K] -> [B, K, V]
        return language_model.apply(params, tokens, cache)

    text, aux = generate(key, model, prompt, state=cache, num_tokens=64)

A way of decoding that combines models, or gives its model something else to read than
the token, is a `model` of its own around them: what it remembers goes into the state.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["generate"]


@typed
def generate(
    key: Key[Array, ""],
    model: Callable[[Any, Array], tuple[Array, Any]],
    prompt: Integer[ArrayLike, "batch prompt"], *,
    state: Any, num_tokens: int, temperature: float = 1.0,
    adjust: Callable[[Array], Array] | None = None,
) -> tuple[Int[Array, "batch num_tokens"], dict[str, Any]]:  # fmt: skip
    """Reads a prompt in one call, and then writes.

    Args:
        key: a typed key, consumed.
        model: `(state, tokens [B, K]) -> (logits [B, K, V], state)` reads tokens and
            says what follows each.
        prompt: `[B, P]`, P >= 1.
        state: before the prompt: an empty cache, with room for P + num_tokens - 1.
        num_tokens: to write in each row.
        temperature: logits are divided by it, >= 0; at 0 the likeliest token is taken,
            the first of equals.
        adjust: logits `[B, V]` to logits before that, as for a bias. None: as they are.

    Returns:
        The tokens, int32 `[B, num_tokens]`; aux has "log_prob" `[B, num_tokens]` of
        each under the adjusted logits at temperature 1, and the last "state", which has
        read all but the last token.

    Raises:
        ValueError: a number is out of range, or the prompt is empty.

    >>> counts = 9 * jnp.eye(4)[jnp.array([1, 2, 3, 0])]  # a model that counts
    >>> model = lambda state, tokens: (counts[tokens], state)
    >>> text, _ = generate(
    ...     jax.random.key(0), model, jnp.array([[0, 1]]), state=(), num_tokens=5,
    ...     temperature=0.0)
    >>> text.tolist()
    [[2, 3, 0, 1, 2]]
    """
    check_range("num_tokens", num_tokens, low=1)
    check_range("temperature", temperature, low=0.0, below=float("inf"))
    if not prompt.shape[1]:
        raise ValueError("argument 'prompt' has no tokens, expected at least 1.")

    def draw(key: Array, logits: Array) -> tuple[Array, Array]:
        last: Float[Array, "b v"] = as_float32(logits[:, -1])
        last = last if adjust is None else adjust(last)
        if temperature == 0.0:
            token = jnp.argmax(last, axis=-1)
        else:
            token = jax.random.categorical(key, last / temperature)
        log_prob = jax.nn.log_softmax(last)
        own = jnp.take_along_axis(log_prob, token[:, None], axis=-1)[:, 0]
        return token.astype(jnp.int32), own

    def write(carry: Any, key: Array) -> Any:
        state, token = carry
        logits, state = model(state, token[:, None])
        token, log_prob = draw(key, logits)
        return (state, token), (token, log_prob)

    keys = jax.random.split(key, num_tokens)
    logits, state = model(state, jnp.asarray(prompt).astype(jnp.int32))
    first = draw(keys[0], logits)
    (state, _), rest = jax.lax.scan(write, (state, first[0]), keys[1:])
    tokens, log_prob = (
        jnp.concatenate([one[:, None], jnp.moveaxis(more, 0, 1)], axis=1)
        for one, more in zip(first, rest, strict=True)
    )
    return tokens, {"log_prob": log_prob, "state": state}


def _counter(key: Array) -> Any:
    table = jax.random.normal(jax.random.key(1), (5, 5))

    def model(state: Any, tokens: Array) -> tuple[Array, Any]:
        return table[tokens], state

    prompt = jax.random.randint(key, (8, 3), 0, 5)
    return (key, model, prompt), {"state": (), "num_tokens": 6}


EXAMPLES = {generate: _counter}
