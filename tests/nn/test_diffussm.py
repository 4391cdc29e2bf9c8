"""DiffuSSM's block against its equations in float64, and how its work grows."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.nn.diagonal_ssm import DiagonalSSM
from jaxzoo.nn.diffussm import DiffuSSM, DiffuSSMBlock
from jaxzoo.training.cost import count

WIDTH, TOKENS, TIMES, STATES = 6, 8, 4, 3
BLOCK = DiffuSSMBlock(WIDTH, TIMES, STATES)
X = jax.random.normal(jax.random.key(0), (2, TOKENS, WIDTH))
CONDITION = jax.random.normal(jax.random.key(1), (2, 5))


def moved(params):
    """Parameters that begin at 0 would hide what they scale."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return tree.unflatten(
        x + 0.3 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    )


def gelu(x):
    return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def test_a_block_is_its_equations():
    params = moved(BLOCK.init(jax.random.key(3), X, CONDITION))
    found = jax.jit(BLOCK.apply)(params, X, CONDITION)
    p = jax.tree.map(lambda v: np.asarray(v, np.float64), params["params"])
    ssm = DiagonalSSM(2 * WIDTH, STATES, bidirectional=True)
    for row in range(2):
        x, c = (np.asarray(v[row], np.float64) for v in (X, CONDITION))
        shift, scale, gain = np.split(dense(c / (1 + np.exp(-c)), p["condition"]), 3)
        centred = x - x.mean(-1, keepdims=True)
        inner = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        inner = inner * (1 + scale) + shift
        mixed = gelu(dense(inner, p["mix"]))
        # Token j stands at place k = j mod M of the shorter token l = j // M.
        short = np.zeros((TOKENS // TIMES, 2 * WIDTH))
        part = 2 * WIDTH // TIMES
        for j in range(TOKENS):
            k = j % TIMES
            short[j // TIMES, k * part : (k + 1) * part] = gelu(mixed[j] @ p["up"][k])
        own = {"params": params["params"]["ssm"]}
        y = np.asarray(ssm.apply(own, jnp.float32(short)[None])[0], np.float64)
        long = np.stack(
            [gelu(y[j // TIMES] @ p["down"][j % TIMES]) for j in range(TOKENS)]
        )
        gated = gelu(dense(inner, p["gate"])) * gelu(dense(long, p["value"]))
        expected = x + gain * dense(gated, p["out"])
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


def test_every_token_sees_every_token_and_the_condition():
    net: Any = DiffuSSM(width=WIDTH, depth=2, out=2, compress=TIMES, states=STATES)
    params = moved(net.init(jax.random.key(3), X[..., :1], CONDITION))

    def of_first(x, c):
        return net.apply(params, x, c)[0, 3, 0]

    by_token, by_condition = jax.grad(of_first, (0, 1))(X[..., :1], CONDITION)
    assert (jnp.abs(by_token[0]) > 1e-7).all()
    assert (by_token[1] == 0).all()
    assert (jnp.abs(by_condition[0]) > 0).all()


def test_it_begins_as_the_identity_and_answers_0():
    params = BLOCK.init(jax.random.key(3), X, CONDITION)
    np.testing.assert_array_equal(BLOCK.apply(params, X, CONDITION), X)
    net: Any = DiffuSSM(width=WIDTH, depth=1, out=2, compress=1, states=STATES)
    params = net.init(jax.random.key(3), X, CONDITION)
    y = net.apply(params, X, CONDITION)
    assert y.shape == (2, TOKENS, 2) and (y == 0).all()


def test_the_work_grows_linearly():
    """Twice the tokens, twice the FLOPs, but for the logarithm in the FFT's."""
    net = DiffuSSM(width=64, depth=1, out=2)

    def flops(length):
        x, c = jnp.zeros((1, length, 1)), jnp.zeros((1, 8))
        params = jax.eval_shape(net.init, jax.random.key(0), x, c)
        return count(jax.make_jaxpr(net.apply)(params, x, c)).flops

    exponent = math.log2(flops(4096) / flops(2048))
    assert exponent == pytest.approx(1.0, abs=0.05)


def test_a_factor_that_does_not_divide_is_named():
    with pytest.raises(
        ValueError, match="'compress' is 3, expected a divisor of the 8"
    ):
        DiffuSSMBlock(WIDTH, 3).init(jax.random.key(0), X, CONDITION)
