"""Slices of accelerators by name: their hosts, and what each launcher calls them.

v5e:4x4    a TPU slice, family and topology
h100:8x4   GPUs, 8 on each of 4 hosts
"""

import math
import re
from typing import NamedTuple

__all__ = ["Hardware", "HardwareError", "hardware"]


class HardwareError(ValueError):
    """No such accelerator, or none that this launcher can ask for."""


class Hardware(NamedTuple):
    """What a run stands on.

    Attributes:
        family: such as "v5e" or "h100".
        topology: as it was written, such as "4x4"; for GPUs per host x hosts.
        hosts: one process runs on each.
        per_host: chips or GPUs of one host.
        gke: the label of its nodes in Google Kubernetes Engine.
        tpu: whether it is a TPU.
    """

    family: str
    topology: str
    hosts: int
    per_host: int
    gke: str
    tpu: bool

    @property
    def chips(self) -> int:
        """Chips or GPUs of all hosts."""
        return self.hosts * self.per_host

    def gcloud(self) -> tuple[str, str]:
        """The accelerator type and the runtime version of a Cloud TPU VM."""
        if self.family not in _GCLOUD:
            raise HardwareError(
                f"gcloud starts TPU VMs of {', '.join(_GCLOUD)}, not {self.family}: "
                "take jobset for it."
            )
        prefix, cores, runtime = _GCLOUD[self.family]
        return f"{prefix}-{cores * self.chips}", runtime

    def xpk(self) -> str:
        """The --tpu-type of xpk."""
        if not self.tpu:
            raise HardwareError(
                f"xpk starts TPU slices, not {self.family}: see jobset."
            )
        if self.family == "v5e" and self.chips < 8:
            raise HardwareError(f"xpk has no v5e:{self.topology}: 2x4 is its smallest.")
        prefix = "v5litepod" if self.family == "v5e" else self.family
        return f"{prefix}-{self.topology}"


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_GKE_TPU = {
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
_GKE_GPU = {
    "a100": "nvidia-tesla-a100",
    "h100": "nvidia-h100-80gb",
    "h100-mega": "nvidia-h100-mega-80gb",
    "h200": "nvidia-h200-141gb",
    "b200": "nvidia-b200",
}
# Prefix of the type, cores that it counts for a chip, runtime version.
_GCLOUD = {
    "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}
_MOST_CUBES = {"v5p": 140, "tpu7x": 144}


def hardware(name: str) -> Hardware:
    """Reads a name such as "v5e:4x4" or "h100:8x4".

    Raises:
        HardwareError: there is no such family or topology.
    """
    family, _, topology = name.partition(":")
    if family not in _GKE_TPU | _GKE_GPU:
        known = ", ".join(_GKE_TPU | _GKE_GPU)
        raise HardwareError(
            f"--accelerator {name!r}: no family {family!r}, there are {known}."
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", topology):
        raise HardwareError(
            f"--accelerator {name!r}: expected a topology after the colon, "
            "such as v5e:4x4 or h100:8x4."
        )
    sides = [int(side) for side in topology.split("x")]
    if family in _GKE_GPU:
        return _gpus(family, topology, sides)
    chips = math.prod(sides)
    if not _tpu_has(family, topology, sides):
        raise HardwareError(f"--accelerator {name!r}: {family} has no such topology.")
    # 8 chips of v5e or v6e share a host; larger slices have 4 on each.
    alone = chips <= (8 if family in ("v5e", "v6e") else 4)
    per_host = chips if alone else 4
    return Hardware(
        family, topology, chips // per_host, per_host, _GKE_TPU[family], True
    )


def _gpus(family: str, topology: str, sides: list[int]) -> Hardware:
    if len(sides) != 2 or sides[0] > 8:
        raise HardwareError(
            f"--accelerator '{family}:{topology}': expected GPUs per host, at most 8, "
            "x hosts."
        )
    per_host, hosts = sides
    return Hardware(family, topology, hosts, per_host, _GKE_GPU[family], False)


def _tpu_has(family: str, topology: str, sides: list[int]) -> bool:
    if family in ("v5e", "v6e"):
        return topology in _FLAT
    if topology in ("2x2x1", "2x2x2", "2x2x4", "2x4x4"):
        return True
    # Larger slices are made of cubes of 4x4x4, shorter sides first.
    cubes = (
        len(sides) == 3 and sides == sorted(sides) and all(s % 4 == 0 for s in sides)
    )
    return cubes and math.prod(sides) // 64 <= _MOST_CUBES[family]
