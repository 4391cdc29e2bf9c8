"""Features standardised by running statistics, such as those of a frozen teacher.

stats = FeatureStats.start(768)
target = stats.standardize(features)                        # by what came before
stats = stats.update(features, momentum=0.01)               # and only then by this
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxzoo.core.collectives import AxisName, axis_size, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range

__all__ = ["FeatureStats"]


class FeatureStats(NamedTuple):
    """Running mean and standard deviation of features, per dimension.

    Attributes:
        mean: per dimension, `[D]`.
        std: per dimension, `[D]`.

    >>> stats = FeatureStats.start(1).update(jnp.array([[1.0], [3.0]]), momentum=1.0)
    >>> stats.standardize(jnp.array([[2.0], [4.0]])).tolist()
    [[0.0], [1.4142]]
    """

    mean: Array
    std: Array

    @classmethod
    def start(cls, width: int) -> "FeatureStats":
        """Those that change nothing: mean 0, deviation 1."""
        return cls(jnp.zeros(width), jnp.ones(width))

    def standardize(self, features: Float[ArrayLike, "... d"]) -> Float[Array, "... d"]:
        """(features - mean) / (std + 1e-6), float32, without a gradient."""
        x = as_float32(features)
        shape = (1,) * (x.ndim - 1) + (-1,)
        scaled = (x - self.mean.reshape(shape)) / (self.std.reshape(shape) + 1e-6)
        return jax.lax.stop_gradient(scaled)

    def update(
        self,
        features: Float[ArrayLike, "batch ... d"],
        *,
        momentum: float | Array,
        where: Bool[ArrayLike, " batch"] | None = None,
        axis_name: AxisName = None,
    ) -> "FeatureStats":
        """The statistics after one more batch.

        new = (1 - momentum) old + momentum (mean, std of this batch over all devices)

        Args:
            features: `[B, D]`, or tokens `[B, N, D]`, which count one by one.
            momentum: weight of this batch; UNIC lowers it from 1 to 0.001 by a cosine.
            where: True for the examples that count; masked ones may hold anything.
            axis_name: of the devices that share the batch; None if arrays are whole.

        Raises:
            ValueError: `momentum` is not in [0, 1], or there is one token in all, whose
                deviation is undefined.
            TypeError: the width is not that of the statistics.
        """
        check_range("momentum", momentum, low=0, high=1)
        if jnp.shape(features)[-1:] != self.mean.shape:
            raise TypeError(
                f"argument 'features' has shape {jnp.shape(features)}, expected a last "
                f"axis of {len(self.mean)}, that of the statistics."
            )
        x = jax.lax.stop_gradient(as_float32(features))
        x = x.reshape(len(x), -1, x.shape[-1])
        if x.shape[0] * x.shape[1] * axis_size(axis_name) < 2:
            raise ValueError(
                "argument 'features' has one token, whose deviation is undefined: "
                "expected 2 or more."
            )
        counts = jnp.ones(len(x), bool) if where is None else jnp.asarray(where)
        tokens, mean, std = _moments(x, counts[:, None, None], axis_name)
        # A batch without two tokens that count says nothing.
        weight = jnp.where(tokens > 1.0, momentum, 0.0)
        return FeatureStats(
            self.mean + weight * (mean - self.mean),
            self.std + weight * (std - self.std),
        )


def _moments(
    x: Array, counts: Array, axis_name: AxisName
) -> tuple[Array, Array, Array]:
    """Number of tokens `[B, N, D]` that count, their mean and deviation (n - 1)."""
    total = jnp.sum(jnp.where(counts, x, 0.0), axis=(0, 1))
    tokens = jnp.sum(counts).astype(x.dtype) * x.shape[1]
    tokens, total = psum((tokens, total), axis_name)
    mean = total / jnp.maximum(tokens, 1.0)
    centred = jnp.where(counts, x - mean[None, None], 0.0)
    squares = psum(jnp.sum(jnp.square(centred), axis=(0, 1)), axis_name)
    return tokens, mean, jnp.sqrt(squares / jnp.maximum(tokens - 1.0, 1.0)) + 1e-6
