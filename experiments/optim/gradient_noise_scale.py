"""The gradient noise scale: it foretells which batch size stops saving steps.

Claims: the estimates of |G|^2, tr(Sigma), G^T H G and tr(H Sigma) from one step are
unbiased; on digits the steps and examples that SGD needs to one loss, at the best
learning rate of every batch size, lie on the hyperbola (S/S_min - 1)(E/E_min - 1) = 1;
and its B_crit is within a factor of 3 of B_simple, averaged over a run.

    python -m experiments.optim.gradient_noise_scale full     # 3 seeds: 1.5 minutes

Expected: R2 = 0.99, B_crit = 29 and B_simple = 23. The figure also shows B_simple of
500 training images, 43 on average, and B_noise, 17, with tr(H Sigma) over 50 of them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.optim._gradient_noise_scale_pictures import pictures
from experiments.optim._tasks import Task, digits_mlp
from jaxzoo.optim.gradient_noise_scale import (
    noise_scale,
    pareto_fit,
    shard_noise_scale,
)
from jaxzoo.training.command import experiment
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.training.seeds import stderr


@dataclasses.dataclass(frozen=True)
class Config:
    batch_sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512)
    learning_rates: tuple[float, ...] = (
        0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0,
    )  # fmt: skip
    target: float = 0.1  # training loss in nats
    most_steps: int = 200  # of a run with a very large batch
    most_examples: int = 6_000  # of a run with a very small batch
    probe_batch: int = 64  # of the run along which the noise scale is measured
    parts: int = 8  # of each of its batches
    seeds: int = 3
    hidden: int = 64
    examples: int = 500  # training images that loss and exact noise scale are seen on
    draws: int = 20_000  # of the quadratic

    def __post_init__(self):
        if self.seeds < 2 or self.probe_batch % self.parts:
            raise ValueError("seeds >= 2, and parts that divide probe_batch, please")
        if self.probe_batch not in self.batch_sizes or len(self.batch_sizes) < 3:
            raise ValueError("three or more batch_sizes with probe_batch, please")


PRESETS = {
    "smoke": Config(
        batch_sizes=(16, 64, 256), learning_rates=(0.1, 0.3), seeds=2, hidden=16,
        target=1.0, most_steps=100, most_examples=2000, examples=100, draws=2000,
    ),
    "full": Config(),
}  # fmt: skip


def quadratic_claims(config: Config) -> list[Claim]:
    """Gradients of 0.5 w^T H w with noise of a known covariance, many single steps."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(2, 10, 10))
    hessian, sigma = (r @ r.T / 10 for r in root)
    mean = rng.normal(size=10)
    mix = jnp.asarray(np.linalg.cholesky(sigma), jnp.float32)
    matrix, centre = (jnp.asarray(a, jnp.float32) for a in (hessian, mean))
    small, parts = 2, 8

    def draw(key: jax.Array) -> list[jax.Array]:
        g = centre[None] + jax.random.normal(key, (parts, 10)) @ mix.T / small**0.5
        values = []
        for curvature in (None, lambda v: matrix @ v):
            knobs: dict[str, Any] = {"batch_small": small, "curvature": curvature}
            _, pair = noise_scale(g[0], g.mean(0), batch_big=small * parts, **knobs)
            _, whole = shard_noise_scale(g, batch_size=small, curvature=curvature)
            values += [pair["signal"], pair["noise"]]
            values += [whole["signal"], whole["noise"]]
        return values

    keys = jax.random.split(jax.random.key(0), config.draws)
    drawn = np.asarray(jax.jit(jax.vmap(draw))(keys), np.float64)
    terms = [mean @ mean, np.trace(sigma)] * 2
    terms += [mean @ hessian @ mean, np.trace(hessian @ sigma)] * 2
    errors = drawn.std(axis=1, ddof=1) / config.draws**0.5
    worst = float(np.max(np.abs(drawn.mean(axis=1) - terms) / errors))
    return [
        Claim(
            "quadratic: |G|^2, tr(Sigma), G^T H G and tr(H Sigma), each from two "
            f"batches and from {parts} devices: largest distance of the mean of "
            f"{config.draws} steps from the exact value, in standard errors",
            worst, "< 3", worst < 3,
        )
    ]  # fmt: skip


