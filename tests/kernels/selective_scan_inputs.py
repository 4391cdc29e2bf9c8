"""What the tests of the scan's kernels share: inputs, the definition, other calls."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.selective_scan import ref, selective_scan
from pallas_kernels.selective_scan.terms import Inputs, Rule

RNG = np.random.default_rng(0)
SOFT, HARD = Rule(softplus=True), Rule()


def normal(*shape, dtype: Any = jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32).astype(dtype)


def inputs(shape, dtype: Any = jnp.float32, extras=True) -> tuple[Inputs, Any, Any]:
    """The arrays of (B, T, G, P, N), and gradients of y and of the last state."""
    batch, length, groups, width, states = shape
    of_tokens, of_states = shape[:4], (batch, length, groups, states)
    start = (batch, groups, states, width)
    ids = np.sort(RNG.integers(0, 3, (batch, length)), 1)
    arrays = Inputs(
        u=normal(*of_tokens, dtype=dtype),
        delta=(normal(*of_tokens) - 1 if extras else abs(normal(*of_tokens))),
        A=-jnp.exp(normal(groups, states, width) - 1),
        B=normal(*of_states, dtype=dtype),
        C=normal(*of_states, dtype=dtype),
        D=normal(groups, width) if extras else None,
        z=normal(*of_tokens, dtype=dtype) if extras else None,
        delta_bias=normal(groups, width) if extras else None,
        start=normal(*start),
        resets=jnp.asarray(np.diff(ids, axis=1, prepend=ids[:, :1]) != 0)
        if extras
        else None,
    )
    arrays = arrays._replace(delta=arrays.delta.astype(dtype))
    return arrays, normal(*of_tokens, dtype=dtype), normal(*start)


def definition(rule, arrays, d_y, d_end):
    def scan(floats):
        return ref.scan(rule, floats._replace(resets=arrays.resets))

    floats = arrays._replace(resets=None)
    (y, end), back = jax.vjp(scan, floats)
    return y, end, back((d_y.astype(y.dtype), d_end))[0]


def assert_near(actual, wanted, bound):
    """y, the last state and each gradient, relative to its largest value."""
    names = ("y", "end", *(f"d {k}" for k in Inputs._fields))
    both = zip(names, *((y, e, *d) for y, e, d in (actual, wanted)), strict=True)
    for name, a, b in both:
        assert (a is None) == (b is None), name
        if b is not None:
            a, b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (a, b))
            assert a.shape == b.shape, name
            far = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
            assert far <= bound, (name, far)


def described(shape: tuple[int, ...], dtype: Any) -> str:
    batch, length, groups, width, states = shape
    sizes = f"B={batch} T={length} D={groups * width} G={groups} N={states}"
    return f"{sizes} {jnp.dtype(dtype).name}"


def knobs(arrays: Inputs) -> dict[str, Any]:
    """The arrays as arguments of the operation, of one group."""
    drop = {k: jnp.squeeze(x, -2) for k, x in arrays._asdict().items() if k in "uDzBC"}
    return {
        **drop,
        "delta": jnp.squeeze(arrays.delta, -2),
        "A": jnp.swapaxes(arrays.A[0], 0, 1),
        "delta_bias": arrays.delta_bias[0],
        "initial_state": jnp.swapaxes(arrays.start[:, 0], -1, -2),
    }


def everything(array, tokens, states, dtype, implementation: Any) -> tuple[Any, Any]:
    """Value and gradients of a call with all that can be given; its arguments.

    `array(*shape, dtype=float32)` makes them; u is of shape `tokens`, B of `states`.
    """
    batch, length, channels = tokens
    of_tokens, of_states = array(*tokens, dtype=dtype), array(*states, dtype=dtype)
    rows = channels, states[-1]
    floats = {
        "u": of_tokens, "delta": of_tokens, "A": array(*rows),
        "B": of_states, "C": of_states, "D": array(channels), "z": of_tokens,
        "delta_bias": array(channels), "initial_state": array(batch, *rows),
    }  # fmt: skip
    ids = array(batch, length, dtype=jnp.int32)

    def gradient(floats, ids, d_y):
        scan = functools.partial(
            selective_scan, delta_softplus=True, implementation=implementation
        )
        y, back = jax.vjp(lambda floats: scan(**floats, segment_ids=ids), floats)
        return y, back(d_y)

    return gradient, (floats, ids, of_tokens)


def split_in_two(check: bool) -> tuple[Any, Any, Any]:
    """A loss with the sequence whole in XLA, and split in two; its arguments."""
    arrays, d_y, _ = inputs((2, 24, 1, 5, 3))
    floats, ids = knobs(arrays), jnp.cumsum(arrays.resets, axis=1)
    weights = d_y[:, :, 0]
    mesh = jax.make_mesh((2,), ("time",), axis_types=(AxisType.Auto,))
    along = {"u", "delta", "B", "C", "z"}
    specs = {k: P(None, "time") if k in along else P() for k in floats}

    def total(floats, ids, weights, **words):
        y, end = selective_scan(
            **floats, delta_softplus=True, segment_ids=ids, return_final_state=True,
            **words,
        )  # fmt: skip
        return jnp.sum(weights * jnp.sin(y)), jnp.sum(jnp.sin(end))

    def part(floats, ids, weights):
        of_y, of_end = total(floats, ids, weights, axis_name="time")
        return jax.lax.psum(of_y, "time") + of_end

    split = jax.shard_map(
        part, mesh=mesh, in_specs=(specs, P(None, "time"), P(None, "time")),
        out_specs=P(), check_vma=check,
    )  # fmt: skip

    def whole(floats, ids, weights):
        return sum(total(floats, ids, weights, implementation="xla"))

    return whole, split, (floats, ids, weights)
