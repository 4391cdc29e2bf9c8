"""LeanVAE: wavelets, patches and compressed sensing in place of 3-D convolutions.

Claims: the Haar round trip is exact to 1e-5; on clips of moving digits LeanVAE, at no
more than a fifth of the FLOPs of a VAE of causal 3-D convolutions with a latent of the
same size, trained alike, is within 1 dB of its PSNR on digits of other hands.

    python -m experiments.vae.leanvae full    # 3 seeds: a minute on 2 cores

Expected: an error of 2e-7; 0.17 of the FLOPs; 15.0 dB for LeanVAE and 14.4 dB for the
convolutions, 9.2 dB for the mean clip. Both are far from converged in 800 steps, and
had one learning rate, so this compares them at equal steps, not at their best.
"""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.data.digits import flat_digits
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, image_grid, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import descend
from jaxzoo.vae.leanvae import LeanVAE, haar3d, ihaar3d, leanvae_loss

SIDE = 8  # of a frame, as of a digit
START = -6.0  # of log-variances: little noise at first, in both models
NAMES = {"lean": "LeanVAE", "conv": "3-D convolutions"}


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    first_seed: int = 0
    held_out: Literal["test", "validation"] = "test"
    frames: int = 5  # of a clip; 1 + a multiple of 4
    clips: int = 2000  # for training
    held_out_clips: int = 200
    latents: int = 8  # per 4 x 4 x 4 pixels, for both
    low: int = 8
    high: int = 24
    separate: int = 1
    fused: int = 1
    iterations: int = 2
    recovery: int = 1
    channels: int = 8  # of the convolutions at full size; doubled at each halving
    steps: int = 800
    batch_size: int = 8
    learning_rate: float = 5e-3
    conv_learning_rate: float = 5e-3

    def __post_init__(self):
        if self.seeds < 2 or self.frames % 4 != 1 or self.frames < 5:
            raise ValueError("seeds >= 2 and frames 5, 9, 13 .., please")


PRESETS = {
    "smoke": Config(
        seeds=2, frames=5, clips=8, held_out_clips=4, latents=2, low=2, high=4,
        separate=0, fused=0, iterations=1, recovery=1, channels=2, steps=2,
        batch_size=2,
    ),
    "full": Config(),
}  # fmt: skip


