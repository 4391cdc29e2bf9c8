"""The transformer against NumPy, and what a masked encoder relies on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from numpy.testing import assert_allclose

from jaxzoo.nn.vit import Block, Transformer, ViT, patchify, sincos_2d, unpatchify

VIT: Any = ViT(patch=2, width=8, depth=2, heads=2)
IMAGES = jax.random.normal(jax.random.key(1), (3, 4, 6, 2))
PARAMS = jax.jit(VIT.init)(jax.random.key(0), IMAGES)


def test_patches_are_cut_row_by_row_and_put_together_again():
    patches = np.asarray(patchify(IMAGES, 2))
    assert patches.shape == (3, 6, 8)
    for n in range(6):
        row, column = divmod(n, 3)
        window = IMAGES[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert np.array_equal(patches[:, n], window.reshape(3, -1))
    assert np.array_equal(unpatchify(jnp.asarray(patches), (4, 6, 2), 2), IMAGES)
    with pytest.raises(ValueError, match="'patch' is 4, expected a divisor.* 4 .* 6"):
        patchify(IMAGES, 4)


def test_positions_by_the_formula():
    table = sincos_2d(3, 5, 8)
    for row in range(3):
        for column in range(5):
            angles = [[p * 10000 ** (-i / 2) for i in range(2)] for p in (column, row)]
            expected = [wave(a) for a in angles for wave in (np.sin, np.cos)]
            assert_allclose(
                table[5 * row + column], np.concatenate(expected), atol=1e-6
            )
    with pytest.raises(ValueError, match="'width' is 6"):
        sincos_2d(2, 2, 6)


def numpy_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return centred / scale * p["scale"] + p["bias"]


def numpy_block(x, p, heads):
    """Pre-norm block of one example [T, D] in float64."""

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    q, k, v = np.split(
        dense(numpy_norm(x, p["norm_1"]), p["attention"]["qkv"]), 3, axis=1
    )
    mixed = []
    for q_h, k_h, v_h in zip(
        *(np.split(a, heads, axis=1) for a in (q, k, v)), strict=True
    ):
        weights = scipy.special.softmax(q_h @ k_h.T / np.sqrt(q_h.shape[1]), axis=1)
        mixed.append(weights @ v_h)
    x = x + dense(np.concatenate(mixed, axis=1), p["attention"]["out"])
    hidden = dense(numpy_norm(x, p["norm_2"]), p["up"])
    gelu = 0.5 * hidden * (1 + scipy.special.erf(hidden / np.sqrt(2)))
    return x + dense(gelu, p["down"])


def test_the_whole_by_numpy():
    # Random biases and scales too, so that none can be forgotten.
    leaves, tree = jax.tree.flatten(PARAMS)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    params = jax.tree.unflatten(
        tree,
        [
            p + 0.3 * jax.random.normal(k, p.shape)
            for p, k in zip(leaves, keys, strict=True)
        ],
    )
    out, blocks = VIT.apply(params, IMAGES)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)["params"]
    patches = np.asarray(patchify(IMAGES, 2), np.float64)[0]
    x = patches @ p["patches"]["kernel"] + p["patches"]["bias"] + sincos_2d(2, 3, 8)
    x = np.concatenate([p["cls"][None], x])
    for i in range(2):
        block = jax.tree.map(lambda a, i=i: a[i], p["body"]["blocks"])
        x = numpy_block(x, block, heads=2)
        assert_allclose(blocks[i][0], x, rtol=1e-4, atol=1e-4)
    assert_allclose(out[0], numpy_norm(x, p["body"]["norm"]), rtol=1e-4, atol=1e-4)


def test_the_encoder_takes_any_subset_in_any_order():
    tokens = VIT.apply(PARAMS, IMAGES, method="embed")
    out, _ = VIT.apply(PARAMS, tokens, method="encode")
    assert tokens.shape == (3, 6, 8) and out.shape == (3, 7, 8)
    order = np.array([4, 0, 5, 1, 3, 2])
    shuffled, _ = VIT.apply(PARAMS, tokens[:, order], method="encode")
    assert_allclose(shuffled[:, 0], out[:, 0], atol=1e-5)
    assert_allclose(shuffled[:, 1:], out[:, 1:][:, order], atol=1e-5)
    # Without positions the images' own order would not matter either.
    moved, _ = VIT.apply(PARAMS, IMAGES[:, ::-1])
    assert np.abs(moved[:, 0] - out[:, 0]).max() > 1e-3
    part, blocks = VIT.apply(PARAMS, tokens[:, :2], method="encode")
    assert part.shape == (3, 3, 8) and blocks.shape == (2, 3, 3, 8)


def test_variants_have_the_parameters_they_say():
    plain = VIT.clone(cls_token=False, positions="learned")
    params = plain.init(jax.random.key(0), IMAGES)["params"]
    assert "cls" not in params and params["positions"].shape == (6, 8)
    assert plain.apply({"params": params}, IMAGES)[0].shape == (3, 6, 8)
    assert set(PARAMS["params"]) == {"cls", "patches", "body"}
    with pytest.raises(ValueError, match="'heads' is 3, expected a divisor of 8"):
        Block(3).init(jax.random.key(0), jnp.ones((1, 2, 8)))


def test_all_leading_axes_are_batch_and_abstract_init_agrees():
    images = IMAGES[None].repeat(2, 0)
    out, _ = VIT.apply(PARAMS, images)
    assert_allclose(out[1], VIT.apply(PARAMS, IMAGES)[0], atol=1e-5)
    abstract = jax.eval_shape(VIT.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, PARAMS) == jax.tree.map(jnp.shape, abstract)


def test_bfloat16_computes_with_float32_parameters():
    coarse = VIT.clone(dtype=jnp.bfloat16)
    params = coarse.init(jax.random.key(0), IMAGES)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    fine, rough = VIT.apply(PARAMS, IMAGES)[0], coarse.apply(PARAMS, IMAGES)[0]
    assert rough.dtype == jnp.float32 and not np.array_equal(fine, rough)
    assert_allclose(fine, rough, atol=0.1)


def test_a_gradient_step_lowers_a_loss_and_reaches_every_parameter():
    def loss(params):
        return jnp.mean((VIT.apply(params, IMAGES)[0] - IMAGES.mean()) ** 2)

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    before, gradient = value_and_grad(PARAMS)
    step = jax.tree.map(lambda g: -0.05 * g, gradient)
    assert value_and_grad(optax.apply_updates(PARAMS, step))[0] < before
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradient))


def test_blocks_start_from_different_weights():
    kernel = PARAMS["params"]["body"]["blocks"]["up"]["kernel"]
    assert kernel.shape == (2, 8, 32) and not np.array_equal(kernel[0], kernel[1])
    body: Any = Transformer(3, 2)
    (_, after_each), _ = body.init_with_output(jax.random.key(0), IMAGES)
    assert after_each.shape == (3, *IMAGES.shape)
