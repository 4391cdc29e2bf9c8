"""What a cascade of Einsums costs: passes over a rank, and cycles on two arrays.

Both are read from the steps and run nothing. Passes say how often an algorithm has to
walk through a rank, whatever the hardware and the order of loops. Cycles, traffic and
buffer are those of attention, from queries p and keys m, whose steps are divided among
a 2-D and a 1-D array of processing elements.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxzoo.core.typed import typed
from jaxzoo.nn.einsum_cascade import Access, Cascade, Einsum, access

__all__ = ["Accelerator", "Binding", "Cost", "mapping_cost", "pass_count"]


class Binding(NamedTuple):
    """Where a cascade is computed: `on_2d` names the tensors of the 2-D array.

    Steps of a group are fused, so that tensors used in it alone never leave the chip;
    groups follow each other. `block` is how many queries stay on the chip together;
    None is the largest halving of their number that fits.
    """

    on_2d: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    block: int | None = None


class Accelerator(NamedTuple):
    """A `side` x `side` array and one of `lanes`, each element one operation a cycle.

    `buffer` and `word` in bytes, `bandwidth` in bytes per cycle. An exponential takes
    `exponential` multiply-adds after the subtraction, which is one operation; 0 stands
    for a pipelined unit that does both in one.
    """

    side: int
    lanes: int
    buffer: int
    word: int
    bandwidth: float
    exponential: int


class Cost(NamedTuple):
    """What a mapping takes: cycles, busy cycles of both arrays and their shares; bytes
    to and from memory, and bytes of buffer that are needed for nothing to spill."""

    cycles: float
    busy_2d: float
    busy_1d: float
    utilisation_2d: float
    utilisation_1d: float
    traffic: float
    buffer: float


@functools.cache
@typed
def pass_count(cascade: Cascade, rank: str) -> int:
    """How often a cascade has to walk through a rank, whatever the order of its loops.

    A step that reads a fibre of the rank is one pass later than each reduction of the
    whole rank that it waits for and that has read the fibre, or what it came from:

        pass(step) = 1 + max over u of passes over u that the step's inputs wait for,

    u among the tensors with the whole rank that the step reads or that those were
    computed from. Nothing waits for a reduction over one tile of a rank.

    Args:
        cascade: the steps.
        rank: of an input or of a step. Of an axis that steps cut in tiles, it is the
            passes over all of the axis.

    Returns:
        The largest pass of a step, >= 1.

    Raises:
        ValueError: no step has the rank, or every iteration of a loop needs one pass
            more.

    >>> dot = Einsum("Y[]", ("A[k]", "B[k]"), "times")
    >>> again = Einsum("Z[]", ("Y[]", "A[k]"), "times")
    >>> pass_count(Cascade(("A[k]", "B[k]"), (dot, again), "Z[]"), "k")
    2
    """
    return max(count for count, _ in _passes(cascade, rank))


@functools.cache
@typed
def mapping_cost(
    cascade: Cascade,
    sizes: tuple[tuple[str, int], ...],
    binding: Binding,
    machine: Accelerator,
) -> Cost:
    """Cycles, traffic and buffer of attention with one head on a pair of arrays.

        cycles = sum over groups of max(busy 2-D, busy 1-D, traffic / bandwidth)
        busy   = operations / processing elements
        buffer = inputs of a tile of keys and a block of queries, what was reduced over
                 keys, and, of all keys, what a later pass reads again

    Args:
        cascade: with the ranks e, f, m (keys) and p (queries).
        sizes: the lengths of those, as pairs.
        binding: which array computes what, and what is fused.
        machine: the hardware.

    Returns:
        `Cost`.

    Raises:
        ValueError: the binding names other steps than the cascade has, or `sizes` has
            no length for a rank.

    >>> scores = Einsum("QK[m,p]", ("Q[e,p]", "K[e,m]"), "times")
    >>> weights = Einsum("SN[m,p]", ("QK[m,p]",), "exp")
    >>> cascade = Cascade(("Q[e,p]", "K[e,m]"), (scores, weights), "SN[m,p]")
    >>> binding = Binding(on_2d=("QK",), groups=(("QK", "SN"),))
    >>> machine = Accelerator(256, 256, 2**25, 2, bandwidth=457.0, exponential=6)
    >>> sizes = ("e", 64), ("m", 1024), ("p", 1024)
    >>> cost = mapping_cost(cascade, sizes, binding, machine)
    >>> cost.cycles, cost.utilisation_2d
    (24576.0, 0.0417)
    """
    length = cascade.lengths(dict(sizes))
    names = [step.made.name for step in cascade.steps]
    if sorted(names) != sorted(name for group in binding.groups for name in group):
        raise ValueError(
            f"argument 'binding' has the groups {binding.groups}, expected each of "
            f"{', '.join(names)} once."
        )
    if missing := {r for s in cascade.steps for r in s.ranks} - length.keys():
        raise ValueError(f"argument 'sizes' has no {min(missing)}, expected all ranks.")
    totals = [0.0] * 4
    largest = 0.0
    for group in binding.groups:
        steps = [s for s in cascade.steps if s.made.name in group]
        busy = [0.0, 0.0]
        for step in steps:
            points = math.prod(length[rank] for rank in step.ranks)
            flat = step.made.name not in binding.on_2d
            elements = machine.lanes if flat else machine.side**2
            busy[flat] += points * _operations(step, machine) / elements
        traffic, buffer = _storage(cascade, steps, length, binding, machine)
        cycles = max(*busy, traffic / machine.bandwidth)
        totals = [a + b for a, b in zip(totals, (cycles, *busy, traffic), strict=True)]
        largest = max(largest, buffer)
    cycles, busy_2d, busy_1d, traffic = totals
    shares = busy_2d / cycles, busy_1d / cycles
    return Cost(cycles, busy_2d, busy_1d, *shares, traffic, largest)


def _parts(cascade: Cascade, rank: str) -> tuple[str, ...]:
    """The ranks that steps walk through a rank by: itself, or tiles and within them."""
    if any(rank in step.ranks for step in cascade.steps):
        return (rank,)
    inputs = {tensor.name: tensor.axes for tensor in map(access, cascade.inputs)}
    found = {
        axis
        for step in cascade.steps
        for tensor in step.read
        for own, axis in zip(inputs.get(tensor.name, ()), tensor.axes, strict=False)
        if own == (rank,)
    }
    if len(found) != 1:
        raise ValueError(f"argument 'rank' is {rank!r}, expected one that steps have.")
    return found.pop()


def _passes(cascade: Cascade, rank: str) -> list[tuple[int, int]]:
    """Per step its pass over a rank, 0 where it does not walk through all of it, and 1
    more than the passes of any tensor that it waits for.

    Of each tensor: `waits`, passes by tensor that end before any of its elements is
    there; `flows`, those during which its elements appear one by one; `origin`, the
    tensors with the whole rank that it was computed from.
    """
    parts, loop = _parts(cascade, rank), cascade.loop
    waits: dict[str, dict[str, int]] = {}
    flows: dict[str, dict[str, int]] = {}
    origin: dict[str, dict[str, int]] = {}
    indexed = {tensor.name: tensor.ranks for s in cascade.steps for tensor in s.read}
    for _ in range(len(cascade.steps) + 2):
        before, counts = (dict(waits), dict(flows)), []
        for step in cascade.steps:
            wait, flow, whole = {}, {}, {}
            for tensor in step.read:
                known = [x.get(tensor.name, {}) for x in (waits, flows, origin)]
                if tensor.name in dict(cascade.initial) and not tensor.following:
                    if loop in tensor.ranks and loop not in parts:
                        # Fibres of the last iteration are others than those of this.
                        known = [
                            {u: n for u, n in x.items() if loop not in indexed[u]}
                            for x in known
                        ]
                _raise_to(wait, known[0])
                if parts[0] in tensor.ranks:
                    _raise_to(flow, known[1])
                elif parts[0] in tensor.ended:
                    _raise_to(wait, known[1])
                if set(parts) <= set(tensor.ranks):
                    whole |= {tensor.name: 0, **known[2]}
            count = 1 + max((wait.get(u, 0) for u in whole), default=0)
            _raise_to(flow, dict.fromkeys(whole, count))
            counts.append((count if whole else 0, 1 + max(wait.values(), default=0)))
            out = step.made
            if parts[0] in out.ranks:
                waits[out.name], flows[out.name] = wait, flow
                origin[out.name] = whole if set(parts) <= set(out.ranks) else {}
            else:
                _raise_to(wait, flow)
                waits[out.name] = wait
        if before == (waits, flows):
            return counts
    raise ValueError(
        f"argument 'cascade' walks through {rank} once more in every iteration "
        f"of {loop}, expected a count."
    )


def _raise_to(old: dict[str, int], new: Mapping[str, int]) -> None:
    old.update({u: max(n, old.get(u, 0)) for u, n in new.items()})


def _operations(step: Einsum, machine: Accelerator) -> int:
    """Operations at one point; a product that is summed is one multiply-add."""
    cost = {"take": 0, "exp": max(machine.exponential, 1)}.get(step.map, 1)
    cost += machine.exponential if step.map == "sub_exp" else 0
    reduces = len(step.ranks) > len(step.made.ranks)
    return cost + (reduces and (step.map, step.reduce) != ("times", "add"))


def _storage(
    cascade: Cascade,
    steps: list[Einsum],
    length: Mapping[str, int],
    binding: Binding,
    machine: Accelerator,
) -> tuple[float, float]:
    """Bytes between the chip and its memory, and bytes of buffer, of one group."""
    parts, rows = _parts(cascade, "m"), length["p"]
    stage = dict(zip(cascade.steps, [s for _, s in _passes(cascade, "m")], strict=True))
    output = access(cascade.output)
    made = {step.made.name: step.made for step in steps}
    read = {tensor.name: tensor for step in steps for tensor in step.read}
    outside = [t for s in cascade.steps if s not in steps for t in s.read]
    leaving = {tensor.name for tensor in [*outside, output]} & made.keys()
    ends: dict[str, list[int]] = {}  # stages at which a tensor is made or read
    for step in steps:
        for tensor in (step.made, *step.read):
            ends.setdefault(tensor.name, []).append(stage[step])
    final = max(stage[step] for step in steps)

    def words(tensor: Access, block: int, whole: bool = True) -> float:
        tile = {parts[0]: 1 if len(parts) > 1 else min(machine.side, length["m"])}
        tile = {"p": block} | ({} if whole else tile)
        return math.prod(tile.get(r, length[r]) for r in tensor.ranks)

    def need(block: int) -> float:
        inputs = [a for n, a in read.items() if n not in made]
        inputs = [a for a in inputs if len(set(ends[a.name])) == 1]
        states = [a for n, a in made.items() if n != output.name]
        states = [a for a in states if parts[0] not in a.ranks or a.following]
        kept = [
            sum(
                words(tensor, block)
                for name, tensor in {**read, **made}.items()
                if parts[0] in tensor.ranks and not made.get(name, tensor).following
                and min(ends[name]) <= now < max(ends[name])
            )
            for now in range(1, final)
        ]  # fmt: skip
        held = sum(words(a, block, whole=False) for a in inputs)
        for state in states:
            axes = tuple(a for a in state.axes if not set(a) & set(parts))
            held += words(state._replace(axes=axes), block)
        return held + max(kept, default=0)

    # A product fills the rows of the 2-D array; the 1-D array takes one query.
    least = machine.side if made.keys() & set(binding.on_2d) else 1
    block = binding.block or rows
    while binding.block is None and block % 2 == 0 and block // 2 >= least:
        if need(block) * machine.word <= machine.buffer:
            break
        block //= 2
    blocks, buffer = rows / block, need(block)
    moved = sum(
        words(a, rows) * (1.0 if "p" in a.ranks else blocks)
        for n, a in read.items()
        if n not in made
    )
    moved += sum(words(made[n], rows) for n in leaving)
    return moved * machine.word, buffer * machine.word
