"""What this library holds, read from the code: papers, claims, what is missing.

    python -m jaxzoo.catalogue            writes CATALOGUE.md
    python -m jaxzoo.catalogue --check    exits 1 when it is stale or a piece is missing

Only the standard library is imported, so that listing 358 papers stays instant.
"""

import difflib
import json
import re
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxzoo.literals import Function, read_functions, read_literals, relative

ROOT = Path(__file__).resolve().parents[1]
STATUSES = ("planned", "built", "holds", "fails")
# Experiments that are no paper: all methods of a topic side by side, and a whole model.
NO_PAPERS = ("compare", "pretrain")
HEAD = """# Catalogue

Written by `python -m jaxzoo.catalogue` from the `PAPER` literals in the code and the
results of the last full runs; do not edit. `python -m experiments show SLUG` tells more
about one paper, `python -m experiments run SLUG` measures its claims again.
"""


@dataclass(frozen=True)
class Paper:
    """One paper: its literal, its row of the plan, its files, its last full result."""

    slug: str
    title: str
    arxiv: str
    year: int
    authors: str = ""
    where: str = ""
    differs: str = ""
    topic: str = ""
    kind: str = ""
    tier: int = 0
    claim: str = ""
    module: str = ""
    path: str = ""
    experiment: str | None = None
    test: str | None = None
    result: dict[str, Any] | None = None
    root: Path = ROOT

    @property
    def status(self) -> str:
        """`planned`, `built`, `holds` or `fails`."""
        if not self.path:
            return "planned"
        if self.result is None:
            return "built"
        claims = self.result["claims"]
        return "holds" if claims and all(c["holds"] for c in claims) else "fails"

    @property
    def url(self) -> str:
        """The paper's page on arXiv, empty where it has none."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else ""

    @property
    def functions(self) -> tuple[Function, ...]:
        """The names in `__all__`; parsed when asked for, which keeps `list` fast."""
        return read_functions(self.root / self.path) if self.path else ()

    @property
    def usage(self) -> str:
        """The line that brings the paper in: an import, or a command for a finding."""
        names = ", ".join(f.name for f in self.functions)
        if self.path.startswith("experiments/"):
            return f"python -m {self.module}"
        return (
            f"from {self.module} import {names}" if names else f"import {self.module}"
        )


def read_plan(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Returns the rows of `experiments/papers.toml` by slug."""
    path = root / "experiments" / "papers.toml"
    if not path.is_file():
        raise ValueError("experiments/papers.toml is missing: is this a checkout?")
    try:
        rows = tomllib.loads(path.read_text("utf-8")).get("paper", [])
        return {row["slug"]: row for row in rows}
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ValueError(f"experiments/papers.toml: {error}") from None


def read_papers(root: Path = ROOT, *, planned: bool = False) -> list[Paper]:
    """Reads every `PAPER` literal of the tree at `root`.

    Args:
        root: the checkout to read.
        planned: also returns the papers that stand in the plan alone.

    Returns:
        The papers by topic and slug.

    Raises:
        ValueError: a literal or result is damaged; names file, line and field.
    """
    plan = read_plan(root)
    papers = [
        _paper(root, path, literal, plan)
        for path in _sources(root)
        for literal in read_literals(root, path)
    ]
    if planned:
        known = [f for f in Paper.__dataclass_fields__ if f != "root"]
        for slug in plan.keys() - {paper.slug for paper in papers}:
            row = {"arxiv": "", **plan[slug]}
            papers.append(Paper(root=root, **{k: row[k] for k in known if k in row}))
    return sorted(papers, key=lambda paper: (paper.topic, paper.slug, paper.path))


def problems(root: Path = ROOT) -> list[str]:
    """Returns one sentence for each piece that is missing, misnamed or left over."""
    try:
        papers, plan = read_papers(root), read_plan(root)
    except ValueError as error:
        return [str(error)]
    found = []
    files: dict[str, list[str]] = defaultdict(list)
    for paper in papers:
        files[paper.path].append(paper.slug)
        found += _paper_problems(paper, plan)
    for slug, count in Counter(paper.slug for paper in papers).items():
        if count > 1:
            where = ", ".join(sorted(p.path for p in papers if p.slug == slug))
            found.append(f"{slug}: the slug is used {count} times, in {where}")
    for path, slugs in files.items():
        stem = Path(path).stem
        # A kernel folder is named after its op, which several papers may share.
        if not path.startswith("pallas_kernels/") and stem not in slugs:
            found.append(f"{path}: the file name is not the slug {' or '.join(slugs)}")
    used = {paper.experiment for paper in papers}
    for file in _experiments(root):
        if (path := relative(root, file)) not in used:
            found.append(f"{path}: an experiment without a paper")
    for file in sorted((root / "experiments" / "results").glob("*/*.json")):
        other = file.parent.name == "bench" or file.stem in NO_PAPERS
        if f"experiments/{file.parent.name}/{file.stem}.py" not in used and not other:
            found.append(f"{relative(root, file)}: a result without a paper")
    return sorted(found)


def render(root: Path = ROOT) -> str:
    """Returns the text of CATALOGUE.md."""
    papers, topics = read_papers(root, planned=True), defaultdict(list)
    for paper in papers:
        topics[paper.topic].append(paper)
    count = Counter(paper.status for paper in papers)
    told = f"{len(papers) - count['planned']} of {len(papers)} papers are built: every"
    told += f" claim holds for {count['holds']}, some claim fails for {count['fails']},"
    parts = [HEAD, f"{told} and {count['built']} wait for a full run.\n"]
    for topic, members in topics.items():
        built = [paper for paper in members if paper.path]
        if not built:
            continue
        rows = ["paper | import | claim | measured | bound | holds | minutes"]
        rows.append(" | ".join(["---"] * 7))
        rows += [row for paper in built for row in _rows(paper)]
        parts.append(f"## {topic}\n\n" + "".join(f"| {row} |\n" for row in rows))
    left = {t: sum(not p.path for p in members) for t, members in topics.items()}
    lines = [f"- {topic}: {number}\n" for topic, number in left.items() if number]
    parts.append("## Planned\n\n" + ("".join(lines) or "Nothing is left.\n"))
    return "\n".join(parts)


