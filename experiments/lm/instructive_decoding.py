"""Instructive decoding: a model that often ignores its instruction is made to heed it.

A small transformer reads an instruction of four words, one of which says copy, reverse,
sort or uppercase, and six letters; of its training answers 30 % are those of the
default task, copy, whatever was asked. It has also read what stands in for knowledge of
the language: "opposite" before an instruction (answers of another task), "opposite"
alone (of any task) and no instruction at all (the default task).

Claims: eps = 0 is greedy decoding; at eps = 0.3 the noisy instruction "opposite" gives
at least 5 points more exact matches than that, and no fewer than none at all ("null").

    python -m experiments.lm.instructive_decoding full   # 3 seeds: 2 minutes, 2 cores

Expected: 57.0 % exact matches by greedy decoding, 60.4 % by 'opposite' and 61.6 % by
'null' at eps = 0.3, so that the last two claims fail and the exit status is 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.lm._answers import trained_on_answers
from jaxzoo.lm.instructive_decoding import (
    exact_match,
    instructive_decode,
    label_adherence,
    noisy_instruction,
)
from jaxzoo.nn.generate import generate
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr

TASKS = ("copy", "reverse", "sort", "uppercase")
LETTERS = 8  # lower case 0 to 7, upper case 8 to 15
TASK, OPPOSITE, FILLER, PAD, SEP = 16, 20, 21, 29, 30  # 4 tasks and 8 fillers
VOCABULARY = 31
WORDS = 4  # of an instruction
NOISES = ("trunc_shuffle", "null", "random_words", "opposite", "opposite, instruction")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    letters: int = 6
    width: int = 48
    depth: int = 2
    heads: int = 2
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 3e-3
    default_rate: float = 0.3  # training answers of the default task
    problems: int = 1024
    eps: tuple[float, ...] = (-0.3, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # 0.3 is claimed of

    def __post_init__(self):
        if self.seeds < 2 or 0.3 not in self.eps or 0.0 not in self.eps:
            raise ValueError("seeds >= 2 and eps with 0 and 0.3, please")


PRESETS = {
    "smoke": Config(
        seeds=2, letters=3, width=16, depth=1, steps=5, batch_size=8, problems=16,
        eps=(0.0, 0.3),
    ),
    "full": Config(),
}  # fmt: skip


def instructions(key: jax.Array, task: jax.Array) -> jax.Array:
    """The task's word at a place among fillers, `[B, 4]`."""
    keys = jax.random.split(key)
    words = FILLER + jax.random.randint(keys[0], (len(task), WORDS), 0, 8)
    place = jax.random.randint(keys[1], (len(task), 1), 0, WORDS)
    is_task = jnp.arange(WORDS)[None] == place
    return jnp.where(is_task, TASK + task[:, None], words).astype(jnp.int32)


def answers(letters: jax.Array) -> jax.Array:
    """By each task, `[B, 4, T]`."""
    ways = letters, letters[:, ::-1], jnp.sort(letters, axis=1), letters + LETTERS
    return jnp.stack(ways, axis=1)


def prompts(instruction: jax.Array, letters: jax.Array) -> jax.Array:
    """Filled up in front to one length: "opposite", four words, letters, separator."""
    missing = WORDS + 1 - instruction.shape[1]
    front = jnp.pad(instruction, ((0, 0), (missing, 0)), constant_values=PAD)
    return jnp.pad(
        jnp.concatenate([front, letters], axis=1), ((0, 0), (0, 1)), constant_values=SEP
    ).astype(jnp.int32)


