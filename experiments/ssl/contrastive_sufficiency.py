"""Contrastive sufficiency: what InfoNCE loses by an encoder is lost information.

Claims: in a model small enough to be counted out, scores that see both views through an
encoder alone, trained by InfoNCE with many negatives, have an excess loss of
I(x; z) - I(f(x); f(z)), for 100 encoders; the three forms of sufficiency agree; the
excess risk of the best downstream head never exceeds the bound; and on linear-Gaussian
views the chi-squared loss finds the canonical correlations.

    python -m experiments.ssl.contrastive_sufficiency full    # 2 minutes on 2 cores
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.nn.contrastive import chi_squared_loss, info_nce
from jaxzoo.ssl.contrastive_sufficiency import (
    downstream_bound,
    f_information,
    sufficiency,
)
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.step import init_state, update_step

STATES, CAUSES = 12, 4  # values of a view, and of what both views come from
CORRELATIONS = (0.9, 0.7, 0.5, 0.3, 0.1)  # canonical, of the Gaussian views
KEPT = 2  # dimensions of the Gaussian encoders


@dataclasses.dataclass(frozen=True)
class Config:
    encoders: int = 100
    seeds: int = 3  # models
    steps: int = 300
    batch_size: int = 256
    learning_rate: float = 0.1
    eval_batches: int = 12
    eval_size: int = 1024  # negatives
    gaussian_steps: int = 1000

    def __post_init__(self):
        if self.seeds < 2 or self.encoders < 1:
            raise ValueError("seeds >= 2 and encoders >= 1, please")


PRESETS = {
    "smoke": Config(
        encoders=5, seeds=2, steps=20, batch_size=64, eval_batches=2, eval_size=128,
        gaussian_steps=20,
    ),
    "full": Config(),
}  # fmt: skip


def models(config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Joint tables `[seeds, x, z]`, and E[y | x] of a label of the cause."""
    joints, heads = [], []
    for seed in range(config.seeds):
        rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
        causes = rng.dirichlet(np.ones(CAUSES))
        views = rng.dirichlet(np.full(STATES, 0.1), CAUSES)
        labels = rng.uniform(-1, 1, CAUSES)
        # Two views of one cause, drawn alike; a little of everything keeps p > 0.
        joint = 0.98 * (views.T * causes) @ views + 0.02 / STATES**2
        share = 0.98 * causes[:, None] * views
        head = (labels @ share) / (share.sum(0) + 0.02 / STATES)
        joints.append(joint / joint.sum())
        heads.append(head)
    return np.stack(joints), np.stack(heads)


def partitions(config: Config) -> np.ndarray:
    """Codes `[encoders + 1, x]` of 2 to 8 values; the last encoder keeps x as it is."""
    rng = np.random.Generator(np.random.Philox(key=[0, 2]))
    codes = [rng.integers(0, 2 + i % 7, STATES) for i in range(config.encoders)]
    return np.stack([*codes, np.arange(STATES)]).astype(np.int32)


def draw(joints: np.ndarray, size: int, t: int) -> np.ndarray:
    """Pairs (x, z) of each model `[seeds, size, 2]`."""
    rows = []
    for seed, joint in enumerate(joints):
        rng = np.random.Generator(np.random.Philox(key=[seed, t + 10]))
        flat = rng.choice(STATES**2, size, p=joint.reshape(-1))
        rows.append(np.stack(np.unravel_index(flat, joint.shape), -1))
    return np.stack(rows).astype(np.int32)


def info_nce_of(codes: jax.Array, table: jax.Array, pairs: jax.Array) -> jax.Array:
    """InfoNCE of the scores table[f(x), f(z)] on a batch of pairs."""
    first = table[codes[pairs[:, 0]]]
    second = jax.nn.one_hot(codes[pairs[:, 1]], STATES)
    return info_nce(first, second)[0]


