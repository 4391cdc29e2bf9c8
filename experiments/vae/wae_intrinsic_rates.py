"""WAEs of data on d-dimensional sets in R^D: how risks fall with the number of data.

Claims: at d = 2 the slope of log held-out risk against log n changes by less than 0.15
between D = 8 and D = 128; at d = 6 it is closer to 0 than at d = 2. Also shown: excess
risks over WAEs with the most data, and estimates of d.

    python -m experiments.vae.wae_intrinsic_rates full    # 3 seeds: 1.5 minutes

Expected: slopes of -0.46 (D = 8) and -0.48 (D = 128) at d = 2, though by seed their
difference is 0.03 +- 0.21; -0.71 and -0.28 at d = 6. So in 128 coordinates the larger d
is flatter and in 8 it is not: that claim fails. There the risk of 100 data is large,
that of 1,600 is not: 8 coordinates hold 6 dimensions with hardly a fold. Excess risks
fall faster than the bound, -0.41 to -1.8 in place of -0.25 and -0.125.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.nn.mlp import MLP
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import descend
from jaxzoo.vae.wae import sample_prior, wae_mmd_loss
from jaxzoo.vae.wae_intrinsic_rates import (
    covering_dimension,
    manifold_data,
    rate_fit,
    two_nn_dimension,
)


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    first_seed: int = 0
    dims: tuple[int, int] = (2, 6)
    spaces: tuple[int, int] = (8, 128)
    sizes: tuple[int, ...] = (100, 200, 400, 800, 1600)
    most: int = 12_800  # data of the reference
    frequency: float = 1.0
    narrowest: int = 16  # units of a layer with 100 data
    hidden: int = 64  # at most
    steps: int = 600
    batch_size: int = 100
    learning_rate: float = 2e-3
    weight: float = 1.0  # of the MMD
    held_out: int = 1000
    estimated: int = 1000  # points that dimensions are estimated of

    def __post_init__(self):
        if self.seeds < 2 or self.estimated < 100:
            raise ValueError("seeds >= 2 and 100 points of estimates, please")


PRESETS = {
    "smoke": Config(
        seeds=2, spaces=(8, 16), sizes=(100, 200), most=400, narrowest=4, hidden=8,
        steps=3, batch_size=8, held_out=20, estimated=100,
    ),
    "full": Config(),
}  # fmt: skip


def widths(config: Config, dim: Any, n: Any) -> Any:
    """Units that n data are given: they grow as n^(d / (2 + d))."""
    growth = (n / 100.0) ** (dim / (2.0 + dim))
    return np.minimum(np.round(config.narrowest * growth), config.hidden)


def points(config: Config, dim: Any, space: Any, seed: Any, count: int) -> jax.Array:
    """On a set of `dim` dimensions in `space` coordinates; of others 0 is made."""
    keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1))
    largest, shape = max(config.spaces), (count, max(config.dims))
    z = jax.random.uniform(keys[0], shape, minval=-1.0, maxval=1.0)
    z = jnp.where(jnp.arange(shape[1]) < dim, z, 0.0)
    x = manifold_data(keys[1], z, features=largest, frequency=config.frequency)
    return jnp.where(jnp.arange(largest) < space, x * jnp.sqrt(largest / space), 0.0)


def one_model(config: Config, dim: Any, space: Any, n: Any, width: Any, seed: Any):
    """Risks of one WAE. All have the arrays of the largest, what is too much is 0."""
    keys = jax.random.split(jax.random.key(seed), 4)
    latents, largest = max(config.dims), max(config.spaces)
    is_code = (jnp.arange(latents) < dim)[None]  # as many codes as there are dimensions
    is_used = (jnp.arange(largest) < space)[None]
    x = points(config, dim, space, seed, config.most + config.held_out)
    train, test = x[: config.most], x[config.most :]
    hidden = (config.hidden, config.hidden)
    encoder, decoder = (MLP((*hidden, size), nn.relu) for size in (latents, largest))
    start = (
        encoder.init(keys[0], x[:1]), decoder.init(keys[1], jnp.zeros((1, latents))),
    )  # fmt: skip

    def narrowed(path: Any, leaf: jax.Array) -> jax.Array:
        """What hidden units beyond the width send on is 0."""
        is_later = leaf.ndim == 2 and path[2].key != "Dense_0"
        kept = (jnp.arange(leaf.shape[0]) < width)[:, None] if is_later else True
        return jnp.where(kept, leaf, 0.0)

    def risk(params: Any, x: jax.Array, key: jax.Array) -> Any:
        params = jax.tree_util.tree_map_with_path(narrowed, params)
        codes: Any = encoder.apply(params[0], x)
        codes = jnp.where(is_code, codes, 0.0)
        output: Any = decoder.apply(params[1], codes)
        prior = sample_prior(key, num_samples=len(x), latents=latents)
        prior, output = jnp.where(is_code, prior, 0.0), jnp.where(is_used, output, 0.0)
        return wae_mmd_loss(x, output, codes, prior, weight=config.weight)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        rows = jax.random.randint(keys[0], (config.batch_size,), 0, n)
        return risk(params, train[rows], keys[1])[0]

    params = descend(loss, start, config.learning_rate, keys[2], config.steps)
    value, parts = risk(params, test, keys[3])
    error = jnp.mean(parts["per_example"])
    return {"risk": value, "error": error, "mmd": parts["mmd"]}


def every(config: Config) -> tuple[Any, Any]:
    """All WAEs, `[dims, spaces, sizes and most, seeds]`, and estimates of d."""
    sizes = (*config.sizes, config.most)
    seeds = config.first_seed + np.arange(config.seeds)
    grid = np.meshgrid(config.dims, config.spaces, sizes, seeds, indexing="ij")
    dim, space, n, seed = grid
    cases = dim, space, n, widths(config, dim, n), seed

    def estimates(case: Any) -> Any:
        dim, space, seed = case
        x = points(config, dim, space, seed, config.estimated)
        last = config.estimated // 10
        covered = covering_dimension(x, first=last // 10, last=last)[0]
        return {"two_nn": two_nn_dimension(x), "covering": covered}

    @jax.jit
    def run(cases: Any, sets: Any) -> Any:
        found = lax.map(lambda case: one_model(config, *case), cases)
        return found, lax.map(estimates, sets)

    sets = [a[:, :, 0] for a in (dim, space, seed)]
    found = run([a.ravel() for a in cases], [a.ravel() for a in sets])
    pairs = zip(jax.device_get(found), (dim, sets[0]), strict=True)
    models, dims = [
        {name: values.reshape(like.shape) for name, values in part.items()}
        for part, like in pairs
    ]
    return models, dims


def pictures(config: Config, run: Run, models: Any, slopes: Any, estimates: Any) -> Any:
    figure, axes = panels(3, width=4.3)
    n = np.array(config.sizes)
    dims, spaces = config.dims, config.spaces
    for i, d in enumerate(dims):
        for j, space in enumerate(spaces):
            place = 2 * i + j
            style: Any = {"color": COLORS[place], "marker": "os^D"[place], "ms": 4}
            risks = models["risk"][i, j, :-1]
            axes[0].errorbar(
                n, risks.mean(axis=1), [stderr(r) for r in risks], capsize=3,
                label=f"d = {d}, D = {space}", ls="-" if j else "--", **style,
            )  # fmt: skip
            own = slopes[i, j]
            axes[1].errorbar(
                place, own.mean(), stderr(own), capsize=4, **style | {"ms": 7}
            )
            axes[1].plot([place + 0.15] * len(own), own, "k.", ms=4)
            for k, (name, values) in enumerate(estimates.items()):
                label = name.replace("_", "-") if place == 0 else None
                axes[2].errorbar(
                    place + 0.2 * k - 0.1, values[i, j].mean(), stderr(values[i, j]),
                    color=COLORS[4 + 2 * k], marker="sx"[k], ms=5, capsize=3,
                    label=label, ls="none",
                )  # fmt: skip
        span = [2 * i - 0.4, 2 * i + 1.4]
        label = "-1 / (2 + d), of excess risks" if i == 0 else None
        axes[1].plot(span, [-1.0 / (2.0 + d)] * 2, "0.4", ls=":", label=label)
        axes[2].plot(span, [d, d], "0.4", ls=":", label="d" if i == 0 else None)
    axes[0].set(
        xscale="log", yscale="log", xlabel="training points n",
        ylabel="held-out risk (data: squares sum to 1)",
    )  # fmt: skip
    ticks = [f"d={d}\nD={space}" for d in dims for space in spaces]
    for ax in axes[1:]:
        ax.set_xticks(range(4), ticks)
    axes[1].set_ylabel("slope of log risk against log n")
    axes[2].set_ylabel("estimated dimension")
    for ax in axes:
        ax.legend(frameon=False, fontsize=8)
    return run.figure(
        "rates", figure, title="Risks of WAEs by number and dimension of data",
        caption=f"Means and standard errors over {config.seeds} seeds, each with its "
        f"own set; dots are seeds. Right: estimates of {config.estimated} points.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    models, estimates = every(config)
    risks = models["risk"].astype(np.float64)
    n = np.array(config.sizes, np.float64)
    # With more data than in the first sizes there is hardly any excess to be seen.
    lines = jax.jit(jax.vmap(lambda y, last: (
        rate_fit(n, y)[0], rate_fit(n[:3], y[:3], reference=last)[0],
    )))  # fmt: skip
    columns = np.moveaxis(risks, 2, 3).reshape(-1, len(n) + 1)
    fitted = jax.device_get(lines(columns[:, :-1], columns[:, -1]))
    slopes, excess = (np.reshape(a, (2, 2, -1)) for a in fitted)
    (d, deep), (few, many) = config.dims, config.spaces
    change = slopes[0, 1] - slopes[0, 0]
    gap = abs(float(change.mean()))
    flatter = np.abs(slopes[0]) - np.abs(slopes[1])  # [spaces, seeds]
    claims = [
        Claim(
            f"d = {d}: slope of log risk against log n, D = {many} less D = {few}, "
            "size of the mean over seeds",
            gap, "< 0.15", gap < 0.15, stderr(change),
        ),
    ]  # fmt: skip
    for j, space in enumerate(config.spaces):
        mean = float(flatter[j].mean())
        claims.append(
            Claim(
                f"D = {space}: size of the slope at d = {d} less that at d = {deep}, "
                "mean over seeds",
                mean, "> 0", mean > 0, stderr(flatter[j]),
            )
        )  # fmt: skip
    metrics, rows = {}, []
    for i, dim in enumerate(config.dims):
        for j, space in enumerate(config.spaces):
            values = {
                "slope": slopes[i, j], "excess_slope": excess[i, j],
                "first_risk": risks[i, j, 0], "last_risk": risks[i, j, -2],
                "reference": risks[i, j, -1],
            } | {name: v[i, j] for name, v in estimates.items()}  # fmt: skip
            name = f"d{dim}/D{space}"
            metrics |= {f"{name}/{k}": float(v.mean()) for k, v in values.items()}
            cells = (f"{v.mean():.3g} ± {stderr(v):.1g}" for v in values.values())
            rows.append((name, *cells))
    heads = ("data", "slope", "of excess", "first", "last", "most", "covering", "2-NN")
    run.table(f"Held-out risks, {config.seeds} seeds", heads, rows)
    figure = pictures(config, run, models, slopes, estimates)
    return Report(claims, metrics, [figure])


if __name__ == "__main__":
    experiment(main, PRESETS)
