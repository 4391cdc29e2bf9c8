"""Seq-VCR: variance and covariance regularisation of a transformer's hidden states.

    for every position t, C_t = covariance over the batch of x[:, t]
    loss = mean_t mean_k  lam1 max(0, 1 - sqrt(C_kk + eta)) + lam2 sum_{l != k} C_kl^2

It is added to the next-token loss, on a projection of an intermediate layer, so that
this layer keeps its directions apart. The method comes with pause tokens between the
question and the answer; collapse is measured by the matrix entropy of a layer.

    tokens = add_pause_tokens(question, num_pauses=2, pause_token=11)
    loss = next_token_loss + seq_vcr(projected)[0]
    entropy = matrix_entropy(hidden)            # [B], one number per sequence
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxzoo.core.collectives import AxisName, axis_size, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "seq_vcr",
    "title": "Seq-VCR: Preventing Collapse in Intermediate Transformer Representations "
    "for Enhanced Reasoning",
    "arxiv": "2411.02344",
    "year": 2025,
    "authors": "Md Rifat Arefin, Gopeshh Subbaraj, Nicolas Gontier, Yann LeCun, Irina "
    "Rish, Ravid Shwartz-Ziv, Christopher Pal",
    "where": "Section 3 (matrix-based entropy, the regulariser, pause tokens).",
    "differs": "No released code could be read: this is the paper's text. The gradient "
    "of a standard deviation is taken with eta inside the root, as in the text. The "
    "experiment trains a transformer of 4 layers from scratch on 3x3-digit products, "
    "not GPT-2 Small on 4x4 and 5x5.",
}

__all__ = ["add_pause_tokens", "matrix_entropy", "seq_vcr"]

LARGEST = 1e7  # of an entry: its fourth power, summed, stays in float32


@typed
def seq_vcr(
    x: Float[ArrayLike, "batch positions d"],
    *,
    lam1: float = 1.0,
    lam2: float = 0.004,
    eta: float = 1e-3,
    where: Bool[ArrayLike, "batch positions"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The regulariser: unit variance and no covariance over the batch, per position.

    loss = 1/(T d) sum_t sum_k lam1 max(0, 1 - sqrt(C_kk + eta))
                               + lam2 sum_{l != k} C_kl^2
    C_t = 1/(B - 1) sum_b (x_bt - mean_t)(x_bt - mean_t)^T

    Args:
        x: hidden states, or a projection of them.
        lam1: weight of the variance, >= 0.
        lam2: weight of the covariance, >= 0.
        eta: added to the variance under the root, > 0.
        where: True for the tokens that count; masked ones may hold anything. A position
            with fewer than two of them has no covariance and does not count.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` that the batch is split
            over; None where arrays are whole. Only sums travel.

    Returns:
        `(loss, aux)`: float32 scalar; `aux["variance"]` and `aux["covariance"]`, the
        two terms without their weights, and `aux["std"]`, the mean standard deviation.

    Raises:
        ValueError: the whole batch has one row, a weight is out of range, or there is
            no such axis.

    Two features that are one and the same, with standard deviation 1:

    >>> x = jnp.sqrt(0.5) * jnp.array([[[1.0, 1.0]], [[-1.0, -1.0]]])
    >>> loss, aux = seq_vcr(x, eta=1e-9)
    >>> float(loss), float(aux["variance"]), float(aux["covariance"])
    (0.004, 0.0, 1.0)
    """
    check_range("lam1", lam1, low=0)
    check_range("lam2", lam2, low=0)
    check_range("eta", eta, low=1e-12)
    rows = x.shape[0] * axis_size(axis_name)
    if rows < 2:
        raise ValueError(
            f"argument 'x' has {rows} row over all devices, expected 2 or more: one "
            "row has no variance."
        )
    counts = jnp.ones(x.shape[:2], bool) if where is None else jnp.asarray(where)
    x = jnp.where(counts[..., None], as_float32(x), 0.0)
    x = jnp.clip(x, -LARGEST, LARGEST)
    number = psum(jnp.sum(counts, axis=0), axis_name).astype(x.dtype)  # [T]
    mean = psum(jnp.sum(x, axis=0), axis_name) / jnp.maximum(number, 1.0)[:, None]
    centred = jnp.where(counts[..., None], x - mean[None], 0.0)
    products = psum(jnp.einsum("btk,btl->tkl", centred, centred), axis_name)
    products = products / jnp.maximum(number - 1.0, 1.0)[:, None, None]
    variances = jnp.diagonal(products, axis1=1, axis2=2)  # [T, d]
    std = jnp.sqrt(jnp.maximum(variances, 0.0) + eta)
    squares = jnp.square(products * (1.0 - jnp.eye(x.shape[2]))[None])
    counted = (number >= 2).astype(x.dtype)
    positions = jnp.maximum(jnp.sum(counted), 1.0)
    variance, covariance, spread = (
        jnp.sum(term * counted) / positions
        for term in (
            jnp.mean(jnp.maximum(1.0 - std, 0.0), axis=1),
            jnp.mean(jnp.sum(squares, axis=2), axis=1),
            jnp.mean(std, axis=1),
        )
    )
    loss = lam1 * variance + lam2 * covariance
    aux = {"variance": variance, "covariance": covariance, "std": spread}
    return loss, jax.lax.stop_gradient(aux)


