"""What optimizers written as Optax transformations share: dtypes, ranges, the step.

    direction = scale_by_lion(b1=0.9, b2=0.99)               # a GradientTransformation
    optimizer = descend(direction, learning_rate, weight_decay=0.1)

State is float32 whatever the parameters are, and updates come back in the dtype of the
gradients, so that `optax.apply_if_finite` and `optax.MultiSteps`, whose branches have
to agree, take every optimizer of the library.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxzoo.core.typed import as_float32, check_range

__all__ = ["Mask", "Number", "Rate", "descend", "float32_zeros", "in_float32", "like"]

Number = float | int | jax.Array | np.ndarray | np.generic
Rate = Number | Callable[[Any], Any]  # a number, or a schedule: step -> number
Mask = Any  # None, a tree of bools over the parameters, or a function that makes one
Tree = TypeVar("Tree")


def descend(
    direction: optax.GradientTransformation,
    learning_rate: Rate,
    *,
    weight_decay: Number = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """`direction`, decoupled weight decay, then minus the learning rate.

    u = -learning_rate (direction(g) + weight_decay p)

    Args:
        direction: what comes before the learning rate.
        learning_rate: >= 0, or a schedule of the step.
        weight_decay: >= 0; a plain 0 asks for no parameters in `update`.
        mask: the parameters that decay, as in `optax.add_decayed_weights`.

    Raises:
        ValueError: a number is out of range.

    >>> optimizer = descend(optax.identity(), 0.5, weight_decay=0.1)
    >>> p = jnp.array([10.0])
    >>> optimizer.update(jnp.array([1.0]), optimizer.init(p), p)[0].tolist()
    [-1.0]
    """
    if not callable(learning_rate):
        check_range("learning_rate", learning_rate, low=0.0)
    check_range("weight_decay", weight_decay, low=0.0)
    parts = [direction]
    if not (isinstance(weight_decay, float | int) and weight_decay == 0):
        decay: Any = weight_decay
        parts.append(optax.add_decayed_weights(decay, mask))
    rate: Any = learning_rate
    return _extra(optax.chain(*parts, optax.scale_by_learning_rate(rate)))


def float32_zeros(tree: Tree) -> Tree:
    """Zeros of the shapes of a tree in float32 (float64 where the tree is).

    >>> float32_zeros({"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype
    dtype('float32')
    """
    return jax.tree.map(lambda x: jnp.zeros_like(as_float32(x)), tree)


def in_float32(tree: Tree) -> Tree:
    """The arrays of a tree in float32 (float64 where they came so)."""
    return jax.tree.map(as_float32, tree)


def like(tree: Tree, reference: Any) -> Tree:
    """The arrays of a tree in the dtypes of another one: of the gradients."""
    return jax.tree.map(lambda x, r: x.astype(r.dtype), tree, reference)


def _extra(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(transformation)
