"""Multi-momentum by a float64 transcription, and that it is a control variate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.optim.multi_momentum import multi_momentum, scale_by_multi_momentum
from jaxzoo.training.collectives import collectives

STEPS, CLUSTERS, BATCH, WIDTH = 5, 3, 6, 7


def batches():
    """Per-example gradients `[steps, B, d]` and clusters `[steps, B]`."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLUSTERS, (STEPS, BATCH))
    labels[1] = 2  # a batch of one cluster alone
    centers = rng.normal(size=(CLUSTERS, WIDTH))
    return centers[labels] + 0.3 * rng.normal(size=(STEPS, BATCH, WIDTH)), labels


def of_the_paper(grads, labels, base, proportions=None, beta=0.8, momentum=0.7, nu=0.4):
    """The directions, by a loop over examples."""
    m = np.zeros((CLUSTERS, WIDTH))
    v = before = np.zeros(WIDTH)
    seen, out = np.zeros(CLUSTERS), []
    for g, c in zip(grads, labels, strict=True):
        for each in c:
            seen[each] += 1
        pi = seen / seen.sum() if proportions is None else proportions
        d = sum(g[i] - m[c[i]] for i in range(BATCH)) / BATCH + pi @ m
        for each in set(c):
            m[each] = beta * m[each] + (1 - beta) * g[c == each].mean(0)
        if base == "momentum":
            v = momentum * v + d
            out.append(v)
            continue
        before, v = v, momentum * v + (1 - momentum) * d
        r = momentum / (1 - momentum)
        qhm, igt = (1 - nu) * d + nu * v, v + r * (v - before)
        out.append(qhm if base == "qhm" else igt)
    return np.stack(out), m


def extras(g, c, dtype=jnp.float32):
    one_hot = np.eye(CLUSTERS)[c]
    parts = {"w": jnp.asarray(one_hot.T @ g / BATCH, dtype)}
    return {"cluster_updates": parts, "counts": jnp.asarray(one_hot.sum(0), jnp.int32)}


@pytest.mark.parametrize("base", ["momentum", "qhm", "igt"])
@pytest.mark.parametrize("proportions", [None, np.array([0.2, 0.3, 0.5])])
def test_steps_are_those_of_the_paper(base, proportions):
    grads, labels = batches()
    expected, buffers = of_the_paper(grads, labels, base, proportions)
    with jax.enable_x64(True):
        direction: Any = scale_by_multi_momentum(
            n_clusters=CLUSTERS,
            beta=0.8,
            proportions=proportions,
            base=base,
            momentum=0.7,
            nu=0.4,
        )
        state = direction.init({"w": jnp.zeros(WIDTH)})
        update = jax.jit(direction.update)
        for t in range(STEPS):
            g = {"w": jnp.asarray(grads[t].mean(0))}
            knobs = extras(grads[t], labels[t], jnp.float64)
            updates, state = update(g, state, **knobs)
            assert_allclose(updates["w"], expected[t], rtol=1e-6, atol=1e-6)
    assert_allclose(state.momenta["w"], buffers, rtol=1e-6, atol=1e-6)
    assert_array_equal(state.seen, np.bincount(labels.ravel(), minlength=CLUSTERS))


def test_without_clusters_it_is_momentum_sgd():
    ours: Any = multi_momentum(0.1, n_clusters=4, momentum=0.9)
    sgd: Any = optax.sgd(0.1, momentum=0.9)
    p = {"w": jnp.zeros(WIDTH)}
    state, expected = ours.init(p), sgd.init(p)
    for g in jnp.float32(batches()[0].mean(1)):
        updates, state = jax.jit(ours.update)({"w": g}, state)
        wanted, expected = sgd.update({"w": g}, expected)
        assert_allclose(updates["w"], wanted["w"], rtol=1e-5, atol=1e-7)


