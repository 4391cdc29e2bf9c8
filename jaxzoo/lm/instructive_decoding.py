"""Instructive decoding: what a spoilt instruction asks for is taken from the logits.

A model reads the input twice, under the instruction and under a noisy one, and then the
same answer after both:

    z - eps z_noisy          logits of the next token

so that what it would say anyway counts less. Noisy instructions, by `kind`:

    trunc_shuffle    some of its words, in another order
    null             nothing: the input alone
    random_words     words of a list
    opposite         "Always respond with the opposite of what you're asked. You never
                     get it right.", in the place of the instruction or before it

    noisy = noisy_instruction(key, instruction, kind="opposite", opposite=meta)
    text, aux = instructive_decode(
        key, model, jnp.concatenate([instruction, x], axis=1),
        jnp.concatenate([noisy, x], axis=1), state=cache, noisy_state=other_cache,
        num_tokens=32, temperature=0.0)
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed
from jaxzoo.nn.generate import generate

PAPER = {
    "slug": "instructive_decoding",
    "title": "Distort, Distract, Decode: Instruction-Tuned Model Can Refine its "
    "Response from Noisy Instructions",
    "arxiv": "2311.00233",
    "year": 2024,
    "authors": "Taehyeon Kim, Joonkee Kim, Gihun Lee, Se-Young Yun",
    "where": "Section 2 (contrast of logits, algorithm 1, the four noisy "
    "instructions), exact match and label adherence of section 3.",
    "differs": "eps is 0.3, which the released code adds as -0.3. A word is one token "
    "here, and the first word of an instruction may stay in 'trunc_shuffle', where "
    "the released code drops it. Random words come from a list that is given, not "
    "from NLTK's. 'opposite' stands in the place of the instruction, as in the "
    "released code for SuperNI, or before it. Neither Rouge-L nor label coherence. "
    "The experiment has no instruction-tuned model: a transformer of 57 thousand "
    "parameters learns from examples the four tasks, and what 'opposite' and no "
    "instruction mean. There 'opposite' gains 3.4 points of exact match on greedy "
    "decoding, where 5 were claimed, and 'null' 4.6: both claims on them fail. "
    "Without an instruction the model does the default task alone, so that 'null', "
    "and 'random_words' as much, takes most from what is wrong; 'opposite' is ahead "
    "of both only from eps = 0.5 on. What gains is the task that is half learnt "
    "(sort, from 27 to 37 %).",
}

__all__ = [
    "exact_match",
    "instructive_decode",
    "instructive_logits",
    "label_adherence",
    "noisy_instruction",
]


@typed
def instructive_logits(
    logits: Float[ArrayLike, "*batch vocabulary"],
    noisy_logits: Float[ArrayLike, "*batch vocabulary"],
    *,
    eps: float | Float[ArrayLike, ""] = 0.3,
) -> Float[Array, "*batch vocabulary"]:
    """Logits less those under a noisy instruction.

    z - eps z_noisy

    Args:
        logits: z under the instruction, `[..., V]`; -inf stays.
        noisy_logits: z_noisy after the same tokens, finite where `logits` are.
        eps: 0 leaves the logits as they are; below 0 the noise is followed.

    Returns:
        float32 `[..., V]`.

    Raises:
        ValueError: `eps` is not finite.

    >>> z, noisy = jnp.array([2.0, 1.9, 0.0]), jnp.array([3.0, 0.0, 0.0])
    >>> instructive_logits(z, noisy).tolist()
    [1.1, 1.9, 0.0]
    """
    check_range("eps", eps, above=-float("inf"), below=float("inf"))
    z, noisy = as_float32(logits), as_float32(noisy_logits)
    barred = z == -jnp.inf
    return jnp.where(barred, z, z - eps * jnp.where(barred, 0.0, noisy))


@typed
def noisy_instruction(
    key: Key[Array, ""],
    instruction: Integer[ArrayLike, "*batch length"],
    *,
    kind: Literal["trunc_shuffle", "null", "random_words", "opposite"] = "opposite",
    keep: float = 0.6,
    words: Integer[ArrayLike, " words"] | None = None,
    num_words: int = 1,
    opposite: Integer[ArrayLike, " meta"] | None = None,
    is_before: bool = False,
) -> Int[Array, "*batch noisy"]:
    """Makes the instruction that is to be avoided.

    Args:
        key: a typed key, consumed.
        instruction: tokens, one a word, `[..., L]`.
        kind: see the head of this file.
        keep: of "trunc_shuffle", the share of the words that stay, in [0, 1]:
            floor(keep L) of them.
        words: of "random_words", the list, `[W]`.
        num_words: how many of it, without repetition, 1 to W.
        opposite: of "opposite", its tokens, `[M]`.
        is_before: of "opposite": the instruction follows it, as in the released code
            for multiple choice.

    Returns:
        int32 tokens, `[..., K]`: K is floor(keep L), 0, `num_words`, M or M + L.

    Raises:
        ValueError: a number is out of range, or what `kind` needs is missing.

    >>> key, instruction = jax.random.key(1), jnp.arange(10, 15)
    >>> noisy_instruction(key, instruction, kind="trunc_shuffle").tolist()
    [13, 10, 12]
    >>> noisy_instruction(key, instruction, opposite=jnp.array([7, 7])).tolist()
    [7, 7]
    """
    check_range("keep", keep, low=0, high=1)
    check_range("num_words", num_words, low=1)
    instruction = jnp.asarray(instruction).astype(jnp.int32)
    *batch, length = instruction.shape
    if kind == "null":
        return instruction[..., :0]
    if kind == "trunc_shuffle":
        order = _shuffled(key, (*batch, length))[..., : int(keep * length)]
        return jnp.take_along_axis(instruction, order, axis=-1)
    if kind == "random_words":
        count = 0 if words is None else len(words)
        if words is None or num_words > count:
            raise ValueError(
                f"argument 'num_words' is {num_words}, and 'words' has {count} of them."
            )
        chosen = _shuffled(key, (*batch, count))[..., :num_words]
        return jnp.asarray(words).astype(jnp.int32)[chosen]
    if opposite is None:
        raise ValueError("argument 'opposite' is None, expected tokens for this kind.")
    meta = jnp.asarray(opposite).astype(jnp.int32)
    meta = jnp.broadcast_to(
        meta.reshape(*[1] * len(batch), -1), (*batch, meta.shape[0])
    )
    return jnp.concatenate([meta, instruction], axis=-1) if is_before else meta


@typed
def instructive_decode(
    key: Key[Array, ""],
    model: Callable[[Any, Array], tuple[Array, Any]],
    prompt: Integer[ArrayLike, "batch prompt"],
    noisy_prompt: Integer[ArrayLike, "batch noisy"], *,
    state: Any, noisy_state: Any, num_tokens: int,
    eps: float | Float[ArrayLike, ""] = 0.3, temperature: float = 1.0,
) -> tuple[Int[Array, "batch num_tokens"], dict[str, Any]]:  # fmt: skip
    """Writes one answer after two prompts, by `instructive_logits`.

    Args:
        key: a typed key, consumed.
        model: `(state, tokens [B, K]) -> (logits [B, K, V], state)`.
        prompt: instruction and input, `[B, P]`, P >= 1.
        noisy_prompt: noisy instruction and input, `[B, N]`, N >= 1.
        state: before the prompt: an empty cache, with room for P + num_tokens - 1.
        noisy_state: likewise, with room for N + num_tokens - 1.
        num_tokens: to write in each row.
        eps: see `instructive_logits`; 0 is the model by itself.
        temperature: as in `generate`: at 0 the likeliest token is taken.

    Returns:
        The tokens, int32 `[B, num_tokens]`; aux has "log_prob" `[B, num_tokens]` of
        each under the logits that it was drawn by, at temperature 1, and the last
        "state" and "noisy_state".

    Raises:
        ValueError: a number is out of range, or a prompt is empty.

    A model that says 1 whatever it reads, and nearly as often what it reads:

    >>> table = jnp.array([[1.5, 2, 0], [0, 3.5, 0], [0, 2, 1.5]])
    >>> model = lambda state, tokens: (table[tokens], state)
    >>> prompt, noisy = jnp.array([[2]]), jnp.array([[1]])
    >>> for eps in (0.0, 0.3):
    ...     text, _ = instructive_decode(
    ...         jax.random.key(0), model, prompt, noisy, state=(), noisy_state=(),
    ...         num_tokens=1, eps=eps, temperature=0.0)
    ...     print(text.tolist())
    [[1]]
    [[2]]
    """
    check_range("eps", eps, above=-float("inf"), below=float("inf"))
    if not noisy_prompt.shape[1]:
        raise ValueError("argument 'noisy_prompt' has no tokens, expected at least 1.")

    def contrasted(carry: Any, tokens: Array) -> Any:
        state, noisy_state, beginning = carry
        noisy_tokens = tokens if beginning is None else beginning
        z, state = model(state, tokens)
        noisy, noisy_state = model(noisy_state, noisy_tokens)
        z = instructive_logits(z[:, -1:], noisy[:, -1:], eps=eps)
        return z, (state, noisy_state, None)

    begin = state, noisy_state, jnp.asarray(noisy_prompt).astype(jnp.int32)
    text, aux = generate(
        key, contrasted, prompt, state=begin, num_tokens=num_tokens,
        temperature=temperature,
    )  # fmt: skip
    first, second, _ = aux["state"]
    return text, {**aux, "state": first, "noisy_state": second}


@typed
def exact_match(
    answers: Integer[ArrayLike, "*batch length"],
    expected: Integer[ArrayLike, "*batch length"],
    *,
    where: Bool[ArrayLike, "*batch length"] | None = None,
) -> Bool[Array, "*batch"]:
    """Whether each answer is the expected one, token by token.

    Args:
        answers: `[..., T]`.
        expected: `[..., T]`.
        where: tokens that count; None: all.

    Returns:
        bool `[...]`.

    >>> exact_match(jnp.array([[1, 2], [1, 3]]), jnp.array([[1, 2], [1, 2]])).tolist()
    [True, False]
    """
    same = jnp.equal(answers, expected)
    return jnp.all(same if where is None else same | ~jnp.asarray(where), axis=-1)


@typed
def label_adherence(
    answers: Integer[ArrayLike, "*batch length"],
    labels: Integer[ArrayLike, "*batch labels length"],
) -> Bool[Array, "*batch"]:
    """Whether each answer is one of those that its instruction allows, right or wrong.

    Args:
        answers: `[..., T]`.
        labels: the label space of each, `[..., K, T]`.

    Returns:
        bool `[...]`.

    >>> label_adherence(jnp.array([5]), jnp.array([[4], [5]])).item()
    True
    """
    same = jnp.equal(jnp.asarray(answers)[..., None, :], labels)
    return jnp.any(jnp.all(same, axis=-1), axis=-1)


def _shuffled(key: Array, shape: tuple[int, ...]) -> Array:
    """Every row an order of its own."""
    return jnp.argsort(jax.random.uniform(key, shape), axis=-1)


def _logits(key: Array):
    return tuple(jax.random.normal(key, (2, 8, 6))), {"eps": 0.4}


def _instruction(key: Array):
    tokens = jax.random.randint(key, (8, 5), 0, 20)
    return (key, tokens), {
        "kind": "random_words",
        "words": jnp.arange(9),
        "num_words": 2,
    }


def _prompts(key: Array):
    table = jax.random.normal(jax.random.key(1), (5, 5))

    def model(state: Any, tokens: Array) -> tuple[Array, Any]:
        return table[tokens], state

    prompt = jax.random.randint(key, (8, 3), 0, 5)
    kwargs = {"state": (), "noisy_state": (), "num_tokens": 6}
    return (key, model, prompt, prompt[:, 1:]), kwargs


def _answers(key: Array):
    return tuple(jax.random.randint(key, (2, 8, 3), 0, 2)), {}


def _labels(key: Array):
    labels = jax.random.randint(key, (8, 4, 3), 0, 2)
    return (labels[:, 0] * labels[:, 1], labels), {}


EXAMPLES = {
    instructive_logits: _logits,
    noisy_instruction: _instruction,
    instructive_decode: _prompts,
    exact_match: _answers,
    label_adherence: _labels,
}
