"""DPO: preferences without a reward model, in a bandit, on letters and on spelling.

Claims: the loss is log 2 where policy and reference agree; in a bandit with
Bradley-Terry preferences its minimiser is pi_ref exp(r / beta) / Z; a small language
model of letters that learns from pairs gets at least the reward, at equal KL, that
REINFORCE gets from a reward model trained on the same pairs; and a byte transformer,
pretrained on Moby Dick, that is shown pairs of a word and a misspelling of it prefers
the right spelling of words that it was not shown more often than before.

    pip install codespell                     # for the last claim
    python -m experiments.lm.dpo full         # 3 seeds: 2 minutes on 2 cores

Expected: REINFORCE is ahead at equal KL, by 0.37 letters, so that the exit status is 1:
it draws new strings from its policy where DPO has 1,024 pairs of the reference's, and
what it is paid for, single letters, is easy to learn as a reward. The right spelling is
preferred in 88.8 % of the pairs, from 88.1 % before, little more than the error of it.

The pairs of the last claim are codespell's list of real misspellings: a stand-in for
human preferences, of which no set can be had without a download.
"""

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.lm._dpo_letters import (
    by_dpo,
    by_reinforce,
    descend,
    frontier_points,
    most_at,
)
from jaxzoo.data.text import moby_dick
from jaxzoo.lm.dpo import dpo_loss, optimal_policy
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.token_logprobs import token_kl, token_logprobs
from jaxzoo.nn.transformer import Transformer
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr

PROMPT, ANSWER = 32, 16  # bytes before a word, and of it


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    arms: int = 20  # of the bandit
    betas: tuple[float, ...] = (0.1, 0.2, 0.4, 0.7, 1.0, 2.0)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)
    pairs: int = 1024  # of strings of letters
    length: int = 12  # of those strings
    steps: int = 300  # of each training on letters
    batch_size: int = 64
    samples: int = 2048  # that reward and KL are measured on
    pretraining: int = 600  # steps of the byte transformer
    tuning: int = 150  # steps on spelling
    width: int = 64
    beta: float = 0.1  # of spelling
    words: int = 1500  # pairs of spelling, a quarter of them held out

    def __post_init__(self):
        if self.seeds < 2 or len(self.betas) < 2:
            raise ValueError("seeds >= 2 and two betas or more, please")


PRESETS = {
    "smoke": Config(
        seeds=2, arms=5, betas=(0.1, 1.0), learning_rates=(3e-3,), pairs=64, length=6,
        steps=20, batch_size=16, samples=128, pretraining=10, tuning=5, width=16,
        words=64,
    ),
    "full": Config(),
}  # fmt: skip


# A bandit: all pairs of arms, with their probabilities as weights.


