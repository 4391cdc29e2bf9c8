"""Augmentations: against Pillow, SciPy and colorsys, and however they are split."""

import colorsys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from jaxzoo.data import augment, augment_color
from jaxzoo.data.augment import (
    compose,
    flip,
    gaussian_blur,
    gaussian_noise,
    random_resized_crop,
)
from jaxzoo.data.augment_color import color_jitter, grayscale

KEY = jax.random.key(0)
IMAGES = jax.random.uniform(jax.random.key(1), (16, 12, 10, 3))
ALL: list[Any] = [
    random_resized_crop,
    flip,
    partial(flip, vertical=True),
    color_jitter,
    partial(grayscale, probability=0.5),
    gaussian_blur,
    gaussian_noise,
    compose(random_resized_crop, flip, color_jitter, grayscale, gaussian_blur),
]
NAMES = ["crop", "flip", "vertical", "jitter", "grey", "blur", "noise", "compose"]
every = pytest.mark.parametrize("augmentation", ALL, ids=NAMES)
still: Any = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


@pytest.mark.parametrize(
    "augmentation",
    [
        partial(random_resized_crop, scale=(1.0, 1.0), ratio=(10 / 12, 10 / 12)),
        partial(flip, probability=0.0),
        partial(color_jitter, **still),
        partial(color_jitter, probability=0.0),
        partial(grayscale, probability=0.0),
        partial(gaussian_blur, sigma=(0.0, 0.0), probability=1.0),
        partial(gaussian_blur, probability=0.0),
        partial(gaussian_noise, std=0.0),
    ],
)
def test_nothing_changes_at_zero_strength(augmentation):
    assert_array_equal(augmentation(KEY, IMAGES), IMAGES)


@every
def test_range_shape_and_dtype_are_kept_and_examples_draw_for_themselves(augmentation):
    for dtype in (jnp.float32, jnp.bfloat16):
        same = jnp.broadcast_to(IMAGES[:1], IMAGES.shape).astype(dtype)
        out = augmentation(KEY, same)
        assert out.shape == IMAGES.shape and out.dtype == dtype
        values = np.asarray(out, np.float32)
        assert values.min() >= 0 and values.max() <= 1 + 1e-6
        distinct = len({image.tobytes() for image in values})
        assert distinct > 1
    assert not np.array_equal(augmentation(jax.random.key(5), same), out)


