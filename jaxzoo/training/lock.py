"""One live process per run folder, as long as the system keeps the lock."""

import atexit
import errno
import json
import os
import socket
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: two processes on one folder are not told apart there
    fcntl = None

__all__ = ["FolderInUseError", "hold", "release"]

# What network and FUSE file systems without locks answer: there nobody is told apart.
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}

_held: dict[Path, IO[str]] = {}


class FolderInUseError(Exception):
    """Another live process has the folder; the message names it."""


def hold(file: Path) -> None:
    """Takes the lock `file` for this process; again does nothing.

    The system drops the lock of a process that died, however it died, so that nothing
    stale has to be recognised; the text in the file only says whom to look for.

    Raises:
        FolderInUseError: another process holds it.
    """
    if fcntl is None or file in _held:
        return
    while True:
        opened = open(file, "a+")
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                opened.close()
                return
            opened.seek(0)
            owner = opened.read().strip() or "{}"
            opened.close()
            raise FolderInUseError(_sentence(file, owner)) from None
        # The holder before us may have removed the file between our two calls.
        if file.exists() and os.path.samestat(os.fstat(opened.fileno()), file.stat()):
            break
        opened.close()
    opened.truncate(0)
    opened.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    opened.flush()
    _held[file] = opened
    atexit.register(release, file)


def release(file: Path) -> None:
    """Gives the lock back and removes its file."""
    if opened := _held.pop(file, None):
        file.unlink(missing_ok=True)
        opened.close()


def _sentence(file: Path, owner: str) -> str:
    try:
        told = json.loads(owner)
        who = f"process {told['pid']} on {told['host']}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"{file.parent} is in use by {who}: wait for it, or take another --run-dir."
