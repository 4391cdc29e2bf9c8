"""A trained VAE's latent space as a Riemannian manifold: sample it, and walk in it.

    G(z) = sum_i S_i^-1 exp(-(z - m_i)^T S_i^-1 (z - m_i) / rho^2)
           + regularizer exp(-tau ||z||^2) I

m_i and S_i = diag(exp(2 log_std_i)) are what the encoder says of a few training points.
No training is needed: the density proportional to sqrt(det G(z)), uniform on the
manifold, takes the place of the prior N(0, I).

    mean, log_std = encode(params, x_train)                       # [N, D] each
    index = k_medoids(mean, num_medoids=100)         # of jaxzoo.core.medoids
    chart = mean[index], log_std[index]
    rho = bandwidth(chart[0])
    z, aux = hmc(key, lambda z: log_volume(z, *chart, rho=rho), start)  # of core.mcmc
    images = decode(params, z)

`start` are training means drawn at random; the defaults of `hmc` are those of the
released code. With tau = 0 the density has no finite
integral: chains are short and stay where the data is, or tau is above 0.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from jaxzoo.core.medoids import distances
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "geometric_vae",
    "title": "A Geometric Perspective on Variational Autoencoders",
    "arxiv": "2209.07370",
    "year": 2022,
    "authors": "Clément Chadebec, Stéphanie Allassonnière",
    "where": "Sections 3 and 4: the metric of encoder means and covariances, sampling "
    "of the uniform density by HMC, interpolation by energy minimisation.",
    "differs": "The metric, the choice of centroids (k-medoids that alternate, from "
    "the most central points), rho and tau = 0 are those of the released code, which "
    "leaves the last centroid out of rho; here it is in. That code's HMC draws momenta "
    "of standard deviation 0.5 but weighs them as of 1, and its force lacks the factor "
    "0.5 of the square root: here both are those of the density. The released code has "
    "no geodesics; here they minimise the energy of a discretised curve under the "
    "inverse metric, which is small where the data is, or under G. Covariances are "
    "diagonal. The experiment trains on 500 digits of 8x8 pixels with a Bernoulli "
    "likelihood, where the paper has images from MNIST to CelebA and squared error, "
    "and compares by MMD where the paper reports FID. There the claim fails: samples "
    "of the uniform density are further from held-out digits than those of N(0, I) "
    "(squared MMD 0.13 and 0.012), with chains as in the released code and further "
    "still with longer steps (0.19), for 8 latents and, tried once, for 2 (0.069 and "
    "0.033): chains gather where many centroids' terms add up, and digits blur.",
}

__all__ = ["bandwidth", "curve_energy", "geodesic", "latent_metric", "log_volume"]

LARGEST = 1e18  # its square is a float32, as are sums of a few
LARGEST_LOG_STD = 20.0

Rows = Float[ArrayLike, "centroids latents"]
Width = float | Float[ArrayLike, ""]


@typed
def latent_metric(
    z: Float[ArrayLike, "batch latents"],
    centroids: Rows,
    log_std: Rows,
    *,
    rho: Width,
    regularizer: float = 1e-2,
    tau: float = 0.0,
) -> Float[Array, "batch latents latents"]:
    """The metric G(z) of this file's head, a positive definite matrix per point.

    Args:
        z: points, `[B, D]`.
        centroids: encoder means m_i of the chosen training points, `[K, D]`.
        log_std: their log standard deviations; S_i = diag(exp(2 log_std_i)). Beyond
            20 in size they count as 20.
        rho: width of a centroid's influence, > 0, in units of its standard deviations;
            `bandwidth(centroids)` is the released code's.
        regularizer: lambda of the paper, > 0; the released code has 0.01 for MNIST.
        tau: >= 0; above 0 the manifold's volume is finite.

    Returns:
        `[B, D, D]`, diagonal, since the covariances are; float32.

    Raises:
        ValueError: a number is out of range.

    >>> z, centroid, log_std = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.zeros((1, 1))
    >>> latent_metric(z, centroid, log_std, rho=1.0).tolist()  # exp(-1) + 0.01
    [[[0.3779]]]
    """
    log_diagonal = _log_diagonal(z, centroids, log_std, rho, regularizer, tau)
    return jax.vmap(jnp.diag)(jnp.exp(log_diagonal))


@typed
def log_volume(
    z: Float[ArrayLike, "batch latents"],
    centroids: Rows,
    log_std: Rows,
    *,
    rho: Width,
    regularizer: float = 1e-2,
    tau: float = 0.0,
) -> Float[Array, " batch"]:
    """log sqrt(det G(z)) = 1/2 sum_d log G(z)_dd: the log of the uniform density.

    Args:
        z: points, `[B, D]`.
        centroids: as in `latent_metric`, as are all arguments and errors.
        log_std: `[K, D]`.
        rho: > 0.
        regularizer: > 0.
        tau: >= 0.

    Returns:
        Nats per point, float32.

    >>> z, centroid, log_std = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.zeros((1, 1))
    >>> log_volume(z, centroid, log_std, rho=1.0).tolist()
    [-0.4866]
    """
    log_diagonal = _log_diagonal(z, centroids, log_std, rho, regularizer, tau)
    return 0.5 * jnp.sum(log_diagonal, axis=1)


@typed
def bandwidth(centroids: Float[ArrayLike, "centroids latents"]) -> Float[Array, ""]:
    """rho as in the released code: max_i min_{j != i} ||m_i - m_j||.

    Args:
        centroids: two or more, `[K, D]`.

    Returns:
        float32 scalar, in units of `centroids`.

    Raises:
        ValueError: there are fewer than two centroids.

    >>> float(bandwidth(jnp.array([[0.0], [1.0], [5.0]])))
    4.0
    """
    check_range("centroids.shape[0]", centroids.shape[0], low=2)
    distance = distances(centroids, centroids)
    itself = jnp.eye(len(distance), dtype=bool)
    return jnp.max(jnp.min(jnp.where(itself, jnp.inf, distance), axis=1))


@typed
def curve_energy(
    curve: Float[ArrayLike, "batch points latents"],
    centroids: Rows,
    log_std: Rows,
    *,
    rho: Width,
    regularizer: float = 1e-2,
    tau: float = 0.0,
    metric: Literal["inverse", "latent"] = "inverse",
) -> Float[Array, " batch"]:
    """Energy of curves given by points at equal times from 0 to 1.

    (T - 1) / 2 sum_t d_t^T M(z_t) d_t,   d_t between neighbours, z_t their middle,
    with M = G^-1 ("inverse"), small where the data is, or M = G ("latent")

    Args:
        curve: T >= 2 points of each curve, `[B, T, D]`. Differences count up to 1e8.
        centroids: as in `latent_metric`, as are the arguments down to `tau`.
        log_std: `[K, D]`.
        rho: > 0.
        regularizer: > 0.
        tau: >= 0.
        metric: M; short curves pass through the data ("inverse") or go round it.

    Returns:
        Energy per curve, float32. Entries of log M count up to 40 in size.

    Raises:
        ValueError: a number is out of range, or a curve has one point.

    >>> line = jnp.array([[[0.0], [1.0], [2.0]]])
    >>> far, log_std = jnp.full((1, 1), 1e3), jnp.zeros((1, 1))  # there G = 0.01 I
    >>> curve_energy(line, far, log_std, rho=1.0).tolist()  # 2 / 2 * 2 * 1 / 0.01
    [200.0]
    """
    check_range("curve.shape[1]", curve.shape[1], low=2)
    curve = as_float32(curve)
    step = jnp.clip(curve[:, 1:] - curve[:, :-1], -1e8, 1e8)
    middle = 0.5 * curve[:, 1:] + 0.5 * curve[:, :-1]
    log_diagonal = _log_diagonal(
        middle.reshape(-1, curve.shape[2]), centroids, log_std, rho, regularizer, tau
    )
    sign = -1.0 if metric == "inverse" else 1.0
    weight = jnp.exp(jnp.clip(sign * log_diagonal, -40.0, 40.0)).reshape(step.shape)
    return 0.5 * step.shape[1] * jnp.sum(weight * jnp.square(step), axis=(1, 2))


@typed
def geodesic(
    energy: Callable[[Array], Array],
    start: Float[ArrayLike, "batch latents"],
    end: Float[ArrayLike, "batch latents"],
    *,
    num_points: int = 16,
    num_steps: int = 200,
    learning_rate: float = 0.01,
) -> tuple[Float[Array, "batch num_points latents"], dict[str, Array]]:
    """Curves of least energy between pairs of points, by Adam from the straight line.

    Args:
        energy: of curves, `[B, T, D]` to `[B]`, such as `curve_energy` of a chart.
        start: first points, `[B, D]`.
        end: last points, likewise.
        num_points: T, >= 3.
        num_steps: of Adam, >= 1; the rate falls to 0.
        learning_rate: of Adam, > 0, in units of the distance from start to end.

    Returns:
        `(curve, aux)`: `[B, T, D]`; aux holds "energy" and "straight_energy", `[B]`,
        the first never above the second.

    Raises:
        ValueError: a number is out of range.

    Gradient: that of the straight line; how far the curve leaves it is a constant.

    >>> def energy(curve):  # of flat space
    ...     return jnp.sum(jnp.square(curve[:, 1:] - curve[:, :-1]), axis=(1, 2))
    >>> curve, _ = geodesic(energy, jnp.zeros((1, 2)), jnp.ones((1, 2)), num_points=3)
    >>> curve.tolist()
    [[[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]]
    """
    check_range("num_points", num_points, low=3)
    check_range("num_steps", num_steps, low=1)
    check_range("learning_rate", learning_rate, above=0.0)
    start, end = as_float32(start), as_float32(end)
    time = jnp.linspace(0.0, 1.0, num_points, dtype=start.dtype)[None, :, None]
    line = (1.0 - time) * start[:, None] + time * end[:, None]
    straight = lax.stop_gradient(line)
    length = jnp.max(jnp.abs(straight[:, -1:] - straight[:, :1]), axis=2, keepdims=True)

    def of(inner: Array) -> Array:
        # Ends stay; distances in units of that between them, energies in units of the
        # straight line's, so that one rate serves every scale.
        leave = jnp.pad(length * inner, ((0, 0), (1, 1), (0, 0)))
        return energy(straight + leave)

    inner = jnp.zeros_like(straight[:, 1:-1])
    before = of(inner)
    unit = jnp.where(before > 0.0, before, 1.0)
    rate = optax.cosine_decay_schedule(learning_rate, num_steps)
    optimizer = optax.adam(rate, eps=1e-3)

    def step(carry: Any, _: None) -> Any:
        inner, state = carry
        slope = jax.grad(lambda x: jnp.sum(of(x) / unit))(inner)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(inner, updates), state), None

    (inner, _), _ = lax.scan(step, (inner, optimizer.init(inner)), None, num_steps)
    after = of(inner)
    inner = jnp.where((after < before)[:, None, None], length * inner, 0.0)
    aux = {"energy": jnp.minimum(after, before), "straight_energy": before}
    # What the energy depends on is given, like a chart of a trained encoder.
    inner, aux = lax.stop_gradient((inner, aux))
    return line + jnp.pad(inner, ((0, 0), (1, 1), (0, 0))), aux


def _log_diagonal(
    z: Any, centroids: Any, log_std: Any, rho: Any, regularizer: float, tau: float
) -> Array:
    """log G(z)_dd, `[B, D]`."""
    check_range("rho", rho, above=0.0)
    check_range("regularizer", regularizer, above=0.0)
    check_range("tau", tau, low=0.0)
    z, centroids, log_std = as_float32(z), as_float32(centroids), as_float32(log_std)
    # The limits keep every square and every product in the gradient a float32.
    log_std = jnp.clip(log_std, -LARGEST_LOG_STD, LARGEST_LOG_STD)
    shift = jnp.clip(z[:, None] - centroids[None], -LARGEST, LARGEST)
    shift = jnp.clip(shift * jnp.exp(-log_std)[None] / rho, -LARGEST, LARGEST)
    log_weight = -jnp.sum(jnp.square(shift), axis=2)
    terms = -2.0 * log_std[None] + log_weight[:, :, None]
    norm = jnp.sum(jnp.square(jnp.clip(z, -LARGEST, LARGEST)), axis=1)
    floor = (math.log(regularizer) - tau * norm)[:, None]
    return jnp.logaddexp(logsumexp(terms, axis=1), jnp.broadcast_to(floor, z.shape))


def _example(key: Array, *shape: int):
    """Points or curves of that shape, with 5 centroids and their log_std."""
    centroids, log_std = jax.random.normal(key, (2, 5, 3))
    points = jax.random.normal(jax.random.fold_in(key, 1), shape)
    return (points, centroids, 0.3 * log_std), {"rho": 1.5, "tau": 0.1}


def _energy(curve: Array) -> Array:
    (_, *chart), knobs = _example(jax.random.key(1), 1)
    return curve_energy(curve, *chart, **knobs)


EXAMPLES = {
    bandwidth: lambda key: ((jax.random.normal(key, (8, 3)),), {}),
    curve_energy: lambda key: _example(key, 8, 4, 3),
    geodesic: lambda key: (
        (_energy, *jax.random.normal(key, (2, 8, 3))),
        {"num_points": 4, "num_steps": 3},
    ),
    latent_metric: lambda key: _example(key, 8, 3),
    log_volume: lambda key: _example(key, 8, 3),
}
