"""VICReg: embeddings of two views agree, while no dimension dies or repeats another.

    loss = 25 invariance + 25 variance + 1 covariance

    invariance   mean squared distance between the two embeddings of an example
    variance     mean over dimensions of max(0, gamma - sqrt(var + eps)), on each view
    covariance   sum of squared off-diagonal covariances over D, on each view

A training step in two lines, with any encoder and projector:

    za, zb = project(params, view_a), project(params, view_b)     # [B, D] each
    loss, aux = vicreg_loss(za, zb)

The last two terms are statistics of the whole batch. With `axis_name` they are those of
the batch over all devices, and so are their gradients. The covariance never costs more
than the smaller of two products: with fewer examples than dimensions

    sum_ij C_ij^2 = sum_ab (x_a . x_b)^2 / (B - 1)^2,    x the centred embeddings,

has B x B terms in place of D x D, from which the squared variances are subtracted.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxzoo.core.collectives import (
    AxisName,
    all_gather,
    axis_index,
    axis_size,
    masked_rows,
    psum,
)
from jaxzoo.core.typed import ArrayLike, check_range, typed

PAPER = {
    "slug": "vicreg",
    "title": "VICReg: Variance-Invariance-Covariance Regularization for "
    "Self-Supervised Learning",
    "arxiv": "2105.04906",
    "year": 2022,
    "authors": "Adrien Bardes, Jean Ponce, Yann LeCun",
    "where": "Section 4.1, equations 1 to 6.",
    "differs": "The invariance is averaged over dimensions under every convention, as "
    "in the released code; equation 5 sums over them. Centred embeddings beyond 1e6 in "
    "magnitude are clipped, so that fourth powers stay finite. The experiments train "
    "small networks on 8x8 digits and on 10,000 Fashion-MNIST images, with Adam where "
    "the paper trains a ResNet-50 on ImageNet with LARS.",
}

__all__ = ["variance_term", "vicreg_loss"]

# Larger entries have no meaning where the target for the spread is 1; their fourth
# powers, summed over the batch, would pass the range of float32.
LARGEST = 1e6


@typed
def vicreg_loss(
    za: Float[ArrayLike, "batch features"],
    zb: Float[ArrayLike, "batch features"],
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    convention: Literal["official", "paper", "vicregl"] = "official",
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The VICReg loss of two views of a batch.

    loss = invariance s(za, zb) + variance v + covariance c
    s(za, zb) = mean_bd (za - zb)^2
    v(z) = mean_d max(0, gamma - std_d),  std_d = sqrt(var_d + eps)
    c(z) = 1/D sum_{i != j} C_ij^2,  C = covariance of z's columns, with B - 1

    convention    v                   c               the same as
    "official"    (v(za) + v(zb))/2   c(za) + c(zb)   facebookresearch/vicreg, lightly
    "paper"       v(za) + v(zb)       c(za) + c(zb)   equation 6, solo-learn
    "vicregl"     (v(za) + v(zb))/2   the mean        facebookresearch/VICRegL

    Args:
        za: embeddings of the first view, `[B, D]`, B of 2 or more over all devices.
        zb: embeddings of the second view, likewise.
        invariance: weight of s, >= 0. Multiply it by D for the sum over dimensions that
            equation 5 writes.
        variance: weight of v, >= 0.
        covariance: weight of c, >= 0.
        gamma: the standard deviation below which a dimension is pushed, >= 0.
        eps: added to the variance, >= 1e-12, so that the root has a derivative.
        convention: how the two views are put together, see above.
        where: True for the examples that count; masked rows may hold anything.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` that the batch is split
            over; None where the arrays are whole.

    Returns:
        `(loss, aux)`: float32 scalar; aux holds the terms s, v and c without their
        weights as "invariance", "variance" and "covariance", and "std", the mean over
        dimensions and views of sqrt(var_d), near 0 in a collapse. If fewer than 2
        examples count, v, c and "std" are 0.

    Raises:
        ValueError: the batch has 1 example, a weight is out of range, or there is no
            such axis.
        TypeError: the shapes of the arguments differ.

    >>> za = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    >>> loss, aux = vicreg_loss(za, za + jnp.array([[0.0, 0.2]]))
    >>> {name: round(float(term), 3) for name, term in aux.items()}
    {'invariance': 0.02, 'variance': 0.495, 'covariance': 0.0, 'std': 0.707}
    >>> round(float(loss), 3)
    12.875
    """
    weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
    for name, weight in weights.items():
        check_range(name, weight, low=0)
    _check(za, gamma, eps, axis_name, name="za")
    a, b = masked_rows(za, where), masked_rows(zb, where)
    total = _count(a, where, axis_name)
    gap = psum(jnp.sum(jnp.square(jnp.clip(a - b, -LARGEST, LARGEST))), axis_name)
    views = [_centred(z, total, where, axis_name) for z in (a, b)]
    variances = jnp.stack([_variances(x, total, axis_name) for x in views])
    # Both views weigh alike; conventions differ in whether they are added or averaged.
    v_views = 1.0 if convention == "paper" else 0.5
    c_views = 0.5 if convention == "vicregl" else 1.0
    aux = {
        "invariance": gap / jnp.maximum(total * a.shape[1], 1.0),
        "variance": v_views * sum(_hinge(x, total, gamma, eps) for x in variances),
        "covariance": c_views * sum(_covariance(x, total, axis_name) for x in views),
        "std": jnp.mean(_std(variances)),
    }
    return sum((w * aux[name] for name, w in weights.items()), jnp.zeros(())), aux


