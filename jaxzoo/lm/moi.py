"""Mixture of Inputs: a model reads what it might have said beside what it said.

A token y is drawn from p as ever, but the next input is the posterior mean of a
Dirichlet prior with concentrations H p that saw y beta + 1 - H times,

    w = (H p + (beta + 1 - H) onehot(y)) / (beta + 1)
      = onehot(y) + H / (beta + 1) (p - onehot(y))
    H = entropy(p) / log V                                           in [0, 1]

and the model reads the mean of the embeddings, sum_v w_v e_v. Where it is certain that
is the token's own. No training, and the text is one of tokens:

    text, aux = moi_generate(key, model, prompt, state=cache, num_tokens=64, beta=1.0)

The model is one that reads weights too, as `jaxzoo.nn.language_model.LanguageModel`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed
from jaxzoo.nn.generate import generate

PAPER = {
    "slug": "moi",
    "title": "Text Generation Beyond Discrete Token Sampling",
    "arxiv": "2505.14827",
    "year": 2025,
    "authors": "Yufan Zhuang, Liyuan Liu, Chandan Singh, Jingbo Shang, Jianfeng Gao",
    "where": "Section 3 (the Dirichlet prior by entropy, its posterior mean, the mixed "
    "input) and the direct mixture that section 4 compares with.",
    "differs": "By default p is that of the 20 likeliest tokens and H its entropy "
    "over log 20, as in the released code for vLLM; the paper's are of the whole "
    "vocabulary (`top_k=None`). The released code loses the weight of a drawn token "
    "that is not among the 20; here it stays. It mixes probabilities from before the "
    "temperature, which `prior_temperature` can change. Neither top-p nor min-p. The "
    "experiment has no large model that writes long chains of thought, and no text, "
    "but a transformer of 56 thousand parameters that was trained to write partial "
    "results modulo 10. There mixtures gain 0.5 points on sampling, the most with "
    "beta = 0, below what the authors advise, and the direct mixture gains 8: the "
    "claim that it is behind them fails. Greedy decoding gains 17: an error is here a "
    "token that was drawn against the odds, and what forgets that draw helps.",
}

__all__ = ["moi_generate", "moi_weights"]


@typed
def moi_weights(
    logits: Float[ArrayLike, "*batch vocabulary"],
    tokens: Integer[ArrayLike, "*batch"],
    *,
    beta: float | Float[ArrayLike, ""] = 1.0,
    top_k: int | None = 20,
) -> tuple[Float[Array, "*batch vocabulary"], dict[str, Array]]:
    """Weights of the embeddings in the next input.

    w = (H p + (beta + 1 - H) onehot(y)) / (beta + 1),   p = softmax(logits)

    Args:
        logits: that the tokens were drawn from, `[..., V]`; -inf is never mixed.
        tokens: y in [0, V), `[...]`.
        beta: >= 0; inf gives the token alone. The authors advise 0.5 to 2.
        top_k: p is that of the likeliest tokens, of equal ones the first, and H its
            entropy over log top_k: 20 in the released code. None: of all tokens, as in
            the paper.

    Returns:
        `(weights, aux)`: float32 `[..., V]` that sum to 1, and `aux["entropy"]`, H in
        [0, 1], `[...]`.

    Raises:
        ValueError: a number is out of range.

    >>> logits = jnp.log(jnp.array([0.5, 0.25, 0.25]))
    >>> weights, aux = moi_weights(logits, jnp.array(1), beta=1.0)
    >>> weights.round(4).tolist(), aux["entropy"].round(4).item()
    ([0.2366, 0.6451, 0.1183], 0.9464)
    >>> moi_weights(logits, jnp.array(1), beta=float("inf"))[0].tolist()
    [0.0, 1.0, 0.0]
    """
    check_range("beta", beta, low=0.0)
    if top_k is not None:
        check_range("top_k", top_k, low=1)
    logits = as_float32(logits)
    p, entropy = _prior(logits, top_k)
    own = jax.nn.one_hot(tokens, logits.shape[-1], dtype=logits.dtype)
    weights = own + (entropy / (1.0 + beta))[..., None] * (p - own)
    return weights, {"entropy": entropy}


@typed
def moi_generate(
    key: Key[Array, ""],
    model: Callable[[Any, Array], tuple[Array, Any]],
    prompt: Integer[ArrayLike, "batch prompt"], *,
    state: Any, num_tokens: int, beta: float | Float[ArrayLike, ""] = 1.0,
    temperature: float = 1.0, prior_temperature: float = 1.0, top_k: int | None = 20,
    is_direct: bool = False,
) -> tuple[Int[Array, "batch num_tokens"], dict[str, Any]]:  # fmt: skip
    """Draws tokens as ever, and reads each as a mixture by `moi_weights`.

    Args:
        key: a typed key, consumed.
        model: `(state, x) -> (logits [B, K, V], state)`, where x is the tokens of the
            prompt, `[B, P]`, and then weights of symbols, float32 `[B, 1, V]`.
        prompt: `[B, P]`, P >= 1, read without mixing.
        state: before the prompt: an empty cache, with room for P + num_tokens - 1.
        num_tokens: to write in each row.
        beta: >= 0, see `moi_weights`; inf is sampling without mixtures.
        temperature: tokens are drawn from softmax(logits / temperature), the likeliest
            at 0.
        prior_temperature: > 0; the p that is mixed is softmax(logits /
            prior_temperature). 1 in the released code, whatever `temperature` is.
        top_k: see `moi_weights`.
        is_direct: weights are p itself: the direct mixture, without y, H and `beta`.

    Returns:
        The tokens, int32 `[B, num_tokens]`; aux has "log_prob" `[B, num_tokens]` of
        each by the model that reads mixtures, at temperature 1, and the last "state".

    Raises:
        ValueError: a number is out of range, or the prompt is empty.

    A model that counts:

    >>> table = 9 * jnp.eye(4)[jnp.array([1, 2, 3, 0])]
    >>> def model(state, x):
    ...     return (jax.nn.one_hot(x, 4) if x.ndim == 2 else x) @ table, state
    >>> text, aux = moi_generate(
    ...     jax.random.key(0), model, jnp.array([[0]]), state=(), num_tokens=4,
    ...     temperature=0.0, beta=0.0)
    >>> text.tolist()
    [[1, 2, 3, 0]]
    """
    check_range("beta", beta, low=0.0)
    check_range("prior_temperature", prior_temperature, above=0.0, below=float("inf"))
    if top_k is not None:
        check_range("top_k", top_k, low=1)

    def mixing(carry: Any, tokens: Array) -> Any:
        state, logits = carry
        if logits is None:  # the prompt
            said, state = model(state, tokens)
        else:
            if is_direct:
                weights = _prior(logits, top_k)[0]
            else:
                weights = moi_weights(logits, tokens[:, 0], beta=beta, top_k=top_k)[0]
            said, state = model(state, weights[:, None].astype(jnp.float32))
        return said, (state, as_float32(said[:, -1]) / prior_temperature)

    text, aux = generate(
        key, mixing, prompt, state=(state, None), num_tokens=num_tokens,
        temperature=temperature,
    )  # fmt: skip
    return text, {**aux, "state": aux["state"][0]}


def _prior(logits: Array, top_k: int | None) -> tuple[Array, Array]:
    """p `[..., V]` of the likeliest tokens, and its entropy over the largest one."""
    size = logits.shape[-1]
    count = size if top_k is None else min(top_k, size)
    if count < size:
        _, best = jax.lax.top_k(logits, count)
        none = jnp.zeros(logits.shape, bool)
        keep = jnp.put_along_axis(none, best, True, axis=-1, inplace=False)
        logits = jnp.where(keep, logits, -jnp.inf)
    # -inf has no place in a gradient: such tokens are left out of both sums.
    inside = logits > -jnp.inf
    log_p = jax.nn.log_softmax(logits)
    log_p = jnp.where(inside, log_p, 0.0)
    p = jnp.where(inside, jnp.exp(log_p), 0.0)
    entropy = -jnp.sum(p * log_p, axis=-1)
    return p, jnp.minimum(entropy / math.log(max(count, 2)), 1.0)


def _weights_example(key: Array):
    keys = jax.random.split(key)
    logits = 2.0 * jax.random.normal(keys[0], (8, 6))
    return (logits, jax.random.randint(keys[1], (8,), 0, 6)), {"beta": 0.5, "top_k": 4}


def _generate_example(key: Array):
    table = jax.random.normal(jax.random.key(1), (5, 5))

    def model(state: Any, x: Array) -> tuple[Array, Any]:
        x = jax.nn.one_hot(x, 5) if x.ndim == 2 else x
        return x @ table, state

    prompt = jax.random.randint(key, (8, 3), 0, 5)
    return (key, model, prompt), {"state": (), "num_tokens": 6, "top_k": 3}


EXAMPLES = {moi_weights: _weights_example, moi_generate: _generate_example}