@typed
def add_pause_tokens(
    question: Int[ArrayLike, "*batch length"], *, num_pauses: int, pause_token: int
) -> Int[Array, "*batch longer"]:
    """Appends the same pause token to every question; the answer comes after them.

    Pauses give the model columns to compute in and take no part in the loss.

    Args:
        question: token ids.
        num_pauses: how many, >= 1; the paper uses 2.
        pause_token: id of the pause token, >= 1.

    Returns:
        Token ids, `[*batch, length + num_pauses]`.

    Raises:
        ValueError: `num_pauses` or `pause_token` is below 1.

    >>> add_pause_tokens(jnp.array([[4, 2]]), num_pauses=2, pause_token=9).tolist()
    [[4, 2, 9, 9]]
    """
    check_range("num_pauses", num_pauses, low=1)
    check_range("pause_token", pause_token, low=1)
    question = jnp.asarray(question)
    shape = (*question.shape[:-1], num_pauses)
    return jnp.concatenate(
        [question, jnp.full(shape, pause_token, question.dtype)], axis=-1
    )


@typed
def matrix_entropy(
    hidden: Float[ArrayLike, "*batch tokens d"], *, alpha: float = 1.0
) -> Float[Array, "*batch"]:
    """Renyi entropy of the trace-normalised Gram matrix of one sequence's states.

    S_alpha = 1/(1 - alpha) log sum_i p_i^alpha,   p_i = eigenvalue_i(K) / tr K,
    K = hidden hidden^T; alpha = 1 is the limit -sum_i p_i log p_i.

    Args:
        hidden: states of the tokens of each sequence.
        alpha: order of the entropy, in [0.01, 100].

    Returns:
        float32 in nats, from 0 (all tokens along one direction, or all zero) to
        log(min(tokens, d)).

    Raises:
        ValueError: `alpha` is out of range.

    >>> float(matrix_entropy(jnp.eye(4))), float(matrix_entropy(jnp.ones((4, 4))))
    (1.386, 0.0)
    """
    check_range("alpha", alpha, low=0.01, high=100.0)
    x = as_float32(hidden)
    # The trace is divided out; to divide by the largest entry first keeps it in range.
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    x = x / jnp.where(top > 0, top, 1.0)
    if x.shape[-2] > x.shape[-1]:  # the smaller of the two Gram matrices: same values
        x = jnp.swapaxes(x, -1, -2)
    gram = x @ jnp.swapaxes(x, -1, -2)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    gram = gram / jnp.where(trace > 0, trace, 1.0)
    return _spectral_entropy(gram, alpha)


def _spectral_entropy(gram: Array, alpha: float) -> Array:
    values = jnp.linalg.eigvalsh(gram)
    # Below this they are rounding errors, and their logarithms have no meaning.
    eps = 4.0 * jnp.finfo(values.dtype).eps
    counts = values > eps
    logs = jnp.log(jnp.where(counts, values, 1.0))
    if alpha == 1.0:
        return -jnp.sum(jnp.where(counts, values * logs, 0.0), axis=-1)
    powers = jnp.where(counts, jnp.exp(alpha * logs), 0.0)
    total = jnp.sum(powers, axis=-1)
    return jnp.log(jnp.where(total > 0, total, 1.0)) / (1.0 - alpha)


def _pause_example(key: Array):
    question = jax.random.randint(key, (8, 5), 0, 10)
    return (question,), {"num_pauses": 2, "pause_token": 11}


EXAMPLES = {
    seq_vcr: lambda key: (
        (0.5 * jax.random.normal(key, (8, 3, 4)),),
        {"where": jnp.ones((8, 3), bool).at[5:, 1:].set(False)},
    ),
    add_pause_tokens: _pause_example,
    matrix_entropy: lambda key: ((jax.random.normal(key, (8, 3, 4)),), {}),
}
