"""Attention for Hopper GPUs in Pallas: forward, and two kernels for the gradient.

The equations are those of `pallas_tpu`. Three warpgroups make a block of threads: one
fetches, a ring of blocks ahead of the other two, which compute.

    out, dQ   each of the two owns half of the block's queries and walks over keys. In
              the forward pass they take turns, so that one's exponentials run beside
              the other's products.
    dK, dV    one of the two owns dV, the other dK, of the same keys: the first makes
              the weights P^T and hands them over in shared memory, the other dP^T.
              Each makes two of the four products and holds one sum in its registers.

The query heads of a key head are walked over by the block that owns its keys: no two
blocks add to one sum, and each run gives the same bits. Logits are in units of log 2,
and what does not count is below where the running maximum starts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_gpu
from pallas_kernels.attention.fold import folded
from pallas_kernels.attention.gpu_bodies import forward_body, keys_body, queries_body
from pallas_kernels.attention.gpu_tiles import Beside, Cut, cut
from pallas_kernels.attention.pattern import Extras, Pattern
from pallas_kernels.attention.tiles import Tiling, pad, row_sums

__all__ = ["BLOCKS", "backward", "forward", "unsupported"]

STAGES = 2  # blocks in a ring
# Positions owned by a block of threads and walked over at a time, for each width.
BLOCKS = {
    "out": {64: (128, 128), 128: (128, 128), 256: (128, 64)},
    "dq": {64: (128, 128), 128: (128, 64), 256: (128, 64)},
    "dkv": {64: (128, 64), 128: (128, 64), 256: (64, 64)},
}


def unsupported(
    pattern: Pattern, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> str | None:
    """Why a call cannot run here, if so: as `pallas_tpu.unsupported`."""
    kinds = {x.dtype for x in (q, k, v)}
    if len(kinds) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
        names = ", ".join(str(x.dtype) for x in (q, k, v))
        return (
            "the GPU kernel takes q, k and v of one dtype, bfloat16 or float16, "
            f"and these are {names}"
        )
    if extras.bias is not None:
        return "the GPU kernel takes no bias"
    mask = extras.mask
    if mask is not None and mask.shape[3] > 1 and (mask.shape[4] > 1 or k.shape[2] < 2):
        return "the GPU kernel takes masks of queries or of keys, not of pairs"
    if min(q.size, k.size) == 0:
        return "the GPU kernel takes no empty arrays"
    if q.shape[-1] > 256:
        return f"the GPU kernel takes heads of at most 256, and this is {q.shape[-1]}"
    own, step = pattern.tile or (128, 64)
    if own < 1 or step < 1 or own % 128 or step % 64:
        return (
            "the GPU kernel takes tiles of a multiple of 128 that is owned and of 64 "
            f"that is walked over, not {pattern.tile}"
        )
    return mosaic_gpu.unavailable()


def forward(
    pattern: Pattern,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention; equals `ref.attend` wherever `unsupported` gives None.

    As `pallas_tpu.forward`, but q, k and v are bfloat16 or float16, masks are of
    queries or of keys, and the tile is by default that of `BLOCKS`. `interpret` is what
    `mosaic_gpu.simulator` gives; None: compile.
    """
    call = functools.partial(_forward, pattern, interpret)
    return folded(call)(q, k, v, extras)