def bandit_claims(config: Config) -> list[Claim]:
    """How far L-BFGS on all pairs ends from the policy that is known to be best."""
    n, beta = config.arms, 0.5
    first, second = (jnp.asarray(x.ravel()) for x in np.mgrid[:n, :n])
    solver = optax.lbfgs()

    def distance(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        reward = jax.random.normal(keys[0], (n,))
        reference = jax.nn.log_softmax(jax.random.normal(keys[1], (n,)))
        weight = jax.nn.sigmoid(reward[first] - reward[second])

        def loss(logits: jax.Array) -> jax.Array:
            policy = jax.nn.log_softmax(logits)
            rows = policy[first], policy[second], reference[first], reference[second]
            return jnp.sum(weight * dpo_loss(*rows, beta=beta)[1]["per_example"])

        def step(carry: Any, _: None) -> Any:
            logits, state = carry
            value, slope = optax.value_and_grad_from_state(loss)(logits, state=state)
            updates, state = solver.update(
                slope, state, logits, value=value, grad=slope, value_fn=loss
            )
            return (optax.apply_updates(logits, updates), state), None

        start = (reference, solver.init(reference))
        (logits, _), _ = lax.scan(step, start, None, 100)
        best, _ = optimal_policy(reference, reward, beta=beta)
        return jnp.sum(jnp.abs(jax.nn.softmax(logits) - jnp.exp(best))) / 2

    keys = jax.random.split(jax.random.key(0), config.seeds)
    worst = float(jnp.max(lax.map(distance, keys)))
    rows = jax.random.normal(jax.random.key(1), (2, 8)) - 20.0
    start = abs(float(dpo_loss(rows[0], rows[1], rows[0], rows[1])[0]) - np.log(2))
    return [
        Claim("|loss - log 2| at policy = reference", start, "<= 1e-6", start <= 1e-6),
        Claim(
            f"bandit of {n} arms: total variation of the minimiser from "
            "pi_ref exp(r / beta) / Z, worst seed",
            worst, "< 0.01", worst < 0.01,
        ),
    ]  # fmt: skip


# Spelling: a byte transformer.


def misspellings(config: Config) -> dict[str, np.ndarray] | None:
    """Prompts with a word and a misspelling of it, none where codespell is missing."""
    found = importlib.util.find_spec("codespell_lib")
    if found is None or found.origin is None:
        return None
    path = Path(found.origin).parent / "data" / "dictionary.txt"
    wrong: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines():
        mistake, _, word = line.partition("->")
        if word.isascii() and word.isalpha() and mistake.isascii():
            wrong.setdefault(word, mistake)
    text = moby_dick(window=64).split("train").arrays["token"].tobytes()
    prompts, chosen, rejected, seen = [], [], [], set()
    for match in re.finditer(rb"(?<= )[a-z]{4,12}(?= )", text):
        word = match.group().decode()
        if word not in wrong or word in seen or match.start() < PROMPT:
            continue
        seen.add(word)
        prompts.append(text[match.start() - PROMPT : match.start()])
        for answers, answer in ((chosen, word), (rejected, wrong[word])):
            answers.append((answer[: ANSWER - 1] + " ").encode().ljust(ANSWER, b"\0"))
        if len(seen) == config.words:
            break

    def rows(texts: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(texts), np.uint8).reshape(len(texts), -1)

    return {"prompt": rows(prompts), "chosen": rows(chosen), "rejected": rows(rejected)}


def spelling(config: Config, pairs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Win rate and KL before and after DPO, `[seeds]` each."""
    model = LanguageModel(
        256, config.width,
        Transformer(config.width, depth=2, heads=4, implementation="ref"),
    )  # fmt: skip
    data = moby_dick(window=PROMPT + ANSWER)
    text = jnp.asarray(data.split("train").arrays["token"])
    rest = jnp.asarray(data.split("validation").arrays["token"][:128], jnp.int32)
    quarter = len(pairs["prompt"]) // 4
    train, test = (
        {k: jnp.asarray(v[part], jnp.int32) for k, v in pairs.items()}
        for part in (slice(quarter, None), slice(quarter))
    )

    def states(params: Any, tokens: jax.Array) -> tuple[Any, Any]:
        outputs: Any = model.apply(params, tokens[:, :-1], method="hidden")
        return outputs[0], model.apply(params, method="head")

    def answer(params: Any, prompt: jax.Array, answer: jax.Array) -> jax.Array:
        """log pi(answer | prompt), the bytes 0 that fill it up left out."""
        tokens = jnp.concatenate([prompt, answer], axis=1)
        logp, _ = token_logprobs(*states(params, tokens), tokens[:, 1:], chunk=256)
        return jnp.sum(jnp.where(answer > 0, logp[:, -ANSWER:], 0.0), axis=1)

    def both(params: Any, example: Any) -> list[jax.Array]:
        return [
            answer(params, example["prompt"], example[k])
            for k in ("chosen", "rejected")
        ]

    def likelihood(params: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (32,), 0, len(text))
        tokens = text[rows].astype(jnp.int32)
        logp, _ = token_logprobs(*states(params, tokens), tokens[:, 1:], chunk=256)
        return -jnp.mean(logp)

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)
        start = model.init(keys[0], jnp.zeros((1, 8), jnp.int32))
        reference = descend(likelihood, start, 3e-3, keys[1], config.pretraining)

        def loss(params: Any, key: jax.Array) -> jax.Array:
            rows = jax.random.randint(key, (32,), 0, len(train["prompt"]))
            example = {k: v[rows] for k, v in train.items()}
            known = both(lax.stop_gradient(reference), example)
            return dpo_loss(*both(params, example), *known, beta=config.beta)[0]

        policy = descend(loss, reference, 3e-4, keys[2], config.tuning)
        scores = {}
        for name, params in (("before", reference), ("after", policy)):
            right, wrong = both(params, test)
            scores[name] = 100 * jnp.mean(right > wrong)
        kl = token_kl(*states(policy, rest), *states(reference, rest), chunk=256)
        return {**scores, "kl": jnp.mean(kl)}

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    return jax.device_get(jax.jit(lambda k: lax.map(one, k))(keys))


def picture(
    config: Config, run: Run, points: Any, levels: np.ndarray, spelled: Any
) -> Figure:
    figure, axes = panels(2 if spelled else 1, width=4.8)
    axes = np.atleast_1d(axes)
    for color, (name, values) in zip(COLORS, points.items(), strict=False):
        axes[0].plot(
            values["kl"].ravel(), values["reward"].ravel(), ".", color=color, alpha=0.4
        )
        most = most_at(values, levels)
        spread = [stderr(m) for m in most.T]
        axes[0].errorbar(
            levels, most.mean(0), spread, color=color, capsize=3, label=name
        )
    axes[0].set(xlabel="KL from the reference (nats)", ylabel="letters e per string")
    axes[0].legend(frameon=False, loc="lower right")
    if spelled:
        means = [spelled[k].mean() for k in ("before", "after")]
        errors = [stderr(spelled[k]) for k in ("before", "after")]
        axes[1].bar(
            ["before", "after DPO"], means, yerr=errors, color=COLORS[:2], capsize=4
        )
        axes[1].axhline(50, color="0.5", lw=0.8)
        axes[1].set(ylabel="right spelling preferred (%)", ylim=(0, 100))
    return run.figure(
        "dpo", figure, title="Learning from pairs",
        caption="Left: reward against KL of policies of letters; points are single "
        "runs, lines the best of them and of mixtures of two. Right: words that were "
        f"not shown. Means and standard errors over {config.seeds} seeds.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    claims = bandit_claims(config)
    points = {
        "DPO": frontier_points(config, by_dpo),
        "REINFORCE": frontier_points(config, by_reinforce),
    }
    kls = [p["kl"].reshape(config.seeds, -1) for p in points.values()]
    low = max(k.min(axis=1).max() for k in kls)
    high = max(min(k.max(axis=1).min() for k in kls), low)
    levels = np.linspace(low, high, 8)
    ours, theirs = (most_at(p, levels) for p in points.values())
    by_seed = (ours - theirs).mean(axis=1)
    ahead = float(by_seed.mean())
    claims.append(
        Claim(
            "letters: reward of DPO less that of REINFORCE at equal KL, mean over "
            f"{low:.1f} to {high:.1f} nats, letters e per string",
            ahead, ">= 0", ahead >= 0, stderr(by_seed),
        )
    )  # fmt: skip
    metrics = {}
    for name, values in points.items():
        for i, beta in enumerate(config.betas):
            for kind in ("reward", "kl"):
                metrics[f"{name}/{beta:g}/{kind}"] = float(values[kind][:, i].mean())
    pairs, spelled = misspellings(config), None
    if pairs is None:
        run.say("codespell is not installed: nothing is claimed of spelling.")
    else:
        spelled = spelling(config, pairs)
        gain = spelled["after"] - spelled["before"]
        claims.append(
            Claim(
                "spelling, words not shown: points by which the right one is preferred "
                "more often than before",
                float(gain.mean()), "> 0", bool(gain.mean() > 0), stderr(gain),
            )
        )  # fmt: skip
        metrics |= {f"spelling/{k}": float(v.mean()) for k, v in spelled.items()}
    return Report(claims, metrics, [picture(config, run, points, levels, spelled)])


if __name__ == "__main__":
    experiment(main, PRESETS)
