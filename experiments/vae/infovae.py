"""InfoVAE: an autoregressive decoder ignores its code by the ELBO, not by MMD-VAE.

Claims: on binary digits, with a decoder that sees all pixels before, the code of a VAE
trained by the ELBO has less than 0.1 nats of mutual information with the image, that
of an MMD-VAE more than 1; with alpha = 0, lam = 1 the loss is minus the ELBO to 1e-6.

    python -m experiments.vae.infovae full    # 3 seeds: a minute

Expected: 0.03 nats by the ELBO, 2.3 by MMD-VAE (1.2 on the worst seed). The code's
weights start at 0; with random ones the ELBO model keeps about 0.7 nats or more. With
alpha = 0 and lam = 100, also shown, the code is ignored as by the ELBO.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.core.stats import bernoulli_log_prob, normal_kl
from jaxzoo.data.digits import flat_digits
from jaxzoo.nn.mlp import GaussianMLP
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import descend
from jaxzoo.vae.infovae import (
    infovae_loss,
    log_det_covariance,
    mutual_information,
    prior_divergence,
)
from jaxzoo.vae.vae import elbo

KINDS = ("ELBO", "InfoVAE", "MMD-VAE")


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    first_seed: int = 0
    latents: int = 2
    hidden: int = 128
    steps: int = 1000
    batch_size: int = 100
    learning_rate: float = 3e-3
    lam: float = 100.0
    draws: int = 4  # per example, for mutual information

    def __post_init__(self):
        if self.seeds < 2 or self.batch_size < 2 or self.lam < 1.0:
            raise ValueError("seeds >= 2, batch-size >= 2, lam >= 1, please")


PRESETS = {
    "smoke": Config(seeds=2, hidden=8, steps=10, batch_size=8, draws=1),
    "full": Config(),
}  # fmt: skip


class Autoregressive(nn.Module):
    """Logits of each pixel from a code and the pixels before it.

    Two masked hidden layers, whose units see the first pixels up to a place of their
    own, and beside them a linear path of the pixels and one of the code, which starts
    at 0: the decoder begins as a model of images alone.
    """

    hidden: int

    @nn.compact
    def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
        pixels = x.shape[1]
        place = np.arange(pixels)
        before = (place[:, None] < place[None]).astype(np.float32)
        units = np.arange(self.hidden) * pixels // self.hidden
        init = nn.initializers.lecun_normal()
        x = 2.0 * x - 1.0
        # Units of place k see pixels below k; later layers may see their own place.
        h, seen = x, place + 1
        for i in range(2):
            kernel = self.param(f"kernel_{i}", init, (len(seen), self.hidden))
            bias = self.param(f"bias_{i}", nn.initializers.zeros, (self.hidden,))
            h = jnp.tanh(h @ (kernel * (seen[:, None] <= units[None])) + bias[None])
            seen = units
        kernel = self.param("out", init, (self.hidden, pixels))
        logits = h @ (kernel * (seen[:, None] <= place[None]))
        linear = self.param("linear", nn.initializers.zeros, (pixels, pixels))
        logits += x @ (linear * before)
        return logits + nn.Dense(pixels, kernel_init=nn.initializers.zeros)(z)


def one_model(config: Config, key: Any, weights: Any, x: Any, test: Any) -> Any:
    """Trains by alpha and lam; figures over all training and test images."""
    encoder = GaussianMLP(config.latents, (64,))
    decoder = Autoregressive(config.hidden)
    keys = jax.random.split(key, 7)

    def run(params: Any, key: jax.Array, x: jax.Array) -> Any:
        codes: Any = encoder.apply(params[0], x)
        mean, log_std = codes
        z = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
        logits: Any = decoder.apply(params[1], z, x)
        return bernoulli_log_prob(x, logits), normal_kl(mean, log_std), z, mean, log_std

    def loss(params: Any, key: jax.Array) -> jax.Array:
        rows_key, bits_key, noise_key, prior_key = jax.random.split(key, 4)
        rows = len(x) * jax.random.uniform(rows_key, (config.batch_size,))
        # Pixels are probabilities: a new binary image at every step.
        image = jax.random.bernoulli(bits_key, x[rows.astype(int)]).astype(x.dtype)
        log_p, kl, z, *_ = run(params, noise_key, image)
        divergence = prior_divergence(prior_key, z)
        return infovae_loss(log_p, kl, divergence, alpha=weights[0], lam=weights[1])[0]

    origin = jnp.zeros((1, config.latents))
    start: Any = encoder.init(keys[0], x[:1]), decoder.init(keys[1], origin, x[:1])
    params = descend(loss, start, config.learning_rate, keys[2], config.steps)
    found = {}
    for name, grey in (("train", x), ("test", test)):
        images = jax.random.bernoulli(keys[6], grey).astype(grey.dtype)
        log_p, kl, z, mean, log_std = run(params, keys[3], images)
        information, aux = mutual_information(
            keys[4], mean, log_std, num_samples=config.draws
        )
        found[name] = {
            "information": information, "sampling_error": aux["stderr"],
            "reconstruction": -jnp.mean(log_p), "kl": jnp.mean(kl),
            "log_det": log_det_covariance(z), "mmd": prior_divergence(keys[5], z),
        }  # fmt: skip
        if name == "test":
            # Twice the same number, by two ways.
            bound = jnp.mean(elbo(log_p, kl))
            own, _ = infovae_loss(log_p, kl, found[name]["mmd"], alpha=0.0, lam=1.0)
            found[name]["elbo_error"] = jnp.abs(own + bound) / jnp.abs(bound)
    return found, z


def measured(config: Config) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """By kind figures `[seeds]` and the first seed's test codes; test labels."""
    (x, _), (test, label) = flat_digits()
    lam = config.lam
    weights = np.asarray([(0.0, 1.0), (0.0, lam), (1.0, lam)], np.float32)

    @jax.jit
    def every(seeds: Any, weights: Any, x: Any, test: Any) -> Any:
        keys = jax.vmap(jax.random.key)(seeds)
        count = len(keys)
        order = jnp.tile(keys, len(KINDS)), jnp.repeat(weights, count, axis=0)
        found, z = lax.map(lambda a: one_model(config, a[0], a[1], x, test), order)
        shape = len(KINDS), count
        return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), found), z[
            ::count
        ]

    seeds = config.first_seed + np.arange(config.seeds)
    found, z = jax.device_get(every(seeds, weights, x, test))
    results = {
        kind: {
            f"{part}/{name}": values[i]
            for part, figures in found.items() for name, values in figures.items()
        }
        for i, kind in enumerate(KINDS)
    }  # fmt: skip
    return results, dict(zip(KINDS, z, strict=True)), label


