"""Byte models of a novel, and what they write together: for `speculative_decoding`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.data.text import moby_dick
from jaxzoo.lm.speculative_decoding import acceptance_rate, speculative_decode
from jaxzoo.nn.generate import adjusted_log_probs
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer

greedy = functools.partial(adjusted_log_probs, temperature=0.0)


def table_model(logits: jax.Array) -> Any:
    return lambda state, tokens: (logits[tokens], state)


def counted(aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
    calls, kept, rejected = (jnp.sum(aux[k]) for k in ("calls", "kept", "rejected"))
    return {"kept": kept / (kept + rejected), "tokens": 1 + kept / calls}


def transformer(width: int, depth: int) -> LanguageModel:
    body = Transformer(width, depth=depth, heads=2, implementation="ref")
    return LanguageModel(256, width, body)


def trained(config: Any, model: LanguageModel, key: jax.Array) -> Any:
    """Parameters of all seeds."""
    text = moby_dick(window=64).split("train").arrays["token"].reshape(-1)
    optimizer = optax.adam(
        optax.cosine_decay_schedule(config.learning_rate, config.steps)
    )

    def one(text: jax.Array, key: jax.Array) -> Any:
        init_key, key = jax.random.split(key)
        params: Any = model.init(init_key, jnp.zeros((1, 4), jnp.int32))

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            most = len(text) - config.window
            start = jax.random.randint(key, (config.batch_size, 1), 0, most)
            tokens = text[start + jnp.arange(config.window + 1)[None]].astype(jnp.int32)

            def loss(params: Any) -> jax.Array:
                logits: Any = model.apply(params, tokens[:, :-1])
                return jnp.mean(
                    optax.softmax_cross_entropy_with_integer_labels(
                        logits[0], tokens[:, 1:]
                    )
                )

            updates, state = optimizer.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, config.steps)
        return lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    run = jax.jit(lambda text, k: lax.map(functools.partial(one, text), k))
    return run(jnp.asarray(text), jax.random.split(key, config.seeds))


def on_text(
    config: Any, drafts: int, target: LanguageModel, draft: LanguageModel | None,
    weights: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Acceptance, tokens per call and greedy bytes that are not the target's, by seed.

    Args:
        config: sizes.
        drafts: for each call.
        target: the model whose text it is.
        draft: the other model; None: bigrams.
        weights: parameters of the target for all seeds, and of the draft, or log
            probabilities of bigrams.
    """
    held = moby_dick(window=64).split("validation").arrays["token"].reshape(-1)
    starts = np.linspace(0, len(held) - 64, config.prompts).astype(int)[:, None]
    prompt = held[starts + np.arange(config.prompt_bytes)[None]].astype(np.int32)
    room = config.prompt_bytes + config.written + drafts

    def reader(model: LanguageModel, params: Any) -> Any:
        return lambda cache, tokens: model.apply(params, tokens, cache)

    def one(given: Any) -> dict[str, jax.Array]:
        key, params, other = given

        def write(is_greedy: jax.Array) -> Any:
            cold = functools.partial(jnp.where, is_greedy)
            cache = target.body.empty_cache(config.prompts, room)
            small: Any = table_model(other)
            small_cache: Any = ()
            if draft is not None:
                small = reader(draft, other)
                small_cache = draft.body.empty_cache(config.prompts, room)
            text, aux = speculative_decode(
                key, reader(target, params), small, jnp.asarray(prompt),
                target_state=cache, draft_state=small_cache,
                num_tokens=config.written, num_drafted=drafts,
                adjust=lambda x: cold(greedy(x), x),
            )  # fmt: skip
            known = jnp.concatenate([jnp.asarray(prompt), text], axis=1)
            after = slice(config.prompt_bytes - 1, -1)
            p: Any = target.apply(params, known)
            p = p[0][:, after]
            if draft is None:
                q = other[known[:, after]]
            else:
                q = draft.apply(other, known)
                q = q[0][:, after]
            rates = acceptance_rate(cold(greedy(p), p), cold(greedy(q), q))
            found = {
                "rate": jnp.mean(rates),
                "wrong": jnp.sum(jnp.argmax(p, axis=-1) != text),
            }  # fmt: skip
            return found | counted(aux)

        return lax.map(write, jnp.array([False, True]))

    keys = jax.random.split(jax.random.key(2), config.seeds)
    return jax.device_get(jax.jit(lambda *x: lax.map(one, x))(keys, *weights))
