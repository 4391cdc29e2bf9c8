"""Small models at high learning rates break as large ones do, and the same mends them.

Claims: the largest attention logit of a tiny byte transformer rises with its learning
rate, and norms of queries and keys hold it; these norms and a z-loss together lower the
sensitivity of the loss to the learning rate, over three decades of it, by at least
30 %, with a best loss within 1 %; the z-loss halves the mean of |log Z|; and the logits
of the largest width are within a factor of 2 of what smaller ones predict.

    python -m experiments.dynamics.small_scale_proxies full   # 3 seeds: 3 minutes

Expected: from a rate of 3e-3 to 3 the largest logit goes from 7 to 3e7, with qk-norm
to 3e3. The sensitivity falls by 3 +- 17 % and |log Z| by 1 %, so both these claims
fail; the best loss is 0.1 % higher, and predicted logits are off by a factor of 1.5.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.stats import spearmanr

from experiments.dynamics._small_scale_proxies_pictures import picture
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
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.training.seeds import stderr


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    lowest: float = 3e-3  # a decade below the best, two above, as in the paper
    highest: float = 3.0
    rates: int = 7  # even in the logarithm
    width: int = 32
    smaller: tuple[int, ...] = (8, 16, 24)  # what is extrapolated from; (): nothing
    mu_param: bool = True  # with muParam, too
    depth: int = 2
    heads: int = 2
    context: int = 32  # bytes
    batch_size: int = 8
    steps: int = 120
    warmup: int = 12
    z_loss: float = 1e-4
    weight_decay: float = 1e-4
    windows: int = 64  # of held-out text
    threshold: float = 100.0  # of logits, for the first rate that passes it

    def __post_init__(self):
        if self.seeds < 2 or self.rates < 2 or len(self.smaller) in (1, 2):
            raise ValueError("seeds and rates >= 2, and no or 3 smaller widths, please")


PRESETS = {
    "smoke": Config(
        seeds=2, rates=3, width=16, smaller=(), mu_param=False, context=12, steps=6,
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
            head: Any = model.apply(params, method="head")
            # The weight is an array here, so it stands outside.
            _, aux = next_token_loss(hidden, head, tokens[:, 1:])
            return aux["cross_entropy"] + z_loss * aux["log_z_squared"]

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            shape, last = (config.batch_size,), len(text) - length
            starts = jax.random.randint(key, shape, 0, last)
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


def parameters(config: Config, width: int) -> int:
    model = built(config, width, False)
    tokens = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def everything(config: Config) -> dict[str, dict[str, np.ndarray]]:
    """What `swept` measures by setting: `[seeds, rates]`, before training `[seeds]`."""
    names, knobs = list(KNOBS), jnp.array(list(KNOBS.values()))

    def rows(prefix: str, result: dict[str, np.ndarray], names: list[str]) -> Any:
        return {
            prefix + name: {
                k: v if k.endswith("before") else v[:, i] for k, v in result.items()
            }
            for i, name in enumerate(names)
        }

    found = rows("", swept(config, config.width, False, knobs[:2]), names[:2])
    found |= rows("qk-norm, ", swept(config, config.width, True, knobs), names)
    if config.mu_param:
        scaled = swept(config, config.width, True, knobs[1:2], base=config.width // 2)
        found["qk-norm, z-loss, muParam"] = rows("", scaled, ["it"])["it"]
    for width in config.smaller:
        result = swept(config, width, False, knobs[:1])
        found[f"width {width}"] = rows("", result, ["it"])["it"]
    return found


def sensitivity(result: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(lr_sensitivity(result["loss"], result["loss/before"]))


def best(result: dict[str, np.ndarray]) -> np.ndarray:
    return np.nanmin(result["loss"], axis=-1)


def predicted(config: Config, found: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the largest width by rate, from smaller ones, and as measured.

    Geometric means over seeds; NaN where there are no smaller ones.
    """
    logs = [
        np.log(found[name]["max_logit"]).mean(axis=0)
        for name in (*(f"width {w}" for w in config.smaller), "plain")
    ]
    if not config.smaller:
        return np.full(config.rates, np.nan), np.exp(logs[-1])
    sizes = [parameters(config, width) for width in config.smaller]
    values = np.exp(np.stack(logs[:-1], axis=-1))
    at = float(parameters(config, config.width))
    ahead = extrapolate(jnp.array(sizes, float), values, at)
    return np.asarray(ahead), np.exp(logs[-1])


