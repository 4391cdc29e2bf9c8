"""What the error of a Wasserstein autoencoder depends on: the data's own dimension.

For data on a set of dimension d in R^D the expected excess risk of a WAE, networks
growing with n, is at most of order n^(-1 / (2 + d)) up to logarithms: D is not there.
To see it: data of known d, estimates of d, and a line through log risks.

    x = manifold_data(key, z, features=128)    # z uniform on [-1, 1]^d; key is the map
    two_nn_dimension(x), covering_dimension(x)[0]                     # both some d
    slope, aux = rate_fit(sizes, risks)        # risks held out, of WAEs of `sizes` data
    slope, aux = rate_fit(sizes, risks, reference=risk_of_many)       # of excess risks
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from jaxzoo.core.divergences import squared_distances
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "wae_intrinsic_rates",
    "title": "A Statistical Analysis of Wasserstein Autoencoders for Intrinsically "
    "Low-dimensional Data",
    "arxiv": "2402.15710",
    "year": 2024,
    "authors": "Saptarshi Chakraborty, Peter L. Bartlett",
    "where": "Rates in the Minkowski dimension of the data, with width growing in n; "
    "the simulation with data of two intrinsic dimensions.",
    "differs": "The text was not at hand beyond its first page; the authors' code was: "
    "BigGAN images of dimension 2 and 16, 1,000 to 5,000 of them, ten epochs, 8 codes. "
    "Here: sets of waves, 100 to 1,600 points, 600 steps whatever n, d codes, squares "
    "summed over coordinates plus an MMD of weight 1; width grows as n^(d / (2 + d)) "
    "to at most 64, an assumption. No penalty by a critic. 6 codes for d = 2, tried on "
    "other seeds, leave an MMD that rules the slope. One claim fails: in 8 coordinates "
    "d = 6 has the steeper risk, -0.71 against -0.46; in 128 it is flatter, -0.28 "
    "against -0.48. The change of slope at d = 2 is 0.03 +- 0.21 over three seeds.",
}

__all__ = ["covering_dimension", "manifold_data", "rate_fit", "two_nn_dimension"]

Scalar = float | Float[ArrayLike, ""]


@typed
def manifold_data(
    key: Key[Array, ""],
    latents: Float[ArrayLike, "n d"],
    *,
    features: int = 8,
    frequency: Scalar = 1.0,
) -> Float[Array, "n features"]:
    """Points of a smooth d-dimensional set in R^D: waves in random directions.

    x_j = sqrt(2 / D) cos(w_j . z + b_j),   w_j ~ N(0, frequency^2 I), b_j uniform

    Args:
        key: a typed key; the same key is the same map. Of a larger D it is another.
        latents: z, `[N, d]`, such as uniform draws of [-1, 1]^d; counts up to 1e4.
        features: D, > 0.
        frequency: waves per unit of z, times 2 pi, > 0: the larger, the more folded.

    Returns:
        x, `[N, D]`, float32. Whatever D, squares of x sum to 1 on average over maps,
        and those of differences to 2 - 2 exp(-frequency^2 ||z - z'||^2 / 2).

    Raises:
        ValueError: `features` or `frequency` is not positive.

    >>> z = jnp.array([[0.0, 0.0], [0.5, 0.0]])
    >>> manifold_data(jax.random.key(0), z, features=3).shape
    (2, 3)
    """
    check_range("features", features, low=1)
    check_range("frequency", frequency, above=0.0)
    keys = jax.random.split(key)
    z = jnp.clip(as_float32(latents), -1e4, 1e4)
    waves = as_float32(frequency) * jax.random.normal(keys[0], (z.shape[1], features))
    phases = jax.random.uniform(keys[1], (features,), maxval=2.0 * jnp.pi)
    return jnp.sqrt(2.0 / features) * jnp.cos(z @ waves + phases[None])


@typed
def two_nn_dimension(x: Float[ArrayLike, "n d"]) -> Float[Array, ""]:
    """The dimension in which a point's two nearest neighbours are that far (2-NN).

    (N - 1) / sum_i log(r_i2 / r_i1)

    Where density varies little over these distances r_2 / r_1 is Pareto with index d,
    of which this is the unbiased likelihood estimate (Facco et al. 2017 fit a line).

    Args:
        x: points, `[N, D]`, N >= 3. Distances count from 1e-15, to 1e18.

    Returns:
        The estimate, a float32 scalar > 0, at most 1e6; too small for d above some 10.

    Raises:
        ValueError: there are fewer than three points.

    >>> float(two_nn_dimension(jnp.array([[0.0], [1.0], [3.0]])))  # 3, 2, 1.5
    0.9102
    """
    check_range("len(x)", len(x), low=3)
    squares = squared_distances(x, x)
    others = jnp.where(jnp.eye(len(x), dtype=bool), 1e37, squares)
    nearest = jnp.log(jnp.maximum(-lax.top_k(-others, 2)[0], 1e-30))
    total = 0.5 * jnp.sum(nearest[:, 1] - nearest[:, 0])
    return (len(x) - 1.0) / jnp.maximum(total, 1e-6 * len(x))


@typed
def covering_dimension(
    x: Float[ArrayLike, "n d"], *, first: int = 10, last: int = 100
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The dimension by which a sample's covering numbers grow, as Minkowski's.

    N(r) ~ r^-d:  d = -1 / slope of log r_k on log k,  k = first .. last

    r_k is the radius at which k balls cover all points. Centres are chosen by turns,
    each the point that is farthest from those before: r_k is at most twice the best.

    Args:
        x: points, `[N, D]`; the first is the first centre.
        first: the least number of balls of the fit, > 0.
        last: the largest, > `first`, at most N.

    Returns:
        `(dimension, aux)`: float32 scalar, from 0.001 to 1000; in aux "radii" `[last]`,
        which count from 1e-15.

    Raises:
        ValueError: `first` or `last` is out of range.

    >>> x = jnp.linspace(0.0, 1.0, 65)[:, None]
    >>> dimension, aux = covering_dimension(x, first=1, last=33)
    >>> aux["radii"][:5].tolist()
    [1.0, 0.5, 0.25, 0.25, 0.125]
    """
    check_range("first", first, low=1)
    check_range("last", last, low=first + 1, high=len(x))
    x = as_float32(x)

    def add(squares: Array, _: None) -> tuple[Array, Array]:
        # Before the first turn all are equally far.
        centre = lax.dynamic_slice_in_dim(x, jnp.argmax(squares), 1)
        squares = jnp.minimum(squares, squared_distances(x, centre)[:, 0])
        return squares, jnp.max(squares)

    start = jnp.full(len(x), 1e37, x.dtype)
    logs = 0.5 * jnp.log(jnp.maximum(lax.scan(add, start, None, last)[1], 1e-30))
    count = jnp.log(jnp.arange(first, last + 1, dtype=x.dtype))
    slope = _line(count, logs[first - 1 :])[0]
    return 1.0 / jnp.clip(-slope, 1e-3, 1e3), {"radii": jnp.exp(logs)}


@typed
def rate_fit(
    sizes: Float[ArrayLike, " runs"],
    risks: Float[ArrayLike, " runs"],
    *,
    reference: Scalar = 0.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The power of n by which risks fall: a line through logarithms.

    log(risk - reference) = intercept + slope log n,  by least squares

    Args:
        sizes: n, `[K]`, two values at least that differ; count from 1e-30 to 1e30.
        risks: of the runs with n data each, `[K]`; less the reference likewise.
        reference: what n = infinity would have, such as the risk of a run with the
            most data; risks less that are excess risks.

    Returns:
        `(slope, aux)`: float32 scalar, -1 / (2 + d) for the paper's rate; in aux
        "intercept", and "stderr" of the slope, from the residuals (0 for K = 2).

    Raises:
        ValueError: `reference` is not a number.

    >>> slope, aux = rate_fit(jnp.array([10.0, 1000.0]), jnp.array([2.0, 0.2]))
    >>> float(slope)
    -0.5
    """
    check_range("reference", reference)
    excess = as_float32(risks) - as_float32(reference)
    logs = [jnp.log(jnp.clip(a, 1e-30, 1e30)) for a in (as_float32(sizes), excess)]
    slope, intercept, error = _line(*logs)
    return slope, lax.stop_gradient({"intercept": intercept, "stderr": error})


def _line(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """Slope and intercept of least squares, and the slope's standard error."""
    centred = x - jnp.mean(x)
    spread = jnp.maximum(jnp.sum(jnp.square(centred)), 1e-12)
    slope = jnp.sum(centred * y) / spread
    intercept = jnp.mean(y) - slope * jnp.mean(x)
    left = jnp.sum(jnp.square(y - intercept - slope * x)) / max(len(x) - 2, 1)
    return slope, intercept, jnp.sqrt(left / spread)


def _points(key: Array):
    return (jax.random.normal(key, (16, 3)),)


def _runs(key: Array):
    noise = jax.random.uniform(key, (8,), minval=1.0, maxval=1.5)
    sizes = 10.0 * 2.0 ** jnp.arange(8)
    return (sizes, noise * sizes**-0.3), {"reference": 0.05}


EXAMPLES = {
    manifold_data: lambda key: ((key, *_points(key)), {"features": 4}),
    two_nn_dimension: lambda key: (_points(key), {}),
    covering_dimension: lambda key: (_points(key), {"first": 2, "last": 10}),
    rate_fit: _runs,
}
