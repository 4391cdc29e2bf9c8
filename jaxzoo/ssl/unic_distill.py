"""UNIC: one student distilled from several teachers, with teacher dropping.

    loss_bt = mean over kinds (CLS, patches) of mean over tokens of
              0.5 (1 - cos(s, y)) + 0.5 mean_d smooth_l1(s_d - y_d)
    loss    = sum_bt keep_bt loss_bt / sum_bt keep_bt

y is the teacher's feature, standardised per dimension by running means and deviations;
s comes from a ladder of projectors on all blocks of the student. `keep` holds, for each
example, the teacher with the largest loss and each other one with probability 1 - p.

    ladder = LadderOfProjectors({"dino": 768, "deit": 1024})
    projected = ladder.apply(params, blocks)                    # of a ViT, CLS first
    losses = []
    for name, features in teachers.items():                     # [B, 1 + N, D]
        kinds = zip(projected[name], (features[:, 0], features[:, 1:]), stats[name])
        losses.append(sum(token_loss(s, st.standardize(y)) for s, y, st in kinds) / 2)
    loss, aux = unic_loss(jnp.stack(losses, axis=1), key=key)   # [B, teachers]
    stats[name] = ...                                           # st.update(y, ...)

The statistics are `jaxzoo.nn.feature_stats.FeatureStats`, per teacher and kind. As in
the released code a batch is standardised by those before it, and only then do they
move; with a momentum that falls from 1 the first batch sets them.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxzoo.core.collectives import AxisName, axis_index, axis_size, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "unic_distill",
    "title": "UNIC: Universal Classification Models via Multi-teacher Distillation",
    "arxiv": "2408.05088",
    "year": 2024,
    "authors": "Mert Bulent Sariyildiz, Philippe Weinzaepfel, Thomas Lucas, Diane "
    "Larlus, Yannis Kalantidis",
    "where": "Section 3 and the released code (naver/unic): standardised features, "
    "cosine and smooth-L1 loss, ladder of projectors, teacher dropping.",
    "differs": "The released code divides by the number of losses that each device "
    "keeps, here it is that of all devices. The experiment distils two teachers of its "
    "own, trained on two labellings of 8x8 digits, into a tiny ViT.",
}

__all__ = [
    "LadderOfProjectors",
    "teacher_dropping",
    "token_loss",
    "unic_loss",
]


@typed
def token_loss(
    student: Float[ArrayLike, "batch *tokens d"],
    target: Float[ArrayLike, "batch *tokens d"],
    *,
    cosine: float = 0.5,
    smooth_l1: float = 0.5,
    beta: float = 1.0,
) -> Float[Array, " batch"]:
    """Cosine and smooth-L1 loss per example, averaged over tokens.

    cosine (1 - cos(s, y)) + smooth_l1 mean_d h(s_d - y_d),
    h(e) = e^2 / (2 beta) where |e| < beta, |e| - beta / 2 elsewhere

    Args:
        student: projected features, `[B, D]` or tokens `[B, N, D]`.
        target: the teacher's, standardised, in the same shape.
        cosine: weight of the first term.
        smooth_l1: weight of the second.
        beta: where the second turns from a square to a line.

    Returns:
        float32 `[B]`. A zero vector has cosine 0 with everything, and a gradient of 0
        from that term.

    Raises:
        TypeError: the shapes differ.
        ValueError: a weight is negative, or `beta` is below 1e-6.

    >>> token_loss(jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 0.5]])).tolist()
    [1.1562]
    """
    check_range("cosine", cosine, low=0)
    check_range("smooth_l1", smooth_l1, low=0)
    check_range("beta", beta, low=1e-6)
    s, y = as_float32(student), as_float32(target)
    error = jnp.abs(s - y)
    # h(e) = small (e - small / 2) / beta, overflow-free
    small = jnp.minimum(error, beta)
    huber = jnp.mean(small * (error - 0.5 * small) / beta, axis=-1)
    similarity = jnp.sum(_unit(s) * _unit(y), axis=-1)
    loss = cosine * (1.0 - similarity) + smooth_l1 * huber
    return jnp.mean(loss, axis=tuple(range(1, loss.ndim)))


@typed
def teacher_dropping(
    key: Key[Array, ""],
    losses: Float[ArrayLike, "batch teachers"],
    *,
    drop: float | Float[ArrayLike, ""] = 0.5,
) -> Bool[Array, "batch teachers"]:
    """Which teachers count for which example.

    The teacher with the largest loss always does, each other one with probability
    1 - drop, on its own.

    Args:
        key: a typed key, consumed.
        losses: per example and teacher.
        drop: p, the probability with which one of the others is dropped.

    Returns:
        bool `[B, teachers]`, at least one True in each row; of equal losses the first
        is the largest.

    Raises:
        ValueError: `drop` is not in [0, 1].

    >>> losses = jnp.array([[1.0, 3.0, 2.0]])
    >>> teacher_dropping(jax.random.key(0), losses, drop=1.0).tolist()
    [[False, True, False]]
    """
    check_range("drop", drop, low=0, high=1)
    return _keep(jnp.asarray(losses), jax.random.uniform(key, losses.shape), drop)


@typed
def unic_loss(
    losses: Float[ArrayLike, "batch teachers"],
    *,
    key: Key[Array, ""] | None = None,
    drop: float | Float[ArrayLike, ""] = 0.5,
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The mean over what teacher dropping keeps.

    loss = sum_bt keep_bt losses_bt / sum_bt keep_bt

    The sums go over the whole batch, so that an example with two teachers weighs twice
    as much as one with one: as in the released code, but for one point. That divides
    by the count of each device; here it is that of all.

    Args:
        losses: per example and teacher, the mean of `token_loss` over kinds of tokens.
        key: a typed key, consumed, the same on all devices; needed if `drop` is not 0.
        drop: probability with which a teacher other than the hardest is dropped.
        where: True for the examples that count; masked ones may hold anything.
        axis_name: of the devices that share the batch; None if arrays are whole.

    Returns:
        `(loss, aux)`: float32 scalar, 0 if no example counts;
        `aux["per_example"]` is the mean over each example's kept teachers `[B]`,
        `aux["per_teacher"]` the mean loss of each, before dropping, and
        `aux["kept"]` the part of the examples that each was kept for.

    Raises:
        ValueError: `drop` is not in [0, 1], or is not 0 while there is no key.

    >>> losses = jnp.array([[1.0, 3.0], [4.0, 2.0]])
    >>> loss, aux = unic_loss(losses, drop=1.0, key=jax.random.key(0))
    >>> float(loss), aux["kept"].tolist()
    (3.5, [0.5, 0.5])
    """
    check_range("drop", drop, low=0, high=1)
    if key is None and not (isinstance(drop, int | float) and drop == 0):
        raise ValueError(f"argument 'key' is None, expected a key as 'drop' is {drop}.")
    losses = as_float32(losses)
    keep = jnp.ones(losses.shape, bool)
    counts = keep[:, 0] if where is None else jnp.asarray(where)
    losses = jnp.where(counts[:, None], losses, 0.0)
    if key is not None:
        keep = _keep(losses, _own_rows(key, losses.shape, axis_name), drop)
    keep = (keep & counts[:, None]).astype(losses.dtype)
    sums = {
        "examples": jnp.sum(counts).astype(losses.dtype),
        "kept": jnp.sum(keep, axis=0),
        "loss": jnp.sum(keep * losses),
        "per_teacher": jax.lax.stop_gradient(jnp.sum(losses, axis=0)),
    }
    sums = psum(sums, axis_name)
    examples = jnp.maximum(sums["examples"], 1.0)
    own = jnp.sum(keep * losses, axis=1) / jnp.maximum(jnp.sum(keep, axis=1), 1.0)
    aux = {
        "per_example": jax.lax.stop_gradient(own),
        "per_teacher": sums["per_teacher"] / examples,
        "kept": sums["kept"] / examples,
    }
    return sums["loss"] / jnp.maximum(jnp.sum(sums["kept"]), 1.0), aux


