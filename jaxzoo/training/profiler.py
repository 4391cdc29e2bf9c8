"""A trace of some steps on demand: `--profile 100:110`."""

import re
from pathlib import Path
from typing import Any

import jax

__all__ = ["Profiler", "profile_steps"]


def profile_steps(text: str) -> tuple[int, int]:
    """Reads `FIRST:LAST`, both counted from 0 and both included.

    Raises:
        ValueError: it is not two steps in order.

    Example:
        >>> profile_steps("100:110")
        (100, 110)
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) > int(found[2]):
        raise ValueError(
            f"--profile {text!r}: expected FIRST:LAST, two steps in order, "
            "such as 100:110."
        )
    return int(found[1]), int(found[2])


class Profiler:
    """Traces the compiled calls in which the wanted steps run; a context manager.

    The loop runs many steps per call, so that the trace holds whole calls: at least the
    wanted steps.

    Args:
        first: the first wanted step, counted from 0.
        last: the last wanted step.
        folder: where jax.profiler writes, for TensorBoard or xprof.
    """

    def __init__(self, first: int, last: int, folder: Path):
        self.first, self.last, self.folder = first, last, folder
        self.traced: tuple[int, int] | None = None
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:  # an error or a signal in between: keep what there is
            self._stop()

    def before(self, start: int, end: int) -> None:
        """Starts the trace if the call of steps `start` to `end - 1` is the first."""
        wanted = start <= self.last and end > self.first
        if wanted and not self._running and self.traced is None:
            jax.profiler.start_trace(self.folder)
            self._running = True
            self.traced = (start, end - 1)

    def after(self, end: int, result: Any) -> str | None:
        """Stops the trace after the last call; then returns a sentence to show.

        Args:
            end: one more than the last step of the call.
            result: what the call returned; it is waited for.
        """
        if not self._running or self.traced is None:
            return None
        self.traced = (self.traced[0], end - 1)
        if end <= self.last:
            return None
        jax.block_until_ready(result)
        self._stop()
        first, last = self.traced
        return f"Steps {first} to {last} are traced in {self.folder}."

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()
