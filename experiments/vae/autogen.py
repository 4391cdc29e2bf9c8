"""AutoGen: one more term, and a text VAE uses its latent.

Claims: gradients are 1 + m times those of a beta-VAE with beta = 1 / (1 + m); on short
pieces of Moby Dick, held out, AutoGen with m = 1 has at least twice the KL of a VAE,
whose m is 0, and a higher log-likelihood of reconstruction. Also shown: a VAE with an
annealed KL, and what m costs in log p(x), on text and on digits.

    python -m experiments.vae.autogen full    # 3 seeds: 2 minutes on 2 cores

Expected: gradients agree to 4e-7. A VAE uses 0.02 nats of its latent, so that any use
of it is many times more; AutoGen uses 2.0, reconstructs 1.2 nats per piece better
(-32.4, -33.6), and has 0.3 nats less of log p(x) (-33.9, -33.6). Of 4 nats early
in training the annealed VAE keeps 0.2.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from experiments.vae._courses import courses
from jaxzoo.core.stats import bernoulli_log_prob, normal_kl, normal_log_prob
from jaxzoo.data.digits import flat_digits
from jaxzoo.data.text import LETTERS, moby_dick_letters
from jaxzoo.nn.mlp import MLP, GaussianMLP
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.vae.autogen import (
    TextDecoder,
    TextEncoder,
    autogen_loss,
    autogen_objective,
    kl_annealing,
    word_dropout,
)

# Multiplicity m, and whether the weight of the KL is annealed.
TEXT = {"VAE": (0.0, 0), "VAE, annealed": (0.0, 1), "AutoGen, m = 1": (1.0, 0)}
MULTIPLES = (0.0, 1.0, 3.0)  # of digits


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    first_seed: int = 0
    held_out: Literal["test", "validation"] = "test"
    letters: int = 16  # of a text
    texts: int = 500  # held out
    latents: int = 8
    hidden: int = 64
    steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 3e-3
    dropout: float = 0.4  # of letters that the decoder reads
    draws: int = 50  # of z, for log p(x)

    def __post_init__(self):
        if self.seeds < 2 or self.draws < 2:
            raise ValueError("seeds >= 2 and draws >= 2, please")


PRESETS = {
    "smoke": Config(
        seeds=2, letters=4, texts=20, latents=2, hidden=4, steps=5, batch_size=8,
        draws=3,
    ),
    "full": Config(),
}  # fmt: skip


class Model:
    """q(z|x) and p(x|z) of texts or of digits, the parameters being arguments."""

    def __init__(self, config: Config, kind: str):
        self.config, self.kind = config, kind
        if kind == "text":
            self.encoder: Any = TextEncoder(LETTERS, config.latents, config.hidden)
            self.decoder: Any = TextDecoder(LETTERS, config.hidden)
        else:
            self.encoder = GaussianMLP(config.latents, (config.hidden,))
            self.decoder = MLP((config.hidden, 64))

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        keys, z = jax.random.split(key), jnp.zeros((1, self.config.latents))
        rest = (x[:1],) if self.kind == "text" else ()
        return self.encoder.init(keys[0], x[:1]), self.decoder.init(keys[1], z, *rest)

    def draw(self, params: Any, key: jax.Array, x: jax.Array) -> Any:
        mean, log_std = self.encoder.apply(params[0], x)
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        return z, mean, log_std

    def log_likelihood(
        self, params: Any, z: jax.Array, x: jax.Array, seen: jax.Array
    ) -> jax.Array:
        if self.kind != "text":
            log_prob = dict(normal=normal_log_prob, bernoulli=bernoulli_log_prob)
            return log_prob[self.kind](x, self.decoder.apply(params[1], z))
        log_p = jax.nn.log_softmax(self.decoder.apply(params[1], z, seen))
        return jnp.sum(jnp.take_along_axis(log_p, x[..., None], -1), axis=(1, 2))

    def terms(self, params: Any, key: jax.Array, x: jax.Array, dropout: float) -> Any:
        keys = jax.random.split(key)
        z, mean, log_std = self.draw(params, keys[0], x)
        seen = x
        if self.kind == "text":
            seen = word_dropout(keys[1], x, LETTERS, rate=dropout)
        return self.log_likelihood(params, z, x, seen), normal_kl(mean, log_std)


def gradient_error(model: Model, params: Any, key: jax.Array, x: jax.Array) -> Any:
    """How far gradients are from 1 + m times a beta-VAE's, relative, by m."""

    found, pull = jax.vjp(lambda p: model.terms(p, key, x, 0.4), params)

    def one(m: jax.Array) -> jax.Array:
        def own(found: Any) -> jax.Array:
            return autogen_loss(*found, m=m)[0]

        def other(found: Any) -> jax.Array:
            return jnp.mean(found[1] / (1.0 + m) - found[0])

        a, b = (ravel_pytree(pull(jax.grad(f)(found)))[0] for f in (own, other))
        return jnp.linalg.norm(a - (1.0 + m) * b) / jnp.linalg.norm(a)

    return jax.vmap(one)(jnp.array([0.5, 1.0, 4.0, 9.0]))