@pytest.mark.parametrize(
    "augmentation",
    [
        partial(random_resized_crop, size=(5, 17)),
        color_jitter,
        compose(*[one for one in ALL[:-1] if one is not color_jitter]),
    ],
    ids=["crop", "jitter", "compose"],
)
def test_equal_bits_over_eight_devices_and_by_parts(augmentation):
    whole = jax.jit(augmentation)(KEY, IMAGES)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows: Any = P("data")
    spread = jax.device_put(IMAGES, NamedSharding(mesh, rows))
    assert_array_equal(jax.jit(augmentation)(KEY, spread), whole)

    def part(images, ids):
        return augmentation(KEY, images, ids=ids)

    mapped = jax.shard_map(part, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
    assert_array_equal(jax.jit(mapped)(IMAGES, jnp.arange(16)), whole)
    # As for a process that loads four of the rows, in an order of its own.
    mine = jnp.array([7, 4, 12, 9])
    assert_array_equal(jax.jit(part)(IMAGES[mine], mine), whole[mine])


def test_flips_are_flips():
    right = flip(KEY, IMAGES, probability=1.0)
    assert_array_equal(right, np.asarray(IMAGES)[:, :, ::-1])
    down = flip(KEY, IMAGES, vertical=True, probability=1.0)
    assert_array_equal(down, np.asarray(IMAGES)[:, ::-1])
    many = jnp.broadcast_to(IMAGES[:1], (4000, 12, 10, 3))
    share = np.mean(np.any(flip(KEY, many, probability=0.3) != many, (1, 2, 3)))
    assert abs(share - 0.3) < 4 * (0.21 / 4000) ** 0.5


@pytest.mark.parametrize("size", [None, (7, 5), (30, 23)])
def test_a_crop_is_pillows(size, monkeypatch):
    boxes = []

    def remember(*args):
        box = real(*args)
        jax.debug.callback(lambda *b: boxes.append([int(x) for x in b]), *box)
        return box

    real = augment._box
    monkeypatch.setattr(augment, "_box", remember)
    one = IMAGES[:1]
    crop = jax.jit(partial(random_resized_crop, size=size, scale=(0.1, 1.0)))
    for seed in range(6):
        out = crop(jax.random.key(seed), one)
        jax.effects_barrier()
        top, height, left, width = boxes.pop()
        cut = np.asarray(one)[0, top : top + height, left : left + width]
        height, width = size or (12, 10)
        for channel in range(3):
            image = Image.fromarray(cut[..., channel])
            resized = image.resize((width, height), Image.Resampling.BILINEAR)
            assert_allclose(out[0, ..., channel], np.asarray(resized), atol=2e-6)


def test_boxes_have_the_asked_shares_and_ratios():
    keys = jax.random.split(KEY, 4000)
    draw = partial(
        augment._box, height=200, width=200, scale=(0.1, 0.4), ratio=(0.5, 2.0)
    )
    top, height, left, width = np.asarray(jax.jit(jax.vmap(draw))(keys))
    area, ratio = height * width / 200**2, width / height
    assert area.min() > 0.09 and area.max() < 0.41
    assert abs(area.mean() - 0.25) < 0.01 and abs(area.std() - 0.3 / 12**0.5) < 0.01
    assert ratio.min() > 0.49 and ratio.max() < 2.03
    assert abs(np.log(ratio).mean()) < 4 * np.log(ratio).std() / 4000**0.5
    assert top.min() >= 0 and (top + height).max() <= 200
    assert left.min() >= 0 and (left + width).max() <= 200
    # The place is uniform over what is free.
    free = (200 - width) > 20
    place = left[free] / (200 - width[free])
    assert abs(place.mean() - 0.5) < 0.03 and abs(place.std() - 12**-0.5) < 0.03


def test_a_crop_that_cannot_fit_is_the_largest_in_the_centre():
    strip = jnp.linspace(0, 1, 40).reshape(1, 1, 40, 1)  # no box of 1:1 has its area
    out = random_resized_crop(KEY, strip, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert_allclose(out, jnp.full_like(strip, strip[0, 0, 19, 0]), rtol=1e-6)


def test_colour_against_colorsys_and_by_hand():
    pixels = np.asarray(IMAGES[0].reshape(-1, 3), np.float64)
    for shift in (-0.4, 0.1, 0.5):
        got = augment_color._shift_hue(IMAGES[0], jnp.float32(shift)).reshape(-1, 3)
        hsv = [colorsys.rgb_to_hsv(*p) for p in pixels]
        expected = [colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in hsv]
        assert_allclose(got, expected, atol=2e-6)
    one = {**still, "brightness": 0.5}
    bright = color_jitter(KEY, IMAGES * 0.5, **one) / (IMAGES * 0.5)
    assert_allclose(np.ptp(np.asarray(bright), axis=(1, 2, 3)), 0, atol=1e-5)
    factors = np.asarray(bright)[:, 0, 0, 0]
    assert factors.min() >= 0.5 and factors.max() <= 1.5 and factors.std() > 0.1
    # Contrast keeps the mean grey value, saturation every pixel's.
    calm = 0.4 + 0.2 * IMAGES
    luma = jnp.array(augment_color.LUMA)
    for name, axes in (("contrast", (1, 2)), ("saturation", ())):
        out = color_jitter(KEY, calm, **{**still, name: 0.5})
        assert np.abs(out - calm).max() > 0.01
        assert_allclose((out @ luma).mean(axes), (calm @ luma).mean(axes), atol=1e-4)
    assert_allclose(
        grayscale(KEY, IMAGES, probability=1.0)[..., 2], IMAGES @ luma, rtol=1e-5
    )


def test_a_black_and_a_grey_image_survive_a_change_of_hue():
    flat = jnp.stack([jnp.zeros((4, 4, 3)), jnp.full((4, 4, 3), 0.3)])
    assert_allclose(color_jitter(KEY, flat, **{**still, "hue": 0.5}), flat, atol=1e-6)
    one_channel = IMAGES[..., :1]
    unchanged = color_jitter(
        KEY, one_channel, **{**still, "saturation": 1.0, "hue": 0.5}
    )
    assert_array_equal(unchanged, one_channel)


def test_blur_is_scipys_with_weights_scaled_at_the_border():
    out = gaussian_blur(KEY, IMAGES, sigma=(1.5, 1.5), probability=1.0)
    smooth = partial(
        scipy.ndimage.gaussian_filter, sigma=1.5, mode="constant", truncate=20
    )
    inside = smooth(np.ones((12, 10)))
    image = np.asarray(IMAGES[3, ..., 1], np.float64)
    assert_allclose(out[3, ..., 1], smooth(image) / inside, rtol=1e-5)


def test_noise_has_the_asked_spread():
    grey = jnp.full((4, 64, 64, 3), 0.5)
    noisy = np.asarray(gaussian_noise(KEY, grey, std=0.05), np.float64) - 0.5
    assert abs(noisy.std() - 0.05) < 4 * 0.05 / (2 * noisy.size) ** 0.5
    assert abs(noisy.mean()) < 4 * 0.05 / noisy.size**0.5


@every
def test_bad_images_and_ids_are_named(augmentation):
    with pytest.raises(TypeError, match=r"'images' is float32\[12,10,3\], expected"):
        augmentation(KEY, IMAGES[0])
    with pytest.raises(TypeError, match="'images' is uint8"):
        augmentation(KEY, jnp.zeros((2, 4, 4, 3), jnp.uint8))
    with pytest.raises(TypeError, match=r"'ids' is int32\[3\], expected.*b=16"):
        augmentation(KEY, IMAGES, ids=jnp.arange(3))


def test_bad_strengths_are_named():
    bad: list[tuple[Any, str]] = [
        (partial(random_resized_crop, scale=(0.0, 1.0)), "'scale' is 0.0"),
        (partial(random_resized_crop, ratio=(2.0, 1.0)), "'ratio'.*smaller number"),
        (partial(random_resized_crop, size=(0, 4)), "'size' is 0"),
        (partial(flip, probability=1.5), "'probability' is 1.5"),
        (partial(color_jitter, contrast=-1.0), "'contrast' is -1.0"),
        (partial(color_jitter, hue=0.6), "'hue' is 0.6"),
        (partial(gaussian_blur, sigma=(-1.0, 1.0)), "'sigma' is -1.0"),
        (partial(gaussian_noise, std=float("nan")), "'std' is nan"),
    ]
    for augmentation, message in bad:
        with pytest.raises(ValueError, match=message):
            augmentation(KEY, IMAGES)
    for augmentation in (color_jitter, grayscale):
        with pytest.raises(ValueError, match="'images' has 4 channels, expected 1 or"):
            augmentation(KEY, jnp.zeros((2, 4, 4, 4)))
