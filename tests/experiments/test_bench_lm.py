"""The bench of language models at a tiny shape."""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxzoo.training.record import Run

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(REPO))
    yield importlib.import_module("experiments.bench.lm")
    sys.path.remove(str(REPO))


def test_what_is_measured_is_recorded(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.timing, "RESULTS", tmp_path)
    config = dataclasses.replace(
        bench.PRESETS["smoke"], record=True, noise=100.0, samples=5, patience=60.0
    )
    run = Run(
        tmp_path / "run", topic="bench", slug="lm", title="", preset="smoke",
        config=config,
    )  # fmt: skip
    report: Any = bench.main(config, run)
    assert (tmp_path / "lm_cpu.json").exists()
    texts = " ".join(claim.text for claim in report.claims)
    for words in ("with drafts", "temporary memory of token_logprobs", "2 layers"):
        assert words in texts
    assert report.metrics["tokens_per_call"] >= 1
    assert report.metrics["training step/tokens_per_second"] > 0


def test_contestants_compute_the_same(bench):
    config = bench.PRESETS["smoke"]
    calls, sizes = bench.losses(config)
    values = [calls[name]() for name in (bench.CHUNKED, bench.DENSE)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *values
    )
    assert set(sizes) == {bench.CHUNKED, bench.DENSE}


def test_a_step_goes_on_from_the_last_one(bench):
    calls, params = bench.steps(bench.PRESETS["smoke"])
    losses = [float(calls[bench.STEP]()) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))
