"""LeanVAE's wavelets, blocks, bottleneck and loss against float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import erf

from jaxzoo.vae.leanvae import (
    NAF,
    CompressedSensing,
    LeanVAE,
    haar3d,
    ihaar3d,
    leanvae_loss,
)

SMALL = LeanVAE(
    latents=3, low=2, high=4, separate=1, fused=1, iterations=1, recovery=1,
    patch=(1, 2, 2), channels=2,
)  # fmt: skip


def bands(x: Any, axes: tuple[int, ...]) -> Any:
    """Band by band and axis by axis, along axes of `[B, (n,) H, W, C]`."""
    out = []
    for kind in np.ndindex(*(2,) * len(axes)):
        band = x
        for axis, high in zip(axes, kind, strict=True):
            a, b = (np.take(band, range(i, band.shape[axis], 2), axis) for i in (0, 1))
            band = a - b if high else a + b
        out.append(band)
    return np.concatenate(out, axis=-1)


def filled(params: Any, seed: int) -> Any:
    """Random numbers in the place of parameters, so that none is 0 or 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: 0.3 * rng.normal(size=a.shape) + 0.1, params)


def naf(p: Any, x: Any, layers: int, residual: bool) -> Any:
    """One place at a time, from what lies around it now and in two frames before."""
    for i in range(layers):
        taps, mixed = p[f"Conv_{i}"]["kernel"][:, :, :, 0], np.zeros_like(x)
        padded = np.pad(x, ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)))
        for t, row, column in np.ndindex(*x.shape[1:4]):
            cube = padded[:, t : t + 3, row : row + 3, column : column + 3]
            mixed[:, t, row, column] = np.sum(cube * taps, axis=(1, 2, 3))
        mixed += p[f"Conv_{i}"]["bias"]
        x = x + mixed if residual else mixed
        norm, (up, down) = p[f"LayerNorm_{i}"], (2 * i, 2 * i + 1)
        h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        h = (h * norm["scale"] + norm["bias"]) @ p[f"Dense_{up}"]["kernel"]
        h, gate = np.split(h, 2, axis=-1)
        h = 0.5 * gate * (1.0 + erf(gate / np.sqrt(2.0))) * h
        h = h @ p[f"Dense_{down}"]["kernel"]
        x = x + h if residual else h
    return x


def test_wavelets_are_sums_and_differences_and_come_back():
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 6, 3))
    first, rest = haar3d(x)
    assert_allclose(first, bands(x[:, 0], (2, 1)), atol=1e-5)
    assert_allclose(rest, bands(x[:, 1:], (1, 2, 3)), atol=1e-5)
    assert_allclose(ihaar3d(first, rest), x, atol=1e-5)
    assert_allclose(ihaar3d(*haar3d(x[:, :1])), x[:, :1], atol=1e-5)


def test_a_still_video_has_no_high_bands():
    first, rest = haar3d(np.full((1, 3, 2, 2, 1), 3.0))
    assert first.tolist() == [[[[12.0, 0.0, 0.0, 0.0]]]]
    assert np.asarray(rest).ravel().tolist() == [24.0] + 7 * [0.0]


@pytest.mark.parametrize("residual", [True, False])
def test_blocks_are_those_of_the_released_code(residual):
    x = np.random.default_rng(1).normal(size=(2, 4, 3, 2, 3))
    block = NAF(2, residual)
    shapes: Any = jax.eval_shape(block.init, jax.random.key(0), x)
    params = filled(shapes, 2)
    expected = naf(params["params"], x, 2, residual)
    assert_allclose(jax.jit(block.apply)(params, x), expected, rtol=1e-4, atol=1e-5)


def sensing(iterations: int) -> Any:
    y = np.random.default_rng(3).normal(size=(2, 2, 2, 2, 2))
    block = CompressedSensing(5, 2, iterations, 1)

    def recover(params: Any, y: Any) -> Any:
        return block.apply(params, y, method="recover")

    def init(y: Any) -> Any:
        return block.init(jax.random.key(0), y, method="recover")

    return y, filled(jax.eval_shape(init, y), 4), jax.jit(recover)


