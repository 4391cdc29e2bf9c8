"""Pause tokens: a language model computes for longer before it answers.

A token outside the text, with an embedding of its own, is read like any other and never
predicted. With tokens p, and M pauses:

    pretraining   p with M pauses at random places; the next-token loss skips the
                  positions k whose next token is a pause
    fine-tuning   prefix, M pauses, target; the loss is on the target alone
    inference     prefix, M pauses, and what the model says is ignored before the last

    tokens, _ = insert_pause(key, text, pause_token=256)                   # [B, T]
    loss, aux = pause_loss(logits[:, :-1], tokens[:, 1:], pause_token=256)

    tokens, where = finetune_append(prefix, target, 10, pause_token=256)
    loss, aux = pause_loss(logits[:, :-1], tokens[:, 1:], pause_token=256, where=where)

    answer, _ = pause_generate(decode, prefix, 10, num_tokens=4, pause_token=256)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxzoo.core.collectives import AxisName, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "pause_tokens",
    "title": "Think before you speak: Training Language Models With Pause Tokens",
    "arxiv": "2310.02226",
    "year": 2024,
    "authors": "Sachin Goyal, Ziwei Ji, Ankit Singh Rawat, Aditya Krishna Menon, "
    "Sanjiv Kumar, Vaishnavh Nagarajan",
    "where": "Section 3 (equations 1 and 2, inference), 4.1 (10 % of the length, cut "
    "to what it was).",
    "differs": "No code was released: this is the paper's text. Losses are means over "
    "the positions that count, where it writes sums. Every set of places of the pauses "
    "is equally likely; how it draws them is not said. An answer holds no pause. The "
    "experiment is not of 1B parameters on C4 but of two layers of width 32 on two-hop "
    "lookups, without modular sums, and there the finding is not seen: exact answers "
    "are 53 % without pauses, 42 % with pauses in pretraining alone, 34 % with them in "
    "fine-tuning alone and 34 % with both, a tie at 0.1 +- 5 points that counts as "
    "more than 0; to name the symbol that was asked for is right in 40 %. Copies of "
    "'=' in the place of pauses do the same (33 %); a third layer is no help (47 %).",
}

__all__ = ["finetune_append", "insert_pause", "pause_generate", "pause_loss"]


@typed
def insert_pause(
    key: Key[Array, ""],
    tokens: Int[ArrayLike, "*batch length"],
    *,
    pause_token: int,
    rate: float = 0.1,
    is_trimmed: bool = True,
) -> tuple[Int[Array, "*batch longer"], dict[str, Array]]:
    """Puts pauses between the tokens of a text, each set of places equally likely.

    M = round(rate T) of T + M places hold a pause, and the text fills the others.

    Args:
        key: a typed key, consumed.
        tokens: text without pauses, `[..., T]`.
        pause_token: id of the pause, >= 1, that the text does not use.
        rate: pauses per token, in [0, 1].
        is_trimmed: only the first T places are kept, as in the paper: the price of a
            step is that of a text without pauses, and the end of the text is lost.

    Returns:
        `(tokens, aux)`: `[..., T]`, or `[..., T + M]` if not trimmed; `aux["source"]`,
        which token of the text stands there (of a pause, the next one), from 0 to T;
        and `aux["is_pause"]`.

    Raises:
        ValueError: a number is out of range.

    >>> tokens, aux = insert_pause(
    ...     jax.random.key(1), jnp.arange(1, 7), pause_token=9, rate=0.5
    ... )
    >>> tokens.tolist(), aux["source"].tolist()
    ([9, 1, 2, 9, 3, 4], [0, 0, 1, 2, 2, 3])
    """
    check_range("pause_token", pause_token, low=1)
    check_range("rate", rate, low=0, high=1)
    tokens = jnp.asarray(tokens)
    *batch, length = tokens.shape
    count = round(rate * length)
    noise = jax.random.uniform(key, (*batch, length + count))
    # The places of the smallest numbers: argsort of argsort is the rank.
    is_pause = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1) < count
    source = jnp.cumsum(~is_pause, axis=-1) - ~is_pause
    if is_trimmed:
        is_pause, source = is_pause[..., :length], source[..., :length]
    # A pause behind the whole text has no next token.
    text = jnp.take_along_axis(tokens, jnp.minimum(source, length - 1), axis=-1)
    paused = jnp.where(is_pause, jnp.asarray(pause_token, tokens.dtype), text)
    return paused, {"source": source, "is_pause": is_pause}


@typed
def pause_loss(
    logits: Float[ArrayLike, "*batch length vocabulary"],
    targets: Int[ArrayLike, "*batch length"],
    *,
    pause_token: int,
    where: Bool[ArrayLike, "*batch length"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Next-token loss that never asks for a pause (equations 1 and 2).

    mean over k with targets_k != pause of  -log softmax(logits_k)[targets_k]

    Args:
        logits: what the model says at each position, `[..., T, V]`; V may leave the
            pause out or have a column for it.
        targets: the token after each position, `[..., T]`.
        pause_token: id of the pause, >= 1.
        where: True for the positions that count, such as those before a token of the
            answer; masked ones may hold anything.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` that the batch is split
            over; None where arrays are whole.

    Returns:
        `(loss, aux)`: float32 scalar in nats, 0 if nothing counts;
        `aux["per_token"]`, `[..., T]`, 0 where nothing counts, and `aux["tokens"]`, how
        many positions count.

    Raises:
        ValueError: `pause_token` is below 1, or there is no such axis.

    >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.75, 0.25]]))
    >>> loss, aux = pause_loss(logits, jnp.array([9, 1]), pause_token=9)
    >>> float(loss), float(aux["tokens"])
    (1.3863, 1.0)
    """
    check_range("pause_token", pause_token, low=1)
    targets = jnp.asarray(targets)
    counts = targets != pause_token
    if where is not None:
        counts = counts & where
    # Replaced before the softmax, so that what does not count cannot send a NaN back.
    logits = jnp.where(counts[..., None], as_float32(logits), 0.0)
    targets = jnp.where(counts, targets, 0)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    per_token = jax.nn.logsumexp(logits, axis=-1) - picked
    per_token = jnp.where(counts, per_token, 0.0)
    number = psum(jnp.sum(counts).astype(per_token.dtype), axis_name)
    loss = psum(jnp.sum(per_token), axis_name) / jnp.maximum(number, 1.0)
    return loss, {"per_token": per_token, "tokens": number}


