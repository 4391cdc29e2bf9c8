"""GFlowNet-EM: latent structures built step by step, by a policy that learns to infer.

The E-step trains a policy P_F that builds z by actions, s_0 -> ... -> s_T = z. Where

    Z(x) prod_t P_F(s_t+1|s_t, x) = R(z) prod_t P_B(s_t|s_t+1),   R = p(x, z)^(1/temp)

it draws z from p(z|x), and any ways train it: noisier ones, stored ones, or dreams. The
M-step ascends log p(x, z) of drawn z, while the E-step's loss is small.

    walk = sample_latents(key, policy, x, num_latents=8, explore=0.05)
    loss, aux = balance_loss(walk.log_flow, walk.log_pf, log_joint(x, walk.actions))
    dream = sample_latents(key, policy, x_of_z, num_latents=8, actions=z)  # z, x from p
    loss -= dream.log_pf.sum(axis=1).mean()
    average, now = m_step_gate(average, aux["per_example"], threshold=1.0)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "gflownet_em",
    "title": "GFlowNet-EM for learning compositional latent variable models",
    "arxiv": "2302.06576",
    "year": 2023,
    "authors": "Edward J. Hu, Nikolay Malkin, Moksh Jain, Katie Everett, Alexandros "
    "Graikos, Yoshua Bengio",
    "where": "The E-step by (sub-)trajectory balance, exploration, sleep, tempering, "
    "the adaptive E-step; policies over discrete latents and over trees.",
    "differs": "Replay and sleep are the caller's, by `actions`. Trees' flows are the "
    "policy's times the p built so far, as in the released code; its MCMC, back and "
    "forth, is left out, and one set of symbols makes words and joins. Z depends on x, "
    "where the released VAE has one. The experiment has sums of signed vectors and a "
    "fixed random grammar: no decoder of images, and no grammar is learned. On its 256 "
    "latents the policy is 0.05 from the posterior, mean field 0.34, of one seed 0.17.",
}

__all__ = ["balance_loss", "m_step_gate", "sample_latents", "sample_trees"]
__all__ += ["Walk"]

LARGEST = 1e15  # of a residual: its square, summed, stays in float32


class Walk(NamedTuple):
    """How z was built: `actions` and the rest per step, `[B, T]`."""

    actions: Array  # int32
    log_pf: Array  # log P_F of the action, nats, without exploration
    log_pb: Array  # log P_B of taking it back, nats
    log_flow: Array  # the policy's log-flow before it; the first is log Z(x)


@typed
def balance_loss(
    log_flow: Float[ArrayLike, "batch steps"],
    log_pf: Float[ArrayLike, "batch steps"],
    log_reward: Float[ArrayLike, " batch"],
    log_pb: Float[ArrayLike, "batch steps"] | None = None,
    *,
    decay: float | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The E-step's loss: trajectory balance, or that of all pieces of each way.

    (log F_0 + sum_t log P_F/P_B - log F_T)^2,   log F_0 = log Z, F_T = R
    sum_{i<j} decay^(j-i-1) (log F_i + sum_{i<=t<j} log P_F/P_B - log F_j)^2 / sum w

    Args:
        log_flow: the policy's log F of the states before the end, nats.
        log_pf: log P_F of the actions, by whatever policy they were taken.
        log_reward: log p(x, z) of what was built.
        log_pb: log P_B of the way back; None where there is one way alone.
        decay: > 0, weight of the pieces; None: the whole way alone.
        temperature: > 0; above 1 it flattens the posterior.

    Returns:
        `(loss, aux)`: float32 scalar, and its "per_example", `[B]`.
    Raises:
        ValueError: a number is out of range.

    >>> args = jnp.array([[1.0, 0.0]]), jnp.log(jnp.ones((1, 2)) / 2), jnp.array([-2.0])
    >>> [float(balance_loss(*args, decay=decay)[0]) for decay in (None, 1.0)]
    [2.604, 1.4687]
    """
    check_range("temperature", temperature, above=0.0)
    log_flow, log_pf = as_float32(log_flow), as_float32(log_pf)
    ratio = log_pf if log_pb is None else log_pf - as_float32(log_pb)
    steps = log_pf.shape[1]
    # A piece's residual is a difference of two numbers, of its ends.
    flows = jnp.append(log_flow, as_float32(log_reward)[:, None] / temperature, axis=1)
    ends = flows - jnp.pad(jnp.cumsum(ratio, axis=1), ((0, 0), (1, 0)))
    ends = jnp.clip(ends, -LARGEST, LARGEST)
    if decay is None:
        start, end, weight = np.array([0]), np.array([steps]), np.ones(1)
    else:
        check_range("decay", decay, above=0.0)
        start, end = np.triu_indices(steps + 1, 1)
        weight = np.exp((end - start - 1 - (steps - 1) * (decay > 1)) * math.log(decay))
    square = jnp.square(ends[:, start] - ends[:, end])
    per_example = square @ jnp.asarray(weight / weight.sum(), square.dtype)
    return jnp.mean(per_example), {"per_example": per_example}


