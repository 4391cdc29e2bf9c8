"""The collectives of a compiled program, and what they send over the network."""

import math
import re
from typing import NamedTuple

import numpy as np

from jaxzoo.training.hlo import (
    Instruction,
    array_bytes,
    attribute,
    executions,
    parse,
)

__all__ = ["KINDS", "Collective", "collectives", "wire_bytes"]

KINDS = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}


class Collective(NamedTuple):
    """All collectives of one kind over groups of one shape.

    Attributes:
        kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all",
            "collective-permute" or "collective-broadcast".
        count: how often one device takes part.
        bytes: payload of one device, summed over `count`: the buffer's bytes, which of
            an all-gather is the output and of a reduce-scatter the input.
        group: positions, in the mesh's order, of the devices of the first group.
    """

    kind: str
    count: int
    bytes: int
    group: tuple[int, ...]

    @property
    def group_size(self) -> int:
        """How many devices take part in one of them."""
        return len(self.group)


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives that one execution of a compiled program makes.

    Args:
        hlo_text: `compiled.as_text()`, from a CPU, GPU or TPU program.

    Returns:
        One entry for each kind and group, the largest payload first. Loops count times
        their trip count, every branch of a conditional once.
    """
    computations, entry = parse(hlo_text)
    devices = _number_of_devices(hlo_text)
    total: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    channels: set[str] = set()
    for name, times in executions(computations, entry, fusions=True).items():
        for instruction in computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS or _seen(instruction, channels):
                continue
            group = _group(instruction.attributes, devices)
            size = _payload(kind, instruction, computations[name], len(group))
            # The TPU compiler's fusion of an all-reduce with a slice of its result.
            if name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            entry_of = total.setdefault((kind, group), [0, 0])
            entry_of[0] += times
            entry_of[1] += times * size
    found = [Collective(k, n, size, g) for (k, g), (n, size) in total.items()]
    return sorted(found, key=lambda c: (-c.bytes, c.kind, c.group))


def wire_bytes(kind: str, size: float, group_size: int) -> float:
    """Bytes that one device has to send, by the ring algorithm.

    Args:
        kind: as in `Collective`.
        size: the payload, by the convention of `Collective.bytes`.
        group_size: devices that take part.

    >>> wire_bytes("all-reduce", 100, 4)
    150.0
    """
    if group_size == 1:
        return 0.0
    if kind in ("collective-permute", "collective-broadcast"):
        return float(size)
    rounds = 2 if kind == "all-reduce" else 1
    return rounds * size * (group_size - 1) / group_size


def _seen(instruction: Instruction, channels: set[str]) -> bool:
    # A TPU's collective that runs beside other kernels stands in each of them, under
    # one channel.
    if '"async_collective_fusion_config"' not in instruction.attributes:
        return False
    channel = attribute(instruction.attributes, "channel_id")
    seen = channel in channels
    channels.add(channel)
    return seen


def _payload(
    kind: str,
    instruction: Instruction,
    computation: dict[str, Instruction],
    group_size: int,
) -> int:
    # By the operands: results of asynchronous forms differ between the compilers.
    operands = [computation[name] for name in instruction.operands]
    size = sum(array_bytes(operand.type) for operand in operands)
    return size * group_size if kind == "all-gather" else size


def _number_of_devices(text: str) -> int:
    header = text[: text.find("\n")]
    counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", header)
    return math.prod(int(count) for count in counts)


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective."""
    pairs = re.findall(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
    if pairs:
        return tuple(int(device) for device in pairs[0])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return tuple(int(device) for device in listed[1].split(","))
    tiled = re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    )
    if tiled:
        order = _iota(_numbers(tiled[3]), _numbers(tiled[4]))
        return tuple(order.reshape(int(tiled[1]), int(tiled[2]))[0].tolist())
    named = re.search(r"replica_groups=(mesh\[.*?) \{([^}]*)\}", attributes)
    return _named_group(named[1], named[2]) if named else tuple(range(devices))


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in text.split(",")] if text else []


def _iota(shape: list[int], permutation: list[int]) -> np.ndarray:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(permutation or list(range(len(shape))))


def _named_group(mesh: str, axes: str) -> tuple[int, ...]:
    """The group of `mesh['data'=2,'fsdp'=8] {'fsdp'}`, also of a part `'fsdp':(2)4`.

    Devices in another order, which the text may add, change who is in it, not how many.
    """
    parts = {n: s for n, *s in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)}
    shape: list[int] = []
    for name, text in re.findall(r"'([^']+)'=(\d+)", mesh):
        size = int(text)
        before, part = parts.get(name, ("1", "1"))
        before, part = int(before or 1), int(part or size)
        shape += [before, part, size // before // part]
    taken = (0, slice(None), 0) * (len(shape) // 3)
    return tuple(_iota(shape, [])[taken].ravel().tolist())
