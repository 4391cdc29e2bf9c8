"""A trained VAE's latent space as a Riemannian manifold: sample it, and walk in it.

    G(z) = sum_i S_i^-1 exp(-(z - m_i)^T S_i^-1 (z - m_i) / rho^2)
           + regularizer exp(-tau ||z||^2) I

m_i and S_i = diag(exp(2 log_std_i)) are what the encoder says of a few training points.
No training is needed: the density proportional to sqrt(det G(z)), uniform on the
manifold, takes the place of the prior N(0, I).

    mean, log_std = encode(params, x_train)                       # [N, D] each
    index = choose_centroids(mean, num_centroids=100)
    centroids, log_std = mean[index], log_std[index]
    rho = bandwidth(centroids)
    z, aux = sample_uniform(key, start, centroids, log_std, rho=rho)
    images = decode(params, z)

`start` are training means drawn at random. With tau = 0 the density has no finite
integral: chains are short and stay where the data is, or tau is above 0.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, Key

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

__all__ = [
    "bandwidth",
    "choose_centroids",
    "curve_energy",
    "geodesic",
    "latent_metric",
    "log_volume",
    "sample_uniform",
]

LARGEST = 1e18  # its square is a float32, as are sums of a few
LARGEST_LOG_STD = 20.0


@typed
def latent_metric(
    z: Float[ArrayLike, "batch latents"],
    centroids: Float[ArrayLike, "centroids latents"],
    log_std: Float[ArrayLike, "centroids latents"],
    *,
    rho: float | Float[ArrayLike, ""],
    regularizer: float = 1e-2,
    tau: float = 0.0,
) -> Float[Array, "batch latents latents"]:
    """The metric G(z), a positive definite matrix per point.

    G(z) = sum_i S_i^-1 exp(-||z - m_i||^2_{S_i^-1} / rho^2)
           + regularizer exp(-tau ||z||^2) I

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
    centroids: Float[ArrayLike, "centroids latents"],
    log_std: Float[ArrayLike, "centroids latents"],
    *,
    rho: float | Float[ArrayLike, ""],
    regularizer: float = 1e-2,
    tau: float = 0.0,
) -> Float[Array, " batch"]:
    """Log of sqrt(det G(z)): the uniform density's logarithm, up to a constant.

    1/2 sum_d log G(z)_dd, in log-space

    Args:
        z: points, `[B, D]`.
        centroids: as in `latent_metric`.
        log_std: likewise.
        rho: likewise, > 0.
        regularizer: likewise, > 0.
        tau: likewise, >= 0.

    Returns:
        Nats per point, float32.

    Raises:
        ValueError: a number is out of range.

    >>> z, centroid, log_std = jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.zeros((1, 1))
    >>> log_volume(z, centroid, log_std, rho=1.0).tolist()
    [-0.4866]
    """
    log_diagonal = _log_diagonal(z, centroids, log_std, rho, regularizer, tau)
    return 0.5 * jnp.sum(log_diagonal, axis=1)


