"""The GPU kernels with the vendor's compiler: needs its wheels, no GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hopper import on_h100, prepare, spilled
from stages import heads_first

from pallas_kernels.attention import pallas_gpu as gpu
from pallas_kernels.attention.pattern import Extras, Pattern

CAUSAL = Pattern(0.125, right=0)
CASES = {
    "long, width 64": (CAUSAL, {}, (1, 2, 2, 32768, 32768, 64)),
    "long, width 128": (CAUSAL, {}, (1, 2, 2, 32768, 32768, 128)),
    "long, width 256": (CAUSAL, {}, (1, 2, 2, 32768, 32768, 256)),
    "ragged": (Pattern(0.1, 200, 30, softcap=9.0), {}, (1, 1, 1, 333, 999, 80)),
    "all": (
        Pattern(0.1, 900, 30, softcap=9.0, drop=0.1),
        {
            "sinks": ((1, 2), jnp.float32),
            "mask": ((1, 1, 1, 1, 2040), bool),
            "query_ids": ((1, 1, 2, 2047), jnp.int32),
            "key_ids": ((1, 1, 2040), jnp.int32),
            "seed": ((2,), jnp.uint32),
        },
        (1, 1, 2, 2047, 2040, 256),
    ),
}  # fmt: skip


def compiled(pattern: Pattern, extras: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """Forward and gradient of arrays as `attention` is given them."""
    mesh, array = on_h100()
    batch, heads, groups, queries, keys, width = shape

    def gradient(q, k, v, d_out, d_lse, extras):
        # Heads are brought first here, and last again by the kernel.
        q, d_out = (jnp.moveaxis(x, 1, 3) for x in (q, d_out))
        k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
        out, lse = gpu.forward(pattern, q, k, v, extras)
        dq, dk, dv, _, d_sinks = gpu.backward(
            pattern, q, k, v, extras, out, lse, d_out, d_lse
        )
        dk, dv = (jnp.swapaxes(x, 1, 2) for x in (dk, dv))
        return jnp.moveaxis(dq, 3, 1), dk, dv, d_sinks

    q = array(batch, queries, heads, groups, width, dtype=jnp.bfloat16)
    k = array(batch, keys, heads, width, dtype=jnp.bfloat16)
    d_lse = array(batch, heads, groups, queries)
    given: dict[str, Any] = {
        name: array(*size, dtype=dtype) for name, (size, dtype) in extras.items()
    }
    beside = Extras(**given)
    with jax.set_mesh(mesh):
        return jax.jit(gradient).lower(q, k, k, q, d_lse, beside).compile()


def for_h100(case: str) -> str:
    return f"H100, {case}: {heads_first(CASES[case][2], jnp.bfloat16)}"


@pytest.mark.stage("attention", "pallas_gpu", "compiled", for_h100)
@pytest.mark.parametrize("case", CASES)
def test_compiles_for_an_h100(case, monkeypatch, tmp_path):
    """Within its shared memory and its registers; nothing is copied on the way."""
    prepare(monkeypatch, tmp_path)
    program = compiled(*CASES[case])
    spills = spilled(tmp_path)
    assert len(spills) == 3
    if case.startswith("long"):
        # Seen: nothing; 152 bytes in dK and dV of 128; 480 in dQ of 256.
        assert max(spills) < 512
        batch, heads, groups, queries, _, _ = CASES[case][2]
        vector = 4 * batch * heads * groups * queries
        memory = program.memory_analysis()
        assert memory is not None and memory.temp_size_in_bytes < 3 * vector
        assert " transpose(" not in (program.as_text() or "")
