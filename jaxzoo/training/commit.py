"""How a step of a fit comes to be there, and how it goes: on a disk and in a bucket.

    on a disk    written under `<step>.tmp`, then renamed: it is there whole or not
    in a bucket  written under `<step>`, the manifest last: without it there is no step

A bucket renames nothing, so that the one object which is written or removed at once is
the manifest: a step begins and ends with it.
"""

import os
import shutil
from pathlib import Path

from jaxzoo.training.crash import crash_point
from jaxzoo.training.folder import in_bucket, names, remove
from jaxzoo.training.manifest import MANIFEST

__all__ = [
    "committed",
    "discard",
    "drop_unfinished",
    "give_up",
    "publish",
    "put_aside",
    "staging",
]

ASIDE = f"{MANIFEST}.damaged"


def staging(folder: Path, step: int) -> Path:
    """Where a step is written before it counts."""
    return folder / (str(step) if in_bucket(folder) else f"{step}.tmp")


def publish(staged: Path, step: Path) -> None:
    """Makes a step count whose manifest is written."""
    if not in_bucket(staged):
        staged.rename(step)
        _sync(step.parent)


def _sync(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_up(staged: Path) -> None:
    """Removes what was written of a step, unless it counts already."""
    if not (in_bucket(staged) and _counts(staged)):
        remove(staged)


def committed(folder: Path) -> list[int]:
    """The steps that count, ascending."""
    steps = (int(name) for name in names(folder) if name.isdecimal())
    return sorted(step for step in steps if _counts(folder / str(step)))


def _counts(step: Path) -> bool:
    return (step / MANIFEST).exists() if in_bucket(step) else step.is_dir()


def discard(step: Path) -> None:
    """Removes a step; half of it would look like damage."""
    if in_bucket(step):
        (step / MANIFEST).unlink()
        crash_point("clean.renamed")
        remove(step)
        return
    gone = step.rename(step.with_name(f"{step.name}.old"))
    crash_point("clean.renamed")
    shutil.rmtree(gone)


def put_aside(step: Path) -> Path:
    """Makes a damaged step count no longer, but leaves it to be looked at.

    Returns:
        The path that it has now; in a bucket its manifest's, and the rest stays until
        the step is saved again.
    """
    if in_bucket(step):
        aside = step / ASIDE
        aside.write_bytes((step / MANIFEST).read_bytes())
        (step / MANIFEST).unlink()
        return aside
    aside = step.with_name(f"{step.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    return step.rename(aside)


def drop_unfinished(folder: Path) -> None:
    """Makes the folder of a fit, without what a kill left behind there."""
    if in_bucket(folder):
        for step in (folder / name for name in names(folder) if name.isdecimal()):
            if not ((step / MANIFEST).exists() or (step / ASIDE).exists()):
                remove(step)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.tmp", "*.old"):
        for path in folder.glob(pattern):
            shutil.rmtree(path)
