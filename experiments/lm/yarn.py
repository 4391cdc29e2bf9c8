"""YaRN: a transformer reads four times as far as it was trained, without training.

Claims: at a scale of 1 the frequencies are those of plain rotary positions, pairs that
turn more than 32 times within the trained context stay as they are, and those that turn
less than once are interpolated; a byte transformer trained on 128 bytes of Moby Dick at
a time, given 512, has a loss that orders YaRN < position interpolation < none, without
any training; and with YaRN's frequencies for the long context its loss on 128 bytes
rises by at most 2 %, as it is and after a short fine-tuning in the long context.

    python -m experiments.lm.yarn full        # 3 seeds: 2 minutes on 2 cores

Expected: at 512 bytes 2.34 nats by YaRN, 2.72 by interpolation, 2.59 by none: the
second half of the order fails. At 128 bytes YaRN costs 2.6 % (fails), and 0.7 % after
20 steps of fine-tuning, which make the plain model 2.1 % worse there.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.data.text import moby_dick
from jaxzoo.lm.yarn import attention_scale, rope_frequencies
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import descend

TUNED = ("none", "interpolation", "yarn")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    context: int = 128  # bytes that the model is trained on
    factor: int = 4  # the long context over that
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 5e-3
    width: int = 32
    depth: int = 2
    heads: int = 2
    tuning: int = 20  # steps in the long context
    tuning_batch: int = 2
    tuning_rate: float = 1e-3
    windows: int = 16  # long ones of held-out text

    def __post_init__(self):
        if self.seeds < 2 or self.factor < 2 or self.windows % 2:
            raise ValueError("seeds >= 2, factor >= 2 and windows even, please")


PRESETS = {
    "smoke": Config(
        seeds=2, context=16, steps=10, batch_size=4, width=16, tuning=2, windows=2,
    ),
    "full": Config(),
}  # fmt: skip


def rotations(config: Config) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Frequencies and the scale of queries and keys by each method."""
    make = functools.partial(
        rope_frequencies, float(config.factor), width=config.width // config.heads,
        trained_length=config.context,
    )  # fmt: skip
    one, louder = jnp.ones(()), attention_scale(float(config.factor))
    yarn, paper = make()[0], make(convention="paper")[0]
    return {
        "none": (make(method="none")[0], one),
        "interpolation": (make(method="interpolation")[0], one),
        "ntk": (make(method="ntk")[0], one),
        "yarn": (yarn, louder),
        "yarn, ramp of the paper": (paper, louder),
        "yarn, no temperature": (yarn, one),
    }


def losses(config: Config, params: Any, tokens: jax.Array, rope: Any) -> jax.Array:
    """Nats of each byte but the first, `[B, T - 1]`."""
    frequencies, scale = rope
    body = Transformer(
        config.width, config.depth, config.heads, implementation="ref",
        frequencies=frequencies, rope_scale=scale,
    )  # fmt: skip
    model = LanguageModel(256, config.width, body)
    outputs: Any = model.apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(outputs[0], tokens[:, 1:])


def measured(config: Config) -> dict[str, np.ndarray]:
    """Held-out losses by seed and method: at each place of long windows, and short.

    "long" `[seeds, methods, places]`, "short" `[seeds, methods]`; "tuned_long" and
    "tuned_short" likewise after fine-tuning, of the methods in `TUNED`.
    """
    length = config.context * config.factor
    data = moby_dick(window=length)
    text = jnp.asarray(data.split("train").arrays["token"].ravel())
    far = data.split("validation").arrays["token"][: config.windows].astype(np.int32)
    far = jnp.asarray(far)
    near = far.reshape(-1, config.context)
    ropes = rotations(config)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *ropes.values())
    tuned = jax.tree.map(lambda *x: jnp.stack(x), *[ropes[name] for name in TUNED])

    def drawn(key: jax.Array, batch: int, length: int) -> jax.Array:
        starts = jax.random.randint(key, (batch,), 0, len(text) - length)
        return text[starts[:, None] + jnp.arange(length)[None]].astype(jnp.int32)

    def held_out(params: Any, rope: Any) -> tuple[jax.Array, jax.Array]:
        def one(tokens: jax.Array) -> jax.Array:
            return jnp.mean(losses(config, params, tokens, rope), axis=0)

        parts = far.reshape(-1, 2, length)
        return jnp.mean(lax.map(one, parts), axis=0), jnp.mean(one(near))

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        body = Transformer(config.width, config.depth, config.heads)
        model = LanguageModel(256, config.width, body)
        start = model.init(keys[0], jnp.zeros((1, 8), jnp.int32))

        def at(rope: Any, batch: int, length: int) -> Any:
            def loss(params: Any, key: jax.Array) -> jax.Array:
                tokens = drawn(key, batch, length)
                return jnp.mean(losses(config, params, tokens, rope))

            return loss

        trained = descend(
            at(ropes["none"], config.batch_size, config.context),
            start, config.learning_rate, keys[1], config.steps,
        )  # fmt: skip

        def tune(rope: Any) -> tuple[jax.Array, jax.Array]:
            loss = at(rope, config.tuning_batch, length)
            rate, steps = config.tuning_rate, config.tuning
            return held_out(descend(loss, trained, rate, keys[2], steps), rope)

        long, short = lax.map(functools.partial(held_out, trained), stacked)
        tuned_long, tuned_short = lax.map(tune, tuned)
        return {
            "long": long,
            "short": short,
            "tuned_long": tuned_long,
            "tuned_short": tuned_short,
        }

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    return jax.device_get(jax.jit(lambda k: lax.map(one, k))(keys))


