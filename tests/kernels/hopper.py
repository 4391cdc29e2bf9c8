"""Lowering and compiling for a GPU that is not there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P

from jaxzoo.training import topology

HOW = "needs the compiler: pip install jax-cuda13-plugin jax-cuda13-pjrt"
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")


def lowered(function: Callable[..., Any], *arrays: Any, devices: int = 1) -> str:
    """The program for CUDA; over `devices` its arrays are split by rows."""
    mesh = AbstractMesh((devices,), ("data",), (AxisType.Auto,), abstract_device=H100)
    if devices > 1:
        rows = P("data")
        function = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows)
    with use_abstract_mesh(mesh):
        traced = jax.jit(function).trace(*arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def prepare(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Makes the compiler write what it says of each kernel to a folder."""
    pytest.importorskip("jax_cuda13_plugin", reason=HOW)
    topology.prepare()
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")


def on_h100() -> tuple[Mesh, Callable[..., Any]]:
    """A mesh of one, and `array(*shape, dtype=float32)` that lies on it."""
    mesh = Mesh(np.array(topology.devices("h100:1")), ("x",))

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    return mesh, array


def spilled(folder: Path) -> list[int]:
    """Bytes that each thread of each kernel writes for want of registers."""
    reports = [x.read_text() for x in folder.glob("*.ptxas")]
    return [int(x) for r in reports for x in re.findall(r"frame, (\d+) bytes spill", r)]
