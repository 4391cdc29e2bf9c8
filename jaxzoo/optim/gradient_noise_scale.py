"""The gradient noise scale: how large a batch is worth its examples.

A batch of B examples has a gradient with mean G and covariance Sigma / B. So

    E g_B^T H g_B = G^T H G + tr(H Sigma) / B                 for any matrix H

and two batch sizes tell the two terms apart. Their ratio is a batch size:

    B_simple = tr(Sigma) / |G|^2                 H = I, costs nothing beside training
    B_noise  = tr(H Sigma) / (G^T H G)           H the Hessian of the loss

Batches far below it waste steps, far above it examples. Data parallel training has
both gradients at hand, the one of each device and their mean:

    def step(params, local_batch):                          # inside jax.shard_map
        own = jax.grad(loss)(varying(params, "data"), local_batch)
        b, aux = shard_noise_scale(tree_map(lambda g: g[None], own),
                                   batch_size=64, axis_name="data")

A single step says little. Average each term over steps, and divide only afterwards:

    ema = optax.ema(0.99)
    mean, state = ema.update({k: aux[k] for k in ("signal", "noise")}, state)
    b_simple = mean["noise"] / mean["signal"]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxzoo.core.collectives import AxisName, axis_size, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "gradient_noise_scale",
    "title": "An Empirical Model of Large-Batch Training",
    "arxiv": "1812.06162",
    "year": 2018,
    "authors": "Sam McCandlish, Jared Kaplan, Dario Amodei, OpenAI Dota Team",
    "where": "Section 2 (B_noise, B_simple, the learning rate of a batch size, steps "
    "against examples), appendix A.1 (two batch sizes, one step's gradients of all "
    "devices), appendix D (the batch size that follows the noise scale).",
    "differs": "The authors released no code; two batch sizes agree with what GPT-NeoX "
    "logs. The hyperbola is fitted by least squares of its linear form, S_min / S + "
    "E_min / E = 1. The batch size that follows the noise scale is given as a number: "
    "changing the batch is left to the caller. The experiment has digits, SGD and ten "
    "learning rates per batch size in place of image, language and game models: B_crit "
    "= 29, run-averaged B_simple 23, R2 0.99. B_noise lay below B_simple, at 17 "
    "against 43 of the training images, on average over a run.",
}

__all__ = [
    "adaptive_batch_size", "noise_scale", "optimal_learning_rate", "pareto_fit",
    "shard_noise_scale",
]  # fmt: skip

Gradients = PyTree[Float[ArrayLike, "?*shape"], "T"]
Stacked = PyTree[Float[ArrayLike, "parts ..."]]
Product = Callable[[Any], Any]


@typed
def noise_scale(
    g_small: Gradients, g_big: Gradients, *, batch_small: int, batch_big: int,
    curvature: Product | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:  # fmt: skip
    """The noise scale from one gradient of a small batch and one of a big batch.

    signal = (B |g_B|^2 - b |g_b|^2) / (B - b)             unbiased for |G|^2
    noise  = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)             unbiased for tr(Sigma)

    Args:
        g_small: mean gradient over `batch_small` examples, any tree of arrays. They may
            be among the examples of the big batch.
        g_big: mean gradient over `batch_big` examples, a like tree.
        batch_small: b >= 1.
        batch_big: B > b.
        curvature: `v -> H v` for trees like the gradients, such as the product with the
            Hessian; |v|^2 is v^T H v then. None: H = I.

    Returns:
        `(noise / signal, aux)`: B_simple, or B_noise with the Hessian, in examples;
        infinite where the estimate of the signal is not positive. aux holds "signal"
        and "noise", which may be negative: average these over steps.

    Raises:
        ValueError: a batch size is out of range.
        TypeError: the trees differ.

    >>> small, big = jnp.array([3.0, 0.0]), jnp.array([2.0, 1.0])
    >>> b, aux = noise_scale(small, big, batch_small=1, batch_big=8)
    >>> float(aux["signal"]), float(aux["noise"]), float(b)
    (4.4286, 4.5714, 1.0323)
    """
    check_range("batch_small", batch_small, low=1)
    check_range("batch_big", batch_big, above=batch_small)
    scale = jnp.maximum(_largest(g_small), _largest(g_big))
    small, big = (_square(_over(g, scale), curvature) for g in (g_small, g_big))
    signal = (batch_big * big - batch_small * small) / (batch_big - batch_small)
    noise = (small - big) / (1.0 / batch_small - 1.0 / batch_big)
    return _ratio(signal, noise, scale)


@typed
def shard_noise_scale(
    gradients: Stacked, *, batch_size: int = 1, curvature: Product | None = None,
    exact: bool = False, axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:  # fmt: skip
    """The noise scale from the gradients of the parts of one batch, and their mean.

    noise  = b sum_k |g_k - mean|^2 / (K - 1)              unbiased for tr(Sigma)
    signal = |mean|^2 - noise / (b K)                      unbiased for |G|^2

    It is the mean of `noise_scale` over the parts, each against the whole. The parts
    may be those of devices, micro-batches that are accumulated, or single examples.

    Args:
        gradients: tree of arrays `[parts, ...]`, each part the mean over `batch_size`
            examples; inside `jax.shard_map` those by `varying(params, axis)`, as above.
        batch_size: b >= 1, examples per part.
        curvature: `v -> H v` for the tree of one part, the same H on all devices.
        exact: the parts are all that there are, such as every example of a data set,
            and nothing is estimated.
        axis_name: the axis that the parts are split over; None where they are whole.

    Returns:
        `(noise / signal, aux)` as for `noise_scale`, the same on all devices.

    Raises:
        ValueError: `batch_size` < 1, there is no such axis, or fewer than two parts.

    >>> g = jnp.array([[3.0, 0.0], [1.0, 2.0]])
    >>> b, aux = shard_noise_scale(g, batch_size=4)
    >>> float(aux["signal"]), float(aux["noise"]), float(b)
    (3.0, 16.0, 5.3333)
    """
    check_range("batch_size", batch_size, low=1)
    parts = jax.tree.leaves(gradients)[0].shape[0] * axis_size(axis_name)
    if parts < 2:
        raise ValueError("argument 'gradients' has one part, expected at least two.")
    scale = psum(_largest(gradients), axis_name)
    scaled = _over(gradients, scale)
    mean = jax.tree.map(lambda g: psum(jnp.sum(g, 0), axis_name) / parts, scaled)
    deviations = jax.tree.map(lambda g, m: g - m[None], scaled, mean)
    squares = jax.vmap(lambda d: _square(d, curvature))(deviations)
    count = parts if exact else parts - 1
    noise = batch_size * psum(jnp.sum(squares), axis_name) / count
    signal = _square(mean, curvature)
    if not exact:
        signal -= noise / (batch_size * parts)
    return _ratio(signal, noise, scale)


@typed
def optimal_learning_rate(
    noise_scale: Float[ArrayLike, "*shape"], *, batch_size: int, lr_max: float
) -> Float[Array, "*shape"]:
    """The learning rate of SGD that is best for a batch size.

    lr(B) = lr_max / (1 + B_noise / B)

    Args:
        noise_scale: B_noise, or B_simple in its place; below 0 it counts as 0.
        batch_size: B >= 1.
        lr_max: the best learning rate of very large batches, >= 0.

    Returns:
        The learning rates, float32. The loss falls by the same factor: lr / lr_max is
        the share of the largest possible progress of a step.

    Raises:
        ValueError: an argument is out of range.

    >>> optimal_learning_rate(jnp.array([0.0, 64.0]), batch_size=64, lr_max=0.1)
    Array([0.1 , 0.05], dtype=float32)
    """
    check_range("batch_size", batch_size, low=1)
    check_range("lr_max", lr_max, low=0.0)
    return lr_max / (1.0 + jnp.maximum(as_float32(noise_scale), 0.0) / batch_size)


@typed
def adaptive_batch_size(
    noise_scale: Float[ArrayLike, "*shape"], *, exchange_rate: float
) -> Float[Array, "*shape"]:
    """The batch size that spends steps and examples at a fixed rate of exchange.

    B = sqrt(r B_noise), the minimum of (B_noise + B) + r (1 + B_noise / B): what a
    unit of progress costs in examples, and r times what it costs in steps.

    Args:
        noise_scale: B_noise as it is now, as for `optimal_learning_rate`.
        exchange_rate: r >= 0, the examples that one step less may cost. With r equal to
            B_noise this is B_noise itself, which needs twice the fewest steps.

    Returns:
        The batch sizes, float32 and not rounded.

    Raises:
        ValueError: `exchange_rate` is out of range.

    >>> adaptive_batch_size(jnp.array([16.0, 64.0]), exchange_rate=64.0).tolist()
    [32.0, 64.0]
    """
    check_range("exchange_rate", exchange_rate, low=0.0)
    scale = as_float32(noise_scale)
    noisy = scale > 0.0  # the slope of a square root at 0 is infinite
    root = jnp.where(noisy, jnp.sqrt(jnp.where(noisy, scale, 1.0)), 0.0)
    return jnp.sqrt(jnp.asarray(exchange_rate, scale.dtype)) * root


@typed
def pareto_fit(
    steps: Float[ArrayLike, " runs"], examples: Float[ArrayLike, " runs"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The critical batch size, from runs of several batch sizes to one loss.

    (S / S_min - 1) (E / E_min - 1) = 1,    B_crit = E_min / S_min

    That is S_min / S + E_min / E = 1, which is linear in the two unknowns: they are
    fitted by least squares, and every run's relative error weighs the same.

    Args:
        steps: S of each run, positive, at least two different ones.
        examples: E of each run, batch size times steps.

    Returns:
        `(B_crit, aux)`; aux holds "min_steps", "min_examples" and "r2": the share of
        the variance of log S that S_min + E_min / B explains, B = E / S.

    >>> batch = jnp.array([10.0, 100.0, 1000.0])
    >>> steps = 50.0 * (1.0 + 40.0 / batch)
    >>> b_crit, aux = pareto_fit(steps, batch * steps)
    >>> float(b_crit), float(aux["min_steps"]), float(aux["r2"])
    (40.0, 50.0, 1.0)
    """
    (s, s_scale), (e, e_scale) = _normalised(steps), _normalised(examples)
    known = (s > 0.0) & (e > 0.0)
    s, e = jnp.where(known, s, 1.0), jnp.where(known, e, 1.0)
    x, y = jnp.where(known, 1.0 / s, 0.0), jnp.where(known, 1.0 / e, 0.0)
    xx, xy, yy = jnp.sum(x * x), jnp.sum(x * y), jnp.sum(y * y)
    determinant = xx * yy - xy * xy
    solvable = determinant > 0.0
    determinant = jnp.where(solvable, determinant, 1.0)
    min_s = (yy * jnp.sum(x) - xy * jnp.sum(y)) / determinant
    min_e = (xx * jnp.sum(y) - xy * jnp.sum(x)) / determinant
    predicted = jnp.log(jnp.maximum(min_s + min_e * s / e, 1e-30))
    logs = jnp.log(s)
    spread = jnp.sum(jnp.square(logs - jnp.mean(logs)))
    missed = jnp.sum(jnp.square(logs - predicted))
    steepness = jnp.where(solvable & (min_s != 0.0), min_s, 1.0)
    r2 = 1.0 - missed / jnp.where(spread > 0.0, spread, 1.0)
    aux = {"min_steps": min_s * s_scale, "min_examples": min_e * e_scale, "r2": r2}
    return min_e / steepness * (e_scale / s_scale), aux