@typed
def m_step_gate(
    average: Float[ArrayLike, ""],
    losses: Float[ArrayLike, " batch"],
    *,
    threshold: float,
    decay: float = 0.9,
) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """Whether the sampler follows the model closely enough for an M-step.

    average' = decay average + (1 - decay) mean losses,   now = average' < threshold

    Args:
        average: of the steps before; begin above the threshold.
        losses: "per_example" of the E-step's loss.
        threshold: in squared nats.
        decay: in [0, 1).

    Returns:
        `(average', now)`, float32 and bool.
    Raises:
        ValueError: a number is out of range.

    >>> average, now = m_step_gate(jnp.array(2.0), jnp.array([1.0, 2.0]), threshold=1.9)
    >>> float(average), bool(now)
    (1.95, False)
    """
    check_range("decay", decay, low=0.0, below=1.0)
    check_range("threshold", threshold)
    average = decay * as_float32(average) + (1.0 - decay) * jnp.mean(as_float32(losses))
    return average, average < threshold


@typed
def sample_latents(
    key: Key[Array, ""],
    policy: Callable[[Any, Any], Any],
    x: Float[ArrayLike, "batch ..."],
    *,
    num_latents: int,
    num_values: int = 2,
    explore: float = 0.0,
    actions: Int[ArrayLike, "batch num_latents"] | None = None,
) -> Walk:
    """Discrete latents, each drawn given x and those before it; P_B is 1.

    Args:
        key: a typed key, consumed.
        policy: `(x, state) -> (logits [B, D, V], log_flow [B])`, such as `FlowPolicy`
            in `jaxzoo.nn`; the state `[B, D, V]` is one-hot, 0 for what is to come.
        x: data.
        num_latents: D.
        num_values: V of each latent.
        explore: probability of a uniform action, in [0, 1].
        actions: z in [0, V) to be followed, of a replay buffer or of a dream.

    Returns:
        `Walk`, whose actions are z.
    Raises:
        ValueError: a number is out of range.

    >>> net = lambda x, state: (jnp.zeros((1, 2, 2)), x[:, 0])
    >>> walk = sample_latents(jax.random.key(0), net, jnp.ones((1, 1)), num_latents=2)
    >>> walk.log_pf.tolist(), walk.log_flow.tolist()
    ([[-0.6931, -0.6931]], [[1.0, 1.0]])
    """
    check_range("num_latents", num_latents, low=1)
    check_range("num_values", num_values, low=1)
    x = as_float32(x)
    start = jnp.zeros((x.shape[0], num_latents, num_values), x.dtype)

    def look(state: Array, t: Array) -> tuple[Array, Array]:
        logits, flow = policy(x, state)
        return jnp.take(logits.reshape(start.shape), t, axis=1), flow

    def move(state: Array, action: Array, t: Array) -> tuple[Array, Array]:
        chosen = jax.nn.one_hot(action, num_values, dtype=x.dtype)
        return state.at[:, t].set(chosen), jnp.zeros(x.shape[:1], x.dtype)

    return _walk(key, start, (look, move), num_latents, explore, actions)[1]


