"""Exact attention by scipy, counts by closed forms, and a cache that refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import softmax

from jaxzoo.lm.attention_io_complexity import (
    lower_bound,
    small_cache_attention,
    sweep,
    transfers,
)
from jaxzoo.nn.counted_attention import Machine, flash_attention, naive_attention


def widest(*args, **kwargs):
    return flash_attention(*args, **kwargs, tiling="widest")


PROGRAMS: dict[Any, Any] = {
    "naive": naive_attention,
    "flash": flash_attention,
    "flash_widest": widest,
    "small_cache": small_cache_attention,
}
# Lengths and widths that tiles do and do not divide, and caches from hardly enough to
# more than everything.
SHAPES = [(12, 4), (13, 5), (7, 1), (1, 3), (5, 8)]


def least(name: str, width: int) -> int:
    if name == "naive":
        return max(2 * width + 1, 4)
    return 5 if name == "small_cache" else 4 * width + 4


def tokens(length, width, size=1.5, seed=0):
    return tuple(size * np.random.default_rng(seed).normal(size=(3, length, width)))


def attention(q, k, v, scale=1.0):
    return softmax(scale * q @ k.T, axis=1) @ v


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("length, width", SHAPES)
def test_programs_are_exact_and_move_what_the_closed_form_says(name, length, width):
    q, k, v = tokens(length, width)
    low = least(name, width)
    for cache in (low, low + 1, low + 7, 2 * low + 3, 61, 64, 100, 257, 4000):
        if cache < low:
            continue
        output, aux = PROGRAMS[name](q, k, v, cache=cache, scale=0.7)
        assert_allclose(output, attention(q, k, v, 0.7), rtol=1e-12, atol=1e-14)
        moved = transfers(np.array(cache), length=length, width=width, program=name)
        assert aux["loads"] + aux["stores"] == moved
        assert aux["peak"] <= cache
        assert moved >= 4 * length * width  # q, k and v in, the output out


@pytest.mark.parametrize("name", PROGRAMS)
def test_counts_of_loads_and_stores_by_hand(name):
    """N = 12, d = 4; a cache of 60 has blocks of 3 keys, of 5 keys, or sides of 6."""
    q, k, v = tokens(12, 4)
    _, aux = PROGRAMS[name](q, k, v, cache=60)
    matrix, scores = 12 * 4, 12 * 12
    expected = {
        # q once, k and v for each query; scores twice, weights once
        "naive": (matrix + 2 * 12 * matrix + 3 * scores, 2 * scores + matrix),
        # 4 blocks of keys: q each time, the output and two sums all but the first
        "flash": (2 * matrix + 4 * matrix + 3 * (matrix + 24), 4 * matrix + 3 * 24),
        "flash_widest": (2 * matrix + 3 * matrix + 2 * (matrix + 24),
                         3 * matrix + 2 * 24),
        # 2 blocks of rows: q and k for each of two tiles; scores once, v for each
        "small_cache": (2 * matrix + 2 * matrix + scores + 2 * matrix,
                        scores + matrix),
    }  # fmt: skip
    assert (aux["loads"], aux["stores"]) == expected[name]


def test_running_sums_are_needed_over_blocks():
    """Scores that grow from block to block, far beyond where exp overflows."""
    q, k, v = tokens(12, 4)
    k = k * 10.0 ** np.arange(12)[:, None] / 1e7
    for sign in (1, -1):
        keys = k[::sign]
        for name, program in PROGRAMS.items():
            output, _ = program(q, keys, v, cache=least(name, 4))
            assert_allclose(output, attention(q, keys, v), rtol=1e-9, atol=1e-12)


def test_an_overfull_cache_raises():
    machine = Machine(6, x=np.arange(8.0), y=np.zeros(3))
    machine.load("x", slice(0, 4))
    with pytest.raises(MemoryError, match="'y' has 3 words, but 4 of 6"):
        machine.load("y", slice(0, 3))
    assert (machine.used, machine.loads) == (4, 4)
    machine.load("x", slice(4, 8))  # in the place of the first
    machine.compute("y", lambda x: x[:2], "x")
    assert machine.used == machine.peak == 6
    with pytest.raises(MemoryError, match="'z' has 4 words, but 6 of 6"):
        machine.compute("z", lambda x: x, "x")
    machine.store("y", slice(1, 3))
    assert_array_equal(machine.slow["y"], [0, 4, 5])
    machine.free("x")
    assert (machine.used, machine.peak, machine.stores) == (2, 6, 2)
    with pytest.raises(KeyError):
        machine.compute("z", lambda x: x, "x")  # no longer in the cache


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_runs_with_one_word_less(name):
    q, k, v = tokens(6, 4)
    need = least(name, 4)
    with pytest.raises(ValueError, match=f"'cache' is {need - 1}, expected .* {need}"):
        PROGRAMS[name](q, k, v, cache=need - 1)
    size = {"length": 6, "width": 4, "program": name}
    moved = transfers(np.array([need - 1, need]), **size)
    assert_array_equal(np.isfinite(moved), [False, True])


@pytest.mark.parametrize("name", PROGRAMS)
def test_tiles_fill_the_cache(name):
    """Were they smaller than need be, the constants would be too large."""
    length, width, cache = 64, 8, 150
    _, aux = PROGRAMS[name](*tokens(length, width), cache=cache)
    share = {
        "naive": 17 / cache,
        "flash": 0.85,
        "flash_widest": 0.9,
        "small_cache": 0.9,
    }
    assert aux["peak"] >= share[name] * cache


def test_flash_tiles_have_a_quarter_of_the_cache():
    size = {"length": 2**12, "width": 32}
    cache = 32 * np.array([64, 256, 1024])
    flash = transfers(cache, program="flash", **size)
    blocks = size["length"] / (cache / (4 * 32))
    matrix = 2**12 * 32
    assert_allclose(flash, matrix * (3 * blocks + 1) + 2**14 * (blocks - 1))
    half = transfers(cache, program="flash_widest", **size)
    assert np.all((half < 0.65 * flash) & (half > 0.45 * flash))


def test_lower_bound_is_both_formulas():
    cache = np.array([16, 255, 256, 1024, 2**14, 2**20])
    bound = lower_bound(cache, length=1024, width=16)
    n2 = 1024.0**2
    expected = [n2 * 4, n2 * 16 / 255**0.5, n2, n2 / 4, n2 / 64, n2 / 64]
    assert_allclose(bound, expected)
    for name in PROGRAMS:
        moved = transfers(cache, length=1024, width=16, program=name)
        assert np.all(moved >= bound)


@pytest.mark.parametrize("width", [16, 64, 128])
def test_exponents_and_the_switch(width):
    cache = (width**2 * 2.0 ** np.arange(-4, 5)).astype(int)
    found = sweep(cache, length=2**17, width=width)
    assert -1.15 < found["slope/flash"] < -0.85
    assert -1.15 < found["slope/flash_widest"] < -0.85
    assert -0.65 < found["slope/small_cache"] < -0.35
    assert 1 / 4 < found["switch/flash_widest"] / width**2 < 2
    assert 2 < found["switch/flash"] / width**2 < 4
    assert np.ptp(found["naive"][np.isfinite(found["naive"])]) == 0


def test_sweep_by_numpy():
    cache = np.array([100, 300, 1000, 2500, 5000, 20000])
    found = sweep(cache, length=4096, width=32)
    above, below = cache >= 1024, cache <= 1024
    for name, keep in (
        ("flash", above),
        ("flash_widest", above),
        ("small_cache", below),
    ):
        slope = np.polyfit(np.log(cache[keep]), np.log(found[name][keep]), 1)[0]
        assert_allclose(found[f"slope/{name}"], slope)
    gap = np.log(found["flash"] / found["small_cache"])
    first = np.flatnonzero(gap <= 0)[0]
    expected = np.exp(np.interp(0, -gap[first - 1 : first + 1],
                                np.log(cache[first - 1 : first + 1])))  # fmt: skip
    assert_allclose(found["switch/flash"], expected)
    assert expected != cache[first]


def test_sweep_says_what_it_cannot_say():
    found = sweep(np.array([64, 100]), length=4096, width=32)
    assert np.isnan(found["switch/flash"]) and np.isnan(found["slope/flash"])
    found = sweep(np.array([64, 100, 10**5]), length=4096, width=32)
    assert_allclose(found["switch/flash"], 10**5)  # it does not fit in less
    assert np.isfinite(found["slope/small_cache"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_jax_traces_the_same_program(name):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in tokens(5, 3))
    cache = least(name, 3) + 9

    def program(q, k, v):
        return PROGRAMS[name](q, k, v, cache=cache)

    output, aux = jax.jit(program)(q, k, v)
    host, counts = program(*tokens(5, 3))
    assert output.dtype == jnp.float32 and host.dtype == np.float64
    assert_allclose(output, host, rtol=1e-5, atol=1e-6)
    assert {n: int(x) for n, x in aux.items()} == counts

    def exact(q, k, v):
        return jnp.sum(jnp.sin(jax.nn.softmax(q @ k.T, axis=1) @ v))

    got = jax.grad(lambda *x: jnp.sum(jnp.sin(program(*x)[0])), (0, 1, 2))(q, k, v)
    for one, other in zip(got, jax.grad(exact, (0, 1, 2))(q, k, v), strict=True):
        assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_jax_and_numpy_count_alike():
    cache = np.array([3, 5, 20, 36, 64, 65, 100, 4000])
    size = {"length": 100, "width": 8}
    for name in PROGRAMS:
        host = transfers(cache, program=name, **size)
        assert_array_equal(transfers(jnp.asarray(cache), program=name, **size), host)


def test_bad_arguments_are_named():
    q, k, v = tokens(6, 4)
    with pytest.raises(TypeError, match=r"argument 'v' is float64\[5,4\]"):
        naive_attention(q, k, v[:5], cache=100)
    with pytest.raises(ValueError, match="argument 'tiling' is 'half'"):
        flash_attention(q, k, v, cache=100, tiling="half")  # pyright: ignore
    with pytest.raises(ValueError, match="argument 'scale' is nan"):
        small_cache_attention(q, k, v, cache=100, scale=float("nan"))
    with pytest.raises(ValueError, match="argument 'width' is 0, expected"):
        lower_bound(np.array([4]), length=3, width=0)
