"""The loss and its gradients in float64, the ring over devices, and its memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from jaxzoo.ssl.siglip import siglip_loss

RNG = np.random.default_rng(0)
IMAGE, TEXT = RNG.normal(size=(2, 16, 8)).astype(np.float32) / 8**0.5
SCALE, BIAS = jnp.float32(0.7), jnp.float32(-1.5)
IDS = np.arange(16) // 3


def by_the_paper(image, text, log_scale, bias, labels=None):
    """Algorithm 1 in float64: value and the gradients of all four arguments."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    n, scale = len(image), np.exp(np.float64(log_scale))
    labels = 2 * np.eye(n) - 1 if labels is None else labels
    products = image @ text.T
    logits = scale * products + np.float64(bias)
    value = np.logaddexp(0, -labels * logits).sum() / n
    slope = -labels / (1 + np.exp(labels * logits)) / n
    of_scale = (slope * products).sum() * scale
    return value, (
        slope @ text * scale, slope.T @ image * scale, of_scale, slope.sum()
    )  # fmt: skip


def value_and_grad(*args: Any, **knobs: Any) -> Any:
    def loss(image, text, log_scale, bias):
        return siglip_loss(image, text, log_scale=log_scale, bias=bias, **knobs)[0]

    return jax.value_and_grad(loss, (0, 1, 2, 3))(*map(jnp.asarray, args))


def assert_same(actual, expected, rtol=1e-5):
    def one(a, b):
        assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())

    jax.tree.map(one, actual, expected)


@pytest.mark.parametrize("chunk", [None, 16, 4, 1])
@pytest.mark.parametrize("log_scale, bias", [(0.7, -1.5), (np.log(10), -10), (3, 2)])
def test_value_and_gradients_are_the_papers(chunk, log_scale, bias):
    args = (IMAGE, TEXT, np.float32(log_scale), np.float32(bias))
    assert_same(value_and_grad(*args, chunk=chunk), by_the_paper(*args))


@pytest.mark.parametrize("chunk", [None, 4])
def test_several_positives_per_row(chunk):
    labels = np.where(IDS[:, None] == IDS[None], 1, -1)
    args = (IMAGE, TEXT, SCALE, BIAS)
    expected = by_the_paper(*args, labels)
    assert_same(value_and_grad(*args, positives=IDS, chunk=chunk), expected)
    # With a number of its own for each row it is the plain loss.
    alone = value_and_grad(*args, positives=np.arange(16), chunk=chunk)
    assert_same(alone, by_the_paper(*args))


def test_terms_add_up():
    loss, aux = siglip_loss(IMAGE, TEXT, log_scale=SCALE, bias=BIAS)
    own = np.exp(SCALE) * (IMAGE * TEXT).sum(-1) + BIAS
    assert_allclose(aux["own_pairs"], np.logaddexp(0, -own).mean(), rtol=1e-5)
    assert_allclose(aux["own_pairs"] + aux["other_pairs"], loss, rtol=1e-6)


def test_masked_pairs_are_left_out_on_both_sides():
    keep = np.arange(16) % 3 > 0
    expected, wanted = by_the_paper(IMAGE[keep], TEXT[keep], SCALE, BIAS)
    spoilt = [np.where(keep[:, None], x, np.nan) for x in (IMAGE, TEXT)]
    plans: list[Any] = [{}, {"positives": np.arange(16)}]
    for more in plans:
        value, got = value_and_grad(*spoilt, SCALE, BIAS, where=keep, **more)
        assert_allclose(value, expected, rtol=1e-5)
        assert_same((got[0][keep], got[1][keep], *got[2:]), wanted)
        assert np.all(np.asarray(got[0])[~keep] == 0)
        assert np.all(np.asarray(got[1])[~keep] == 0)


def test_a_bias_of_minus_ten_begins_lower():
    rows = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (IMAGE, TEXT)]
    at = {
        bias: float(siglip_loss(*rows, log_scale=np.log(10.0), bias=bias)[0])
        for bias in (0.0, -10.0)
    }
    assert at[-10.0] < at[0.0]


def test_saturated_logits_and_zero_vectors():
    """A pair that is right beyond doubt costs nothing, one that is wrong its logit."""
    loss, aux = siglip_loss(jnp.eye(2), jnp.eye(2), log_scale=5.0, bias=-50.0)
    assert_allclose(loss, 0.0, atol=1e-5)
    wrong, _ = siglip_loss(jnp.eye(2), -jnp.eye(2), log_scale=5.0, bias=-50.0)
    assert_allclose(wrong, np.exp(5) + 50, rtol=1e-6)
    zeros = np.zeros((4, 3), np.float32)
    assert_same(value_and_grad(zeros, zeros, SCALE, BIAS),
                by_the_paper(zeros, zeros, SCALE, BIAS))  # fmt: skip


