"""STEP: N:M masks learned from scratch under Adam, with the variance learned first.

    phase 1   dense Adam:  m, v, u = mhat / (sqrt(vhat) + eps)
    switch    once the mean of |v_t - v_{t-1}|_1 / d over a window is below eps, not
              before `earliest` and not after `latest`
    phase 2   the gradient at w * mask moves all of w (straight through); v stays as it
              is: u = mhat / (sqrt(vhat at the switch) + eps)

Gradients at masked weights are noisy and never settle, and their squares spoil what
Adam divides by. STEP learns the divisor while the weights are still dense.

    switched = state.switched_at > 0
    def sparse_loss(params):          # `straight_through` for each kernel
        return loss(jax.tree.map(lambda w: straight_through(w, switched), params))
    grads = jax.grad(sparse_loss)(params)
    updates, state = optimizer.update(grads, state, params)

SR-STE, the baseline, is `sr_ste_gradient` before any optimizer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxzoo.core.transform import (
    Mask,
    Number,
    Rate,
    descend,
    float32_zeros,
    in_float32,
    like,
)
from jaxzoo.core.typed import ArrayLike, as_float32, check_axis, check_range, typed

PAPER = {
    "slug": "step_nm",
    "title": "STEP: Learning N:M Structured Sparsity Masks from Scratch with "
    "Precondition",
    "arxiv": "2302.01172",
    "year": 2023,
    "authors": "Yucheng Lu, Shivani Agrawal, Suvinay Subramanian, Oleg Rybakov, "
    "Christopher De Sa, Amir Yazdanbakhsh",
    "where": "STEP and its AutoSwitch with the arithmetic mean; SR-STE, the baseline.",
    "differs": "No released code was found. The divisor is sqrt(vhat) + eps with vhat "
    "corrected for its age at the switch, so that an early switch does not "
    "enlarge the step; of the automatic switch the arithmetic mean is here, "
    "not the geometric one, and its window is an argument, not 1 / (1 - b2). "
    "Measured on digits with 1:8 masks in all layers of an MLP, 5 seeds, the "
    "switch at half of 800 steps: the claim fails. STEP's masked test loss is"
    " 0.418 +- 0.025 nats, SR-STE's under Adam 0.409 +- 0.004, each at the "
    "best of nine settings; accuracies are 88.5% and 88.2%, and dense Adam "
    "masked at the end has 1.91. With eps = 1e-8 STEP fails altogether (1.7 "
    "to 2.3 nats, SR-STE 0.41): the dense network has learned the training "
    "set by then, its second moment is close to 0, and masked gradients "
    "divided by it are enormous; eps = 1e-2 mends that. There the threshold "
    "eps of the automatic switch is passed at once, and at 1e-8 never within "
    "400 steps, so the experiment fixes the step.",
}

__all__ = [
    "StepState", "nm_mask", "scale_by_step_nm", "sr_ste_gradient", "step_nm",
    "straight_through",
]  # fmt: skip


class StepState(NamedTuple):
    """State of `scale_by_step_nm`.

    Attributes:
        count: steps taken, int32.
        switched_at: the last step of phase 1, int32; 0 while it lasts.
        mu: first moments.
        nu: second moments, fixed after the switch.
        changes: mean absolute changes of nu in the last steps, `[window]`.
    """

    count: Any
    switched_at: Any
    mu: Any
    nu: Any
    changes: Any


@typed
def nm_mask(
    w: Float[ArrayLike, "*shape"], *, n: int = 2, m: int = 4, axis: int = 0
) -> Bool[Array, "*shape"]:
    """True for the n largest |w| of each group of m neighbours along an axis.

    Args:
        w: weights; in a Flax kernel `[in, out]` axis 0 is that of the sum.
        n: how many stay; of equal ones the first.
        m: size of a group, a divisor of the axis.
        axis: along which the groups lie.

    Returns:
        The mask, exactly n True in each group.

    Raises:
        ValueError: n is not between 1 and m, m does not divide the axis, or there is no
            such axis.

    >>> nm_mask(jnp.array([0.1, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, -1.0])).tolist()
    [False, True, True, False, True, True, False, False]
    """
    axis = check_axis("axis", axis, w.ndim)
    check_range("m", m, low=1)
    check_range("n", n, low=1, high=m)
    if w.shape[axis] % m:
        raise ValueError(
            f"argument 'm' is {m}, expected a divisor of {w.shape[axis]}, the size of "
            f"axis {axis}."
        )
    size = jnp.moveaxis(jnp.abs(as_float32(w)), axis, -1)
    groups = size.reshape(*size.shape[:-1], -1, m)
    rank = jnp.argsort(jnp.argsort(-groups, stable=True), stable=True)
    return jnp.moveaxis((rank < n).reshape(size.shape), -1, axis)


@typed
def straight_through(
    w: Float[ArrayLike, "*shape"], is_sparse: Bool[ArrayLike, ""] | bool = True, *,
    n: int = 2, m: int = 4, axis: int = 0,
) -> Float[Array, "*shape"]:  # fmt: skip
    """The masked weights, with the gradient that the masked weights have.

    Gradient: straight through, that of the identity, also for masked weights.

    Args:
        w: weights.
        is_sparse: False gives the weights as they are, as in phase 1.
        n: as for `nm_mask`, like `m` and `axis`.
        m: size of a group.
        axis: along which the groups lie.

    Returns:
        w * mask, float32.

    Raises:
        ValueError: as for `nm_mask`.

    >>> w = jnp.array([0.1, -3.0, 2.0, 0.5])
    >>> straight_through(w, n=1).tolist()
    [0.0, -3.0, 0.0, 0.0]
    >>> jax.grad(lambda w: (straight_through(w, n=1) ** 2).sum())(w).tolist()
    [0.0, -6.0, 0.0, 0.0]
    """
    keep = nm_mask(w, n=n, m=m, axis=axis) | ~jnp.asarray(is_sparse)
    w = as_float32(w)
    return w - lax.stop_gradient(jnp.where(keep, 0.0, w))


@typed
def sr_ste_gradient(
    gradient: Float[ArrayLike, "*shape"], w: Float[ArrayLike, "*shape"], *,
    n: int = 2, m: int = 4, lam: float = 2e-4, axis: int = 0,
) -> Float[Array, "*shape"]:  # fmt: skip
    """SR-STE: the straight-through gradient, and a decay of the weights masked out.

    gradient + lam (1 - mask) w

    Args:
        gradient: of the loss at the masked weights.
        w: the dense weights.
        n: how many of a group stay.
        m: size of a group.
        lam: strength of the decay, >= 0.
        axis: along which the groups lie.

    Returns:
        The gradient for the optimizer, float32.

    Raises:
        ValueError: as for `nm_mask`, or `lam` is out of range.

    >>> w = jnp.array([0.1, -3.0, 2.0, 0.5])
    >>> sr_ste_gradient(jnp.ones(4), w, n=1, lam=0.1).tolist()
    [1.01, 1.0, 1.2, 1.05]
    """
    check_range("lam", lam, low=0.0)
    keep = nm_mask(w, n=n, m=m, axis=axis)
    return as_float32(gradient) + jnp.where(keep, 0.0, lam * as_float32(w))


@typed
def scale_by_step_nm(
    *, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8,
    window: int = 1000, earliest: int = 1, latest: int = 10_000,
) -> optax.GradientTransformation:  # fmt: skip
    """Adam's direction, whose second moment is fixed once it has settled.

    Args:
        b1: of the first moment, in [0, 1).
        b2: of the second moment, in [0, 1).
        eps: beside the square root, and what the mean change of v has to fall below;
            >= 0.
        window: of that mean, in steps; the authors take 1 / (1 - b2).
        earliest: of phase 1, at least; they take a tenth of the training.
        latest: of phase 1, at most; they take half of it.

    Returns:
        A transformation; `state.switched_at > 0` says that the forward pass is to be
        sparse.

    Raises:
        ValueError: a number is out of range.

    >>> direction, g = scale_by_step_nm(latest=2), jnp.array([1.0])
    >>> state = direction.init(g)
    >>> for scale in (1.0, 1.0, 100.0):
    ...     updates, state = direction.update(scale * g, state)
    >>> int(state.switched_at), updates.tolist()  # v is still that of 1
    (2, [37.5])
    """
    check_range("b1", b1, low=0.0, below=1.0)
    check_range("b2", b2, low=0.0, below=1.0)
    check_range("eps", eps, low=0.0)
    check_range("window", window, low=1)
    check_range("earliest", earliest, low=1)
    check_range("latest", latest, low=earliest)
    rates: Any = (b1, b2, eps)
    first, second, small = rates

    def init(params: Any) -> StepState:
        mu, nu = float32_zeros(params), float32_zeros(params)
        count, switched_at = jnp.int32(0), jnp.zeros((), jnp.int32)
        return StepState(count, switched_at, mu, nu, jnp.zeros(window, jnp.float32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        grads, count = in_float32(updates), state.count + 1
        is_fixed = state.switched_at > 0
        mu = optax.tree.update_moment(grads, state.mu, first, 1)
        moved = optax.tree.update_moment(grads, state.nu, second, 2)
        nu = jax.tree.map(lambda a, b: jnp.where(is_fixed, a, b), state.nu, moved)
        change = _mean_change(nu, state.nu)
        changes = state.changes.at[state.count % window].set(change)
        mean = jnp.sum(changes) / jnp.minimum(count, window)
        has_settled = (mean < small) & (count >= earliest)
        switches = ~is_fixed & (has_settled | (count >= latest))
        switched_at = jnp.where(switches, count, state.switched_at)
        mu_hat = optax.tree.bias_correction(mu, first, count)
        age = jnp.where(is_fixed, state.switched_at, count)
        nu_hat = optax.tree.bias_correction(nu, second, age)
        direction = jax.tree.map(lambda a, b: a / (jnp.sqrt(b) + small), mu_hat, nu_hat)
        new = StepState(count, switched_at, mu, nu, changes)
        return like(direction, updates), new

    return optax.GradientTransformation(init, update)


@typed
def step_nm(
    learning_rate: Rate,
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    window: int = 1000,
    earliest: int = 1,
    latest: int = 10_000,
    weight_decay: Number = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """STEP's optimizer: Adam, then Adam with a fixed second moment.

    Args:
        learning_rate: >= 0, or a schedule of the step.
        b1: as for `scale_by_step_nm`, like all that follows up to `latest`.
        b2: of the second moment.
        eps: beside the square root, and the threshold of the switch.
        window: of the mean change of the second moment, in steps.
        earliest: of phase 1, at least.
        latest: of phase 1, at most.
        weight_decay: decoupled, >= 0.
        mask: the parameters that decay, as in `optax.add_decayed_weights`.

    Returns:
        An Optax optimizer; the first of its states is a `StepState`.

    Raises:
        ValueError: a number is out of range.

    >>> optimizer, g = step_nm(0.1), jnp.array([2.0])
    >>> updates, state = optimizer.update(g, optimizer.init(g))
    >>> updates.tolist(), int(state[0].switched_at)
    ([-0.1], 0)
    """
    direction = scale_by_step_nm(
        b1=b1, b2=b2, eps=eps, window=window, earliest=earliest, latest=latest
    )
    return descend(direction, learning_rate, weight_decay=weight_decay, mask=mask)


def _mean_change(new: Any, old: Any) -> Array:
    total = sum(
        jnp.sum(jnp.abs(a - b)).astype(jnp.float32)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    )
    return jnp.asarray(total) / max(1, sum(x.size for x in jax.tree.leaves(new)))


EXAMPLES = {
    nm_mask: lambda key: ((jax.random.normal(key, (8, 4)),), {}),
    straight_through: lambda key: ((jax.random.normal(key, (8, 4)),), {"m": 8}),
    sr_ste_gradient: lambda key: (
        tuple(jax.random.normal(key, (2, 8, 4))),
        {"lam": 0.1},
    ),
    scale_by_step_nm: lambda key: ((), {}),
    step_nm: lambda key: ((0.01,), {}),
}
