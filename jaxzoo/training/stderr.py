"""What a child process writes, without jax's C++ stacks."""

import collections
import re
import threading
from typing import IO

__all__ = ["Reader"]

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


class Reader:
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
        for line in self._pipe:
            if self._log is not None:
                self._log.write(line)
                self._log.flush()
            if self._is_noise(line):
                continue
            self.last.append(line)
            if self._show is not None:
                self._show.write(line)
                self._show.flush()

    def _is_noise(self, line: str) -> bool:
        begins = _BEGINS.match(line) is not None
        self._inside = begins or (self._inside and _GOES_ON.match(line) is not None)
        return self._inside
