"""The loss in float64, masks that are permutations, and a decoder that puts back."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.nn.vit import Transformer, ViT, patchify, sincos_2d
from jaxzoo.ssl.mae import MAEDecoder, mae_loss, random_masking, unshuffle

POSITIONS = sincos_2d(4, 4, 12)
RNG = np.random.default_rng(0)
PREDICTION, PATCHES = RNG.normal(size=(2, 4, 9, 12)).astype(np.float32)
MASK = RNG.random((4, 9)) < np.array([[0.2], [0.5], [0.7], [0.9]])


def numpy_loss(prediction, patches, mask, normalize=True):
    """Section 3 and the released code, one patch at a time."""
    errors = []
    for b, n in zip(*np.nonzero(mask), strict=True):
        target = patches[b, n].astype(np.float64)
        if normalize:
            variance = ((target - target.mean()) ** 2).sum() / (len(target) - 1)
            target = (target - target.mean()) / np.sqrt(variance + 1e-6)
        errors.append(np.mean((prediction[b, n] - target) ** 2))
    return np.mean(errors)


def test_loss_in_float64():
    for normalize in (True, False):
        value, _ = mae_loss(PREDICTION, PATCHES, MASK, normalize=normalize)
        expected = numpy_loss(PREDICTION, PATCHES, MASK, normalize)
        assert_allclose(value, expected, rtol=1e-5)
    # Examples with more hidden patches weigh more: no mean of means.
    _, aux = mae_loss(PREDICTION, PATCHES, MASK)
    rows = [slice(b, b + 1) for b in range(4)]
    means = [numpy_loss(PREDICTION[r], PATCHES[r], MASK[r]) for r in rows]
    assert_allclose(aux["per_example"], means, rtol=1e-5)
    assert abs(np.mean(means) - numpy_loss(PREDICTION, PATCHES, MASK)) > 1e-3


def test_visible_patches_have_no_part_and_the_variance_has_n_minus_1():
    spoilt = np.where(MASK[:, :, None], PREDICTION, np.inf)
    value, gradient = jax.value_and_grad(lambda p: mae_loss(p, PATCHES, MASK)[0])(
        jnp.asarray(spoilt)
    )
    assert_allclose(value, mae_loss(PREDICTION, PATCHES, MASK)[0])
    assert np.all(np.asarray(gradient)[~MASK] == 0) and np.all(np.isfinite(gradient))
    everything = mae_loss(PREDICTION, PATCHES, np.ones_like(MASK))[0]
    assert abs(everything - value) > 1e-3
    biased = (PATCHES - PATCHES.mean(-1, keepdims=True)) / PATCHES.std(
        -1, keepdims=True
    )
    zero = np.zeros_like(PATCHES)
    value, _ = mae_loss(zero, PATCHES, MASK)
    assert_allclose(value, 11 / 12, rtol=1e-4)  # sum of squares p - 1, over p
    assert abs(np.mean(biased**2) - value) > 0.05


def test_normalised_targets_do_not_see_contrast_and_brightness():
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2.0, size=(4, 9, 1)).astype(np.float32)
    shift = rng.normal(size=(4, 9, 1)).astype(np.float32)
    other = PATCHES * scale + shift
    expected, _ = mae_loss(PREDICTION, PATCHES, MASK)
    assert_allclose(mae_loss(PREDICTION, other, MASK)[0], expected, rtol=1e-4)
    raw = [mae_loss(PREDICTION, p, MASK, normalize=False)[0] for p in (PATCHES, other)]
    assert abs(raw[0] - raw[1]) > 0.1
    flat = jnp.ones_like(PATCHES)
    value, gradient = jax.value_and_grad(
        lambda p: mae_loss(jnp.zeros_like(p), p, MASK)[0]
    )(flat)
    assert value == 0 and np.all(np.isfinite(gradient))


def test_masking_is_an_exact_permutation():
    x = jnp.arange(6 * 49.0).reshape(6, 49, 1)
    masked = random_masking(jax.random.key(0), x)
    assert masked.visible.shape == (6, 12, 1)
    ids = np.asarray(masked.ids_restore)
    assert np.array_equal(np.sort(ids, axis=1), np.tile(np.arange(49), (6, 1)))
    assert np.array_equal(masked.mask.sum(1), np.full(6, 37))
    # Visible tokens return to their own places, the mask token to all others.
    whole = np.asarray(unshuffle(masked.visible, jnp.array([-1.0]), masked.ids_restore))
    assert np.array_equal(whole, np.where(masked.mask[:, :, None], -1.0, x))
    kept = np.take_along_axis(np.asarray(x), np.asarray(masked.ids_keep)[..., None], 1)
    assert np.array_equal(kept, masked.visible)
    assert len({tuple(row) for row in ids}) == 6, "one mask for all examples"


@pytest.mark.parametrize(
    ("count", "ratio", "keep"),
    [(16, 0.75, 4), (49, 0.75, 12), (10, 0.9, 1), (7, 0.0, 7), (196, 0.6, 78)],
)
def test_how_many_are_kept(count, ratio, keep):
    x = jnp.ones((2, count, 1))
    masked = random_masking(jax.random.key(0), x, ratio=ratio)
    assert masked.visible.shape[1] == keep


def test_every_token_is_hidden_equally_often():
    masked = random_masking(jax.random.key(3), jnp.ones((4000, 8, 1)))
    # Standard error of a frequency: sqrt(.75 * .25 / 4000) = 0.0068.
    assert np.abs(masked.mask.mean(0) - 0.75).max() < 0.028


@functools.cache
def model() -> Any:
    """A tiny encoder and decoder, and what the one makes of two images."""
    vit: Any = ViT(patch=2, width=8, depth=1, heads=2)
    decoder: Any = MAEDecoder(Transformer(1, 2), 12, 4)
    images, positions = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), POSITIONS

    @jax.jit
    def build():
        params = vit.init(jax.random.key(1), images)
        tokens = vit.apply(params, images, method="embed")
        masked = random_masking(jax.random.key(2), tokens)
        codes, _ = vit.apply(params, masked.visible, method="encode")
        ids = masked.ids_restore
        return decoder.init(jax.random.key(3), codes, ids, positions), codes, masked

    return images, decoder, *build()


def test_encoder_has_a_quarter_of_the_tokens_and_the_decoder_all():
    images, decoder, weights, codes, masked = model()
    assert codes.shape == (2, 1 + 4, 8)
    prediction = decoder.apply(weights, codes, masked.ids_restore, POSITIONS)
    assert prediction.shape == patchify(images, 2).shape == (2, 16, 4)
    value, _ = mae_loss(prediction, patchify(images, 2), masked.mask)
    assert np.isfinite(value)


def test_decoder_puts_codes_back_and_hidden_patches_differ_by_position_alone():
    _, decoder, weights, codes, masked = model()
    probe = decoder.clone(body=Tell())
    _, told = probe.apply(
        weights, codes, masked.ids_restore, POSITIONS, mutable="intermediates"
    )
    (x,) = told["intermediates"]["body"]["tokens"]
    p = weights["params"]
    embedded = codes @ p["embed"]["kernel"] + p["embed"]["bias"][None, None]
    assert_allclose(x[:, 0], embedded[:, 0], atol=1e-6)  # CLS has no position
    bare = np.asarray(x[:, 1:] - POSITIONS[None])
    for b in range(2):
        assert_allclose(bare[b][masked.ids_keep[b]], embedded[b, 1:], atol=1e-5)
        hidden = bare[b][np.asarray(masked.mask[b])]
        assert_allclose(hidden, np.tile(p["mask"], (12, 1)), atol=1e-5)


class Tell(nn.Module):
    """Stands for the decoder's body; tells what came in."""

    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "tokens", x)
        return x, []


