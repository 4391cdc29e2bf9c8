"""Divergence, losses and networks against float64 NumPy and SciPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import norm

from jaxzoo.vae.gmm_posterior_vae import (
    PatchDiscriminator,
    ResNetDecoder,
    ResNetEncoder,
    gmm_posterior_loss,
    mixture_kl,
    patch_discriminator_loss,
)


def codes(rows: int = 6, size: int = 3, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, size)) + 0.3, 0.5 * rng.normal(size=(rows, size)) - 1


def expected_kl(centre, variance):
    return 0.5 * np.sum(centre**2 + variance - np.log(variance) - 1)


def test_moments_are_those_of_the_mixture():
    """Against draws of the mixture, and the density's integral of its Gaussian."""
    mean, log_std = codes()
    kl, aux = mixture_kl(mean, log_std, convention="mixture")
    rng = np.random.default_rng(1)
    chosen = rng.integers(len(mean), size=200_000)
    z = mean[chosen] + np.exp(log_std[chosen]) * rng.normal(size=(200_000, 3))
    error = z.std(axis=0) / 200_000**0.5
    assert np.all(np.abs(z.mean(axis=0) - aux["mean"]) < 5 * error)
    assert_allclose(aux["variance"], z.var(axis=0), rtol=0.02)
    centre, variance = mean.mean(axis=0), np.exp(2 * log_std).mean(axis=0)
    variance += mean.var(axis=0)
    assert_allclose(aux["mean"], centre, rtol=1e-5)
    assert_allclose(aux["variance"], variance, rtol=1e-5)
    assert_allclose(kl, expected_kl(centre, variance), rtol=1e-5)
    draws = centre + variance**0.5 * rng.normal(size=(200_000, 3))
    ratio = norm.logpdf(draws, centre, variance**0.5) - norm.logpdf(draws)
    ratio = ratio.sum(axis=1)
    assert abs(ratio.mean() - kl) < 5 * ratio.std() / 200_000**0.5


def test_the_released_convention_has_the_variance_of_means():
    mean, log_std = codes(seed=1)
    kl, aux = mixture_kl(mean, log_std)
    assert_allclose(aux["variance"], mean.var(axis=0), rtol=1e-5)
    assert_allclose(kl, expected_kl(mean.mean(axis=0), mean.var(axis=0)), rtol=1e-4)
    moved = mixture_kl(mean, log_std + 1.0)[0]
    assert moved == kl


def test_the_divergence_leaves_each_posterior_free():
    """Codes far apart, which the sum of their own KLs would not leave there."""
    rng = np.random.default_rng(2)
    sign = np.where(np.arange(1000)[:, None] % 2, 1.0, -1.0)
    mean = sign * 0.8**0.5
    log_std = np.full_like(mean, np.log(0.2**0.5))
    kl, _ = mixture_kl(mean, log_std, convention="mixture")
    each = 0.5 * np.mean(mean**2 + 0.2 - np.log(0.2) - 1)
    assert abs(kl) < 1e-6 < 0.5 < each
    mixed = mixture_kl(mean[rng.permutation(1000)], log_std, convention="mixture")[0]
    assert_allclose(mixed, kl, atol=1e-6)


def test_divergence_is_zero_at_the_standard_normal_only():
    zero = jnp.zeros((4, 2))
    assert_allclose(mixture_kl(zero, zero, convention="mixture")[0], 0.0, atol=1e-6)
    for mean, log_std in ((zero + 0.5, zero), (zero, zero - 0.5), (zero, zero + 0.5)):
        assert mixture_kl(mean, log_std, convention="mixture")[0] > 0.1