def fit_scores(config: Config, run: Run, joints, codes) -> jax.Array:
    """The best table of scores of each encoder, `[seeds, encoders, 12, 12]`."""

    def loss(params, _, pairs):
        values = jax.vmap(info_nce_of, (0, 0, None))(codes, params, pairs)
        return jnp.sum(values), {"loss": jnp.mean(values)}

    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimizer = optax.adam(schedule)
    step = update_step(loss, optimizer, reproducible=run.options.reproducible)

    def start():
        def one(seed):
            params = jnp.zeros((len(codes), STATES, STATES))
            return init_state(jax.random.key(seed), params, optimizer)

        return jax.vmap(one)(jnp.arange(config.seeds))

    batches = functools.partial(draw, joints, config.batch_size)
    state = train(
        run, "scores", jax.vmap(step), start, batches, num_steps=config.steps,
        show="loss", batch_axis=1, ids=batches,
    )  # fmt: skip
    return local(state["params"])


def excess(config: Config, joints, codes, tables) -> np.ndarray:
    """InfoNCE of each encoder less that of the scores that see all."""

    @jax.jit
    def on_batch(pairs):
        def of_seed(args):
            tables, pairs = args
            of_one = functools.partial(info_nce_of, pairs=pairs)
            values = lax.map(lambda args: of_one(*args), (codes, tables))
            return values[:-1] - values[-1]  # the same batch: its noise cancels

        return lax.map(of_seed, (tables, pairs))

    steps = range(1_000_000, 1_000_000 + config.eval_batches)
    return np.mean([on_batch(draw(joints, config.eval_size, t)) for t in steps], axis=0)


def theory(joints, heads, codes) -> dict[str, np.ndarray]:
    """Sufficiencies, downstream excess risks and their bounds, counted out."""

    def of_pair(joint, head, codes):
        knobs: dict[str, Any] = {"num_codes": STATES}
        of_x = joint.sum(1)
        out = {}
        for divergence in ("kl", "chi_squared"):
            for form in ("information", "bregman", "variational"):
                out[f"{divergence}/{form}"] = sufficiency(
                    joint, codes, codes, divergence=divergence, form=form, **knobs
                )
        one_hot = jax.nn.one_hot(codes, STATES)
        mass = of_x @ one_hot
        best = (of_x * head) @ one_hot / jnp.where(mass > 0, mass, 1.0)
        out["risk"] = jnp.sum(of_x * jnp.square(best[codes] - head))
        predictor = head @ joint / joint.sum(0)  # of y, from the second view
        error = jnp.sum(joint * jnp.square(predictor[None] - head[:, None]))
        for divergence in ("kl", "chi_squared"):
            suff = out[f"{divergence}/bregman"]
            out[f"bound/{divergence}"] = downstream_bound(suff, jnp.sqrt(error))
        return out

    over_codes = jax.vmap(of_pair, (None, None, 0))
    over_seeds = jax.jit(jax.vmap(over_codes, (0, 0, None)))
    args = (jnp.float32(joints), jnp.float32(heads), codes[:-1])
    return jax.device_get(over_seeds(*args))


def fit_gaussian(config: Config, run: Run) -> jax.Array:
    """Linear encoders of both views, by the chi-squared loss."""
    rho = np.array(CORRELATIONS, np.float32)

    def loss(params, _, views):
        first, second = (views[:, i] @ params[i] for i in (0, 1))
        value, _ = chi_squared_loss(first, second)
        return value, {"loss": value}

    def batches(t):
        rows = []
        for seed in range(config.seeds):
            rng = np.random.Generator(np.random.Philox(key=[seed, t + 10]))
            noise = rng.normal(size=(2, 512, len(rho))).astype(np.float32)
            other = rho * noise[0] + np.sqrt(1 - rho**2) * noise[1]
            rows.append(np.stack([noise[0], other], 1))
        return np.stack(rows)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, config.gaussian_steps))
    step = update_step(loss, optimizer, reproducible=run.options.reproducible)

    def start():
        def one(seed):
            key, weights = jax.random.split(jax.random.key(seed))
            params = 0.3 * jax.random.normal(weights, (2, len(rho), KEPT))
            return init_state(key, params, optimizer)

        return jax.vmap(one)(jnp.arange(config.seeds))

    state = train(
        run, "gaussian", jax.vmap(step), start, batches,
        num_steps=config.gaussian_steps, show="loss", batch_axis=1,
    )  # fmt: skip
    return local(state["params"])


