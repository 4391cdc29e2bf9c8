"""MARS: variance reduction by yesterday's gradient, in front of any adaptive step.

    c <- g(x_t; s_t) + gamma b1 / (1 - b1) (g(x_t; s_t) - g(x_{t-1}; s_t))
    c <- c / |c|                                          where |c| > 1
    m <- b1 m + (1 - b1) c

    adamw:    v <- b2 v + (1 - b2) c^2,  u = mhat / (sqrt(vhat) + eps)
    lion:     u = sign(m)
    shampoo:  u = U V^T,  m = U S V^T    for matrices; adamw for all else
    p <- p - learning_rate (u + weight_decay p)

With gamma = 1 the momentum is STORM's: it follows the true gradient without the lag of
an average, because what the step changed is added to what is remembered.

The approximate form, the default, takes the gradient of the step before for
g(x_{t-1}; s_t), and costs a buffer. The exact form is a second gradient, on today's
batch at the parameters of the step before:

    updates, state = optimizer.update(g, state, params, previous_updates=g_before)
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxzoo.core.transform import (
    Mask,
    Number,
    Rate,
    descend,
    float32_zeros,
    in_float32,
    like,
)
from jaxzoo.core.typed import check_range, typed

PAPER = {
    "slug": "mars",
    "title": "MARS: Unleashing the Power of Variance Reduction for Training Large "
    "Models",
    "arxiv": "2411.10438",
    "year": 2024,
    "authors": "Huizhuo Yuan, Yifeng Liu, Shuang Wu, Xun Zhou, Quanquan Gu",
    "where": "Algorithms 1 to 4: the correction with its clipping, MARS-AdamW, "
    "MARS-Lion and MARS-Shampoo, exact and approximate.",
    "differs": "With convention='authors' the clipping is the released code's, array "
    "by array, where the paper clips all parameters at once; the first correction "
    "is against a gradient of 0, where the paper begins with x_0 = x_1; and "
    "Newton-Schulz (here in float32, theirs in bfloat16) stands for the SVD. "
    "The code leaves vectors to an AdamW of its own by default, and its layout "
    "is [out, in]: here all arrays are corrected, and `optax.partition` gives "
    "vectors to another optimizer. AMSGrad is left out. The gradient before is "
    "kept in the exact form too. Measured: on the noisy quadratic the mean "
    "square error of the momentum is 0.90 of the average's with the start from "
    "m = 0, which both forget alike, and 0.57 after it; on digits MARS-AdamW is"
    " no better than AdamW (0.349 against 0.339 nats), MARS-Shampoo is (0.284);"
    " on Moby Dick after 100 steps 2.255 against 2.292 nats.",
}

__all__ = ["MarsState", "mars", "scale_by_mars"]

Variant = Literal["adamw", "lion", "shampoo"]
Convention = Literal["authors", "paper"]


class MarsState(NamedTuple):
    """State of `scale_by_mars`.

    Attributes:
        count: steps taken, int32.
        previous: the gradients of the step before, float32.
        inner: state of the transformation that the corrected gradient goes through.
    """

    count: Any
    previous: Any
    inner: Any


@typed
def scale_by_mars(
    *,
    b1: Number = 0.95,
    b2: Number = 0.99,
    eps: Number = 1e-8,
    gamma: Number = 0.025,
    max_norm: Number = 1.0,
    variant: Variant = "adamw",
    convention: Convention = "authors",
) -> optax.GradientTransformationExtraArgs:
    """The corrected gradient through Adam, the sign of its mean, or orthogonalised.

    Args:
        b1: of the momentum, in [0, 1); it scales the correction too.
        b2: of the second moment, in [0, 1).
        eps: >= 0, beside the square root.
        gamma: strength of the correction, >= 0; 1 is STORM, 0 none.
        max_norm: what c is clipped to, > 0; `float("inf")` for no clipping.
        variant: "adamw", "lion" or "shampoo".
        convention: "authors" is the released code: each array is clipped by its own
            norm, the gradient before the first is 0, and Newton-Schulz makes nearly
            orthogonal matrices, times sqrt(max(1, columns / rows)). "paper": one norm
            of all arrays, no correction at the first step, and exact U V^T.

    Returns:
        A transformation; `update` takes `previous_updates`, the gradients at the
        parameters of the step before, for the exact form.

    Raises:
        ValueError: a number is out of range, or there is no such variant.

    >>> g = jnp.array([0.3, -0.1])
    >>> direction = scale_by_mars(gamma=1.0, variant="lion")
    >>> state = direction.init(g)
    >>> updates, state = direction.update(g, state, previous_updates=jnp.zeros(2))
    >>> updates.tolist(), state.previous.tolist()
    ([1.0, -1.0], [0.3, -0.1])
    """
    check_range("b1", b1, low=0.0, below=1.0)
    check_range("b2", b2, low=0.0, below=1.0)
    check_range("eps", eps, low=0.0)
    check_range("gamma", gamma, low=0.0)
    check_range("max_norm", max_norm, above=0.0)
    inner = _inner(b1, b2, eps, variant, convention)
    rates: Any = (gamma, b1)
    weight = rates[0] * rates[1] / (1.0 - rates[1])

    def init(params: Any) -> MarsState:
        zeros = float32_zeros(params)
        return MarsState(jnp.zeros((), jnp.int32), zeros, inner.init(zeros))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        previous_updates: Any = None,
        **extra: Any,
    ) -> tuple[Any, MarsState]:
        del extra
        now = in_float32(updates)
        if previous_updates is not None:
            before = in_float32(previous_updates)
        elif convention == "paper":
            is_first = state.count == 0
            before = jax.tree.map(
                lambda g, old: jnp.where(is_first, g, old), now, state.previous
            )
        else:
            before = state.previous
        corrected = jax.tree.map(lambda g, old: g + weight * (g - old), now, before)
        corrected = _clipped(corrected, max_norm, convention)
        direction, inner_state = inner.update(corrected, state.inner, params)
        count = optax.safe_increment(state.count)
        return like(direction, updates), MarsState(count, now, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


@typed
def mars(
    learning_rate: Rate,
    *,
    b1: Number = 0.95,
    b2: Number = 0.99,
    eps: Number = 1e-8,
    gamma: Number = 0.025,
    variant: Variant = "adamw",
    convention: Convention = "authors",
    weight_decay: Number = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """MARS with decoupled weight decay, c clipped to norm 1.

    The authors' code leaves vectors to AdamW: `optax.partition` does that.

    Args:
        learning_rate: >= 0, or a schedule of the step; 3e-3 is the authors' default.
        b1: as for `scale_by_mars`, like all that follows up to `convention`.
        b2: of the second moment.
        eps: beside the square root.
        gamma: strength of the correction.
        variant: "adamw", "lion" or "shampoo".
        convention: "authors" or "paper".
        weight_decay: decoupled, >= 0.
        mask: the parameters that decay, as in `optax.add_decayed_weights`.

    Returns:
        An Optax optimizer; `update` takes `previous_updates` for the exact form.

    Raises:
        ValueError: a number is out of range, or there is no such variant.

    >>> optimizer = mars(0.01)
    >>> g = jnp.array([0.3, -0.1])
    >>> optimizer.update(g, optimizer.init(g))[0].tolist()
    [-0.01, 0.01]
    """
    direction = scale_by_mars(
        b1=b1, b2=b2, eps=eps, gamma=gamma, variant=variant, convention=convention
    )
    return descend(direction, learning_rate, weight_decay=weight_decay, mask=mask)


def _inner(
    b1: Any, b2: Any, eps: Any, variant: Variant, convention: Convention
) -> optax.GradientTransformation:
    """What the corrected gradient goes through: Optax's own pieces."""
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    if variant == "adamw":
        return adam
    mean = optax.ema(b1, debias=False)
    if variant == "lion":
        return optax.chain(mean, optax.scale_by_sign())
    if convention == "paper":
        whiten = optax.chain(mean, _each_matrix(_orthogonal))
    else:
        newton_schulz = contrib.scale_by_muon(
            beta=b1, eps=eps, nesterov=False, weight_dimension_numbers=_plain_matrices
        )
        whiten = optax.chain(newton_schulz, _each_matrix(_widened))
    parts: Any = {True: whiten, False: adam}
    return optax.partition(parts, lambda p: jax.tree.map(lambda x: x.ndim == 2, p))


def _clipped(tree: Any, max_norm: Any, convention: Convention) -> Any:
    """Each array by its own norm, or all by their common one."""
    whole = optax.tree.norm(tree) if convention == "paper" else None

    def clip(x: jax.Array) -> jax.Array:
        norm = optax.tree.norm(x) if whole is None else whole
        return x * jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))

    return jax.tree.map(clip, tree)


def _each_matrix(function: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(function, updates))


def _plain_matrices(tree: Any) -> Any:
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), tree)


def _widened(x: jax.Array) -> jax.Array:
    # Kernels are [in, out] here; the authors' are [out, in].
    return x * max(1.0, x.shape[1] / x.shape[0]) ** 0.5


def _orthogonal(x: jax.Array) -> jax.Array:
    u, _, v = jnp.linalg.svd(x, full_matrices=False)
    return jnp.matmul(u, v, precision=jax.lax.Precision.HIGHEST)


EXAMPLES = {
    scale_by_mars: lambda key: ((), {}),
    mars: lambda key: ((0.01,), {}),
}