def _largest(tree: Any) -> Array:
    """The largest entry: squares of what it divides do neither overflow nor vanish."""
    largest = [jnp.max(jnp.abs(as_float32(x))) for x in jax.tree.leaves(tree)]
    return jax.lax.stop_gradient(jnp.max(jnp.stack(largest)))


def _over(tree: Any, scale: Array) -> Any:
    divisor = jnp.where(scale > 0.0, scale, 1.0)
    return jax.tree.map(lambda x: as_float32(x) / divisor, tree)


def _square(v: Any, curvature: Product | None) -> Array:
    """v^T H v"""
    product = v if curvature is None else curvature(v)
    terms = jax.tree.map(lambda a, b: jnp.sum(a * b), v, product)
    return jnp.sum(jnp.stack(jax.tree.leaves(terms)))


def _ratio(signal: Array, noise: Array, scale: Array) -> tuple[Array, dict[str, Array]]:
    positive = signal > 0.0
    ratio = jnp.where(positive, noise / jnp.where(positive, signal, 1.0), jnp.inf)
    return ratio, {"signal": signal * scale**2, "noise": noise * scale**2}


def _normalised(x: ArrayLike) -> tuple[Array, Array]:
    scale = _largest(x)
    return _over(x, scale), jnp.where(scale > 0.0, scale, 1.0)


