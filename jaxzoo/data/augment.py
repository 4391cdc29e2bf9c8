"""Random augmentations of images: pure functions of (key, images).

Images are `[B, H, W, C]` with values in [0, 1]; what comes back has the same dtype and
range. The draws of an example depend on the key and on its id alone:

    views = compose(
        partial(random_resized_crop, scale=(0.2, 1.0)), flip, color_jitter, grayscale
    )
    first = views(first_key, images)

By default an example's id is its row. Where a device or a process holds a part of the
batch, give the rows of the whole batch as `ids`; then every image is the same, bit for
bit, however the batch is split. Nothing here has a shape that depends on a value, so
that everything runs under `jax.jit`, `jax.vmap` and `jax.shard_map`. What changes
colours is in `augment_color`.
"""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxzoo.core.typed import ArrayLike, check_range, typed
from jaxzoo.data._examples import Pair, check_pair, per_example, sometimes, weighted

__all__ = [
    "Augmentation",
    "compose",
    "flip",
    "gaussian_blur",
    "gaussian_noise",
    "random_resized_crop",
]

ATTEMPTS = 10  # boxes that are drawn before a crop falls back to the centre


class Augmentation(Protocol):
    """What `compose` takes and gives: `(key, images, ids=None) -> images`."""

    def __call__(
        self, key: Array, images: ArrayLike, *, ids: ArrayLike | None = None
    ) -> Array: ...


def compose(*augmentations: Augmentation) -> Augmentation:
    """One augmentation after the other, number i with the key `fold_in(key, i)`.

    Args:
        *augmentations: functions of this module or of `augment_color`, with
            `functools.partial` for options.

    Returns:
        An augmentation.

    >>> both = compose(flip, gaussian_noise)
    >>> both(jax.random.key(0), jnp.ones((2, 8, 8, 3))).shape
    (2, 8, 8, 3)
    """

    def composed(key: Array, images: ArrayLike, *, ids: ArrayLike | None = None):
        images = jnp.asarray(images)
        for index, augmentation in enumerate(augmentations):
            images = augmentation(jax.random.fold_in(key, index), images, ids=ids)
        return images

    return composed


@typed
def random_resized_crop(
    key: Key[Array, ""],
    images: Float[ArrayLike, "b h w c"],
    *,
    ids: Int[ArrayLike, " b"] | None = None,
    size: tuple[int, int] | None = None,
    scale: Pair = (0.08, 1.0),
    ratio: Pair = (3 / 4, 4 / 3),
) -> Float[Array, "b new_h new_w c"]:
    """Cuts a random box out of each image and resizes it.

    The box is drawn as in torchvision: its share of the area is uniform, its aspect
    ratio log-uniform, its corners whole pixels; where ten draws do not fit, the largest
    box of the nearest allowed ratio in the centre is taken. Resizing is bilinear, with
    a wider filter where it makes smaller: Pillow's BILINEAR.

    Args:
        key: a typed key, consumed.
        images: `[B, H, W, C]` in [0, 1].
        ids: what tells the draws of examples apart; their rows by default.
        size: (height, width) of the result; that of `images` by default.
        scale: least and largest share of the area, in (0, 1].
        ratio: least and largest width / height, > 0.

    Returns:
        `[B, *size, C]`.

    Raises:
        TypeError: `images` is no `[B, H, W, C]` of floats, or `ids` does not fit it.
        ValueError: a range is out of range or upside down.

    >>> images = jnp.linspace(0, 1, 2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    >>> whole = random_resized_crop(jax.random.key(0), images, scale=(1, 1))
    >>> bool(jnp.all(whole == images))
    True
    """
    check_pair("scale", scale, low=1e-6, high=1.0)
    check_pair("ratio", ratio, low=1e-6)
    new_size = size or (images.shape[1], images.shape[2])
    for value in new_size:
        check_range("size", value, low=1)

    def crop(key: Array, image: Array) -> Array:
        height, width = image.shape[:2]
        top, box_h, left, box_w = _box(key, height, width, scale, ratio)
        image = _resize(image, top, box_h, 0, new_size[0])
        return _resize(image, left, box_w, 1, new_size[1])

    return per_example(crop, key, images, ids)


@typed
def flip(
    key: Key[Array, ""],
    images: Float[ArrayLike, "b h w c"],
    *,
    ids: Int[ArrayLike, " b"] | None = None,
    vertical: bool = False,
    probability: float = 0.5,
) -> Float[Array, "b h w c"]:
    """Mirrors some of the images, left to right or top to bottom.

    Args:
        key: a typed key, consumed.
        images: `[B, H, W, C]` in [0, 1].
        ids: what tells the draws of examples apart; their rows by default.
        vertical: top to bottom instead of left to right.
        probability: that an image is mirrored, in [0, 1].

    Returns:
        Shaped like `images`.

    Raises:
        TypeError: `images` is no `[B, H, W, C]` of floats, or `ids` does not fit it.
        ValueError: `probability` is out of range.

    >>> image = jnp.array([[0.0, 1.0]]).reshape(1, 1, 2, 1)
    >>> flip(jax.random.key(0), image, probability=1.0).ravel().tolist()
    [1.0, 0.0]
    """
    axis = 0 if vertical else 1
    mirrored = sometimes(lambda key, image: jnp.flip(image, axis), probability)
    return per_example(mirrored, key, images, ids)


