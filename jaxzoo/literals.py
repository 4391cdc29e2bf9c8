"""What a file of the library says of itself, by `ast`: its `PAPER`, its `__all__`.

Nothing is imported, so that hundreds of files take half a second.
"""

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

FIELDS = {"slug": str, "title": str, "arxiv": str, "year": int}
FIELDS |= {"authors": str, "where": str, "differs": str}


class Function(NamedTuple):
    """One public name of a file: how it is called and what it computes."""

    name: str
    signature: str
    summary: str


def relative(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()


def read_literals(root: Path, file: Path) -> list[dict[str, Any]]:
    text = file.read_text("utf-8")
    start = re.search(r"^PAPER\b[^=\n]*=", text, re.MULTILINE)
    if not start:
        return []
    where = f"{relative(root, file)}:{text.count(chr(10), 0, start.start()) + 1}"
    # Parsing these few lines instead of the file keeps 700 files under half a second.
    end = re.compile(r"^[])}]", re.MULTILINE).search(text, start.end())
    try:
        tree = ast.parse(text[start.start() : end.end()] if end else text)
    except SyntaxError:
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise ValueError(f"{where}: {error.msg}, line {error.lineno}") from None
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        target = node.target if isinstance(node, ast.AnnAssign) else target
        if isinstance(target, ast.Name) and target.id == "PAPER":
            break
    else:
        return []
    assert isinstance(node, ast.Assign | ast.AnnAssign)
    try:
        value = ast.literal_eval(node.value) if node.value else None
    except ValueError:
        raise ValueError(f"{where}: PAPER is not a literal") from None
    return [_checked(where, item) for item in _as_list(value)]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _checked(where: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: PAPER is a {type(item).__name__}, not a dict")
    for field, kind in FIELDS.items():
        if field not in item:
            raise ValueError(f"{where}: PAPER lacks the field {field!r}")
        if type(item[field]) is not kind:
            got = type(item[field]).__name__
            raise ValueError(f"{where}: {field!r} is a {got}, not a {kind.__name__}")
        if item[field] == "" and field != "arxiv":
            raise ValueError(f"{where}: {field!r} is empty")
    if extra := item.keys() - FIELDS.keys():
        raise ValueError(f"{where}: PAPER has no field {min(extra, key=str)!r}")
    return item


def read_functions(file: Path) -> tuple[Function, ...]:
    try:
        body = ast.parse(file.read_text("utf-8")).body
    except SyntaxError as error:
        raise ValueError(f"{file.name}: {error.msg}, line {error.lineno}") from None
    names, nodes = [], {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            nodes[node.name] = node
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = ast.literal_eval(node.value)
    return tuple(_function(name, nodes.get(name)) for name in names)


def _function(name: str, node: ast.FunctionDef | ast.ClassDef | None) -> Function:
    if node is None:
        return Function(name, name, "")
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
        signature = f"{name}({', '.join(fields)})"
    else:
        back = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        signature = f"{name}({ast.unparse(node.args)}){back}"
    summary = (ast.get_docstring(node) or "").split("\n")[0]
    return Function(name, signature, summary)
