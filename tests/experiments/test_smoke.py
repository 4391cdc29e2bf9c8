"""Every experiment runs from end to end at its smallest preset."""

import importlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxzoo.training.record import Report, Run

REPO = Path(__file__).resolve().parents[2]
FILES = sorted(
    path
    for path in REPO.glob("experiments/*/*.py")
    if path.parent.name not in {"bench", "launch", "results"} and path.stem[0] != "_"
)


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """Programs of some sixty experiments are not kept for the tests that follow."""
    yield
    jax.clear_caches()


def test_there_are_experiments():
    assert "vae" in {path.stem for path in FILES}


@pytest.mark.parametrize(
    "path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_smoke(path, tmp_path, monkeypatch):
    topic, slug = path.parent.name, path.stem
    monkeypatch.syspath_prepend(REPO)
    module: Any = importlib.import_module(f"experiments.{topic}.{slug}")
    monkeypatch.chdir(tmp_path)
    run = Run(
        tmp_path / "run",
        topic=topic,
        slug=slug,
        title=module.__doc__.splitlines()[0],
        preset="smoke",
        config=module.PRESETS["smoke"],
    )
    report = module.main(module.PRESETS["smoke"], run)
    run.finish(report)
    assert isinstance(report, Report)
    assert report.claims
    for claim in report.claims:
        assert claim.text and claim.bound
        assert np.isfinite(claim.measured), claim
        assert claim.stderr is None or np.isfinite(claim.stderr), claim
        assert isinstance(claim.holds, bool | np.bool_)
    assert report.metrics
    assert report.figures
    for figure in report.figures:
        assert figure.title and figure.caption
        assert (run.folder / figure.file).read_bytes().startswith(b"\x89PNG")
    written = json.loads((run.folder / "report.json").read_text())
    assert (written["topic"], written["slug"]) == (topic, slug)
    assert len(written["claims"]) == len(report.claims)
    assert None not in written["metrics"].values()
    html = (run.folder / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(report.figures)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}
