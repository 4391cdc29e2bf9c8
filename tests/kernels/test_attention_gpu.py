"""The GPU kernels on a CPU: in the simulator, against the definition, and lowered."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import SEED, SINKS, definition, far, ids, inputs, mask
from hopper import lowered
from running import QUICKLY
from stages import heads_first

from pallas_kernels import attention as package
from pallas_kernels import mosaic_gpu
from pallas_kernels.attention import attention, fold, gpu_tiles, ref
from pallas_kernels.attention import pallas_gpu as gpu
from pallas_kernels.attention.pattern import Extras, Pattern, allowed
from pallas_kernels.attention.tiles import Tiling

NEW = pytest.mark.skipif(
    mosaic_gpu.unavailable() is not None, reason=mosaic_gpu.unavailable() or ""
)


CASES = {
    "causal, grouped, three blocks": (
        Pattern(0.3, right=0), Extras(), (1, 1, 2, 300, 270, 64)
    ),
    "window, width 128": (Pattern(0.1, 40, 30), Extras(), (1, 2, 1, 150, 203, 100)),
    "width 256": (Pattern(0.1, right=0), Extras(), (1, 1, 1, 70, 130, 256)),
    "softcap, mask of keys": (
        Pattern(0.7, softcap=2.0),
        Extras(mask=mask(2, 1, 1, 1, 150)),
        (2, 1, 1, 40, 150, 64),
    ),
    "mask of queries": (
        Pattern(0.3), Extras(mask=mask(1, 2, 1, 40, 1)), (1, 2, 1, 40, 60, 64)
    ),
    "blind, but for sinks": (
        Pattern(0.3, right=-50), Extras(sinks=SINKS), (1, 2, 2, 140, 50, 64)
    ),
    "one pair": (Pattern(0.3), Extras(), (1, 1, 1, 1, 1, 1)),
    "all": (
        Pattern(0.5, 100, 20, softcap=3.0, drop=0.2),
        Extras(
            None, SINKS, mask(1, 1, 1, 1, 150), ids(1, 2, 2, 140), ids(1, 2, 150), SEED
        ),
        (2, 2, 2, 140, 150, 64),
    ),
}  # fmt: skip


def stage(name, describe):
    """Marks a test as a case of a stage of these kernels."""
    return pytest.mark.stage("attention", "pallas_gpu", name, describe)


@NEW
@stage("simulated", lambda name: f"{name}: {heads_first(CASES[name][2], jnp.bfloat16)}")
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition_and_no_thread_races(name):
    pattern, extras, shape = CASES[name]
    arrays = inputs(shape, jnp.bfloat16)
    q, k, v, *_ = arrays
    assert gpu.unsupported(pattern, q, k, v, extras) is None
    simulated = mosaic_gpu.simulator()

    @QUICKLY
    def kernels(q, k, v, d_out, d_lse, extras):
        out, lse = gpu.forward(pattern, q, k, v, extras, interpret=simulated)
        *gradients, d_bias, d_sinks = gpu.backward(
            pattern, q, k, v, extras, out, lse, d_out, d_lse, interpret=simulated
        )
        assert d_bias is None
        return out, lse, *gradients, d_sinks

    with mosaic_gpu.simulation():
        actual = jax.block_until_ready(kernels(*arrays, extras))
    expected = definition(pattern, *arrays, extras)
    names = ("out", "lse", "dq", "dk", "dv", "d_sinks")
    for name, a, b in zip(names, actual, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert far(a, b) < (1e-5 if name == "lse" else 1e-2), name


@NEW
def test_a_missing_barrier_is_found(monkeypatch):
    """A reader that releases a block before it has read it."""
    q, k, v, *_ = inputs((1, 1, 1, 70, 400, 64), jnp.bfloat16)
    take = mosaic_gpu.Ring.take

    release = mosaic_gpu.Ring.release

    def hasty(self, step):
        buffers = take(self, step)
        release(self, step)
        return buffers

    monkeypatch.setattr(mosaic_gpu.Ring, "take", hasty)
    monkeypatch.setattr(mosaic_gpu.Ring, "release", lambda self, step: None)
    simulated = mosaic_gpu.simulator()

    def run():
        with mosaic_gpu.simulation():
            out = gpu.forward(Pattern(0.3), q, k, v, Extras(), interpret=simulated)
            jax.block_until_ready(out)

    with pytest.raises(Exception, match="RACE DETECTED"):
        run()


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(1.0),
        Pattern(1.0, right=0),
        Pattern(1.0, 100, 0),
        Pattern(1.0, 300, 70),
        Pattern(1.0, -20, 200),
        Pattern(1.0, None, -50),
    ],
)
def test_tiles_without_a_mask_need_none_and_no_tile_is_left_out(pattern, by_keys):
    rows, columns = (64, 128) if by_keys else (128, 64)
    tiles = Tiling(pattern, 500, 430, (1, 1), rows, columns)
    how, beside = gpu_tiles.cut(tiles, Extras(), 64, by_keys=by_keys)
    counted = allowed(
        pattern, jnp.arange(512)[:, None], jnp.arange(512)[None], length=430
    )
    counted = np.ones((512, 512), bool) if counted is None else np.array(counted)
    counted[500:] = True  # rows of zeros, whose gradients are zero
    if by_keys:
        counted[:, 430:] = True  # columns that are not written
        counted = counted.T
    for block in range(how.blocks):
        own = block * how.own
        low = int(beside.first[block])
        high = max(low, int(beside.last[block]) + 1)
        at = gpu_tiles.Place(0, 0, 0, 0, own, jnp.int32(low), jnp.int32(high))
        visited = []
        for start, stop, is_masked in gpu_tiles.spans(how, at, False):
            visited += range(int(start), int(stop))
            for step in range(int(start), int(stop)):
                tile = counted[own : own + how.own, step * how.step :][:, : how.step]
                assert is_masked or tile.all()
        assert visited == list(range(low, high))


def test_vmap_makes_a_longer_batch():
    q, k, v, *_ = inputs((6, 2, 1, 9, 9, 4))
    stacked = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v)]
    of = ids(3, 1, 1, 1, 9)
    shapes = []

    def attend(q, k, v, extras):
        shapes.append(q.shape)
        return ref.attend(Pattern(0.3, right=0), q, k, v, extras)

    def one(q, k, v, of):
        extras = Extras(query_ids=of, key_ids=of[:, :, 0])
        return fold.folded(attend)(q, k, v, extras)

    together = jax.vmap(one, in_axes=(0, None, 0, 0))(
        stacked[0], stacked[1][0], stacked[2], of
    )
    assert shapes[-1] == q.shape
    for i in range(3):
        alone = one(stacked[0][i], stacked[1][0], stacked[2][i], of[i])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def test_vmap_over_dropout_and_sinks_is_a_loop_that_drops_the_same():
    q, k, v, *_ = inputs((4, 1, 2, 9, 9, 4))
    stacked = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v)]
    pattern = Pattern(0.3, drop=0.3)
    seeds = jnp.arange(4, dtype=jnp.uint32).reshape(2, 2)

    def one(q, k, v, seed):
        extras = Extras(sinks=SINKS[:1], seed=seed)
        return fold.folded(functools.partial(ref.attend, pattern))(q, k, v, extras)

    q, k, v = stacked
    together = jax.vmap(one)(q, k, v, seeds)
    for i in range(2):
        q, k, v = (x[i] for x in stacked)
        alone = one(q, k, v, seeds[i])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


def of_width(dtype: Any, width: int) -> str:
    return f"causal: {heads_first((1, 2, 2, 300, 300, width), dtype)}"


@NEW
@stage("lowered", of_width)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lowers_for_cuda_behind_the_same_call(dtype, width, monkeypatch, capsys):
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "hopper")
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    q = jax.ShapeDtypeStruct((1, 300, 4, width), dtype)
    k = jax.ShapeDtypeStruct((1, 300, 2, width), dtype)

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, is_causal=True).astype(jnp.float32))

    text = lowered(jax.grad(total, (0, 1, 2)), q, k, k)
    assert "attention: pallas_gpu (the fastest here)" in capsys.readouterr().err
    assert text.count("mosaic_gpu_v2") >= 3


@NEW
def test_inside_shard_map(monkeypatch):
    """The gradient's types say that it differs by device, as those of inputs do."""
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "hopper")
    q = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.bfloat16)

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, is_causal=True).astype(jnp.float32))

    text = lowered(jax.grad(total, (0, 1, 2)), q, q, q, devices=2)
    assert text.count("mosaic_gpu_v2") >= 3


