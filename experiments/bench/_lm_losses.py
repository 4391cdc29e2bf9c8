"""Contestants of `lm`: losses from hidden states, and DPO from logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import _timing as timing
from jaxzoo.lm.dpo import dpo_loss
from jaxzoo.nn.token_logprobs import target_logprobs, token_logprobs

Call = Callable[[], Any]
CHUNKED, DENSE = "token_logprobs", "whole logits"
DPO, TORCH_DPO = "dpo_loss of logits", "torch dpo of logits"


def temporary(function: Any, *arrays: Any) -> float:
    """Bytes of temporary memory of a jitted function."""
    analysis: Any = function.lower(*arrays).compile().memory_analysis()
    return float(analysis.temp_size_in_bytes)


def waiting(function: Any, *arrays: Any) -> Call:
    return lambda: jax.block_until_ready(function(*arrays))


def losses(config: Any) -> tuple[dict[str, Call], dict[str, float]]:
    """Cross-entropy and gradient of hidden states and head, chunked and whole."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = config.features, config.vocabulary
    hidden = jax.random.normal(keys[0], (config.tokens, config.features))
    head = jax.random.normal(keys[1], shape) / config.features**0.5
    targets = jax.random.randint(keys[2], (config.tokens,), 0, config.vocabulary)

    def chunked(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return -jnp.mean(token_logprobs(hidden, head, targets)[0])

    def dense(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return -jnp.mean(target_logprobs(hidden @ head, targets))

    calls, bytes_of = {}, {}
    for name, loss in {CHUNKED: chunked, DENSE: dense}.items():
        both = jax.jit(jax.value_and_grad(loss, (0, 1)))
        calls[name] = waiting(both, hidden, head)
        bytes_of[name] = temporary(both, hidden, head)
    return calls, bytes_of


def preferences(config: Any) -> tuple[dict[str, Call], float]:
    """DPO from logits to their gradient, ours and PyTorch's."""
    rows, length, vocabulary = config.dpo
    rng = np.random.default_rng(0)
    logits = rng.normal(size=config.dpo).astype(np.float32)
    tokens = rng.integers(0, vocabulary, (rows, length))
    half = rows // 2
    reference = rng.normal(size=(2, half)).astype(np.float32) - 9.0 * length

    def loss(logits: jax.Array) -> jax.Array:
        sums = jnp.sum(target_logprobs(logits, tokens), axis=-1)
        return dpo_loss(sums[:half], sums[half:], reference[0], reference[1])[0]

    both = jax.jit(jax.value_and_grad(loss))
    given = jnp.asarray(logits)
    calls = {DPO: waiting(both, given)}
    if torch := imported():
        theirs = torch.from_numpy(logits).requires_grad_()
        index, fixed = torch.from_numpy(tokens)[..., None], torch.from_numpy(reference)

        def call() -> Any:
            theirs.grad = None
            logp = torch.log_softmax(theirs, -1).gather(-1, index)[..., 0].sum(-1)
            margin = (logp[:half] - fixed[0]) - (logp[half:] - fixed[1])
            value = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
            value.backward()
            return value.detach(), theirs.grad

        calls[TORCH_DPO] = call
        _same([calls[DPO](), call()])
    return calls, temporary(both, given)


def imported() -> Any:
    """PyTorch, or None."""
    try:
        import torch  # pyright: ignore
    except ImportError:
        return None
    return torch


def _same(results: list[Any]) -> None:
    arrays = [[np.asarray(x) for x in pair] for pair in results]
    for ours, theirs in zip(*arrays, strict=True):
        if (error := timing.far(ours, theirs)) > 1e-4:
            raise ArithmeticError(f"jax and torch differ by {error}.")
