"""Schedule refinement: the next run's learning rates from this run's gradient norms.

For a convex loss the best weighting of the iterates, and the schedule whose last
iterate is as good as that weighted average, are

    w_t   ~ 1 / |g_t|^2            SGD
    w_t   ~ 1 / |g_t|_1            Adam and its kin
    eta_t = w_t sum_{p > t} w_p    divided by its largest value

Norms that stay constant give the linear decay 1 - t/T. Norms that fall, or grow towards
the end, give warm-up and another shape of decay. Two runs:

    run 1:  optax.sgd(optax.linear_schedule(lr, 0.0, T)), log |g_t|
    eta, _ = refine_schedule(norms)
    run 2:  optax.sgd(lambda t: lr * eta[t])
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "schedule_refinement",
    "title": "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement",
    "arxiv": "2310.07831",
    "year": 2023,
    "authors": "Aaron Defazio, Ashok Cutkosky, Harsh Mehta, Konstantin Mishchenko",
    "where": "Algorithm 1 and its variant for Adam (refinement from logged norms), the "
    "bound on the last iterate and its best weights.",
    "differs": "Schedules are divided by their largest value, as in the paper; the "
    "released code divides by the sum of the weights. Norms below 1e-9 of the largest "
    "count as that, and schedules stretch to other lengths. The known schedules are "
    "Optax's. Of five logistic problems of scikit-learn linear decay is best against a "
    "constant rate and 1/sqrt(t) on four: wine is separable, and every schedule that "
    "stays high long drives its loss below 1e-5. The refined schedule beat linear "
    "decay there alone: where SGD fits single batches, as on digits, norms fall so far "
    "that the early steps are left without a learning rate (0.078 against 0.006).",
}

__all__ = ["last_iterate_bound", "refine_schedule"]


@typed
def refine_schedule(
    grad_norms: Float[ArrayLike, " logged"],
    *,
    kind: Literal["sgd", "adam"] = "sgd",
    tau: float = 0.1,
    steps: int | None = None,
) -> tuple[Float[Array, " steps"], dict[str, Array]]:
    """The learning rate schedule that a run's gradient norms ask for.

    eta_t = w_t sum_{p > t} w_p / max,   w = 1 / median(norms)^2, or ^1 for Adam

    Args:
        grad_norms: of the gradients of a finished run, one per step, or per so many
            steps, `[T]` with T >= 2: |g_t|_2 for SGD, |g_t|_1 for Adam. What is below
            1e-9 of the largest counts as that.
        kind: how the norms become weights.
        tau: width of the median filter as a share of T, in [0, 1]; 0 filters nothing.
            It repeats the first norm to the left, and reflects the norms at the end,
            where they often rise.
        steps: length of the schedule, which is stretched to it; None: T.

    Returns:
        `(schedule, aux)`: float32 `[steps]`, at most 1 and 0 at the last step: times a
        learning rate, index it by the step. aux holds "weights" `[T]`, in the scale
        that makes `last_iterate_bound` least at distance 1, and "smoothed" `[T]`, the
        filtered norms. Equals the released code's closed form, over its maximum.

    Raises:
        ValueError: an argument is out of range, or there is a single norm.

    >>> refine_schedule(jnp.ones(5))[0].tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> refine_schedule(jnp.array([4.0, 1.0, 1.0, 1.0, 2.0]), tau=0.0)[0].tolist()
    [0.0903, 1.0, 0.556, 0.111, 0.0]
    """
    check_range("tau", tau, low=0.0, high=1.0)
    count = grad_norms.shape[0]
    if count < 2:
        raise ValueError("argument 'grad_norms' has one norm, expected at least two.")
    length = count if steps is None else steps
    check_range("steps", length, low=1)
    norms = as_float32(grad_norms)
    largest = jax.lax.stop_gradient(jnp.max(norms))
    scale = jnp.where(largest > 0.0, largest, 1.0)
    smooth = jnp.maximum(_median_filter(norms / scale, tau), 1e-9)
    # Relative to the least norm, so that no power of a weight overflows.
    least = jax.lax.stop_gradient(jnp.min(smooth))
    weights = (least / smooth) ** (2 if kind == "sgd" else 1)
    later = jnp.cumsum(weights[:0:-1])[::-1]
    rates = weights * jnp.append(later, 0.0)
    schedule = rates / jnp.max(rates)
    if length != count:
        places = jnp.linspace(0.0, count - 1.0, length, dtype=schedule.dtype)
        schedule = jnp.interp(places, jnp.arange(count, dtype=places.dtype), schedule)
    unit = jnp.sqrt(jnp.sum(jnp.square(weights * smooth)))
    aux = {"weights": weights / unit / scale, "smoothed": smooth * scale}
    return schedule, aux


@typed
def last_iterate_bound(
    weights: Float[ArrayLike, " steps"],
    grad_norms: Float[ArrayLike, " steps"],
    *,
    distance: float = 1.0,
) -> Float[Array, ""]:
    """What the last iterate of the schedule of some weights is from the least loss.

    (D^2 + sum_t w_t^2 |g_t|^2) / (2 sum_t w_t)

    holds for f(x_T) - f(x*) of a convex f, if SGD takes steps of eta_t = w_t sum_{p>t}
    w_p / sum_p w_p. It is least, D / sqrt(sum_t |g_t|^-2), at

    w_t = D |g_t|^-2 / sqrt(sum_p |g_p|^-2)

    Args:
        weights: w_t >= 0, `[T]`.
        grad_norms: |g_t|_2, `[T]`.
        distance: D >= 0, of the first iterate from the minimum.

    Returns:
        The bound, float32, in units of the loss; infinite where the weights sum to less
        than 1e-15, or float32 overflows.

    Raises:
        ValueError: `distance` is out of range.

    >>> norms = jnp.array([1.0, 2.0])
    >>> w = refine_schedule(norms, tau=0.0)[1]["weights"]
    >>> float(last_iterate_bound(w, norms)), float(last_iterate_bound(w * 2, norms))
    (0.8944, 1.118)
    """
    check_range("distance", distance, low=0.0)
    w, g = as_float32(weights), as_float32(grad_norms)
    total, steepest = jnp.sum(w), jnp.max(jnp.abs(w)) * jnp.max(jnp.abs(g))
    # Squares outside of these limits are not float32 numbers.
    usable = (total > 1e-15) & (steepest < 1e15)
    w, g = jnp.where(usable, w, 1.0), jnp.where(usable, g, 0.0)
    bound = (distance**2 + jnp.sum(jnp.square(w * g))) / (2.0 * jnp.sum(w))
    return jnp.where(usable, bound, jnp.inf)


def _median_filter(norms: Array, tau: float) -> Array:
    """Medians of windows of an odd width about each norm."""
    count = norms.shape[0]
    half = int(tau * count) // 2
    if half == 0:
        return norms
    padded = jnp.concatenate([jnp.full(half, norms[0]), norms])
    padded = jnp.pad(padded, (0, half), mode="reflect")
    windows = jnp.arange(count)[:, None] + jnp.arange(2 * half + 1)[None]
    return jnp.median(padded[windows], axis=1)


def _example_norms(key: Array) -> Array:
    return jnp.linspace(2.0, 1.0, 32) + 0.3 * jax.random.uniform(key, (32,))


EXAMPLES = {
    refine_schedule: lambda key: ((_example_norms(key),), {"tau": 0.2, "steps": 40}),
    last_iterate_bound: lambda key: (
        (jax.random.uniform(key, (32,)) + 0.1, _example_norms(key)),
        {"distance": 2.0},
    ),
}
