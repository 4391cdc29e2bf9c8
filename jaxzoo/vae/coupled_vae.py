"""Coupled VAEs: codes of all data, as a whole, are exactly draws of the prior.

    min over theta, pi:  E_pi c(x, z) + epsilon KL(pi || p_data x p_z)
    c(x, z) = -log p_theta(x|z),   pi a coupling: its marginals are p_data and p_z

is entropic optimal transport between data and any prior that can be sampled. A VAE,
with epsilon = 1, leaves the latent marginal free, hence its holes. By potentials it is

    max  E phi(x) + E psi(z) - epsilon E exp((phi + psi - c) / epsilon) + epsilon

    cost = gaussian_cost(x, *decode(z))             # [B, M], z [M, D] draws of p_z
    loss, aux = semi_dual_loss(psi(z), cost)        # descend in psi, ascend in theta
    index = jax.random.categorical(key, log_coupling(psi(z), cost))   # codes z[index]
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxzoo.core.stats import normal_log_prob
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "coupled_vae",
    "title": "Coupled Variational Autoencoder",
    "arxiv": "2306.02565",
    "year": 2023,
    "authors": "Xiaoran Hao, Patrick Shafto",
    "where": "The VAE as entropic transport: primal, dual and semi-dual forms.",
    "differs": "Of the paper the beginning alone could be read; the rest is from the "
    "authors' code (XiaoranHao/CoopCommAsInfoVAE), which has a potential per data "
    "point, raised by averaged SGD between epochs of the decoder, and draws one code "
    "per image. Here potentials are arrays of the caller's; the primal's penalty is "
    "any number, an assumption. The experiment, in 2-D only, has networks for "
    "potentials, expected costs under the coupling, and one loop of Adam for all. One "
    "claim fails: on rings the sliced W2 is 1.02 +- 0.27 of a VAE's, on the mixture "
    "0.59. The dual did not hold in that loop: its exponentials have heavy tails and "
    "its codes fail the test in all recorded runs. So do those of the primal on the "
    "mixture, with a weight of 2; with 10 and 50 it gave up its codes.",
}

__all__ = [
    "dual_loss",
    "gaussian_cost",
    "log_coupling",
    "primal_loss",
    "semi_dual_loss",
    "soft_min",
]

LARGEST = 1e15  # of costs and potentials, so that quotients by epsilon are float32
LARGEST_EXPONENT = 20.0  # above which exp goes on as a straight line


@typed
def gaussian_cost(
    x: Float[ArrayLike, "batch event"],
    mean: Float[ArrayLike, "draws event"],
    log_std: Float[ArrayLike, "draws event"],
) -> Float[Array, "batch draws"]:
    """The cost of every pair: c(x_i, z_j) = -log N(x_i; mean_j, std_j^2).

    Args:
        x: data, `[B, E]`.
        mean: of what the decoder makes of each code, `[M, E]`.
        log_std: log of its standard deviations, likewise.

    Returns:
        Nats, `[B, M]`, float32.

    >>> gaussian_cost(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.zeros((1, 1))).tolist()
    [[0.9189]]
    """
    mean, log_std = as_float32(mean), as_float32(log_std)

    def one(x: Array) -> Array:
        return -normal_log_prob(jnp.repeat(x[None], len(mean), 0), mean, log_std)

    return jax.vmap(one)(as_float32(x))


@typed
def primal_loss(
    cost: Float[ArrayLike, " batch"],
    kl: Float[ArrayLike, " batch"],
    marginal: float | Float[ArrayLike, ""],
    *,
    epsilon: float | Float[ArrayLike, ""] = 1.0,
    weight: float | Float[ArrayLike, ""] = 10.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The primal, an encoder q(z|x) as coupling with a penalty on its latent marginal.

    mean_b cost + epsilon kl  +  weight D(q_z, p_z)

    With weight 0 and epsilon 1 it is the loss of a VAE, with an MMD as D an InfoVAE's.

    Args:
        cost: -log p(x|z) at one z ~ q(z|x), nats, `[B]`.
        kl: KL(q(z|x) || p_z), nats, `[B]`.
        marginal: D of the batch's codes and draws of the prior, such as an MMD.
        epsilon: > 0, of the entropy.
        weight: >= 0, nats per unit of D; the constraint is met as it grows.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "per_example" `[B]`, without D.

    Raises:
        ValueError: a number is out of range.

    >>> loss, aux = primal_loss(jnp.array([1.0, 3.0]), jnp.ones(2), 0.5, weight=4.0)
    >>> float(loss), aux["per_example"].tolist()
    (5.0, [2.0, 4.0])
    """
    check_range("epsilon", epsilon, above=0.0)
    check_range("weight", weight, low=0.0)
    each = as_float32(cost) + as_float32(epsilon) * as_float32(kl)
    loss = jnp.mean(each) + as_float32(weight) * as_float32(marginal)
    return loss, {"per_example": lax.stop_gradient(each)}


