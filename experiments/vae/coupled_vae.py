"""Coupled VAEs: codes that are draws of the prior, and samples without holes, in 2-D.

Claims, on rings and on a mixture: the latent marginal of the coupling passes a
permutation MMD test against the prior at 5%, where a VAE's aggregate posterior fails;
samples of the coupled VAE have a lower sliced W2 to held-out data than the VAE's.

    python -m experiments.vae.coupled_vae full    # 3 seeds, 24 models: 2 minutes

Expected: p-values of 0.1 to 0.7 for the semi-dual coupling, below 0.02 for the VAE; a
sliced W2 of 0.12 on the mixture, 0.22 for the VAE, whose prior has holes. On rings both
have 0.08, so that this claim fails. Also shown: the primal, an encoder with a penalty,
which fails the test on the mixture, and the dual, which fails it in all runs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.core.divergences import (
    gaussian_kernel,
    inverse_multiquadratic_kernel,
    mmd,
    random_directions,
    sliced_wasserstein,
    squared_distances,
)
from jaxzoo.core.stats import normal_kl, normal_log_prob
from jaxzoo.nn.mlp import MLP, GaussianMLP
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import descend
from jaxzoo.vae.coupled_vae import (
    dual_loss,
    gaussian_cost,
    log_coupling,
    primal_loss,
    semi_dual_loss,
)

KINDS = ("VAE", "primal", "dual", "semi-dual")
SHAPES = ("rings", "mixture")
LATENTS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    first_seed: int = 0
    points: int = 4000  # of the data, and as many held out
    hidden: int = 64
    steps: int = 3000
    batch_size: int = 128
    draws: int = 256  # of the prior, per step
    learning_rate: float = 2e-3
    potential_scale: float = 10.0  # nats per unit of a network's output
    epsilon: float = 1.0
    weight: float = 2.0  # of the primal's MMD
    pool: int = 10_000  # draws of the prior among which codes are chosen at the end
    tested: int = 1000  # codes
    permutations: int = 200
    repetitions: int = 3  # of the test; their median counts

    def __post_init__(self):
        if self.seeds < 2 or self.tested > self.points:
            raise ValueError("seeds >= 2, tested <= points, please")


PRESETS = {
    "smoke": Config(
        seeds=2, points=20, hidden=4, steps=3, batch_size=8, draws=8, pool=20,
        tested=10, permutations=20, repetitions=1,
    ),
    "full": Config(),
}  # fmt: skip


def data(shape: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Rings of radius 1 and 2, or eight Gaussians on a circle; sd 0.1 around them."""
    keys = jax.random.split(key, 3)
    turn = jax.random.uniform(keys[0], (count,), maxval=2.0 * np.pi)
    outer = jax.random.bernoulli(keys[1], 2.0 / 3.0, (count,))
    radius = jnp.where(shape == 0, jnp.where(outer, 2.0, 1.0), 2.0)
    eighth = np.pi / 4.0 * jnp.floor(turn * 4.0 / np.pi)
    angle = jnp.where(shape == 0, turn, eighth)
    points = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return points + 0.1 * jax.random.normal(keys[2], points.shape)


def same_distribution(config: Config, key: jax.Array, x: Any, y: Any) -> Any:
    """The p-value of a permutation test by the MMD; >= 0.05 passes at 5%."""
    pooled = jnp.concatenate([x, y])
    kernel = gaussian_kernel(squared_distances(pooled, pooled), width=0.5)
    sign = jnp.repeat(jnp.array([1.0, -1.0]), len(x))

    keys = jax.random.split(key, config.permutations)
    others = jax.vmap(lambda k: jax.random.permutation(k, sign))(keys)
    signs = jnp.concatenate([sign[None], others])
    statistics = jnp.sum(signs * (signs @ kernel), axis=1)
    return jnp.mean(statistics >= statistics[0] - 1e-3)


