"""A tree of three papers for `python -m experiments`, of files that need no jax."""

import shutil
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PLAN = """
[[paper]]
slug = "alpha"
title = "Alpha & co"
arxiv = "2001.00001"
year = 2020
topic = "vae"
kind = "method"
tier = 1
claim = "Alpha works."
data = "digits"
[[paper]]
slug = "beta"
title = "Beta"
arxiv = "2001.00002"
year = 2021
topic = "vae"
kind = "method"
tier = 2
claim = "Beta fails."
data = "digits"
[[paper]]
slug = "gamma"
title = "Gamma rays"
arxiv = "2001.00003"
year = 2022
topic = "flows"
kind = "method"
tier = 2
claim = "Gamma is planned."
data = "digits"
"""
METHOD = '''"""A method."""

PAPER = {
    "slug": "SLUG",
    "title": "TITLE",
    "arxiv": "ARXIV",
    "year": 2020,
    "authors": "Ada Author",
    "where": "Section 1.",
    "differs": "Smaller.",
}

__all__ = ["loss"]


def loss(x: float, *, beta: float = 1.0) -> float:
    """Computes the loss."""
    return beta * x
'''
EXPERIMENT = '''"""An experiment that needs no jax."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Config:
    steps: int = 100  # of Adam
    width: int = 8
    """Of each layer."""
    # What to learn.
    methods: tuple[str, ...] = ("a", "b")


PRESETS = {"smoke": Config(), "full": Config(steps=200)}

if __name__ == "__main__":
    folder = Path("runs/vae/SLUG")
    if "--run-dir" in sys.argv:
        folder = Path(sys.argv[sys.argv.index("--run-dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    print("argv", sys.argv[1:])
    report = REPORT
    report |= {"preset": sys.argv[1], "slug": "SLUG"}
    (folder / "report.json").write_text(json.dumps(report))
    sys.exit(CODE)
'''
REPORT = {
    "slug": "alpha",
    "topic": "vae",
    "title": "<b>Alpha</b>",
    "preset": "full",
    "config": {"steps": 200, "width": 8, "methods": ["a", "b"]},
    "claims": [
        {
            "text": "x < y & z",
            "measured": 0.75,
            "bound": ">= 0.5",
            "holds": True,
            "stderr": 0.01,
        }
    ],
    "metrics": {"loss": 1.25, "note": "<script>alert(1)</script>"},
    "figures": [
        {"file": "curves.png", "title": "Curves", "caption": "Going <down>."},
        {"file": "../secret.png", "title": "Secret", "caption": ""},
        {"file": "gone.png", "title": "Gone", "caption": ""},
    ],
    "seconds": 120.0,
    "versions": {"python": "3.13.0", "jax": "0.12.0"},
    "device": "1 x cpu",
    "commit": "abc",
    "status": "finished",
}
CLAIM_FAILS = {
    "text": "it works",
    "measured": None,
    "bound": "> 0",
    "holds": False,
    "stderr": None,
}


def plant(tree: Path) -> Path:
    """Two built papers, of which beta's claim fails, and a planned one."""
    files = [*(REPO / "experiments").glob("_*.py"), *(REPO / "jaxzoo").glob("[!_]*.py")]
    for file in files:
        copy = tree / file.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (tree / "jaxzoo/training").mkdir()
    shutil.copy(REPO / "jaxzoo/training/page.py", tree / "jaxzoo/training/page.py")
    (tree / "experiments/papers.toml").write_text(PLAN)
    for folder in ("jaxzoo/vae", "experiments/vae"):
        (tree / folder).mkdir()
    folders = ("jaxzoo", "jaxzoo/vae", "jaxzoo/training", "experiments")
    for folder in (*folders, "experiments/vae"):
        (tree / folder / "__init__.py").touch()
    papers = [("alpha", "2001.00001", 0), ("beta", "2001.00002", 1)]
    for slug, arxiv, code in papers:
        text = METHOD.replace("SLUG", slug).replace("ARXIV", arxiv)
        text = text.replace("TITLE", "Alpha & co" if slug == "alpha" else "Beta")
        (tree / f"jaxzoo/vae/{slug}.py").write_text(text)
        report = REPORT if code == 0 else REPORT | {"claims": [dict(CLAIM_FAILS)]}
        text = EXPERIMENT.replace("SLUG", slug).replace("CODE", str(code))
        text = text.replace("REPORT", repr(report))
        (tree / f"experiments/vae/{slug}.py").write_text(text)
    return tree
