"""A-CODER: cyclic block coordinates at the rate of Nesterov, for f + g.

    min_u F(u) = f(u) + g(u),  f convex and smooth, g = sum_i g^i(u^i) with a prox
    a_k = the largest a with  a^2 / A_k <= 2 (1 + gamma A_{k-1}) / (5 L),
    A_k = A_{k-1} + a_k,      x_k = (A_{k-1} y_{k-1} + a_k v_{k-1}) / A_k

and then for the blocks i = m, ..., 1, one after the other:

    p_k^i = grad^i f(x_k^1, ..., x_k^i, y_k^{i+1}, ..., y_k^m)
    q_k^i = p_k^i + (a_{k-1} / a_k) (grad^i f(x_{k-1}) - p_{k-1}^i)
    z_k^i = z_{k-1}^i + a_k q_k^i
    v_k^i = prox_{A_k g^i}(x_0^i - z_k^i)
    y_k^i = (A_{k-1} y_{k-1}^i + a_k v_k^i) / A_k

A block sees those before it already moved, as in Gauss-Seidel. What that costs dual
averaging, grad f(x_k) - p_k, the next cycle pays back: the second term of q. So

    F(y_k) - F(u) <= |x_0 - u|^2 / (2 A_k)  for every u,

with A_k of order k^2, or (1 + sqrt(2 gamma / 5 L))^k where g is gamma-strongly convex.
A cycle costs two passes over the blocks: p_k, and the gradient at x_k.

The line search raises L until what the proof asks of a cycle is true:

    f(y) <= f(x) + <grad f(x), y - x> + L/2 |y - x|^2
    |grad f(x) - p| <= 3/4 L |y - x|

VR-A-CODER does it for f = mean_t f_t with gradients of single terms, of which the full
gradient at the mean of the last K points takes the variance.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "a_coder",
    "title": "Accelerated Cyclic Coordinate Dual Averaging with Extrapolation for "
    "Composite Convex Optimization",
    "arxiv": "2303.16279",
    "year": 2023,
    "authors": "Cheuk Yin Lin, Chaobing Song, Jelena Diakonikolas",
    "where": "Algorithms 1 (A-CODER) and 2 (VR-A-CODER), and a line search for L.",
    "differs": "The line search is ours: it tests the two inequalities that the proof "
    "needs with its 2/5, never lowers L, and serves A-CODER alone. Blocks are of equal "
    "width. VR-A-CODER's first z is K a_1 grad f(x_0), the weight that its later "
    "gradients have; public code has grad f(x_0). A cycle counts as two passes. In the "
    "experiment the slope is -2 on real tables, but -1.4 +- 0.05 at a correlation of "
    "0.9999, where the gap has a plateau and the claimed -1.8 fails. There 1e-6 takes "
    "0.41 +- 0.16 of the passes of coordinate descent, whose passes grow with the "
    "condition number as A-CODER's do not. Below a condition of 1e5 or so coordinate "
    "descent is faster, so the claim fails on breast cancer: 22 times its passes.",
}

__all__ = ["a_coder", "vr_a_coder"]


@typed
def a_coder(
    x0: Float[ArrayLike, " d"],
    block_gradient: Callable[..., Any], prox: Callable[..., Any], *,
    num_blocks: int, num_cycles: int, lipschitz: float, gamma: float = 0.0,
    value: Callable[..., Any] | None = None,
) -> tuple[Float[Array, " d"], dict[str, Array]]:  # fmt: skip
    """Runs A-CODER from `x0`.

    Args:
        x0: where it starts, `[D]`.
        block_gradient: `(x [D], i) -> [D / m]`, block i of the gradient of f at x; `i`
            is traced, int32.
        prox: `(x [D / m], s, i) -> [D / m]`, argmin_u s g^i(u) + |u - x|^2 / 2.
        num_blocks: m, of equal width; D blocks are single coordinates.
        num_cycles: K.
        lipschitz: L > 0. Without `value` it has to be large enough, and the sum of the
            gradient's Lipschitz constant and of the blocks' is; with `value` it is
            where the search begins.
        gamma: g is gamma-strongly convex; 0 where it is not.
        value: `x [D] -> f(x)`, for the line search, which only ever raises L. Reverse
            mode does not go through it; leave it out to differentiate.

    Returns:
        `(y, aux)`: the last point `[D]`, float32. aux holds "path", y_1, ..., y_K,
        `[K, D]`; "v", the last point of dual averaging; per cycle, `[K]`, "A", the
        bound's A_k, "lipschitz" and "passes", full passes over the blocks' gradients.

    Raises:
        ValueError: a number is out of range, or `num_blocks` does not divide D.

    >>> target = jnp.array([3.0, -0.5])
    >>> def soft(x, s, i): return jnp.sign(x) * jnp.maximum(jnp.abs(x) - s, 0.0)
    >>> y, aux = a_coder(  # min |x - target|^2 / 2 + |x|_1
    ...     jnp.zeros(2), lambda x, i: (x - target)[i][None], soft, num_blocks=2,
    ...     num_cycles=100, lipschitz=1.0)
    >>> y.tolist(), aux["passes"][-1].item()
    ([2.0, 0.0], 2.0)
    """
    check_range("num_cycles", num_cycles, low=1)
    check_range("lipschitz", lipschitz, above=0.0)
    check_range("gamma", gamma, low=0.0)
    start = _split(x0, num_blocks)
    blocks = jnp.arange(num_blocks)

    def gradient_at(w: Array) -> Array:
        each = jax.vmap(block_gradient, (None, 0))(w.reshape(-1), blocks)
        return jnp.asarray(each, w.dtype).reshape(w.shape)

    first = gradient_at(start)
    zero = jnp.zeros((), start.dtype)
    # x_k, y_k, v_k, z_k, p_k, grad f(x_k), a_k, A_k.
    state = (start, start, start, jnp.zeros_like(start), first, first, zero, zero)

    def attempt(state: Any, lipschitz: Array) -> Any:
        _, y, v, z, p, gradient, a, total = state
        new = _weight(total, lipschitz, gamma)
        sum_, carried = total + new, a / new
        x = (total * y + new * v) / sum_

        def block(w: Array, i: Array) -> Any:
            p_i = _as_block(block_gradient(w.reshape(-1), i), w)
            q_i = p_i + carried * (gradient[i] - p[i])
            z_i = z[i] + new * q_i
            v_i = _as_block(prox(start[i] - z_i, sum_, i), w)
            y_i = (total * y[i] + new * v_i) / sum_
            return w.at[i].set(y_i), (y_i, v_i, z_i, p_i)

        _, moved = lax.scan(block, x, blocks, reverse=True)
        return (x, *moved, gradient_at(x), new, sum_)

    def holds(state: Any, lipschitz: Array) -> Array:
        assert value is not None
        x, y, _, _, p, gradient, _, _ = state
        step = y - x
        square, norm = jnp.sum(jnp.square(step)), jnp.sum(jnp.square(y))
        model = value(x.reshape(-1)) + jnp.sum(gradient * step) + lipschitz / 2 * square
        fits = value(y.reshape(-1)) <= model
        fits &= jnp.sum(jnp.square(gradient - p)) <= (0.75 * lipschitz) ** 2 * square
        # Of a step this short both sides are rounding errors.
        return fits | (square <= 64.0 * jnp.finfo(square.dtype).eps * norm)

    def cycle(carry: Any, _: None) -> Any:
        state, lipschitz = carry
        new, tries = attempt(state, lipschitz), jnp.ones((), jnp.int32)
        if value is not None:
            new, lipschitz, tries = lax.while_loop(
                # 64 doublings: where f is NaN no L will do.
                lambda s: ~holds(s[0], s[1]) & (s[2] < 64),
                lambda s: (attempt(state, 2.0 * s[1]), 2.0 * s[1], s[2] + 1),
                (new, lipschitz, tries),
            )
        passes = 2.0 * tries.astype(start.dtype)
        return (new, lipschitz), (new[1].reshape(-1), new[-1], lipschitz, passes)

    begin = (state, jnp.asarray(lipschitz, start.dtype))
    (state, _), records = lax.scan(cycle, begin, None, length=num_cycles)
    names = ("path", "A", "lipschitz", "passes")
    aux = {"v": state[2].reshape(-1), **dict(zip(names, records, strict=True))}
    return state[1].reshape(-1), aux


@typed
def vr_a_coder(
    key: Key[Array, ""], x0: Float[ArrayLike, " d"],
    block_gradient: Callable[..., Any], prox: Callable[..., Any], *,
    num_blocks: int, num_terms: int, num_epochs: int, num_cycles: int,
    lipschitz: float, gamma: float = 0.0,
) -> tuple[Float[Array, " d"], dict[str, Array]]:  # fmt: skip
    """Runs VR-A-CODER, for f the mean of many terms.

    In epoch s with the centre c, the mean of the points y of the epoch before, and its
    gradient mu = grad f(c), each of K cycles goes from x = (A_{s-1} c + a_s v) / A_s
    over the blocks as A-CODER does, with a term t drawn for each block, and

        q^i = grad^i f_t(w) - grad^i f_t(c) + mu^i
              + (a / a_s) (grad^i f_t(x_before) - grad^i f_t(w_before))
        z^i += a_s q^i,    v^i = prox_{(A_{s-1} + a_s k / K) g^i}(x_0^i - z^i / K)

    w being x with the blocks after i already moved, w_before that of the cycle before,
    and a_s^2 = K A_{s-1} (1 + gamma A_{s-1}) / (8 L).

    Args:
        key: a typed key, consumed.
        x0: where it starts, `[D]`.
        block_gradient: `(x [D], i, t) -> [D / m]`, block i of the gradient of f_t.
        prox: as for `a_coder`.
        num_blocks: m, as for `a_coder`.
        num_terms: n; f is the mean of f_0, ..., f_{n-1}.
        num_epochs: S; the first one is a single proximal step.
        num_cycles: K per epoch.
        lipschitz: L > 0, of the gradients of single terms.
        gamma: as for `a_coder`.

    Returns:
        `(c, aux)`: the last centre `[D]`, float32. aux holds "path", the centres
        `[S, D]`, "v", and per epoch, `[S]`, "A", and "passes": gradients of terms over
        n, 1 + 4 K / n after the first epoch.

    Raises:
        ValueError: a number is out of range, or `num_blocks` does not divide D.

    >>> targets = jnp.array([[3.0, 1.0], [1.0, 3.0]])
    >>> c, aux = vr_a_coder(  # min mean_t |x - target_t|^2 / 2
    ...     jax.random.key(0), jnp.zeros(2), lambda x, i, t: (x - targets[t])[i][None],
    ...     lambda x, s, i: x, num_blocks=2, num_terms=2, num_epochs=20, num_cycles=4,
    ...     lipschitz=1.0)
    >>> c.round(2).tolist()
    [2.0, 2.0]
    """
    sizes = {"num_terms": num_terms, "num_epochs": num_epochs, "num_cycles": num_cycles}
    for name, size in sizes.items():
        check_range(name, size, low=1)
    check_range("lipschitz", lipschitz, above=0.0)
    check_range("gamma", gamma, low=0.0)
    start, count = _split(x0, num_blocks), num_cycles
    blocks, terms = jnp.arange(num_blocks), jnp.arange(num_terms)

    def part(w: Array, i: Array, t: Array) -> Array:
        return _as_block(block_gradient(w.reshape(-1), i, t), w)

    def gradient_at(w: Array) -> Array:
        each = jax.vmap(jax.vmap(part, (None, None, 0)), (None, 0, None))
        return jnp.mean(each(w, blocks, terms), axis=1)

    first = jnp.asarray(1.0 / (4.0 * lipschitz), start.dtype)
    z = count * first * gradient_at(start)  # K cycles that all saw this gradient
    over_blocks = jax.vmap(lambda x, i: _as_block(prox(x, first, i), start))
    v = over_blocks(start - z / count, blocks)

    def epoch(carry: Any, key: Array) -> Any:
        center, x, y, v, z, a, total = carry
        new = jnp.sqrt(count * total * (1.0 + gamma * total) / (8.0 * lipschitz))
        sum_, mu = total + new, gradient_at(center)
        drawn = jax.random.randint(key, (count, num_blocks), 0, num_terms, jnp.int32)

        def cycle(carry: Any, inputs: Any) -> Any:
            x_before, y_before, v, z = carry
            k, drawn = inputs
            x = (total * center + new * v) / sum_
            carried = jnp.where(k == 1, a, new) / new
            strength = total + new * k / count

            def block(carry: Any, inputs: Any) -> Any:
                (w, w_before), (i, t) = carry, inputs
                p_i = part(w, i, t) - part(center, i, t) + mu[i]
                back = part(x_before, i, t) - part(w_before, i, t)
                z_i = z[i] + new * (p_i + carried * back)
                v_i = _as_block(prox(start[i] - z_i / count, strength, i), w)
                y_i = (total * center[i] + new * v_i) / sum_
                ahead = (w.at[i].set(y_i), w_before.at[i].set(y_before[i]))
                return ahead, (y_i, v_i, z_i)

            _, (y, v, z) = lax.scan(block, (x, x_before), (blocks, drawn), reverse=True)
            return (x, y, v, z), y

        last, points = lax.scan(cycle, (x, y, v, z), (jnp.arange(1, count + 1), drawn))
        center = jnp.mean(points, axis=0)
        return (center, *last, new, sum_), (center.reshape(-1), sum_)

    keys = jax.random.split(key, num_epochs)
    last, (path, totals) = lax.scan(epoch, (v, start, v, v, z, first, first), keys[1:])
    path = jnp.concatenate([v.reshape(1, -1), path])
    passes = jnp.full(num_epochs, 1.0 + 4.0 * count / num_terms, start.dtype)
    aux = {"path": path, "v": last[3].reshape(-1), "passes": passes.at[0].set(1.0)}
    return last[0].reshape(-1), {**aux, "A": jnp.concatenate([first[None], totals])}


def _split(x0: ArrayLike, num_blocks: int) -> Array:
    """`x0` in float32, `[m, D / m]`."""
    check_range("num_blocks", num_blocks, low=1)
    if x0.shape[0] % num_blocks:
        raise ValueError(
            f"argument 'num_blocks' is {num_blocks}, expected a divisor of the length "
            f"of 'x0', {x0.shape[0]}."
        )
    return as_float32(x0).reshape(num_blocks, -1)


def _as_block(x: Any, like: Array) -> Array:
    return jnp.asarray(x, like.dtype).reshape(like.shape[1:])


def _weight(total: Array, lipschitz: Array, gamma: float) -> Array:
    """The largest a with a^2 <= r (A + a), r = 2 (1 + gamma A) / (5 L)."""
    ratio = 0.4 * (1.0 + gamma * total) / lipschitz
    return 0.5 * (ratio + jnp.sqrt(ratio * (ratio + 4.0 * total)))


# One quadratic for all keys: callables are no arrays, which `jax.vmap` could stack.
def _example_gradient(x: Array, i: Array) -> Array:
    a = jnp.cos(jnp.outer(jnp.arange(1.0, 13.0), jnp.arange(1.0, 9.0)))
    return jnp.take(a.reshape(12, 4, 2), i, axis=1).T @ (a @ x - 1.0) / 12


def _example_term(x: Array, i: Array, t: Array) -> Array:
    a = jnp.cos((t + 1.0) * jnp.arange(1.0, 9.0))
    return jnp.take(a.reshape(4, 2), i, axis=0) * (a @ x - 1.0)


def _example_prox(x: Array, s: Array, i: Array) -> Array:
    return x / (1.0 + 0.1 * s)


EXAMPLES = {
    a_coder: lambda key: (
        (jax.random.normal(key, (8,)), _example_gradient, _example_prox),
        {"num_blocks": 4, "num_cycles": 3, "lipschitz": 2.0, "gamma": 0.1},
    ),
    vr_a_coder: lambda key: (
        (key, jax.random.normal(key, (8,)), _example_term, _example_prox),
        {"num_blocks": 4, "num_terms": 5, "num_epochs": 3, "num_cycles": 2,
         "lipschitz": 8.0, "gamma": 0.1},
    ),
}  # fmt: skip
