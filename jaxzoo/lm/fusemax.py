"""FuseMax: attention as cascades of Einsums, counted by passes and mapped on arrays.

An algorithm is a list of steps in index notation. How often it has to walk through the
keys follows from the steps alone, whatever the hardware and the order of loops:

    GM[p]   = max_m QK[m,p]                  all keys, before
    SN[m,p] = exp(QK[m,p] - GM[p])           any key again: one more pass

Softmax attention takes 3 passes over the keys, or 2, or, with a running maximum, 1.
What is read in several passes is kept whole or read again; a cascade of 1 pass needs a
buffer that does not grow with the sequence, and keeps two arrays of processing elements
busy.

    cascade = attention_cascade(1, tile=256)
    pass_count(cascade, "m")                          # 1
    execute(cascade, {"Q": q, "K": k, "V": v})        # [F, P]
    mapping_cost(cascade, sizes, binding, machine)    # cycles, traffic, buffer
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "fusemax",
    "title": "FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator "
    "Design",
    "arxiv": "2406.10491",
    "year": 2024,
    "authors": "Nandeeka Nayak, Xinrui Wu, Toluwanimi O. Odemuyiwa, Michael Pellauer, "
    "Joel S. Emer, Christopher W. Fletcher",
    "where": "Sections II-C (extended Einsums), III-A (passes), IV-D and IV-E (late "
    "division; Cascades 4 and 5), V (mapping and binding).",
    "differs": "Tensors are dense: no merge operators. The paper gives the 2-pass "
    "cascade in words only. Cycles are operations over processing elements, the "
    "largest of both arrays and the memory: the paper's interleaving hides fills and "
    "drains, and nothing is simulated. Energy, area and FLAT are not modelled. The "
    "utilisations of the released model are met, to 4 digits for FuseMax and 2 for "
    "the unfused baseline. At 1K tokens FuseMax keeps 0.89 of the 2-D array busy, also "
    "in the released figures: 0.9 holds from 4K on. In float32 the cascades are within "
    "1e-5 of softmax attention where scores are divided by sqrt(E), which the paper's "
    "leave out; without, 1.2e-5 was seen.",
}

__all__ = [
    "Accelerator",
    "Binding",
    "Cascade",
    "Cost",
    "Einsum",
    "attention",
    "attention_cascade",
    "execute",
    "mapping_cost",
    "pass_count",
]

LARGEST = 1e6  # of an entry of a query or key: scores and their gradients stay finite
OPERATORS: dict[str, tuple[int, Callable[..., Array]]] = {
    "take": (1, lambda a: a),
    "exp": (1, jnp.exp),
    "plus": (2, jnp.add),
    "minus": (2, jnp.subtract),
    "times": (2, jnp.multiply),
    "divide": (2, jnp.divide),
    "max": (2, jnp.maximum),
    "sub_exp": (2, lambda a, b: jnp.exp(a - b)),
}
REDUCERS = {"add": jnp.sum, "max": jnp.max}


class Einsum(NamedTuple):
    """One step: `output = reduce over the ranks that it lacks of map(inputs)`.

    Tensors are written `QK[m,p]`. An index is a rank `m`; the next coordinate `m1+1` of
    an iterative rank; its end `M1`, in capitals; or `m1*M0+m0`, an axis cut in tiles.
    """

    output: str
    inputs: tuple[str, ...]
    map: str = "take"
    reduce: str = "add"


class Cascade(NamedTuple):
    """Steps in order, from `inputs` to `output`.

    `initial` holds what a tensor with an iterative rank is at coordinate 0, `sizes` the
    lengths of ranks that no input has, such as that of a tile.
    """

    inputs: tuple[str, ...]
    steps: tuple[Einsum, ...]
    output: str
    initial: tuple[tuple[str, float], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()


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


@typed
def attention(
    q: Float[ArrayLike, "batch queries heads d"],
    k: Float[ArrayLike, "batch keys heads d"],
    v: Float[ArrayLike, "batch keys heads f"],
    *,
    passes: Literal[1, 2, 3] = 1,
    tile: int = 128,
    scale: float = 1.0,
) -> Float[Array, "batch queries heads f"]:
    """Softmax attention by one of the cascades: softmax(scale q k^T) v.

    Args:
        q: queries. Entries of `scale * q` and of k beyond 1e6 count as 1e6.
        k: keys.
        v: values.
        passes: which cascade: how often it walks through the keys.
        tile: keys per tile of 1 and 2 passes; has to divide their number, unless there
            are fewer keys than that.
        scale: of the scores. The paper leaves 1/sqrt(d) out, which is 1.0.

    Returns:
        float32 (float64 of float64), the same for every `passes` up to rounding.

    Raises:
        ValueError: `tile` does not divide the keys, or `scale` is NaN.

    >>> x = jnp.eye(2).reshape(1, 2, 1, 2)
    >>> attention(x, x, x, tile=1)[0, :, 0].tolist()
    [[0.7311, 0.2689], [0.2689, 0.7311]]
    """
    check_range("scale", scale)
    check_range("tile", tile, low=1)
    cascade = attention_cascade(passes, tile=min(tile, k.shape[1]))
    if k.shape[1] % min(tile, k.shape[1]):
        raise ValueError(
            f"argument 'tile' is {tile}, expected a divisor of the {k.shape[1]} keys."
        )
    q, k = (jnp.clip(as_float32(x), -LARGEST, LARGEST) for x in (scale * q, k))

    def one(q: Array, k: Array, v: Array) -> Array:
        return execute(cascade, {"Q": q.T, "K": k.T, "V": v.T}).T

    return jax.vmap(jax.vmap(one, 1, 1))(q, k, as_float32(v))


@functools.cache
@typed
def attention_cascade(
    passes: Literal[1, 2, 3], tile: int = 128, late_division: bool = False
) -> Cascade:
    """The attention cascades: Q [e,p], K [e,m] and V [f,m] to AV [f,p].

    3: maximum; exponentials and their sum; division, and the product with V.
    2: per tile of keys its maximum, exponentials and sum; then what corrects them to
       the global maximum, division, and the product with V.
    1: running maximum, denominator and numerator times V; each new maximum corrects
       what was summed so far.

    Args:
        passes: over the rank m of keys, 1, 2 or 3.
        tile: keys per tile, >= 1; 3 passes have no tiles.
        late_division: divide after the product with V: F P divisions, not M P. That of
            1 pass always is. It takes the third pass of 3 away.

    Returns:
        The cascade, as a tuple that can be changed step by step.

    Raises:
        ValueError: `tile` is below 1, or `passes` another number.

    >>> [step.output for step in attention_cascade(3).steps]
    ['QK[m,p]', 'GM[p]', 'SN[m,p]', 'SD[p]', 'A[m,p]', 'AV[f,p]']
    """
    check_range("tile", tile, low=1)
    inputs, output = ("Q[e,p]", "K[e,m]", "V[f,m]"), "AV[f,p]"
    if passes == 3:
        steps = (
            Einsum("QK[m,p]", ("Q[e,p]", "K[e,m]"), "times"),
            Einsum("GM[p]", ("QK[m,p]",), reduce="max"),
            Einsum("SN[m,p]", ("QK[m,p]", "GM[p]"), "sub_exp"),
            Einsum("SD[p]", ("SN[m,p]",)),
        )
        return Cascade(inputs, steps + _divided("m", "m", late_division), output)
    tiles = (
        Einsum("QK[m1,m0,p]", ("Q[e,p]", "K[e,m1*M0+m0]"), "times"),
        Einsum("LM[m1,p]", ("QK[m1,m0,p]",), reduce="max"),
    )
    sizes = (("m0", tile),)
    if passes == 2:
        steps = (
            Einsum("SLN[m1,m0,p]", ("QK[m1,m0,p]", "LM[m1,p]"), "sub_exp"),
            Einsum("SLD[m1,p]", ("SLN[m1,m0,p]",)),
            Einsum("GM[p]", ("LM[m1,p]",), reduce="max"),
            Einsum("PLM[m1,p]", ("LM[m1,p]", "GM[p]"), "sub_exp"),
            Einsum("SD[p]", ("SLD[m1,p]", "PLM[m1,p]"), "times"),
            Einsum("SN[m1,m0,p]", ("SLN[m1,m0,p]", "PLM[m1,p]"), "times"),
        )
        last = _divided("m1,m0", "m1*M0+m0", late_division)
        return Cascade(inputs, tiles + steps + last, output, sizes=sizes)
    steps = (
        Einsum("RM[m1+1,p]", ("RM[m1,p]", "LM[m1,p]"), "max"),
        Einsum("SLN[m1,m0,p]", ("QK[m1,m0,p]", "RM[m1+1,p]"), "sub_exp"),
        Einsum("SLD[m1,p]", ("SLN[m1,m0,p]",)),
        Einsum("SLNV[f,m1,p]", ("SLN[m1,m0,p]", "V[f,m1*M0+m0]"), "times"),
        Einsum("PRM[m1,p]", ("RM[m1,p]", "RM[m1+1,p]"), "sub_exp"),
        Einsum("SPD[m1,p]", ("RD[m1,p]", "PRM[m1,p]"), "times"),
        Einsum("RD[m1+1,p]", ("SLD[m1,p]", "SPD[m1,p]"), "plus"),
        Einsum("SPNV[f,m1,p]", ("RNV[f,m1,p]", "PRM[m1,p]"), "times"),
        Einsum("RNV[f,m1+1,p]", ("SLNV[f,m1,p]", "SPNV[f,m1,p]"), "plus"),
        Einsum("AV[f,p]", ("RNV[f,M1,p]", "RD[M1,p]"), "divide"),
    )
    initial = (("RM", -math.inf), ("RD", 0.0), ("RNV", 0.0))
    return Cascade(inputs, tiles + steps, output, initial, sizes)


@functools.partial(jax.jit, static_argnums=0)
@typed
def execute(cascade: Cascade, tensors: Mapping[str, ArrayLike]) -> Array:
    """Computes a cascade; an iterative rank is a scan, everything else is dense.

    Compiled once per cascade and shapes, and differentiable.

    Args:
        cascade: the steps; static under `jax.jit`.
        tensors: the inputs by name, axes in the order that the cascade gives them.

    Returns:
        The output of the cascade, of the dtype that its inputs promote to.

    Raises:
        ValueError: an input is missing, a shape does not fit, a step reads what is not
            there or names an operator that does not exist.

    >>> total = Cascade(("A[k]",), (Einsum("Y[]", ("A[k]",)),), "Y[]")
    >>> float(execute(total, {"A": jnp.array([1.0, 2.0, 4.0])}))
    7.0
    """
    sizes = dict(cascade.sizes)
    for text in cascade.inputs:
        name, axes = _access(text).name, _access(text).axes
        if name not in tensors or len(tensors[name].shape) != len(axes):
            came = f"{name} {tensors[name].shape}" if name in tensors else f"no {name}"
            raise ValueError(f"argument 'tensors' has {came}, expected {text}.")
        for (rank, *_), size in zip(axes, tensors[name].shape, strict=True):
            if sizes.setdefault(rank, size) != size:
                raise ValueError(
                    f"argument 'tensors' has {name} with rank {rank} of length {size}, "
                    f"expected {sizes[rank]} as before."
                )
    lengths = _lengths(cascade, sizes)
    names = [_access(text).name for text in cascade.inputs]
    values = {name: jnp.asarray(tensors[name]) for name in names}
    loop, looped = _loop(cascade), False
    for step in cascade.steps:
        if loop is None or loop not in _ranks(step):
            read = [_cut(values, text, lengths) for text in step.inputs]
            values[_access(step.output).name] = _apply(step, read)
        elif not looped:
            values |= _scan(cascade, loop, values, lengths)
            looped = True
    return _cut(values, cascade.output, lengths)


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
    >>> [pass_count(attention_cascade(n), "m") for n in (3, 2, 1)]
    [3, 2, 1]
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

    >>> groups = ("QK",), ("GM", "SN", "SD", "A"), ("AV",)
    >>> sizes = ("e", 64), ("f", 64), ("m", 1024), ("p", 1024)
    >>> machine = Accelerator(256, 256, 2**25, 2, bandwidth=457.0, exponential=0)
    >>> unfused = Binding(("QK", "AV"), groups)
    >>> mapping_cost(attention_cascade(3), sizes, unfused, machine).utilisation_2d
    0.0767
    """
    length = _lengths(cascade, dict(sizes))
    names = [_access(step.output).name for step in cascade.steps]
    if sorted(names) != sorted(name for group in binding.groups for name in group):
        raise ValueError(
            f"argument 'binding' has the groups {binding.groups}, expected each of "
            f"{', '.join(names)} once."
        )
    if missing := {r for s in cascade.steps for r in _ranks(s)} - length.keys():
        raise ValueError(f"argument 'sizes' has no {min(missing)}, expected all ranks.")
    totals = [0.0] * 4
    largest = 0.0
    for group in binding.groups:
        steps = [s for s in cascade.steps if _access(s.output).name in group]
        busy = [0.0, 0.0]
        for step in steps:
            points = math.prod(length[rank] for rank in _ranks(step))
            flat = _access(step.output).name not in binding.on_2d
            elements = machine.lanes if flat else machine.side**2
            busy[flat] += points * _operations(step, machine) / elements
        traffic, buffer = _storage(cascade, steps, length, binding, machine)
        cycles = max(*busy, traffic / machine.bandwidth)
        totals = [a + b for a, b in zip(totals, (cycles, *busy, traffic), strict=True)]
        largest = max(largest, buffer)
    cycles, busy_2d, busy_1d, traffic = totals
    shares = busy_2d / cycles, busy_1d / cycles
    return Cost(cycles, busy_2d, busy_1d, *shares, traffic, largest)


