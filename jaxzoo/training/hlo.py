"""Reads the text of a compiled program: its collectives and its memory traffic.

XLA's own analysis counts the body of a loop once, whatever its length, says nothing of
collectives, and is silent altogether where a GPU program is compiled ahead of time. So
both are counted here from `compiled.as_text()`, loops times their trip counts. Every
figure is that of one device.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

__all__ = ["Collective", "Traffic", "collectives", "traffic", "wire_bytes"]


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


class Traffic(NamedTuple):
    """What one device reads and writes in its main memory.

    Attributes:
        bytes: operands and results of every kernel that lie there.
        unknown: names of loops whose trip count the text does not tell, counted once.
    """

    bytes: int
    unknown: tuple[str, ...]


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


_Computations = dict[str, dict[str, _Instruction]]

_KINDS = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
# Neither reads nor writes, or what it runs is counted in its own computation.
_FREE = {
    "after-all",
    "async-start",
    "async-update",
    "bitcast",
    "call",
    "call-start",
    "conditional",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
    "while",
}
_VIEWS = {"bitcast", "convert", "copy", "reshape", "transpose"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # where the update stands
_ARRAY = r"\b([a-z]\w*)(\[[\d,]*\])(\{[^}]*\})?"


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives that one execution of a compiled program makes.

    Args:
        hlo_text: `compiled.as_text()`, from a CPU, GPU or TPU program.

    Returns:
        One entry for each kind and group, the largest payload first. Loops count times
        their trip count, every branch of a conditional once.
    """
    computations, entry = _parse(hlo_text)
    devices = _number_of_devices(hlo_text)
    total: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    channels: set[str] = set()
    for name, times in _executions(computations, entry, fusions=True).items():
        for instruction in computations[name].values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _KINDS or _seen(instruction, channels):
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


def traffic(hlo_text: str) -> Traffic:
    """The bytes that one execution of a compiled program moves in main memory.

    Counted are operands and results of each kernel, a slice as its own size. What the
    compiler put into a TPU's vector memory is left out, caches are not modelled.

    Args:
        hlo_text: `compiled.as_text()`.
    """
    computations, entry = _parse(hlo_text)
    total = 0
    unknown = []
    for name, times in _executions(computations, entry, fusions=False).items():
        for instruction in computations[name].values():
            total += times * _moved(instruction, computations[name], computations)
            if instruction.opcode == "while":
                if _trip_count(instruction, computations) is None:
                    unknown.append(instruction.name)
    return Traffic(total, tuple(unknown))


