"""The TPU kernels with the vendor's compiler: needs its wheel, no TPU."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from selective_scan_inputs import everything

from jaxzoo.training import topology

HOW = "needs the compiler: pip install 'jax[tpu]'"


def compiled(monkeypatch, name, shape, dtype, implementation: Any = "pallas_tpu"):
    """Value and gradients of a call of (B, T, D, N) with everything, for a TPU."""
    pytest.importorskip("libtpu", reason=HOW)
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    topology.prepare()
    sharding = SingleDeviceSharding(topology.devices(name)[0])
    batch, length, channels, states = shape

    def array(*shape, dtype: Any = jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    of_tokens, of_states = (batch, length, channels), (batch, length, states)
    gradient, args = everything(array, of_tokens, of_states, dtype, implementation)
    traced = jax.jit(gradient).trace(*args)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def temporary(compiled) -> int:
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def for_chip(name: str, shape: tuple[int, ...], dtype: Any) -> str:
    batch, length, channels, states = shape
    sizes = f"B={batch} T={length} D={channels} N={states}"
    return f"{name.split(':')[0]}: {sizes} {jnp.dtype(dtype).name}"


@pytest.mark.stage("selective_scan", "pallas_tpu", "compiled", for_chip)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5e:1x1", (1, 2048, 1024, 16)),
        ("v5e:1x1", (1, 65536, 5120, 16)),
        ("v5e:1x1", (1, 2048, 5120, 128)),
        ("v5p:2x2x1", (2, 8192, 2560, 16)),
        ("v5p:2x2x1", (1, 65536, 1024, 128)),
        ("v6e:1x1", (2, 4096, 5120, 16)),
        ("v6e:1x1", (1, 65536, 5120, 128)),
        ("v6e:1x1", (2, 333, 200, 5)),
        ("v5e:1x1", (1, 1, 1, 1)),
    ],
    ids=str,
)
def test_compiles(monkeypatch, name, shape, dtype):
    made = compiled(monkeypatch, name, shape, dtype)
    assert (made.as_text() or "").count('"tpu_custom_call"') == 2
    # The states at the starts of blocks of 256, B and C and their gradients with
    # tokens on lanes, and copies where a length is no multiple of a block: nothing of
    # T x D x N.
    batch, length, channels, states = shape
    kept = 4 * batch * length * channels * states // 256
    of_states = 4 * batch * length * max(states, 8)
    copies = 8 * 4 * batch * length * channels if length % 256 else 0
    assert temporary(made) <= 1.1 * kept + 8 * of_states + copies + 2**23


def test_temporaries_against_all_states():
    """The states of a scan by its definition: 128 MiB here, and more with copies."""
    monkeypatch = pytest.MonkeyPatch()
    try:
        shape = (1, 2048, 1024, 16)
        used = temporary(compiled(monkeypatch, "v5e:1x1", shape, jnp.float32))
        plain = temporary(compiled(monkeypatch, "v5e:1x1", shape, jnp.float32, "ref"))
    finally:
        monkeypatch.undo()
    assert used <= 10 * 2**20 < plain / 10
