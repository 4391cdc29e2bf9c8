"""Small-scale proxies: how losses mind the learning rate, and what warns early.

    sensitivity = mean over a log grid of rates of min(loss, l0) - min over it of loss

with l0 the loss before training. Two instabilities of large models are there in small
ones at high rates: attention logits that grow, which `Transformer(qk_norm=True)` holds,
and output logits that drift, which `next_token_loss(..., z_loss=1e-4)` holds. What
grows can be extrapolated from size to size before it breaks:

    logits = extrapolate(sizes, max_logits, at)     # per rate, from smaller models
    rate = first_unstable_rate(rates, logits)       # 1e4 is where the paper's broke

The paper's weights decay by the schedule alone, and "muParam (simple)" slows matrices
by how much wider they are than a base:

    adamw = independent_adamw(schedule, peak=rate)
    optimizer = optax.chain(adamw, scale_by_fan_in(base=64))
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxzoo.core.transform import Mask, Number, Rate, descend, in_float32, like
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
    "differs": "Written from the abstract, summaries and NanoDO, whose weight decay "
    "and muParam these are (the decay is scaled with the rate there too); muParam's "
    "other forms are left out. Queries and keys have RMS norms with a scale, where "
    "the paper has layer norms. In the experiment byte models of 42,000 parameters "
    "train for 120 steps, on rates from 3e-3 to 3 in place of 3e-4 to 3e-1, as their "
    "best is ten times as high. There qk-norm lowers the largest logit from 3e7 to "
    "3e3, yet with z-loss the sensitivity by 3 +- 17 % (fails): losses differ at 0.3, "
    "2.87 against 2.56 nats, and at 3 no norm helps. 120 steps are too few for a "
    "z-loss of 1e-4: mean |log Z| is 0.99 of that without (fails). A longer warm-up, "
    "muParam and decay times the rate lower the sensitivity more.",
}

__all__ = [
    "extrapolate", "first_unstable_rate", "independent_adamw", "lr_sensitivity",
    "max_attention_logit", "scale_by_fan_in",
]  # fmt: skip


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
        float32 `[...]`, >= 0, in the unit of the losses; of one grid they compare.

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
    keys: Float[ArrayLike, "*batch t k h"], *, is_causal: bool = True,
) -> Float[Array, "*batch"]:  # fmt: skip
    """The largest logit of attention: what grows before training breaks.

    max over heads, t and t' of q_t . k_t' / sqrt(H)

    Args:
        queries: `[..., T, N, H]`, as attention gets them: normed, turned.
        keys: `[..., T, K, H]`, K a divisor of N: heads share them.
        is_causal: t' <= t alone.

    Returns:
        float32 `[...]`. All logits are made at once, `[..., N, T, T]`, of entries
        within 1e15.

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
        sizes: numbers of parameters of models that were trained, > 0, `[S]`, S >= 3.
        values: > 0, as their largest attention logits or the RMS of their gradients,
            `[..., S]`, for instance per learning rate; 1e-30 if less.
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
    # `at` goes along through an orthogonal basis that is made of the others: powers
    # of log size themselves are all but parallel.
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
    max_logits: Float[ArrayLike, "*batch rates"], *, threshold: float = 1e4,
) -> Float[Array, "*batch"]:  # fmt: skip
    """The smallest learning rate whose attention logits pass a threshold.

    Args:
        rates: learning rates in any order, `[R]`.
        max_logits: measured or extrapolated, `[..., R]`; NaN passes every threshold.
        threshold: > 0; in the paper models with logits above 1e4 diverged.

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
    learning_rate: Rate, *, peak: Number | None = None,
    b1: Number = 0.9, b2: Number = 0.95, eps: Number = 1e-8,
    weight_decay: Number = 1e-4, mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """AdamW whose weights decay alike whatever learning rate is tried.

    p <- p - learning_rate mhat / (sqrt(vhat) + eps) - s weight_decay p
    s = learning_rate / peak, where `optax.adamw` has the learning rate itself

    Args:
        learning_rate: >= 0, or a schedule of the step.
        peak: > 0, the largest rate of the schedule. None: the learning rate, if it is
            a number, so that s = 1.
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
    adam = _in_float32(optax.scale_by_adam(*numbers))
    if peak is None and callable(learning_rate):
        raise ValueError(
            "argument 'peak' is None, expected the largest rate of the schedule."
        )
    share: Any = weight_decay
    top: Any = learning_rate if peak is None else peak
    check_range("peak", top, above=0.0)
    return descend(adam, learning_rate, weight_decay=share / top, mask=mask)


@typed
def scale_by_fan_in(*, base: int) -> optax.GradientTransformation:
    """muParam (simple): wider matrices learn more slowly, u <- (base / fan_in) u.

    Chained after an optimizer it scales the learning rate, and a weight decay within.

    Args:
        base: the fan-in at which the learning rate was tuned, >= 1. That of an array is
            its last axis but one, so that `[depth, in, out]` is a stack of layers; an
            "embedding", and a stack of vectors named "scale" or "bias", stay.

    Returns:
        A transformation without state.

    Raises:
        ValueError: `base` is below 1.

    >>> optimizer, u = scale_by_fan_in(base=16), jnp.ones((64, 1))
    >>> float(optimizer.update(u, optimizer.init(u))[0][0, 0])
    0.25
    """
    check_range("base", base, low=1)

    def scaled(path: Any, u: Array) -> Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        is_matrix = u.ndim >= 2 and name not in ("embedding", "scale", "bias")
        return u * (base / u.shape[-2]) if is_matrix else u

    return optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates)
    )


def _in_float32(inner: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = inner.update(in_float32(updates), state)
        return like(new, updates), state

    return optax.GradientTransformation(
        lambda params: inner.init(in_float32(params)), update
    )


def _along(y: Array, x: Array) -> Array:
    """Coefficients of y along x, 0 where all x are."""
    return jnp.einsum("...s,s->...", y, x) / jnp.maximum(jnp.vdot(x, x), 1e-12)


def _sizes(key: Array) -> tuple[Array, Array, Array]:
    sizes = 2.0 ** jnp.arange(1.0, 9.0)
    values = (1.0 + jax.random.uniform(key, (3, 8))) * sizes[None]
    return sizes, values, jnp.asarray(512.0)


def _logits(key: Array) -> tuple[Array, Array]:
    rates = 10.0 ** jnp.linspace(-3.0, 0.0, 8)
    return rates, rates[None] * (1.0 + jax.random.uniform(key, (3, 8)))


EXAMPLES = {
    lr_sensitivity: lambda key: (
        (jax.random.uniform(key, (8, 5)), jnp.linspace(0.5, 1.4, 8)), {}
    ),
    max_attention_logit: lambda key: (
        tuple(jnp.split(jax.random.normal(key, (2, 8, 6, 4)), [4], axis=2)), {}
    ),
    extrapolate: lambda key: (_sizes(key), {}),
    first_unstable_rate: lambda key: (_logits(key), {"threshold": 0.1}),
    independent_adamw: lambda key: ((0.01,), {"peak": 0.01}),
    scale_by_fan_in: lambda key: ((), {"base": 4}),
}  # fmt: skip
