"""Linearised implicit posteriors against Gaussians and determinants in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.vae.linearised_implicit_vi import (
    MatrixGenerator,
    linearised_entropy,
    livi_loss,
)


def gaussian_entropy(covariance):
    size = len(covariance)
    log_det = np.linalg.slogdet(covariance)[1]
    return 0.5 * size * np.log(2 * np.pi * np.e) + 0.5 * log_det


def matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns))


def linear(a):
    a = jnp.asarray(a, jnp.float32)
    return lambda z: a @ z + 1.0


def draws(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape)


def net(z):
    """2 -> 4, curved."""
    first, second = matrix(6, 2, 3), matrix(4, 6, 4)
    return jnp.asarray(second, jnp.float32) @ jnp.tanh(
        jnp.asarray(first, jnp.float32) @ z
    )


def jacobian(z):
    first, second = matrix(6, 2, 3), matrix(4, 6, 4)
    slope = 1 - np.tanh(first @ np.asarray(z, np.float64)) ** 2
    return second @ (slope[:, None] * first)


@pytest.mark.parametrize("shape", [(5, 2), (4, 4), (2, 5)])
@pytest.mark.parametrize("sigma", [0.05, 0.7])
def test_of_a_linear_sampler_it_is_the_gaussian_s(shape, sigma):
    a = matrix(*shape)
    got, aux = linearised_entropy(linear(a), draws(6, shape[1]), sigma=sigma)
    covariance = a @ a.T + sigma**2 * np.eye(shape[0])
    assert_allclose(got, gaussian_entropy(covariance), atol=1e-4)
    gram = a.T @ a + sigma**2 * np.eye(shape[1])
    assert_allclose(aux["log_det"], np.linalg.slogdet(gram)[1], atol=1e-3)
    assert_allclose(aux["mean"], np.asarray(draws(6, shape[1])) @ a.T + 1, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.05, 0.5])
def test_of_a_curved_sampler_it_is_that_of_its_tangent(sigma):
    z = draws(7, 2)
    got, _ = linearised_entropy(net, z, sigma=sigma)
    for value, point in zip(got, z, strict=True):
        j = jacobian(point)
        expected = gaussian_entropy(j @ j.T + sigma**2 * np.eye(4))
        assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["smallest", "largest"])
@pytest.mark.parametrize("shape", [(8, 1), (8, 2), (30, 6)])
def test_bounds_by_one_singular_value(method, shape):
    a, sigma = matrix(*shape), 0.1
    values = np.linalg.svd(a, compute_uv=False)
    value = values[-1] if method == "smallest" else values[0]
    got, aux = linearised_entropy(
        linear(a), draws(3, shape[1]), sigma=sigma, method=method, iterations=12
    )
    log_det = shape[1] * np.log(value**2 + sigma**2)
    assert_allclose(aux["log_det"], log_det, atol=2e-3)
    exact, _ = linearised_entropy(linear(a), draws(3, shape[1]), sigma=sigma)
    slack = 1e-4 if shape[1] == 1 else 0.0
    if method == "smallest":
        assert (got <= exact + slack).all()
    else:
        assert (got >= exact - slack).all()


@pytest.mark.parametrize("method", ["smallest", "largest"])
def test_the_gradient_of_a_bound_is_that_of_the_singular_value(method):
    a, sigma = matrix(6, 3), 0.2

    def bound(a):
        value, _ = linearised_entropy(
            lambda z: a @ z, draws(1, 3), sigma=sigma, method=method, iterations=12
        )
        return value[0]

    got = jax.grad(bound)(jnp.asarray(a, jnp.float32))
    left, values, right = np.linalg.svd(a)
    i = 2 if method == "smallest" else 0
    slope = 3 * values[i] / (values[i] ** 2 + sigma**2)
    expected = slope * np.outer(left[:, i], right[i])
    assert_allclose(got, expected, atol=2e-2 * abs(slope))


def test_the_loss_is_the_negative_elbo():
    z, noise, sigma = draws(9, 2), draws(9, 4, seed=2), 0.3
    center = jnp.array([1.0, -1.0, 0.5, 2.0])

    def log_joint(theta):
        return -0.5 * jnp.sum(jnp.square(theta - center)) / 0.8

    loss, aux = livi_loss(net, log_joint, z, noise, sigma=sigma)
    values = []
    for one, eps in zip(z, noise, strict=True):
        theta = np.asarray(net(one), np.float64) + sigma * np.asarray(eps)
        log_p = -0.5 * np.sum((theta - np.asarray(center)) ** 2) / 0.8
        j = jacobian(one)
        values.append(-log_p - gaussian_entropy(j @ j.T + sigma**2 * np.eye(4)))
    assert_allclose(aux["per_example"], values, rtol=1e-4, atol=1e-3)
    assert_allclose(loss, np.mean(values), rtol=1e-4)
    assert_allclose(loss, -(aux["log_joint"] + aux["entropy"]), rtol=1e-5)


def test_a_gaussian_posterior_is_a_stationary_point():
    """Of a linear sampler and a Gaussian target of its covariance, KL is 0."""
    a, sigma = matrix(3, 3), 0.4
    covariance = a @ a.T + sigma**2 * np.eye(3)
    precision = jnp.asarray(np.linalg.inv(covariance), jnp.float32)
    z, noise = draws(20000, 3), draws(20000, 3, seed=2)

    def loss(a):
        def log_joint(theta):
            return -0.5 * theta @ precision @ theta

        return livi_loss(lambda z: a @ z, log_joint, z, noise, sigma=sigma)[0]

    a = jnp.asarray(a, jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(loss))(a)
    exact = 1.5 - gaussian_entropy(covariance)
    assert_allclose(value, exact, atol=0.05)
    assert jnp.abs(gradient).max() < 0.05 * jnp.abs(jnp.linalg.inv(a)).max()


def test_matrices_from_both_sides():
    module = MatrixGenerator(((2, 3), (4, 5), (2, 2)))
    z = draws(7, 6)
    params = module.init(jax.random.key(0), z)
    got = module.apply(params, z)
    p = {k: np.asarray(v, np.float64) for k, v in params["params"].items()}
    assert sum(x.size for x in p.values()) == 8 + 15 + 20 + 8 + 10 + 4
    for value, one in zip(np.asarray(got), np.asarray(z, np.float64), strict=True):
        x = p["left_0"].T @ one.reshape(2, 3) @ p["right_0"] + p["bias_0"]
        x = p["left_1"].T @ np.tanh(x) @ p["right_1"] + p["bias_1"]
        assert_allclose(value, x.ravel(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has 5 numbers"):
        module.init(jax.random.key(0), draws(7, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "'sigma' is 0.0"),
        ({"iterations": 0}, "'iterations' is 0"),
        ({"method": "both"}, "'method' is 'both'"),
    ],
)
def test_bad_numbers_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linearised_entropy(net, draws(2, 2), **change)
    with pytest.raises(ValueError, match=message):
        livi_loss(net, jnp.sum, draws(2, 2), draws(2, 4), **change)
