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
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.data.text import moby_dick
from jaxzoo.lm.dpo import dpo_loss, optimal_policy
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.token_logprobs import token_kl, token_logprobs
from jaxzoo.nn.transformer import Transformer
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr

LETTERS = 27  # the space and a to z
CONTEXT = 4  # letters that the small model sees
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


# Letters: a model of four letters' context, DPO against REINFORCE.


def letters() -> np.ndarray:
    """The training text of Moby Dick in 27 symbols, runs of others as one space."""
    text = moby_dick(window=64).split("train").arrays["token"].tobytes().decode("latin")
    plain = re.sub("[^a-z]+", " ", text.lower())
    return np.frombuffer(plain.encode(), np.uint8).astype(np.int32) % 32


def init_letters(key: jax.Array, outputs: int = LETTERS) -> dict[str, jax.Array]:
    keys = jax.random.split(key)
    inputs = CONTEXT * LETTERS
    return {
        "in": jax.random.normal(keys[0], (inputs, 64)) / CONTEXT**0.5,
        "out": jax.random.normal(keys[1], (64, outputs)) * 0.01,
    }


def letter_outputs(params: Any, before: jax.Array) -> jax.Array:
    """From the four letters before, `[..., 4]`."""
    hot = jax.nn.one_hot(before, LETTERS).reshape(*before.shape[:-1], -1)
    return jnp.tanh(hot @ params["in"]) @ params["out"]


def contexts(strings: jax.Array) -> jax.Array:
    """The four letters before each letter, spaces before the first, `[B, T, 4]`."""
    padded = jnp.pad(strings, ((0, 0), (CONTEXT, 0)))
    length = strings.shape[1]
    return jnp.stack([padded[:, i : i + length] for i in range(CONTEXT)], axis=-1)


def log_prob(params: Any, strings: jax.Array) -> jax.Array:
    """Of whole strings, `[B]`."""
    logits = letter_outputs(params, contexts(strings))
    return -jnp.sum(
        optax.softmax_cross_entropy_with_integer_labels(logits, strings), axis=-1
    )


def draw(key: jax.Array, params: Any, count: int, length: int) -> jax.Array:
    def step(before: jax.Array, key: jax.Array) -> Any:
        letter = jax.random.categorical(key, letter_outputs(params, before))
        return jnp.concatenate([before[:, 1:], letter[:, None]], axis=1), letter

    start = jnp.zeros((count, CONTEXT), jnp.int32)
    _, drawn = lax.scan(step, start, jax.random.split(key, length))
    return drawn.T


def true_reward(strings: jax.Array) -> jax.Array:
    """How many letters e."""
    return jnp.sum(strings == 5, axis=1).astype(jnp.float32)


def descend(loss: Any, params: Any, rate: Any, key: jax.Array, steps: int) -> Any:
    """Adam on `loss(params, key)`."""
    optimizer = optax.adam(rate)

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, steps)
    return lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


class Setting(NamedTuple):
    """What both ways begin with: a reference, and pairs drawn from it."""

    reference: Any
    chosen: jax.Array
    rejected: jax.Array


def setting(config: Config, text: jax.Array, key: jax.Array) -> Setting:
    keys = jax.random.split(key, 5)

    def likelihood(params: Any, key: jax.Array) -> jax.Array:
        starts = jax.random.randint(key, (256,), 0, len(text) - config.length)
        windows = text[starts[:, None] + jnp.arange(config.length)[None]]
        return -jnp.mean(log_prob(params, windows))

    start = init_letters(keys[0])
    reference = descend(likelihood, start, 3e-3, keys[1], config.steps)
    pairs = draw(keys[2], reference, 2 * config.pairs, config.length)
    one, other = pairs[: config.pairs], pairs[config.pairs :]
    wins = jax.random.bernoulli(
        keys[3], jax.nn.sigmoid(true_reward(one) - true_reward(other))
    )
    chosen = jnp.where(wins[:, None], one, other)
    return Setting(reference, chosen, jnp.where(wins[:, None], other, one))