class LadderOfProjectors(nn.Module):
    """Projects all blocks of a student into each teacher's space; thrown away after.

    For each teacher, and for CLS and patches apart, every block has an MLP of its own,
    a larger one for the last; their outputs are added.

    Attributes:
        widths: of the teachers' features, by name.
        hidden: width of the MLPs of the blocks before the last.
        last_hidden: width of the last block's.
        dtype: compute dtype; parameters and outputs are float32.
    """

    widths: Mapping[str, int]
    hidden: int = 768
    last_hidden: int = 3072
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, blocks: Float[Array, "depth ... t d"]
    ) -> dict[str, tuple[Float[Array, "... w"], Float[Array, "... n w"]]]:
        """By teacher `(CLS, patches)`, from the tokens after each block, CLS first."""
        kinds = (blocks[..., 0, :], blocks[..., 1:, :])
        projected = {}
        for name, width in sorted(self.widths.items()):
            sums = self._rungs([x[-1:] for x in kinds], self.last_hidden, width, name)
            if len(blocks) > 1:
                lower = [x[:-1] for x in kinds]
                more = self._rungs(lower, self.hidden, width, f"{name}_lower")
                sums = [a + b for a, b in zip(sums, more, strict=True)]
            projected[name] = tuple(sums)
        return projected

    def _rungs(
        self, kinds: list[Array], hidden: int, width: int, name: str
    ) -> list[Array]:
        """The sum of an MLP per block, for each kind; their parameters are stacked."""
        count, d = len(kinds[0]), kinds[0].shape[-1]
        normal, zeros = nn.initializers.truncated_normal(0.02), nn.initializers.zeros
        up = self.param(f"{name}_up", normal, (2, count, d, hidden))
        up_bias = self.param(f"{name}_up_bias", zeros, (2, count, hidden))
        down = self.param(f"{name}_down", normal, (2, count, hidden, width))
        down_bias = self.param(f"{name}_down_bias", zeros, (2, width))
        up, up_bias, down = (p.astype(self.dtype) for p in (up, up_bias, down))
        sums = []
        for i, x in enumerate(kinds):
            y = jnp.einsum("l...d,ldh->l...h", x.astype(self.dtype), up[i])
            bias = up_bias[i].reshape(count, *(1,) * (y.ndim - 2), hidden)
            y = nn.gelu(y + bias, approximate=False)
            y = jnp.einsum("l...h,lhw->...w", y, down[i]).astype(jnp.float32)
            sums.append(y + down_bias[i].reshape((1,) * (y.ndim - 1) + (width,)))
        return sums


