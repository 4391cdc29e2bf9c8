"""A float64 recurrence of the selective scan, its adjoint, in NumPy; and its cases."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from running import QUICKLY

from pallas_kernels.selective_scan import selective_scan

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