@typed
def finetune_append(
    prefix: Int[ArrayLike, "*batch prefix"],
    target: Int[ArrayLike, "*batch target"],
    num_pauses: int,
    *,
    pause_token: int,
) -> tuple[Int[Array, "*batch length"], Bool[Array, "*batch shorter"]]:
    """Question, pauses, answer; and where the loss is: on the answer alone.

    Args:
        prefix: token ids, `[..., N]`, N >= 1.
        target: token ids, `[..., T]`.
        num_pauses: M, >= 0; the paper's fine-tuning has 10 or 50.
        pause_token: id of the pause, >= 1.

    Returns:
        `[..., N + M + T]`, and True at the positions whose next token is one of the
        target, `[..., N + M + T - 1]`: the first is the last pause.

    Raises:
        ValueError: a number is out of range, or the prefix is empty.

    >>> tokens, where = finetune_append(
    ...     jnp.array([4, 2]), jnp.array([7]), 3, pause_token=9
    ... )
    >>> tokens.tolist(), where.tolist()
    ([4, 2, 9, 9, 9, 7], [False, False, False, False, True])
    """
    target = jnp.asarray(target)
    paused = _with_pauses(prefix, num_pauses, pause_token)
    tokens = jnp.concatenate([paused, target.astype(paused.dtype)], axis=-1)
    is_before = jnp.arange(tokens.shape[-1] - 1) >= paused.shape[-1] - 1
    shape = (*tokens.shape[:-1], tokens.shape[-1] - 1)
    return tokens, jax.lax.broadcast_in_dim(is_before, shape, (len(shape) - 1,))


