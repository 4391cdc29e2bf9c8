"""Linearised implicit posteriors: correlated, curved and two-peaked targets in 2-D.

Claims: for a linear sampler the entropy is the Gaussian's; on a banana the fitted
sampler has a lower KL divergence to the target than Gaussians with a diagonal and with
a full covariance, fitted by the same ELBO; and of a mixture of two Gaussians its draws
are in both. The weights of a small network for regression are given such a posterior
too, by a generator of matrices and the bound by the smallest singular value.

    python -m experiments.vae.linearised_implicit_vi full   # 3 seeds: 1 minute, 2 cores

Expected: KL to the banana 0.32 nats, of the Gaussians 0.70 and 0.71; of the mixture's
draws at least 46 % are in each mode (KL 0.05, of the Gaussians 0.85).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxzoo.core.stats import normal_log_prob
from jaxzoo.nn.mlp import MLP
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.vae.linearised_implicit_vi import (
    MatrixGenerator,
    linearised_entropy,
    livi_loss,
)

HIDDEN = 8  # of the network whose weights are inferred: 1 -> 8 -> 1, 25 weights
NOISE = 0.1  # of its observations
EXTENT, BINS = 6.0, 96  # of the grid that KL is computed on


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    latents: int = 4  # k
    hidden: int = 32
    sigma: float = 0.1
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 5e-3
    draws: int = 400_000  # that KL is measured by
    weight_steps: int = 1000  # on the weights of a network
    points: int = 20

    def __post_init__(self):
        if self.seeds < 2 or self.latents < 2:
            raise ValueError("seeds >= 2 and latents >= 2, please")


PRESETS = {
    "smoke": Config(
        seeds=2, hidden=8, steps=5, batch_size=8, draws=2000, weight_steps=3, points=4,
    ),
    "full": Config(),
}  # fmt: skip


def banana(theta: jax.Array) -> jax.Array:
    """theta_1 ~ N(0, 1.5^2), theta_2 = theta_1^2 / 2 - 1.5 + 0.4 N(0, 1)."""
    x, y = theta[..., 0], theta[..., 1]
    spread = y - 0.5 * jnp.square(x) + 1.5
    log_p = -0.5 * jnp.square(x / 1.5) - 0.5 * jnp.square(spread / 0.4)
    return log_p - jnp.log(2 * jnp.pi * 1.5 * 0.4)


def mixture(theta: jax.Array) -> jax.Array:
    """Two Gaussians of standard deviation 0.5, at (-1.5, 0) and (1.5, 0)."""
    x, y = theta[..., 0], theta[..., 1]
    parts = [-2.0 * (jnp.square(x - m) + jnp.square(y)) for m in (-1.5, 1.5)]
    return jnp.logaddexp(*parts) - jnp.log(2 * 2 * jnp.pi * 0.25)


TARGETS = {"banana": banana, "mixture": mixture}


def linear_entropy() -> Claim:
    """Of 2, 10 and 50 numbers, with fewer and with as many latents."""
    worst = 0.0
    for size, k in ((2, 2), (10, 3), (50, 50)):
        a = np.random.default_rng(size).normal(size=(size, k)) / k**0.5
        covariance = a @ a.T + 0.1**2 * np.eye(size)
        exact = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
        matrix = jnp.asarray(a, jnp.float32)
        got, _ = linearised_entropy(
            lambda z, a=matrix: a @ z, jnp.ones((3, k)), sigma=0.1
        )
        worst = max(worst, float(jnp.abs(got - exact).max()))
    return Claim(
        "linear samplers: |entropy - that of the Gaussian| in nats, largest",
        worst, "<= 1e-4", worst <= 1e-4,
    )  # fmt: skip


def descend(loss: Callable[..., Any], params: Any, key: Any, rate: float, steps: int):
    """Adam on `loss(params, key)`, its rate falling to 0."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params, key)
        updates, state = optimizer.update(slope, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(key, steps)
    start = params, optimizer.init(params)
    (params, _), values = lax.scan(step, start, keys)
    return params, jnp.mean(values[-50:])


def divergence(theta: jax.Array, target: Any) -> jax.Array:
    """KL(q || p) in nats, of a histogram of draws against the target in its bins."""
    edges = jnp.linspace(-EXTENT, EXTENT, BINS + 1)
    side = edges[1] - edges[0]
    place = jnp.floor((theta + EXTENT) / side).astype(jnp.int32)
    inside = jnp.all((place >= 0) & (place < BINS), axis=1)
    flat = jnp.where(inside, place[:, 0] * BINS + place[:, 1], BINS**2)
    share = jnp.zeros(BINS**2 + 1).at[flat].add(1.0) / len(theta)
    middle = 0.5 * (edges[1:] + edges[:-1])
    grid = jnp.stack(jnp.meshgrid(middle, middle, indexing="ij"), axis=-1)
    log_p = jnp.append(target(grid).ravel() + 2 * jnp.log(side), -50.0)
    log_q = jnp.log(jnp.where(share > 0, share, 1.0))
    # What a histogram of n draws has too much: Miller and Madow's bins / 2n.
    return jnp.sum(share * (log_q - log_p)) - jnp.sum(share > 0) / (2 * len(theta))


def on_the_plane(config: Config, name: str) -> dict[str, np.ndarray]:
    """KL by way, some draws, and the share of those at the right, by seed."""
    target, k = TARGETS[name], config.latents
    net = MLP((config.hidden, config.hidden, 2))

    def implicit(params: Any, key: jax.Array, count: int) -> jax.Array:
        keys = jax.random.split(key)
        noise = config.sigma * jax.random.normal(keys[1], (count, 2))
        made: Any = net.apply(params, jax.random.normal(keys[0], (count, k)))
        return made + noise

    def gaussian(params: Any, key: jax.Array, count: int, is_full: bool) -> Any:
        mean, log_std, slant = params["mean"], params["log_std"], params["slant"]
        z = jax.random.normal(key, (count, 2))
        x = jnp.exp(log_std)[None] * z
        shear = jnp.where(is_full, slant, 0.0) * z[:, 0]
        return mean[None] + x + shear[:, None] * jnp.array([[0.0, 1.0]])

    def one(key: jax.Array) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 4)

        def implicit_loss(params: Any, key: jax.Array) -> jax.Array:
            keys = jax.random.split(key)
            z = jax.random.normal(keys[0], (config.batch_size, k))
            noise = jax.random.normal(keys[1], (config.batch_size, 2))

            def g(z: jax.Array) -> Any:
                return net.apply(params, z)

            return livi_loss(g, target, z, noise, sigma=config.sigma)[0]

        start = net.init(keys[0], jnp.zeros(k))
        rate, steps = config.learning_rate, config.steps
        params, elbo = descend(implicit_loss, start, keys[1], rate, steps)
        theta = implicit(params, keys[2], config.draws)
        found = {
            "implicit": divergence(theta, target), "loss": elbo,
            "draws": theta[:1000], "right": jnp.mean(theta[:, 0] > 0),
        }  # fmt: skip
        for way, is_full in (("mean-field", False), ("full covariance", True)):

            def loss(params: Any, key: jax.Array, is_full: bool = is_full) -> jax.Array:
                theta = gaussian(params, key, config.batch_size, is_full)
                return -jnp.mean(target(theta)) - jnp.sum(params["log_std"])

            start = {"mean": 0.1 * jax.random.normal(keys[3], (2,))}
            start |= {"log_std": jnp.zeros(2), "slant": jnp.zeros(())}
            params, _ = descend(loss, start, keys[1], rate, steps)
            theta = gaussian(params, keys[2], config.draws, is_full)
            found |= {way: divergence(theta, target), f"{way}/draws": theta[:1000]}
        return found

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    return jax.device_get(jax.jit(lambda k: lax.map(one, k))(keys))


