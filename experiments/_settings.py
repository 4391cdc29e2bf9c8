"""An experiment's fields and presets, read from its code: nothing is imported."""

import ast
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments._terminal import fail
from jaxzoo.catalogue import ROOT, Paper


class Option(NamedTuple):
    """One field of an experiment's `Config`."""

    name: str
    type: str
    default: str
    about: str


def read_settings(paper: Paper) -> tuple[list[Option], dict[str, dict[str, Any]]]:
    """The fields of `Config` and the literal settings of each of `PRESETS`."""
    text = (ROOT / str(paper.experiment)).read_text("utf-8")
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        fail(f"{paper.experiment}: {error.msg}, line {error.lineno}")
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
