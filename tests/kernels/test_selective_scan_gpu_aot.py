"""The GPU kernels with the vendor's compiler: needs its wheels, no GPU."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hopper import on_h100, prepare, spilled
from selective_scan_inputs import everything

SIZES = "B T D G N"


def compiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Value and gradients of a call of (B, T, D, G, N) with everything, for an H100."""
    mesh, array = on_h100()
    batch, length, channels, groups, states = shape
    of_tokens, of_states = (batch, length, channels), (batch, length, groups, states)
    gradient, args = everything(array, of_tokens, of_states, dtype, "pallas_gpu")
    with jax.set_mesh(mesh):
        return jax.jit(gradient).lower(*args).compile()


def for_h100(shape: tuple[int, ...], dtype: Any) -> str:
    sizes = zip(SIZES.split(), shape, strict=True)
    return f"H100: {' '.join(f'{k}={n}' for k, n in sizes)} {jnp.dtype(dtype).name}"


@pytest.mark.stage("selective_scan", "pallas_gpu", "compiled", for_h100)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "shape",
    [
        (8, 2048, 1536, 1, 16),
        (1, 65536, 1024, 1, 16),
        (1, 4096, 5120, 1, 128),
        (2, 333, 200, 2, 5),
    ],
    ids=str,
)
def test_compiles_for_an_h100(shape, dtype, monkeypatch, tmp_path):
    """Within its shared memory and its registers; no two blocks add to one sum."""
    prepare(monkeypatch, tmp_path)
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "hopper")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    program = compiled(shape, dtype)
    reports = [x.read_text() for x in tmp_path.glob("*.ptxas")]
    registers = [
        int(x) for r in reports for x in re.findall(r"Used (\d+) registers", r)
    ]
    spills = spilled(tmp_path)
    assert len(registers) == 2 and spills == [0, 0]
    assert max(registers) <= 255 and min(registers) <= 168  # three blocks to a core
    resources = [x.read_text() for x in tmp_path.glob("*.resources.txt")]
    shared = [int(re.findall(r"smem_scratch_bytes=(\d+)", x)[0]) for x in resources]
    assert len(shared) == 2
    if shape[-1] <= 16:  # of a core's 228 KiB each block takes 1 KiB more
        assert max(shared) < 113 * 2**10
    print(f"registers {registers}, spills {spills}, shared memory {shared}")
    code = [x.read_text() for x in tmp_path.glob("*.ptx")]
    assert len(code) == 2
    assert not any(re.search(r"\b(atom|red)\.(global|gpu|relaxed)", x) for x in code)

    # In float32: the states at the starts of chunks of 32, the gradients of B and C by
    # blocks of 32 channels, B and C; nothing of T x D x N.
    batch, length, channels, groups, states = shape
    blocks, wide = -(-channels // groups // 32) * groups, -(-states // 16) * 16
    tokens = batch * -(-length // 32) * 32
    kept = 4 * tokens // 32 * blocks * 32 * wide
    of_states = 4 * tokens * wide
    copies = 8 * 4 * tokens * blocks * 32 if length % 8 or channels % 32 else 0
    used = program.memory_analysis().temp_size_in_bytes
    assert used <= kept + (2 * blocks + 8 * groups) * of_states + copies + 2**21
