"""diffGrad: Adam with a friction where the gradient hardly changes.

    m, v     moments of the gradient as in Adam, bias corrected
    xi_t     = 1 / (1 + exp(-|g_{t-1} - g_t|))              in [1/2, 1), per coordinate
    u_t      = xi_t mhat / (sqrt(vhat) + eps)

Where the gradient stays as it is, as near a minimum, the step is half of Adam's; where
it changes much, the step is Adam's.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
    "slug": "diffgrad",
    "title": "diffGrad: An Optimization Method for Convolutional Neural Networks",
    "arxiv": "1909.11015",
    "year": 2020,
    "authors": "Shiv Ram Dubey, Soumendu Chakraborty, Swalpa Kumar Roy, Snehasis "
    "Mukherjee, Satish Kumar Singh, Bidyut Baran Chaudhuri",
    "where": "Section II (the friction and the step); the three functions of the "
    "analysis are in the experiment.",
    "differs": "The code that the published figures came from kept a reference to the "
    "gradient in place of a copy, so that its friction was 1/2 throughout: half"
    " of Adam's step. This is the paper's equation, as in the authors' later "
    "diffGrad_v2. eps stands beside sqrt(vhat), as in the paper; the code adds "
    "it to sqrt(v), before the correction. Weight decay is decoupled, theirs is"
    " a term of the gradient. The notebook's derivative of sin(8 x) in the "
    "second function lacks the factor 8; here the functions are differentiated."
    " Measured from -1: diffGrad finds the lower minimum of the first two "
    "functions, Adam passes over it (0 against 0.05, 0.0001 against 0.85); on "
    "the third, whose minimum is a wedge, both swing about it (0.0069 against "
    "0.0020). On digits accuracy is 91.4% against 90.9%: a small MLP on 8x8 "
    "images, not the paper's ResNet on CIFAR.",
}

__all__ = ["DiffGradState", "diffgrad", "scale_by_diffgrad"]

Friction = Literal["absolute", "signed", "unclipped"]


class DiffGradState(NamedTuple):
    """State of `scale_by_diffgrad`.

    Attributes:
        previous: the gradients of the step before, float32; 0 before the first.
        adam: Optax's state of Adam.
    """

    previous: Any
    adam: Any


@typed
def scale_by_diffgrad(
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    friction: Friction = "absolute",
) -> optax.GradientTransformation:
    """Adam's direction, times the friction coefficient of each coordinate.

    Args:
        b1: of the first moment, in [0, 1).
        b2: of the second moment, in [0, 1).
        eps: >= 0, beside the square root.
        friction: what becomes of d = g_{t-1} - g_t: "absolute" is the paper's
            sigmoid(|d|). For ablation: "signed" is sigmoid(d), which also brakes what
            grows; "unclipped" is |d| itself, without bounds.

    Returns:
        A transformation that keeps the gradient of the step before.

    Raises:
        ValueError: a number is out of range, or there is no such friction.

    >>> direction, g = scale_by_diffgrad(), jnp.array([2.0, -0.1])
    >>> state = direction.init(g)
    >>> first, state = direction.update(g, state)
    >>> first.tolist(), direction.update(g, state)[0].tolist()
    ([0.8808, -0.52498], [0.5, -0.5])
    """
    check_range("b1", b1, low=0.0, below=1.0)
    check_range("b2", b2, low=0.0, below=1.0)
    check_range("eps", eps, low=0.0)
    rates: Any = {"b1": b1, "b2": b2, "eps": eps}
    adam = optax.scale_by_adam(**rates)

    def init(params: Any) -> DiffGradState:
        zeros = float32_zeros(params)
        return DiffGradState(zeros, adam.init(zeros))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        now = in_float32(updates)
        steps, adam_state = adam.update(now, state.adam, params)

        def slowed(step: jax.Array, old: jax.Array, g: jax.Array) -> jax.Array:
            return step * _coefficient(old - g, friction)

        direction = jax.tree.map(slowed, steps, state.previous, now)
        return like(direction, updates), DiffGradState(now, adam_state)

    return optax.GradientTransformation(init, update)


@typed
def diffgrad(
    learning_rate: Rate,
    *,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    friction: Friction = "absolute",
    weight_decay: Number = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """diffGrad, with decoupled weight decay where it is asked for.

    Args:
        learning_rate: >= 0, or a schedule of the step; 1e-3 is the authors' default.
        b1: as for `scale_by_diffgrad`.
        b2: as for `scale_by_diffgrad`.
        eps: as for `scale_by_diffgrad`.
        friction: as for `scale_by_diffgrad`.
        weight_decay: >= 0.
        mask: the parameters that decay, as in `optax.add_decayed_weights`.

    Returns:
        An Optax optimizer.

    Raises:
        ValueError: a number is out of range, or there is no such friction.

    >>> optimizer, g = diffgrad(0.1), jnp.array([0.0, 100.0])
    >>> optimizer.update(g, optimizer.init(g))[0].tolist()
    [0.0, -0.1]
    """
    direction = scale_by_diffgrad(b1=b1, b2=b2, eps=eps, friction=friction)
    return descend(direction, learning_rate, weight_decay=weight_decay, mask=mask)


def _coefficient(difference: jax.Array, friction: Friction) -> jax.Array:
    if friction == "signed":
        return jax.nn.sigmoid(difference)
    if friction == "unclipped":
        return jnp.abs(difference)
    return jax.nn.sigmoid(jnp.abs(difference))


EXAMPLES = {
    scale_by_diffgrad: lambda key: ((), {}),
    diffgrad: lambda key: ((0.01,), {}),
}
