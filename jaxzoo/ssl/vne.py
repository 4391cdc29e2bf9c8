"""VNE: the von Neumann entropy of a batch of representations, to be raised or lowered.

    rho = Z^T Z / N,  rows of Z of length 1       [D, D], its eigenvalues sum to 1
    S   = -sum_j l_j log l_j                      0 <= S <= log rank(rho)

S is log D if the representations fill all directions evenly, and 0 if they lie on one
line. To raise the entropy of what any model represents, or with a negative alpha to
lower it:

    loss, aux = vne_regularised(h, loss, alpha=0.05)              # loss - 0.05 S(h)

With fewer rows than columns the eigenvalues are those of Z Z^T / N, the squared
singular values of Z / sqrt(N); the others are 0.

The gradient is that of the trace, dS = -tr((log rho + I) d rho): it is exact where
eigenvalues coincide, and finite where they are 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxzoo.core.collectives import AxisName, all_gather, axis_size, masked_rows, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "vne",
    "title": "VNE: An Effective Method for Improving Deep Representation by "
    "Manipulating Eigenvalue Distribution",
    "arxiv": "2304.01434",
    "year": 2023,
    "authors": "Jaeill Kim, Suhyun Kang, Duhun Hwang, Jungwoo Shin, Wonjong Rhee",
    "where": "Section 3 (the entropy, by singular values where N < d), section 4.3 "
    "(I-VNE+), section 5 (rank and isotropy).",
    "differs": "Isotropy is the second-order form of the ratio of partition functions, "
    "which needs no search over directions. I-VNE+ has one weight: the released code's "
    "4.16 and 1.0 are alpha = 0.24 and a larger step. The experiment trains small "
    "networks on 8x8 digits with Adam, not a ResNet-50 on ImageNet-100 with SGD.",
}

__all__ = ["i_vne_plus", "vne", "vne_regularised"]


@typed
def vne(
    h: Float[ArrayLike, "batch features"],
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Von Neumann entropy of a batch of representations, with its kin.

    S = -sum_j l_j log l_j,  l_j the eigenvalues of sum_n z_n z_n^T / N,  |z_n| = 1

    Args:
        h: representations, `[N, D]`, of any length; a zero vector counts in N alone.
        where: True for the rows that count; masked rows may hold anything.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` that the rows are split
            over; None where `h` is whole.

    Returns:
        `(entropy, aux)`: float32 scalar in nats, in [0, log min(N, D)]. aux holds
        "eigenvalues" `[min(N, D)]`, ascending; "rank", int32, how many of them exceed
        the rounding errors; "effective_rank", exp(S), at most the rank; "isotropy" in
        [0, 1], 1 where no direction is preferred: (1 - m + l_min / 2) / (1 + m + l_max
        / 2), m the length of the mean of the z_n. Equals the released code's entropy.

    Raises:
        ValueError: there is no such axis.

    >>> entropy, aux = vne(jnp.array([[3.0, 0.0], [0.0, 0.1]]))
    >>> float(entropy), float(aux["effective_rank"])
    (0.693, 2.0)
    """
    z = _unit(h, where)
    batch, width = z.shape[0] * axis_size(axis_name), z.shape[1]
    total = jnp.maximum(_count(z, where, axis_name), 1.0)
    if batch < width:
        every = all_gather(z, axis_name)
        values = jnp.linalg.eigvalsh(_matmul(every, every.T) / total)
        # All devices have the same; their mean is what shard_map knows to be so.
        values = psum(values, axis_name) / axis_size(axis_name)
        smallest = jnp.zeros((), z.dtype)
    else:
        values = jnp.linalg.eigvalsh(psum(_matmul(z.T, z), axis_name) / total)
        smallest = values[0]
    # Below this they are rounding errors, and their logarithms have no meaning.
    counts = values > 4.0 * jnp.finfo(values.dtype).eps * values[-1]
    entropy = -jnp.sum(jnp.where(counts, values, 0.0) * _log(values, counts))
    mean = _length(psum(jnp.sum(z, axis=0), axis_name) / total)
    aux = {
        "eigenvalues": values,
        "rank": jnp.sum(counts),
        "effective_rank": jnp.exp(entropy),
        "isotropy": (1.0 - mean + smallest / 2.0) / (1.0 + mean + values[-1] / 2.0),
    }
    return entropy, aux