@typed
def choose_centroids(
    mean: Float[ArrayLike, "examples latents"], *, num_centroids: int = 100
) -> Int[Array, " num_centroids"]:
    """Which points stand for all of them: k-medoids, without random numbers.

    It starts at the points with the smallest sum of distances to all others. Then in
    turn each point joins its nearest medoid, and each cluster's member with the
    smallest sum of distances to the others becomes its medoid, until none changes.

    Args:
        mean: encoder means, `[N, D]`; memory is N^2.
        num_centroids: K of the metric, 1..N.

    Returns:
        K indices into `mean`.

    Raises:
        ValueError: `num_centroids` is not in 1..N.

    >>> mean = jnp.array([[0.0], [1.0], [2.0], [9.0], [10.0], [11.0]])
    >>> sorted(choose_centroids(mean, num_centroids=2).tolist())
    [1, 4]
    """
    check_range("num_centroids", num_centroids, low=1, high=mean.shape[0])
    mean = as_float32(mean)
    distance = _distances(mean)

    def nearer(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        medoids, _ = carry
        belongs = jnp.argmin(distance[:, medoids], axis=1)
        member = belongs[:, None] == jnp.arange(num_centroids)[None]
        cost = jnp.where(member, distance @ member.astype(mean.dtype), jnp.inf)
        best = jnp.argmin(cost, axis=0)
        columns = jnp.arange(num_centroids)
        better = cost[best, columns] < cost[medoids, columns]
        return jnp.where(better, best, medoids), jnp.any(better)

    start = jnp.argsort(jnp.sum(distance, axis=1))[:num_centroids]
    return lax.while_loop(lambda carry: carry[1], nearer, (start, jnp.array(True)))[0]


@typed
def bandwidth(centroids: Float[ArrayLike, "centroids latents"]) -> Float[Array, ""]:
    """rho as in the released code: the largest distance to a nearest neighbour.

    max_i min_{j != i} ||m_i - m_j||

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
    distance = _distances(as_float32(centroids))
    itself = jnp.eye(len(distance), dtype=bool)
    return jnp.max(jnp.min(jnp.where(itself, jnp.inf, distance), axis=1))


@typed
def sample_uniform(
    key: Key[Array, ""],
    start: Float[ArrayLike, "batch latents"],
    centroids: Float[ArrayLike, "centroids latents"],
    log_std: Float[ArrayLike, "centroids latents"],
    *,
    rho: float | Float[ArrayLike, ""],
    regularizer: float = 1e-2,
    tau: float = 0.0,
    num_steps: int = 100,
    num_leapfrog: int = 10,
    step_size: float = 0.01,
) -> tuple[Float[Array, "batch latents"], dict[str, Array]]:
    """Hamiltonian Monte Carlo on the uniform density of the manifold.

    p(z) proportional to sqrt(det G(z)); momenta N(0, I); a proposal is accepted with
    probability min(1, exp(H_old - H_new)), H = -log_volume(z) + ||momentum||^2 / 2

    Args:
        key: of momenta and acceptances.
        start: one chain per row, for instance encoder means of training points.
        centroids: as in `latent_metric`.
        log_std: likewise.
        rho: likewise, > 0.
        regularizer: likewise, > 0.
        tau: likewise, >= 0.
        num_steps: proposals per chain, >= 1.
        num_leapfrog: leapfrog steps per proposal, >= 1.
        step_size: of a leapfrog step, > 0.

    Returns:
        `(z, aux)`: the last states, float32; aux holds "acceptance" per chain.

    Raises:
        ValueError: a number is out of range.

    Gradient: the identity in `start`; forces and acceptances are constants.

    >>> start, log_std = jnp.zeros((500, 1)), jnp.zeros((1, 1))
    >>> z, _ = sample_uniform(
    ...     jax.random.key(0), start, jnp.ones((1, 1)), log_std, rho=1.0,
    ...     regularizer=1e-6, tau=1.0, step_size=0.1,
    ... )
    >>> abs(float(jnp.mean(z)) - 1.0) < 0.15
    True
    """
    check_range("num_steps", num_steps, low=1)
    check_range("num_leapfrog", num_leapfrog, low=1)
    check_range("step_size", step_size, above=0.0)
    start = as_float32(start)
    fixed = [lax.stop_gradient(as_float32(x)) for x in (centroids, log_std)]

    def density(z: Array) -> Array:
        return log_volume(z, *fixed, rho=rho, regularizer=regularizer, tau=tau)

    force = jax.grad(lambda z: jnp.sum(density(z)))

    def leap(state: tuple[Array, Array], _: None) -> Any:
        z, half = state[0], state[1] + 0.5 * step_size * force(state[0])
        z = z + step_size * half
        return (z, half + 0.5 * step_size * force(z)), None

    def step(z: Array, key: Array) -> tuple[Array, Array]:
        keys = jax.random.split(key)
        before = jax.random.normal(keys[0], z.shape, z.dtype)
        (new, after), _ = lax.scan(leap, (z, before), None, num_leapfrog)
        kinetic = 0.5 * jnp.sum(jnp.square(before) - jnp.square(after), axis=1)
        uniform = jax.random.uniform(keys[1], (len(z),), z.dtype)
        accepted = jnp.log(uniform) < density(new) - density(z) + kinetic
        return jnp.where(accepted[:, None], new, z), accepted

    keys = jax.random.split(key, num_steps)
    z, accepted = lax.scan(step, lax.stop_gradient(start), keys)
    acceptance = jnp.mean(accepted.astype(z.dtype), axis=0)
    # An exact zero that carries the gradient.
    return z + (start - lax.stop_gradient(start)), {"acceptance": acceptance}


@typed
def curve_energy(
    curve: Float[ArrayLike, "batch points latents"],
    centroids: Float[ArrayLike, "centroids latents"],
    log_std: Float[ArrayLike, "centroids latents"],
    *,
    rho: float | Float[ArrayLike, ""],
    regularizer: float = 1e-2,
    tau: float = 0.0,
    metric: Literal["inverse", "latent"] = "inverse",
) -> Float[Array, " batch"]:
    """Energy of curves given by points at equal times from 0 to 1.

    (T - 1) / 2 sum_t d_t^T M(z_t) d_t,   d_t between neighbours, z_t their middle,
    with M = G^-1, small where the data is, or M = G

    Args:
        curve: T >= 2 points of each curve, `[B, T, D]`. Differences count up to 1e8.
        centroids: as in `latent_metric`.
        log_std: likewise.
        rho: likewise, > 0.
        regularizer: likewise, > 0.
        tau: likewise, >= 0.
        metric: "inverse" is M = G^-1: short curves pass through the data; "latent" is
            M = G: they go round it.

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
    parts = curve.shape[1] - 1
    step = jnp.clip(curve[:, 1:] - curve[:, :-1], -1e8, 1e8)
    middle = 0.5 * curve[:, 1:] + 0.5 * curve[:, :-1]
    log_diagonal = _log_diagonal(
        middle.reshape(-1, curve.shape[2]), centroids, log_std, rho, regularizer, tau
    )
    sign = -1.0 if metric == "inverse" else 1.0
    weight = jnp.exp(jnp.clip(sign * log_diagonal, -40.0, 40.0)).reshape(step.shape)
    return 0.5 * parts * jnp.sum(weight * jnp.square(step), axis=(1, 2))


@typed
def geodesic(
    start: Float[ArrayLike, "batch latents"],
    end: Float[ArrayLike, "batch latents"],
    centroids: Float[ArrayLike, "centroids latents"],
    log_std: Float[ArrayLike, "centroids latents"],
    *,
    rho: float | Float[ArrayLike, ""],
    regularizer: float = 1e-2,
    tau: float = 0.0,
    metric: Literal["inverse", "latent"] = "inverse",
    num_points: int = 16,
    num_steps: int = 200,
    learning_rate: float = 0.01,
) -> tuple[Float[Array, "batch num_points latents"], dict[str, Array]]:
    """Curves of least energy between pairs of points, by Adam from the straight line.

    Args:
        start: first points, `[B, D]`.
        end: last points, likewise.
        centroids: as in `latent_metric`.
        log_std: likewise.
        rho: likewise, > 0.
        regularizer: likewise, > 0.
        tau: likewise, >= 0.
        metric: as in `curve_energy`.
        num_points: T, >= 3.
        num_steps: of Adam, >= 1; the rate falls to 0.
        learning_rate: of Adam, > 0, in units of the distance from start to end.

    Returns:
        `(curve, aux)`: `[B, T, D]`; aux holds "energy" and "straight_energy", `[B]`,
        the first never above the second.

    Raises:
        ValueError: a number is out of range.

    Gradient: that of the straight line; how far the curve leaves it is a constant.

    >>> far, log_std = jnp.full((1, 2), 1e3), jnp.zeros((1, 2))
    >>> ends = jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> curve, aux = geodesic(*ends, far, log_std, rho=1.0, num_points=3)
    >>> curve.tolist()  # flat there
    [[[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]]
    """
    check_range("num_points", num_points, low=3)
    check_range("num_steps", num_steps, low=1)
    check_range("learning_rate", learning_rate, above=0.0)
    start, end = as_float32(start), as_float32(end)
    fixed = [lax.stop_gradient(as_float32(x)) for x in (centroids, log_std)]
    time = jnp.linspace(0.0, 1.0, num_points, dtype=start.dtype)[None, :, None]
    line = (1.0 - time) * start[:, None] + time * end[:, None]
    straight = lax.stop_gradient(line)
    length = jnp.max(jnp.abs(straight[:, -1:] - straight[:, :1]), axis=2, keepdims=True)

    def energy(inner: Array) -> Array:
        # Ends stay; distances in units of that between them, energies in units of the
        # straight line's, so that one rate serves every scale.
        leave = jnp.pad(length * inner, ((0, 0), (1, 1), (0, 0)))
        return curve_energy(
            straight + leave, *fixed, rho=rho, regularizer=regularizer, tau=tau,
            metric=metric,
        )  # fmt: skip

    inner = jnp.zeros_like(straight[:, 1:-1])
    before = energy(inner)
    unit = jnp.where(before > 0.0, before, 1.0)
    optimizer = optax.adam(
        optax.cosine_decay_schedule(learning_rate, num_steps), eps=1e-3
    )

    def step(carry: Any, _: None) -> Any:
        inner, state = carry
        slope = jax.grad(lambda x: jnp.sum(energy(x) / unit))(inner)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(inner, updates), state), None

    (inner, _), _ = lax.scan(step, (inner, optimizer.init(inner)), None, num_steps)
    after = energy(inner)
    is_shorter = after < before
    inner = jnp.where(is_shorter[:, None, None], length * inner, 0.0)
    aux = {"energy": jnp.minimum(after, before), "straight_energy": before}
    return line + jnp.pad(inner, ((0, 0), (1, 1), (0, 0))), aux


