"""Filters and blocks of diagonal state spaces against recurrences in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.nn.diagonal_ssm import DiagonalSSM, DiagonalStack, fft_conv, waves

WIDTH, STATES, LENGTH = 3, 4, 11
X = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))


def recurrence(x, rates, weights):
    """y_t = 2 Re sum_n w_n h_t, h_t = e^rate h_(t-1) + x_t; one sequence."""
    h, out = np.zeros(rates.shape, complex), []
    for token in x:
        h = np.exp(rates) * h + token[:, None]
        out.append(2 * (weights * h).sum(-1).real)
    return np.stack(out)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 37])
def test_filters_are_what_the_recurrence_answers_to_one_token(length):
    rng = np.random.default_rng(length)
    rates = -rng.uniform(0.01, 1, (2, 3)) + 1j * rng.uniform(0, 20, (2, 3))
    weights = rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3))
    impulse = np.zeros((length, 2))
    impulse[0] = 1
    found = waves(jnp.complex64(rates), jnp.complex64(weights), length)
    np.testing.assert_allclose(found, recurrence(impulse, rates, weights), atol=3e-4)


def test_a_long_filter_stays_exact_at_high_frequency():
    """Phases of thousands of turns, whose float32 sum would be off."""
    rates = np.array([[-1e-3 + 3.1j]])
    found = waves(jnp.complex64(rates), jnp.ones((1, 1), jnp.complex64), 784)
    rate = complex(np.complex64(rates[0, 0]))
    exact = 2 * np.real(np.exp(rate * np.arange(784)))
    np.testing.assert_allclose(found[:, 0], exact, atol=2e-3)


@pytest.mark.parametrize("kind", ["s4d", "dlr"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_block_is_its_recurrence(kind, bidirectional):
    block = DiagonalSSM(WIDTH, STATES, kind, bidirectional)
    params = block.init(jax.random.key(1), X)
    y = jax.jit(block.apply)(params, X)
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params["params"])

    def filtered(x, name):
        step, decay = np.exp(p[f"{name}log_step"]), np.exp(p[f"{name}log_decay"])
        weights = p[f"{name}C"][..., 0] + 1j * p[f"{name}C"][..., 1]
        if kind == "dlr":
            rates = -step * decay + 1j * p[f"{name}turn"]
            return recurrence(x, rates, weights / STATES)
        a = -decay + 1j * p[f"{name}turn"]
        # The integral of e^(a s) over a step, by many midpoints.
        held = np.zeros_like(a)
        for point in (np.arange(4000) + 0.5) / 4000:
            held += np.exp(a * step * point) * step / 4000
        return recurrence(x, step * a, weights * held)

    for row in range(2):
        x = np.asarray(X[row], np.float64)
        mixed = filtered(x, "") + p["D"] * x
        if bidirectional:
            later = np.concatenate([x[1:], np.zeros((1, WIDTH))])
            mixed += filtered(later[::-1], "back_")[::-1]
        cubic = mixed + 0.044715 * mixed**3
        mixed = mixed / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * cubic))
        value, gate = np.split(mixed @ p["out"]["kernel"] + p["out"]["bias"], 2, -1)
        np.testing.assert_allclose(y[row], value / (1 + np.exp(-gate)), atol=2e-5)


def test_one_direction_sees_nothing_later_and_two_see_all():
    for bidirectional in (False, True):
        block = DiagonalSSM(WIDTH, STATES, bidirectional=bidirectional)
        params = block.init(jax.random.key(1), X)

        def output(x, block: Any = block, params=params):
            return block.apply(params, x)[0, 4].sum()

        slope = jax.jacrev(output)(X)
        later = jnp.abs(slope[0, 5:]).max()
        assert (later > 1e-3) if bidirectional else (later < 1e-5)


def test_convolution_is_that_of_numpy():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 9, 2)), rng.normal(size=(9, 2))
    found = fft_conv(jnp.float32(x), jnp.float32(kernel))
    for d in range(2):
        expected = np.convolve(x[0, :, d], kernel[:, d])[:9]
        np.testing.assert_allclose(found[0, :, d], expected, atol=1e-5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'length' is 0"):
        waves(jnp.zeros((1, 1), jnp.complex64), jnp.zeros((1, 1), jnp.complex64), 0)
    with pytest.raises(ValueError, match="'kind' is 's5'"):
        DiagonalSSM(WIDTH, kind="s5").init(jax.random.key(0), X)  # pyright: ignore


def test_a_stack_is_its_blocks_in_turn():
    block: Any = DiagonalSSM(WIDTH, STATES)
    stack = DiagonalStack(block, 2)
    params = stack.init(jax.random.key(2), X)
    found, _ = stack.apply(params, X)

    def normed(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)

    x = X
    for i in range(2):
        own = jax.tree.map(lambda v, i=i: v[i], params["params"]["layers"]["mixer"])
        x = x + block.apply({"params": own}, normed(x))
    np.testing.assert_allclose(found, normed(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'segment_ids'"):
        stack.apply(params, X, segment_ids=jnp.zeros((2, LENGTH), int))
