"""Diffusion nets: an autoencoder whose code is a diffusion map.

    K_ij = exp(-||x_i - x_j||^2 / eps),  q_i = sum_j K_ij,  P psi_j = l_j psi_j
    P_ij proportional to K_ij / (q_i q_j)^alpha, with rows that sum to 1

An encoder is trained to give the map Psi_i = (l_j^t psi_j(i)), which exists at the
training points alone, and to have eigenvectors of P as outputs; a decoder is trained to
go back. Stacked they need no training points, and do not reproduce what is no such one:

    embedding, aux = diffusion_maps(x, dims=4, eps=0.04)
    f = net.apply(params, x, method="encode")
    loss, _ = encoder_loss(f, embedding, aux["transition"], aux["eigenvalues"])
    score = net.apply(params, new, method="outlier_score")

They replace `nystrom` and `preimage`, sums over all training points.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed
from jaxzoo.nn.mlp import MLP

PAPER = {
    "slug": "diffusion_nets",
    "title": "Diffusion Nets",
    "arxiv": "1506.07840",
    "year": 2015,
    "authors": "Gal Mishne, Uri Shaham, Alexander Cloninger, Israel Cohen",
    "where": "Diffusion maps with density normalisation, the encoder's cost with the "
    "eigenvector constraint, decoder, outlier score; Nystrom extension, pre-image.",
    "differs": "The released code has sigmoids, pre-trains layer by layer and decays "
    "weights; here are tanh, no pre-training, no decay. Its kernel has 16 neighbours "
    "and its first term is a mean over coordinates, so that its eta is smaller by "
    "`dims`. The pre-image is an average by a kernel, its width the best of seven. The "
    "experiment has a swiss roll, no closed curves, no digits; both extensions are 12 "
    "% from the map of all points there, 700 being few, and 4 % apart.",
}

__all__ = [
    "DiffusionNet",
    "diffusion_maps",
    "encoder_loss",
    "nystrom",
    "preimage",
]

LARGEST, SMALLEST = 1e12, 1e-6  # of a number that is squared; of what is divided by


@typed
def diffusion_maps(
    x: Float[ArrayLike, "points features"],
    *,
    dims: int,
    eps: float,
    alpha: float = 1.0,
    t: float = 1.0,
) -> tuple[Float[Array, "points dims"], dict[str, Array]]:
    """The diffusion map of a set of points, and the Markov matrix that it is made of.

    Psi_t(x_i) = (l_j^t psi_j(i)), j = 1..dims, without the constant psi_0; psi_j has a
    mean square of 1 under P's stationary distribution, and its largest entry is > 0.

    Args:
        x: N points, `[N, F]`; memory is N^2 F.
        dims: how many coordinates, 1..N-1.
        eps: width of the kernel, > 0, in squared units of x.
        alpha: in [0, 1]: 1 takes the density of the points out, 0 keeps it.
        t: diffusion time, >= 0.

    Returns:
        `(embedding, aux)`: float32 `[N, dims]`; in aux "transition", P, "eigenvalues",
        l in [0, 1], "eigenvectors", psi, and "log_density", log q.

    Raises:
        ValueError: a number is out of range.

    Of two points l = (1 - e) / (1 + e), e = exp(-1):

    >>> embedding, aux = diffusion_maps(jnp.array([[0.0], [1.0]]), dims=1, eps=1.0)
    >>> aux["eigenvalues"].tolist(), jnp.abs(embedding).tolist()
    ([0.4621], [[0.4621], [0.4621]])
    """
    check_range("dims", dims, low=1, high=len(x) - 1)
    _check(eps, alpha, t)
    log_k = -_squares(x, x) / eps
    log_density = jax.nn.logsumexp(log_k, axis=1)
    log_k = log_k - alpha * (log_density[:, None] + log_density[None])
    degree = jax.nn.logsumexp(log_k, axis=1)
    # A symmetric matrix with the eigenvalues of P.
    values, vectors = _eigh(jnp.exp(log_k - 0.5 * (degree[:, None] + degree[None])))
    values = jnp.clip(values[::-1][1 : dims + 1], SMALLEST, 1.0)
    stationary = jax.nn.softmax(degree)
    psi = vectors[:, ::-1][:, 1 : dims + 1] * jax.lax.rsqrt(stationary)[:, None]
    largest = jnp.argmax(jnp.abs(psi), axis=0)[None]
    psi = psi * jnp.sign(jnp.take_along_axis(psi, largest, axis=0))
    aux = {
        "transition": jnp.exp(log_k - degree[:, None]),
        "eigenvalues": values,
        "eigenvectors": psi,
        "log_density": log_density,
    }
    return psi * (values**t)[None], aux


@typed
def nystrom(
    x: Float[ArrayLike, "batch features"],
    points: Float[ArrayLike, "points features"],
    log_density: Float[ArrayLike, " points"],
    eigenvectors: Float[ArrayLike, "points dims"],
    eigenvalues: Float[ArrayLike, " dims"],
    *,
    eps: float,
    alpha: float = 1.0,
    t: float = 1.0,
) -> Float[Array, "batch dims"]:
    """The diffusion map of new points by Nystrom's extension.

    psi_j(x) = 1/l_j sum_i p(x, x_i) psi_j(i),  p proportional to k(x, x_i) / q_i^alpha

    Args:
        x: new points, `[B, F]`.
        points: those of `diffusion_maps`, `[N, F]`.
        log_density: log q of them, by its aux, like the next two.
        eigenvectors: psi, `[N, dims]`.
        eigenvalues: l; below 1e-6 they count as that.
        eps: as there, like the next two.
        alpha: in [0, 1].
        t: >= 0. A ValueError where one of the three is out of range.

    Returns:
        l_j^t psi_j(x), float32 `[B, dims]`: at the points themselves, their map.

    >>> x = jnp.array([[0.0], [1.0], [3.0]])
    >>> embedding, aux = diffusion_maps(x, dims=1, eps=1.0)
    >>> fit = [aux[k] for k in ("log_density", "eigenvectors", "eigenvalues")]
    >>> again = nystrom(x, x, *fit, eps=1.0)
    >>> float(jnp.abs(again - embedding).max()) < 1e-5
    True
    """
    _check(eps, alpha, t)
    log_k = -_squares(x, points) / eps - alpha * _limited(log_density)[None]
    values = jnp.clip(as_float32(eigenvalues), SMALLEST, 1.0) ** (t - 1.0)
    psi = _limited(eigenvectors)
    return (jax.nn.softmax(log_k, axis=1) @ psi) * values[None]


@typed
def encoder_loss(
    f: Float[ArrayLike, "points dims"],
    embedding: Float[ArrayLike, "points dims"],
    transition: Float[ArrayLike, "points points"],
    eigenvalues: Float[ArrayLike, " dims"],
    *,
    eta: float | Float[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Squared distance to the diffusion map, and what its outputs lack as eigenvectors.

    1/N sum_i ||f(x_i) - Psi(x_i)||^2 + eta/N sum_j ||(P - l_j I) f_j||^2

    Args:
        f: outputs of the encoder at all points, in their order, `[N, dims]`. Entries
            of all arrays count up to 1e12.
        embedding: Psi, likewise.
        transition: P, `[N, N]`.
        eigenvalues: l_j, `[dims]`.
        eta: weight of the constraint, >= 0; a ValueError otherwise.

    Returns:
        `(loss, aux)`: float32 scalar; in aux "fit" and "constraint", its terms without
        eta, and "per_example", the first, `[N]`.

    >>> f, p = jnp.array([[1.0], [0.0]]), jnp.full((2, 2), 0.5)  # (P - l) f = (0, 0.5)
    >>> float(encoder_loss(f, 0.0 * f, p, jnp.array([0.5]), eta=2.0)[0])
    0.75
    """
    check_range("eta", eta, low=0.0)
    f = _limited(f)
    per_example = jnp.sum(jnp.square(f - _limited(embedding)), axis=1)
    residual = _limited(_limited(transition) @ f - f * _limited(eigenvalues)[None])
    fit, constraint = jnp.mean(per_example), jnp.sum(jnp.square(residual)) / len(f)
    terms = {"fit": fit, "constraint": constraint, "per_example": per_example}
    return fit + eta * constraint, terms


