"""Masked autoencoders: hide most patches, encode the rest, predict the hidden pixels.

    loss = mean over hidden patches and their pixels of (prediction - target)^2,
    target = (pixels - mean) / sqrt(variance + eps), both of the patch itself

The encoder sees visible patches alone. The backbone comes from elsewhere:

    vit = ViT(patch=4, width=64, depth=4, heads=4)              # jaxzoo.nn.vit
    decoder = MAEDecoder(Transformer(depth=2, heads=4), width=32, pixels=16)

    tokens = vit.apply(params["vit"], images, method="embed")   # positions added
    masked = random_masking(key, tokens)                        # 25% of them
    codes, _ = vit.apply(params["vit"], masked.visible, method="encode")
    positions = sincos_2d(7, 7, 32)
    prediction = decoder.apply(
        params["decoder"], codes, masked.ids_restore, positions
    )
    loss, aux = mae_loss(prediction, patchify(images, 4), masked.mask)

Inside shard_map each device masks its own rows: give it `fold_in(key, axis_index)`.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxzoo.core.collectives import AxisName, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "mae",
    "title": "Masked Autoencoders Are Scalable Vision Learners",
    "arxiv": "2111.06377",
    "year": 2022,
    "authors": "Kaiming He, Xinlei Chen, Saining Xie, Yanghao Li, Piotr Dollar, Ross "
    "Girshick",
    "where": "Section 3; per-patch normalised targets and masking as in the released "
    "code (facebookresearch/mae): the variance has n - 1, eps 1e-6 under the root.",
    "differs": "The number of visible patches is rounded down after the product is "
    "freed of float error (0.1 of 10 patches is 1; the released code has 0 there).",
}

__all__ = ["MAEDecoder", "Masking", "mae_loss", "random_masking", "unshuffle"]


class Masking(NamedTuple):
    """What `random_masking` keeps of a batch, and how to put it back.

    Attributes:
        visible: the tokens that were kept, `[B, K, D]`.
        ids_keep: which they are, int32 `[B, K]`.
        ids_restore: where each of the N tokens lies among the shuffled, kept ones
            first, int32 `[B, N]`; each row is a permutation.
        mask: True for the tokens that are hidden, `[B, N]`.
    """

    visible: Array
    ids_keep: Array
    ids_restore: Array
    mask: Array


@typed
def random_masking(
    key: Key[Array, ""], x: Float[ArrayLike, "batch n d"], *, ratio: float = 0.75
) -> Masking:
    """Keeps a random part of each example's tokens, as many in every example.

    The tokens are shuffled by sorting uniform noise, and the first ones kept.

    Args:
        key: a typed key, consumed.
        x: tokens, with their positions already added.
        ratio: the part that is hidden, in [0, 1); K = floor((1 - ratio) N) are kept.

    Returns:
        A `Masking`: the visible tokens, their indices, the way back, the mask.

    Raises:
        ValueError: `ratio` is out of range, or leaves no token.

    >>> x = jnp.arange(8.0).reshape(1, 8, 1)
    >>> masked = random_masking(jax.random.key(0), x)
    >>> masked.visible.shape, int(masked.mask.sum())
    ((1, 2, 1), 6)
    """
    check_range("ratio", ratio, low=0, high=1)
    batch, count, _ = x.shape
    keep = math.floor(count * (1.0 - ratio) + 1e-6)
    if keep < 1:
        raise ValueError(
            f"argument 'ratio' is {ratio}, expected one that leaves at least one of "
            f"{count} tokens."
        )
    noise = jax.random.uniform(key, (batch, count))
    ids_shuffle = jnp.argsort(noise, axis=1)
    # The inverse of a permutation, with int32 in place of what argsort returns.
    ids_restore = jnp.argsort(ids_shuffle, axis=1).astype(jnp.int32)
    ids_keep = ids_shuffle[:, :keep].astype(jnp.int32)
    visible = jnp.take_along_axis(jnp.asarray(x), ids_keep[:, :, None], axis=1)
    return Masking(visible, ids_keep, ids_restore, ids_restore >= keep)


@typed
def unshuffle(
    visible: Float[ArrayLike, "batch k d"],
    mask_token: Float[ArrayLike, " d"],
    ids_restore: Int[ArrayLike, "batch n"],
) -> Float[Array, "batch n d"]:
    """All tokens in their order, the hidden ones replaced by one shared token.

    Args:
        visible: the kept tokens, in the order of `Masking.visible`.
        mask_token: stands for every hidden token.
        ids_restore: of the same `Masking`.

    Returns:
        float32 `[batch, N, D]`.

    Raises:
        TypeError: a shape does not fit.
        ValueError: there are more visible tokens than tokens.

    >>> visible, ids = jnp.array([[[5.0], [6.0]]]), jnp.array([[2, 1, 0]])
    >>> unshuffle(visible, jnp.array([0.0]), ids)[0, :, 0].tolist()
    [0.0, 6.0, 5.0]
    """
    batch, keep, width = visible.shape
    hidden = ids_restore.shape[1] - keep
    if hidden < 0:
        raise ValueError(
            f"argument 'visible' has {keep} tokens, expected at most those of "
            f"'ids_restore', {ids_restore.shape[1]}."
        )
    filling = jnp.broadcast_to(as_float32(mask_token), (batch, hidden, width))
    shuffled = jnp.concatenate([as_float32(visible), filling], axis=1)
    return jnp.take_along_axis(shuffled, ids_restore[:, :, None], axis=1)


@typed
def mae_loss(
    prediction: Float[ArrayLike, "batch n p"],
    patches: Float[ArrayLike, "batch n p"],
    mask: Bool[ArrayLike, "batch n"],
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean squared error on the hidden patches.

    loss = sum_bn mask_bn mean_p (prediction - target)^2 / sum_bn mask_bn

    With `normalize` the target is each patch less its mean, over its standard
    deviation: sqrt(variance + eps), the variance over p - 1. It equals the loss of
    the released code.

    Args:
        prediction: the decoder's, `[B, N, p]`.
        patches: the true pixels, as `patchify` cuts them. They are no constants: a
            gradient reaches them.
        mask: True for the hidden patches, which alone count.
        where: True for the examples that count; masked ones may hold anything.
        normalize: per-patch normalised targets; False takes the pixels as they are.
        eps: added to the variance, so that flat patches have a target of 0.
        axis_name: of the devices that share the batch; None if arrays are whole.

    Returns:
        `(loss, aux)`: float32 scalar, 0 if nothing is hidden; `aux["per_example"]` is
        the mean over each example's own hidden patches, `[B]`.

    Raises:
        TypeError: a shape does not fit.
        ValueError: `eps` is below 1e-12, or patches of one number are to be normalised.

    >>> patches = jnp.array([[[0.0, 2.0], [5.0, 5.0]]])
    >>> loss, _ = mae_loss(jnp.zeros((1, 2, 2)), patches, jnp.array([[True, False]]))
    >>> float(loss)     # the target is -+ 1 / sqrt(2)
    0.50
    """
    check_range("eps", eps, low=1e-12)
    if normalize and patches.shape[-1] < 2:
        raise ValueError(
            "argument 'patches' has patches of 1 number, whose variance is undefined: "
            "expected 2 or more, or normalize=False."
        )
    prediction, target = as_float32(prediction), as_float32(patches)
    hidden = jnp.asarray(mask)
    if where is not None:
        hidden = hidden & jnp.asarray(where)[:, None]
        target = jnp.where(jnp.asarray(where)[:, None, None], target, 0.0)
    if normalize:
        target = _standardize(target, eps)
    # where, not a product: what a visible patch got may be infinite.
    error = jnp.where(hidden[:, :, None], prediction - target, 0.0)
    errors = jnp.sum(jnp.mean(jnp.square(error), axis=-1), axis=1)
    counts = jnp.sum(hidden, axis=1).astype(errors.dtype)
    total, count = psum((jnp.sum(errors), jnp.sum(counts)), axis_name)
    aux = {"per_example": jax.lax.stop_gradient(errors / jnp.maximum(counts, 1.0))}
    return total / jnp.maximum(count, 1.0), aux