def _log_diagonal(
    z: ArrayLike,
    centroids: ArrayLike,
    log_std: ArrayLike,
    rho: float | ArrayLike,
    regularizer: float,
    tau: float,
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


def _distances(x: Array) -> Array:
    """Of every row to every row, for rows of any size."""
    scale = lax.stop_gradient(jnp.max(jnp.abs(x)))
    scale = jnp.where(scale > 0.0, scale, 1.0)
    square = jnp.sum(jnp.square((x[:, None] - x[None]) / scale), axis=2)
    apart = square > 0.0  # the root has no derivative at 0
    return scale * jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


def _points(key: Array, *rows: int) -> list[Array]:
    """Points of as many rows each, then 5 centroids and their log_std."""
    keys = jax.random.split(key, len(rows) + 2)
    pairs = zip((*rows, 5, 5), keys, strict=True)
    drawn = [jax.random.normal(k, (n, 3)) for n, k in pairs]
    return [*drawn[:-1], 0.3 * drawn[-1]]


def _metric_example(key: Array):
    return tuple(_points(key, 8)), {"rho": 1.5, "tau": 0.1}


def _sample_example(key: Array):
    key, chain_key = jax.random.split(key)
    knobs = {"rho": 1.5, "num_steps": 2, "num_leapfrog": 2, "step_size": 0.1}
    return (chain_key, *_points(key, 8)), knobs


def _curve_example(key: Array):
    key, curve_key = jax.random.split(key)
    curve = jax.random.normal(curve_key, (8, 4, 3))
    return (curve, *_points(key)), {"rho": 1.5}


def _geodesic_example(key: Array):
    return tuple(_points(key, 8, 8)), {"rho": 1.5, "num_points": 4, "num_steps": 3}


EXAMPLES = {
    bandwidth: lambda key: ((jax.random.normal(key, (8, 3)),), {}),
    choose_centroids: lambda key: (
        (jax.random.normal(key, (8, 3)),),
        {"num_centroids": 3},
    ),
    curve_energy: _curve_example,
    geodesic: _geodesic_example,
    latent_metric: _metric_example,
    log_volume: _metric_example,
    sample_uniform: _sample_example,
}
