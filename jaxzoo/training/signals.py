"""Signals that ask a run to stop, collected until it can."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["stop_signals"]


@contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second SIGINT goes through at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return

    def handle(signum: int, _: Any) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)
        say("Stopping after this call of steps; Ctrl-C once more stops at once.")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
