"""The TPU kernels of Mamba-2 with the vendor's compiler: needs its wheel, no TPU."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxzoo.training import topology
from pallas_kernels.ssd import pallas_tpu as tpu
from pallas_kernels.ssd.form import Inputs

HOW = "needs the compiler: pip install 'jax[tpu]'"
CHIPS = ["v5e:1x1", "v5p:2x2x1", "v6e:1x1"]


def compiled(name, shape, dtype, extras="") -> Any:
    """Value and gradient at a shape (B, T, G, R, P, N); extras: D, z, s(egments)."""
    pytest.importorskip("libtpu", reason=HOW)
    topology.prepare()
    sharding = SingleDeviceSharding(topology.devices(name)[0])
    batch, length, groups, heads, width, states = shape
    inner = groups * heads * width

    def array(*size, dtype=jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((batch, *size), dtype, sharding=sharding)

    def by_head(x):
        return x.reshape(batch, length, groups, heads, width)

    def both(wide: Any, call: Inputs, d_state: Any) -> Any:
        # As from the projections of a block: its columns are the heads.
        x, gate, d_y = jax.tree.map(by_head, wide)
        call = call._replace(x=x, gate=gate)
        y, state, starts = tpu.forward(call, keep=True)
        assert starts is not None
        grads = tpu.backward(call, starts, d_y, d_state)
        flat = (
            None if x is None else x.reshape(batch, length, inner)
            for x in (y, grads.x, grads.gate)
        )  # fmt: skip
        return *flat, state, grads._replace(x=None, gate=None)

    wide = array(length, inner, dtype=dtype)
    skip: Any = jax.ShapeDtypeStruct(
        (groups, heads, width), jnp.float32, sharding=sharding
    )
    state = array(groups, heads, width, states)
    call: Any = Inputs(
        x=None, gate=None,  # pyright: ignore
        dt=array(length, groups, heads),
        log_decay=array(length, groups, heads),
        b=array(length, groups, states, dtype=dtype),
        c=array(length, groups, states, dtype=dtype),
        skip=skip if "D" in extras else None,
        state=state,
        fresh=array(length, dtype=jnp.bool_) if "s" in extras else None,
    )  # fmt: skip
    given = ((wide, wide if "z" in extras else None, wide), call, state)
    lowered = jax.jit(both).trace(*given).lower(lowering_platforms=("tpu",))
    result = lowered.compile()
    assert (result.as_text() or "").count('"tpu_custom_call"') == 2
    return result


def stage(describe):
    """Marks a test as a case of this stage of these kernels."""
    return pytest.mark.stage("ssd", "pallas_tpu", "compiled", describe)


def of_models(dtype, length, heads, states, extras, name) -> str:
    what = "everything" if extras else "plain"
    sizes = f"T={length} H={heads} P=64 N={states} {dtype.__name__}"
    return f"{what}: {sizes}, {name.split(':')[0]}"


@stage(of_models)
@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize(
    ("dtype", "length", "heads", "states", "extras"),
    [
        (jnp.bfloat16, 2048, 16, 128, ""),
        (jnp.bfloat16, 65536, 16, 64, "Dzs"),
        (jnp.bfloat16, 65536, 80, 128, "Dzs"),
        (jnp.float32, 2048, 80, 128, "Dzs"),
        (jnp.float32, 16384, 40, 64, ""),
    ],
)
def test_compiles_at_the_sizes_of_models(dtype, length, heads, states, extras, name):
    result = compiled(name, (1, length, 1, heads, 64, states), dtype, extras)
    lanes = 64 * heads
    # Before blocks of 512 tokens a state of N numbers for each lane, and in rows the
    # steps, the decays and their gradients; nothing of T by N by lanes.
    kept = 4 * length * (lanes * states // 512 + 12 * heads + 4 * states)
    assert result.memory_analysis().temp_size_in_bytes < 1.5 * kept + 2**20


@stage(lambda shape: f"B, T, G, R, P, N = {shape}, both dtypes, v5e")
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 1),
        (2, 333, 2, 3, 5, 7),
        (1, 300, 4, 1, 64, 16),
        (1, 600, 1, 2, 256, 256),
        (1, 2048, 8, 10, 128, 128),
    ],
)
def test_compiles_at_odd_sizes(shape):
    compiled(CHIPS[0], shape, jnp.bfloat16, "Dzs")
    compiled(CHIPS[0], shape, jnp.float32, "s")
