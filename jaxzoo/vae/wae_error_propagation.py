"""How errors of a Wasserstein autoencoder add up, with and without an adversary.

For an encoder E, a decoder G with Lipschitz constant L and a prior Z

    W1(X, G(Z)) <= mean ||x - G(E(x))|| + L W1(E(X), Z)

by the triangle inequality, for samples of equal size as well as for their laws. Of a
training sample with a share eps of an adversary's points no more can be asked than

    W1(P, (1 - eps) P + eps Q) = eps W1(P, Q),     and so for total variation

    bound, aux = bound_terms(x, decode(encode(x)), encode(x), z, decode(z), lipschitz)
    aux["realised"] <= bound                          # W1(x, G(z)), exactly
    train, _ = contaminate(key, x, outliers, fraction=0.1)
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jaxzoo.core.divergences import squared_distances
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "wae_error_propagation",
    "title": "Concurrent Density Estimation with Wasserstein Autoencoders: Some "
    "Statistical Insights",
    "arxiv": "2312.06591",
    "year": 2023,
    "authors": "Anish Chakrabarty, Arkaprabha Basu, Swagatam Das",
    "where": "Latent and reconstruction consistency as one inequality of W1; Huber "
    "contamination of the training sample (section 5).",
    "differs": "The text was not at hand beyond its first page and no code was found: "
    "the inequality is the triangle's, for samples as for laws, where the paper has "
    "rates of networks for latent TV and W1. Assignment, shared histogram bins and "
    "the outliers, N(6, 0.3^2) in each coordinate, are choices; latent MMD. The "
    "experiment trains 20 WAEs, 15 of mixtures and 5 of digits with random images as "
    "outliers, and 15 with 100 data. The spectral bound on Lip(G) makes it loose: 12 "
    "to 19 where W1 is 0.7 to 2.8. Number of data hardly mattered.",
}

__all__ = ["bound_terms", "contaminate", "histogram_tv", "wasserstein1"]


@typed
def wasserstein1(
    x: Float[ArrayLike, "n d"], y: Float[ArrayLike, "n d"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The exact Wasserstein-1 distance of two samples of one size, by assignment.

    W1 = min over permutations p of mean_i ||x_i - y_p(i)||

    by shortest augmenting paths (Jonker, Volgenant 1987), in O(N^3).

    Args:
        x: points, `[N, D]`; differences beyond 1e18 count as 1e18.
        y: as many points.

    Returns:
        `(distance, aux)`: float32 scalar >= 0 in the points' unit; in aux "index", the
        row of y that each row of x goes to, int32 `[N]`. For gradients it is a
        constant, as the best assignment may be.

    Raises:
        TypeError: the samples differ in shape; names the argument.

    >>> x, y = jnp.array([[0.0], [1.0]]), jnp.array([[3.0], [0.5]])
    >>> distance, aux = wasserstein1(x, y)
    >>> float(distance), aux["index"].tolist()
    (1.25, [1, 0])
    """
    cost = _norm(squared_distances(x, y))
    index = _assign(lax.stop_gradient(cost))
    chosen = jnp.take_along_axis(cost, index[:, None], axis=1)
    return jnp.mean(chosen), {"index": index}


