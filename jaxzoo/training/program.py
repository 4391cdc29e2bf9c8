"""The compiled call of a training loop: its steps, its batches, where they lie."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    Mesh,
    NamedSharding,
    Sharding,
    SingleDeviceSharding,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P

from jaxzoo.training.chips import chip
from jaxzoo.training.cost import count
from jaxzoo.training.mesh import (
    BATCH_AXES,
    Specs,
    batch_shardings,
    put_batch,
    state_shardings,
)
from jaxzoo.training.nonfinite import FINE, guarded
from jaxzoo.training.options import Options

__all__ = [
    "Loader",
    "Program",
    "Told",
    "build",
    "describe",
    "full_rate",
    "left_out",
    "state_like",
]

State = Any  # a pytree of arrays
Batch = Any  # a pytree of arrays
Metrics = dict[str, Any]
Step = Callable[[State, Batch], tuple[State, Metrics]]


class Program(NamedTuple):
    """What training runs, for one who wants to look at it before.

    Attributes:
        name: the fit's.
        call: the jitted function of `steps` steps; the state is donated.
        arguments: its arguments as `jax.ShapeDtypeStruct`; the state is the first.
        step: one step `(state, batch) -> (state, metrics)`.
        batch: one step's batch as `jax.ShapeDtypeStruct`.
        steps: steps per call.
        examples: examples per step.
        mesh: where the arguments lie, or None.
    """

    name: str
    call: Any
    arguments: tuple[Any, ...]
    step: Step
    batch: Batch
    steps: int
    examples: int
    mesh: Mesh | None


class Told(NamedTuple):
    """What a call tells the host beside the state.

    Attributes:
        metrics: means over the steps that count.
        fine: how many those are.
        bad: as `nonfinite.guarded` tells it.
        wishes: the largest signal that a process received, and whether to save.
    """

    metrics: Metrics
    fine: Any
    bad: Any
    wishes: Any


class Loader:
    """Batches, as the compiled call wants them."""

    def __init__(
        self,
        mesh: Mesh | None,
        batches: Callable[..., Batch],
        axis: int,
        rows: int | None,
    ):
        self.mesh, self._batches, self._axis, self._total = mesh, batches, axis, rows
        self._rows = None if rows is None else _own_rows(mesh, rows)

    def one(self, t: int) -> Batch:
        """The batch of step t, or this process's rows of it."""
        if self._rows is None:
            return self._batches(t)
        return self._batches(t, self._rows)

    def stacked(self, first: int, size: int) -> Batch:
        """The batches of a call, on the mesh."""
        parts = [self.one(t) for t in range(first, first + size)]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
        if self.mesh is None:
            return batch
        return put_batch(self.mesh, batch, self._axis + 1, self._rows, self._total or 0)

    def shapes(self, size: int) -> tuple[Batch, Batch]:
        """One whole batch as shapes, and `size` of them with their shardings."""

        def one(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = list(np.shape(leaf))
            if self._total is not None and len(shape) > self._axis:
                shape[self._axis] = self._total
            return jax.ShapeDtypeStruct(tuple(shape), np.asarray(leaf).dtype)

        batch = jax.eval_shape(lambda b: b, jax.tree.map(one, self.one(0)))
        stacked = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), batch
        )
        if self.mesh is None:
            return batch, stacked
        shardings = batch_shardings(self.mesh, stacked, self._axis + 1)
        return batch, jax.tree.map(_lying, stacked, shardings)

    def examples(self, stacked: Batch) -> int:
        """Examples per step, by the batches of a call; those of each seed count."""
        shapes = [x.shape[1:] for x in jax.tree.leaves(stacked)]
        sizes = [shape[: self._axis + 1] for shape in shapes if len(shape) > self._axis]
        return math.prod(sizes[0]) if sizes else 1