@typed
def variance_term(
    z: Float[ArrayLike, "batch features"],
    *,
    gamma: float = 1.0,
    eps: float = 1e-4,
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The variance term of one view, to be added to other losses against collapse.

    v(z) = mean_d max(0, gamma - std_d),  std_d = sqrt(var_d + eps), var_d with B - 1

    Args:
        z: embeddings, `[B, D]`, B of 2 or more over all devices.
        gamma: the standard deviation below which a dimension is pushed, >= 0.
        eps: added to the variance, >= 1e-12.
        where: True for the examples that count; masked rows may hold anything.
        axis_name: the axis that the batch is split over; None where `z` is whole.

    Returns:
        `(value, aux)`: float32 scalar in [0, gamma], and `aux["std"]`, sqrt(var_d),
        `[D]`. Both are 0 if fewer than 2 examples count.

    Raises:
        ValueError: the batch has 1 example, `gamma` or `eps` is out of range, or there
            is no such axis.

    >>> value, aux = variance_term(jnp.array([[2.0, 5.0], [-2.0, 5.0]]))
    >>> round(float(value), 3), aux["std"].round(3).tolist()
    (0.495, [2.828, 0.0])
    """
    _check(z, gamma, eps, axis_name, name="z")
    z = masked_rows(z, where)
    total = _count(z, where, axis_name)
    variances = _variances(_centred(z, total, where, axis_name), total, axis_name)
    return _hinge(variances, total, gamma, eps), {"std": _std(variances)}


def _check(
    z: ArrayLike, gamma: float, eps: float, axis_name: AxisName, *, name: str
) -> None:
    check_range("gamma", gamma, low=0)
    check_range("eps", eps, low=1e-12)
    batch = z.shape[0] * axis_size(axis_name)
    if batch < 2:
        raise ValueError(
            f"argument '{name}' has a batch of {batch}, expected 2 examples or more: "
            "the variance of one is not defined."
        )


def _count(z: Array, where: ArrayLike | None, axis_name: AxisName) -> Array:
    """How many examples count over all devices, as a float."""
    if where is None:
        return jnp.asarray(z.shape[0] * axis_size(axis_name), z.dtype)
    return psum(jnp.sum(where), axis_name).astype(z.dtype)


def _centred(
    z: Array, total: Array, where: ArrayLike | None, axis_name: AxisName
) -> Array:
    """`z` minus its mean over the whole batch; rows that do not count are zeros."""
    # Divided before the sum, which then is finite for all finite embeddings.
    mean = psum(jnp.sum(z / jnp.maximum(total, 1.0), axis=0), axis_name)
    x = jnp.clip(z - mean[None], -LARGEST, LARGEST)
    return x if where is None else jnp.where(where[:, None], x, 0.0)


def _variances(x: Array, total: Array, axis_name: AxisName) -> Array:
    squares = psum(jnp.sum(jnp.square(x), axis=0), axis_name)
    return squares / jnp.maximum(total - 1.0, 1.0)


def _std(variances: Array) -> Array:
    # A report, on which nobody descends: the root has no derivative at 0.
    return jnp.sqrt(jax.lax.stop_gradient(variances))


def _hinge(variances: Array, total: Array, gamma: float, eps: float) -> Array:
    below = jnp.maximum(gamma - jnp.sqrt(variances + eps), 0.0)
    return jnp.where(total >= 2.0, jnp.mean(below), 0.0)


def _covariance(x: Array, total: Array, axis_name: AxisName) -> Array:
    """1/D sum over i != j of the squared covariances of the centred columns."""
    batch, width = x.shape[0] * axis_size(axis_name), x.shape[1]
    if batch < width:
        diagonal = psum(jnp.sum(jnp.square(x), axis=0), axis_name)
        # Of C and of C - level the off-diagonal is the same. Without the mean variance
        # little is left to be subtracted where columns are nearly uncorrelated.
        level = jax.lax.stop_gradient(jnp.mean(diagonal))
        squares = _gram_squares(x, level, axis_name)
        squares += (width - batch) * jnp.square(level)
        squares -= jnp.sum(jnp.square(diagonal - level))
    else:
        squares = _off_diagonal_squares(x, axis_name)
    return squares / (width * jnp.square(jnp.maximum(total - 1.0, 1.0)))


# Both sums are of squares of a symmetric matrix, whose derivative is one product; taken
# by hand, since autodiff makes two. Float32 means float32 here, also on a TPU.
_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _gram_squares(x: Array, level: Array, axis_name: AxisName) -> Array:
    """sum_ab (x x^T - level I)_ab^2 over the whole batch; `level` is a constant."""
    return psum(jnp.sum(jnp.square(_gram(x, level, axis_name)[0])), axis_name)


@_gram_squares.defjvp
def _(axis_name, primals, tangents):
    (x, level), (dx, _) = primals, tangents
    gram, every = _gram(x, level, axis_name)
    slope = jnp.sum(4.0 * _matmul(gram, every) * dx)
    return psum(jnp.sum(jnp.square(gram)), axis_name), psum(slope, axis_name)


def _gram(x: Array, level: Array, axis_name: AxisName) -> tuple[Array, Array]:
    """This device's rows of x x^T - level I, and the whole of x."""
    every = all_gather(x, axis_name)
    row = axis_index(axis_name) * len(x) + jnp.arange(len(x))
    own = row[:, None] == jnp.arange(len(every))[None]
    return _matmul(x, every.T) - jnp.where(own, level, 0.0), every


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _off_diagonal_squares(x: Array, axis_name: AxisName) -> Array:
    """sum over i != j of (x^T x)_ij^2."""
    return jnp.sum(jnp.square(_off_diagonal(x, axis_name)))


@_off_diagonal_squares.defjvp
def _(axis_name, primals, tangents):
    (x,), (dx,) = primals, tangents
    product = _off_diagonal(x, axis_name)
    slope = jnp.sum(4.0 * _matmul(x, product) * dx)
    return jnp.sum(jnp.square(product)), psum(slope, axis_name)


def _off_diagonal(x: Array, axis_name: AxisName) -> Array:
    product = psum(_matmul(x.T, x), axis_name)
    return jnp.where(jnp.eye(x.shape[1], dtype=bool), 0.0, product)


def _views(key: Array):
    za, noise = jax.random.normal(key, (2, 8, 16))
    return 0.7 * za, 0.7 * za + 0.3 * noise


EXAMPLES = {
    vicreg_loss: lambda key: (_views(key), {"where": jnp.arange(8) < 6}),
    variance_term: lambda key: (_views(key)[:1], {"where": jnp.arange(8) < 6}),
}
