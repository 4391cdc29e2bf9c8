"""Variational Open-Domain: Renyi bounds over a corpus, exact and from a few documents.

Claims: over a corpus of 200 documents, all of which can be visited, the bounds keep
their order, ELBO <= L_0.5 <= L_0, and L_0 is the exact log-marginal likelihood; the
self-normalised estimate from K documents, drawn by priority sampling, has a bias that
shrinks with K and is below 1e-4 nats at K = 200.

    python -m experiments.vae.vod full        # 4 corpora: 1 minute on 2 cores

Expected: a bias of 0.022 nats (upwards: estimates are no bounds) at K = 4, of 0.0029 at
64 and 6e-8 at 200, where draws with replacement still have 0.001; at small K theirs is
a little smaller.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.vae.vod import priority_sample, renyi_bound

SAMPLERS = ("exponential", "uniform", "with replacement")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 4  # corpora
    documents: int = 200
    questions: int = 8
    features: int = 8
    counts: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 200)  # K
    alphas: tuple[float, ...] = (0.0, 0.5, 1.0)
    draws: int = 2000

    def __post_init__(self):
        if self.seeds < 2 or self.counts[-1] != self.documents:
            raise ValueError("seeds >= 2, and all documents as the last count, please")
        if self.alphas != tuple(sorted(self.alphas)) or self.alphas[0] != 0.0:
            raise ValueError("alphas from 0 on, please")


PRESETS = {
    "smoke": Config(seeds=2, documents=20, questions=2, counts=(4, 20), draws=50),
    "full": Config(),
}  # fmt: skip


def corpus(config: Config, key: jax.Array) -> tuple[jax.Array, ...]:
    """log p(a|z, q), the retriever's scores and the sampler's, `[questions, P]`.

    Documents and questions are directions. The retriever goes by likeness, the answer
    by likeness to another direction that is near the question, and the sampler is a
    mixture of both with an error of its own.
    """
    keys = jax.random.split(key, 4)
    shape = (config.questions, config.features)
    documents = jax.random.normal(keys[0], (config.documents, config.features))
    question = jax.random.normal(keys[1], shape)
    need = 0.7 * question + 0.7 * jax.random.normal(keys[2], shape)
    f_theta = question @ documents.T / 8**0.5
    log_p = -jax.nn.softplus(3.0 - 1.5 * (need @ documents.T) / 8**0.5)
    error = jax.random.normal(keys[3], f_theta.shape)
    return log_p, f_theta, f_theta + 0.5 * log_p + 0.7 * error


def estimates(
    config: Config, key: jax.Array, arrays: tuple[jax.Array, ...], count: int,
    sampler: Any,
) -> jax.Array:  # fmt: skip
    """Mean over draws of the bounds from K documents, `[alphas, questions]`."""
    below = jnp.cumsum(jax.nn.softmax(arrays[2], axis=-1), axis=-1)

    def one(key: jax.Array) -> jax.Array:
        if sampler == "with replacement":
            u = jax.random.uniform(key, (config.questions, count))
            found = jax.vmap(jnp.searchsorted)(below, u)
            index, log_s = jnp.minimum(found, config.documents - 1), None
        else:
            index, log_s = priority_sample(
                key, arrays[2], num_samples=count, noise=sampler
            )
        chosen: Any = [jnp.take_along_axis(x, index, axis=-1) for x in arrays]
        bounds = [renyi_bound(*chosen, log_s=log_s, alpha=a) for a in config.alphas]
        return jnp.stack(bounds)

    keys = jax.random.split(key, config.draws)
    return jnp.mean(lax.map(one, keys, batch_size=50), axis=0)


def measured(config: Config) -> dict[str, Any]:
    """By corpus: exact bounds, and the bias of estimates by sampler and count."""

    def one(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key)
        arrays: Any = corpus(config, keys[0])
        log_r = jax.nn.log_softmax(arrays[2])
        exact = [renyi_bound(*arrays, log_s=log_r, alpha=a) for a in config.alphas]
        prior = jax.nn.log_softmax(arrays[1])
        marginal = jax.nn.logsumexp(arrays[0] + prior, axis=-1)
        found = {"exact": jnp.stack(exact), "marginal": marginal}
        for sampler in SAMPLERS:
            gaps = [
                estimates(config, keys[1], arrays, count, sampler) - found["exact"]
                for count in config.counts
            ]
            found[sampler] = jnp.mean(jnp.stack(gaps), axis=-1)
        return found

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    return jax.device_get(jax.jit(lambda k: lax.map(one, k))(keys))


def picture(config: Config, run: Run, results: dict[str, Any]) -> Figure:
    figure, axes = panels(2, width=5.0)
    order = np.argsort(results["marginal"].ravel())
    place = np.arange(len(order))
    axes[0].plot(place, results["marginal"].ravel()[order], "k.", label="log p(a|q)")
    for i, alpha in enumerate(config.alphas):
        values = results["exact"][:, i].ravel()[order]
        axes[0].plot(place, values, color=COLORS[i], label=f"alpha = {alpha}")
    axes[0].set(xlabel="question, by its likelihood", ylabel="exact bound (nats)")
    axes[0].legend(frameon=False, fontsize=8)
    for i, sampler in enumerate(SAMPLERS):
        bias = np.abs(results[sampler][:, :, 0])
        axes[1].errorbar(
            config.counts, bias.mean(0), [stderr(b) for b in bias.T], color=COLORS[i],
            fmt="o-", ms=3, capsize=2, label=sampler,
        )  # fmt: skip
    axes[1].set(
        xlabel="documents K", ylabel="bias of the estimate of L_0 (nats)",
        xscale="log", yscale="log",
    )  # fmt: skip
    axes[1].legend(frameon=False, fontsize=8)
    return run.figure(
        "vod", figure, title="Bounds over a corpus",
        caption=f"Left: exact bounds of {order.size} questions. Right: how far the "
        f"mean of {config.draws} estimates is from the exact value, means over "
        f"questions and standard errors over {config.seeds} corpora, priority sampling "
        "by two kinds of noise and draws with replacement.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    results = measured(config)
    exact = results["exact"]
    claims = []
    for i in range(len(config.alphas) - 1):
        gap = exact[:, i] - exact[:, i + 1]
        worst = float(gap.min())
        claims.append(
            Claim(
                f"exact L_{config.alphas[i]:g} less L_{config.alphas[i + 1]:g}, the "
                "least of all questions, nats",
                worst, ">= 0", worst >= 0,
            )
        )  # fmt: skip
    error = float(np.max(np.abs(exact[:, 0] - results["marginal"])))
    claims.append(
        Claim(
            "exact L_0 against the log-marginal likelihood, nats apart at most",
            error, "<= 1e-5", error <= 1e-5,
        )
    )  # fmt: skip
    bias = np.abs(results["exponential"][:, :, 0])  # [seeds, counts]
    ratios = bias.mean(axis=0)
    ratio = float(np.max(ratios[1:] / ratios[:-1]))
    claims.append(
        Claim(
            "bias of the K-sample estimate of L_0 over that of the next smaller K, "
            "largest", ratio, "< 1", ratio < 1,
        )
    )  # fmt: skip
    last = bias[:, -1]
    claims.append(
        Claim(
            f"bias of the estimate of L_0 at K = {config.documents}, nats",
            float(last.mean()), "< 1e-4", bool(last.mean() < 1e-4), stderr(last),
        )
    )  # fmt: skip
    metrics, rows = {}, []
    for i, alpha in enumerate(config.alphas):
        metrics[f"exact/{alpha:g}"] = float(exact[:, i].mean())
        for j, count in enumerate(config.counts):
            for sampler in SAMPLERS:
                value = float(results[sampler][:, j, i].mean())
                metrics[f"bias/{sampler}/{alpha:g}/{count}"] = value
    for j, count in enumerate(config.counts):
        values = [results[s][:, j, 0].mean() for s in SAMPLERS]
        rows.append((str(count), *(f"{v:.5f}" for v in values)))
    run.table(
        "Bias of the estimate of the log-marginal likelihood, nats",
        ("K", *SAMPLERS), rows,
    )  # fmt: skip
    return Report(claims, metrics, [picture(config, run, results)])


if __name__ == "__main__":
    experiment(main, PRESETS)
