"""Shared conformer blocks with experts against loops in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.sequence.shared_moe_conformer import (
    SharedConformer,
    balance_loss,
    distillation_loss,
    top_k_gates,
)

WIDTH, EXPERTS = 4, 3
ALL = np.ones((2, 6), bool)
BLOCK = {"heads": 2, "hidden": 5, "experts": EXPERTS, "k": 2, "kernel": 3}


def wide(x):
    return np.asarray(x, np.float64)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def net(groups=2, size=2, **knobs):
    return SharedConformer(WIDTH, groups, size, {**BLOCK, **knobs})


@functools.cache
def params(groups=2, size=2):
    """Numbers in every leaf: also in biases, which begin with 0."""
    shapes = jax.eval_shape(net(groups, size).init, jax.random.key(0), features())
    leaves, form = jax.tree.flatten(shapes)
    draws = [0.5 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    tree = jax.tree.unflatten(form, draws)
    tree["params"]["scale"] += np.float32(1.0)
    return tree


def features():
    return normal(2, 6, 3, seed=9)


@functools.cache
def applied(**knobs):
    model = net(**knobs)
    return jax.jit(lambda p, x, where: model.apply(p, x, where=where))


def dense(p, x):
    return x @ wide(p["kernel"]) + wide(p["bias"])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def block(p, own, x, where, k=2, capacity=None):
    """One application, frame by frame; `x` is `[B, T, D]` in float64."""
    count = iter(range(6))

    def norm(x):
        i = next(count)
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * own["scale"][i] + own["shift"][i]

    y = dense(p["up"], norm(x))
    x = x + 0.5 * dense(p["down"], y * sigmoid(y))
    y, mixed = norm(x), np.zeros_like(x)
    for b in range(len(x)):
        for n in range(2):
            q, key, v = (
                y[b] @ wide(p["attention"][name]["kernel"])[:, n]
                + wide(p["attention"][name]["bias"])[n]
                for name in ("query", "key", "value")
            )
            scores = q @ key.T / math.sqrt(q.shape[-1])
            scores[:, ~where[b]] = -np.inf
            out = wide(p["attention"]["out"]["kernel"])[n]
            mixed[b] += softmax(scores) @ v @ out
    x = x + mixed + wide(p["attention"]["out"]["bias"])
    a, gate = np.split(dense(p["conv_in"], norm(x)), 2, -1)
    y = np.where(where[..., None], a * sigmoid(gate), 0)
    padded = np.pad(y, ((0, 0), (1, 1), (0, 0)))
    taps = wide(p["conv"])
    y = sum(padded[:, i : i + x.shape[1]] * taps[i] for i in range(3))
    y = norm(y)
    x = x + dense(p["conv_out"], y * sigmoid(y))
    tokens, valid = norm(x).reshape(-1, WIDTH), where.reshape(-1)
    logits = tokens @ wide(own["router"])
    room = len(tokens)
    if capacity is not None:
        room = min(room, math.ceil(capacity * k * len(tokens) / EXPERTS))
    full, y = [0] * EXPERTS, np.zeros_like(tokens)
    for t, token in enumerate(tokens):
        if not valid[t]:
            continue
        for e in np.argsort(-logits[t], kind="stable")[:k]:
            full[e] += 1
            if full[e] > room:
                continue
            h = token @ p["expert_up"][e] + p["expert_up_bias"][e, 0]
            h = (h * sigmoid(h)) @ p["expert_down"][e] + p["expert_down_bias"][e, 0]
            y[t] += softmax(logits[t])[e] * h
    return norm(x + 0.5 * y.reshape(x.shape)), balance(logits[valid], k)


def balance(logits, k):
    counts = np.zeros(EXPERTS)
    for row in logits:
        counts[np.argsort(-row, kind="stable")[:k]] += 1
    return EXPERTS / k * (counts / len(logits)) @ softmax(logits).mean(0)


def encoder(tree, x, where, groups=2, size=2, **knobs):
    p = tree["params"]
    x, losses = dense(p["embed"], wide(x)), []
    for group in range(groups):
        shared = jax.tree.map(lambda leaf, g=group: leaf[g], p["blocks"])
        for i in range(size):
            own = {
                name: wide(p[name][group, i]) for name in ("scale", "shift", "router")
            }
            x, loss = block(shared, own, x, where, **knobs)
            losses.append(loss)
    return x, losses


@pytest.mark.parametrize("capacity", [None, 0.6])
def test_encoder_is_what_loops_in_float64_are(capacity):
    where = np.arange(6)[None] < np.array([[6], [4]])
    got, aux = applied(capacity=capacity)(params(), features(), where)
    expected, losses = encoder(params(), features(), where, capacity=capacity)
    assert_allclose(got[where], expected[where], atol=1e-4)
    assert_allclose(aux["balance"], losses, rtol=1e-4)
    assert_allclose(np.sum(aux["share"], 1), 2, rtol=1e-5)


def test_too_little_room_changes_what_comes_out():
    free, _ = applied(capacity=None)(params(), features(), ALL)
    tight, _ = applied(capacity=0.6)(params(), features(), ALL)
    assert np.abs(free - tight).max() > 1e-2


def test_only_routers_and_norms_are_of_one_application():
    tree = params()["params"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(tree["blocks"])} == {2}
    sizes = {name: tree[name].shape for name in ("scale", "shift", "router")}
    assert sizes == {
        "scale": (2, 2, 6, WIDTH),
        "shift": (2, 2, 6, WIDTH),
        "router": (2, 2, WIDTH, EXPERTS),
    }


@pytest.mark.parametrize("name", ["scale", "shift", "router"])
def test_each_application_has_its_own(name):
    """The same numbers in both applications of a group are another encoder."""
    before, _ = applied(capacity=None)(params(), features(), ALL)
    tree = jax.tree.map(np.copy, params())
    tree["params"][name][:, 1] = tree["params"][name][:, 0]
    after, _ = applied(capacity=None)(tree, features(), ALL)
    assert np.abs(before - after).max() > 1e-3


def test_frames_that_do_not_count_have_no_influence():
    where = np.arange(6)[None] < np.array([[6], [4]])
    spoilt = np.where(where[..., None], features(), 1e4)
    run = applied(capacity=0.6)
    got, _ = run(params(), spoilt, where)
    expected, _ = run(params(), features(), where)
    assert_allclose(got[where], expected[where], atol=1e-5)


def test_noise_comes_with_a_key_alone_and_moves_routers():
    model = net(noise=5.0)
    run = jax.jit(lambda p, x, key: model.apply(p, x, key=key)[1]["share"])
    shares = [run(params(), features(), jax.random.key(i)) for i in range(2)]
    assert np.abs(shares[0] - shares[1]).max() > 0.05


def test_routers_learn_through_a_single_expert():
    model = net(1, 1, k=1)
    tree = params(1, 1)

    def total(p):
        return jnp.sum(model.apply(p, features())[0] * normal(2, 6, WIDTH, seed=3))

    gradient = jax.jit(jax.grad(total))(tree)["params"]["router"]
    assert np.all(np.abs(gradient).sum((0, 1, 2)) > 1e-4)


def test_gates_by_sorting():
    logits = normal(50, 5)
    for k in (1, 2, 5):
        expected = np.zeros((50, 5))
        for row, into in zip(wide(logits), expected, strict=True):
            best = np.argsort(-row, kind="stable")[:k]
            into[best] = softmax(row)[best]
        assert_allclose(top_k_gates(logits, k=k), expected, atol=1e-6)
    ties = np.zeros((1, 4), np.float32)
    assert_array_equal(top_k_gates(ties, k=2), [[0.25, 0.25, 0, 0]])


@pytest.mark.parametrize("k", [1, 2])
def test_balance_by_counting(k):
    logits = 2 * normal(40, EXPERTS)
    loss, aux = balance_loss(logits, k=k)
    assert_allclose(loss, balance(wide(logits), k), rtol=1e-5)
    assert_allclose(np.sum(aux["probability"]), 1, rtol=1e-6)


def test_balance_is_least_where_experts_get_the_same():
    even = 50 * np.eye(4, dtype=np.float32)
    assert_allclose(balance_loss(even)[0], 1, rtol=1e-6)
    assert_allclose(balance_loss(np.tile(even[:1], (4, 1)))[0], 4, rtol=1e-6)
    crowded = normal(64, 4) + np.array([[2, 0, 0, 0]], np.float32)
    step = crowded - 100 * jax.grad(lambda x: balance_loss(x)[0])(crowded)
    assert balance_loss(step)[1]["share"][0] < balance_loss(crowded)[1]["share"][0]


def test_distillation_by_hand():
    h, taught = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    y, told = normal(2, 3, 5, seed=2), normal(2, 3, 5, seed=3)
    where = np.array([[True, True, False], [True, False, False]])
    loss, aux = distillation_loss(h, taught, y, told, where=where, weight=0.3)
    p, q = softmax(wide(told)), softmax(wide(y))
    kl = (p * np.log(p / q)).sum(-1)[where].mean()
    gap = ((wide(h) - taught) ** 2).mean(-1)[where].mean()
    assert_allclose(loss, gap + 0.3 * kl, rtol=1e-5)
    assert_allclose([aux["hidden"], aux["kl"]], [gap, kl], rtol=1e-5)
    assert distillation_loss(h, h, y, y)[0] == 0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'k' is 4, expected a number .* <= 3"):
        top_k_gates(normal(2, 3), k=4)
    with pytest.raises(ValueError, match="'k' is 0, expected"):
        balance_loss(normal(2, 3), k=0)
    h, y = normal(2, 3, 4), normal(2, 3, 5)
    with pytest.raises(ValueError, match=r"'weight' is -1.0, expected"):
        distillation_loss(h, h, y, y, weight=-1.0)
    with pytest.raises(TypeError, match=r"'teacher_hidden' is float32\[2,3,3\]"):
        distillation_loss(h, h[..., :3], y, y)
