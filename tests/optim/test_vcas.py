"""Probabilities by bisection, the controller in loops, means over many draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.optim.vcas import VCASState, keep_probabilities, vcas_dense, vcas_update

KEY = jax.random.key(5)


def by_bisection(score, budget):
    """min(1, c score) that sums to the budget, in float64."""
    score = np.asarray(score, np.float64)
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        if np.minimum(1, middle * score).sum() < budget:
            low = middle
        else:
            high = middle
    return np.minimum(1, high * score)


@pytest.mark.parametrize("ratio", [0.02, 0.25, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("power", [0.0, 1.0, 4.0])
def test_probabilities_by_bisection(ratio, power):
    score = np.random.default_rng(0).permutation((1.0 + np.arange(20)) ** -power)
    p = keep_probabilities(score.astype(np.float32), ratio=ratio)
    assert_allclose(p, by_bisection(score, 20 * ratio), rtol=2e-5)
    assert_allclose(p.sum(), 20 * ratio, rtol=1e-5)


def test_probabilities_where_few_scores_are_positive():
    score = jnp.zeros(8).at[jnp.array([2, 5])].set(jnp.array([1e-20, 3.0]))
    assert keep_probabilities(score, ratio=0.5).tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    assert np.all(keep_probabilities(jnp.zeros(8), ratio=0.5) == 0)
    assert keep_probabilities(jnp.ones(1), ratio=0.5).tolist() == [0.5]


def layer(seed=0):
    """Examples and tokens of very different sizes."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(8, 3, 4)), rng.normal(size=(8, 3, 5))
    x *= rng.uniform(0.2, 2.0, (8, 3, 1))
    dy *= (1.0 + np.arange(8.0).reshape(8, 1, 1)) ** -1.5
    w, b = rng.normal(size=(4, 5)), rng.normal(size=5)
    return [a.astype(np.float32) for a in (x, w, b, dy)]


def gradients(key, x, w, b, dy, rho=1.0, nu=1.0):
    """The cotangents of x, w, b and nu."""

    def of(x, w, b, nu):
        return vcas_dense(key, x, w, b, rho=rho, nu=nu)

    return jax.vjp(of, x, w, b, jnp.float32(nu))[1](dy)


def exact(x, w, dy):
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    return dy @ w.T, np.einsum("nti,nto->io", x, dy), dy.sum((0, 1))


def test_nothing_is_dropped_at_one():
    x, w, b, dy = layer()
    assert_allclose(vcas_dense(KEY, x, w, b, rho=0.3, nu=0.3), x @ w + b, 1e-5, 1e-5)
    got = gradients(KEY, x, w, b, dy)
    for a, e in zip(got, exact(x, w, dy), strict=False):
        assert_allclose(a, e, rtol=1e-4, atol=1e-5)
    assert got[3] == 0


def test_examples_are_dropped_whole_and_scaled_by_their_probability():
    x, w, b, dy = layer()
    p = by_bisection(np.linalg.norm(dy.reshape(8, -1), axis=1), 4)
    dx, dw, db, _ = gradients(KEY, x, w, b, dy, rho=0.5)
    kept = np.abs(dx).sum((1, 2)) > 0
    assert 0 < kept.sum() < 8 and np.all(kept[p == 1])
    g = dy * (kept / p).reshape(8, 1, 1)
    for a, e in zip((dx, dw, db), exact(x, w, g), strict=True):
        assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rho, nu", [(0.5, 1.0), (1.0, 0.4), (0.6, 0.5)])
def test_unbiased_with_the_variance_that_the_cotangent_of_nu_tells(rho, nu):
    x, w, b, dy = layer()
    draws = 10_000
    keys = jax.random.split(jax.random.key(0), draws)
    sample = functools.partial(gradients, rho=rho, nu=nu)
    every = jax.jit(jax.vmap(sample, (0, None, None, None, None)))(keys, x, w, b, dy)
    every = [np.asarray(a, np.float64) for a in every]
    squares = {}
    for name, got, want in zip("xwb", every, exact(x, w, dy), strict=False):
        error = (got - want).reshape(draws, -1)
        squares[name] = np.square(error).sum(1)
        limit = 3 * np.sqrt(squares[name].mean() / draws)
        assert np.linalg.norm(error.mean(0)) <= limit + 1e-5, name
    if rho == 1:  # all that dw varies by is the choice of tokens
        spread = squares["w"].std() / np.sqrt(draws)
        assert abs(squares["w"].mean() - every[3].mean()) <= 4 * spread
        size = np.linalg.norm(dy, axis=2) * np.linalg.norm(x, axis=2)
        q = by_bisection(size.reshape(-1), nu * 24)
        told = ((1 - q) / q * size.reshape(-1) ** 2).sum()
        assert_allclose(every[3], told, rtol=1e-3)
        assert squares["x"].mean() < 1e-8
    if nu == 1:
        assert_allclose(every[3], 0, atol=1e-4)


