"""The equations in float64, the bound against exact minima, and what L must be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.linear_model import lars_path_gram

from jaxzoo.optim.a_coder import a_coder, vr_a_coder

L1, L2 = 0.02, 0.1


def table(rows=24, columns=6, seed=0):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(rows, 1))
    a = rng.normal(size=(rows, columns)) + common
    return a, a @ rng.normal(size=columns) + 0.3 * rng.normal(size=rows)


def soft(x, s, l1=L1, l2=L2, xp=np):
    return xp.sign(x) * xp.maximum(xp.abs(x) - s * l1, 0) / (1 + s * l2)


def problem(a, b, *, blocks, l1=L1, l2=L2):
    """f, its blocks' gradients and the prox for jax; F and its minimum in float64."""
    n, width = len(b), a.shape[1] // blocks
    gram, linear = a.T @ a / n, a.T @ b / n
    split, offset = jnp.asarray(gram.reshape(blocks, width, -1)), jnp.asarray(linear)

    def value(x):
        return 0.5 * x @ (jnp.asarray(gram) @ x) - offset @ x

    def gradient(x, i):
        part = jnp.take(offset.reshape(blocks, width), i, axis=0)
        return jnp.take(split, i, axis=0) @ x - part

    def prox(x, s, i):
        return soft(x, s, l1, l2, jnp)

    def total(x):
        x = np.asarray(x, np.float64)
        smooth = 0.5 * np.einsum("...i,ij,...j", x, gram, x) - x @ linear
        return smooth + l1 * np.abs(x).sum(-1) + l2 / 2 * (x**2).sum(-1)

    ridge = gram + l2 * np.eye(len(gram))
    strength: Any = l1  # scikit-learn's annotation has an int
    best: Any = lars_path_gram(
        linear, ridge, n_samples=1, method="lasso", alpha_min=strength
    )[2]
    return (gradient, prox), value, total, best[:, -1]


def of_the_paper(a, b, x0, *, blocks, cycles, lipschitz, gamma):
    """Algorithm 1, line by line."""
    n, d = a.shape
    parts = np.arange(d).reshape(blocks, -1)

    def grad(w):
        return a.T @ (a @ w - b) / n

    x = y = v = x0
    x_old, p, p_old, z = x0, grad(x0), grad(x0), np.zeros(d)
    weight = total = 0.0
    path = []
    for _ in range(cycles):
        ratio = 2 * (1 + total * gamma) / (5 * lipschitz)
        old_weight, old_total = weight, total
        weight = (ratio + np.sqrt(ratio**2 + 4 * ratio * old_total)) / 2
        total = old_total + weight
        assert_allclose(weight**2 / total, ratio)
        x_old, p_old, y_old = x, p.copy(), y
        x = (old_total * y_old + weight * v) / total
        y, v, z, p = y_old.copy(), v.copy(), z.copy(), p.copy()
        for i in reversed(range(blocks)):
            s = parts[i]
            mixed = np.concatenate([x[: s[-1] + 1], y[s[-1] + 1 :]])
            p[s] = grad(mixed)[s]
            q = p[s] + old_weight / weight * (grad(x_old)[s] - p_old[s])
            z[s] += weight * q
            v[s] = soft(x0[s] - z[s], total)
            y[s] = (old_total * y_old[s] + weight * v[s]) / total
        path.append((y, total))
    return np.array([y for y, _ in path]), np.array([t for _, t in path]), v


