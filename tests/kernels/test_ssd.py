"""The scan of Mamba-2 against a float64 recurrence in NumPy."""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ssd import pallas_tpu, ssd, step

# Each test runs once what it compiles.
QUICKLY = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)

# The oracle: the recurrence and its adjoint, one token at a time.


def sigmoid(x):
    return np.exp(-np.logaddexp(0.0, -x))


def oracle(a, d_y, d_state, *, softplus, ids):
    """y, the final state and the gradient of every input; float64 throughout."""
    raw = a["dt"] + a.get("dt_bias", 0.0)
    dt = np.logaddexp(0.0, raw) if softplus else raw
    batch, length, heads, width = a["x"].shape
    many = heads // a["B"].shape[2]
    B, C = (np.repeat(a[k], many, axis=2) for k in "BC")
    states = np.zeros((length + 1, batch, heads, width, B.shape[3]))
    states[0] = a.get("initial_state", 0.0)
    decay = np.exp(dt * a["A"])
    if ids is not None:
        decay[:, 1:][ids[:, 1:] != ids[:, :-1]] = 0.0
    D = a.get("D", np.zeros(heads))
    D = D if D.ndim == 2 else np.repeat(D[:, None], width, 1)
    core = np.zeros(a["x"].shape)
    for t in range(length):
        new = (dt[:, t, :, None] * a["x"][:, t])[..., None] * B[:, t, :, None]
        states[t + 1] = decay[:, t, :, None, None] * states[t] + new
        core[:, t] = (states[t + 1] * C[:, t, :, None]).sum(-1) + D * a["x"][:, t]
    gate, slope = 1.0, 0.0
    if "z" in a:
        s = sigmoid(a["z"])
        gate, slope = a["z"] * s, s * (1 + a["z"] * (1 - s))
    g = d_y * gate
    grads = {k: np.zeros(v.shape) for k, v in a.items()}
    if "z" in a:
        grads["z"] = d_y * core * slope
    grads["x"] = g * D
    d_D = (g * a["x"]).sum((0, 1))
    dB, dC, d_dt = np.zeros(B.shape), np.zeros(C.shape), np.zeros(dt.shape)
    back = d_state.copy()
    for t in range(length - 1, -1, -1):
        dC[:, t] = (g[:, t][..., None] * states[t + 1]).sum(2)
        back = back + g[:, t][..., None] * C[:, t, :, None]
        along = (back * B[:, t, :, None]).sum(-1)
        grads["x"][:, t] += dt[:, t, :, None] * along
        dB[:, t] = ((dt[:, t, :, None] * a["x"][:, t])[..., None] * back).sum(2)
        inner = decay[:, t] * (back * states[t]).sum((2, 3))
        d_dt[:, t] = (a["x"][:, t] * along).sum(-1) + a["A"] * inner
        grads["A"] += (dt[:, t] * inner).sum(0)
        back = decay[:, t, :, None, None] * back
    d_dt *= sigmoid(raw) if softplus else 1.0
    by_group = (batch, length, -1, many, B.shape[3])
    found = {"dt": d_dt, "dt_bias": d_dt.sum((0, 1)), "initial_state": back}
    found |= {"B": dB.reshape(by_group).sum(3), "C": dC.reshape(by_group).sum(3)}
    found["D"] = d_D if a.get("D", D).ndim == 2 else d_D.sum(1)
    return core * gate, states[-1], grads | {k: v for k, v in found.items() if k in a}


class Case(NamedTuple):
    """What is static in a call; values are drawn."""

    shape: tuple[int, ...]  # B, T, H, P, G, N
    chunk: int | None = None
    extras: str = ""  # of D, d (for each of P), z, b(ias), i(nitial), s(egments)
    softplus: bool = False
    dtype: str = "float32"


CASES = (
    Case((2, 37, 4, 3, 2, 5), 8, "Dzbis", True),
    Case((1, 64, 2, 8, 1, 16), 16, "dis"),
    Case((2, 1, 2, 3, 1, 4), None, "Dzi"),
    Case((1, 131, 2, 4, 2, 3), None, "Dis"),
    Case((3, 19, 6, 2, 2, 1), 4, "dzis", True),
    Case((2, 12, 1, 1, 1, 2), 1, "s"),
    Case((1, 7, 3, 2, 3, 3), 9, "bi", True),
    Case((2, 37, 4, 3, 2, 5), 8, "Dzbis", True, "bfloat16"),
    Case((1, 131, 2, 4, 2, 3), None, "Dis", False, "bfloat16"),
)
BOUND = {"float32": 1e-5, "bfloat16": 1e-2}