def _unit(x: Array) -> Array:
    """x / |x|, and 0 with a gradient of 0 where that is below 1e-8."""
    # In units of the largest entry, so that no square overflows or vanishes.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    tiny = largest < 1e-8
    scaled = jnp.where(tiny, 0.0, x) / jnp.where(tiny, 1.0, largest)
    square = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)
    return scaled * jax.lax.rsqrt(jnp.where(tiny, 1.0, square))


def _keep(losses: Array, uniform: Array, drop: float | ArrayLike) -> Array:
    hardest = jnp.argmax(losses, axis=1)[:, None] == jnp.arange(losses.shape[1])[None]
    return hardest | (uniform >= drop)


def _own_rows(key: Array, shape: tuple[int, ...], axis_name: AxisName) -> Array:
    """This device's rows of the random numbers of the whole batch."""
    rows, columns = shape
    whole = jax.random.uniform(key, (rows * axis_size(axis_name), columns))
    start = axis_index(axis_name) * rows
    return jax.lax.dynamic_slice_in_dim(whole, start, rows)


def _losses_example(key: Array):
    losses = jax.random.uniform(key, (8, 3), minval=0.5, maxval=2.0)
    return (losses,), {"key": jax.random.key(1), "where": jnp.arange(8) < 6}


EXAMPLES = {
    token_loss: lambda key: (tuple(jax.random.normal(key, (2, 8, 5, 4))), {}),
    teacher_dropping: lambda key: ((key, jax.random.uniform(key, (8, 3))), {}),
    unic_loss: _losses_example,
}
