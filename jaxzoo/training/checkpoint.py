"""Checkpoints that cannot lie: Orbax moves the bytes, a manifest vouches for them.

    <folder>/<step>/state/<leaf>/...   what Orbax wrote
    <folder>/<step>/MANIFEST.json      SHA-256 of every file and of every leaf

A step that counts (`commit` tells which do) was written whole; if it was damaged later,
that shows. The folder lies on a disk or in a bucket, gs://BUCKET/FOLDER.

    python -m jaxzoo.training.checkpoint verify|hash|list DIR
"""

import errno
import hashlib
import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from jaxzoo.core.tree import describe, differences, named_leaves
from jaxzoo.training import commit
from jaxzoo.training.crash import crash_point
from jaxzoo.training.folder import (
    file_names,
    free_bytes,
    in_bucket,
    locate,
    remove,
    write_out,
)
from jaxzoo.training.hosts import everyone, from_first, is_first, wait_for_all
from jaxzoo.training.key_data import with_data, wrap_key
from jaxzoo.training.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    damage,
    read_manifest,
    write_manifest,
    wrong_leaf,
)

__all__ = ["Checkpoints", "DamagedCheckpoint", "SaveError", "digest", "verify"]


class SaveError(OSError):
    """A save failed; the message has the folder and the cause. Older steps stay."""


class Checkpoints:
    """The checkpoints of one fit below one folder; a context manager.

    Args:
        folder: absolute path, made if missing, or one that `folder.locate` gave.
        keep: how many of the newest steps stay.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        self.folder, self._keep = folder, keep
        if is_first():
            commit.drop_unfinished(folder)
        wait_for_all("opened the checkpoints")
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        # After a second Ctrl-C nobody waits for a save, which may take minutes.
        if kind is not KeyboardInterrupt:
            self.wait()

    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return commit.committed(self.folder)

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
        """Saves a pytree of arrays, unless the step is there.

        The arrays may be donated as soon as this returns: a process that is alone has
        copied them to the host and writes in the background. Several processes write
        together, each its own parts, before any of them goes on.

        Raises:
            SaveError: this save or the one before it failed; the older steps stay.
        """
        self.wait()
        if from_first(step in self.steps()):
            return
        write_out()  # a checkpoint counts on the lines that were logged before it
        names = {name.replace("/", ".") for name in named_leaves(state)}
        if len(names) < len(jax.tree.leaves(state)):
            raise ValueError(
                "two leaves of 'state' have the same path when '/' and '.' are one: "
                "rename a key, or the two would share a folder."
            )
        crash_point("save.begin")
        arrays = jax.tree.map(_on_host, with_data(state))
        if jax.process_count() == 1:
            work = (step, describe(state), arrays)
            self._thread = threading.Thread(target=self._write, args=work)
            self._thread.start()
        else:
            self._write(step, describe(state), arrays)
            self.wait()

    def _write(self, step: int, leaves: dict[str, Any], arrays: Any) -> None:
        temporary = commit.staging(self.folder, step)
        try:
            if is_first():
                remove(temporary)  # in a bucket a damaged step may lie there
            with _orbax() as writer:
                writer.save(temporary / "state", args=ocp.args.PyTreeSave(arrays))
            crash_point("save.arrays")
            write_manifest(temporary, step, leaves, arrays)
            crash_point("save.commit")
            if is_first():
                self._commit(step, temporary)
            wait_for_all(f"saved {step}")
        except Exception as error:
            try:
                commit.give_up(temporary)
            finally:
                self._error = _explained(error, self.folder, arrays)

    def _commit(self, step: int, temporary: Path) -> None:
        commit.publish(temporary, self.folder / str(step))
        crash_point("save.committed")
        for old in self.steps()[: -self._keep]:
            commit.discard(self.folder / str(old))

    def restore(self, step: int, like: Any) -> Any:
        """Reads a step into arrays with the shapes, dtypes and shardings of `like`.

        Raises:
            DamagedCheckpoint: a file or leaf is not what was saved; names both.
            ValueError: `like` is another tree; lists the leaves that differ. A dtype is
                never cast.
        """
        folder = self.folder / str(step)
        share = jax.process_index(), jax.process_count()
        _raise_any([sentence[:400] for sentence in damage(folder, share)[:1]])
        manifest = read_manifest(folder)
        if different := differences(manifest["leaves"], describe(like)):
            raise ValueError(
                f"step {step} holds another tree than was asked for: {different}."
            )
        targets = jax.tree.map(_target, with_data(like, abstract=True))
        restore_args = ocp.checkpoint_utils.construct_restore_args(targets)
        with _orbax() as reader:
            args = ocp.args.PyTreeRestore(item=targets, restore_args=restore_args)
            arrays = reader.restore(folder / "state", args=args)
        name = wrong_leaf(manifest, arrays)
        other = (
            f"step {step}: leaf '{name}' came back with other bytes than were saved."
        )
        _raise_any([other] if name else [])
        return jax.tree.map(wrap_key, like, arrays)

    def restore_latest(self, like: Any) -> tuple[int, Any] | None:
        """The newest step that is whole; a damaged one is put aside with a warning."""
        while (step := from_first(self.latest())) is not None:
            try:
                return step, self.restore(step, like)
            except DamagedCheckpoint as found:
                aside = ""
                if is_first():
                    aside = str(commit.put_aside(self.folder / str(step)))
                aside = from_first(aside)
                warnings.warn(f"{found} It is now {aside}.", stacklevel=2)
        return None


def _raise_any(found: list[str]) -> None:
    """Raises in every process what any of them found."""
    if sentences := [sentence for told in everyone(found) for sentence in told]:
        raise DamagedCheckpoint(sentences[0])


def verify(folder: Path) -> list[str]:
    """One sentence for each damage below a step's, a fit's or a run's folder."""
    return [found for step in _step_folders(folder) for found in damage(step)]


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
        if found := damage(step):
            raise DamagedCheckpoint(found[0])
        leaves = read_manifest(step)["leaves"]
        whole.update(json.dumps(leaves, sort_keys=True).encode())
    return whole.hexdigest()


def _orbax() -> ocp.Checkpointer:
    # A folder per leaf, so that a damaged file tells which leaf it was.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))


def _on_host(leaf: Any) -> Any:
    """A copy in host memory, so that training may go on in the leaf's own."""
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.copy()
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _explained(error: Exception, folder: Path, arrays: Any) -> Exception:
    """The error of a save, with the folder and, for a full disk, the bytes."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    free = free_bytes(folder)
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


def _number(step: Path) -> int:
    return int(step.name)


def _step_folders(folder: Path) -> list[Path]:
    """The steps at or below a folder: itself, a fit's, or of each fit of a run."""
    if in_bucket(folder):
        told = [folder / name for name in file_names(folder)]
        found = [path.parent for path in told if path.name == MANIFEST]
        return sorted(found, key=lambda step: (step.parent, _number(step)))
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
    command, folder = argv[0], locate(argv[1])
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
        except DamagedCheckpoint as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    found = verify(folder)
    for sentence in found:
        print(sentence)
    print(f"{len(steps)} steps, {len(found)} damaged files.")
    return 1 if found else 0


# Orbax tells at every save that there is nothing to merge without OCDBT.
logging.get_absl_logger().addFilter(
    lambda record: "Skipping merge of OCDBT" not in record.getMessage()
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
