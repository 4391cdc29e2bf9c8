"""Checkpoints that cannot lie: Orbax moves the bytes, a manifest vouches for them.

    <folder>/<step>/state/<leaf>/...   what Orbax wrote
    <folder>/<step>/MANIFEST.json      SHA-256 of every file and of every leaf

A step is written under `<step>.tmp`, the manifest last, and committed by one rename:
what stands under its number is whole or was damaged later, and damage shows.

    python -m jaxzoo.training.checkpoint verify|hash|list DIR
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from jaxzoo.core.tree import describe, differences, leaf_sha256, named_leaves
from jaxzoo.training.crash import crash_point

__all__ = ["Checkpoints", "DamagedCheckpoint", "SaveError", "digest", "verify"]

MANIFEST = "MANIFEST.json"


class DamagedCheckpoint(Exception):
    """What lies on the disk is not what was saved; the message names it."""


class SaveError(OSError):
    """A save failed; the message has the folder and the cause. Older steps stay."""


class Checkpoints:
    """The checkpoints of one fit below one folder; a context manager.

    Args:
        folder: absolute path, made if missing.
        keep: how many of the newest steps stay.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder, self._keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in ("*.tmp", "*.old"):  # what a kill left behind
            for path in folder.glob(pattern):
                shutil.rmtree(path)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        names = (path.name for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return max(self.steps(), default=None)

    def wait(self) -> None:
        """Waits for the save under way; raises the error that it met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def save(self, step: int, state: Any) -> None:
        """Saves a pytree of arrays in the background, unless the step is there.

        Raises:
            SaveError: the save before this one failed; the steps before it stay.
        """
        self.wait()
        if (self.folder / str(step)).exists():
            return
        names = {name.replace("/", ".") for name in named_leaves(state)}
        if len(names) < len(jax.tree.leaves(state)):
            raise ValueError(
                "two leaves of 'state' have the same path when '/' and '.' are one: "
                "rename a key, or the two would share a folder."
            )
        crash_point("save.begin")
        # jax arrays are immutable: the thread may read what training goes on from.
        state = jax.tree.map(_own, state)
        self._thread = threading.Thread(target=self._write, args=(step, state))
        self._thread.start()

    def _write(self, step: int, state: Any) -> None:
        temporary, arrays = self.folder / f"{step}.tmp", _data(state)
        try:
            with _orbax() as writer:
                writer.save(temporary / "state", args=ocp.args.PyTreeSave(arrays))
            crash_point("save.arrays")
            _write_manifest(temporary, step, describe(state), arrays)
            crash_point("save.commit")
            temporary.rename(self.folder / str(step))
            _sync(self.folder)
            crash_point("save.committed")
            for old in self.steps()[: -self._keep]:
                # Not deleted in place: half a folder would look like damage.
                gone = (self.folder / str(old)).rename(self.folder / f"{old}.old")
                crash_point("clean.renamed")
                shutil.rmtree(gone)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self._error = _explained(error, self.folder, arrays)

    def restore(self, step: int, like: Any) -> Any:
        """Reads a step into arrays with the shapes, dtypes and shardings of `like`.

        Raises:
            DamagedCheckpoint: a file or leaf is not what was saved; names both.
            ValueError: `like` is another tree; lists the leaves that differ. A dtype is
                never cast.
        """
        folder = self.folder / str(step)
        if damage := _damage(folder):
            raise DamagedCheckpoint(damage[0])
        stored = _manifest(folder)["leaves"]
        if different := differences(stored, describe(like)):
            raise ValueError(
                f"step {step} holds another tree than was asked for: {different}."
            )
        targets = jax.tree.map(_target, _data(like, abstract=True))
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        with _orbax() as reader:
            args = ocp.args.PyTreeRestore(item=targets, restore_args=restore_args)
            arrays = reader.restore(folder / "state", args=args)
        for name, leaf in named_leaves(arrays).items():
            if leaf_sha256(leaf) != stored[name]["sha256"]:
                raise DamagedCheckpoint(
                    f"step {step}: leaf '{name}' came back with other bytes than were "
                    "saved."
                )
        return jax.tree.map(_wrap_key, like, arrays)

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """The newest step that is whole; a damaged one is put aside with a warning."""
        while (step := self.latest()) is not None:
            try:
                return step, self.restore(step, like)
            except DamagedCheckpoint as damage:
                aside = self.folder / f"{step}.damaged"
                if aside.exists():
                    shutil.rmtree(aside)
                (self.folder / str(step)).rename(aside)
                warnings.warn(f"{damage} It is now {aside}.", stacklevel=2)
        return None


def verify(folder: Path) -> list[str]:
    """One sentence for each damage below a step's, a fit's or a run's folder."""
    return [damage for step in _step_folders(folder) for damage in _damage(step)]


def digest(folder: Path) -> str:
    """One SHA-256 of the tree of the newest step below `folder`.

    It covers names, shapes, dtypes and values: equal digests are equal trees.

    Raises:
        DamagedCheckpoint: the step is not what was saved.
        FileNotFoundError: there is no step.
    """
    steps = _step_folders(folder)
    if not steps:
        raise FileNotFoundError(f"{folder} holds no checkpoint.")
    fits = {step.parent for step in steps}
    newest = [max((s for s in steps if s.parent == f), key=_number) for f in fits]
    whole = hashlib.sha256()
    for step in sorted(newest):
        if damage := _damage(step):
            raise DamagedCheckpoint(damage[0])
        whole.update(json.dumps(_manifest(step)["leaves"], sort_keys=True).encode())
    return whole.hexdigest()


def _orbax() -> ocp.Checkpointer:
    # A folder per leaf, so that a damaged file tells which leaf it was.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))


def _write_manifest(
    folder: Path, step: int, leaves: dict[str, dict[str, Any]], arrays: Any
) -> None:
    for name, leaf in named_leaves(arrays).items():
        leaves[name]["sha256"] = leaf_sha256(leaf)
    files = {
        path.relative_to(folder).as_posix(): _file_facts(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"format": 1, "step": step, "leaves": leaves, "files": files}
    content["digest"] = _self_digest(content)
    crash_point("save.manifest")
    with open(folder / MANIFEST, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        # The other files are left to the system: if they are lost with the power, the
        # manifest says so and the step before is taken.
        os.fsync(file.fileno())


def _damage(folder: Path) -> list[str]:
    """What is wrong with one step: at most a sentence per file."""
    where = f"step {folder.name}"
    try:
        manifest = _manifest(folder)
        files, step = manifest["files"], manifest["step"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        return [f"{where}: file '{MANIFEST}' {reason}."]
    found = []
    if str(step) != folder.name:
        found.append(f"{where}: file '{MANIFEST}' is that of step {step}.")
    present = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    }
    for name in sorted(present - files.keys() - {MANIFEST}):
        found.append(f"{where}: file '{name}'{_leaf_of(name)} was not saved with it.")
    for name, facts in files.items():
        if name not in present:
            found.append(f"{where}: file '{name}'{_leaf_of(name)} is missing.")
        elif (folder / name).is_symlink() or _file_facts(folder / name) != facts:
            found.append(
                f"{where}: file '{name}'{_leaf_of(name)} is not what was saved."
            )
    return found


def _leaf_of(file: str) -> str:
    parts = file.split("/")
    named = len(parts) > 2 and parts[1] != "array_metadatas"
    return f" (leaf '{parts[1].replace('.', '/')}')" if named else ""


def _manifest(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(content, dict):
        raise ValueError("it is not a manifest")
    told = content.pop("digest")
    if told != _self_digest(content):
        raise ValueError("its digest differs")
    return content


def _self_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_facts(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(tree: Any, *, abstract: bool = False) -> Any:
    """The tree with typed keys as the integers behind them."""

    def one(leaf: Any) -> Any:
        if not _is_key(leaf):
            return leaf
        if not abstract:
            return jax.random.key_data(leaf)
        data = jax.eval_shape(jax.random.key_data, leaf)
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


def _own(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _wrap_key(like: Any, leaf: Any) -> Any:
    if not _is_key(like):
        return leaf
    return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))


def _explained(error: Exception, folder: Path, arrays: Any) -> Exception:
    """The error of a save, with the folder and, for a full disk, the bytes."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    free = shutil.disk_usage(folder).free
    # tensorstore tells a full disk in words, without an errno.
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(
        error
    )
    why = str(error).partition("\n")[0][:200]
    if full or free < needed:
        why = f"{os.strerror(errno.ENOSPC)}: {needed} bytes are needed, {free} are free"
    explained = SaveError(f"cannot save to {folder}: {why}.")
    explained.__cause__ = error
    return explained


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number(step: Path) -> int:
    return int(step.name)


def _step_folders(folder: Path) -> list[Path]:
    """The steps at or below a folder: itself, a fit's, or of each fit of a run."""
    if _is_step(folder):
        return [folder]
    found = [p for p in [*folder.glob("*"), *folder.glob("*/*")] if _is_step(p)]
    return sorted(found, key=lambda step: (step.parent, _number(step)))


def _is_step(folder: Path) -> bool:
    # A fit may be named by a number too: then its steps lie below it.
    numbered = folder.name.isdecimal() and folder.is_dir()
    return numbered and not any(p.name.isdecimal() for p in folder.iterdir())


def main(argv: list[str]) -> int:
    """The command line: exit status 0, 1 for damage, 2 for a wrong command."""
    if len(argv) != 2 or argv[0] not in {"verify", "hash", "list"}:
        print("usage: checkpoint verify|hash|list DIR", file=sys.stderr)
        return 2
    command, folder = argv[0], Path(argv[1]).resolve()
    steps = _step_folders(folder) if folder.is_dir() else []
    if not steps:
        print(f"error: {folder} holds no checkpoint.", file=sys.stderr)
        return 2
    if command == "list":
        for step in steps:
            print(step.relative_to(folder.parent))
        return 0
    if command == "hash":
        try:
            print(digest(folder))
        except DamagedCheckpoint as damage:
            print(f"error: {damage}", file=sys.stderr)
            return 1
        return 0
    damage = verify(folder)
    for sentence in damage:
        print(sentence)
    print(f"{len(steps)} steps, {len(damage)} damaged files.")
    return 1 if damage else 0


# Orbax tells at every save that there is nothing to merge without OCDBT.
logging.get_absl_logger().addFilter(
    lambda record: "Skipping merge of OCDBT" not in record.getMessage()
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