def one_model(
    config: Config, model: Model, m: jax.Array, annealed: jax.Array, key: jax.Array,
    x: jax.Array, test: jax.Array,
) -> Any:  # fmt: skip
    """Trains one model, and measures it on what was held out."""
    keys = jax.random.split(key, 4)
    optimizer = optax.adam(
        optax.cosine_decay_schedule(config.learning_rate, config.steps)
    )
    warmup = max(config.steps // 2, 1)

    def step(carry: Any, inputs: Any) -> Any:
        params, state = carry
        count, key = inputs
        own = jax.random.split(key)
        rows = jax.random.randint(own[0], (config.batch_size,), 0, len(x))
        weight = jnp.where(annealed, kl_annealing(count, warmup=warmup), 1.0)

        def loss(params: Any) -> Any:
            log_p, kl = model.terms(params, own[1], x[rows], config.dropout)
            return autogen_loss(log_p, kl, m=m, kl_weight=weight)[0], jnp.mean(kl)

        gradient, kl = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), kl

    start = model.init(keys[0], x)
    inputs = jnp.arange(config.steps), jax.random.split(keys[1], config.steps)
    (params, _), course = lax.scan(step, (start, optimizer.init(start)), inputs)

    def sample(key: jax.Array) -> Any:
        z, mean, log_std = model.draw(params, key, test)
        log_p = model.log_likelihood(params, z, test, test)
        terms = log_p, normal_log_prob(z), normal_log_prob(z, mean, log_std)
        return terms, normal_kl(mean, log_std)

    draws, kl = lax.map(sample, jax.random.split(keys[2], config.draws))
    objective, terms = autogen_objective(*draws, m=m)
    found = {
        "kl": jnp.mean(kl),
        "reconstruction": jnp.mean(draws[0]),
        "log_p": jnp.mean(terms["log_marginal"]),
        "log_r": jnp.mean(terms["log_reconstruction"]),
        "bound": jnp.mean(terms["bound"]),
        "objective": jnp.mean(objective),
    }
    kinds = ("text",) if model.kind == "text" else ("bernoulli", "normal")
    found |= {
        f"error/{kind}": gradient_error(
            Model(config, kind), params, keys[3], x[: config.batch_size]
        )
        for kind in kinds
    }
    return found, course


