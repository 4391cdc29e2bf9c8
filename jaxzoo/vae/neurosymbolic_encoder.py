"""Neurosymbolic encoders: a VAE's encoder with a learned program beside its network.

A program reads a trajectory and gives the log-odds of a binary code c, a network gives
a Gaussian code z; the decoder reads both. Structures are integers, so that one compiled
function trains any program; `expand_structure` is the step of a search over them.

    maximise  E log p(x | c, z) - KL(q(z|x) || p) - gamma |C - KL(q(c|x) || p)|
    program :=  leaf | if leaf then leaf else leaf          (if: by a sigmoid)
    leaf    :=  weight * fold(feature) + bias | hole        (hole: by a network)

    features = trajectory_features(x)                                # [B, T - 2, 5]
    logits = run_program(structure, features, fillers, weights, biases)
    codes = sample_codes(key, logits[:, None])                       # x from them and z
    loss, aux = neurosymbolic_loss(log_likelihood, logits[:, None], mean, log_std,
                                   adversary_logits, codes)
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from jaxzoo.core.stats import bernoulli_log_prob, normal_kl
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "neurosymbolic_encoder",
    "title": "Unsupervised Learning of Neurosymbolic Encoders",
    "arxiv": "2107.13132",
    "year": 2022,
    "authors": "Eric Zhan, Jennifer J. Sun, Ann Kennedy, Yisong Yue, Swarat Chaudhuri",
    "where": "The objective with capacity and adversary, binary codes, smooth "
    "if-then-else, neural holes, and A* search by relaxed losses, as released.",
    "differs": "The text could not be had: details are of the authors' released code "
    "(prog_tvae, prog_tvae_info, near). The language is smaller: one if at most, of "
    "whole clips, leaves of one feature; features and folds are ours. In the "
    "experiment each program trains with a VAE of its own, there with a fixed one, and "
    "is ranked by the ELBO; networks are MLPs, the decoder sees the last step; one "
    "program learns. Holes trained worse than programs, so that the search entered no "
    "if. With a decoder that did not see the last step, 700 steps chose speed, not the "
    "mode, in 3 of 3 tuning seeds; 300 steps chose the mode.",
}

__all__ = [
    "expand_structure",
    "neurosymbolic_loss",
    "run_program",
    "sample_codes",
    "trajectory_features",
]

HOLE, ABSENT = -1, -2  # in the place of a feature
LARGEST = 1e15  # of positions and means: their squares are float32
LARGEST_TERM = 1e6  # of what programs multiply


@typed
def trajectory_features(x: Float[ArrayLike, "batch steps 2"]) -> Float[Array, "..."]:
    """What leaves of programs can select: place, speed, distance and turn, per step.

    v_t = x_{t+1} - x_t;   x_t, y_t, |v_t|, |x_t - x_0|, |angle from v_{t-1} to v_t|

    Args:
        x: positions, `[B, T, 2]`, T >= 3. Beyond 1e15 they count as 1e15.

    Returns:
        `[B, T - 2, 5]`, float32, for t = 1 .. T - 2; angles are in [0, pi], and 0
        beside a step shorter than 1e-10.

    Raises:
        ValueError: there are fewer than 3 positions.

    >>> x = jnp.array([[[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]]])
    >>> trajectory_features(x)[0, 0].tolist()
    [3.0, 4.0, 1.0, 5.0, 0.6435]
    """
    check_range("x.shape[1]", jnp.shape(x)[1], low=3)
    x = _clip(x, LARGEST)
    length, direction = _polar(x[:, 1:] - x[:, :-1])
    before, after = direction[:, :-1], direction[:, 1:]
    dot = jnp.sum(before * after, axis=-1)
    cross = before[..., 0] * after[..., 1] - before[..., 1] * after[..., 0]
    still = jnp.square(dot) + jnp.square(cross) < 0.5  # a direction is missing
    turn = jnp.arctan2(jnp.abs(cross), jnp.where(still, 1.0, dot))  # 0 there
    distance = _polar(x[:, 1:-1] - x[:, :1])[0]
    rest = jnp.stack([length[:, 1:], distance, turn], axis=-1)
    return jnp.concatenate([x[:, 1:-1], rest], axis=-1)


@typed
def run_program(
    structure: Int[ArrayLike, "3 2"],
    features: Float[ArrayLike, "batch steps features"],
    fillers: Float[ArrayLike, "batch 3"],
    weights: Float[ArrayLike, " 3"],
    biases: Float[ArrayLike, " 3"],
    *,
    window: int = 5,
) -> Float[Array, " batch"]:
    """The log-odds that a program gives trajectories, smooth in all that is learned.

    leaf_0,  or  g leaf_1 + (1 - g) leaf_2,  g = sigmoid(leaf_0)
    leaf_i = weight_i fold(feature) + bias_i;   a hole: leaf_i = filler_i

    Args:
        structure: rows are condition, then, else. Of each the feature, 0 .. F - 1
            (larger count as F - 1), or -1 for a hole; and the fold: 0 average over
            time, 1 that of the last window, 2 the largest of any window. Where the
            second row's feature is -2 there is no if: the program is the first row.
        features: standardised, `[B, T, F]`; here and below 1e6 is the largest number.
        fillers: of a network, in the place of holes, `[B, 3]`.
        weights: of leaves, `[3]`.
        biases: likewise.
        window: steps, in 1 .. T.

    Returns:
        Log-odds of code 1, `[B]`, float32; the binary program is `> 0`.

    Raises:
        ValueError: `window` is out of range.

    >>> s = jnp.array([[0, 0], [0, 2], [-1, 0]])  # if average then peak else a hole
    >>> features, one = jnp.array([[[0.0], [4.0]], [[-9.0], [3.0]]]), jnp.ones(3)
    >>> run_program(s, features, jnp.zeros((2, 3)), one, 0 * one, window=1).tolist()
    [3.5232, 0.1423]
    """
    steps, count = jnp.shape(features)[1:]
    check_range("window", window, low=1, high=steps)
    numbers = features, fillers, weights, biases
    features, fillers, weights, biases = (_clip(a, LARGEST_TERM) for a in numbers)
    windows = [features[:, i : steps - window + 1 + i] for i in range(window)]
    windows = jnp.mean(jnp.stack(windows), axis=0)
    folds = jnp.mean(features, axis=1), windows[:, -1], jnp.max(windows, axis=1)
    table = jnp.stack(folds, axis=-1)
    feature, fold = jnp.asarray(structure).T
    table = table[:, jnp.clip(feature, 0, count - 1), jnp.clip(fold, 0, 2)]
    leaves = weights[None] * table + biases[None]
    leaves = jnp.where((feature == HOLE)[None], fillers, leaves)
    gate = jax.nn.sigmoid(leaves[:, 0])
    chosen = gate * leaves[:, 1] + (1.0 - gate) * leaves[:, 2]
    return jnp.where(feature[1] == ABSENT, leaves[:, 0], chosen)


@typed
def sample_codes(
    key: Key[Array, ""],
    logits: Float[ArrayLike, "batch programs"],
    *,
    temperature: float | Float[ArrayLike, ""] = 0.5,
) -> Float[Array, "batch programs"]:
    """Binary codes, straight-through: the hard Gumbel-softmax of two classes.

    c = [l + e > 0],   e = log u - log(1 - u);   smooth: sigmoid((l + e) / temperature)

    Gradient: an estimator, that of the smooth sample.

    Args:
        key: a typed key.
        logits: log-odds of code 1, `[B, P]`.
        temperature: > 0.

    Returns:
        0 or 1, `[B, P]`, float32.

    Raises:
        ValueError: `temperature` is not positive.

    >>> sample_codes(jax.random.key(0), jnp.array([[50.0, -50.0]])).tolist()
    [[1.0, 0.0]]
    """
    check_range("temperature", temperature, above=0.0)
    logits = as_float32(logits)
    noisy = logits + jax.random.logistic(key, logits.shape, logits.dtype)
    soft = jax.nn.sigmoid(noisy / as_float32(temperature))
    return (noisy > 0.0) + (soft - lax.stop_gradient(soft))


@typed
def neurosymbolic_loss(
    log_likelihood: Float[ArrayLike, " batch"],
    logits: Float[ArrayLike, "batch programs"],
    mean: Float[ArrayLike, "batch latents"],
    log_std: Float[ArrayLike, "batch latents"],
    adversary_logits: Float[ArrayLike, "batch programs"],
    codes: Float[ArrayLike, "batch programs"],
    *,
    capacity: float | Float[ArrayLike, ""] = 0.6,
    capacity_weight: float | Float[ArrayLike, ""] = 10.0,
    adversary_weight: float | Float[ArrayLike, ""] = 1.0,
    free_bits: float | Float[ArrayLike, ""] = 0.5,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of encoder, programs and decoder.

    -mean log p(x|c,z) + mean_b sum_d max(KL_d, free) + gamma sum_p |C - mean_b KL_p|
    - weight sum_p mean_b CE(adversary_p(z), c_p)

    KL_p is to a fair coin. The adversary reads codes from z; it learns by the last term
    with z constant and the sign changed. Programs learned already are not in the loss.

    Args:
        log_likelihood: of x given codes and a draw of z, in nats, `[B]`.
        logits: of the programs that learn, `[B, P]`; beyond 50 they count as 50.
        mean: of q(z|x), `[B, D]`; beyond 1e15 it counts as 1e15.
        log_std: log of its deviations, `[B, D]`; beyond 40 it counts as 40.
        adversary_logits: at a draw of z, its parameters being constants, `[B, P]`.
        codes: draws of `sample_codes`, `[B, P]`.
        capacity: C, in [0, log 2] nats; the released code has it grow from 0 to 0.6.
        capacity_weight: gamma, >= 0.
        adversary_weight: >= 0.
        free_bits: what a latent may tell for free, in nats, >= 0; as released, 1 / D.

    Returns:
        `(loss, aux)`: float32 scalar; in aux, in nats, "elbo", with the true KLs,
        "program_kl" and "adversary", its cross-entropies, `[P]`, and "neural_kl".

    Raises:
        ValueError: a number is out of range.

    >>> zero, z = jnp.zeros((1, 1)), jnp.ones((1, 2))
    >>> loss, aux = neurosymbolic_loss(jnp.ones(1), zero, z, 0 * z, zero, zero)
    >>> float(loss), float(aux["elbo"])  # -1 + 1 + 10 * 0.6 - log 2, 1 - 1
    (5.3069, 0.0)
    """
    check_range("capacity", capacity, low=0.0, high=math.log(2.0))
    check_range("capacity_weight", capacity_weight, low=0.0)
    check_range("adversary_weight", adversary_weight, low=0.0)
    check_range("free_bits", free_bits, low=0.0)
    likelihood, logits = jnp.mean(as_float32(log_likelihood)), _clip(logits, 50.0)
    entropy = jax.nn.softplus(logits) - logits * jax.nn.sigmoid(logits)
    program_kl = math.log(2.0) - jnp.mean(entropy, axis=0)
    excess = jnp.sum(jnp.abs(as_float32(capacity) - program_kl))
    kl = normal_kl(_clip(mean, LARGEST)[..., None], _clip(log_std, 40.0)[..., None])
    neural_kl = jnp.mean(jnp.sum(kl, axis=1))
    told = jnp.mean(jnp.sum(jnp.maximum(kl, as_float32(free_bits)), axis=1))
    read, targets = _clip(adversary_logits, LARGEST), _clip(codes, LARGEST_TERM)
    adversary = -bernoulli_log_prob(targets, read, axis=0) / len(targets)
    loss = told - likelihood + as_float32(capacity_weight) * excess
    loss = loss - as_float32(adversary_weight) * jnp.sum(adversary)
    aux = {
        "elbo": likelihood - neural_kl - jnp.sum(program_kl),
        "program_kl": program_kl, "neural_kl": neural_kl, "adversary": adversary,
    }  # fmt: skip
    return loss, lax.stop_gradient(aux)


