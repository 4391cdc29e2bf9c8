"""One self-contained HTML page over finished runs: claims, numbers, pictures.

Plain text in, plain text out. The page fetches nothing: the style stands in it and the
figures are embedded, so that it can be mailed, archived or opened from a pod's disk.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --line: #dde2ea;
  --ground: #f5f6f9; --card: #fff; --link: #2557a7; --good: #166b3a; --bad: #a3232b;
  --good-ground: #dcf3e5; --bad-ground: #fbe1e2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ee; --soft: #98a2b3;
  --line: #2f3744; --ground: #12161d; --card: #1a2029; --link: #8ab4f8;
  --good: #7fdba4; --bad: #ff9a9f; --good-ground: #143524; --bad-ground: #43191d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 58rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 .3rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 0 0 .2rem; }
h3 { font-size: .8rem; letter-spacing: .06em; text-transform: uppercase;
  color: var(--soft); margin: 1.4rem 0 .3rem; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
.soft { color: var(--soft); font-size: .88rem; margin: 0; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.2rem 1.3rem 1.3rem; margin: 1.2rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0;
  border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: .82rem; }
tbody th { font-weight: 400; color: var(--soft); }
.values th, .values td { padding-top: .2rem; padding-bottom: .2rem; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.badge { display: inline-block; border-radius: 99px; padding: 0 .6rem;
  font-size: .8rem; font-weight: 600; white-space: nowrap; }
.yes { color: var(--good); background: var(--good-ground); }
.no { color: var(--bad); background: var(--bad-ground); }
figure { margin: 1rem 0 0; } figcaption { font-size: .88rem; color: var(--soft); }
figcaption b { color: var(--ink); }
img { display: block; max-width: 100%; height: auto; margin: 0 0 .4rem;
  border: 1px solid var(--line); border-radius: 6px; background: #fff; }
details { margin-top: 1rem; font-size: .92rem; }
summary { cursor: pointer; color: var(--soft); }
code { font: .85em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 34rem) { article { padding: 1rem .9rem; border-radius: 8px; }
  .claims thead { display: none; } .claims tr { display: block; padding: .5rem 0;
  border-top: 1px solid var(--line); } .claims tr:first-child { border-top: 0; }
  .claims td { border: 0; padding: 0 .5rem 0 0; display: inline-block; }
  .claims td:first-child { display: block; }
  .claims td + td + .number::before { content: "bound "; color: var(--soft); } }
"""


