"""The selective scan against a float64 recurrence and its adjoint in NumPy."""

import functools
import itertools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.selective_scan import selective_scan, step

# Compiling takes longer here than what is compiled.
QUICKLY = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)

# The oracle: one token at a time, for one row of the batch and one channel.


def oracle(arrays: Any, d_y, d_end, *, softplus, zoh, ids):
    """y, end and gradients; of a complex x the gradient is dL/d re + i dL/d im.

    `arrays` has float64 u [B, T, D], delta, A [D, N], B [B, T, G, N], C, D [D],
    z [B, T, D], delta_bias [D] and initial_state [B, D, N].
    """
    u, raw, A, B, C = (arrays[k] for k in ("u", "delta", "A", "B", "C"))
    z, first = arrays["z"], arrays["initial_state"]
    (batch, length, channels), states = u.shape, A.shape[1]
    heads = np.arange(channels) // (channels // B.shape[2])
    twice = 2.0 if np.iscomplexobj(A) else 1.0
    biased = raw + arrays["delta_bias"]
    dt = np.logaddexp(0, biased) if softplus else biased
    kind = np.result_type(A, first)
    y, end = np.zeros(u.shape), np.zeros(first.shape, kind)
    grads = {k: np.zeros(x.shape, x.dtype) for k, x in arrays.items()}
    for b in range(batch):
        before = np.zeros((length, channels, states), kind)
        fresh = np.zeros(length, bool)
        h, inner = first[b].astype(kind), np.zeros((length, channels))
        shares, slopes, powers = [], [], []
        for t in range(length):
            fresh[t] = t > 0 and ids is not None and ids[b, t] != ids[b, t - 1]
            h = np.where(fresh[t], 0.0, h)
            before[t] = h
            step_t = dt[b, t][:, None]
            power = np.exp(step_t * A)
            share, by_dt, by_A = step_t + 0 * A, 1 + 0 * A, 0 * A
            if zoh:
                zero = A == 0
                safe = np.where(zero, 1.0, A)
                share = np.where(zero, step_t, np.expm1(step_t * safe) / safe)
                by_dt = power
                x = step_t * A
                # The derivative in A, with its limit's next terms near 0.
                exact = (step_t * power - share) / safe
                near = step_t**2 * (0.5 + x / 3 + x**2 / 8 + x**3 / 30 + x**4 / 144)
                by_A = np.where(np.abs(x) < 1e-3, near, exact)
            h = power * h + share * B[b, t, heads] * u[b, t][:, None]
            inner[t] = twice * np.real(np.sum(C[b, t, heads] * h, axis=1))
            powers.append(power)
            shares.append((share, by_dt))
            slopes.append(by_A)
        end[b] = h
        after = np.concatenate([before[1:], h[None]])
        whole = inner + arrays["D"] * u[b]
        gate = 1 / (1 + np.exp(-z[b]))
        y[b] = whole * z[b] * gate
        d_whole = d_y[b] * z[b] * gate
        grads["z"][b] = d_y[b] * whole * gate * (1 + z[b] * (1 - gate))
        grads["D"] += np.sum(d_whole * u[b], axis=0)
        d_u = d_whole * arrays["D"]
        g = d_end[b].astype(kind)
        for t in reversed(range(length)):
            h_t = after[t] if t == length - 1 or not fresh[t + 1] else None
            if h_t is None:  # what was forgotten before t + 1 is not in `before`
                h_t = powers[t] * before[t]
                h_t = h_t + shares[t][0] * B[b, t, heads] * u[b, t][:, None]
            d = d_whole[t][:, None] * twice
            g = g + np.conj(C[b, t, heads]) * d
            of_C, rows = np.conj(h_t) * d, g * np.conj(shares[t][0])
            of_B = rows * u[b, t][:, None]
            for n, total in (("C", of_C), ("B", of_B)):
                part: Any = np.zeros((B.shape[2], states), total.dtype)
                np.add.at(part, heads, total)
                is_real = not np.iscomplexobj(grads[n])
                grads[n][b, t] = np.real(part) if is_real else part
            d_u[t] += np.sum(np.real(rows * np.conj(B[b, t, heads])), axis=1)
            d_share = g * np.conj(B[b, t, heads]) * u[b, t][:, None]
            d_power = g * np.conj(before[t])
            d_exponent = d_power * np.conj(powers[t])
            step_t = dt[b, t][:, None]
            of_A = d_exponent * step_t + d_share * np.conj(slopes[t])
            grads["A"] += of_A
            of_dt = np.real(
                d_exponent * np.conj(A) + d_share * np.conj(shares[t][1])
            ).sum(1)
            if softplus:
                of_dt = of_dt / (1 + np.exp(-biased[b, t]))
            grads["delta"][b, t] = of_dt
            g = np.where(fresh[t], 0.0, g * np.conj(powers[t]))
        grads["initial_state"][b] = g if np.iscomplexobj(first) else np.real(g)
        grads["u"][b] = d_u
    grads["delta_bias"] = grads["delta"].sum((0, 1))
    return y, end, grads