def on_weights(config: Config) -> dict[str, np.ndarray]:
    """Bayesian regression, by the exact determinant and by its bound."""
    generator = MatrixGenerator(((2, 4), (8, 8), (5, 5)))
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-2, -0.7, 10), rng.uniform(0.7, 2, 10)])
    x = jnp.asarray(x[: config.points], jnp.float32)
    noise = jnp.asarray(rng.normal(size=len(x)), jnp.float32)
    y = jnp.sin(2 * x) + NOISE * noise
    grid = jnp.linspace(-2, 2, 81)

    def predict(theta: jax.Array, x: jax.Array) -> jax.Array:
        first, bias, last, rest = jnp.split(theta, [HIDDEN, 2 * HIDDEN, 3 * HIDDEN])
        hidden = jnp.tanh(2 * x[:, None] * first[None] + 2 * bias[None])
        return hidden @ last + rest[0]

    def log_joint(theta: jax.Array) -> jax.Array:
        misfit = (y - predict(theta, x)) / NOISE
        return normal_log_prob(misfit) + normal_log_prob(theta)

    def one(key: jax.Array, method: Any) -> dict[str, jax.Array]:
        keys = jax.random.split(key, 3)

        def loss(params: Any, key: jax.Array) -> jax.Array:
            keys = jax.random.split(key)
            z = jax.random.normal(keys[0], (8, 8))
            noise = jax.random.normal(keys[1], (8, 25))

            def g(z: jax.Array) -> Any:
                return generator.apply(params, z)

            return livi_loss(g, log_joint, z, noise, sigma=0.05, method=method)[0]

        start = generator.init(keys[0], jnp.zeros(8))
        rate, steps = config.learning_rate, config.weight_steps
        params, _ = descend(loss, start, keys[1], rate, steps)
        theta: Any = generator.apply(params, jax.random.normal(keys[2], (500, 8)))
        curves = jax.vmap(predict, (0, None))(theta, grid)
        return {"mean": jnp.mean(curves, axis=0), "spread": jnp.std(curves, axis=0)}

    def both(key: jax.Array) -> dict[str, Any]:
        return {m: one(key, m) for m in ("exact", "smallest")}

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    found = jax.device_get(jax.jit(lambda k: lax.map(both, k))(keys))
    places = np.abs(np.asarray(grid))
    for rows in found.values():
        rows["between"] = rows["spread"][:, places < 0.5].mean(axis=1)
        rows["at_data"] = rows["spread"][:, places > 0.9].mean(axis=1)
    return found | {"x": np.asarray(x), "y": np.asarray(y), "grid": np.asarray(grid)}