@functools.cache
def compiled(case: Case, implementation: Any):
    """Outputs and gradients of every float input as one compiled function."""

    def call(floats, ids, d_y, d_state):
        def outputs(floats):
            return ssd(
                **floats, segment_ids=ids, return_final_state=True, chunk=case.chunk,
                dt_softplus=case.softplus, implementation=implementation,
            )  # fmt: skip

        out, back = jax.vjp(outputs, floats)
        return out, back((d_y.astype(out[0].dtype), d_state))[0]

    return QUICKLY(call)


def drawn(case: Case, seed: int):
    """Inputs: steps from 1e-4 to 1e2, alone or mixed, and A from 0 to -20."""
    rng = np.random.default_rng(seed)
    batch, length, heads, width, groups, states = case.shape
    low, high = [(-4, -4), (-2, 0), (-4, 2), (2, 2)][rng.integers(4)]
    dt = 10.0 ** rng.uniform(low, high, (batch, length, heads))
    if case.softplus:
        dt = np.log(np.expm1(np.minimum(dt, 30.0))) + (dt > 30) * dt
    size = 10.0 ** [-6, -1, 0, 1.3][rng.integers(4)]

    def normal(*shape):
        return rng.normal(size=shape)

    floats = {
        "x": normal(batch, length, heads, width),
        "dt": dt,
        "A": -size * rng.random(heads),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
    }
    if "D" in case.extras:
        floats["D"] = normal(heads)
    if "d" in case.extras:
        floats["D"] = normal(heads, width)
    if "z" in case.extras:
        floats["z"] = 2 * normal(batch, length, heads, width)
    if "b" in case.extras:
        floats["dt_bias"] = 0.1 * normal(heads)
    if "i" in case.extras:
        floats["initial_state"] = normal(batch, heads, width, states)
    small = ("x", "B", "C", "z")
    floats = {
        k: jnp.asarray(v, case.dtype if k in small else "float32")
        for k, v in floats.items()
    }
    ids = None
    if "s" in case.extras:
        changes = rng.random((batch, length)) < rng.choice([0.0, 0.1, 0.5])
        ids = np.cumsum(changes, axis=1) % 3
    d_y = jnp.asarray(normal(batch, length, heads, width), case.dtype)
    d_state = jnp.asarray(normal(batch, heads, width, states), jnp.float32)
    return floats, ids, d_y, d_state


def close(actual, wanted, bound, name=""):
    """Relative to the largest value.

    dt A = -50 is known to 3e-6 in float32, and so is its exponential: what is left of
    anything after such a step, 1e-20 of it, is held to 1e-17.
    """
    actual = np.asarray(actual.astype(jnp.float32), np.float64)
    assert actual.shape == wanted.shape, name
    assert np.all(np.isfinite(actual)), name
    far = np.abs(actual - wanted).max(initial=0.0)
    largest = np.abs(wanted).max(initial=1e-12)
    assert far <= bound * largest, (name, far / largest)


def double(x):
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def check(case, implementation, seed):
    floats, ids, d_y, d_state = drawn(case, seed)
    (y, state), grads = compiled(case, implementation)(floats, ids, d_y, d_state)
    assert y.dtype == case.dtype and state.dtype == jnp.float32
    wanted_y, wanted_state, wanted = oracle(
        {k: double(v) for k, v in floats.items()}, double(d_y), double(d_state),
        softplus=case.softplus, ids=ids,
    )  # fmt: skip
    close(y, wanted_y, BOUND[case.dtype], "y")
    close(state, wanted_state, 1e-5, "state")
    for name, gradient in grads.items():
        assert gradient.dtype == floats[name].dtype
        close(gradient, wanted[name], BOUND[case.dtype], name)


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


def arrays(length=20):
    floats, *_ = drawn(Case((2, length, 4, 3, 2, 5)), 2)
    return tuple(floats[k] for k in ("x", "dt", "A", "B", "C"))


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


