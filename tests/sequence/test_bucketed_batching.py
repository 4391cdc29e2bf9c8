"""Samplers, bins, search and cost against plain loops, and what buckets promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.sequence.bucketed_batching import (
    bucket_batches,
    bucket_bins,
    dynamic_batches,
    encdec_cost,
    fixed_batches,
    largest_batches,
    padding,
)

seeds = st.integers(0, 2**31 - 1)
COUNT = 60
of_padding, of_buckets = jax.jit(padding), jax.jit(bucket_batches)


def speech(seed, count=COUNT):
    rng = np.random.default_rng(seed)
    length = np.clip(rng.lognormal(4, 0.7, count), 5, 400).astype(np.int32)
    output = np.maximum(length * rng.lognormal(-2, 0.5, count), 1).astype(np.int32)
    return length, output


def members(batch):
    return [np.flatnonzero(batch == b) for b in np.unique(batch[batch >= 0])]


def assert_numbered(batch):
    used = np.unique(batch[batch >= 0])
    assert_array_equal(used, np.arange(len(used)))


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_padding_by_a_loop(seed):
    length, _ = speech(seed)
    batch = np.random.default_rng(seed).integers(-1, 9, COUNT).astype(np.int32)
    cost = of_padding(length, batch)
    real = padded = 0
    for rows in members(batch):
        real += length[rows].sum()
        padded += len(rows) * length[rows].max()
        assert cost["size"][batch[rows[0]]] == len(rows)
        assert cost["longest"][batch[rows[0]]] == length[rows].max()
    assert_allclose(cost["padding"], 1 - real / padded, rtol=1e-5)
    assert cost["batches"] == len(members(batch))
    assert_allclose(cost["mean_size"], (batch >= 0).sum() / len(members(batch)))


def test_padding_of_nothing_and_of_equal_lengths():
    nothing = padding(np.ones(4, np.int32), np.full(4, -1, np.int32))
    assert nothing["padding"] == nothing["batches"] == nothing["mean_size"] == 0
    assert padding(np.full(4, 7, np.int32), np.array([0, 0, 1, 1]))["padding"] == 0


def test_fixed_batches():
    length, _ = speech(0)
    batch = np.asarray(fixed_batches(jax.random.key(0), length, size=7))
    assert_numbered(batch)
    assert sorted(map(len, members(batch))) == [4, *[7] * 8]
    other = np.asarray(fixed_batches(jax.random.key(1), length, size=7))
    assert np.any(batch != other)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_dynamic_batches_by_a_loop(seed):
    length, _ = speech(seed)
    key = jax.random.key(seed)
    got = np.asarray(
        jax.jit(dynamic_batches, static_argnames="cap")(key, length, cap=300)
    )
    order = np.asarray(jax.random.permutation(key, COUNT))
    expected, number, rows = np.zeros(COUNT, int), 0, []
    for example in order:
        wider = [*rows, length[example]]
        if rows and len(wider) * max(wider) > 300:
            number, rows = number + 1, []
        rows.append(length[example])
        expected[example] = number
    assert_array_equal(got, expected)
    for rows in members(got):
        assert len(rows) == 1 or len(rows) * length[rows].max() <= 300


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_bins_by_a_loop(seed):
    length, output = speech(seed)

    def upper(values, parts):
        values = np.sort(values).astype(float)
        sums = np.cumsum(values)
        return [
            values[np.argmax(sums >= sums[-1] * part / parts * (1 - 1e-6))]
            for part in range(1, parts + 1)
        ]

    expected, low = [], -1
    for high in upper(length, 4):
        inside = output[(length > low) & (length <= high)]
        tokens = upper(inside, 3) if len(inside) else [0, 0, 0]
        expected += [(high, most) for most in tokens]
        low = high
    got = jax.jit(bucket_bins, static_argnames=("buckets", "sub_buckets"))(
        length, output, buckets=4, sub_buckets=3
    )
    assert_array_equal(got, expected)
    assert got[-1, 0] == length.max()


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_every_example_goes_into_the_first_bin_with_room(seed):
    length, output = speech(seed)
    bins = np.array([[40, 4], [40, 9], [90, 9], [90, 30], [300, 70]], np.int32)
    sizes = np.array([7, 5, 4, 0, 2], np.int32)
    batch = np.asarray(of_buckets(jax.random.key(seed), length, output, bins, sizes))
    assert_numbered(batch)
    wanted = np.full(COUNT, -1)
    for example in range(COUNT):
        for b, (frames, tokens) in enumerate(bins):
            if length[example] <= frames and output[example] <= tokens and sizes[b]:
                wanted[example] = b
                break
    assert_array_equal(batch < 0, wanted < 0)
    count = 0
    for b, size in enumerate(sizes):
        inside = np.flatnonzero(wanted == b)
        own = [rows for rows in members(batch) if wanted[rows[0]] == b]
        assert sorted(np.concatenate([*own, []]).astype(int)) == sorted(inside)
        assert all(len(rows) == size for rows in own[:-1])
        count += -(-len(inside) // size) if size else 0
    assert count == len(members(batch))


def test_members_of_a_bucket_are_drawn_anew():
    length, output = speech(3)
    bins, sizes = np.array([[400, 900]], np.int32), np.array([6], np.int32)
    drawn = [
        np.asarray(of_buckets(jax.random.key(k), length, output, bins, sizes))
        for k in (0, 1)
    ]
    assert np.any(drawn[0] != drawn[1])


@pytest.mark.parametrize("start", [1, 32, 5000])
@pytest.mark.parametrize("gap", [0.0, 0.05])
def test_search_finds_the_largest_batch(start, gap):
    bins = np.array([[10, 3], [77, 9], [400, 90], [10**6, 1], [1, 0]], np.int32)

    def memory(batch, frames, tokens):
        return batch * (3.0 * frames + 0.01 * frames**2.0 + 5.0 * tokens) + 100.0

    found = np.asarray(
        largest_batches(memory, bins, cap=5000.0, start=start, gap=gap, limit=1000)
    )
    f, t = bins.astype(float).T
    exact = np.minimum(np.floor(4900 / (3 * f + 0.01 * f**2 + 5 * t)), 1000)
    if gap == 0:
        assert_array_equal(found, exact)
    assert np.all(found <= exact) and np.all(found >= np.floor(exact / (1 + gap) - gap))


def test_search_asks_a_measurement():
    asked = []

    def measured(batch, frames, tokens):
        asked.append(int(batch))
        return np.float32(batch * (frames + tokens))

    def memory(*arrays):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.lax.map(lambda x: jax.pure_callback(measured, shape, *x), arrays)

    bins = jnp.array([[10, 3], [77, 9]])
    assert largest_batches(memory, bins, cap=1000.0).tolist() == [76, 11]
    assert len(asked) < 40


def test_two_dimensions_pad_less_than_one_and_that_less_than_none():
    length, output = speech(5, 4000)
    key = jax.random.key(0)
    one = bucket_bins(length, output, buckets=12)
    two = bucket_bins(length, output, buckets=12, sub_buckets=3)
    found = {"none": fixed_batches(key, length, size=16)}
    for name, bins in (("one", one), ("two", two)):
        sizes = np.full(len(bins), 16, np.int32)
        found[name] = of_buckets(key, length, output, bins, sizes)
        assert np.all(found[name] >= 0)
    frames = {name: float(padding(length, b)["padding"]) for name, b in found.items()}
    tokens = {name: float(padding(output, b)["padding"]) for name, b in found.items()}
    assert frames["one"] < 0.3 * frames["none"]
    assert tokens["two"] < 0.7 * tokens["one"] < tokens["none"]


def test_cost_by_hand():
    d, t, u = 64.0, 50.0, 20.0
    knobs = {"encoder_layers": 3, "decoder_layers": 2, "width": 64, "batch": 4}
    length, output = np.array([50]), np.array([20])
    cost = encdec_cost(length, output, **knobs, rate=1e9, bandwidth=1e3)
    encoder = 3 * (2 * t * (4 * d * d + 8 * d * d) + 2 * 2 * t * t * d) / 1e9
    read = 2 * u * 2 * (4 * d * d + 2 * d * d + 8 * d * d) / 1e3 / 4
    memory = 2 * 2 * t * 2 * d * d / 1e9
    assert_allclose(cost["encoder"], encoder, rtol=1e-5)
    assert_allclose(cost["decoder"], read + memory, rtol=1e-5)
    busy = encdec_cost(length, output, **knobs, rate=1e9, bandwidth=1e15)
    steps = [2 * (2 * 14 * d * d + 4 * d * (t + i + 0.5)) for i in range(20)]
    assert_allclose(busy["decoder"], sum(steps) / 1e9 + memory, rtol=1e-5)


def test_a_layer_in_the_decoder_costs_more_than_in_the_encoder():
    length, output = np.array([125]), np.array([40])
    moved = [
        encdec_cost(length, output, encoder_layers=24 + n, decoder_layers=24 - n)
        for n in (0, 10, 20)
    ]
    seconds = [float(cost["seconds"][0]) for cost in moved]
    assert seconds[0] > seconds[1] > seconds[2]
    assert_allclose(moved[0]["decoder"], 6 * moved[2]["decoder"], rtol=1e-5)


def test_bad_arguments_are_named():
    length, output = speech(0)
    key, bins = jax.random.key(0), np.ones((3, 2), np.int32)
    with pytest.raises(ValueError, match="argument 'size' is 0"):
        fixed_batches(key, length, size=0)
    with pytest.raises(TypeError, match=r"argument 'batch' is int32\[59\]"):
        padding(length, length[1:])
    with pytest.raises(TypeError, match=r"argument 'sizes' is int32\[2\]"):
        bucket_batches(key, length, output, bins, np.ones(2, np.int32))
    with pytest.raises(ValueError, match="argument 'cap' is nan"):
        largest_batches(lambda b, f, t: b * f, bins, cap=float("nan"))
