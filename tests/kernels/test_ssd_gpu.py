"""The GPU kernels on a CPU: in the simulator, against the definition, and lowered."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import lowered
from running import QUICKLY
from ssd_inputs import assert_near, definition, inputs, sizes

from pallas_kernels import mosaic_gpu
from pallas_kernels import ssd as package
from pallas_kernels.ssd import gpu_layout as layout
from pallas_kernels.ssd import gpu_tiles, ssd
from pallas_kernels.ssd import pallas_gpu as gpu
from pallas_kernels.ssd.form import Inputs

NEW = pytest.mark.skipif(
    mosaic_gpu.unavailable() is not None, reason=mosaic_gpu.unavailable() or ""
)
BF16, F16 = jnp.bfloat16, jnp.float16
# (B, T, G, R, P, N), extras, dtype, log 10 of the longest step, blocks of threads to
# fill the machine with, and then the parts of time and the columns of a block that are
# cut for it.
CASES: dict[str, tuple] = {
    "plain": ((2, 128, 1, 1, 64, 64), "", BF16, 0.0, 1, (1, 1)),
    "parts, the last one shorter": ((1, 300, 1, 1, 64, 64), "D", BF16, 0.0, 2, (2, 1)),
    "heads of two columns": ((1, 190, 1, 2, 100, 100), "D", BF16, 0.0, 6, (1, 2)),
    "everything, padded": ((1, 70, 2, 3, 5, 7), "Dzs", BF16, 0.0, 4, (1, 3)),
    "strong decays": ((1, 150, 1, 1, 64, 128), "s", BF16, 3.0, 3, (3, 1)),
    "one token": ((2, 1, 1, 2, 64, 16), "z", F16, 0.0, 1, (1, 2)),
}  # fmt: skip


def stage(name, describe):
    """Marks a test as a case of a stage of these kernels."""
    return pytest.mark.stage("ssd", "pallas_gpu", name, describe)


def kernels(call, d_y, d_state, **knobs) -> Any:
    """y, the last state and all gradients."""
    y, state, kept = gpu.forward(call, keep=True, **knobs)
    return y, state, gpu.backward(call, kept, d_y, d_state, **knobs)


def simulated(function, *arrays) -> Any:
    run = functools.partial(function, interpret=mosaic_gpu.simulator())
    with mosaic_gpu.simulation():
        return jax.block_until_ready(QUICKLY(run)(*arrays))


@NEW
@stage("simulated", lambda name: f"{name}: {sizes(CASES[name][0], CASES[name][2])}")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_and_no_thread_races(name, monkeypatch):
    shape, extras, dtype, high, fill, expected = CASES[name]
    monkeypatch.setattr(layout, "FILL", fill)
    monkeypatch.setattr(layout, "SHORTEST", 1)
    arrays = inputs(shape, extras, dtype, high)
    assert gpu.unsupported(arrays[0]) is None
    cut = layout.plan(arrays[0])
    assert (cut.parts, cut.share) == expected
    got, wanted = simulated(kernels, *arrays), definition(*arrays)
    for gradient, given in zip(got[2], arrays[0], strict=True):
        assert gradient is None or gradient.dtype == given.dtype
    assert_near(got, wanted, 1e-2 if dtype == BF16 else 2e-3)


@NEW
def test_nothing_leaks_out_of_a_document():
    """To the bit, from a huge state, and where a step leaves nothing."""
    (call, d_y, d_state), at = inputs((1, 100, 1, 3, 64, 64), "s", BF16), 37
    call = call._replace(
        fresh=jnp.zeros((1, 100), bool).at[0, at].set(True),
        log_decay=call.log_decay.at[:, jnp.array([5, 80])].set(-1e4),
    )
    other = call._replace(
        x=call.x.at[:, :at].multiply(1e4), b=call.b.at[:, :at].add(1),
        c=call.c.at[:, :at].add(1), state=call.state + 1e9,
    )  # fmt: skip
    # After it large: what cancels leaves rounding errors that are seen on any machine.
    d_y, d_state = (1e3 * d_y).at[:, :at].set(0), 0 * d_state
    a, b = (simulated(kernels, x, d_y, d_state) for x in (call, other))
    for x, y in zip((a[0], *a[2][:5]), (b[0], *b[2][:5]), strict=True):
        np.testing.assert_array_equal(x[:, at:], y[:, at:])
    np.testing.assert_array_equal(a[1], b[1])
    for gradient in b[2][:5]:
        assert np.all(np.isfinite(gradient)) and np.any(gradient[:, at + 1 :])
        np.testing.assert_array_equal(gradient[:, :at], 0)
    np.testing.assert_array_equal(b[2].state, 0)
    np.testing.assert_array_equal(b[2].log_decay[:, at], 0)


@NEW
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_an_early_release_is_found(kernel, monkeypatch):
    """A block of memory that is filled again before it has been read."""
    call, d_y, d_state = inputs((1, 200, 1, 4, 64, 64), "", BF16)
    monkeypatch.setattr(layout, "FILL", 1)
    if kernel == "backward":  # its ring is for columns
        monkeypatch.setattr(layout, "SHORTEST", 4)
        _, _, kept = simulated(functools.partial(gpu.forward, keep=True), call)
    real = gpu_tiles.Walk.run

    def hasty(self, step, carry, **knobs):
        def early(index, blocks, done, carry):
            done()
            return step(index, blocks, lambda: None, carry)

        return real(self, early, carry, **knobs)

    monkeypatch.setattr(gpu_tiles.Walk, "run", hasty)
    with pytest.raises(Exception, match="RACE DETECTED"):
        if kernel == "forward":
            simulated(gpu.forward, call)
        else:
            simulated(gpu.backward, call, kept, d_y, d_state)


@NEW
def test_vmap_makes_a_longer_batch():
    call, *gradients = inputs((1, 70, 1, 1, 64, 16), "D", BF16)
    other = call._replace(b=-2 * call.b, skip=3 * call.skip)
    calls = [(call, *gradients), (other, *gradients)]
    together = jax.tree.map(lambda *x: jnp.stack(x), *calls)

    def run(*arrays, **knobs):
        return jax.vmap(functools.partial(kernels, **knobs))(*arrays)

    got = simulated(run, *together)
    for i, call in enumerate(calls):
        one = jax.tree.map(lambda x, i=i: x[i], got)
        assert_near(one, definition(*call), 1e-2)


OF_MODELS = (1, 2048, 1, 16, 64, 128)


def of_model(dtype, extras) -> str:
    what = "everything" if extras else "plain"
    return f"forward and gradient, {what}: {sizes(OF_MODELS, dtype)}"


@NEW
@stage("lowered", of_model)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_lowers_for_cuda_behind_the_same_call(dtype, extras, monkeypatch, capsys):
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "hopper")
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    batch, length, groups, heads, width, states = OF_MODELS
    x = jax.ShapeDtypeStruct((batch, length, heads, width), dtype)
    dt = jax.ShapeDtypeStruct((batch, length, heads), dtype)
    a = jax.ShapeDtypeStruct((heads,), jnp.float32)
    b = jax.ShapeDtypeStruct((batch, length, groups, states), dtype)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def total(x, dt, a, b, c, ids):
        knobs: Any = {}
        if extras:
            knobs = {"D": a, "z": x, "segment_ids": ids, "dt_softplus": True}
        return jnp.sum(ssd(x, dt, a, b, c, **knobs).astype(jnp.float32))

    arrays = (x, dt, a, b, b, ids)
    for function, count in ((total, 2), (jax.grad(total, (0, 1, 2, 3, 4)), 5)):
        text = lowered(function, *arrays)
        assert "ssd: pallas_gpu (the fastest here)" in capsys.readouterr().err
        assert text.count("mosaic_gpu_v2") >= count


@NEW
def test_inside_shard_map():
    """Where arrays are split over batch rows, and time is cut into parts."""
    arrays = jax.eval_shape(lambda: inputs((2, 1024, 1, 1, 64, 16), "s", BF16))
    text = lowered(kernels, *arrays, devices=2)
    assert text.count("mosaic_gpu_v2") >= 5


def abstract(shape) -> Any:
    batch, length, groups, heads, width, states = shape
    of: Any = dict.fromkeys(Inputs._fields)
    of["x"] = jax.ShapeDtypeStruct((batch, length, groups, heads, width), BF16)
    of["b"] = jax.ShapeDtypeStruct((batch, length, groups, states), BF16)
    return Inputs(**of)


def test_every_column_and_chunk_is_cut_once():
    for shape in ((4, 4096, 1, 24, 64, 128), (1, 65536, 1, 16, 128, 128),
                  (1, 1, 1, 1, 1, 1), (3, 1000, 7, 5, 65, 1)):  # fmt: skip
        cut = layout.plan(abstract(shape))
        assert cut.columns * layout.CHUNK >= math.prod(shape[2:5])
        assert 0 < cut.chunks - (cut.parts - 1) * cut.per_part <= cut.per_part
        assert cut.per_group % cut.share == 0
        # No more blocks of threads than run at once where each walks over time.
        assert cut.parts == 1 or shape[0] * cut.columns * cut.parts <= layout.FILL


def test_what_it_cannot_do_is_said_in_a_sentence():
    call, *_ = inputs((1, 3, 1, 1, 2, 2), "z", BF16)
    for change, word in (
        ({k: getattr(call, k).astype(jnp.float32) for k in "xbc"}, "float32"),
        ({"b": call.b.astype(F16)}, "one dtype"),
        ({"gate": call.gate.astype(F16)}, "one dtype"),
        ({"dt": np.zeros(call.dt.shape, np.float64)}, "float64"),
        ({"b": jnp.zeros((1, 3, 1, 129), BF16)}, "129"),
        ({"b": call.b[..., :0]}, "empty"),
    ):
        assert word in (gpu.unsupported(call._replace(**change)) or "")
    assert gpu.unsupported(call) == mosaic_gpu.unavailable()


def test_a_gpu_of_another_generation_gets_xla(monkeypatch, capsys):
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "gpu")
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    x = jnp.ones((1, 2, 1, 1), BF16)
    arrays = (x, x[..., 0], jnp.ones(1), x, x)
    ssd(*arrays)
    said = capsys.readouterr().err
    assert said.startswith("ssd: xla (there is no kernel for 'gpu')")
    with pytest.raises(NotImplementedError, match="'pallas_gpu', but the Hopper"):
        ssd(*arrays, implementation="pallas_gpu")
    assert set(package.KERNELS) <= set(package.IMPLEMENTATIONS)