def training_batch(config: Config, key: jax.Array) -> jax.Array:
    """Prompts and answers, `[B, T]`."""
    keys = jax.random.split(key, 6)
    rows = (config.batch_size,)
    letters = jax.random.randint(keys[0], (*rows, config.letters), 0, LETTERS)
    task = jax.random.randint(keys[1], rows, 0, 4)
    plain = instructions(keys[2], task)
    opposite = jnp.full((*rows, 1), OPPOSITE, jnp.int32)
    nothing = jnp.full((*rows, WORDS), PAD, jnp.int32)
    ways = jnp.stack(
        [
            prompts(plain, letters),
            prompts(jnp.concatenate([opposite, plain], axis=1), letters),
            prompts(opposite, letters),
            prompts(nothing, letters),
        ],
        axis=1,
    )
    way = jax.random.categorical(
        keys[3], jnp.log(jnp.array([0.8, 0.1, 0.05, 0.05])), shape=rows
    )
    other = (task + jax.random.randint(keys[4], rows, 1, 4)) % 4
    done = jnp.stack([task, other, task, jnp.zeros_like(task)], axis=1)
    done = jnp.take_along_axis(done, way[:, None], axis=1)[:, 0]
    default = jax.random.bernoulli(keys[5], config.default_rate, rows)
    done = jnp.where(default, 0, done)
    prompt = jnp.take_along_axis(ways, way[:, None, None], axis=1)[:, 0]
    answer = jnp.take_along_axis(answers(letters), done[:, None, None], axis=1)[:, 0]
    return jnp.concatenate([prompt, answer], axis=1).astype(jnp.int32)


def language_model(config: Config) -> LanguageModel:
    body = Transformer(
        config.width, config.depth, config.heads, qk_norm=True, implementation="ref"
    )
    return LanguageModel(VOCABULARY, config.width, body)


def measured(config: Config) -> dict[str, np.ndarray]:
    """Of each seed: exact matches by task, answers of some task, greedy differences.

    "right" `[seeds, noises, eps, tasks]`, "adheres" `[seeds, noises, eps]`: shares;
    "greedy" `[seeds, tasks]`, and "differ" `[seeds, noises]`, tokens at eps = 0.
    """
    model = language_model(config)
    eps, count = jnp.asarray(config.eps), config.problems
    nil = config.eps.index(0.0)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)
        params, loss = trained_on_answers(
            model, functools.partial(training_batch, config), keys[0],
            prompt=WORDS + config.letters + 2,  # with "opposite" and the separator
            learning_rate=config.learning_rate, steps=config.steps,
        )  # fmt: skip
        task = jnp.arange(count) % 4
        letters = jax.random.randint(keys[1], (count, config.letters), 0, LETTERS)
        instruction = instructions(keys[2], task)
        prompt, labels = prompts(instruction, letters), answers(letters)
        expected = jnp.take_along_axis(labels, task[:, None, None], axis=1)[:, 0]
        meta, fillers = jnp.array([OPPOSITE]), FILLER + jnp.arange(8)

        def noise(kind: Any, **knobs: Any) -> jax.Array:
            noisy = noisy_instruction(keys[3], instruction, kind=kind, **knobs)
            return prompts(noisy, letters)

        noisy = jnp.stack([
            noise("trunc_shuffle"), noise("null"),
            noise("random_words", words=fillers), noise("opposite", opposite=meta),
            noise("opposite", opposite=meta, is_before=True),
        ])  # fmt: skip
        cache = model.body.empty_cache(count, prompt.shape[1] + config.letters)
        knobs = {"num_tokens": config.letters, "temperature": 0.0}

        def read(cache: Any, tokens: jax.Array) -> Any:
            return model.apply(params, tokens, cache)

        def by_task(right: jax.Array) -> jax.Array:
            return jnp.mean(right.reshape(-1, 4).astype(jnp.float32), axis=0)

        greedy, _ = generate(keys[3], read, prompt, state=cache, **knobs)

        def decoded(given: Any) -> Any:
            noisy_prompt, eps = given
            text, _ = instructive_decode(
                keys[3], read, prompt, noisy_prompt, state=cache, noisy_state=cache,
                eps=eps, **knobs,
            )  # fmt: skip
            right = by_task(exact_match(text, expected))
            adheres = jnp.mean(label_adherence(text, labels).astype(jnp.float32))
            return right, adheres, jnp.sum(text != greedy)

        pairs = jnp.repeat(noisy, len(eps), axis=0), jnp.tile(eps, len(noisy))
        found = lax.map(decoded, pairs)
        right, adheres, differ = (
            x.reshape(len(noisy), len(eps), *x.shape[1:]) for x in found
        )
        return {
            "loss": loss, "right": right, "adheres": adheres,
            "differ": differ[:, nil], "greedy": by_task(exact_match(greedy, expected)),
            "copies": jnp.mean(exact_match(greedy, letters).astype(jnp.float32)),
        }  # fmt: skip

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    return jax.device_get(jax.jit(lambda k: lax.map(one, k))(keys))