def _example_stack(key: Array) -> Array:
    return 1.0 + 0.3 * jax.random.normal(key, (8, 16))


def _example_runs(key: Array) -> tuple[Array, Array]:
    batch = 4.0 * 2.0 ** jnp.arange(8.0)
    steps = (50.0 + 2000.0 / batch) * jnp.exp(0.1 * jax.random.normal(key, (8,)))
    return steps, batch * steps


def _example_product(v: Array) -> Array:
    return v * jnp.linspace(0.5, 2.0, 16, dtype=v.dtype)


EXAMPLES = {
    noise_scale: lambda key: (
        (_example_stack(key)[0], jnp.mean(_example_stack(key), axis=0)),
        {"batch_small": 2, "batch_big": 16, "curvature": _example_product},
    ),
    shard_noise_scale: lambda key: (
        (_example_stack(key),), {"batch_size": 4, "curvature": _example_product}
    ),
    optimal_learning_rate: lambda key: (
        (50.0 * jax.random.uniform(key, (8,)),), {"batch_size": 32, "lr_max": 0.5}
    ),
    adaptive_batch_size: lambda key: (
        (1.0 + 50.0 * jax.random.uniform(key, (8,)),), {"exchange_rate": 32.0}
    ),
    pareto_fit: lambda key: (_example_runs(key), {}),
}  # fmt: skip
