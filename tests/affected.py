"""What a change can reach is tested first; the rest as long as there is time.

    TESTS_SINCE=MANIFEST TESTS_UNTIL=SECONDS pytest -p tests.affected ...

MANIFEST has a line for each file of the newest commit that has passed everything: the
hash that git gives its contents, and its path. (So no history is needed to compare.)

    git ls-tree -r --format='%(objectname) %(path)' COMMIT > .ci/passed

A test is affected if its file reaches one that is not as it was then, or if what it is
parametrized with does: a case of the contracts has its function's module, a smoke its
experiment. Files reach what they import or name: dotted names of this project anywhere
in their text, and in tests and kernels also files beside them by their mere names.
Affected tests come first, whatever the time; after SECONDS of the epoch others are
skipped, and the summary says how many in one line. The others' order begins elsewhere
for each commit, so that none is always last. Without MANIFEST, and if what holds for
all tests has changed, everything is run. `make test` sets both, `make test-all` none.
"""

import builtins
import functools
import hashlib
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


class Passed:
    """The files of a commit that has passed everything, by their contents."""

    def __init__(self, manifest: Path, root: Path = ROOT):
        lines = manifest.read_text("utf-8").splitlines()
        pairs = (line.split(" ", 1) for line in lines)
        self.root, self.hashes = root, {path: sha1 for sha1, path in pairs}
        self._known: dict[Path, bool] = {}

    def is_changed(self, path: Path) -> bool:
        if path not in self._known:
            data = path.read_bytes() if path.is_file() else b""
            # As git names a blob.
            sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            name = path.relative_to(self.root).as_posix()
            self._known[path] = self.hashes.get(name) != sha1
        return self._known[path]

    def is_all_changed(self) -> bool:
        """Whether something differs that holds for all tests."""
        names = {name for name in self.hashes if name.startswith(EVERYTHING)}
        for place in EVERYTHING:
            names |= {
                path.relative_to(self.root).as_posix()
                for path in (self.root / place).rglob("*")
                if path.is_file() and "__pycache__" not in path.parts
            }
        return any(self.is_changed(self.root / name) for name in names)


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


def is_affected(item: pytest.Item, passed: Passed) -> bool:
    if item.path.relative_to(ROOT).as_posix() in ALWAYS:
        return True
    return any(
        passed.is_changed(path) for start in starts(item) for path in reaches(start)
    )


def in_turn(items: list[Any], start: float) -> list[Any]:
    """The same items from a place on, in [0, 1) of all, and round again."""
    cut = int(start * len(items))
    return items[cut:] + items[:cut]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    since = os.environ.get("TESTS_SINCE")
    if not since or not (ROOT / since).is_file():  # a source archive has no manifest
        return
    passed = Passed(ROOT / since)
    everything = passed.is_all_changed()
    first, others = [], []
    for item in items:
        item.stash[AFFECTED] = everything or is_affected(item, passed)
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
