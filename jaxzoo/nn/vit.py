"""A vision transformer for images NHWC, and its pieces: patches, positions, blocks.

    vit = ViT(patch=4, width=64, depth=4, heads=4)
    tokens = vit.apply(params, images, method="embed")    # [B, N, D], with positions
    out, blocks = vit.apply(params, tokens, method="encode")     # [B, 1 + N, D]

`encode` takes any subset of the tokens in any order, since positions are added before:
a masked auto-encoder keeps a quarter of them and pays for a quarter. `apply(params,
images)` is the two in one.

Parameters are float32; `dtype` is what the layers compute in, while softmax, norms and
outputs are float32. The blocks run under `lax.scan`, their parameters stacked: a deep
one compiles as fast as a shallow one, and has as few leaves.
"""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["Block", "Transformer", "ViT", "patchify", "sincos_2d", "unpatchify"]

_dense_init = nn.initializers.xavier_uniform()
_token_init = nn.initializers.normal(0.02)


def patchify(images: Float[Array, "... h w c"], patch: int) -> Float[Array, "... n p"]:
    """Cuts images into square patches, row by row.

    Args:
        images: NHWC with any leading axes; height and width are multiples of `patch`.
        patch: side of a patch in pixels.

    Returns:
        `[..., (H/p)(W/p), p p C]`: the pixels of each patch row by row, channels last.

    Raises:
        ValueError: a side is not a multiple of `patch`.

    >>> patchify(jnp.arange(16.0).reshape(1, 4, 4, 1), 2)[0, 1].tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    *lead, height, width, channels = images.shape
    rows, columns = patch_grid((height, width, channels), patch)
    x = images.reshape(*lead, rows, patch, columns, patch, channels)
    x = jnp.swapaxes(x, -4, -3)
    return x.reshape(*lead, rows * columns, patch * patch * channels)


def unpatchify(
    patches: Float[Array, "... n p"], shape: tuple[int, int, int], patch: int
) -> Float[Array, "... h w c"]:
    """Puts the patches of `patchify` together again.

    Args:
        patches: `[..., N, p p C]`, all patches in their order.
        shape: height, width and channels of the images.
        patch: side of a patch in pixels.

    Returns:
        Images `[..., H, W, C]`.

    Raises:
        ValueError: a side is not a multiple of `patch`.

    >>> images = jnp.arange(48.0).reshape(1, 6, 4, 2)
    >>> bool((unpatchify(patchify(images, 2), (6, 4, 2), 2) == images).all())
    True
    """
    lead = patches.shape[:-2]
    rows, columns = patch_grid(shape, patch)
    x = patches.reshape(*lead, rows, columns, patch, patch, shape[2])
    return jnp.swapaxes(x, -4, -3).reshape(*lead, *shape)


def patch_grid(shape: tuple[int, int, int], patch: int) -> tuple[int, int]:
    """How many rows and columns of patches an image of this shape has."""
    height, width, _ = shape
    if patch < 1 or height % patch or width % patch:
        raise ValueError(
            f"argument 'patch' is {patch}, expected a divisor of the image's height "
            f"{height} and width {width}."
        )
    return height // patch, width // patch


def sincos_2d(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed positions: sines and cosines of column and row at width/4 frequencies.

    The order is that of MAE's released code: the first half tells the column, the
    second the row; in each half the sines stand before the cosines, and frequencies
    fall from 1 to 10000^-(1 - 4/width).

    Args:
        rows: of the grid.
        columns: of the grid.
        width: of the embedding, a multiple of 4.

    Returns:
        float32 `[rows columns, width]`, row by row.

    Raises:
        ValueError: `width` is not a multiple of 4.

    >>> sincos_2d(2, 2, 4).round(4).tolist()[1]
    [0.8415, 0.5403, 0.0, 1.0]
    """
    if width < 4 or width % 4:
        raise ValueError(f"argument 'width' is {width}, expected a multiple of 4.")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [place[:, None] * frequencies for place in (column, row)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class Attention(nn.Module):
    """Multi-head self-attention among all tokens.

    Attributes:
        heads: how many; they divide the width.
        dtype: compute dtype; the softmax is float32.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... t d"]) -> Float[Array, "... t d"]:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(
                f"argument 'heads' is {self.heads}, expected a divisor of {width}."
            )
        dense = {"dtype": self.dtype, "kernel_init": _dense_init}
        qkv = nn.Dense(3 * width, name="qkv", **dense)(x)
        # One batch axis, as jax.nn's attention wants it.
        qkv = qkv.reshape(-1, x.shape[-2], 3, self.heads, width // self.heads)
        q, k, v = (qkv[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return nn.Dense(width, name="out", **dense)(mixed)


class Block(nn.Module):
    """Attention, then an MLP with GELU, each after a norm and beside a skip.

    Attributes:
        heads: of the attention.
        mlp_ratio: hidden width of the MLP over the width.
        dtype: compute dtype; the stream that blocks add to stays float32.
    """

    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... t d"]) -> Float[Array, "... t d"]:
        width = x.shape[-1]
        dense = {"dtype": self.dtype, "kernel_init": _dense_init}
        y = Attention(self.heads, self.dtype, name="attention")(_norm("norm_1")(x))
        x = x + y.astype(x.dtype)
        y = nn.Dense(int(width * self.mlp_ratio), name="up", **dense)(
            _norm("norm_2")(x)
        )
        y = nn.Dense(width, name="down", **dense)(nn.gelu(y, approximate=False))
        return x + y.astype(x.dtype)


class Transformer(nn.Module):
    """Blocks one after the other, and a norm after the last.

    Attributes:
        depth: how many blocks, 1 or more.
        heads: of each.
        mlp_ratio: of each.
        dtype: compute dtype.
    """

    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "... t d"]
    ) -> tuple[Float[Array, "... t d"], Float[Array, "depth ... t d"]]:
        """Returns the tokens after the last norm, and those after each block."""

        def one(block: Block, x: Array, _: None) -> tuple[Array, Array]:
            x = block(x)
            return x, x

        block = Block(self.heads, self.mlp_ratio, self.dtype, name="blocks")
        run = nn.scan(
            one,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, after_each = run(block, x.astype(jnp.float32), None)
        return _norm("norm")(x), after_each


class ViT(nn.Module):
    """A vision transformer: patches, positions, a CLS token, blocks.

    Attributes:
        patch: side of a patch in pixels.
        width: of the tokens; a multiple of `heads`, and of 4 for "sincos".
        depth: how many blocks.
        heads: of the attention.
        mlp_ratio: hidden width of the blocks' MLP over the width.
        cls_token: puts a learned token before those of the patches.
        positions: "sincos", fixed; or "learned", for one image size.
        dtype: compute dtype; parameters and outputs are float32.
    """

    patch: int = 4
    width: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    cls_token: bool = True
    positions: Literal["sincos", "learned"] = "sincos"
    dtype: Any = jnp.float32

    def setup(self):
        self.body = Transformer(self.depth, self.heads, self.mlp_ratio, self.dtype)
        if self.cls_token:
            self.cls = self.param("cls", _token_init, (self.width,))

    @nn.compact
    def embed(self, images: Float[Array, "... h w c"]) -> Float[Array, "... n d"]:
        """The tokens of all patches, with their positions, without CLS."""
        x = patchify(images, self.patch)
        embedding = nn.Dense(
            self.width, name="patches", dtype=self.dtype, kernel_init=_dense_init
        )
        height, width, channels = images.shape[-3:]
        grid = patch_grid((height, width, channels), self.patch)
        if self.positions == "learned":
            shape = (grid[0] * grid[1], self.width)
            position = self.param("positions", _token_init, shape)
        else:
            position = jnp.asarray(sincos_2d(*grid, self.width))
        x = embedding(x).astype(jnp.float32)
        return x + jnp.broadcast_to(position, x.shape)

    def encode(
        self, tokens: Float[Array, "... n d"]
    ) -> tuple[Float[Array, "... t d"], Float[Array, "depth ... t d"]]:
        """Runs the blocks on tokens of `embed`: all of them, or those that were chosen.

        Args:
            tokens: `[..., N, width]`.

        Returns:
            The tokens after the last norm, `[..., 1 + N, width]` with CLS first (N of
            them without CLS); and those after each block, before that norm, with the
            blocks on the first axis.
        """
        if self.cls_token:
            first = jnp.broadcast_to(
                self.cls, (*tokens.shape[:-2], 1, self.width)
            ).astype(tokens.dtype)
            tokens = jnp.concatenate([first, tokens], axis=-2)
        return self.body(tokens)

    def __call__(
        self, images: Float[Array, "... h w c"]
    ) -> tuple[Float[Array, "... t d"], Float[Array, "depth ... t d"]]:
        """`encode` of `embed`."""
        return self.encode(self.embed(images))


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, name=name)
