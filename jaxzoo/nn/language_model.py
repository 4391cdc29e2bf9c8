"""An embedding and a head around any body of tokens: a transformer, or Mamba.

    model = LanguageModel(256, 64, Transformer(width=64, depth=4, heads=4))
    logits, _ = model.apply(params, tokens)                            # [B, T, 256]
    hidden, cache = model.apply(params, tokens, cache, method="hidden")

A body is a module `(x, cache, *, segment_ids) -> (x, cache)`. `next_token_loss` is
what it is trained on.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxzoo.core.stats import mean_where
from jaxzoo.core.typed import ArrayLike, check_range, typed
from jaxzoo.nn.token_logprobs import token_logprobs

__all__ = ["LanguageModel", "next_token_loss"]


class LanguageModel(nn.Module):
    """Tokens to the logits of the next ones.

    Attributes:
        vocabulary: how many symbols.
        width: of the body.
        body: `MambaStack`, `Transformer` or another module with their arguments.
        is_tied: the head is the embedding, whose products are divided by the root of
            the width; otherwise it has parameters of its own.
    """

    vocabulary: int
    width: int
    body: Any
    is_tied: bool = True

    def setup(self) -> None:
        shape = (self.vocabulary, self.width)
        self.embedding = self.param("embedding", nn.initializers.normal(1.0), shape)
        if not self.is_tied:
            self.own_head = self.param(
                "head", nn.initializers.lecun_normal(), shape[::-1]
            )

    def hidden(
        self,
        tokens: Int[Array, "b t"] | Float[Array, "b t v"],
        cache: Any = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """What the head is applied to: the body's output, and its cache.

        Floats are weights of the symbols: the body reads the mean of their embeddings.
        """
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            x = tokens @ self.embedding
        else:
            x = jnp.take(self.embedding, tokens, axis=0)
        return self.body(x, cache, segment_ids=segment_ids)

    def head(self) -> Float[Array, "d v"]:
        """The matrix that makes logits of `hidden`."""
        if self.is_tied:
            return self.embedding.T / jnp.sqrt(float(self.width))
        return self.own_head

    def __call__(
        self,
        tokens: Int[Array, "b t"] | Float[Array, "b t v"],
        cache: Any = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t v"], Any]:
        """Logits `[B, T, vocabulary]`, float32, and the body's cache."""
        x, cache = self.hidden(tokens, cache, segment_ids=segment_ids)
        return jnp.asarray(x, jnp.float32) @ self.head(), cache


@typed
def next_token_loss(
    hidden: Float[ArrayLike, "*batch d"],
    head: Float[ArrayLike, "d v"],
    targets: Int[ArrayLike, "*batch"],
    *,
    where: Bool[ArrayLike, "*batch"] | None = None,
    z_loss: float | Float[ArrayLike, ""] = 0.0,
    chunk: int = 1024,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Cross-entropy of the next tokens, and a pull of the logits' normaliser to 1.

    mean_t -log p(target_t) + z_loss (log Z_t)^2,   Z_t = sum_v exp(logit_tv)

    as in PaLM, whose weight is 1e-4. Logits of all tokens are never kept.

    Args:
        hidden: `[..., D]`, as by `LanguageModel.hidden`.
        head: `[D, V]`, as by `LanguageModel.head`.
        targets: integers in [0, V), `[...]`.
        where: which tokens count, `[...]`; None: all. If none does, the loss is 0.
            What is masked may hold anything.
        z_loss: weight, >= 0.
        chunk: of `token_logprobs`.

    Returns:
        `(value, aux)`: the loss; in aux "cross_entropy" in nats a token, the mean of
        "log_z_squared", "accuracy", and "per_example", the cross-entropy of each token.

    Raises:
        ValueError: a target outside the vocabulary, or `z_loss` < 0.

    >>> hidden, head = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0, 2.0], [9.0] * 3])
    >>> loss, aux = next_token_loss(hidden, head, jnp.array([1]), z_loss=0.1)
    >>> float(loss), float(aux["log_z_squared"])
    (1.9873, 5.7966)
    """
    check_range("z_loss", z_loss, low=0.0, below=float("inf"))
    hidden, targets = jnp.asarray(hidden), jnp.asarray(targets)
    if where is not None:
        # A masked token may hold anything, and its gradient meets the shared head.
        hidden = jnp.where(jnp.asarray(where)[..., None], hidden, 0.0)
        targets = jnp.where(where, targets, 0)
    logp, aux = token_logprobs(hidden, head, targets, chunk=chunk)
    cross_entropy = mean_where(-logp, where)
    squared = mean_where(jnp.square(aux["logsumexp"]), where)
    right = (aux["top"] == targets).astype(logp.dtype)
    return cross_entropy + z_loss * squared, {
        "cross_entropy": cross_entropy,
        "log_z_squared": squared,
        "accuracy": mean_where(right, where),
        "per_example": -logp,
    }
