"""What the tests of Mamba-2's kernels share: inputs, the definition, a distance."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from running import QUICKLY

from pallas_kernels.ssd import ref
from pallas_kernels.ssd.form import Inputs


def inputs(shape, extras="", dtype=jnp.float32, high=0.0) -> Any:
    """A call of a shape (B, T, G, R, P, N), and the gradients of its results.

    Extras: D, z, s(egments). Steps are from 1e-2 to 10^high.
    """
    rng = np.random.default_rng(0)
    batch, length, groups, heads, width, states = shape

    def normal(*size):
        return jnp.asarray(rng.normal(size=size), jnp.float32)

    over_time = (batch, length, groups)
    dt = 10.0 ** rng.uniform(-2, high, (*over_time, heads))
    fresh = rng.random((batch, length)) < 0.02
    call = Inputs(
        x=normal(*over_time, heads, width).astype(dtype),
        dt=jnp.asarray(dt, jnp.float32),
        log_decay=jnp.asarray(-dt * rng.random((groups, heads)), jnp.float32),
        b=normal(*over_time, states).astype(dtype),
        c=normal(*over_time, states).astype(dtype),
        skip=normal(groups, heads, width) if "D" in extras else None,
        gate=normal(*over_time, heads, width).astype(dtype) if "z" in extras else None,
        state=normal(batch, groups, heads, width, states),
        fresh=jnp.asarray(fresh) if "s" in extras else None,
    )
    d_y = normal(*over_time, heads, width).astype(dtype)
    return call, d_y, normal(batch, groups, heads, width, states)


@QUICKLY
def definition(call, d_y, d_state):
    def scan(floats):
        return ref.scan(floats._replace(fresh=call.fresh))

    floats = jax.tree.map(lambda x: x.astype(jnp.float32), call._replace(fresh=None))
    (y, state), back = jax.vjp(scan, floats)
    return y, state, back((d_y.astype(jnp.float32), d_state))[0]


def assert_near(got, wanted, bound):
    """y, the last state and each gradient, relative to its largest value."""
    names = ("y", "state", *Inputs._fields)
    pairs = zip(names, (*got[:2], *got[2]), (*wanted[:2], *wanted[2]), strict=True)
    for name, a, b in pairs:
        assert (a is None) == (b is None), name
        if a is None:
            continue
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape and np.all(np.isfinite(a)), name
        far = np.abs(a - b).max()
        assert far <= bound * np.abs(b).max(), (name, far / np.abs(b).max())


def sizes(shape, dtype: Any = "float32") -> str:
    letters = zip("BTGRPN", shape, strict=True)
    numbers = " ".join(f"{letter}={size}" for letter, size in letters)
    return f"{numbers} {getattr(dtype, '__name__', dtype)}"