def _lying(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _own_rows(mesh: Mesh | None, total: int) -> slice:
    if mesh is None:
        return slice(0, total)
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    indices = sharding.addressable_devices_indices_map((total,)).values()
    spans = [index[0].indices(total) for index in indices if index] or [(0, total)]
    return slice(min(span[0] for span in spans), max(span[1] for span in spans))


def build(
    step: Step, state: Any, loader: Loader, *, specs: Specs | None, options: Options
) -> tuple[Any, Step]:
    """The compiled call of one fit, and one step as it stands in it.

    Args:
        step: `(state, batch) -> (state, metrics)`.
        state: the state at step 0, or a function that makes it.
        loader: of the batches; its mesh is that of the call.
        specs: as for `mesh.state_shardings`.
        options: the run's.

    Returns:
        `call(state, bad, batches, first, wishes) -> (state, Told)`, jitted, which takes
        the state for its own; and `step` where it sees the mesh.
    """
    mesh, policy = loader.mesh, options.non_finite

    def on_mesh(state: State, batch: Batch) -> tuple[State, Metrics]:
        # A step may ask what mesh it is on, as the reproducible one does.
        with nullcontext() if mesh is None else use_abstract_mesh(mesh.abstract_mesh):
            return step(state, batch)

    guard = guarded(on_mesh, policy, options.injection())

    def call(state: State, bad: Any, batch: Batch, first: Any, wishes: Any) -> Any:
        state, bad, metrics, fine = guard(state, bad, batch, first)
        means = jax.tree.map(lambda m: _mean(m, fine, policy == "skip"), metrics)
        # After all other exchanges: two that could overtake each other end Gloo.
        wishes = jnp.where(bad >= FINE, wishes, 0)
        told = Told(means, jnp.sum(fine), bad, jnp.max(wishes, axis=0))
        return state, told

    out: Any = None
    if mesh is not None:
        places = jax.tree.map(
            lambda leaf: leaf.sharding, state_like(mesh, state, specs)
        )
        out = places, NamedSharding(mesh, P())
    return jax.jit(call, donate_argnums=0, out_shardings=out), on_mesh


def state_like(mesh: Mesh | None, state: Any, specs: Specs | None) -> Any:
    """The state at step 0 as shapes, with the shardings that training gives it."""
    shapes = jax.eval_shape(state if callable(state) else lambda: state)
    if mesh is None:
        alone = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda leaf: _lying(leaf, alone), shapes)
    return jax.tree.map(_lying, shapes, state_shardings(mesh, shapes, specs))


def describe(
    name: str,
    call: Any,
    step: Step,
    state: Any,
    loader: Loader,
    size: int,
    specs: Specs | None,
) -> Program:
    """What `build` made, with the shapes that it is called with."""
    mesh, shapes = loader.mesh, state_like(loader.mesh, state, specs)
    batch, stacked = loader.shapes(size)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    wishes = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    if mesh is not None:
        number = _lying(number, NamedSharding(mesh, P()))
        wishes = jax.ShapeDtypeStruct((mesh.size, 2), jnp.int32)
        wishes = _lying(wishes, NamedSharding(mesh, P(mesh.axis_names)))
    arguments = (shapes, number, stacked, number, wishes)
    examples = loader.examples(stacked)
    return Program(name, call, arguments, step, batch, size, examples, mesh)


def full_rate(step: Step, state: State, stacked: Batch) -> float:
    """Steps per second at the peak FLOP/s of all devices; 0 where that is not known."""
    places = {leaf.sharding for leaf in jax.tree.leaves(state)}
    devices = set().union(*(place.device_set for place in places))
    kind = chip(next(iter(devices)).device_kind)
    if kind is None:
        return 0.0
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacked)
    flops = count(jax.make_jaxpr(step)(state, batch)).flops
    return kind.flops * len(devices) / flops if flops else 0.0


def left_out(state: State, size: int) -> State:
    """The state behind steps that are passed over: later ones keep their keys."""
    if isinstance(state, dict) and "step" in state:
        return {**state, "step": _advance(state["step"], size)}
    return state


@jax.jit
def _advance(step: jax.Array, size: int) -> jax.Array:
    return step + size


def _mean(values: jax.Array, fine: jax.Array, skip: bool) -> jax.Array:
    if not skip:
        return jnp.mean(values, axis=0)
    counts = fine.reshape(-1, *[1] * (values.ndim - 1))
    total = jnp.sum(jnp.where(counts, values, 0), axis=0)
    return total / jnp.maximum(jnp.sum(fine), 1)
