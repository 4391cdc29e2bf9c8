"""N-grams of a text: a language model that costs nothing but a table.

    table = ngram_log_probs(text, vocabulary=256, order=2)
    model = lambda state, tokens: (table[tokens], state)

The model of bigrams reads and drafts as any other of `jaxzoo.nn.generate`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from jaxzoo.core.typed import ArrayLike, check_range, typed

__all__ = ["ngram_log_probs"]


@typed
def ngram_log_probs(
    text: Integer[ArrayLike, " length"],
    *,
    vocabulary: int,
    order: int = 2,
    pseudocount: float = 1.0,
) -> Float[Array, "..."]:
    """Log probabilities of n-grams of a text, smoothed by those one shorter.

    p(x | c_1 c_2 ..) = (N(c x) + pseudocount p(x | c_2 ..)) / (N(c) + pseudocount)

    and p(x) by the same rule from uniform.

    Args:
        text: integers in [0, V), `[T]`.
        vocabulary: V.
        order: n, 2 for bigrams.
        pseudocount: what the shorter n-gram counts, > 0.

    Returns:
        log p, float32 `[V, .., V]` with n axes: contexts, oldest first, and the token.

    Raises:
        ValueError: a number is out of range.

    >>> table = ngram_log_probs(jnp.array([0, 1, 0, 1, 0]), vocabulary=2)
    >>> jnp.exp(table).tolist()  # p(0) = (3 + 0.5) / 6
    [[0.194, 0.806], [0.861, 0.139]]
    """
    check_range("vocabulary", vocabulary, low=1)
    check_range("order", order, low=1)
    check_range("pseudocount", pseudocount, above=0, below=float("inf"))
    text, length = jnp.asarray(text), text.shape[0]
    probs = jnp.full((vocabulary,), 1 / vocabulary, jnp.float32)
    for n in range(1, order + 1):
        shape = (vocabulary,) * n
        grams = tuple(text[i : max(length - n + 1, 0) + i] for i in range(n))
        counts = jnp.zeros(shape, jnp.float32).at[grams].add(1.0, mode="drop")
        shorter = jnp.broadcast_to(probs, shape)
        total = jnp.sum(counts, axis=-1, keepdims=True)
        probs = (counts + pseudocount * shorter) / (total + pseudocount)
    return jnp.log(probs)


def _text(key: Array):
    return (jax.random.randint(key, (40,), 0, 5),), {"vocabulary": 5, "order": 3}


EXAMPLES = {ngram_log_probs: _text}
