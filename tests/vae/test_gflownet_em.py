"""Balance, walks and trees against loops and whole sums, in float64."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.nn.flow_policy import FlowPolicy
from jaxzoo.vae.gflownet_em import (
    balance_loss,
    m_step_gate,
    sample_latents,
    sample_trees,
)


def some_ways(seed: int = 0):
    rng = np.random.default_rng(seed)
    flow, log_pf, log_pb = rng.normal(size=(3, 5, 4))
    return flow, log_pf, rng.normal(size=5), log_pb


def as_arrays(*arrays: Any) -> Any:
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_trajectory_balance_is_the_equation(temperature):
    flow, log_pf, reward, log_pb = some_ways()
    gap = flow[:, 0] + log_pf.sum(1) - reward / temperature - log_pb.sum(1)
    arrays = as_arrays(flow, log_pf, reward, log_pb)
    loss, aux = balance_loss(*arrays, temperature=temperature)
    assert_allclose(aux["per_example"], gap**2, rtol=1e-5)
    assert_allclose(loss, np.mean(gap**2), rtol=1e-5)


@pytest.mark.parametrize("decay", [0.5, 1.0, 3.0])
def test_subtrajectory_balance_is_a_loop_over_pieces(decay):
    flow, log_pf, reward, log_pb = some_ways(1)
    expected = []
    for b in range(5):
        flows, total, weights = [*flow[b], reward[b]], 0.0, 0.0
        for i in range(4):
            for j in range(i + 1, 5):
                weight = decay ** (j - i - 1)
                ratio = sum(log_pf[b, t] - log_pb[b, t] for t in range(i, j))
                total += weight * (flows[i] + ratio - flows[j]) ** 2
                weights += weight
        expected.append(total / weights)
    _, aux = balance_loss(*as_arrays(flow, log_pf, reward, log_pb), decay=decay)
    assert_allclose(aux["per_example"], expected, rtol=1e-4)


def test_the_gate_is_a_moving_average():
    average, now = m_step_gate(jnp.array(4.0), jnp.array([0.0, 2.0]), threshold=2.5)
    assert_allclose(average, 0.9 * 4.0 + 0.1 * 1.0, rtol=1e-6)
    assert not now
    for _ in range(6):
        average, now = m_step_gate(average, jnp.array([0.0, 2.0]), threshold=2.5)
    assert_allclose(average, 1.0 + 3.0 * 0.9**7, rtol=1e-5)
    assert now


def chain_policy(x, state):
    """The second latent depends on the first: no product of marginals."""
    first = state[:, 0]
    logits = jnp.stack([x, 3.0 * first - 1.0, jnp.flip(state[:, 1], axis=1)], axis=1)
    return logits, x[:, 0]


def test_latents_follow_the_chain_rule():
    z = np.array(list(itertools.product((0, 1), repeat=3)))
    x = np.tile([0.3, -0.4], (8, 1))
    walk = sample_latents(
        jax.random.key(0), chain_policy, *as_arrays(x), num_latents=3,
        actions=jnp.asarray(z),
    )  # fmt: skip

    def log_softmax(v):
        return v - np.log(np.exp(v).sum())

    one = np.eye(2)
    for row, (a, b, c) in enumerate(z):
        expected = [
            log_softmax(x[row])[a],
            log_softmax(3.0 * one[a] - 1.0)[b],
            log_softmax(one[b][::-1])[c],
        ]
        assert_allclose(walk.log_pf[row], expected, rtol=1e-5)
    assert_array_equal(walk.actions, z)
    assert_allclose(np.exp(walk.log_pf.sum(1)).sum(), 1.0, rtol=1e-5)


def test_exploration_changes_the_draws_and_not_their_probabilities():
    x = jnp.tile(jnp.array([[4.0, -4.0]]), (4000, 1))

    def first(explore):
        walk = sample_latents(
            jax.random.key(1), chain_policy, x, num_latents=3, explore=explore
        )
        log_p = jax.nn.log_softmax(jnp.array([4.0, -4.0]))
        assert_allclose(walk.log_pf[:, 0], log_p[walk.actions[:, 0]], rtol=1e-5)
        return float(jnp.mean(walk.actions[:, 0]))

    assert first(0.0) < 0.004
    assert abs(first(0.5) - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


def every_way(length, symbols):
    """Actions of all ways, and the tree of each: spans with symbols."""
    ways, trees = [], []
    for at in itertools.product(*(range(n - 1) for n in range(length, 1, -1))):
        for chosen in itertools.product(range(symbols), repeat=length - 2):
            spans, joined = [(i, i + 1) for i in range(length)], set()
            for i, symbol in zip(at, (*chosen, 0), strict=True):
                spans[i : i + 2] = [(spans[i][0], spans[i + 1][1])]
                joined.add((*spans[i], symbol))
            pairs = zip(at, (*chosen, 0), strict=True)
            ways.append([i * symbols + symbol for i, symbol in pairs])
            trees.append(frozenset(joined))
    return np.array(ways), trees


def inside(rules, leaves, words):
    """log p(words) of symbol 0 as a join, by the inside algorithm."""
    n, size = len(words), len(rules)
    chart = {(i, i + 1): leaves[:, w] for i, w in enumerate(words)}
    for span in range(2, n + 1):
        for i in range(n - span + 1):
            chart[i, i + span] = sum(
                np.einsum("abc,b,c->a", rules, chart[i, k], chart[k, i + span])
                for k in range(i + 1, i + span)
            )
    assert size == len(chart[0, n])
    return np.log(chart[0, n][0])


@pytest.fixture(scope="module")
def parsed():
    """All ways over one sentence of 4 words, by a random policy."""
    rng = np.random.default_rng(3)
    logits, words = rng.normal(size=(2, 4 + 3)), np.array([0, 2, 1, 2])
    ways, trees = every_way(4, 2)
    net = FlowPolicy((3, 2), (8,))
    params = net.init(jax.random.key(0), jnp.zeros((1, 4, 6)))

    def policy(roots):
        return net.apply(params, jax.nn.one_hot(roots, 6))

    log_joint, walk = jax.jit(
        lambda w: sample_trees(
            jax.random.key(0), policy, jnp.asarray(logits, jnp.float32), w,
            actions=jnp.asarray(ways),
        )
    )(jnp.tile(jnp.asarray(words), (len(ways), 1)))  # fmt: skip
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p[:, :4].reshape(2, 2, 2), p[:, 4:], words, trees, log_joint, walk


def test_trees_sum_to_the_inside_algorithm(parsed):
    rules, leaves, words, trees, log_joint, _ = parsed
    by_tree = {}
    for tree, value in zip(trees, np.asarray(log_joint), strict=True):
        # All ways to one tree have its probability.
        assert_allclose(by_tree.setdefault(tree, value), value, rtol=1e-5)
    total = np.log(np.sum(np.exp(list(by_tree.values()))))
    assert len(by_tree) == 5 * 2**2
    assert_allclose(total, inside(rules, leaves, words), rtol=1e-5)


def test_ways_back_and_forth_are_distributions(parsed):
    _, _, _, trees, _, walk = parsed
    forth, back = (np.exp(np.asarray(x).sum(1)) for x in (walk.log_pf, walk.log_pb))
    assert_allclose(forth.sum(), 1.0, rtol=1e-5)
    for tree in set(trees):
        same = np.array([other == tree for other in trees])
        assert_allclose(back[same].sum(), 1.0, rtol=1e-5)


def test_the_flow_of_trees_is_the_policys_times_what_is_built(parsed):
    _, leaves, words, _, _, walk = parsed
    start = np.asarray(walk.log_flow[:, 0])
    built = sum(np.log(leaves[:, w].sum()) for w in words)
    assert_allclose(start, start[0], rtol=1e-6)
    net = FlowPolicy((3, 2), (8,))
    params = net.init(jax.random.key(0), jnp.zeros((1, 4, 6)))
    output: Any = net.apply(params, jax.nn.one_hot(jnp.asarray(words)[None], 6))
    assert_allclose(start[0], float(output[1][0]) + built, rtol=1e-5)


def test_sampled_trees_are_legal():
    words = jnp.zeros((200, 4), jnp.int32)

    def policy(roots):
        return jnp.zeros((200, 3, 2)), jnp.zeros(200)

    _, walk = sample_trees(jax.random.key(0), policy, jnp.zeros((2, 5)), words)
    allowed = {tuple(way) for way in every_way(4, 2)[0].tolist()}
    drawn = {tuple(way) for way in np.asarray(walk.actions).tolist()}
    assert drawn <= allowed and len(drawn) > 20
    assert_allclose(walk.log_pf[0], -np.log([6.0, 4.0, 1.0]), rtol=1e-5, atol=1e-6)


def test_training_by_balance_finds_the_posterior():
    """Of two bits that have to differ: any product of marginals is 1/2 away."""
    table = jnp.log(jnp.array([[0.02, 0.6], [0.36, 0.02]]))
    x = jnp.zeros((32, 1))

    def policy(params, x, state):
        rows = jnp.tile(params["second"][None], (32, 1, 1))
        second = jnp.sum(state[:, 0, :, None] * rows, axis=1)
        first = jnp.tile(params["first"][None], (32, 1))
        flow = jnp.tile(params["flow"][None], 32)
        return jnp.stack([first, second], axis=1), flow

    def walk(params, key, explore):
        return sample_latents(
            key, lambda x, s: policy(params, x, s), x, num_latents=2, explore=explore
        )

    def loss(params, key):
        way = walk(params, key, 0.3)
        reward = table[way.actions[:, 0], way.actions[:, 1]]
        return balance_loss(way.log_flow, way.log_pf, reward)[0]

    def step(params, key):
        slope = jax.grad(loss)(params, key)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, slope), None

    params = {"first": jnp.zeros(2), "second": jnp.zeros((2, 2)), "flow": jnp.zeros(())}
    keys = jax.random.split(jax.random.key(0), 600)
    params = jax.jit(lambda p: jax.lax.scan(step, p, keys)[0])(params)
    first, second = (jax.nn.softmax(params[n]) for n in ("first", "second"))
    found = first[:, None] * second
    assert 0.5 * np.abs(np.asarray(found) - np.exp(table)).sum() < 0.02
    assert abs(float(params["flow"])) < 0.02  # log Z of a table that sums to 1


def test_bad_numbers_are_named():
    x = jnp.zeros((8, 2))
    with pytest.raises(ValueError, match="'explore' is 1.5"):
        sample_latents(jax.random.key(0), chain_policy, x, num_latents=3, explore=1.5)
    with pytest.raises(ValueError, match="'temperature' is 0"):
        balance_loss(x, x, x[:, 0], temperature=0.0)
    with pytest.raises(ValueError, match="actions.shape"):
        sample_trees(
            jax.random.key(0), lambda roots: (roots, roots), jnp.zeros((2, 5)),
            jnp.zeros((1, 4), jnp.int32), actions=jnp.zeros((1, 2), jnp.int32),
        )  # fmt: skip
