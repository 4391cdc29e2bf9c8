"""Gradient origin networks against NumPy in float64, and closed forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.vae.gradient_origin_network import (
    Siren,
    gon_latent,
    gon_loss,
    variational_gon_loss,
)

LATENTS, ENTRIES = 3, 5


def problem(dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, weights and biases of F(z) = tanh(z W + b), in float64 or rounded."""
    random = np.random.default_rng(0)
    x = random.uniform(0.1, 0.9, (4, ENTRIES))
    w = random.normal(size=(LATENTS, ENTRIES))
    b = random.normal(size=ENTRIES)
    return x.astype(dtype), w.astype(dtype), 0.3 * b.astype(dtype)


def network(w, b):
    return lambda z: jnp.tanh(z @ w + b[None])


def numpy_latent(x, w, b, likelihood, step):
    """The derivative at the origin, written out."""
    output = np.tanh(b)[None]
    if likelihood == "square":
        slope = -2.0 * (x - output)
    else:
        slope = 1.0 / (1.0 + np.exp(-output)) - x
    return -step * (slope * (1.0 - output**2)) @ w.T


def numpy_loss(x, w, b, likelihood="square", step=1.0):
    z = numpy_latent(x, w, b, likelihood, step)
    output = np.tanh(z @ w + b)
    if likelihood == "square":
        return ((x - output) ** 2).sum(1)
    return (np.log1p(np.exp(output)) - x * output).sum(1)


@pytest.mark.parametrize("likelihood", ["square", "bernoulli"])
@pytest.mark.parametrize("step", [1.0, 0.3])
def test_latents_and_loss_are_those_of_the_paper(likelihood, step):
    x, w, b = problem()
    exact = problem(np.float64)
    knobs: dict[str, Any] = {"likelihood": likelihood, "step_size": step}
    z, aux = gon_latent(network(w, b), x, latents=LATENTS, **knobs)
    assert_allclose(z, numpy_latent(*exact, likelihood, step), rtol=1e-4, atol=1e-6)
    loss, found = gon_loss(network(w, b), x, latents=LATENTS, **knobs)
    expected = numpy_loss(*exact, likelihood, step)
    assert_allclose(found["per_example"], expected, rtol=1e-4)
    assert_allclose(loss, expected.mean(), rtol=1e-4)
    assert_allclose(found["z"], z)
    assert_allclose(found["origin"], aux["per_example"])
    assert_allclose(found["output"], np.tanh(z @ w + b[None]), rtol=1e-5, atol=1e-6)


def test_the_gradient_goes_through_the_step():
    """Central differences of the NumPy loss; with z held fixed it is another one."""
    x, w, b = problem(np.float64)
    step, tiny = 0.3, 1e-5
    expected = np.zeros_like(w)
    for i in np.ndindex(*w.shape):
        up, down = w.copy(), w.copy()
        up[i] += tiny
        down[i] -= tiny
        both = (numpy_loss(x, v, b, step=step).mean() for v in (up, down))
        expected[i] = np.subtract(*both) / (2 * tiny)

    def value(w):
        return gon_loss(network(w, b), x, latents=LATENTS, step_size=step)[0]

    def held(w):
        z, _ = gon_latent(network(w, b), x, latents=LATENTS, step_size=step)
        output = network(w, b)(jax.lax.stop_gradient(z))
        return jnp.mean(jnp.sum((x - output) ** 2, axis=1))

    with jax.enable_x64(True):
        start = jnp.asarray(w)
        through, fixed = (np.asarray(jax.grad(f)(start)) for f in (value, held))
    assert_allclose(through, expected, rtol=1e-6, atol=1e-8)
    assert np.abs(fixed - expected).max() > 0.1


