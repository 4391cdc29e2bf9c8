"""Large batches that generalise: ghost batch norm, and steps of the right length.

    y = (x - mean_g) / sqrt(var_g + eps)         g: the ghost batch of 128 that x is in
    mean <- momentum mean + (1 - momentum) mean_g        one ghost batch after another
    learning_rate(B) = learning_rate(b) sqrt(B / b),  gradients clipped

and as many updates as with the small batch, however many epochs that takes. In their
place, noise on each example's loss gives the gradient of a large batch the covariance
of a small one's:

    loss = mean_n z_n loss_n,  z_n ~ N(1, std^2),  std^2 = B / b - 1

    x = GhostBatchNorm(ghost_size=128, use_running_average=not train)(x)
    optimizer = large_batch_sgd(0.1, batch_size=4096, base_size=128)

Under jit over a mesh batches are whole. Inside shard_map the ghost batches are those of
a device's own rows: y needs no communication, running statistics are the device's own.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from jaxzoo.core.transform import Mask, Number, Rate, descend, in_float32, like
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "ghost_batch_norm",
    "title": "Train longer, generalize better: closing the generalization gap in large "
    "batch training of neural networks",
    "arxiv": "1705.08741",
    "year": 2017,
    "authors": "Elad Hoffer, Itay Hubara, Daniel Soudry",
    "where": "Section 3 (random walk on a random potential), section 4 (learning rate, "
    "multiplicative noise, Algorithm 1), section 5 (as many updates).",
    "differs": "The batch has to be a multiple of the ghost batch; the released code, "
    "which takes ghost batches one by one and adds up their gradients, has a smaller "
    "last one. Running variances divide by n, as in Flax, not by n - 1. The noise on "
    "losses has the covariance of drawing with replacement. The random potential of "
    "the experiment has independent steps (power 1, log^2 t), as the paper's power of "
    "2 in one dimension is a straight slope. On digits the large batch lost 1.3 points "
    "of accuracy (0.5 standard error) at the same epochs; as many updates brought more "
    "than that back (205 %), and ghost batches by themselves nothing.",
}

__all__ = [
    "GhostBatchNorm",
    "ghost_batch_norm",
    "large_batch_sgd",
    "noisy_mean",
]


@typed
def ghost_batch_norm(
    x: Float[ArrayLike, "batch *space features"],
    mean: Float[ArrayLike, " features"],
    var: Float[ArrayLike, " features"],
    *,
    ghost_size: int,
    momentum: float = 0.9,
    eps: float = 1e-5,
) -> tuple[Float[Array, "batch *space features"], dict[str, Array]]:
    """Every ghost batch normalised by its own statistics, per feature.

    y = (x - mean_g) / sqrt(var_g + eps)

    Args:
        x: `[B, ..., D]`; the first `ghost_size` rows are the first ghost batch.
        mean: running mean `[D]`.
        var: running variance `[D]`.
        ghost_size: rows of a ghost batch, a divisor of B; B is usual batch norm.
        momentum: of the running statistics, in [0, 1].
        eps: added to variances, >= 0.

    Returns:
        `(y, aux)`: float32; aux holds the running "mean" and "var" after all ghost
        batches in turn. Variances are those of the rows, divided by their number, as
        in Flax.

    Raises:
        ValueError: a number is out of range, or the batch cannot be cut so.

    >>> x = jnp.array([[0.0], [2.0], [10.0], [30.0]])
    >>> y, aux = ghost_batch_norm(x, jnp.zeros(1), jnp.ones(1), ghost_size=2)
    >>> y[:, 0].round(3).tolist()
    [-1.0, 1.0, -1.0, 1.0]
    >>> round(float(aux["mean"][0]), 3)                         # 0.9 (0.1) + 0.1 (20)
    2.09
    """
    check_range("ghost_size", ghost_size, low=1)
    check_range("momentum", momentum, low=0.0, high=1.0)
    check_range("eps", eps, low=0.0)
    if x.shape[0] % ghost_size:
        raise ValueError(
            f"argument 'ghost_size' is {ghost_size}, expected a divisor of the batch "
            f"of {x.shape[0]}."
        )
    x = as_float32(x)
    ghosts = x.reshape(-1, ghost_size, *x.shape[1:])
    axes = tuple(range(1, ghosts.ndim - 1))
    # In units in which squares are finite, whatever the activations are.
    unit = lax.stop_gradient(jnp.maximum(jnp.max(jnp.abs(x), initial=0.0), 1.0))
    ghosts = ghosts / unit
    means = jnp.mean(ghosts, axes, keepdims=True)
    centred = ghosts - means
    variances = jnp.mean(jnp.square(centred), axes, keepdims=True)
    y = centred * lax.rsqrt(jnp.maximum(variances + eps / unit / unit, 1e-30))
    count = len(ghosts)
    # momentum^(G - 1 - g) of ghost batch g is left after the others.
    weights = (1.0 - momentum) * momentum ** jnp.arange(count - 1, -1, -1, x.dtype)
    means = unit * means.reshape(count, -1)
    variances = unit * unit * variances.reshape(count, -1)
    kept = momentum**count
    aux = {
        "mean": kept * as_float32(mean) + jnp.tensordot(weights, means, 1),
        "var": kept * as_float32(var) + jnp.tensordot(weights, variances, 1),
    }
    return y.reshape(x.shape), aux


class GhostBatchNorm(nn.Module):
    """`flax.linen.BatchNorm` with ghost batches; the same variables.

    Attributes:
        ghost_size: rows of a ghost batch.
        use_running_average: normalise by the running statistics, as in evaluation.
        momentum: of the running statistics, per ghost batch.
        eps: added to variances.
        dtype: of the output; statistics and parameters are float32.
    """

    ghost_size: int
    use_running_average: bool = False
    momentum: float = 0.9
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],)
        mean: Any = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var: Any = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones_init(), shape)
        bias = self.param("bias", nn.initializers.zeros_init(), shape)
        row = (1,) * (x.ndim - 1) + shape
        if self.use_running_average:
            spread = lax.rsqrt(var.value + self.eps).reshape(row)
            y = (as_float32(x) - mean.value.reshape(row)) * spread
        else:
            size = x.shape[0] if self.is_initializing() else self.ghost_size
            y, aux = ghost_batch_norm(
                x, mean.value, var.value, ghost_size=size, momentum=self.momentum,
                eps=self.eps,
            )  # fmt: skip
            if not self.is_initializing():
                mean.value, var.value = aux["mean"], aux["var"]
        return (y * scale.reshape(row) + bias.reshape(row)).astype(self.dtype)


def large_batch_sgd(
    learning_rate: Rate,
    *,
    batch_size: int = 4096,
    base_size: int = 128,
    momentum: Number = 0.9,
    max_norm: Number = 5.0,
    weight_decay: Number = 0.0,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum, a learning rate tuned at a small batch, and clipping.

    u = -learning_rate sqrt(batch_size / base_size) momentum(clip(g))

    Args:
        learning_rate: that of the small batch, >= 0, or a schedule of the update.
        batch_size: examples per update, >= 1.
        base_size: the small batch, >= 1.
        momentum: in [0, 1).
        max_norm: largest global norm of the gradients, > 0; 5 in the released code.
        weight_decay: >= 0, decoupled.
        mask: the parameters that decay.

    Returns:
        An optimizer with float32 state.

    Raises:
        ValueError: a number is out of range.

    >>> optimizer = large_batch_sgd(0.1, batch_size=512, base_size=128)
    >>> p = jnp.zeros(1)
    >>> optimizer.update(p + 1.0, optimizer.init(p), p)[0].tolist()
    [-0.2]
    """
    check_range("batch_size", batch_size, low=1)
    check_range("base_size", base_size, low=1)
    check_range("momentum", momentum, low=0.0, below=1.0)
    check_range("max_norm", max_norm, above=0.0)
    ratio = (batch_size / base_size) ** 0.5
    largest: Any = max_norm
    decay: Any = momentum
    clip, trace = optax.clip_by_global_norm(largest), optax.trace(decay)
    inner = optax.chain(clip, trace)

    def init(params: Any) -> Any:
        return inner.init(in_float32(params))

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        new, state = inner.update(in_float32(updates), state, params)
        return like(new, updates), state

    base: Any = learning_rate

    def scaled(step: Any) -> Any:
        return ratio * base(step)

    if not callable(learning_rate):
        check_range("learning_rate", learning_rate, low=0.0)
    rate: Rate = scaled if callable(learning_rate) else ratio * learning_rate
    direction = optax.GradientTransformation(init, update)
    return descend(direction, rate, weight_decay=weight_decay, mask=mask)