@pytest.mark.parametrize("adversary", ["bce", "hinge"])
@pytest.mark.parametrize("error", ["absolute", "square"])
def test_loss_is_that_of_the_equations(error, adversary):
    mean, log_std = codes(seed=3)
    rng = np.random.default_rng(4)
    x, y, fake = rng.normal(size=(3, 6, 4, 4, 1))
    knobs: Any = {
        "error_weight": 3.0, "kl_weight": 0.7, "regularizer": 0.2,
        "adversary_weight": 0.4, "convention": "mixture",
    }  # fmt: skip
    loss, aux = gmm_posterior_loss(
        x, y, mean, log_std, fake, error=error, adversary=adversary, **knobs
    )
    apart = np.abs(x - y) if error == "absolute" else (x - y) ** 2
    generator = -fake if adversary == "hinge" else np.log1p(np.exp(-fake))
    variance = np.exp(2 * log_std)
    kl = expected_kl(mean.mean(0), mean.var(0) + variance.mean(0))
    spread = np.mean(np.sum(variance - np.log(variance) - 1, axis=1))
    total = 3.0 * apart.sum() / 6 + 0.7 * kl + 0.2 * spread + 0.4 * generator.mean()
    assert_allclose(loss, total, rtol=1e-5)
    assert_allclose(aux["spread"], spread, rtol=1e-5)
    without, aux = gmm_posterior_loss(
        x, y, mean, log_std, error=error, adversary=adversary, **knobs
    )
    assert_allclose(without, total - 0.4 * generator.mean(), rtol=1e-5)
    assert aux["generator"] == 0.0


@pytest.mark.parametrize("convention", ["released", "mixture"])
def test_only_the_regularizer_holds_variances_up(convention):
    """Descent on log s: towards 1 with it, otherwise not away from a small value."""
    rng = np.random.default_rng(5)
    mean = rng.normal(size=(500, 1))
    mean = (mean - mean.mean()) / mean.std() * (1 - 0.01**2) ** 0.5
    log_std = np.full_like(mean, np.log(0.01))

    def slope(regularizer: float) -> Any:
        def loss(log_std):
            return gmm_posterior_loss(
                mean,
                mean,
                mean,
                log_std,
                regularizer=regularizer,
                convention=convention,
            )[0]

        return 500 * jax.jit(jax.grad(loss))(jnp.asarray(log_std, jnp.float32))

    assert np.all(np.abs(slope(0.0)) < 1e-4)
    # d/d log s of 0.1 (s^2 - 2 log s) = 0.2 (s^2 - 1)
    assert_allclose(slope(0.1), 0.2 * (0.01**2 - 1), rtol=1e-3)


def test_discriminator_loss_is_that_of_the_equations():
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(2, 5, 3, 3, 1)) * 2
    hinge = np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()
    loss, aux = patch_discriminator_loss(real, fake, adversary="hinge")
    assert_allclose(loss, hinge, rtol=1e-5)
    assert_allclose(aux["real"] + aux["fake"], loss, rtol=1e-6)
    bce = np.log1p(np.exp(-real)).mean() + np.log1p(np.exp(fake)).mean()
    assert_allclose(patch_discriminator_loss(real, fake)[0], bce, rtol=1e-5)
    assert patch_discriminator_loss(real + 9, fake - 9, adversary="hinge")[0] == 0.0


def test_networks_have_their_shapes():
    x, key = jnp.zeros((2, 8, 8, 1)), jax.random.key(0)

    def outputs(key):
        codes, _ = ResNetEncoder(latents=3).init_with_output(key, x)
        return codes, ResNetDecoder((8, 8, 1)).init_with_output(key, codes[0])[0]

    codes, image = jax.eval_shape(outputs, key)
    assert [c.shape for c in codes] == [(2, 3), (2, 3)] and image.shape == x.shape


def test_a_logit_sees_its_patch_alone():
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
    net = PatchDiscriminator(channels=4)

    @jax.jit
    def seen(key):
        def corner(x):
            return net.init_with_output(key, x)[0][0, 0, 0, 0]

        return jax.grad(corner)(x)

    slope = seen(jax.random.key(1))
    assert np.any(slope[0, :4, :4] != 0) and np.all(slope[0, 6:] == 0)
    assert np.all(slope[1] == 0)


def test_bad_numbers_are_named():
    x, z = jnp.zeros((2, 3)), jnp.zeros((2, 1))
    for name in ("error_weight", "kl_weight", "regularizer", "adversary_weight"):
        knobs: Any = {name: -1.0}
        with pytest.raises(ValueError, match=f"'{name}' is -1.0"):
            gmm_posterior_loss(x, x, z, z, **knobs)
    with pytest.raises(TypeError, match="'output' is"):
        gmm_posterior_loss(x, x[:, :2], z, z)
