"""Which drafted tokens a model keeps, so that all are drawn as if by it alone.

A draft x ~ q is kept with probability min(1, p(x) / q(x)); where it is not, the token
is drawn again from max(p - q, 0), normalised. It then has the distribution p:

    min(p, q) + (1 - sum min(p, q)) max(p - q, 0) / sum max(p - q, 0) = p

    kept, token = speculative_accept(key, target_logits, draft_logits, drafted)

Several drafts for the same place are tried in turn (`tree_accept`; SpecInfer,
2305.09781).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Key

from jaxzoo.core.typed import ArrayLike, as_float32, typed

__all__ = ["speculative_accept", "tree_accept"]


@typed
def speculative_accept(
    key: Key[Array, ""],
    target_logits: Float[ArrayLike, "*batch places vocabulary"],
    draft_logits: Float[ArrayLike, "*batch drafts vocabulary"],
    drafted: Integer[ArrayLike, "*batch drafts"],
) -> tuple[Int[Array, "*batch"], Int[Array, "*batch"]]:
    """How many drafts are kept, and the token after them: together drawn from p.

    Args:
        key: a typed key, consumed.
        target_logits: log p up to a constant, `[..., G + 1, V]`; place i follows the
            first i drafts.
        draft_logits: log q likewise, `[..., G, V]`, which the drafts were drawn from.
        drafted: `[..., G]`, in [0, V).

    Returns:
        Kept drafts, int32, 0 to G, and the next token, int32: drawn from normalised
        max(p - q, 0) after a rejection, and otherwise from p.

    Raises:
        ValueError: there is not one place more than drafts.

    >>> p, q = jnp.array([[0.0, 0.0, 1.0]] * 3), jnp.array([[0.5, 0.0, 0.5]] * 2)
    >>> kept, token = speculative_accept(
    ...     jax.random.key(0), jnp.log(p), jnp.log(q), jnp.array([2, 0]))
    >>> kept.item(), token.item()  # p(0) = 0
    (1, 2)
    """
    if target_logits.shape[-2] != drafted.shape[-1] + 1:
        raise ValueError(
            f"argument 'target_logits' has {target_logits.shape[-2]} places, expected "
            f"one more than the {drafted.shape[-1]} of 'drafted'."
        )
    accept_key, token_key = jax.random.split(key)
    log_p, log_q = _normalised(target_logits), _normalised(draft_logits)
    draft = jnp.asarray(drafted)[..., None]
    own_p = jnp.take_along_axis(log_p[..., :-1, :], draft, axis=-1)[..., 0]
    own_q = jnp.take_along_axis(log_q, draft, axis=-1)[..., 0]
    # Strictly less: u = 0 must not let a token through that the target never writes.
    log_u = jnp.log(jax.random.uniform(accept_key, drafted.shape, own_p.dtype))
    good = log_u < own_p - own_q
    kept = jnp.sum(jnp.cumprod(good.astype(jnp.int32), axis=-1), axis=-1)
    # After the last draft q is 0, and max(p - q, 0) is p.
    beyond = [(0, 0)] * (log_q.ndim - 2) + [(0, 1), (0, 0)]
    log_q = jnp.pad(log_q, beyond, constant_values=-jnp.inf)
    place = kept[..., None, None]
    log_p = jnp.take_along_axis(log_p, place, axis=-2)[..., 0, :]
    log_q = jnp.take_along_axis(log_q, place, axis=-2)[..., 0, :]
    token = jax.random.categorical(token_key, _residual(log_p, log_q))
    return kept.astype(jnp.int32), token.astype(jnp.int32)


@typed
def tree_accept(
    key: Key[Array, ""],
    target_logits: Float[ArrayLike, "*batch branches places vocabulary"],
    draft_logits: Float[ArrayLike, "*batch branches drafts vocabulary"],
    drafted: Integer[ArrayLike, "*batch branches drafts"],
) -> tuple[Int[Array, "*batch"], Int[Array, "*batch"], Int[Array, "*batch"]]:
    """How many drafts of which branch are kept, and the token after them: drawn from p.

    At each place the tokens of the branches that agree with what was kept are tried in
    turn, x with probability min(1, r(x) / q(x)): r is p at first, and after each that
    is not kept max(r - q, 0), normalised. If none is, the token comes from r.

    Args:
        key: a typed key, consumed.
        target_logits: log p up to a constant, `[..., K, G + 1, V]`; place i follows the
            first i drafts of that branch.
        draft_logits: log q likewise, `[..., K, G, V]`.
        drafted: `[..., K, G]` in [0, V), branches drawn independently of each other.

    Returns:
        Kept drafts, int32, 0 to G; the next token, int32; and a branch that begins with
        what was kept, int32.

    Raises:
        ValueError: there is not one place more than drafts.

    >>> p = jnp.array([[[0.0, 0.0, 1.0]] * 2] * 2)
    >>> q = jnp.array([[[0.5, 0.0, 0.5]]] * 2)
    >>> found = tree_accept(
    ...     jax.random.key(0), jnp.log(p), jnp.log(q), jnp.array([[0], [2]]))
    >>> [x.item() for x in found]  # p(0) = 0, and the second branch says 2
    [1, 2, 1]
    """
    if target_logits.shape[-2] != drafted.shape[-1] + 1:
        raise ValueError(
            f"argument 'target_logits' has {target_logits.shape[-2]} places, expected "
            f"one more than the {drafted.shape[-1]} of 'drafted'."
        )
    log_p, log_q = _normalised(target_logits), _normalised(draft_logits)
    tokens = jnp.asarray(drafted)
    *batch, branches, drafts = tokens.shape

    def one(key: Array, log_p: Array, log_q: Array, tokens: Array) -> Any:
        accept_key, token_key = jax.random.split(key)
        log_u = jnp.log(jax.random.uniform(accept_key, (drafts, branches), log_p.dtype))

        def place(carry: Any, i: Array) -> Any:
            agrees, is_open, kept = carry
            # Branches that agree have read the same: the first tells p and q of all.
            first = jnp.argmax(agrees)
            q = log_q[first, i]

            def candidate(carry: Any, k: Array) -> Any:
                left, found, token = carry
                x = tokens[k, i]
                is_tried = agrees[k] & is_open & ~found
                is_good = is_tried & (log_u[i, k] < left[x] - q[x])
                rest = jax.nn.log_softmax(_residual(left, q))
                left = jnp.where(is_tried & ~is_good, rest, left)
                return (left, found | is_good, jnp.where(is_good, x, token)), None

            start = log_p[first, i], jnp.zeros((), bool), jnp.zeros_like(tokens[0, 0])
            (left, found, token), _ = jax.lax.scan(
                candidate, start, jnp.arange(branches)
            )
            agrees = jnp.where(found, agrees & (tokens[:, i] == token), agrees)
            return (agrees, found, kept + found), (left, is_open)

        begin = jnp.ones(branches, bool), jnp.ones((), bool), jnp.zeros((), jnp.int32)
        (agrees, is_open, kept), (left, was_open) = jax.lax.scan(
            place, begin, jnp.arange(drafts)
        )
        branch = jnp.argmax(agrees)
        # The place where nobody was kept is the last that was open.
        last = jnp.where(is_open, log_p[branch, drafts], left[jnp.sum(was_open) - 1])
        token = jax.random.categorical(token_key, last)
        return kept, token.astype(jnp.int32), branch.astype(jnp.int32)

    for _ in batch:
        one = jax.vmap(one)
    return one(jax.random.split(key, tuple(batch)), log_p, log_q, tokens)


def _normalised(logits: ArrayLike) -> Array:
    return jax.nn.log_softmax(as_float32(logits))


def _residual(log_p: Array, log_q: Array) -> Array:
    """log max(p - q, 0), and log p where nothing is left because p = q."""
    is_more = log_p > log_q
    gap = jnp.where(is_more, log_q - log_p, -1.0)
    left = jnp.where(is_more, log_p + jnp.log(-jnp.expm1(gap)), -jnp.inf)
    return jnp.where(jnp.any(is_more, axis=-1, keepdims=True), left, log_p)


def _drafts(key: Array) -> Any:
    logits = jax.random.normal(key, (2, 8, 4, 5))
    drafted = jax.random.randint(key, (8, 3), 0, 5)
    return (key, logits[0], logits[1, :, :-1], drafted), {}


def _tree(key: Array) -> Any:
    logits = jax.random.normal(key, (2, 8, 1, 4, 5))
    target, draft = jnp.tile(logits, (1, 1, 3, 1, 1))
    drafted = jax.random.randint(key, (8, 3, 3), 0, 5)
    return (key, target, draft[..., :-1, :], drafted), {}


EXAMPLES = {speculative_accept: _drafts, tree_accept: _tree}
