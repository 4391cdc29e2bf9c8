"""Sprites: areas, centres and turns are those that the factors say."""

import numpy as np
import pytest

from jaxzoo.data.sprites import FACTORS, SHAPES, draw_sprites, flat_sprites, sprites


def one(shape=0, scale=0.2, angle=0.0, x=0.5, y=0.5, size=64):
    image = draw_sprites([shape], [scale], [angle], [x], [y], size=size)[0]
    return image / 255.0


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_area_grows_with_the_square_of_scale(shape):
    small, large = (one(shape, scale).mean() for scale in (0.12, 0.24))
    np.testing.assert_allclose(large, 4 * small, rtol=0.02)
    # The square's is (2 scale)^2; the others' are within a third of it.
    np.testing.assert_allclose(small, 0.24**2, rtol=0.02 if shape == 0 else 0.34)


def test_the_ellipse_has_the_area_of_its_axes():
    np.testing.assert_allclose(one(1).mean(), np.pi * 1.4 * 0.8 * 0.2**2, rtol=0.01)


@pytest.mark.parametrize("shape", range(2))
def test_the_centre_is_at_x_and_y_with_y_downwards(shape):
    image = one(shape, angle=0.4, x=0.6, y=0.35)
    grid = (np.arange(64) + 0.5) / 64
    np.testing.assert_allclose((image.sum(0) @ grid) / image.sum(), 0.6, atol=2e-3)
    np.testing.assert_allclose((image.sum(1) @ grid) / image.sum(), 0.35, atol=2e-3)


def test_angles_turn_counter_clockwise():
    lying, standing = one(1), one(1, angle=np.pi / 2)
    np.testing.assert_allclose(standing, np.rot90(lying), atol=1e-6)
    # Turned by 30 degrees the ellipse goes up to the right: rows count downwards.
    image = one(1, angle=np.pi / 6)
    y, x = np.mgrid[:64, :64] - 31.5
    assert (image * x * y).sum() < 0


def test_every_combination_is_there_once_and_no_two_look_alike():
    data = sprites(size=24)
    arrays = [data.split(name).arrays for name in ("train", "test")]
    factors = np.concatenate([a["factors"] for a in arrays])
    count = int(np.prod([len(v) for v in FACTORS.values()]))
    assert len(np.unique(factors, axis=0)) == len(factors) == count == 3456
    images = np.concatenate([a["image"] for a in arrays]).reshape(count, -1)
    assert len(np.unique(images, axis=0)) == count
    edge = np.ones((24, 24), bool)
    edge[1:-1, 1:-1] = False
    assert images.reshape(-1, 24, 24)[:, edge].max() < 255  # nothing is cut off


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="size=0"):
        sprites(size=0)
    with pytest.raises(ValueError, match="shape has an entry outside 0..2"):
        draw_sprites([3], [0.2], [0.0], [0.5], [0.5])
    with pytest.raises(ValueError, match="expected one length"):
        draw_sprites([1, 1], [0.2], [0.0], [0.5], [0.5])


def test_rows_are_the_images_with_their_factors():
    x, factors = flat_sprites()
    record = sprites().split("test")[7]
    found = np.flatnonzero(np.all(factors == record["factors"][None], axis=1))
    assert len(x) == 3456 and found.tolist() == [3007]
    np.testing.assert_allclose(255.0 * x[3007], record["image"].ravel(), atol=1e-3)
    upright, others = flat_sprites(is_upright=True)
    angle = list(FACTORS).index("angle")
    chosen = factors[:, angle] == 0
    np.testing.assert_array_equal(upright, x[chosen])
    np.testing.assert_array_equal(others, factors[chosen][:, [0, 1, 3, 4]])
