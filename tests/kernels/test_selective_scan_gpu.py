"""The GPU kernels on a CPU: in the simulator, against the definition, and lowered."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import lowered
from jax.experimental.pallas import mosaic_gpu as plgpu
from running import QUICKLY
from selective_scan_inputs import (
    HARD,
    SOFT,
    assert_near,
    definition,
    described,
    inputs,
    knobs,
    split_in_two,
)

from pallas_kernels import mosaic_gpu
from pallas_kernels.selective_scan import gpu_bodies, gpu_tokens, selective_scan
from pallas_kernels.selective_scan import pallas_gpu as gpu
from pallas_kernels.selective_scan.gpu_plan import plan_of
from pallas_kernels.selective_scan.terms import Rule

NEW = pytest.mark.skipif(
    mosaic_gpu.unavailable() is not None, reason=mosaic_gpu.unavailable() or ""
)


def stage(name, describe):
    """Marks a test as a case of a stage of these kernels."""
    return pytest.mark.stage("selective_scan", "pallas_gpu", name, describe)


def kernels(rule, arrays, d_y, d_end, interpret: Any = None):
    """y, the last state, and the gradients, of the kernels."""
    y, end, kept = gpu.forward_keeping(rule, arrays, interpret=interpret)
    gradients = gpu.backward(rule, arrays, kept, d_y, d_end, interpret=interpret)
    return y, end, gradients


# (B, T, G, P, N): more chunks than the ring holds, groups of a block and a bit, two
# blocks of states.
CASES = {
    "all": (SOFT, (2, 70, 2, 35, 5), jnp.float32, True),
    "plain, two blocks of states": (HARD, (1, 33, 1, 8, 17), jnp.float32, False),
    "one token": (SOFT, (1, 1, 1, 1, 1), jnp.float32, True),
    "whole chunks": (SOFT, (2, 64, 1, 32, 16), jnp.bfloat16, True),
    "half": (SOFT, (1, 20, 1, 3, 2), jnp.float16, True),
}  # fmt: skip


@NEW
@stage("simulated", lambda name: f"{name}: {described(*CASES[name][1:3])}")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_and_no_thread_races(name):
    rule, shape, dtype, extras = CASES[name]
    given = inputs(shape, dtype, extras)
    assert gpu.unsupported(rule, given[0]) is None
    with mosaic_gpu.simulation():
        call = functools.partial(kernels, rule, interpret=mosaic_gpu.simulator())
        actual = jax.block_until_ready(QUICKLY(call)(*given))
    wanted = QUICKLY(functools.partial(definition, rule))(*given)
    assert_near(actual, wanted, 1e-5 if dtype == jnp.float32 else 1e-2)


def unready(self, step):
    return tuple(buffer.at[self.stage(step)] for buffer in self.buffers)


def wait_and_release(self, step):
    plgpu.barrier_wait(self.full.at[self.stage(step)])
    plgpu.barrier_arrive(self.free.at[self.stage(step)])


RING = mosaic_gpu.Ring
HASTY = types.SimpleNamespace(**{**vars(plgpu), "wait_smem_to_gmem": lambda _: None})
FAULTS = {
    "a chunk is read before it is there": [
        (RING, "take", unready), (RING, "release", wait_and_release)
    ],
    "a chunk is written over while it is read": [(plgpu, "commit_smem", lambda: None)],
    "a result is written over while it is copied": [(gpu_bodies, "plgpu", HASTY)],
}  # fmt: skip


@NEW
@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_barrier_is_found(monkeypatch, fault):
    given, _, _ = inputs((1, 97, 1, 2, 2))
    for change in FAULTS[fault]:
        monkeypatch.setattr(*change)

    def run():
        with mosaic_gpu.simulation():
            out = gpu.forward(SOFT, given, interpret=mosaic_gpu.simulator())
            jax.block_until_ready(out)

    with pytest.raises(Exception, match="RACE DETECTED"):
        run()


@NEW
def test_vmap_is_a_loop():
    arrays, d_y, d_end = inputs((3, 9, 1, 5, 3))
    simulated = mosaic_gpu.simulator()

    def one(u, d_y):
        some = arrays._replace(u=u[None], start=arrays.start[:1], resets=None)
        rows = {k: getattr(some, k)[:1] for k in ("delta", "B", "C", "z")}
        some = some._replace(**rows)
        y, _, kept = gpu.forward_keeping(SOFT, some, interpret=simulated)
        d_end_1, d_y = d_end[:1], d_y[None]
        back = gpu.backward(SOFT, some, kept, d_y, d_end_1, interpret=simulated)
        return y[0], back.A

    with mosaic_gpu.simulation():
        y, d_A = jax.block_until_ready(QUICKLY(jax.vmap(one))(arrays.u, d_y))
    same = {
        k: jnp.broadcast_to(x[:1], x.shape)
        for k, x in arrays._asdict().items()
        if k in ("delta", "B", "C", "z", "start")
    }
    wanted, _, _ = definition(
        SOFT, arrays._replace(**same, resets=None), d_y, jnp.zeros_like(d_end)
    )
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-5)
    for i in range(3):
        rows = {k: v[i : i + 1] for k, v in same.items()}
        some = arrays._replace(**rows, u=arrays.u[i : i + 1], resets=None)
        alone = definition(SOFT, some, d_y[i : i + 1], d_end[:1])[2].A
        np.testing.assert_allclose(d_A[i], alone, rtol=1e-4, atol=1e-5)


@NEW
def test_inside_shard_map(monkeypatch):
    """The gradient's types say that it differs by device, as those of inputs do."""
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "hopper")
    u = jax.ShapeDtypeStruct((2, 32, 32), jnp.bfloat16)
    B, A = jax.ShapeDtypeStruct((2, 32, 16), jnp.bfloat16), -jnp.ones((32, 16))

    def total(u, delta, B, C):
        return jnp.sum(selective_scan(u, delta, A, B, C).astype(jnp.float32))

    text = lowered(jax.grad(total, (0, 1, 2, 3)), u, u, B, B, devices=2)
    assert text.count("mosaic_gpu_v2") >= 2


