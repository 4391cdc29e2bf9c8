"""Counts the arithmetic of a step from its jaxpr, before any compiler touches it.

A compiler counts a loop's body once and a hand-written kernel not at all; a jaxpr has
their lengths and grids. One multiply-add is two FLOPs, each elementwise operation on
floating numbers one (also `exp`), a reduction one per number that goes in. Moving,
converting, comparing integers and hashing random bits count nothing. What was written
with `jax.checkpoint` counts as often as it is computed.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["Cost", "count"]


class Cost(NamedTuple):
    """What a jaxpr computes.

    Attributes:
        flops: floating-point operations, of all devices together.
        flops_by_primitive: the same by the name of the primitive.
        bytes: operands and results of all operations, as if none were fused: an upper
            bound on memory traffic.
        unknown: what could not be counted, in words: loops of unknown length, which
            count once, and operations without a rule, which count nothing.
    """

    flops: float
    flops_by_primitive: dict[str, float]
    bytes: float
    unknown: tuple[str, ...]

    @property
    def matmul_flops(self) -> float:
        """FLOPs of matrix products, convolutions and kernels."""
        return sum(self.flops_by_primitive.get(name, 0.0) for name in _MATMULS)


_MATMULS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "pallas_call")

_MOVES = {
    "bitcast_convert_type",
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "copy_p",
    "device_put",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "iota",
    "optimization_barrier",
    "pad",
    "pvary",
    "reshape",
    "rev",
    "scatter",
    "select_and_gather_add",
    "select_n",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "stop_gradient",
    "tile",
    "transpose",
    # of kernels, and of collectives over mapped axes
    "get",
    "swap",
    "all_gather",
    "all_to_all",
    "ppermute",
    "pbroadcast",
}
# Per number that goes in: reductions, sums along an axis, collectives that add.
_PER_INPUT = {
    "argmax",
    "argmin",
    "cumlogsumexp",
    "cummax",
    "cummin",
    "cumprod",
    "cumsum",
    "psum",
    "psum2",
    "psum_invariant",
    "pmax",
    "pmin",
    "reduce_scatter",
}
# No rule is exact for these: eigenvalues are found by iteration.
_UNCOUNTED = {"eig", "eigh", "svd", "schur", "hessenberg", "custom_call", "ffi_call"}


def count(jaxpr: Any) -> Cost:
    """Counts a jaxpr, loops times their lengths.

    Args:
        jaxpr: what `jax.make_jaxpr(f)(*arguments)` returns, or a jaxpr inside of one.

    Returns:
        Its `Cost`; under `jax.shard_map` that of all devices of the mapped axes.

    >>> import jax
    >>> x = jnp.ones((3, 4))
    >>> count(jax.make_jaxpr(lambda x: x @ x.T)(x)).flops
    72.0
    """
    inner = getattr(jaxpr, "jaxpr", jaxpr)  # closed, or the open one inside
    return _sum(_equation(equation) for equation in _needed(inner))


def _needed(jaxpr: Any) -> list[Any]:
    """The equations that a result depends on: compilers drop the others."""
    live = {id(variable) for variable in jaxpr.outvars}
    kept = []
    for equation in reversed(jaxpr.eqns):
        results = {id(variable) for variable in equation.outvars}
        if results & live or equation.effects or not results:
            kept.append(equation)
            live |= {id(variable) for variable in equation.invars}
    return kept[::-1]


def _sum(costs: Iterable[Cost]) -> Cost:
    flops = size = 0.0
    by_primitive: dict[str, float] = {}
    unknown: dict[str, None] = {}
    for cost in costs:
        flops, size = flops + cost.flops, size + cost.bytes
        unknown |= dict.fromkeys(cost.unknown)
        for name, value in cost.flops_by_primitive.items():
            by_primitive[name] = by_primitive.get(name, 0.0) + value
    return Cost(flops, by_primitive, size, tuple(unknown))


def _times(cost: Cost, factor: float) -> Cost:
    scaled = {name: value * factor for name, value in cost.flops_by_primitive.items()}
    return Cost(cost.flops * factor, scaled, cost.bytes * factor, cost.unknown)


def _equation(equation: Any) -> Cost:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _times(count(params["jaxpr"]), params["length"])
    if name == "while":
        bodies = _sum([count(params["cond_jaxpr"]), count(params["body_jaxpr"])])
        words = "a while loop, of unknown length: counted once"
        return bodies._replace(unknown=(*bodies.unknown, words))
    if name == "cond":
        branches = [count(branch) for branch in params["branches"]]
        unknown = _sum(branches).unknown
        largest = max(branches, key=lambda cost: (cost.flops, cost.bytes))
        return largest._replace(unknown=unknown)
    if name == "shard_map":
        sizes = dict(params["mesh"].shape)
        axes = params.get("manual_axes", params.get("newly_manual_axes", ()))
        return _times(count(params["jaxpr"]), math.prod(sizes[axis] for axis in axes))
    if name == "pallas_call":
        return _kernel(equation)
    if name.startswith(("reduce", "scatter", "sort", "select_and_scatter")):
        return _leaf(equation)  # the jaxpr in it combines two numbers
    bodies = [body for value in params.values() for body in _jaxprs(value)]
    return _sum(map(count, bodies)) if bodies else _leaf(equation)


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, tuple | list) else [value]
    return [v for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]


def _kernel(equation: Any) -> Cost:
    """A Pallas kernel: what it says of itself, else its body times its grid."""
    params = equation.params
    moved = _bytes(equation.invars) + _bytes(equation.outvars)
    if (estimate := params.get("cost_estimate")) is not None:
        flops = float(estimate.flops)
        return Cost(flops, {"pallas_call": flops}, float(estimate.bytes_accessed), ())
    grid = params["grid_mapping"].grid
    static = all(isinstance(size, int) for size in grid)
    body = _times(count(params["jaxpr"]), math.prod(grid) if static else 1)
    unknown = () if static else ("a Pallas grid of unknown size: counted once",)
    unknown = (*body.unknown, *unknown)
    return Cost(body.flops, {"pallas_call": body.flops}, moved, unknown)


def _leaf(equation: Any) -> Cost:
    name = equation.primitive.name
    moved = _bytes(equation.invars) + _bytes(equation.outvars)
    if name in _UNCOUNTED:
        return Cost(0.0, {}, moved, (f"{name}: counted as nothing",))
    flops = _flops(name, equation)
    return Cost(flops, {name: flops} if flops else {}, moved, ())


def _flops(name: str, equation: Any) -> float:
    if name in _RULES:
        return float(_RULES[name](equation))
    operands, results = _avals(equation.invars), _avals(equation.outvars)
    floating = any(jnp.issubdtype(a.dtype, jnp.inexact) for a in operands + results)
    if name in _MOVES or not floating or not results:
        return 0.0
    if name in _PER_INPUT or (name.startswith("reduce_") and "window" not in name):
        return float(sum(aval.size for aval in operands))
    if name.startswith("scatter"):  # scatter-add and its like: once per update
        return float(operands[2].size)
    return float(max(aval.size for aval in results))


def _avals(variables: Any) -> list[Any]:
    avals = [getattr(variable, "aval", None) for variable in variables]
    return [aval for aval in avals if hasattr(aval, "dtype") and hasattr(aval, "size")]


def _bytes(variables: Any) -> float:
    return float(sum(a.size * a.dtype.itemsize for a in _avals(variables)))


def _dot_general(equation: Any) -> int:
    (contracting, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * equation.outvars[0].aval.size * math.prod(shape[d] for d in contracting)


def _ragged_dot_general(equation: Any) -> float:
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracting, _), _ = numbers.dot_dimension_numbers
    shape, size = equation.invars[0].aval.shape, equation.outvars[0].aval.size
    total = 2 * size * math.prod(shape[dimension] for dimension in contracting)
    # Where the sum itself is ragged, the groups share it.
    shared = set(numbers.lhs_ragged_dimensions) & set(contracting)
    return total / equation.invars[2].aval.shape[-1] if shared else total


def _convolution(equation: Any) -> int:
    """Products of numbers that are there: no padding, no holes of a dilation."""
    lhs, rhs = (variable.aval.shape for variable in equation.invars[:2])
    out = equation.outvars[0].aval.shape
    params = equation.params
    numbers = params["dimension_numbers"]
    pairs = out[numbers.out_spec[0]] * out[numbers.out_spec[1]]
    pairs *= rhs[numbers.rhs_spec[1]]
    for axis in range(len(params["window_strides"])):
        where = numbers.out_spec[2 + axis], numbers.rhs_spec[2 + axis]
        step, hole = params["lhs_dilation"][axis], params["rhs_dilation"][axis]
        position = (
            np.arange(out[where[0]])[:, None] * params["window_strides"][axis]
            + np.arange(rhs[where[1]])[None] * hole
            - params["padding"][axis][0]
        )
        size = (lhs[numbers.lhs_spec[2 + axis]] - 1) * step + 1
        inside = (position >= 0) & (position < size) & (position % step == 0)
        pairs *= int(inside.sum())
    return 2 * pairs


def _reduce_window(equation: Any) -> int:
    window = math.prod(equation.params["window_dimensions"])
    return equation.outvars[0].aval.size * window


def _sort(equation: Any) -> float:
    aval = equation.invars[0].aval
    length = aval.shape[equation.params["dimension"]]
    return aval.size * math.ceil(math.log2(max(length, 2)))


def _top_k(equation: Any) -> float:
    aval = equation.invars[0].aval
    return aval.size * math.ceil(math.log2(max(aval.shape[-1], 2)))


def _fft(equation: Any) -> float:
    points = math.prod(equation.params["fft_lengths"])
    size = max(equation.invars[0].aval.size, equation.outvars[0].aval.size)
    return 5 * size * math.log2(max(points, 2))


def _cholesky(equation: Any) -> float:
    aval = equation.invars[0].aval
    return aval.size * aval.shape[-1] / 3


def _lu(equation: Any) -> float:
    *batch, m, n = equation.invars[0].aval.shape
    k = min(m, n)
    return math.prod(batch) * (2 * m * n * k - (m + n) * k**2 + 2 * k**3 / 3)


def _qr(equation: Any) -> float:
    *batch, m, n = equation.invars[0].aval.shape
    return math.prod(batch) * (2 * m * n - 2 * min(m, n) ** 2 / 3) * min(m, n)


def _triangular_solve(equation: Any) -> float:
    return equation.outvars[0].aval.size * equation.invars[0].aval.shape[-1]


_RULES = {
    "cholesky": _cholesky,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "fft": _fft,
    "geqrf": _qr,
    "lu": _lu,
    "qr": _qr,
    "ragged_dot_general": _ragged_dot_general,
    "reduce_window": _reduce_window,
    "reduce_window_max": _reduce_window,
    "reduce_window_min": _reduce_window,
    "reduce_window_sum": _reduce_window,
    "sort": _sort,
    "top_k": _top_k,
    "triangular_solve": _triangular_solve,
}
