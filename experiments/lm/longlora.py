"""LongLoRA: tuned in shifted groups, a transformer reads four times as far.

Claims: a group of all tokens is full attention, and scores in groups of G cost G/N of
it; a byte transformer trained on 128 bytes of Moby Dick at a time and tuned at 512 with
interpolated positions, by LoRA with trainable embeddings and norms in shifted groups of
128, has, read with full attention, a test loss within 3 % of that of full tuning, and
below those of groups that are not shifted and of LoRA with frozen embeddings and norms.

    python -m experiments.lm.longlora full        # 3 seeds: 2 minutes on 2 cores

Expected: full tuning 2.303 nats, LongLoRA 2.340 (1.6 % more), plain LoRA 2.370; groups
that are not shifted 2.339, so that one claim fails.
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
from jaxzoo.lm.longlora import (
    forward_flops,
    longlora_params,
    merge_longlora,
    s2_attention,
)
from jaxzoo.lm.yarn import rope_frequencies
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import descend
from pallas_kernels.attention import attention, shifted_groups

# Whether embeddings and norms are tuned too, and whether groups are shifted.
ARMS = {
    "LongLoRA": (True, True),
    "groups not shifted": (True, False),
    "plain LoRA": (False, True),
}


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    context: int = 128  # bytes that the model is trained on
    factor: int = 4  # the long context over that
    group: int = 128  # G of the tuning
    steps: int = 300
    batch_size: int = 16
    learning_rate: float = 5e-3
    width: int = 32
    depth: int = 2
    heads: int = 2
    rank: int = 8
    tuning: int = 60  # steps in the long context
    tuning_batch: int = 4
    tuning_rate: float = 3e-3
    windows: int = 32  # long ones of the test split

    def __post_init__(self):
        length = self.context * self.factor
        if self.seeds < 2 or self.windows % 4 or length % self.group:
            raise ValueError("seeds >= 2, windows in fours, whole groups, please")


PRESETS = {
    "smoke": Config(
        seeds=2, context=16, group=16, steps=10, batch_size=4, width=16, tuning=3,
        tuning_batch=2, windows=4,
    ),
    "full": Config(),
}  # fmt: skip


def losses(
    config: Config, params: Any, tokens: jax.Array, scale: float, shifted: Any = None
) -> jax.Array:
    """Nats of each byte but the first, `[B, T]`, of tokens `[B, T + 1]`.

    `shifted` says whether the groups are; None: full attention.
    """

    def grouped(q: Any, k: Any, v: Any, cache: Any) -> Any:
        still, moved = (
            functools.partial(s2_attention, group=config.group, is_shifted=b)
            for b in (False, True)
        )
        return lax.cond(shifted, moved, still, q, k, v), cache

    frequencies, _ = rope_frequencies(
        scale, width=config.width // config.heads, trained_length=config.context,
        method="interpolation",
    )  # fmt: skip
    body = Transformer(
        config.width, config.depth, config.heads, implementation="ref",
        frequencies=frequencies, attend=None if shifted is None else grouped,
    )  # fmt: skip
    model = LanguageModel(256, config.width, body)
    outputs: Any = model.apply(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(outputs[0], tokens[:, 1:])


def measured(config: Config, split: str = "test") -> dict[str, np.ndarray]:
    """Held-out losses at each place of long windows, `[seeds, places]` by name.

    "not tuned" has interpolated positions too. All begin with the same model, and are
    tuned on the same text.
    """
    length = config.context * config.factor
    data = moby_dick(window=length + 1)
    text = jnp.asarray(data.split("train").arrays["token"].ravel())
    far = data.split(split).arrays["token"][: config.windows].astype(np.int32)
    parts = jnp.asarray(far).reshape(-1, 4, length + 1)
    factor = float(config.factor)

    def drawn(key: jax.Array, batch: int, length: int) -> jax.Array:
        starts = jax.random.randint(key, (batch, 1), 0, len(text) - length - 1)
        return text[starts + jnp.arange(length + 1)[None]].astype(jnp.int32)

    def held_out(params: Any) -> jax.Array:
        def one(tokens: jax.Array) -> jax.Array:
            return jnp.mean(losses(config, params, tokens, factor), axis=0)

        return jnp.mean(lax.map(one, parts), axis=0)

    def one(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, 4)
        body = Transformer(config.width, config.depth, config.heads)
        model = LanguageModel(256, config.width, body)
        start = model.init(keys[0], jnp.zeros((1, 8), jnp.int32))

        def pretraining(params: Any, key: jax.Array) -> jax.Array:
            tokens = drawn(key, config.batch_size, config.context)
            return jnp.mean(losses(config, params, tokens, 1.0))

        trained = descend(
            pretraining, start, config.learning_rate, keys[1], config.steps
        )
        rate, steps = config.tuning_rate, config.tuning

        def loss(params: Any, key: jax.Array, shifted: Any = None) -> jax.Array:
            tokens = drawn(key, config.tuning_batch, length)
            return jnp.mean(losses(config, params, tokens, factor, shifted))

        def arm(kind: jax.Array) -> jax.Array:
            is_whole, is_shifted = kind

            def merged(trainable: Any) -> Any:
                # Frozen ones get no gradient, and Adam leaves them where they are.
                whole = jax.tree.map(
                    lambda x: jnp.where(is_whole, x, lax.stop_gradient(x)),
                    trainable.whole,
                )
                return merge_longlora(trained, trainable._replace(whole=whole))

            def of_adapters(trainable: Any, key: jax.Array) -> jax.Array:
                return loss(merged(trainable), key, is_shifted)

            begin = longlora_params(keys[3], trained, rank=config.rank)
            return held_out(merged(descend(of_adapters, begin, rate, keys[2], steps)))

        full = held_out(descend(loss, trained, rate, keys[2], steps))
        arms = lax.map(arm, jnp.array(list(ARMS.values())))
        return held_out(trained), full, *arms

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    found = jax.device_get(jax.jit(lambda k: lax.map(one, k))(keys))
    return dict(zip(("not tuned", "full tuning", *ARMS), found, strict=True))


def exactness(config: Config) -> list[Claim]:
    """Groups against full attention and against segments, and what they cost."""
    length = config.context * config.factor
    shape = (2, length, config.heads, config.width // config.heads)
    q, k, v = jax.random.normal(jax.random.key(0), (3, *shape))
    full = functools.partial(attention, is_causal=True, implementation="ref")
    ids = shifted_groups(length, config.heads, config.group)
    whole = s2_attention(q, k, v, group=length, is_shifted=False) - full(q, k, v)
    grouped = functools.partial(s2_attention, group=config.group)
    moved = grouped(q, k, v) - full(q, k, v, segment_ids=ids)
    claims = [
        Claim(text, worst, "<= 1e-5", worst <= 1e-5)
        for text, worst in (
            ("one group of all tokens: largest difference from full attention",
             float(jnp.max(jnp.abs(whole)))),
            ("shifted groups: largest difference from attention whose segments they "
             "are", float(jnp.max(jnp.abs(moved)))),
        )
    ]  # fmt: skip

    def compiled(group: int) -> float:
        call = functools.partial(s2_attention, group=group, is_shifted=False)
        cost: Any = jax.jit(call).lower(q, k, v).compile().cost_analysis()
        return cost["flops"]

    ratio, share = compiled(config.group) / compiled(length), config.group / length
    cost = Claim(
        f"groups of {config.group} of {length} tokens: operations of the compiled "
        "attention over those of full attention",
        ratio, f"{share:g} within 1 %", abs(ratio / share - 1) <= 0.01,
    )  # fmt: skip
    return [*claims, cost]


def picture(config: Config, run: Run, results: dict[str, np.ndarray]) -> Figure:
    figure, axes = panels(2, width=5.2)
    size = config.context // 4
    full = results["full tuning"]
    for i, name in enumerate(ARMS):
        excess = (results[name] - full).reshape(config.seeds, -1, size).mean(axis=2)
        places = (np.arange(excess.shape[1]) + 0.5) * size
        axes[0].errorbar(
            places, excess.mean(0), [stderr(v) for v in excess.T], color=COLORS[i],
            label=name, capsize=2,
        )  # fmt: skip
    axes[0].axhline(0.0, color="0.5", lw=0.8, ls="--")
    axes[0].set(xlabel="position (bytes)", ylabel="loss over full tuning (nats a byte)")
    axes[0].legend(frameon=False, fontsize=8)
    lengths = 2.0 ** np.arange(12, 18)
    llama = {"width": 4096, "depth": 32, "hidden": 11008, "vocabulary": 32000}
    for label, share in {"full attention": 1, "G = N / 4": 4}.items():
        totals = [
            float(forward_flops(jnp.array(int(n)), group=int(n) // share, **llama)[0])
            for n in lengths
        ]
        axes[1].plot(lengths, np.array(totals) / 1e12, "o-", ms=4, label=label)
    axes[1].legend(frameon=False)
    axes[1].set(
        xscale="log", yscale="log", xlabel="N (tokens)",
        ylabel="forward pass of Llama 2 7B (TFLOP)",
    )  # fmt: skip
    return run.figure(
        "longlora", figure, title="Tuned in groups, read with full attention",
        caption="Left: test loss by position over that of full tuning, means and "
        f"standard errors over {config.seeds} seeds. Right: operations by the formula.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    claims = exactness(config)
    results = measured(config)
    means = {name: values.mean(axis=1) for name, values in results.items()}
    rise = 100 * (means["LongLoRA"] / means["full tuning"] - 1)
    claims.append(
        Claim(
            "LongLoRA: test loss with full attention over that of full tuning, %",
            float(rise.mean()), "<= 3", bool(rise.mean() <= 3), stderr(rise),
        )
    )  # fmt: skip
    for name in ("groups not shifted", "plain LoRA"):
        gap = means[name] - means["LongLoRA"]
        claims.append(
            Claim(
                f"test loss of {name} less that of LongLoRA, nats a byte",
                float(gap.mean()), "> 0", bool(gap.mean() > 0), stderr(gap),
            )
        )  # fmt: skip
    body = Transformer(config.width, config.depth, config.heads)
    params = jax.eval_shape(
        LanguageModel(256, config.width, body).init,
        jax.random.key(0), jnp.zeros((1, 8), jnp.int32),
    )  # fmt: skip
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    trainable = longlora_params(jax.random.key(0), zeros, rank=config.rank)

    def count(tree: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    sizes = {name: count(trainable) for name in ARMS}
    sizes |= {"plain LoRA": count(trainable.low_rank), "full tuning": count(zeros)}
    length, scores = config.context * config.factor, {}
    for pattern, group in (("full", length), ("groups", config.group)):
        _, aux = forward_flops(
            jnp.array(length), width=config.width, depth=config.depth,
            hidden=-(-config.width * 8 // 3 // 8) * 8, vocabulary=256, group=group,
        )  # fmt: skip
        scores[pattern] = float(aux["scores"]) / 1e3
    metrics, rows = {}, []
    for name, values in means.items():
        pattern, size = "groups" if name in ARMS else "full", sizes.get(name, 0)
        metrics |= {f"{name}/loss": float(values.mean()), f"{name}/tuned": size}
        # Adam keeps two numbers of each parameter, beside its gradient.
        rows.append((
            name, f"{values.mean():.4f} ± {stderr(values):.4f}", f"{size}",
            f"{12 * size / 1024:.0f}", f"{scores[pattern]:.0f}" if size else "",
        ))  # fmt: skip
    run.table(
        f"Test loss at {length} bytes with full attention, {config.seeds} seeds",
        ("tuned by", "nats a byte", "parameters tuned", "gradients and Adam (KiB)",
         "scores a head (thousands)"),
        rows,
    )  # fmt: skip
    return Report(claims, metrics, [picture(config, run, results)])


if __name__ == "__main__":
    experiment(main, PRESETS)
