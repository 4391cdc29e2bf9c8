"""Diffusion nets on a swiss roll: new points without the training points.

Claims: on held-out points the encoder's error, against the diffusion map of all points
together, is at most 1.1 times that of Nystrom's extension, which keeps the training
points; the eigenvector constraint lowers ||(P - l) f|| by 2 or more against plain
squared error; and the autoencoder's error tells points off the manifold from held-out
ones with an AUROC of 0.95 or more. Also shown: the decoder against the pre-image by a
kernel.

    python -m experiments.vae.diffusion_nets full      # 3 seeds: 1 minute on 2 cores

Expected: errors of 12 % of the map for Nystrom's extension and for the encoder, and an
AUROC of 0.998; the constraint makes ||(P - l) f|| smaller by 3.2 or more.
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
from jaxzoo.training.step import descend
from jaxzoo.vae.diffusion_nets import (
    DiffusionNet,
    diffusion_maps,
    encoder_loss,
    nystrom,
    preimage,
)

WIDTH = 1.7  # of the roll; layers are 0.63 apart
DISTANCE = 0.15  # from the roll, of what counts as off it


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    points: int = 700
    held_out: int = 300
    dims: int = 5
    eps: float = 0.03
    hidden: int = 64
    steps: int = 3000
    learning_rate: float = 5e-3
    eta: float = 300.0

    def __post_init__(self):
        if self.seeds < 2 or not 2 <= self.dims < self.points or self.held_out < 4:
            raise ValueError("seeds >= 2, 2 <= dims < points, held-out >= 4, please")


PRESETS = {
    "smoke": Config(seeds=2, points=40, held_out=8, dims=2, hidden=8, steps=3),
    "full": Config(),
}  # fmt: skip


def roll(place: jax.Array) -> jax.Array:
    """`[N, 2]` in the unit square to the roll `[N, 3]`, a tenth of the usual size."""
    # The square root spreads points evenly along the spiral, all but.
    low, high = (1.5 * jnp.pi) ** 2, (3.8 * jnp.pi) ** 2
    t = jnp.sqrt(low + (high - low) * place[:, 0])
    return jnp.stack(
        [0.1 * t * jnp.cos(t), WIDTH * place[:, 1], 0.1 * t * jnp.sin(t)], axis=1
    )


def off_the_roll(key: jax.Array, count: int) -> jax.Array:
    """Points of its bounding box that are at least DISTANCE away."""
    low, high = jnp.array([-1.2, 0.0, -1.2]), jnp.array([1.2, WIDTH, 1.2])
    box = jax.random.uniform(key, (8 * count, 3), minval=low, maxval=high)
    spiral = roll(jnp.stack([jnp.linspace(0, 1, 500), jnp.zeros(500)], axis=1))
    gap = box[:, None, ::2] - spiral[None, :, ::2]  # the roll fills its width
    nearest = jnp.sqrt(jnp.min(jnp.sum(jnp.square(gap), axis=2), axis=1))
    first = jnp.argsort(nearest < DISTANCE, stable=True)[:count]
    return box[first]


def distance(x: jax.Array, y: jax.Array) -> jax.Array:
    """Root mean square of the rows' distances."""
    return jnp.sqrt(jnp.mean(jnp.sum(jnp.square(x - y), axis=1)))


def auroc(inside: jax.Array, outside: jax.Array) -> jax.Array:
    """How often a point off the manifold has the larger score."""
    return jnp.mean(outside[:, None] > inside[None])


def one_seed(config: Config, key: jax.Array) -> dict[str, jax.Array]:
    keys = jax.random.split(key, 6)
    total = config.points + config.held_out
    everything = roll(jax.random.uniform(keys[0], (total, 2)))
    x, new = everything[: config.points], everything[config.points :]
    embedding, aux = diffusion_maps(x, dims=config.dims, eps=config.eps)
    p, values = aux["transition"], aux["eigenvalues"]
    joint, _ = diffusion_maps(everything, dims=config.dims, eps=config.eps)
    # The joint map in the axes of the training points' own: signs, and turns among
    # nearly equal eigenvalues.
    turn = jnp.linalg.lstsq(joint[: config.points], embedding)[0]
    truth = joint[config.points :] @ turn

    def error(y: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(y - truth)) / jnp.sum(jnp.square(truth)))

    fit = [aux[k] for k in ("log_density", "eigenvectors", "eigenvalues")]
    extended = nystrom(new, x, *fit, eps=config.eps)
    net: Any = DiffusionNet(config.dims, 3, (config.hidden, config.hidden))
    start = net.init(keys[1], x)

    def trained(eta: jax.Array) -> dict[str, jax.Array]:
        def loss(params: Any, _: jax.Array) -> jax.Array:
            f = net.apply(params, x, method="encode")
            return encoder_loss(f, embedding, p, values, eta=eta)[0]

        def back(params: Any, _: jax.Array) -> jax.Array:
            made = net.apply(params, embedding, method="decode")
            return jnp.mean(jnp.sum(jnp.square(made - x), axis=1))

        def both(params: Any, key: jax.Array) -> jax.Array:
            # They share no parameter, so that one descent trains each by itself.
            return loss(params, key) + back(params, key)

        rate, steps = config.learning_rate, config.steps
        params = descend(both, start, rate, keys[2], steps)
        f = net.apply(params, x, method="encode")
        _, terms = encoder_loss(f, embedding, p, values)
        code = net.apply(params, new, method="encode")
        outside = off_the_roll(keys[4], config.held_out)
        inner = net.apply(params, new, method="outlier_score")
        outer = net.apply(params, outside, method="outlier_score")
        decoded = net.apply(params, truth, method="decode")
        return {
            "error": error(code),
            "fit": jnp.sqrt(terms["fit"]),
            "constraint": jnp.sqrt(terms["constraint"]),
            "against_nystrom": jnp.linalg.norm(code - extended)
            / jnp.linalg.norm(extended),
            "auroc": auroc(inner, outer),
            "inner": jnp.sqrt(inner),
            "outer": jnp.sqrt(outer),
            "decoder": distance(new, decoded),
            "code": code,
        }

    pair = lax.map(trained, jnp.array([0.0, config.eta]))
    widths = 0.25 ** jnp.arange(1, 8)
    kernels = lax.map(
        lambda w: distance(new, preimage(truth, embedding, x, width=w)), widths
    )
    return {
        **pair,
        "nystrom": error(extended),
        "preimage": jnp.min(kernels),
        "eigenvalues": values,
        "truth": truth,
    }


