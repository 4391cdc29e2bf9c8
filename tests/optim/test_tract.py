"""The update by the paper's equation in float64, and by what it does to the outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.optim.tract import tract_conv, tract_dense


def layer(rows, width=6, outputs=4, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (rows, width), (width, outputs), (outputs,), (rows, outputs)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def gradients(function, x, w, b, g, **kwargs):
    """The cotangents of x, w and b."""
    return jax.vjp(lambda x, w, b: function(x, w, b, **kwargs), x, w, b)[1](g)


def of_the_paper(x, g, lam):
    """G^T X (X^T X / b + lam I)^-1 with the paper's orientation, in float64."""
    x, g = x.astype(np.float64), g.astype(np.float64)
    inverse = np.linalg.inv(x.T @ x / len(x) + lam * np.eye(x.shape[1]))
    return (g.T @ x @ inverse).T


@pytest.mark.parametrize("rows", [1, 4, 6, 20])  # of width 6: both ways to invert
@pytest.mark.parametrize("lam", [0.01, 0.1, 3.0])
def test_the_update_by_the_paper(rows, lam):
    x, w, b, g = layer(rows)
    z = tract_dense(x, w, b, lam=lam)
    assert_allclose(z, x @ w + b, rtol=1e-5, atol=1e-5)
    dx, dw, db = gradients(tract_dense, x, w, b, g, lam=lam)
    expected = of_the_paper(x, g, lam)
    assert_allclose(dw, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    assert_allclose(db, g.sum(0), rtol=1e-5, atol=1e-5)


def test_it_is_the_least_squares_step_of_the_outputs():
    """With u = dw / B it has no slope in |x u - g|^2 + B lam |u|^2."""
    x, w, b, g = layer(20)
    u = np.asarray(gradients(tract_dense, x, w, b, g, lam=0.3)[1], np.float64) / 20
    slope = x.T @ (x @ u - g) + 20 * 0.3 * u
    assert_allclose(slope, 0, atol=1e-4)


def test_without_a_penalty_sgd_moves_the_outputs_by_their_gradient():
    x, w, b, g = layer(rows=4, width=16)
    w = np.asarray(w)
    dw = gradients(tract_dense, x, w, b, g, lam=1e-9)[1]
    moved = tract_dense(x, w - 0.1 * np.asarray(dw), b) - tract_dense(x, w, b)
    assert_allclose(moved, -0.1 * 4 * g, rtol=1e-4, atol=1e-4)
    plain = x @ (-0.1 * (x.T @ g))
    assert np.abs(plain + 0.1 * 4 * g).max() > 0.1


def test_with_a_large_penalty_it_is_the_gradient():
    x, w, b, g = layer(20)
    dw = gradients(tract_dense, x, w, b, g, lam=1e6)[1]
    assert_allclose(1e6 * np.asarray(dw), x.T @ g, rtol=1e-4, atol=1e-4)


def test_contrast_counts_once_not_twice():
    """Twice the contrast: the plain gradient moves the outputs four times as far."""
    x, w, b, g = layer(rows=4, width=16)

    def moved(x, lam):
        return x @ np.asarray(gradients(tract_dense, x, w, b, g, lam=lam)[1])

    assert_allclose(moved(2 * x, 1e-9), moved(x, 1e-9), rtol=1e-3, atol=1e-3)
    assert_allclose(moved(2 * x, 1e9), 4 * moved(x, 1e9), rtol=1e-3)


def patches(x, size, stride, same):
    """All patches `[N, H', W', rows * columns * C]` in loops."""
    rows, columns = size
    if same:
        out = [-(-n // stride) for n in x.shape[1:3]]
        pads = [
            max((o - 1) * stride + k - n, 0)
            for o, k, n in zip(out, size, x.shape[1:3], strict=True)
        ]
        widths = [(p // 2, p - p // 2) for p in pads]
        x = np.pad(x, [(0, 0), *widths, (0, 0)])
    out = [(n - k) // stride + 1 for n, k in zip(x.shape[1:3], size, strict=True)]
    starts = [[stride * i for i in range(n)] for n in out]
    return np.stack([
        np.stack([
            x[:, i : i + rows, j : j + columns].reshape(len(x), -1) for j in starts[1]
        ], 1) for i in starts[0]
    ], 1)  # fmt: skip


@pytest.mark.parametrize("stride, padding", [(1, "SAME"), (2, "SAME"), (2, "VALID")])
@pytest.mark.parametrize("images", [1, 5])
def test_a_convolution_is_a_dense_layer_of_patches(stride, padding, images):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(images, 5, 6, 2)).astype(np.float32)
    w = rng.normal(size=(3, 2, 2, 4)).astype(np.float32)
    b = rng.normal(size=4).astype(np.float32)
    flat = patches(x, (3, 2), stride, padding == "SAME")
    z = tract_conv(x, w, b, stride=stride, padding=padding, lam=0.2)
    assert_allclose(z, flat @ w.reshape(12, 4) + b, rtol=1e-4, atol=1e-4)
    g = rng.normal(size=z.shape).astype(np.float32)
    kwargs = {"stride": stride, "padding": padding, "lam": 0.2}
    dx, dw, db = gradients(tract_conv, x, w, b, g, **kwargs)
    expected = of_the_paper(flat.reshape(-1, 12), g.reshape(-1, 4), 0.2)
    assert_allclose(dw.reshape(12, 4), expected, rtol=1e-3, atol=1e-3)
    assert_allclose(db, g.sum((0, 1, 2)), rtol=1e-4, atol=1e-4)

    def plain(x):
        strides = (stride, stride)
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, jnp.asarray(w), strides, padding, dimension_numbers=names
        )

    assert_allclose(dx, jax.vjp(plain, x)[1](g)[0], rtol=1e-5, atol=1e-5)


def test_leading_axes_are_rows():
    x, w, b, g = layer(20)
    flat = gradients(tract_dense, x, w, b, g)
    deep = gradients(tract_dense, x.reshape(4, 5, 6), w, b, g.reshape(4, 5, 4))
    assert_allclose(deep[1], flat[1], rtol=1e-5, atol=1e-6)
    assert deep[0].shape == (4, 5, 6)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("size", [0.0, 1e-20, 1e10, 1e30])
def test_constant_rows_of_any_size_have_a_finite_update(rows, size):
    x, w, b, g = layer(rows)
    x = np.float32(size) * np.ones_like(x)
    dw = gradients(tract_dense, x, w, b, g, lam=1e-6)[1]
    assert np.all(np.isfinite(dw))


def test_it_trains_through_an_optimizer_and_jit():
    import optax

    x, w, b, _ = layer(20)
    target = jnp.asarray(x[:, :4] * 3.0 + 1.0)
    optimizer = optax.adam(0.1)

    @jax.jit
    def step(params, state):
        def loss(params):
            return jnp.mean(jnp.square(tract_dense(x, *params) - target))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params, losses = (jnp.asarray(w), jnp.asarray(b)), []
    state = optimizer.init(params)
    for _ in range(200):
        params, state, value = step(params, state)
        losses.append(value)
    assert losses[-1] < 0.01 * losses[0]


def test_bad_arguments_are_named():
    x, w, b, _ = layer(4)
    for lam in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="argument 'lam' is"):
            tract_dense(x, w, b, lam=lam)
    with pytest.raises(TypeError, match=r"argument 'w' is float32\[5,4\]"):
        tract_dense(x, w[:-1], b)
    with pytest.raises(ValueError, match="argument 'padding' is 'FULL'"):
        images = np.ones((1, 4, 4, 2), np.float32)
        kernel = np.ones((2, 2, 2, 4), np.float32)
        tract_conv(images, kernel, b, padding="FULL")  # pyright: ignore
