"""What the command says: refusals in one sentence, tables and paragraphs that fit."""

import difflib
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import NoReturn


def fail(sentence: str) -> NoReturn:
    """Ends the command with status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def near(word: str, known: Iterable[str]) -> str:
    """A question after the nearest of the known words, or nothing."""
    found = difflib.get_close_matches(word.lower(), list(known), 1, 0.5)
    return f"; did you mean {found[0]}?" if found else ""


def check_known(
    kind: str, name: str | None, names: Iterable[str], of: str = ""
) -> None:
    """Refuses a name that is none of the names."""
    names = sorted(names)
    if name is not None and name not in names:
        hint = near(name, names) or f": there are {', '.join(names)}"
        fail(f"no {kind} '{name}'{of}{hint}")


def count(number: int, noun: str) -> str:
    """A number of things, in the plural where they are not one."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def columns() -> int:
    """How many fit on a line of the terminal."""
    # Into a pipe goes the whole text: a program reads it.
    return shutil.get_terminal_size((10_000, 0)).columns


def table(rows: list[tuple[str, ...]], elastic: int = -1) -> None:
    """Prints aligned columns; the `elastic` one gives way where they do not fit."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    elastic = max(elastic, -len(widths)) if len(widths) > 3 else -1
    over = sum(widths) + 2 * (len(widths) - 1) - columns()
    widths[elastic] = max(widths[elastic] - max(over, 0), 6)
    for row in rows:
        cells = list(row)
        if len(cells[elastic]) > widths[elastic]:
            cells[elastic] = cells[elastic][: widths[elastic] - 1] + "…"
        line = "  ".join(map(str.ljust, cells, widths)).rstrip()
        print(line if len(line) <= columns() else line[: max(columns() - 1, 1)] + "…")


def wrapped(text: str, indent: str) -> list[str]:
    """Lines of at most 88 columns, all but the first behind the indent."""
    width = max(min(columns(), 88), 30)
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False)


def labelled(pairs: list[tuple[str, str]]) -> None:
    """Prints name and text of each pair that has one."""
    for name, text in pairs:
        if text:
            print("\n".join(wrapped(f"{name + ':':<9}{text}", " " * 9)))
