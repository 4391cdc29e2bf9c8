"""A transformer of tokens in order: rotary positions, grouped heads, SwiGLU.

    body = Transformer(width=64, depth=4, heads=4)
    y, _ = body.apply(params, x)                                     # [B, T, 64]
    cache = body.empty_cache(batch, 256)
    y, cache = body.apply(params, x[:, :5], cache)                   # the first five
    y, cache = body.apply(params, x[:, 5:6], cache)                  # one more

`language_model.LanguageModel` puts an embedding and a head around it. A cache counts
the tokens of each row by itself: to forget the last ones, give it smaller `lengths`.
`apply(..., mutable="intermediates")` also returns the queries and keys of each block
as attention gets them; `partition_spec` says how devices share the parameters.

Parameters are float32; `dtype` is what products compute in, while norms, rotations and
the stream that blocks add to are float32.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import attention, decode_attention

__all__ = ["Block", "KVCache", "Transformer", "partition_spec", "rotary"]


class KVCache(NamedTuple):
    """Keys and values of the tokens before.

    Attributes:
        keys: `[B, S, K, H]`, rotated; of a stack `[depth, B, S, K, H]`.
        values: likewise.
        lengths: int32 `[B]`, tokens of each row; of a stack `[depth, B]`.
    """

    keys: Array
    values: Array
    lengths: Array


def rotary(
    x: Float[Array, "b t n h"],
    positions: Int[Array, "b t"] | Float[Array, "b t"],
    *,
    base: float = 10000.0,
    frequencies: Float[Array, " half"] | Float[Array, "b t half"] | None = None,
) -> Float[Array, "b t n h"]:
    """Turns each pair of features by its position: products see distances alone.

    Feature i is paired with i + H/2, as in GPT-NeoX and Hugging Face's Llama (RoFormer
    pairs neighbours), and turned by position * base^(-2i/H), or position * frequency i.

    Args:
        x: `[B, T, N, H]`, H even.
        positions: `[B, T]`, from 0; fractions interpolate.
        base: of the wave lengths, > 1.
        frequencies: `[H/2]`, radians per position, in the place of those of `base`; or
            `[B, T, H/2]`, if tokens have their own.

    Returns:
        `[B, T, N, H]` in the dtype of `x`; computed in float32.

    Raises:
        ValueError: H is odd, `base` out of range, or there are not H/2 `frequencies`.

    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> rotary(x, jnp.array([[1]])).round(4).ravel().tolist()  # cos 1, sin 1
    [0.5403, 0.8415]
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"argument 'x' has {width} features a head, expected even.")
    if not base > 1:
        raise ValueError(f"argument 'base' is {base}, expected above 1.")
    if frequencies is None:
        speeds = base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    else:
        speeds = jnp.asarray(frequencies, jnp.float32)
    if speeds.shape[-1] != width // 2:
        raise ValueError(
            f"argument 'frequencies' has shape {speeds.shape}, expected [{width // 2}] "
            "or that for each token."
        )
    if speeds.ndim == 1:
        speeds = speeds[None, None]
    angles = (positions.astype(jnp.float32)[..., None] * speeds)[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Block(nn.Module):
    """Attention, then SwiGLU, each after a norm and beside a path around it.

    Attributes:
        heads: of queries, a divisor of the width.
        key_heads: heads of keys and values, a divisor of `heads`; None: `heads`.
        hidden: width of the SwiGLU; None: 8/3 of the width, up to a multiple of 8.
        is_causal: tokens see no later ones.
        qk_norm: RMS norms of queries and keys, per head, before the rotation.
        base: of `rotary`.
        dtype: compute dtype of products.
        implementation: of the attention; None: the best.
        frequencies: of `rotary`, or a function of positions `[B, T]` that gives them.
            Keys in a cache are turned: with other frequencies begin another cache.
        rope_scale: queries and keys are multiplied by it after the rotation, so logits
            by its square.
        attend: `(q, k, v, cache) -> (mixed, cache)` in the place of attention and of
            `KVCache`: q and mixed are `[B, T, N, H]`, k and v `[B, T, K, H]`, turned,
            and `cache.lengths` `[B]` counts the tokens that were read before.
    """

    heads: int
    key_heads: int | None = None
    hidden: int | None = None
    is_causal: bool = True
    qk_norm: bool = False
    base: float = 10000.0
    dtype: Any = jnp.float32
    implementation: Any = None
    frequencies: Any = None
    rope_scale: Any = 1.0
    attend: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        cache: Any = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Returns the output, and the cache with these tokens in it."""
        width = x.shape[-1]
        key_heads = self.key_heads or self.heads
        if width % self.heads or self.heads % key_heads:
            raise ValueError(
                f"arguments 'heads' and 'key_heads' are {self.heads} and {key_heads}, "
                f"expected a divisor of the width {width} and one of 'heads'."
            )
        size = width // self.heads
        normed = _norm("norm_1")(x)
        q = self._heads(normed, self.heads, size, "query")
        k = self._heads(normed, key_heads, size, "key")
        v = self._heads(normed, key_heads, size, "value")
        if self.qk_norm:
            q, k = _norm("query_norm")(q), _norm("key_norm")(k)
        q, k = q.astype(v.dtype), k.astype(v.dtype)
        places = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
        if cache is not None:
            places = places + cache.lengths[:, None]
        q, k = (self._turned(h, places) for h in (q, k))
        self.sow("intermediates", "queries", q)
        self.sow("intermediates", "keys", k)
        mixed, cache = self._mixed(q, k, v, cache, segment_ids)
        x = x + self._dense(width, "out")(mixed.reshape(x.shape)).astype(x.dtype)
        hidden = self.hidden or -(-width * 8 // 3 // 8) * 8
        normed = _norm("norm_2")(x)
        gate = nn.silu(self._dense(hidden, "gate")(normed))
        y = self._dense(width, "down")(gate * self._dense(hidden, "up")(normed))
        return x + y.astype(x.dtype), cache

    def _mixed(self, q: Array, k: Array, v: Array, cache: Any, segment_ids: Any) -> Any:
        if self.attend is not None:
            return self.attend(q, k, v, cache)
        if cache is None:
            mixed = attention(
                q, k, v, is_causal=self.is_causal, segment_ids=segment_ids,
                implementation=self.implementation,
            )  # fmt: skip
            return mixed, None
        _check_cache(self, segment_ids)
        new = _written(cache, k, v)
        return decode_attention(q, new.keys, new.values, new.lengths), new

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(
            features, use_bias=False, dtype=self.dtype, name=name,
            kernel_init=nn.initializers.lecun_normal(),
        )  # fmt: skip

    def _heads(self, x: Array, count: int, size: int, name: str) -> Array:
        return self._dense(count * size, name)(x).reshape(*x.shape[:2], count, size)

    def _turned(self, x: Array, places: Array) -> Array:
        speeds: Any = self.frequencies
        speeds = speeds(places) if callable(speeds) else speeds
        x = rotary(x, places, base=self.base, frequencies=speeds)
        return (self.rope_scale * x).astype(x.dtype)


class Transformer(nn.Module):
    """Blocks one after the other under `lax.scan`, and a norm after the last.

    Attributes:
        width: of the tokens.
        depth: how many blocks.
        heads: as in `Block`, like all that follow.
        remat: blocks are computed again for the gradient: memory of one block.
    """

    width: int
    depth: int
    heads: int
    key_heads: int | None = None
    hidden: int | None = None
    is_causal: bool = True
    qk_norm: bool = False
    base: float = 10000.0
    remat: bool = False
    dtype: Any = jnp.float32
    implementation: Any = None
    frequencies: Any = None
    rope_scale: Any = 1.0
    attend: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        cache: Any = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Runs all blocks.

        Args:
            x: `[B, T, width]`.
            cache: of the tokens before, by `empty_cache` at first. Its room is for the
                caller to keep: what does not fit is NaN. There is no gradient with it.
                Of `attend`, any pytree whose leaves have an axis of `depth` first.
            segment_ids: integers `[B, T]`: tokens see those of their own segment.

        Returns:
            `[B, T, width]`, and the cache with these tokens; None without one.
        """

        def one(block: Block, x: Array, cache: Any) -> tuple[Array, Any]:
            return block(x, cache, segment_ids=segment_ids)

        block = Block(
            self.heads, self.key_heads, self.hidden, self.is_causal, self.qk_norm,
            self.base, self.dtype, self.implementation, self.frequencies,
            self.rope_scale, self.attend, name="blocks",
        )  # fmt: skip
        run = nn.scan(
            nn.remat(one, prevent_cse=False) if self.remat else one,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True}, length=self.depth,
        )  # fmt: skip
        x, cache = run(block, x.astype(jnp.float32), cache)
        return _norm("norm")(x), cache

    @nn.nowrap
    def empty_cache(self, batch: int, size: int) -> KVCache:
        """A cache with room for `size` tokens in each of `batch` rows."""
        heads = self.key_heads or self.heads
        shape = (self.depth, batch, size, heads, self.width // self.heads)
        zeros = jnp.zeros(shape, self.dtype)
        return KVCache(zeros, zeros, jnp.zeros(shape[:2], jnp.int32))


def partition_spec(name: str, shape: tuple[int, ...]) -> P | None:
    """How a mesh with the axes fsdp and tensor shares a parameter of this model.

    Products into heads and into the SwiGLU are split by their outputs over tensor,
    those back by their inputs, so that a block has two sums over it; the other side is
    split over fsdp, as are the embedding's features. For `jaxzoo.training.mesh.place`.

    Args:
        name: a path, as "params/body/blocks/query/kernel".
        shape: of the parameter.

    Returns:
        The spec; None for what is no matrix of the model.

    >>> tuple(partition_spec("params/body/blocks/out/kernel", (2, 64, 64)))
    (None, 'tensor', 'fsdp')
    """
    parts = name.split("/")
    if parts[-1] == "embedding":
        return P("tensor", "fsdp")
    if parts[-1] != "kernel" or len(parts) < 2 or len(shape) < 2:
        return None
    before = (None,) * (len(shape) - 2)
    if parts[-2] in ("query", "key", "value", "gate", "up"):
        return P(*before, "fsdp", "tensor")
    return P(*before, "tensor", "fsdp") if parts[-2] in ("out", "down") else None


def _written(cache: KVCache, k: Array, v: Array) -> KVCache:
    """Puts tokens behind those of each row; NaN if there is no room for them."""
    count, size = k.shape[1], cache.keys.shape[1]
    fits = (cache.lengths + count <= size).reshape(-1, 1, 1, 1)

    def put(old: Array, new: Array) -> Array:
        new = jnp.where(fits, new.astype(old.dtype), jnp.nan)
        place = partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        return jax.vmap(place)(old, new, cache.lengths)

    return KVCache(put(cache.keys, k), put(cache.values, v), cache.lengths + count)


def _check_cache(block: Block, segment_ids: Any) -> None:
    if not block.is_causal:
        raise ValueError("argument 'is_causal' is False, with a cache it must be True.")
    if segment_ids is not None:
        raise ValueError(
            "argument 'segment_ids' came with a cache: a row of it is one document."
        )


def _norm(name: str) -> nn.RMSNorm:
    return nn.RMSNorm(epsilon=1e-5, dtype=jnp.float32, name=name)
