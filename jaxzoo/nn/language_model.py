"""An embedding and a head around any body of tokens: a transformer, or Mamba.

    model = LanguageModel(256, 64, Transformer(width=64, depth=4, heads=4))
    logits, _ = model.apply(params, tokens)                            # [B, T, 256]
    hidden, cache = model.apply(params, tokens, cache, method="hidden")

A body is a module `(x, cache, *, segment_ids) -> (x, cache)`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["LanguageModel"]


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
        tokens: Int[Array, "b t"],
        cache: Any = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """What the head is applied to: the body's output, and its cache."""
        x = jnp.take(self.embedding, tokens, axis=0)
        return self.body(x, cache, segment_ids=segment_ids)

    def head(self) -> Float[Array, "d v"]:
        """The matrix that makes logits of `hidden`."""
        if self.is_tied:
            return self.embedding.T / jnp.sqrt(float(self.width))
        return self.own_head

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        cache: Any = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t v"], Any]:
        """Logits `[B, T, vocabulary]`, float32, and the body's cache."""
        x, cache = self.hidden(tokens, cache, segment_ids=segment_ids)
        return jnp.asarray(x, jnp.float32) @ self.head(), cache