@typed
def preimage(
    y: Float[ArrayLike, "batch dims"],
    embedding: Float[ArrayLike, "points dims"],
    points: Float[ArrayLike, "points features"],
    *,
    width: float | Float[ArrayLike, ""],
) -> Float[Array, "batch features"]:
    """Points with the map y: sum_i w_i x_i, w = softmax(-||y - Psi_i||^2 / width).

    Args:
        y: places in the map, `[B, dims]`.
        embedding: Psi of the training points, `[N, dims]`.
        points: the training points, `[N, F]`.
        width: > 0, in squared units of the map; a ValueError otherwise.

    Returns:
        float32 `[B, F]`, in the convex hull of the points.

    >>> line = jnp.array([[0.0], [1.0]])
    >>> preimage(jnp.array([[0.5]]), line, 10.0 * line, width=1.0).tolist()
    [[5.0]]
    """
    check_range("width", width, above=0.0)
    weights = jax.nn.softmax(-_squares(y, embedding) / width, axis=1)
    return weights @ _limited(points)


class DiffusionNet(nn.Module):
    """An encoder to `dims` coordinates of the map, and a decoder to `features` back.

    Each is trained by itself. `hidden` are the encoder's widths, from the points on.
    """

    dims: int
    features: int
    hidden: Sequence[int] = (20, 20)

    def setup(self):
        self.encoder = MLP((*self.hidden, self.dims))
        self.decoder = MLP((*reversed(self.hidden), self.features))

    def encode(self, x: Array) -> Array:
        return self.encoder(x)

    def decode(self, y: Array) -> Array:
        return self.decoder(y)

    def __call__(self, x: Float[Array, "... f"]) -> Float[Array, "... f"]:
        return self.decoder(self.encoder(x))

    def outlier_score(self, x: Float[Array, "... f"]) -> Float[Array, "..."]:
        """||x - D(E(x))||^2, large off the manifold."""
        return jnp.sum(jnp.square(x - self(x)), axis=-1)


