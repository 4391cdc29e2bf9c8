"""The densities against sums in float64, charts against themselves, descent by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import logsumexp, softmax

from jaxzoo.vae.vae_charts import (
    Charts,
    chart_elbo,
    log_prior,
    mixture_loss,
    overlap_weights,
    riemannian_descent,
)


def prior(z):
    """By cases, as the released code has it; the last axis is summed."""
    total = 0.0
    for value in np.abs(z):
        if value <= 0.8:
            continue
        if value <= 1.0:
            total += np.log(0.05 + (1.0 - value) * (1 - 0.05) / 0.2)
        else:
            total += np.log(0.05) - 100.0 * (value - 1.0)
    return total


def draws(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def test_the_prior_is_flat_then_a_line_then_falls():
    z = np.linspace(-1.3, 1.3, 60, dtype=np.float32).reshape(30, 2)
    expected = [prior(row.astype(np.float64)) for row in z]
    assert_allclose(log_prior(z), expected, rtol=1e-4, atol=1e-5)
    edges = jnp.array([[0.8], [-0.8], [1.0], [-1.0]])
    beyond = log_prior(edges * 1.00001) - log_prior(edges)
    assert_allclose(beyond, 0.0, atol=2e-3)  # no jumps


def test_elbo_is_that_of_the_paper():
    x, back, z = draws((5, 3), (2, 5, 3), (2, 5, 2))
    got = chart_elbo(x, back, z, sigma_x=0.3, sigma_z=0.2)
    for k in range(2):
        for b in range(5):
            gap = x[b].astype(np.float64) - back[k, b]
            expected = -gap @ gap / (2 * 0.3**2) + prior(z[k, b].astype(np.float64))
            assert_allclose(got[k, b], expected + 2 * np.log(0.2), rtol=1e-4)


def test_mixture_is_a_sum_of_likelihoods():
    elbo, log_alpha = draws((3, 6), (3,))
    alpha = softmax(log_alpha.astype(np.float64))
    expected = np.log(alpha @ np.exp(elbo.astype(np.float64)))
    loss, aux = mixture_loss(elbo, log_alpha)
    assert_allclose(loss, -expected.mean(), rtol=1e-5)
    assert_allclose(aux["per_example"], -expected, rtol=1e-4, atol=1e-6)
    assert_allclose(mixture_loss(elbo, log_alpha + 2.0)[0], loss, rtol=1e-5)
    joint = elbo + np.log(alpha)[:, None]
    assert_allclose(aux["responsibilities"], softmax(joint, axis=0), rtol=1e-5)
    # Each chart learns from points by its responsibility for them.
    gradient = jax.grad(lambda e: mixture_loss(e, log_alpha)[0])(elbo)
    assert_allclose(gradient, -aux["responsibilities"] / 6, rtol=1e-5)


def overlap(elbo, z, scale):
    charts, batch = elbo.shape
    out = np.zeros((charts, batch))
    for b in range(batch):
        logs = []
        for g in range(charts):
            own = elbo[:, b].astype(np.float64)
            own[g] += prior(scale * z[g, b]) - prior(z[g, b])
            logs.append(own - logsumexp(own))
        out[:, b] = softmax(np.max(logs, axis=0))
    return out


def test_overlap_weights_are_those_of_the_paper():
    (elbo,) = draws((3, 8))
    z = np.random.default_rng(1).uniform(-1, 1, size=(3, 8, 2)).astype(np.float32)
    got = overlap_weights(elbo, z, scale=1.3)
    assert_allclose(got, overlap(elbo, z.astype(np.float64), 1.3), rtol=2e-3, atol=1e-5)
    assert_allclose(jnp.sum(got, axis=0), 1.0, rtol=1e-5)
    # In the middle of all charts, they are the responsibilities.
    middle = overlap_weights(elbo, 0.1 * z)
    assert_allclose(middle, softmax(elbo, axis=0), rtol=1e-5)


def test_overlap_gives_points_near_a_border_to_the_other_chart():
    elbo = jnp.array([[0.0, 0.0], [-9.0, -9.0]])
    z = jnp.array([[[0.5], [0.9]], [[0.0], [0.0]]])
    inside, border = np.asarray(overlap_weights(elbo, z))[1]
    assert inside < 1e-3 and 0.4 < border < 0.6


@pytest.mark.parametrize(("features", "latents"), [(2, 1), (3, 2)])
def test_encoders_undo_decoders_and_charts_are_injective(features, latents):
    with jax.enable_x64(True):
        net: Any = Charts(2, latents, features, layers=5, hidden=8)
        params = net.init(jax.random.key(0), jnp.zeros((4, features)), method="encode")
        z = jax.random.uniform(jax.random.key(1), (2, 6, latents), minval=-1.0)

        @jax.jit
        def both(params, z):
            x = net.apply(params, z, method="decode")
            again = net.apply(params, x, method="encode")
            shared = net.apply(params, x[0], method="encode")
            back = net.apply(params, shared, method="decode")
            twice = net.apply(params, back, method="encode")

            def one(z):
                return net.apply(params, z[:, None], method="decode")[:, 0]

            slope = jax.jacobian(one)(z[:, 0])  # [K, n, K, d]
            return x, again, shared, twice, slope

        x, again, shared, twice, slope = both(params, z)
        assert_allclose(again, z, atol=1e-10)
        assert_allclose(shared[0], z[0], atol=1e-10)
        assert_allclose(twice, shared, atol=1e-10)  # D_k(E_k(.)) is a projection
        assert np.abs(x[0] - x[1]).min(axis=0).max() > 1e-3  # charts differ
        for k in range(2):
            assert np.linalg.matrix_rank(slope[k, :, k]) == latents
            assert_array_equal(slope[k, :, 1 - k], 0.0)


def test_stretch_of_charts_is_a_mean_of_squares():
    net: Any = Charts(2, 1, 2, layers=2, hidden=4)
    z, beside = draws((2, 5, 1), (2, 5, 1))
    params = net.init(jax.random.key(0), jnp.zeros((4, 2)), method="encode")
    x, y = (np.asarray(net.apply(params, a, method="decode")) for a in (z, beside))
    got = net.apply(params, z, beside, 0.1, method="stretch")
    expected = np.mean([((a - b) ** 2).sum() for a, b in zip(x, y, strict=True)])
    assert_allclose(got, expected / 5 / 0.01, rtol=1e-4)


def paraboloid(z):
    return jnp.concatenate([z, jnp.sum(z**2, axis=-1, keepdims=True)], axis=-1)


GOAL = jnp.array([0.5, -0.3, 1.0])


def to_goal(x):
    return 0.5 * jnp.sum(jnp.square(x - GOAL[None]), axis=1)


def on_paraboloid(turn, start, **knobs):
    """Descent in one chart, whose coordinates are z @ turn."""
    back = jnp.linalg.inv(turn)
    return riemannian_descent(
        lambda x: (x[:, :2] @ turn)[None], lambda z: paraboloid(z @ back),
        lambda x: jnp.zeros((1, len(x))), to_goal, start, **knobs,
    )  # fmt: skip


def test_a_step_is_that_of_the_metric():
    (start,) = draws((4, 3), seed=3)
    x, aux = on_paraboloid(jnp.eye(2), start, num_steps=1, step_size=0.1)
    for row, got, value in zip(start, x, aux["objective"].T, strict=True):
        z = row[:2].astype(np.float64)
        at = np.append(z, z @ z)
        j = np.array([[1, 0], [0, 1], 2 * z])
        z = z - 0.1 * np.linalg.solve(j.T @ j, j.T @ (at - np.asarray(GOAL)))
        expected = np.append(z, z @ z)
        assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        gaps = [at - np.asarray(GOAL), expected - np.asarray(GOAL)]
        assert_allclose(value, [g @ g / 2 for g in gaps], rtol=1e-4)


def test_the_way_does_not_depend_on_the_coordinates_of_the_chart():
    (start,) = draws((4, 3), seed=4)
    knobs = {"num_steps": 5, "step_size": 0.3}
    turn = jnp.array([[3.0, 1.0], [0.0, 0.5]])
    plain = on_paraboloid(jnp.eye(2), start, **knobs)[1]["path"]
    assert_allclose(on_paraboloid(turn, start, **knobs)[1]["path"], plain, atol=1e-4)


def test_a_step_that_is_too_long_is_halved():
    """From 8 on, to the first that lowers f."""
    z, goal = np.array([2.0, 0.0]), np.asarray(GOAL, np.float64)
    j = np.array([[1, 0], [0, 1], 2 * z])
    move = np.linalg.solve(j.T @ j, j.T @ (np.append(z, z @ z) - goal))

    def value(z):
        return np.sum((np.append(z, z @ z) - goal) ** 2) / 2

    ways = [z - 8.0 / 2**i * move for i in range(8)]
    chosen = next(w for w in ways if value(w) < value(z))
    assert np.any(chosen != ways[0])
    x = on_paraboloid(
        jnp.eye(2), jnp.array([[2.0, 0.0, 4.0]]), num_steps=1, step_size=8.0
    )[0]
    assert_allclose(x[0], np.append(chosen, chosen @ chosen), rtol=1e-4)


def test_points_go_round_a_circle_through_two_charts():
    """Angles about 0 and about pi, each good for three quarters of the circle."""

    def encode(x):
        angle = jnp.arctan2(x[:, 1], x[:, 0]), jnp.arctan2(-x[:, 1], -x[:, 0])
        return jnp.stack(angle)[..., None]

    def decode(z):
        sign = jnp.array([1.0, -1.0])[:, None, None]
        edge = jnp.clip(z, -2.4, 2.4)
        return sign * jnp.concatenate([jnp.cos(edge), jnp.sin(edge)], axis=2)

    def elbo(x):
        return log_prior(encode(x) / 2.4)

    goal = jnp.array([-1.0, 0.2]) / 1.04**0.5
    start = jnp.array([[1.0, 0.3], [1.0, -0.3], [-0.5, -1.0], [0.0, 1.0]])
    x, aux = riemannian_descent(
        encode, decode, elbo, lambda x: jnp.sum((x - goal[None]) ** 2, axis=1) / 2,
        start, num_steps=60, step_size=0.3,
    )  # fmt: skip
    assert_allclose(x, jnp.broadcast_to(goal, x.shape), atol=1e-2)
    assert_allclose(jnp.linalg.norm(aux["path"], axis=2), 1.0, rtol=1e-5)
    assert jnp.all(aux["objective"][1:] <= aux["objective"][:-1])
    assert_array_equal(aux["chart"][0, :2], 0)
    assert_array_equal(jnp.max(aux["chart"], axis=0), 1)


def test_bad_input_is_refused():
    x, back, z = draws((5, 3), (2, 5, 3), (2, 5, 2))
    with pytest.raises(ValueError, match="'sigma_x'"):
        chart_elbo(x, back, z, sigma_x=0.0)
    with pytest.raises(ValueError, match="'sigma_z'"):
        chart_elbo(x, back, z, sigma_z=-1.0)
    with pytest.raises(ValueError, match="'scale'"):
        overlap_weights(z[..., 0], z, scale=1.0)
    with pytest.raises(ValueError, match="'num_steps'"):
        on_paraboloid(jnp.eye(2), x, num_steps=0)
    with pytest.raises(ValueError, match="'step_size'"):
        on_paraboloid(jnp.eye(2), x, step_size=0.0)
    with pytest.raises(TypeError, match="'reconstruction'"):
        chart_elbo(x, back[:, :4], z)
