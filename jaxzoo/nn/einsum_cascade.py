"""Cascades of Einsums: an algorithm as steps in index notation, checked and executed.

    steps = (
        Einsum("M[n]", ("X[k,n]",), reduce="max"),               # a maximum over k
        Einsum("E[k,n]", ("X[k,n]", "M[n]"), "sub_exp"),         # exp(X - M)
        Einsum("S[n]", ("E[k,n]",)),
        Einsum("Y[k,n]", ("E[k,n]", "S[n]"), "divide"),
    )
    softmax = Cascade(("X[k,n]",), steps, "Y[k,n]")
    execute(softmax, {"X": x})

What such steps cost, whoever runs them: `jaxzoo.nn.cascade_cost`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxzoo.core.typed import ArrayLike, typed

__all__ = ["Access", "Cascade", "Einsum", "access", "execute"]

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


class Access(NamedTuple):
    """A tensor as a step names it: the ranks of each axis, two where it is cut.

    `ended` are iterative ranks read at their last coordinate, `following` those at the
    next one.
    """

    name: str
    axes: tuple[tuple[str, ...], ...]
    ended: frozenset[str]
    following: frozenset[str]

    @property
    def ranks(self) -> tuple[str, ...]:
        """Of all axes, in order."""
        return tuple(rank for axis in self.axes for rank in axis)


@functools.cache
@typed
def access(text: str) -> Access:
    """Reads a tensor in index notation.

    Args:
        text: such as `QK[m,p]`, with the indices of `Einsum`.

    Returns:
        Its name, axes and iterative ranks.

    Raises:
        ValueError: it is written otherwise.

    >>> access("K[e,m1*M0+m0]").axes
    (('e',), ('m1', 'm0'))
    """
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
    return Access(found[1], tuple(axes), frozenset(ended), frozenset(following))


class Einsum(NamedTuple):
    """One step: `output = reduce over the ranks that it lacks of map(inputs)`.

    Tensors are written `QK[m,p]`. An index is a rank `m`; the next coordinate `m1+1` of
    an iterative rank; its end `M1`, in capitals; or `m1*M0+m0`, an axis cut in tiles.
    """

    output: str
    inputs: tuple[str, ...]
    map: str = "take"
    reduce: str = "add"

    @property
    def made(self) -> Access:
        """The output."""
        return access(self.output)

    @property
    def read(self) -> tuple[Access, ...]:
        """The inputs."""
        return tuple(map(access, self.inputs))

    @property
    def ranks(self) -> list[str]:
        """The iteration space: the ranks of the output, then those it reduces."""
        read = [rank for tensor in self.read for rank in tensor.ranks]
        return list(dict.fromkeys([*self.made.ranks, *read]))


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

    @property
    def loop(self) -> str | None:
        """The iterative rank, of which there is at most one."""
        ranks = {rank for step in self.steps for rank in step.made.following}
        if len(ranks) > 1:
            raise ValueError(
                f"argument 'cascade' iterates over {ranks}, expected one rank."
            )
        return next(iter(ranks), None)

    def lengths(self, known: Mapping[str, int]) -> dict[str, int]:
        """Lengths of all ranks, from those of the inputs' ranks and of tiles."""
        lengths = {**dict(self.sizes), **known}
        axes = {tensor.name: tensor.axes for tensor in map(access, self.inputs)}
        for step in self.steps:
            for tensor in step.read:
                for (own, *_), (outer, *inner) in zip(
                    axes.get(tensor.name, ()), tensor.axes, strict=False
                ):
                    if own not in lengths:
                        continue
                    tile = lengths[inner[0]] if inner else 1
                    if lengths[own] % tile:
                        raise ValueError(
                            f"argument 'cascade' cuts {lengths[own]} of {own} in tiles "
                            f"of {tile}, expected a divisor."
                        )
                    lengths.setdefault(outer, lengths[own] // tile)
            axes.setdefault(step.made.name, step.made.axes)
        return lengths


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
        name, axes, *_ = access(text)
        if name not in tensors or len(tensors[name].shape) != len(axes):
            came = f"{name} {tensors[name].shape}" if name in tensors else f"no {name}"
            raise ValueError(f"argument 'tensors' has {came}, expected {text}.")
        for (rank, *_), size in zip(axes, tensors[name].shape, strict=True):
            if sizes.setdefault(rank, size) != size:
                raise ValueError(
                    f"argument 'tensors' has {name} with rank {rank} of length {size}, "
                    f"expected {sizes[rank]} as before."
                )
    lengths = cascade.lengths(sizes)
    names = [access(text).name for text in cascade.inputs]
    values = {name: jnp.asarray(tensors[name]) for name in names}
    loop, looped = cascade.loop, False
    for step in cascade.steps:
        if loop is None or loop not in step.ranks:
            read = [_cut(values, text, lengths) for text in step.inputs]
            values[step.made.name] = _apply(step, read)
        elif not looped:
            values |= _scan(cascade, loop, values, lengths)
            looped = True
    return _cut(values, cascade.output, lengths)


def _cut(values: Mapping[str, Array], text: str, lengths: Mapping[str, int]) -> Array:
    """A tensor with one axis per rank of an access."""
    tensor = access(text)
    if tensor.name not in values:
        raise ValueError(f"argument 'cascade' reads {text} before it is computed.")
    return jnp.reshape(values[tensor.name], [lengths[r] for r in tensor.ranks])


def _apply(step: Einsum, arrays: Iterable[Array], loop: str | None = None) -> Array:
    """One step on arrays with an axis per rank, but none for the rank of the loop."""
    inputs = [[r for r in tensor.ranks if r != loop] for tensor in step.read]
    out = [r for r in step.made.ranks if r != loop]
    every = [r for r in step.ranks if r != loop]
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


def _scan(
    cascade: Cascade, loop: str, values: Mapping[str, Array], lengths: dict[str, int]
) -> dict[str, Array]:
    """The states that the steps of the loop leave behind."""
    body = [step for step in cascade.steps if loop in step.ranks]
    outputs = {step.made.name: step.made for step in body}
    states = [name for name, tensor in outputs.items() if tensor.following]
    start = {}
    for name in states:
        if name not in dict(cascade.initial):
            raise ValueError(f"argument 'cascade' has no initial value of {name}.")
        shape = [lengths[r] for r in outputs[name].ranks if r != loop]
        dtype = jnp.result_type(*values.values())
        start[name] = jnp.full(shape, dict(cascade.initial)[name], dtype)
    reads = {t: access(t) for step in body for t in step.inputs}
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
            new[step.made.name] = _apply(step, read, loop)
        return {name: new[name] for name in states}, None

    return jax.lax.scan(iteration, start, sliced, length=lengths[loop])[0]
