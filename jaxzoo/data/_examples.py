"""What augmentations share: a key for each example, a chance, and means of pixels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxzoo.core.typed import ArrayLike, as_float32, check_range

Pair = tuple[float | int, float | int]


def per_example(
    change: Callable[[Array, Array], Array],
    key: Array,
    images: ArrayLike,
    ids: ArrayLike | None,
) -> Array:
    """`change(key, image)` in float32 for each example, with a key of its own."""
    ids = jnp.arange(images.shape[0]) if ids is None else jnp.asarray(ids)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids)
    return jax.vmap(change)(keys, as_float32(images)).astype(images.dtype)


def sometimes(change: Callable[[Array, Array], Array], probability: float):
    check_range("probability", probability, low=0, high=1)

    def maybe(key: Array, image: Array) -> Array:
        choice_key, change_key = jax.random.split(key)
        # A uniform draw is below 1, so that a probability of 1 is certain.
        chosen = jax.random.uniform(choice_key) < probability
        return jnp.where(chosen, change(change_key, image), image)

    return maybe


def weighted(image: Array, index: Array, weights: Array, axis: int) -> Array:
    """Weighted means of pixels; `index` and `weights` are `[new size, terms]`.

    The terms are added one by one: a matrix product would add them in an order that
    depends on how many examples a device has.
    """
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)

    def term(index: Array, weight: Array) -> Array:
        part = jnp.take(image, index, axis=axis)
        weight = jnp.expand_dims(weight, (1 - axis, 2))
        return jnp.broadcast_to(weight, part.shape) * part

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + term(*pair), None

    first, rest = (index[:, 0], weights[:, 0]), (index.T[1:], weights.T[1:])
    return jax.lax.scan(add, term(*first), rest)[0]


def check_pair(
    name: str, pair: Pair, *, low: float, high: float = float("inf")
) -> None:
    for value in pair:
        check_range(name, value, low=low, high=high)
    if pair[0] > pair[1]:
        raise ValueError(
            f"argument '{name}' is {pair}, expected the smaller number first."
        )
