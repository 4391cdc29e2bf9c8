"""TVLARS: LARS whose rate starts high and decays along a sigmoid, without warm-up.

    phi_t = 1 / (alpha + exp(lam (t - delay))) + gamma_min
    s_t   = phi_t eta |w| / (|g| + wd |w|) (g + wd w)         for each array by itself
    m    <- momentum m + s_t,    w <- w - learning_rate m

|w| / |g| makes the first steps of LARS huge where gradients are small, which warm-up
holds back. TVLARS takes them: they lead out of the sharp minima near the start. The
rate stays near 1 / alpha up to `delay`, and `lam` says how sharply it drops then.

    optimizer = tvlars(16.0, lam=0.08, delay=60.0)            # in steps

LARS and LAMB, which it is compared to, are Optax's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxzoo.core.transform import Mask, Number, Rate, descend, in_float32, like
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "tvlars",
    "title": "Revisiting LARS for Large Batch Training Generalization of Neural "
    "Networks",
    "arxiv": "2309.14053",
    "year": 2023,
    "authors": "Khoi Do, Duong Nguyen, Hoa Nguyen, Long Tran-Thanh, Nguyen-Hoang Tran, "
    "Quoc-Viet Pham",
    "where": "The time-varying rate with its bounds, and the algorithm of TVLARS.",
    "differs": "The layer-wise rate has |g| + wd |w| below the line, as the paper's "
    "LARS; the released code has |g + wd w|, holds the rate of LARS for "
    "some epochs and divides it by 0.1 + exp(lam t) then, without "
    "gamma_min. Momentum is the released code's heavy ball. Time is counted "
    "in steps. On digits with an MLP, batch 1024 and 120 steps TVLARS and "
    "LARS with warm-up are equal within the errors: 0.2 points above on "
    "average over learning rates of 1 to 64, and 0.2 below at 64, where the "
    "paper has it ahead.",
}

__all__ = ["scale_by_tvlars", "time_varying_rate", "tvlars"]


class TVLARSState(NamedTuple):
    """The steps so far, and the momentum of Optax's `trace` in float32."""

    count: Array
    trace: Any


@typed
def time_varying_rate(
    step: Float[ArrayLike, "*steps"] | Int[ArrayLike, "*steps"],
    *,
    lam: Number = 1e-2,
    delay: Number = 100.0,
    alpha: Number = 1.0,
    gamma_min: Number = 1e-3,
) -> Float[Array, "*steps"]:
    """The factor of the learning rate, a sigmoid that falls.

    phi_t = 1 / (alpha + exp(lam (t - delay))) + gamma_min

    Args:
        step: t, from 0.
        lam: lambda >= 0, per step: how sharply it falls.
        delay: the step about which it falls.
        alpha: > 0; the rate begins just below 1 / alpha + gamma_min.
        gamma_min: >= 0, what it falls to. The authors' is 1e-3 B / B_base.

    Returns:
        The factors, float32, between gamma_min and 1 / (alpha + exp(-lam delay)) +
        gamma_min.

    Raises:
        ValueError: an argument is out of range.

    >>> t = jnp.array([0.0, 100.0, 300.0])
    >>> time_varying_rate(t, lam=0.05, delay=100.0, gamma_min=0.01).tolist()
    [1.0033, 0.51, 0.01005]
    """
    _check(lam, delay, alpha, gamma_min)
    sharpness, middle, top, least = map(jnp.asarray, (lam, delay, alpha, gamma_min))
    # As a sigmoid it stays finite, and so does its slope, where exp would overflow.
    exponent = sharpness * (as_float32(step) - middle)
    falling = jax.nn.sigmoid(jnp.log(top) - exponent) / top
    return as_float32(falling + least)