@typed
def noisy_mean(
    key: Key[Array, ""], losses: Float[ArrayLike, " batch"], *, std: float
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean of losses with random weights: noise in proportion to each gradient.

    loss = mean_n z_n loss_n,  z_n ~ N(1, std^2)

    Args:
        key: a typed key.
        losses: of the examples, `[B]`.
        std: of the weights, >= 0; sqrt(B / b - 1) gives the mean over B examples the
            covariance of one over b.

    Returns:
        `(loss, aux)`: float32 scalar whose gradient is, on average, the mean's; aux
        holds "mean", the mean of the losses, and "weight" `[B]`.

    Raises:
        ValueError: `std` is negative or NaN.

    >>> losses = jnp.array([1.0, 3.0])
    >>> loss, aux = noisy_mean(jax.random.key(0), losses, std=0.0)
    >>> float(loss), float(aux["mean"])
    (2.0, 2.0)
    """
    check_range("std", std, low=0.0)
    losses = as_float32(losses)
    noise = jax.random.normal(key, losses.shape)
    weight = 1.0 + std * noise.astype(losses.dtype)
    return jnp.mean(weight * losses), {"mean": jnp.mean(losses), "weight": weight}


def _example(key: Array) -> tuple[Array, Array, Array]:
    return jax.random.normal(key, (16, 8)), jnp.zeros(8), jnp.ones(8)


EXAMPLES = {
    ghost_batch_norm: lambda key: (_example(key), {"ghost_size": 4}),
    large_batch_sgd: lambda key: ((0.01,), {"batch_size": 256}),
    noisy_mean: lambda key: ((key, jax.random.uniform(key, (8,))), {"std": 0.5}),
}
