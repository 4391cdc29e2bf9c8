"""What a training program will need and how fast it can be, from its compiled form.

The compiler of the real machine says what memory it takes and which collectives it
makes; FLOPs are counted from the jaxpr. Times are floors: every rate at its peak, work
shared evenly, compute, memory and network all at once, but one collective after the
other. Latencies are left out, so a step of microseconds takes longer than its floor.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxzoo.training.chips import Chip
from jaxzoo.training.collectives import Collective, collectives, wire_bytes
from jaxzoo.training.cost import count
from jaxzoo.training.traffic import traffic

__all__ = ["Forecast", "Memory", "Network", "forecast", "network_seconds"]


class Memory(NamedTuple):
    """Bytes of one device.

    Attributes:
        parameters, optimizer, other: of the state, by its keys "params", "opt_state".
        batch: of all steps of a call.
        temporaries: the rest of the peak; None where the program does not compile.
        peak: what the program needs at its worst moment.
        available: what the device has for it.
    """

    parameters: int
    optimizer: int
    other: int
    batch: int
    temporaries: int | None
    peak: int
    available: int

    @property
    def fits(self) -> bool:
        """Whether the peak fits into the device."""
        return self.peak <= self.available


class Network(NamedTuple):
    """The collectives of one kind and group size, of one device in one step."""

    kind: str
    group_size: int
    count: float
    bytes: float
    wire_bytes: float
    seconds: float


class Forecast(NamedTuple):
    """The figures of one training step; None where the program does not compile.

    Attributes:
        fit: its name.
        mesh: size of each axis.
        devices: how many they are.
        steps: steps per call of the program.
        examples: per step.
        compile_seconds: how long the compiler took.
        memory: of one device.
        flops: of all devices, counted from the jaxpr.
        matmul_flops: those of matrix products, convolutions and kernels.
        unknown: what could not be counted, in words.
        compiler_flops: of one device, a loop's body once; None from some compilers.
        traffic: bytes that one device moves in its memory.
        networks: the collectives.
        compute_seconds, memory_seconds, network_seconds: the floors.
    """

    fit: str
    mesh: dict[str, int]
    devices: int
    steps: int
    examples: int
    compile_seconds: float
    memory: Memory
    flops: float
    matmul_flops: float
    unknown: tuple[str, ...]
    compiler_flops: float | None
    traffic: float | None
    networks: tuple[Network, ...]
    compute_seconds: float
    memory_seconds: float | None
    network_seconds: float | None

    @property
    def bound(self) -> str:
        """What binds: "compute", "memory" or "network"."""
        return max(self._seconds(), key=lambda name: self._seconds()[name])

    @property
    def floor(self) -> float:
        """Seconds that a step takes at least."""
        return max(self._seconds().values())

    @property
    def mfu(self) -> float:
        """The largest share of the peak FLOP/s that the step can reach."""
        return self.compute_seconds / self.floor if self.floor else 0.0

    def _seconds(self) -> dict[str, float]:
        return {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds or 0.0,
            "network": self.network_seconds or 0.0,
        }


def forecast(program: Any, chip: Chip, platform: str) -> Forecast:
    """Compiles a training program for devices that are not there, and reads it.

    Args:
        program: as `train` hands it to `run.dry_run`.
        chip: what the mesh is made of.
        platform: "tpu" or "cuda"; "cpu" works too, for tests.

    Returns:
        The forecast; where the program does not fit, `memory.peak` is what the compiler
        says it would need, and what only a compiled program tells is missing.
    """
    plain = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        (program.arguments[0], program.batch),
    )
    cost = count(jax.make_jaxpr(program.step)(*plain))
    devices = program.mesh.size
    began = time.monotonic()
    try:
        lowered = program.call.trace(*program.arguments).lower(
            lowering_platforms=(platform,)
        )
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _out_of_memory(str(error))
        if needed is None:
            raise
        compiled, peak, available = None, *needed
    else:
        peak, available = compiled.memory_analysis().peak_memory_in_bytes, chip.hbm
    memory = _memory(program, compiled is not None, peak, available)
    compute = cost.flops / devices / chip.flops
    known = Forecast(
        fit=program.name,
        mesh={name: int(size) for name, size in program.mesh.shape.items()},
        devices=devices,
        steps=program.steps,
        examples=program.examples,
        compile_seconds=time.monotonic() - began,
        memory=memory,
        flops=cost.flops,
        matmul_flops=cost.matmul_flops,
        unknown=cost.unknown,
        compiler_flops=None,
        traffic=None,
        networks=(),
        compute_seconds=compute,
        memory_seconds=None,
        network_seconds=None,
    )
    return known if compiled is None else _read(known, program, compiled, chip)


def _read(known: Forecast, program: Any, compiled: Any, chip: Chip) -> Forecast:
    """Adds what the compiled program tells, for one of its steps."""
    text, steps = compiled.as_text(), program.steps
    analysis = compiled.cost_analysis()  # None from the GPU's compiler
    flops = (analysis or {}).get("flops", 0.0)
    moved = traffic(text)
    loops = (f"{len(moved.unknown)} compiled loops of unknown length: counted once",)
    networks = _networks(collectives(text), program.mesh, chip, steps)
    return known._replace(
        unknown=known.unknown + (loops if moved.unknown else ()),
        compiler_flops=flops if flops > 0 else None,
        traffic=moved.bytes / steps,
        networks=networks,
        memory_seconds=moved.bytes / steps / chip.bandwidth,
        network_seconds=math.fsum(network.seconds for network in networks),
    )


def _memory(program: Any, compiled: bool, peak: int, available: int) -> Memory:
    state, *others = program.arguments
    parts = dict(state) if isinstance(state, dict) else {"other": state}
    parameters = _shard_bytes(parts.pop("params", ()))
    optimizer = _shard_bytes(parts.pop("opt_state", ()))
    other, batch = _shard_bytes(parts), _shard_bytes(others)
    rest = peak - parameters - optimizer - other - batch
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        other=other,
        batch=batch,
        temporaries=max(rest, 0) if compiled else None,
        peak=peak,
        available=available,
    )


def _shard_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _out_of_memory(message: str) -> tuple[int, int] | None:
    """Needed and available bytes, from what libtpu says of a program too large."""
    size = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"\({size}\) exceeds available HBM \({size}\)", message)
    found = found or re.search(rf"Used {size} of {size} hbm", message)
    if "RESOURCE_EXHAUSTED" not in message or found is None:
        return None
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    needed, available = (int(float(found[i]) * units[found[i + 1]]) for i in (1, 3))
    return needed, available


def _networks(
    found: Sequence[Collective], mesh: Any, chip: Chip, steps: int
) -> tuple[Network, ...]:
    devices = list(mesh.devices.flat)
    merged: dict[tuple[str, int], Network] = {}
    for c in found:
        if c.group_size < 2:
            continue
        wire = wire_bytes(c.kind, c.bytes, c.group_size)
        seconds = network_seconds(c, devices, chip)
        before = merged.get((c.kind, c.group_size), Network("", 0, 0, 0, 0, 0))
        figures = (c.count, c.bytes, wire, seconds)
        sums = [old + new / steps for old, new in zip(before[2:], figures, strict=True)]
        merged[c.kind, c.group_size] = Network(c.kind, c.group_size, *sums)
    return tuple(sorted(merged.values(), key=lambda network: -network.seconds))


def network_seconds(
    collective: Collective, devices: Sequence[Any], chip: Chip
) -> float:
    """A floor for the seconds of collectives, by the links that their group has.

    Between the nodes of a GPU cluster a node sends its share once, by all adapters of
    the group's members; within, over NVLink, both at the same time. In a torus a group
    has the links of those axes along which it extends: two of an axis that is a ring,
    one of an axis that is a line, for its ends have no more.

    Args:
        collective: its bytes and group.
        devices: all devices, in the mesh's order.
        chip: what they are.
    """
    members = [devices[position] for position in collective.group]
    nodes = Counter(_node(device, chip) for device in members)
    together = max(nodes.values())
    kind, size = collective.kind, collective.bytes
    inside = 0.0  # between the two devices of one chip nothing is counted
    if chip.links:
        rate = chip.interconnect / chip.links * _links(list(nodes), devices, chip)
    else:
        rate = chip.network
        inside = wire_bytes(kind, size, together) / chip.interconnect
    if len(nodes) == 1:
        return inside
    return max(inside, wire_bytes(kind, size, len(nodes)) / (together * rate))


def _node(device: Any, chip: Chip) -> tuple[int, ...]:
    """What shares links: the chip in a torus, the host of GPUs."""
    return tuple(device.coords) if chip.links else (device.process_index,)


def _links(places: list[tuple[int, ...]], devices: Sequence[Any], chip: Chip) -> int:
    shape = [1 + max(size) for size in zip(*(d.coords for d in devices), strict=True)]
    flat = chip.links == 4
    torus = all(size % 4 == 0 for size in shape)
    total = 0
    for axis, size in enumerate(shape):
        if len({place[axis] for place in places}) > 1:
            total += 2 if (size == 16 if flat else torus) else 1
    return total