def number(value: Any) -> str:
    """Returns a measured number as short text; null stands for NaN."""
    return "nan" if value is None else f"{value:.4g}" if _real(value) else str(value)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rows(paper: Paper) -> Iterator[str]:
    title = _cell(paper.title)
    head = f"[{title}]({paper.url})" if paper.url else title
    head += f" | `{paper.usage}`"
    if not paper.result or not paper.result["claims"]:
        yield f"{head} | *no full run yet* | | | |"
        return
    minutes = number(round(paper.result["seconds"] / 60, 1))
    for claim in paper.result["claims"]:
        measured = number(claim["measured"])
        if claim.get("stderr") is not None:
            measured += f" ± {number(claim['stderr'])}"
        told = [_cell(text) for text in (claim["text"], measured, claim["bound"])]
        told += ["yes" if claim["holds"] else "**no**", minutes]
        yield " | ".join([head, *told]).rstrip()
        head, minutes = " |", ""


def _cell(text: str) -> str:
    # In a table GitHub splits at every bar and reads * _ < as markup.
    return re.sub(r"([|*_<])", r"\\\1", " ".join(text.split()))


def _paper_problems(paper: Paper, plan: dict[str, dict[str, Any]]) -> Iterator[str]:
    topic, slug = paper.topic, paper.slug
    if slug not in plan:
        near = difflib.get_close_matches(slug, plan, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"{paper.path}: {slug} is not in experiments/papers.toml{hint}"
    elif plan[slug]["topic"] != topic:
        yield f"{paper.path}: {slug} belongs to topic {plan[slug]['topic']}"
    elif paper.arxiv != plan[slug].get("arxiv", ""):
        planned = plan[slug].get("arxiv", "")
        yield f"{paper.path}: {slug} has arXiv {paper.arxiv}, but {planned} in the plan"
    if paper.experiment is None:
        yield f"{slug}: experiments/{topic}/{slug}.py is missing"
    if paper.test is None:
        yield f"{slug}: tests/{topic}/test_{slug}.py is missing"
    if paper.result is not None:
        if not paper.result["claims"]:
            yield f"{slug}: the committed result has no claims"
        if paper.result.get("preset") != "full":
            yield f"{slug}: the committed result is not of a full run"


def _paper(root: Path, file: Path, literal: dict, plan: dict[str, dict]) -> Paper:
    slug, path = literal["slug"], relative(root, file)
    row, stem = plan.get(slug, {}), file.stem
    kernel = path.startswith("pallas_kernels/")
    topic = row.get("topic", "") if kernel else file.parent.name
    tests = [f"tests/{topic}/test_{slug}.py", f"tests/{topic}/test_{stem}.py"]
    if kernel:
        tests[1] = f"tests/kernels/test_{file.parent.name}.py"
    own = path.startswith("experiments/")
    experiment = path if own else f"experiments/{topic}/{slug}.py"
    record = root / "experiments" / "results" / topic / f"{Path(experiment).stem}.json"
    return Paper(
        **literal,
        topic=topic,
        kind=row.get("kind", ""),
        tier=row.get("tier", 0),
        claim=row.get("claim", ""),
        module=path.removesuffix(".py").removesuffix("/__init__").replace("/", "."),
        path=path,
        experiment=experiment if (root / experiment).is_file() else None,
        test=next((test for test in tests if (root / test).is_file()), None),
        result=_result(root, record),
        root=root,
    )


def _result(root: Path, file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    where = relative(root, file)
    try:
        record = json.loads(file.read_text("utf-8"))
        if not _real(record["seconds"]):
            raise ValueError("seconds is not a number")
        for claim in record["claims"]:
            if missing := {"text", "measured", "bound", "holds"} - claim.keys():
                raise ValueError(f"a claim lacks {min(missing)}")
    except KeyError as error:
        raise ValueError(f"{where}: the field {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: damaged result: {error}") from None
    return record


def _experiments(root: Path) -> list[Path]:
    # bench/ holds ratios against peers, launch/ files for pods: none is a paper.
    files = (root / "experiments").glob("*/[!_]*.py")
    others = ("bench", "launch")
    return sorted(
        f for f in files if f.parent.name not in others and f.stem not in NO_PAPERS
    )


def _sources(root: Path) -> list[Path]:
    kernels = sorted((root / "pallas_kernels").glob("*/__init__.py"))
    return [*sorted((root / "jaxzoo").rglob("*.py")), *kernels, *_experiments(root)]


def main(argv: list[str]) -> int:
    """Writes CATALOGUE.md, or with `--check` says what is stale or missing."""
    if argv not in ([], ["--check"]):
        print(f"unknown: {' '.join(argv)}; the only option is --check", file=sys.stderr)
        return 2
    file = ROOT / "CATALOGUE.md"
    try:
        text = render()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if not argv:
        file.write_text(text, "utf-8")
        return 0
    old = file.read_text("utf-8") if file.is_file() else ""
    lines = (old.splitlines(), text.splitlines(), "CATALOGUE.md", "from the code")
    diff = list(difflib.unified_diff(*lines, lineterm=""))
    if diff:
        print("CATALOGUE.md is stale; run python -m jaxzoo.catalogue")
        print("\n".join(diff[:20]))
    found = problems()
    print("\n".join(found), end="\n" if found else "")
    return 1 if diff or found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
