"""Pallas for NVIDIA GPUs of the Hopper kind, as all kernels here use it.

The interface of Mosaic GPU moves with each version of jax; what differs stands here and
nowhere else. A kernel is a body that every warpgroup of a block runs:

    def body(operands, results, scratch):
        ...
    call(body, operands, results=..., scratch=..., grid={"head": 8}, warpgroups=3)

Products are asked of `products(interpret)`: on a GPU they are wgmma instructions, in
the simulator their definition, which reads the same memory at the same point of the
program, so that the simulator judges the barriers around them.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.sharded import alike

__all__ = [
    "Products",
    "Ring",
    "by_roles",
    "call",
    "full",
    "products",
    "ring",
    "simulation",
    "simulator",
    "swizzled",
    "unavailable",
]

OLDEST = (0, 11, 2)


class Products(NamedTuple):
    """Matrix products of a warpgroup; both take a function to run while they run.

    Attributes:
        fresh: `(a, b, shape, meanwhile=None)`: a @ b, float32.
        onto: `(sums, a, b)`: sums + a @ b. `a` is a reference to shared memory or an
            array in registers, `b` a reference to shared memory.
    """

    fresh: Callable[..., jax.Array]
    onto: Callable[..., jax.Array]


class Ring(NamedTuple):
    """Buffers that one warpgroup fills, some stages ahead of those that read them.

    Attributes:
        buffers: references to shared memory, `[stages, ...]`.
        full: a barrier per stage, complete when its buffers are filled.
        free: a barrier per stage, complete when nobody reads it any more.
    """

    buffers: tuple[Any, ...]
    full: Any
    free: Any

    def stage(self, step: Any) -> Any:
        """The stage of a step, counted from 0."""
        return lax.rem(step, jnp.int32(self.buffers[0].shape[0]))

    def begin(self) -> None:
        """A reader: all stages are free."""
        for stage in range(self.buffers[0].shape[0]):
            plgpu.barrier_arrive(self.free.at[stage])

    def take(self, step: Any) -> tuple[Any, ...]:
        """A reader: the buffers of a step, when they are filled."""
        stage = self.stage(step)
        plgpu.barrier_wait(self.full.at[stage])
        return tuple(buffer.at[stage] for buffer in self.buffers)

    def release(self, step: Any) -> None:
        """A reader: it has read what it took."""
        plgpu.barrier_arrive(self.free.at[self.stage(step)])

    def fill(self, step: Any, *sources: Any) -> None:
        """The writer: copies a step's blocks of global memory, when there is room."""
        stage = self.stage(step)
        plgpu.barrier_wait(self.free.at[stage])
        for source, buffer in zip(sources, self.buffers, strict=True):
            plgpu.copy_gmem_to_smem(source, buffer.at[stage], self.full.at[stage])

    def end(self) -> None:
        """The writer: nobody reads any more."""
        for stage in range(self.buffers[0].shape[0]):
            plgpu.barrier_wait(self.free.at[stage])


def unavailable() -> str | None:
    """Why no kernel can be made with this jax; None if one can."""
    if jax.__version_info__ < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return (
            f"the GPU kernel needs jax {oldest} or newer, and this is {jax.__version__}"
        )
    return None


def call(
    body: Callable[..., None],
    operands: Any,
    *,
    name: str,
    results: Any,
    scratch: Any,
    grid: dict[str, int],
    warpgroups: int,
    cost: pl.CostEstimate,
    interpret: Any = None,
) -> Any:
    """Run a kernel.

    Args:
        body: takes `(operands, results, scratch)`, trees of references. Inside,
            `lax.axis_index` gives the place in the grid, and of "warpgroup".
        operands: a tree of arrays.
        name: of the kernel.
        results: a tree of `jax.ShapeDtypeStruct`.
        scratch: a tree of memory and barriers, shared by the warpgroups of a block.
        grid: the blocks, by name; the last axis runs fastest.
        warpgroups: of a block, of 128 threads each.
        cost: what the compiler is told.
        interpret: what `simulator` gives; None: compile.

    Returns:
        The results.
    """
    varies = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)]
    axes = jax.sharding.ManualAxisType(varying=frozenset().union(*varies))
    results = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=axes), results
    )
    knobs: dict[str, Any] = {}
    if jax.__version_info__ >= (0, 12):
        knobs["cost_estimate"] = cost
    leaves, tree = jax.tree.flatten(operands)
    out_leaves, out_tree = jax.tree.flatten(results)

    def flat(*refs: Any) -> None:
        inputs, refs = refs[: len(leaves)], refs[len(leaves) :]
        outputs, (scratch,) = refs[: len(out_leaves)], refs[len(out_leaves) :]
        body(tree.unflatten(inputs), out_tree.unflatten(outputs), scratch)

    flat.__name__ = name
    out = plgpu.kernel(
        flat,
        out_type=tuple(out_leaves),
        scratch_types=(scratch,),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        **knobs,
    )(*leaves)
    # The kernel's results have lost the type that was asked for.
    return alike((operands, out_tree.unflatten(out)))[1]