def one_model(config: Config, kind: Any, shape: Any, key: Any) -> Any:
    """Trains one of `KINDS` on one of `SHAPES`: figures, samples and codes."""
    widths = (config.hidden, config.hidden)
    encoder = GaussianMLP(LATENTS, widths)
    decoder = GaussianMLP(2, widths)
    potential = MLP((*widths, 1))
    keys = jax.random.split(key, 12)
    x, test = (data(shape, k, config.points) for k in keys[:2])
    imq = functools.partial(inverse_multiquadratic_kernel, scale=2.0 * LATENTS)

    def prior(key: jax.Array, count: int) -> jax.Array:
        return jax.random.normal(key, (count, LATENTS))

    def encode(params: Any, key: jax.Array, x: jax.Array) -> Any:
        codes: Any = encoder.apply(params["encoder"], x)
        z = codes[0] + jnp.exp(codes[1]) * prior(key, len(x))
        return z, normal_kl(codes[0], codes[1])

    def decode(params: Any, z: jax.Array) -> Any:
        parts: Any = decoder.apply(params["decoder"], z)
        return parts[0], jnp.clip(parts[1], -2.5, 1.0)

    def value(params: Any, which: str, x: jax.Array) -> jax.Array:
        out: Any = potential.apply(params[which], x)
        return config.potential_scale * out[:, 0]

    def costs(params: Any, x: jax.Array, z: jax.Array) -> jax.Array:
        mean, log_std = decode(params, z)
        return gaussian_cost(x, mean, log_std)

    def primal(params: Any, key: jax.Array, x: jax.Array, z: jax.Array) -> Any:
        codes, kl = encode(params, key, x)
        cost = -normal_log_prob(x, *decode(params, codes))
        weight = jnp.where(kind == 0, 0.0, config.weight)
        epsilon = jnp.where(kind == 0, 1.0, config.epsilon)
        distance = mmd(codes, z, imq)
        return primal_loss(cost, kl, distance, epsilon=epsilon, weight=weight)[0]

    def decoder_loss(params: Any, psi: jax.Array, cost: jax.Array) -> jax.Array:
        """The cost under the coupling, which is a constant here."""
        plan = jnp.exp(log_coupling(psi, cost, epsilon=config.epsilon))
        return jnp.mean(jnp.sum(lax.stop_gradient(plan) * cost, axis=1))

    def dual(params: Any, _: jax.Array, x: jax.Array, z: jax.Array) -> Any:
        phi, psi = value(params, "phi", x), value(params, "psi", z)
        cost = costs(params, x, z)
        fixed = lax.stop_gradient(cost)
        loss = dual_loss(phi, psi, fixed, epsilon=config.epsilon)[0]
        return loss + decoder_loss(params, psi, cost)

    def semi_dual(params: Any, _: jax.Array, x: jax.Array, z: jax.Array) -> Any:
        psi, cost = value(params, "psi", z), costs(params, x, z)
        fixed = lax.stop_gradient(cost)
        loss = semi_dual_loss(psi, fixed, epsilon=config.epsilon)[0]
        return loss + decoder_loss(params, psi, cost)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        rows_key, prior_key, key = jax.random.split(key, 3)
        rows = jax.random.randint(rows_key, (config.batch_size,), 0, len(x))
        branch = jnp.array([0, 0, 1, 2])[kind]
        z = prior(prior_key, config.draws)
        return lax.switch(branch, (primal, dual, semi_dual), params, key, x[rows], z)

    start = {
        "encoder": encoder.init(keys[2], x[:1]),
        "decoder": decoder.init(keys[3], jnp.zeros((1, LATENTS))),
        "phi": potential.init(keys[4], x[:1]),
        "psi": potential.init(keys[5], jnp.zeros((1, LATENTS))),
    }
    params = descend(loss, start, config.learning_rate, keys[6], config.steps)

    def test_codes(key: jax.Array) -> Any:
        keys = jax.random.split(key, 6)
        few = jax.random.choice(keys[0], x, (config.tested,), replace=False)
        pool, own = prior(keys[1], config.pool), prior(keys[2], config.tested)
        log_plan = log_coupling(
            value(params, "psi", pool), costs(params, few, pool),
            epsilon=config.epsilon,
        )  # fmt: skip
        index = jax.random.categorical(keys[3], log_plan)
        codes = jnp.where(kind < 2, encode(params, keys[4], few)[0], pool[index])
        moved = jnp.square(decode(params, codes)[0] - few)
        return codes, {
            "p": same_distribution(config, keys[5], codes, own),
            "mmd": mmd(codes, own, functools.partial(gaussian_kernel, width=0.5)),
            "error": jnp.mean(jnp.sum(moved, axis=1)),
        }

    codes, tests = lax.map(test_codes, jax.random.split(keys[7], config.repetitions))
    mean, log_std = decode(params, prior(keys[8], len(test)))
    samples = mean + jnp.exp(log_std) * prior(keys[9], len(test))
    directions = random_directions(keys[10], dim=2, num_directions=50)
    found = {name: jnp.median(values) for name, values in tests.items()}
    found |= {
        "sw2": jnp.sqrt(sliced_wasserstein(samples, test, directions)),
        "floor": jnp.sqrt(sliced_wasserstein(x, test, directions)),
    }
    codes = codes[0]
    return found, samples, codes


