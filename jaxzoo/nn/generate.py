"""Text from a model with a state, one token at a time.

    def model(cache, tokens):                      # [B, K] -> [B, K, V]
        return language_model.apply(params, tokens, cache)

    text, aux = generate(key, model, prompt, state=cache, num_tokens=64)

A way of decoding that combines models, or gives its model something else to read than
the token, is a `model` of its own around them: what it remembers goes into the state.
A temperature and the k likeliest tokens alone are one distribution, whoever draws from
it: `adjusted_log_probs`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

__all__ = ["adjusted_log_probs", "generate"]


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


@typed
def adjusted_log_probs(
    logits: Float[ArrayLike, "*batch vocabulary"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Float[Array, "*batch vocabulary"]:
    """What tokens are drawn from, so that every way of drawing is one from a softmax.

    log softmax(logits / temperature) over the `top_k` largest, -inf for the others

    Args:
        logits: `[..., V]`.
        temperature: >= 0; 0 is greedy, all of the probability on the largest.
        top_k: tokens that stay, of equal ones the first; None: all.

    Returns:
        Log probabilities in nats, float32 `[..., V]`.

    Raises:
        ValueError: a number is out of range.

    >>> logits = jnp.log(jnp.array([0.5, 0.1, 0.4]))
    >>> jnp.exp(adjusted_log_probs(logits, temperature=0.5, top_k=2)).tolist()
    [0.610, 0.0, 0.390]
    """
    check_range("temperature", temperature, low=0, below=float("inf"))
    if top_k is not None:
        check_range("top_k", top_k, low=1)
    logits = as_float32(logits)
    count = 1 if temperature == 0 else top_k
    if count is not None and count < logits.shape[-1]:
        _, best = jax.lax.top_k(logits, count)
        none = jnp.zeros(logits.shape, bool)
        keep = jnp.put_along_axis(none, best, True, axis=-1, inplace=False)
        logits = jnp.where(keep, logits, -jnp.inf)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # Less the largest first: a small temperature would send it to infinity.
    logits = (logits - jax.lax.stop_gradient(largest)) / (temperature or 1.0)
    return jax.nn.log_softmax(logits)


def _counter(key: Array) -> Any:
    table = jax.random.normal(jax.random.key(1), (5, 5))

    def model(state: Any, tokens: Array) -> tuple[Array, Any]:
        return table[tokens], state

    prompt = jax.random.randint(key, (8, 3), 0, 5)
    return (key, model, prompt), {"state": (), "num_tokens": 6}


def _logits(key: Array) -> Any:
    return (jax.random.normal(key, (8, 5)),), {"temperature": 0.7}


EXAMPLES = {adjusted_log_probs: _logits, generate: _counter}
