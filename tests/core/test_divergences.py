"""Distances between samples against scipy, closed forms and plain loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from numpy.testing import assert_allclose

from jaxzoo.core.divergences import (
    gaussian_kernel,
    gaussian_total_correlation,
    inverse_multiquadratic_kernel,
    mmd,
    random_directions,
    sliced_wasserstein,
    squared_distances,
)
from jaxzoo.core.sinkhorn import sinkhorn, sinkhorn_divergence

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(7, 3)), 0.5 * RNG.normal(size=(5, 3)) + 1.0


def kernel_of(name):
    if name == "gaussian":
        return lambda a, b: np.exp(-np.sum((a - b) ** 2) / (2 * 1.5**2))
    return lambda a, b: sum(
        s * 6.0 / (s * 6.0 + np.sum((a - b) ** 2)) for s in (0.1, 2)
    )


KERNELS = {
    "gaussian": functools.partial(gaussian_kernel, width=1.5),
    "imq": functools.partial(
        inverse_multiquadratic_kernel, scale=6.0, factors=(0.1, 2.0)
    ),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_is_the_double_sum(name, unbiased):
    k, (n, m) = kernel_of(name), (len(X), len(Y))

    def within(a):
        pairs = [
            k(a[i], a[j])
            for i in range(len(a)) for j in range(len(a)) if i != j or not unbiased
        ]  # fmt: skip
        return np.mean(pairs)

    between = sum(k(a, b) for a in X for b in Y) / (n * m)
    expected = within(X) + within(Y) - 2 * between
    got = mmd(jnp.array(X), jnp.array(Y), KERNELS[name], unbiased=unbiased)
    assert_allclose(got, expected, rtol=1e-5)


def test_the_u_statistic_has_the_mean_of_the_closed_form_and_the_v_statistic_not():
    # E k of Gaussians: 1-d, x ~ N(0, 1), y ~ N(m, 1), width w.
    m, w, rows = 0.7, 1.2, 8

    def mean_kernel(shift):
        variance = w**2 + 2.0
        return w / variance**0.5 * np.exp(-(shift**2) / (2.0 * variance))

    exact = 2.0 * (mean_kernel(0.0) - mean_kernel(m))
    draws = RNG.normal(size=(2, 20_000, rows, 1)).astype(np.float32)
    kernel = functools.partial(gaussian_kernel, width=w)
    for unbiased in (True, False):
        statistic = functools.partial(mmd, kernel=kernel, unbiased=unbiased)
        values = np.asarray(jax.jit(jax.vmap(statistic))(draws[0], draws[1] + m))
        stderr = values.std() / len(values) ** 0.5
        distance = abs(values.mean() - exact) / stderr
        assert distance < 4 if unbiased else distance > 20


def test_one_direction_is_scipys_assignment():
    x, y = RNG.normal(size=(2, 9, 1))
    for p in (1, 2, 3):
        cost = np.abs(x - y.T) ** p
        rows, columns = scipy.optimize.linear_sum_assignment(cost)
        got = sliced_wasserstein(jnp.array(x), jnp.array(y), jnp.ones((1, 1)), p=p)
        assert_allclose(got, cost[rows, columns].mean(), rtol=1e-5)


def test_sliced_wasserstein_of_a_shift_is_its_square_over_the_dimension():
    x = jnp.array(RNG.normal(size=(50, 4)))
    shift = jnp.array([1.0, -2.0, 0.5, 0.0])
    directions = random_directions(jax.random.key(0), dim=4, num_directions=20_000)
    got = sliced_wasserstein(x, x + shift[None], directions)
    assert_allclose(got, float(shift @ shift) / 4, rtol=0.03)
    # Each direction sees the part of the shift along it, exactly.
    along = jnp.mean(jnp.square(directions @ shift))
    assert_allclose(got, along, rtol=1e-4)


def test_little_entropy_gives_scipys_assignment():
    x, y = RNG.normal(size=(2, 6, 2)).astype(np.float32)
    cost = np.square(x[:, None] - y[None]).sum(-1)
    rows, columns = scipy.optimize.linear_sum_assignment(cost)
    value, aux = sinkhorn(jnp.array(cost), epsilon=0.01, num_iterations=2000)
    assert_allclose(value, cost[rows, columns].mean(), atol=0.02)
    assert_allclose(aux["plan"][rows, columns], 1 / 6, atol=1e-3)


def test_sinkhorn_minimizes_transport_and_entropy():
    cost, epsilon = RNG.uniform(size=(3, 4)), 0.2
    value, aux = sinkhorn(jnp.array(cost), epsilon=epsilon)
    plan = np.asarray(aux["plan"], np.float64)
    assert_allclose(plan.sum(0), 1 / 4, atol=1e-6)
    assert_allclose(plan.sum(1), 1 / 3, atol=1e-6)

    def objective(p):
        return (p * cost).sum() + epsilon * (p * np.log(p * 12)).sum()

    assert_allclose(value, objective(plan), rtol=1e-5)
    for _ in range(20):  # within the couplings nothing is better
        move = RNG.normal(size=(3, 4))
        move -= move.mean(0, keepdims=True)
        move -= move.mean(1, keepdims=True)
        assert objective(plan + 1e-3 * move) > objective(plan)


def test_a_cost_of_one_pair_has_a_closed_form():
    # Of [[0, c], [c, 0]] the plan is exp(-c/eps) : 1 off and on the diagonal.
    c, epsilon = 0.3, 0.25
    ratio = np.exp(-c / epsilon)
    on = 0.5 / (1 + ratio)
    value, aux = sinkhorn(jnp.array([[0.0, c], [c, 0.0]]), epsilon=epsilon)
    assert_allclose(aux["plan"], [[on, on * ratio], [on * ratio, on]], rtol=1e-5)
    assert_allclose(value, -epsilon * np.log((1 + ratio) / 2), rtol=1e-5)


def test_implicit_gradients_are_those_through_the_iterations():
    cost, weight = jnp.array(RNG.uniform(size=(4, 3))), RNG.normal(size=(4, 3))

    def of_plan(cost, epsilon):
        return jnp.sum(weight * sinkhorn(cost, epsilon=epsilon)[1]["plan"])

    def unrolled(cost, epsilon):
        def turn(potentials, _):
            f, _ = potentials
            g = -epsilon * (jax.nn.logsumexp((f[:, None] - cost) / epsilon, 0))
            f = -epsilon * (jax.nn.logsumexp((g[None] - cost) / epsilon, 1))
            return (f, g), None

        zeros = jnp.zeros(4), jnp.zeros(3)
        (f, g), _ = jax.lax.scan(turn, zeros, length=300)
        plan = jnp.exp((f[:, None] + g[None] - cost) / epsilon)
        return jnp.sum(weight * plan / 4)

    got = jax.jit(jax.grad(of_plan, (0, 1)))(cost, jnp.array(0.3))
    with jax.enable_x64(True):
        wanted = jax.jit(jax.grad(unrolled, (0, 1)))(
            jnp.array(cost, float), jnp.array(0.3)
        )
    # The plan of `unrolled` misses its factor 1/3 of the columns' weights.
    for a, b in zip(got, wanted, strict=True):
        assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_the_gradient_of_the_value_is_the_plan():
    cost = jnp.array(RNG.uniform(size=(4, 5)))
    (_, aux), gradient = jax.value_and_grad(sinkhorn, has_aux=True)(cost)
    assert_allclose(gradient, aux["plan"], atol=1e-6)


def test_debiased_transport_between_gaussians():
    # W_2^2 of a shift is its square, for every epsilon; entropy alone is not 0.
    x = jnp.array(RNG.normal(size=(30, 2)))
    assert_allclose(sinkhorn_divergence(x, x + 0.7, epsilon=1.0), 0.98, rtol=1e-3)
    assert_allclose(sinkhorn_divergence(x, x, epsilon=1.0), 0.0, atol=1e-5)
    assert sinkhorn(squared_distances(x, x), epsilon=1.0)[0] > 0.1


def test_wide_entropy_is_half_an_mmd_of_negative_distances():
    x, y = jnp.array(X), jnp.array(Y)
    got = sinkhorn_divergence(x, y, epsilon=1e4)
    expected = np.sum((X.mean(0) - Y.mean(0)) ** 2)  # MMD of -|x-y|^2 / 2
    assert_allclose(got, expected, rtol=0.02)


def test_total_correlation_of_a_gaussian():
    rho = 0.8
    draws = RNG.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=50_000)
    got = gaussian_total_correlation(jnp.array(draws * [3.0, 0.01]))
    assert_allclose(got, -0.5 * np.log(1 - rho**2), rtol=0.02)
    correlation = np.corrcoef(draws.T)
    assert_allclose(got, -0.5 * np.log(np.linalg.det(correlation)), rtol=1e-3)
    flat = jnp.array(np.c_[draws[:100], np.ones(100)])
    assert_allclose(
        gaussian_total_correlation(flat),
        gaussian_total_correlation(flat[:, :2]),
        rtol=1e-5,
    )


def test_bad_input_is_named():
    x = jnp.zeros((4, 2))
    with pytest.raises(ValueError, match="argument 'x' has 1 points, expected >= 2"):
        mmd(x[:1], x)
    with pytest.raises(TypeError, match="argument 'y' is float32"):
        sliced_wasserstein(x, x[:3], jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="'epsilon' is 0"):
        sinkhorn(x, epsilon=0.0)
