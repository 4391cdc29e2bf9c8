"""Random changes of colour, as in `augment`: pure functions of (key, images).

    views = compose(flip, color_jitter, partial(grayscale, probability=0.2))
    first = views(first_key, images)

Images are `[B, H, W, C]` with values in [0, 1], of one channel or of three: red, green
and blue.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxzoo.core.typed import ArrayLike, check_range, typed
from jaxzoo.data._examples import per_example, sometimes

__all__ = ["color_jitter", "grayscale"]

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in Pillow and torchvision


@typed
def color_jitter(
    key: Key[Array, ""],
    images: Float[ArrayLike, "b h w c"],
    *,
    ids: Int[ArrayLike, " b"] | None = None,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    probability: float = 1.0,
) -> Float[Array, "b h w c"]:
    """Changes brightness, contrast, saturation and hue, in this order.

    The first three are blends f * image + (1 - f) * other, cut to [0, 1], with other =
    black, the mean grey value, or the grey image, and f uniform in [1 - s, 1 + s], not
    below 0, for strength s. Hue moves by a uniform share of the colour circle. Grey
    images have neither saturation nor hue and keep what they lack.

    Args:
        key: a typed key, consumed.
        images: `[B, H, W, C]` in [0, 1], C of 1 or 3.
        ids: what tells the draws of examples apart; their rows by default.
        brightness: strength, >= 0.
        contrast: strength, >= 0.
        saturation: strength, >= 0.
        hue: largest move, in [0, 0.5] of the colour circle.
        probability: that an image is changed, in [0, 1].

    Returns:
        Shaped like `images`.

    Raises:
        TypeError: `images` is no `[B, H, W, C]` of floats, or `ids` does not fit it.
        ValueError: C is neither 1 nor 3, or a strength is out of range.

    >>> grey = jnp.full((1, 1, 1, 3), 0.5)
    >>> bright = color_jitter(jax.random.key(0), grey, contrast=0.0)
    >>> bool(0.3 <= bright[0, 0, 0, 0] <= 0.7)
    True
    """
    strengths = {"brightness": brightness, "contrast": contrast}
    for name, strength in (strengths | {"saturation": saturation}).items():
        check_range(name, strength, low=0)
    check_range("hue", hue, low=0, high=0.5)
    _check_channels(images)

    def jitter(key: Array, image: Array) -> Array:
        keys = jax.random.split(key, 4)
        image = _blend(keys[0], image, jnp.zeros_like(image), brightness)
        mean = jnp.broadcast_to(jnp.mean(_luma(image)), image.shape)
        image = _blend(keys[1], image, mean, contrast)
        if image.shape[-1] == 1:
            return image
        grey = jnp.broadcast_to(_luma(image), image.shape)
        image = _blend(keys[2], image, grey, saturation)
        if hue == 0:  # the way to hues and back would round
            return image
        return _shift_hue(
            image, jax.random.uniform(keys[3], (), minval=-hue, maxval=hue)
        )

    return per_example(sometimes(jitter, probability), key, images, ids)


@typed
def grayscale(
    key: Key[Array, ""],
    images: Float[ArrayLike, "b h w c"],
    *,
    ids: Int[ArrayLike, " b"] | None = None,
    probability: float = 0.2,
) -> Float[Array, "b h w c"]:
    """Takes the colour out of some of the images; they keep their channels.

    Args:
        key: a typed key, consumed.
        images: `[B, H, W, C]` in [0, 1], C of 1 or 3.
        ids: what tells the draws of examples apart; their rows by default.
        probability: that an image becomes grey, in [0, 1].

    Returns:
        Shaped like `images`.

    Raises:
        TypeError: `images` is no `[B, H, W, C]` of floats, or `ids` does not fit it.
        ValueError: C is neither 1 nor 3, or `probability` is out of range.

    >>> red = jnp.array([1.0, 0.0, 0.0]).reshape(1, 1, 1, 3)
    >>> grayscale(jax.random.key(0), red, probability=1.0).ravel().tolist()
    [0.2989, 0.2989, 0.2989]
    """
    _check_channels(images)

    def without_color(key: Array, image: Array) -> Array:
        return jnp.broadcast_to(_luma(image), image.shape)

    return per_example(sometimes(without_color, probability), key, images, ids)


def _luma(image: Array) -> Array:
    """Grey values `[H, W, 1]`."""
    if image.shape[-1] == 1:
        return image
    red, green, blue = (LUMA[i] * image[..., i : i + 1] for i in range(3))
    return red + green + blue


def _blend(key: Array, image: Array, other: Array, strength: float) -> Array:
    low, high = max(0.0, 1.0 - strength), 1.0 + strength
    factor = jax.random.uniform(key, (), minval=low, maxval=high)
    return jnp.clip(factor * image + (1.0 - factor) * other, 0.0, 1.0)


def _shift_hue(image: Array, shift: Array) -> Array:
    """Turns the colour circle; the largest and the smallest channel stay as they are.

    Channel c of a colour with hue h is top - range * clip(min(k, 4 - k), 0, 1), where
    k = (c + 6 h) mod 6 with c = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = (image[..., i : i + 1] for i in range(3))
    top = jnp.maximum(jnp.maximum(red, green), blue)
    span = top - jnp.minimum(jnp.minimum(red, green), blue)
    # Channels are compared with each other, not with `top`: at a tie both sides give
    # one hue, so that it does not matter how the compiler rounds which of them.
    sector = jnp.where(green >= blue, blue - red + 2 * span, red - green + 4 * span)
    sector = jnp.where((red >= green) & (red >= blue), green - blue, sector)
    hue = sector / jnp.where(span == 0, 1.0, span) + 6 * shift
    offset = jnp.array([5.0, 3.0, 1.0])[None, None]
    k = (jnp.broadcast_to(hue, image.shape) + offset) % 6
    share = jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)
    return jnp.clip(top - span * share, 0.0, 1.0)


def _check_channels(images: ArrayLike) -> None:
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"argument 'images' has {images.shape[-1]} channels, expected 1 or 3 for a "
            "change of colour."
        )
