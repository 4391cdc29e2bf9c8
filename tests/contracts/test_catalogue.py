"""The catalogue sees what is there, and says what is not."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxzoo import catalogue, literals

REPO = Path(__file__).resolve().parents[2]
PAPERS = catalogue.read_papers(REPO)
PLAN = """
[[paper]]
slug = "alpha"
title = "Alpha"
arxiv = "2001.00001"
year = 2020
topic = "vae"
kind = "method"
tier = 1
claim = "Alpha works."
data = "digits"
[[paper]]
slug = "beta"
title = "Beta | pipes"
year = 2021
topic = "vae"
kind = "finding"
tier = 2
claim = "Beta is found."
data = "digits"
"""
ALPHA = {
    "slug": "alpha",
    "title": "Alpha",
    "arxiv": "2001.00001",
    "year": 2020,
    "authors": "A. Author",
    "where": "Section 1",
    "differs": "In nothing.",
}
CODE = '''

__all__ = ["loss", "LIMIT"]
LIMIT = 3


def loss(x: float, *, beta: float = 1.0) -> float:
    """Computes the loss.

    More words.
    """
    return beta * x
'''
RESULT = {
    "slug": "alpha",
    "topic": "vae",
    "preset": "full",
    "seconds": 90.0,
    "claims": [{"text": "a|b", "measured": 0.51234, "bound": ">= 0.5", "holds": True}],
}


def literal(**changes):
    fields = {**ALPHA, **changes}
    body = "".join(
        f"    {name!r}: {value!r},\n"
        for name, value in fields.items()
        if value is not None
    )
    return '"""A file."""\n\nPAPER = {\n' + body + "}\n" + CODE


def write(root, path, text=""):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def tree(tmp_path):
    """A complete tree of one paper, with a second one planned."""
    write(tmp_path, "experiments/papers.toml", PLAN)
    write(tmp_path, "jaxzoo/vae/alpha.py", literal())
    write(tmp_path, "experiments/vae/__init__.py")
    write(tmp_path, "experiments/vae/alpha.py", '"""Alpha."""\n')
    write(tmp_path, "experiments/bench/speed.py", '"""No paper."""\n')
    write(tmp_path, "tests/vae/test_alpha.py")
    return tmp_path


def test_catalogue_is_not_stale():
    assert (REPO / "CATALOGUE.md").read_text("utf-8") == catalogue.render(REPO), (
        "run python -m jaxzoo.catalogue"
    )


def test_nothing_is_missing():
    assert catalogue.problems(REPO) == []


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.slug)
def test_every_paper_is_complete(paper):
    for field in ("topic", "kind", "tier", "claim", "experiment", "test"):
        assert getattr(paper, field), f"{paper.path}: {field}"
    assert paper.path.startswith("experiments/") or paper.functions
    for function in paper.functions:
        assert "\n" not in function.signature


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.slug)
def test_literals_are_what_python_sees(paper):
    seen = importlib.import_module(paper.module).PAPER
    seen = seen if isinstance(seen, list | tuple) else [seen]
    fields = {name: getattr(paper, name) for name in literals.FIELDS}
    assert fields in list(seen)


def test_no_package_is_imported():
    code = "import sys, jaxzoo.catalogue as c; c.read_papers()\n"
    code += "print([m for m in ('jax', 'numpy', 'rich', 'tyro') if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_complete_tree(tree):
    (paper,) = catalogue.read_papers(tree)
    assert catalogue.problems(tree) == []
    assert (paper.module, paper.topic, paper.tier) == ("jaxzoo.vae.alpha", "vae", 1)
    assert paper.status == "built" and paper.claim == "Alpha works."
    assert paper.test == "tests/vae/test_alpha.py"
    assert paper.usage == "from jaxzoo.vae.alpha import loss, LIMIT"
    loss, limit = paper.functions
    assert loss.signature == "loss(x: float, *, beta: float=1.0) -> float"
    assert loss.summary == "Computes the loss." and limit == ("LIMIT", "LIMIT", "")
    both = catalogue.read_papers(tree, planned=True)
    assert [p.status for p in both] == ["built", "planned"]


def test_list_of_papers_and_kernels_and_findings(tree):
    two = [ALPHA, {**ALPHA, "slug": "gamma", "arxiv": ""}]
    write(tree, "jaxzoo/vae/alpha.py", f"PAPER = {two!r}\n" + CODE)
    assert [p.slug for p in catalogue.read_papers(tree)] == ["alpha", "gamma"]
    write(tree, "jaxzoo/vae/alpha.py")
    write(tree, "pallas_kernels/op/__init__.py", literal())
    (paper,) = catalogue.read_papers(tree)
    assert (paper.module, paper.topic) == ("pallas_kernels.op", "vae")
    assert catalogue.problems(tree) == []
    finding = literal(slug="beta", arxiv="")
    write(tree, "experiments/vae/beta.py", finding)
    write(tree, "tests/vae/test_beta.py")
    beta = catalogue.read_papers(tree)[1]
    assert beta.experiment == beta.path == "experiments/vae/beta.py"
    assert beta.usage == "python -m experiments.vae.beta"
    assert catalogue.problems(tree) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"where": None}, "alpha.py:3: PAPER lacks the field 'where'"),
        ({"year": "2020"}, "alpha.py:3: 'year' is a str, not a int"),
        ({"authors": ["A"]}, "alpha.py:3: 'authors' is a list, not a str"),
        ({"differs": ""}, "alpha.py:3: 'differs' is empty"),
        ({"diffres": "x"}, "alpha.py:3: PAPER has no field 'diffres'"),
    ],
)
def test_bad_literal_is_named(tree, changes, words):
    write(tree, "jaxzoo/vae/alpha.py", literal(**changes))
    with pytest.raises(ValueError) as error:
        catalogue.read_papers(tree)
    assert words in str(error.value)
    assert catalogue.problems(tree) == [str(error.value)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\nPAPER = dict(slug='alpha')\n", "alpha.py:2: PAPER is not a literal"),
        ("PAPER = 'alpha'\n", "alpha.py:1: PAPER is a str, not a dict"),
        ("PAPER = {'slug': }\n", "alpha.py:1: "),
    ],
)
def test_what_is_not_a_literal_is_named(tree, text, words):
    write(tree, "jaxzoo/vae/alpha.py", text)
    with pytest.raises(ValueError) as error:
        catalogue.read_papers(tree)
    assert words in str(error.value)


def rename_code(tree):
    (tree / "jaxzoo/vae/alpha.py").rename(tree / "jaxzoo/vae/alfa.py")


def change_topic(tree):
    for folder in ("jaxzoo", "experiments"):
        (tree / folder / "vae").rename(tree / folder / "flows")


FAULTS = {
    "no test": (
        lambda tree: (tree / "tests/vae/test_alpha.py").unlink(),
        "alpha: tests/vae/test_alpha.py is missing",
    ),
    "no experiment": (
        lambda tree: (tree / "experiments/vae/alpha.py").unlink(),
        "alpha: experiments/vae/alpha.py is missing",
    ),
    "file name": (
        rename_code,
        "jaxzoo/vae/alfa.py: the file name is not the slug alpha",
    ),
    "topic": (change_topic, "jaxzoo/flows/alpha.py: alpha belongs to topic vae"),
    "slug": (
        lambda tree: write(tree, "jaxzoo/vae/alhpa.py", literal(slug="alhpa")),
        "jaxzoo/vae/alhpa.py: alhpa is not in experiments/papers.toml; "
        "did you mean alpha?",
    ),
    "arxiv": (
        lambda tree: write(tree, "jaxzoo/vae/alpha.py", literal(arxiv="1.2")),
        "jaxzoo/vae/alpha.py: alpha has arXiv 1.2, but 2001.00001 in the plan",
    ),
    "twice": (
        lambda tree: write(tree, "jaxzoo/vae/other.py", literal()),
        "alpha: the slug is used 2 times, in jaxzoo/vae/alpha.py, jaxzoo/vae/other.py",
    ),
    "stray result": (
        lambda tree: write(tree, "experiments/results/vae/beta.json", "{}"),
        "experiments/results/vae/beta.json: a result without a paper",
    ),
    "stray experiment": (
        lambda tree: write(tree, "experiments/vae/beta.py"),
        "experiments/vae/beta.py: an experiment without a paper",
    ),
    "damaged result": (
        lambda tree: write(tree, "experiments/results/vae/alpha.json", "{"),
        "experiments/results/vae/alpha.json: damaged result",
    ),
    "smoke result": (
        lambda tree: write(
            tree,
            "experiments/results/vae/alpha.json",
            json.dumps(RESULT | {"preset": "smoke"}),
        ),
        "alpha: the committed result is not of a full run",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_problem_is_found(tree, fault):
    break_it, sentence = FAULTS[fault]
    break_it(tree)
    found = catalogue.problems(tree)
    assert any(line.startswith(sentence) for line in found), found


def test_status_and_table(tree):
    file = write(tree, "experiments/results/vae/alpha.json", json.dumps(RESULT))
    assert catalogue.read_papers(tree)[0].status == "holds"
    row = (
        "| [Alpha](https://arxiv.org/abs/2001.00001) "
        "| `from jaxzoo.vae.alpha import loss, LIMIT` "
        "| a\\|b | 0.5123 | >= 0.5 | yes | 1.5 |\n"
    )
    text = catalogue.render(tree)
    assert row in text and "- vae: 1\n" in text and str(tree) not in text
    claim = {"text": "c", "measured": None, "bound": "> 0", "holds": False}
    claims = [*RESULT["claims"], claim]
    file.write_text(json.dumps(RESULT | {"claims": claims}))
    assert catalogue.read_papers(tree)[0].status == "fails"
    assert "| c | nan | > 0 | **no** |" in catalogue.render(tree)
    file.write_text(json.dumps(RESULT | {"claims": []}))
    assert catalogue.read_papers(tree)[0].status == "fails"


def test_check_says_what_is_stale(tree, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "ROOT", tree)
    for function in (catalogue.render, catalogue.problems):
        monkeypatch.setattr(function, "__defaults__", (tree,))
    assert catalogue.main([]) == 0 and catalogue.main(["--check"]) == 0
    assert capsys.readouterr().out == ""
    (tree / "CATALOGUE.md").write_text("old\n")
    assert catalogue.main(["--check"]) == 1
    assert "CATALOGUE.md is stale" in (out := capsys.readouterr().out)
    assert "-old" in out
    assert catalogue.main(["--chekc"]) == 2
