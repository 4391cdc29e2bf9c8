"""Scans against the dense joint Gaussian of all frames, in float64."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.vae.svae import (
    LinearDynamics,
    PotentialNetwork,
    lds_filter_smoother,
    sample_posterior,
    svae_elbo,
)

SIZE = 2

smoother = jax.jit(lds_filter_smoother)


def dynamics(seed: int = 0) -> LinearDynamics:
    rng = np.random.default_rng(seed)
    root, start = rng.normal(size=(2, SIZE, SIZE))
    return LinearDynamics(
        *(
            jnp.asarray(x, jnp.float32)
            for x in (
                0.6 * rng.normal(size=(SIZE, SIZE)),
                rng.normal(size=SIZE),
                root @ root.T + 0.2 * np.eye(SIZE),
                rng.normal(size=SIZE),
                start @ start.T + 0.2 * np.eye(SIZE),
            )
        )
    )


def potentials(steps: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(steps, SIZE, SIZE))
    linear, precision = rng.normal(size=(steps, SIZE)), root @ root.swapaxes(1, 2)
    return jnp.asarray(linear, jnp.float32), jnp.asarray(precision, jnp.float32)


def log_normal(x, mean, covariance):
    away = x - mean
    quadratic = away @ np.linalg.solve(covariance, away)
    return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])


def joint(prior: LinearDynamics, steps: int):
    """Mean and covariance of z_1 ... z_T together."""
    a, b, q, m, p = (np.asarray(x, np.float64) for x in prior)
    mean, covariance = np.zeros((steps, SIZE)), np.zeros((steps, SIZE, steps, SIZE))
    for t in range(steps):
        mean[t] = m
        covariance[t, :, t] = p
        for s in range(t):
            covariance[t, :, s] = a @ covariance[t - 1, :, s]
            covariance[s, :, t] = covariance[t, :, s].T
        m, p = a @ m + b, a @ p @ a.T + q
    return mean.ravel(), covariance.reshape(steps * SIZE, -1)


def dense(prior: LinearDynamics, linear, precision):
    """Moments of q over all frames at once, and log Z."""
    steps = len(linear)
    mean, covariance = joint(prior, steps)
    weight = np.zeros((steps, SIZE, steps, SIZE))
    for t in range(steps):
        weight[t, :, t] = precision[t]
    weight = weight.reshape(len(mean), -1)
    inverse = np.linalg.inv(covariance)
    after = np.linalg.inv(inverse + weight)
    h = np.asarray(linear, np.float64).ravel() + inverse @ mean
    log_z = 0.5 * (h @ after @ h - mean @ inverse @ mean)
    log_z += 0.5 * (np.linalg.slogdet(after)[1] - np.linalg.slogdet(covariance)[1])
    return after @ h, after, log_z


def blocks(mean, covariance):
    steps = len(mean) // SIZE
    by_time = covariance.reshape(steps, SIZE, steps, SIZE)
    own = np.stack([by_time[t, :, t] for t in range(steps)])
    cross = [by_time[t, :, t + 1] for t in range(steps - 1)]
    return mean.reshape(steps, SIZE), own, np.reshape(cross, (-1, SIZE, SIZE))


@pytest.mark.parametrize("steps", [1, 6])
def test_moments_and_normaliser_are_those_of_the_joint_gaussian(steps):
    prior, arrays = dynamics(), potentials(steps)
    q = smoother(prior, *arrays)
    mean, covariance, log_z = dense(prior, *arrays)
    expected = blocks(mean, covariance)
    for name, value in zip(("mean", "covariance", "cross"), expected, strict=True):
        assert_allclose(q[name], value, rtol=1e-4, atol=1e-5)
    assert_allclose(q["log_normaliser"], log_z, rtol=1e-5, atol=1e-5)
    for t in range(steps):
        mean, covariance, _ = dense(prior, *(x[: t + 1] for x in arrays))
        assert_allclose(q["filtered_mean"][t], mean[-SIZE:], rtol=1e-4, atol=1e-5)
        last = covariance[-SIZE:, -SIZE:]
        assert_allclose(q["filtered_covariance"][t], last, rtol=1e-4, atol=1e-5)


def test_without_potentials_q_is_the_prior():
    prior = dynamics(1)
    zeros = jnp.zeros((6, SIZE)), jnp.zeros((6, SIZE, SIZE))
    q = smoother(prior, *zeros)
    mean, covariance = joint(prior, 6)
    expected = blocks(mean, covariance)
    for name, value in zip(("mean", "covariance", "cross"), expected, strict=True):
        assert_allclose(q[name], value, rtol=1e-4, atol=1e-5)
    assert_allclose(q["log_normaliser"], 0.0, atol=1e-6)


def test_sharp_potentials_pin_the_path_and_huge_ones_stay_finite():
    prior = dynamics(2)
    path = jax.random.normal(jax.random.key(0), (6, SIZE))
    for sharp, error in ((1e6, 1e-4), (1e30, 1e-3)):
        precision = sharp * jnp.broadcast_to(jnp.eye(SIZE), (6, SIZE, SIZE))
        # Both are limited: beyond 1e12 the potential is 1e12 wide, around 0 and 1e12.
        linear = jnp.minimum(sharp, 1e12) * path
        q = smoother(prior, linear, precision)
        assert_allclose(q["mean"], jnp.clip(path, -1, 1) if sharp > 1e12 else path,
                        atol=error)  # fmt: skip
        assert np.all(np.isfinite(q["log_normaliser"]))


def test_paths_have_the_moments_of_q():
    prior, arrays = dynamics(3), potentials(6, 3)
    q = smoother(prior, *arrays)
    moments = q["filtered_mean"], q["filtered_covariance"]
    keys = jax.random.split(jax.random.key(0), 40_000)
    paths = jax.jit(jax.vmap(lambda key: sample_posterior(key, prior, *moments)))(keys)
    paths = np.asarray(paths, np.float64).reshape(len(keys), -1)
    mean, covariance, _ = dense(prior, *arrays)
    error = 5 * np.sqrt(np.diag(covariance) / len(keys))
    assert np.all(np.abs(paths.mean(0) - mean) < error)
    scale = np.sqrt(np.diag(covariance))
    gap = (np.cov(paths.T) - covariance) / np.outer(scale, scale)
    assert np.abs(gap).max() < 5 * (2 / len(keys)) ** 0.5


def linear_gaussian(steps: int):
    """Frames of a linear decoder, their optimal potentials and exact log p(x)."""
    rng = np.random.default_rng(4)
    prior = dynamics(4)
    decoder, offset, variance = rng.normal(size=(3, SIZE)), rng.normal(size=3), 0.3
    mean, covariance = joint(prior, steps)
    wide = np.kron(np.eye(steps), decoder)
    centre = wide @ mean + np.tile(offset, steps)
    spread = wide @ covariance @ wide.T + variance * np.eye(3 * steps)
    x = rng.multivariate_normal(centre, spread)
    exact = log_normal(x, centre, spread)
    x = jnp.asarray(x.reshape(steps, 3), jnp.float32)
    decoder, offset = (jnp.asarray(v, jnp.float32) for v in (decoder, offset))
    linear = (x - offset[None]) @ decoder / variance
    precision = jnp.broadcast_to(decoder.T @ decoder / variance, (steps, SIZE, SIZE))

    def log_p(z):
        square = jnp.square(x - z @ decoder.T - offset[None]) / variance
        return -0.5 * jnp.sum(square + np.log(2 * np.pi * variance), axis=1)

    return prior, linear, precision, log_p, exact


def test_optimal_potentials_make_the_bound_exact():
    """With the sampled KL for every path, with the exact one on average."""
    prior, *arrays, log_p, exact = linear_gaussian(6)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def bounds(key, scale):
        value, aux = svae_elbo(key, prior, scale * arrays[0], arrays[1], log_p)
        return value, jnp.sum(aux["log_likelihood"]) - aux["sampled_kl"]

    keys = jax.random.split(jax.random.key(0), 4000)
    exact_kl, sampled_kl = bounds(keys, 1.0)
    assert_allclose(sampled_kl, exact, atol=1e-3)
    error = np.std(exact_kl) / len(keys) ** 0.5
    assert np.std(exact_kl) > 0.1 and abs(np.mean(exact_kl) - exact) < 4 * error
    assert np.mean(bounds(keys, 0.5)[0]) < exact - 1.0


def test_hidden_frames_have_no_potential_but_a_likelihood():
    prior, *arrays, log_p, _ = linear_gaussian(6)
    seen = jnp.array([True, True, False, False, True, True])
    key = jax.random.key(1)

    @jax.jit
    def bound(*arrays):
        linear, precision = arrays
        return svae_elbo(key, prior, linear, precision, log_p, observed=seen)

    value, aux = bound(*arrays)
    spoilt = [x.at[2:4].set(jnp.nan) for x in arrays]
    again = bound(*spoilt)[0]
    assert_allclose(value, again)
    zeroed = [x.at[2:4].set(0.0) for x in arrays]
    mean, covariance, _ = dense(prior, *zeroed)
    assert_allclose(aux["mean"].ravel(), mean, rtol=1e-4, atol=1e-5)
    assert_allclose(value, jnp.sum(log_p(aux["z"])) - aux["kl"], rtol=1e-5)
    before = joint(prior, 6)
    away = mean - before[0]
    divergence = np.trace(np.linalg.solve(before[1], covariance)) - len(mean)
    divergence += away @ np.linalg.solve(before[1], away)
    divergence += np.linalg.slogdet(before[1])[1] - np.linalg.slogdet(covariance)[1]
    assert_allclose(aux["kl"], 0.5 * divergence, rtol=1e-4)


def test_a_natural_step_of_rate_1_is_least_squares_and_small_ones_climb():
    prior, arrays = dynamics(5), potentials(6, 5)
    q = smoother(prior, *arrays)
    moments = [q[name][None] for name in ("mean", "covariance", "cross")]
    mean, own, cross = (np.asarray(x[0], np.float64) for x in moments)
    step = jax.jit(LinearDynamics.natural_step)
    new = step(prior, *moments, 1.0)
    second = own + mean[:, :, None] * mean[:, None, :]
    pairs = cross + mean[:-1, :, None] * mean[1:, None, :]
    gram = np.zeros((SIZE + 1, SIZE + 1))
    gram[:SIZE, :SIZE] = second[:-1].sum(0)
    gram[:SIZE, SIZE] = gram[SIZE, :SIZE] = mean[:-1].sum(0)
    gram[SIZE, SIZE] = 5
    moved = np.concatenate([pairs.sum(0), mean[None, 1:].sum(1)])
    both = np.linalg.solve(gram, moved).T
    assert_allclose(new.transition, both[:, :SIZE], rtol=1e-3, atol=1e-4)
    assert_allclose(new.bias, both[:, SIZE], rtol=1e-3, atol=1e-4)
    noise = (second[1:].sum(0) - both @ moved) / 5
    assert_allclose(new.noise, noise, rtol=1e-3, atol=1e-4)
    assert_allclose(new.initial_mean, mean[0], rtol=1e-5)
    assert_allclose(new.initial_covariance, own[0], rtol=1e-4)

    def evidence(prior):
        return float(smoother(prior, *arrays)["log_normaliser"])

    found = [evidence(step(prior, *moments, r)) for r in (0.0, 0.1, 1.0)]
    assert_allclose(found[0], evidence(prior), rtol=1e-6)
    assert found[0] + 0.01 < found[1] < found[2] - 0.01


def test_the_network_gives_positive_potentials_of_each_frame_alone():
    net: Any = PotentialNetwork(3, (8,))
    x = jax.random.normal(jax.random.key(0), (5, 4))
    params = net.init(jax.random.key(1), x)
    linear, precision = net.apply(params, 10.0 * x)
    assert linear.shape == (5, 3) and precision.shape == (5, 3, 3)
    assert np.linalg.eigvalsh(precision).min() > 0.009
    alone = net.apply(params, 10.0 * x[2])
    assert_allclose(alone[0], linear[2], rtol=1e-5)
    assert_allclose(alone[1], precision[2], rtol=1e-5)


def test_a_prior_of_other_size_is_named():
    with pytest.raises(TypeError, match="'prior' has .* expected 3 latents"):
        lds_filter_smoother(dynamics(), jnp.zeros((4, 3)), jnp.zeros((4, 3, 3)))
    with pytest.raises(TypeError, match="'prior' has .* expected 3 latents"):
        moments = jnp.zeros((4, 3)), jnp.zeros((4, 3, 3))
        sample_posterior(jax.random.key(0), dynamics(), *moments)
