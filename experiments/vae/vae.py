"""Auto-Encoding Variational Bayes: the ELBO, its gradient, and wake-sleep beside it.

Claims: on a linear-Gaussian model the ELBO lies below the exact log p(x) and reaches it
at the true posterior; pathwise gradients are unbiased and have a tenth of the variance
of score-function gradients or less; on digits the VAE's held-out ELBO exceeds that of
wake-sleep after as many steps.

    python -m experiments.vae.vae full    # 8x8 digits, 5 seeds: half a minute, 2 cores

Expected of `full`: the score-function gradient has 38 times the variance or more, and
the VAE is ahead by 0.09 nats.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.nn import sigmoid

from experiments._batches import SeedBatches
from experiments.vae._linear_gaussian import (
    exact_moments,
    gradient_moments,
    score,
    settings,
)
from jaxzoo.core.stats import bernoulli_log_prob, normal_kl, normal_log_prob
from jaxzoo.data.digits import digits
from jaxzoo.nn.mlp import MLP, GaussianMLP
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.plots import curves, image_grid, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.step import init_state, update_step
from jaxzoo.vae.vae import (
    corrupt,
    elbo,
    latent_usage,
    reparameterize,
    score_function_elbo,
    wake_sleep_losses,
)

Method = Literal["vae", "wake_sleep", "autoencoder", "denoising"]


@dataclasses.dataclass(frozen=True)
class Config:
    methods: tuple[Method, ...] = ("vae", "wake_sleep", "autoencoder", "denoising")
    seeds: int = 5
    steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 1e-3
    latents: int = 8
    hidden: int = 64
    gradient_draws: int = 20_000  # for the claims on the estimators
    eval_samples: int = 200  # draws of z per held-out image

    def __post_init__(self):
        if self.seeds < 2 or not {"vae", "wake_sleep"} <= set(self.methods):
            raise ValueError("seeds >= 2, and methods with vae and wake_sleep, please")


PRESETS = {
    "smoke": Config(
        methods=("vae", "wake_sleep"), seeds=2, steps=20, gradient_draws=2000,
        eval_samples=10,
    ),
    "full": Config(),
}  # fmt: skip


def networks(config: Config) -> dict[str, Any]:
    return {
        "encoder": GaussianMLP(config.latents, (config.hidden,)),
        "decoder": MLP((config.hidden, 64)),
    }


def loss(method: Method, nets, params, key: jax.Array, grey: jax.Array):
    """The training loss of each method on a batch of grey images [B, 64]."""
    keys = jax.random.split(key, 4)
    x = jax.random.bernoulli(keys[0], grey).astype(jnp.float32)
    encode = functools.partial(nets["encoder"].apply, params["encoder"])
    decode = functools.partial(nets["decoder"].apply, params["decoder"])
    stop = lax.stop_gradient
    if method == "wake_sleep":
        z = stop(reparameterize(keys[1], *encode(x))[0])
        log_joint = bernoulli_log_prob(x, decode(z)) + normal_log_prob(z)
        dream_z = jax.random.normal(keys[2], z.shape)
        pixels = jax.random.bernoulli(keys[3], sigmoid(stop(decode(dream_z))))
        log_posterior = normal_log_prob(dream_z, *encode(pixels.astype(jnp.float32)))
        losses = wake_sleep_losses(log_joint, log_posterior)
        return losses.generative + losses.recognition, {"objective": -losses.generative}
    mean, log_std = encode(corrupt(keys[1], x) if method == "denoising" else x)
    beta = 1.0 if method == "vae" else 0.0
    z = reparameterize(keys[2], mean, log_std)[0] if method == "vae" else mean
    bound = elbo(
        bernoulli_log_prob(x, decode(z)), normal_kl(mean, log_std), beta=beta
    ).mean()
    return -bound, {"objective": bound}


def init(config: Config, nets, optimizer, seed: jax.Array) -> Any:
    """The training state before the first step."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "encoder": nets["encoder"].init(keys[0], jnp.zeros((1, 64))),
        "decoder": nets["decoder"].init(keys[1], jnp.zeros((1, config.latents))),
    }
    return init_state(keys[2], params, optimizer)