@typed
def dual_loss(
    phi: Float[ArrayLike, " batch"],
    psi: Float[ArrayLike, " draws"],
    cost: Float[ArrayLike, "batch draws"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The dual, negated: what potentials of data and codes descend on.

    -(mean phi_i + mean psi_j + epsilon - epsilon mean_ij exp((phi_i + psi_j - c_ij)
    / epsilon))

    For every phi and psi -loss is a lower bound of the primal, and its mean over
    batches of x and z that of the whole.

    Args:
        phi: potential at data, in nats, `[B]`.
        psi: potential at draws of the prior, `[M]`.
        cost: c(x_i, z_j), `[B, M]`.
        epsilon: > 0; exponents above 20 are continued by the tangent.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "mass", the mean of the
        exponentials, 1 at the optimum.

    Raises:
        ValueError: `epsilon` is not positive.

    >>> loss, aux = dual_loss(jnp.array([1.0]), jnp.array([2.0]), jnp.array([[3.0]]))
    >>> float(loss), float(aux["mass"])
    (-3.0, 1.0)
    """
    epsilon = _positive(epsilon)
    phi, psi, cost = _clipped(phi), _clipped(psi), _clipped(cost)
    exponent = (phi[:, None] + psi[None] - cost) / epsilon
    # As exp it would overflow before potentials could be pulled back from too high.
    low = jnp.minimum(exponent, LARGEST_EXPONENT)
    beyond = jnp.minimum(jnp.maximum(exponent - LARGEST_EXPONENT, 0.0), LARGEST)
    mass = jnp.mean(jnp.exp(low) + math.exp(LARGEST_EXPONENT) * beyond)
    value = jnp.mean(phi) + jnp.mean(psi) - epsilon * (mass - 1.0)
    return -value, {"mass": lax.stop_gradient(mass)}


@typed
def soft_min(
    psi: Float[ArrayLike, " draws"],
    cost: Float[ArrayLike, "batch draws"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 1.0,
) -> Float[Array, " batch"]:
    """The best phi for a psi: -epsilon log mean_j exp((psi_j - c_ij) / epsilon).

    With psi = 0 and epsilon = 1 it is -log mean_j p(x_i|z_j), -log p(x_i) estimated.

    Args:
        psi: potential at draws of the prior, in nats, `[M]`.
        cost: c(x_i, z_j), `[B, M]`.
        epsilon: > 0; the smaller, the nearer to min_j (c_ij - psi_j).

    Returns:
        phi in nats, `[B]`, float32.

    Raises:
        ValueError: `epsilon` is not positive.

    >>> soft_min(jnp.array([0.0, 1.0]), jnp.array([[2.0, 3.0]])).tolist()
    [2.0]
    """
    epsilon = _positive(epsilon)
    scaled = (_clipped(psi)[None] - _clipped(cost)) / epsilon
    log_mean = jax.nn.logsumexp(scaled, axis=1) - math.log(scaled.shape[1])
    return -epsilon * log_mean


@typed
def semi_dual_loss(
    psi: Float[ArrayLike, " draws"],
    cost: Float[ArrayLike, "batch draws"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The semi-dual, negated: the dual at the best phi, with psi alone left.

    -(mean_i soft_min_i(psi, c) + mean_j psi_j)

    Its derivative by c_ij is minus the coupling: a decoder descends on -loss while psi
    descends on loss. The released code has a potential per data point and the minimum
    over all data: give it, and the cost's transpose.

    Args:
        psi: potential at draws of the prior, in nats, `[M]`.
        cost: c(x_i, z_j), `[B, M]`; minima over M draws are too high by O(1/M).
        epsilon: > 0, of the entropy.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "per_example", phi, `[B]`.

    Raises:
        ValueError: `epsilon` is not positive.

    >>> float(semi_dual_loss(jnp.array([0.0, 1.0]), jnp.array([[2.0, 3.0]]))[0])
    -2.5
    """
    phi = soft_min(psi, cost, epsilon=epsilon)
    loss = -(jnp.mean(phi) + jnp.mean(_clipped(psi)))
    return loss, {"per_example": lax.stop_gradient(phi)}


@typed
def log_coupling(
    psi: Float[ArrayLike, " draws"],
    cost: Float[ArrayLike, "batch draws"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 1.0,
) -> Float[Array, "batch draws"]:
    """log pi(z_j|x_i): the encoder that psi makes, for `jax.random.categorical`.

    pi(z_j|x_i) = softmax_j((psi_j - c_ij) / epsilon)

    At the optimum its mean over data is 1/M for every j: codes are draws of the prior.
    With psi = 0 it is the true posterior, restricted to the draws.

    Args:
        psi: potential at draws of the prior, in nats, `[M]`.
        cost: c(x_i, z_j), `[B, M]`.
        epsilon: > 0, of the entropy.

    Returns:
        Log-probabilities in nats, `[B, M]`, float32, normalised over j.

    Raises:
        ValueError: `epsilon` is not positive.

    >>> log_coupling(jnp.array([0.0, 1.0]), jnp.array([[2.0, 3.0]])).tolist()
    [[-0.6931, -0.6931]]
    """
    epsilon = _positive(epsilon)
    scaled = (_clipped(psi)[None] - _clipped(cost)) / epsilon
    return jax.nn.log_softmax(scaled, axis=1)


def _positive(epsilon: float | ArrayLike) -> Array:
    check_range("epsilon", epsilon, above=0.0)
    return as_float32(epsilon)


def _clipped(x: ArrayLike) -> Array:
    return jnp.clip(as_float32(x), -LARGEST, LARGEST)


def _cost_example(key: Array):
    draws = jax.random.normal(key, (8, 10))
    return draws[:, 0], draws[:, 1], 2.0 + jnp.abs(draws[:, 2:])


EXAMPLES = {
    gaussian_cost: lambda key: (tuple(jax.random.normal(key, (3, 8, 2))), {}),
    primal_loss: lambda key: ((*jax.random.uniform(key, (2, 8)), 0.3), {}),
    dual_loss: lambda key: (_cost_example(key), {}),
    soft_min: lambda key: (_cost_example(key)[1:], {"epsilon": 0.5}),
    semi_dual_loss: lambda key: (_cost_example(key)[1:], {}),
    log_coupling: lambda key: (_cost_example(key)[1:], {}),
}
