"""Contrastive losses of pairs of embeddings: softmax and chi-squared.

    loss, aux = info_nce(za, zb, log_scale=jnp.log(10.0))       # CLIP's; rows are pairs
    loss, aux = info_nce(za, zb, negatives="both_views")        # SimCLR's
    loss, aux = chi_squared_loss(za, zb)

Each is that of the whole batch, also where it is split over devices, none of which ever
holds the logits of all pairs.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxzoo.core.collectives import (
    AxisName,
    Side,
    axis_index,
    masked_rows,
    psum,
    varying,
)
from jaxzoo.core.typed import ArrayLike, check_range, typed
from jaxzoo.nn.pair_log_sums import pair_log_sums

__all__ = ["chi_squared_loss", "info_nce"]

Scale = float | Float[ArrayLike, ""]


@typed
def info_nce(
    za: Float[ArrayLike, "batch width"],
    zb: Float[ArrayLike, "batch width"],
    *,
    log_scale: Scale = 0.0,
    negatives: Literal["other_view", "both_views"] = "other_view",
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The softmax contrastive loss, mean of both directions.

    -1/2n sum_i log softmax_j(s_ij)[i] + log softmax_j(s_ji)[i],
    s_ij = exp(log_scale) <za_i, zb_j>

    Embeddings are used as they come: normalise them before where cosines are meant.
    "other_view" is CLIP's loss, as open_clip computes it for a whole batch;
    "both_views" is SimCLR's NT-Xent, lightly's `NTXentLoss`, in which each of the 2n
    views meets the 2n - 1 others. Over a mesh the columns go round a ring of devices;
    gradients are by reverse mode alone there.

    Args:
        za: embeddings of the first view, one per row; over a mesh this device's.
        zb: embeddings of the second view; row i belongs to row i of `za`.
        log_scale: log of the inverse temperature, below 40; it gets a gradient.
        negatives: which views a view is told from.
        where: True for the pairs that count.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` over which the batch is
            split; None where it is whole.
        chunk: columns per tile of logits, a divisor of a device's rows; None takes all.

    Returns:
        `(loss, aux)` in nats, float32. `aux["per_example"]` is each pair's part,
        `aux["information"]` the bound log n - loss on the mutual information (for
        "both_views" log(2n - 1) - loss).

    Raises:
        TypeError: the two batches or widths differ.
        ValueError: a knob is out of range, or there is no such axis.

    >>> loss, aux = info_nce(jnp.eye(2), jnp.eye(2))
    >>> float(loss), float(aux["information"])
    (0.3133, 0.3799)
    """
    if isinstance(log_scale, float):
        check_range("log_scale", log_scale)
    if chunk is not None:
        check_range("chunk", chunk, low=1)
    za, zb = (masked_rows(x, where) for x in (za, zb))
    mask = jnp.ones(len(za), bool) if where is None else jnp.asarray(where)
    root = varying(jnp.sqrt(_scale(log_scale, za)), axis_name)
    # So that no product overflows; a bound on all logits would cost as much as one.
    za, zb = (jnp.clip(z * root, -1e13, 1e13) for z in (za, zb))
    own = jnp.sum(za * zb, axis=-1)
    both = negatives == "both_views"
    sums = _both_views if both else _other_view
    log_sums = sums(za, zb, where, axis_name, chunk)

    per_example = jnp.where(mask, 0.5 * (log_sums[0] + log_sums[1]) - own, 0.0)
    count = jnp.sum(mask).astype(za.dtype)
    total, count = psum((jnp.sum(per_example), count), axis_name)
    loss = total / jnp.maximum(count, 1)
    others = 2 * count - 1 if both else count
    information = jnp.log(jnp.maximum(others, 1)) - loss
    return loss, {"per_example": per_example, "information": information}


