"""Finds, shows, runs and reports every paper: `python -m experiments --help`.

Nothing here imports jax or any other package: a list must come faster than a thought.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from experiments._parser import make_parser
from experiments._reports import held, read_report, refusal, stamp, without_nan
from experiments._settings import read_settings
from experiments._terminal import (
    check_known,
    columns,
    count,
    fail,
    labelled,
    near,
    table,
    wrapped,
)
from jaxzoo.catalogue import ROOT, STATUSES, Paper, number, read_papers
from jaxzoo.training.page import page


def main(argv: list[str]) -> int:
    """Runs one command; returns its exit status."""
    parser = make_parser(COMMANDS)
    # Flags after -- belong to the experiment and may look like ours.
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, extra = argv[:cut], argv[cut + 1 :]
    command = next((word for word in argv if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        if any(paper.slug == command for paper in read_papers(planned=True)):
            fail(f"'{command}' is a paper: python -m experiments show {command}")
        fail(f"no command '{command}'" + near(command, COMMANDS))
    options, unknown = parser.parse_known_args(argv or ["list"])
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if extra and options.command is not run_papers:
        fail("only run takes flags after --")
    options.extra = extra
    return options.command(options)


def list_papers(options: argparse.Namespace) -> int:
    """Prints the papers that match every word and filter."""
    papers = read_papers(planned=True)
    check_known("topic", options.topic, {paper.topic for paper in papers})
    check_known("status", options.status, STATUSES)
    words = [word.lower() for word in options.words]
    found = [
        paper
        for paper in papers
        if all(word in _searched(paper) for word in words)
        and options.topic in (None, paper.topic)
        and options.tier in (None, paper.tier)
        and options.status in (None, paper.status)
    ]
    shown = [p for p in found if p.path or options.all or options.status == "planned"]
    left = len(found) - len(shown)
    if options.json:
        print(json.dumps([_as_dict(paper) for paper in shown], indent=2))
        return 0
    rows = [("slug", "topic", "tier", "status", "title", "year", "claims")]
    for p in shown:
        tail = (p.title, str(p.year), held(p.result))
        rows.append((p.slug, p.topic, str(p.tier), p.status, *tail))
    if shown:
        # On a narrow terminal the title is worth more than the columns before it.
        narrow = columns() < 90
        table([(row[0], *row[3:5]) if narrow else row for row in rows], -3)
        print()
    named = "No paper" if not shown else count(len(shown), "paper")
    more = "; --all shows them" if left else ""
    print(f"{named} shown, {left} planned match too{more}." if left else f"{named}.")
    if not found and words:
        known = {word for paper in papers for word in _searched(paper).split()}
        known |= {paper.slug for paper in papers}
        for word in words:
            if not any(word in text for text in known):
                print(f"No paper has '{word}'{near(word, known)}")
    return 0


def show_paper(options: argparse.Namespace) -> int:
    """Prints all that is known of one paper."""
    paper = _find(options.slug, read_papers(planned=True))
    print(paper.title)
    labelled([("authors", paper.authors), ("year", str(paper.year))])
    labelled([("arXiv", paper.url), ("topic", f"{paper.topic}, tier {paper.tier}")])
    labelled([("kind", paper.kind), ("plan", paper.claim)])
    if not paper.path:
        print("\nnot built yet")
        return 0
    labelled([("where", paper.where), ("differs", paper.differs)])
    labelled([("code", paper.path), ("test", paper.test or "missing")])
    print()
    print(paper.usage)  # whole, to be copied
    for function in paper.functions:
        print()
        print("\n".join(wrapped(function.signature, "    ")))
        print("\n".join(wrapped("    " + function.summary, "    ")))
    if paper.experiment is None:
        print("\nIts experiment is not written yet.")
        return 0
    fields, presets = read_settings(paper)
    module = paper.experiment.removesuffix(".py").replace("/", ".")
    print(f"\npython -m {module} [{' | '.join(presets) or 'full'}]")
    width = max((len(field.name) for field in fields), default=0) + 6
    for field in fields:
        head = f"  --{field.name.replace('_', '-')}".ljust(width)
        about = f"  # {field.about}" if field.about else ""
        text = f"{head}{field.type} = {field.default}{about}"
        print("\n".join(wrapped(text, " " * width)))
    print()
    _show_result(paper)
    return 0


def run_papers(options: argparse.Namespace) -> int:
    """Runs experiments one after the other; returns the worst exit status."""
    papers = read_papers(planned=True)
    chosen = [_find(slug, papers) for slug in dict.fromkeys(options.slugs)]
    if options.all:
        chosen = [paper for paper in papers if paper.experiment]
    if not chosen:
        fail("name a paper, or --all")
    for paper in chosen:
        if not paper.path:
            fail(f"'{paper.slug}' is planned but not built yet")
        if paper.experiment is None:
            fail(f"'{paper.slug}' has no experiment yet")
        if presets := read_settings(paper)[1]:
            check_known("preset", options.preset, presets, f" of {paper.slug}")
    rows, worst = [("paper", "preset", "exit", "seconds", "claims")], 0
    for paper in chosen:
        experiment = Path(str(paper.experiment))
        folder = Path("runs") / paper.topic / experiment.stem
        command = [sys.executable, "-m", ".".join(experiment.with_suffix("").parts)]
        command += [options.preset, *options.extra]
        if options.run_dir:
            folder = options.run_dir
            if len(chosen) > 1:
                folder = folder / paper.topic / experiment.stem
            command += ["--run-dir", str(folder)]
        print(f"== {paper.topic}/{paper.slug} {options.preset}", flush=True)
        before, began = stamp(folder), time.monotonic()
        code = _call(command)
        seconds = f"{time.monotonic() - began:.0f}"
        # An older report in the folder says nothing about this run.
        report = read_report(folder) if stamp(folder) != before else None
        rows.append((paper.slug, options.preset, str(code), seconds, held(report)))
        worst = max(worst, code)
        if code == 130:
            break
    print()
    table(rows)
    if skipped := len(chosen) - len(rows) + 1:
        print(f"Stopped; {count(skipped, 'paper')} not run.")
    return worst


def record_results(options: argparse.Namespace) -> int:
    """Copies the reports of finished full runs to experiments/results."""
    papers = [paper for paper in read_papers() if paper.experiment]
    chosen = [_find(slug, papers) for slug in options.slugs] or papers
    done = refused = 0
    for paper in chosen:
        stem = Path(str(paper.experiment)).stem
        folders = (options.run_dir / paper.topic / stem, options.run_dir)
        folder = next((f for f in folders if (f / "report.json").is_file()), None)
        report = read_report(folder) if folder else None
        if folder == options.run_dir and report and report.get("slug") != stem:
            folder = report = None
        if folder is None and not options.slugs:
            continue
        reason = refusal(paper, report, folder or folders[0])
        if reason or report is None:
            refused += 1
            print(f"{paper.slug}: {reason}", file=sys.stderr)
            continue
        small = {name: value for name, value in report.items() if name != "figures"}
        target = ROOT / "experiments" / "results" / paper.topic / f"{stem}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            without_nan(small), indent=2, ensure_ascii=False, allow_nan=False
        )
        target.write_text(text + "\n", "utf-8")
        print(f"{paper.slug}: {held(report)} claims hold")
        done += 1
    if done:
        print(f"{count(done, 'result')} recorded. Next: python -m jaxzoo.catalogue")
    elif not refused:
        print(f"{options.run_dir}: no report of a run", file=sys.stderr)
    return 0 if done and not refused else 1


def write_gallery(options: argparse.Namespace) -> int:
    """Writes one HTML page over all finished runs."""
    if not options.runs.is_dir():
        fail(f"--runs {options.runs}: no such folder")
    papers = {paper.slug: paper for paper in read_papers(planned=True)}
    found = []
    for file in sorted(options.runs.rglob("report.json")):
        report = read_report(file.parent)
        if not report or not isinstance(report.get("claims"), list):
            print(f"{file}: not a report, skipped", file=sys.stderr)
            continue
        if paper := papers.get(str(report.get("slug"))):
            report |= {"title": paper.title, "arxiv": paper.arxiv}
        found.append({**report, "folder": file.parent})
    output = options.output or options.runs / "index.html"
    found.sort(key=lambda r: (str(r.get("topic")), str(r.get("slug"))))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page(found, title="jaxzoo: papers, measured"), "utf-8")
    except OSError as error:
        fail(f"--output {output}: {error.strerror}")
    print(f"{output}: {count(len(found), 'run')}")
    return 0


COMMANDS = {
    "list": (list_papers, "search the papers"),
    "show": (show_paper, "all about one paper"),
    "run": (run_papers, "run experiments"),
    "record": (record_results, "keep the results of full runs"),
    "report": (write_gallery, "one web page over all runs"),
}


def _find(slug: str, papers: list[Paper]) -> Paper:
    for paper in papers:
        if paper.slug == slug:
            return paper
    return fail(f"no paper '{slug}'" + near(slug, [paper.slug for paper in papers]))


def _searched(paper: Paper) -> str:
    words = (paper.slug, paper.topic, paper.title, paper.claim, paper.authors)
    return " ".join(words).lower()


def _as_dict(paper: Paper) -> dict[str, Any]:
    names = [name for name in Paper.__dataclass_fields__ if name != "root"]
    return {n: getattr(paper, n) for n in names} | {"status": paper.status}


def _show_result(paper: Paper) -> None:
    if not paper.result:
        print("No full run is recorded.")
        return
    result = paper.result
    print(f"Last full run: {result['seconds'] / 60:.1f} minutes")
    for claim in result["claims"]:
        error = claim.get("stderr")
        told = number(claim["measured"]) + (f" ± {number(error)}" if error else "")
        verdict = "holds" if claim["holds"] else "FAILS"
        text = f"  {verdict}: {claim['text']} Measured {told}, bound {claim['bound']}."
        print("\n".join(wrapped(text, "    ")))
    versions = ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items())
    labelled([("device", result.get("device", "")), ("versions", versions)])
    labelled([("commit", result.get("commit") or "unknown")])


def _call(command: list[str]) -> int:
    with subprocess.Popen(command) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal interrupts both; the experiment still saves where it stood.
            process.wait()
            return 130
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # `list | head` has read enough; Python would complain again while it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
