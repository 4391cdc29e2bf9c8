"""A method file can be carried into another project with at most two files more."""

import ast
import shutil
import subprocess
import sys

import pytest

from jaxzoo.catalogue import ROOT, read_papers

PATHS = sorted({p.path for p in read_papers() if p.path.startswith("jaxzoo/")})


def needs(path: str) -> set[str]:
    """The other files of jaxzoo that a file imports, directly or through them."""
    found, left = set(), [path]
    while left:
        for node in ast.walk(ast.parse((ROOT / left.pop()).read_text("utf-8"))):
            module = isinstance(node, ast.ImportFrom) and node.module or ""
            if module.startswith(("jaxzoo.", "pallas_kernels.")):
                other = module.replace(".", "/") + ".py"
                if other not in found:
                    found.add(other)
                    left.append(other)
    return found


@pytest.mark.parametrize("path", PATHS)
def test_at_most_two_files_come_along(path, tmp_path):
    others = needs(path)
    assert len(others) <= 2, others
    for file in {path, *others}:
        target = tmp_path / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, target)
        for folder in target.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
    module = path.removesuffix(".py").replace("/", ".")
    code = f"import {module} as m; print(m.__file__)"
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[0] = {str(tmp_path)!r}; {code}",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / path)


def test_iwae_needs_typed_and_stats_alone():
    assert needs("jaxzoo/vae/iwae.py") == {
        "jaxzoo/core/typed.py",
        "jaxzoo/core/stats.py",
    }
