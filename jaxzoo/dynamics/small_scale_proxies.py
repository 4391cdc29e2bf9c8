"""Small-scale proxies: how a model's loss minds its learning rate, and what warns early.

    sensitivity = mean over a log grid of rates of min(loss, l0) - min over it of loss

with l0 the loss before training: 0 for a model that any rate of the grid trains alike.
Two instabilities of large models are there in small ones at high rates: attention
logits that grow, which norms of queries and keys hold (`Transformer(qk_norm=True)`),
and output logits that drift, which `next_token_loss(..., z_loss=1e-4)` holds. What
grows can be extrapolated from size to size before it breaks:

    logits = extrapolate(sizes, max_logits, at)     # per rate, from smaller models
    rate = first_unstable_rate(rates, logits)       # 1e4 is where the paper's broke

The paper's optimizer decays weights whatever the learning rate is, and "muParam
(simple)" divides the updates of matrices by how much wider they are than a base:

    optimizer = optax.chain(
        independent_adamw(schedule, peak=rate), scale_by_fan_in(base=64)
    )
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxzoo.core.transform import Mask, Number, Rate, descend
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "small_scale_proxies",
    "title": "Small-scale proxies for large-scale Transformer training instabilities",
    "arxiv": "2309.14322",
    "year": 2023,
    "authors": "Mitchell Wortsman, Peter J. Liu, Lechao Xiao, Katie Everett, Alex "
    "Alemi, Ben Adlam, John D. Co-Reyes, Izzeddin Gur, Abhishek Kumar, Roman Novak, "
    "Jeffrey Pennington, Jascha Sohl-dickstein, Kelvin Xu, Jaehoon Lee, Justin Gilmer, "
    "Simon Kornblith",
    "where": "The sensitivity to the learning rate, the logits of attention and of the "
    "output, independent weight decay, muParam (simple), and the quadratic fit in log "
    "space that predicts instability.",
    "differs": "TO BE MEASURED.",
}

__all__ = [
    "extrapolate",
    "first_unstable_rate",
    "independent_adamw",
    "lr_sensitivity",
    "max_attention_logit",
    "scale_by_fan_in",
]


@typed
def lr_sensitivity(
    losses: Float[ArrayLike, "*batch rates"], initial: Float[ArrayLike, "*batch"]
) -> Float[Array, "*batch"]:
    """How far losses are from the best one on average over learning rates.

    mean_r min(loss_r, l0) - min_r loss_r

    Args:
        losses: after training, one per learning rate of a grid that is even in the
            logarithm (the paper's: 3e-4 to 3e-1), `[..., R]`. NaN and infinity count
            as l0: training diverged.
        initial: l0, the loss before training, `[...]`.

    Returns:
        float32 `[...]`, >= 0, in the unit of the losses. It depends on the grid: only
        values of the same one compare.

    Raises:
        TypeError: `initial` does not have the shape of `losses` without its last axis.

    >>> losses = jnp.array([[3.0, 2.0, 2.5, jnp.nan]])
    >>> lr_sensitivity(losses, jnp.array([4.0])).tolist()  # 2.875 on average, 2 at best
    [0.875]
    """
    losses, initial = as_float32(losses), as_float32(initial)[..., None]
    kept = jnp.where(jnp.isfinite(losses), jnp.minimum(losses, initial), initial)
    return jnp.mean(kept - jnp.min(kept, axis=-1, keepdims=True), axis=-1)


@typed
def max_attention_logit(
    queries: Float[ArrayLike, "*batch t n h"],
    keys: Float[ArrayLike, "*batch t k h"],
    *,
    is_causal: bool = True,
) -> Float[Array, "*batch"]:
    """The largest logit of attention: what grows before training breaks.

    max over heads, t and t' of q_t . k_t' / sqrt(H)

    Args:
        queries: `[..., T, N, H]`, as attention gets them: normed, turned.
        keys: `[..., T, K, H]`, K a divisor of N: heads share them.
        is_causal: t' <= t alone.

    Returns:
        float32 `[...]`. All logits are made at once, `[..., N, T, T]`. Entries beyond
        1e15 count as that.

    Raises:
        ValueError: K does not divide N.

    >>> q, k = jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [-5.0]])
    >>> float(max_attention_logit(q[:, None], k[:, None]))  # 1 3, 2 3, 2 (-5)
    6.0
    """
    q, k = (jnp.clip(as_float32(x), -1e15, 1e15) for x in (queries, keys))
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"argument 'keys' has {k.shape[-2]} heads, expected a divisor of the "
            f"{q.shape[-2]} of 'queries'."
        )
    k = jnp.repeat(k, q.shape[-2] // k.shape[-2], axis=-2)
    logits = jnp.einsum("...tnh,...snh->...nts", q, k) / math.sqrt(q.shape[-1])
    if is_causal:
        seen = jnp.tri(q.shape[-3], dtype=bool)
        logits = jnp.where(jnp.broadcast_to(seen, logits.shape), logits, -jnp.inf)
    return jnp.max(logits, axis=(-3, -2, -1))


@typed
def extrapolate(
    sizes: Float[ArrayLike, " sizes"],
    values: Float[ArrayLike, "*batch sizes"],
    at: Float[ArrayLike, ""] | float,
) -> Float[Array, "*batch"]:
    """What a quadratic in log space says of another size.

    log value = a + b log size + c (log size)^2, by least squares

    Args:
        sizes: of models that were trained, as numbers of parameters, > 0, three at
            least; `[S]`.
        values: > 0, as their largest attention logits or the RMS of their gradients;
            `[..., S]`, for instance per learning rate. Below 1e-30 they count as that.
        at: > 0, the size to predict.

    Returns:
        float32 `[...]`, at most e^80.

    Raises:
        ValueError: there are fewer than three sizes, or `at` is not above 0.

    >>> sizes = jnp.array([10.0, 100.0, 1000.0])
    >>> extrapolate(sizes, jnp.array([[1.0, 10.0, 1000.0]]), 1e4).round(-2).tolist()
    [1000000.0]
    """
    if isinstance(at, float):
        check_range("at", at, above=0.0)
    sizes, values, at = (as_float32(x) for x in (sizes, values, at))
    if sizes.shape[0] < 3:
        raise ValueError(
            f"argument 'sizes' has {sizes.shape[0]} of them, expected 3 or more."
        )
    # The last entry goes along through an orthogonal basis that is made of the others:
    # powers of log size themselves are all but parallel.
    x = jnp.log(jnp.maximum(jnp.append(sizes, at), 1e-30))
    x = x - jnp.mean(x[:-1])
    square = jnp.square(x)
    square = square - jnp.mean(square[:-1])
    square = square - _along(square[:-1], x[:-1]) * x
    y = jnp.log(jnp.maximum(values, 1e-30))
    level = jnp.mean(y, axis=-1)
    slope, bend = _along(y, x[:-1]), _along(y, square[:-1])
    return jnp.exp(jnp.minimum(level + slope * x[-1] + bend * square[-1], 80.0))


@typed
def first_unstable_rate(
    rates: Float[ArrayLike, " rates"],
    max_logits: Float[ArrayLike, "*batch rates"],
    *,
    threshold: float = 1e4,
) -> Float[Array, "*batch"]:
    """The smallest learning rate whose attention logits pass a threshold.

    Args:
        rates: learning rates in any order, `[R]`.
        max_logits: measured, or predicted by `extrapolate`; `[..., R]`. NaN and
            infinity pass it: training diverged.
        threshold: > 0; in the paper every model with logits above 1e4 diverged.

    Returns:
        float32 `[...]`; infinity if no rate is unstable.

    Raises:
        ValueError: `threshold` is out of range.

    >>> rates = jnp.array([1e-3, 1e-2, 1e-1])
    >>> first_unstable_rate(rates, jnp.array([[5.0, 2e4, 9e6]])).tolist()
    [0.01]
    """
    check_range("threshold", threshold, above=0.0, below=float("inf"))
    rates, max_logits = as_float32(rates), as_float32(max_logits)
    stable = jnp.isfinite(max_logits) & (max_logits <= threshold)
    rates = jnp.broadcast_to(rates, max_logits.shape)
    return jnp.min(jnp.where(stable, jnp.inf, rates), axis=-1)


@typed
def independent_adamw(
    learning_rate: Rate,
    *,
    peak: Number | None = None,
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    weight_decay: Number = 1e-4,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose weight decay follows the schedule, and not the rate it begins from.

    p <- p - s (peak mhat / (sqrt(vhat) + eps) + weight_decay p),  s = learning_rate/peak

    Where the rates are tuned, weights decay alike under all of them. `optax.adamw` has
    weight_decay learning_rate p.

    Args:
        learning_rate: >= 0, or a schedule of the step.
        peak: > 0, what s is relative to: the largest rate of a schedule. None: the
            learning rate, if it is a number, so that s = 1.
        b1: in [0, 1).
        b2: in [0, 1).
        eps: >= 0. Where the RMS of a gradient is near it, its parameter stands still.
        weight_decay: >= 0, a share of the parameter per step.
        mask: the parameters that decay, as in `optax.add_decayed_weights`.

    Returns:
        A transformation; `update` takes the parameters.

    Raises:
        ValueError: a number is out of range, or `peak` is missing beside a schedule.

    >>> optimizer, p = independent_adamw(0.1, weight_decay=0.01), jnp.array([10.0])
    >>> optimizer.update(jnp.array([3.0]), optimizer.init(p), p)[0].tolist()
    [-0.2]
    """
    check_range("b1", b1, low=0.0, below=1.0)
    check_range("b2", b2, low=0.0, below=1.0)
    check_range("eps", eps, low=0.0)
    check_range("weight_decay", weight_decay, low=0.0)
    numbers: Any = (b1, b2, eps)
    adam = optax.scale_by_adam(*numbers, mu_dtype=jnp.float32)
    if peak is not None:
        check_range("peak", peak, above=0.0)
        share: Any = weight_decay
        return descend(adam, learning_rate, weight_decay=share / peak, mask=mask)
    if callable(learning_rate):
        raise ValueError(
            "argument 'peak' is None, expected the largest rate of the schedule."
        )
    check_range("learning_rate", learning_rate, low=0.0)
    scaled = optax.chain(adam, optax.scale(learning_rate))
    return descend(scaled, 1.0, weight_decay=weight_decay, mask=mask)