def products(interpret: Any) -> Products:
    """The products of a kernel; see `Products`."""

    def fresh(
        a: Any, b: Any, shape: tuple[int, int], meanwhile: Callable | None = None
    ) -> jax.Array:
        def run(sums: Any) -> jax.Array:
            plgpu.wgmma(sums, a, b)
            if meanwhile is not None:
                meanwhile()
            return sums[...]

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def onto(sums: jax.Array, a: Any, b: Any) -> jax.Array:
        start = plgpu.WGMMAAccumulatorRef.init(sums)
        return pl.run_state(lambda at: plgpu.wgmma(at, a, b))(start)  # pyright: ignore

    def fresh_defined(
        a: Any, b: Any, shape: tuple[int, int], meanwhile: Callable | None = None
    ) -> jax.Array:
        out = onto_defined(jnp.zeros(shape, jnp.float32), a, b)
        if meanwhile is not None:
            meanwhile()
        return out

    def onto_defined(sums: jax.Array, a: Any, b: Any) -> jax.Array:
        out = sums + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
        # A wgmma reads by the proxy that a copy writes by, a plain read does not.
        plgpu.commit_smem()
        return out

    if interpret is None:
        return Products(fresh, onto)
    return Products(fresh_defined, onto_defined)


def by_roles(compute: Callable[[], None], fetch: Callable[[], None]) -> None:
    """Of three warpgroups two compute; the last fetches and gives them registers."""
    who = lax.axis_index("warpgroup")

    @pl.when(who < 2)
    def _() -> None:
        plgpu.set_max_registers(240, action="increase")
        compute()

    @pl.when(who == 2)
    def _() -> None:
        plgpu.set_max_registers(24, action="decrease")
        fetch()


def ring(stages: int, readers: int, *buffers: tuple[Any, tuple[int, ...], Any]) -> Ring:
    """The memory of a `Ring`.

    Args:
        stages: steps that fit in.
        readers: warpgroups that read every step.
        buffers: `(kind, shape, dtype)` of each buffer of a stage, where `kind` is
            `swizzled` or `plgpu.SMEM`.
    """
    return Ring(
        tuple(kind((stages, *shape), dtype) for kind, shape, dtype in buffers),
        plgpu.Barrier(num_arrivals=len(buffers), num_barriers=stages),
        plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    )


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory laid out for products and for copies of whole rows.

    Args:
        shape: the last axis a multiple of 128 bytes, the one before of 8.
        dtype: of 16 or 32 bits.
    """
    across = 128 // jnp.dtype(dtype).itemsize
    tiling, swizzle = plgpu.TilingTransform, plgpu.SwizzleTransform
    transforms = (tiling((8, across)), swizzle(128))  # pyright: ignore
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def full(shape: tuple[int, ...], value: Any, layout: Any) -> jax.Array:
    """A float32 array in registers, in a layout of `plgpu.Layout`."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def simulator() -> Any:
    """What to give as `interpret`: threads, barriers and copies, watched for races."""
    return plgpu.InterpretGPUParams(detect_races=True)


@contextlib.contextmanager
def simulation() -> Iterator[None]:
    """Where simulated kernels run; raises at its end if threads have raced."""
    state = importlib.import_module(
        "jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call"
    )
    try:
        yield
        found = state.get_races().races_found
    finally:  # after an exception no kernel runs before this
        state.reset_gpu_interpret_mode_state()
    if found:  # newer versions raise where it happens
        raise RuntimeError("RACE DETECTED: the simulator has said where")
