"""The network against loops in float64, its limits, and what error regression does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.vae.pv_rnn import PVRNN, error_regression, pv_rnn_loss

HIDDEN, LATENTS, TAUS = (4, 3, 2), (2, 1, 1), (1.5, 4.0, 9.0)
NET: Any = PVRNN(outputs=2, hidden=HIDDEN, latents=LATENTS, taus=TAUS)
BATCH, STEPS, FITTED = 3, 6, 4


@functools.cache
def applied(net):
    return jax.jit(net.apply)


@functools.cache
def weights():
    noise = jnp.zeros((1, 1, NET.width))
    return jax.jit(NET.init)(jax.random.key(9), noise)


def setting():
    net = NET
    keys = jax.random.split(jax.random.key(0), 3)
    noise = jax.random.normal(keys[0], (BATCH, STEPS, net.width))
    a = jax.random.normal(keys[1], (BATCH, FITTED, 2 * net.width))
    params = weights()
    params = {"params": dict(params["params"])}
    params["params"]["bias"] = 0.3 * jax.random.normal(keys[2], (net.units,))
    return net, params, noise, a


def cut(x, sizes, i, axis=-1):
    ends = np.cumsum((0, *sizes)).tolist()
    return np.take(x, np.arange(ends[i], ends[i + 1]), axis=axis)


def oracle(params, noise, a):
    """One sequence, layer by layer and step by step."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params["params"])
    noise, a = np.asarray(noise, np.float64), np.asarray(a, np.float64)
    layers, width = range(len(HIDDEN)), sum(LATENTS)

    ends = np.cumsum([sum(HIDDEN), *4 * [width]])[:-1]
    names = (
        "w_d",
        "prior_mean",
        "prior_log_std",
        "posterior_mean",
        "posterior_log_std",
    )
    p |= dict(zip(names, np.split(p["of_d"], ends, axis=1), strict=True))

    def block(name, rows, columns, i, j):
        return cut(cut(p[name], rows, i, 0), columns, j)

    h = [np.zeros(n) for n in HIDDEN]
    outputs, kls, stds = [], [], []
    for t in range(STEPS):
        d, new, kl = [np.tanh(x) for x in h], [], 0.0
        for k in layers:
            w = [
                block(f"{who}_{what}", HIDDEN, LATENTS, k, k)
                for who in ("prior", "posterior")
                for what in ("mean", "log_std")
            ]
            mean, std = np.tanh(d[k] @ w[0]), np.exp(d[k] @ w[1])
            stds.extend(std)
            if t < FITTED:
                own = (cut(a[t, :width], LATENTS, k), cut(a[t, width:], LATENTS, k))
                inner = [d[k] @ w[2], d[k] @ w[3]]
                q_mean, q_std = np.tanh(inner[0] + own[0]), np.exp(inner[1] + own[1])
                terms = np.log(std / q_std) - 0.5
                terms += (q_std**2 + (q_mean - mean) ** 2) / (2 * std**2)
                kl += terms.sum()
                mean, std = q_mean, q_std
            z = mean + std * cut(noise[t], LATENTS, k)
            drive = z @ block("of_z", LATENTS, HIDDEN, k, k) + cut(p["bias"], HIDDEN, k)
            for j in layers:
                if abs(j - k) <= 1:
                    drive = drive + d[j] @ block("w_d", HIDDEN, HIDDEN, j, k)
            new.append((1 - 1 / TAUS[k]) * h[k] + drive / TAUS[k])
        h = new
        outputs.append(np.tanh(h[0]) @ p["output"]["kernel"] + p["output"]["bias"])
        kls.append(kl)
    stds = np.array(stds).reshape(STEPS, width)
    return np.array(outputs), np.array(kls), np.concatenate(h), stds


def test_the_network_is_that_of_the_equations():
    net, params, noise, a = setting()
    out = applied(net)(params, noise, a)
    for b in range(BATCH):
        output, kl, h, std = oracle(params, noise[b], a[b])
        assert_allclose(out["output"][b], output, rtol=2e-5, atol=1e-6)
        assert_allclose(out["kl"][b], kl, rtol=2e-5, atol=1e-6)
        assert_allclose(out["h"][b, -1], h, rtol=2e-5, atol=1e-6)
        assert_allclose(np.exp(out["prior_log_std"][b]), std, rtol=2e-5)
    assert_array_equal(out["kl"][:, FITTED:], 0.0)


def test_the_first_prior_is_the_unit_gaussian_and_others_are_not():
    net, params, noise, _ = setting()
    out = applied(net)(params, noise)
    assert_array_equal(out["prior_mean"][:, 0], 0.0)
    assert_array_equal(out["prior_log_std"][:, 0], 0.0)
    assert np.abs(out["prior_log_std"][:, 1:]).min() > 0.0
    assert_array_equal(out["mean"], out["prior_mean"])


def test_the_same_weights_and_no_a_are_no_divergence():
    net, params, noise, a = setting()
    own = params["params"]
    units, pair = net.units, 2 * net.width
    prior = own["of_d"][:, units : units + pair]
    own["of_d"] = own["of_d"].at[:, units + pair :].set(prior)
    out, free = applied(net)(params, noise, 0.0 * a), applied(net)(params, noise)
    assert_allclose(out["kl"], 0.0, atol=1e-6)
    assert_allclose(out["output"], free["output"], rtol=1e-6)
    assert applied(net)(params, noise, a)["kl"][:, :FITTED].min() > 0.0


