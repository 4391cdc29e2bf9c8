"""VeLU and its penalty against the formulas in float64, and the running statistic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.optim.velu import VeLU, velu, w2_penalty


def of_the_paper(x, std, lam, *, alpha, beta1, beta2, gamma, mu):
    bounded = np.clip(beta2 * x, -1 + 1e-6, 1 - 1e-6)
    inside = alpha * (np.arctan(beta1 * x) + np.arcsin(bounded))
    factor = np.clip(1 + gamma * np.tanh(mu * std), 0.5, 2.0)
    return lam * x / (1 + np.exp(-inside)) * factor


@pytest.mark.parametrize("gamma", [0.5, -0.9, 3.0])  # the last two meet the clamp
def test_it_is_the_papers(gamma):
    x = np.linspace(-5.0, 5.0, 101)
    knobs = {"alpha": 1.3, "beta1": 0.7, "beta2": 0.4, "gamma": gamma, "mu": 2.0}
    got = velu(x.astype(np.float32), 1.5, lam=0.8, **knobs)
    assert_allclose(got, of_the_paper(x, 1.5, 0.8, **knobs), rtol=2e-5, atol=1e-6)
    plain = of_the_paper(x, 0.0, 0.8, **knobs)
    assert np.abs(got - plain).max() > 0.1  # the spread matters


@pytest.mark.parametrize("size", [0.0, 1.0, 1e30])
def test_slopes_are_finite_where_the_arc_sine_is_clipped(size):
    x = size * jnp.array([-1.0, 0.0, 0.5, 1.0])
    assert np.all(np.isfinite(jax.grad(lambda x: velu(x, 1.0).sum())(x)))
    assert np.all(np.isfinite(jax.grad(lambda x: w2_penalty(x)[0])(x)))


def test_the_penalty_is_the_closed_form():
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(50, 4))
    penalty, aux = w2_penalty(x.astype(np.float32), weight=0.1)
    assert_allclose(aux["w2"], x.mean() ** 2 + (x.std() - 1) ** 2, rtol=1e-5)
    assert_allclose(penalty, 0.1 * aux["w2"], rtol=1e-6)
    normal = (x - x.mean()) / x.std()
    assert float(w2_penalty(normal.astype(np.float32))[0]) < 1e-10


def test_the_layer_follows_its_input_while_it_trains_and_not_after():
    layer, x = VeLU(momentum=0.75), jnp.array([[1.0, 5.0]])
    variables: Any = layer.init(jax.random.key(0), x)
    assert float(variables["batch_stats"]["std"]) == 1.0
    both: Any = layer.apply(variables, x, mutable=["batch_stats", "intermediates"])
    out, new = both
    std = new["batch_stats"]["std"]
    assert_allclose(std, 0.75 * 1.0 + 0.25 * 2.0)
    assert_allclose(out, velu(x, std), rtol=1e-6)
    assert_allclose(new["intermediates"]["activation"][0], out)
    still: Any = layer.apply(variables, x)
    assert_allclose(still, velu(x, 1.0), rtol=1e-6)


def test_the_scale_is_trained():
    layer, x = VeLU(), jnp.array([[1.0, 5.0]])
    variables: Any = layer.init(jax.random.key(0), x)

    def total(params):
        out: Any = layer.apply({**variables, "params": params}, x)
        return out.sum()

    gradient = jax.grad(total)(variables["params"])
    assert_allclose(gradient["lam"], velu(x, 1.0).sum(), rtol=1e-6)


def test_what_is_out_of_range_is_named():
    with pytest.raises(ValueError, match="'weight'"):
        w2_penalty(jnp.ones(3), weight=-1.0)
    with pytest.raises(ValueError, match="'mu'"):
        velu(jnp.ones(3), 1.0, mu=float("nan"))
