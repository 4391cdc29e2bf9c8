"""What an experiment says in the end: claims with their numbers, metrics, pictures."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["Claim", "Figure", "Report"]


class Claim(NamedTuple):
    """A paper's statement in miniature, with the number that was measured.

    Attributes:
        text: the statement, readable on its own.
        measured: the number, with `stderr` over seeds or draws where it is random.
        bound: what the number has to satisfy, such as ">= 0.5".
        holds: whether it does.
        stderr: standard error of `measured`, or None.
    """

    text: str
    measured: float
    bound: str
    holds: bool
    stderr: float | None = None

    def row(self) -> tuple[str, str, str, str]:
        """The claim as text, what was measured, what was asked, and whether it is."""
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        verdict = "yes" if self.holds else "NO"
        return self.text, f"{self.measured:.4g}{error}", self.bound, verdict


class Figure(NamedTuple):
    """A picture in the run's folder."""

    file: str
    title: str
    caption: str


class Report(NamedTuple):
    """What an experiment's `main` returns.

    Attributes:
        claims: at least one.
        metrics: numbers (or short strings) worth comparing between runs, by name.
        figures: as `Run.figure` returned them.
    """

    claims: Sequence[Claim]
    metrics: Mapping[str, float | int | str]
    figures: Sequence[Figure] = ()
