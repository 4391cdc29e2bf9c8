"""The TPU kernels of Mamba-2, interpreted and lowered on a CPU."""

import functools
import importlib
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from running import QUICKLY
from ssd_inputs import assert_near, definition, inputs, sizes

from pallas_kernels.ssd import pallas_tpu as tpu
from pallas_kernels.ssd import tpu_layout


def kernels(call, d_y, d_state, **knobs):
    """y, the last state and all gradients."""
    y, state, starts = tpu.forward(call, keep=True, **knobs)
    assert starts is not None
    return y, state, tpu.backward(call, starts, d_y, d_state, **knobs)


def assert_equal(arrays, bound, *, interpret: Any = True):
    assert tpu.unsupported(arrays[0]) is None
    run = QUICKLY(functools.partial(kernels, interpret=interpret))
    assert_near(run(*arrays), definition(*arrays), bound)


CASES: dict[str, tuple] = {
    "several blocks of tokens and lanes": ((1, 600, 1, 6, 64, 16), "D"),
    "everything, padded": ((2, 130, 2, 3, 5, 7), "Dzs"),
    "strong decays": ((1, 130, 1, 1, 128, 8), "", 2.0),
    "one token": ((2, 1, 1, 2, 64, 16), "z"),
}


def stage(name, describe):
    """Marks a test as a case of a stage of these kernels."""
    return pytest.mark.stage("ssd", "pallas_tpu", name, describe)


@stage("interpreted", lambda name: f"{name}: {sizes(CASES[name][0])}")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    shape, extras, *high = CASES[name]
    assert_equal(inputs(shape, extras, jnp.float32, *high), 1e-5)


SMALL = (1, 200, 1, 4, 32, 16)


@stage("interpreted", lambda: f"everything: {sizes(SMALL, 'bfloat16')}")
def test_bfloat16():
    assert_equal(inputs(SMALL, "Dzs", jnp.bfloat16), 1e-2)


ONE_HEAD = (1, 140, 1, 1, 3, 4)


@stage("oracle", lambda: sizes(ONE_HEAD))
def test_equals_float64():
    call, d_y, d_state = inputs(ONE_HEAD)
    y, state, grads = QUICKLY(functools.partial(kernels, interpret=True))(
        call, d_y, d_state
    )
    x, dt, log_decay, b, c, h, d_y, d_state = (
        np.asarray(a, np.float64).squeeze((0, 2) if a.shape[1] > 1 else (0, 1, 2))
        for a in (*call[:5], call.state, d_y, d_state)
    )
    dt, decay = dt[:, 0], np.exp(log_decay[:, 0])
    x, d_y = x[:, 0], d_y[:, 0]
    states = [h]
    for t in range(140):
        states.append(decay[t] * states[-1] + dt[t] * np.outer(x[t], b[t]))
    found = {k: np.zeros(v.shape) for k, v in
             {"x": x, "dt": dt, "log_decay": dt, "b": b, "c": c}.items()}  # fmt: skip
    g = d_state
    for t in reversed(range(140)):
        found["c"][t] = states[t + 1].T @ d_y[t]
        g = g + np.outer(d_y[t], c[t])
        found["x"][t], found["b"][t] = dt[t] * g @ b[t], dt[t] * g.T @ x[t]
        found["dt"][t] = x[t] @ g @ b[t]
        found["log_decay"][t] = decay[t] * np.sum(g * states[t])
        g = decay[t] * g
    found["state"] = g
    pairs = {k: (getattr(grads, k), v) for k, v in found.items()}
    pairs["y"] = (y, np.stack([s @ c[t] for t, s in enumerate(states[1:])]))
    pairs["end"] = (state, states[-1])
    for name, (a, wanted) in pairs.items():
        far = np.abs(np.asarray(a, np.float64).reshape(wanted.shape) - wanted).max()
        assert far <= 1e-5 * np.abs(wanted).max(), name


def races() -> bool:
    """Older versions of jax print races and do not raise."""
    module = "jax._src.pallas.mosaic.interpret.interpret_pallas_call"
    return bool(getattr(importlib.import_module(module).races, "races_found", False))


RACED = (1, 200, 2, 2, 128, 8)


@stage("simulated", lambda: f"everything: {sizes(RACED)}")
def test_no_races_and_nothing_read_before_it_is_written(monkeypatch):
    monkeypatch.setattr(tpu_layout, "BLOCK", 1)
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    try:
        arrays = inputs(RACED, "Dzs")
        assert_equal(arrays, 1e-5, interpret=interpret)
        assert not races()
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def lowered(dtype, extras) -> str:
    return f"{'everything' if extras else 'plain'}: {sizes(OF_MODELS, dtype)}"