def test_recovery_is_unrolled_ista():
    y, params, recover = sensing(2)
    p = params["params"]
    p["thresholds"] = np.array([0.3, 0.01])
    x = y @ p["q"].T
    for i in range(2):
        r = x - p["step_sizes"][i] * (x @ p["phi"].T - y) @ p["phi"]
        codes = naf(p[f"forward_{i}"], r, 1, False)
        codes = np.sign(codes) * np.maximum(np.abs(codes) - p["thresholds"][i], 0.0)
        x = r + naf(p[f"backward_{i}"], codes, 1, False)
    assert_allclose(recover(params, y), x, rtol=1e-4, atol=1e-4)


def test_the_gradient_step_alone_explains_the_measurements():
    """With orthonormal rows of Phi a step of 1 ends where Phi p = y."""
    y, params, recover = sensing(1)
    p = params["params"]
    p["phi"] = np.linalg.qr(p["phi"].T)[0].T
    p["step_sizes"], p["thresholds"] = np.ones(1), np.array([1e6])
    p["backward_0"]["Conv_0"]["bias"] = np.zeros(5)
    p["backward_0"]["LayerNorm_0"]["bias"] = np.zeros(5)
    assert_allclose(recover(params, y) @ p["phi"].T, y, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    video = np.random.default_rng(5).normal(size=(1, 5, 8, 4, 2)).astype(np.float32)
    noise = np.zeros((1, 3, 2, 1, 3), np.float32)
    params = filled(jax.eval_shape(SMALL.init, jax.random.key(0), video, noise), 6)
    return video, noise, params, jax.jit(SMALL.apply)


def test_the_latent_is_measured_and_sees_no_later_frame(model):
    video, noise, params, apply = model
    made, mean, log_variance = apply(params, video, noise)
    assert made.shape == video.shape and mean.shape == log_variance.shape == noise.shape
    later = video.copy()
    later[:, 3:] += 1.0
    other, moved, _ = apply(params, later, noise)
    assert_allclose(moved[:, :2], mean[:, :2], rtol=1e-4, atol=1e-4)
    assert_allclose(other[:, :3], made[:, :3], rtol=1e-3, atol=1e-3)
    assert np.abs(moved[:, 2] - mean[:, 2]).max() > 1e-3


def test_every_part_learns(model):
    video, noise, params, _ = model

    def loss(params: Any) -> Any:
        out: Any = SMALL.apply(params, video, noise + 0.1)
        return leanvae_loss(video, *out, kl_weight=1e-3)[0]

    gradient = jax.jit(jax.grad(loss))(jax.tree.map(jnp.float32, params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.any(np.asarray(leaf) != 0), jax.tree_util.keystr(path)


def test_the_loss_is_that_of_the_released_code():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(2, 3, 5, 4, 4, 2))
    m, v = rng.normal(size=(2, 3, 2, 2, 3))
    loss, aux = leanvae_loss(x, y, m, v, low_weight=0.3, high_weight=0.7, kl_weight=0.1)
    first = np.abs(bands(x[:, 0], (2, 1)) - bands(y[:, 0], (2, 1)))
    rest = np.abs(bands(x[:, 1:], (1, 2, 3)) - bands(y[:, 1:], (1, 2, 3)))
    expected = np.abs(x - y).mean()
    expected += 0.3 * (first[..., :2].mean() + rest[..., :2].mean())
    expected += 0.7 * (first[..., 2:].mean() + rest[..., 2:].mean())
    kl = 0.5 * np.sum(m**2 + np.exp(v) - 1.0 - v, axis=(1, 2, 3))
    assert_allclose(loss, expected + 0.1 * kl.mean(), rtol=1e-5)
    assert_allclose(aux["kl"], kl, rtol=1e-5)
    assert_allclose(aux["per_example"].mean(), loss, rtol=1e-6)


def test_bad_input_is_named():
    x, z = jnp.zeros((1, 3, 2, 2, 1)), jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="'kl_weight' is -1.0"):
        leanvae_loss(x, x, z, z, kl_weight=-1.0)
    with pytest.raises(ValueError, match=r"'len\(video\[0\]\)' is 1"):
        leanvae_loss(x[:, :1], x[:, :1], z, z)
    with pytest.raises(ValueError, match="'video'"):
        haar3d(x[:, :2])
    with pytest.raises(ValueError, match="'rest'"):
        ihaar3d(jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 1, 2, 2, 4)))
    with pytest.raises(TypeError, match="'reconstruction'"):
        leanvae_loss(x, x[:, :, :, :1], z, z)
