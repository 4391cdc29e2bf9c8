"""The TPU kernels, interpreted and lowered on a CPU, against the definition."""

import functools
import importlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from running import QUICKLY, interpret
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

from pallas_kernels.selective_scan import pallas_tpu as tpu
from pallas_kernels.selective_scan import ref, selective_scan
from pallas_kernels.selective_scan.terms import Rule
from pallas_kernels.selective_scan.tpu_plan import plan_of


def kernels(rule, arrays, d_y, d_end, interpret: Any = True):
    """y, the last state, and the gradients, of the kernels."""
    y, end, kept = tpu.forward_keeping(rule, arrays, interpret=interpret)
    return y, end, tpu.backward(rule, arrays, kept, d_y, d_end, interpret=interpret)


def assert_equal(rule, given, bound=1e-5, **knobs):
    assert tpu.unsupported(rule, given[0]) is None
    actual = QUICKLY(functools.partial(kernels, rule, **knobs))(*given)
    assert_near(actual, QUICKLY(functools.partial(definition, rule))(*given), bound)


CASES = {
    "all, two blocks, groups": (SOFT, (2, 300, 2, 70, 5), jnp.float32, True),
    "five blocks of channels": (HARD, (1, 20, 1, 640, 16), jnp.float32, False),
    "one token": (SOFT, (1, 1, 1, 1, 1), jnp.float32, True),
    "bfloat16": (SOFT, (1, 37, 1, 130, 9), jnp.bfloat16, True),
}  # fmt: skip


def stage(name, describe):
    """Marks a test as a case of a stage of these kernels."""
    return pytest.mark.stage("selective_scan", "pallas_tpu", name, describe)


@stage("interpreted", lambda name: f"{name}: {described(*CASES[name][1:3])}")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    rule, shape, dtype, extras = CASES[name]
    bound = 1e-5 if dtype == jnp.float32 else 1e-2
    assert_equal(rule, inputs(shape, dtype, extras), bound)


@stage("oracle", lambda: described((1, 150, 1, 7, 3), jnp.float32))
def test_equals_float64():
    arrays, d_y, d_end = inputs((1, 150, 1, 7, 3), extras=False)
    got = QUICKLY(functools.partial(kernels, HARD))(arrays, d_y, d_end)
    u, dt, A, B, C = (
        np.asarray(x, np.float64)[..., :, :].squeeze(axis)
        for x, axis in zip(arrays[:5], ((0, 2), (0, 2), 0, (0, 2), (0, 2)), strict=True)
    )
    dy, g = np.asarray(d_y, np.float64)[0, :, 0], np.asarray(d_end, np.float64)[0, 0]
    h = np.asarray(arrays.start, np.float64)[0, 0]
    states = [h]
    for t in range(150):
        h = np.exp(dt[t] * A) * h + dt[t] * u[t] * B[t][:, None]
        states.append(h)
    y = np.stack([C[t] @ states[t + 1] for t in range(150)])
    grads = [np.zeros_like(x) for x in (u, dt, A, B, C)]
    for t in reversed(range(150)):
        power = np.exp(dt[t] * A)
        g = g + C[t][:, None] * dy[t]
        x = B[t] @ g
        grads[0][t] = dt[t] * x
        grads[1][t] = u[t] * x + np.sum(g * power * states[t] * A, axis=0)
        grads[2] += g * power * states[t] * dt[t]
        grads[3][t], grads[4][t] = g @ (dt[t] * u[t]), states[t + 1] @ dy[t]
        g = g * power
    wanted = (y, states[-1], *grads, g)
    mine = (got[0], got[1], *got[2][:5], got[2].start)
    for a, b in zip(mine, wanted, strict=True):
        far = np.abs(np.asarray(a, np.float64).reshape(b.shape) - b).max()
        assert far <= 1e-5 * np.abs(b).max()


def races() -> bool:
    """Older versions of jax print races and do not raise."""
    module = "jax._src.pallas.mosaic.interpret.interpret_pallas_call"
    return bool(getattr(importlib.import_module(module).races, "races_found", False))


RACED = (1, 140, 2, 5, 3)  # two blocks of tokens, two of channels


@stage("simulated", lambda: f"all: {described(RACED, jnp.float32)}")
def test_no_races_and_nothing_read_before_it_is_written(monkeypatch):
    def shorter(inputs):
        return plan_of(inputs)._replace(size=128, blocks=2)

    monkeypatch.setattr(tpu, "plan_of", shorter)
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    given = inputs(RACED)
    try:
        assert_equal(SOFT, given, interpret=interpret)
        assert not races()
    finally:
        pltpu.reset_tpu_interpret_mode_state()


# Bytes: what the blocks move between the memories, against each array once.


class Calls:
    """Stands for `pallas_call`, and keeps what each call was made of."""

    def __init__(self, real):
        self.real, self.calls = real, []

    def __call__(self, body, *, out_shape, grid_spec, cost_estimate, **words):
        call = self.real(
            body, out_shape=out_shape, grid_spec=grid_spec,
            cost_estimate=cost_estimate, **words,
        )  # fmt: skip

        def kept(*operands):
            kinds = [x.dtype for x in (*jax.tree.leaves(operands), *out_shape)]
            self.calls.append((grid_spec, kinds, cost_estimate.bytes_accessed))
            return call(*operands)

        return kept