class MAEDecoder(nn.Module):
    """Codes of the visible patches and mask tokens in, pixels of all patches out.

    Attributes:
        body: maps tokens `[B, T, width]` to `(tokens after its norm, anything)`, as
            `jaxzoo.nn.vit.Transformer` does; the paper's is narrow and shallow.
        width: of the decoder's tokens.
        pixels: numbers in a patch, p p C.
        cls_token: the codes begin with the encoder's CLS token, which comes along.
        dtype: compute dtype; parameters and the output are float32.
    """

    body: nn.Module
    width: int
    pixels: int
    cls_token: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        codes: Float[Array, "batch t d"],
        ids_restore: Int[Array, "batch n"],
        positions: Float[ArrayLike, "n width"],
    ) -> Float[Array, "batch n p"]:
        """Predicts the pixels of every patch, hidden or not.

        Args:
            codes: the encoder's output, CLS first if there is one.
            ids_restore: of the `Masking`.
            positions: of all patches in their order, in the decoder's own width.
        """
        dense = {"dtype": self.dtype, "kernel_init": nn.initializers.xavier_uniform()}
        x = nn.Dense(self.width, name="embed", **dense)(codes).astype(jnp.float32)
        token = self.param("mask", nn.initializers.normal(0.02), (self.width,))
        first, visible = jnp.split(x, [int(self.cls_token)], axis=1)
        x = unshuffle(visible, token, ids_restore)
        x = x + jnp.asarray(positions)[None]
        x, _ = self.body(jnp.concatenate([first, x], axis=1))
        x = nn.Dense(self.pixels, name="predict", **dense)(x)
        return x[:, int(self.cls_token) :].astype(jnp.float32)


def _standardize(patches: Array, eps: float) -> Array:
    """Each patch less its mean, over its standard deviation."""
    centred = patches - jnp.mean(patches, axis=-1, keepdims=True)
    # In units of the largest deviation, so that no square overflows.
    largest = jnp.max(jnp.abs(centred), axis=-1, keepdims=True)
    unit = jax.lax.stop_gradient(jnp.maximum(largest, 1.0))
    variance = jnp.var(centred / unit, axis=-1, keepdims=True, ddof=1)
    return centred / unit * jax.lax.rsqrt(variance + eps / unit / unit)


def _loss_example(key: Array):
    prediction, patches = jax.random.normal(key, (2, 8, 6, 4))
    mask = jnp.arange(6)[None] >= 1 + jnp.arange(8)[:, None] % 5
    return (prediction, patches, mask), {"where": jnp.arange(8) < 6}


def _unshuffle_example(key: Array):
    x = jax.random.normal(key, (8, 6, 4))
    masked = random_masking(key, x, ratio=0.5)
    return (masked.visible, x[0, 0], masked.ids_restore), {}


EXAMPLES = {
    mae_loss: _loss_example,
    random_masking: lambda key: ((key, jax.random.normal(key, (8, 8, 4))), {}),
    unshuffle: _unshuffle_example,
}