@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_five_cycles_by_the_paper(blocks):
    a, b = table()
    x0 = np.random.default_rng(1).normal(size=6)
    knobs: Any = {"lipschitz": 9.0, "gamma": L2}
    path, totals, v = of_the_paper(a, b, x0, blocks=blocks, cycles=5, **knobs)
    with jax.enable_x64(True):
        callables = problem(a, b, blocks=blocks)[0]
        y, aux = a_coder(x0, *callables, num_blocks=blocks, num_cycles=5, **knobs)
    assert y.dtype == jnp.float64
    assert_allclose(aux["path"], path, rtol=1e-10)
    assert_allclose(aux["A"], totals, rtol=1e-12)
    assert_allclose(aux["v"], v, rtol=1e-10)
    assert_allclose(y, path[-1], rtol=1e-10)
    callables = problem(a, b, blocks=blocks)[0]
    small = jnp.asarray(x0, jnp.float32)
    y, _ = a_coder(small, *callables, num_blocks=blocks, num_cycles=5, **knobs)
    assert y.dtype == jnp.float32
    assert_allclose(y, path[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("l2", [0.0, L2])
@pytest.mark.parametrize("start", [0.01, None])
def test_the_gap_stays_below_its_bound(l2, start):
    """|x0 - x*|^2 / 2 A_k, with the true L and with one that has to be found."""
    a, b = table(columns=12)
    callables, value, total, best = problem(a, b, blocks=12, l2=l2)
    x0 = np.ones(12)
    with jax.enable_x64(True):
        _, aux = a_coder(
            x0, *callables, num_blocks=12, num_cycles=200, gamma=l2,
            lipschitz=start or 2 * np.linalg.norm(a.T @ a / 24, 2),
            value=value if start else None,
        )  # fmt: skip
    gap = total(aux["path"]) - total(best)
    assert np.all(gap <= np.sum((x0 - best) ** 2) / (2 * np.asarray(aux["A"])) + 1e-12)
    assert gap[-1] < 1e-3 * gap[0] and np.all(gap > -1e-12)


def test_the_weights_grow_as_the_rates_say():
    x0 = jnp.ones(6)
    knobs: Any = {"num_blocks": 6, "num_cycles": 100, "lipschitz": 5.0}
    callables = problem(*table(), blocks=6)[0]
    k = np.arange(1, 101)
    totals = a_coder(x0, *callables, **knobs)[1]["A"]
    assert np.all(totals >= 0.4 / 5.0 * k**2 / 4)
    totals = np.asarray(a_coder(x0, *callables, gamma=L2, **knobs)[1]["A"])
    assert np.all(totals[1:] / totals[:-1] >= 1 + np.sqrt(0.4 * L2 / 5.0) - 1e-5)


def test_the_line_search_finds_an_l_and_counts_its_passes():
    a, b = table()
    callables, value, _, _ = problem(a, b, blocks=6)
    true = np.linalg.norm(a.T @ a / 24, 2)
    knobs: Any = {"num_blocks": 6, "num_cycles": 60, "value": value}
    y, aux = a_coder(jnp.ones(6), *callables, lipschitz=0.01, **knobs)
    found, passes = np.asarray(aux["lipschitz"]), np.asarray(aux["passes"])
    assert np.all(np.diff(found) >= 0) and found[-1] <= 4 * true
    doublings = np.log2(found[-1] / 0.01)
    assert_allclose(passes.sum(), 2 * (60 + doublings), rtol=1e-6)
    # Those that hold from the first cycle change nothing.
    plain = {k: v for k, v in knobs.items() if k != "value"}
    for lipschitz in (found[-1], 10 * true):
        with_it, aux = a_coder(
            jnp.ones(6), *callables, lipschitz=float(lipschitz), **knobs
        )
        without, _ = a_coder(
            jnp.ones(6), *callables, lipschitz=float(lipschitz), **plain
        )
        assert np.all(aux["passes"] == 2)
        assert_allclose(with_it, without, rtol=1e-6)


def test_too_small_an_l_diverges_without_the_search():
    callables, value, total, _ = problem(*table(), blocks=6, l1=0.0, l2=0.0)
    knobs: Any = {"num_blocks": 6, "num_cycles": 100, "lipschitz": 0.05}
    y, _ = a_coder(jnp.ones(6), *callables, **knobs)
    found, _ = a_coder(jnp.ones(6), *callables, value=value, **knobs)
    assert not total(y) < total(np.ones(6))
    assert total(found) < total(np.ones(6))


def test_logistic_regression_with_l1_meets_its_conditions():
    a, b = table(rows=60, columns=8)
    design = jnp.asarray(a * np.sign(b)[:, None], jnp.float32)

    def value(x):
        return jnp.mean(jnp.logaddexp(0.0, -design @ x))

    def gradient(x, i):
        weights = -jax.nn.sigmoid(-design @ x) / 60
        return jnp.take(design.reshape(60, 4, 2), i, axis=1).T @ weights

    def prox(x, s, i):
        return soft(x, s, L1, 0.0, jnp)

    y, aux = a_coder(
        jnp.zeros(8), gradient, prox, num_blocks=4, num_cycles=1500, lipschitz=0.01,
        value=value,
    )  # fmt: skip
    stationary = soft(np.asarray(y - jax.grad(value)(y)), 1.0, L1, 0.0)
    assert_allclose(stationary, y, atol=1e-4)
    assert 2 <= np.sum(np.abs(stationary) > 1e-3) < 8
    assert aux["lipschitz"][-1] < 10


def test_where_f_is_nan_the_search_ends():
    def gradient(x, i):
        return jnp.full(2, jnp.nan)

    y, aux = a_coder(
        jnp.zeros(4), gradient, lambda x, s, i: x, num_blocks=2, num_cycles=2,
        lipschitz=1.0, value=lambda x: jnp.sum(x),
    )  # fmt: skip
    assert np.all(np.isnan(y)) and np.all(aux["passes"] == 128)


def test_variance_reduced_epochs_by_the_paper():
    a, b = table(rows=5)
    x0 = np.random.default_rng(1).normal(size=6)
    key, lipschitz, epochs, cycles = jax.random.key(3), 20.0, 4, 3

    def grad(w, i, t):
        s = slice(2 * i, 2 * i + 2)
        return a[t, s] * (a[t] @ w - b[t])

    def full(w):
        return a.T @ (a @ w - b) / 5

    weight = total = 1 / (4 * lipschitz)
    z = cycles * weight * full(x0)
    v = soft(x0 - weight * full(x0), weight)
    x, y, center = x0, v, v
    centers = [center]
    for s in range(1, epochs):
        drawn = jax.random.randint(jax.random.split(key, epochs)[s], (cycles, 3), 0, 5)
        old_weight, old_total = weight, total
        weight = np.sqrt(cycles * total * (1 + total * L2) / (8 * lipschitz))
        total, mu, points = total + weight, full(center), []
        for k in range(1, cycles + 1):
            x_old, y_old = x, y
            x = (old_total * center + weight * v) / total
            y, v, z = y.copy(), v.copy(), z.copy()
            for i in (2, 1, 0):
                part, after, t = slice(2 * i, 2 * i + 2), 2 * i + 2, drawn[k - 1, i]
                w = np.concatenate([x[:after], y[after:]])
                w_old = np.concatenate([x_old[:after], y_old[after:]])
                factor = (old_weight if k == 1 else weight) / weight
                q = grad(w, i, t) - grad(center, i, t) + mu[part]
                q = q + factor * (grad(x_old, i, t) - grad(w_old, i, t))
                z[part] += weight * q
                strength = old_total + weight * k / cycles
                v[part] = soft(x0[part] - z[part] / cycles, strength)
                y[part] = (old_total * center[part] + weight * v[part]) / total
            points.append(y)
        center = np.mean(points, axis=0)
        centers.append(center)

    with jax.enable_x64(True):
        rows, targets = jnp.asarray(a), jnp.asarray(b)

        def gradient(x, i, t):
            row = jnp.take(rows, t, axis=0)
            return jnp.take(row.reshape(3, 2), i, axis=0) * (row @ x - targets[t])

        got, aux = vr_a_coder(
            key, x0, gradient, problem(a, b, blocks=3)[0][1], num_blocks=3,
            num_terms=5, num_epochs=epochs, num_cycles=cycles, lipschitz=lipschitz,
            gamma=L2,
        )  # fmt: skip
    assert_allclose(aux["path"], centers, rtol=1e-9)
    assert_allclose(got, centers[-1], rtol=1e-9)
    assert_allclose(aux["A"][-1], total, rtol=1e-12)
    assert_allclose(aux["passes"], [1.0] + 3 * [1 + 4 * 3 / 5])


def test_variance_reduction_arrives_at_the_minimum():
    a, b = table()
    (_, prox), _, total, best = problem(a, b, blocks=6)
    rows, targets = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)

    def gradient(x, i, t):
        row = jnp.take(rows, t, axis=0)
        return (jnp.take(row, i) * (row @ x - targets[t]))[None]

    run = jax.jit(jax.vmap(lambda key: vr_a_coder(
        key, jnp.zeros(6), gradient, prox, num_blocks=6, num_terms=24, num_epochs=40,
        num_cycles=24, lipschitz=8.0, gamma=L2,
    )[0]))  # fmt: skip
    found = run(jax.random.split(jax.random.key(0), 3))
    assert_allclose(found, np.broadcast_to(best, (3, 6)), atol=2e-3)
    assert np.all(total(found) - total(best) < 1e-5)


def test_bad_arguments_are_named():
    callables = problem(*table(), blocks=6)[0]
    knobs: Any = {"num_cycles": 1, "lipschitz": 1.0}
    with pytest.raises(ValueError, match="'num_blocks' is 4, expected a divisor of"):
        a_coder(jnp.zeros(6), *callables, num_blocks=4, **knobs)
    for name in ("lipschitz", "gamma"):
        with pytest.raises(ValueError, match=f"argument '{name}' is -1.0"):
            a_coder(jnp.zeros(6), *callables, num_blocks=6, **{**knobs, name: -1.0})
    with pytest.raises(TypeError, match=r"argument 'x0' is float32\[6,1\]"):
        a_coder(jnp.zeros((6, 1)), *callables, num_blocks=6, **knobs)
