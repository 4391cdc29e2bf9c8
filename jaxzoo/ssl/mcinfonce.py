"""MCInfoNCE: contrastive learning of posteriors on the sphere, not of points.

    encoder   q(z|x) = vMF(mean(x), kappa(x)), a von Mises-Fisher distribution
    loss      -log mean_k exp(c z_k.z_k+) / (exp(c z_k.z_k+) + mean_m exp(c z_k.z_km-))

Samples z, z+ and z- come from the posteriors of an input, of its positive and of the
negatives. Where inputs are ambiguous, kappa(x) finds how much.

    z = sample_vmf(first_key, mean, kappa, num_samples=16)              # [B, 16, d]
    other = sample_vmf(second_key, other_mean, other_kappa, num_samples=16)
    loss, aux = mcinfonce(z, other, concentration=20.0)

Directions are scaled to unit length wherever they come in; a zero vector stays zero.
Everything is in nats. `vmf_log_prob` and `log_bessel` hold for concentrations from 0 to
1e30 and any dimension, where a quotient of Bessel functions overflows at 90.
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jaxzoo.core.collectives import AxisName, all_gather, axis_index, axis_size, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "mcinfonce",
    "title": "Probabilistic Contrastive Learning Recovers the Correct Aleatoric "
    "Uncertainty of Ambiguous Inputs",
    "arxiv": "2302.02865",
    "year": 2023,
    "authors": "Michael Kirchhof, Enkelejda Kasneci, Seong Joon Oh",
    "where": "Section 3 (generative process, MCInfoNCE), section 4.1 (controlled "
    "experiment) and 4.4 (credible intervals for retrieval).",
    "differs": "The released code weighs the negatives by 1/M and the positive by 1, "
    "the paper both by 1/(M+1): `convention`. Negatives are the other rows of the "
    "batch unless given. Gradients of the samples to the concentration are exact "
    "(implicit); the released code drops the term of the rejection.",
}

__all__ = [
    "credible_retrieval",
    "log_bessel",
    "mcinfonce",
    "sample_vmf",
    "vmf_log_prob",
]

DEBYE_FROM = 15.0  # where the expansion for large arguments reaches float32
NODES = 24  # of the integral in the gradient of a sample
TINY = 1e-20


@typed
def mcinfonce(
    z: Float[ArrayLike, "batch samples d"],
    positive: Float[ArrayLike, "batch samples d"],
    negative: Float[ArrayLike, "batch negatives samples d"] | None = None,
    *,
    concentration: Float[ArrayLike, ""] | float = 16.0,
    convention: Literal["official", "paper"] = "official",
    where: Bool[ArrayLike, " batch"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """InfoNCE of posterior samples, averaged inside the logarithm.

    per example  -log mean_k exp(c p_k) / (v exp(c p_k) + w sum_m exp(c n_km))

    p_k and n_km are the cosines of sample k with those of the positive and the
    negatives. "official": v = 1, w = 1/M, the released code; "paper": v = w = 1/(M+1),
    whose value lies below 0 where the positives stand out.

    Args:
        z: samples of each row's posterior; scaled to unit length here.
        positive: samples of its positive's posterior, likewise.
        negative: samples of M negatives per row; None takes the positives of all other
            rows that count, those of other devices among them.
        concentration: c, the positives' concentration around each other in the latent
            space; a number or a learned scalar.
        convention: see above.
        where: True for the rows that count, as rows and as negatives; masked rows may
            hold anything. With none at all the loss is 0.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` that the batch is split
            over; None where arrays are whole.

    Returns:
        `(loss, aux)`: float32 scalar in nats; `aux["per_example"]` and
        `aux["positive_cosine"]`, the mean p_k, per row.

    Raises:
        TypeError: shapes do not fit; names the argument.
        ValueError: there is one row and no negative, or no such axis.

    >>> z = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    >>> loss, aux = mcinfonce(z, z, concentration=1.0)
    >>> float(loss), aux["positive_cosine"].tolist()
    (0.3133, [1.0, 1.0])
    """
    if not isinstance(concentration, jax.Array):
        check_range("concentration", float(concentration), low=0)
    rows = z.shape[0]
    if negative is None and rows * axis_size(axis_name) < 2:
        raise ValueError(
            "argument 'z' has 1 row, expected 2 or more where no 'negative' is given: "
            "the other rows are the negatives."
        )
    counts = jnp.ones(rows, bool) if where is None else jnp.asarray(where)
    z, positive = _rows(z, counts), _rows(positive, counts)
    cosine = jnp.sum(z * positive, axis=-1)  # [B, K]
    if negative is None:
        pool, known = all_gather(positive, axis_name), all_gather(counts, axis_name)
        own = axis_index(axis_name) * rows + jnp.arange(rows)
        valid = known[None, :] & (jnp.arange(len(known))[None, :] != own[:, None])
        others = jnp.einsum("bkd,nkd->bkn", z, pool)
    else:
        valid = jnp.ones(negative.shape[:2], bool)
        others = jnp.einsum("bkd,bmkd->bkm", z, _rows(negative, counts))
    scale = as_float32(concentration)
    total = jnp.maximum(jnp.sum(valid, axis=1), 1)[:, None].astype(z.dtype)
    logits = jnp.where(valid[:, None, :], scale * others, -jnp.inf)
    if convention == "official":
        logits = logits - jnp.log(total)[:, :, None]
    top = scale * cosine
    both = jnp.concatenate([top[..., None], logits], axis=-1)
    ratio = top - jax.nn.logsumexp(both, axis=-1)
    if convention == "paper":
        ratio = ratio + jnp.log1p(total)
    samples = z.shape[1]
    per_example = math.log(samples) - jax.nn.logsumexp(ratio, axis=1)
    per_example = jnp.where(counts, per_example, 0.0)
    count = jnp.maximum(psum(jnp.sum(counts), axis_name), 1).astype(z.dtype)
    loss = psum(jnp.sum(per_example), axis_name) / count
    aux = {"per_example": per_example, "positive_cosine": jnp.mean(cosine, axis=1)}
    return loss, jax.lax.stop_gradient(aux)


@typed
def sample_vmf(
    key: Key[Array, ""],
    mean: Float[ArrayLike, "*batch d"],
    concentration: Float[ArrayLike, "*batch"],
    *,
    num_samples: int = 16,
) -> Float[Array, "*batch num_samples d"]:
    """Draws from von Mises-Fisher distributions, by Wood's rejection.

    z = w mean + sqrt(1 - w^2) v, with v uniform among the directions at right angles to
    the mean, and w of density proportional to (1 - w^2)^((d-3)/2) exp(kappa w).

    Gradient: unbiased for expectations. To the mean it is that of the formula; to the
    concentration it is implicit, dw/dkappa = -(dF/dkappa) / (dF/dw) of w's distribution
    function F. The derivative of Wood's proposal alone misses what rejection does.

    Args:
        key: a typed key, consumed.
        mean: mean directions, d of 2 or more; scaled to unit length here.
        concentration: kappa >= 0; 0 is the uniform distribution.
        num_samples: K.

    Returns:
        Unit vectors, `[*batch, K, d]`.

    Raises:
        ValueError: d is below 2, or `num_samples` below 1.

    >>> mean = jnp.array([1.0, 0.0, 0.0])
    >>> z = sample_vmf(jax.random.key(0), mean, jnp.float32(100.0), num_samples=1000)
    >>> z.shape, float(z[:, 0].mean())
    ((1000, 3), 0.99)
    """
    check_range("num_samples", num_samples, low=1)
    d = _dimension("mean", mean)
    mean, kappa = _unit(as_float32(mean))[..., None, :], as_float32(concentration)
    shape = (*kappa.shape, num_samples)
    kappa = jnp.broadcast_to(jnp.maximum(kappa, 0.0)[..., None], shape)
    radial_key, tangent_key = jax.random.split(key)
    below = _moved(_wood(radial_key, jax.lax.stop_gradient(kappa), d), kappa, d)
    noise = jax.random.normal(tangent_key, (*shape, d), kappa.dtype)
    mean = jnp.broadcast_to(mean, noise.shape)
    # Twice: what the first round leaves along the mean counts where it leaves little.
    tangent = _across(_across(noise, mean), mean)
    # below = 1 - w: near the mean, w itself has no digits left for it.
    along, across = 1.0 - below, jnp.sqrt(jnp.maximum(below * (2.0 - below), 1e-36))
    return along[..., None] * mean + across[..., None] * tangent


@typed
def vmf_log_prob(
    x: Float[ArrayLike, "*batch d"],
    mean: Float[ArrayLike, "*batch d"],
    concentration: Float[ArrayLike, "*batch"],
) -> Float[Array, "*batch"]:
    """Log-density of a von Mises-Fisher distribution on the unit sphere.

    log C(kappa) + kappa mean.x,
    C(kappa) = kappa^(d/2-1) / ((2 pi)^(d/2) I_(d/2-1)(kappa))

    Args:
        x: points, d of 2 or more; scaled to unit length here.
        mean: mean directions, likewise.
        concentration: kappa >= 0; 0 is the uniform distribution.

    Returns:
        float32, in nats per unit of area of the sphere.

    Raises:
        TypeError: shapes do not fit; names the argument.
        ValueError: d is below 2.

    >>> x = jnp.array([0.0, 0.0, 1.0])
    >>> float(vmf_log_prob(x, x, jnp.float32(0.0)))  # -log(4 pi)
    -2.531
    """
    d = _dimension("x", x)
    x, mean = _unit(as_float32(x)), _unit(as_float32(mean))
    kappa = jnp.maximum(as_float32(concentration), 0.0)
    # kappa (mean.x - 1), without the rounding of a cosine near 1.
    distance = -0.5 * kappa * jnp.sum(jnp.square(x - mean), axis=-1)
    return distance - 0.5 * d * math.log(2 * math.pi) - _log_scaled(kappa, d / 2 - 1)


@typed
def log_bessel(x: Float[ArrayLike, "..."], *, order: float) -> Float[Array, "..."]:
    """Log of the modified Bessel function of the first kind, log I_order(x).

    The power series for small x and order, Debye's uniform expansion elsewhere; the
    error is that of float32 in its terms, which are about as large as x and `order`.

    Args:
        x: arguments >= 0; below 1e-20 they count as 1e-20, where the logarithm of a
            positive order would leave the numbers.
        order: >= 0, for instance d/2 - 1.

    Returns:
        float32, shaped like `x`.

    Raises:
        ValueError: `order` is negative.

    >>> log_bessel(jnp.array([1.0, 1000.0]), order=0.0).tolist()
    [0.2359, 995.6]
    """
    check_range("order", order, low=0, high=1e9)
    x = jnp.maximum(as_float32(x), TINY)
    return _log_scaled(x, order) + x + order * jnp.log(x)


@typed
def credible_retrieval(
    samples: Float[ArrayLike, "queries samples d"],
    mean: Float[ArrayLike, "queries d"],
    database: Float[ArrayLike, "entries d"],
    *,
    level: float = 0.95,
) -> Bool[Array, "queries entries"]:
    """Which entries lie in the credible region of each query's posterior.

    The region is the cap around the mean that holds `level` of the samples: entry n is
    retrieved where mean.n >= the (1 - level) quantile of mean.z_k.

    Args:
        samples: posterior samples of each query; scaled to unit length here.
        mean: mean direction of each query, likewise.
        database: means of the entries to retrieve from, likewise.
        level: probability of the region, in [0, 1].

    Returns:
        One bool per query and entry.

    Raises:
        TypeError: shapes do not fit; names the argument.
        ValueError: `level` is out of range.

    >>> mean, entries = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.1], [0.0, 1.0]])
    >>> samples = jnp.array([[[1.0, 0.2], [1.0, -0.2]]])
    >>> credible_retrieval(samples, mean, entries).tolist()
    [[True, False]]
    """
    check_range("level", level, low=0, high=1)
    samples, mean, database = (
        _unit(as_float32(value)) for value in (samples, mean, database)
    )
    cosine = jnp.sum(samples * mean[:, None, :], axis=-1)
    edge = jnp.quantile(cosine, 1.0 - level, axis=1)
    return mean @ database.T >= edge[:, None]


def _rows(x: ArrayLike, counts: Array) -> Array:
    """Unit vectors, zero where the row does not count."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    return _unit(jnp.where(counts.reshape(shape), as_float32(x), 0.0))


def _across(x: Array, mean: Array) -> Array:
    """The direction of `x` at right angles to a unit vector."""
    return _unit(x - jnp.sum(x * mean, axis=-1, keepdims=True) * mean)


def _unit(x: Array) -> Array:
    # The length does not matter: to divide by the largest entry first saves squares
    # that leave the numbers, and asks for no gradient.
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    x = x / jnp.where(top > 0, top, 1.0)
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(square > 0, square, 1.0))


def _dimension(name: str, x: ArrayLike) -> int:
    if x.shape[-1] < 2:
        raise ValueError(
            f"argument '{name}' has dimension {x.shape[-1]}, expected 2 or more: a "
            "sphere of directions."
        )
    return x.shape[-1]


def _hypot(x: Array, y: float) -> Array:
    """sqrt(x^2 + y^2) whose squares stay in range, also in the gradient."""
    large, small = jnp.maximum(x, y), jnp.minimum(x, y)
    large = jnp.maximum(large, TINY)
    return large * jnp.sqrt(1.0 + jnp.square(small / large))


def _log_scaled(x: Array, order: float) -> Array:
    """log(I_order(x) exp(-x) x^-order): smooth at 0, and its slope is exact at 1e30."""
    p = _hypot(x, order)
    if order < DEBYE_FROM:
        p = jnp.maximum(p, DEBYE_FROM)
    q, inverse = jnp.square(order / p), 1.0 / p
    terms = (
        (3 - 5 * q) / 24,
        (81 + q * (-462 + q * 385)) / 1152,
        (30375 + q * (-369603 + q * (765765 - q * 425425))) / 414720,
        (4465125 + q * (-94121676 + q * (349922430 + q * (-446185740 + q * 185910725))))
        / 39813120,
    )
    series = inverse * (
        terms[0] + inverse * (terms[1] + inverse * (terms[2] + inverse * terms[3]))
    )
    large = jnp.log1p(series) - 0.5 * jnp.log(2 * math.pi * p)
    if order > 0:
        large += order * (order / (p + x)) - order * jnp.log(order + p)
    if order >= DEBYE_FROM:
        return large
    small_x = jnp.minimum(x, DEBYE_FROM)
    small = jnp.log(_power_series(jnp.square(small_x / DEBYE_FROM), order)) - small_x
    small -= order * math.log(2.0) + math.lgamma(order + 1.0)
    return jnp.where(_hypot(x, order) < DEBYE_FROM, small, large)


def _power_series(y: Array, order: float) -> Array:
    """sum_k (x^2/4)^k / (k! (order+1)_k), with x^2 = y DEBYE_FROM^2 and y <= 1."""
    coefficients = [1.0]
    for k in range(1, 30):
        ratio = DEBYE_FROM**2 / 4 / (k * (k + order))
        coefficients.append(coefficients[-1] * ratio)
    total = jnp.zeros_like(y)
    for coefficient in reversed(coefficients):
        total = total * y + coefficient
    return total


def _wood(key: Array, kappa: Array, d: int) -> Array:
    """Draws of 1 - w, one for each concentration."""
    b = (d - 1) / (2 * kappa + _hypot(2 * kappa, float(d - 1)))
    edge = 2 * b / (1 + b)  # 1 - x0 in Wood's letters

    def body(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        turn, below, done = carry
        keys = jax.random.split(jax.random.fold_in(key, turn), 3)
        radius, angle, chance = (
            jax.random.uniform(k, kappa.shape, kappa.dtype, minval=TINY) for k in keys
        )
        # Ulrich's beta((d-1)/2, (d-1)/2) from two uniform draws.
        radius = jnp.sqrt(1 - radius ** (2 / (d - 2))) if d > 2 else 1.0
        beta = 0.5 * (1 + radius * jnp.cos(2 * math.pi * angle))
        new = 2 * b * beta / (1 - (1 - b) * beta)
        share = (edge + (1 - edge) * new) / (edge * (2 - edge))
        accepted = kappa * (edge - new) + (d - 1) * jnp.log(share) >= jnp.log(chance)
        below = jnp.where(~done & accepted, new, below)
        return turn + 1, below, done | accepted

    start = (jnp.int32(0), jnp.zeros_like(kappa), kappa < 0)
    _, below, _ = jax.lax.while_loop(lambda c: ~jnp.all(c[2]), body, start)
    return below


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _moved(below: Array, kappa: Array, d: int) -> Array:
    """`below`, which was drawn for `kappa` and follows it where it moves."""
    return below


@_moved.defjvp
def _moved_jvp(d: int, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """The tail of w's distribution: d(1 - w)/dkappa = -(dU/dkappa) / f(w), U = 1 - F.

    dU/dkappa is the integral over t from w to 1 of (t - E[w]) f(t). With
    t = 1 - (1 - w) u^2 the integrand is a polynomial times a smooth function for every
    d, and u in [0, 1] for every kappa: Gauss and Legendre's nodes do.
    """
    below, kappa = primals
    _, slope = jax.jvp(
        lambda k: _log_scaled(k, d / 2 - 1), (kappa,), (jnp.ones_like(kappa),)
    )  # E[w] - 1
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    total = jnp.zeros_like(below)
    for u, weight in zip(0.5 + 0.5 * nodes, weights, strict=True):
        share = (2 - below * u * u) / jnp.maximum(2 - below, 1e-6)
        density = kappa * below * (1 - u * u) + 0.5 * (d - 3) * jnp.log(share)
        total += (weight * u ** (d - 2)) * (-slope - below * u * u) * jnp.exp(density)
    # At kappa = 0 it is (1 - w^2) / (d - 1); twice that is never reached.
    rate = jnp.clip(below * total, 0.0, 2 * below * (2 - below) / (d - 1))
    return below, -rate * tangents[1]


def _samples_example(key: Array):
    z, noise = jax.random.normal(key, (2, 8, 3, 4))
    return (z, z + 0.5 * noise), {"concentration": 4.0, "where": jnp.arange(8) < 6}


def _vmf_example(key: Array):
    x, mean = jax.random.normal(key, (2, 8, 4))
    return (x, mean, 1.0 + 4.0 * jnp.abs(x[:, 0])), {}


def _sample_example(key: Array):
    _, mean, concentration = _vmf_example(key)[0]
    return (key, mean, concentration), {"num_samples": 3}


def _retrieval_example(key: Array):
    samples = jax.random.normal(key, (8, 5, 4))
    return (samples, jnp.mean(samples, axis=1), samples[:, 0]), {}


EXAMPLES = {
    mcinfonce: _samples_example,
    sample_vmf: _sample_example,
    vmf_log_prob: _vmf_example,
    log_bessel: lambda key: (
        (jnp.exp(2.0 * jax.random.normal(key, (8,))),),
        {"order": 1.5},
    ),
    credible_retrieval: _retrieval_example,
}