class Case(NamedTuple):
    """What is static in a call; values are drawn."""

    shape: tuple[int, ...]  # B, T, D, N, and G or 0 for B and C without groups
    kind: str
    zoh: bool
    softplus: bool
    extras: str  # which of D, z, delta_bias, initial_state (h)
    segments: bool
    dtype: str
    chunk: int


CHOICES = {
    "shape": [
        (2, 1, 3, 2, 0), (1, 31, 4, 3, 1), (2, 16, 6, 1, 2), (1, 13, 5, 4, 5),
    ],
    "kind": ["real", "complex", "complex A"],
    "zoh": [False, True],
    "softplus": [False, True],
    "extras": ["", "Dz", "bh", "Dzbh"],
    "segments": [False, True],
    "dtype": ["float32", "bfloat16"],
    "chunk": [1, 5, 64],
}  # fmt: skip


def covering(choices=CHOICES) -> list[Case]:
    """Cases in which every pair of choices of two options occurs."""
    rng = np.random.default_rng(0)
    names = list(choices)
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }
    cases = []
    while left:
        tries = []
        for _ in range(60):
            picks = [(n, int(rng.integers(len(choices[n])))) for n in names]
            new = left & set(itertools.combinations(picks, 2))
            tries.append((len(new), picks, new))
        _, picks, new = max(tries, key=lambda entry: entry[0])
        left -= new
        cases.append(Case(*(choices[n][i] for n, i in picks)))
    return cases


CASES = covering()
LETTERS = {"D": "D", "z": "z", "b": "delta_bias", "h": "initial_state"}


def drawn(case: Case, seed: int) -> Any:
    """Inputs of a case: parts of complex numbers apart, and weights of the outputs."""
    rng = np.random.default_rng(seed)
    batch, length, channels, states, groups = case.shape
    of_states = (batch, length, states)
    if groups:
        of_states = (batch, length, groups, states)
    # Step sizes from 1e-4 to 1e2; under softplus the same after it.
    delta = np.exp(rng.uniform(np.log(1e-4), np.log(1e2), (batch, length, channels)))
    if case.softplus:
        delta = np.where(delta > 30, delta, np.log(np.expm1(np.minimum(delta, 30))))
    decay = -np.exp(rng.uniform(np.log(1e-3), np.log(4.0), (channels, states)))
    decay = np.where(rng.random(decay.shape) < 0.15, 0.0, decay)
    arrays = {
        "u": rng.normal(size=(batch, length, channels)),
        "delta": delta,
        "A": decay,
        "B": rng.normal(size=of_states),
        "C": rng.normal(size=of_states),
    }
    shapes = {
        "D": (channels,), "z": (batch, length, channels), "delta_bias": (channels,),
        "initial_state": (batch, channels, states),
    }  # fmt: skip
    for letter in case.extras:
        name = LETTERS[letter]
        arrays[name] = rng.normal(size=shapes[name])
    if "delta_bias" in arrays:  # step sizes stay above 0
        arrays["delta_bias"] = np.abs(arrays["delta_bias"]) * 1e-2
    imaginary = {
        "real": [], "complex A": ["A"], "complex": ["A", "B", "C", "initial_state"],
    }[case.kind]  # fmt: skip
    floats = {k: jnp.asarray(x, jnp.float32) for k, x in arrays.items()}
    narrow = {"u", "B", "C", "z"} if case.kind == "real" else {"u", "z"}
    floats = {k: x.astype(case.dtype) if k in narrow else x for k, x in floats.items()}
    parts = {
        k: jnp.asarray(rng.normal(size=arrays[k].shape), jnp.float32)
        for k in imaginary
        if k in arrays
    }
    if "A" in parts:  # the phase of a step, up to 1e2 Im A, is known to 1e-7 of itself
        parts["A"] = parts["A"] * 0.03
    ids = None
    if case.segments:
        ids = jnp.asarray(np.sort(rng.integers(0, 4, (batch, length)), 1), jnp.int32)
    weights = [
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((batch, length, channels), *[shapes["initial_state"]] * 2)
    ]
    # The gradient of the output comes in its dtype.
    weights[0] = weights[0].astype(case.dtype).astype(jnp.float32)
    return floats, parts, ids, weights


