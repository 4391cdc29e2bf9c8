"""Mamba: what a state keeps is selected by the token.

A state space model with states h, steps delta, rates A and maps B, C

    h_t = Abar_t h_(t-1) + Bbar_t x_t        y_t = C_t h_t + D x_t

can choose what it remembers once delta, B and C are functions of x_t: a large step
forgets the past for the token, a small one ignores the token. With one state, A = -1
and B = 1 that is a gated recurrence (theorem 1).

The recurrence itself, with its kernels, is `pallas_kernels.selective_scan`; the block
around it, with caches, is `jaxzoo.nn.mamba`. The two tasks are those on which the paper
shows what selection is for.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxzoo.core.typed import ArrayLike, as_float32, typed

PAPER = {
    "slug": "mamba",
    "title": "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    "arxiv": "2312.00752",
    "year": 2023,
    "authors": "Albert Gu, Tri Dao",
    "where": "Equations 2 to 4 (discretisation), algorithm 2 (selection), theorem 1 "
    "(gates), section 4.1 (selective copying, induction heads); figure 3 and section "
    "3.3 (the block, the scan) in jaxzoo.nn.mamba and pallas_kernels.selective_scan.",
    "differs": "The default for B is delta B, as in the released code; equation 4 has "
    "the exact zero-order hold. Copying 8 tokens out of 56 or 120 places, S4D blocks "
    "get 58 to 64 % right, not 50 or less (47 % once, of 120 and with a lower learning "
    "rate, where Mamba had 75 %); the paper's 18 % are of 16 in 4,096 places.",
}

__all__ = [
    "discretize",
    "gated_recurrence",
    "induction_heads",
    "selection",
    "selective_copying",
]


@typed
def discretize(
    delta: Float[ArrayLike, "*batch d"],
    A: Float[ArrayLike, "d n"],
    B: Float[ArrayLike, "*batch n"],
    *,
    method: Literal["euler", "zoh"] = "euler",
) -> tuple[Float[Array, "*batch d n"], Float[Array, "*batch d n"]]:
    """The coefficients of a step of size delta of dh/dt = A h + B x.

        Abar = e^(delta A)
        Bbar = delta B                    (euler)
        Bbar = (e^(delta A) - 1) / A B    (zoh: x is constant over the step)

    They meet where delta A is small. Both are made whole here, `[..., D, N]`: to run a
    sequence, `selective_scan` makes them as it goes.

    Args:
        delta: `[..., D]`, >= 0.
        A: `[D, N]`; negative rates forget, 0 adds up.
        B: `[..., N]`.
        method: "euler", as in the released code, or "zoh", equation 4.

    Returns:
        Abar and Bbar, float32 `[..., D, N]`.

    Raises:
        TypeError: a shape does not fit.
        ValueError: there is no such method.

    >>> one = jnp.ones((1, 1))
    >>> decay, gain = discretize(one[0], -one, one[0], method="zoh")
    >>> decay.round(4).item(), gain.round(4).item()  # 1/e and 1 - 1/e
    (0.3679, 0.6321)
    """
    if method not in ("euler", "zoh"):
        raise ValueError(f"argument 'method' is {method!r}, expected 'euler' or 'zoh'.")
    delta = as_float32(delta)[..., None]
    A = as_float32(A).reshape(*[1] * (delta.ndim - 2), *A.shape)
    B = as_float32(B)[..., None, :]
    exponent = delta * A
    if method == "euler":
        return jnp.exp(exponent), delta * B
    is_flat = jnp.abs(exponent) < 1e-4
    # Each branch has a `where` of its own, since the other's values would make NaN of
    # its gradient; the series is exact where it is taken.
    held = jnp.where(
        is_flat,
        delta * (1 + jnp.where(is_flat, exponent, 0.0) / 2),
        jnp.expm1(exponent) / jnp.where(is_flat, -1.0, A),
    )
    return jnp.exp(exponent), held * B


@typed
def selection(
    x: Float[ArrayLike, "batch time d"],
    *,
    down: Float[ArrayLike, "d rank"],
    up: Float[ArrayLike, "rank d"],
    bias: Float[ArrayLike, " d"],
    to_B: Float[ArrayLike, "d n"],
    to_C: Float[ArrayLike, "d n"],
) -> tuple[
    Float[Array, "batch time d"],
    Float[Array, "batch time n"],
    Float[Array, "batch time n"],
]:
    """Algorithm 2, what makes S4 selective: steps, B and C are functions of the token.

        delta_t = softplus(x_t down up + bias)    B_t = x_t to_B    C_t = x_t to_C

    `selective_scan(x, delta, A, B, C)` is then the layer S6.

    Args:
        x: `[B, T, D]`.
        down: `[D, R]`; the paper's broadcast of one number per token is R = 1, with
            ones in `up`.
        up: `[R, D]`.
        bias: `[D]`, before the softplus.
        to_B: `[D, N]`.
        to_C: `[D, N]`.

    Returns:
        delta `[B, T, D]`, B and C `[B, T, N]`, float32.

    Raises:
        TypeError: a shape does not fit.

    >>> one = jnp.ones((1, 1))
    >>> knobs = {"down": one, "up": one, "bias": -one[0], "to_B": 2 * one, "to_C": one}
    >>> delta, B, C = selection(jnp.ones((1, 1, 1)), **knobs)
    >>> delta.round(4).item(), B.item(), C.item()  # log 2
    (0.6931, 2.0, 1.0)
    """
    x, down, up, bias = (as_float32(v) for v in (x, down, up, bias))
    delta = jax.nn.softplus(x @ down @ up + bias.reshape(1, 1, -1))
    return delta, x @ as_float32(to_B), x @ as_float32(to_C)


@typed
def gated_recurrence(
    x: Float[ArrayLike, "batch time d"],
    logits: Float[ArrayLike, "batch time d"],
    *,
    initial_state: Float[ArrayLike, "batch d"] | None = None,
) -> Float[Array, "batch time d"]:
    """Theorem 1: what a selective model with one state, A = -1 and B = 1 computes.

    h_t = (1 - g_t) h_(t-1) + g_t x_t,  g = sigmoid(logits)

    `selective_scan(x, logits, -1, 1, 1, delta_softplus=True, discretization="zoh")` is
    the same, as e^(-softplus(a)) = 1 - sigmoid(a).

    Args:
        x: `[B, T, D]`.
        logits: `[B, T, D]` of the gates.
        initial_state: `[B, D]`; 0 by default.

    Returns:
        float32 `[B, T, D]`, all states.

    Raises:
        TypeError: a shape does not fit.

    >>> x = jnp.array([4.0, 8.0]).reshape(1, 2, 1)
    >>> gated_recurrence(x, jnp.zeros((1, 2, 1))).ravel().tolist()
    [2.0, 5.0]
    """
    x, logits = as_float32(x), as_float32(logits)
    # 1 - sigmoid(a) rounds to 0 where sigmoid(-a) does not.
    keep, take = jax.nn.sigmoid(-logits), jax.nn.sigmoid(logits) * x
    if initial_state is not None:
        first = keep[:, 0] * as_float32(initial_state)
        take = jnp.concatenate([(take[:, 0] + first)[:, None], take[:, 1:]], axis=1)

    def join(a: Any, b: Any) -> Any:
        return a[0] * b[0], b[0] * a[1] + b[1]

    return jax.lax.associative_scan(join, (keep, take), axis=1)[1]


@typed
def selective_copying(
    key: Key[Array, ""], batch: int, *, length: int, count: int, vocabulary: int
) -> tuple[Int[Array, "batch time"], Int[Array, "batch count"]]:
    """Sequences of which a few tokens, at random places among noise, are to be copied.

    The distances differ from sequence to sequence: a filter that is the same for all
    cannot tell the tokens from the noise. What is asked for is asked by symbol 1, as
    often as there are tokens; symbol 0 is the noise.

    Args:
        key: consumed.
        batch: B, how many sequences.
        length: of the part with the tokens.
        count: K <= `length`, how many tokens.
        vocabulary: V > 2, symbols; tokens are 2 to V - 1.

    Returns:
        int32 `[B, length + K]`, and the tokens int32 `[B, K]`, which are asked for at
        the last K places.

    Raises:
        ValueError: a size is out of range.

    >>> x, y = selective_copying(jax.random.key(0), 1, length=5, count=2, vocabulary=9)
    >>> [t for t in x[0, :5].tolist() if t] == y[0].tolist(), x[0, 5:].tolist()
    (True, [1, 1])
    """
    _check_sizes(batch, length, 1, vocabulary)
    if not 1 <= count <= length:
        raise ValueError(f"argument 'count' is {count}, expected 1 to {length}.")
    which, where = jax.random.split(key)
    tokens = jax.random.randint(which, (batch, count), 2, vocabulary)
    order = jnp.argsort(jax.random.uniform(where, (batch, length)), axis=1)
    # A permutation: K of its places hold a number below K.
    is_token = order < count
    rank = jnp.clip(jnp.cumsum(is_token, axis=1) - 1, 0)
    noisy = jnp.where(is_token, jnp.take_along_axis(tokens, rank, axis=1), 0)
    asked = jnp.ones((batch, count), jnp.int32)
    return jnp.concatenate([noisy, asked], axis=1).astype(jnp.int32), tokens


@typed
def induction_heads(
    key: Key[Array, ""], batch: int, *, length: int, vocabulary: int
) -> tuple[Int[Array, "batch time"], Int[Array, " batch"]]:
    """Sequences in which a mark comes twice: what followed it once follows it again.

    Args:
        key: consumed.
        batch: B, how many sequences.
        length: T >= 3; the second mark is the last token.
        vocabulary: V > 2; the mark is symbol 0, and the others are drawn evenly.

    Returns:
        int32 `[B, T]`, and what follows int32 `[B]`.

    Raises:
        ValueError: a size is out of range.

    >>> x, y = induction_heads(jax.random.key(0), 1, length=6, vocabulary=5)
    >>> row = x[0].tolist()
    >>> row[row.index(0) + 1] == y.item(), row[-1]
    (True, 0)
    """
    _check_sizes(batch, length, 3, vocabulary)
    which, where = jax.random.split(key)
    tokens = jax.random.randint(which, (batch, length), 1, vocabulary)
    place = jax.random.randint(where, (batch,), 0, length - 2)
    at = jnp.arange(length)[None]
    marks = (at == place[:, None]) | (at == length - 1)
    answer = jnp.take_along_axis(tokens, place[:, None] + 1, axis=1)[:, 0]
    return jnp.where(marks, 0, tokens), answer


def _check_sizes(batch: int, length: int, shortest: int, vocabulary: int) -> None:
    sizes = ("batch", batch, 1), ("length", length, shortest)
    for name, size, least in (*sizes, ("vocabulary", vocabulary, 3)):
        if size < least:
            raise ValueError(f"argument '{name}' is {size}, expected at least {least}.")


def _select_example(key: Array) -> Any:
    names = {"down": (8, 2), "up": (2, 8), "bias": (8,), "to_B": (8, 3), "to_C": (8, 3)}
    keys = jax.random.split(key, 1 + len(names))
    maps = {
        name: 0.5 * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys[1:], names.items(), strict=True)
    }
    return (jax.random.normal(keys[0], (2, 5, 8)),), maps


def _step_example(key: Array) -> Any:
    keys = jax.random.split(key, 3)
    A = -jnp.exp(jax.random.normal(keys[1], (4, 3)))
    B = jax.random.normal(keys[2], (8, 3))
    return (0.1 + jax.random.uniform(keys[0], (8, 4)), A, B), {"method": "zoh"}


EXAMPLES = {
    discretize: _step_example,
    selection: _select_example,
    gated_recurrence: lambda key: (tuple(jax.random.normal(key, (2, 2, 8, 3))), {}),
    selective_copying: lambda key: (
        (key, 3), {"length": 7, "count": 2, "vocabulary": 6},
    ),
    induction_heads: lambda key: ((key, 3), {"length": 7, "vocabulary": 6}),
}  # fmt: skip
