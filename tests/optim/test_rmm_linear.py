"""The sketch by what it has to do: rank, mean, variance, bytes; in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.optim.rmm_linear import rand_linear, variance_rmm, variance_sgd

KINDS = ["gaussian", "rademacher", "dct", "dft"]
BATCH, INPUTS, OUTPUTS = 12, 5, 4
KEY = jax.random.key(3)


def layer(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (BATCH, INPUTS), (INPUTS, OUTPUTS), (OUTPUTS,), (BATCH, OUTPUTS)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def gradients(key, x, w, b, dy, **kwargs):
    """The cotangents of x, w and b."""

    def of(x, w, b):
        return rand_linear(key, x, w, b, **kwargs)

    return jax.vjp(of, x, w, b)[1](dy)


def sketch_product(key, rho, kind):
    """S S^T, read off the layer itself: x and dy are the identity."""
    one, none = jnp.eye(BATCH), jnp.zeros(BATCH)
    return gradients(key, one, 0 * one, none, one, rho=rho, kind=kind)[1]


def total_variance(x, dy, product):
    """Mean of |x^T S S^T dy - x^T dy|^2 over draws of S S^T, in float64."""
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    error = np.asarray(product, np.float64) - np.eye(len(x))
    return np.square(np.einsum("bi,nbc,co->nio", x, error, dy)).sum((1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_one_s_of_low_rank_stands_between_the_input_and_the_gradient(kind):
    x, w, b, dy = layer()
    product = np.asarray(sketch_product(KEY, 0.5, kind), np.float64)
    rank = np.linalg.matrix_rank(product, tol=1e-4)
    assert rank <= 6
    assert_allclose(product, product.T, atol=1e-6)
    y = rand_linear(KEY, x, w, b, rho=0.5, kind=kind)
    assert_allclose(y, x @ w + b, rtol=1e-5, atol=1e-5)
    dx, dw, db = gradients(KEY, x, w, b, dy, rho=0.5, kind=kind)
    assert_allclose(dx, dy @ w.T, rtol=1e-5, atol=1e-5)
    assert_allclose(db, dy.sum(0), rtol=1e-5, atol=1e-5)
    assert_allclose(dw, x.T.astype(np.float64) @ product @ dy, rtol=1e-4, atol=1e-4)
    assert np.abs(dw - x.T @ dy).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_unbiased_and_has_the_variance_of_the_closed_form(kind):
    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    product = jax.vmap(lambda key: sketch_product(key, 0.25, kind))(keys)
    x, _, _, dy = layer()
    x[:, 0] += 1.0
    dy[:, 0] += 1.0  # so that x^T dy is no small part
    squares = total_variance(x, dy, product)
    mean = np.asarray(product, np.float64).mean(0)
    off = np.linalg.norm(x.T @ (mean - np.eye(BATCH)) @ dy)
    assert off <= 3 * np.sqrt(squares.mean() / draws)
    variance, aux = variance_rmm(x, dy, rho=0.25, kind=kind)
    error = squares.std() / np.sqrt(draws)
    assert abs(variance - squares.mean()) <= 4 * error + 1e-4 * squares.mean()
    assert 4 * error < 0.05 * squares.mean()
    assert_allclose(aux["ratio"], variance / aux["sgd"], rtol=1e-5)


def test_variances_by_the_paper():
    x, _, _, dy = (a.astype(np.float64) for a in layer())
    each = np.einsum("bi,bo->bio", x, dy).reshape(BATCH, -1)
    sgd = BATCH * np.var(each, axis=0, ddof=1).sum()
    assert_allclose(
        variance_sgd(x.astype(np.float32), dy.astype(np.float32)), sgd, 1e-5
    )
    norms, product = (x**2).sum() * (dy**2).sum(), ((x.T @ dy) ** 2).sum()
    value, aux = variance_rmm(x.astype(np.float32), dy.astype(np.float32), rho=0.5)
    assert_allclose(value, (norms + product) / 6, rtol=1e-5)
    assert_allclose(aux["sgd"], sgd, rtol=1e-5)
    assert_allclose(aux["correlation"], product / norms, rtol=1e-5)


def stored_bytes(function, x, w):
    """Bytes between the passes beside the weights and the key, which live anyway."""
    leaves = jax.tree.leaves(jax.vjp(function, x, w)[1])
    arrays = [a for a in leaves if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key)]
    return sum(a.nbytes for a in arrays) - w.nbytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [0.25, 0.5])
def test_stored_bytes_are_rho_times_those_of_a_dense_layer(kind, rho):
    x, w, b, _ = (jnp.asarray(a) for a in layer())
    x = jnp.concatenate([x, x]).reshape(2, 2, 6, INPUTS)  # 24 rows
    dense = stored_bytes(jnp.matmul, x, w)
    assert dense == x.nbytes

    def sketched(x, w):
        return rand_linear(KEY, x, w, b, rho=rho, kind=kind)

    assert stored_bytes(sketched, x, w) == rho * dense


def test_leading_axes_are_rows():
    x, w, b, dy = layer()
    flat = gradients(KEY, x, w, b, dy, rho=0.5)
    deep = gradients(
        KEY, x.reshape(3, 4, INPUTS), w, b, dy.reshape(3, 4, OUTPUTS), rho=0.5
    )
    assert_allclose(deep[0].reshape(x.shape), flat[0], rtol=1e-6)
    assert_allclose(deep[1], flat[1], rtol=1e-6)


def test_under_jit_and_remat_s_is_the_same():
    x, w, b, dy = layer()
    plain = gradients(KEY, x, w, b, dy, rho=0.5)[1]
    assert_allclose(jax.jit(gradients, static_argnames="rho")(
        KEY, x, w, b, dy, rho=0.5)[1], plain, rtol=1e-5)  # fmt: skip

    def scalar(w):
        return jnp.vdot(rand_linear(KEY, x, w, b, rho=0.5), dy)

    assert_allclose(jax.grad(jax.checkpoint(scalar))(w), plain, rtol=1e-5)


def test_bad_arguments_are_named():
    x, w, b, dy = layer()
    for rho in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="argument 'rho' is"):
            rand_linear(KEY, x, w, b, rho=rho)
    with pytest.raises(ValueError, match="argument 'x' has 1 rows"):
        variance_sgd(x[:1], dy[:1])
