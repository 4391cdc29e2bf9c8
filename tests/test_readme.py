"""README: the table says what is built, the code runs, the links lead somewhere.

`python tests/test_readme.py` writes the table.
"""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxzoo.catalogue import Paper, read_papers

REPO = Path(__file__).resolve().parents[1]
README = REPO / "README.md"
TEXT = README.read_text("utf-8")
TABLE = re.compile(r"(?<=<!-- catalogue -->\n).*(?=<!-- /catalogue -->)", re.DOTALL)


def row(paper: Paper) -> str:
    claims = paper.result["claims"] if paper.result else []
    title = paper.title.replace("|", "\\|")
    title = f"[{title}]({paper.url})" if paper.url else title
    held = f"{sum(claim['holds'] for claim in claims)} of {len(claims)}"
    return (
        f"| {title} | [{paper.path}]({paper.path}) "
        f"| [{paper.experiment}]({paper.experiment}) "
        f"| {held if claims else 'not measured yet'} |\n"
    )


def table() -> str:
    head = "| paper | file | experiment | claims hold |\n| --- | --- | --- | --- |\n"
    return head + "".join(map(row, read_papers(REPO)))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_table_is_the_catalogue():
    (found,) = TABLE.findall(TEXT)
    assert found == table(), (
        f"run python tests/test_readme.py; between the markers has to stand\n{table()}"
    )


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code):
    # A process of its own: what runs here runs when a reader pastes it.
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", blocks("pycon"))
def test_sessions_print_what_is_written(code):
    session = doctest.DocTestParser().get_doctest(code, {}, "README.md", None, None)
    assert session.examples
    failures = []
    doctest.DocTestRunner(verbose=False).run(session, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(file):
    targets = re.findall(r"\]\(([^)\s]+)\)", (REPO / file).read_text("utf-8"))
    local = {target.split("#")[0] for target in targets if "://" not in target}
    assert [target for target in sorted(local) if not (REPO / target).exists()] == []


if __name__ == "__main__":
    README.write_text(TABLE.sub(lambda _: table(), TEXT), "utf-8")
