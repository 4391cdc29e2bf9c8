"""The GPU kernels of Mamba-2 with the vendor's compiler: needs its wheels, no GPU."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hopper import on_h100, prepare, spilled
from ssd_inputs import sizes

from pallas_kernels.ssd import gpu_layout as layout
from pallas_kernels.ssd import pallas_gpu as gpu
from pallas_kernels.ssd.form import Inputs

BF16, F16 = jnp.bfloat16, jnp.float16
# (B, T, G, R, P, N), extras, dtype: those of the table of records, and others.
CASES: dict[str, tuple] = {
    "many heads": ((4, 4096, 1, 24, 64, 128), "", BF16),
    "long": ((1, 65536, 1, 16, 128, 128), "", BF16),
    "everything": ((2, 8192, 1, 80, 64, 64), "Dzs", BF16),
    "everything, ragged": ((2, 333, 2, 3, 100, 16), "Dzs", F16),
    "one token": ((1, 1, 1, 1, 1, 1), "D", BF16),
}


def abstract(shape, extras, dtype) -> Any:
    """A call, and the gradients of its results."""
    mesh, array = on_h100()
    batch, length, groups, heads, width, states = shape
    by_head = (batch, length, groups, heads)
    x, dt = array(*by_head, width, dtype=dtype), array(*by_head)
    b = array(batch, length, groups, states, dtype=dtype)
    state = array(batch, groups, heads, width, states)
    call = Inputs(
        x, dt, dt, b, b,
        skip=array(groups, heads, width) if "D" in extras else None,
        gate=x if "z" in extras else None,
        state=state,
        fresh=array(batch, length, dtype=jnp.bool_) if "s" in extras else None,
    )  # fmt: skip
    return mesh, (call, x, state)


def value(call, *_) -> Any:
    return gpu.forward(call)[:2]


def gradient(call, d_y, d_state) -> Any:
    y, state, kept = gpu.forward(call, keep=True)
    return y, state, gpu.backward(call, kept, d_y, d_state)


def for_h100(case: str) -> str:
    return f"H100, {case}: {sizes(CASES[case][0], CASES[case][2])}"


@pytest.mark.stage("ssd", "pallas_gpu", "compiled", for_h100)
@pytest.mark.parametrize("case", CASES)
def test_compiles_for_an_h100(case, monkeypatch, tmp_path):
    """Within its shared memory and registers; what is wide is not moved on the way."""
    prepare(monkeypatch, tmp_path)
    mesh, arrays = abstract(*CASES[case])
    with jax.set_mesh(mesh):
        programs = [jax.jit(f).lower(*arrays).compile() for f in (value, gradient)]
    spills = spilled(tmp_path)
    # Seen: at most 20 bytes, in the gradient, where states are 128.
    assert len(spills) >= 3 and max(spills) <= 32
    (batch, length, groups, heads, width, states), extras, _ = CASES[case]
    if length < 4096:
        return
    cut, tokens, lanes = layout.plan(arrays[0]), batch * length, groups * heads * width
    numbers = 4 * tokens * groups * heads  # one of a head and token
    parts = 2 * 4 * batch * cut.parts * lanes * states if cut.parts > 1 else 0
    # For the gradient also the states between chunks and their gradients, those of b
    # and c as they are summed, and with a gate what comes in for y before it.
    between = 2 * 2 * batch * cut.chunks * lanes * states
    sets = 2 * 2 * tokens * cut.columns // cut.share * states
    gated = 2 * tokens * lanes * ("z" in extras)
    bounds = 9 * numbers + parts, 20 * numbers + 3 * parts + between + sets + gated
    for program, bound in zip(programs, bounds, strict=True):
        memory, text = program.memory_analysis(), program.as_text() or ""
        assert memory is not None and memory.temp_size_in_bytes <= 1.05 * bound
        moved = re.findall(r" (\w+)\[[\d,]*\]\S* (?:transpose|copy)\(", text)
        assert "bf16" not in moved
