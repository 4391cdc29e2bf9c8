"""Reads the text of a compiled program: computations, instructions, how often they run.

XLA's own analysis counts the body of a loop once, whatever its length, says nothing of
collectives, and is silent altogether where a GPU program is compiled ahead of time. So
`collectives.py` and `traffic.py` count from `compiled.as_text()`, loops times their
trip counts. Every figure is that of one device.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = [
    "ARRAY",
    "Computations",
    "Instruction",
    "array_bytes",
    "attribute",
    "executions",
    "parse",
    "trip_count",
]


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: its result's.
        type: of the result, with layouts.
        opcode: such as "fusion" or "all-gather-start".
        operands: names; of a constant its value, of a parameter its number.
        attributes: the text behind the operands.
        root: whether its result is the computation's.
    """

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


Computations = dict[str, dict[str, Instruction]]

ARRAY = r"\b([a-z]\w*)(\[[\d,]*\])(\{[^}]*\})?"
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


def parse(text: str) -> tuple[Computations, str]:
    """The computations of a program by name, and the name of the entry.

    Args:
        text: `compiled.as_text()`.

    Raises:
        ValueError: it is something else.
    """
    computations: Computations = {}
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


def _instruction(line: str) -> Instruction | None:
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
    return Instruction(
        match[2], match[3], match[4], operands, line[end:], bool(match[1])
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"%([\w.\-]+)", text))


def executions(
    computations: Computations, entry: str, *, fusions: bool
) -> dict[str, int]:
    """How often each computation runs in one execution of the program.

    Args:
        computations: as `parse` returns them.
        entry: where it begins.
        fusions: whether to go into kernels.
    """
    times = dict.fromkeys(computations, 0)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations[name].values():
            for callee, factor in _callees(instruction, computations, fusions):
                visit(callee, count * factor)

    visit(entry, 1)
    return {name: count for name, count in times.items() if count}


def _callees(
    instruction: Instruction, computations: Computations, fusions: bool
) -> Iterator[tuple[str, int]]:
    opcode, attributes = instruction.opcode, instruction.attributes
    if opcode == "while":
        count = trip_count(instruction, computations)
        yield attribute(attributes, "body"), 1 if count is None else count
    elif opcode == "conditional":
        listed = re.search(r"branch_computations=\{([^}]*)\}", attributes)
        pair = r"(?:true|false)_computation=%?([\w.\-]+)"
        for branch in _names(listed[1]) if listed else re.findall(pair, attributes):
            yield branch, 1
    elif opcode.removesuffix("-start") in ("call", "async", *["fusion"] * fusions):
        callee = attribute(attributes, "calls") or attribute(attributes, "to_apply")
        if callee:
            yield callee, 1


def attribute(attributes: str, name: str) -> str:
    """The word behind `name=`, or nothing."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", attributes)
    return found[1] if found else ""


def trip_count(loop: Instruction, computations: Computations) -> int | None:
    """How often a loop runs its body; None where the text does not tell."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    # The TPU compiler drops the figure; what it leaves is `i < constant`, i from 0 on.
    condition = computations[attribute(loop.attributes, "condition")]
    compare = next(i for i in condition.values() if i.root)
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    bound = condition[compare.operands[1]]
    return int(bound.operands[0]) if bound.opcode == "constant" else None


def array_bytes(type_text: str, *, main_memory: bool = False) -> int:
    """Bytes of a type; with `main_memory` of what lies there, not in a scratchpad."""
    total = 0
    for dtype, shape, layout in re.findall(ARRAY, type_text):
        # S(n) at the end of a layout is another memory: a scratchpad, or the host's.
        if main_memory and re.search(r"S\([1-9]\)", layout):
            continue
        sizes = [int(size) for size in re.findall(r"\d+", shape)]
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 8)
        total += math.ceil(math.prod(sizes) * bits / 8)
    return total
