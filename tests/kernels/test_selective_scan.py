"""The selective scan against a float64 recurrence and its adjoint in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import QUICKLY
from selective_scan_oracle import (
    CASES,
    Case,
    called,
    check,
    close,
    drawn,
    joined,
    oracle,
)

from pallas_kernels.selective_scan import selective_scan, step


def every_case(**_: Any) -> str:
    return f"{len(CASES)} cases of shapes and options"


@pytest.mark.stage(
    "selective_scan", "xla", "oracle", lambda: f"180 inputs drawn for {every_case()}"
)
@settings(max_examples=180, deadline=None, derandomize=True)
@given(st.integers(0, len(CASES) - 1), st.integers(0, 2**31 - 1))
def test_xla_is_the_oracle(number, seed):
    check(CASES[number], "xla", seed)


@pytest.mark.stage("selective_scan", "ref", "oracle", every_case)
@pytest.mark.parametrize("number", range(len(CASES)))
def test_ref_is_the_oracle(number):
    check(CASES[number], "ref", number)


def test_the_oracle_is_its_own_finite_difference():
    case = Case((1, 6, 2, 2, 1), "complex", True, True, "Dzbh", True, "float32", 4)
    floats, parts, ids, weights = drawn(case, 0)
    exact: Any = {k: np.asarray(x, np.float64) for k, x in floats.items()}
    exact |= {k: exact[k] + 1j * np.asarray(x, np.float64) for k, x in parts.items()}
    exact["delta"] = np.log(np.expm1(np.linspace(0.1, 2, 12).reshape(1, 6, 2)))
    d_y, d_re, d_im = (np.asarray(w, np.float64) for w in weights)
    knobs = {"softplus": True, "zoh": True, "ids": np.asarray(ids)}

    def value(arrays):
        end: Any
        y, end, _ = oracle(arrays, d_y, d_re + 1j * d_im, **knobs)
        return np.sum(d_y * y) + np.sum(d_re * end.real + d_im * end.imag)

    grads = oracle(exact, d_y, d_re + 1j * d_im, **knobs)[2]
    rng = np.random.default_rng(1)
    for name, x in exact.items():
        for unit in (1.0, 1j) if np.iscomplexobj(x) else (1.0,):
            way = rng.normal(size=x.shape) * unit
            moved = [value({**exact, name: x + s * 1e-6 * way}) for s in (1, -1)]
            slope = (moved[0] - moved[1]) / 2e-6
            along = np.sum(np.real(np.conj(grads[name]) * way))
            np.testing.assert_allclose(slope, along, rtol=1e-6, atol=1e-7)


# Derivatives, memory, decoding, documents.


def everything(kind: str, implementation: Any, zoh=False, length=13):
    """A scalar of float arguments with every option on, and the arguments."""
    case = Case((1, length, 4, 3, 2), kind, zoh, True, "Dzbh", True, "float32", 4)
    floats, parts, ids, weights = drawn(case, 3)
    floats["delta"] = jnp.sin(floats["delta"])  # well inside of every range

    def value(floats, parts):
        y, end = called(case, implementation, joined(floats, parts), ids)
        ends = jnp.sin(end.real) * weights[1] + jnp.cos(end.imag)
        return jnp.sum(weights[0] * jnp.sin(y)) + jnp.sum(ends)

    return value, (floats, parts)


@pytest.mark.parametrize(("kind", "zoh"), [("real", False), ("complex", False)])
def test_forward_mode_and_second_derivatives_are_those_of_the_definition(kind, zoh):
    chunks, args = everything(kind, "xla", zoh)
    whole, _ = everything(kind, "ref", zoh)
    tangents = jax.tree.map(lambda x: jnp.sin(3 * x), args)

    def both(function):
        value, change = jax.jvp(function, args, tangents)
        slopes = jax.grad(function, (0, 1))

        def along(*args):  # the product of the Hessian with the tangents
            products = jax.tree.map(jnp.vdot, slopes(*args), tangents)
            return sum(jax.tree.leaves(products))

        reverse = jax.grad(along, (0, 1))(*args)
        forward = jax.jvp(slopes, args, tangents)[1]
        return value, change, slopes(*args), reverse, forward

    for a, b in zip(
        *(jax.tree.leaves(QUICKLY(lambda f=f: both(f))()) for f in (chunks, whole)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * np.abs(b).max())


def test_vmap_and_remat_change_nothing():
    function, (floats, _) = everything("real", "xla")
    gradient = jax.grad(function)
    halves = jax.tree.map(lambda x: x / 2, floats)
    wanted = [QUICKLY(gradient)(x, {}) for x in (floats, halves)]
    again = QUICKLY(jax.grad(jax.checkpoint(function)))(floats, {})
    stacked = jax.tree.map(lambda *x: jnp.stack(x), floats, halves)
    together = QUICKLY(jax.vmap(gradient, (0, None)))(stacked, {})
    for name, x in together.items():
        for row, one in zip(x, wanted, strict=True):
            np.testing.assert_allclose(row, one[name], rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(again[name], wanted[0][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["ref", "xla"])
@pytest.mark.parametrize("discretization", ["euler", "zoh"])
def test_it_is_smooth_where_A_and_delta_are_zero(implementation, discretization):
    """As A goes to 0, or delta does, both rules add delta B u."""

    def value(A, delta):
        one = jnp.ones((1, 3, 1))
        y = selective_scan(
            one, delta * one, A.reshape(1, 1), one, one,
            discretization=discretization, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(y)

    # Of sum_t sum_(s <= t) c e^((t - s) delta A), c = delta or (e^(delta A) - 1) / A.
    zero = jnp.zeros(())
    extra = {"euler": 0.0, "zoh": 0.5 * 6}[discretization]
    slopes = jax.grad(value, (0, 1))(zero, 1.0 + zero)
    np.testing.assert_allclose(slopes, (4 + extra, 6.0), rtol=1e-6)
    curve = jax.grad(jax.grad(value))(zero, 1.0 + zero)
    # sum_k (3 - k) k^2, and for zoh of the integral of (k + s)^2 over a step.
    exact = {"euler": 2 * 1 + 1 * 4, "zoh": (3 * 1 + 2 * 7 + 1 * 19) / 3}
    np.testing.assert_allclose(curve, exact[discretization], rtol=1e-5)
    np.testing.assert_allclose(jax.grad(value, (0, 1))(-1 + zero, zero), (0, 6.0))


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("zoh", [False, True])
def test_steps_of_one_token_are_the_scan(kind, zoh):
    case = Case((2, 9, 6, 3, 2), kind, zoh, True, "Dzbh", True, "float32", 4)
    floats, parts, ids, _ = drawn(case, 5)
    arrays: Any = joined(floats, parts)
    wanted, end = called(case, "xla", arrays, ids)
    state, rows = arrays.pop("initial_state"), []
    whole = {k: arrays[k] for k in ("A", "D", "delta_bias")}

    @jax.jit
    def one(state, x, reset):
        return step(
            state, x["u"], x["delta"], whole["A"], x["B"], x["C"], z=x["z"],
            D=whole["D"], delta_bias=whole["delta_bias"], delta_softplus=True,
            discretization="zoh" if zoh else "euler", reset=reset,
        )  # fmt: skip

    changes = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    for t in range(9):
        row = {k: x[:, t] for k, x in arrays.items() if k not in whole}
        y, state = one(state, row, changes[:, t])
        rows.append(y)
    close("y", jnp.stack(rows, 1), np.asarray(wanted), 1e-6)
    close("state", state, np.asarray(end), 1e-6)


@pytest.mark.parametrize("implementation", ["ref", "xla"])
def test_documents_of_a_row_do_not_meet(implementation):
    """Each has the output of its own, although its neighbours hold no numbers."""
    case = Case((1, 12, 2, 3, 0), "real", False, False, "", False, "float32", 5)
    floats, _, _, _ = drawn(case, 1)
    floats["delta"] = jnp.minimum(floats["delta"], 1.0)
    ids = jnp.array([[7] * 4 + [2] * 5 + [7] * 3])
    alone = [
        called(case, implementation, {**{k: x[:, part] for k, x in floats.items()
                                         if k != "A"}, "A": floats["A"]}, None)[0]
        for part in (slice(0, 4), slice(4, 9), slice(9, 12))
    ]  # fmt: skip
    u = floats["u"]
    wanted = jnp.concatenate(alone, axis=1)
    got, _ = called(case, implementation, floats, ids)
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    far = {**floats, "u": u.at[:, :4].set(1e38), "B": floats["B"].at[:, :4].set(1e38)}
    got, end = called(case, implementation, far, ids)
    np.testing.assert_allclose(got[:, 4:], wanted[:, 4:], rtol=1e-6, atol=1e-6)
    assert np.isfinite(end).all()


def test_euler_is_not_the_exact_rule():
    case = Case((1, 9, 2, 3, 0), "real", False, False, "", False, "float32", 5)
    floats, _, _, _ = drawn(case, 1)
    euler, exact = (
        called(case._replace(zoh=zoh), "xla", floats, None)[0] for zoh in (False, True)
    )
    assert np.abs(euler - exact).max() > 0.1


def test_pieces_one_after_the_other_are_the_whole():
    case = Case((2, 31, 4, 3, 0), "real", False, True, "", False, "float32", 8)
    floats, _, _, _ = drawn(case, 2)
    wanted, wanted_end = called(case, "xla", floats, None)
    rows, state = [], None
    for part in (slice(0, 10), slice(10, 11), slice(11, 31)):
        given = {k: x if k == "A" else x[:, part] for k, x in floats.items()}
        if state is not None:
            given["initial_state"] = state
        y, state = called(case, "xla", given, None)
        rows.append(y)
    close("y", jnp.concatenate(rows, 1), np.asarray(wanted), 1e-6)
    close("end", state, np.asarray(wanted_end), 1e-6)


@pytest.mark.parametrize("empty", ["batch", "length", "channels", "states"])
def test_nothing_in_is_nothing_out(empty):
    sizes = {"batch": 2, "length": 3, "channels": 4, "states": 5, empty: 0}
    b, t, d, n = sizes.values()
    x, of_states = jnp.ones((b, t, d)), jnp.ones((b, t, n))
    start = jnp.full((b, d, n), 2.0)
    y, end = selective_scan(
        x, x, -jnp.ones((d, n)), of_states, of_states, D=jnp.ones(d),
        initial_state=start, return_final_state=True,
    )  # fmt: skip
    assert y.shape == x.shape and end.shape == start.shape
    if empty == "length":
        np.testing.assert_array_equal(end, start)
    if empty == "states":
        np.testing.assert_array_equal(y, x)


def temporary(length, channels=256, batch=1, **knobs):
    """Bytes beside inputs and outputs of value and gradients, for N = 16."""
    x = jax.ShapeDtypeStruct((batch, length, channels), jnp.float32)
    of_states = jax.ShapeDtypeStruct((batch, length, 16), jnp.float32)
    A = jax.ShapeDtypeStruct((channels, 16), jnp.float32)

    def loss(*args):
        return jnp.sum(selective_scan(*args, **knobs) ** 2)

    gradient = QUICKLY(jax.value_and_grad(loss, tuple(range(5))))
    compiled = gradient.lower(x, x, A, of_states, of_states).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes


def test_memory_is_small_and_linear_in_length():
    """All states would be 32 MiB. Compilers of jax before 0.12 copy u and delta."""
    most = (9 if jax.__version_info__ >= (0, 12) else 13) * 2**20
    sizes = {n: temporary(n) for n in (2048, 8192, 32768)}
    assert sizes[2048] <= most
    assert sizes[8192] <= 4.2 * sizes[2048] and sizes[32768] <= 4.2 * sizes[8192]
    assert temporary(2048, discretization="zoh") <= most


def test_chunks_of_many_sequences_are_shorter():
    """What the gradient walks over several times is to stay in a cache."""
    chosen, long = (temporary(64, 64, 64, chunk=chunk) for chunk in (None, 64))
    assert chosen < 0.5 * long