def test_bfloat16_decoder_keeps_float32_parameters_and_output():
    _, decoder, weights, codes, masked = model()
    inputs = (codes, masked.ids_restore, POSITIONS)
    coarse = decoder.clone(dtype=jnp.bfloat16)
    own = jax.eval_shape(coarse.init, jax.random.key(0), *inputs)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(own))
    rough, fine = coarse.apply(weights, *inputs), decoder.apply(weights, *inputs)
    assert rough.dtype == jnp.float32 and not np.array_equal(rough, fine)
    assert_allclose(rough, fine, atol=0.1)


def test_nothing_hidden_or_everything_masked_is_zero():
    for kwargs in ({}, {"where": jnp.zeros(4, bool)}):
        mask = jnp.asarray(MASK) if kwargs else jnp.zeros((4, 9), bool)
        value, gradient = jax.value_and_grad(
            lambda p, mask=mask, kwargs=kwargs: mae_loss(p, PATCHES, mask, **kwargs)[0]
        )(jnp.full_like(PREDICTION, jnp.nan) if kwargs else jnp.asarray(PREDICTION))
        assert value == 0 and np.all(np.asarray(gradient) == 0)


def test_a_batch_of_one_and_bfloat16():
    one = mae_loss(PREDICTION[:1], PATCHES[:1], MASK[:1])[0]
    assert_allclose(one, numpy_loss(PREDICTION[:1], PATCHES[:1], MASK[:1]), rtol=1e-5)
    prediction, patches = (jnp.asarray(a, jnp.bfloat16) for a in (PREDICTION, PATCHES))
    value, _ = mae_loss(prediction, patches, MASK)
    assert value.dtype == jnp.float32
    exact = [np.asarray(a, np.float32) for a in (prediction, patches)]
    assert_allclose(value, numpy_loss(exact[0], exact[1], MASK), rtol=1e-5)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"'patches' is float32\[4,9,11\]"):
        mae_loss(PREDICTION, PATCHES[:, :, :11], MASK)
    with pytest.raises(TypeError, match=r"'patches' is float32\[3,9,12\]"):
        mae_loss(PREDICTION, PATCHES[:3], MASK)
    with pytest.raises(TypeError, match=r"'mask' is bool\[4,8\]"):
        mae_loss(PREDICTION, PATCHES, MASK[:, :8])
    with pytest.raises(TypeError, match=r"'where' is bool\[3\]"):
        mae_loss(PREDICTION, PATCHES, MASK, where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="'patches' has patches of 1 number"):
        mae_loss(PREDICTION[..., :1], PATCHES[..., :1], MASK)
    with pytest.raises(ValueError, match="'eps' is 0"):
        mae_loss(PREDICTION, PATCHES, MASK, eps=0.0)
    with pytest.raises(ValueError, match="'axis_name' is 'rows'"):
        mae_loss(PREDICTION, PATCHES, MASK, axis_name="rows")
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'ratio' is 0.9, expected .* of 4 tokens"):
        random_masking(key, jnp.ones((2, 4, 1)), ratio=0.9)
    with pytest.raises(ValueError, match="'ratio' is 1.5"):
        random_masking(key, jnp.ones((2, 4, 1)), ratio=1.5)
    with pytest.raises(ValueError, match="'visible' has 4 tokens, expected at most"):
        unshuffle(jnp.ones((1, 4, 2)), jnp.ones(2), jnp.zeros((1, 3), int))
