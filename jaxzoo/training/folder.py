"""Folders on a disk and in Google Cloud Storage: what differs between the two.

A local folder is a `pathlib.Path`; gs://BUCKET/FOLDER is an `epath.Path`, which has the
same methods and passes for one in our type hints. But an object is written whole or not
at all, so that nothing is appended to it or renamed, and a folder is only a part of
names. Here are the few operations that have to know.
"""

import functools
import hashlib
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import fsspec
import fsspec.config
import tensorstore
from etils import epath

from jaxzoo.training.sinks import MissingExtraError

__all__ = [
    "FolderError",
    "append",
    "facts",
    "file_names",
    "free_bytes",
    "in_bucket",
    "kvstore",
    "local_copy",
    "locate",
    "names",
    "objects",
    "remove",
    "replace",
    "write_later",
    "write_out",
]

SCHEME = re.compile(r"\w\w+:/")  # a drive of Windows has one letter
BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]+[a-z0-9](/[^/]+)+/?")
LATER = 10.0  # seconds; a bucket takes about one write of an object per second
READERS = 16  # objects read at once: each takes tens of milliseconds to begin

# Other processes and tensorstore write too: what was listed before is not so now.
fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False

_waiting: dict[Path, str] = {}
_written_at = -math.inf


class FolderError(ValueError):
    """A folder was named that cannot be one; the message has what was expected."""


def locate(name: str | Path) -> Path:
    """The folder that a person named; it need not be there.

    Args:
        name: a local path, or gs://BUCKET/FOLDER as text: `Path` would make a local
            gs:/BUCKET/FOLDER of it.

    Raises:
        FolderError: it is neither.
        MissingExtraError: it is in a bucket, and gcsfs is not installed.
    """
    if not isinstance(name, str | Path):
        return name  # located before
    text = str(name)
    if not SCHEME.match(text):
        return Path(text).resolve()
    if not BUCKET.fullmatch(text):
        raise FolderError(
            f"folder '{text}' is neither a local path nor, as text, gs://BUCKET/FOLDER."
        )
    try:
        fsspec.get_filesystem_class("gs")
    except ImportError:
        raise MissingExtraError(
            'gcsfs is not installed: pip install "jaxzoo-papers[gcs]".'
        ) from None
    return cast(Path, epath.Path(text))


def in_bucket(path: Path) -> bool:
    """Whether a path is that of objects and not of files."""
    return not isinstance(path, Path)


def kvstore(path: Path) -> dict[str, Any]:
    """What tensorstore calls a path."""
    if not in_bucket(path):
        return {"driver": "file", "path": str(path)}
    bucket, _, below = str(path).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": below}


def objects(folder: Path) -> tensorstore.KvStore:
    """What lies below a folder in a bucket, by its name there."""
    spec = kvstore(folder / "x")
    spec["path"] = spec["path"].removesuffix("x")
    return tensorstore.KvStore.open(spec, context=_context()).result()


@functools.cache
def _context() -> tensorstore.Context:
    return tensorstore.Context()


def names(folder: Path) -> list[str]:
    """What lies in a folder, which need not be there; the names are not sorted."""
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def file_names(folder: Path) -> list[str]:
    """The files at any depth below a folder, as sorted posix paths from there."""
    if in_bucket(folder):
        found = [key.decode() for key in objects(folder).list().result()]
        # Consoles show a folder by an empty object whose name ends in a slash.
        found = [name for name in found if name and not name.endswith("/")]
    else:
        found = [
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() or path.is_symlink()
        ]
    return sorted(found, key=lambda name: name.split("/"))


def facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of files below a folder, by name; a link has none."""
    names = list(names)
    if not in_bucket(folder):
        return {name: _facts_of_file(folder / name) for name in names}
    store = objects(folder)

    def one(name: str) -> dict[str, Any]:
        content = store.read(name).result().value
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def _facts_of_file(path: Path) -> dict[str, Any]:
    if path.is_symlink():
        return {}
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def remove(folder: Path) -> None:
    """Removes a folder with all that is below it, as far as it is there."""
    if in_bucket(folder):
        cast(epath.Path, folder).rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def replace(path: Path, text: str) -> None:
    """Writes a file whole: a reader, or a run after a kill, never sees half of it."""
    if in_bucket(path):
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_later(path: Path, text: str) -> None:
    """Writes a file whole: on a disk at once, in a bucket at the next `write_out`.

    That comes before each checkpoint and at the end; here it comes 10 s after the last.
    """
    if not in_bucket(path):
        replace(path, text)
        return
    _waiting[path] = text
    if time.monotonic() - _written_at > LATER:
        write_out()


def append(path: Path, line: str) -> None:
    """Adds a line to a file: on a disk at once, in a bucket as `write_later` does."""
    if not in_bucket(path):
        with open(path, "a") as file:
            file.write(line)
        return
    before = _waiting.get(path)
    if before is None:
        before = path.read_text() if path.exists() else ""
    write_later(path, before + line)


def write_out() -> None:
    """Writes what waits; what was not written yet cannot be read."""
    global _written_at
    while _waiting:
        path, text = next(iter(_waiting.items()))
        path.write_text(text)
        del _waiting[path]
        _written_at = time.monotonic()


def free_bytes(folder: Path) -> float:
    """How many bytes can still be written; a bucket is never full."""
    return math.inf if in_bucket(folder) else shutil.disk_usage(folder).free


@contextmanager
def local_copy(folder: Path, names: Iterable[str]) -> Iterator[Path]:
    """A local folder with these files of a folder, as far as they are there."""
    if not in_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            if (folder / name).exists():
                Path(place, os.path.basename(name)).write_bytes(
                    (folder / name).read_bytes()
                )
        yield Path(place)
