"""VCAS: back-propagation through a sample of examples and tokens, as noise allows.

A layer y = x w + b with x `[N, ..., D]` is given dy. It keeps example i with
probability p_i, and of what is left, token j for the weight gradient alone with q_j:

    p_i ~ |dy_i|,          sum p = rho N;     g_i = dy_i m_i / p_i
    q_j ~ |g_j| |x_j|,     sum q = nu tokens that are left
    dx = g w^T,  db = sum g,  dw = sum_j x_j (m_j / q_j) g_j^T

All are unbiased. A controller measures, every so many steps, the variance V_s that
gradients have between batches, V_act that dropping examples adds, and V_w that dropping
tokens adds, and moves the ratios until each is about tau V_s:

    s    <-  s + alpha  if V_act > tau V_s,  else  s - alpha
    rho_l =  max_{j <= l} p_j(s), the share of examples with a share s of the norm
    nu_l <-  nu_l / beta  if V_w > tau V_s,  else  nu_l beta

    y = vcas_dense(key, x, w, b, rho=state.rho[l], nu=state.nu[l])
    state = vcas_update(state, v_sgd, v_act, v_w, norms)           # now and then

The cotangent of `nu` is V_w of that layer in that pass, by its closed form. Rows that
are dropped are zeros here, and a matmul of zeros takes as long: what is saved on
hardware that skips them is rho N of N rows for dx, and rho nu of them for dw.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "vcas",
    "title": "Efficient Backpropagation with Variance-Controlled Adaptive Sampling",
    "arxiv": "2402.17227",
    "year": 2024,
    "authors": "Ziteng Wang, Jianfei Chen, Jun Zhu",
    "where": "Sections 4.1 and 4.2 (sampling of activations and of weights), section 5 "
    "and algorithm 1 (the controller).",
    "differs": "A dropped row is a row of zeros, as shapes are static: it costs what a "
    "kept one does, and FLOPs are counted, not saved. Every layer may drop examples, "
    "where the released code does between blocks; ratios are not rounded to a number "
    "of rows; all weights are measured, not a sample of 1%. `decay` is the released "
    "code's; nu stays at 1 or below. The experiment trains small networks on 8x8 "
    "digits with Adam, not BERT and ViT: 30% of the backward FLOPs, measuring "
    "included, for a training loss 1.7% higher.",
}

__all__ = ["VCASState", "keep_probabilities", "vcas_dense", "vcas_update"]


class VCASState(NamedTuple):
    """What the controller knows; layers count from the input to the output.

    Attributes:
        s: share of the gradient's norm that is to be kept, `[]`.
        rho: share of the examples that layer l keeps, `[L]`.
        nu: share of the tokens left that its weight gradient is formed from, `[L]`.
        act_excess: V_act / V_s at the last update, `[]`.
        weight_excess: V_w / V_s of each layer, `[L]`.
    """

    s: Array
    rho: Array
    nu: Array
    act_excess: Array
    weight_excess: Array

    @classmethod
    def exact(cls, layers: int) -> "VCASState":
        """Where every training begins: nothing is dropped."""
        one, none = jnp.ones(layers), jnp.zeros(layers)
        return cls(jnp.ones(()), one, one, jnp.zeros(()), none)


@typed
def keep_probabilities(
    score: Float[ArrayLike, " count"], *, ratio: float | Float[ArrayLike, ""]
) -> Float[Array, " count"]:
    """Probabilities in proportion to a score, at most 1, with a given mean.

    p_i = min(1, c score_i),  sum_i p_i = ratio count

    With them the sum of m_i v_i / p_i has the least variance if score_i = |v_i|.

    Args:
        score: >= 0, `[n]`; an entry of 0 is never kept.
        ratio: mean of p, in (0, 1].

    Returns:
        p `[n]`, float32. If fewer than ratio n scores are positive, these have p = 1.

    Raises:
        ValueError: `ratio` is out of range.

    >>> keep_probabilities(jnp.array([8.0, 1.0, 3.0, 0.0]), ratio=0.5).tolist()
    [1.0, 0.25, 0.75, 0.0]
    """
    check_range("ratio", ratio, above=0.0, high=1.0)
    score = as_float32(score)
    return _probabilities(score, jnp.asarray(ratio, score.dtype) * score.shape[0])


@typed
def vcas_dense(
    key: Key[Array, ""],
    x: Float[ArrayLike, "batch *tokens inputs"],
    w: Float[ArrayLike, "inputs outputs"],
    b: Float[ArrayLike, " outputs"],
    *,
    rho: float | Float[ArrayLike, ""] = 1.0,
    nu: float | Float[ArrayLike, ""] = 1.0,
) -> Float[Array, "batch *tokens outputs"]:
    """A dense layer that back-propagates a sample of its examples and tokens.

    y = x w + b

    Gradient: those of `x`, `w` and `b` are unbiased estimates, exact where `rho` and
    `nu` are 1; that of `nu` is no derivative but the variance that sampling tokens adds
    to dw, sum_j (1 - q_j) / q_j |g_j|^2 |x_j|^2; that of `rho` is 0. Reverse mode only.

    Args:
        key: typed key, a new one for each step and layer.
        x: inputs, `[N, ..., D]`; axes between are tokens of an example.
        w: weights, `[D, K]`.
        b: bias, `[K]`.
        rho: share of the N examples that are kept, in (0, 1]. Those that a later layer
            has dropped have no gradient, and count as dropped.
        nu: share of the tokens left that dw is formed from, in (0, 1].

    Returns:
        y `[N, ..., K]`, float32.

    Raises:
        ValueError: `rho` or `nu` is out of range.

    >>> x, w, b = jnp.eye(4), jnp.ones((4, 2)), jnp.zeros(2)
    >>> f = lambda x: vcas_dense(jax.random.key(0), x, w, b, rho=0.5).sum()
    >>> jax.grad(f)(x).sum(1).tolist()
    [0.0, 16.0, 16.0, 16.0]
    """
    check_range("rho", rho, above=0.0, high=1.0)
    check_range("nu", nu, above=0.0, high=1.0)
    x, w, b = as_float32(x), as_float32(w), as_float32(b)
    ratios = [jnp.asarray(ratio, x.dtype) for ratio in (rho, nu)]
    return _dense(key, x, w, b, *ratios)


@typed
def vcas_update(
    state: VCASState,
    sgd_variance: Float[ArrayLike, " layers"],
    act_variance: Float[ArrayLike, " layers"],
    weight_variance: Float[ArrayLike, " layers"],
    grad_norms: Float[ArrayLike, "layers batches batch"],
    *,
    tau: float = 0.025,
    alpha: float = 0.01,
    beta: float = 0.95,
    decay: float = 0.6,
) -> VCASState:
    """One move of the controller.

    Args:
        state: `VCASState.exact(L)` at first.
        sgd_variance: V_s of the weight gradient of each layer, between batches.
        act_variance: V_act, mean squared distance of dw with `rho`, and `nu` = 1, from
            the exact dw of the same batch.
        weight_variance: V_w, the mean of the cotangents of `nu`.
        grad_norms: |dy_i| of each example in exact passes over a few batches.
        tau: noise that is accepted, as a share of V_s, once for examples and once for
            tokens; > 0.
        alpha: step of s, in (0, 1).
        beta: factor of nu, in (0, 1).
        decay: share of the old rho that stays, in [0, 1). 0.6 is the released code's,
            0 the paper's.

    Returns:
        The new state, float32.

    Raises:
        ValueError: a number is out of range.

    >>> norms = jnp.array([[[8.0, 1.0, 1.0, 0.0]]])
    >>> one = jnp.ones(1)
    >>> state = VCASState.exact(1)
    >>> state = vcas_update(state, one, 0 * one, one, norms, alpha=0.1, decay=0.0)
    >>> float(state.s), state.rho.tolist(), state.nu.tolist()
    (0.9, [0.5], [1.0])
    """
    check_range("tau", tau, above=0.0)
    check_range("alpha", alpha, above=0.0, below=1.0)
    check_range("beta", beta, above=0.0, below=1.0)
    check_range("decay", decay, low=0.0, below=1.0)
    sgd, act, weight, norms = (
        as_float32(a) for a in (sgd_variance, act_variance, weight_variance, grad_norms)
    )
    act_excess = _over(jnp.sum(act), jnp.sum(sgd))
    weight_excess = _over(weight, sgd)
    s = jnp.clip(state.s + jnp.where(act_excess > tau, alpha, -alpha), 0.0, 1.0)
    # Gradients flow down: what a layer has dropped, those below it never see.
    kept = jax.lax.cummax(jnp.mean(_sparsity(norms, s), axis=1))
    rho = decay * state.rho + (1.0 - decay) * kept
    more = jnp.minimum(state.nu / beta, 1.0)
    nu = jnp.where(weight_excess > tau, more, state.nu * beta)
    return VCASState(s, rho, nu, act_excess, weight_excess)


@jax.custom_vjp
def _dense(key: Array, x: Array, w: Array, b: Array, rho: Array, nu: Array) -> Array:
    y = jnp.matmul(x, w)
    return y + b.reshape((1,) * (y.ndim - 1) + (-1,))


def _forward(key: Array, x: Array, w: Array, b: Array, rho: Array, nu: Array):
    return _dense(key, x, w, b, rho, nu), (key, x, w, rho, nu)


def _backward(stored: tuple[Array, ...], dy: Array):
    key, x, w, rho, nu = stored
    act_key, weight_key = jax.random.split(key)
    batch = x.shape[0]
    examples = dy.reshape(batch, -1)
    p = _probabilities(_lengths(examples), rho * batch)
    m = _kept(act_key, p)
    g = (examples * m.reshape(-1, 1)).reshape(-1, dy.shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    leverage = _lengths(g) * _lengths(rows)
    left = jnp.sum(m > 0) * (g.shape[0] // batch)
    q = _probabilities(leverage, jnp.maximum(nu * left, 1.0))
    chosen = _kept(weight_key, q).reshape(-1, 1)
    dw = jnp.matmul((rows * chosen).T, g)
    odds = jnp.where(q > 0.0, (1.0 - q) / jnp.where(q > 0.0, q, 1.0), 0.0)
    added = jnp.sum(odds * jnp.square(leverage))
    dx = jnp.matmul(g, w.T).reshape(x.shape)
    return None, dx, dw, jnp.sum(g, axis=0), jnp.zeros_like(rho), added


_dense.defvjp(_forward, _backward)


def _probabilities(score: Array, budget: Array) -> Array:
    """min(1, c score) with the c that makes the sum `budget`, if there is one."""
    count = score.shape[0]
    top = jax.lax.stop_gradient(jnp.max(score))
    score = jnp.where(top > 0.0, score / jnp.where(top > 0.0, top, 1.0), 0.0)
    falling = jnp.sort(score)[::-1]
    tail = jnp.cumsum(falling[::-1])[::-1]
    # With the first m of them at 1, what is left of the budget goes to the others.
    left = jnp.clip(budget, 0.0, count) - jnp.arange(count)
    first = jnp.argmax(falling * left <= tail)
    some = tail[first] > 0.0
    c = left[first] / jnp.where(some, tail[first], 1.0)
    # Not by c, whose rounding would drop an example where all are to be kept.
    is_enough = budget >= jnp.sum(score > 0.0)
    return jnp.where(is_enough, jnp.sign(score), jnp.minimum(score * c, 1.0))


def _kept(key: Array, p: Array) -> Array:
    """1 / p with probability p, else 0."""
    is_kept = jax.random.uniform(key, p.shape, p.dtype) < p
    return jnp.where(is_kept, 1.0 / jnp.where(is_kept, p, 1.0), 0.0)


def _sparsity(norms: Array, s: Array) -> Array:
    """Least share of the last axis that holds a share s of its sum."""
    running = jnp.cumsum(jnp.sort(norms, axis=-1)[..., ::-1], axis=-1)
    short = jnp.sum(running < s * running[..., -1:], axis=-1)
    share = jnp.minimum((short + 1) / norms.shape[-1], 1.0)
    return jnp.where(s < 1.0, share, 1.0).astype(norms.dtype)


def _lengths(x: Array) -> Array:
    """Lengths of rows, also where their squares would overflow."""
    largest = jnp.max(jnp.abs(x))
    scale = jnp.where(largest > 0.0, largest, 1.0)
    return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale), axis=1))


def _over(x: Array, y: Array) -> Array:
    """x / y, 0 where y is 0; scaled, as the derivative has the square of y."""
    top = jax.lax.stop_gradient(jnp.max(y))
    scale = jnp.where(top > 0.0, top, 1.0)
    x, y = x / scale, y / scale
    return jnp.where(y > 0.0, x / jnp.where(y > 0.0, y, 1.0), 0.0)


def _layer(key: Array):
    keys = jax.random.split(key, 3)
    x, w = jax.random.normal(keys[0], (8, 2, 4)), jax.random.normal(keys[1], (4, 3))
    return x, w, jax.random.normal(keys[2], (3,))


def _measured(key: Array):
    variances = jax.random.uniform(key, (3, 2), minval=0.5)
    return *variances, jax.random.uniform(key, (2, 2, 8), minval=0.1)


EXAMPLES = {
    keep_probabilities: lambda key: (
        (jax.random.uniform(key, (8,), minval=0.1),),
        {"ratio": 0.4},
    ),
    vcas_dense: lambda key: ((key, *_layer(key)), {"rho": 0.6, "nu": 0.5}),
    vcas_update: lambda key: ((VCASState.exact(2), *_measured(key)), {}),
}