def exactness() -> Claim:
    """Of Llama's rotary positions, by both ramps."""
    worst = 0.0
    for convention in ("released", "paper"):
        for scale in (1.0, 4.0, 16.0):
            make = functools.partial(
                rope_frequencies, scale, width=128, trained_length=4096
            )
            got, aux = make(convention=convention)
            plain, squeezed = (make(method=m)[0] for m in ("none", "interpolation"))
            fast, slow = aux["rotations"] > 32, aux["rotations"] < 1
            gaps = [jnp.where(fast, got - plain, 0.0)]
            gaps += [jnp.where(slow, got - squeezed, 0.0)]
            gaps += [got - plain] if scale == 1.0 else []
            worst = max(worst, *(float(jnp.max(jnp.abs(g / plain))) for g in gaps))
    return Claim(
        "Llama's frequencies: relative difference from plain where s = 1 or r > 32, "
        "and from interpolated where r < 1, largest",
        worst, "<= 1e-6", worst <= 1e-6,
    )  # fmt: skip


def picture(config: Config, run: Run, results: dict[str, np.ndarray]) -> Figure:
    figure, axes = panels(2, width=5.2)
    names = ["none", "interpolation", "ntk", "yarn"]
    size = config.context // 8
    for i, name in enumerate(names):
        curve = results["long"][:, i]
        curve = np.concatenate([curve[:, :1], curve], axis=1)
        curve = curve.reshape(config.seeds, -1, size).mean(axis=2)
        places = (np.arange(curve.shape[1]) + 0.5) * size
        spread = [stderr(v) for v in curve.T]
        axes[0].errorbar(
            places, curve.mean(0), spread, color=COLORS[i], label=name, capsize=2
        )
    axes[0].axvline(config.context, color="0.5", lw=0.8, ls="--")
    axes[0].set(xlabel="position (bytes)", ylabel="loss without training (nats a byte)")
    axes[0].legend(frameon=False)
    bars = {
        "trained context": results["short"],
        f"{config.factor}x": results["long"].mean(axis=2),
        f"{config.factor}x, fine-tuned": results["tuned_long"].mean(axis=2),
        "trained context,\nfine-tuned": results["tuned_short"],
    }
    for i, name in enumerate(names):
        for j, (label, values) in enumerate(bars.items()):
            order = list(TUNED) if "fine-tuned" in label else names
            if name not in order:
                continue
            value = values[:, order.index(name)]
            axes[1].errorbar(
                j + 0.15 * (i - 1.5), value.mean(), stderr(value), fmt="o",
                color=COLORS[i], capsize=3,
            )  # fmt: skip
    axes[1].set_xticks(range(len(bars)), list(bars), fontsize=8)
    axes[1].set(ylabel="mean loss (nats a byte)")
    return run.figure(
        "yarn", figure, title="Further than it was trained",
        caption="Left: held-out loss by position, the dashed line the trained context. "
        "Right: means over whole windows, in the colours of the left. Means and "
        f"standard errors over {config.seeds} seeds.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    results = measured(config)
    names = list(rotations(config))
    long = dict(
        zip(names, np.moveaxis(results["long"].mean(axis=2), 1, 0), strict=True)
    )
    short = dict(zip(names, results["short"].T, strict=True))
    far = dict(
        zip(TUNED, np.moveaxis(results["tuned_long"].mean(2), 1, 0), strict=True)
    )
    near = dict(zip(TUNED, results["tuned_short"].T, strict=True))
    claims = [exactness()]
    for worse, better in (("interpolation", "yarn"), ("none", "interpolation")):
        gap = long[worse] - long[better]
        claims.append(
            Claim(
                f"{config.factor}x the trained context, no training: loss of {worse} "
                f"less that of {better}, nats a byte",
                float(gap.mean()), "> 0", bool(gap.mean() > 0), stderr(gap),
            )
        )  # fmt: skip
    for when, values in (("no training", short), ("fine-tuned", near)):
        rise = 100 * (values["yarn"] / short["none"] - 1)
        claims.append(
            Claim(
                f"trained context, yarn for {config.factor}x, {when}: rise of the "
                "loss over that of the model as it was, %",
                float(rise.mean()), "<= 2", bool(rise.mean() <= 2), stderr(rise),
            )
        )  # fmt: skip
    metrics, rows = {}, []
    kinds = {"short": short, "long": long, "tuned_short": near, "tuned_long": far}
    for name in names:
        values = {k: v[name] for k, v in kinds.items() if name in v}
        metrics |= {f"{name}/{k}": float(v.mean()) for k, v in values.items()}
        texts = [f"{values[k].mean():.3f}" if k in values else "" for k in kinds]
        rows.append((name, *texts))
    last = results["long"][:, :, -config.context :].mean(axis=(0, 2))
    metrics |= {f"{k}/last": float(v) for k, v in zip(names, last, strict=True)}
    run.table(
        f"Held-out loss in nats a byte, {config.seeds} seeds",
        ("frequencies", "trained context", "long", "tuned, trained", "tuned, long"),
        rows,
    )
    return Report(claims, metrics, [picture(config, run, results)])


if __name__ == "__main__":
    experiment(main, PRESETS)