def test_what_it_cannot_do_is_said_in_a_sentence(monkeypatch):
    q, k, v, *_ = inputs((1, 1, 1, 8, 8, 8), jnp.bfloat16)
    plain = Pattern(0.3)
    for (a, b, c), extras, word in (
        ([x.astype(jnp.float32) for x in (q, k, v)], Extras(), "float32"),
        ((q.astype(jnp.float16), k, v), Extras(), "one dtype"),
        ((q, k, v), Extras(bias=jnp.zeros((1, 1, 1, 8, 8))), "bias"),
        ((q, k, v), Extras(mask=mask(1, 1, 1, 8, 8)), "not of pairs"),
        ((q[..., :0], k[..., :0], v[..., :0]), Extras(), "empty"),
        ([jnp.concatenate([x] * 33, -1) for x in (q, k, v)], Extras(), "264"),
    ):
        assert word in (gpu.unsupported(plain, a, b, c, extras) or "")
    tiled = gpu.unsupported(plain._replace(tile=(64, 64)), q, k, v, Extras())
    assert "128" in (tiled or "")
    assert gpu.unsupported(plain, q, k, v, Extras()) == mosaic_gpu.unavailable()


def test_a_gpu_of_another_generation_gets_xla(monkeypatch, capsys):
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "gpu")
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    q = jnp.ones((1, 4, 1, 4), jnp.bfloat16)
    attention(q, q, q)
    said = capsys.readouterr().err
    assert said.startswith("attention: xla (there is no kernel for 'gpu')")
    with pytest.raises(NotImplementedError, match="'pallas_gpu', but the Hopper"):
        attention(q, q, q, implementation="pallas_gpu")
    assert set(package.KERNELS) <= set(package.IMPLEMENTATIONS)
