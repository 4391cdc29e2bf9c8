"""Collectives and memory traffic of compiled programs whose figures are known."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxzoo.training.collectives import collectives, wire_bytes
from jaxzoo.training.traffic import traffic

W = jnp.ones((16, 16))


def compiled(f, *arguments) -> Any:
    return jax.jit(f).lower(*arguments).compile()


def mesh_of(**axes):
    devices = np.array(jax.devices()[: math.prod(axes.values())])
    types = (AxisType.Auto,) * len(axes)
    return Mesh(devices.reshape(*axes.values()), tuple(axes), axis_types=types)


def hlo(f, mesh, shape, in_spec, out_spec) -> Any:
    f = jax.shard_map(
        f, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False
    )
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, in_spec))
    return jax.jit(f).lower(x).compile().as_text()


@pytest.mark.parametrize(
    ("f", "kind", "payload"),
    [
        (lambda a: lax.psum(a, "x"), "all-reduce", 2 * 16 * 4),
        (lambda a: lax.all_gather(a, "x"), "all-gather", 4 * 2 * 16 * 4),
        (
            lambda a: lax.psum_scatter(a, "x", scatter_dimension=1, tiled=True),
            "reduce-scatter", 2 * 16 * 4,
        ),
        (
            lambda a: lax.all_to_all(a, "x", 1, 0, tiled=True),
            "all-to-all", 2 * 16 * 4,
        ),
        (
            lambda a: lax.ppermute(a, "x", [(i, (i + 1) % 4) for i in range(4)]),
            "collective-permute", 2 * 16 * 4,
        ),
    ],
    ids=["psum", "all_gather", "psum_scatter", "all_to_all", "ppermute"],
)  # fmt: skip
def test_known_collectives_are_found(f, kind, payload):
    mesh = mesh_of(y=2, x=4)
    text = hlo(f, mesh, (16, 16), P(("y", "x")), P(("y", "x")))
    (found,) = collectives(text)
    assert (found.kind, found.count, found.bytes) == (kind, 1, payload)
    if kind == "collective-permute":
        assert found.group == (0, 1)
    else:
        assert found.group == (0, 1, 2, 3) and found.group_size == 4
    # Over the other axis the groups are strided.
    if kind == "all-reduce":
        other = hlo(
            lambda a: lax.psum(a, "y"), mesh, (16, 16), P(("y", "x")), P(("y", "x"))
        )
        assert collectives(other)[0].group == (0, 4)


def test_collectives_in_loops_count_their_trips():
    def f(a):
        def inner(c, _):
            return lax.psum(c, "x") * 0.5, None

        def outer(c, _):
            return lax.scan(inner, c, None, length=3)[0], None

        return lax.scan(outer, a, None, length=5)[0]

    (found,) = collectives(hlo(f, mesh_of(x=8), (16, 16), P("x"), P("x")))
    assert (found.count, found.bytes) == (15, 15 * 2 * 16 * 4)


def test_the_collectives_of_data_parallel_training_are_the_gradients():
    mesh = mesh_of(x=8)
    w = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, P()))
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("x")))
    step = jax.jit(
        lambda w, x: w - jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w),
        out_shardings=NamedSharding(mesh, P()),
    )
    found = collectives(compiled(step, w, x).as_text())
    assert [(c.kind, c.bytes, c.group_size) for c in found] == [
        ("all-reduce", 16 * 32 * 4, 8)
    ]


def test_a_program_without_collectives_has_none():
    assert collectives(compiled(jnp.matmul, W, W).as_text()) == []
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("nothing")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-reduce", 150),
        ("all-gather", 75),
        ("reduce-scatter", 75),
        ("all-to-all", 75),
        ("collective-permute", 100),
    ],
)
def test_wire_bytes_of_a_ring(kind, expected):
    assert wire_bytes(kind, 100, 4) == expected
    assert wire_bytes(kind, 100, 1) == 0


TPU_HLO = """\
HloModule jit_call, is_scheduled=true, replica_count=1, num_partitions=16

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%all-reduce-scatter.1 (input.1: f32[512,2048]) -> f32[128,2048] {
  %input.1 = f32[512,2048]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[512,2048]{1,0:T(8,128)} all-reduce(%input.1), channel_id=3, \
replica_groups=[4,4]<=[16], use_global_device_ids=true, to_apply=%add
  %index = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[128,2048]{1,0:T(8,128)} dynamic-slice(%all-reduce.3, %index, \
%index), dynamic_slice_sizes={128,2048}
}