def fit(config: Config, run: Run, nets) -> dict[str, Any]:
    """Trains each method from the same start, all seeds at once."""
    data = SeedBatches(digits().split("train"), config.seeds, config.batch_size)

    def batches(t: int) -> np.ndarray:
        return data.at(t)["image"].reshape(data.seeds, -1, 64) / np.float32(16)

    optimizer = optax.adam(config.learning_rate)

    def start():
        one = functools.partial(init, config, nets, optimizer)
        return jax.vmap(one)(jnp.arange(config.seeds))

    fits = {}
    for method in config.methods:
        objective = functools.partial(loss, method, nets)
        step = update_step(objective, optimizer, reproducible=run.options.reproducible)
        state = train(
            run, method, jax.vmap(step), start, batches, num_steps=config.steps,
            show="objective", batch_axis=1, ids=data.ids,
        )  # fmt: skip
        fits[method] = local(state["params"])
    return fits


def evaluate(config: Config, nets, grey: np.ndarray, params) -> dict[str, jax.Array]:
    """Held-out figures of one seed, on one fixed binarisation of the test images."""
    x = jax.random.bernoulli(jax.random.key(1), grey).astype(jnp.float32)
    mean, log_std = nets["encoder"].apply(params["encoder"], x)

    def bound(key):
        z = reparameterize(key, mean, log_std)[0]
        logits = nets["decoder"].apply(params["decoder"], z)
        return elbo(bernoulli_log_prob(x, logits), normal_kl(mean, log_std))

    keys = jax.random.split(jax.random.key(2), config.eval_samples)
    logits = nets["decoder"].apply(params["decoder"], mean)
    usage = latent_usage(mean, log_std)
    return {
        "elbo": jnp.mean(lax.map(bound, keys)),
        "reconstruction": jnp.mean(bernoulli_log_prob(x, logits)),
        "kl_per_latent": jnp.sort(usage["kl"])[::-1],
        "active_units": jnp.sum(usage["variance_of_mean"] > 0.01),
    }


def pathwise(model, x, mean, log_std, key) -> jax.Array:
    z = reparameterize(key, mean, log_std)[0]
    return -jnp.mean(model.log_joint(x, z) - normal_log_prob(z, mean, log_std))


def score_function(model, x, mean, log_std, key) -> jax.Array:
    z = lax.stop_gradient(reparameterize(key, mean, log_std)[0])
    log_q = normal_log_prob(z, mean, log_std)
    return -jnp.mean(score_function_elbo(model.log_joint(x, z), log_q))


def linear_gaussian_claims(config: Config) -> tuple[list[Claim], dict[str, float]]:
    """What can be checked against a closed form."""

    def bounds(setting):
        model, x, key = setting
        mean, log_std = model.posterior(x)

        def gap(mean, log_std):
            z = reparameterize(key, mean, log_std, num_samples=500)
            bound = model.log_joint(x, z) - normal_log_prob(z, mean, log_std)
            return bound - model.log_marginal(x)[None]

        below = jnp.mean(gap(mean + 0.3, log_std + 0.2))
        return jnp.max(jnp.abs(gap(mean, log_std))), below

    stacked = settings(config.seeds)
    at_posterior, below = jax.device_get(jax.jit(lambda s: lax.map(bounds, s))(stacked))
    path, other = (
        gradient_moments(objective, stacked, config.gradient_draws, 0.2)
        for objective in (pathwise, score_function)
    )
    worst = score(path, exact_moments(stacked, 0.2))
    ratios = jax.device_get(other.variance.sum((1, 2)) / path.variance.sum((1, 2)))
    claims = [
        Claim(
            "linear-Gaussian: ELBO of an inexact encoder minus log p(x), largest over "
            "seeds, nats",
            float(below.max()), "< 0", bool(below.max() < 0),
        ),
        Claim(
            "linear-Gaussian: |ELBO - log p(x)| at the true posterior, worst, nats",
            float(at_posterior.max()), "<= 1e-4", bool(at_posterior.max() <= 1e-4),
        ),
        Claim(
            "pathwise gradients are unbiased: largest error in standard errors",
            worst, "<= 3", worst <= 3,
        ),
        Claim(
            "variance of score-function over pathwise gradients, smallest over seeds",
            float(ratios.min()), ">= 10", bool(ratios.min() >= 10),
        ),
    ]  # fmt: skip
    return claims, {"variance_ratio": ratios.mean(), "pathwise_score": worst}


