"""Second moments against exhaustive noise, autodiff and closed forms, in float64."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.vae.bbvi_gradvar import (
    abc_fit,
    second_moment_bounds,
    second_moment_estimate,
    second_moment_quadratic,
)

# Noise with three values: mean 0, variance 1, and every expectation is a finite sum.
KURTOSIS = 2.5
VALUES = np.sqrt(KURTOSIS) * np.array([-1.0, 0.0, 1.0])
WEIGHTS = np.array([0.5 / KURTOSIS, 1 - 1 / KURTOSIS, 0.5 / KURTOSIS])

PHI = {
    "linear": (lambda s: s, lambda s: np.ones_like(s)),
    "softplus": (lambda s: np.log1p(np.exp(s)), lambda s: 1 / (1 + np.exp(-s))),
    "exp": (np.exp, np.exp),
}


def problem(size: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    precision = root @ root.T / size + 0.3 * np.eye(size)
    offset, lower = rng.normal(size=size), rng.normal(size=(size, size))
    diagonal = np.abs(rng.normal(size=size)) + 0.2
    return precision, offset, diagonal, lower


def as_arrays(*arrays: Any) -> Any:
    return [None if x is None else jnp.asarray(x, jnp.float32) for x in arrays]


def gradients(precision, offset, diagonal, lower, conditioner, with_entropy):
    """Every gradient that one sample may give, `[noise, parameters]`, and its weight.

    By the chain rule over C_ij one after the other, from grad f(z) = H (z - c).
    """
    phi, slope = PHI[conditioner]
    size = len(offset)
    scale = np.diag(phi(diagonal))
    if lower is not None:
        scale = scale + np.tril(lower, -1)
    rows, weights = [], []
    for index in itertools.product(range(3), repeat=size):
        u, weight = VALUES[list(index)], np.prod(WEIGHTS[list(index)])
        push = precision @ (scale @ u + offset)
        row = list(push)
        for i in range(size):
            entropy = slope(diagonal)[i] / phi(diagonal)[i] if with_entropy else 0.0
            row.append(push[i] * u[i] * slope(diagonal)[i] - entropy)
            if lower is not None:
                row += [push[i] * u[j] for j in range(i)]
        rows.append(row)
        weights.append(weight)
    return np.array(rows), np.array(weights)


@pytest.mark.parametrize("conditioner", ["linear", "softplus", "exp"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_closed_form_is_the_sum_over_all_noise(conditioner, full, with_entropy):
    precision, offset, diagonal, lower = problem(4)
    lower = lower if full else None
    rows, weights = gradients(
        precision, offset, diagonal, lower, conditioner, with_entropy
    )
    moment = weights @ (rows**2).sum(axis=1)
    squared = ((weights @ rows) ** 2).sum()
    for count in (1, 4):
        value, aux = second_moment_quadratic(
            *as_arrays(precision, offset, diagonal, lower), num_samples=count,
            kurtosis=KURTOSIS, conditioner=conditioner, with_entropy=with_entropy,
        )  # fmt: skip
        expected = squared + (moment - squared) / count
        assert_allclose(value, expected, rtol=1e-5)
        assert_allclose(aux["gradient_squared"], squared, rtol=1e-5)
        assert_allclose(aux["variance"], (moment - squared) / count, rtol=1e-5)


@pytest.mark.parametrize("conditioner", ["linear", "softplus"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kurtosis", [1.0, 1.8, 3.0, 9.0])
def test_bounds_hold_at_random_parameters(conditioner, full, kurtosis):
    for seed in range(25):
        precision, offset, diagonal, lower = problem(5, seed)
        arrays = as_arrays(precision, offset, diagonal, lower if full else None)
        knobs: dict[str, Any] = {"num_samples": 1 + seed % 3, "kurtosis": kurtosis}
        knobs["conditioner"] = conditioner
        value, _ = second_moment_quadratic(*arrays, **knobs)
        low, high = second_moment_bounds(*arrays, **knobs)
        assert low <= value * (1 + 1e-5) and value <= high * (1 + 1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_bounds_are_met(full):
    """Round energies: from below by noise of kurtosis 1, from above by the factor."""
    size = 6
    zeros = np.zeros(size)
    lower = np.zeros((size, size)) if full else None
    # With C = 0 in all rows but the last, that of the largest factor.
    diagonal = np.array([0.0] * (size - 1) + [2.0])
    arrays = as_arrays(2.0 * np.eye(size), zeros, diagonal, lower)
    knobs: dict[str, Any] = {"conditioner": "linear", "with_entropy": False}
    value, _ = second_moment_quadratic(*arrays, **knobs)
    _, high = second_moment_bounds(*arrays, **knobs)
    assert_allclose(value, high, rtol=1e-6)
    if not full:
        value, _ = second_moment_quadratic(*arrays, kurtosis=1.0, **knobs)
        low, _ = second_moment_bounds(*arrays, kurtosis=1.0, **knobs)
        assert_allclose(value, low, rtol=1e-6)


def test_correlations_cost_a_factor_of_the_dimension():
    """At equal distance: none for mean-field, (d + 3)/2 for Cholesky on round H."""
    for size in (4, 16, 64):
        ones, lower = np.ones(size) / np.sqrt(size), np.zeros((size, size))
        knobs: dict[str, Any] = {"conditioner": "linear", "with_entropy": False}
        flat, _ = second_moment_quadratic(
            *as_arrays(np.eye(size), 0 * ones, ones), **knobs
        )
        full, _ = second_moment_quadratic(
            *as_arrays(np.eye(size), 0 * ones, ones, lower), **knobs
        )
        assert_allclose(flat, 4.0, rtol=1e-5)
        assert_allclose(full, (size + 3) / 2 + 2.0, rtol=1e-5)


def test_exp_has_no_upper_bound_and_a_lower_one():
    arrays = as_arrays(*problem(5))
    value, _ = second_moment_quadratic(*arrays, conditioner="exp")
    low, high = second_moment_bounds(*arrays, conditioner="exp")
    assert low <= value and high == np.inf


@pytest.mark.parametrize("conditioner", ["linear", "softplus", "exp"])
@pytest.mark.parametrize("full", [False, True])
def test_the_estimate_agrees_with_the_closed_form(conditioner, full):
    precision, offset, diagonal, lower = as_arrays(*problem(3))
    lower = lower if full else None
    mode = jnp.array([1.0, -2.0, 0.5])

    def energy(z):
        return 0.5 * (z - mode) @ precision @ (z - mode)

    knobs: dict[str, Any] = {"num_samples": 2, "conditioner": conditioner}
    exact, expected = second_moment_quadratic(
        precision, offset, diagonal, lower, **knobs
    )
    value, aux = second_moment_estimate(
        jax.random.key(0), energy, mode + offset, diagonal, lower, num_draws=20000,
        **knobs,
    )  # fmt: skip
    assert abs(value - exact) < 5 * aux["stderr"]
    assert abs(aux["variance"] - expected["variance"]) < 5 * aux["stderr"]


def test_the_gradient_of_the_objective_vanishes_at_the_best_scale():
    """C C' = H^-1, and the diagonal of H to the -1/2 for mean-field."""
    precision, offset, _, _ = problem(4)
    factor = np.linalg.cholesky(np.linalg.inv(precision))
    knobs: dict[str, Any] = {"conditioner": "linear"}
    value, aux = second_moment_quadratic(
        *as_arrays(precision, 0 * offset, np.diag(factor), factor), **knobs
    )
    assert aux["gradient_squared"] < 1e-8 and value > 1.0
    best = 2.0 + 0.5 * np.linalg.slogdet(precision)[1]
    assert_allclose(aux["objective"], best, rtol=1e-5)
    _, aux = second_moment_quadratic(
        *as_arrays(precision, 0 * offset, np.diag(precision) ** -0.5), **knobs
    )
    assert aux["gradient_squared"] < 1e-8