def scale_by_tvlars(
    *,
    lam: Number = 1e-2,
    delay: Number = 100.0,
    alpha: Number = 1.0,
    gamma_min: Number = 1e-3,
    trust_coefficient: Number = 1e-3,
    momentum: Number = 0.9,
    weight_decay: Number = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformation:
    """The direction of TVLARS: `tvlars` without the learning rate.

    Args:
        lam: as for `time_varying_rate`.
        delay: likewise, in steps.
        alpha: likewise.
        gamma_min: likewise.
        trust_coefficient: eta >= 0, the length of a step per length of the parameters.
        momentum: in [0, 1), of scaled gradients.
        weight_decay: wd >= 0, inside of the layer-wise rate.
        mask: the parameters that decay, as in `optax.add_decayed_weights`.

    Returns:
        A transformation whose `update` needs the parameters. An array of zeros, or
        whose gradient is zero, has no layer-wise rate: 1 stands in its place.

    Raises:
        ValueError: an argument is out of range.

    >>> direction = scale_by_tvlars(lam=0.0, gamma_min=0.0, trust_coefficient=0.1)
    >>> p = jnp.array([3.0, 4.0])
    >>> direction.update(jnp.array([0.0, 2.0]), direction.init(p), p)[0].tolist()
    [0.0, 0.25]
    """
    _check(lam, delay, alpha, gamma_min)
    check_range("trust_coefficient", trust_coefficient, low=0.0)
    check_range("momentum", momentum, low=0.0, below=1.0)
    check_range("weight_decay", weight_decay, low=0.0)
    decay: Any = optax.add_decayed_weights(weight_decay, mask)  # pyright: ignore
    trace: Any = optax.trace(momentum)  # pyright: ignore
    eta: Any = trust_coefficient

    def init(params: Any) -> TVLARSState:
        return TVLARSState(jnp.zeros((), jnp.int32), trace.init(in_float32(params)))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        if params is None:
            raise ValueError("argument 'params' is None, expected the parameters.")
        grads, weights = in_float32(updates), in_float32(params)
        zeros = jax.tree.map(jnp.zeros_like, grads)
        decayed, _ = decay.update(zeros, decay.init(weights), weights)
        phi = time_varying_rate(
            state.count, lam=lam, delay=delay, alpha=alpha, gamma_min=gamma_min
        )

        def scaled(g: Array, w: Array, d: Array) -> Array:
            length, slope = _norm(w), _norm(g) + _norm(d)
            known = (length > 0.0) & (slope > 0.0)
            ratio = eta * length / jnp.where(known, slope, 1.0)
            return (phi * jnp.where(known, ratio, 1.0) * (g + d)).astype(g.dtype)

        steps = jax.tree.map(scaled, grads, weights, decayed)
        moved, inner = trace.update(steps, state.trace)
        count: Any = optax.safe_increment(state.count)
        return like(moved, updates), TVLARSState(count, inner)

    return optax.GradientTransformation(init, update)


def tvlars(
    learning_rate: Rate,
    *,
    lam: Number = 1e-2,
    delay: Number = 100.0,
    alpha: Number = 1.0,
    gamma_min: Number = 1e-3,
    trust_coefficient: Number = 1e-3,
    momentum: Number = 0.9,
    weight_decay: Number = 5e-4,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """TVLARS, for large batches without warm-up.

    m <- momentum m + phi_t eta |w| / (|g| + wd |w|) (g + wd w)
    w <- w - learning_rate m

    Args:
        learning_rate: >= 0, or a schedule: the largest rate, as `phi` falls from 1.
        lam: lambda >= 0, per step: how sharply the rate falls.
        delay: the step about which it falls.
        alpha: > 0; the rate begins just below 1 / alpha + gamma_min.
        gamma_min: >= 0, the share of the rate that remains.
        trust_coefficient: eta >= 0.
        momentum: in [0, 1).
        weight_decay: wd >= 0, inside of the layer-wise rate, not decoupled.
        mask: the parameters that decay, as in `optax.add_decayed_weights`.

    Returns:
        An optimizer whose `update` needs the parameters. With a constant learning rate
        and no decay it is `optax.lars` with the learning rate times phi.

    Raises:
        ValueError: an argument is out of range.

    >>> optimizer = tvlars(2.0, lam=0.0, gamma_min=0.0, trust_coefficient=0.1)
    >>> p = jnp.array([3.0, 4.0])
    >>> optimizer.update(jnp.array([0.0, 2.0]), optimizer.init(p), p)[0].tolist()
    [-0.0004, -0.4999]
    """
    direction = scale_by_tvlars(
        lam=lam, delay=delay, alpha=alpha, gamma_min=gamma_min,
        trust_coefficient=trust_coefficient, momentum=momentum,
        weight_decay=weight_decay, mask=mask,
    )  # fmt: skip
    return descend(direction, learning_rate)


def _check(lam: Number, delay: Number, alpha: Number, gamma_min: Number) -> None:
    check_range("lam", lam, low=0.0)
    check_range("delay", delay)
    check_range("alpha", alpha, above=0.0)
    check_range("gamma_min", gamma_min, low=0.0)


def _norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x)))


_QUICK = {"lam": 0.01, "delay": 300.0, "gamma_min": 0.01, "trust_coefficient": 0.05}

EXAMPLES = {
    time_varying_rate: lambda key: (
        (jax.random.uniform(key, (8,), maxval=200.0),),
        {"lam": 0.05, "delay": 80.0, "alpha": 0.5, "gamma_min": 0.01},
    ),
    scale_by_tvlars: lambda key: ((), _QUICK),
    tvlars: lambda key: ((0.1,), _QUICK),
}
