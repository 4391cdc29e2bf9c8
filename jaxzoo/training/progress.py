"""A live progress bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

__all__ = ["Progress"]


class Progress:
    """Shows rate, time left and one metric of a loop; a context manager.

    The rate leaves out the steps up to the first update, which hold the compilation.

    Args:
        console: where to show it.
        name: what is running.
        start: first step of this sitting.
        total: the step at which the loop ends.
        show: name of the metric to show, or None.

    Attributes:
        examples: how many a step takes; 0 shows no rate of them.
        full_rate: steps per second at which the devices would do all the arithmetic
            they can; 0 shows no model FLOPs utilization (MFU).
    """

    def __init__(
        self, console: Console, name: str, start: int, total: int, show: str | None
    ):
        self._console, self._name, self._total, self._show = console, name, total, show
        self.examples = 0
        self.full_rate = 0.0
        self._first: tuple[float, int] | None = None
        self._next_line = start + max(1, (total - start) // 5)
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn(
                "{task.completed}/{task.total} {task.fields[words]}", markup=False
            ),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            name,
            total=total,
            completed=start,
            words="compiling" if start < total else "done before",
        )

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Tells that `step` steps are done."""
        words = self._words(step, metrics)
        self._bar.update(self._task, completed=step, words=words)
        if not self._console.is_terminal and (
            step >= self._next_line or step == self._total
        ):
            self._console.print(
                f"{self._name}: {step}/{self._total} {words}",
                highlight=False,
                soft_wrap=True,
            )
            self._next_line = step + max(1, self._total // 5)

    def _words(self, step: int, metrics: Mapping[str, Any]) -> str:
        now = time.monotonic()
        words = []
        if self._first is None:
            self._first = (now, step)
        elif step > self._first[1]:
            rate = (step - self._first[1]) / max(now - self._first[0], 1e-9)
            words.append(f"{_number(rate)} steps/s")
            if self.examples:
                words.append(f"{_number(rate * self.examples)} examples/s")
            if self.full_rate:
                words.append(f"{100 * rate / self.full_rate:.1f} % MFU")
            words.append(_clock((self._total - step) / rate))
        if self._show is not None:
            words.append(f"{self._show} {np.mean(metrics[self._show]):.4g}")
        return "  ".join(words)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} left"
