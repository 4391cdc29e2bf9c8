"""What vouches for a step: SHA-256 of every file and of every leaf.

<step>/MANIFEST.json   written when everything else is there
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from jaxzoo.core.tree import leaf_sha256, named_leaves
from jaxzoo.training.crash import crash_point
from jaxzoo.training.folder import facts, file_names, in_bucket, kvstore, names
from jaxzoo.training.hosts import is_first, wait_for_all

__all__ = [
    "MANIFEST",
    "DamagedCheckpoint",
    "damage",
    "read_manifest",
    "wrong_leaf",
    "write_manifest",
]

MANIFEST = "MANIFEST.json"


class DamagedCheckpoint(Exception):
    """What lies on the disk is not what was saved; the message names it."""


def write_manifest(
    folder: Path, step: int, leaves: dict[str, dict[str, Any]], arrays: Any
) -> None:
    """Vouches for a step of which everything else is written; all processes call it.

    Args:
        folder: the step's.
        step: its number.
        leaves: dtype and shape of each leaf by name, as the state has them.
        arrays: what was written, as `leaves` names it.

    Raises:
        DamagedCheckpoint: a part of a leaf that several processes wrote does not read
            back as it was in their memory.
    """
    named = named_leaves(arrays)
    split = {name: leaf for name, leaf in named.items() if not _is_whole(leaf)}
    told = folder / f"parts-{jax.process_index()}.json"
    if split:
        told.write_text(json.dumps({n: _part_hashes(x) for n, x in split.items()}))
    wait_for_all(f"parts of step {step}")
    if not is_first():
        return
    parts = _gathered(folder, list(split))
    for name, leaf in named.items():
        whole = _read_back(folder, name, parts[name]) if name in split else leaf
        leaves[name]["sha256"] = leaf_sha256(whole)
    files = facts(folder, file_names(folder))
    content = {"format": 1, "step": step, "leaves": leaves, "files": files}
    if parts:
        content["parts"] = parts
    content["digest"] = _self_digest(content)
    crash_point("save.manifest")
    _write(folder / MANIFEST, json.dumps(content, indent=1))


def _write(path: Path, text: str) -> None:
    if in_bucket(path):
        path.write_text(text)
        return
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        # The other files are left to the system: if they are lost with the power, the
        # manifest says so and the step before is taken.
        os.fsync(file.fileno())


def _is_whole(leaf: Any) -> bool:
    """Whether this process can look at all of a leaf."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def _part_hashes(leaf: jax.Array) -> dict[str, str]:
    """SHA-256 of the parts of a leaf that lie here, by their place in it."""
    return {
        _place(shard.index, leaf.shape): leaf_sha256(shard.data)
        for shard in leaf.addressable_shards
    }


def _place(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    spans = [i.indices(size)[:2] for i, size in zip(index, shape, strict=True)]
    return ",".join(f"{start}:{stop}" for start, stop in spans)


def _gathered(folder: Path, split: list[str]) -> dict[str, dict[str, str]]:
    """The hashes that all processes left, which then are not files any more."""
    parts: dict[str, dict[str, str]] = {name: {} for name in split}
    told = [name for name in names(folder) if name.startswith("parts-")]
    for path in (folder / name for name in told):
        for name, hashes in json.loads(path.read_text()).items():
            parts[name].update(hashes)
        path.unlink()
    return parts


def _read_back(folder: Path, name: str, parts: dict[str, str]) -> np.ndarray:
    """A leaf from its files, each part as the process that had it told."""
    path = folder / "state" / name.replace("/", ".")
    spec = {"driver": "zarr", "kvstore": kvstore(path)}
    opened = tensorstore.open(spec, read=True)
    whole = opened.result().read().result()
    for place, sha256 in parts.items():
        spans = (map(int, span.split(":")) for span in place.split(","))
        if leaf_sha256(whole[tuple(slice(*span) for span in spans)]) != sha256:
            raise DamagedCheckpoint(
                f"leaf '{name}' [{place}] was written with other bytes than it had."
            )
    return whole


def wrong_leaf(manifest: dict[str, Any], arrays: Any) -> str:
    """The first leaf that did not come back as it was saved, or an empty string.

    A leaf of which this process has a part only is compared where the same part was
    saved by one process; its files have been compared before.
    """
    parts = manifest.get("parts", {})
    for name, leaf in named_leaves(arrays).items():
        if _is_whole(leaf):
            if leaf_sha256(leaf) != manifest["leaves"][name]["sha256"]:
                return name
            continue
        told = parts.get(name, {})
        for place, sha256 in _part_hashes(leaf).items():
            if told.get(place, sha256) != sha256:
                return name
    return ""


def damage(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with one step: at most a sentence per file.

    Args:
        folder: the step's.
        share: (index, count): hashes every count-th file, for one of `count` processes.
    """
    where = f"step {folder.name}"
    try:
        manifest = read_manifest(folder)
        files, step = manifest["files"], manifest["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        return [f"{where}: file '{MANIFEST}' {reason}."]
    found = []
    if str(step) != folder.name:
        found.append(f"{where}: file '{MANIFEST}' is that of step {step}.")
    present = set(file_names(folder))
    for name in sorted(present - files.keys() - {MANIFEST}):
        found.append(f"{where}: file '{name}'{_leaf_of(name)} was not saved with it.")
    mine = dict(list(files.items())[share[0] :: share[1]])
    there = facts(folder, mine.keys() & present)
    for name, saved in mine.items():
        if name not in present:
            found.append(f"{where}: file '{name}'{_leaf_of(name)} is missing.")
        elif there[name] != saved:
            found.append(
                f"{where}: file '{name}'{_leaf_of(name)} is not what was saved."
            )
    return found


def _leaf_of(file: str) -> str:
    parts = file.split("/")
    named = len(parts) > 2 and parts[1] != "array_metadatas"
    return f" (leaf '{parts[1].replace('.', '/')}')" if named else ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a step.

    Raises:
        ValueError: it is damaged.
        FileNotFoundError: there is none.
    """
    content = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it is not a manifest")
    told = content.pop("digest")
    if told != _self_digest(content):
        raise ValueError("its digest differs")
    return content


def _self_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