@typed
def expand_structure(
    structure: Int[ArrayLike, "3 2"], *, num_features: int
) -> tuple[Int[Array, "children 3 2"], dict[str, Array]]:
    """All programs in which the first hole is filled: the step of a search.

    A* expands what has the least loss + penalty * cost, holes filled by networks.

    Args:
        structure: as in `run_program`; [[-1, 0], [-2, 0], [-2, 0]] is a mere hole.
        num_features: F, > 0.

    Returns:
        `(children, aux)`: `[3 F + 1, 3, 2]`, by feature and fold, and last an if of
        three holes; in aux, `[3 F + 1]`, "valid", whether there is such a child,
        "complete", whether without holes, and "cost", its leaves and the if.

    Raises:
        ValueError: `num_features` is not positive.

    >>> start = jnp.array([[-1, 0], [-2, 0], [-2, 0]])
    >>> children, aux = expand_structure(start, num_features=1)
    >>> children[2:, :2].tolist(), aux["cost"].tolist()
    ([[[0, 2], [-2, 0]], [[-1, 0], [-1, 0]]], [1.0, 1.0, 1.0, 1.0])
    """
    check_range("num_features", num_features, low=1)
    structure = jnp.asarray(structure)
    leaf = jnp.indices((num_features, 3), structure.dtype).reshape(2, -1).T
    holes = structure[:, 0] == HOLE
    first = holes & (jnp.cumsum(holes) == 1)
    filled = jnp.where(first[None, :, None], leaf[:, None], structure[None])
    branch = jnp.array([[[HOLE, 0]] * 3], structure.dtype)
    children = jnp.concatenate([filled, branch])
    mere = holes[0] & (structure[1, 0] == ABSENT)
    valid, named = jnp.repeat(jnp.any(holes), len(leaf)), children[..., 0]
    return children, {
        "valid": jnp.append(valid, mere), "complete": jnp.all(named != HOLE, axis=1),
        "cost": jnp.sum(named >= 0, axis=1) + 1.0 * (named[:, 1] != ABSENT),
    }  # fmt: skip