class CausalConv(nn.Module):
    """A 3 x 3 x 3 convolution that sees no later frame, as one matrix product."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        sizes = [-(-side // self.stride) for side in x.shape[1:4]]
        x = jnp.pad(x, ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)))
        for axis, size in enumerate(sizes, start=1):
            span = self.stride * (size - 1) + 1
            taps = [
                lax.slice_in_dim(x, i, i + span, self.stride, axis) for i in range(3)
            ]
            x = jnp.concatenate(taps, axis=-1)
        return nn.Dense(self.features)(x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x + CausalConv(x.shape[-1])(nn.silu(nn.LayerNorm()(x)))


class ConvVAE(nn.Module):
    """What video VAEs are made of otherwise; its latent is that of patches of 2."""

    latents: int
    channels: int

    @nn.compact
    def __call__(self, video: Any, noise: Any) -> Any:
        h = CausalConv(self.channels)(video)
        for width in (2 * self.channels, 4 * self.channels):
            h = Residual()(CausalConv(width, stride=2)(h))
        mean, log_variance = jnp.split(nn.Dense(2 * self.latents)(h), 2, axis=-1)
        log_variance += START
        std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        h = Residual()(CausalConv(4 * self.channels)(mean + std * noise))
        for width in (2 * self.channels, self.channels):
            for axis in (1, 2, 3):
                h = jnp.repeat(h, 2, axis=axis)
            h = CausalConv(width)(h[:, 1:])  # the first frame stands alone
            h = Residual()(h) if width > self.channels else h
        h = CausalConv(video.shape[-1])(nn.silu(nn.LayerNorm()(h)))
        return h, mean, log_variance


def operations(config: Config) -> dict[str, float]:
    """Floating point operations per clip, encoder and decoder, of all products."""
    pairs = (config.frames - 1) // 2
    grids = [(1 + 2 * pairs) * SIDE**2, (1 + pairs) * (SIDE // 2) ** 2]
    grids.append((1 + pairs // 2) * (SIDE // 4) ** 2)
    c, z = config.channels, config.latents

    def conv(grid: int, inputs: int, outputs: int) -> int:
        return 27 * grid * inputs * outputs

    full, half, quarter = grids
    conv_vae = (
        2 * conv(full, 1, c) + conv(half, c, 2 * c) + 2 * conv(half, 2 * c, 2 * c)
        + conv(quarter, 2 * c, 4 * c) + 2 * conv(quarter, 4 * c, 4 * c)
        + quarter * 4 * c * 2 * z + conv(quarter, z, 4 * c)
        + conv(half, 4 * c, 2 * c) + conv(full, 2 * c, c)
    )  # fmt: skip

    def naf(layers: int, width: int) -> int:
        return layers * (27 * width + 3 * width * (8 * width // 3))

    low, high = config.low, config.high
    width = low + high
    token = 2 * (naf(config.separate, low) + naf(config.separate, high))
    token += 2 * naf(config.fused, width) + 2 * width * z  # and both latent outputs
    token += width * z + config.iterations * (
        2 * width * z + 2 * naf(config.recovery, width)
    )
    first, later = SIDE**2 // 16, quarter - SIDE**2 // 16
    embed = 2 * (first * 4 * (low + 3 * high) + later * 8 * (low + 7 * high))
    wavelets = 2 * (first * 4 * 16 + later * 8 * 64)  # as products with 4 x 4, 8 x 8
    lean = quarter * token + embed + wavelets
    return {"lean": 2.0 * lean, "conv": 2.0 * conv_vae}


def moving_digits(digits: np.ndarray, count: int, frames: int, seed: int) -> np.ndarray:
    """Clips `[count, frames, 8, 8, 1]`: a digit passes, and turns when half is out."""
    rng = np.random.default_rng(seed)
    images = digits[rng.integers(len(digits), size=count)].reshape(count, SIDE, SIDE)
    images = np.pad(images, ((0, 0), (4, 4), (4, 4)))
    start = rng.integers(2, 7, size=(count, 1, 2))
    speed = rng.integers(-1, 2, size=(count, 1, 2))
    where = (start + speed * np.arange(frames)[None, :, None]) % 16
    where = np.minimum(where, 16 - where)
    clips = [
        [image[i : i + SIDE, j : j + SIDE] for i, j in corners]
        for image, corners in zip(images, where, strict=True)
    ]
    return np.asarray(clips, np.float32)[..., None]


def initial(model: nn.Module, key: jax.Array, *args: Any) -> Any:
    """Like `init`, from one draw: some thirty would take most of the compilation."""
    shapes = jax.eval_shape(model.init, key, *args)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    cuts = np.cumsum([leaf.size for _, leaf in leaves])
    draws = jnp.split(jax.random.normal(key, (int(cuts[-1]),)), cuts[:-1])
    values = []
    for (path, leaf), draw in zip(leaves, draws, strict=True):
        name = path[-1].key
        constants = {"bias": 0.0, "scale": 1.0, "step_sizes": 1.0, "thresholds": 0.01}
        if name in constants:
            values.append(jnp.full(leaf.shape, constants[name]))
            continue
        inputs = leaf.shape[1] if name == "phi" else np.prod(leaf.shape[:-1])
        values.append(draw.reshape(leaf.shape) / np.sqrt(inputs))
    params = jax.tree.unflatten(jax.tree.structure(shapes), values)
    own = params["params"]
    if "sensing" in own:
        own["sensing"]["q"] = own["sensing"]["phi"].T
        own["spread"]["bias"] += START
    return params


def one_seed(config: Config, key: jax.Array, x: Any, test: Any) -> Any:
    """PSNR in dB of both models on held-out clips, and their first reconstructions."""
    lean = LeanVAE(
        config.latents, config.low, config.high, config.separate, config.fused,
        config.iterations, config.recovery, patch=(2, 2, 2), channels=1,
    )  # fmt: skip
    conv = ConvVAE(config.latents, config.channels)
    shape = (1 + (config.frames - 1) // 4, SIDE // 4, SIDE // 4, config.latents)
    rates = config.learning_rate, config.conv_learning_rate
    found = {}
    for name, model, rate in zip(NAMES, (lean, conv), rates, strict=True):
        keys = jax.random.split(jax.random.fold_in(key, 1), 2)

        def loss(params: Any, key: jax.Array, model: Any = model) -> jax.Array:
            rows, noise = jax.random.split(key)
            rows = jax.random.randint(rows, (config.batch_size,), 0, len(x))
            noise = jax.random.normal(noise, (config.batch_size, *shape))
            return leanvae_loss(x[rows], *model.apply(params, x[rows], noise))[0]

        params = initial(model, keys[0], test[:1], jnp.zeros((1, *shape)))
        params = descend(loss, params, rate, keys[1], config.steps)
        still = jnp.zeros((len(test), *shape))
        output: Any = model.apply(params, test, still)
        made, mean = jnp.clip(output[0], 0.0, 1.0), output[1]
        error = jnp.mean(jnp.square(made - test))
        found[name] = -10.0 * jnp.log10(error), made[0], jnp.std(mean)
    return found


def pictures(
    config: Config, run: Run, psnr: Any, flops: Any, rows: Any
) -> list[Figure]:
    figure, axes = panels(1)
    for name, color, marker in zip(NAMES, COLORS, "os", strict=False):
        values, cost = psnr[name], flops[name] / 1e6
        axes[0].plot(
            [cost] * len(values), values, marker, color=color, alpha=0.4, ms=5, mew=0
        )
        axes[0].errorbar(
            cost, values.mean(), stderr(values), color=color, marker=marker, ms=8,
            capsize=4, label=NAMES[name],
        )  # fmt: skip
    axes[0].axhline(
        psnr["conv"].mean() - 1.0, color="0.4", ls=":", lw=1,
        label="1 dB below the convolutions",
    )  # fmt: skip
    axes[0].set(
        xlabel="millions of FLOPs per clip, there and back",
        ylabel="PSNR of held-out clips, dB", xlim=(0.0, 1.2e-6 * flops["conv"]),
    )  # fmt: skip
    axes[0].legend(frameon=False)
    grid = image_grid(
        [np.asarray(r)[..., 0] for r in rows], ["held out", *NAMES.values()]
    )
    return [
        run.figure(
            "psnr", figure, title="Reconstruction against cost",
            caption=f"Means and standard errors over {config.seeds} seeds, faint the "
            "seeds. Latents have the same size.",
        ),
        run.figure(
            "clips", grid, title="A held-out clip",
            caption="Its frames, and as decoded from the mean latent, first seed.",
        ),
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    (x, _), (test, _) = flat_digits(config.held_out)
    x = moving_digits(x, config.clips, config.frames, 1)
    test = moving_digits(test, config.held_out_clips, config.frames, 2)

    @jax.jit
    def every(seeds: jax.Array, x: jax.Array, test: jax.Array) -> Any:
        keys = jax.vmap(jax.random.key)(seeds)
        noise = jax.random.uniform(keys[0], test.shape)  # digits are sixteenths: exact
        back = jnp.max(jnp.abs(ihaar3d(*haar3d(noise)) - noise))
        return back, lax.map(functools.partial(one_seed, config, x=x, test=test), keys)

    seeds = config.first_seed + np.arange(config.seeds)
    back, found = jax.device_get(every(seeds, x, test))
    psnr = {name: found[name][0] for name in NAMES}
    flops = operations(config)
    ratio, lost = flops["lean"] / flops["conv"], psnr["conv"] - psnr["lean"]
    claims = [
        Claim(
            "clips of noise in [0, 1], largest error of the Haar round trip",
            float(back), "<= 1e-5", bool(back <= 1e-5),
        ),
        Claim(
            "FLOPs of LeanVAE over those of the 3-D convolutions, equal latents",
            ratio, "<= 0.2", ratio <= 0.2,
        ),
        Claim(
            "held-out clips, PSNR of the 3-D convolutions minus LeanVAE's, dB, mean "
            "over seeds",
            float(lost.mean()), "<= 1", bool(lost.mean() <= 1.0), stderr(lost),
        ),
    ]  # fmt: skip
    plain = -10.0 * np.log10(np.mean(np.square(test - x.mean(axis=0))))
    metrics, rows = {"mean_clip/psnr": float(plain)}, []
    for name, label in NAMES.items():
        values, spread = psnr[name], found[name][2]
        metrics |= {
            f"{name}/psnr": float(values.mean()), f"{name}/flops": flops[name],
            f"{name}/latent_std": float(spread.mean()),
        }  # fmt: skip
        cells = (
            f"{values.mean():.2f} ± {stderr(values):.2f}",
            f"{flops[name] / 1e6:.2f}",
        )
        rows.append((label, *cells, f"{spread.mean():.2f}"))
    run.table(
        f"Held-out clips, {config.seeds} seeds",
        ("model", "PSNR, dB", "MFLOPs per clip", "std of latent means"), rows,
    )  # fmt: skip
    shown = [test[0], *(found[name][1][0] for name in NAMES)]
    return Report(claims, metrics, pictures(config, run, psnr, flops, shown))


if __name__ == "__main__":
    experiment(main, PRESETS)