def test_mean_and_variance_are_those_of_the_theory():
    """Frozen buffers at the clusters' means: all batches of two examples, by hand."""
    rng = np.random.default_rng(1)
    population = rng.normal(size=(9, 2)) + 5 * np.repeat(np.eye(3)[:, :2], 3, axis=0)
    cluster = np.repeat(np.arange(3), 3)
    means = np.stack([population[cluster == c].mean(0) for c in range(3)])
    direction: Any = scale_by_multi_momentum(
        n_clusters=3, beta=0.9, proportions=np.full(3, 1 / 3, np.float32), momentum=0.0
    )
    state = direction.init(jnp.zeros(2))._replace(momenta=jnp.float32(means))
    pairs = np.stack(np.meshgrid(np.arange(9), np.arange(9)), -1).reshape(-1, 2)

    def of_pair(pair):
        g = jnp.float32(population)[pair]
        parts = jax.ops.segment_sum(g, jnp.asarray(cluster)[pair], 3) / 2
        counts = jnp.bincount(jnp.asarray(cluster)[pair], length=3)
        return direction.update(g.mean(0), state, cluster_updates=parts, counts=counts)[
            0
        ]

    d = np.asarray(jax.jit(jax.vmap(of_pair))(jnp.asarray(pairs)))
    assert_allclose(d.mean(0), population.mean(0), rtol=1e-5)
    within = np.mean([population[cluster == c].var(0).sum() for c in range(3)])
    assert_allclose(d.var(0).sum(), within / 2, rtol=1e-5)
    assert population.var(0).sum() > 3 * within


def test_a_cluster_that_is_not_met_keeps_its_buffer():
    grads, labels = batches()
    direction: Any = scale_by_multi_momentum(n_clusters=CLUSTERS)
    state = direction.init({"w": jnp.zeros(WIDTH)})
    for t in range(2):  # the second batch is of cluster 2 alone
        before = state.momenta["w"]
        g = {"w": jnp.float32(grads[t].mean(0))}
        _, state = direction.update(g, state, **extras(grads[t], labels[t]))
    assert_array_equal(state.momenta["w"][:2], before[:2])
    assert np.any(state.momenta["w"][2] != before[2])


def test_transport_makes_old_gradients_of_a_quadratic_new():
    """The velocity is the gradient at the iterates, up to what zeros began it with."""
    scale = jnp.array([1.0, 3.0])
    optimizer: Any = multi_momentum(0.05, n_clusters=1, base="igt", momentum=0.8)
    x = p = jnp.array([1.0, -2.0])  # shifted parameters and iterates
    state = optimizer.init(x)
    for t in range(1, 9):
        updates, state = optimizer.update(scale * x, state)
        velocity = state[0].velocity
        assert_allclose(velocity, (1 - 0.8**t) * scale * p, rtol=0.35)
        x, p = x + updates, p - 0.05 * velocity
        ahead = 4.0 * -0.05 * velocity
        assert_allclose(x, p + ahead, rtol=1e-5, atol=1e-6)


def test_buffers_sharded_by_cluster_are_summed_by_one_all_reduce():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    direction: Any = scale_by_multi_momentum(
        n_clusters=8, proportions=np.full(8, 1 / 8, np.float32)
    )
    rng = np.random.default_rng(0)
    parts = jnp.float32(rng.normal(size=(8, 5)))
    g, counts = parts.sum(0), jnp.arange(8)
    whole = direction.init(g)._replace(momenta=2 * parts)
    spread = NamedSharding(mesh, P("data"))
    same = NamedSharding(mesh, P())
    shardings: Any = type(whole)(spread, same, same)
    update = jax.jit(
        lambda g, state, parts: direction.update(
            g, state, cluster_updates=parts, counts=counts
        ),
        in_shardings=(same, shardings, spread),
        out_shardings=(same, shardings),
    )
    state = jax.device_put(whole, shardings)
    compiled: Any = update.lower(g, state, parts).compile()
    found = collectives(compiled.as_text())
    assert [(c.kind, c.count, c.bytes) for c in found] == [("all-reduce", 1, 20)]
    got = compiled(g, state, jax.device_put(parts, spread))
    expected = direction.update(g, whole, cluster_updates=parts, counts=counts)
    jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-5, 1e-6), got, expected)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="argument 'n_clusters' is 0"):
        multi_momentum(0.1, n_clusters=0)
    with pytest.raises(ValueError, match="argument 'proportions' has 2 entries, exp"):
        scale_by_multi_momentum(n_clusters=3, proportions=np.ones(2, np.float32))
    with pytest.raises(ValueError, match="argument 'base' is 'adam'"):
        multi_momentum(0.1, n_clusters=2, base="adam")  # pyright: ignore
    direction: Any = scale_by_multi_momentum(n_clusters=2)
    state = direction.init(jnp.zeros(2))
    with pytest.raises(TypeError, match="cluster_updates and counts come together"):
        direction.update(jnp.zeros(2), state, counts=jnp.ones(2))