def test_linear_network_of_orthogonal_columns_is_a_projection():
    """2 W W^T with W^T W = I / 2: no encoder, and the best reconstruction there is."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (6, 4)))
    u = np.linalg.svd(x.T)[0][:, :2].astype(np.float32)
    loss, aux = gon_loss(lambda z: z @ (u.T / 2**0.5), jnp.asarray(x), latents=2)
    left = np.linalg.svd(x)[1][2:]
    assert_allclose(aux["output"], x @ u @ u.T, atol=1e-5)
    assert_allclose(loss, (left**2).sum() / 6, rtol=1e-4)


def test_rows_do_not_see_each_other():
    x, w, b = problem()
    whole, _ = gon_latent(network(w, b), x, latents=LATENTS)
    for i in range(len(x)):
        alone, _ = gon_latent(network(w, b), x[i : i + 1], latents=LATENTS)
        assert_allclose(alone[0], whole[i], rtol=1e-5)


def test_variational_form_in_float64():
    x, w, b = problem(np.float64)
    step, beta = 0.2, 0.7
    a = np.linspace(-0.5, 0.5, LATENTS * LATENTS).reshape(LATENTS, LATENTS)
    key = jax.random.key(1)
    with jax.enable_x64(True):
        noise = np.asarray(jax.random.normal(key, (2, 4, LATENTS), jnp.float64))
        _, aux = variational_gon_loss(
            key, network(w, b), lambda z: (z @ a + 0.2, 0.5 * z - 0.1),
            jnp.asarray(x), latents=LATENTS, likelihood="square", step_size=step,
            beta=beta,
        )  # fmt: skip

    def objective(z, noise):
        mean, log_std = z @ a + 0.2, 0.5 * z - 0.1
        output = np.tanh((mean + np.exp(log_std) * noise) @ w + b)
        kl = 0.5 * (np.exp(2 * log_std) + mean**2 - 1 - 2 * log_std).sum(-1)
        return ((x - output) ** 2).sum(-1) + beta * kl, kl

    z, tiny = np.zeros((4, LATENTS)), 1e-5
    for i in range(LATENTS):
        move = tiny * np.eye(LATENTS)[i][None]
        up, down = (objective(s * move + 0.0 * z, noise[0])[0] for s in (1, -1))
        z[:, i] = -step * (up - down) / (2 * tiny)
    loss, kl = objective(z, noise[1])
    assert_allclose(aux["z"], z, rtol=1e-6, atol=1e-9)
    assert_allclose(aux["per_example"], loss, rtol=1e-6)
    assert_allclose(aux["kl"], kl, rtol=1e-6)


def test_siren_is_sines_of_points_and_code():
    siren = Siren((7, 6), 2, frequency=10.0)
    points = siren.grid(2, 3)
    assert_allclose(points[:, 0], [-0.5] * 3 + [0.5] * 3)
    assert_allclose(points[:3, 1], [-2 / 3, 0.0, 2 / 3], atol=1e-6)
    z = jax.random.normal(jax.random.key(2), (4, 3))
    params = siren.init(jax.random.key(3), points, z)
    layers: Any = params["params"]
    got: Any = siren.apply(params, points, z)
    for row in range(4):
        for i, point in enumerate(np.asarray(points, np.float64)):
            y = np.concatenate([point, np.asarray(z[row], np.float64)])
            for name in ("Dense_0", "Dense_1"):
                y = np.sin(10.0 * (y @ layers[name]["kernel"] + layers[name]["bias"]))
            y = y @ layers["Dense_2"]["kernel"] + layers["Dense_2"]["bias"]
            assert_allclose(got[row, i], y, rtol=1e-4, atol=1e-5)
    assert np.abs(layers["Dense_0"]["kernel"]).max() <= 1 / 5
    assert np.abs(layers["Dense_1"]["kernel"]).max() <= (6 / 7) ** 0.5 / 10


def test_siren_decodes_at_any_resolution():
    """Points that two grids share, 1 by 1 and 3 by 3, have the same value."""
    siren = Siren((8,), frequency=10.0)
    z = jnp.ones((2, 3))
    params = siren.init(jax.random.key(4), siren.grid(1, 1), z)
    coarse: Any = siren.apply(params, siren.grid(1, 1), z)
    fine: Any = siren.apply(params, siren.grid(3, 3), z)
    assert fine.shape == (2, 9, 1)
    assert_allclose(fine[:, 4], coarse[:, 0], rtol=1e-5)


def test_bad_arguments_are_named():
    x, w, b = problem()
    with pytest.raises(ValueError, match="'latents' is 0"):
        gon_latent(network(w, b), x, latents=0)
    with pytest.raises(ValueError, match="'step_size' is 0"):
        gon_loss(network(w, b), x, latents=LATENTS, step_size=0.0)
    with pytest.raises(ValueError, match="'beta' is -1"):
        variational_gon_loss(
            jax.random.key(0), network(w, b), lambda z: (z, z), x, latents=LATENTS,
            beta=-1.0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="'decode' returns"):
        gon_loss(lambda z: network(w, b)(z)[:, :2], x, latents=LATENTS)
