"""What a training step of a VAE costs: its bound, gradient and Adam's update.

Claims: with 50 samples per image a step takes at most 0.85 of the time of plain PyTorch
and 0.65 of pythae's, and so with 1 sample; an MLP of 784-200-200-50 and back, batches
of 100 images.

    pip install torch pythae
    python -m experiments.bench.vae full     # half a minute on 2 quiet cores

Measured on 2 cores with AVX-512, jax 0.12.0, torch 2.14: with 50 samples 0.67 of
PyTorch's time and 0.61 of pythae's (50 ms, 74 and 82), with one 0.51 and 0.52.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.bench import _timing as timing
from jaxzoo.core.stats import bernoulli_log_prob, normal_kl, normal_log_prob
from jaxzoo.nn.mlp import MLP, GaussianMLP
from jaxzoo.training.command import experiment
from jaxzoo.training.record import Claim, Report, Run
from jaxzoo.vae.iwae import iwae_loss
from jaxzoo.vae.vae import elbo, reparameterize

OURS, TORCH, PYTHAE = "jaxzoo", "torch", "pythae"
BOUNDS = {TORCH: 0.85, PYTHAE: 0.65}


@dataclasses.dataclass(frozen=True)
class Config:
    pixels: int = 784
    hidden: int = 200
    latents: int = 50
    batch_size: int = 100
    samples_per_image: tuple[int, ...] = (1, 50)
    samples: int = 7
    """Quiet ones of each contestant."""
    seconds: float = 0.25
    """Of one sample."""
    patience: float = 120.0
    """Seconds to wait for quiet."""
    noise: float = 0.12
    """Of a core, used by others."""
    record: bool = True
    """Also writes experiments/results/bench/vae_cpu.json."""


PRESETS = {
    "smoke": Config(
        pixels=12, hidden=8, latents=3, batch_size=4, samples_per_image=(1, 3),
        samples=2, seconds=0.01, patience=0.5, record=False,
    ),
    "full": Config(),
}  # fmt: skip


class Fit:
    """Networks with fixed first weights, a batch, and the loss for given noise."""

    def __init__(self, config: Config):
        self.config = config
        hidden = config.hidden, config.hidden
        self.encoder = GaussianMLP(config.latents, hidden)
        self.decoder = MLP((*hidden, config.pixels))
        keys = jax.random.split(jax.random.key(0), 3)
        shape = config.batch_size, config.pixels
        self.x = jax.random.bernoulli(keys[0], 0.3, shape).astype(jnp.float32)
        self.params: Any = (
            self.encoder.init(keys[1], self.x),
            self.decoder.init(keys[2], jnp.zeros((1, config.latents))),
        )

    def loss(self, params: Any, x: jax.Array, noise: jax.Array) -> jax.Array:
        """Of noise `[k, batch, latents]`: the ELBO for k = 1, else IWAE's bound."""
        codes: Any = self.encoder.apply(params[0], x)
        mean, log_std = codes
        z = mean[None] + jnp.exp(log_std)[None] * noise
        # One product over all samples: [k * batch, latents].
        logits: Any = self.decoder.apply(params[1], z.reshape(-1, z.shape[-1]))
        log_p = bernoulli_log_prob(x, logits.reshape(*z.shape[:2], -1))
        if len(noise) == 1:
            return -jnp.mean(elbo(log_p[0], normal_kl(mean, log_std)))
        log_w = log_p + normal_log_prob(z) - normal_log_prob(z, mean, log_std)
        return iwae_loss(log_w)[0]

    def step(self, samples: int) -> Callable[[], Any]:
        optimizer = optax.adam(1e-3)

        def step(params: Any, state: Any, key: jax.Array, x: jax.Array) -> Any:
            keys = jax.random.split(key)
            zeros = jnp.zeros((len(x), self.config.latents))
            noise = reparameterize(keys[0], zeros, zeros, num_samples=samples)
            value, grads = jax.value_and_grad(self.loss)(params, x, noise)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, keys[1], value

        jitted = jax.jit(step, donate_argnums=(0, 1, 2))
        params = jax.tree.map(jnp.copy, self.params)
        held = [params, optimizer.init(params), jax.random.key(1)]

        def call() -> Any:
            *held[:], value = jax.block_until_ready(jitted(*held, self.x))
            return value

        return call

    def weights(self) -> tuple[Any, Any]:
        """Kernels and biases of encoder and decoder, layer by layer."""

        def of(net: Any) -> Any:
            dense = [net[f"Dense_{i}"] for i in range(len(net))]
            return [tuple(np.asarray(d[k]) for k in ("kernel", "bias")) for d in dense]

        encoder, decoder = self.params
        return of(encoder["params"]["MLP_0"]), of(decoder["params"])


def contestants(config: Config, samples: int) -> dict[str, Callable[[], Any]]:
    """Steps by name, after their losses have been compared."""
    fit = Fit(config)
    calls = {OURS: fit.step(samples)}
    shape = samples, config.batch_size, config.latents
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    loss = jax.jit(fit.loss)
    try:
        from experiments.bench import _torch_vae as peers
    except ImportError:
        return calls
    knobs = {"samples": samples, "latents": config.latents}
    calls[TORCH], value = peers.training_step(np.array(fit.x), *fit.weights(), **knobs)
    ours, theirs = float(loss(fit.params, fit.x, noise)), value(noise)
    if abs(ours / theirs - 1.0) > 1e-4:
        raise ArithmeticError(f"{OURS} has a loss of {ours}, {TORCH} of {theirs}.")
    try:
        calls[PYTHAE], draw = peers.pythae_step(
            np.array(fit.x), *fit.weights(), **knobs
        )
    except ImportError:
        return calls
    theirs = float(np.mean([draw() for _ in range(10)]))
    if abs(ours / theirs - 1.0) > 0.01:
        raise ArithmeticError(f"{OURS} has a loss of {ours}, {PYTHAE} of {theirs}.")
    return calls


def main(config: Config, run: Run) -> Report:
    claims, rows = [], []
    metrics: dict[str, float] = {"load_before": os.getloadavg()[0]}
    for samples in config.samples_per_image:
        calls = contestants(config, samples)
        measured = timing.measure(
            calls, samples=config.samples, seconds=config.seconds,
            patience=config.patience, noise=config.noise,
        )  # fmt: skip
        metrics[f"{samples}/quiet"] = measured["quiet"]
        ours = measured[OURS]["median"]
        for who in calls:
            median, least = measured[who]["median"], measured[who]["min"]
            head = f"{samples}/{who}"
            metrics |= {f"{head}/median_ms": median, f"{head}/min_ms": least}
            rows.append(
                (f"{who}, {samples}", f"{median:.2f}", f"{least:.2f}",
                 f"{ours / median:.2f}")
            )  # fmt: skip
            if who in BOUNDS and measured["quiet"] >= timing.QUIET:
                ratio = ours / median
                metrics[f"{head}/ratio"] = ratio
                claims.append(
                    Claim(
                        f"training step, {samples} samples per image: our time over "
                        f"that of {who}",
                        ratio, f"<= {BOUNDS[who]:g}", ratio <= BOUNDS[who],
                    )
                )  # fmt: skip
    run.table("Training steps", ("", "median (ms)", "min (ms)", "ours / it"), rows)
    if config.record:
        path = timing.RESULTS / "vae_cpu.json"
        timing.write_record(path, dataclasses.asdict(config), claims, metrics)
    return Report(claims, metrics, [])


if __name__ == "__main__":
    experiment(main, PRESETS)
