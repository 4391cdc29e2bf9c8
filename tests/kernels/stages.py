"""Tables of which case of a kernel passed which stage, on which version of JAX.

    pytest tests/kernels --junitxml runs/kernels.xml     # once per environment
    python tests/kernels/stages.py runs/*.xml

writes `stages.json` beside this file, where a case keeps what other versions of JAX
passed before, and the tables between the marks of the READMEs. What failed, or was
skipped, in the reports that are given is taken out.
"""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = HERE / "stages.json"
KERNELS = HERE.parents[1] / "pallas_kernels"
MARKS = "<!-- stages -->\n", "<!-- /stages -->\n"
# From the definition down to the machine: each finds what the one before cannot.
STAGES = {
    "oracle": "equals float64",
    "interpreted": "interpreted: equals the definition",
    "simulated": "simulated with race detection",
    "lowered": "lowered",
    "compiled": "compiled for the chip",
    "device": "run on the chip",
}
Case = tuple[str, str, str, str]  # operation, implementation, stage, what of it


def case(item: Any) -> Case | None:
    """What a test with the mark `stage` is a case of."""
    mark = item.get_closest_marker("stage")
    if mark is None:
        return None
    operation, implementation, stage, describe = mark.args
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, expected one of {', '.join(STAGES)}.")
    call = getattr(item, "callspec", None)
    return operation, implementation, stage, describe(**call.params if call else {})


def heads_first(shape: tuple[int, ...], dtype: Any = "float32") -> str:
    """The sizes of queries `[B, K, G, T, H]` and of S keys in attention."""
    batch, key_heads, groups, queries, keys, width = shape
    heads = key_heads * groups
    return (
        f"B={batch} T={queries} S={keys} N={heads} K={key_heads} H={width} "
        f"{getattr(dtype, '__name__', dtype)}"
    )


def read(paths: list[Path]) -> dict[Case, dict[str, bool]]:
    """Whether each case passed, by version, in the reports of pytest."""
    found: dict[Case, dict[str, bool]] = {}
    for path in paths:
        for test in ElementTree.parse(path).iter("testcase"):
            said = {x.get("name"): x.get("value", "") for x in test.iter("property")}
            # A test that was skipped, for want of a compiler, says nothing.
            if "stage" not in said or test.find("skipped") is not None:
                continue
            passed = test.find("failure") is None and test.find("error") is None
            operation, implementation, stage, what = said["stage"].split("|")
            which = operation, implementation, stage, what
            versions = found.setdefault(which, {})
            # A case may be several tests: all of them are to pass.
            version = said["jax"]
            versions[version] = versions.get(version, True) and passed
    return found


def merged(old: list[Any], new: dict[Case, dict[str, bool]]) -> list[list[Any]]:
    """The record with what the reports say of their own versions."""
    known = {tuple(row[:4]): set(row[4]) for row in old}
    for which, versions in new.items():
        before = known.setdefault(which, set())
        for version, passed in versions.items():
            (before.add if passed else before.discard)(version)
    order = list(STAGES)

    def place(row):
        return row[0], row[1], order.index(row[2]), numbers(row[3])

    rows = [[*which, sorted(v, key=numbers)] for which, v in known.items() if v]
    return sorted(rows, key=place)


def numbers(text: str) -> list[Any]:
    """A key that sorts 64 before 128."""
    parts = re.split(r"(\d+)", text)
    return [(int(x), "") if x.isdigit() else (-1, x) for x in parts]


def table(rows: list[Any], operation: str) -> str:
    """Every case of an operation."""
    rows = [row for row in rows if row[0] == operation]
    versions = sorted({v for row in rows for v in row[4]}, key=numbers)
    lines = [
        "| implementation | stage | case | " + " | ".join(f"jax {v}" for v in versions),
        "|---" * (3 + len(versions)),
    ]
    for _, implementation, stage, what, passed in rows:
        cells = ["passed" if v in passed else "" for v in versions]
        lines.append(
            f"| {implementation} | {STAGES[stage]} | {what} | " + " | ".join(cells)
        )
    return "".join(f"{line} |\n" for line in lines)


def summary(rows: list[Any]) -> str:
    """How many cases of each stage passed, on the versions that ran it."""
    counts: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for operation, implementation, stage, _, versions in rows:
        stages = counts.setdefault((operation, implementation), {})
        stages.setdefault(stage, []).extend(versions)
    lines = [
        "| operation | implementation | " + " | ".join(STAGES.values()),
        "|---" * (2 + len(STAGES)),
    ]
    for (operation, implementation), stages in counts.items():
        cells = []
        for stage in STAGES:
            ran = stages.get(stage, [])
            versions = sorted(set(ran), key=numbers)
            cells.append(", ".join(f"{ran.count(v)} on {v}" for v in versions) or "no")
        lines.append(f"| {operation} | {implementation} | " + " | ".join(cells))
    return "".join(f"{line} |\n" for line in lines)


def pages(rows: list[Any]) -> dict[Path, str]:
    """The READMEs with their tables."""
    made = {KERNELS / "README.md": summary(rows)}
    for operation in {row[0] for row in rows}:
        made[KERNELS / operation / "README.md"] = table(rows, operation)
    texts = {}
    for path, rows_of_it in made.items():
        before, _, rest = path.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        texts[path] = before + MARKS[0] + rows_of_it + MARKS[1] + after
    return texts


def load() -> list[Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def main(paths: list[Path]) -> None:
    rows = merged(load(), read(paths))
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    RECORD.write_text(f"[\n{lines}\n]\n")
    for path, text in pages(rows).items():
        path.write_text(text)
    print(f"{RECORD.name}: {len(rows)} cases")


if __name__ == "__main__":
    main([Path(x) for x in sys.argv[1:]])