def picture(config: Config, run: Run, results: Any, codes: Any, labels: Any) -> Figure:
    figure, axes = panels(3, width=3.9)
    place = np.arange(len(KINDS))
    for i, part in enumerate(("train", "test")):
        own = [results[kind][f"{part}/information"] for kind in KINDS]
        axes[0].bar(
            place + 0.4 * i - 0.2, np.mean(own, axis=1), 0.38,
            yerr=[stderr(v) for v in own], color=COLORS[i], capsize=3, label=part,
        )  # fmt: skip
    axes[0].set(ylabel="I(x; z) (nats)", xlabel="trained by")
    axes[0].set_xticks(place, KINDS)
    axes[0].legend(frameon=False, fontsize=8)
    for ax, kind in zip(axes[1:], ("ELBO", "MMD-VAE"), strict=True):
        for i, digit in enumerate((0, 1, 4, 7)):
            own = codes[kind][labels == digit]
            ax.scatter(
                own[:, 0], own[:, 1], s=14, color=COLORS[i], marker="osD^"[i],
                label=str(digit), alpha=0.7,
            )  # fmt: skip
        ax.set(xlabel="z_1 (prior std)", ylabel="z_2 (prior std)", title=kind)
        ax.legend(frameon=False, fontsize=8, title="digit")
    return run.figure(
        "infovae", figure, title="What a code tells of its image",
        caption="Left: mutual information, means and standard errors over "
        f"{config.seeds} seeds. Others: codes of test digits, first seed.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    results, codes, labels = measured(config)
    plain, ours = (results[k]["train/information"] for k in ("ELBO", "MMD-VAE"))
    error = max(float(r["test/elbo_error"].max()) for r in results.values())
    most, least = float(plain.max()), float(ours.min())
    claims = [
        Claim(
            "I(x; z) of the VAE trained by the ELBO, training images, worst seed, nats",
            most, "< 0.1", most < 0.1, stderr(plain),
        ),
        Claim(
            "I(x; z) of the MMD-VAE, training images, worst seed, nats",
            least, "> 1", least > 1.0, stderr(ours),
        ),
        Claim(
            "alpha = 0, lam = 1: largest difference to the negative ELBO, relative",
            error, "<= 1e-6", error <= 1e-6,
        ),
    ]  # fmt: skip
    metrics, rows = {}, []
    names = [n for n in results["ELBO"] if not n.endswith("error")]
    for kind, found in results.items():
        metrics |= {f"{kind}/{name}": float(found[name].mean()) for name in found}
        cells = [f"{found[n].mean():.3g} ± {stderr(found[n]):.1g}" for n in names]
        rows.append((kind, *cells))
    transposed = list(zip(names, *(row[1:] for row in rows), strict=True))
    run.table(f"Digits, {config.seeds} seeds", ("figure", *KINDS), transposed)
    return Report(claims, metrics, [picture(config, run, results, codes, labels)])


if __name__ == "__main__":
    experiment(main, PRESETS)
