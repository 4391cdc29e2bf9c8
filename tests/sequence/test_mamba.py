"""Discretisation, selection, the gate of theorem 1 and the two tasks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxzoo.nn.mamba import Mamba
from jaxzoo.sequence.mamba import (
    discretize,
    gated_recurrence,
    induction_heads,
    selection,
    selective_copying,
)
from pallas_kernels.selective_scan import selective_scan


def test_a_step_is_the_matrix_exponential_of_the_equation():
    """exp of [[A, B], [0, 0]] delta has the exact step in its first row."""
    rng = np.random.default_rng(0)
    delta, A, B = rng.uniform(0, 3, (2, 4)), -rng.uniform(0, 4, (4, 3)), np.ones((2, 3))
    B = rng.normal(size=B.shape)
    A[0, 0] = 0.0
    decay, gain = discretize(
        *(jnp.float32(v) for v in (delta, A, B)), method="zoh"
    )  # fmt: skip
    for b, d, n in np.ndindex(2, 4, 3):
        system = np.array([[A[d, n], B[b, n]], [0, 0]]) * delta[b, d]
        exact = scipy.linalg.expm(system)[0]
        np.testing.assert_allclose(
            [decay[b, d, n], gain[b, d, n]], exact, rtol=2e-6, atol=1e-7
        )


def test_both_methods_meet_at_small_steps_and_differ_at_large_ones():
    A, B = -jnp.ones((1, 1)), jnp.ones(1)
    gains = {
        (method, step): discretize(jnp.full(1, step), A, B, method=method)[1].item()
        for method in ("euler", "zoh")
        for step in (1e-4, 2.0)
    }
    assert gains["euler", 1e-4] == pytest.approx(gains["zoh", 1e-4], rel=1e-4)
    assert gains["euler", 2.0] == pytest.approx(2.0)
    assert gains["zoh", 2.0] == pytest.approx(1 - np.exp(-2.0), rel=1e-6)


@pytest.mark.parametrize("exponent", [0.0, -5e-5, -2e-4, -1.0])
def test_the_slope_of_the_exact_step_is_right_across_the_series(exponent):
    def gain(a):
        return discretize(jnp.ones(1), a.reshape(1, 1), jnp.ones(1), method="zoh")[1][
            0, 0
        ]

    # d/da (e^a - 1) / a by its series, which converges for all of these.
    expected = sum(
        k * exponent ** (k - 1) / np.prod(range(1, k + 2)) for k in range(1, 20)
    )
    slope = jax.grad(gain)(jnp.float32(exponent))
    np.testing.assert_allclose(slope, expected, rtol=2e-3)


def test_selection_is_algorithm_2_token_by_token():
    """The weights of the block of nn, whose scan it feeds."""
    block = Mamba(4, states=3, expand=1, conv=1, rank=2)
    x = jax.random.normal(jax.random.key(0), (2, 6, 4))
    params: Any = block.init(jax.random.key(1), x)
    p = params["params"]
    u, z = jnp.split(x @ p["in_proj"]["kernel"], 2, axis=-1)
    u = jax.nn.silu(u * p["conv"].reshape(1, 1, -1) + p["conv_bias"].reshape(1, 1, -1))
    down, to_b, to_c = jnp.split(p["x_proj"]["kernel"], [2, 5], axis=1)
    up, bias = p["dt_proj"]["kernel"], p["dt_bias"]
    delta, b, c = selection(u, down=down, up=up, bias=bias, to_B=to_b, to_C=to_c)
    tokens = np.asarray(u, np.float64)
    for row, t in np.ndindex(2, 6):
        low = tokens[row, t] @ np.asarray(down, np.float64)
        step = np.log1p(np.exp(low @ np.asarray(up, np.float64) + np.asarray(bias)))
        np.testing.assert_allclose(delta[row, t], step, rtol=1e-5)
        np.testing.assert_allclose(b[row, t], tokens[row, t] @ to_b, atol=1e-6)
        np.testing.assert_allclose(c[row, t], tokens[row, t] @ to_c, atol=1e-6)
    y = selective_scan(u, delta, -jnp.exp(p["A_log"]), b, c, D=p["D"], z=z)
    found, _ = block.apply(params, x)
    np.testing.assert_allclose(found, y @ p["out_proj"]["kernel"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_theorem_1(scale):
    """The gated recurrence, in float64, and the scan that it is."""
    rng = np.random.default_rng(2)
    x, logits = rng.normal(size=(2, 1, 9, 3)) * np.array([1, scale]).reshape(2, 1, 1, 1)
    start = rng.normal(size=(1, 3))
    h, expected = start, []
    for t in range(9):
        gate = 1 / (1 + np.exp(-logits[:, t]))
        h = (1 - gate) * h + gate * x[:, t]
        expected.append(h)
    expected = np.stack(expected, axis=1)
    x, logits, start = (jnp.float32(v) for v in (x, logits, start))
    found = gated_recurrence(x, logits, initial_state=start)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    one = jnp.ones((1, 9, 1))
    scan = selective_scan(
        x, logits, -jnp.ones((3, 1)), one, one, initial_state=start[..., None],
        delta_softplus=True, discretization="zoh",
    )  # fmt: skip
    np.testing.assert_allclose(scan, expected, rtol=1e-5, atol=1e-6)


def test_what_is_copied_stands_in_order_among_noise():
    x, y = selective_copying(jax.random.key(0), 500, length=12, count=3, vocabulary=7)
    assert x.shape == (500, 15)
    body = np.asarray(x[:, :12])
    assert ((body != 0).sum(1) == 3).all()
    for row, tokens in zip(body, np.asarray(y), strict=True):
        assert row[row != 0].tolist() == tokens.tolist()
    assert (np.asarray(x[:, 12:]) == 1).all()
    # Each place holds a token in a quarter of the rows, and each token comes as often.
    share = (body != 0).mean(0)
    assert np.abs(share - 0.25).max() < 5 * (0.25 * 0.75 / 500) ** 0.5
    counts = np.bincount(np.asarray(y).ravel(), minlength=7)
    assert (counts[:2] == 0).all()
    assert np.abs(counts[2:] - 300).max() < 5 * 300**0.5


def test_what_followed_the_mark_is_the_answer():
    x, y = induction_heads(jax.random.key(1), 600, length=6, vocabulary=5)
    rows = np.asarray(x)
    assert ((rows == 0).sum(1) == 2).all()
    assert (rows[:, -1] == 0).all()
    first = (rows == 0).argmax(1)
    assert (rows[np.arange(600), first + 1] == np.asarray(y)).all()
    assert np.abs(np.bincount(first, minlength=4) - 150).max() < 5 * 150**0.5
    assert (np.bincount(np.asarray(y), minlength=5)[1:] > 100).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: selective_copying(k, 1, length=3, count=4, vocabulary=5), "'count'"),
        (lambda k: selective_copying(k, 0, length=3, count=1, vocabulary=5), "'batch'"),
        (lambda k: induction_heads(k, 1, length=2, vocabulary=5), "'length' is 2"),
        (lambda k: induction_heads(k, 1, length=4, vocabulary=2), "'vocabulary' is 2"),
    ],
)
def test_sizes_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jax.random.key(0))
