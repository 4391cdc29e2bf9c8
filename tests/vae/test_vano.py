"""The objective against densities of Gaussian vectors, and grids against each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import norm

from jaxzoo.vae.vano import (
    VanoDecoder,
    VanoEncoder,
    cameron_martin,
    trapezoid_weights,
    vano_loss,
)

KINDS = ("linear", "nomad", "hyper")


def test_trapezoid_weights_are_numpys_rule():
    grid = np.sort(np.random.default_rng(0).uniform(size=30))
    f = np.cos(3 * grid)
    w = trapezoid_weights(jnp.asarray(grid, jnp.float32))
    assert_allclose(np.asarray(w) @ f, np.trapezoid(f, grid), rtol=1e-5)
    with pytest.raises(ValueError, match="is 1, expected a number >= 2"):
        trapezoid_weights(jnp.zeros(1))


def test_the_likelihood_is_a_ratio_of_gaussian_densities():
    """White noise on a grid of cells of size w has variance 1 / w at each point."""
    rng = np.random.default_rng(1)
    w = rng.uniform(0.1, 0.5, size=6)
    u, prediction = rng.normal(size=(2, 4, 6))
    std = w**-0.5
    expected = norm.logpdf(u, prediction, std) - norm.logpdf(u, 0.0, std)
    expected = expected.sum(axis=1)
    arrays: Any = [jnp.asarray(x, jnp.float32) for x in (prediction, u, w)]
    assert_allclose(cameron_martin(*arrays), expected, rtol=1e-5, atol=1e-6)
    # For D the gradient is that of the squared distance.
    slope = jax.grad(lambda d: jnp.sum(cameron_martin(d, *arrays[1:])))(arrays[0])
    assert_allclose(slope, w[None] * (u - prediction), rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_exact_expectation_of_a_linear_decoder():
    """E over q of <Bz, u> - ||Bz||^2 / 2 in closed form, within 4 standard errors."""
    rng = np.random.default_rng(2)
    b, w = rng.normal(size=(5, 2)), rng.uniform(0.1, 0.5, size=5)
    mean, log_std = rng.normal(size=(3, 2)), 0.3 * rng.normal(size=(3, 2))
    u = rng.normal(size=(3, 5))
    std = np.exp(log_std)
    gram = b.T @ (w[:, None] * b)
    square = np.einsum("bi,ij,bj->b", mean, gram, mean) + std**2 @ np.diag(gram)
    likelihood = (mean @ b.T * u) @ w - 0.5 * square
    kl = 0.5 * (std**2 + mean**2 - 1 - 2 * log_std).sum(axis=1)
    arrays: Any = [jnp.asarray(x, jnp.float32) for x in (mean, log_std, u, w)]

    def decode(z):
        return z @ jnp.asarray(b.T, jnp.float32)

    def one(key):
        return vano_loss(key, decode, *arrays, num_samples=500, beta=0.3)[1]

    draws = jax.lax.map(one, jax.random.split(jax.random.key(0), 60))
    got = np.asarray(draws["likelihood"], np.float64)
    error = got.std(axis=0, ddof=1) / 60**0.5
    assert np.all(np.abs(got.mean(axis=0) - likelihood) < 4 * error)
    assert np.all(error < 0.05)
    assert_allclose(draws["kl"][0], kl, rtol=1e-5)
    assert_allclose(
        draws["per_example"], draws["likelihood"] - 0.3 * draws["kl"], rtol=1e-4
    )


def test_the_optimum_is_probabilistic_pca_with_noise_of_variance_beta():
    """Descent on a linear decoder and encoder of two modes."""
    w = jnp.full(8, 1 / 8)
    y = (jnp.arange(8) + 0.5) / 8
    modes = 2**0.5 * jnp.sin(2 * jnp.pi * y[:, None] * jnp.arange(1, 3)[None])
    spread, beta = jnp.array([1.0, 0.5]), 0.1

    def loss(params, key):
        keys = jax.random.split(key)
        u = (jax.random.normal(keys[0], (128, 2)) * spread[None]) @ modes.T
        mean = (u * w[None]) @ modes @ params["encode"]
        log_std = jnp.broadcast_to(params["log_std"][None], mean.shape)

        def decode(z):
            return z @ (modes @ params["decode"]).T

        return vano_loss(keys[1], decode, mean, log_std, u, w, beta=beta)[0]

    def step(params, inputs):
        key, rate = inputs
        slope = jax.grad(loss)(params, key)
        return jax.tree.map(lambda p, g: p - rate * g, params, slope), None

    start = {
        "decode": jnp.array([[0.5, 0.1], [0.1, 0.5]]),
        "encode": 0.5 * jnp.eye(2),
        "log_std": jnp.full(2, -0.5),
    }
    keys = jax.random.split(jax.random.key(0), 1500)
    rates = jnp.linspace(0.3, 0.0, 1500)
    end = jax.jit(lambda p: jax.lax.scan(step, p, (keys, rates))[0])(start)
    expected = np.sqrt(np.array([1.0, 0.25]) - beta)
    assert_allclose(end["decode"], np.diag(expected), atol=0.02)
    # The posterior's variance is beta / lambda_i.
    assert_allclose(jnp.exp(2 * end["log_std"]), [0.1, 0.4], rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_finer_grid_gives_the_same_functions_and_the_same_loss(kind):
    encoder: Any = VanoEncoder(3, hidden=8)
    decoder: Any = VanoDecoder(3, kind=kind, hidden=8)
    z = jnp.ones((2, 3))

    def of(params, points):
        grid = jnp.linspace(0.0, 1.0, points)
        u = jnp.stack([jnp.sin(2 * jnp.pi * grid), jnp.cos(4 * jnp.pi * grid)])
        y, w = grid[:, None], trapezoid_weights(grid)
        mean, log_std = encoder.apply(params[0], u, y, w)

        def decode(z):
            return decoder.apply(params[1], z, y)

        loss, _ = vano_loss(jax.random.key(2), decode, mean, log_std, u, w)
        return mean, log_std, decode(z), loss

    @jax.jit
    def both(key):
        y = jnp.zeros((1, 1))
        params = encoder.init(key, y, y, y[0]), decoder.init(key, z, y)
        return of(params, 33), of(params, 65)

    coarse, fine = both(jax.random.key(0))
    assert_allclose(coarse[2], fine[2][:, ::2], atol=1e-5)
    for a, b in zip(coarse, fine, strict=True):
        if a.shape == b.shape:
            assert_allclose(a, b, atol=2e-3)
    assert float(jnp.abs(coarse[0][0] - coarse[0][1]).max()) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_what_distinguishes_the_decoders(kind):
    """The linear one is linear in z, the others are not."""
    y = jnp.linspace(0.0, 1.0, 5)[:, None]
    z = jax.random.normal(jax.random.key(0), (2, 4, 3))
    decoder: Any = VanoDecoder(3, kind=kind, hidden=8, frequencies=0)

    @jax.jit
    def of(key):
        params = decoder.init(key, z, y)
        parts = decoder.apply(params, z, y)
        total = decoder.apply(params, z[0] + z[1], y)
        return parts, total, decoder.apply(params, z[1, 2], y[3:4])

    parts, total, alone = of(jax.random.key(1))
    assert parts.shape == (2, 4, 5)
    gap = float(jnp.abs(total - parts[0] - parts[1]).max())
    assert (gap < 1e-5) == (kind == "linear")
    assert kind == "linear" or gap > 1e-2
    # Every function by itself, and every point by itself.
    assert_allclose(alone[0], parts[1, 2, 3], rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    z, u, w = jnp.zeros((2, 1)), jnp.zeros((2, 3)), jnp.ones(3)
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="'decode' gives shape"):
        vano_loss(key, lambda z: z, z, z, u, w)
    with pytest.raises(ValueError, match="'beta' is -1"):
        vano_loss(key, lambda z: z, z, z, u, w, beta=-1.0)
    with pytest.raises(TypeError, match="argument 'weights'"):
        cameron_martin(u, u, w[:2])
    decoder: Any = VanoDecoder(1, kind="other")  # pyright: ignore
    with pytest.raises(ValueError, match="'kind' is 'other'"):
        decoder.init(key, z, u.T)
