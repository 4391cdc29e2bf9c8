"""The bench of scans at a tiny shape: every path of it, and what it compares."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from experiments.bench import _ssm_device as device  # noqa: E402
from experiments.bench import _timing as timing  # noqa: E402
from experiments.bench import ssm as bench  # noqa: E402
from experiments.bench._attention_device import Target  # noqa: E402
from jaxzoo.training.mesh import PlacementError  # noqa: E402
from jaxzoo.training.record import Run  # noqa: E402


def test_it_times_compares_and_records(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    config = dataclasses.replace(bench.PRESETS["smoke"], record=True, noise=100.0)
    config = dataclasses.replace(config, samples=5, patience=60.0, length=32)
    run = Run(
        tmp_path / "run", topic="bench", slug="ssm", title="", preset="smoke",
        config=config,
    )  # fmt: skip
    report = bench.main(config, run)
    record = json.loads((tmp_path / "ssm_cpu.json").read_text())
    assert record["metrics"]["quiet"] == 5
    for name in (bench.OURS, bench.SCAN, bench.ASSOCIATIVE):
        assert record["metrics"][f"{name}/difference"] < 1e-5
        assert record["metrics"][f"{name}/min_ms"] > 0
    assert len(report.claims) == len(record["claims"]) >= 4


def test_the_parallel_prefix_is_the_recurrence():
    config = dataclasses.replace(bench.PRESETS["smoke"], channels=3, states=2)
    u, delta, A, B, C, _ = (np.asarray(x, np.float64) for x in bench.inputs(config, 7))
    h, y = np.zeros((3, 2)), []
    for t in range(7):
        own = delta[0, t][:, None]
        h = np.exp(own * A) * h + own * u[0, t][:, None] * B[0, t]
        y.append(h @ C[0, t])
    got = bench.associative(*(x.astype(np.float32) for x in (u, delta, A, B, C)))
    np.testing.assert_allclose(got[0], y, rtol=1e-5, atol=1e-6)


def clock(call, *, wait=jax.block_until_ready):
    """Runs once, as a device would many times, and tells a fixed time."""
    wait(call())
    return 1e-3


def test_everything_on_a_device_runs_with_tiny_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(timing, "copy_rate", lambda clock: 1e12)
    small = {device.SCAN: (1, 9, 4, 3), device.SSD: (1, 9, 2, 4, 4)}
    works = [
        work._replace(sizes=small[work.kind])
        for work in device.WORKLOADS
        if work.name in ("G10", "G11 2048", "G12")
    ]
    checks = [x._replace(sizes=small[x.kind], dtype="float32") for x in device.CHECKS]
    config = dataclasses.replace(bench.PRESETS["full"], device=True)
    run = Run(
        tmp_path / "run", topic="bench", slug="ssm", title="", preset="full",
        config=config,
    )  # fmt: skip
    target = Target("NVIDIA H100 (pretended)", "ref", None, clock, 2.0**30)
    monkeypatch.setattr(device, "crossover", lambda *_: crossed(target))
    report = device.measure(
        config, run, target, checks=checks[1:3], workloads=works, lengths=(8,)
    )
    record = json.loads(
        (tmp_path / "results" / "ssm_nvidia_h100_pretended.json").read_text()
    )
    assert report.claims[0].holds and len(record["checks"]) == 2
    assert record["metrics"]["G12/both/ref/ms"] == record["metrics"]["G12/both/xla/ms"]
    missing = [name for name in record["reasons"] if device.PEER in name]
    assert len(missing) == 2 * len(works)
    texts = [claim["text"] for claim in record["claims"]]
    for word in ("XLA", "as published", "floor of exponentials", "G13"):
        assert any(word in text for text in texts), word
    published = next(c for c in report.claims if "G10, forward: our time over that of "
                     "jax-linear-attention, as published" in c.text)  # fmt: skip
    assert published.measured == pytest.approx(1 / 0.272) and not published.holds


def crossed(target):
    """G13 with times of its own: SSD takes 1, 2, 2 and attention 2, 1, 3 ms."""
    times = iter([2e-3, 1e-3, 1e-3, 2e-3, 3e-3, 2e-3])
    slow = target._replace(clock=lambda call, **_: (call(), next(times))[1])
    work = device.Work("G13", device.SSD, (1, 3, 1, 2, 2), "float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "Work", lambda *_: work)
        patch.setattr(device, "attention", lambda q, k, v, is_causal: q[:1, :1])
        metrics, claim = CROSSOVER(slow, (8, 16, 32))
    assert metrics["G13 16/ssd/ms"] == 2.0 and claim.measured == 32
    return metrics, claim


CROSSOVER = device.crossover


def test_without_a_gpu_it_says_so(tmp_path):
    config = dataclasses.replace(bench.PRESETS["smoke"], device=True)
    with pytest.raises(PlacementError, match="--device needs a GPU"):
        bench.main(config, None)  # pyright: ignore