def picture(config: Config, run: Run, found: dict[str, np.ndarray]) -> Figure:
    figure, axes = panels(2)
    right = 100 * found["right"]
    for i, name in enumerate(NOISES):
        curve = right[:, i].mean(axis=-1)
        spread = [stderr(x) for x in curve.T]
        axes[0].errorbar(
            config.eps, curve.mean(axis=0), spread, color=COLORS[i], label=name,
            marker="o", ms=4, capsize=3,
        )  # fmt: skip
    axes[0].set(xlabel="eps (share of the noisy logits)", ylabel="exact matches (%)")
    axes[0].legend(frameon=False)
    at = config.eps.index(0.3)
    ways = {"greedy": 100 * found["greedy"]}
    ways |= {k: right[:, NOISES.index(k), at] for k in ("null", "opposite")}
    colors = COLORS[6], COLORS[1], COLORS[3]
    for j, (name, values) in enumerate(ways.items()):
        axes[1].errorbar(
            np.arange(4) + 0.15 * (j - 1), values.mean(axis=0),
            [stderr(x) for x in values.T], fmt="o", color=colors[j], label=name,
            capsize=3,
        )  # fmt: skip
    axes[1].set_xticks(range(4), list(TASKS))
    axes[1].set(xlabel="task of the instruction", ylabel="exact matches (%)")
    axes[1].legend(frameon=False)
    return run.figure(
        "instructive_decoding", figure, title="Instructions that are heeded",
        caption="Left: by how much of the noisy logits is taken away. Right: by task, "
        f"at eps = 0.3. Means and standard errors over {config.seeds} seeds.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    found = measured(config)
    at = config.eps.index(0.3)
    right = 100 * found["right"][:, :, at].mean(axis=-1)
    rates = dict(zip(NOISES, right.T, strict=True))
    greedy = 100 * found["greedy"].mean(axis=-1)
    wrong = int(found["differ"].sum())
    gain, more = rates["opposite"] - greedy, rates["opposite"] - rates["null"]
    claims = [
        Claim(
            "tokens at eps = 0 that are not greedy decoding's, all noisy instructions",
            wrong, "== 0", wrong == 0,
        ),
        Claim(
            "eps = 0.3: exact matches by 'opposite' less greedy decoding's, points",
            float(gain.mean()), ">= 5", bool(gain.mean() >= 5), stderr(gain),
        ),
        Claim(
            "eps = 0.3: exact matches by 'opposite' less those by 'null', points",
            float(more.mean()), ">= 0", bool(more.mean() >= 0), stderr(more),
        ),
    ]  # fmt: skip
    metrics = {f"{k}/exact": float(x.mean()) for k, x in rates.items()}
    metrics["greedy/exact"] = float(greedy.mean())
    rows = [("greedy", f"{greedy.mean():.1f}", f"{stderr(greedy):.1f}", "")]
    adheres = 100 * found["adheres"].mean(axis=0)
    metrics["greedy/adherence"] = float(adheres[0, config.eps.index(0.0)])
    for i, (name, rate) in enumerate(rates.items()):
        metrics[f"{name}/adherence"] = float(adheres[i, at])
        texts = f"{rate.mean():.1f}", f"{stderr(rate):.1f}", f"{adheres[i, at]:.1f}"
        rows.append((name, *texts))
    for name, values in (
        ("greedy", found["greedy"]),
        ("opposite", found["right"][:, 3, at]),
    ):
        shares = 100 * values.mean(axis=0)
        metrics |= {f"{name}/{t}": float(v) for t, v in zip(TASKS, shares, strict=True)}
    metrics |= {k: float(found[k].mean()) for k in ("loss", "copies")}
    run.table(
        f"At eps = 0.3, %, {config.seeds} seeds",
        (
            "noisy instruction",
            "exact matches",
            "standard error",
            "answers of some task",
        ),
        rows,
    )
    return Report(claims, metrics, [picture(config, run, found)])


if __name__ == "__main__":
    experiment(main, PRESETS)