def _parse(text: str) -> tuple[_Computations, str]:
    computations: _Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and line.startswith("  "):
            instruction = _instruction(line)
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("hlo_text has no ENTRY computation: pass compiled.as_text().")
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    # The opcode is the first word after a space that opens a parenthesis: types have
    # parentheses too, but after other characters.
    match = re.match(r"  (ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(", line)
    if match is None:
        return None
    depth, end = 1, match.end()
    while depth and end < len(line):
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    inside = line[match.end() : end - 1]
    literal = match[4] in ("constant", "parameter")  # a value, a number
    operands = (inside,) if literal else _names(inside)
    return _Instruction(
        match[2], match[3], match[4], operands, line[end:], bool(match[1])
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%([\w.\-]+)", text))


def _executions(
    computations: _Computations, entry: str, *, fusions: bool
) -> dict[str, int]:
    """How often each computation runs; those inside of kernels only with `fusions`."""
    times = dict.fromkeys(computations, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations[name].values():
            for callee, factor in _callees(instruction, computations, fusions):
                visit(callee, count * factor)

    visit(entry, 1)
    return {name: count for name, count in times.items() if count}


def _callees(
    instruction: _Instruction, computations: _Computations, fusions: bool
) -> Iterator[tuple[str, int]]:
    opcode, attributes = instruction.opcode, instruction.attributes
    if opcode == "while":
        count = _trip_count(instruction, computations)
        yield _attribute(attributes, "body"), 1 if count is None else count
    elif opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", attributes)
        pair = r"(?:true|false)_computation=%?([\w.\-]+)"
        for branch in _names(listed[1]) if listed else re.findall(pair, attributes):
            yield branch, 1
    elif opcode.removesuffix("-start") in ("call", "async", *["fusion"] * fusions):
        callee = _attribute(attributes, "calls") or _attribute(attributes, "to_apply")
        if callee:
            yield callee, 1


def _attribute(attributes: str, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", attributes)
    return found[1] if found else ""


def _trip_count(loop: _Instruction, computations: _Computations) -> int | None:
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    # The TPU compiler drops the figure; what it leaves is `i < constant`, i from 0 on.
    condition = computations[_attribute(loop.attributes, "condition")]
    compare = next(i for i in condition.values() if i.root)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    bound = condition[compare.operands[1]]
    return int(bound.operands[0]) if bound.opcode == "constant" else None


def _seen(instruction: _Instruction, channels: set[str]) -> bool:
    # A TPU's collective that runs beside other kernels stands in each of them, under
    # one channel.
    if '"async_collective_fusion_config"' not in instruction.attributes:
        return False
    channel = _attribute(instruction.attributes, "channel_id")
    seen = channel in channels
    channels.add(channel)
    return seen


def _payload(
    kind: str,
    instruction: _Instruction,
    computation: dict[str, _Instruction],
    group_size: int,
) -> int:
    # By the operands: results of asynchronous forms differ between the compilers.
    operands = [computation[name] for name in instruction.operands]
    size = sum(_bytes(operand.type) for operand in operands)
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


def _bytes(type_text: str, *, main_memory: bool = False) -> int:
    """Bytes of a type; with `main_memory` of what lies there, not in a scratchpad."""
    total = 0
    for dtype, shape, layout in re.findall(_ARRAY, type_text):
        # S(n) at the end of a layout is another memory: a scratchpad, or the host's.
        if main_memory and re.search(r"S\([1-9]\)", layout):
            continue
        shape = shape.strip("[]")
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 8)
        total += math.ceil(math.prod(_numbers(shape)) * bits / 8)
    return total


def _hbm(instruction: _Instruction) -> int:
    return _bytes(instruction.type, main_memory=True)


def _moved(
    instruction: _Instruction,
    computation: dict[str, _Instruction],
    computations: _Computations,
) -> int:
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    if '"AllocateBuffer"' in instruction.attributes:
        return 0
    instruction = _synchronous(instruction)
    opcode, result = instruction.opcode, _hbm(instruction)
    operands = [computation[name] for name in instruction.operands]
    if opcode == "fusion":
        inner = computations[_attribute(instruction.attributes, "calls")]
        return _moved_by_fusion(instruction, operands, inner, computations)
    if opcode in _SLICES:
        return result + min(_hbm(operands[0]), _bytes(instruction.type))
    if opcode in _UPDATES:
        update = operands[_UPDATES[opcode]]
        return _hbm(update) + min(result, _bytes(update.type))
    if opcode.endswith("-start") and instruction.type.startswith("("):
        return result  # such a type lists the operands too
    return result + sum(map(_hbm, operands))


def _synchronous(instruction: _Instruction) -> _Instruction:
    """The kernel that `fusion-start` and its like run; others as they are."""
    kernel = instruction.opcode.removesuffix("-start")
    if kernel == instruction.opcode or kernel not in {"fusion", *_SLICES, *_UPDATES}:
        return instruction
    # The type is (operands, result, more).
    depth, parts = 0, [""]
    for character in instruction.type[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return instruction._replace(opcode=kernel, type=parts[1])


def _moved_by_fusion(
    fusion: _Instruction,
    operands: list[_Instruction],
    inner: dict[str, _Instruction],
    computations: _Computations,
) -> int:
    total = 0
    for parameter in inner.values():
        if parameter.opcode == "parameter":
            operand = operands[int(parameter.operands[0])]
            total += min(_hbm(operand), _read(parameter, inner, computations))
    root = next(i for i in inner.values() if i.root)
    written = _written(root, inner, computations)
    results = re.findall(_ARRAY, fusion.type)
    if len(written) != len(results):  # tuples in tuples: no slices looked for
        return total + _hbm(fusion)
    sizes = [_bytes("".join(array), main_memory=True) for array in results]
    return total + sum(map(min, sizes, written))


def _read(
    value: _Instruction, inner: dict[str, _Instruction], computations: _Computations
) -> int:
    """Bytes of a fusion's parameter that the fusion looks at: of a slice the slice."""
    total, whole = 0, _bytes(value.type)
    for user in inner.values():
        if value.name not in user.operands or user.opcode == "tuple":
            continue
        first = user.operands[0] == value.name
        if first and user.opcode in _SLICES:
            total += _bytes(user.type)
        elif user.opcode in _VIEWS:
            total += _read(user, inner, computations)
        elif user.opcode == "fusion":
            callee = computations[_attribute(user.attributes, "calls")]
            total += _read_by_fusion(value, user, inner, callee, computations)
        elif not (first and user.opcode in _UPDATES):  # which is done in place
            return whole
    return min(total, whole)


def _read_by_fusion(
    value: _Instruction,
    fusion: _Instruction,
    inner: dict[str, _Instruction],
    callee: dict[str, _Instruction],
    computations: _Computations,
) -> int:
    total = 0
    for parameter in callee.values():
        if parameter.opcode != "parameter":
            continue
        if fusion.operands[int(parameter.operands[0])] == value.name:
            total += _read(parameter, callee, computations)
            root = next(i for i in callee.values() if i.root)
            while root.opcode in _VIEWS:
                root = callee[root.operands[0]]
            if root is parameter:  # a view, for those who use the fusion
                total += _read(fusion, inner, computations)
    return total


def _written(
    value: _Instruction, inner: dict[str, _Instruction], computations: _Computations
) -> list[int]:
    """Bytes that a fusion writes of each of its results: of an update the update."""
    if value.opcode == "tuple":
        parts = [_written(inner[n], inner, computations) for n in value.operands]
        return [size for part in parts for size in part]
    if value.opcode in _UPDATES:
        return [_bytes(inner[value.operands[_UPDATES[value.opcode]]].type)]
    if value.opcode in _VIEWS:
        return _written(inner[value.operands[0]], inner, computations)
    if value.opcode == "fusion":
        callee = computations[_attribute(value.attributes, "calls")]
        root = next(i for i in callee.values() if i.root)
        return _written(root, callee, computations)
    return [_bytes("".join(a)) for a in re.findall(_ARRAY, value.type)]
