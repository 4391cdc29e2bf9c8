"""Self-pretraining: denoise the task's own inputs first, then learn its labels.

What a model reaches on a long-sequence task from random parameters says more about its
parametrisation than about what it can do. Pretraining on the inputs of the task alone,
by predicting the next token or those that are hidden, and then fine-tuning on the same
inputs, brings transformers near state space models.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "self_pretraining",
    "title": "Never Train from Scratch: Fair Comparison of Long-Sequence Models "
    "Requires Data-Driven Priors",
    "arxiv": "2310.02980",
    "year": 2024,
    "authors": "Ido Amos, Jonathan Berant, Ankit Gupta",
    "where": "Section 3: the masked and the causal denoising objective, and the "
    "protocol of pretraining and fine-tuning on the same inputs.",
    "differs": "The experiment is far smaller: two layers of 32, 2,000 images as "
    "784 pixels and 2,000 short lists, a few hundred steps where the paper trains "
    "until nothing changes. There pretraining gains nothing: with as many labelled "
    "steps -2 points on pixels and -9 on ListOps, with as many in all -18 and -15. "
    "Tried too: 196 pixels and four times the images a step, -0.4 and -9 points on "
    "pixels; a third more steps, -7 with as many in all. Nor is there a distance to "
    "shrink: from scratch the transformer, with rotary positions, is ahead of S4D.",
}

__all__ = ["denoising_loss", "hide_tokens"]


@typed
def hide_tokens(
    key: Key[Array, ""],
    tokens: Int[ArrayLike, "*batch time"],
    *,
    rate: float,
    vocabulary: int,
    where: Bool[ArrayLike, "*batch time"] | None = None,
) -> tuple[Int[Array, "*batch time"], Bool[Array, "*batch time"]]:
    """Replaces tokens by a mask, each with the same probability, independently.

    Args:
        key: consumed.
        tokens: `[..., T]`.
        rate: share that is hidden, in [0, 1]; the paper has 0.15 to 0.5.
        vocabulary: V, symbols 0 to V - 1; the mask that stands in their place is V.
        where: `[..., T]`, tokens that may be hidden; None: all.

    Returns:
        What the model sees, int32 `[..., T]`, and which tokens are hidden, `[..., T]`.

    Raises:
        ValueError: `rate` or `vocabulary` is out of range.

    >>> seen, hidden = hide_tokens(
    ...     jax.random.key(0), jnp.arange(6), rate=0.5, vocabulary=9
    ... )
    >>> bool(((seen == 9) == hidden).all())
    True
    """
    check_range("rate", rate, low=0.0, high=1.0)
    check_range("vocabulary", vocabulary, low=1)
    tokens = jnp.asarray(tokens, jnp.int32)
    hidden = jax.random.bernoulli(key, rate, tokens.shape)
    if where is not None:
        hidden = hidden & jnp.asarray(where)
    return jnp.where(hidden, vocabulary, tokens), hidden


@typed
def denoising_loss(
    logits: Float[ArrayLike, "*batch time vocabulary"],
    tokens: Int[ArrayLike, "*batch time"],
    *,
    where: Bool[ArrayLike, "*batch time"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy of the tokens that count, in nats.

    Masked: logits of what `hide_tokens` left to see, `where` it hid. Causal: logits
    `[..., :-1, :]` of the tokens with `tokens[..., 1:]`.

    Args:
        logits: `[..., T, V]`.
        tokens: `[..., T]`, in [0, V).
        where: `[..., T]`, tokens that count; None: all. If none does, the loss is 0.

    Returns:
        The loss, float32, and aux with "per_token" `[..., T]`, 0 where nothing counts,
        and "accuracy", the share of the tokens that count whose logit is the largest.

    Raises:
        TypeError: a shape does not fit.

    >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75], [1.0, 9.0]]))
    >>> loss, aux = denoising_loss(
    ...     logits, jnp.array([0, 1, 1]), where=jnp.array([True, True, False])
    ... )
    >>> loss.round(4).item(), aux["per_token"].round(4).tolist()
    (0.4904, [0.6931, 0.2877, 0.0])
    """
    logits, tokens = as_float32(logits), jnp.asarray(tokens)
    counts = jnp.ones(tokens.shape, bool) if where is None else jnp.asarray(where)
    # Hidden rows may hold anything: their gradient has to be 0, not 0 times NaN.
    safe = jnp.where(counts[..., None], logits, 0.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(safe, tokens)
    losses = jnp.where(counts, losses, 0.0)
    total = jnp.maximum(jnp.sum(counts), 1)
    right = counts & (jnp.argmax(safe, axis=-1) == tokens)
    return jnp.sum(losses) / total, {
        "per_token": losses,
        "accuracy": jnp.sum(right) / total,
    }


def _loss_example(key: Array) -> Any:
    keys = jax.random.split(key, 3)
    where = jnp.arange(6)[None] < jnp.array([[4], [6], [1], [2], [6], [6], [0], [3]])
    return (
        (
            jax.random.normal(keys[0], (8, 6, 5)),
            jax.random.randint(keys[1], (8, 6), 0, 5),
        ),
        {"where": where},
    )


EXAMPLES = {
    hide_tokens: lambda key: (
        (key, jnp.arange(12).reshape(2, 6)), {"rate": 0.3, "vocabulary": 12},
    ),
    denoising_loss: _loss_example,
}  # fmt: skip
