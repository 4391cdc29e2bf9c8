"""What `attention` may be called with: refusals that name the argument."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

Window = int | tuple[int | None, int | None]


class Dropout(NamedTuple):
    """Which share of the pairs is dropped, and by which key.

    Attributes:
        rate: in [0, 1).
        key: a typed key, consumed. The same key drops the same pairs in every
            implementation.
    """

    rate: float
    key: Key[Array, ""]


def check_arrays(q: Array, k: Array, v: Array) -> None:
    """Refuses queries, keys and values that do not fit each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise wrong(name, x, "[batch, length, heads, width]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise wrong(name, x, "floats")
        if x.dtype != q.dtype:
            raise wrong(name, x, f"{q.dtype}, as 'q' has")
    batch, _, heads, width = q.shape
    if (k.shape[0], k.shape[3]) != (batch, width):
        raise wrong("k", k, f"[{batch}, S, K, {width}], to fit 'q'")
    if v.shape != k.shape:
        raise wrong("v", v, f"{list(k.shape)}, as 'k' has")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise wrong("k", k, f"a number of heads that divides the {heads} of 'q'")


def segments(ids, q: Array, k: Array) -> tuple[Array | None, Array | None]:
    """Ids as `[B|1, K|1, G|1, T]` and `[B|1, K|1, S]`."""
    if ids is None:
        return None, None
    pair = ids if isinstance(ids, tuple) else (ids, ids)
    batch, length, heads, _ = q.shape
    _, keys, key_heads, _ = k.shape
    rows, columns = (jnp.asarray(x) for x in pair)
    for x, size, count in ((rows, length, heads), (columns, keys, key_heads)):
        fits = x.ndim in (2, 3) and x.shape[0] in (1, batch) and x.shape[1] == size
        fits = fits and (x.ndim == 2 or x.shape[2] == count)
        if not fits or not jnp.issubdtype(x.dtype, jnp.integer):
            raise wrong(
                "segment_ids", x,
                f"integers [{batch}, {size}] or [{batch}, {size}, {count}], or a pair "
                "for queries and keys",
            )  # fmt: skip
    rows = rows[:, None, None] if rows.ndim == 2 else jnp.moveaxis(rows, 2, 1)
    if rows.ndim == 3:
        rows = rows.reshape(rows.shape[0], key_heads, heads // key_heads, length)
    columns = columns[:, None] if columns.ndim == 2 else jnp.moveaxis(columns, 2, 1)
    return rows, columns


def window_sides(window: Window | None) -> tuple[int | None, int | None]:
    """How far queries see to the left and to the right, None where without limit."""
    if window is None:
        return None, None
    sides = window if isinstance(window, tuple) else (window, window)
    least = 0 if isinstance(window, tuple) else 1
    if len(sides) != 2 or any(s is not None and s < least for s in sides):
        raise ValueError(
            f"argument 'window' is {window}, expected a number above 0 or a pair "
            "(left, right) of numbers not below 0, or None."
        )
    return sides


def finite(name: str, value: float) -> float:
    """The number, if it is one."""
    value = float(value)
    if value != value or value in (float("inf"), -float("inf")):
        raise ValueError(f"argument '{name}' is {value}, expected a finite number.")
    return value


def softcap_of(value: float) -> float:
    """The cap, if it is above 0."""
    if not 0 < value < float("inf"):
        raise ValueError(f"argument 'logit_softcap' is {value}, expected above 0.")
    return float(value)


def drop_rate(value: float) -> float:
    """The rate, if it is one."""
    if not 0 <= value < 1:
        raise ValueError(f"argument 'dropout' has rate {value}, expected in [0, 1).")
    return float(value)


def seed_of(dropout: Dropout | tuple[float, Array] | None) -> Array:
    """Two words of a typed key, for kernels."""
    assert dropout is not None
    if not jnp.issubdtype(dropout[1].dtype, jax.dtypes.prng_key):
        raise wrong("dropout", dropout[1], "(rate, key) with a typed key")
    return jax.random.bits(dropout[1], (2,), jnp.uint32)


def wrong(name: str, x: Array, expected: str) -> TypeError:
    """The error of an array that is not what was expected."""
    return TypeError(
        f"argument '{name}' is {x.dtype}{list(x.shape)}, expected {expected}."
    )
