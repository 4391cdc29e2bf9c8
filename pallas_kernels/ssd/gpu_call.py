"""How the GPU kernels are called."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.ssd.gpu_layout import CHUNK, TOTAL, Plan

__all__ = ["NUMBERS", "SKIP", "call", "float32", "tile"]

STAGES = 2  # of a ring
Block = tuple[Any, tuple[int, ...], Any]  # kind of memory, shape, dtype
NUMBERS: Block = (plgpu.SMEM, (TOTAL + 1, CHUNK), jnp.float32)
SKIP: Block = (plgpu.SMEM, (CHUNK,), jnp.float32)


def call(
    body: Callable[..., None],
    cut: Plan,
    operands: Any,
    *,
    results: Any,
    ring: tuple[Block, ...],
    scratch: tuple[Any, ...],
    products: int,
    interpret: Any,
    grid: dict[str, int] | None = None,
    warpgroups: int = 1,
) -> Any:
    """Run a kernel; under `vmap`, with one longer batch.

    Args:
        body: takes how the call is cut, the products, and trees of references to
            operands, results and memory, of which the ring comes first.
        cut: how the call is cut.
        operands: a tree of arrays, the batch on their first axis.
        results: a tree of `jax.ShapeDtypeStruct`, likewise.
        ring: buffers of a stage.
        scratch: more memory.
        products: matrix products for each column and chunk.
        interpret: what `mosaic_gpu.simulator` gives; None: compile.
        grid: blocks of threads of a row of the batch; None: parts and columns.
        warpgroups: of a block of threads.
    """
    grid = grid or {"part": cut.parts, "column": cut.columns}

    @jax.custom_batching.custom_vmap
    def run(operands: Any) -> Any:
        batch = jax.tree.leaves(operands)[0].shape[0]
        out = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), results
        )
        moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, out)))
        tokens = batch * cut.columns * cut.chunks * CHUNK
        cost = pl.CostEstimate(
            flops=2 * products * CHUNK * cut.states * tokens,
            transcendentals=2 * CHUNK * tokens,
            bytes_accessed=moved,
        )
        name = getattr(body, "func", body).__name__
        return mosaic_gpu.call(
            functools.partial(body, cut, mosaic_gpu.products(interpret)), operands,
            name=f"ssd_{name}", results=out,
            scratch=(mosaic_gpu.ring(STAGES, warpgroups, *ring), *scratch),
            grid={"batch": batch, **grid}, warpgroups=warpgroups, cost=cost,
            interpret=interpret,
        )  # fmt: skip

    @run.def_vmap
    def _(size: int, is_batched: Any, operands: Any) -> Any:
        def join(x: jax.Array, flag: bool) -> jax.Array:
            x = x if flag else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = run(jax.tree.map(join, operands, is_batched[0]))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return run(operands)


def tile(shape: tuple[int, int], dtype: Any) -> Block:
    """A buffer for what products read."""
    return mosaic_gpu.swizzled, shape, dtype


def float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A result."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
