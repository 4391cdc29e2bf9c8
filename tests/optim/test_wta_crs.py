"""The estimator by the paper in float64 NumPy; its mean, variance and bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.optim.wta_crs import linear_wta, variance_wta_crs, wta_crs_matmul

KEY = jax.random.key(2)
PAIRS = 16


def sample(power=1.0, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.permutation((1.0 + np.arange(PAIRS)) ** -power)
    x, y = rng.normal(size=(3, PAIRS)) * sizes, rng.normal(size=(PAIRS, 4))
    return x.astype(np.float32), y.astype(np.float32)


def of_the_paper(x, y, k):
    """p, the winners, and the total variances with them and without, in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    p = np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=1)
    p /= p.sum()
    order = np.argsort(-p)
    cost = [(1 - p[order[:c]].sum()) / (k - c) for c in range(k)]
    winners = order[: int(np.argmin(cost))]
    rest = [i for i in range(len(p)) if i not in winners]

    def variance(among, draws):
        q = p[among] / p[among].sum()
        terms = np.einsum("ni,ik->ink", x[:, among], y[among]) / q[:, None, None]
        mean = np.einsum("i,ink->nk", q, terms)
        return (q * np.square(terms - mean).sum((1, 2))).sum() / draws

    plain = variance(np.arange(len(p)), k)
    return p, winners, variance(rest, k - len(winners)), plain


@pytest.mark.parametrize(
    "power, k", [(0.0, 6), (1.0, 6), (2.0, 6), (1.0, 1), (3.0, 15)]
)
def test_winners_weights_and_sum_by_the_paper(power, k):
    x, y = sample(power)
    p, winners, _, _ = of_the_paper(x, y, k)
    estimate, aux = wta_crs_matmul(KEY, x, y, k=k)
    index, count = np.asarray(aux["index"]), int(aux["winners"])
    assert count == len(winners) and len(index) == k
    assert set(index[:count]) == set(winners)
    assert not set(index[count:]) & set(winners)
    left = 1 - p[winners].sum()
    expected = [1.0] * count + [left / ((k - count) * p[j]) for j in index[count:]]
    assert_allclose(aux["weight"], expected, rtol=1e-4)
    total = sum(
        w * np.outer(x[:, j], y[j]) for w, j in zip(expected, index, strict=True)
    )
    assert_allclose(estimate, total, rtol=1e-4, atol=1e-4 * np.abs(total).max())


@pytest.mark.parametrize("power", [0.5, 2.0])
def test_unbiased_with_the_variance_of_the_closed_form(power):
    x, y = sample(power)
    draws, k = 100_000, 6
    keys = jax.random.split(jax.random.key(0), draws)
    every = jax.jit(jax.vmap(lambda key: wta_crs_matmul(key, x, y, k=k)[0]))(keys)
    every, exact = np.asarray(every, np.float64), x.astype(np.float64) @ y
    squares = np.square(every - exact).sum((1, 2))
    off = np.linalg.norm(every.mean(0) - exact)
    assert off <= 3 * np.sqrt(squares.mean() / draws)
    variance, aux = variance_wta_crs(x, y, k=k)
    _, winners, expected, plain = of_the_paper(x, y, k)
    assert_allclose(variance, expected, rtol=1e-4)
    assert_allclose(aux["crs"], plain, rtol=1e-4)
    assert aux["winners"] == len(winners) > 0
    error = squares.std() / np.sqrt(draws)
    assert abs(squares.mean() - expected) <= 4 * error
    assert expected < plain


def test_with_winners_the_variance_is_below_that_of_plain_sampling():
    """Theorem 2, with its bound on the ratio, over many pairs of matrices."""
    seen = 0
    both = jax.jit(variance_wta_crs, static_argnames="k")
    for seed in range(40):
        x, y = sample([0.5, 1.0, 2.0][seed % 3], seed)
        variance, aux = both(x, y, k=8)
        count, mass = int(aux["winners"]), float(aux["mass"])
        if mass > count / 8:
            seen += 1
            assert variance < aux["crs"]
            assert variance <= 1.0001 * (1 - mass) * 8 / (8 - count) * aux["crs"]
    assert seen > 20


def layer(rows=PAIRS, seed=0):
    x, dy = sample(1.0, seed)
    rng = np.random.default_rng(seed + 1)
    x, dy = np.resize(x.T, (rows, 3)), np.resize(dy, (rows, 4))
    norms = rng.uniform(0.5, 2.0, rows).astype(np.float32)
    w, b = rng.normal(size=(3, 4)), rng.normal(size=4)
    return x, w.astype(np.float32), b.astype(np.float32), norms, dy


def gradients(key, x, w, b, norms, dy, k):
    return jax.vjp(functools.partial(linear_wta, key, k=k), x, w, b, norms)[1](dy)


