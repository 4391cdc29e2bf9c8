"""Boosting written out in float64 around the parts that were trained."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.optim.gbnn import gbnn, pseudo_residuals

KINDS = {"regression": None, "two classes": 2, "three classes": 3}


def table(kind, rows=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    signal = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]
    if KINDS[kind] is None:
        return x, (signal + 2.0).astype(np.float32)
    cuts = np.quantile(signal, [0.3, 0.8])[: KINDS[kind] - 1]
    return x, np.digitize(signal, cuts).astype(np.int32)


@functools.cache
def fit(kind):
    """Compiled once: L-BFGS takes its time to compile."""
    return jax.jit(
        lambda seed, x, y, shrinkage: gbnn(
            jax.random.key(seed), x, y, num_steps=5, num_units=3,
            num_classes=KINDS[kind], shrinkage=shrinkage, subsample=0.9,
            num_iterations=30,
        )
    )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def fitted(request):
    x, y = table(request.param)
    return request.param, x, y, *fit(request.param)(0, x, y, 0.5)


def output(part, x):
    kernel, bias, readout, shift = (np.asarray(p, np.float64) for p in part)
    return 1 / (1 + np.exp(-(x @ kernel + bias))) @ readout + shift


def of_the_paper(kind, f, y):
    """Mean loss, pseudo-residuals, and the Newton step as a function of h."""
    if kind == "regression":
        r = y[:, None] - f
        return np.mean(r**2 / 2), r, lambda h: 1.0
    if kind == "two classes":
        sign = 2.0 * y[:, None] - 1
        r = 2 * sign / (1 + np.exp(2 * sign * f))
        loss = np.mean(np.log(1 + np.exp(-2 * sign * f)))
        bottom = r * (2 * sign - r)
        return loss, r, lambda h: np.sum(r * h) / np.sum(h**2 * bottom)
    p = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
    r = np.eye(3)[y] - p
    loss = -np.mean(np.log(p[np.arange(len(y)), y]))
    return loss, r, lambda h: np.sum(r * h) / np.sum(h**2 * p * (1 - p))


def test_the_expansion_is_that_of_the_paper(fitted):
    kind, x, y, model, aux = fitted
    y = y.astype(np.float64) if kind == "regression" else y
    if kind == "regression":
        constant = [y.mean()]
    elif kind == "two classes":
        constant = [0.5 * np.log(y.mean() / (1 - y.mean()))]
    else:
        constant = np.log(np.bincount(y) / len(y))
    assert_allclose(model.constant, constant, rtol=1e-5)
    f = np.tile(np.asarray(constant), (len(y), 1))
    losses = [of_the_paper(kind, f, y)[0]]
    for t in range(5):
        part = [leaf[t] for leaf in model.parts]
        _, r, newton = of_the_paper(kind, f, y)
        got = pseudo_residuals(
            f.astype(np.float32), y=table(kind)[1], num_classes=KINDS[kind]
        )
        assert_allclose(got, r, atol=1e-5)
        h = output(part, x)
        assert_allclose(model.rate[t], 0.5 * newton(h), rtol=1e-4)
        assert_allclose(aux["fit"][t], np.mean((r - h) ** 2), rtol=1e-4)
        assert t or np.mean((r - h) ** 2) < 0.8 * np.mean(r**2)
        f = f + 0.5 * newton(h) * h
        losses.append(of_the_paper(kind, f, y)[0])
        assert_allclose(aux["loss"][t], losses[-1], rtol=1e-4)
    assert np.all(np.diff(losses) < 0)
    assert_allclose(model(x), f, rtol=1e-4, atol=1e-5)


def test_one_network_has_the_outputs_of_the_expansion(fitted):
    _, x, _, model, _ = fitted
    merged = model.merge()
    assert merged.kernel.shape == (3, 15)
    assert_allclose(merged(x), model(x), rtol=1e-5, atol=1e-5)
    # Unit j of part t is column 3 t + j.
    assert_allclose(merged.kernel[:, 7], model.parts.kernel[2, :, 1])
    assert_allclose(
        merged.readout[7], model.rate[2] * model.parts.readout[2, 1], rtol=1e-6
    )


def test_fewer_units_are_an_earlier_stage(fitted):
    _, x, _, model, _ = fitted
    f = np.tile(np.asarray(model.constant, np.float64), (len(x), 1))
    assert_allclose(model.truncate(0)(x), f, rtol=1e-6)
    for kept in range(1, 6):
        part = [leaf[kept - 1] for leaf in model.parts]
        f = f + float(model.rate[kept - 1]) * output(part, x)
        fewer = model.truncate(3 * kept)
        assert_allclose(fewer(x), f, rtol=1e-4, atol=1e-5)
        assert_allclose(fewer.merge()(x), f, rtol=1e-4, atol=1e-5)
    for wrong in (4, 18, -3):
        with pytest.raises(ValueError, match=f"'num_units' is {wrong}, expected a mul"):
            model.truncate(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_pseudo_residuals_are_minus_the_gradient(kind):
    _, y = table(kind)
    classes = KINDS[kind]
    f = np.random.default_rng(1).normal(size=(40, 3 if classes == 3 else 1))
    r = pseudo_residuals(f.astype(np.float32), y, num_classes=classes)

    def total(f):
        return 40 * of_the_paper(kind, f, y)[0]

    for index in np.ndindex(2, f.shape[1]):
        nudge = np.zeros_like(f)
        nudge[index] = 1e-5
        slope = (total(f + nudge) - total(f - nudge)) / 2e-5
        assert_allclose(r[index], -slope, rtol=1e-4)


def test_two_classes_take_the_exact_newton_step(fitted):
    kind, x, y, model, _ = fitted
    if kind != "two classes":
        pytest.skip("the other losses have no such promise")
    constant, sign = model.constant.item(), 2.0 * y[:, None] - 1.0
    h = (model.truncate(3)(x) - constant) / model.rate[0]

    def loss(rho):
        return jnp.sum(jax.nn.softplus(-2.0 * sign * (constant + rho * h)))

    first, second = jax.grad(loss), jax.grad(jax.grad(loss))
    assert_allclose(model.rate[0], -0.5 * first(0.0) / second(0.0), rtol=1e-4)


def test_each_part_draws_its_rows_and_weights_anew():
    x, y = table("regression")
    run = fit("regression")
    a, b = run(0, x, y, 0.3)[0], run(0, x, y, 0.6)[0]
    assert_allclose(a.parts.kernel[0], b.parts.kernel[0], rtol=1e-5)
    assert_allclose(2 * a.rate, b.rate, rtol=1e-6)
    assert np.all(np.abs(a.parts.kernel[0] - a.parts.kernel[1]) > 1e-4)
    other = run(1, x, y, 0.3)[0]
    assert np.any(np.abs(other.parts.kernel - a.parts.kernel) > 0.1)


def test_a_class_that_no_row_has_and_constant_targets_are_finite():
    x, _ = table("regression")
    for kind in ("two classes", "three classes"):
        model, aux = fit(kind)(0, x, np.zeros(40, np.int32), 1.0)
        assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves((model, aux)))
        assert np.all(np.argmax(np.asarray(model(x)), axis=1) == 0)
    model, _ = fit("regression")(0, x, np.full(40, 3.0, np.float32), 1.0)
    assert_allclose(model(x), np.full((40, 1), 3.0), atol=2e-2)


def test_bad_arguments_are_named():
    x, y = table("regression")
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="argument 'y' is float32, expected integer"):
        gbnn(key, x, y, num_steps=1, num_units=1, num_classes=2)
    with pytest.raises(TypeError, match="argument 'f' has 1 columns, expected 3"):
        pseudo_residuals(y[:, None], np.zeros(40, np.int32), num_classes=3)
    for name, value in (("shrinkage", 1.5), ("subsample", 0.0), ("num_classes", 1)):
        with pytest.raises(ValueError, match=f"argument '{name}' is {value}"):
            knobs: Any = {"num_steps": 1, "num_units": 1, name: value}
            gbnn(key, x, y, **knobs)
    with pytest.raises(TypeError, match=r"argument 'y' is float32\[39\]"):
        gbnn(key, x, y[:39], num_steps=1, num_units=1)
