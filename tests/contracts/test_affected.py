"""What a change can reach is found, and comes first."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.affected import ROOT, Passed, in_turn, reaches

FORMAT = "%(objectname) %(path)"
FILES = {
    "jaxzoo/core/sums.py": "VALUE = 1\n",
    "jaxzoo/vae/one.py": "from jaxzoo.core.sums import VALUE\n",
    "jaxzoo/vae/two.py": '"""Like jaxzoo.vae.none, which is not there."""\n',
    "pallas_kernels/scan/__init__.py": "from pallas_kernels.scan import ref\n",
    "pallas_kernels/scan/ref.py": "RATE = 2\n",
    "experiments/vae/one.py": "from jaxzoo.vae.one import VALUE\n",
    "tests/vae/helper.py": "import pallas_kernels.scan\n",
    "tests/vae/test_one.py": "COMMAND = 'python -m experiments.vae.one'\n"
    "def test_it(): pass\n",
    "tests/vae/test_two.py": "# Of jaxzoo.vae.two.\ndef test_it(): pass\n",
    "tests/vae/test_helped.py": "HELPER = 'helper'\ndef test_it(): pass\n",
    "pyproject.toml": "[tool.pytest.ini_options]\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    # What CI sets is about this project, not about that one.
    for name in ("TESTS_SINCE", "TESTS_UNTIL"):
        monkeypatch.delenv(name, raising=False)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "tests/affected.py", tmp_path / "tests")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "all")
    return tmp_path


def git(project: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", "-C", str(project), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def manifest(project: Path) -> Path:
    """Of the commit that there is."""
    path = project / "passed"
    path.write_text(git(project, "ls-tree", "-r", "--format", FORMAT, "HEAD"))
    return path


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        # A command in a string, what it imports, and what that does.
        ("tests/vae/test_one.py", ["experiments.vae.one", "jaxzoo.vae.one"]),
        ("tests/vae/test_two.py", ["jaxzoo.vae.two"]),
        ("tests/vae/test_helped.py", ["pallas_kernels.scan.ref", "tests.vae.helper"]),
    ],
)
def test_files_reach_what_they_name(project, start, expected):
    found = reaches(project / start, project)
    names = {p.relative_to(project).with_suffix("").as_posix() for p in found}
    names = {name.replace("/", ".") for name in names}
    assert set(expected) <= names
    assert ("jaxzoo.core.sums" in names) == (start == "tests/vae/test_one.py")


def test_changes_are_of_contents(project):
    passed = Passed(manifest(project), project)
    files = [project / name for name in FILES]
    assert not any(map(passed.is_changed, files)) and not passed.is_all_changed()
    (project / "jaxzoo/vae/two.py").write_text("\n")
    (project / "new.py").write_text("\n")
    (project / "jaxzoo/core/sums.py").unlink()
    passed = Passed(manifest(project), project)  # of the commit, not of the tree
    names = ["jaxzoo/vae/two.py", "new.py", "jaxzoo/core/sums.py"]
    assert all(passed.is_changed(project / name) for name in names)
    assert not passed.is_changed(project / "jaxzoo/vae/one.py")
    (project / "tests/golden").mkdir()
    (project / "tests/golden/a.npz").write_text("")
    assert Passed(manifest(project), project).is_all_changed()


@pytest.mark.parametrize(
    ("file", "ran"),
    [
        ("jaxzoo/core/sums.py", {"test_one"}),
        ("pallas_kernels/scan/ref.py", {"test_helped"}),
        ("pyproject.toml", {"test_one", "test_two", "test_helped"}),
        (None, set()),
    ],
)
def test_when_the_time_is_up_what_is_affected_is_still_run(project, file, ran):
    since = manifest(project)
    if file:
        (project / file).write_text(FILES[file] + "\n# changed\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.affected", "-p"]
    command += ["no:cacheprovider", "-v", "-ra", "tests/vae"]
    env = os.environ | {"TESTS_SINCE": str(since), "TESTS_UNTIL": "0"}
    done = subprocess.run(
        command, cwd=project, env=env, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    passed = {line.split("::")[0] for line in lines if " PASSED" in line}
    assert {Path(name).stem for name in passed} == ran, done.stdout
    assert ("the time is up" in done.stdout) == (len(ran) < 3)


def test_doctests_leave_no_value_behind(project):
    (project / "a.py").write_text('">>> [1]\\n[1]"\n')
    text = "import builtins\ndef test_it(): assert not hasattr(builtins, '_')\n"
    (project / "test_b.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "--doctest-modules", "-p"]
    command += ["no:cacheprovider", "-p", "tests.affected", "a.py", "test_b.py"]
    done = subprocess.run(
        command, cwd=project, capture_output=True, text=True, check=False
    )
    assert "2 passed" in done.stdout, done.stdout


def test_the_order_begins_elsewhere():
    assert in_turn([1, 2, 3, 4], 0.5) == [3, 4, 1, 2]
    assert in_turn([1, 2], 0.0) == [1, 2]
    assert in_turn([], 0.9) == []