def test_it_says_which_implementation_ran(monkeypatch, capsys):
    monkeypatch.setenv("PALLAS_KERNELS_LOG", "1")
    ssd(*arrays())
    ssd(*arrays(), implementation="ref")
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    jax.eval_shape(ssd, *arrays())
    x, *others = arrays()
    jax.eval_shape(ssd, x.astype(jnp.bfloat16), *others)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(
        "ssd: xla (there is no kernel for 'cpu'); x float32[2, 20, 4, 3], B [2, 20"
    )
    assert said[1].startswith("ssd: ref (asked for)")
    assert said[2].startswith("ssd: pallas_tpu (the fastest here)")
    assert said[3].startswith("ssd: xla (the TPU kernel takes x, B, C and z of one dty")


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU kernels, interpreted, as the implementation that is chosen."""
    monkeypatch.setenv("PALLAS_KERNELS_TARGET", "tpu")
    for name in ("forward", "backward"):
        whole = functools.partial(getattr(pallas_tpu, name), interpret=True)
        monkeypatch.setattr(pallas_tpu, name, whole)


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


ONES = jnp.ones
BAD = {
    "x of 3 axes": ({"x": ONES((2, 20, 4))}, TypeError, r"'x' is float32\[2, 20, 4\]"),
    "x of ints": ({"x": ONES((2, 20, 4, 3), int)}, TypeError, "'x' is int32"),
    "dt": ({"dt": ONES((2, 20, 1))}, TypeError, r"'dt' .*expected floats \[2, 20, 4\]"),
    "A": ({"A": ONES((4, 5))}, TypeError, r"'A' is float32\[4, 5\], expected .*\[4\]"),
    "B of 3 axes": ({"B": ONES((2, 20, 5))}, TypeError, "'B' is"),
    "B of fewer tokens": ({"B": ONES((2, 19, 2, 5))}, TypeError, "'B' is"),
    "groups": (
        {"B": ONES((2, 20, 3, 5)), "C": ONES((2, 20, 3, 5))}, TypeError,
        "'B' .* divides the 4 of 'x'",
    ),
    "C": ({"C": ONES((2, 20, 2, 6))}, TypeError, "'C' .*as 'B' has"),
    "D": ({"D": ONES(3)}, TypeError, r"'D' is float32\[3\].* or \[4, 3\]"),
    "D of 2 axes": ({"D": ONES((4, 2))}, TypeError, "'D' is"),
    "z": ({"z": ONES((2, 20, 4, 1))}, TypeError, "'z' .*as 'x' has"),
    "dt_bias": ({"dt_bias": ONES(1)}, TypeError, "'dt_bias' is"),
    "state": (
        {"initial_state": ONES((2, 4, 5, 3))}, TypeError,
        r"'initial_state' .*expected floats \[2, 4, 3, 5\]",
    ),
    "ids": ({"segment_ids": ONES((2, 19), int)}, TypeError, "'segment_ids' is int32"),
    "ids of floats": ({"segment_ids": ONES((2, 20))}, TypeError, "'segment_ids' is f"),
    "chunk": ({"chunk": 0}, ValueError, "'chunk' is 0"),
    "axis": ({"axis_name": "t"}, ValueError, "'axis_name' is 't'"),
    "name": (
        {"implementation": "cudnn"}, ValueError, "'cudnn', expected one of 'ref', 'xla'"
    ),
    "platform": (
        {"implementation": "pallas_tpu"}, NotImplementedError,
        "'pallas_tpu', but the TPU kernel does not run on 'cpu'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    bad, error, message = BAD[name]
    given = dict(zip(("x", "dt", "A", "B", "C"), arrays(), strict=True))
    with pytest.raises(error, match=message):
        ssd(**cast(Any, given | bad))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"state": ONES((2, 4, 3))}, "'state' is"),
        ({"x": ONES((2, 1, 4, 3))}, "'x' is"),
        ({"dt": ONES(4)}, "'dt' is"),
        ({"B": ONES((2, 5))}, "'B' is"),
        ({"reset": ONES(2)}, r"'reset' is float32\[2\], expected bool \[2\]"),
    ],
)
def test_bad_input_of_a_step_is_named(bad, message):
    x, dt, A, B, C = (a if a.ndim == 1 else a[:, 0] for a in arrays())
    given = {"state": ONES((2, 4, 3, 5)), "x": x, "dt": dt, "A": A, "B": B, "C": C}
    with pytest.raises(TypeError, match=message):
        step(**cast(Any, given | bad))