@typed
def chi_squared_loss(
    za: Float[ArrayLike, "batch width"],
    zb: Float[ArrayLike, "batch width"],
    *,
    log_scale: Scale = 0.0,
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The contrastive loss of the chi-squared divergence, mean of both directions.

    -mean_i s_ii + mean_ij s_ij + 1/4 mean_i Var_j(s_ij) + 1/4 mean_j Var_i(s_ij),
    s_ij = exp(log_scale) <za_i, zb_j>

    Scores are linear in each view, so that means and variances over a batch follow from
    its first two moments: no pair is ever formed, and a mesh exchanges width x width
    numbers whatever the batch.

    Args:
        za: embeddings of the first view, one per row; over a mesh this device's.
        zb: embeddings of the second view; row i belongs to row i of `za`.
        log_scale: log of a factor of all scores, below 40; it gets a gradient.
        where: True for the pairs that count.
        axis_name: the axis that the batch is split over; None where it is whole.

    Returns:
        `(loss, aux)`, float32; minus the loss estimates the chi-squared information.
        "alignment" is the mean score of pairs less that of all, "spread" the variances.

    Raises:
        TypeError: the two batches or widths differ.
        ValueError: `log_scale` is NaN, or there is no such axis.

    >>> loss, aux = chi_squared_loss(jnp.eye(2), jnp.eye(2))
    >>> float(loss), float(aux["alignment"]), float(aux["spread"])
    (-0.375, 0.5, 0.125)
    """
    if isinstance(log_scale, float):
        check_range("log_scale", log_scale)
    za, zb = (masked_rows(x, where) for x in (za, zb))
    # Products of four entries: beyond 1e8 they would pass the end of float32.
    scaled = za * varying(_scale(log_scale, za), axis_name)
    za, zb = jnp.clip(scaled, -1e8, 1e8), jnp.clip(zb, -1e8, 1e8)
    mask = jnp.ones(len(za), bool) if where is None else jnp.asarray(where)
    weight = mask.astype(za.dtype)[:, None]
    count = jnp.maximum(psum(jnp.sum(weight), axis_name), 1)

    def mean(x: Array) -> Array:
        return psum(jnp.sum(x * weight, axis=0), axis_name) / count

    means = [mean(za), mean(zb)]
    za, zb = (
        za - varying(means[0], axis_name)[None],
        zb - varying(means[1], axis_name)[None],
    )
    moments = psum([(x * weight).T @ x for x in (za, zb)], axis_name)
    cov_a, cov_b = (m / count for m in moments)
    # A row's scores vary by <za_i, zb_j - mean>: its own place enters by second moment.
    spread = 0.25 * (means[0] @ cov_b @ means[0] + means[1] @ cov_a @ means[1])
    spread += 0.5 * jnp.sum(cov_a * cov_b)
    alignment = jnp.sum(mean(za * zb))
    return spread - alignment, {"alignment": alignment, "spread": spread}


def _scale(log_scale: Any, like: Array) -> Array:
    return jnp.exp(jnp.minimum(jnp.asarray(log_scale, like.dtype), 40.0))


def _logits(rows: Side, columns: Side) -> Array:
    return _without(rows.features @ columns.features.T, rows.tags, columns.tags)


def _gram_logits(rows: Side, columns: Side) -> Array:
    """`_logits` where the columns are the rows: one product fewer in the gradient."""
    return _without(_gram(rows.features), rows.tags, columns.tags)


def _without(logits: Array, rows: dict, columns: dict) -> Array:
    """The logits of pairs that do not count put out of the way."""
    if "where" in columns:
        both = rows["where"][:, None] & columns["where"][None]
        logits = jnp.where(both, logits, -1e30)
    if "view" in rows:  # no view is told from itself
        own = rows["view"][:, None] == columns["view"][None]
        logits = jnp.where(own, -1e30, logits)
    return logits


def _other_view(za, zb, where, axis_name, chunk) -> tuple[Array, Array]:
    tags = {} if where is None else {"where": jnp.asarray(where)}
    knobs = {"axis_name": axis_name, "chunk": chunk}
    return pair_log_sums(_logits, Side(za, tags), Side(zb, tags), **knobs)


def _both_views(za, zb, where, axis_name, chunk) -> tuple[Array, Array]:
    # Of the four blocks of pairs that of (b, a) is that of (a, b), read by columns.
    of_a, of_b = _other_view(za, zb, where, axis_name, chunk)
    own_a, own_b = (_own_view(z, where, axis_name, chunk) for z in (za, zb))
    return jnp.logaddexp(of_a, own_a), jnp.logaddexp(of_b, own_b)


def _own_view(z, where, axis_name, chunk) -> Array:
    views = axis_index(axis_name) * len(z) + jnp.arange(len(z))
    tags = {"view": varying(views, axis_name)}
    if where is not None:
        tags["where"] = jnp.asarray(where)
    whole = axis_name is None and chunk is None
    logits = _gram_logits if whole else _logits
    knobs = {"axis_name": axis_name, "chunk": chunk}
    return pair_log_sums(logits, Side(z, tags), Side(z, tags), **knobs)[0]


@jax.custom_jvp
def _gram(z: Array) -> Array:
    return z @ z.T


@_gram.defjvp
def _gram_jvp(primals: Any, tangents: Any) -> Any:
    (z,), (dz,) = primals, tangents
    half = dz @ z.T  # transposed, (g + g.T) @ z: one product, where z @ z.T gives two
    return _gram(z), half + half.T


def _pair_example(key: Array):
    za, zb = jax.random.normal(key, (2, 16, 8))
    return (za, zb), {"log_scale": jnp.float32(0.3), "where": jnp.arange(16) < 13}


def _info_nce_example(key: Array):
    args, kwargs = _pair_example(key)
    return args, {**kwargs, "negatives": "both_views", "chunk": 2}


EXAMPLES = {info_nce: _info_nce_example, chi_squared_loss: _pair_example}
