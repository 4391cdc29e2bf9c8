"""Accepted noise against its density, and gradients against quadrature in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import special, stats

from jaxzoo.nn.gamma_rejection import gamma_h, gamma_log_ratio


def transform(eps, a):
    return (a - 1 / 3) * (1 + eps / np.sqrt(9 * a - 3)) ** 3


def log_ratio(eps, a):
    """Of the densities of Gamma(a, 1) and of h(e), by its slope in e."""
    slope = (transform(eps + 1e-6, a) - transform(eps - 1e-6, a)) / 2e-6
    proposal = stats.norm.logpdf(eps) - np.log(slope)
    return stats.gamma.logpdf(transform(eps, a), a) - proposal


def grid(a):
    """Noise that is not always rejected, with the weight of each point."""
    eps = np.linspace(-min(np.sqrt(9 * a - 3), 9.0) + 1e-4, 9.0, 20_001)
    return eps, np.full(len(eps), eps[1] - eps[0])


@pytest.mark.parametrize("a", [1.0, 1.7, 6.0, 40.0])
def test_transformation_and_ratio_by_hand(a):
    eps = np.linspace(-1.0, 3.0, 9)
    shapes = np.full(9, a)
    assert_allclose(
        gamma_h(eps.astype(np.float32), shapes.astype(np.float32)),
        transform(eps, a), rtol=1e-5,
    )  # fmt: skip
    got = gamma_log_ratio(eps.astype(np.float32), shapes.astype(np.float32))
    assert_allclose(got, log_ratio(eps, a), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("a", [1.2, 3.0])
def test_path_and_correction_are_the_gradient_by_quadrature(a):
    """The expectation over accepted noise, point by point."""
    eps, weight = grid(a)
    with jax.enable_x64(True):
        e, shape = jnp.asarray(eps), jnp.asarray(a)

        def at(f, e):
            z = gamma_h(e, shape)
            slope = jax.grad(gamma_h, 1)(e, shape)
            path = jax.grad(f)(z) * slope
            return path, f(z) * jax.grad(gamma_log_ratio, 1)(e, shape)

        ratio = gamma_log_ratio(e, jnp.full(len(eps), a))
        density = weight * stats.norm.pdf(eps) * np.exp(np.asarray(ratio))
        assert_allclose(density.sum(), 1.0, rtol=1e-7)
        for f, exact in (
            (jnp.square, 2 * a + 1),
            (jnp.log, float(special.polygamma(1, a))),
        ):
            path, correction = jax.vmap(functools.partial(at, f))(e)
            total = density @ np.asarray(path + correction)
            assert_allclose(total, exact, rtol=1e-7)
            # The path alone is biased.
            assert abs(density @ np.asarray(path) - exact) > 2e-3 * exact


def test_shape_augmentation_takes_the_correction_away():
    """The root mean square of the ratio's slope, over accepted noise."""
    sizes = []
    for a in (1.5, 2.5, 6.5, 11.5):
        eps, weight = grid(a)
        e, shapes = (np.asarray(x, np.float32) for x in (eps, np.full(len(eps), a)))
        slope = jax.vmap(jax.grad(gamma_log_ratio, 1))(e, shapes)
        density = weight * stats.norm.pdf(eps) * np.exp(log_ratio(eps, a))
        sizes.append(float(density @ np.square(slope)))
    assert sizes[0] > 4 * sizes[1] > 16 * sizes[2] > 32 * sizes[3]