def images(task: Task) -> dict[str, jax.Array]:
    return {k: jnp.asarray(v) for k, v in task.source.arrays.items()}


def rows(data: dict[str, jax.Array], key: jax.Array, count: int) -> Any:
    chosen = jax.random.randint(key, (count,), 0, len(data["label"]))
    return {k: v[chosen] for k, v in data.items()}


def gradient(task: Task, params: Any, example: Any) -> Any:
    return jax.grad(lambda p: task.loss(p, jax.random.key(0), example)[0])(params)


def horizon(config: Config, size: int) -> tuple[int, int]:
    """How many looks at the loss, and how many steps between two of them."""
    steps = config.most_steps + config.most_examples // size
    every = max(1, steps // 200)
    return steps // every, every


@functools.partial(jax.jit, static_argnames=("config", "task", "size"))
def losses_of(config: Config, task: Task, size: int) -> jax.Array:
    """Training loss of SGD, `[rates, seeds, looks]`."""
    data = images(task)
    seen = {k: v[: config.examples] for k, v in data.items()}
    looks, every = horizon(config, size)

    def one(rate: jax.Array, seed: jax.Array) -> jax.Array:
        key = jax.random.key(seed)

        def step(i: Any, carry: Any) -> Any:
            params, t = carry
            example = rows(data, jax.random.fold_in(key, t), size)
            slope = gradient(task, params, example)
            return jax.tree.map(lambda p, g: p - rate * g, params, slope), t + 1

        def look(carry: Any, _: None) -> Any:
            carry = lax.fori_loop(0, every, step, carry)
            return carry, task.loss(carry[0], key, seen)[0]

        start = task.init(jax.random.fold_in(key, 10**6)), jnp.zeros((), jnp.int32)
        return lax.scan(look, start, None, looks)[1]

    rates = jnp.asarray(config.learning_rates, jnp.float32)
    over_seeds = jax.vmap(one, (None, 0))
    return jax.vmap(over_seeds, (0, None))(rates, jnp.arange(config.seeds))


def steps_to(config: Config, size: int, losses: np.ndarray) -> np.ndarray:
    """Steps until the loss is first at the target, infinite where it never is."""
    reached = losses <= config.target
    first = np.where(reached.any(-1), reached.argmax(-1) + 1.0, np.inf)
    return first * horizon(config, size)[1]


@functools.partial(jax.jit, static_argnames=("config", "task", "steps"))
def probe(config: Config, task: Task, rate: jax.Array, steps: int) -> Any:
    """The noise scale along one run of each seed: estimated, and exact now and then."""
    data = images(task)
    seen = {k: v[: config.examples] for k, v in data.items()}
    size = config.probe_batch // config.parts
    ema = optax.ema(0.95)

    def exact(params: Any) -> tuple[jax.Array, jax.Array]:
        def of_one(i: jax.Array) -> Any:
            return gradient(task, params, {k: v[i][None] for k, v in seen.items()})

        def curvature(v: Any) -> Any:
            return jax.jvp(lambda p: gradient(task, p, seen), (params,), (v,))[1]

        each = lax.map(of_one, jnp.arange(config.examples), batch_size=50)
        simple, _ = shard_noise_scale(each, exact=True)
        # A few examples suffice for tr(H Sigma): each costs a product with H.
        some = jax.tree.map(lambda g: g[::10], each)
        _, aux = shard_noise_scale(some, curvature=curvature)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), each)
        bend = optax.tree.vdot(mean, curvature(mean))
        return simple, aux["noise"] / bend

    def one(seed: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), 10**6)

        def step(carry: Any, t: jax.Array) -> Any:
            params, state = carry
            example = rows(data, jax.random.fold_in(key, t), config.probe_batch)
            cut = {
                k: v.reshape(config.parts, size, *v.shape[1:])
                for k, v in example.items()
            }
            parts = jax.vmap(lambda e: gradient(task, params, e))(cut)
            _, aux = shard_noise_scale(parts, batch_size=size)
            means: Any
            means, state = ema.update(aux, state)
            params = jax.tree.map(lambda p, g: p - rate * g.mean(0), params, parts)
            return (params, state), means["noise"] / means["signal"]

        def chunk(carry: Any, ts: jax.Array) -> Any:
            carry, estimates = lax.scan(step, carry, ts)
            return carry, (estimates, *exact(carry[0]))

        zeros: Any = {"signal": jnp.zeros(()), "noise": jnp.zeros(())}
        start = task.init(key), ema.init(zeros)
        times = jnp.arange(steps).reshape(10, -1)
        return lax.scan(chunk, start, times)[1]

    estimates, simple, noise = lax.map(one, jnp.arange(config.seeds))
    return estimates.reshape(config.seeds, -1), simple, noise


