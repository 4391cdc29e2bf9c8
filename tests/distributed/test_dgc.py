"""Deep gradient compression by the paper in float64, and the bytes of its HLO."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.core.collectives import varying
from jaxzoo.distributed.dgc import DGCState, dgc, scale_by_dgc
from jaxzoo.training.collectives import collectives, wire_bytes
from tests.distributed.workers import (
    SHAPES,
    STEPS,
    flattened,
    gradients,
    mesh,
    over_workers,
    sharded,
    zeros,
)

SPEC = DGCState(*cast(Any, (P(), P("d"), P("d"), P())))


def of_the_paper(grads, workers, counts, clip, masking=True):
    """Directions `[steps, d]`, u and v; counts[t] gives k of each tensor at step t."""
    g = flattened(grads, 2)
    d = g.shape[2]
    sizes = [int(np.prod(SHAPES[n])) for n in sorted(SHAPES)]
    u, v = np.zeros((workers, d)), np.zeros((workers, d))
    directions = []
    for t in range(STEPS):
        total = np.zeros(d)
        for i in range(workers):
            own = g[t, i]
            limit = clip / np.sqrt(workers)
            if np.linalg.norm(own) > limit:
                own = own * limit / np.linalg.norm(own)
            u[i] = 0.7 * u[i] + own
            v[i] = v[i] + u[i]
            begin = 0
            for size, k in zip(sizes, counts[t], strict=True):
                part = np.arange(begin, begin + size)
                sent = part[np.argsort(-np.abs(v[i, part]))[:k]]
                total[sent] += v[i, sent]
                v[i, sent] = 0
                if masking:
                    u[i, sent] = 0
                begin += size
        directions.append(total / workers)
    return np.stack(directions), u, v


@pytest.mark.parametrize("workers, masking", [(1, True), (3, True), (8, False)])
def test_steps_are_those_of_the_paper(workers, masking):
    grads = gradients(workers)
    counts = 2 * [[3, 77, 1]] + 2 * [[2, 39, 1]] + 2 * [[1, 8, 1]]  # ceil((1 - s) size)
    expected, u, v = of_the_paper(grads, workers, counts, 7.0, masking)
    with jax.enable_x64(True):
        direction: Any = scale_by_dgc(
            momentum=0.7,
            sparsities=(0.5, 0.75, 0.95),
            stage_steps=2,
            clip=7.0,
            factor_masking=masking,
            axis_name="d",
        )
        double = jax.tree.map(jnp.asarray, grads)
        state, updates = over_workers(direction, workers, double)
    got = flattened(updates, 2)
    for each in range(workers):
        assert_allclose(got[:, each], expected, rtol=1e-6, atol=1e-6)
    assert_allclose(state.momentum, u, rtol=1e-6, atol=1e-9)
    assert_allclose(state.residual, v, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("devices, check_vma", [(1, True), (8, True), (8, False)])
def test_shard_map_over_real_devices_is_the_simulation(devices, check_vma):
    grads = jax.tree.map(jnp.float32, gradients(devices))
    direction: Any = scale_by_dgc(sparsities=(0.5, 0.9), stage_steps=3, axis_name="d")
    last, expected = over_workers(direction, devices, grads)
    init, update = sharded(direction, devices, SPEC, check_vma)
    state = init(zeros())
    for t in range(STEPS):
        updates, state = update(jax.tree.map(lambda g, t=t: g[t], grads), state)
        wanted = jax.tree.map(lambda u, t=t: u[t, 0], expected)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-5, 1e-6), updates, wanted)
    assert_allclose(state.residual, last.residual.reshape(-1), 1e-5, 1e-6)
    assert_allclose(state.momentum, last.momentum.reshape(-1), 1e-5, 1e-6)


def sent_by(compiled):
    found = collectives(compiled.as_text())
    return {c.kind: wire_bytes(c.kind, c.bytes, c.group_size) for c in found}


def test_bytes_sent_are_those_of_the_compiled_program():
    grads = jax.tree.map(lambda g: jnp.float32(g[0]), gradients(8))
    total = {}
    for stages in ((0.75,), (0.75, 0.99)):
        direction: Any = scale_by_dgc(sparsities=stages, stage_steps=1, axis_name="d")
        init, update = sharded(direction, 8, SPEC)
        state = init(zeros())
        compiled: Any = update.lower(grads, state).compile()
        steps = []
        for _ in stages:
            _, state = compiled(grads, state)
            steps.append(float(state.bytes_sent))
        # The text has every stage once.
        assert sent_by(compiled) == {"all-gather": sum(steps)}
        total[stages] = steps
    # 7 others hear of 2 + 39 + 1 entries, then of 1 + 2 + 1, 8 bytes each.
    assert total[0.75, 0.99] == [7 * 8 * 42, 7 * 8 * 4]
    direction: Any = scale_by_dgc(compression="none", axis_name="d")
    spec = DGCState(*cast(Any, (P(), P(), P(), P())))
    init, update = sharded(direction, 8, spec)
    state = init(zeros())
    compiled: Any = update.lower(grads, state).compile()
    _, state = compiled(grads, state)
    assert sent_by(compiled) == {"all-reduce": float(state.bytes_sent)}


def test_without_compression_it_is_momentum_of_the_mean_gradient():
    grads = jax.tree.map(jnp.float32, gradients(8))
    direction: Any = scale_by_dgc(compression="none", axis_name="d")
    spec = DGCState(*cast(Any, (P(), P(), P(), P())))
    init, update = sharded(direction, 8, spec)
    trace: Any = optax.trace(0.9)

    def mean(grads):
        own = jax.tree.map(lambda g: g[0], grads)
        return jax.lax.pmean(own, "d")

    average = jax.shard_map(mean, mesh=mesh(), in_specs=P("d"), out_specs=P())
    dense = jax.jit(lambda grads, state: trace.update(average(grads), state))
    state, expected = init(zeros()), trace.init(zeros())
    for t in range(3):
        now = jax.tree.map(lambda g, t=t: g[t], grads)
        updates, state = update(now, state)
        wanted, expected = dense(now, expected)
        jax.tree.map(assert_array_equal, updates, wanted)


def test_what_was_sent_and_what_is_left_is_the_momentum_that_came():
    """Integers, so that sums are exact; without masking u is that of dense momentum."""
    rng = np.random.default_rng(0)
    grads = {"w": jnp.float32(rng.integers(-99, 99, (STEPS, 4, 40)))}
    direction: Any = scale_by_dgc(
        momentum=0.5, sparsities=0.9, factor_masking=False, axis_name="d"
    )
    state, updates = over_workers(direction, 4, grads)
    sent = np.asarray(updates["w"])[:, 0].sum(0)
    left = np.asarray(state.residual).mean(0)
    u = came = np.zeros((4, 40))
    for g in np.asarray(grads["w"]):
        u = 0.5 * u + g
        came = came + u
    assert_array_equal(sent + left, came.mean(0))
    assert np.count_nonzero(left) > 20


def test_where_it_was_sent_momentum_and_residual_are_zero():
    g = {"w": jnp.array([3.0, -5.0, 1.0, 0.5])}
    direction: Any = scale_by_dgc(sparsities=0.75)
    updates, state = direction.update(g, direction.init(g))
    assert updates["w"].tolist() == [0.0, -5.0, 0.0, 0.0]
    assert state.momentum.tolist() == state.residual.tolist() == [3.0, 0.0, 1.0, 0.5]
    updates, state = direction.update(g, state)
    assert_allclose(updates["w"], [3.0 * 2.9, 0, 0, 0], rtol=1e-6)


def test_clipping_knows_the_number_of_workers_and_survives_large_gradients():
    direction: Any = scale_by_dgc(sparsities=0.0, clip=2.0, axis_name="d")
    for size in (1.0, 1e30):
        g = {"w": jnp.full((1, 4, 4), size)}  # of norm 2 size on each of 4 workers
        _, updates = over_workers(direction, 4, g)
        assert_allclose(updates["w"], 0.5, rtol=1e-6)


def test_gradients_of_replicated_parameters_are_the_device_s_own():
    """The recipe of the docstring: `varying` keeps shard_map from summing them."""
    optimizer: Any = dgc(0.1, sparsities=0.0, axis_name="d")
    x = jnp.arange(16.0).reshape(8, 2)

    def local(p, x):
        state = optimizer.init(p)
        grads = jax.grad(lambda p: jnp.sum(x @ p))(varying(p, "d"))
        updates, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, updates)

    out: Any = P()
    step = jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("d")), out_specs=out)
    assert_allclose(jax.jit(step)(jnp.zeros(2), x), -0.1 * x.mean(0), rtol=1e-6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="argument 'sparsities' is 1.0, expected"):
        scale_by_dgc(sparsities=(0.5, 1.0))
    with pytest.raises(ValueError, match="argument 'clip' is 0"):
        dgc(0.1, clip=0)
    with pytest.raises(ValueError, match="argument 'compression' is 'signs'"):
        dgc(0.1, compression="signs")  # pyright: ignore
    with pytest.raises(ValueError, match="argument 'axis_name' is 'rows', expected"):
        dgc(0.1, axis_name="rows").init(zeros())