def test_batch_of_one_is_one_question():
    args = (IMAGE[:1], TEXT[:1], SCALE, BIAS)
    assert_same(value_and_grad(*args), by_the_paper(*args))


def test_small_floats_are_summed_in_float32():
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in (IMAGE, TEXT))
    value, got = value_and_grad(image, text, SCALE, BIAS)
    assert value.dtype == jnp.float32 and got[0].dtype == jnp.bfloat16
    expected, _ = by_the_paper(
        np.asarray(image, np.float32), np.asarray(text, np.float32), SCALE, BIAS
    )
    assert_allclose(value, expected, rtol=1e-5)


def test_all_rows_masked_is_zero():
    nothing = np.zeros(16, bool)
    value, got = value_and_grad(IMAGE, TEXT, SCALE, BIAS, where=nothing)
    assert value == 0 and all(np.all(np.asarray(g) == 0) for g in got)


# Over devices.


def over(devices, function, check_vma=True):
    """The value and gradients of a loss inside shard_map, its rows split."""
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    rows: Any = P("d")
    specs = (rows, rows, P(), P())
    mapped = jax.shard_map(
        jax.value_and_grad(function, (0, 1, 2, 3)), mesh=mesh, in_specs=specs,
        out_specs=(P(), specs), check_vma=check_vma,
    )  # fmt: skip
    return jax.jit(mapped)


def ring(chunk=None, **knobs):
    def loss(image, text, log_scale, bias):
        knobs.update(log_scale=log_scale, bias=bias, axis_name="d", chunk=chunk)
        return siglip_loss(image, text, **knobs)[0]

    return loss


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_ring_is_the_whole(devices, chunk):
    args = (IMAGE, TEXT, SCALE, BIAS)
    assert_same(over(devices, ring(chunk))(*args), by_the_paper(*args))


def gathered(image, text, log_scale, bias):
    texts = lax.all_gather(text, "d", tiled=True)
    logits = jnp.exp(log_scale) * image @ texts.T + bias
    own = jnp.arange(len(image)) + lax.axis_index("d") * len(image)
    labels = 2.0 * jax.nn.one_hot(own, len(texts)) - 1.0
    return -lax.psum(jnp.sum(jax.nn.log_sigmoid(labels * logits)), "d") / len(texts)


def temporary(devices, loss, rows, width) -> int:
    """Bytes of temporary memory of one device, compiled and not run."""
    x = jax.ShapeDtypeStruct((devices * rows, width), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    compiled = over(devices, loss).lower(x, x, scalar, scalar).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_memory_does_not_grow_with_devices():
    rows, width = 256, 32
    tile = 4 * rows * rows
    sizes = {n: temporary(n, ring(), rows, width) for n in (1, 2, 4, 8)}
    assert max(sizes.values()) < 4.1 * tile
    assert sizes[8] <= 1.01 * sizes[2]
    chunked = {n: temporary(n, ring(32), rows, width) for n in (1, 2, 4, 8)}
    assert max(chunked.values()) < tile
    assert chunked[8] <= 1.01 * chunked[2]
    # For contrast: gathered texts need a row of logits per global text.
    assert temporary(8, gathered, rows, width) > 8 * tile


def test_memory_is_at_most_five_shards_and_linear_in_the_batch():
    sizes = {rows: temporary(8, ring(64), rows, 512) for rows in (1024, 4096)}
    for rows, size in sizes.items():
        assert size < 5 * 4 * rows * 512
    assert sizes[4096] < 4.1 * sizes[1024]


def test_bad_input_is_named():
    knobs: Any = {"log_scale": 0.0, "bias": 0.0}
    with pytest.raises(TypeError, match="'text' is float32.15,8., expected .*batch=16"):
        siglip_loss(IMAGE, TEXT[:15], **knobs)
    with pytest.raises(TypeError, match="'text' is float32.16,7., expected .*width=8"):
        siglip_loss(IMAGE, TEXT[:, :7], **knobs)
    with pytest.raises(ValueError, match="'chunk' is 5, expected a divisor of 16"):
        siglip_loss(IMAGE, TEXT, **knobs, chunk=5)
    with pytest.raises(ValueError, match="'log_scale' is nan"):
        siglip_loss(IMAGE, TEXT, log_scale=float("nan"), bias=0.0)
    with pytest.raises(ValueError, match="'axis_name' is 'rows', expected None"):
        siglip_loss(IMAGE, TEXT, **knobs, axis_name="rows")
    with pytest.raises(ValueError, match="'axis_name' is 'rows', expected None"):
        over(2, lambda x, t, s, b: siglip_loss(
            x, t, log_scale=s, bias=b, axis_name="rows")[0]
        )(IMAGE, TEXT, SCALE, BIAS)  # fmt: skip
