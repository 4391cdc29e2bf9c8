"""What the TPU kernels do in a step of their grid: chunk by chunk, with the state.

The equations stand in `pallas_tpu`, what is inside of a chunk in `tpu_chunk`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ssd.tpu_chunk import (
    Chunk,
    cut_chunk,
    dot,
    gather,
    inside,
    lower,
    sums,
    upper,
)
from pallas_kernels.ssd.tpu_layout import CHUNK, ROWS, Plan

__all__ = ["backward_body", "forward_body"]


def forward_body(cut: Plan, ins: dict, outs: dict, scratch: dict) -> None:
    """One step of the grid forward.

    Args:
        cut: the static part of the call.
        ins: references to blocks of operands, by name.
        outs: the same of results.
        scratch: the same of buffers: states of all lanes of a part.
    """
    block, lanes = pl.program_id(2), pl.program_id(3)
    states = scratch["states"]

    @pl.when(block == 0)
    def _() -> None:
        states[lanes] = ins["state"][...]

    if "starts" in outs:
        outs["starts"][...] = states[lanes]

    def one(k: Any, _: None) -> None:
        chunk, at = _chunk(cut, ins, k)
        b, c, h = ins["b"][at], ins["c"][at], states[lanes]
        y = _core(cut, chunk, b, c, h, ins["x"].dtype)[0]
        if "skip" in ins:
            y += ins["skip"][...] * chunk.x
        if "gate" in ins:
            gate = ins["gate"][at].astype(jnp.float32)
            y *= gate * jax.lax.logistic(gate)
        outs["y"][at] = y.astype(outs["y"].dtype)
        states[lanes] = _after(chunk, b, h, ins["x"].dtype)

    jax.lax.fori_loop(0, cut.chunks, one, None)

    @pl.when(block == cut.blocks - 1)
    def _() -> None:
        outs["end"][...] = states[lanes]


def backward_body(cut: Plan, ins: dict, outs: dict, scratch: dict) -> None:
    """One step of the grid for the gradient; the last block of tokens comes first.

    Args:
        cut: the static part of the call.
        ins: references to blocks of operands, by name.
        outs: the same of results.
        scratch: the same of buffers: gradients of the states of all lanes of a part,
            states before the chunks of a block, and sums for skip.
    """
    step, lanes = pl.program_id(2), pl.program_id(3)
    states, inner, skips = scratch["states"], scratch["inner"], scratch.get("skips")
    dtype = ins["x"].dtype

    @pl.when(step == 0)
    def _() -> None:
        states[lanes] = ins["d_end"][...]
        if skips is not None:
            skips[lanes] = jnp.zeros((1, cut.lanes), jnp.float32)

    @pl.when(lanes == 0)
    def _() -> None:
        for name in ("b", "c"):
            outs[name][...] = jnp.zeros(outs[name].shape, jnp.float32)

    inner[0] = ins["starts"][...]

    def again(k: Any, _: None) -> None:
        chunk, at = _chunk(cut, ins, k)
        inner[k + 1] = _after(chunk, ins["b"][at], inner[k], dtype)

    jax.lax.fori_loop(0, cut.chunks - 1, again, None)

    def one(i: Any, _: None) -> None:
        k = cut.chunks - 1 - i
        chunk, at = _chunk(cut, ins, k)
        b, c, h, after = ins["b"][at], ins["c"][at], inner[k], states[lanes]
        g = ins["d_y"][at].astype(jnp.float32)
        if "gate" in ins:
            core, came = _core(cut, chunk, b, c, h, dtype)
            if "skip" in ins:
                core += ins["skip"][...] * chunk.x
            gate = ins["gate"][at].astype(jnp.float32)
            open_ = jax.lax.logistic(gate)
            slope = open_ * (1.0 + gate * (1.0 - open_))
            outs["gate"][at] = (g * core * slope).astype(dtype)
            g *= gate * open_
        else:
            came = dot(c, h, 1, 0, dtype)
        d_came = chunk.into * g
        ended = dot(b, after, 1, 0, dtype) * chunk.ends
        d_xd, decays, d_c, d_b = _pairs(cut, chunk, b, c, g, dtype)
        d_xd += ended
        outs["b"][at] += d_b + dot(chunk.ends * chunk.xd, after, 1, 1, dtype)
        outs["c"][at] += d_c + dot(d_came, h, 1, 1, dtype)
        passed = jnp.sum(chunk.total * h * after, axis=0, keepdims=True)
        decays += gather(cut, jnp.broadcast_to(passed, chunk.x.shape))
        decays += sums(gather(cut, d_came * came), lower(), 1, 0)
        decays += sums(gather(cut, chunk.xd * ended), upper(), 1, 0)
        outs["log_decay"][k] = decays
        outs["dt"][k] = gather(cut, chunk.x * d_xd)
        d_x = d_xd * chunk.dt
        if "skip" in ins:
            d_x += ins["skip"][...] * g
            skips[lanes] += jnp.sum(chunk.x * g, axis=0, keepdims=True)  # pyright: ignore
        outs["x"][at] = d_x.astype(dtype)
        states[lanes] = chunk.total * after + dot(c, d_came, 0, 0, dtype)

    jax.lax.fori_loop(0, cut.chunks, one, None)

    @pl.when(step == cut.blocks - 1)
    def _() -> None:
        outs["d_state"][...] = states[lanes]
        if skips is not None:
            outs["skip"][...] = skips[lanes]


def _chunk(cut: Plan, ins: dict, k: Any) -> tuple[Chunk, Any]:
    """The k-th chunk of a block, and its rows."""
    at = pl.ds(pl.multiple_of(k * CHUNK, CHUNK), CHUNK)
    counts = ins["counts"][k] if "counts" in ins else None
    x, dt, log_decay = ins["x"][at], ins["dt"][k], ins["log_decay"][k]
    return cut_chunk(cut, x, dt, log_decay, counts), at


def _core(
    cut: Plan, chunk: Chunk, b: Any, c: Any, h: Any, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """y without skip and gate, and what of it came from before the chunk."""
    came = dot(c, h, 1, 0, dtype)
    scores = dot(c, b, 1, 1, dtype)
    within: dict[int, jax.Array] = {}
    for head in range(cut.per_block):
        start, mine = _slice(cut, head)
        weights = inside(chunk, head) * scores
        xd = jnp.where(mine, chunk.xd[:, start : start + mine.shape[1]], 0.0)
        y = dot(weights, xd, 1, 0, dtype)
        within[start] = within[start] + y if start in within else y
    return jnp.concatenate(list(within.values()), axis=1) + chunk.into * came, came


def _pairs(
    cut: Plan, chunk: Chunk, b: Any, c: Any, g: Any, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of dt x, log_decay (rows), c and b by the pairs of a chunk."""
    scores, d_scores = dot(c, b, 1, 1, dtype), jnp.zeros((CHUNK, CHUNK), jnp.float32)
    decays = jnp.zeros((ROWS, CHUNK), jnp.float32)
    row = jax.lax.broadcasted_iota(jnp.int32, decays.shape, 0)
    d_xd: dict[int, jax.Array] = {}
    for head in range(cut.per_block):
        start, mine = _slice(cut, head)
        at = slice(start, start + mine.shape[1])
        own = jnp.where(mine, g[:, at], 0.0)
        left = inside(chunk, head)
        d_weights, weights = dot(own, chunk.xd[:, at], 1, 1, dtype), left * scores
        d_scores += d_weights * left
        crossed = sums(d_weights * weights, lower(strictly=True), 1, 1)
        crossed = jnp.sum(jnp.where(lower(), crossed, 0.0), axis=0, keepdims=True)
        decays = jnp.where(row == head, crossed, decays)
        d = dot(weights, own, 0, 0, dtype)
        d_xd[start] = d_xd[start] + d if start in d_xd else d
    d_c, d_b = dot(d_scores, b, 1, 0, dtype), dot(d_scores, c, 0, 0, dtype)
    return jnp.concatenate(list(d_xd.values()), axis=1), decays, d_c, d_b


def _after(chunk: Chunk, b: Any, h: Any, dtype: Any) -> jax.Array:
    """The state after a chunk."""
    return chunk.total * h + dot(b, chunk.ends * chunk.xd, 0, 0, dtype)


def _slice(cut: Plan, head: int) -> tuple[int, jax.Array]:
    """Where the whole lane tiles of a head start, and which lanes there are its own."""
    wide = max(128, cut.width)
    start = head * cut.width // wide * wide
    lanes = start + jax.lax.broadcasted_iota(jnp.int32, (CHUNK, wide), 1)
    own = head * cut.width
    return start, (lanes >= own) & (lanes < own + cut.width)