OF_MODELS = (1, 2048, 1, 16, 64, 128)


@stage("lowered", lowered)
@pytest.mark.parametrize("extras", ["", "Dzs"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_tpu(dtype, extras):
    for shape in (OF_MODELS, (2, 333, 2, 3, 5, 7)):
        arrays = jax.eval_shape(lambda s=shape: inputs(s, extras, dtype))
        traced = jax.jit(kernels).trace(*arrays)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 2


# Bytes.


def traffic(spec: pl.BlockSpec, grid, dtype) -> int:
    """Bytes that the steps of a grid move: a block each time that it is another one."""
    size = math.prod(x or 1 for x in cast(Any, spec.block_shape))
    steps = np.indices(grid, np.int32).reshape(len(grid), -1)
    at = np.stack(QUICKLY(jax.vmap(cast(Any, spec.index_map)))(*steps))
    moves = 1 + np.any(at[:, 1:] != at[:, :-1], axis=0).sum()
    return int(moves) * size * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize(
    ("dtype", "extras", "states", "heads"),
    [
        (jnp.bfloat16, "", 128, 16),
        (jnp.bfloat16, "Dz", 64, 80),
        (jnp.bfloat16, "", 128, 80),
        (jnp.float32, "Dz", 128, 16),
    ],
)
def test_bytes_are_within_half_of_those_of_inputs_and_outputs(
    monkeypatch, dtype, extras, states, heads
):
    """The states between blocks come on top, and rows of heads that are not there."""
    seen: list[tuple] = []
    real = pl.pallas_call

    def spy(body, *, out_shape, grid, in_specs, out_specs, name, **knobs):
        inner = real(
            body, out_shape=out_shape, grid=grid, in_specs=in_specs,
            out_specs=out_specs, name=name, **knobs,
        )  # fmt: skip

        def run(*arrays):
            kinds = [x.dtype for x in (*arrays, *out_shape)]
            seen.append((name, grid, (*in_specs, *out_specs), kinds))
            return inner(*arrays)

        return run

    monkeypatch.setattr(pl, "pallas_call", spy)
    shape = (1, 4096, 1, heads, 64, states)
    call, d_y, d_state = jax.eval_shape(lambda: inputs(shape, extras, dtype))
    jax.eval_shape(kernels, call, d_y, d_state)
    jax.eval_shape(tpu.forward, call)

    def size(*trees):
        leaves = jax.tree.leaves(trees)
        return sum(x.size * x.dtype.itemsize for x in leaves)

    once = {
        "ssd_forward": size(call, d_y, d_state),
        "ssd_backward": size(call, call, d_y, d_state) - size(d_state),
    }
    ratios = []
    for name, grid, specs, kinds in seen:
        pairs = zip(specs, kinds, strict=True)
        ratios.append(sum(traffic(s, grid, x) for s, x in pairs) / once[name])
    assert [x[0] for x in seen] == ["ssd_forward", "ssd_backward", "ssd_forward"]
    assert all(1.0 <= ratio <= 1.5 for ratio in ratios), ratios
    assert ratios[2] < ratios[0]  # without a gradient no states are kept
    assert ratios[2] <= 1.1, ratios


def test_inside_shard_map():
    """Where arrays are split over batch rows."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    arrays = inputs((2, 20, 1, 1, 128, 8))

    def split(check, **knobs):
        run = functools.partial(kernels, **knobs)
        rows = P("data")
        return run, jax.shard_map(
            run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check
        )

    # The interpreter's loops do not know of varying axes; the compiled kernel does.
    both = (QUICKLY(f)(*arrays) for f in split(False, interpret=True))
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
    traced = jax.jit(split(True)[1]).trace(*arrays)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_heads_are_split_where_their_states_fill_the_memory():
    shape = (1, 128, 2, 320, 64, 256)
    call, *_ = jax.eval_shape(lambda: inputs(shape))
    cut = tpu_layout.plan(call)
    assert cut.parts == 5 and cut.grid == (1, 10, 1, 16)
    assert cut.across * cut.lanes * cut.states * 4 <= 4 * 2**20


def test_what_it_cannot_do_is_said_in_a_sentence():
    call, *_ = inputs((1, 3, 1, 1, 2, 2))
    half = call.x.astype(jnp.float16)
    for change, word in (
        ({"x": half}, "float16"),
        ({"b": call.b.astype(jnp.bfloat16)}, "one dtype"),
        ({"b": jnp.zeros((1, 3, 1, 257))}, "257"),
        ({"b": call.b[..., :0]}, "empty"),
    ):
        assert word in (tpu.unsupported(call._replace(**change)) or "")
    assert tpu.unsupported(call) is None