def _forward(
    pattern: Pattern, interpret: Any, q: Any, k: Any, v: Any, extras: Extras
) -> tuple[jax.Array, jax.Array]:
    how, beside = _cut(pattern, q, k, extras, "out")
    (batch, heads, groups, length, width), rows = q.shape, how.own // 2
    q, k, v = (_heads_last(x, how.width) for x in (q, k, v))
    padded = how.blocks * how.own
    kind, written = q.dtype, q.shape[1]
    if extras.sinks is not None:  # without the copy that stops at the end of the array
        kind, written = jnp.float32, padded
    own = [(mosaic_gpu.swizzled, (2, rows, how.width), q.dtype)]
    keys, values = _rings(how, beside, k)
    out, lse = _call(
        forward_body, how, (q, k, v, beside), interpret,
        results=(
            jax.ShapeDtypeStruct((batch, written, *q.shape[2:]), kind),
            jax.ShapeDtypeStruct((batch, heads * groups, padded), jnp.float32),
        ),
        scratch=(
            *_own(how, beside, own, 2, rows),
            plgpu.SMEM((2, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
            keys,
            values,
        ),
        products=2,
    )  # fmt: skip
    return (
        _heads_first(out[:, :length], heads, width),
        lse[:, :, :length].reshape(batch, heads, groups, length),
    )


def backward(
    pattern: Pattern,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    """The gradient of `forward`: as `pallas_tpu.backward`."""
    call = functools.partial(_backward, pattern, interpret)
    d_lse = jnp.zeros_like(lse) if d_lse is None else d_lse
    *gradients, d_sinks = folded(call)(q, k, v, extras, out, lse, d_out, d_lse)
    return *gradients, None, d_sinks


def _backward(
    pattern: Pattern, interpret: Any, q: Any, k: Any, v: Any, extras: Extras,
    out: Any, lse: Any, d_out: Any, d_lse: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    lse, delta, d_sinks = row_sums(extras, out, lse, d_out, d_lse)
    by_queries, by_keys = (_cut(pattern, q, k, extras, x) for x in ("dq", "dkv"))
    (batch, heads, groups, length, width), dtype = q.shape, q.dtype
    last = by_queries[0].width
    arrays = [_heads_last(x.astype(dtype), last) for x in (q, k, v, d_out)]
    q, k, v, d_out = arrays
    vectors = [x.reshape(batch, heads * groups, length) for x in (lse, delta)]

    def whole(how: Cut) -> list[jax.Array]:
        return [pad(x, 2, how.tiles.rows) for x in vectors]

    how, beside = by_queries
    rows = how.own // 2
    own: list[Any] = [(mosaic_gpu.swizzled, (2, rows, last), dtype)] * 2
    own += [(plgpu.SMEM, (2, rows), jnp.float32)] * 2
    stages = (STAGES, STAGES)
    if last == 256:  # that would not fit beside the rest
        stages = (STAGES, 1) if beside.ids is None else (1, 1)
    dq = _call(
        queries_body, how, (*arrays, *whole(how), beside), interpret,
        results=(jax.ShapeDtypeStruct(q.shape, dtype),),
        scratch=(*_own(how, beside, own, 2, rows), *_rings(how, beside, k, stages)),
        products=3,
    )[0]  # fmt: skip

    how, beside = by_keys
    own = [(mosaic_gpu.swizzled, (1, how.own, last), dtype)] * 2
    block = (mosaic_gpu.swizzled, (how.step, last), dtype)
    beside_block = (plgpu.SMEM, (how.step,), jnp.float32)
    ids = [] if beside.ids is None else [(plgpu.SMEM, (how.step,), jnp.int32)]
    dk, dv = _call(
        keys_body, how, (*arrays, *whole(how), beside), interpret,
        results=tuple(jax.ShapeDtypeStruct(x.shape, dtype) for x in (k, v)),
        scratch=(
            *_own(how, beside, own, 1, how.own),
            mosaic_gpu.swizzled((how.own, how.step), dtype),
            plgpu.Barrier(),
            plgpu.Barrier(),
            mosaic_gpu.ring(STAGES, 2, block, beside_block, *ids),
            mosaic_gpu.ring(STAGES, 2, block, beside_block),
        ),
        products=4,
    )  # fmt: skip
    dk, dv = (x[:, : how.tiles.keys, :, :width].transpose(0, 2, 1, 3) for x in (dk, dv))
    dq = _heads_first(dq[:, :length], heads, width)
    return dq, dk, dv, d_sinks


def _cut(
    pattern: Pattern, q: jax.Array, k: jax.Array, extras: Extras, result: str
) -> tuple[Cut, Beside]:
    width = next(x for x in BLOCKS[result] if x >= q.shape[-1])
    own, step = pattern.tile or BLOCKS[result][width]
    by_keys = result == "dkv"
    rows, columns = (step, own) if by_keys else (own, step)
    heads = q.shape[1], q.shape[2]
    tiles = Tiling(pattern, q.shape[3], k.shape[2], heads, rows, columns)
    return cut(tiles, extras, width, by_keys=by_keys)


def _call(
    body: Callable[..., None], how: Cut, operands: Any, interpret: Any, *,
    results: Any, scratch: Any, products: int,
) -> Any:  # fmt: skip
    batch, heads, groups = operands[0].shape[0], *how.tiles.heads
    pairs = batch * heads * groups * how.tiles.pairs
    moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, results)))
    cost = pl.CostEstimate(
        flops=2 * products * how.width * pairs,
        transcendentals=pairs,
        bytes_accessed=moved,
    )
    return mosaic_gpu.call(
        functools.partial(body, how, mosaic_gpu.products(interpret)), operands,
        name=f"attention_{body.__name__}", results=results, scratch=scratch,
        grid={
            "batch": batch,
            "head": heads if how.by_keys else heads * groups,
            "block": how.blocks,
        },
        warpgroups=3, cost=cost, interpret=interpret,
    )  # fmt: skip


def _own(
    how: Cut, beside: Beside, buffers: list[Any], parts: int, size: int
) -> tuple[Any, Any]:
    """Memory for what is owned, in `parts`, with ids; and a barrier for each part."""
    if beside.ids is not None:
        buffers = [*buffers, (plgpu.SMEM, (parts, size), jnp.int32)]
    memory = tuple(kind(shape, dtype) for kind, shape, dtype in buffers)
    return memory, plgpu.Barrier(num_arrivals=len(buffers), num_barriers=parts)


def _rings(
    how: Cut, beside: Beside, k: jax.Array, stages: tuple[int, int] = (STAGES, STAGES)
) -> tuple[Any, Any]:
    """For keys, with ids, and for values."""
    block = (mosaic_gpu.swizzled, (how.step, how.width), k.dtype)
    ids = [] if beside.ids is None else [(plgpu.SMEM, (how.step,), jnp.int32)]
    return tuple(
        mosaic_gpu.ring(count, 2, *buffers)
        for count, buffers in zip(stages, ((block, *ids), (block,)), strict=True)
    )  # pyright: ignore


def _heads_last(x: jax.Array, width: int) -> jax.Array:
    """`[B, K, G, T, H]` or `[B, K, S, H]` to `[B, T, N, width]`.

    That is how `attention` was given it, so that XLA drops both transpositions.
    """
    x = x.reshape(x.shape[0], -1, *x.shape[-2:]).transpose(0, 2, 1, 3)
    return pad(pad(x, 1, 8), 3, width)  # copies come in tiles of 8 rows


def _heads_first(x: jax.Array, heads: int, width: int) -> jax.Array:
    """`[B, T, N, width]` to `[B, K, G, T, H]`."""
    x = x[..., :width].transpose(0, 2, 1, 3)
    return x.reshape(x.shape[0], heads, -1, *x.shape[2:])
