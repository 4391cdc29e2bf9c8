"""The lossy autoencoder against loops in float64, Jacobians and exact sums."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.core.stats import normal_kl, normal_log_prob
from jaxzoo.vae.vlae import (
    AutoregressiveFlow,
    LocalDecoder,
    af_prior_elbo,
    bits_back_length,
    causal_conv,
    free_bits,
)


def by_loops(x, kernel, sees_itself):
    """Each pixel, each place of the window, one after the other."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    batch, height, width, _ = x.shape
    rows, columns = kernel.shape[:2]
    y = np.zeros((batch, height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            for r in range(rows):
                for c in range(columns):
                    a, b = i - (rows - 1) + r, j - columns // 2 + c
                    is_before = a < i or (a == i and b < j)
                    is_before |= sees_itself and (a, b) == (i, j)
                    if is_before and a >= 0 and 0 <= b < width:
                        y[:, i, j] += x[:, a, b] @ kernel[r, c]
    return y


@pytest.mark.parametrize("sees_itself", [False, True])
@pytest.mark.parametrize("window", [(1, 3), (2, 2), (2, 3), (3, 7)])
def test_convolution_is_the_sum_over_what_comes_before(window, sees_itself):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, 4, 5, 2))
    kernel = jax.random.normal(keys[1], (*window, 2, 3))
    got = causal_conv(x, kernel, sees_itself=sees_itself)
    assert_allclose(got, by_loops(x, kernel, sees_itself), rtol=1e-4, atol=1e-5)


def seen_by_the_decoder(window):
    """[pixels, pixels]: whether a logit depends on a pixel."""
    decoder = LocalDecoder((4, 5, 1), window, features=(8, 8), activation=jnp.tanh)
    x = jax.random.normal(jax.random.key(1), (1, 4, 5, 1))
    z = jnp.ones((1, 3))
    params = decoder.init(jax.random.key(2), x, z)

    def logits(x):
        out: Any = decoder.apply(params, x, z)
        return out.ravel()

    return np.asarray(jax.jacobian(logits)(x)).reshape(20, 20) != 0.0


def test_three_pixels_are_left_above_and_between():
    seen = seen_by_the_decoder((2, 2)).reshape(4, 5, 4, 5)
    assert_array_equal(np.argwhere(seen[2, 3]), [[1, 2], [1, 3], [2, 2]])
    assert seen.sum(axis=(2, 3)).max() == 3


def test_the_largest_window_sees_all_that_comes_before():
    expected = np.tril(np.ones((20, 20), bool), -1)
    assert_array_equal(seen_by_the_decoder((4, 9)), expected)


def flow_and_params(latents=4, layers=2, seed=0) -> tuple[AutoregressiveFlow, Any]:
    """A flow that is far from the identity."""
    flow = AutoregressiveFlow(latents, hidden=12, layers=layers)
    keys = jax.random.split(jax.random.key(seed), 5)
    params = flow.init(keys[0], jnp.zeros((1, latents)))
    leaves, tree = jax.tree.flatten(params)
    moved = [
        x + 0.4 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys[1:], strict=True)
    ]
    return flow, jax.tree.unflatten(tree, moved)


def inverse(flow, params, z) -> Any:
    return flow.apply(params, z)


def jacobian(function, points):
    return np.stack([np.asarray(jax.jacobian(function)(p)) for p in points])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_flow_has_the_determinant_it_says_and_an_inverse(layers):
    flow, params = flow_and_params(layers=layers)
    z = jax.random.normal(jax.random.key(3), (5, 4))
    eps, log_det = inverse(flow, params, z)

    def one(z):
        out: Any = flow.apply(params, z[None])
        return out[0][0]

    matrices = jacobian(one, z)
    assert_allclose(log_det, np.linalg.slogdet(matrices)[1], rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(log_det)).max() > 0.3
    again: Any = flow.apply(params, eps, method="forward")
    assert_allclose(again, z, atol=1e-4)
    if layers == 1:  # its order is turned round: eps_d of z_1 .. z_d
        assert_array_equal(matrices[:, ::-1][:, ~np.tri(4, dtype=bool)], 0.0)


