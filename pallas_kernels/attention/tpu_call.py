"""The grid of a TPU kernel: which blocks of which arrays each of its steps works on.

    grid (batch, head of keys, group, block of queries, step)     for out and dQ
    grid (batch, head of keys, block of keys, group, step)        for dK and dV

A step is one tile. The last axis, for dK and dV the last two, is walked in order, with
sums in scratch memory between the steps; the others may run in any order. The query
heads of a group read the same keys by their index: nothing is repeated in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.pattern import Extras
from pallas_kernels.attention.tiles import Sides, Tiling, ranges
from pallas_kernels.attention.tpu_tiles import Scalars, Tile

__all__ = ["call"]


def call(
    kernel: Callable[..., None],
    name: str,
    tiles: Tiling,
    extras: Extras,
    *,
    by_keys: bool,
    masks: Sides,
    queries: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    vectors: tuple[jax.Array, ...],
    results: list[tuple[str, tuple[int, ...], Any]],
    scratch: list[tuple[int, int]],
    products: int,
    interpret: Any,
) -> Any:
    """Run a kernel over its grid.

    Args:
        kernel: takes `(tiles, place, scalars, masks, queries, keys, vectors, results,
            scratch)`, from `scalars` on references; `place(scalars)` gives the tile,
            whether it is to be visited, and whether its block begins and ends here.
        name: of the kernel, in profiles.
        tiles: how the call is cut.
        extras: for the seed of dropout and the sinks.
        by_keys: a step owns a block of keys, not of queries.
        masks: what `sides` gave.
        queries: arrays `[B, K, G, T, H]`, in whole blocks.
        keys: arrays `[B, K, S, H]`, in whole blocks.
        vectors: arrays `[B, K, G, 1, T]`, float32.
        results: kind ("queries", "keys" or "vectors"), shape and dtype of each.
        scratch: shapes of float32 buffers.
        products: matrix products of a tile.
        interpret: True or `pltpu.InterpretParams`: run without a TPU.

    Returns:
        The results. The cost that the compiler is told counts pairs within the window,
        and operands and results once.
    """
    first, last, shape, steps = ranges(tiles, masks, by_keys)
    sinks = (
        None if extras.sinks is None else extras.sinks.reshape(-1).astype(jnp.float32)
    )
    scalars = Scalars(first, last, extras.seed, sinks)
    (batch, heads, groups, _, width), (down, across) = queries[0].shape, tiles.grid
    grid = (batch, heads, groups, down, steps)
    if by_keys:
        grid = (batch, heads, across, groups, steps)

    def stand(ids: tuple[Any, ...], scalars: Scalars) -> tuple[Tile, jax.Array]:
        return _stand(tiles, shape, ids, scalars, by_keys)

    def spec(kind: str, of: tuple[int, ...]) -> pl.BlockSpec:
        return _spec(tiles, kind, of, stand)

    def place(scalars: Scalars) -> tuple[Any, ...]:
        ids = tuple(pl.program_id(axis) for axis in range(5))
        tile, here = stand(ids, scalars)
        begins, ends = ids[4] == 0, ids[4] == steps - 1
        if by_keys:  # over all groups of queries
            begins, ends = begins & (ids[3] == 0), ends & (ids[3] == groups - 1)
        return tile, here, begins, ends

    def body(scalars: Scalars, *refs: Any) -> None:
        inputs, others = refs[:4], refs[4:]
        outputs, buffers = others[: len(results)], others[len(results) :]
        kernel(tiles, place, scalars, *inputs, outputs, buffers)

    operands = (masks, queries, keys, vectors)
    names = ("vectors", "key vectors", "vectors", "key vectors", "tiles")
    outputs = [_struct(size, dtype, operands) for _, size, dtype in results]
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, outputs)))
    pairs = batch * heads * groups * tiles.pairs
    ordered = 2 if by_keys else 1
    return pl.pallas_call(
        body,
        out_shape=outputs,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[
                Sides(
                    *(
                        None if x is None else spec(kind, x.shape)
                        for kind, x in zip(names, masks, strict=True)
                    )
                ),
                tuple(spec("queries", x.shape) for x in queries),
                tuple(spec("keys", x.shape) for x in keys),
                tuple(spec("vectors", x.shape) for x in vectors),
            ],
            out_specs=[spec(kind, size) for kind, size, _ in results],
            scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * (5 - ordered)
            + ("arbitrary",) * ordered,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * width * pairs,
            transcendentals=pairs,
            bytes_accessed=moved,
        ),
        interpret=interpret,
        name=name,
    )(scalars, *operands)


def _stand(
    tiles: Tiling,
    shape: tuple[int, ...],
    ids: tuple[Any, ...],
    scalars: Scalars,
    by_keys: bool,
) -> tuple[Tile, jax.Array]:
    """The tile of a step, and whether it is to be visited.

    Steps beyond the range of a block stay at its last tile, so that nothing is fetched.
    """
    if by_keys:
        batch, head, own, group, step = ids
    else:
        batch, head, group, own, step = ids
    at: Any = 0
    for size, index in zip(shape, (batch, head, group, own), strict=True):
        at = at * size + (index if size > 1 else 0)
    last = scalars.last[at]
    block = scalars.first[at] + step
    there = jnp.minimum(block, jnp.maximum(last, 0))
    row, column = (there, own) if by_keys else (own, there)
    return Tile(batch, head, group, row, column, by_keys), block <= last


def _spec(
    tiles: Tiling, kind: str, shape: tuple[int, ...], stand: Callable[..., Any]
) -> pl.BlockSpec:
    """The blocks of an array; a leading axis of length 1 is for all."""
    rows, columns, width = tiles.rows, tiles.columns, shape[-1]
    block = {
        "queries": (rows, width),
        "keys": (columns, width),
        "vectors": (1, rows),
        "key vectors": (1, columns),
        "tiles": (rows, columns),
    }[kind]
    leading = shape[:-2]

    def index(*ids: Any) -> tuple[Any, ...]:
        tile, _ = stand(ids[:5], Scalars(*ids[5]))
        numbers = zip((tile.batch, tile.head, tile.group), leading, strict=False)
        last = {
            "queries": (tile.row, 0),
            "keys": (tile.column, 0),
            "vectors": (0, tile.row),
            "key vectors": (0, tile.column),
            "tiles": (tile.row, tile.column),
        }[kind]
        return (*(i if size > 1 else 0 for i, size in numbers), *last)

    return pl.BlockSpec((None,) * len(leading) + block, index)


def _struct(shape: tuple[int, ...], dtype: Any, operands: Any) -> jax.ShapeDtypeStruct:
    """A result, which varies over the axes of a mesh that any operand varies over."""
    varies = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)]
    axes = jax.sharding.ManualAxisType(varying=frozenset().union(*varies))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
