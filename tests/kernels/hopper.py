"""Lowering for a GPU that is not there."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P

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