def pictures(config: Config, run: Run, nets, fits, results, grey) -> list[Figure]:
    figure, (left, right) = panels(2)
    history = {m: run.history(m) for m in fits}
    bounds = {m: (h["step"], h["objective"]) for m, h in history.items()}
    curves(left, bounds, xlabel="step", ylabel="training objective (nats)")
    used = {
        m: (np.arange(1, config.latents + 1), r["kl_per_latent"].T)
        for m, r in results.items()
        if m in ("vae", "wake_sleep")
    }
    curves(
        right, used, xlabel="latent, sorted", ylabel="KL to the prior (nats)",
        points=True,
    )  # fmt: skip
    rows = [grey[:: len(grey) // 12][:12]]
    for params in fits.values():
        first = jax.tree.map(lambda p: p[0], params)
        mean, _ = nets["encoder"].apply(first["encoder"], rows[0])
        rows.append(np.asarray(sigmoid(nets["decoder"].apply(first["decoder"], mean))))
    grid = image_grid([r.reshape(-1, 8, 8) for r in rows], ["data", *fits])
    return [
        run.figure(
            "training", figure, title="Training and latent usage",
            caption="Objective of each method (wake-sleep: log p(x, z) of the wake "
            "phase, not a bound), and nats that each latent carries on held-out images;"
            f" mean and standard error over {config.seeds} seeds.",
        ),
        run.figure(
            "reconstructions", grid, title="Reconstructions",
            caption="Held-out digits, and the decoder's mean at the encoder's mean.",
        ),
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    claims, metrics = linear_gaussian_claims(config)
    nets = networks(config)
    grey = digits().split("test").arrays["image"].reshape(-1, 64) / np.float32(16)
    fits = fit(config, run, nets)
    held_out = functools.partial(evaluate, config, nets, grey)
    every_seed = jax.jit(lambda params: lax.map(held_out, params))
    results = {m: jax.device_get(every_seed(params)) for m, params in fits.items()}
    rows = []
    for method, r in results.items():
        # Without a divergence in the loss an auto-encoder's codes are no posterior.
        bounded = method in ("vae", "wake_sleep")
        rows.append((
            method,
            f"{r['elbo'].mean():.2f}" if bounded else "-",
            f"{r['reconstruction'].mean():.2f}",
            f"{r['active_units'].mean():.1f} of {config.latents}",
        ))  # fmt: skip
        metrics |= {
            f"{method}/{name}": r[name].mean()
            for name in ("elbo", "reconstruction", "active_units")
            if bounded or name != "elbo"
        }
    run.table(
        f"Held-out digits, {config.seeds} seeds",
        ("method", "ELBO (nats)", "log p(x | mean code) (nats)", "active units"),
        rows,
    )
    gain = results["vae"]["elbo"] - results["wake_sleep"]["elbo"]
    stderr = float(gain.std(ddof=1) / len(gain) ** 0.5)
    claims.append(
        Claim(
            f"digits: held-out ELBO of the VAE minus wake-sleep's after {config.steps} "
            "steps, nats",
            float(gain.mean()), "> 0", bool(gain.mean() > 0), stderr,
        )
    )  # fmt: skip
    return Report(claims, metrics, pictures(config, run, nets, fits, results, grey))


if __name__ == "__main__":
    experiment(main, PRESETS)
