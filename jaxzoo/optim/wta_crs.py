"""WTA-CRS: a product of matrices from k of its column-row pairs, the largest for sure.

    x y = sum_i x_i y_i,   x_i column i of x, y_i row i of y
    p_i = |x_i| |y_i| / sum_j |x_j| |y_j|

The winners C, the |C| pairs of largest p, are all taken; the other k - |C| pairs are
drawn from the rest, with replacement:

    sum_{i in C} x_i y_i + (1 - P_C) / (k - |C|) sum_{drawn j} x_j y_j / p_j

with P_C = sum_{i in C} p_i and the |C| that makes (1 - P_C) / (k - |C|) least. It is
unbiased, and where P_C > |C| / k it has less variance than k plain draws.

A linear layer that forms its weight gradient so keeps k rows of its input, not all:

    y = linear_wta(key, x, w, b, grad_norm, k=32)

The pairs are chosen in the forward pass, when the gradient's norms are not known yet:
`grad_norm` holds those that each example had when it was last seen. The cotangent of
`grad_norm` is what they are now, to be stored for the next time:

    grads, norms = jax.grad(loss, (0, 1))(params, cache[ids])
    cache = cache.at[ids].set(norms)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "wta_crs",
    "title": "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of "
    "Language Model",
    "arxiv": "2305.15265",
    "year": 2023,
    "authors": "Zirui Liu, Guanchu Wang, Shaochen Zhong, Zhaozhuo Xu, Daochen Zha, "
    "Ruixiang Tang, Zhimeng Jiang, Kaixiong Zhou, Vipin Chaudhary, Shuai Xu, Xia Hu",
    "where": "Section 3.1 (the estimator, theorems 1 and 2), section 3.2 and algorithm "
    "1 (the linear layer and its cache of gradient norms).",
    "differs": "The stored norms pass through the gradient of `grad_norm`, where the "
    "released code keeps a buffer; a row whose norm was 0 keeps 1e-4 of the largest, "
    "which makes the estimate unbiased also then (the code adds 1e-8). |C| stays below "
    "k. The experiment trains small networks on 8x8 digits with Adam, not T5 and BERT "
    "on GLUE: 91.6% held out from a tenth of the rows, 91.1% from all.",
}

__all__ = ["linear_wta", "variance_wta_crs", "wta_crs_matmul"]


@typed
def wta_crs_matmul(
    key: Key[Array, ""],
    x: Float[ArrayLike, "rows pairs"],
    y: Float[ArrayLike, "pairs columns"],
    *,
    k: int,
) -> tuple[Float[Array, "rows columns"], dict[str, Array]]:
    """An unbiased estimate of x y from k of its column-row pairs.

    Gradient: with the chosen pairs and their weights held fixed, that of the sum.

    Args:
        key: typed key.
        x: `[N, M]`.
        y: `[M, K]`.
        k: pairs that are taken, at least 1; with k >= M the product is exact.

    Returns:
        `(estimate, aux)`: float32 `[N, K]`; aux holds "index", int32 `[min(k, M)]`, the
        pairs, the winners first; "weight", what each is multiplied with; and
        "winners", int32, |C|.

    Raises:
        ValueError: `k` is below 1.

    >>> x, y = jnp.array([[9.0, 1.0, 1.0]]), jnp.ones((3, 1))
    >>> estimate, aux = wta_crs_matmul(jax.random.key(0), x, y, k=2)
    >>> float(estimate[0, 0]), int(aux["winners"]), aux["weight"].tolist()
    (11.0, 1, [1.0, 2.0])
    """
    check_range("k", k, low=1)
    x, y = as_float32(x), as_float32(y)
    chosen = _choose(key, _relative(x.T) * _relative(y), k)
    estimate = jnp.matmul(
        x[:, chosen.index] * chosen.weight.reshape(1, -1), y[chosen.index]
    )
    return estimate, chosen._asdict()


@typed
def linear_wta(
    key: Key[Array, ""],
    x: Float[ArrayLike, "*batch inputs"],
    w: Float[ArrayLike, "inputs outputs"],
    b: Float[ArrayLike, " outputs"],
    grad_norm: Float[ArrayLike, "*batch"],
    *,
    k: int,
) -> Float[Array, "*batch outputs"]:
    """A linear layer that keeps k rows of its input for the backward pass.

    y = x w + b

    Gradient: dw estimates x^T dy from k rows, without bias whatever `grad_norm` is;
    those of `x` and `b` are exact; that of `grad_norm` is |dy_i|, the norm to store for
    the next pass. Reverse mode only.

    Args:
        key: typed key, a new one for each step and layer.
        x: inputs, `[..., D]`. All leading axes together are the rows.
        w: weights, `[D, K]`.
        b: bias, `[K]`.
        grad_norm: a guess of |dy_i| for each row, >= 0, in any unit; ones where nothing
            is known. One below 1e-4 of the largest counts as that.
        k: rows that are kept, at least 1; with as many rows or more dw is exact.

    Returns:
        y `[..., K]`, float32, as are the stored rows.

    Raises:
        ValueError: `k` is below 1.

    >>> x, w, b = jnp.eye(4), jnp.ones((4, 2)), jnp.zeros(2)
    >>> f = lambda x: linear_wta(jax.random.key(0), x, w, b, jnp.ones(4), k=2)
    >>> sorted(leaf.shape for leaf in jax.tree.leaves(jax.vjp(f, x)[1]))
    [(2,), (2, 4), (4, 2)]
    """
    check_range("k", k, low=1)
    x, w, b = as_float32(x), as_float32(w), as_float32(b)
    rows, norms = x.reshape(-1, x.shape[-1]), as_float32(grad_norm).reshape(-1)
    y = _linear(k, key, rows, w, norms) + b.reshape(1, -1)
    return y.reshape(*x.shape[:-1], w.shape[1])


@typed
def variance_wta_crs(
    x: Float[ArrayLike, "rows pairs"], y: Float[ArrayLike, "pairs columns"], *, k: int
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Total variance of the estimate, E |estimate - x y|^2, and that of k plain draws.

    ((sum_{i not in C} |x_i| |y_i|)^2 - |sum_{i not in C} x_i y_i|^2) / (k - |C|)

    Plain column-row sampling is the same with an empty C. Theorem 2: the ratio of the
    two is at most (1 - P_C) k / (k - |C|).

    Args:
        x: `[N, M]`. Entries beyond 1e7 count as 1e7, so that fourth powers stay within
            float32; likewise for `y`.
        y: `[M, K]`.
        k: pairs that are taken, at least 1.

    Returns:
        `(variance, aux)`: float32 scalar, 0 with k >= M; aux holds "crs", the variance
        of plain column-row sampling; "winners", int32, |C|; and "mass", P_C.

    Raises:
        ValueError: `k` is below 1.

    >>> x, y = jnp.array([[9.0, 1.0, -1.0]]), jnp.ones((3, 1))
    >>> variance, aux = variance_wta_crs(x, y, k=2)
    >>> float(variance), float(aux["crs"])
    (4.0, 20.0)
    """
    check_range("k", k, low=1)
    x, y = (jnp.clip(as_float32(a), -1e7, 1e7) for a in (x, y))
    sizes = _lengths(x.T) * _lengths(y)
    order, p, tail, winners = _winners(jax.lax.stop_gradient(sizes), k)
    pairs = sizes.shape[0]
    x, y, sizes = x[:, order], y[order], sizes[order]

    def spread(rest: Array) -> Array:
        product = _matmul(x * rest.reshape(1, -1), y)
        squares = jnp.square(jnp.sum(sizes * rest)) - jnp.sum(jnp.square(product))
        return jnp.maximum(squares, 0.0)

    rest = (jnp.arange(pairs) >= winners).astype(sizes.dtype)
    draws = (k - winners).astype(sizes.dtype)
    variance = spread(rest) / draws if k < pairs else jnp.zeros((), sizes.dtype)
    mass = jnp.sum(p * (1.0 - rest))
    crs = spread(jnp.ones_like(rest)) / k
    return variance, {"crs": crs, "winners": winners, "mass": mass}


