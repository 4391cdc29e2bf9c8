"""One live process per run folder.

On a disk the system keeps the lock; in a bucket it is an object with a heartbeat.
"""

import atexit
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: two processes on one folder are not told apart there
    fcntl = None

from jaxzoo.training.folder import in_bucket, objects

__all__ = ["FolderInUseError", "check", "hold", "release"]

BEAT, SILENCE = 4.0, 20.0  # seconds between two beats, and until they have ended

# What network and FUSE file systems without locks answer: there nobody is told apart.
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}

_held: dict[Path, IO[str]] = {}
_beating: dict[Path, "_Heartbeat"] = {}


class FolderInUseError(Exception):
    """Another live process has the folder; the message names it."""


def hold(file: Path, say: Callable[[str], None] = print) -> None:
    """Takes the lock `file` for this process; again does nothing.

    The system drops the lock of a process that died, however it died, so that nothing
    stale has to be recognised; the text in the file only says whom to look for.

    In a bucket the holder writes the object again every 4 s, and whoever finds it there
    watches it for 20 s: only if nothing was written is the holder dead, and the lock
    taken. Each write asks that the object be the one that was seen, so that of two
    processes at most one succeeds. A holder that could not write for 20 s, stopped or
    cut off, may so lose the folder: `check` then says so.

    Args:
        file: lies in the folder that is locked.
        say: is told about the 20 s.

    Raises:
        FolderInUseError: another process holds it.
    """
    if in_bucket(file):
        if file not in _beating:
            _beating[file] = _Heartbeat(file, say)
            atexit.register(release, file)
        return
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
    opened.write(_owner())
    opened.flush()
    _held[file] = opened
    atexit.register(release, file)


def release(file: Path) -> None:
    """Gives the lock back and removes its file."""
    if heartbeat := _beating.pop(file, None):
        heartbeat.stop()
    if opened := _held.pop(file, None):
        file.unlink(missing_ok=True)
        opened.close()


def check(file: Path) -> None:
    """Tells whether a lock in a bucket that this process took is still its own.

    Raises:
        FolderInUseError: another process has taken it.
    """
    if (heartbeat := _beating.get(file)) and heartbeat.lost:
        raise FolderInUseError(_sentence(file, heartbeat.lost))


class _Heartbeat:
    """A thread that writes an object again and again, as long as nobody else does."""

    def __init__(self, file: Path, say: Callable[[str], None]):
        self._store, self._name, self.lost = objects(file.parent), file.name, ""
        self._text = _owner(token=uuid.uuid4().hex)
        self._seen = self._wait_for_silence(file, say)
        self._done = threading.Event()
        self._beat()
        if self.lost:
            raise FolderInUseError(_sentence(file, self.lost))
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def _wait_for_silence(self, file: Path, say: Callable[[str], None]) -> bytes:
        """The generation of the object as nobody, or a holder that died, left it."""
        first = now = self._store.read(self._name).result()
        until = time.monotonic() + SILENCE
        if first.state == "value":
            say(f"{_who(first.value)} had {file.parent}: waiting for its heartbeat.")
        while now.state == "value" and time.monotonic() < until:
            time.sleep(BEAT / 4)
            now = self._store.read(self._name).result()
            beaten = now.stamp.generation != first.stamp.generation
            if now.state == "value" and beaten:
                raise FolderInUseError(_sentence(file, now.value))
        return now.stamp.generation

    def _beat(self) -> None:
        store, name, text = self._store, self._name, self._text
        written = store.write(name, text, if_equal=self._seen).result().generation
        if not written:
            there = store.read(name).result()
            # A write whose answer was lost is sent again, and then meets itself.
            if there.value != text.encode():
                self.lost = there.value.decode() or "{}"
            written = there.stamp.generation
        self._seen = written

    def _go_on(self) -> None:
        while not self.lost and not self._done.wait(BEAT):
            self._beat()

    def stop(self) -> None:
        """Ends the heartbeat; removes the object if it is still ours."""
        self._done.set()
        self._thread.join()
        if not self.lost:
            self._store.write(self._name, None, if_equal=self._seen).result()


def _owner(**more: str) -> str:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **more})


def _sentence(file: Path, owner: str | bytes) -> str:
    who = _who(owner)
    return f"{file.parent} is in use by {who}: wait for it, or take another --run-dir."


def _who(owner: str | bytes) -> str:
    try:
        told = json.loads(owner)
        return f"process {told['pid']} on {told['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
