"""A method file can be carried into another project with at most two files more.

Where that would make a file longer than 320 lines it is three: length gives way last.
"""

import ast
import json
import shutil
import subprocess
import sys

import pytest

from jaxzoo.catalogue import ROOT, read_papers

PATHS = sorted({p.path for p in read_papers() if p.path.startswith("jaxzoo/")})
# Its exchange of signs is a file of its own, over `collectives`.
THREE = {"jaxzoo/distributed/one_bit_adam.py"}
# One process imports all copies, each as if there were no other: jax loads once.
IMPORT_EACH = """
import importlib, json, sys
copies, told = json.load(sys.stdin), {}
for folder, module in copies:
    for name in [n for n in sys.modules if n.split(".")[0] in sys.argv[1:]]:
        del sys.modules[name]
    sys.path[0] = folder
    importlib.invalidate_caches()
    try:
        told[module] = importlib.import_module(module).__file__
    except Exception as error:
        told[module] = repr(error)
print(json.dumps(told))
"""


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
def test_at_most_two_files_come_along(path):
    assert len(needs(path)) <= (3 if path in THREE else 2), needs(path)


def test_the_copies_can_be_imported(tmp_path):
    copies = []
    for path in PATHS:
        module = path.removesuffix(".py").replace("/", ".")
        folder = tmp_path / module
        for file in {path, *needs(path)}:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, target)
            for parent in target.relative_to(folder).parents[:-1]:
                (folder / parent / "__init__.py").touch()
        copies.append((str(folder), module))
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, "jaxzoo", "pallas_kernels"],
        input=json.dumps(copies), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = {
        module: f"{folder}/{module.replace('.', '/')}.py" for folder, module in copies
    }
    assert json.loads(done.stdout) == expected


def test_iwae_needs_typed_and_stats_alone():
    assert needs("jaxzoo/vae/iwae.py") == {
        "jaxzoo/core/typed.py",
        "jaxzoo/core/stats.py",
    }
