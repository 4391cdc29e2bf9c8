"""TO BE WRITTEN."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.stats import spearmanr

from jaxzoo.data.text import moby_dick
from jaxzoo.dynamics.small_scale_proxies import (
    extrapolate,
    first_unstable_rate,
    independent_adamw,
    lr_sensitivity,
    max_attention_logit,
    scale_by_fan_in,
)
from jaxzoo.nn.language_model import LanguageModel, next_token_loss
from jaxzoo.nn.transformer import Transformer
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    lowest: float = 3e-4
    highest: float = 3e-1
    rates: int = 7  # even in the logarithm
    width: int = 32
    smaller: tuple[int, ...] = (8, 12, 16, 24)  # what is extrapolated from
    depth: int = 2
    heads: int = 2
    context: int = 48  # bytes
    batch_size: int = 8
    steps: int = 150
    warmup: int = 15
    z_loss: float = 1e-4
    weight_decay: float = 1e-4
    windows: int = 64  # of held-out text

    def __post_init__(self):
        if self.seeds < 2 or self.rates < 2 or len(self.smaller) < 3:
            raise ValueError("seeds >= 2, rates >= 2 and three smaller widths, please")


PRESETS = {
    "smoke": Config(
        seeds=2, rates=3, width=16, smaller=(4, 8, 12), context=12, steps=6,
        warmup=2, batch_size=2, windows=4,
    ),
    "full": Config(),
}  # fmt: skip

# z-loss as a share of the setting's, warm-up in multiples of it, decay independent
# of the rate (1) or PyTorch's and Optax's (0), where 0.1 is multiplied by the rate.
KNOBS = {
    "plain": (0.0, 1.0, 1.0),
    "z-loss": (1.0, 1.0, 1.0),
    "longer warm-up": (1.0, 4.0, 1.0),
    "decay times the rate": (1.0, 1.0, 0.0),
}
COUPLED = 0.1


def grid(config: Config) -> jax.Array:
    return jnp.geomspace(config.lowest, config.highest, config.rates)


def built(config: Config, width: int, qk_norm: bool) -> LanguageModel:
    body = Transformer(
        width, config.depth, config.heads, qk_norm=qk_norm, implementation="ref"
    )
    return LanguageModel(256, width, body, is_tied=False)


def measured(model: Any, params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
    """Held-out loss in nats a byte, and what warns."""
    (logits, _), kept = model.apply(params, tokens[:, :-1], mutable="intermediates")
    blocks = kept["intermediates"]["body"]["blocks"]
    largest = max_attention_logit(blocks["queries"][0], blocks["keys"][0])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return {
        "loss": jnp.mean(losses),
        "max_logit": jnp.max(largest),
        "abs_log_z": jnp.mean(jnp.abs(log_z)),
        "embedding": jnp.sqrt(jnp.mean(params["params"]["embedding"] ** 2)),
    }


def swept(
    config: Config, width: int, qk_norm: bool, knobs: Any, base: int | None = None
) -> dict[str, np.ndarray]:
    """Everything measured after training, `[seeds, knobs, rates]`."""
    model = built(config, width, qk_norm)
    length = config.context + 1
    splits = moby_dick(window=length)
    text = jnp.asarray(splits.split("train").arrays["token"].ravel())
    held_out = splits.split("validation").arrays["token"][: config.windows]
    held_out = jnp.asarray(held_out.astype(np.int32))

    def trained(start: Any, key: jax.Array, rate: jax.Array, knob: jax.Array) -> Any:
        z_loss, warmup = knob[0] * config.z_loss, knob[1] * config.warmup
        independent = config.weight_decay
        decay = knob[2] * independent + (1.0 - knob[2]) * COUPLED * rate

        def schedule(step: jax.Array) -> jax.Array:
            rest = (step - warmup) / (config.steps - warmup)
            fall = 0.5 + 0.5 * jnp.cos(jnp.pi * jnp.clip(rest, 0.0, 1.0))
            return rate * jnp.minimum((step + 1) / warmup, 1.0) * fall

        parts = [
            optax.clip_by_global_norm(1.0),
            independent_adamw(schedule, peak=rate, weight_decay=decay),
        ]
        parts += [] if base is None else [scale_by_fan_in(base=base)]
        optimizer = optax.chain(*parts)

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            hidden, _ = model.apply(params, tokens[:, :-1], method="hidden")
            head = model.apply(params, method="head")
            # The weight is an array here, so it stands outside.
            _, aux = next_token_loss(hidden, head, tokens[:, 1:])
            return aux["cross_entropy"] + z_loss * aux["log_z_squared"]

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            starts = jax.random.randint(key, (config.batch_size,), 0, len(text) - length)
            tokens = text[starts[:, None] + jnp.arange(length)[None]].astype(jnp.int32)
            gradient = jax.grad(loss)(params, tokens)
            updates, state = optimizer.update(gradient, state, params)
            rms = jnp.sqrt(jnp.mean(gradient["params"]["embedding"] ** 2))
            return (optax.apply_updates(params, updates), state), rms

        keys = jax.random.split(key, config.steps)
        carry, rms = lax.scan(step, (start, optimizer.init(start)), keys)
        result = measured(model, carry[0], held_out)
        return result | {"gradient": rms[-1]}

    def one(seed: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(seed))
        start = model.init(keys[0], jnp.zeros((1, 8), jnp.int32))
        train = functools.partial(trained, start, keys[1])
        over_rates = jax.vmap(train, in_axes=(0, None))
        result = lax.map(lambda k: over_rates(grid(config), k), knobs)
        before = measured(model, start, held_out)
        return result | {f"{k}/before": v for k, v in before.items()}

    seeds = jnp.arange(config.seeds)
    return jax.device_get(jax.jit(lambda s: lax.map(one, s))(seeds))
