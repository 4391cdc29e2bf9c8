"""1-bit Adam by the paper in float64, over real devices, and the bytes of its HLO."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.core.collectives import varying
from jaxzoo.distributed.one_bit_adam import (
    OneBitAdamState,
    one_bit_adam,
    scale_by_one_bit_adam,
    warmup_steps,
)
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

WARMUP = 2
SPEC = OneBitAdamState(*cast(Any, (P(), P("d"), P("d"), P())))


def of_the_paper(grads, workers, *, scale="mean", feedback=True):
    """Directions `[steps, d]` and errors, by loops over workers and servers."""
    names = sorted(grads)
    flat = np.concatenate(
        [np.reshape(grads[n], (STEPS, workers, -1)) for n in names], axis=2
    )
    of_leaf = np.repeat(np.arange(len(names)), [int(np.prod(SHAPES[n])) for n in names])
    d = flat.shape[2]
    chunk = 8 * -(-d // (8 * workers))

    def sign(x):
        return np.where(x >= 0, 1.0, -1.0)

    def quantize(x, leaves):
        out = np.zeros_like(x)
        for leaf in set(leaves):
            at = leaves == leaf
            size = np.mean(np.abs(x[at]))
            size = size if scale == "mean" else np.sqrt(np.mean(x[at] ** 2))
            out[at] = size * sign(x[at])
        return out

    m, v = np.zeros(d), np.zeros(d)
    worker, server = np.zeros((workers, d)), np.zeros(d)
    directions = []
    for t in range(1, STEPS + 1):
        g = flat[t - 1]
        if t <= WARMUP:
            m = 0.9 * m + 0.1 * g.mean(0)
            v = 0.99 * v + 0.01 * g.mean(0) ** 2
        else:
            total = np.zeros(d)
            for i in range(workers):
                x = 0.9 * m + 0.1 * g[i] + worker[i]
                c = quantize(x, of_leaf)
                worker[i] = (x - c) * feedback
                total += c / workers
            x, m = total + server, np.zeros(d)
            for j in range(workers):
                part = slice(j * chunk, (j + 1) * chunk)
                m[part] = quantize(x[part], of_leaf[part])
            server = (x - m) * feedback
        frozen = v / (1 - 0.99 ** min(t, WARMUP))
        directions.append(m / (1 - 0.9**t) / (np.sqrt(frozen) + 1e-8))
    return np.stack(directions), worker, server


@pytest.mark.parametrize(
    "workers, scale, feedback",
    [(1, "rms", True), (3, "mean", True), (8, "mean", False)],
)
def test_steps_are_those_of_the_paper(workers, scale, feedback):
    grads = gradients(workers)
    expected, worker, server = of_the_paper(
        grads, workers, scale=scale, feedback=feedback
    )
    with jax.enable_x64(True):
        direction: Any = scale_by_one_bit_adam(
            b2=0.99,
            warmup=WARMUP,
            scale=scale,
            error_feedback=feedback,
            axis_name="d",
        )
        state, updates = over_workers(
            direction, workers, jax.tree.map(jnp.asarray, grads)
        )
    got = flattened(updates, 2)
    for each in range(workers):
        assert_allclose(got[:, each], expected, rtol=1e-6, atol=1e-6)
    d = expected.shape[1]
    assert_allclose(state.worker_error[:, :d], worker, rtol=1e-5, atol=1e-6)
    assert_allclose(state.server_error.reshape(-1)[:d], server, rtol=1e-5, atol=1e-6)
    assert not np.any(state.worker_error[:, d:])  # what fills the vector up


@pytest.mark.parametrize("devices, check_vma", [(1, True), (8, True), (8, False)])
def test_shard_map_over_real_devices_is_the_simulation(devices, check_vma):
    grads = jax.tree.map(jnp.float32, gradients(devices))
    direction: Any = scale_by_one_bit_adam(b2=0.99, warmup=WARMUP, axis_name="d")
    last, expected = over_workers(direction, devices, grads)
    init, update = sharded(direction, devices, SPEC, check_vma)
    state = init(zeros())
    for t in range(STEPS):
        updates, state = update(jax.tree.map(lambda g, t=t: g[t], grads), state)
        wanted = jax.tree.map(lambda u, t=t: u[t, 0], expected)
        jax.tree.map(lambda a, b: assert_allclose(a, b, 2e-5, 1e-5), updates, wanted)
    assert_allclose(state.worker_error, last.worker_error.reshape(-1), 1e-4, 1e-5)
    assert_allclose(state.server_error, last.server_error.reshape(-1), 1e-4, 1e-5)


def test_bytes_sent_are_those_of_the_compiled_program_and_28_times_fewer():
    shapes = {"a": (100, 300), "b": (300,), "c": (300, 20), "d": (20,)}
    grads = jax.tree.map(lambda g: jnp.float32(g[0]), gradients(8, shapes, 1))
    direction: Any = scale_by_one_bit_adam(warmup=1, axis_name="d")
    init, update = sharded(direction, 8, SPEC)
    state = init(zeros(shapes))
    compiled: Any = update.lower(grads, state).compile()
    found = collectives(compiled.as_text())
    sent = {c.kind: wire_bytes(c.kind, c.bytes, c.group_size) for c in found}
    assert set(sent) == {"all-reduce", "all-to-all", "all-gather"}
    _, state = compiled(grads, state)
    dense = float(state.bytes_sent)
    assert dense == sent["all-reduce"]
    _, state = compiled(grads, state)
    assert float(state.bytes_sent) == sent["all-to-all"] + sent["all-gather"]
    assert sent["all-to-all"] == sent["all-gather"]
    assert dense >= 28 * float(state.bytes_sent)
    wide = [line for line in compiled.as_text().splitlines() if " all-to-all(" in line]
    assert all("u8[" in line for line in wide)
    assert int(state.adam.count) == 2


def test_without_compression_it_is_adam_of_the_mean_gradient():
    grads = jax.tree.map(jnp.float32, gradients(8))
    direction: Any = scale_by_one_bit_adam(b2=0.99, compression="none", axis_name="d")
    init, update = sharded(direction, 8, SPEC)
    adam: Any = optax.scale_by_adam(b2=0.99)

    def mean(grads):
        own = jax.tree.map(lambda g: g[0], grads)
        return jax.lax.pmean(own, "d")

    average = jax.shard_map(mean, mesh=mesh(), in_specs=P("d"), out_specs=P())
    dense = jax.jit(lambda grads, state: adam.update(average(grads), state))
    state, expected = init(zeros()), adam.init(zeros())
    for t in range(3):
        now = jax.tree.map(lambda g, t=t: g[t], grads)
        updates, state = update(now, state)
        wanted, expected = dense(now, expected)
        jax.tree.map(assert_array_equal, updates, wanted)
    assert not np.any(state.worker_error)


def test_the_warm_up_is_adam_and_then_v_stays():
    grads = jax.tree.map(lambda g: jnp.float32(g[:, 0]), gradients(1))
    ours: Any = one_bit_adam(0.1, warmup=3)
    adam: Any = optax.adam(0.1)
    state, expected = ours.init(zeros()), adam.init(zeros())
    update = jax.jit(ours.update)
    for t in range(STEPS):
        now = jax.tree.map(lambda g, t=t: g[t], grads)
        updates, state = update(now, state)
        wanted, expected = adam.update(now, expected)
        if t < 3:
            jax.tree.map(lambda a, b: assert_allclose(a, b, 1e-5), updates, wanted)
            frozen = state[0].adam.nu
    jax.tree.map(assert_array_equal, state[0].adam.nu, frozen)
    assert state[0].bytes_sent == 0  # a world of one


def test_what_was_sent_and_what_is_left_is_all_that_came():
    """Without decay m is the gradient: sums over steps agree up to the last errors."""
    grads = jax.tree.map(jnp.float32, gradients(8))
    direction: Any = scale_by_one_bit_adam(
        b1=0.0, b2=0.0, eps=0.0, warmup=1, axis_name="d"
    )
    ones = jax.tree.map(lambda g: g.at[0].set(1.0), grads)  # so v = 1
    state, updates = over_workers(direction, 8, ones)
    sent = flattened(updates, 2)[1:, 0].sum(0)
    came = flattened(ones, 2)[1:].mean(1).sum(0)
    d = came.size
    left = state.worker_error[:, :d].mean(0) + state.server_error.reshape(-1)[:d]
    assert_allclose(sent + left, came, rtol=1e-4, atol=1e-4)
    assert np.abs(left).max() > 0.1


def test_a_parameter_that_had_no_gradient_stays_where_it_is():
    grads = {"w": jnp.array([1.0, 0.0, -2.0])}
    direction: Any = scale_by_one_bit_adam(warmup=1)
    state = direction.init(grads)
    for _ in range(3):
        updates, state = direction.update(grads, state)
        assert updates["w"][1] == 0 and np.all(np.isfinite(updates["w"]))


def test_compressed_gradients_feed_both_moments():
    """The paper's counter-example: all of v is of one size, as |C(g)| is."""
    grads = jax.tree.map(lambda g: jnp.float32(g[:, 0]), gradients(1))
    direction: Any = scale_by_one_bit_adam(compression="gradient", warmup=0)
    state = direction.init(zeros())
    _, state = direction.update(jax.tree.map(lambda g: g[0], grads), state)
    nu = state.adam.nu["kernel"]
    g = grads["kernel"][0]
    assert_allclose(nu, np.full_like(nu, 0.001 * np.mean(np.abs(g)) ** 2), rtol=1e-4)