def _clip(x: ArrayLike, limit: float) -> Array:
    return jnp.clip(as_float32(x), -limit, limit)


def _polar(v: Array) -> tuple[Array, Array]:
    """Length and direction, both 0 (and without gradient) below 1e-10."""
    short = (square := jnp.sum(jnp.square(v), axis=-1)) < 1e-20
    length = jnp.sqrt(jnp.where(short, 1.0, square))
    direction = jnp.where(short[..., None], 0.0, v / length[..., None])
    return jnp.where(short, 0.0, length), direction


def _program_example(key: Array):
    draws = jax.random.normal(key, (8, 9, 5))
    structure = jnp.array([[4, 0], [2, 2], [HOLE, 0]])
    numbers = draws[:, 7, :3], draws[0, 8, :3], draws[1, 8, :3]
    return (structure, draws[:, :7], *numbers), {"window": 3}


def _loss_example(key: Array):
    draws = jax.random.normal(key, (6, 8, 2))
    codes = (draws[5] > 0.0).astype(draws.dtype)
    return (draws[0, :, 0], *draws[1:5], codes), {}


EXAMPLES = {
    trajectory_features: lambda key: ((jax.random.normal(key, (8, 6, 2)),), {}),
    run_program: _program_example,
    sample_codes: lambda key: ((key, jax.random.normal(key, (8, 2))), {}),
    neurosymbolic_loss: _loss_example,
    expand_structure: lambda key: (_program_example(key)[0][:1], {"num_features": 5}),
}