class _Access(NamedTuple):
    """A tensor as a step names it: the ranks of each axis, two where it is cut."""

    name: str
    axes: tuple[tuple[str, ...], ...]
    ended: frozenset[str]  # iterative ranks, read at their last coordinate
    following: frozenset[str]  # iterative ranks at the next coordinate

    @property
    def ranks(self) -> tuple[str, ...]:
        return tuple(rank for axis in self.axes for rank in axis)


@functools.cache
def _access(text: str) -> _Access:
    found = re.fullmatch(r"(\w+)\[([^\[\]]*)\]", text)
    if found is None:
        raise ValueError(
            f"argument 'cascade' has {text!r}, expected such as 'QK[m,p]'."
        )
    axes, ended, following = [], set(), set()
    for index in filter(None, found[2].split(",")):
        if tiles := re.fullmatch(r"([a-z]\w*)\*([A-Z]\w*)\+([a-z]\w*)", index):
            axes.append((tiles[1], tiles[3]))
        elif re.fullmatch(r"[A-Z]\w*", index):
            ended.add(index.lower())
        elif re.fullmatch(r"[a-z]\w*(\+1)?", index):
            axes.append((index.removesuffix("+1"),))
            following |= {index[:-2]} if index.endswith("+1") else set()
        else:
            raise ValueError(
                f"argument 'cascade' has the index {index!r} in {text!r}, expected "
                "'m', 'm1+1', 'M1' or 'm1*M0+m0'."
            )
    return _Access(found[1], tuple(axes), frozenset(ended), frozenset(following))


