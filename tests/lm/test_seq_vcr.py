"""The regulariser in float64 NumPy, and entropies with closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.seq_vcr import add_pause_tokens, matrix_entropy, seq_vcr

X = (0.6 * np.random.default_rng(0).normal(size=(9, 5, 4))).astype(np.float32)
X[:, :, 1] += 0.7 * X[:, :, 0]


def by_hand(x, lam1, lam2, eta):
    """Position by position with numpy.cov."""
    total = 0.0
    for t in range(x.shape[1]):
        c = np.cov(x[:, t].astype(np.float64), rowvar=False)
        for k in range(len(c)):
            total += lam1 * max(0.0, 1.0 - np.sqrt(c[k, k] + eta))
            total += lam2 * sum(c[k, m] ** 2 for m in range(len(c)) if m != k)
    return total / (x.shape[1] * x.shape[2])


@pytest.mark.parametrize("weights", [(1.0, 0.004), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_loss_by_hand(weights):
    lam1, lam2 = weights
    for scale in (1.0, 3.0):  # below and above the hinge
        loss, aux = seq_vcr(scale * X, lam1=lam1, lam2=lam2, eta=0.01)
        assert_allclose(loss, by_hand(scale * X, lam1, lam2, 0.01), rtol=2e-5)
        assert_allclose(
            loss, lam1 * aux["variance"] + lam2 * aux["covariance"], rtol=1e-6
        )
    assert_allclose(seq_vcr(X)[0], by_hand(X, 1.0, 0.004, 1e-3), rtol=2e-5)


def test_it_is_about_the_batch_and_not_about_the_sequence():
    """Tokens that differ over positions, but agree over the batch, are collapsed."""
    same = np.broadcast_to(X[:1], X.shape)
    loss, aux = seq_vcr(same, eta=1e-4)
    assert_allclose(aux["std"], 0.01, rtol=1e-4)
    assert_allclose(loss, 0.99, rtol=1e-4)
    shifted = X + np.arange(5, dtype=np.float32)[None, :, None]
    assert_allclose(seq_vcr(shifted)[0], seq_vcr(X)[0], rtol=1e-4)


def test_descent_spreads_a_collapsed_batch_and_decorrelates_it():
    x = jnp.asarray(0.05 * X)

    @jax.jit
    def descend(x):
        def step(x, _):
            return x - 5.0 * jax.grad(lambda x: seq_vcr(x, lam2=1.0)[0])(x), None

        return jax.lax.scan(step, x, length=2000)[0]

    _, before = seq_vcr(x, lam2=1.0)
    _, after = seq_vcr(descend(x), lam2=1.0)
    assert before["std"] < 0.1 and after["std"] > 0.9
    assert after["covariance"] < 0.01


def test_masked_tokens_do_not_count():
    mask = np.ones((9, 5), bool)
    mask[6:, 2], mask[1:, 3], mask[:, 4] = False, False, False
    spoilt = np.where(mask[..., None], X, np.nan)
    parts = [by_hand(X[:, :2], 1, 0.5, 1e-3), by_hand(X[:6, 2:3], 1, 0.5, 1e-3)]
    # The fourth position has one row and the fifth none: neither has a covariance.
    expected = (2 * parts[0] + parts[1]) / 3
    loss, _ = seq_vcr(spoilt, lam2=0.5, where=jnp.asarray(mask))
    assert_allclose(loss, expected, rtol=2e-5)
    nothing = jnp.zeros((9, 5), bool)
    value, gradient = jax.value_and_grad(
        lambda x: seq_vcr(x, where=nothing)[0]
    )(jnp.asarray(spoilt))  # fmt: skip
    assert value == 0 and np.all(np.asarray(gradient) == 0)


def test_zero_states_and_bfloat16():
    gradient = jax.grad(lambda x: seq_vcr(x)[0])(jnp.zeros(X.shape))
    assert np.all(np.isfinite(gradient))
    small = jnp.asarray(X, jnp.bfloat16)
    loss = seq_vcr(small)[0]
    assert loss.dtype == jnp.float32
    assert_allclose(loss, seq_vcr(small.astype(jnp.float32))[0])


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4)])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_entropy_by_singular_values(shape, alpha):
    hidden = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    p = np.linalg.svd(hidden.astype(np.float64), compute_uv=False) ** 2
    p /= p.sum(1, keepdims=True)
    if alpha == 1.0:
        expected = -(p * np.log(p)).sum(1)
    else:
        expected = np.log((p**alpha).sum(1)) / (1 - alpha)
    assert_allclose(matrix_entropy(hidden, alpha=alpha), expected, rtol=2e-5)


def test_entropy_in_closed_form():
    for alpha in (0.5, 1.0, 2.0):
        flat = matrix_entropy(7.0 * jnp.eye(5), alpha=alpha)
        assert_allclose(flat, np.log(5.0), rtol=1e-5)
        line = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(3))
        assert_allclose(matrix_entropy(line, alpha=alpha), 0.0, atol=1e-5)
        assert matrix_entropy(jnp.zeros((4, 3)), alpha=alpha) == 0
    # Neither the scale nor the basis matters.
    hidden = jnp.asarray(X[0])
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0]
    turned = 1e20 * hidden @ jnp.asarray(turn, jnp.float32)
    assert_allclose(matrix_entropy(turned), matrix_entropy(hidden), rtol=1e-4)


def test_pauses_come_after_the_question():
    question = jnp.arange(6).reshape(2, 3)
    longer = add_pause_tokens(question, num_pauses=2, pause_token=9)
    assert_array_equal(longer, [[0, 1, 2, 9, 9], [3, 4, 5, 9, 9]])
    assert longer.dtype == question.dtype
    one = add_pause_tokens(question[0], num_pauses=1, pause_token=9)
    assert_array_equal(one, [0, 1, 2, 9])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'x' has 1 row over all devices, expected 2"):
        seq_vcr(X[:1])
    with pytest.raises(TypeError, match=r"'x' is float32\[9,4\], expected"):
        seq_vcr(X[:, 0])
    with pytest.raises(TypeError, match="'where' is bool.*batch=9"):
        seq_vcr(X, where=jnp.ones((5, 9), bool))
    with pytest.raises(ValueError, match="'lam2' is -1.0"):
        seq_vcr(X, lam2=-1.0)
    with pytest.raises(ValueError, match="'eta' is 0.0"):
        seq_vcr(X, eta=0.0)
    with pytest.raises(ValueError, match="'axis_name' is 'rows'"):
        seq_vcr(X, axis_name="rows")
    with pytest.raises(ValueError, match="'alpha' is 0.0"):
        matrix_entropy(X, alpha=0.0)
    with pytest.raises(ValueError, match="'num_pauses' is 0"):
        add_pause_tokens(jnp.zeros((2, 3), jnp.int32), num_pauses=0, pause_token=9)