def joined(floats, parts):
    return {k: x + 1j * parts[k] if k in parts else x for k, x in floats.items()}


def called(case: Case, implementation: Any, arrays, ids):
    first = ("u", "delta", "A", "B", "C")
    others = {k: x for k, x in arrays.items() if k not in first}
    return selective_scan(
        *(arrays[k] for k in first),
        delta_softplus=case.softplus, segment_ids=ids, return_final_state=True,
        discretization="zoh" if case.zoh else "euler", chunk=case.chunk,
        implementation=implementation, **others,
    )  # fmt: skip


@functools.cache
def compiled(case: Case, implementation: Any):
    def call(floats, parts, ids, weights):
        y, end = called(case, implementation, joined(floats, parts), ids)
        total = jnp.sum(weights[0] * y.astype(jnp.float32))
        total += jnp.sum(weights[1] * end.real)
        if case.kind != "real":
            total += jnp.sum(weights[2] * end.imag)
        return total, (y, end)

    return QUICKLY(jax.value_and_grad(call, (0, 1), has_aux=True))


def expected(case: Case, floats, parts, ids, weights):
    exact = {
        k: np.asarray(x.astype(jnp.float32), np.float64) for k, x in floats.items()
    }
    exact |= {k: exact[k] + 1j * np.asarray(x, np.float64) for k, x in parts.items()}
    batch, length, channels, states, groups = case.shape
    for name in ("B", "C"):
        exact[name] = exact[name].reshape(batch, length, groups or 1, states)
    given = dict(exact)
    plain = {
        "D": np.zeros(channels), "delta_bias": np.zeros(channels),
        "initial_state": np.zeros((batch, channels, states)),
        # Where silu is 1.
        "z": np.full((batch, length, channels), 1.2784645427610737),
    }  # fmt: skip
    exact = {**plain, **exact}
    d_y, d_re, d_im = (np.asarray(w, np.float64) for w in weights)
    d_end = d_re + 1j * d_im if case.kind != "real" else d_re
    y, end, grads = oracle(
        exact, d_y, d_end, softplus=case.softplus, zoh=case.zoh,
        ids=None if ids is None else np.asarray(ids),
    )  # fmt: skip
    return y, end, {k: grads[k] for k in given}


BOUND = {"float32": 1e-5, "bfloat16": 1e-2}


def close(name, actual, wanted, bound):
    actual = np.asarray(actual)
    actual = actual.astype(np.complex128 if np.iscomplexobj(actual) else np.float64)
    wanted = wanted.reshape(actual.shape)
    largest = np.abs(wanted).max(initial=1e-30)
    assert np.isfinite(actual).all(), name
    assert np.abs(actual - wanted).max(initial=0.0) <= bound * largest, name


def check(case: Case, implementation, seed):
    floats, parts, ids, weights = drawn(case, seed)
    (_, (y, end)), (of_floats, of_parts) = compiled(case, implementation)(
        floats, parts, ids, weights
    )
    wanted_y, wanted_end, grads = expected(case, floats, parts, ids, weights)
    assert y.dtype == case.dtype
    assert end.dtype == ("float32" if case.kind == "real" else "complex64")
    # Narrow numbers are rounded on the way out, not before.
    close("y", y, wanted_y, BOUND[case.dtype])
    close("end", end, wanted_end, 1e-5)
    for name, gradient in of_floats.items():
        bound = BOUND[str(gradient.dtype)]
        close(f"d {name}", gradient, grads[name].real, bound)
    for name, gradient in of_parts.items():
        close(f"d imaginary {name}", gradient, grads[name].imag, 1e-5)


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


# Derivatives, memory, decoding, documents, errors.


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


def test_it_says_which_implementation_ran(monkeypatch, capsys):
    one, A = jnp.ones((1, 2, 3)), -jnp.ones((3, 3))
    selective_scan(one, one, A, one, one)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    selective_scan(one, one, A, one, one)
    selective_scan(one, one, A, one, one, implementation="ref")
    selective_scan(one[:, :0], one[:, :0], A, one[:, :0], one[:, :0])
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    jax.eval_shape(selective_scan, one, one, A, one, one)
    jax.eval_shape(selective_scan, one, one, A + 0j, one, one)
    said = capsys.readouterr().err.splitlines()
    starts = [
        "xla (there is no kernel for 'cpu'); u float32[1, 2, 3], A [3, 3]",
        "ref (asked for)",
        "ref (an axis has length 0",
        "pallas_tpu (the fastest here)",
        "xla (the TPU kernel takes real A",
    ]
    for line, start in zip(said, starts, strict=True):
        assert line.startswith(f"selective_scan: {start}")