def some(config: Config, key: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    rows = jax.random.randint(key, (config.batch_size,), 0, len(arrays[0]))
    return [x[rows] for x in arrays]


def by_dpo(config: Config, given: Setting, beta: Any, rate: Any, key: jax.Array) -> Any:
    def loss(params: Any, key: jax.Array) -> jax.Array:
        pair = some(config, key, given.chosen, given.rejected)
        policy = [log_prob(params, x) for x in pair]
        reference = [log_prob(given.reference, x) for x in pair]
        # The grid of betas is traced: rewards are scaled outside, where it may be.
        scaled = [beta * x for x in (*policy, *reference)]
        return dpo_loss(*scaled, beta=1.0)[0]

    return descend(loss, given.reference, rate, key, config.steps)


def by_reinforce(
    config: Config, given: Setting, beta: Any, rate: Any, key: jax.Array
) -> Any:
    """A reward model of the same pairs, and policy gradients on reward less KL."""
    model_key, init_key, key = jax.random.split(key, 3)

    def learned(params: Any, strings: jax.Array) -> jax.Array:
        return jnp.sum(letter_outputs(params, contexts(strings))[..., 0], axis=1)

    def ranking(params: Any, key: jax.Array) -> jax.Array:
        chosen, rejected = some(config, key, given.chosen, given.rejected)
        margin = learned(params, chosen) - learned(params, rejected)
        return -jnp.mean(jax.nn.log_sigmoid(margin))

    start = init_letters(init_key, outputs=1)
    judge = descend(ranking, start, 3e-3, model_key, config.steps)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        strings = draw(key, params, config.batch_size, config.length)
        log_policy = log_prob(params, strings)
        spent = log_policy - log_prob(given.reference, strings)
        gain = lax.stop_gradient(learned(judge, strings) - beta * spent)
        return -jnp.mean((gain - jnp.mean(gain)) * log_policy)

    return descend(loss, given.reference, rate, key, config.steps)


def frontier_points(config: Config, way: Any) -> dict[str, np.ndarray]:
    """Reward and KL of the trained policies, `[seeds, betas, rates]`."""
    text = jnp.asarray(letters())

    def one(given: Setting, key: jax.Array, beta: Any, rate: Any) -> Any:
        policy = way(config, given, beta, rate, key)
        drawn = draw(jax.random.fold_in(key, 1), policy, config.samples, config.length)
        spent = log_prob(policy, drawn) - log_prob(given.reference, drawn)
        return {"reward": jnp.mean(true_reward(drawn)), "kl": jnp.mean(spent)}

    @jax.jit
    def every(text: jax.Array) -> Any:
        seeds = jnp.arange(config.seeds)
        keys = jax.vmap(jax.random.key)(seeds)
        given = lax.map(functools.partial(setting, config, text), keys)
        over = jax.vmap(one, (None, None, None, 0))
        over = jax.vmap(over, (None, None, 0, None))
        betas, rates = jnp.array(config.betas), jnp.array(config.learning_rates)
        later = jax.vmap(lambda k: jax.random.fold_in(k, 7))(keys)
        return jax.vmap(over, (0, 0, None, None))(given, later, betas, rates)

    return jax.device_get(every(text))


def most_at(points: dict[str, np.ndarray], levels: np.ndarray) -> np.ndarray:
    """The reward at each KL, `[seeds, levels]`, by policies and mixtures of two."""
    rows = []
    for kl, reward in zip(points["kl"], points["reward"], strict=True):
        order = np.argsort(kl, axis=None)
        hull: list[tuple[float, float]] = []  # the upper concave one
        for x, y in zip(kl.ravel()[order], reward.ravel()[order], strict=True):
            while len(hull) > 1 and _is_below(hull[-2], hull[-1], (x, y)):
                hull.pop()
            if not hull or y > hull[-1][1]:
                hull.append((float(x), float(y)))
        xs, ys = zip(*hull, strict=True)
        rows.append(np.interp(levels, xs, ys))
    return np.stack(rows)


def _is_below(a: Any, b: Any, c: Any) -> bool:
    """Whether b lies on or below the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


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