def moved(grid_spec, kinds) -> int:
    """Bytes of all blocks, over all steps where a block is another than before."""
    specs = jax.tree.leaves(
        (grid_spec.in_specs, grid_spec.out_specs),
        is_leaf=lambda x: isinstance(x, pl.BlockSpec),
    )
    total = 0
    for spec, kind in zip(specs, kinds, strict=True):
        sizes = [n for n in spec.block_shape if isinstance(n, int)]
        steps = itertools.product(*map(range, grid_spec.grid))
        places = [tuple(map(int, spec.index_map(*ids))) for ids in steps]
        visits = sum(a != b for a, b in itertools.pairwise(places)) + 1
        total += visits * int(np.prod(sizes)) * kind.itemsize
    return total


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("length", "channels", "states"), [(2048, 1024, 16), (2048, 1024, 128)]
)
def test_bytes_are_those_of_every_array_once(
    monkeypatch, dtype, length, channels, states
):
    calls = Calls(pl.pallas_call)
    monkeypatch.setattr(pl, "pallas_call", calls)
    given = jax.eval_shape(
        lambda: inputs((2, length, 1, channels, states), dtype, extras=False)
    )
    jax.eval_shape(functools.partial(kernels, HARD), *given)

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    arrays, d_y, d_end = given
    forward = size(arrays) + size((d_y, d_end))  # y and the last state are like these
    backward = size(arrays._replace(start=None)) + size((d_y, d_end)) + size(arrays)
    for (spec, kinds, told), floor in zip(
        calls.calls, (forward, backward), strict=True
    ):
        bytes_moved = moved(spec, kinds)
        assert floor <= bytes_moved <= 1.5 * floor
        assert abs(told - bytes_moved) <= 0.01 * bytes_moved


def lowered(rule, arrays, *gradients):
    function = functools.partial(kernels, rule, interpret=False)
    if not gradients:
        function = functools.partial(tpu.forward, rule)
    traced = jax.jit(function).trace(arrays, *gradients)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


def to_lower(shape: tuple[int, ...], dtype: Any, extras: bool) -> str:
    return f"{'all' if extras else 'plain'}: {described(shape, dtype)}"


@stage("lowered", to_lower)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 2048, 1, 1024, 16), (2, 333, 2, 200, 128), (1, 1, 1, 1, 1)]
)
def test_lowers_for_tpu(shape, dtype, extras):
    given = jax.eval_shape(lambda: inputs(shape, dtype, extras))
    assert lowered(SOFT, given[0]).count("tpu_custom_call") == 1
    assert lowered(SOFT, *given).count("tpu_custom_call") == 2


@pytest.fixture
def interpreted(monkeypatch):
    interpret(monkeypatch, tpu)


def test_they_are_behind_the_same_call_also_where_a_sequence_is_split(interpreted):
    """Without the check of axes, which jax's interpreter of kernels does not know."""
    whole, split, args = split_in_two(check=False)
    results = [QUICKLY(jax.value_and_grad(f))(*args) for f in (split, whole)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


def test_their_types_over_a_mesh_are_right(monkeypatch):
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    whole, split, args = split_in_two(check=True)
    got, wanted = (jax.eval_shape(jax.value_and_grad(f), *args) for f in (split, whole))
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)


def test_vmap_is_a_loop():
    arrays, _, _ = inputs((3, 20, 1, 5, 3))

    def one(u, start):
        some = arrays._replace(u=u[None], start=start[None], resets=None)
        rows = {k: getattr(some, k)[:1] for k in ("delta", "B", "C", "z")}
        return tpu.forward(SOFT, some._replace(**rows), interpret=True)

    y, end = QUICKLY(jax.vmap(one))(arrays.u, arrays.start)
    same = {
        k: jnp.broadcast_to(x[:1], x.shape)
        for k, x in arrays._asdict().items()
        if k in ("delta", "B", "C", "z")
    }
    wanted = ref.scan(SOFT, arrays._replace(**same, resets=None))
    np.testing.assert_allclose(y[:, 0], wanted[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end[:, 0], wanted[1], rtol=1e-4, atol=1e-5)


def test_what_they_lack_is_said_and_names_xla(interpreted):
    floats = knobs(inputs((1, 4, 1, 2, 3))[0])

    def total(u):
        given = {**floats, "u": u}
        return jnp.sum(selective_scan(**given, implementation="pallas_tpu"))

    with pytest.raises(NotImplementedError, match='implementation="xla" has them'):
        jax.jvp(total, (floats["u"],), (floats["u"],))
    with pytest.raises(NotImplementedError, match='implementation="xla" has them'):
        jax.jvp(jax.grad(total), (floats["u"],), (floats["u"],))
    with pytest.raises(NotImplementedError, match="by Euler's rule.*'xla' runs"):
        selective_scan(**floats, discretization="zoh", implementation="pallas_tpu")


def test_what_it_cannot_do_is_said_in_a_sentence():
    arrays, _, _ = inputs((1, 4, 1, 2, 3))
    many = arrays._replace(A=jnp.zeros((1, 300, 2)))
    large = jax.eval_shape(lambda: inputs((1, 1, 1, 2**17, 16))[0])
    for some, rule, word in (
        (arrays._replace(A=arrays.A + 0j), SOFT, "real A"),
        (arrays, Rule(zoh=True), "Euler"),
        (arrays._replace(u=arrays.u.astype(jnp.float16)), SOFT, "float16"),
        (arrays._replace(u=arrays.u[:, :0]), SOFT, "empty"),
        (many, SOFT, "300"),
        (large, SOFT, "N times D"),
    ):
        assert word in (tpu.unsupported(rule, some) or "")
