"""The scan of Mamba-2 against a float64 recurrence in NumPy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import QUICKLY, interpret
from ssd_oracle import (
    CASES,
    Case,
    arrays,
    check,
    close,
    compiled,
    double,
    drawn,
    oracle,
)

from pallas_kernels.ssd import pallas_tpu, ssd, step


@pytest.mark.stage("ssd", "xla", "oracle", lambda: "180 drawn cases")
@settings(max_examples=180, deadline=None, derandomize=True)
@given(st.integers(0, len(CASES) - 1), st.integers(0, 2**31 - 1))
def test_xla_is_the_oracle(number, seed):
    check(CASES[number], "xla", seed)


@pytest.mark.stage("ssd", "ref", "oracle", lambda number: f"{CASES[number]}")
@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_ref_is_the_oracle(number):
    for seed in range(4):
        check(CASES[number], "ref", seed)


def test_strong_decays_cost_no_digits():
    """Steps of 1e2 among small ones: as running sums they would hide the others."""
    case = Case((1, 64, 2, 8, 1, 16), 64, "dis")
    floats, _, d_y, d_state = drawn(case, 0)
    rng = np.random.default_rng(0)
    dt = np.where(rng.random((1, 64, 2)) < 0.2, 1e2, 10.0 ** rng.uniform(-3, -1))
    floats |= {"dt": jnp.asarray(dt, jnp.float32), "A": jnp.array([-5.0, -0.01])}
    ids = np.zeros((1, 64), np.int64)
    (y, state), grads = compiled(case, "xla")(floats, ids, d_y, d_state)
    wanted = oracle(
        {k: double(v) for k, v in floats.items()}, double(d_y), double(d_state),
        softplus=False, ids=ids,
    )  # fmt: skip
    for a, b in ((y, wanted[0]), (state, wanted[1])):
        close(a, b, 2e-6)
    for name, gradient in grads.items():
        close(gradient, wanted[2][name], 2e-6, name)


def everything(implementation: Any):
    """A scalar of float arguments with every option on."""
    case = CASES[0]
    floats, *_ = drawn(case, 6)
    floats |= {"dt": jnp.sin(floats["dt"]), "A": -jnp.arange(1.0, 5.0) / 4}
    ids = jnp.arange(37)[None].repeat(2, 0) // 13

    def value(floats):
        y, state = ssd(
            **floats, segment_ids=ids, return_final_state=True, chunk=8,
            dt_softplus=True, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(state))

    return value, floats


def test_forward_mode_and_second_derivatives_are_those_of_the_definition():
    found = []
    for name in ("xla", "ref"):
        function, args = everything(name)
        tangents = jax.tree.map(lambda x: jnp.sin(3 * x), args)

        def both(function=function, args=args, tangents=tangents):
            value, change = jax.jvp(function, (args,), (tangents,))
            forward = jax.jvp(jax.grad(function), (args,), (tangents,))[1]
            return value, change, forward

        found.append(jax.tree.leaves(QUICKLY(both)()))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5 * np.abs(b).max())


def test_vmap_and_remat_change_nothing():
    function, args = everything("xla")
    alone = QUICKLY(jax.grad(function))(args)
    again = QUICKLY(jax.vmap(jax.grad(jax.checkpoint(function))))(
        jax.tree.map(lambda x: jnp.stack([x, x]), args)
    )
    for a, b in zip(*map(jax.tree.leaves, (alone, again)), strict=True):
        np.testing.assert_allclose(b, jnp.stack([a, a]), atol=2e-5 * np.abs(a).max())


@functools.cache
def plain(chunk: int | None = None) -> Any:
    """`ssd` of positional arguments and a state, compiled."""

    def call(state, *arrays):
        return ssd(*arrays, initial_state=state, return_final_state=True, chunk=chunk)

    return QUICKLY(call)


def test_two_parts_are_the_whole():
    x, dt, A, B, C = arrays()
    zero = jnp.zeros((2, 4, 3, 5))
    whole, end = plain(7)(zero, x, dt, A, B, C)

    def part(state, cut):
        return plain(7)(state, x[:, cut], dt[:, cut], A, B[:, cut], C[:, cut])

    first, state = part(zero, slice(0, 9))
    second, state = part(state, slice(9, 20))
    close(jnp.concatenate([first, second], 1), double(whole), 2e-6)
    close(state, double(end), 2e-6)


def test_documents_do_not_see_each_other_not_even_what_is_not_finite():
    x, dt, A, B, C = arrays()
    ids = jnp.arange(20)[None].repeat(2, 0) // 8
    knobs: Any = {"segment_ids": ids, "return_final_state": True, "chunk": 5}
    wanted, state = ssd(x, dt, A, B, C, **knobs)
    got, again = ssd(x.at[:, :16].multiply(1e30), dt, A, B, C, **knobs)
    np.testing.assert_array_equal(wanted[:, 16:], got[:, 16:])
    np.testing.assert_array_equal(state, again)
    part = slice(8, 16)
    alone = ssd(x[:, part], dt[:, part], A, B[:, part], C[:, part])
    close(wanted[:, 8:16], double(alone), 2e-6)


@pytest.mark.parametrize("name", ["xla", "ref"])
def test_extremes_are_finite_with_finite_gradients(name):
    x, dt, A, B, C = arrays(6)

    def total(dt, A):
        return jnp.sum(ssd(x, dt, A, B, C, implementation=name) ** 2)

    gradient = QUICKLY(jax.grad(total, (0, 1)))
    for size, rate in ((1e30, -1e30), (1e2, -1e6), (0.0, -1.0), (1e-30, 0.0)):
        got = gradient(
            jnp.full_like(dt, size**0.2 if size > 1e2 else size), A * 0 + rate
        )
        assert all(np.all(np.isfinite(g)) for g in got)


def test_step_is_the_scan():
    case = CASES[0]
    floats: Any = drawn(case, 1)[0]
    floats = {k: v[:, :9] if v.ndim > 2 and k != "initial_state" else v
              for k, v in floats.items()}  # fmt: skip
    ids = jnp.arange(9)[None].repeat(2, 0) // 4
    wanted, end = ssd(
        **floats, segment_ids=ids, return_final_state=True, dt_softplus=True
    )
    one = QUICKLY(functools.partial(step, dt_softplus=True))
    state = floats.pop("initial_state")
    over_time = ("x", "dt", "B", "C", "z")
    for t in range(9):
        token = {k: v[:, t] if k in over_time else v for k, v in floats.items()}
        y, state = one(state, reset=jnp.full(2, t in (4, 8)), **token)
        close(y, double(wanted[:, t]), 5e-6)
    close(state, double(end), 5e-6)


def test_empty_sequences():
    x, dt, A, B, C = (a if a.ndim == 1 else a[:, :0] for a in arrays())
    state = jnp.ones((2, 4, 3, 5))
    y, after = ssd(x, dt, A, B, C, initial_state=state, return_final_state=True,
                   segment_ids=jnp.zeros((2, 0), int))  # fmt: skip
    assert y.shape == x.shape
    np.testing.assert_array_equal(after, state)


def temporary(length, implementation: Any = "xla") -> int:
    """Bytes for value and gradient at 8 heads of 64, N = 64, compiled and not run."""
    sizes = ((1, length, 8, 64), (1, length, 8), (8,), *[(1, length, 1, 64)] * 2)

    def loss(*inputs):
        return jnp.sum(ssd(*inputs, implementation=implementation) ** 2)

    given = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    gradient = QUICKLY(jax.value_and_grad(loss, (0, 1, 2, 3, 4)))
    analysis: Any = gradient.lower(*given).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def test_memory_is_linear_in_length_and_that_of_states_between_chunks():
    """Seen: 12.7 MiB at 2048, of which y is 4 and states 4; token by token 525.

    By older jax 17.3.
    """
    short, middle, long = (temporary(n) for n in (2048, 8192, 32768))
    assert short < 18 * 2**20
    assert middle < 4.1 * short and long < 4.1 * middle
    assert temporary(2048, "ref") > 20 * short


@pytest.fixture
def interpreted(monkeypatch):
    interpret(monkeypatch, pallas_tpu)


def test_the_tpu_kernels_are_behind_the_same_call(interpreted):
    found = []
    for name in (None, "xla"):
        function, args = everything(name)
        found.append(QUICKLY(jax.value_and_grad(function))(args))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_what_the_tpu_kernels_lack_is_said_and_names_xla(interpreted):
    x, *others = arrays(3)

    def total(x):
        return jnp.sum(ssd(x, *others, implementation="pallas_tpu") ** 2)

    with pytest.raises(NotImplementedError, match='implementation="xla" has them'):
        jax.jvp(jax.grad(total), (x,), (x,))
    with pytest.raises(NotImplementedError, match='implementation="xla" has them'):
        jax.jvp(total, (x,), (x,))
