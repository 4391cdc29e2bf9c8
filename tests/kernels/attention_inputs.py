"""What the tests of attention's kernels share: inputs, the definition, a distance.

What is drawn depends on its shape alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from running import QUICKLY

from pallas_kernels.attention import ref

SEED = jnp.array([3, 4], jnp.uint32)
SINKS = jnp.array([[0.5, -jnp.inf], [2.0, -1.0]])


def inputs(shape, dtype: Any = jnp.float32) -> Any:
    """q, k, v, d_out, d_lse of a shape (B, K, G, T, S, H)."""
    rng = np.random.default_rng(shape)
    batch, heads, groups, queries, keys, width = shape
    of_queries = (batch, heads, groups, queries, width)
    of_keys = (batch, heads, keys, width)
    shapes = (of_queries, of_keys, of_keys, of_queries, of_queries[:4])
    arrays = [jnp.asarray(rng.normal(size=x), jnp.float32) for x in shapes]
    return *(x.astype(dtype) for x in arrays[:4]), arrays[4]


def ids(*shape, last=3):
    """Sorted along the last axis."""
    drawn = np.random.default_rng(shape).integers(0, last, shape)
    return jnp.asarray(np.sort(drawn, -1), jnp.int32)


def mask(*shape):
    return jnp.asarray(np.random.default_rng(shape).random(shape) < 0.4)


def far(actual, expected):
    """The largest difference, relative to the largest value."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(actual), finite)
    if not finite.any():
        return 0.0
    largest = np.abs(expected[finite]).max()
    return np.abs(actual[finite] - expected[finite]).max() / max(largest, 1e-30)


def definition(pattern, *arrays: Any) -> Any:
    """out, lse, dq, dk, dv and d_sinks in float32, of `inputs` and extras."""

    @QUICKLY
    def both(q, k, v, d_out, d_lse, extras):
        def attend(q, k, v, sinks):
            return ref.attend(pattern, q, k, v, extras._replace(sinks=sinks))

        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        (out, lse), back = jax.vjp(attend, q, k, v, extras.sinks)
        d_lse = jnp.where(lse > -jnp.inf, d_lse, 0.0)
        return out, lse, *back((d_out.astype(out.dtype), d_lse))

    return both(*arrays)