@typed
def bound_terms(
    x: Float[ArrayLike, "n d"],
    reconstruction: Float[ArrayLike, "n d"],
    codes: Float[ArrayLike, "n latents"],
    prior: Float[ArrayLike, "n latents"],
    generated: Float[ArrayLike, "n d"],
    lipschitz: Float[ArrayLike, ""],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The error of a WAE's samples and what bounds it.

    bound = mean_i ||x_i - G(E(x_i))|| + Lip(G) W1(E(x), z)   >=   W1(x, G(z))

    Args:
        x: data, `[N, D]`.
        reconstruction: G(E(x)), `[N, D]`.
        codes: E(x), `[N, K]`.
        prior: z, as many draws of the prior, `[N, K]`.
        generated: G(z), `[N, D]`.
        lipschitz: an upper bound on the constant of G, >= 0, up to 1e15, such as the
            product of the spectral norms of its layers.

    Returns:
        `(bound, aux)`: float32 scalar; in aux its parts "reconstruction" and "latent",
        the W1 of codes without the constant, "realised", the left side, and "slack",
        the bound less that. A negative slack says that `lipschitz` is too small.

    Raises:
        ValueError: `lipschitz` is negative.
        TypeError: shapes do not fit; names the argument.

    >>> z = jnp.array([[0.0], [1.0]])
    >>> bound, aux = bound_terms(3 * z, 2 * z + 3, z + 1, z, 2 * z + 1, jnp.array(2.0))
    >>> float(bound), float(aux["realised"])  # 2.5 + 2 * 1
    (4.5, 0.5)
    """
    check_range("lipschitz", lipschitz, low=0.0)
    gaps = as_float32(x) - as_float32(reconstruction)
    limit = 1e18 / math.sqrt(max(1, jnp.shape(x)[1]))
    squares = jnp.sum(jnp.square(jnp.clip(gaps, -limit, limit)), axis=1)
    error = jnp.mean(_norm(squares))
    latent = wasserstein1(codes, prior)[0]
    realised = wasserstein1(x, generated)[0]
    bound = error + jnp.clip(as_float32(lipschitz), 0.0, 1e15) * latent
    parts = {"reconstruction": error, "latent": latent, "realised": realised}
    return bound, lax.stop_gradient(parts | {"slack": bound - realised})


@typed
def histogram_tv(
    x: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "m d"],
    *,
    low: float = -1.0,
    high: float = 1.0,
    bins: int = 20,
) -> Float[Array, ""]:
    """Total variation of two samples' histograms.

    TV = 1/2 sum_b |p_b - q_b|

    A point is shared by the bins round it, in proportion to its closeness to their
    centres, so that there is a gradient. Sharing never makes it larger than the TV of
    the laws; sampling does.

    Args:
        x: points, `[N, D]`, for small D: there are bins^D bins.
        y: points, `[M, D]`.
        low: centre of the first bin of every axis; what is below belongs to it.
        high: centre of the last one, > low.
        bins: per axis, > 1.

    Returns:
        A float32 scalar in [0, 1].

    Raises:
        ValueError: `low`, `high` or `bins` is out of range.

    >>> x, y = jnp.array([[-1.0], [1.0]]), jnp.array([[-1.0], [0.0]])
    >>> float(histogram_tv(x, y, bins=3)), float(histogram_tv(x, y, bins=2))
    (0.5, 0.25)
    """
    check_range("low", low)
    check_range("high", high, above=low)
    check_range("bins", bins, low=2)

    def shares(points: ArrayLike) -> Array:
        place = (jnp.clip(as_float32(points), low, high) - low) * (bins - 1)
        gaps = place[..., None] / (high - low) - jnp.arange(bins)[None, None]
        weights = jnp.maximum(1.0 - jnp.abs(gaps), 0.0)  # [N, D, bins]
        columns = [weights[:, d] for d in range(weights.shape[1])]
        both = functools.reduce(_outer, columns)
        return jnp.mean(both, axis=0)

    return 0.5 * jnp.sum(jnp.abs(shares(x) - shares(y)))


@typed
def contaminate(
    key: Key[Array, ""],
    x: Float[ArrayLike, "n d"],
    adversary: Float[ArrayLike, "n d"],
    *,
    fraction: float | Float[ArrayLike, ""] = 0.1,
) -> tuple[Float[Array, "n d"], dict[str, Array]]:
    """Huber's contamination: a sample of (1 - eps) P + eps Q.

    Args:
        key: a typed key.
        x: a sample of P, `[N, D]`.
        adversary: a sample of Q, `[N, D]`: whatever the adversary likes.
        fraction: eps, the chance of each row to be the adversary's, in [0, 1].

    Returns:
        `(rows, aux)`: `[N, D]`, in the dtype that came; in aux "is_adversary" `[N]`.

    Raises:
        ValueError: `fraction` is out of range.

    >>> x = jnp.zeros((1000, 2))
    >>> rows, aux = contaminate(jax.random.key(0), x, x + 1.0, fraction=0.25)
    >>> float(aux["is_adversary"].mean()), float(rows.mean())
    (0.2, 0.2)
    """
    check_range("fraction", fraction, low=0.0, high=1.0)
    chosen = jax.random.uniform(key, (len(x),)) < as_float32(fraction)
    return jnp.where(chosen[:, None], adversary, x), {"is_adversary": chosen}


def _norm(squares: Array) -> Array:
    # where twice: equal points are at distance 0 and pull nowhere.
    apart = squares > 0.0
    return jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)


def _outer(a: Array, b: Array) -> Array:
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


def _assign(cost: Array) -> Array:
    """The column of each row in the assignment of least cost, `[N, N]` -> `[N]`.

    Rows join one by one: from the new row the shortest path, in reduced costs, to a
    free column is found, and along it rows change their columns.
    """
    n = cost.shape[0]
    columns = jnp.arange(n)

    def join(row: Any, state: Any) -> Any:
        u, v, column_of, row_of = state  # potentials; -1: none yet

        def search(search: Any) -> Any:
            i, _, least, length, before, rows, seen = search
            through = least + cost[i] - u[i] - v
            shorter = (through < length) & ~seen
            length = jnp.where(shorter, through, length)
            before = jnp.where(shorter, i, before)
            j = jnp.argmin(jnp.where(seen, jnp.inf, length)).astype(jnp.int32)
            rows, seen = rows | (columns == i), seen | (columns == j)
            return row_of[j], j, length[j], length, before, rows, seen

        none, far = jnp.zeros(n, bool), jnp.full(n, jnp.inf, cost.dtype)
        start = jnp.int32(row), jnp.int32(0), jnp.zeros((), cost.dtype)
        start = (*start, far, jnp.full(n, -1, jnp.int32), none, none)
        found = lax.while_loop(lambda s: s[0] >= 0, search, start)
        _, sink, least, length, before, rows, seen = found
        saved = jnp.where(seen, least - jnp.where(seen, length, 0.0), 0.0)
        # A visited row but the new one came in by its own column.
        own = jnp.where(columns == row, least, saved[column_of])
        u, v = jnp.where(rows, u + own, u), v - saved

        def turn(turn: Any) -> Any:
            j, _, column_of, row_of = turn
            i = before[j]
            following = column_of[i]
            return following, i == row, column_of.at[i].set(j), row_of.at[j].set(i)

        turned = (sink, jnp.array(False), column_of, row_of)
        *_, column_of, row_of = lax.while_loop(lambda s: ~s[1], turn, turned)
        return u, v, column_of, row_of

    zeros, free = jnp.zeros(n, cost.dtype), jnp.full(n, -1, jnp.int32)
    return lax.fori_loop(0, n, join, (zeros, zeros, free, free))[2]


def _samples(key: Array):
    draws = jax.random.normal(key, (8, 10))
    return draws[:, :3], 2.0 * draws[:, 3:6] + 1.0, draws[:, 6:8], draws[:, 8:]


def _terms_example(key: Array):
    x, y, codes, prior = _samples(key)
    return (x, 0.9 * x + 0.1, codes, prior, y, jnp.array(1.5)), {}


EXAMPLES = {
    wasserstein1: lambda key: (_samples(key)[:2], {}),
    bound_terms: _terms_example,
    histogram_tv: lambda key: (_samples(key)[2:], {"bins": 4, "high": 2.0}),
    contaminate: lambda key: ((key, *_samples(key)[:2]), {"fraction": 0.4}),
}