@typed
def sample_trees(
    key: Key[Array, ""],
    policy: Callable[[Any], Any],
    grammar: Float[ArrayLike, "symbols choices"],
    words: Int[ArrayLike, "batch length"],
    *,
    explore: float = 0.0,
    actions: Int[ArrayLike, "batch steps"] | None = None,
) -> tuple[Float[Array, " batch"], Walk]:
    """Trees over sentences, joined from below; P_B is uniform over roots of joins.

    A state is a row of roots, at first the words; action i K + A joins roots i and
    i + 1 under symbol A, the last under symbol 0. p(x, z) is the product over joins of
    sum_{B, C} p(A -> B C) b_B c_C, b one-hot or, of a word, p(B -> word). The flow is
    the policy's times the p of what is built so far.

    Args:
        key: a typed key, consumed.
        policy: `roots [B, N] -> (logits [B, N - 1, K], log_flow [B])`; a root is a word
            in [0, V), V + its symbol, or V + K: none.
        grammar: logits of what a symbol becomes, `[K, K K + V]`: two symbols B K + C,
            or a word, whose own symbol is summed over, as in the released code.
        words: in [0, V), N >= 2.
        explore: probability of a uniform action, in [0, 1].
        actions: to be followed, `[B, N - 1]`.

    Returns:
        `(log_joint, walk)`: log p(x, z), float32 `[B]`, for both steps; and the way.
    Raises:
        ValueError: a number is out of range, or a shape does not fit.

    >>> policy = lambda roots: (jnp.zeros((1, 2, 1)), jnp.zeros(1))
    >>> args = jax.random.key(0), policy, jnp.zeros((1, 2)), jnp.array([[0, 0, 0]])
    >>> log_joint, walk = sample_trees(*args)  # 1/2 for each of 2 joins and 3 words
    >>> log_joint.tolist(), walk.log_pf.tolist()
    ([-3.4657], [[-0.6931, 0.0]])
    """
    size, (batch, length) = grammar.shape[0], words.shape
    vocabulary = grammar.shape[1] - size**2
    check_range("grammar.shape[1]", grammar.shape[1], low=size**2 + 1)
    check_range("words.shape[1]", length, low=2)
    log_p = jax.nn.log_softmax(as_float32(grammar), axis=1)
    rules = log_p[:, : size**2].reshape(size, size, size)
    leaves = jnp.moveaxis(log_p[:, size**2 :][:, words], 0, 2)  # [B, N, K]
    place, rows, symbols = jnp.arange(length), jnp.arange(batch), jnp.arange(size)

    def look(state: Any, t: Array) -> tuple[Array, Array]:
        logits, flow = policy(state[0])
        free = (place[:-1] < length - 1 - t)[:, None]
        legal = free & ((symbols == 0) | (t < length - 2))[None]
        logits = jnp.where(legal[None], logits, -jnp.inf)
        built = jax.nn.logsumexp(state[1], axis=2)
        built = jnp.where((place < length - t)[None], built, 0.0)
        return logits.reshape(batch, -1), flow + jnp.sum(built, axis=1)

    def move(state: Any, action: Array, t: Array) -> tuple[Any, Array]:
        roots, inside = state
        at, symbol = action // size, action % size
        left, right = inside[rows, at], inside[rows, at + 1]
        pairs = rules[symbol] + left[:, :, None] + right[:, None]
        value = jax.nn.logsumexp(pairs, axis=(1, 2))[:, None]
        value = jnp.where(symbol[:, None] == symbols[None], value, -jnp.inf)
        # What is right of the pair moves up by one.
        source = jnp.minimum(place[None] + (place[None] > at[:, None]), length - 1)
        roots = jnp.take_along_axis(roots, source, axis=1)
        roots = roots.at[:, -1].set(vocabulary + size)
        roots = roots.at[rows, at].set(vocabulary + symbol)
        inside = jnp.take_along_axis(inside, source[..., None], axis=1)
        inside = inside.at[rows, at].set(value)
        joined = (roots >= vocabulary) & (roots < vocabulary + size)
        return (roots, inside), -jnp.log(jnp.sum(joined, axis=1).astype(inside.dtype))

    start = (words.astype(jnp.int32), leaves)
    (_, inside), walk = _walk(key, start, (look, move), length - 1, explore, actions)
    return inside[:, 0, 0], walk


def _walk(key: Any, start: Any, env: Any, steps: int, explore: float, actions: Any):
    """Follows `actions`, or draws them; logits of -inf are illegal."""
    look, move = env
    check_range("explore", explore, low=0.0, high=1.0)
    if actions is not None:
        check_range("actions.shape[1]", actions.shape[1], low=steps, high=steps)
        actions = actions.T.astype(jnp.int32)

    def step(state: Any, inputs: Any) -> Any:
        t, key, action = inputs
        logits, flow = look(state, t)
        log_p = jax.nn.log_softmax(as_float32(logits), axis=1)
        if action is None:
            legal = log_p > -jnp.inf
            even = legal / jnp.sum(legal, axis=1, keepdims=True).astype(log_p.dtype)
            log_even = jnp.log(explore * even + (1.0 - explore) * jnp.exp(log_p))
            action = jax.random.categorical(key, jax.lax.stop_gradient(log_even))
            action = action.astype(jnp.int32)
        log_pf = jnp.take_along_axis(log_p, action[:, None], axis=1)[:, 0]
        state, log_pb = move(state, action, t)
        return state, Walk(action, log_pf, log_pb, as_float32(flow))

    inputs = (jnp.arange(steps), jax.random.split(key, steps), actions)
    state, walk = jax.lax.scan(step, start, inputs)
    return state, Walk(*(jnp.swapaxes(x, 0, 1) for x in walk))


def _policy(x: Array, state: Any = 0.0) -> tuple[Array, Array]:
    logits = jnp.sin(jnp.stack([x[:, -3:], 3 * x[:, :3]], axis=2) + state)
    return logits, jnp.sum(logits, axis=(1, 2))


def _normal(key: Array, *shape: int) -> Array:
    return jax.random.normal(key, shape)


EXAMPLES = {
    balance_loss: lambda key: (
        (*_normal(key, 2, 8, 3), _normal(key, 8), _normal(key, 8, 3)), {"decay": 0.9},
    ),
    m_step_gate: lambda key: ((jnp.ones(()), _normal(key, 8)), {"threshold": 1.0}),
    sample_latents: lambda key: (
        (key, _policy, _normal(key, 8, 3)), {"num_latents": 3, "explore": 0.1},
    ),
    sample_trees: lambda key: (
        (key, _policy, _normal(key, 2, 8), jnp.eye(8, 4, dtype=int)), {"explore": 0.1},
    ),
}  # fmt: skip
