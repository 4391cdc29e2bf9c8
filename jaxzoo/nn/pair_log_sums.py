"""log sum exp over all pairs of a split batch, for contrastive losses.

Online: a pair (largest logit so far, sum of exponentials below it) travels round the
ring of devices, as `jaxzoo.core.collectives` says of sums over pairs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxzoo.core.collectives import (
    AxisName,
    Block,
    Side,
    axis_size,
    check_chunk,
    over_tiles,
    ring_gradient,
    varying,
    visit_ring,
)

__all__ = ["pair_log_sums"]


def pair_log_sums(
    logits: Block,
    rows: Side,
    columns: Side,
    *,
    axis_name: AxisName = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log sum exp of the logits: of each row over all columns, and the other way.

    Args:
        logits: `(rows, columns) -> [b, c]` of a tile, finite: give pairs that do not
            count -1e30.
        rows: as for `pair_sum`.
        columns: as for `pair_sum`.
        axis_name: as for `pair_sum`.
        chunk: as for `pair_sum`.

    Returns:
        `[b]` for the rows of this device, and `[c]` for its columns.

    Raises:
        ValueError: as for `pair_sum`.

    >>> products = lambda rows, columns: rows.features @ columns.features.T
    >>> of_rows, of_columns = pair_log_sums(
    ...     products, Side(jnp.zeros((4, 3))), Side(jnp.zeros((2, 3)))
    ... )
    >>> of_rows.tolist(), of_columns.tolist()
    ([0.6931, 0.6931, 0.6931, 0.6931], [1.3863, 1.3863])
    """
    check_chunk(columns, chunk)
    if axis_name is None:
        first, second = _no_sums(logits, rows, columns, None)
        return _logs(*_tiles_log_sums(logits, rows, columns, first, second, chunk))
    axis_size(axis_name)
    rows, columns = varying((rows, columns), axis_name)
    return _ring_log_sums(logits, axis_name, chunk, rows, columns)


def _no_sums(logits: Block, rows: Side, columns: Side, axis_name: AxisName) -> Any:
    tile = jax.eval_shape(logits, rows, columns)

    def empty(count: int) -> tuple[jax.Array, jax.Array]:
        lowest = jnp.finfo(tile.dtype).min / 2
        return jnp.full(count, lowest, tile.dtype), jnp.zeros(count, tile.dtype)

    return varying((empty(tile.shape[0]), empty(tile.shape[1])), axis_name)


def _add(state: tuple[jax.Array, jax.Array], tile: jax.Array, axis: int) -> Any:
    top, total = state
    largest = lax.stop_gradient(jnp.maximum(top, jnp.max(tile, axis=axis)))
    below = jnp.exp(tile - jnp.expand_dims(largest, axis))
    return largest, total * jnp.exp(top - largest) + jnp.sum(below, axis=axis)


def _tiles_log_sums(
    logits: Block,
    rows: Side,
    columns: Side,
    of_rows: Any,
    of_columns: Any,
    chunk: int | None,
) -> Any:
    def step(of_rows: Any, visited: Any) -> Any:
        columns, of_columns = visited
        tile = logits(rows, columns)
        return _add(of_rows, tile, 1), _add(of_columns, tile, 0)

    return over_tiles(step, of_rows, (columns, of_columns), chunk)


def _logs(*states: tuple[jax.Array, jax.Array]) -> Any:
    return tuple(top + jnp.log(total) for top, total in states)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ring_log_sums(
    logits: Block, axis_name: AxisName, chunk: int | None, rows: Side, columns: Side
) -> Any:
    def hop(of_rows: Any, traveller: Any) -> Any:
        columns, of_columns = traveller
        states = (of_rows, of_columns)
        of_rows, of_columns = _tiles_log_sums(logits, rows, columns, *states, chunk)
        return of_rows, (columns, of_columns)

    of_rows, of_columns = _no_sums(logits, rows, columns, axis_name)
    of_rows, home = visit_ring(hop, of_rows, (columns, of_columns), axis_name)
    return _logs(of_rows, home[1])


def _ring_log_sums_forward(
    logits: Block, axis_name: AxisName, chunk: int | None, rows: Side, columns: Side
) -> Any:
    sums = _ring_log_sums(logits, axis_name, chunk, rows, columns)
    return sums, (rows, columns, sums)


def _ring_log_sums_backward(
    logits: Block, axis_name: AxisName, chunk: int | None, saved: Any, weights: Any
) -> Any:
    rows, columns, sums = saved
    # d log-sum / d logit is a softmax: held fixed, it makes the gradient that of a sum
    # over pairs, which goes round the same ring.
    rows = Side(rows.features, (rows.tags, sums[0], weights[0]))
    columns = Side(columns.features, (columns.tags, sums[1], weights[1]))
    one = varying(jnp.ones((), sums[0].dtype), axis_name)
    block = functools.partial(_softmax_weighted, logits)
    return ring_gradient(block, axis_name, chunk, rows, columns, one)


def _softmax_weighted(logits: Block, rows: Side, columns: Side) -> jax.Array:
    row_tags, row_sums, row_weights = rows.tags
    column_tags, column_sums, column_weights = columns.tags
    tile = logits(Side(rows.features, row_tags), Side(columns.features, column_tags))
    of_rows = row_weights[:, None] * jnp.exp(tile - row_sums[:, None])
    of_columns = column_weights[None] * jnp.exp(tile - column_sums[None])
    return jnp.sum(tile * lax.stop_gradient(of_rows + of_columns))


_ring_log_sums.defvjp(_ring_log_sums_forward, _ring_log_sums_backward)
