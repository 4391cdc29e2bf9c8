"""The bench of optimizers at a tiny shape, and all optimizers side by side."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
from experiments.bench import _timing as timing  # noqa: E402
from experiments.bench import optim as bench  # noqa: E402
from experiments.optim import compare  # noqa: E402
from jaxzoo.distributed.one_bit_adam import one_bit_adam  # noqa: E402
from jaxzoo.training.record import Run  # noqa: E402


def test_what_is_measured_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    config = dataclasses.replace(
        bench.PRESETS["smoke"], only=("lion",), record=True, noise=100.0, samples=5,
        patience=60.0,
    )  # fmt: skip
    run = Run(
        tmp_path / "run", topic="bench", slug="optim", title="", preset="smoke",
        config=config,
    )  # fmt: skip
    report: Any = bench.main(config, run)
    assert (tmp_path / "optim_cpu.json").exists()
    claims = {claim.text: claim for claim in report.claims}
    assert "step: lion over optax.adamw" in claims
    assert claims["state of adam8bit over Adam's"].holds
    assert report.metrics["lion/state_bytes"] < 4.01
    assert report.metrics["1-bit Adam/cut"] >= 28


def test_a_call_takes_a_step_each_time():
    config = bench.PRESETS["smoke"]
    grads = [jax.numpy.asarray(x) for x in bench.leaves(config, 1)]
    call, size = bench.in_jax(config, optax.sgd(0.5, momentum=0.9), grads)
    call()
    params = call()
    start = bench.leaves(config, 0)[0]
    wanted = start - 0.5 * (1.0 + 1.9) * bench.leaves(config, 1)[0]
    np.testing.assert_allclose(params[0], wanted, rtol=1e-5, atol=1e-5)
    assert size == 4.0


def test_traffic_is_counted_against_a_float32_all_reduce():
    config = bench.PRESETS["smoke"]
    whole = one_bit_adam(1e-3, compression="none", axis_name="data")
    assert bench.sent(config, whole, 1024) == 1.0


def test_ratios_are_of_what_was_measured():
    times = {"lion": 2.0, bench.ADAMW: 4.0, bench.FUSED: 3.0}
    found = {text: (ratio, bound) for text, ratio, bound in bench.ratios(times)}
    assert found == {
        "step of AdamW: optax over PyTorch's fused": (4.0 / 3.0, 1.1),
        "step: lion over optax.adamw": (0.5, 1.1),
    }


def test_every_optimizer_is_found():
    found = compare.optimizers()
    assert {"lion", "mars", "diffgrad", "adam8bit", "one_bit_adam", "dgc"} <= set(found)
    for name, optimizer in found.items():
        assert isinstance(optimizer(1e-3), optax.GradientTransformation), name


def test_the_best_rate_is_that_of_the_least_mean_loss():
    scores = {
        "loss": np.array([[3.0, 3.0], [1.0, 2.0], [np.nan, 0.1]]),
        "accuracy": np.array([[1.0, 1.0], [2.0, 4.0], [9.0, 9.0]]),
    }
    at, losses, accuracies = compare.tuned(scores)
    assert at == 1 and losses.tolist() == [1.0, 2.0] and accuracies.mean() == 3.0