def test_abc_fit_finds_what_it_was_made_of_and_bounds_the_rest():
    rng = np.random.default_rng(0)
    gap, squared = rng.uniform(0.1, 5.0, size=(2, 50))
    for a, b, c in ((1.0, 2.0, 3.0), (0.0, 1.0, 0.5), (4.0, 0.0, 0.0)):
        moment = 2 * a * gap + b * squared + c
        found, aux = abc_fit(*as_arrays(moment, gap, squared))
        assert_allclose(found, [a, b, c], atol=2e-3)
        assert aux["low"] > 0.999
    moment = (3 * gap + squared) * rng.uniform(0.5, 1.0, size=50)
    found, aux = abc_fit(*as_arrays(moment, gap, squared))
    high = 2 * found[0] * gap + found[1] * squared + found[2]
    assert_allclose(aux["per_example"], high, rtol=1e-5)
    assert np.all(moment <= high * (1 + 1e-5))
    assert np.all(moment >= aux["low"] * high * (1 - 1e-5)) and aux["low"] > 0.4


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"kurtosis": 0.5}, "'kurtosis' is 0.5"), ({"num_samples": 0}, "'num_samples'")],
)
def test_bad_numbers_are_named(knobs, message):
    for function in (second_moment_quadratic, second_moment_bounds):
        with pytest.raises(ValueError, match=message):
            function(*as_arrays(*problem(3)), **knobs)
