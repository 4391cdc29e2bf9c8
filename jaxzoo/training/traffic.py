"""The bytes that a compiled program moves in a device's main memory."""

import re
from typing import NamedTuple

from jaxzoo.training.hlo import (
    ARRAY,
    Computations,
    Instruction,
    array_bytes,
    attribute,
    executions,
    parse,
    trip_count,
)

__all__ = ["Traffic", "traffic"]

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


class Traffic(NamedTuple):
    """What one device reads and writes in its main memory.

    Attributes:
        bytes: operands and results of every kernel that lie there.
        unknown: names of loops whose trip count the text does not tell, counted once.
    """

    bytes: int
    unknown: tuple[str, ...]


def traffic(hlo_text: str) -> Traffic:
    """The bytes that one execution of a compiled program moves in main memory.

    Counted are operands and results of each kernel, a slice as its own size. What the
    compiler put into a TPU's vector memory is left out, caches are not modelled.

    Args:
        hlo_text: `compiled.as_text()`.
    """
    computations, entry = parse(hlo_text)
    total = 0
    unknown = []
    for name, times in executions(computations, entry, fusions=False).items():
        for instruction in computations[name].values():
            total += times * _moved(instruction, computations[name], computations)
            if instruction.opcode == "while":
                if trip_count(instruction, computations) is None:
                    unknown.append(instruction.name)
    return Traffic(total, tuple(unknown))


def _hbm(instruction: Instruction) -> int:
    return array_bytes(instruction.type, main_memory=True)


def _moved(
    instruction: Instruction,
    computation: dict[str, Instruction],
    computations: Computations,
) -> int:
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0
    if '"AllocateBuffer"' in instruction.attributes:
        return 0
    instruction = _synchronous(instruction)
    opcode, result = instruction.opcode, _hbm(instruction)
    operands = [computation[name] for name in instruction.operands]
    if opcode == "fusion":
        inner = computations[attribute(instruction.attributes, "calls")]
        return _moved_by_fusion(instruction, operands, inner, computations)
    if opcode in _SLICES:
        return result + min(_hbm(operands[0]), array_bytes(instruction.type))
    if opcode in _UPDATES:
        update = operands[_UPDATES[opcode]]
        return _hbm(update) + min(result, array_bytes(update.type))
    if opcode.endswith("-start") and instruction.type.startswith("("):
        return result  # such a type lists the operands too
    return result + sum(map(_hbm, operands))


def _synchronous(instruction: Instruction) -> Instruction:
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
    fusion: Instruction,
    operands: list[Instruction],
    inner: dict[str, Instruction],
    computations: Computations,
) -> int:
    total = 0
    for parameter in inner.values():
        if parameter.opcode == "parameter":
            operand = operands[int(parameter.operands[0])]
            total += min(_hbm(operand), _read(parameter, inner, computations))
    root = next(i for i in inner.values() if i.root)
    written = _written(root, inner, computations)
    results = re.findall(ARRAY, fusion.type)
    if len(written) != len(results):  # tuples in tuples: no slices looked for
        return total + _hbm(fusion)
    sizes = [array_bytes("".join(array), main_memory=True) for array in results]
    return total + sum(map(min, sizes, written))


def _read(
    value: Instruction, inner: dict[str, Instruction], computations: Computations
) -> int:
    """Bytes of a fusion's parameter that the fusion looks at: of a slice the slice."""
    total, whole = 0, array_bytes(value.type)
    for user in inner.values():
        if value.name not in user.operands or user.opcode == "tuple":
            continue
        first = user.operands[0] == value.name
        if first and user.opcode in _SLICES:
            total += array_bytes(user.type)
        elif user.opcode in _VIEWS:
            total += _read(user, inner, computations)
        elif user.opcode == "fusion":
            callee = computations[attribute(user.attributes, "calls")]
            total += _read_by_fusion(value, user, inner, callee, computations)
        elif not (first and user.opcode in _UPDATES):  # which is done in place
            return whole
    return min(total, whole)


def _read_by_fusion(
    value: Instruction,
    fusion: Instruction,
    inner: dict[str, Instruction],
    callee: dict[str, Instruction],
    computations: Computations,
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
    value: Instruction, inner: dict[str, Instruction], computations: Computations
) -> list[int]:
    """Bytes that a fusion writes of each of its results: of an update the update."""
    if value.opcode == "tuple":
        parts = [_written(inner[n], inner, computations) for n in value.operands]
        return [size for part in parts for size in part]
    if value.opcode in _UPDATES:
        return [array_bytes(inner[value.operands[_UPDATES[value.opcode]]].type)]
    if value.opcode in _VIEWS:
        return _written(inner[value.operands[0]], inner, computations)
    if value.opcode == "fusion":
        callee = computations[attribute(value.attributes, "calls")]
        root = next(i for i in callee.values() if i.root)
        return _written(root, callee, computations)
    return [array_bytes("".join(a)) for a in re.findall(ARRAY, value.type)]