@typed
def gaussian_blur(
    key: Key[Array, ""],
    images: Float[ArrayLike, "b h w c"],
    *,
    ids: Int[ArrayLike, " b"] | None = None,
    sigma: Pair = (0.1, 2.0),
    probability: float = 0.5,
) -> Float[Array, "b h w c"]:
    """Blurs some of the images by a Gaussian of random width.

    The filter ends at four times the largest `sigma`; at a border the weights inside
    the image are scaled to sum to one. A width of 0 changes nothing.

    Args:
        key: a typed key, consumed.
        images: `[B, H, W, C]` in [0, 1].
        ids: what tells the draws of examples apart; their rows by default.
        sigma: least and largest standard deviation in pixels, >= 0.
        probability: that an image is blurred, in [0, 1].

    Returns:
        Shaped like `images`.

    Raises:
        TypeError: `images` is no `[B, H, W, C]` of floats, or `ids` does not fit it.
        ValueError: `sigma` or `probability` is out of range.

    >>> dot = jnp.zeros((1, 5, 5, 1)).at[0, 2, 2, 0].set(1.0)
    >>> out = gaussian_blur(jax.random.key(0), dot, sigma=(0.5, 0.5), probability=1.0)
    >>> out[0, 2, :, 0].tolist()
    [0.0002, 0.0838, 0.6187, 0.0838, 0.0002]
    """
    check_pair("sigma", sigma, low=0.0)
    reach = math.ceil(4 * sigma[1])

    def blur(key: Array, image: Array) -> Array:
        width = jax.random.uniform(key, (), minval=sigma[0], maxval=sigma[1])
        return _smooth(_smooth(image, width, 0, reach), width, 1, reach)

    return per_example(sometimes(blur, probability), key, images, ids)


@typed
def gaussian_noise(
    key: Key[Array, ""],
    images: Float[ArrayLike, "b h w c"],
    *,
    ids: Int[ArrayLike, " b"] | None = None,
    std: float = 0.1,
    probability: float = 1.0,
) -> Float[Array, "b h w c"]:
    """Adds Gaussian noise to some of the images, and cuts the result to [0, 1].

    Args:
        key: a typed key, consumed.
        images: `[B, H, W, C]` in [0, 1].
        ids: what tells the draws of examples apart; their rows by default.
        std: standard deviation of the noise, >= 0.
        probability: that an image gets noise, in [0, 1].

    Returns:
        Shaped like `images`.

    Raises:
        TypeError: `images` is no `[B, H, W, C]` of floats, or `ids` does not fit it.
        ValueError: `std` or `probability` is out of range.

    >>> noisy = gaussian_noise(jax.random.key(0), jnp.full((1, 64, 64, 3), 0.5))
    >>> float(jnp.std(noisy))
    0.1
    """
    check_range("std", std, low=0)

    def noise(key: Array, image: Array) -> Array:
        return jnp.clip(image + std * jax.random.normal(key, image.shape), 0.0, 1.0)

    return per_example(sometimes(noise, probability), key, images, ids)


def _box(key: Array, height: int, width: int, scale, ratio) -> tuple[Array, ...]:
    """(top, height, left, width) of a crop: the first of ten draws that fits."""
    keys = jax.random.split(key, 4)
    shape = (ATTEMPTS,)
    area = jax.random.uniform(keys[0], shape, minval=scale[0], maxval=scale[1])
    low, high = jnp.log(jnp.array(ratio, jnp.float32))
    aspect = jnp.exp(jax.random.uniform(keys[1], shape, minval=low, maxval=high))
    box_w = jnp.round(jnp.sqrt(height * width * area * aspect))
    box_h = jnp.round(jnp.sqrt(height * width * area / aspect))
    fits = (box_w >= 1) & (box_w <= width) & (box_h >= 1) & (box_h <= height)
    first, found = jnp.argmax(fits), jnp.any(fits)
    # None fits: as much of the image as the ratios allow.
    shape_ratio = width / height
    widest = round(min(width, height * ratio[1])) if shape_ratio > ratio[1] else width
    highest = round(min(height, width / ratio[0])) if shape_ratio < ratio[0] else height
    box_w = jnp.where(found, box_w[first], max(widest, 1))
    box_h = jnp.where(found, box_h[first], max(highest, 1))
    free_h, free_w = height - box_h, width - box_w
    top = jnp.floor(jax.random.uniform(keys[2]) * (free_h + 1))
    left = jnp.floor(jax.random.uniform(keys[3]) * (free_w + 1))
    top = jnp.where(found, jnp.minimum(top, free_h), jnp.floor(free_h / 2))
    left = jnp.where(found, jnp.minimum(left, free_w), jnp.floor(free_w / 2))
    return top, box_h, left, box_w


def _resize(image: Array, start: Array, length: Array, axis: int, size: int) -> Array:
    """The pixels [start, start + length) of an axis, as `size` new ones."""
    old_size = image.shape[axis]
    step = length / size
    reach = jnp.maximum(step, 1.0)
    centre = start + (jnp.arange(size) + 0.5) * step - 0.5
    taps = jnp.arange(math.ceil(2 * max(old_size / size, 1)))
    index = jnp.floor(centre - reach)[:, None] + 1.0 + taps[None, :]
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(centre[:, None] - index) / reach)
    inside = (index >= start) & (index < start + length)
    index = jnp.clip(index, 0, old_size - 1).astype(jnp.int32)
    return weighted(image, index, jnp.where(inside, weights, 0.0), axis)


def _smooth(image: Array, width: Array, axis: int, reach: int) -> Array:
    size = image.shape[axis]
    offset = jnp.arange(-reach, reach + 1)
    index = jnp.arange(size)[:, None] + offset[None, :]
    # Below a thousandth of a pixel the neighbours' weights are exactly 0 anyway.
    weights = jnp.exp(-0.5 * jnp.square(offset / jnp.maximum(width, 1e-3)))
    inside = (index >= 0) & (index < size)
    weights = jnp.where(inside, weights[None, :], 0.0)
    return weighted(image, jnp.clip(index, 0, size - 1), weights, axis)
