"""Importance weighted autoencoders: tighter bounds, and models trained by them.

Claims: on a linear-Gaussian model L_1 <= L_5 <= L_50 <= log p(x) and L_5000 is within
0.02 nat of the exact value; the STL and DReG gradients of the inference network are
unbiased and lose their variance at the true posterior; training by L_50 gives a
held-out log-likelihood no lower than training by the ELBO.

    python -m experiments.vae.iwae full    # 8x8 digits, 5 seeds: 1 minute on 2 cores
    python -m experiments.vae.iwae demo    # Fashion-MNIST, 3 seeds: 1 minute
    python -m experiments.vae.iwae full --stochastic-layers 2

Expected: L_50 training gains 0.4 nats on ELBO training in `full`, 2.3 in `demo`.
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
from experiments.vae._iwae_closed_forms import bound_of, linear_gaussian_claims
from jaxzoo.core.stats import bernoulli_log_prob, normal_log_prob
from jaxzoo.data.digits import digits
from jaxzoo.data.fashion_mnist import fashion_mnist
from jaxzoo.nn.mlp import MLP, GaussianMLP
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.plots import curves, image_grid, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import init_state, update_step
from jaxzoo.vae.iwae import (
    active_units,
    importance_log_likelihood,
    iwae_loss,
    log_weights,
)
from jaxzoo.vae.vae import reparameterize


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: Literal["digits", "fashion_mnist"] = "digits"
    samples: tuple[int, ...] = (1, 5, 50)  # k of the bounds that are trained; 1 = ELBO
    seeds: int = 5
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 2e-3
    latents: int = 16
    hidden: int = 64
    stochastic_layers: Literal[1, 2] = 1
    eval_samples: int = 1000  # k of the importance-sampled log-likelihood
    eval_examples: int = 297
    gradient_draws: int = 20_000  # for the claims on the estimators

    def __post_init__(self):
        if self.eval_samples % 50 or min(self.samples) < 1 or self.seeds < 2:
            raise ValueError(
                "eval-samples in fifties, samples >= 1, seeds >= 2, please"
            )


PRESETS = {
    "smoke": Config(
        samples=(1, 5), seeds=2, steps=20, eval_samples=100, eval_examples=50,
        gradient_draws=2000,
    ),
    "full": Config(),
    "demo": Config(
        dataset="fashion_mnist", seeds=3, steps=1200, batch_size=32, learning_rate=3e-3,
        latents=8, hidden=100, eval_samples=500, eval_examples=400,
    ),
}  # fmt: skip


def networks(config: Config, pixels: int) -> dict[str, Any]:
    """The encoder of each stochastic layer, the prior between them, the decoder."""
    latents, hidden = config.latents, config.hidden
    nets = {
        "encoder": GaussianMLP(latents, (hidden,)),
        "decoder": MLP((hidden, pixels)),
    }
    if config.stochastic_layers == 2:
        nets["upper_encoder"] = GaussianMLP(latents // 2, (hidden,))
        nets["lower_prior"] = GaussianMLP(latents, (hidden,))
    return nets


def init_params(nets: dict[str, Any], key: jax.Array, pixels: int) -> dict[str, Any]:
    latents = nets["encoder"].latents
    widths = {"encoder": pixels, "lower_prior": latents // 2}
    keys = jax.random.split(key, len(nets))
    return {
        name: net.init(k, jnp.zeros((1, widths.get(name, latents))))
        for (name, net), k in zip(nets.items(), keys, strict=True)
    }


def log_weight(nets, params, x: jax.Array, key: jax.Array) -> jax.Array:
    """log p(x, z) - log q(z|x) of one draw per example, [B]."""
    net = {name: functools.partial(nets[name].apply, params[name]) for name in nets}
    keys = jax.random.split(key)
    mean, log_std = net["encoder"](x)
    z = reparameterize(keys[0], mean, log_std)[0]
    log_w = bernoulli_log_prob(x, net["decoder"](z)) - normal_log_prob(z, mean, log_std)
    if "upper_encoder" not in net:
        return log_w + normal_log_prob(z)
    upper_mean, upper_log_std = net["upper_encoder"](z)
    upper = reparameterize(keys[1], upper_mean, upper_log_std)[0]
    log_w += normal_log_prob(z, *net["lower_prior"](upper)) + normal_log_prob(upper)
    return log_w - normal_log_prob(upper, upper_mean, upper_log_std)


def images(config: Config) -> tuple[Any, np.float32, np.ndarray]:
    """The training source, the scale of its pixels, and flat test images in [0, 1]."""
    data = digits() if config.dataset == "digits" else fashion_mnist()
    scale = np.float32(16 if config.dataset == "digits" else 255)
    # Every n-th test image: the shipped Fashion-MNIST lies sorted by class.
    test = data.split("test").arrays["image"]
    chosen = np.linspace(0, len(test) - 1, config.eval_examples).astype(int)
    return data.split("train"), scale, test[chosen].reshape(len(chosen), -1) / scale


def fit(config: Config, run: Run, nets, source, scale) -> dict[int, Any]:
    """Trains by each bound from the same start, all seeds at once."""
    pixels = int(np.prod(source[0]["image"].shape))

    def loss(k, params, key, grey):
        noise_key, sample_key = jax.random.split(key)
        # Pixels are probabilities: a new binary image at every step.
        x = jax.random.bernoulli(noise_key, grey).astype(jnp.float32)
        draw = functools.partial(log_weight, nets, params, x)
        value, _ = iwae_loss(log_weights(sample_key, draw, num_samples=k))
        return value, {"bound": -value}

    data = SeedBatches(source, config.seeds, config.batch_size)

    def batches(t: int) -> np.ndarray:
        return data.at(t)["image"].reshape(data.seeds, data.size, -1) / scale

    optimizer = optax.adam(config.learning_rate)

    def start_one(seed):
        init_key, run_key = jax.random.split(jax.random.key(seed))
        return init_state(run_key, init_params(nets, init_key, pixels), optimizer)

    def start():
        return jax.vmap(start_one)(jnp.arange(config.seeds))

    fits = {}
    for k in config.samples:
        objective = functools.partial(loss, k)
        step = update_step(objective, optimizer, reproducible=run.options.reproducible)
        state = train(
            run, f"k{k}", jax.vmap(step), start, batches, num_steps=config.steps,
            show="bound", batch_axis=1, ids=data.ids,
        )  # fmt: skip
        fits[k] = local(state["params"])
    return fits


def evaluate(config: Config, nets, grey: np.ndarray, params) -> dict[str, jax.Array]:
    """Held-out figures of one seed, on one fixed binarisation of the test images."""
    x = jax.random.bernoulli(jax.random.key(1), grey).astype(jnp.float32)
    draw = functools.partial(log_weight, nets, params, x)
    log_w = log_weights(
        jax.random.key(2), draw, num_samples=config.eval_samples, chunk=25
    )
    estimate, aux = importance_log_likelihood(log_w)
    mean, _ = nets["encoder"].apply(params["encoder"], x)
    return {
        "log_likelihood": jnp.mean(estimate),
        "sampling_error": jnp.sqrt(jnp.sum(aux["stderr"] ** 2)) / len(estimate),
        "active_units": jnp.sum(active_units(mean)),
        **{f"L_{k}": jnp.mean(bound_of(log_w, k)) for k in (1, 5, 50)},
    }


def pictures(config: Config, run: Run, nets, fits, results, grey) -> list[Figure]:
    side = int(grey.shape[1] ** 0.5)
    labels = {k: "ELBO" if k == 1 else f"IWAE k={k}" for k in fits}
    rows = [grey[:: max(1, len(grey) // 12)][:12]]
    first = {k: jax.tree.map(lambda p: p[0], params) for k, params in fits.items()}

    @jax.jit
    def decode(params, z):
        return sigmoid(nets["decoder"].apply(params["decoder"], z))

    @jax.jit
    def posterior_mean(params, x):
        return nets["encoder"].apply(params["encoder"], x)[0]

    def grid(rows, names):
        return image_grid([np.reshape(r, (-1, side, side)) for r in rows], names)

    rows += [decode(p, posterior_mean(p, rows[0])) for p in first.values()]
    upper = jax.random.normal(jax.random.key(3), (12, config.latents))
    if config.stochastic_layers == 2:
        above = upper[:, : config.latents // 2]
    drawn, between = [], []
    for params in first.values():
        z = upper
        if config.stochastic_layers == 2:
            mean, log_std = nets["lower_prior"].apply(params["lower_prior"], above)
            z = mean + jnp.exp(log_std) * upper
        drawn.append(decode(params, z))
        ends = posterior_mean(params, rows[0][np.array([1, 10])])
        way = jnp.linspace(0.0, 1.0, 12)[:, None]
        between.append(decode(params, (1 - way) * ends[:1] + way * ends[1:]))

    figure, (left, right) = panels(2)
    history = {k: run.history(f"k{k}") for k in fits}
    per_objective = {labels[k]: (h["step"], h["bound"]) for k, h in history.items()}
    curves(left, per_objective, xlabel="step", ylabel="training bound, own k (nats)")
    flat = np.concatenate(
        [h["bound"][len(h["bound"]) // 8 :] for h in history.values()]
    )
    left.set_ylim(flat.min(), flat.max() + 0.1 * np.ptp(flat) + 1e-3)
    ks = (1, 5, 50, config.eval_samples)
    held_out = {
        f"trained by {labels[k]}": (
            ks,
            np.stack([*(r[f"L_{j}"] for j in ks[:3]), r["log_likelihood"]]),
        )
        for k, r in results.items()
    }
    curves(
        right, held_out, xlabel="k of the bound", ylabel="held-out L_k (nats)",
        points=True,
    )  # fmt: skip
    right.set(xscale="log", xticks=ks, xticklabels=ks)
    right.minorticks_off()
    seeds = f"mean and standard error over {config.seeds} seeds"
    names = list(labels.values())
    return [
        run.figure(
            "bounds", figure, title="Bounds",
            caption=f"Training and held-out bounds, {seeds}.",
        ),
        run.figure(
            "reconstructions", grid(rows, ["data", *names]), title="Reconstructions",
            caption="Held-out images, and the decoder's mean at the posterior mean.",
        ),
        run.figure(
            "samples", grid(drawn, names), title="Samples",
            caption="The decoder's mean at draws from the prior, the same for all.",
        ),
        run.figure(
            "interpolations", grid(between, names), title="Interpolations",
            caption="Straight lines between the codes of two held-out images.",
        ),
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    claims, metrics = linear_gaussian_claims(config)
    source, scale, grey = images(config)
    nets = networks(config, grey.shape[1])
    fits = fit(config, run, nets, source, scale)
    held_out = functools.partial(evaluate, config, nets, grey)
    every_seed = jax.jit(lambda params: lax.map(held_out, params))
    results = {k: jax.device_get(every_seed(params)) for k, params in fits.items()}

    rows = []
    for k, r in results.items():
        bound = r[f"L_{k}"] if f"L_{k}" in r else r["log_likelihood"]
        rows.append((
            "ELBO" if k == 1 else f"IWAE k={k}",
            f"{bound.mean():.2f}",
            f"{r['log_likelihood'].mean():.2f} ± {stderr(r['log_likelihood']):.2f}",
            f"{r['sampling_error'].mean():.2f}",
            f"{r['active_units'].mean():.1f} of {config.latents}",
        ))  # fmt: skip
        metrics |= {f"k{k}/{name}": value.mean() for name, value in r.items()}
        metrics[f"k{k}/log_likelihood_stderr"] = stderr(r["log_likelihood"])
    run.table(
        f"Held-out {config.dataset}, {config.seeds} seeds",
        ("trained by", "its bound", f"log p(x), L_{config.eval_samples} (nats)",
         "sampling error", "active units"),
        rows,
    )  # fmt: skip
    low, high = min(config.samples), max(config.samples)
    gain = results[high]["log_likelihood"] - results[low]["log_likelihood"]
    claims.append(
        Claim(
            f"{config.dataset}: held-out L_{config.eval_samples} of k={high} training "
            f"minus that of k={low}, nats",
            float(gain.mean()), ">= 0", bool(gain.mean() >= 0), stderr(gain),
        )
    )  # fmt: skip
    return Report(claims, metrics, pictures(config, run, nets, fits, results, grey))


if __name__ == "__main__":
    experiment(main, PRESETS)