%async_collective_fusion.1 (param_0: bf16[4,512]) -> (f32[4], bf16[64,512]) {
  %param_0 = bf16[4,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_0), \
channel_id=12, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  %zero = f32[4]{0:T(128)} constant({0, 0, 0, 0})
  ROOT %tuple.1 = (f32[4]{0:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}) \
tuple(%zero, %all-gather.1)
}

%async_collective_fusion.2 (param_1: bf16[4,512]) -> bf16[64,512] {
  %param_1 = bf16[4,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.2 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%param_1), \
channel_id=12, replica_groups=mesh['axis_0'=16] {'axis_0'}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_end":"8"}}
}

%body (wide: (s32[], f32[512,2048], bf16[4,512])) -> (s32[], f32[512,2048], \
bf16[4,512]) {
  %wide = (s32[]{:T(128)}, f32[512,2048]{1,0:T(8,128)}, \
bf16[4,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%wide), index=0
  %x = f32[512,2048]{1,0:T(8,128)} get-tuple-element(%wide), index=1
  %w = bf16[4,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide), index=2
  %fusion.1 = f32[128,2048]{1,0:T(8,128)S(1)} fusion(%x), kind=kCustom, \
calls=%all-reduce-scatter.1
  %fusion.2 = (f32[4]{0:T(128)}, bf16[64,512]{1,0:T(8,128)(2,1)S(1)}) fusion(%w), \
kind=kOutput, calls=%async_collective_fusion.1
  %fusion.3 = bf16[64,512]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, \
calls=%async_collective_fusion.2
  ROOT %next = (s32[]{:T(128)}, f32[512,2048]{1,0:T(8,128)}, \
bf16[4,512]{1,0:T(8,128)(2,1)S(1)}) tuple(%i, %x, %w)
}

%condition (wide.1: (s32[], f32[512,2048], bf16[4,512])) -> pred[] {
  %trips = s32[]{:T(128)} constant(6)
  %wide.1 = (s32[]{:T(128)}, f32[512,2048]{1,0:T(8,128)}, \
bf16[4,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%wide.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %trips), direction=LT
}

ENTRY %main (p: (s32[], f32[512,2048], bf16[4,512])) -> f32[] {
  %p = (s32[]{:T(128)}, f32[512,2048]{1,0:T(8,128)}, \
bf16[4,512]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %while.1 = (s32[]{:T(128)}, f32[512,2048]{1,0:T(8,128)}, \
bf16[4,512]{1,0:T(8,128)(2,1)S(1)}) while(%p), condition=%condition, body=%body
  %i.1 = f32[]{:T(128)} constant(0)
  ROOT %all-reduce.9 = f32[]{:T(128)} all-reduce(%i.1), channel_id=1, \
replica_groups=mesh['data'=4,'fsdp'=4] {'data'}, to_apply=%add
}
"""


def test_the_syntax_of_a_tpu_is_read():
    # As libtpu 0.0.50 writes it: tilings in the types, no trip counts, one gather in
    # two kernels under one channel, an all-reduce that keeps only a slice.
    found = {c.kind: c for c in collectives(TPU_HLO)}
    assert set(found) == {"reduce-scatter", "all-gather", "all-reduce"}
    scatter = found["reduce-scatter"]
    assert (scatter.count, scatter.bytes) == (6, 6 * 512 * 2048 * 4)
    assert scatter.group == (0, 1, 2, 3)
    gather = found["all-gather"]
    assert (gather.count, gather.bytes, gather.group_size) == (6, 6 * 64 * 512 * 2, 16)
    assert found["all-reduce"].group == (0, 4, 8, 12)


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("{}", tuple(range(16))),
        ("[4,4]<=[16]", (0, 1, 2, 3)),
        ("[8,2]<=[2,8]T(1,0)", (0, 8)),
        ("mesh['a'=2,'b'=8] {'b'}", tuple(range(8))),
        ("mesh['a'=2,'b'=8] {'a','b'}", tuple(range(16))),
        ("mesh['a'=2,'b'=8] {'b':(1)2}", (0, 4)),
        ("mesh['a'=2,'b'=8] {'b':(2)4}", (0, 1, 2, 3)),
        ("mesh['a'=2,'b'=8], device_ids=([8,2]T(1,0)) {'a'}", (0, 8)),
    ],
)
def test_groups_are_read_in_every_notation(written, group):
    text = TPU_HLO.replace("mesh['data'=4,'fsdp'=4] {'data'}", written)
    found = {c.kind: c for c in collectives(text)}
    assert found["all-reduce"].group == group


def test_traffic_leaves_out_a_tpus_vector_memory():
    moved = traffic(TPU_HLO)
    # Each trip reads 512 x 2048 numbers and writes 4; all else is in vector memory,
    # but for the scalar of the last all-reduce.
    assert moved.bytes == 6 * (512 * 2048 * 4 + 4 * 4) + 8
    assert moved.unknown == ()


def test_traffic_is_the_compilers_where_there_is_no_loop():
    def f(a, b):
        return jnp.sum(jnp.sin(a @ b), axis=1)

    a, b = jnp.ones((256, 512)), jnp.ones((512, 128))
    program = compiled(f, a, b)
    expected = program.cost_analysis()["bytes accessed"]
    assert traffic(program.as_text()).bytes == pytest.approx(expected, rel=0.05)


def test_traffic_counts_loops_and_of_slices_the_slice():
    def f(rows):
        return lax.scan(lambda c, row: (c + jnp.sin(row), c), jnp.ones(1000), rows)

    rows = jnp.ones((50, 1000))
    moved = traffic(compiled(f, rows).as_text()).bytes
    # A row read, a row written, the carry read and written: not 50 x all rows.
    assert 4 * 50 * 1000 * 4 <= moved <= 10 * 50 * 1000 * 4


NESTED_HLO = """\
HloModule jit_f, is_scheduled=true, num_partitions=1

%view (input: f32[64,64]) -> f32[4096] {
  %input = f32[64,64]{1,0:T(8,128)} parameter(0)
  ROOT %bitcast.1 = f32[4096]{0:T(1024)} bitcast(%input)
}

%kernel (param_0: f32[64,64], param_1: f32[9,4096], param_2: f32[9,4096]) -> \
f32[9,4096] {
  %param_0 = f32[64,64]{1,0:T(8,128)} parameter(0)
  %param_1 = f32[9,4096]{1,0:T(8,128)} parameter(1)
  %param_2 = f32[9,4096]{1,0:T(8,128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %flat = f32[4096]{0:T(1024)} fusion(%param_0), kind=kLoop, calls=%view
  %sine = f32[4096]{0:T(1024)} sine(%flat)
  %row = f32[1,4096]{1,0:T(8,128)} dynamic-slice(%param_1, %zero, %zero), \
dynamic_slice_sizes={1,4096}
  %wide = f32[1,4096]{1,0:T(8,128)} reshape(%sine)
  %sum = f32[1,4096]{1,0:T(8,128)} add(%row, %wide)
  ROOT %update = f32[9,4096]{1,0:T(8,128)} dynamic-update-slice(%param_2, %sum, \
%zero, %zero)
}

ENTRY %main (a: f32[64,64], b: f32[9,4096], c: f32[9,4096]) -> f32[9,4096] {
  %a = f32[64,64]{1,0:T(8,128)} parameter(0)
  %b = f32[9,4096]{1,0:T(8,128)} parameter(1)
  %c = f32[9,4096]{1,0:T(8,128)} parameter(2)
  %new = f32[9,4096]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %start = ((f32[64,64], f32[9,4096], f32[9,4096]), f32[9,4096]{1,0:T(8,128)}, u32[]) \
fusion-start(%a, %b, %c), kind=kLoop, calls=%kernel
  ROOT %done = f32[9,4096]{1,0:T(8,128)} fusion-done(%start)
}
"""


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_kernel_moves_what_it_looks_at_and_what_it_changes(asynchronous):
    text = NESTED_HLO
    if not asynchronous:
        kept = [line for line in text.splitlines() if "%done" not in line]
        text = "\n".join(kept).replace("fusion-start", "fusion")
        old = (
            "((f32[64,64], f32[9,4096], f32[9,4096]), f32[9,4096]{1,0:T(8,128)}, u32[])"
        )
        text = text.replace(old, "f32[9,4096]{1,0:T(8,128)}")
    # All of a, also through the view in a kernel of its own; a row of b; the row of c
    # that is written, for the rest of c stays where it is.
    assert traffic(text).bytes == 3 * 4096 * 4