def test_a_layer_below_keeps_no_more_than_the_layer_above():
    """Through two layers: what the upper one dropped has no gradient below."""
    x, w, b, dy = layer()
    w2 = np.eye(5, dtype=np.float32)

    def kept(key):
        keys = jax.random.split(key)

        def of(x, h):
            y = vcas_dense(keys[0], x, w, b, rho=0.4) + h
            return vcas_dense(keys[1], y, w2, 0 * b, rho=0.7)

        back = jax.vjp(of, x, jnp.zeros((8, 3, 5)))[1](dy)
        return [jnp.any(a != 0, axis=(1, 2)) for a in back]

    below, above = jax.jit(jax.vmap(kept))(jax.random.split(KEY, 500))
    assert not np.any(below & ~above)
    assert_allclose(above.sum(1).mean(), 0.7 * 8, rtol=0.05)
    assert_allclose(below.sum(1).mean(), 0.4 * 8, rtol=0.05)


def controller_of_the_paper(
    s, rho, nu, v_s, v_act, v_w, norms, tau, alpha, beta, decay
):
    """Algorithm 1 in loops, rho smoothed as in the released code."""
    s = min(1.0, s + alpha) if v_act.sum() > tau * v_s.sum() else max(0.0, s - alpha)
    layers, batches, count = norms.shape
    new_rho, new_nu, kept = [], [], 0.0
    for layer in range(layers):
        shares = []
        for i in range(batches):
            falling = np.sort(norms[layer, i])[::-1]
            n = next(
                n for n in range(1, count + 1)
                if falling[:n].sum() >= s * falling.sum() - 1e-9
            )  # fmt: skip
            shares.append(n / count)
        kept = max(kept, np.mean(shares))
        new_rho.append(decay * rho[layer] + (1 - decay) * kept)
        much = v_w[layer] > tau * v_s[layer]
        new_nu.append(min(1.0, nu[layer] / beta) if much else nu[layer] * beta)
    return s, np.array(new_rho), np.array(new_nu)


@pytest.mark.parametrize("decay", [0.0, 0.6])
def test_the_controller_by_the_paper(decay):
    rng = np.random.default_rng(0)
    knobs = {"tau": 0.1, "alpha": 0.07, "beta": 0.8, "decay": decay}
    state = VCASState.exact(3)
    s, rho, nu = 1.0, np.ones(3), np.ones(3)
    step = jax.jit(functools.partial(vcas_update, **knobs))
    for _ in range(8):
        v_s, v_act, v_w = rng.uniform(0, [[1.0], [0.12], [0.2]], (3, 3))
        norms = rng.exponential(size=(3, 2, 16)) ** 2
        s, rho, nu = controller_of_the_paper(
            s, rho, nu, v_s, v_act, v_w, norms, **knobs
        )
        state = step(state, *(a.astype(np.float32) for a in (v_s, v_act, v_w, norms)))
        assert_allclose(state.s, s, rtol=1e-5)
        assert_allclose(state.rho, rho, rtol=1e-5)
        assert_allclose(state.nu, nu, rtol=1e-5)
        assert_allclose(state.act_excess, v_act.sum() / v_s.sum(), rtol=1e-5)
        assert np.all(np.diff(state.rho) >= -1e-6)


def test_bad_arguments_are_named():
    x, w, b, _ = layer()
    with pytest.raises(ValueError, match="argument 'rho' is 0"):
        vcas_dense(KEY, x, w, b, rho=0.0)
    with pytest.raises(ValueError, match="argument 'nu' is 1.5"):
        vcas_dense(KEY, x, w, b, nu=1.5)
    one = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="argument 'beta' is 1"):
        norms = np.ones((2, 1, 4), np.float32)
        vcas_update(VCASState.exact(2), one, one, one, norms, beta=1.0)
