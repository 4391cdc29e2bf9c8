"""From the arguments of a call to its normal form, with every argument checked."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.activations import softplus
from pallas_kernels.ssd.form import Inputs

__all__ = ["fits", "normal", "shared", "sizes", "wrong"]

# A step of which less than exp(-1e4) is left leaves nothing, in float64 as well.
LEAST = -1e4


def normal(
    x: Array, dt: Array, A: Array, B: Array, C: Array, D: Any, z: Any, dt_bias: Any,
    dt_softplus: bool, state: Any, fresh: Any,
) -> Inputs:  # fmt: skip
    """The call with its heads by group; with or without an axis of time."""
    floats = [a for a in (x, dt, A, B, C, D, z, dt_bias, state) if a is not None]
    dtype = jnp.promote_types(jnp.result_type(*floats), jnp.float32)
    batch, (heads, width), (groups, states) = x.shape[0], x.shape[-2:], B.shape[-2:]
    by_group = (groups, heads // groups)

    def grouped(a: Array) -> Array:
        return a.reshape(*a.shape[:-2], *by_group, width)

    dt = dt.astype(dtype)
    wide = (1,) * (dt.ndim - 1)
    if dt_bias is not None:
        dt += dt_bias.astype(dtype).reshape(*wide, heads)
    if dt_softplus:
        dt = softplus(dt)
    log_decay = jnp.maximum(dt * A.astype(dtype).reshape(*wide, heads), LEAST)
    if D is not None:
        D = D.astype(dtype)
        D = grouped(jnp.broadcast_to(D if D.ndim == 2 else D[:, None], x.shape[-2:]))
    if state is None:
        state = jnp.zeros((batch, heads, width, states), dtype)
    return Inputs(
        x=grouped(x),
        dt=dt.reshape(*dt.shape[:-1], *by_group),
        log_decay=log_decay.reshape(*dt.shape[:-1], *by_group),
        b=B,
        c=C,
        skip=D,
        gate=None if z is None else grouped(z),
        state=state.astype(dtype).reshape(batch, *by_group, width, states),
        fresh=fresh,
    )


def shared(
    x: Array, A: Array, B: Array, C: Array, D: Any, z: Any, dt_bias: Any, state: Any,
    of_state: str = "initial_state",
) -> None:  # fmt: skip
    """Check what `ssd` and `step` have in common."""
    batch, (heads, width), (groups, states) = x.shape[0], x.shape[-2:], B.shape[-2:]
    if groups == 0 or heads % groups:
        raise wrong("B", B, f"a number of groups that divides the {heads} of 'x'")
    fits("A", A, (heads,))
    fits("C", C, B.shape, ", as 'B' has")
    if D is not None and D.ndim == 2:
        fits("D", D, (heads, width))
    elif D is not None:
        fits("D", D, (heads,), f" or [{heads}, {width}]")
    if z is not None:
        fits("z", z, x.shape, ", as 'x' has")
    if dt_bias is not None:
        fits("dt_bias", dt_bias, (heads,))
    if state is not None:
        fits(of_state, state, (batch, heads, width, states))


def sizes(x: Array, expected: tuple[str, int, str]) -> tuple[int, ...]:
    """The shape of floats, for which a name, a number of axes and a shape are given."""
    name, axes, shape = expected
    if x.ndim != axes or not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong(name, x, f"floats {shape}")
    return x.shape


def fits(name: str, x: Array, shape: tuple[int, ...], why: str = "") -> None:
    """Check that an argument is floats of a shape."""
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise wrong(name, x, f"floats {list(shape)}{why}")


def wrong(name: str, x: Array, expected: str) -> TypeError:
    """The error that names an argument, what came and what was expected."""
    return TypeError(
        f"argument '{name}' is {x.dtype}{list(x.shape)}, expected {expected}."
    )