class _Chosen(NamedTuple):
    index: Array
    weight: Array
    winners: Array


def _choose(key: Array, sizes: Array, k: int) -> _Chosen:
    """k pairs, the winners first, with weights that make their sum unbiased."""
    pairs = sizes.shape[0]
    if k >= pairs:
        every = jnp.arange(pairs, dtype=jnp.int32)
        return _Chosen(every, jnp.ones_like(sizes), jnp.int32(pairs))
    order, p, tail, winners = _winners(jax.lax.stop_gradient(sizes), k)
    left = tail[winners]
    # A number in [tail_j+1, tail_j) is the pair j; of k numbers the last k - |C| count.
    drawn = jax.random.uniform(key, (k,), p.dtype) * left
    place = pairs - 1 - jnp.searchsorted(tail[::-1], drawn, side="right")
    slot = jnp.arange(k, dtype=jnp.int32)
    is_winner = slot < winners
    rank = jnp.where(is_winner, slot, jnp.clip(place, winners, pairs - 1))
    share = (k - winners).astype(p.dtype) * p[rank]
    safe = jnp.where(is_winner | (share <= 0.0), 1.0, share)
    weight = jnp.where(is_winner, 1.0, left / safe)
    return _Chosen(order[rank].astype(jnp.int32), weight, winners)


