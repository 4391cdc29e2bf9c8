"""Where a block of threads of the GPU kernels stands, and what it computes of tokens.

A chunk comes into a ring, two chunks ahead. What is a function of token and channel
alone is computed by all threads for the whole chunk, before the recurrence and after
it; between them such arrays are float32 rows in shared memory. Layouts are said where
something is loaded, and follow from there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import Ring, full
from pallas_kernels.selective_scan.gpu_plan import (
    CHUNK,
    CHUNK_OF,
    GROUP,
    SINGLE,
    STATE,
    STATES,
    WIDTH,
    Task,
)
from pallas_kernels.selective_scan.operands import Given

__all__ = [
    "LN2", "LOG2E", "Block", "Tokens", "from_shared", "group", "joined", "logistic",
    "over_channels", "put", "softplus", "wide",
]  # fmt: skip

LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453
WALKED = ("u", "delta", "z", "d_y", "B", "C", "marks", "kept")


class Block:
    """The channels of a block of threads in a row of the batch, and its chunks.

    Args:
        task: the static part.
        given: references to the operands.
        ring: memory for the chunks, in the order of `WALKED`.
        backwards: chunks are walked from the last to the first.
    """

    def __init__(self, task: Task, given: Given, ring: Ring, backwards: bool) -> None:
        self.plan, self.softplus = task.plan, task.softplus
        self.given, self.ring = given, ring
        self.backwards = backwards
        self.batch, self.column = lax.axis_index("batch"), lax.axis_index("column")
        across = jnp.int32(self.plan.across)
        self.group = lax.div(self.column, across)
        self.channel = (self.column - self.group * across) * WIDTH
        self.names = [k for k in WALKED if getattr(given, k) is not None]
        self.stages = ring.buffers[0].shape[0]
        skip, bias = (
            _from_global(given.vectors.at[self.column, i], CHUNK_OF.reduce(0))
            for i in range(2)
        )
        self.skip, self.bias = (
            lax.broadcast_in_dim(x, (CHUNK, WIDTH), [1]) for x in (skip, bias)
        )

    def number(self, step: Any) -> Any:
        """Which chunk a step works on."""
        return self.plan.chunks - 1 - step if self.backwards else step

    def walk(self, body: Callable[[Any, dict[str, Any]], None]) -> None:
        """`body(number, arrays)` for all chunks, `arrays` being references by name."""
        self.ring.begin()
        for step in range(min(self.stages, self.plan.chunks)):
            self._fill(jnp.int32(step))

        @pl.loop(0, self.plan.chunks)
        def _(step: Any) -> None:
            arrays = zip(self.names, self.ring.take(step), strict=True)
            body(self.number(step), dict(arrays))
            plgpu.commit_smem()  # what was read is read before a copy overwrites it
            self.ring.release(step)
            later = step + self.stages
            pl.when(later < self.plan.chunks)(lambda: self._fill(later))

        plgpu.wait_smem_to_gmem(0)
        self.ring.end()

    def _fill(self, step: Any) -> None:
        number = self.number(step)
        tokens = pl.ds(number * CHUNK, CHUNK)
        of_tokens = (self.batch, tokens, self.group, pl.ds(self.channel, WIDTH))
        of_states = (self.batch, self.group, slice(None), tokens)
        places = {
            "B": of_states, "C": of_states, "marks": (self.batch, tokens),
            "kept": (self.batch, number, self.column),
        }  # fmt: skip
        sources = (
            getattr(self.given, k).at[places.get(k, of_tokens)] for k in self.names
        )
        self.ring.fill(step, *sources)

    def copy_out(self, out: dict[str, Any], made: Any, number: Any) -> None:
        """Begins to copy what was made of a chunk to the results of that name."""
        plgpu.commit_smem()
        tokens, channels = pl.ds(number * CHUNK, CHUNK), pl.ds(self.channel, WIDTH)
        for name, rows in out.items():
            to = getattr(made, name).at[self.batch, tokens, self.group, channels]
            plgpu.copy_smem_to_gmem(rows, to)

    def parts(self, body: Callable[[Any], None]) -> None:
        """`body(n)` for all blocks of states."""
        if self.plan.parts == 1:
            body(0)
        else:
            pl.loop(0, self.plan.parts)(body)

    def states(self, x: Any, n: Any) -> jax.Array:
        """Of an array of states by row of the batch, a block of states."""
        return _from_global(x.at[self.batch, self.column, n], STATE)

    def rates(self, n: Any) -> jax.Array:
        """A block of A, in units of 1 / log 2."""
        return _from_global(self.given.A.at[self.column, n], STATE)

    def steps(self, number: Any, arrays: dict[str, Any]) -> tuple[jax.Array, ...]:
        """Step sizes, u, and what goes into the softplus, of a chunk."""
        u, raw = wide(arrays["u"]), wide(arrays["delta"]) + self.bias
        dt = softplus(raw) if self.softplus else raw
        return self.counted(dt, number), u, raw

    def counted(self, x: jax.Array, number: Any) -> jax.Array:
        """A chunk with 0 for tokens beyond the last, which so change nothing."""
        if self.plan.length % CHUNK == 0:
            return x
        token = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=CHUNK_OF)
        return jnp.where(token + number * CHUNK < self.plan.length, x, 0.0)

    def clear(self, rows: Any) -> None:
        """Makes rows ready for `add`."""
        if self.plan.parts > 1:
            rows[...] = full(rows.shape, 0.0, CHUNK_OF)

    def add(self, rows: Any, at: Any, more: jax.Array) -> None:
        """Adds the sums over a block of states; if there is but one, they are it."""
        rows, more = rows.at[at].transpose((1, 0)), jnp.sum(more, axis=2)
        if self.plan.parts > 1:
            more = plgpu.load(rows, layout=STATE.reduce(2)) + more
        rows[...] = more


class Steps(NamedTuple):
    """Of a group of tokens, `[channels, tokens, states]`."""

    dt: jax.Array
    x: jax.Array  # dt u
    power: jax.Array  # the decays of the states before
    before: jax.Array  # the states that the tokens find
    after: jax.Array  # the states that they leave


class Tokens:
    """The recurrence over the tokens of a chunk, for a block of states.

    Args:
        rows: by name, references to `[tokens, channels]`.
        arrays: the chunk, as `Block.walk` gives it.
        n: the number of the block of states.
        A: its rates, `[channels, 1, states]`.
    """

    def __init__(
        self, rows: dict[str, Any], arrays: dict[str, Any], n: Any, A: jax.Array
    ) -> None:
        self.rows, self.arrays, self.n = rows, arrays, n
        self.A = jnp.concatenate([A] * GROUP, axis=1)

    def row(self, name: str, k: Any) -> jax.Array:
        """Of group k, what differs by token and channel."""
        x = self.rows[name].at[group(k)].transpose((1, 0))
        x = plgpu.load(x, layout=STATE.reduce(2))
        return lax.broadcast_in_dim(x, self.A.shape, [0, 1])

    def along(self, name: str, k: Any) -> jax.Array:
        """Of group k, B or C."""
        x = self.arrays[name].at[self.n, group(k)]
        x = plgpu.load(x, layout=STATE.reduce(0))
        return lax.broadcast_in_dim(x, self.A.shape, [1, 2])

    def kept(self, h: jax.Array, t: Any) -> jax.Array:
        """What a token finds of the state, or gives back of its gradient."""
        if "marks" not in self.arrays:
            return h
        forgets = jnp.broadcast_to(self.arrays["marks"][t] > 0, h.shape)
        return jnp.where(forgets, 0.0, h)

    def forth(self, k: Any, h: jax.Array) -> tuple[jax.Array, Steps]:
        """The state after group k, from the one before it, and those between."""
        dt, x = self.row("dt", k), self.row("x", k)
        power, more = jnp.exp2(dt * self.A), x * self.along("B", k)
        before, after = [], []
        for i in range(GROUP):
            before.append(self.kept(h, k * GROUP + i))
            h = power[:, i : i + 1] * before[i] + more[:, i : i + 1]
            after.append(h)
        return h, Steps(dt, x, power, joined(before), joined(after))


def group(k: Any, kinds: int = 1) -> Any:
    """Where the rows of group k are, if those of several kinds alternate."""
    return pl.ds(k * (kinds * GROUP), kinds * GROUP)


def joined(of_tokens: list[jax.Array]) -> jax.Array:
    """`[channels, tokens, states]` of several tokens or groups."""
    return jnp.concatenate(of_tokens, axis=1)


def over_channels(room: Any, x: jax.Array) -> jax.Array:
    """`[channels, tokens, states]` summed over channels.

    By way of shared memory, so that a thread then has all channels of one sum: between
    threads it would take six times the instructions.

    Args:
        room: shared memory, `[channels, tokens + 1, states]`.
        x: what to sum.
    """
    count = x.shape[1]
    room[:, pl.ds(0, count)] = x

    def four(i: Any, sums: Any) -> Any:
        return tuple(
            total + plgpu.load(room.at[4 * i + j, pl.ds(0, count)], layout=SINGLE)
            for j, total in enumerate(sums)
        )

    zero = full((count, STATES), 0.0, SINGLE)
    a, b, c, d = lax.fori_loop(0, WIDTH // 4, four, (zero,) * 4)
    return (a + b) + (c + d)


def put(room: Any, n: Any, h: jax.Array) -> None:
    """Writes a block of states to shared memory."""
    room[n] = h


def from_shared(room: Any, n: Any) -> jax.Array:
    """What `put` wrote."""
    return plgpu.load(room.at[n], layout=STATE)


def wide(rows: Any) -> jax.Array:
    """A chunk of `[tokens, channels]` in float32."""
    return plgpu.load(rows, layout=CHUNK_OF).astype(jnp.float32)


def logistic(x: jax.Array) -> jax.Array:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + jnp.exp2(x * -LOG2E))


def softplus(x: jax.Array) -> jax.Array:
    """max(x, 0) + log(1 + e^-|x|), the logarithm as 2 artanh(e / (2 + e)).

    The instruction for logarithms has a small error, not a small relative one.
    """
    e = jnp.exp2(jnp.abs(x) * -LOG2E)
    s = e / (2.0 + e)  # at most 1/3
    square = s * s
    series = square * (1 / 15) + 1 / 13
    for k in (11, 9, 7, 5, 3, 1):
        series = series * square + 1 / k
    return jnp.maximum(x, 0.0) + 2.0 * s * series


def _from_global(x: Any, layout: Any) -> jax.Array:
    # Loads are arranged for the banks of shared memory, where it is that.
    return plgpu.load(x, layout=layout, optimized=False)