@typed
def vne_regularised(
    h: Float[ArrayLike, "batch features"],
    loss: Float[ArrayLike, ""] | float,
    *,
    alpha: float,
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """A loss whose representations are to have more entropy, or less.

    loss - alpha S(h)

    Args:
        h: the representations that the loss is computed from, `[N, D]`.
        loss: the loss of the task, a scalar; with `axis_name` that of the whole batch.
        alpha: weight of the entropy; > 0 raises it, < 0 lowers it. The authors advise
            well below 0.5 in magnitude.
        where: True for the rows of `h` that count.
        axis_name: the axis that the rows are split over; None where `h` is whole.

    Returns:
        `(value, aux)`: float32 scalar, and aux with what `vne` returns, the entropy
        under "entropy".

    Raises:
        ValueError: `alpha` is NaN, or there is no such axis.

    >>> h = jnp.array([[3.0, 0.0], [0.0, 0.1]])
    >>> float(vne_regularised(h, jnp.float32(1.0), alpha=0.1)[0])
    0.9307
    """
    check_range("alpha", alpha)
    entropy, aux = vne(h, where=where, axis_name=axis_name)
    value = as_float32(loss) - alpha * entropy
    return value, {"entropy": entropy, **aux}


@typed
def i_vne_plus(
    za: Float[ArrayLike, "batch features"],
    zb: Float[ArrayLike, "batch features"],
    *,
    alpha: float = 0.24,
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """I-VNE+: two views agree, and entropy keeps them from agreeing on one vector.

    loss = -mean_n cos(za_n, zb_n) - alpha (S(za) + S(zb)) / 2

    Args:
        za: embeddings of the first view, `[N, D]`.
        zb: embeddings of the second view, likewise.
        alpha: weight of the entropy. The released code divides by log N = 4.16 where N
            is 64, its batch; 0 lets all embeddings collapse.
        where: True for the examples that count; masked rows may hold anything.
        axis_name: the axis that the batch is split over; None where it is whole.

    Returns:
        `(loss, aux)`: float32 scalar; aux holds "similarity", the mean cosine;
        "entropy" in nats and "effective_rank", both means over the two views.

    Raises:
        ValueError: `alpha` is NaN, or there is no such axis.
        TypeError: the shapes of the arguments differ.

    >>> za = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> loss, aux = i_vne_plus(za, 2.0 * za, alpha=1.0)
    >>> float(aux["similarity"]), float(aux["entropy"]), float(loss)
    (1.0, 0.6931, -1.6931)
    """
    check_range("alpha", alpha)
    a, b = _unit(za, where), _unit(zb, where)
    total = jnp.maximum(_count(a, where, axis_name), 1.0)
    similarity = psum(jnp.sum(a * b), axis_name) / total
    views = [vne(z, where=where, axis_name=axis_name) for z in (a, b)]
    entropy = (views[0][0] + views[1][0]) / 2.0
    ranks = [aux["effective_rank"] for _, aux in views]
    aux = {
        "similarity": similarity,
        "entropy": entropy,
        "effective_rank": (ranks[0] + ranks[1]) / 2.0,
    }
    return -similarity - alpha * entropy, aux


def _unit(h: ArrayLike, where: ArrayLike | None) -> Array:
    """Rows of length 1; zeros where a row does not count, or is shorter than 1e-36."""
    h = masked_rows(h, where)
    # The largest entry first: squares of 1e-30 are 0, and those of 1e30 infinite.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(h), axis=1, keepdims=True))
    h = h / jnp.maximum(largest, 1e-30)
    squares = jnp.sum(jnp.square(h), axis=1, keepdims=True)
    long = squares > 1e-12
    return jnp.where(long, h * jax.lax.rsqrt(jnp.where(long, squares, 1.0)), 0.0)


def _count(z: Array, where: ArrayLike | None, axis_name: AxisName) -> Array:
    """How many rows count over all devices, as a float."""
    if where is None:
        return jnp.asarray(z.shape[0] * axis_size(axis_name), z.dtype)
    return psum(jnp.sum(where), axis_name).astype(z.dtype)


def _matmul(a: Array, b: Array) -> Array:
    # Float32 also on a TPU: a small eigenvalue drowns in the errors of bfloat16.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _log(x: Array, counts: Array) -> Array:
    """log x where it counts, else 0; the inner `where` keeps NaN from the gradient."""
    return jnp.log(jnp.where(counts, x, 1.0))


def _length(x: Array) -> Array:
    squares = jnp.sum(jnp.square(x))
    return jnp.where(
        squares > 0.0, jnp.sqrt(jnp.where(squares > 0.0, squares, 1.0)), 0.0
    )


def _views(key: Array):
    za, noise = jax.random.normal(key, (2, 8, 16))
    return za, za + 0.5 * noise


EXAMPLES = {
    vne: lambda key: (_views(key)[:1], {"where": jnp.arange(8) < 6}),
    vne_regularised: lambda key: (
        (_views(key)[0], jax.random.normal(key, ())),
        {"alpha": 0.1, "where": jnp.arange(8) < 6},
    ),
    i_vne_plus: lambda key: (_views(key), {"where": jnp.arange(8) < 6}),
}