def gaussian_losses(params: jax.Array) -> np.ndarray:
    """The chi-squared loss of linear encoders in closed form: covariances are known."""
    rho = jnp.array(CORRELATIONS)

    def of_seed(params):
        score = params[0] @ params[1].T  # both views have unit covariance
        return 0.5 * jnp.sum(jnp.square(score)) - jnp.sum(jnp.diag(score) * rho)

    return np.asarray(jax.vmap(of_seed)(params))


def pictures(config: Config, run: Run, measured, counted) -> list[Figure]:
    figure, (left, right) = panels(2)
    suff = counted["kl/bregman"]
    for seed, color in zip(range(config.seeds), COLORS, strict=False):
        left.plot(
            suff[seed], measured[seed], ".", color=color, ms=4, label=f"model {seed}"
        )
        right.plot(
            suff[seed], counted["bound/kl"][seed], "-", lw=0, marker="_", color=color
        )
        right.plot(suff[seed], counted["risk"][seed], ".", color=color, ms=4)
    limit = [0, float(suff.max()) * 1.05]
    left.plot(limit, limit, color="black", lw=0.8, label="equal")
    left.set(
        xlabel="I(x; z) - I(f(x); f(z)) (nats)", ylabel="excess InfoNCE, trained (nats)"
    )
    left.legend(frameon=False)
    right.set(
        xlabel="sufficiency (nats)",
        ylabel="downstream excess risk (squared units of y)",
    )
    right.plot([], [], ".", color="black", label="best head")
    right.plot([], [], "_", color="black", label="bound")
    right.legend(frameon=False)
    return [
        run.figure(
            "sufficiency", figure, title="Lost information, lost loss, lost risk",
            caption=f"{config.encoders} random encoders of {config.seeds} enumerable "
            "models. Left: trained with finitely many negatives, against the exact "
            "value. Right: excess risk of the best head on the codes, and its bound.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    joints, heads = models(config)
    codes = partitions(config)
    counted = theory(joints, heads, codes)
    tables = fit_scores(config, run, joints, codes)
    measured = excess(config, joints, codes, tables)
    gaps = np.abs(measured - counted["kl/bregman"]).max(1)
    forms = max(
        float(np.abs(counted[f"{d}/bregman"] - counted[f"{d}/{f}"]).max())
        for d in ("kl", "chi_squared")
        for f in ("information", "variational")
    )
    slack = min(
        float((counted[f"bound/{d}"] - counted["risk"]).min())
        for d in ("kl", "chi_squared")
    )
    best = -0.5 * sum(rho**2 for rho in CORRELATIONS[:KEPT])
    gaussian = gaussian_losses(fit_gaussian(config, run)) - best
    claims = [
        Claim(
            "excess InfoNCE of trained scores less I(x; z) - I(f(x); f(z)), largest of "
            f"{config.encoders} encoders and {config.seeds} models, nats",
            float(gaps.max()), "<= 0.02", bool(gaps.max() <= 0.02),
            float(gaps.std(ddof=1) / len(gaps) ** 0.5),
        ),
        Claim(
            "the three forms of sufficiency, both divergences: largest difference",
            forms, "<= 1e-4", forms <= 1e-4,
        ),
        Claim(
            "bound on the downstream excess risk less the risk of the best head, "
            "smallest",
            slack, ">= 0", slack >= 0,
        ),
        Claim(
            "linear-Gaussian views: chi-squared loss of trained encoders above the "
            f"best of {KEPT} dimensions, largest",
            float(gaussian.max()), "<= 0.02", bool(gaussian.max() <= 0.02),
        ),
    ]  # fmt: skip
    information = [float(f_information(jnp.float32(joint))) for joint in joints]
    metrics = {
        "information": np.mean(information),
        "sufficiency/mean": counted["kl/bregman"].mean(),
        "sufficiency/largest": counted["kl/bregman"].max(),
        "risk/mean": counted["risk"].mean(),
        "bound_over_risk/median": np.median(
            counted["bound/kl"] / np.maximum(counted["risk"], 1e-9)
        ),
        "gaussian/excess": gaussian.mean(),
    }
    return Report(claims, metrics, pictures(config, run, measured, counted))


if __name__ == "__main__":
    experiment(main, PRESETS)