def to_lower(dtype: Any, extras: bool) -> str:
    shape = (2, 333, 2, 200, 40) if extras else (1, 64, 1, 64, 16)
    return f"{'all' if extras else 'plain'}: {described(shape, dtype)}"


@NEW
@stage("lowered", to_lower)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_lowers_for_cuda(dtype, extras):
    shape = (2, 333, 2, 200, 40) if extras else (1, 64, 1, 64, 16)
    given = jax.eval_shape(lambda: inputs(shape, dtype, extras))
    text = lowered(functools.partial(kernels, SOFT), *given)
    assert text.count("mosaic_gpu_v2") == 2


@NEW
def test_they_are_behind_the_same_call(monkeypatch, capsys):
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "hopper")
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    floats = jax.eval_shape(lambda: knobs(inputs((1, 40, 1, 8, 3))[0]))

    def total(floats):
        return jnp.sum(selective_scan(**floats, delta_softplus=True))

    text = lowered(jax.grad(total), floats)
    assert "selective_scan: pallas_gpu (the fastest here)" in capsys.readouterr().err
    assert text.count("mosaic_gpu_v2") == 2


@NEW
def test_their_types_over_a_mesh_are_right(monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "hopper")
    whole, split, args = split_in_two(check=True)
    got, wanted = (jax.eval_shape(jax.value_and_grad(f), *args) for f in (split, whole))
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)


@NEW
def test_what_they_lack_is_said_and_names_xla(monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "hopper")
    floats = knobs(inputs((1, 4, 1, 2, 3))[0])

    def total(u):
        given = {**floats, "u": u}
        return jnp.sum(selective_scan(**given, implementation="pallas_gpu"))

    def both(u):
        return jax.jvp(jax.grad(total), (u,), (u,))

    with pytest.raises(NotImplementedError, match='implementation="xla" has them'):
        jax.eval_shape(both, floats["u"])
    with pytest.raises(NotImplementedError, match="by Euler's rule.*'xla' runs"):
        selective_scan(**floats, discretization="zoh", implementation="pallas_gpu")


def test_what_it_cannot_do_is_said_in_a_sentence():
    arrays, _, _ = inputs((1, 4, 1, 2, 3))
    many = arrays._replace(A=jnp.zeros((1, 129, 2)))
    large = jax.ShapeDtypeStruct(arrays.u.shape, jnp.float64)
    for some, rule, word in (
        (arrays._replace(A=arrays.A + 0j), SOFT, "real A"),
        (arrays, Rule(zoh=True), "Euler"),
        (arrays._replace(u=large), SOFT, "float64"),
        (arrays._replace(u=arrays.u[:, :0]), SOFT, "empty"),
        (many, SOFT, "129"),
    ):
        assert word in (gpu.unsupported(rule, some) or "")
    assert gpu.unsupported(SOFT, arrays) == mosaic_gpu.unavailable()


def test_what_is_kept_is_a_state_for_32_tokens():
    given = jax.eval_shape(lambda: inputs((2, 1000, 1, 96, 16)))
    plan = plan_of(given[0])
    sizes = (plan.batch, plan.chunks, plan.columns, *plan.tile())
    assert np.prod(sizes) == 2 * 96 * 16 * np.ceil(1000 / 32)


def test_step_sizes_are_right_from_the_smallest_to_the_largest():
    """The logarithm of an instruction would lose step sizes of 1e-4."""
    x = np.linspace(-80.0, 100.0, 2001)
    wanted = np.logaddexp(0.0, x)
    got = np.asarray(gpu_tokens.softplus(jnp.asarray(x, jnp.float32)), np.float64)
    rounded = np.logaddexp(0.0, np.asarray(jnp.asarray(x, jnp.float32), np.float64))
    assert np.abs(rounded / wanted - 1).max() < 1e-5
    # The exponent is rounded once more, to units of log 2.
    assert (np.abs(got / rounded - 1) <= 3e-7 + 1e-7 * np.abs(np.minimum(x, 0))).all()
