"""One process under the launcher, and what it writes, without jax's C++ stacks."""

import collections
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["EXIT_CRASHED", "Child"]

EXIT_CRASHED = 70  # an error that is no claim's
_PR_SET_PDEATHSIG = 1

# Log lines of jax's C++ about its service and about the end that it makes.
_BEGINS = re.compile(
    r"F\d{4} \d\d:\d\d|[WE]\d{4} \d\d:\d\d:\S+ +\d+ "
    r"(coordination_service|preemption_sync_manager|client|service|grpc)"
    r"|\*\*\* Check failure|terminate called after|\[Gloo\] Rank"
)
# How such a message goes on over the next lines.
_GOES_ON = re.compile(
    r"\s*$|\s+@ |\*\*\* |=== Source|external/|Additional GRPC|:[A-Z_]+:|RPC: |\d+$"
    r"|The tasks have crashed|The following tasks|\. This is only|\s+what\(\):"
)


class Child:
    """One process of the run, and what it wrote."""

    def __init__(
        self, rank: int, command: Sequence[str], env: dict[str, str], log: Path | None
    ):
        self.rank, self.code, self._first = rank, None, rank == 0
        self._log = _opened(log, rank)
        # A group of its own: Ctrl-C in the terminal reaches it through us alone.
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=None if self._first else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
            preexec_fn=_die_with(os.getpid()),
        )
        self.ended = 0.0

    def read(self) -> None:
        """Begins to read what it writes."""
        out, err = self.process.stdout, self.process.stderr
        assert err is not None
        show = sys.stderr if self._first else None
        self.err = _Reader(err, show, self._log)
        self._readers = [self.err]
        if out is not None:
            self._readers.append(_Reader(out, None, self._log))

    def poll(self) -> int | None:
        """The exit status once it has ended, minus the signal if one ended it."""
        if self.code is None:
            self.code = self.process.poll()
            self.ended = time.monotonic()
        return self.code

    def send(self, signum: int) -> None:
        """Sends a signal to it and to whatever it started."""
        # Gone, perhaps with a process of its own still in the group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def finish(self) -> None:
        """Ends it for certain and reads its last words."""
        self.send(signal.SIGKILL)
        self.process.wait()
        for reader in self._readers:
            reader.finish()
        if self._log is not None:
            self._log.close()


class _Reader:
    """Reads a pipe to its end in a thread, so that the child never waits for us.

    Args:
        pipe: what the child writes to.
        show: where to pass it on line by line, or None to keep only its last lines.
        log: gets every line as it is, or None.
    """

    def __init__(self, pipe: IO[str], show: IO[str] | None, log: IO[str] | None):
        self.last: collections.deque[str] = collections.deque(maxlen=20)
        self._pipe, self._show, self._log = pipe, show, log
        self._inside = False  # such a message
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until everything that the child wrote is read."""
        # A grandchild may hold the pipe open.
        self._thread.join(timeout=2.0)

    def _read(self) -> None:
        with self._pipe:
            for line in self._pipe:
                self._take(line)

    def _take(self, line: str) -> None:
        if self._log is not None:
            self._log.write(line)
            self._log.flush()
        if self._is_noise(line):
            return
        self.last.append(line)
        if self._show is not None:
            self._show.write(line)
            self._show.flush()

    def _is_noise(self, line: str) -> bool:
        begins = _BEGINS.match(line) is not None
        self._inside = begins or (self._inside and _GOES_ON.match(line) is not None)
        return self._inside


def _opened(folder: Path | None, rank: int) -> IO[str] | None:
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return open(folder / f"rank-{rank}.log", "a")


def _die_with(parent: int) -> Any:
    """What a child does first, so that it never outlives its launcher on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(EXIT_CRASHED)

    return ask
