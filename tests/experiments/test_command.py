"""`python -m experiments`: quick answers, plain errors, a page that fetches nothing."""

import base64
import json
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jaxzoo.training.page import page
from tests.experiments.papers_tree import CLAIM_FAILS, REPORT, plant

REPO = Path(__file__).resolve().parents[2]
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)


@pytest.fixture
def tree(tmp_path):
    """Two built papers, of which beta's claim fails, and a planned one."""
    return plant(tmp_path)


def call(*words, root=REPO, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "experiments", *map(str, words)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(
    "words", [["--help"], ["list"], ["run", "--help"], ["show", "vae"]]
)
def test_answers_are_quick(words):
    def spent():  # on a core: how long it has to wait for one says nothing
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    start = spent()
    call(*words)
    assert spent() - start < 0.6


@pytest.mark.parametrize("words", [["--help"], ["list"], ["show", "vae"]])
def test_no_package_is_imported(words):
    command = [sys.executable, "-X", "importtime", "-m", "experiments", *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    seen = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "jaxzoo.catalogue" in seen
    assert not seen & {"jax", "numpy", "rich", "tyro", "matplotlib"}


def test_list_of_the_real_tree():
    assert "vae" in call("list", "--topic", "vae").stdout
    everything = json.loads(call("list", "--all", "--json").stdout)
    plan = (REPO / "experiments/papers.toml").read_text("utf-8").count("[[paper]]")
    assert len(everything) == plan
    planned = json.loads(call("list", "--status", "planned", "--json").stdout)
    assert {paper["status"] for paper in planned} <= {"planned"}


def test_list_searches(tree):
    out = call("list", root=tree).stdout
    assert "alpha" in out and "gamma" not in out and "1 planned match too" in out
    out = call("list", "gamma", "RAYS", "--all", root=tree).stdout
    assert "Gamma rays" in out and "alpha" not in out
    found = json.loads(call("list", "author", "alpha", "--json", root=tree).stdout)
    assert [paper["slug"] for paper in found] == ["alpha"]
    assert json.loads(call("list", "--tier", "2", "--json", root=tree).stdout)
    assert "mean alpha?" in call("list", "alhpa", root=tree).stdout


@pytest.mark.parametrize("width", [20, 60, 100])
def test_list_fits_the_terminal(tree, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8")
    for words in (["list", "--all"], ["show", "alpha"]):
        table = call(*words, root=tree).stdout.splitlines()
        if words[0] == "list":
            assert max(map(len, table[:-1])) <= width


def test_show(tree):
    out = call("show", "alpha", root=tree).stdout
    for words in (
        "Alpha & co",
        "https://arxiv.org/abs/2001.00001",
        "from jaxzoo.vae.alpha import loss",
        "loss(x: float, *, beta: float=1.0) -> float",
        "Computes the loss.",
        "Alpha works.",
        "python -m experiments.vae.alpha [smoke | full]",
        "No full run is recorded",
    ):
        assert words in out
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert lines["--steps"].split("  # ")[1] == "of Adam"
    assert "int = 100" in lines["--steps"]
    assert lines["--width"].endswith("Of each layer.")
    assert lines["--methods"].endswith("What to learn.")
    out = call("show", "gamma", root=tree).stdout
    assert "Gamma is planned." in out and "not built yet" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["lsit"], "no command 'lsit'; did you mean list?"),
        (["alpha"], "'alpha' is a paper: python -m experiments show alpha"),
        (["show", "alhpa"], "no paper 'alhpa'; did you mean alpha?"),
        (["show"], "the following arguments are required: slug"),
        (["run", "alpha", "betta"], "no paper 'betta'; did you mean beta?"),
        (["run", "gamma"], "'gamma' is planned but not built yet"),
        (["run", "alpha", "--preset", "ful"], "no preset 'ful' of alpha; did you mean"),
        (["run", "alpha", "--presett", "full"], "did you mean --preset?"),
        (["record", "alhpa"], "no paper 'alhpa'; did you mean alpha?"),
        (["list", "--topic", "vea"], "no topic 'vea'; did you mean vae?"),
        (["list", "--status", "hold"], "no status 'hold'; did you mean holds?"),
        (["list", "--tier", "9"], "'9' is not 1, 2, 3 or 4"),
        (["list", "--", "x"], "only run takes flags"),
        (["report", "--runs", "nowhere"], "--runs nowhere: no such folder"),
    ],
)
def test_errors_name_the_nearest(tree, words, sentence):
    done = call(*words, root=tree, code=2)
    assert sentence in done.stderr and done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_a_broken_pipe_is_quiet(tree):
    line = f"{sys.executable} -m experiments list --all | true"
    done = subprocess.run(line, shell=True, cwd=REPO, capture_output=True, check=True)
    assert done.stderr == b""