def _ranks(step: Einsum) -> list[str]:
    """The iteration space of a step: the ranks of its output, then those it reduces."""
    read = [rank for text in step.inputs for rank in _access(text).ranks]
    return list(dict.fromkeys([*_access(step.output).ranks, *read]))


def _divided(ranks: str, keys: str, late: bool) -> tuple[Einsum, ...]:
    if late:
        product = Einsum("SNV[f,p]", (f"SN[{ranks},p]", f"V[f,{keys}]"), "times")
        return product, Einsum("AV[f,p]", ("SNV[f,p]", "SD[p]"), "divide")
    quotient = Einsum(f"A[{ranks},p]", (f"SN[{ranks},p]", "SD[p]"), "divide")
    return quotient, Einsum("AV[f,p]", (f"A[{ranks},p]", f"V[f,{keys}]"), "times")


def _lengths(cascade: Cascade, known: Mapping[str, int]) -> dict[str, int]:
    """Lengths of all ranks, from those of the inputs' ranks and of tiles."""
    lengths = {**dict(cascade.sizes), **known}
    axes = {_access(text).name: _access(text).axes for text in cascade.inputs}
    for step in cascade.steps:
        for access in map(_access, step.inputs):
            for (own, *_), (outer, *inner) in zip(
                axes.get(access.name, ()), access.axes, strict=False
            ):
                if own not in lengths:
                    continue
                tile = lengths[inner[0]] if inner else 1
                if lengths[own] % tile:
                    raise ValueError(
                        f"argument 'cascade' cuts {lengths[own]} of {own} in tiles of "
                        f"{tile}, expected a divisor."
                    )
                lengths.setdefault(outer, lengths[own] // tile)
        axes.setdefault(_access(step.output).name, _access(step.output).axes)
    return lengths


def _cut(values: Mapping[str, Array], text: str, lengths: Mapping[str, int]) -> Array:
    """A tensor with one axis per rank of an access."""
    access = _access(text)
    if access.name not in values:
        raise ValueError(f"argument 'cascade' reads {text} before it is computed.")
    shape = [lengths[rank] for rank in access.ranks]
    return jnp.reshape(values[access.name], shape)


def _apply(step: Einsum, arrays: Iterable[Array], loop: str | None = None) -> Array:
    """One step on arrays with an axis per rank, but none for the rank of the loop."""
    inputs = [[r for r in _access(t).ranks if r != loop] for t in step.inputs]
    out = [r for r in _access(step.output).ranks if r != loop]
    every = list(dict.fromkeys([*out, *(r for ranks in inputs for r in ranks)]))
    count, function = OPERATORS.get(step.map, (None, None))
    if function is None or count != len(inputs) or step.reduce not in REDUCERS:
        raise ValueError(
            f"argument 'cascade' has {step}, expected one of {', '.join(OPERATORS)} "
            "with as many inputs as it takes, and reduce 'add' or 'max'."
        )
    if missing := set(out).difference(*inputs):
        raise ValueError(f"argument 'cascade' has {step}, no input of rank {missing}.")
    if (step.map, step.reduce) == ("times", "add"):
        numbered = [[every.index(r) for r in ranks] for ranks in inputs]
        pairs = [x for pair in zip(arrays, numbered, strict=True) for x in pair]
        target = [every.index(r) for r in out]
        return jnp.einsum(*pairs, target, precision=jax.lax.Precision.HIGHEST)
    aligned = []
    for array, ranks in zip(arrays, inputs, strict=True):
        array = jnp.transpose(array, [ranks.index(r) for r in every if r in ranks])
        lacking = [i for i, r in enumerate(every) if r not in ranks]
        aligned.append(jnp.expand_dims(array, lacking))
    reduced = tuple(range(len(out), len(every)))
    value = function(*aligned)
    return REDUCERS[step.reduce](value, axis=reduced) if reduced else value


def _loop(cascade: Cascade) -> str | None:
    """The iterative rank, of which there is at most one."""
    ranks = {r for step in cascade.steps for r in _access(step.output).following}
    if len(ranks) > 1:
        raise ValueError(
            f"argument 'cascade' iterates over {ranks}, expected one rank."
        )
    return next(iter(ranks), None)


def _scan(
    cascade: Cascade, loop: str, values: Mapping[str, Array], lengths: dict[str, int]
) -> dict[str, Array]:
    """The states that the steps of the loop leave behind."""
    body = [step for step in cascade.steps if loop in _ranks(step)]
    outputs = {_access(step.output).name: _access(step.output) for step in body}
    states = [name for name, access in outputs.items() if access.following]
    start = {}
    for name in states:
        if name not in dict(cascade.initial):
            raise ValueError(f"argument 'cascade' has no initial value of {name}.")
        shape = [lengths[r] for r in outputs[name].ranks if r != loop]
        dtype = jnp.result_type(*values.values())
        start[name] = jnp.full(shape, dict(cascade.initial)[name], dtype)
    reads = {t: _access(t) for step in body for t in step.inputs}
    outside = {
        t: _cut(values, t, lengths) for t, a in reads.items() if a.name not in outputs
    }
    sliced = {
        t: jnp.moveaxis(x, reads[t].ranks.index(loop), 0)
        for t, x in outside.items()
        if loop in reads[t].ranks
    }

    def iteration(old: dict[str, Array], slices: dict[str, Array]):
        seen, new = {**outside, **slices}, {}
        for step in body:
            for text in set(step.inputs) - outside.keys():
                earlier = reads[text].name in states and not reads[text].following
                source = old if earlier else new
                if reads[text].name not in source:
                    raise ValueError(
                        f"argument 'cascade' reads {text} before it is computed."
                    )
                seen[text] = source[reads[text].name]
            read = [seen[text] for text in step.inputs]
            new[_access(step.output).name] = _apply(step, read, loop)
        return {name: new[name] for name in states}, None

    return jax.lax.scan(iteration, start, sliced, length=lengths[loop])[0]


def _parts(cascade: Cascade, rank: str) -> tuple[str, ...]:
    """The ranks that steps walk through a rank by: itself, or tiles and within them."""
    if any(rank in _ranks(step) for step in cascade.steps):
        return (rank,)
    inputs = {_access(text).name: _access(text).axes for text in cascade.inputs}
    found = {
        axis
        for step in cascade.steps
        for access in map(_access, step.inputs)
        for own, axis in zip(inputs.get(access.name, ()), access.axes, strict=False)
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
    parts, loop = _parts(cascade, rank), _loop(cascade)
    waits: dict[str, dict[str, int]] = {}
    flows: dict[str, dict[str, int]] = {}
    origin: dict[str, dict[str, int]] = {}
    indexed = {
        _access(t).name: _access(t).ranks for s in cascade.steps for t in s.inputs
    }
    for _ in range(len(cascade.steps) + 2):
        before, counts = (dict(waits), dict(flows)), []
        for step in cascade.steps:
            wait, flow, whole = {}, {}, {}
            for access in map(_access, step.inputs):
                known = [x.get(access.name, {}) for x in (waits, flows, origin)]
                if access.name in dict(cascade.initial) and not access.following:
                    if loop in access.ranks and loop not in parts:
                        # Fibres of the last iteration are others than those of this.
                        known = [
                            {u: n for u, n in x.items() if loop not in indexed[u]}
                            for x in known
                        ]
                _raise_to(wait, known[0])
                if parts[0] in access.ranks:
                    _raise_to(flow, known[1])
                elif parts[0] in access.ended:
                    _raise_to(wait, known[1])
                if set(parts) <= set(access.ranks):
                    whole |= {access.name: 0, **known[2]}
            count = 1 + max((wait.get(u, 0) for u in whole), default=0)
            _raise_to(flow, dict.fromkeys(whole, count))
            counts.append((count if whole else 0, 1 + max(wait.values(), default=0)))
            out = _access(step.output)
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
    reduces = len(_ranks(step)) > len(_access(step.output).ranks)
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
    made = {_access(s.output).name: _access(s.output) for s in steps}
    read = {_access(t).name: _access(t) for s in steps for t in s.inputs}
    outside = [t for s in cascade.steps if s not in steps for t in s.inputs]
    leaving = {_access(t).name for t in [*outside, cascade.output]} & made.keys()
    ends: dict[str, list[int]] = {}  # stages at which a tensor is made or read
    for step in steps:
        for text in (step.output, *step.inputs):
            ends.setdefault(_access(text).name, []).append(stage[step])
    final = max(stage[step] for step in steps)

    def words(access: _Access, block: int, whole: bool = True) -> float:
        tile = {parts[0]: 1 if len(parts) > 1 else min(machine.side, length["m"])}
        tile = {"p": block} | ({} if whole else tile)
        return math.prod(tile.get(r, length[r]) for r in access.ranks)

    def need(block: int) -> float:
        inputs = [a for n, a in read.items() if n not in made]
        inputs = [a for a in inputs if len(set(ends[a.name])) == 1]
        states = [a for n, a in made.items() if n != _access(cascade.output).name]
        states = [a for a in states if parts[0] not in a.ranks or a.following]
        kept = [
            sum(
                words(access, block)
                for name, access in {**read, **made}.items()
                if parts[0] in access.ranks and not made.get(name, access).following
                and min(ends[name]) <= now < max(ends[name])
            )
            for now in range(1, final)
        ]  # fmt: skip
        held = sum(words(a, block, whole=False) for a in inputs)
        held += sum(words(a._replace(axes=_without(a, parts)), block) for a in states)
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


def _without(access: _Access, ranks: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(a for a in access.axes if not set(a) & set(ranks))


def _example(key: Array):
    q, k, v = jax.random.split(key, 3)
    draw = jax.random.normal
    return (draw(q, (2, 8, 2, 4)), draw(k, (2, 16, 2, 4)), draw(v, (2, 16, 2, 3)))


EXAMPLES = {attention: lambda key: (_example(key), {"tile": 4})}