def picture(config: Config, run: Run, planes: Any, weights: Any) -> Figure:
    figure, axes = panels(3, width=4.2)
    side = np.linspace(-4, 4, 121)
    grid = jnp.stack(jnp.meshgrid(side, side), axis=-1)
    for ax, (name, found) in zip(axes[:2], planes.items(), strict=True):
        density = np.exp(TARGETS[name](grid))
        levels = density.max() * np.array([0.05, 0.2, 0.4, 0.6, 0.8])
        ax.contour(side, side, density, levels, colors="0.6", linewidths=0.7)
        for color, way in ((COLORS[1], "full covariance/draws"), (COLORS[0], "draws")):
            label = "implicit" if way == "draws" else "Gaussian, full covariance"
            ax.plot(*found[way][0, :400].T, ".", ms=2, color=color, label=label)
        ax.set(xlabel="theta_1", ylabel="theta_2", xlim=(-4, 4), ylim=(-4, 4))
        ax.set_title(name, fontsize=10)
    axes[0].legend(frameon=False, markerscale=4, fontsize=8)
    ax = axes[2]
    for color, method in zip(COLORS, ("exact", "smallest"), strict=False):
        mean, spread = (weights[method][k][0] for k in ("mean", "spread"))
        ax.plot(weights["grid"], mean, color=color, label=f"log det: {method}")
        ax.fill_between(
            weights["grid"], mean - spread, mean + spread, color=color, alpha=0.2
        )
    ax.plot(weights["x"], weights["y"], "k.", ms=4)
    ax.set(xlabel="x", ylabel="y, posterior mean and deviation")
    ax.legend(frameon=False, fontsize=8)
    return run.figure(
        "linearised_implicit_vi", figure, title="Posteriors without a density",
        caption="Left, middle: draws of the first seed over the targets' contours. "
        "Right: of the 25 weights of a network, with 1 standard deviation, first seed.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    planes = {name: on_the_plane(config, name) for name in TARGETS}
    weights = on_weights(config)
    claims, found = [linear_entropy()], planes["banana"]
    for way in ("mean-field", "full covariance"):
        gap = found[way] - found["implicit"]
        claims.append(
            Claim(
                f"banana: KL of the Gaussian, {way}, less that of the implicit "
                "posterior, nats",
                float(gap.mean()), "> 0", bool(gap.mean() > 0), stderr(gap),
            )
        )  # fmt: skip
    right = planes["mixture"]["right"]
    least = float(np.minimum(right, 1 - right).min())
    claims.append(
        Claim(
            "mixture: share of the draws in the mode that has fewer, worst seed",
            least, ">= 0.2", least >= 0.2,
        )
    )  # fmt: skip
    ways = ("implicit", "full covariance", "mean-field")
    metrics = {f"{n}/{w}": float(f[w].mean()) for n, f in planes.items() for w in ways}
    metrics |= {
        f"weights/{m}/{k}": float(weights[m][k].mean())
        for m in ("exact", "smallest") for k in ("between", "at_data")
    }  # fmt: skip
    rows = [
        (n, *(f"{f[w].mean():.3f} +- {stderr(f[w]):.3f}" for w in ways))
        for n, f in planes.items()
    ]
    run.table(f"KL in nats, {config.seeds} seeds", ("target", *ways), rows)
    return Report(claims, metrics, [picture(config, run, planes, weights)])


if __name__ == "__main__":
    experiment(main, PRESETS)