def test_the_posterior_knows_the_state_too():
    net, params, noise, _ = setting()
    a = jnp.zeros((BATCH, FITTED, 2 * NET.width))
    assert np.abs(applied(net)(params, noise, a)["mean"][:, 1:FITTED]).min() > 0.0


def test_a_reaches_its_own_sequence_and_no_earlier_step():
    net, params, noise, a = setting()

    def moved(a):
        return applied(net)(params, noise, a)["output"]

    change = np.abs(moved(a.at[1, 2].add(0.5)) - moved(a)).max(axis=2)
    assert_array_equal(change[[0, 2]], 0.0)
    assert_array_equal(change[1, :2], 0.0)
    assert np.all(change[1, 2:] > 0.0)


def test_slow_layers_move_by_a_part_that_tau_sets():
    """From one state, with one drive: the first layer's tau is 1, and it forgets."""
    net, params, noise, _ = setting()
    h = jnp.ones((BATCH, net.units))
    moves = {}
    for tau in (2.0, 20.0):
        slow = net.clone(taus=(1.0, 1.0, tau))
        out = applied(slow)(params, noise[:, :1], None, h)["h"][:, 0]
        moves[tau] = out - h
    assert_allclose(moves[2.0][:, :7], moves[20.0][:, :7], rtol=1e-6)
    assert_allclose(moves[2.0][:, 7:], 10.0 * moves[20.0][:, 7:], rtol=2e-5, atol=1e-5)


def test_a_run_can_be_cut_in_two():
    net, params, noise, a = setting()
    whole = applied(net)(params, noise, a)
    head = applied(net)(params, noise[:, :2], a[:, :2])
    tail = applied(net)(params, noise[:, 2:], a[:, 2:], head["h"][:, -1])
    for name, value in whole.items():
        joined = np.concatenate([head[name], tail[name]], axis=1)
        assert_allclose(joined, value, rtol=1e-5, atol=1e-6)


def test_loss_is_the_sum_of_its_terms():
    rng = np.random.default_rng(0)
    output, x = rng.normal(size=(2, 3, 4, 2))
    kl = rng.uniform(size=(3, 4))
    each = 0.5 * ((output - x) ** 2).sum((1, 2)) + 0.2 * kl.sum(1)
    arrays = [jnp.asarray(v, jnp.float32) for v in (output, x, kl)]
    loss, aux = pv_rnn_loss(*arrays, meta_prior=0.2)
    assert_allclose(aux["per_example"], each, rtol=1e-5)
    assert_allclose(loss, each.mean(), rtol=1e-5)
    assert_allclose(aux["kl"], kl.sum(1), rtol=1e-5)


def test_error_regression_by_loops():
    """A model without noise or state: output = cumulative sum of A's first entry."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 1))
    window, rate, iterations, w = 2, 0.1, 3, 0.3

    def model(noise, a, h):
        past = jnp.pad(a, ((0, 0), (0, noise.shape[1] - a.shape[1]), (0, 0)))
        states = h[:, None] + jnp.cumsum(past[..., :1], axis=1)
        kl = 0.5 * jnp.sum(jnp.square(past), axis=2)
        return {"output": states, "kl": kl, "h": states}

    error, aux = error_regression(
        jax.random.key(0), model, jnp.asarray(x, jnp.float32), units=1, latents=1,
        window=window, iterations=iterations, learning_rate=rate, meta_prior=w,
    )  # fmt: skip
    for b in range(2):
        h, a = 0.0, np.zeros(window)
        for t in range(3):
            m, v = np.zeros(window), np.zeros(window)
            for i in range(1, iterations + 1):
                miss = h + np.cumsum(a) - x[b, t : t + window, 0]
                g = np.array([miss[j:].sum() for j in range(window)]) + w * a
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                bias = (1 - 0.9**i, 1 - 0.999**i)
                a = a - rate * (m / bias[0]) / (np.sqrt(v / bias[1]) + 1e-8)
            states = h + np.cumsum(a)
            assert_allclose(aux["prediction"][b, t, 0], states[-1], atol=1e-5)
            assert_allclose(error[b, t], (states[-1] - x[b, t + 2, 0]) ** 2, rtol=1e-4)
            h, a = states[0], np.append(a[1:], 0.0)


def test_the_future_is_not_seen():
    net = PVRNN(outputs=2, hidden=(4,), latents=(2,), taus=(2.0,))
    params = net.init(jax.random.key(0), jnp.zeros((1, 1, 2)))
    model = functools.partial(net.apply, params)
    x = 0.5 * jax.random.normal(jax.random.key(3), (BATCH, 7, 2))
    knobs = {"units": 4, "latents": 2, "window": 4, "meta_prior": 0.001}
    regress = functools.partial(error_regression, jax.random.key(0), model, **knobs)
    pair = jnp.stack([x, x.at[:, 5:].add(1.0)])
    _, aux = jax.jit(jax.vmap(regress))(pair)
    first, later = aux["prediction"]
    assert_allclose(later[:, :2], first[:, :2], rtol=1e-5)
    assert np.abs(later - first)[:, 2].max() > 1e-3


def test_bad_input_is_named():
    x = jnp.zeros((2, 3, 1))
    with pytest.raises(ValueError, match="'window' is 3"):
        error_regression(jax.random.key(0), jnp.sin, x, units=1, latents=1, window=3)
    with pytest.raises(ValueError, match="'meta_prior' is -1"):
        pv_rnn_loss(x, x, x[..., 0], meta_prior=-1.0)
    with pytest.raises(ValueError, match="not of one length"):
        NET.clone(taus=(1.0,)).init(jax.random.key(0), jnp.zeros((1, 3, 4)))
