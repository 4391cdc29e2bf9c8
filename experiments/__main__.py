"""Finds, shows, runs and reports every paper: `python -m experiments --help`.

Nothing here imports jax or any other package: a list must come faster than a thought.
"""

import argparse
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from jaxzoo.catalogue import ROOT, STATUSES, Paper, number, read_papers
from jaxzoo.training.page import page

EPILOG = """examples:
  python -m experiments list importance weighted
  python -m experiments show iwae
  python -m experiments run vae iwae --preset smoke
  python -m experiments run iwae -- --seeds 3
  python -m experiments run --all
  python -m experiments report
"""


class Option(NamedTuple):
    """One field of an experiment's `Config`."""

    name: str
    type: str
    default: str
    about: str


class Parser(argparse.ArgumentParser):
    """Errors are one sentence that names the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Ends the command with status 2."""
        if found := re.match(r"unrecognized arguments: (-\S+)", message):
            message = f"no option '{found[1]}'"
            message += _near(found[1].split("=")[0], self._option_string_actions)
        _fail(message)


def main(argv: list[str]) -> int:
    """Runs one command; returns its exit status."""
    parser = _parser()
    # Flags after -- belong to the experiment and may look like ours.
    cut = argv.index("--") if "--" in argv else len(argv)
    argv, extra = argv[:cut], argv[cut + 1 :]
    command = next((word for word in argv if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        if any(paper.slug == command for paper in read_papers(planned=True)):
            _fail(f"'{command}' is a paper: python -m experiments show {command}")
        _fail(f"no command '{command}'" + _near(command, COMMANDS))
    options, unknown = parser.parse_known_args(argv or ["list"])
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if extra and options.command is not run_papers:
        _fail("only run takes flags after --")
    options.extra = extra
    return options.command(options)


def list_papers(options: argparse.Namespace) -> int:
    """Prints the papers that match every word and filter."""
    papers = read_papers(planned=True)
    _known("topic", options.topic, {paper.topic for paper in papers})
    _known("status", options.status, STATUSES)
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
        tail = (p.title, str(p.year), _held(p.result))
        rows.append((p.slug, p.topic, str(p.tier), p.status, *tail))
    if shown:
        # On a narrow terminal the title is worth more than the columns before it.
        narrow = _width() < 90
        _table([(row[0], *row[3:5]) if narrow else row for row in rows], -3)
        print()
    named = "No paper" if not shown else _count(len(shown), "paper")
    more = "; --all shows them" if left else ""
    print(f"{named} shown, {left} planned match too{more}." if left else f"{named}.")
    if not found and words:
        known = {word for paper in papers for word in _searched(paper).split()}
        known |= {paper.slug for paper in papers}
        for word in words:
            if not any(word in text for text in known):
                print(f"No paper has '{word}'{_near(word, known)}")
    return 0


def show_paper(options: argparse.Namespace) -> int:
    """Prints all that is known of one paper."""
    paper = _find(options.slug, read_papers(planned=True))
    print(paper.title)
    _lines([("authors", paper.authors), ("year", str(paper.year))])
    _lines([("arXiv", paper.url), ("topic", f"{paper.topic}, tier {paper.tier}")])
    _lines([("kind", paper.kind), ("plan", paper.claim)])
    if not paper.path:
        print("\nnot built yet")
        return 0
    _lines([("where", paper.where), ("differs", paper.differs)])
    _lines([("code", paper.path), ("test", paper.test or "missing")])
    print()
    print(paper.usage)  # whole, to be copied
    for function in paper.functions:
        print()
        print("\n".join(_wrapped(function.signature, "    ")))
        print("\n".join(_wrapped("    " + function.summary, "    ")))
    if paper.experiment is None:
        print("\nIts experiment is not written yet.")
        return 0
    fields, presets = _settings(paper)
    module = paper.experiment.removesuffix(".py").replace("/", ".")
    print(f"\npython -m {module} [{' | '.join(presets) or 'full'}]")
    width = max((len(field.name) for field in fields), default=0) + 6
    for field in fields:
        head = f"  --{field.name.replace('_', '-')}".ljust(width)
        about = f"  # {field.about}" if field.about else ""
        text = f"{head}{field.type} = {field.default}{about}"
        print("\n".join(_wrapped(text, " " * width)))
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
        _fail("name a paper, or --all")
    for paper in chosen:
        if not paper.path:
            _fail(f"'{paper.slug}' is planned but not built yet")
        if paper.experiment is None:
            _fail(f"'{paper.slug}' has no experiment yet")
        if presets := _settings(paper)[1]:
            _known("preset", options.preset, presets, f" of {paper.slug}")
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
        before, began = _stamp(folder), time.monotonic()
        code = _call(command)
        seconds = f"{time.monotonic() - began:.0f}"
        # An older report in the folder says nothing about this run.
        report = _report(folder) if _stamp(folder) != before else None
        rows.append((paper.slug, options.preset, str(code), seconds, _held(report)))
        worst = max(worst, code)
        if code == 130:
            break
    print()
    _table(rows)
    if skipped := len(chosen) - len(rows) + 1:
        print(f"Stopped; {_count(skipped, 'paper')} not run.")
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
        report = _report(folder) if folder else None
        if folder == options.run_dir and report and report.get("slug") != stem:
            folder = report = None
        if folder is None and not options.slugs:
            continue
        reason = _refusal(paper, report, folder or folders[0])
        if reason or report is None:
            refused += 1
            print(f"{paper.slug}: {reason}", file=sys.stderr)
            continue
        small = {name: value for name, value in report.items() if name != "figures"}
        target = ROOT / "experiments" / "results" / paper.topic / f"{stem}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_plain(small), indent=2, ensure_ascii=False, allow_nan=False)
        target.write_text(text + "\n", "utf-8")
        print(f"{paper.slug}: {_held(report)} claims hold")
        done += 1
    if done:
        print(f"{_count(done, 'result')} recorded. Next: python -m jaxzoo.catalogue")
    elif not refused:
        print(f"{options.run_dir}: no report of a run", file=sys.stderr)
    return 0 if done and not refused else 1


def write_gallery(options: argparse.Namespace) -> int:
    """Writes one HTML page over all finished runs."""
    if not options.runs.is_dir():
        _fail(f"--runs {options.runs}: no such folder")
    papers = {paper.slug: paper for paper in read_papers(planned=True)}
    found = []
    for file in sorted(options.runs.rglob("report.json")):
        report = _report(file.parent)
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
        _fail(f"--output {output}: {error.strerror}")
    print(f"{output}: {_count(len(found), 'run')}")
    return 0


COMMANDS = {
    "list": (list_papers, "search the papers"),
    "show": (show_paper, "all about one paper"),
    "run": (run_papers, "run experiments"),
    "record": (record_results, "keep the results of full runs"),
    "report": (write_gallery, "one web page over all runs"),
}


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    about = "Every paper of jaxzoo as a claim that runs. Without a command: list."
    parser = Parser(
        prog="python -m experiments",
        description=about,
        epilog=EPILOG,
        formatter_class=shape,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="command", parser_class=Parser)
    made = {}
    for name, (function, text) in COMMANDS.items():
        sub = made[name] = commands.add_parser(
            name, help=text, description=function.__doc__, allow_abbrev=False
        )
        sub.set_defaults(command=function, parser=sub)
    parser.set_defaults(command=list_papers, parser=parser)
    add = made["list"].add_argument
    add("words", nargs="*", help="looked for in slug, topic, title, claim and authors")
    add("--topic", help="one topic, such as vae")
    add("--tier", type=_tier, help="1 pillar, 2 widely useful, 3 special, 4 miniature")
    add("--status", help=", ".join(STATUSES))
    add("--json", action="store_true", help="a JSON array instead of a table")
    add("--all", action="store_true", help="also papers that are planned")
    made["show"].add_argument("slug")
    add = made["run"].add_argument
    add("slugs", nargs="*", metavar="slug")
    add("--all", action="store_true", help="every paper that is built")
    add("--preset", default="full", help="smoke, full, ... (default: full)")
    add("--run-dir", type=Path, help="where to write (default: runs/TOPIC/SLUG)")
    made["run"].usage = "python -m experiments run SLUG... [options] [-- FLAGS]"
    made["run"].epilog = "FLAGS go to each experiment; `show SLUG` lists them."
    add = made["record"].add_argument
    add("slugs", nargs="*", metavar="slug", help="default: all that have a report")
    add("--run-dir", type=Path, default=Path("runs"), help="default: runs")
    add = made["report"].add_argument
    add("--runs", type=Path, default=Path("runs"), help="default: runs")
    add("--output", type=Path, default=None, help="default: RUNS/index.html")
    return parser


def _tier(text: str) -> int:
    if text not in {"1", "2", "3", "4"}:
        raise argparse.ArgumentTypeError(f"'{text}' is not 1, 2, 3 or 4")
    return int(text)


def _fail(sentence: str) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _known(kind: str, name: str | None, names: Iterable[str], of: str = "") -> None:
    names = sorted(names)
    if name is not None and name not in names:
        hint = _near(name, names) or f": there are {', '.join(names)}"
        _fail(f"no {kind} '{name}'{of}{hint}")


def _find(slug: str, papers: list[Paper]) -> Paper:
    for paper in papers:
        if paper.slug == slug:
            return paper
    return _fail(f"no paper '{slug}'" + _near(slug, [paper.slug for paper in papers]))


def _searched(paper: Paper) -> str:
    words = (paper.slug, paper.topic, paper.title, paper.claim, paper.authors)
    return " ".join(words).lower()


def _as_dict(paper: Paper) -> dict[str, Any]:
    names = [name for name in Paper.__dataclass_fields__ if name != "root"]
    return {n: getattr(paper, n) for n in names} | {"status": paper.status}


def _held(report: dict[str, Any] | None) -> str:
    claims = report.get("claims") if report else None
    return f"{sum(c['holds'] for c in claims)}/{len(claims)}" if claims else "-"


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _width() -> int:
    # Into a pipe goes the whole text: a program reads it.
    return shutil.get_terminal_size((10_000, 0)).columns


def _table(rows: list[tuple[str, ...]], elastic: int = -1) -> None:
    """Prints aligned columns; the `elastic` one gives way where they do not fit."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    elastic = max(elastic, -len(widths)) if len(widths) > 3 else -1
    over = sum(widths) + 2 * (len(widths) - 1) - _width()
    widths[elastic] = max(widths[elastic] - max(over, 0), 6)
    for row in rows:
        cells = list(row)
        if len(cells[elastic]) > widths[elastic]:
            cells[elastic] = cells[elastic][: widths[elastic] - 1] + "…"
        line = "  ".join(map(str.ljust, cells, widths)).rstrip()
        print(line if len(line) <= _width() else line[: max(_width() - 1, 1)] + "…")


def _wrapped(text: str, indent: str) -> list[str]:
    width = max(min(_width(), 88), 30)
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False)


def _lines(pairs: list[tuple[str, str]]) -> None:
    for name, text in pairs:
        if text:
            print("\n".join(_wrapped(f"{name + ':':<9}{text}", " " * 9)))


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
        print("\n".join(_wrapped(text, "    ")))
    versions = ", ".join(f"{k} {v}" for k, v in result.get("versions", {}).items())
    _lines([("device", result.get("device", "")), ("versions", versions)])
    _lines([("commit", result.get("commit") or "unknown")])


def _settings(paper: Paper) -> tuple[list[Option], dict[str, dict[str, Any]]]:
    """The fields of `Config` and the literal settings of each of `PRESETS`."""
    text = (ROOT / str(paper.experiment)).read_text("utf-8")
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        _fail(f"{paper.experiment}: {error.msg}, line {error.lineno}")
    fields: list[Option] = []
    presets: dict[str, dict[str, Any]] = {}
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            fields = list(_fields(node, text.splitlines()))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            named = isinstance(target, ast.Name) and target.id == "PRESETS"
            if named and isinstance(node.value, ast.Dict):
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(key, ast.Constant):
                        presets[str(key.value)] = _keywords(value)
    return fields, presets


def _fields(node: ast.ClassDef, lines: list[str]) -> Iterator[Option]:
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign):
            continue
        # As in tyro, a field is explained by the docstring below or a comment beside.
        about = lines[(item.end_lineno or 1) - 1].encode()[item.end_col_offset or 0 :]
        about = about.decode().strip().removeprefix("#").strip()
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            about = " ".join(str(after.value.value).split())
        above = item.lineno - 2
        if not about and lines[above].strip().startswith("#"):
            about = lines[above].strip().lstrip("# ")
        default = ast.unparse(item.value) if item.value else "required"
        yield Option(
            ast.unparse(item.target), ast.unparse(item.annotation), default, about
        )


def _keywords(call: ast.expr) -> dict[str, Any]:
    found = {}
    for word in call.keywords if isinstance(call, ast.Call) else ():
        try:
            found[word.arg or ""] = ast.literal_eval(word.value)
        except ValueError:
            continue
    return found


def _refusal(paper: Paper, report: dict[str, Any] | None, folder: Path) -> str:
    """Why a report cannot be the committed record; empty where it can."""
    if report is None:
        return f"{folder / 'report.json'} is missing or damaged"
    if report.get("preset") != "full":
        return f"the run in {folder} is of preset {report.get('preset')}, not full"
    if report.get("status") != "finished":
        return f"the run in {folder} is not finished"
    if lacks := {"claims", "seconds", "config"} - report.keys():
        return f"the report in {folder} lacks {min(lacks)}"
    # `full --steps 10` still calls itself full; only its settings tell.
    fields, presets = _settings(paper)
    full, config = presets.get("full", {}), report["config"]
    for field in fields:
        try:
            wanted = full.get(field.name, ast.literal_eval(field.default))
        except (ValueError, SyntaxError):
            continue
        wanted = json.loads(json.dumps(wanted, default=str))
        if field.name in config and config[field.name] != wanted:
            told = f"{field.name} {config[field.name]} where full has {wanted}"
            return f"the run in {folder} has {told}"
    return ""


def _report(folder: Path) -> dict[str, Any] | None:
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) else None


def _stamp(folder: Path) -> int | None:
    file = folder / "report.json"
    return file.stat().st_mtime_ns if file.is_file() else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value != value else value


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
