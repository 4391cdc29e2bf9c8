"""The TPU kernels, interpreted and lowered on a CPU, against the definition."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import SEED, SINKS, definition, far, ids, inputs, mask
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from running import QUICKLY
from stages import heads_first

from pallas_kernels.attention import pallas_tpu as tpu
from pallas_kernels.attention import ref
from pallas_kernels.attention.pattern import Extras, Pattern, allowed
from pallas_kernels.attention.tiles import ranges, sides
from pallas_kernels.attention.tpu_tiles import tiling

TILE = (128, 128)
PLAIN = Pattern(0.3, right=0)


def both(pattern, extras, arrays, *, interpret: Any = True):
    """out, lse, dq, dk, dv and d_sinks: of the kernels, and of the definition."""
    pattern = pattern._replace(tile=TILE)

    @QUICKLY
    def kernels(q, k, v, d_out, d_lse, extras):
        out, lse = tpu.forward(pattern, q, k, v, extras, interpret=interpret)
        *gradients, d_bias, d_sinks = tpu.backward(
            pattern, q, k, v, extras, out, lse, d_out, d_lse,
            interpret=interpret,
        )  # fmt: skip
        assert d_bias is None
        return out, lse, *gradients, d_sinks

    q, k, v, *_ = arrays
    assert tpu.unsupported(pattern, q, k, v, extras) is None
    return kernels(*arrays, extras), definition(pattern, *arrays, extras)


def assert_equal(pattern, extras, arrays, tolerance=1e-5, **knobs):
    actual, expected = both(pattern, extras, arrays, **knobs)
    names = ("out", "lse", "dq", "dk", "dv", "d_sinks")
    for name, a, b in zip(names, actual, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert far(a, b) < tolerance, name


CASES = {
    "causal, grouped": (Pattern(0.3, right=0), Extras(), (2, 1, 2, 300, 300, 8)),
    "two-sided window": (Pattern(0.3, 40, 30), Extras(), (1, 2, 1, 300, 333, 8)),
    "decoding": (Pattern(0.3), Extras(), (2, 1, 2, 1, 130, 8)),
    "one pair": (Pattern(0.3), Extras(), (1, 1, 1, 1, 1, 1)),
    "blind rows": (Pattern(0.3, -20, 200), Extras(), (1, 1, 1, 150, 100, 8)),
    "blind, but for sinks": (
        Pattern(0.3, right=-50), Extras(sinks=SINKS), (1, 2, 2, 140, 150, 8)
    ),
    "softcap": (Pattern(0.7, softcap=2.0), Extras(), (1, 1, 1, 130, 130, 8)),
    "ids": (
        Pattern(0.3, right=0),
        Extras(query_ids=(i := ids(2, 1, 1, 300)), key_ids=i[:, :, 0]),
        (2, 2, 1, 300, 300, 8),
    ),
    "ids of heads, any order": (
        Pattern(0.3),
        Extras(query_ids=ids(1, 2, 2, 140)[..., ::-1], key_ids=ids(1, 2, 150)),
        (2, 2, 2, 140, 150, 8),
    ),
    "mask": (
        Pattern(0.3), Extras(mask=mask(2, 1, 2, 140, 150)), (2, 2, 2, 140, 150, 8)
    ),
    "mask of keys": (
        Pattern(0.3, 99), Extras(mask=mask(2, 1, 1, 1, 150)), (2, 1, 1, 140, 150, 8)
    ),
    "mask of queries": (
        Pattern(0.3), Extras(mask=mask(1, 2, 1, 140, 1)), (1, 2, 1, 140, 150, 8)
    ),
    "mask of heads": (
        Pattern(0.3),
        Extras(mask=jnp.array([True, False]).reshape(1, 2, 1, 1, 1)),
        (1, 2, 1, 40, 30, 8),
    ),
    "dropout": (
        Pattern(0.3, right=0, drop=0.3), Extras(seed=SEED), (2, 1, 2, 140, 140, 8)
    ),
    "all": (
        Pattern(0.5, 100, 20, softcap=3.0, drop=0.2),
        Extras(
            None, SINKS, mask(1, 1, 1, 1, 150), ids(1, 2, 2, 140), ids(1, 2, 150), SEED
        ),
        (2, 2, 2, 140, 150, 8),
    ),
}  # fmt: skip


def stage(name, describe):
    """Marks a test as a case of a stage of these kernels."""
    return pytest.mark.stage("attention", "pallas_tpu", name, describe)


def described(name: str, dtype: str = "float32") -> str:
    return f"{name}: {heads_first(CASES[name][2], dtype)}"


@stage("interpreted", described)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_definition(name):
    pattern, extras, shape = CASES[name]
    assert_equal(pattern, extras, inputs(shape))


@stage("oracle", lambda: f"causal: {heads_first((1, 1, 1, 150, 150, 16))}")
def test_equals_float64():
    pattern, (q, k, v, d_out, d_lse) = (
        Pattern(0.4, right=0),
        inputs((1, 1, 1, 150, 150, 16)),
    )
    actual, _ = both(pattern, Extras(), (q, k, v, d_out, d_lse))
    q, k, v, g, d_lse = (
        np.asarray(x, np.float64)[0, 0] for x in (q, k, v, d_out, d_lse)
    )
    q, g, d_lse = q[0], g[0], d_lse[0]
    logits = np.where(np.tri(150, dtype=bool), 0.4 * q @ k.T, -np.inf)
    lse = np.log(np.exp(logits).sum(1))
    weights = np.exp(logits - lse[:, None])
    out = weights @ v
    d_logits = weights * (g @ v.T - ((g * out).sum(1) - d_lse)[:, None])
    expected = (out, lse, 0.4 * d_logits @ k, 0.4 * d_logits.T @ q, weights.T @ g)
    for a, b in zip(actual[:5], expected, strict=True):
        assert far(np.asarray(a).reshape(b.shape), b) < 1e-5


@stage("interpreted", functools.partial(described, dtype="bfloat16"))
@pytest.mark.parametrize("name", ["causal, grouped", "all"])
def test_bfloat16(name):
    pattern, extras, shape = CASES[name]
    assert_equal(pattern, extras, inputs(shape, jnp.bfloat16), 1e-2)


def test_no_gradient_of_the_log_sum_is_a_gradient_of_zero():
    pattern = Pattern(0.3, right=0)
    q, k, v, d_out, d_lse = inputs((1, 1, 1, 40, 40, 8))
    out, lse = ref.attend(pattern, q, k, v, Extras())
    results = [
        tpu.backward(pattern, q, k, v, Extras(), out, lse, d_out, x, interpret=True)
        for x in (None, jnp.zeros_like(d_lse))
    ]
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_tiles_of_other_documents_are_not_computed():
    """A product with NaN is NaN, whatever its weight: it must not be made."""
    of = jnp.repeat(jnp.arange(3, dtype=jnp.int32), 128)[None, None]
    extras = Extras(query_ids=of[:, :, None], key_ids=of)
    q, k, v, d_out, d_lse = inputs((1, 1, 1, 384, 384, 8))
    v = v.at[:, :, 128:256].set(jnp.nan)
    (out, _, dq, dk, dv, _), _ = both(Pattern(0.3), extras, (q, k, v, d_out, d_lse))
    for x in (out, dq):
        finite = np.isfinite(np.asarray(x)).all((0, 1, 2, 4)).reshape(3, 128)
        np.testing.assert_array_equal(finite.all(1), [True, False, True])
    finite = np.isfinite(np.asarray(dk)).all((0, 1, 3)).reshape(3, 128)
    np.testing.assert_array_equal(finite.all(1), [True, False, True])
    assert np.isfinite(np.asarray(dv)).all()


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_ranges_hold_every_pair_that_counts(name, by_keys):
    pattern, extras, (_, _, _, queries, keys, _) = CASES[name]
    q, k, *_ = inputs((1, 1, 1, queries, keys, 1))
    tiles = tiling(pattern, q, k, (32, 128))
    low, high, shape, steps = ranges(tiles, sides(tiles, extras), by_keys)
    low, high = (np.asarray(x).reshape(shape) for x in (low, high))
    assert np.max(high - low) < steps
    of_queries, of_keys = extras.query_ids, extras.key_ids
    counts = allowed(
        pattern,
        jnp.arange(queries).reshape(1, 1, 1, -1, 1),
        jnp.arange(keys).reshape(1, 1, 1, 1, -1),
        mask=extras.mask,
        query_ids=None if of_queries is None else of_queries[..., None],
        key_ids=None if of_keys is None else of_keys[:, :, None, None],
    )  # fmt: skip
    counts = np.ones((1, 1, 1, queries, keys), bool) if counts is None else counts
    places = np.argwhere(np.asarray(counts)) // np.array([1, 1, 1, 32, 128])
    for b, head, g, i, j in np.unique(places, axis=0):
        own, other = (j, i) if by_keys else (i, j)
        at = tuple(min(x, n - 1) for x, n in zip((b, head, g), shape[:3], strict=True))
        assert low[*at, own] <= other <= high[*at, own]


def test_a_window_takes_as_many_steps_as_it_is_wide():
    q, k, *_ = inputs((1, 1, 1, 1024, 1024, 1))
    tiles = tiling(Pattern(1.0, 128, 0), q, k, TILE)
    for by_keys in (False, True):
        assert ranges(tiles, sides(tiles, Extras()), by_keys)[3] == 2


def races() -> bool:
    """Older versions of jax print races and do not raise."""
    module = "jax._src.pallas.mosaic.interpret.interpret_pallas_call"
    return bool(getattr(importlib.import_module(module).races, "races_found", False))


RACED = (1, 2, 2, 140, 150, 8)


@stage("simulated", lambda name: f"{name}: {heads_first(RACED)}")
@pytest.mark.parametrize("name", ["causal, grouped", "all"])
def test_no_races_and_nothing_read_before_it_is_written(name):
    pattern, extras, _ = CASES[name]
    interpret = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    try:
        assert_equal(pattern, extras, inputs(RACED), interpret=interpret)
        assert not races()
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def lowered(pattern, extras, shape, dtype, **knobs):
    def gradient(q, k, v, d_out, d_lse, extras):
        out, lse = tpu.forward(pattern, q, k, v, extras, **knobs)
        return tpu.backward(pattern, q, k, v, extras, out, lse, d_out, d_lse, **knobs)

    arrays = jax.eval_shape(lambda: inputs(shape, dtype))
    traced = jax.jit(gradient).trace(*arrays, extras)
    return traced.lower(lowering_platforms=("tpu",)).as_text()


def causal_of_width(dtype: Any, width: int) -> str:
    return f"causal: {heads_first((1, 1, 2, 2048, 2048, width), dtype)}"


@stage("lowered", causal_of_width)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lowers_for_tpu(dtype, width):
    text = lowered(Pattern(0.1, right=0), Extras(), (1, 1, 2, 2048, 2048, width), dtype)
    assert text.count("tpu_custom_call") == 3


@stage("lowered", functools.partial(described, dtype="bfloat16"))
@pytest.mark.parametrize("name", CASES)
def test_everything_lowers_for_tpu(name):
    pattern, extras, shape = CASES[name]
    text = lowered(pattern, extras, shape, jnp.bfloat16)
    assert text.count("tpu_custom_call") == 3


def test_inside_shard_map():
    """Where arrays are split over batch rows, types of varying axes are right too."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    q, k, v, d_out, _ = inputs((2, 1, 2, 40, 40, 8))

    def both_passes(q, k, v, d_out):
        out, lse = tpu.forward(PLAIN, q, k, v, Extras(), interpret=True)
        return tpu.backward(
            PLAIN, q, k, v, Extras(), out, lse, d_out, None, interpret=True
        )[:3]

    split = jax.shard_map(
        both_passes, mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    expected = QUICKLY(both_passes)(q, k, v, d_out)
    for a, b in zip(QUICKLY(split)(q, k, v, d_out), expected, strict=True):
        assert far(a, b) < 1e-6


def test_vmap_over_arrays_and_ids():
    q, k, v, *_ = inputs((3, 1, 1, 140, 140, 8))
    of = ids(3, 1, 1, 140)

    def attend(q, k, v, of):
        extras = Extras(query_ids=of[None], key_ids=of[:, 0][None])
        q, k, v = q[None], k[None], v[None]
        return tpu.forward(PLAIN, q, k, v, extras, interpret=True)[0][0]

    extras = Extras(query_ids=of, key_ids=of[:, :, 0])
    expected, _ = ref.attend(PLAIN, q, k, v, extras)
    assert far(QUICKLY(jax.vmap(attend))(q, k, v, of), expected) < 1e-5


def test_what_it_cannot_do_is_said_in_a_sentence():
    q, k, v, *_ = inputs((1, 1, 1, 8, 8, 8))
    half = [x.astype(jnp.float16) for x in (q, k, v)]
    bias = Extras(bias=jnp.zeros((1, 1, 1, 8, 8)))
    for (a, b, c), extras, word in (
        (half, Extras(), "float16"),
        ((q.astype(jnp.bfloat16), k, v), Extras(), "one dtype"),
        ((q, k, v), bias, "bias"),
        ((q[..., :0], k[..., :0], v[..., :0]), Extras(), "empty"),
        ([jnp.concatenate([x] * 65, -1) for x in (q, k, v)], Extras(), "520"),
    ):
        assert word in (tpu.unsupported(PLAIN, a, b, c, extras) or "")
    assert tpu.unsupported(PLAIN, q, k, v, Extras()) is None
    assert "128" in (
        tpu.unsupported(PLAIN._replace(tile=(128, 64)), q, k, v, Extras()) or ""
    )
