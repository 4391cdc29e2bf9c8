"""Mamba-2's recurrence and its adjoint in float64 NumPy, and the cases drawn for it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from running import QUICKLY

from pallas_kernels.ssd import ssd

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


def arrays(length=20):
    floats, *_ = drawn(Case((2, length, 4, 3, 2, 5)), 2)
    return tuple(floats[k] for k in ("x", "dt", "A", "B", "C"))