def test_a_damaged_literal_is_one_sentence(tree):
    (tree / "jaxzoo/vae/alpha.py").write_text("PAPER = {'slug': 3}\n")
    done = call("list", root=tree, code=1)
    assert done.stderr == "error: jaxzoo/vae/alpha.py:1: 'slug' is a int, not a str\n"


def test_run_record_report(tree):
    words = ["run", "beta", "alpha", "--preset", "smoke", "--", "--steps", "3"]
    out = call(*words, root=tree, code=1).stdout
    assert out.count("argv ['smoke', '--steps', '3']") == 2
    table = [line.split() for line in out.splitlines()[-3:]]
    assert [row[0] for row in table] == ["paper", "beta", "alpha"]
    assert [row[2] for row in table] == ["exit", "1", "0"]
    assert [row[4] for row in table] == ["claims", "0/1", "1/1"]

    refused = call("record", root=tree, code=1).stderr
    assert "is of preset smoke, not full" in refused

    call("run", "alpha", "beta", "--run-dir", "out", root=tree, code=1)
    assert (tree / "out/vae/beta/report.json").is_file()
    assert call("record", "alpha", "--run-dir", "out", root=tree).returncode == 0
    call("record", "--run-dir", "out", root=tree)
    kept = json.loads((tree / "experiments/results/vae/alpha.json").read_text())
    assert kept["claims"] == REPORT["claims"] and "figures" not in kept
    out = call("list", root=tree).stdout
    assert "holds" in out and "fails" in out
    out = call("show", "beta", root=tree).stdout
    assert "FAILS: it works Measured nan, bound > 0." in out and "2.0 minutes" in out

    (tree / "out/bad").mkdir()
    (tree / "out/bad/report.json").write_text("{")
    done = call("report", "--runs", "out", root=tree)
    assert str(Path("out/bad/report.json")) in done.stderr
    html = (tree / "out/index.html").read_text()
    assert "Alpha &amp; co" in html and "https://arxiv.org/abs/2001.00001" in html
    assert "<script" not in html


def test_record_takes_one_folder_and_refuses_changed_settings(tree):
    call("run", "alpha", "--run-dir", "mine", root=tree)
    report = json.loads((tree / "mine/report.json").read_text())
    report["config"]["steps"] = 10
    (tree / "mine/report.json").write_text(json.dumps(report))
    refused = call("record", "alpha", "--run-dir", "mine", root=tree, code=1).stderr
    assert "steps 10 where full has 200" in refused
    report["config"]["steps"] = 200
    report["metrics"]["loss"] = float("nan")
    (tree / "mine/report.json").write_text(json.dumps(report))
    call("record", "alpha", "--run-dir", "mine", root=tree)
    kept = json.loads((tree / "experiments/results/vae/alpha.json").read_text())
    assert kept["metrics"]["loss"] is None
    assert "is missing or damaged" in call("record", "beta", root=tree, code=1).stderr


class Resources(HTMLParser):
    """Collects whatever a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.bad, self.images, self.open = [], 0, []

    def handle_starttag(self, tag, attrs):
        self.images += tag == "img"
        if tag in {"script", "link", "iframe", "object", "embed", "b-injected"}:
            self.bad.append(tag)
        for name, value in attrs:
            link = tag == "a" and name == "href"
            arxiv = (value or "").startswith(("#", "https://arxiv.org/abs/"))
            if name in {"src", "href", "srcset", "style"} or name.startswith("on"):
                data = tag == "img" and (value or "").startswith("data:image/png;")
                if not data and not (link and arxiv):
                    self.bad.append((tag, name, value))


def test_page_is_self_contained_and_escaped(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/curves.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    run = REPORT | {"folder": tmp_path / "run", "arxiv": "2001.00001"}
    failed = {"slug": "beta", "claims": [CLAIM_FAILS], "folder": tmp_path}
    html = page([run, failed], title="All & <sundry>")
    seen = Resources()
    seen.feed(html)
    assert seen.bad == [] and seen.images == 1
    assert "url(" not in html and "@import" not in html
    assert "&lt;script&gt;" in html and "All &amp; &lt;sundry&gt;" in html
    assert "<b>Alpha</b>" not in html and "x &lt; y &amp; z" in html
    assert "the picture gone.png is missing" in html
    assert "the picture ../secret.png is missing" in html
    assert "0.75 ± 0.01" in html and "2.0 min" in html and "not a number" in html
    assert html.count(">holds<") == 2 and html.count(">fails<") == 2
    assert str(tmp_path) not in html
    assert "No finished run" in page([], title="none")
