"""What a change can reach is tested first; the rest as long as there is time.

    TESTS_SINCE=COMMIT TESTS_UNTIL=SECONDS pytest -p tests.affected ...

COMMIT has passed everything. A test is affected if a file has changed since then that
its file reaches, or that what it is parametrized with does: a case of the contracts has
its function's module, a smoke its experiment. Files reach what they import or name:
dotted names of this project anywhere in their text, and in tests and kernels also files
beside them by their mere names. Affected tests come first, whatever the time; after
SECONDS of the epoch others are skipped, and the summary says how many in one line. The
others' order begins elsewhere for each commit, so that none is always last. Without the
two variables, where git does not know COMMIT, and if what holds for all tests has
changed, everything is run.
"""

import builtins
import functools
import os
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = (
    "pyproject.toml",
    "tests/conftest.py",
    "jaxzoo/data/files",
    "tests/golden",
)
# These look at all files of the project.
ALWAYS = ("tests/test_readme.py", "tests/contracts/test_catalogue.py")
# Here files import those beside them without a dotted name.
BESIDE = ("tests", "pallas_kernels")
_DOTTED = re.compile(r"\b(?:jaxzoo|experiments|pallas_kernels|tests)(?:[./]\w+)+")
_WORD = re.compile(r"\b[a-z]\w+\b")


def changed(since: str, root: Path = ROOT) -> set[Path] | None:
    """Files that differ from a commit, committed or not; None if nobody knows."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout

    try:
        git("merge-base", "--is-ancestor", since, "HEAD")
        names = git("diff", "--name-only", "--no-renames", since)
        names += git("ls-files", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        return None
    return {root / name for name in names.splitlines()}


@functools.cache
def named(path: Path, root: Path = ROOT) -> frozenset[Path]:
    """Files of this project that a file names, in its imports or anywhere else."""
    text = path.read_text("utf-8")
    found = set()
    for match in _DOTTED.findall(text):
        parts = re.split(r"[./]", match)
        # The longest part of the name that is a file: the rest are its contents.
        for end in range(len(parts), 0, -1):
            base = root.joinpath(*parts[:end])
            if (module := base.with_suffix(".py")).is_file():
                found.add(module)
                break
            package = [base / "__init__.py", base / "__main__.py"]
            if end > 1 and any(p.is_file() and p.stat().st_size for p in package):
                found |= set(base.glob("*.py"))
                break
    if path.relative_to(root).parts[0] in BESIDE:
        words = set(_WORD.findall(text))
        found |= {p for p in path.parent.glob("*.py") if p.stem in words}
    return frozenset(found - {path})


@functools.cache
def reaches(path: Path, root: Path = ROOT) -> frozenset[Path]:
    """A file and all that it names, directly or through others."""
    found, left = {path}, [path]
    while left:
        new = named(left.pop(), root) - found
        found |= new
        left += new
    return frozenset(found)


def starts(item: pytest.Item) -> Iterable[Path]:
    """The file of a test, and those of what it is parametrized with."""
    yield item.path
    callspec = getattr(item, "callspec", None)
    for value in callspec.params.values() if callspec else ():
        module = getattr(value, "module", value)  # a case of the contracts
        if isinstance(module, str) and re.fullmatch(r"\w+([./]\w+)+", module):
            path = ROOT / (module.removesuffix(".py").replace(".", "/") + ".py")
        else:
            path = module
        if isinstance(path, Path) and path.is_file() and path.suffix == ".py":
            yield path


def is_affected(item: pytest.Item, files: set[Path] | None) -> bool:
    if files is None or item.path.relative_to(ROOT).as_posix() in ALWAYS:
        return True
    return any(not files.isdisjoint(reaches(path)) for path in starts(item))


def in_turn(items: list[Any], start: float) -> list[Any]:
    """The same items from a place on, in [0, 1) of all, and round again."""
    cut = int(start * len(items))
    return items[cut:] + items[:cut]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (since := os.environ.get("TESTS_SINCE")):
        return
    files = changed(since)
    if files is not None and any(
        path.relative_to(ROOT).as_posix().startswith(EVERYTHING) for path in files
    ):
        files = None
    first, others = [], []
    for item in items:
        item.stash[AFFECTED] = is_affected(item, files)
        (first if item.stash[AFFECTED] else others).append(item)
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout
    # Every worker has the same order: xdist asks for that.
    items[:] = first + in_turn(others, int(head[:6] or "0", 16) / 16**6)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    until = float(os.environ.get("TESTS_UNTIL", "inf"))
    if time.time() > until and not item.stash.get(AFFECTED, True):
        pytest.skip("not affected by the change, and the time is up")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    # A doctest leaves its last value there, and tyro, where it is imported after one,
    # puts all builtins into a set: a list in a tuple would be an error.
    builtins.__dict__.pop("_", None)


AFFECTED = pytest.StashKey[bool]()
