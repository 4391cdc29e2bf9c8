"""How far a Lipschitz generator can throw: its samples have light tails.

Let G be L-Lipschitz, Z a latent variable, and h any 1-Lipschitz statistic of a sample.

    P(|h(G(Z)) - E h(G(Z))| > t) <= 2 exp(-k t^2 / (2 L^2))  curvature k, 1 if normal
                                 <= 6 exp(-t / (L sqrt(C)))  Z log-concave

whatever the dimension: no such generator has the tails of Student's t, nor has a
diffusion model, whose sampler is one Lipschitz map of all its noises.

    bound = gaussian_tail_bound(t, lipschitz_bound(params))      # of a ReLU decoder
    margin, aux = concentration_check(jnp.linalg.norm(samples, axis=1), t, bound)
    hill_estimator(samples[:, 0], num_tail=100)      # 0.5 for t(2), near 0 if light
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "light_tail_generators",
    "title": "On the Statistical Capacity of Deep Generative Models",
    "arxiv": "2501.07763",
    "year": 2025,
    "authors": "Edric Tam, David B. Dunson",
    "where": "Concentration for normal, log-concave and strongly log-concave latents "
    "and on curved manifolds; diffusion models as one map; simulated heavy tails.",
    "differs": "The text was not at hand beyond the abstract and no code was found: "
    "constants are those of textbooks (Herbst's argument, Bakry-Emery curvature, "
    "Bobkov-Ledoux for a Poincare constant, in place of the KLS one) and deviations "
    "are from means, where Gromov-Levy has medians. Networks, data of two independent "
    "t(2) coordinates, Hill's and Weissman's estimates are choices. One claim fails: "
    "the 99.99% quantile of the diffusion model's samples is 5.1 +- 1.4 times the "
    "data's (other draws: 2.2, 0.64; with 200 noise levels in place of 50 1.06). A "
    "sampler with a constant of 1e35 keeps its bound, which says nothing of that size.",
}

__all__ = [
    "concentration_check",
    "exponential_tail_bound",
    "extreme_quantile",
    "gaussian_tail_bound",
    "hill_estimator",
    "lipschitz_bound",
    "log_sampler_lipschitz",
]

Scalar = float | Float[ArrayLike, ""]
LARGEST, SMALLEST = 1e15, 1e-15  # of what is divided, so that gradients are float32


@typed
def lipschitz_bound(params: PyTree[Float[ArrayLike, "..."]]) -> Float[Array, ""]:
    """An upper bound on the Lipschitz constant of a chain of dense layers.

    L = prod_l ||W_l||_2

    It holds for activations with slopes in [-1, 1]: ReLU, leaky ReLU, tanh, sigmoid.

    Args:
        params: kernels `[inputs, outputs]` of one chain in any tree, such as that of an
            `MLP`; biases, of one axis, do not matter. Entries count up to 1e6 in size.

    Returns:
        The product of the largest singular values, a float32 scalar >= 0.

    Raises:
        ValueError: an array has no axis or more than two, or none is a kernel.

    >>> layer = {"kernel": jnp.diag(jnp.array([3.0, 1.0])), "bias": jnp.ones(2)}
    >>> float(lipschitz_bound({"first": layer, "second": layer}))
    9.0
    """
    kernels = [leaf for leaf in jax.tree.leaves(params) if jnp.ndim(leaf) != 1]
    shapes = [jnp.shape(kernel) for kernel in kernels]
    if not kernels or any(len(shape) != 2 for shape in shapes):
        text = f"'params' has kernels of shapes {shapes}, expected [inputs, outputs]"
        raise ValueError(f"argument {text}, one or more.")
    kernels = [jnp.clip(as_float32(kernel), -1e6, 1e6) for kernel in kernels]
    norms = [jnp.linalg.svd(kernel, compute_uv=False)[0] for kernel in kernels]
    return jnp.prod(jnp.stack(norms))


@typed
def log_sampler_lipschitz(
    growth: Float[ArrayLike, " steps"], noise_std: Float[ArrayLike, " steps"]
) -> Float[Array, ""]:
    """Log of the Lipschitz constant of a diffusion sampler as a map of all its noises.

    x_k = f_k(x_{k-1}) + s_k Z_k,  x_0 = Z_0:   L_k^2 = growth_k^2 L_{k-1}^2 + s_k^2

    Args:
        growth: Lip(f_k) in the order of sampling, > 0, `[K]`: for ancestral sampling by
            a net e, (1 + b_k Lip(e) / sqrt(1 - abar_k)) / sqrt(1 - b_k).
        noise_std: s, >= 0, `[K]`. Both count from 1e-30 to 1e30.

    Returns:
        log L_K, a float32 scalar: L itself is soon too large for float32.

    >>> growth, noise_std = jnp.array([2.0, 1.0]), jnp.array([0.0, 1.5])
    >>> float(log_sampler_lipschitz(growth, noise_std))  # L = sqrt(2^2 + 1.5^2)
    0.9163
    """
    growth, noise = _log(growth), _log(noise_std)
    later = jnp.cumsum(growth[::-1])[::-1]  # of this step and all after it
    shares = jnp.concatenate([later[:1], noise + later - growth])
    return 0.5 * jax.nn.logsumexp(2.0 * shares)


@typed
def gaussian_tail_bound(
    t: Float[ArrayLike, "..."], lipschitz: Scalar, *, curvature: Scalar = 1.0
) -> Float[Array, "..."]:
    """Bound on how often a statistic is further than t from its mean: Gaussian tails.

    2 exp(-curvature t^2 / (2 L^2))

    Args:
        t: distances from the mean, of any shape.
        lipschitz: L of generator and statistic together, > 0. Both count up to 1e15, L
            from 1e-15.
        curvature: > 0. 1 for N(0, I); k where the log-density is k-strongly concave;
            the least Ricci curvature of a manifold of uniform latents, (D - 2) / R^2
            for the sphere of radius R in R^D, D >= 3.

    Returns:
        The bound, in [0, 2], float32, shaped like `t`; of no use above 1.

    Raises:
        ValueError: `lipschitz` or `curvature` is not positive.

    >>> gaussian_tail_bound(jnp.array([0.0, 6.0]), 2.0).tolist()  # 2 exp(-9 / 2)
    [2.0, 0.0222]
    """
    check_range("curvature", curvature, above=0.0)
    ratio = _ratio(t, lipschitz)
    return 2.0 * jnp.exp(-0.5 * as_float32(curvature) * jnp.square(ratio))


@typed
def exponential_tail_bound(
    t: Float[ArrayLike, "..."], lipschitz: Scalar, *, poincare: Scalar = 1.0
) -> Float[Array, "..."]:
    """Bound on how often a statistic is further than t from its mean: log-concave Z.

    6 exp(-t / (L sqrt(C))),   C with Var f(Z) <= C E |grad f(Z)|^2 for all smooth f

    Args:
        t: distances from the mean, of any shape.
        lipschitz: L > 0; limits are those of `gaussian_tail_bound`.
        poincare: C > 0, that of one coordinate where they are independent: 4 s^2 for
            Laplace variables of scale s, (b - a)^2 / pi^2 for uniform ones.

    Returns:
        The bound, in [0, 6], float32, shaped like `t`; of no use above 1.

    Raises:
        ValueError: `lipschitz` or `poincare` is not positive.

    >>> exponential_tail_bound(jnp.array([0.0, 12.0]), 1.0, poincare=4.0).tolist()
    [6.0, 0.0149]
    """
    check_range("poincare", poincare, above=0.0)
    ratio = jnp.abs(_ratio(t, lipschitz))
    return 6.0 * jnp.exp(-ratio / jnp.sqrt(as_float32(poincare)))


@typed
def concentration_check(
    values: Float[ArrayLike, " samples"],
    t: Float[ArrayLike, " distances"],
    bound: Float[ArrayLike, " distances"],
) -> tuple[Float[Array, " distances"], dict[str, Array]]:
    """By how much a bound on tails exceeds what samples do.

    bound(t) - mean_n 1[|h_n - mean h| > t]

    Gradient: that of the bound; what is counted has none.

    Args:
        values: h(G(z)), one number per sample, `[N]`; they count up to 1e30 in size.
        t: distances from the mean, `[T]`.
        bound: of each, such as `gaussian_tail_bound`, `[T]`.

    Returns:
        `(margin, aux)`: `[T]`, float32, below 0 where samples break the bound; in aux
        "frequency" and "subgaussian", the least L of a Gaussian bound that is no less
        than the frequency, 0 where that is 0; `[T]`.

    >>> values, t = jnp.array([0.0, 0.0, 0.0, 4.0]), jnp.array([2.0])
    >>> margin, aux = concentration_check(values, t, jnp.array([1.0]))
    >>> float(margin[0]), float(aux["frequency"][0])
    (0.75, 0.25)
    """
    values = jax.lax.stop_gradient(jnp.clip(as_float32(values), -1e30, 1e30))
    gaps = jnp.abs(values - jnp.sum(values / len(values)))
    distances = jax.lax.stop_gradient(as_float32(t))
    frequency = jnp.mean((gaps[:, None] > distances[None]).astype(gaps.dtype), axis=0)
    rate = jnp.where(frequency > 0.0, frequency, 1.0)
    least = jnp.abs(distances) / jnp.sqrt(2.0 * jnp.log(2.0 / rate))
    aux = {
        "frequency": frequency,
        "subgaussian": jnp.where(frequency > 0.0, least, 0.0),
    }
    return as_float32(bound) - frequency, aux


@typed
def hill_estimator(
    x: Float[ArrayLike, " samples"], *, num_tail: int = 100
) -> Float[Array, ""]:
    """Hill's estimate of the extreme value index of |x|.

    mean_{i <= k} log(|x|_(i) / |x|_(k+1)),   |x|_(1) >= |x|_(2) >= ..

    Args:
        x: samples, `[N]`; sizes below 1e-30 count as 1e-30.
        num_tail: k, how many of the largest are used, from 1 to N - 1.

    Returns:
        A float32 scalar >= 0: 1/a where P(|x| > r) falls as r^-a, 1/df for Student's t.

    Raises:
        ValueError: `num_tail` is out of range.

    >>> float(hill_estimator(jnp.array([1.0, 8.0, -2.0, 4.0]), num_tail=3))  # 2 log 2
    1.3863
    """
    return _tail(x, num_tail)[0]


@typed
def extreme_quantile(
    x: Float[ArrayLike, " samples"], *, level: Scalar = 0.9999, num_tail: int = 100
) -> Float[Array, ""]:
    """Weissman's estimate of a quantile of |x| where samples are few or none.

    |x|_(k+1) (k / (N (1 - level)))^index,   index by `hill_estimator`

    Args:
        x: samples, `[N]`; sizes below 1e-30 count as 1e-30.
        level: of the quantile, in [0, 1); at least 1 - k / N, or it is no extreme one.
        num_tail: k, from 1 to N - 1.

    Returns:
        A float32 scalar in the unit of x, at most 7e33; too large with light tails.

    Raises:
        ValueError: `level` or `num_tail` is out of range.

    >>> float(extreme_quantile(jnp.array([1.0, 8.0, -2.0, 4.0]), level=0.9, num_tail=3))
    16.334
    """
    check_range("level", level, low=0.0, below=1.0)
    index, log_start = _tail(x, num_tail)
    chance = jnp.maximum(1.0 - as_float32(level), 1e-12)
    growth = index * (math.log(num_tail / len(x)) - jnp.log(chance))
    return jnp.exp(jnp.minimum(log_start + growth, 78.0))


def _tail(x: ArrayLike, num_tail: int) -> tuple[Array, Array]:
    check_range("num_tail", num_tail, low=1, high=len(x) - 1)
    largest = jax.lax.top_k(_log(x), num_tail + 1)[0]
    return jnp.mean(largest[:-1]) - largest[-1], largest[-1]


def _log(x: ArrayLike) -> Array:
    return jnp.log(jnp.clip(jnp.abs(as_float32(x)), 1e-30, 1e30))


def _ratio(t: ArrayLike, lipschitz: ArrayLike | float) -> Array:
    check_range("lipschitz", lipschitz, above=0.0)
    t = jnp.clip(as_float32(t), -LARGEST, LARGEST)
    return jnp.clip(t / jnp.clip(as_float32(lipschitz), SMALLEST, LARGEST), -1e6, 1e6)


def _check_example(key: Array):
    t = jnp.linspace(0.1, 2.0, 8)
    return (jax.random.normal(key, (16,)), t, gaussian_tail_bound(t, 1.0)), {}


def _example(key: Array, **knobs: float):
    if "num_tail" in knobs:
        return (jax.random.t(key, 2.0, (16,)),), knobs
    return (jax.random.uniform(key, (8,), maxval=3.0), jnp.array(1.5)), knobs


EXAMPLES = {
    lipschitz_bound: lambda key: ((jax.random.normal(key, (8, 3)),), {}),
    log_sampler_lipschitz: lambda key: (tuple(jax.random.uniform(key, (2, 8))), {}),
    gaussian_tail_bound: lambda key: _example(key, curvature=0.5),
    exponential_tail_bound: lambda key: _example(key, poincare=2.0),
    concentration_check: _check_example,
    hill_estimator: lambda key: _example(key, num_tail=5),
    extreme_quantile: lambda key: _example(key, num_tail=5, level=0.9),
}