def main(config: Config, run: Run) -> Report:
    claims = quadratic_claims(config)
    task = digits_mlp(hidden=(config.hidden,))
    steps, best_rates, table = [], [], []
    for size in config.batch_sizes:
        each = steps_to(config, size, np.asarray(losses_of(config, task, size)))
        mean = each.mean(axis=1)
        index = int(np.argmin(mean))
        if not np.isfinite(mean[index]):
            raise RuntimeError(f"no learning rate reached the loss at batch {size}")
        steps.append(each[index])
        best_rates.append(config.learning_rates[index])
        table.append(
            (f"{size}", f"{best_rates[-1]:g}", f"{mean[index]:.0f} ± "
             f"{stderr(each[index]):.0f}", f"{size * mean[index]:.0f}")
        )  # fmt: skip
        run.say(f"batch {size}: {mean[index]:.0f} steps at {best_rates[-1]:g}")
    steps = np.stack(steps)
    run.table(
        f"Digits, training loss {config.target:g} nats, {config.seeds} seeds",
        ("batch size", "learning rate", "steps", "examples"),
        table,
    )
    sizes = np.asarray(config.batch_sizes, np.float64)
    total = jnp.asarray(steps.mean(1), jnp.float32)
    b_crit, aux = pareto_fit(total, jnp.asarray(sizes, jnp.float32) * total)
    place = config.batch_sizes.index(config.probe_batch)
    count = max(10, int(steps[place].mean()) // 10 * 10)
    rate = jnp.float32(best_rates[place])
    probed = [np.asarray(x) for x in probe(config, task, rate, count)]
    estimates, simple, noise = probed
    # As in the paper the noise scale grows along the run: the mean over its steps. The
    # first averages are of few steps, and may have seen no signal at all.
    usable = np.where((estimates > 0) & np.isfinite(estimates), estimates, np.nan)
    by_seed = np.nanmean(usable[:, min(20, count // 2) :], axis=1)
    averaged = float(by_seed.mean())
    factor = float(max(averaged / b_crit, b_crit / averaged))
    r2 = float(aux["r2"])
    claims += [
        Claim(
            "digits: R2 of log steps on the hyperbola, over batch sizes "
            f"{config.batch_sizes[0]} to {config.batch_sizes[-1]}",
            r2, ">= 0.9", r2 >= 0.9,
        ),
        Claim(
            "digits: factor between B_crit of the hyperbola and run-averaged B_simple "
            f"at batch {config.probe_batch}",
            factor, "<= 3", factor <= 3, factor * stderr(by_seed) / averaged,
        ),
    ]  # fmt: skip
    metrics = {
        "B_crit": float(b_crit),
        "S_min": float(aux["min_steps"]),
        "E_min": float(aux["min_examples"]),
        "B_simple/estimated, mean over the run": averaged,
        "B_simple/exact, mean over the run": float(simple.mean()),
        "B_noise/exact, mean over the run": float(noise.mean()),
        "B_simple/exact, at the end": float(simple[:, -1].mean()),
    }
    for size, rate, row in zip(config.batch_sizes, best_rates, steps, strict=True):
        metrics |= {f"steps/{size}": float(row.mean()), f"learning rate/{size}": rate}
    found = (steps, best_rates)
    return Report(claims, metrics, pictures(config, run, found, (b_crit, aux), probed))


if __name__ == "__main__":
    experiment(main, PRESETS)