def page(runs: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Returns one HTML page over `runs` that needs no other file.

    Args:
        runs: parsed `report.json` files, each with `folder`, the path it came from, to
            find the figures, and where known `arxiv`, the paper's identifier.
        title: the heading of the page.

    Returns:
        The page as text. Every string of a run is escaped; a figure that is missing,
        not a PNG or outside the run's folder is named instead of shown.
    """
    badge = _badge(sum((list(_claims(run)) for run in runs), []))
    many = len(runs) > 1
    head = f"<h1>{escape(title)}</h1>\n"
    if many:
        head += f"<p class=soft>{len(runs)} runs {badge}</p>\n{_index(runs)}"
    if not runs:
        head += "<p class=soft>No finished run was found.</p>\n"
    body = "".join(_run(run, f"run-{i}", title) for i, run in enumerate(runs))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{head}{body}</main>\n</body>\n</html>\n"
    )


def _index(runs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f'<a href="#run-{i}">{_text(run, "slug")}</a><td>{_text(run, "topic")}'
        f"<td>{_text(run, 'preset')}<td>{_badge(_claims(run))}"
        for i, run in enumerate(runs)
    ]
    body = "".join(f"<tr><td>{row}\n" for row in rows)
    head = "<tr><th>paper<th>topic<th>preset<th>claims"
    return f"<div class=scroll><table><thead>{head}<tbody>\n{body}</table></div>\n"


def _run(run: Mapping[str, Any], anchor: str, page_title: str) -> str:
    name, arxiv = str(run.get("title") or run.get("slug") or "untitled"), _arxiv(run)
    # A page of one run already carries the paper's title as its heading.
    title = "" if name == page_title else f"<h2>{escape(name)}</h2>\n"
    facts = [f"<code>{_text(run, 'topic')}/{_text(run, 'slug')}</code>"]
    facts += [escape(str(run["preset"]))] if run.get("preset") else []
    facts += [_duration(run["seconds"])] if _is_number(run.get("seconds")) else []
    facts += [escape(str(run["device"]))] if run.get("device") else []
    facts += [f'<a href="https://arxiv.org/abs/{arxiv}">arXiv {arxiv}</a>'] * bool(
        arxiv
    )
    claims = "".join(
        f"<tr><td>{_text(claim, 'text')}<td class=number>{_measured(claim)}"
        f"<td class=number>{_text(claim, 'bound')}<td>{_badge([claim])}\n"
        for claim in _claims(run)
    )
    head = "<tr><th>claim<th>measured<th>bound<th>"
    parts = [
        f'<article id="{anchor}">\n{title}<p class=soft>{" · ".join(facts)}</p>\n',
        f"<h3>Claims</h3>\n<table class=claims><thead>{head}<tbody>\n{claims}</table>\n"
        if claims
        else "<p class=soft>This run makes no claim.</p>\n",
    ]
    figures = [f for f in run.get("figures") or () if isinstance(f, Mapping)]
    parts += ["<h3>Figures</h3>\n"] * bool(figures)
    parts += [_figure(figure, Path(run.get("folder", "."))) for figure in figures]
    parts.append(_table("Metrics", run.get("metrics")))
    about = {"commit": run.get("commit") or "unknown"} | dict(run.get("versions") or {})
    inner = _table("Config", run.get("config")) + _table("Environment", about)
    parts.append(f"<details><summary>Config and environment</summary>{inner}</details>")
    return "".join(parts) + "\n</article>\n"


def _figure(figure: Mapping[str, Any], folder: Path) -> str:
    caption = f"<b>{_text(figure, 'title')}</b> {_text(figure, 'caption')}"
    file, name = folder / str(figure.get("file", "")), _text(figure, "file")
    try:
        # A report names files of its own folder; any other would leak into the page.
        inside = file.resolve().is_relative_to(folder.resolve())
        data = file.read_bytes() if inside else b""
    except OSError:
        data = b""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        text = f"(the picture {name} is missing or not a PNG)"
        return f"<figure><figcaption>{caption} {text}</figcaption></figure>\n"
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img alt="{_text(figure, "title")}" src="{source}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _table(title: str, values: Any) -> str:
    if not isinstance(values, Mapping) or not values:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{escape(str(name))}<td class=number>{_value(value)}\n"
        for name, value in values.items()
    )
    table = f"<table class=values><tbody>\n{rows}</table>"
    return f"<h3>{title}</h3>\n<div class=scroll>{table}</div>\n"


def _badge(claims: Iterable[Mapping[str, Any]]) -> str:
    held = [claim.get("holds") is True for claim in claims]
    if not held:
        return ""
    word = "holds" if all(held) else "fails"
    if len(held) > 1:
        word = f"{sum(held)} of {len(held)} hold"
    return f"<span class='badge {'yes' if all(held) else 'no'}'>{word}</span>"


def _measured(claim: Mapping[str, Any]) -> str:
    measured, error = claim.get("measured"), claim.get("stderr")
    known = _is_number(measured) and _is_number(error)
    return _value(measured) + (f" ± {error:.2g}" if known else "")


def _claims(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [claim for claim in run.get("claims") or () if isinstance(claim, Mapping)]


def _arxiv(run: Mapping[str, Any]) -> str:
    return escape(str(run.get("arxiv") or ""))


def _text(values: Mapping[str, Any], name: str) -> str:
    return escape(str(values.get(name, "")))


def _value(value: Any) -> str:
    if value is None:
        return "not a number"
    if _is_number(value):
        return escape(f"{value:.4g}" if isinstance(value, float) else str(value))
    return escape(value if isinstance(value, str) else json.dumps(value, default=str))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