ONE = jnp.ones((2, 5, 4))
GOOD: dict[str, Any] = {
    "u": ONE, "delta": ONE, "A": -ONE[0, :4, :3], "B": ONE[..., :3], "C": ONE[..., :3],
}  # fmt: skip
BAD = {
    "u": ({"u": ONE[0]}, TypeError, r"'u' is float32\[5, 4\], expected \[B, T, D\]\."),
    "ints": ({"u": ONE.astype(int)}, TypeError, "'u' is int32.*expected floats"),
    "delta": ({"delta": ONE[:, :4]}, TypeError, r"'delta' .*expected \[2, 5, 4\]"),
    "A": ({"A": ONE[0]}, TypeError, r"'A' is float32\[5, 4\], expected .*D = 4"),
    "A ints": ({"A": GOOD["A"].astype(int)}, TypeError, "'A' is int32"),
    "B": ({"B": ONE}, TypeError, r"'B' .*expected \[2, 5, 3\], or \[2, 5, G, 3\]"),
    "groups": ({"B": jnp.ones((2, 5, 3, 3))}, TypeError, "'B' .*a divisor of 4"),
    "no groups": ({"B": jnp.ones((2, 5, 0, 3))}, TypeError, "'B' .*a divisor of 4"),
    "complex B": ({"B": GOOD["B"] + 0j}, TypeError, "'B' is complex64.*'A' is not"),
    "C": ({"C": jnp.ones((2, 5, 1, 3))}, TypeError, r"'C' .*expected \[2, 5, 3\]"),
    "D": ({"D": ONE[0]}, TypeError, r"'D' is float32\[5, 4\], expected \[4\]"),
    "z": ({"z": ONE[:1]}, TypeError, r"'z' .*expected \[2, 5, 4\]"),
    "bias": ({"delta_bias": ONE[0, 0, :1]}, TypeError, r"'delta_bias' .*\[4\]"),
    "state": ({"initial_state": ONE}, TypeError, r"'initial_state' .*\[2, 4, 3\]"),
    "complex state": (
        {"initial_state": jnp.ones((2, 4, 3)) + 0j}, TypeError,
        "'initial_state' is complex64.*'A' is not",
    ),
    "ids": (
        {"segment_ids": jnp.ones((2, 4), int)}, TypeError,
        r"'segment_ids' .*expected integers \[2, 5\]",
    ),
    "float ids": ({"segment_ids": ONE[..., 0]}, TypeError, "'segment_ids' is float32"),
    "chunk": ({"chunk": 0}, ValueError, "'chunk' is 0, expected at least 1"),
    "rule": (
        {"discretization": cast(Any, "tustin")}, ValueError,
        "'discretization' is 'tustin', expected 'euler' or 'zoh'",
    ),
    "axis": ({"axis_name": "time"}, ValueError, "'axis_name' is 'time'"),
    "name": (
        {"implementation": cast(Any, "cuda")}, ValueError,
        "'implementation' is 'cuda', expected one of 'ref', 'xla'",
    ),
    "platform": (
        {"implementation": "pallas_tpu"}, NotImplementedError,
        "'pallas_tpu', but the TPU kernel does not run on 'cpu'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message):
        selective_scan(**{**GOOD, **changed})


BAD_STEPS = {
    "u": ({"u": ONE}, r"'u' .*expected \[B, D\]"),
    "B": ({"B": ONE[:, 0]}, r"'B' .*expected \[2, 3\], or \[2, G, 3\]"),
    "state": ({"state": ONE}, r"'state' .*expected \[2, 4, 3\]"),
    "reset": ({"reset": jnp.ones(2)}, r"'reset' .*expected bools \[2\]"),
}


@pytest.mark.parametrize("name", BAD_STEPS)
def test_bad_input_of_a_step_is_named(name):
    changed, message = BAD_STEPS[name]
    row = {k: x if k == "A" else x[:, 0] for k, x in GOOD.items()}
    given = {"state": jnp.zeros((2, 4, 3)), **row, **changed}
    with pytest.raises(TypeError, match=message):
        step(**given)
    with pytest.raises(ValueError, match="'discretization' is 'exact'"):
        step(**{**given, "discretization": "exact"})