@typed
def pause_generate(
    decode: Callable[[Any, Any], Any],
    prefix: Int[ArrayLike, "batch length"],
    num_pauses: int,
    *,
    num_tokens: int,
    pause_token: int,
) -> tuple[Int[Array, "batch num_tokens"], dict[str, Array]]:
    """Greedy answer after the last of M pauses; what is said before it is ignored.

    The prefix and its pauses are read in one call, and each token of the answer but the
    last in one more. The answer holds no pause.

    Args:
        decode: `(tokens [B, t], cache) -> (logits [B, t, V], cache)`, where `cache` is
            None at first and then what the last call returned.
        prefix: token ids, `[B, N]`, N >= 1.
        num_pauses: M, >= 0; it need not be that of the fine-tuning.
        num_tokens: length of the answer, >= 1.
        pause_token: id of the pause, >= 1.

    Returns:
        `(tokens, aux)`: int32 `[B, num_tokens]`, and `aux["log_probs"]`, float32 of the
        same shape, in nats.

    Raises:
        ValueError: a number is out of range, or the prefix is empty.

    A model that counts up, and says 0 at a pause:

    >>> def decode(tokens, cache):
    ...     following = jnp.where(tokens == 9, 0, tokens + 1)
    ...     return 5.0 * jax.nn.one_hot(following, 10), ()
    >>> pause_generate(decode, jnp.array([[4]]), 2, num_tokens=3, pause_token=9)[0]
    Array([[0, 1, 2]], dtype=int32)
    """
    check_range("num_tokens", num_tokens, low=1)
    paused = _with_pauses(prefix, num_pauses, pause_token)

    def chosen(logits: Array) -> tuple[Array, Array]:
        logits = as_float32(logits[:, -1])
        if pause_token < logits.shape[-1]:
            logits = logits.at[:, pause_token].set(-jnp.inf)
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        log_probs = jax.nn.log_softmax(logits)
        return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]

    def step(carry: Any, _: None) -> Any:
        token, cache = carry
        logits, cache = decode(token[:, None], cache)
        found = chosen(logits)
        return (found[0], cache), found

    logits, cache = decode(paused, None)
    first = chosen(logits)
    _, rest = jax.lax.scan(step, (first[0], cache), length=num_tokens - 1)
    tokens, log_probs = (
        jnp.concatenate([a[:, None], jnp.swapaxes(b, 0, 1)], axis=1)
        for a, b in zip(first, rest, strict=True)
    )
    return tokens, {"log_probs": log_probs}


def _with_pauses(prefix: ArrayLike, num_pauses: int, pause_token: int) -> Array:
    check_range("num_pauses", num_pauses, low=0)
    check_range("pause_token", pause_token, low=1)
    prefix = jnp.asarray(prefix)
    if prefix.shape[-1] == 0:
        raise ValueError("argument 'prefix' has no tokens, expected one or more.")
    shape = (*prefix.shape[:-1], num_pauses)
    pauses = jnp.full(shape, pause_token, prefix.dtype)
    return jnp.concatenate([prefix, pauses], axis=-1)


def _text(key: Array, *shape: int) -> Array:
    return jax.random.randint(key, shape, 0, 9)


def _loss_example(key: Array):
    keys = jax.random.split(key)
    targets = _text(keys[1], 8, 6).at[:, 2].set(9)
    where = jnp.ones((8, 6), bool).at[5:, 3:].set(False).at[:, 2].set(False)
    logits = jax.random.normal(keys[0], (8, 6, 10))
    return (logits, targets), {"pause_token": 9, "where": where}


def _generate_example(key: Array):
    def decode(tokens: Array, cache: Any) -> tuple[Array, Any]:
        seen = jnp.sum(tokens, axis=1) + (0 if cache is None else cache)
        following = (seen[:, None] + 3 * tokens) % 10
        return 4.0 * jax.nn.one_hot(following, 10), seen

    kwargs = {"num_tokens": 4, "pause_token": 9}
    return (decode, _text(key, 8, 5), 2), kwargs


EXAMPLES = {
    insert_pause: lambda key: (
        (key, _text(key, 8, 10)), {"pause_token": 9, "rate": 0.3}
    ),
    pause_loss: _loss_example,
    finetune_append: lambda key: (
        (_text(key, 8, 5), _text(key, 8, 2), 3), {"pause_token": 9}
    ),
    pause_generate: _generate_example,
}  # fmt: skip