def pictures(
    config: Config, run: Run, text: Any, digits: Any, course: np.ndarray
) -> list[Figure]:
    figure, axes = panels(3, width=4.4)
    series = courses(TEXT, course)
    curves(axes[0], series, xlabel="step", ylabel="KL of text, in training (nats)")
    terms = {
        "reconstruction": "E log p(x|z)", "log_r": "log p(x'=x|x)", "log_p": "log p(x)",
    }  # fmt: skip
    for i, (name, marker) in enumerate(zip(TEXT, "osD", strict=True)):
        values = [text[n][i] for n in terms]
        axes[1].errorbar(
            np.arange(3) + 0.12 * (i - 1), [v.mean() for v in values],
            [stderr(v) for v in values], color=COLORS[i], marker=marker, ms=5, ls="",
            capsize=3, label=name,
        )  # fmt: skip
    axes[1].set(
        xticks=range(3), xticklabels=terms.values(), xlim=(-0.5, 2.5),
        ylabel="text, held out (nats per piece)",
    )  # fmt: skip
    axes[1].legend(frameon=False, loc="center right")
    for i, (name, marker) in enumerate({"reconstruction": "o", "log_p": "s"}.items()):
        values, kl = digits[name], digits["kl"]
        axes[2].errorbar(
            kl.mean(axis=1), values.mean(axis=1), [stderr(v) for v in values],
            [stderr(v) for v in kl], color=COLORS[i], marker=marker, ms=5, capsize=3,
            label=terms[name],
        )  # fmt: skip
    for m, kl, value in zip(MULTIPLES, digits["kl"], digits["log_p"], strict=True):
        axes[2].annotate(
            f"m = {m:g}", (kl.mean(), value.mean()), (0, -16), ha="center",
            textcoords="offset points", fontsize=8,
        )  # fmt: skip
    axes[2].margins(0.12)
    axes[2].set(xlabel="KL (nats)", ylabel="digits, held out (nats per image)")
    axes[2].legend(frameon=False)
    return [
        run.figure(
            "descriptiveness", figure, title="What the latent says, and what it costs",
            caption="Left and middle: VAEs and AutoGen on pieces of "
            f"{config.letters} letters of Moby Dick. Right: AutoGen on binary digits. "
            f"log p(x) has {config.draws} draws; means and standard errors over "
            f"{config.seeds} seeds.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    parts = "train", config.held_out
    x, test = (moby_dick_letters(split, config.letters) for split in parts)
    (images, _), (others, _) = flat_digits(config.held_out)
    images, others = (np.float32(a >= 0.5) for a in (images, others))

    @jax.jit
    def every(seeds: jax.Array, text: Any, digits: Any) -> Any:
        def models(kind: str, settings: Any, data: Any) -> Any:
            def one(inputs: Any) -> Any:
                m, annealed, seed = inputs
                key = jax.random.key(seed)
                return one_model(config, Model(config, kind), m, annealed, key, *data)

            m, annealed = (jnp.repeat(jnp.array(a), len(seeds)) for a in settings)
            order = m, annealed > 0, jnp.tile(seeds, len(settings[0]))
            found = lax.map(one, order)
            shape = len(settings[0]), len(seeds)
            return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), found)

        settings = tuple(zip(*TEXT.values(), strict=True))
        more = MULTIPLES, (0,) * len(MULTIPLES)
        return models("text", settings, text), models("bernoulli", more, digits)

    seeds = config.first_seed + np.arange(config.seeds)
    data = (x, test[: config.texts]), (images, others)
    (text, course), (digits, _) = jax.device_get(every(seeds, *data))
    both = text | digits
    errors = {n: float(v.max()) for n, v in both.items() if n.startswith("error/")}
    ratio = text["kl"][2] / text["kl"][0]
    gain = text["reconstruction"][2] - text["reconstruction"][0]
    worst = max(errors.values())
    claims = [
        Claim(
            "gradients of AutoGen against 1 + m times those of a beta-VAE with beta = "
            "1 / (1 + m), of texts and digits (Bernoulli and normal), m from 0.5 to 9: "
            "largest relative error",
            worst, "< 1e-5", bool(worst < 1e-5),
        ),
        Claim(
            "held-out text: KL of AutoGen with m = 1 over that of a VAE, worst seed",
            float(ratio.min()), ">= 2", bool(ratio.min() >= 2), stderr(ratio),
        ),
        Claim(
            "held-out text: log-likelihood of reconstruction, AutoGen with m = 1 less "
            "a VAE (nats per piece), worst seed",
            float(gain.min()), "> 0", bool(gain.min() > 0), stderr(gain),
        ),
    ]  # fmt: skip
    names = {
        "kl": "KL", "reconstruction": "E log p(x|z)", "log_r": "log p(x'=x|x)",
        "log_p": "log p(x)", "objective": "objective", "bound": "its bound",
    }  # fmt: skip
    metrics: dict[str, Any] = errors
    rows = []
    every_model = [(f"text/{n}", text, i) for i, n in enumerate(TEXT)]
    every_model += [(f"digits/m = {m:g}", digits, i) for i, m in enumerate(MULTIPLES)]
    for label, found, i in every_model:
        metrics |= {f"{label}/{n}": float(found[n][i].mean()) for n in names}
        cells = (f"{found[n][i].mean():.2f} ± {stderr(found[n][i]):.2f}" for n in names)
        rows.append((label, *cells))
    run.table(f"Held out, nats, {config.seeds} seeds", ("model", *names.values()), rows)
    return Report(claims, metrics, pictures(config, run, text, digits, course))


if __name__ == "__main__":
    experiment(main, PRESETS)