def test_a_flow_prior_costs_what_a_posterior_of_inverse_flow_does():
    """The posterior's density by the Jacobian of f, by which its samples are made."""
    flow, params = flow_and_params(seed=1)
    keys = jax.random.split(jax.random.key(4), 3)
    mean, log_std = 0.5 * jax.random.normal(keys[0], (2, 6, 4))
    z = mean + jnp.exp(log_std) * jax.random.normal(keys[1], (6, 4))
    log_q = normal_log_prob(z, mean, log_std)
    likelihood = jax.random.normal(keys[2], (6,))
    eps, log_det = inverse(flow, params, z)

    def forward(eps):
        out: Any = flow.apply(params, eps[None], method="forward")
        return out[0]

    log_det_f = np.linalg.slogdet(jacobian(forward, eps))[1]
    log_q_of_eps = log_q + log_det_f
    expected = likelihood + normal_log_prob(eps) - log_q_of_eps
    got = af_prior_elbo(likelihood, log_q, eps, log_det)
    assert_allclose(got, expected, atol=1e-4)
    plain = likelihood + normal_log_prob(z) - log_q
    assert np.abs(np.asarray(got - plain)).max() > 0.5


def test_a_flow_without_networks_is_a_gaussian_prior():
    flow, params = flow_and_params(layers=1)
    weights = params["params"]
    weights["last"] = jnp.zeros_like(weights["last"])
    prior_mean, raw = jnp.split(weights["last_bias"][0, 0], 2)
    prior_log_std = 3.0 * jnp.tanh(raw / 3.0)
    mean, log_std = jnp.array([0.3, -1.0, 0.0, 2.0]), jnp.array([0.1, -0.5, 0.0, -1.0])
    noise = jax.random.normal(jax.random.key(5), (200_000, 4))
    z = mean[None] + jnp.exp(log_std)[None] * noise
    eps, log_det = inverse(flow, params, z)
    log_q = normal_log_prob(z, mean, log_std)
    bound = af_prior_elbo(jnp.zeros(len(z)), log_q, eps, log_det)
    exact = normal_kl(mean, log_std, prior_mean, prior_log_std)
    error = bound.std() / len(z) ** 0.5
    assert abs(bound.mean() + exact) < 4 * error
    assert error < 0.01


def test_bound_in_float64():
    terms = np.asarray(jax.random.normal(jax.random.key(6), (3, 8)), np.float64)
    eps = np.asarray(jax.random.normal(jax.random.key(7), (8, 3)), np.float64)
    base = -0.5 * (eps**2).sum(1) - 1.5 * np.log(2 * np.pi)
    expected = terms[0] + base + terms[2] - terms[1]
    single = [x.astype(np.float32) for x in (terms[0], terms[1], eps, terms[2])]
    assert_allclose(af_prior_elbo(*single), expected, rtol=1e-5)


def test_free_bits_are_free():
    kl = jax.random.exponential(jax.random.key(8), (6, 5)) * jnp.array(
        [[0.01, 0.3, 1.0, 2.0, 0.0]]
    )
    means = np.asarray(kl, np.float64).mean(0)
    loss, aux = free_bits(kl, lam=0.5)
    assert_allclose(loss, np.maximum(means, 0.5).sum(), rtol=1e-6)
    assert_allclose(aux["kl"], means.sum(), rtol=1e-6)
    gradient = jax.grad(lambda kl: free_bits(kl, lam=0.5)[0])(kl)
    assert_array_equal(aux["is_free"], means < 0.5)
    assert_allclose(gradient, np.where(means < 0.5, 0.0, 1 / 6)[None] * np.ones((6, 1)))
    assert_allclose(free_bits(kl, lam=0.0)[0], means.sum(), rtol=1e-6)


def test_bits_back_costs_the_divergence_to_the_posterior():
    """Two values of x, three of z: the mean over q is an exact sum."""
    joint = np.array([[0.1, 0.2, 0.05], [0.3, 0.05, 0.3]])  # p(x, z)
    q = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])  # q(z|x)
    prior = np.broadcast_to(joint.sum(0), (2, 3))
    nats = [np.log(p).astype(np.float32) for p in (joint / prior, prior, q)]
    length, aux = bits_back_length(*nats)
    evidence = joint.sum(1)
    gap = (q * np.log2(q / (joint / evidence[:, None]))).sum(1)
    assert_allclose((q * length).sum(1), -np.log2(evidence) + gap, rtol=1e-5)
    assert_allclose(aux["data"] + aux["latent"] - aux["back"], length, rtol=1e-6)
    assert_allclose(aux["latent"], -np.log2(prior), rtol=1e-5)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="'lam' is -1"):
        free_bits(jnp.ones((2, 3)), lam=-1.0)
    with pytest.raises(TypeError, match="'kernel'"):
        causal_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((2, 2, 1, 3)))