def measured(config: Config) -> Any:
    """Figures, samples and codes, `[shapes, kinds, seeds, ...]` each."""
    order = np.stack(
        np.meshgrid(*map(np.arange, (2, 4, config.seeds)), indexing="ij"), axis=-1
    ).reshape(-1, 3)

    @jax.jit
    def every(order: jax.Array, first: jax.Array) -> Any:
        def one(row: jax.Array) -> Any:
            key = jax.random.key(first + row[2])
            return one_model(config, row[1], row[0], key)

        return lax.map(one, order)

    found = jax.device_get(every(order, np.int32(config.first_seed)))
    shape = 2, 4, config.seeds
    return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), found)


def pictures(config: Config, run: Run, found: Any, samples: Any, codes: Any) -> Any:
    figure, axes = panels(4, width=3.5)
    for i, shape in enumerate(SHAPES):
        for j, name in enumerate(("p", "sw2")):
            ax = axes[2 * i + j]
            for k, kind in enumerate(KINDS):
                values = found[name][i, k]
                ax.bar(
                    k, values.mean(), yerr=stderr(values), color=COLORS[k], capsize=4
                )
                ax.plot([k] * len(values), values, "k.", ms=4)
                ax.text(k, -0.02, kind, ha="center", va="top", fontsize=8,
                        transform=ax.get_xaxis_transform())  # fmt: skip
            level = 0.05 if name == "p" else found["floor"][i].mean()
            ax.axhline(level, color="0.4", lw=1, ls="--")
            label = (
                "p of codes against the prior"
                if name == "p"
                else "sliced W2 (unit of data)"
            )
            ax.set(xticks=[], ylabel=label, title=shape)
    bars = run.figure(
        "figures", figure, title="Codes against the prior, samples against data",
        caption=f"Means and standard errors over {config.seeds} seeds, dots the seeds. "
        "Dashed: 5% of the test; the sliced W2 (in units of the data) of training to "
        "held-out points.",
    )  # fmt: skip
    figure, axes = panels(4, width=3.2, height=3.2)
    for i, shape in enumerate(SHAPES):
        for j, (points, what) in enumerate(((codes, "codes"), (samples, "samples"))):
            ax = axes[2 * i + j]
            for k, marker in ((0, "x"), (3, "o")):
                x = points[i, k, 0][:500]
                ax.scatter(
                    *x.T, s=6, marker=marker, color=COLORS[k], alpha=0.5, lw=0.6,
                    label=KINDS[k],
                )  # fmt: skip
            ax.set(
                xlabel=f"{what}, first coordinate", ylabel="second coordinate",
                title=shape, aspect="equal", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5),
            )  # fmt: skip
    axes[0].legend(frameon=True, fontsize=8, markerscale=2)
    clouds = run.figure(
        "clouds", figure, title="Codes of all data, and samples", caption="First seed.",
    )  # fmt: skip
    return [bars, clouds]


def main(config: Config, run: Run) -> Report:
    found, samples, codes = measured(config)
    claims, metrics, rows = [], {}, []
    for i, shape in enumerate(SHAPES):
        p = np.median(found["p"][i], axis=1)
        ratio = found["sw2"][i, 3] / found["sw2"][i, 0]
        claims += [
            Claim(
                f"{shape}: p-value of the semi-dual coupling's codes against the "
                f"prior, median of {config.seeds} seeds",
                float(p[3]), ">= 0.05", bool(p[3] >= 0.05), stderr(found["p"][i, 3]),
            ),
            Claim(
                f"{shape}: p-value of a VAE's codes, median of {config.seeds} seeds",
                float(p[0]), "< 0.05", bool(p[0] < 0.05), stderr(found["p"][i, 0]),
            ),
            Claim(
                f"{shape}: sliced W2 of semi-dual samples to held-out data over that "
                f"of a VAE's, mean of {config.seeds} seeds",
                float(ratio.mean()), "< 1", bool(ratio.mean() < 1), stderr(ratio),
            ),
        ]  # fmt: skip
        for k, kind in enumerate(KINDS):
            values = {n: found[n][i, k] for n in ("p", "mmd", "sw2", "error")}
            metrics |= {
                f"{shape}/{kind}/{n}": float(v.mean()) for n, v in values.items()
            }
            cells = (f"{v.mean():.3g} ± {stderr(v):.1g}" for v in values.values())
            rows.append((f"{shape}, {kind}", *cells))
            metrics[f"{shape}/{kind}/p/least"] = float(values["p"].min())
            metrics[f"{shape}/{kind}/p/largest"] = float(values["p"].max())
        metrics[f"{shape}/floor"] = float(found["floor"][i].mean())
    columns = ("model", "p", "MMD of codes", "sliced W2", "squared error")
    run.table(f"{config.seeds} seeds", columns, rows)
    return Report(claims, metrics, pictures(config, run, found, samples, codes))


if __name__ == "__main__":
    experiment(main, PRESETS)