def test_the_layer_is_exact_but_for_the_weight_gradient():
    x, w, b, norms, dy = layer()
    y = linear_wta(KEY, x, w, b, norms, k=5)
    assert_allclose(y, x @ w + b, rtol=1e-5, atol=1e-5)
    dx, dw, db, seen = gradients(KEY, x, w, b, norms, dy, 5)
    assert_allclose(dx, dy @ w.T, rtol=1e-5, atol=1e-5)
    assert_allclose(db, dy.sum(0), rtol=1e-5, atol=1e-5)
    assert_allclose(seen, np.linalg.norm(dy, axis=1), rtol=1e-5)
    assert np.abs(dw - x.T @ dy).max() > 1e-3
    exact = gradients(KEY, x, w, b, norms, dy, PAIRS)[1]
    assert_allclose(exact, x.T @ dy, rtol=1e-5, atol=1e-5)


def test_with_the_true_norms_it_is_the_estimator_of_the_product():
    x, w, b, _, dy = layer()
    norms = np.linalg.norm(dy, axis=1)
    dw = gradients(KEY, x, w, b, norms, dy, 5)[1]
    assert_allclose(dw, wta_crs_matmul(KEY, x.T, dy, k=5)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guess", ["some", "wrong", "zeros"])
def test_the_weight_gradient_is_unbiased_whatever_the_stored_norms_are(guess):
    x, w, b, norms, dy = layer()
    if guess == "wrong":  # nothing is expected where most is
        norms = np.where(np.arange(PAIRS) % 4 == 0, 0.05, norms).astype(np.float32)
    norms = 0 * norms if guess == "zeros" else norms
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    every = jax.jit(jax.vmap(lambda key: gradients(key, x, w, b, norms, dy, 5)[1]))(
        keys
    )
    every = np.asarray(every, np.float64)
    squares = np.square(every - x.T @ dy).sum((1, 2))
    off = np.linalg.norm(every.mean(0) - x.T @ dy)
    assert off <= 3 * np.sqrt(squares.mean() / draws)


@pytest.mark.parametrize("k", [1, 8])
def test_k_rows_are_stored(k):
    x, w, b, norms, _ = layer(rows=32)
    f = functools.partial(linear_wta, KEY, k=k)
    vjp = jax.vjp(f, *(jnp.asarray(a) for a in (x, w, b, norms)))[1]
    leaves = jax.tree.leaves(vjp)
    floats = [a for a in leaves if jnp.issubdtype(a.dtype, jnp.floating)]
    assert sum(a.nbytes for a in floats) - w.nbytes == k * x[0].nbytes
    assert sum(a.nbytes for a in leaves if a.dtype == jnp.int32) == 4 * k
    dense = jax.tree.leaves(jax.vjp(jnp.matmul, jnp.asarray(x), jnp.asarray(w))[1])
    assert sum(a.nbytes for a in dense) - w.nbytes == 32 * x[0].nbytes


def test_leading_axes_are_rows():
    x, w, b, norms, dy = layer()
    flat = gradients(KEY, x, w, b, norms, dy, 5)
    shapes = [(4, 4, 3), (4, 4), (4, 4, 4)]
    deep = [a.reshape(s) for a, s in zip((x, norms, dy), shapes, strict=True)]
    got = gradients(KEY, deep[0], w, b, deep[1], deep[2], 5)
    assert_allclose(got[1], flat[1], rtol=1e-6)
    assert_allclose(got[3].reshape(-1), flat[3], rtol=1e-6)


def test_zero_pairs_are_never_drawn_and_nothing_is_divided_by_zero():
    x, y = sample()
    x[:, 4:] = 0
    keys = jax.random.split(KEY, 200)
    estimate, aux = jax.vmap(lambda key: wta_crs_matmul(key, x, y, k=3))(keys)
    assert np.all(np.isfinite(estimate)) and np.all(aux["index"] < 4)
    estimate, _ = wta_crs_matmul(KEY, 0 * x, y, k=3)
    assert np.all(estimate == 0)
    variance, aux = variance_wta_crs(0 * x, y, k=3)
    assert variance == 0 and aux["crs"] == 0


def test_bad_arguments_are_named():
    x, y = sample()
    with pytest.raises(ValueError, match="argument 'k' is 0"):
        wta_crs_matmul(KEY, x, y, k=0)
    with pytest.raises(TypeError, match=r"argument 'y' is float32\[15,4\]"):
        wta_crs_matmul(KEY, x, y[:-1], k=3)
    x, w, b, norms, _ = layer()
    with pytest.raises(TypeError, match="argument 'grad_norm' is"):
        linear_wta(KEY, x, w, b, norms[:-1], k=3)