@jax.custom_jvp
def _eigh(a: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(a)
    return values, vectors


@_eigh.defjvp
def _eigh_jvp(primals: Any, tangents: Any) -> Any:
    """Equal eigenvalues do not turn each other's eigenvectors."""
    values, vectors = _eigh(*primals)
    inner = vectors.T @ tangents[0] @ vectors
    gap = values[None] - values[:, None]
    gap = jnp.where(jnp.abs(gap) > SMALLEST, gap, jnp.inf)
    return (values, vectors), (jnp.diagonal(inner), vectors @ (inner / gap))


def _check(eps: float, alpha: float, t: float) -> None:
    check_range("eps", eps, above=0.0)
    check_range("alpha", alpha, low=0.0, high=1.0)
    check_range("t", t, low=0.0)


def _limited(x: ArrayLike) -> Array:
    return jnp.clip(as_float32(x), -LARGEST, LARGEST)


def _squares(x: ArrayLike, y: ArrayLike) -> Array:
    """Squared distances of rows, `[len(x), len(y)]`."""
    difference = as_float32(x)[:, None] - as_float32(y)[None]
    return jnp.sum(jnp.square(_limited(difference)), axis=2)


def _arrays(key: Array, *shapes: tuple[int, ...]) -> list[Array]:
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


EXAMPLES = {
    # A long cloud, whose first eigenvalues lie apart.
    diffusion_maps: lambda key: (
        [_arrays(key, (8, 2))[0] * 0.3 + 0.5 * jnp.arange(16.0).reshape(8, 2)],
        {"dims": 2, "eps": 8.0},
    ),
    encoder_loss: lambda key: (
        _arrays(key, (8, 2), (8, 2), (8, 8), (2,)), {"eta": 2.0},
    ),
    nystrom: lambda key: (
        [*_arrays(key, (8, 2), (6, 2), (6,), (6, 2)), jnp.array([0.9, 0.7])],
        {"eps": 2.0},
    ),
    preimage: lambda key: (_arrays(key, (8, 2), (6, 2), (6, 3)), {"width": 2.0}),
}  # fmt: skip
