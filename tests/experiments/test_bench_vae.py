"""The bench of training steps of VAEs at a tiny shape."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import vae as bench
from jaxzoo.training.record import Run

TINY = bench.PRESETS["smoke"]


def test_what_is_measured_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.timing, "RESULTS", tmp_path)
    config = dataclasses.replace(TINY, samples_per_image=(3,), record=True)
    run = Run(
        tmp_path / "run", topic="bench", slug="vae", title="", preset="smoke",
        config=config,
    )  # fmt: skip
    report: Any = bench.main(config, run)
    assert (tmp_path / "vae_cpu.json").exists()
    assert report.metrics["3/jaxzoo/median_ms"] > 0


@pytest.mark.parametrize("samples", [1, 3])
def test_the_loss_is_that_of_the_bound(samples):
    fit = bench.Fit(TINY)
    encoder, decoder = fit.weights()
    x = np.asarray(fit.x, np.float64)
    shape = samples, TINY.batch_size, TINY.latents
    noise = np.random.default_rng(0).normal(size=shape)

    def layers(x, weights):
        for kernel, bias in weights[:-1]:
            x = np.tanh(x @ kernel + bias)
        return x @ weights[-1][0] + weights[-1][1]

    mean, log_std = np.split(layers(x, encoder), 2, axis=-1)
    z = mean + np.exp(log_std) * noise
    p = 1.0 / (1.0 + np.exp(-layers(z, decoder)))
    log_p = np.sum(x * np.log(p) + (1.0 - x) * np.log1p(-p), axis=-1)
    if samples == 1:
        kl = 0.5 * (mean**2 + np.exp(2.0 * log_std) - 1.0) - log_std
        expected = np.mean(kl.sum(-1) - log_p[0])
    else:
        log_w = log_p + np.sum(0.5 * (noise**2 - z**2) + log_std, axis=-1)
        expected = -np.mean(np.log(np.mean(np.exp(log_w), axis=0)))
    got = fit.loss(fit.params, fit.x, jnp.asarray(noise, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_steps_go_on_from_the_last_one():
    call = bench.Fit(TINY).step(3)
    losses = [float(jax.device_get(call())) for _ in range(150)]
    assert np.mean(losses[-20:]) < np.mean(losses[:20])
