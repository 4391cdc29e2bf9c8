"""Machines that are not there: the devices of a TPU slice or of H100 nodes, by name.

    v5e:4x4    16 chips of a v5e slice        h100:8      one node of eight GPUs
    v5p:2x2x2  8 chips of a v5p slice         h100:2x8    two nodes

The vendor's compiler makes them, from its wheel alone. `prepare` has to come before the
first import of jax, so nothing here imports it on the way.
"""

import difflib
import importlib.util
import os
import re
from typing import Any

__all__ = ["TOPOLOGIES", "MissingWheelError", "devices", "prepare", "versions"]

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8",
)  # fmt: skip
_NODES = ("1", "2", "4", "8", *(f"{nodes}x8" for nodes in (2, 4, 8, 16, 32)))
TOPOLOGIES = {
    "v5e": _FLAT,
    "v5p": _CUBES,
    "v6e": _FLAT,
    "tpu7x": _CUBES,
    "h100": _NODES,
}

# What XLA asks a card for; of an H100 SXM.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  device_memory_size: 84978434048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 minor: 0 }
"""


class MissingWheelError(Exception):
    """The compiler is not installed; the message says how to get it."""


def prepare() -> None:
    """Sets the environment in which compilers need no device; before jax is imported.

    Nothing asks the network for a TPU, no GPU is looked for, several may run at once.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # of no slice in particular
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)


def devices(name: str) -> list[Any]:
    """The devices of a topology, in the vendor's order.

    Args:
        name: "KIND:SHAPE", one of `TOPOLOGIES`.

    Raises:
        ValueError: there is no such topology; names the nearest.
        MissingWheelError: the vendor's compiler is not installed.
    """
    kind, _, shape = name.lower().partition(":")
    if shape not in TOPOLOGIES.get(kind, ()):
        raise ValueError(_no_such(name, kind, shape))
    _require(kind)
    from jax.experimental import topologies

    if kind == "h100":
        import jax

        jax.devices()  # has the plugins registered
        nodes, _, gpus = shape.rpartition("x")
        bounds = f"1x{nodes or 1}x{gpus}"
        return list(
            topologies.get_topology_desc(
                "", platform="cuda", topology=bounds, target_config=_H100
            ).devices
        )
    own = {} if _hosts(shape) else {"chips_per_host_bounds": (1, 1, 1)}
    return list(
        topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **own
        ).devices
    )


def _hosts(shape: str) -> bool:
    """Whether the shape is made of the usual hosts of 2x2 chips."""
    return not re.fullmatch(r"1x1(x1)?", shape)


def _no_such(name: str, kind: str, shape: str) -> str:
    if kind not in TOPOLOGIES:
        near = difflib.get_close_matches(kind, TOPOLOGIES, n=1, cutoff=0.3)
        hint = f", did you mean {near[0]}" if near else ""
        return (
            f"no topology '{name}': there are {', '.join(TOPOLOGIES)}, as in v5e:4x4 "
            f"or h100:8{hint}."
        )
    shapes = TOPOLOGIES[kind]
    wanted = _chips(shape)
    near = min(shapes, key=lambda s: abs(_chips(s) - wanted))
    return (
        f"no topology '{name}': {kind} comes as {', '.join(shapes)}, "
        f"did you mean {kind}:{near}."
    )


def _chips(shape: str) -> int:
    count = 1
    for number in re.findall(r"\d+", shape):
        count *= int(number)
    return count


def _require(kind: str) -> None:
    if kind == "h100":
        needed = {"jax_cuda13_plugin", "jax_cuda12_plugin"}
        if not any(importlib.util.find_spec(module) for module in needed):
            raise MissingWheelError(
                f"{kind} needs the CUDA plugin, though no GPU: "
                "pip install jax-cuda13-plugin jax-cuda13-pjrt"
            )
    elif importlib.util.find_spec("libtpu") is None:
        raise MissingWheelError(
            f"{kind} needs the TPU compiler, though no TPU: pip install 'jax[tpu]'"
        )


def versions(name: str) -> str:
    """jax and the compiler behind a topology, with their versions."""
    from importlib import metadata

    wanted = ["jax-cuda13-plugin", "jax-cuda12-plugin"]
    wanted = ["jax", *(wanted if name.lower().startswith("h100") else ["libtpu"])]
    found = {d.name: d.version for d in metadata.distributions() if d.name in wanted}
    return ", ".join(f"{name} {found[name]}" for name in wanted if name in found)