@typed
def scale_by_fan_in(
    *, base: int, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """muParam (simple): wider matrices learn more slowly.

    u <- (base / fan_in) u

    Chained after an optimizer it scales the learning rate, and a weight decay within.
    Initialisations stay what they are.

    Args:
        base: the fan-in at which the learning rate was tuned, >= 1.
        mask: the matrices that are scaled, a tree of bools or a function that makes
            one. None: every array of two or more axes whose name is not "embedding",
            "scale" or "bias", which are stacks of vectors.

    Returns:
        A transformation without state. The fan-in is the last axis but one, so that
        `[depth, in, out]` is a stack of layers.

    Raises:
        ValueError: `base` is below 1.

    >>> updates = {"kernel": jnp.ones((64, 1)), "bias": jnp.ones(1)}
    >>> optimizer = scale_by_fan_in(base=16)
    >>> scaled = optimizer.update(updates, optimizer.init(updates))[0]
    >>> float(scaled["kernel"][0, 0]), float(scaled["bias"][0])
    (0.25, 1.0)
    """
    check_range("base", base, low=1)

    def scaled(updates: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(
            lambda u: u * (base / u.shape[-2]) if u.ndim >= 2 else u, updates
        )

    chosen: Any = _matrices if mask is None else mask
    return optax.with_extra_args_support(
        optax.masked(optax.stateless(scaled), chosen)
    )


def _along(y: Array, x: Array) -> Array:
    """Coefficients of y along x, 0 where all x are."""
    return jnp.einsum("...s,s->...", y, x) / jnp.maximum(jnp.vdot(x, x), 1e-12)


def _matrices(tree: Any) -> Any:
    def is_matrix(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim >= 2 and name not in ("embedding", "scale", "bias")

    return jax.tree_util.tree_map_with_path(is_matrix, tree)


def _losses(key: Array) -> tuple[Array, Array]:
    keys = jax.random.split(key)
    return jax.random.uniform(keys[0], (8, 5)), jax.random.uniform(keys[1], (8,)) + 0.5


def _heads(key: Array) -> tuple[Array, Array]:
    keys = jax.random.split(key)
    shapes = ((2, 8, 4, 4), (2, 8, 2, 4))
    q, k = (jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True))
    return q, k


def _sizes(key: Array) -> tuple[Array, Array, Array]:
    sizes = 2.0 ** jnp.arange(1.0, 9.0)
    values = (1.0 + jax.random.uniform(key, (3, 8))) * sizes[None]
    return sizes, values, jnp.asarray(512.0)


def _logits(key: Array) -> tuple[Array, Array]:
    rates = 10.0 ** jnp.linspace(-3.0, 0.0, 8)
    return rates, rates[None] * (1.0 + jax.random.uniform(key, (3, 8)))


EXAMPLES = {
    lr_sensitivity: lambda key: (_losses(key), {}),
    max_attention_logit: lambda key: (_heads(key), {}),
    extrapolate: lambda key: (_sizes(key), {}),
    first_unstable_rate: lambda key: (_logits(key), {"threshold": 0.1}),
    independent_adamw: lambda key: ((0.01,), {"peak": 0.01}),
    scale_by_fan_in: lambda key: ((), {"base": 4}),
}