def picture(config: Config, run: Run, found: dict[str, np.ndarray]) -> Figure:
    figure, axes = panels(3, width=4.2)
    ways = (
        ("Nystrom", found["nystrom"]),
        ("encoder,\nno constraint", found["error"][:, 0]),
        ("encoder,\nconstraint", found["error"][:, 1]),
    )
    for i, (_, values) in enumerate(ways):
        axes[0].errorbar(
            i, values.mean(), stderr(values), fmt="o", color=COLORS[i], capsize=3
        )
        axes[0].plot([i + 0.1] * len(values), values, ".", color="0.6", ms=4)
    axes[0].set(xticks=range(3), xlim=(-0.5, 2.5), ylim=(0, None))
    axes[0].set_xticklabels([name for name, _ in ways], fontsize=8)
    axes[0].set(ylabel="relative error of the map, held out")
    for i in range(2):
        values = found["constraint"][:, i]
        axes[1].errorbar(
            i, values.mean(), stderr(values), fmt="o", color=COLORS[i + 1], capsize=3
        )
        axes[1].plot([i + 0.1] * len(values), values, ".", color="0.6", ms=4)
    axes[1].set(xticks=range(2), xlim=(-0.5, 1.5), ylim=(0, None))
    axes[1].set_xticklabels(["no constraint", f"eta = {config.eta:g}"])
    axes[1].set(ylabel="||(P - l) f||, root mean square per point")
    largest = float(found["outer"][0, 1].max())
    bins = np.linspace(0.0, largest, 40).tolist()
    for i, (name, label) in enumerate(
        (("inner", "held out"), ("outer", "off the roll"))
    ):
        axes[2].hist(
            found[name][0, 1], bins, color=COLORS[i], alpha=0.6, label=label
        )  # fmt: skip
    axes[2].set(xlabel="||x - D(E(x))|| (units of the roll)", ylabel="points")
    axes[2].legend(frameon=False, fontsize=8)
    return run.figure(
        "diffusion_nets", figure, title="A diffusion map without its points",
        caption="Left: error on held-out points against the diffusion map of all "
        "points. Middle: how far outputs are from eigenvectors of P. Means and "
        f"standard errors over {config.seeds} rolls, dots the rolls. Right: the "
        "autoencoder's error, first roll.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    @jax.jit
    def every(keys: jax.Array) -> Any:
        return lax.map(lambda key: one_seed(config, key), keys)

    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    found = jax.device_get(every(keys))
    ratio = found["error"][:, 1] / found["nystrom"]
    lowered = found["constraint"][:, 0] / found["constraint"][:, 1]
    found_out = found["auroc"][:, 1]
    claims = [
        Claim(
            "error of the encoder on held-out points over that of Nystrom's extension, "
            "worst roll",
            float(ratio.max()), "<= 1.1", bool(ratio.max() <= 1.1), stderr(ratio),
        ),
        Claim(
            "||(P - l) f|| without the constraint over that with it, worst roll",
            float(lowered.min()), ">= 2", bool(lowered.min() >= 2), stderr(lowered),
        ),
        Claim(
            "AUROC of the autoencoder's error, points off the roll against held-out "
            "ones, worst roll",
            float(found_out.min()), ">= 0.95", bool(found_out.min() >= 0.95),
            stderr(found_out),
        ),
    ]  # fmt: skip
    metrics = {
        f"{way}/{name}": float(found[name][:, i].mean())
        for i, way in enumerate(("plain", "constraint"))
        for name in ("error", "fit", "constraint", "against_nystrom", "auroc")
    }
    for name in ("nystrom", "preimage"):
        metrics[name] = float(found[name].mean())
    hidden, dims = config.hidden, config.dims
    metrics |= {
        "decoder": float(found["decoder"].mean()),
        "numbers_of_the_encoder": 4 * hidden + hidden * (hidden + 1)
        + (hidden + 1) * dims,
        "numbers_of_nystrom": config.points * (3 + 1 + dims),
    }  # fmt: skip
    run.table(
        f"Held-out points of a swiss roll, {config.seeds} rolls",
        ("way", "relative error", "||(P - l) f||", "AUROC"),
        [
            ("Nystrom", f"{metrics['nystrom']:.4f}", "", ""),
            *(
                (way, *(
                    f"{metrics[f'{way}/{name}']:.4f}"
                    for name in ("error", "constraint", "auroc")
                ))
                for way in ("plain", "constraint")
            ),
        ],
    )  # fmt: skip
    return Report(claims, metrics, [picture(config, run, found)])


if __name__ == "__main__":
    experiment(main, PRESETS)