def main(config: Config, run: Run) -> Report:
    found = everything(config)
    rates = np.asarray(grid(config))
    plain, normed = found["plain"], found["qk-norm, plain"]
    both = found["qk-norm, z-loss"]
    claims = []

    def claim(text: str, values: Any, bound: str, holds: Any) -> None:
        values = np.atleast_1d(values)
        mean = float(values.mean())
        error = stderr(values) if len(values) > 1 else None
        claims.append(Claim(text, mean, bound, bool(holds(mean)), error))

    orders: Any = [spearmanr(rates, np.log(v))[0] for v in plain["max_logit"]]
    claim(
        "without qk-norm: rank correlation of the learning rate and the largest "
        "attention logit", orders, ">= 0.9", lambda m: m >= 0.9,
    )  # fmt: skip
    share = normed["max_logit"].max(axis=1) / plain["max_logit"].max(axis=1)
    claim(
        "largest attention logit over the grid, with qk-norm over without",
        share, "<= 0.1", lambda m: m <= 0.1,
    )  # fmt: skip
    claim(
        "qk-norm and z-loss: fall of the sensitivity to the learning rate, %",
        100 * (1 - sensitivity(both) / sensitivity(plain)), ">= 30", lambda m: m >= 30,
    )  # fmt: skip
    claim(
        "qk-norm and z-loss: rise of the best loss, %",
        100 * (best(both) / best(plain) - 1), "<= 1", lambda m: m <= 1,
    )  # fmt: skip
    size = [r["abs_log_z"].mean(axis=1) for r in (normed, both)]
    claim(
        "qk-norm: mean |log Z| over the grid with z-loss over without",
        size[1] / size[0], "<= 0.5", lambda m: m <= 0.5,
    )  # fmt: skip
    ahead, actual = predicted(config, found)
    if config.smaller:
        claim(
            f"largest logits at width {config.width}, predicted from {config.smaller}: "
            "factor between prediction and measurement, median over rates",
            np.exp(np.median(np.abs(np.log(ahead / actual)))), "<= 2",
            lambda m: m <= 2,
        )  # fmt: skip
    metrics, rows = {}, []
    for name, result in found.items():
        numbers = {
            "sensitivity": sensitivity(result),
            "best_loss": best(result),
            "abs_log_z": result["abs_log_z"].mean(axis=1),
            "max_logit": result["max_logit"].max(axis=1),
            "gradient_rms": result["gradient"].min(axis=1),
            "embedding_rms": result["embedding"].max(axis=1),
        }
        metrics |= {f"{name}/{k}": float(v.mean()) for k, v in numbers.items()}
        kinds = ("sensitivity", "best_loss", "abs_log_z", "max_logit")
        texts = [f"{numbers[k].mean():.3g} ± {stderr(numbers[k]):.2g}" for k in kinds]
        rows.append((name, *texts))
    for i, rate in enumerate(rates):
        metrics |= {
            f"rate {rate:.0e}/loss": float(plain["loss"][:, i].mean()),
            f"rate {rate:.0e}/loss, qk-norm, z-loss": float(both["loss"][:, i].mean()),
            f"rate {rate:.0e}/logit": float(actual[i]),
        }
        if config.smaller:
            metrics[f"rate {rate:.0e}/logit, predicted"] = float(ahead[i])
    both_logits = (("measured", actual), ("predicted", ahead))
    for name, logits in both_logits if config.smaller else both_logits[:1]:
        first = first_unstable_rate(rates, logits, threshold=config.threshold)
        metrics[f"first rate above {config.threshold:.0f}, {name}"] = float(first)
    run.table(
        f"Over {config.rates} learning rates, {config.seeds} seeds",
        ("setting", "sensitivity (nats)", "best loss (nats)", "mean |log Z|",
         "largest logit"),
        rows,
    )  # fmt: skip
    return Report(claims, metrics, picture(config, run, found, rates, ahead))


if __name__ == "__main__":
    experiment(main, PRESETS)
