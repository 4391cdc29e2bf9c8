"""The bench of scans at a tiny shape: every path of it, and what it compares."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from experiments.bench import _timing as timing  # noqa: E402
from experiments.bench import ssm as bench  # noqa: E402
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
