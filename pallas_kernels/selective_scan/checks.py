"""What a call may be given, and how its arrays stand inside."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.selective_scan.terms import Inputs, Rule

__all__ = ["checked", "rule_of"]

RULES = ("euler", "zoh")


def rule_of(softplus: bool, discretization: str, chunk: int | None = None) -> Rule:
    """The static part of a call.

    Raises:
        ValueError: a knob is out of range.
    """
    if discretization not in RULES:
        raise ValueError(
            f"argument 'discretization' is {discretization!r}, expected 'euler' or "
            "'zoh'."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"argument 'chunk' is {chunk}, expected at least 1.")
    return Rule(bool(softplus), discretization == "zoh", chunk)


def checked(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any,
    start: Any, marks: Any, *, state: str, mark: str,
) -> Inputs:  # fmt: skip
    """The arrays of a call with channels in groups, or an error that names one.

    Args:
        u: `[B, T, D]`; for one token `[B, D]`, and the others alike.
        delta: like `u`.
        A: `[D, N]`.
        B: `[B, T, N]` or `[B, T, G, N]`.
        C: like `B`.
        D: `[D]` or None.
        z: like `u`, or None.
        delta_bias: `[D]` or None.
        start: `[B, D, N]` or None.
        marks: integers `[B, T]` (for one token bools `[B]`) or None; they come back as
            `resets`, unchanged.
        state: how the caller names `start`.
        mark: how the caller names `marks`.

    Raises:
        TypeError: a shape or a dtype does not fit.
    """
    u, delta, A, B, C = (jnp.asarray(x) for x in (u, delta, A, B, C))
    one = mark == "reset"
    shape = "[B, D]" if one else "[B, T, D]"
    if u.ndim != (2 if one else 3):
        raise wrong("u", u, shape)
    _float("u", u)
    _like("delta", delta, u.shape)
    channels, lead = u.shape[-1], u.shape[:-1]
    if A.ndim != 2 or A.shape[0] != channels:
        raise wrong("A", A, f"[D, N] with D = {channels}, as 'u' has")
    is_complex = jnp.iscomplexobj(A)
    _float("A", A, True)
    states = A.shape[1]
    groups = B.shape[-2] if B.ndim == u.ndim + 1 else 1
    grouped = (groups, states) if B.ndim > u.ndim else (states,)
    if B.shape != (*lead, *grouped) or groups == 0 or channels % groups:
        rows = ", ".join(map(str, lead))
        raise wrong(
            "B", B,
            f"[{rows}, {states}], or [{rows}, G, {states}] with G a divisor of "
            f"{channels}",
        )  # fmt: skip
    _float("B", B, is_complex)
    _like("C", C, B.shape, is_complex)
    if z is not None:
        _like("z", z := jnp.asarray(z), u.shape)
    if D is not None:
        _like("D", D := jnp.asarray(D), (channels,))
    if delta_bias is not None:
        _like("delta_bias", delta_bias := jnp.asarray(delta_bias), (channels,))
    of_states = (u.shape[0], channels, states)
    if start is None:
        start = jnp.zeros(of_states, jnp.promote_types(A.dtype, jnp.float32))
    _like(state, start := jnp.asarray(start), of_states, is_complex)
    if marks is not None:
        marks = jnp.asarray(marks)
        fits = marks.dtype == bool if one else jnp.issubdtype(marks.dtype, jnp.integer)
        if marks.shape != lead or not fits:
            raise wrong(mark, marks, f"{'bools' if one else 'integers'} {list(lead)}")
    width = channels // groups

    def split(x: Any) -> Any:
        return None if x is None else x.reshape(*x.shape[:-1], groups, width)

    def transposed(x: jax.Array) -> jax.Array:
        x = x.reshape(*x.shape[:-2], groups, width, states)
        return jnp.swapaxes(x, -1, -2)

    return Inputs(
        u=split(u),
        delta=split(delta),
        A=transposed(A),
        B=B.reshape(*lead, groups, states),
        C=C.reshape(*lead, groups, states),
        D=split(D),
        z=split(z),
        delta_bias=split(delta_bias),
        start=transposed(start),
        resets=marks,
    )


def wrong(name: str, x: jax.Array, expected: str) -> TypeError:
    """The error of an argument that does not fit."""
    return TypeError(
        f"argument '{name}' is {x.dtype}{list(x.shape)}, expected {expected}."
    )


def _float(name: str, x: jax.Array, may_be_complex: bool = False) -> None:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return
    if jnp.iscomplexobj(x) and may_be_complex:
        return
    what = "floats or complex numbers" if may_be_complex else "floats"
    if jnp.iscomplexobj(x) and name in ("B", "C", "state", "initial_state"):
        what = "floats, as 'A' is not complex"
    raise wrong(name, x, what)


def _like(
    name: str, x: jax.Array, shape: tuple[int, ...], may_be_complex: bool = False
) -> None:
    if x.shape != shape:
        raise wrong(name, x, f"{list(shape)}")
    _float(name, x, may_be_complex)