def _winners(sizes: Array, k: int) -> tuple[Array, Array, Array, Array]:
    """Pairs by falling p, their p, the sum of p from each on, and |C| < k."""
    top = jnp.max(sizes)
    sizes = jnp.where(top > 0.0, sizes / jnp.where(top > 0.0, top, 1.0), 1.0)
    p = sizes / jnp.sum(sizes)
    order = jnp.argsort(-p)
    p = p[order]
    tail = jnp.cumsum(p[::-1])[::-1]
    most = min(k, sizes.shape[0])
    slots = jnp.arange(most)
    winners = jnp.argmin(tail[:most] / (k - slots)).astype(jnp.int32)
    return order, p, tail, winners


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(k: int, key: Array, x: Array, w: Array, norms: Array) -> Array:
    return jnp.matmul(x, w)


def _forward(k: int, key: Array, x: Array, w: Array, norms: Array):
    top = jnp.max(norms)
    guess = jnp.where(top > 0.0, norms / jnp.where(top > 0.0, top, 1.0), 1.0)
    chosen = _choose(key, _relative(x) * jnp.maximum(guess, 1e-4), k)
    kept = x[chosen.index] * chosen.weight.reshape(-1, 1)
    return jnp.matmul(x, w), (kept, chosen.index, w)


def _backward(k: int, stored: tuple[Array, Array, Array], dy: Array):
    kept, index, w = stored
    dw = jnp.matmul(kept.T, dy[index])
    return None, jnp.matmul(dy, w.T), dw, _lengths(dy)


_linear.defvjp(_forward, _backward)


def _relative(x: Array) -> Array:
    """Lengths of rows over the largest entry: products of two do not overflow."""
    largest = jnp.max(jnp.abs(x))
    return _lengths(jnp.where(largest > 0.0, x / jnp.where(largest > 0, largest, 1), x))


def _lengths(x: Array) -> Array:
    """Lengths of rows; that of zeros has the gradient 0."""
    squares = jnp.sum(jnp.square(x), axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def _matmul(x: Array, y: Array) -> Array:
    # A difference of sums of fourth powers: float32 on a TPU too.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _pair(key: Array):
    keys = jax.random.split(key, 3)
    sizes = (1.0 + jnp.arange(8)) ** -1.5
    x = jax.random.normal(keys[0], (4, 8)) * sizes.reshape(1, -1)
    return x, jax.random.normal(keys[1], (8, 3)), jax.random.normal(keys[2], (4, 3))


EXAMPLES = {
    wta_crs_matmul: lambda key: ((key, *_pair(key)[:2]), {"k": 5}),
    linear_wta: lambda key: (
        (key, _pair(key)[0].T, _pair(key)[2], jnp.ones(3), 1.0 + jnp.arange(8.0)),
        {"k": 5},
    ),
    variance_wta_crs: lambda key: (_pair(key)[:2], {"k": 5}),
}