def test_gradients_of_replicated_parameters_are_the_device_s_own():
    """The recipe of the docstring: `varying` keeps shard_map from summing them."""
    optimizer: Any = one_bit_adam(0.1, warmup=1, axis_name="d")
    x = jnp.arange(16.0).reshape(8, 2) / 10

    def loss(p, x):
        return jnp.sum(x @ p["w"]) + p["b"]

    def local(p, x):
        state = optimizer.init(p)
        for _ in range(2):
            grads = jax.grad(loss)(varying(p, "d"), x)
            updates, state = optimizer.update(grads, state, p)
            p = optax.apply_updates(p, updates)
        return p, state[0].adam.mu

    p: Any = {"w": jnp.zeros(2), "b": jnp.zeros(())}
    out: Any = P()
    step = jax.shard_map(local, mesh=mesh(), in_specs=(P(), P("d")), out_specs=out)
    _, mu = jax.jit(step)(p, x)
    assert_allclose(mu["b"], 0.19, rtol=1e-5)  # the gradient is 1 everywhere


def test_the_warm_up_ends_where_v_has_settled():
    t = np.arange(1, 400)
    norms = (1 - 0.98**t).astype(np.float32)  # v of a constant gradient, b2 = 0.98
    first = next(
        i for i in t if i > 50 and 1 - 0.98 ** (i - 50) >= 0.96 * (1 - 0.98**i)
    )
    assert int(warmup_steps(norms, b2=0.98)) == first
    falling = norms[::-1].copy()
    assert int(warmup_steps(falling, b2=0.98)) == 51
    assert int(warmup_steps(2.0 ** t[:100].astype(np.float32), b2=0.98)) == 100
    assert int(warmup_steps(norms[:7], b2=0.98)) == 7


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="argument 'warmup' is 0, expected a number"):
        scale_by_one_bit_adam(warmup=0)
    with pytest.raises(ValueError, match="argument 'compression' is 'signs'"):
        one_bit_adam(0.1, compression="signs")  # pyright: ignore
    with pytest.raises(ValueError, match="argument 'axis_name' is 'rows', expected"):
        one_bit_adam(0.1, axis_name="rows").init(zeros())
