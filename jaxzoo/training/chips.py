"""What the makers say of their chips, for each device that JAX shows.

A TPU7x chip is two devices, every other chip one. Rates are peaks: no program reaches
all of them, so times computed from them are floors.
"""

from typing import NamedTuple

__all__ = ["CHIPS", "Chip", "chip"]

GIB, MIB = 2**30, 2**20


class Chip(NamedTuple):
    """One kind of device; every figure is per JAX device.

    Attributes:
        name: the field's name for it.
        kinds: `device.device_kind` as JAX reports it, in all spellings.
        flops: dense bfloat16 FLOP/s with float32 sums.
        hbm: bytes of main memory that a program can use.
        bandwidth: bytes/s of main memory.
        interconnect: bytes/s that the device can send to its neighbours in a torus, or
            in its node, by all links together.
        network: bytes/s that it can send out of its node; 0 where all is one torus.
        links: links per chip of a torus, two for each of its axes; 0 for a switch.
        per_chip: devices on one chip, which share its links.
        sources: where the figures come from.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    hbm: int
    bandwidth: float
    interconnect: float
    network: float
    links: int
    per_chip: int
    sources: str


# Google gives the interconnect in both directions: half of it can be sent. What libtpu
# 0.0.50's compiler offers to a program is a little less than the memory on the chip.
_LIBTPU = "memory as libtpu's compiler names it when a program does not fit"
# NVIDIA gives bandwidths of NVLink in both directions too.
_SMI = "memory as nvidia-smi shows it"

CHIPS = (
    Chip(
        "v4", ("TPU v4",), 275e12, 30 * GIB + GIB // 2, 1.2e12, 300e9, 0.0, 6, 1,
        "Google Cloud documentation, TPU v4; six links of 50 GB/s: Jouppi et al., 'TPU "
        f"v4', 2023; {_LIBTPU}, for both cores",
    ),
    Chip(
        "v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 200e9, 0.0,
        4, 1,
        f"Google Cloud documentation, TPU v5e: 400 GB/s in both directions; {_LIBTPU}",
    ),
    Chip(
        "v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.73 * GIB), 2765e9, 600e9, 0.0, 6,
        1,
        f"Google Cloud documentation, TPU v5p: 1200 GB/s in both directions; {_LIBTPU}",
    ),
    Chip(
        "v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.24 * GIB), 1638e9, 400e9, 0.0,
        4, 1,
        f"Google Cloud documentation, TPU v6e: 800 GB/s in both directions; {_LIBTPU}",
    ),
    Chip(
        "tpu7x", ("TPU7x", "TPU v7x"), 2307e12 / 2, int(94.74 * GIB), 7380e9 / 2,
        600e9 / 2, 0.0, 6, 2,
        "Google Cloud documentation, TPU7x (Ironwood), halved for each of its two "
        f"devices: 1200 GB/s in both directions; {_LIBTPU}",
    ),
    Chip(
        "A100 40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 40960 * MIB, 1555e9, 300e9,
        25e9, 0, 1,
        f"NVIDIA A100 datasheet; DGX A100: one 200 Gb/s adapter per GPU; {_SMI}",
    ),
    Chip(
        "A100 80GB", ("NVIDIA A100-SXM4-80GB",), 312e12, 81920 * MIB, 2039e9, 300e9,
        25e9, 0, 1,
        f"NVIDIA A100 datasheet; DGX A100: one 200 Gb/s adapter per GPU; {_SMI}",
    ),
    Chip(
        "H100", ("NVIDIA H100 80GB HBM3",), 989.4e12, 81559 * MIB, 3.35e12, 450e9,
        50e9, 0, 1,
        f"NVIDIA H100 SXM datasheet; DGX H100: one 400 Gb/s adapter per GPU; {_SMI}",
    ),
    Chip(
        "H200", ("NVIDIA H200",), 989.4e12, 143771 * MIB, 4.8e12, 450e9, 50e9, 0, 1,
        f"NVIDIA H200 SXM datasheet; DGX H200: one 400 Gb/s adapter per GPU; {_SMI}",
    ),
    Chip(
        "B200", ("NVIDIA B200",), 2.25e15, 183359 * MIB, 8e12, 900e9, 50e9, 0, 1,
        f"NVIDIA DGX B200 datasheet: 72 PFLOP/s of sparse FP8, 64 TB/s and 14.4 TB/s "
        f"of NVLink for eight GPUs, one 400 Gb/s adapter each; {_SMI}",
    ),
)  # fmt: skip


def chip(device_kind: str) -> Chip | None:
    """The chip behind `device.device_kind`; None where the table has none.

    >>> chip("TPU v5 lite").name
    'v5e'
    """
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)
