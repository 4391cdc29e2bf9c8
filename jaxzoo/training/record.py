"""What a run leaves behind: one folder with settings, metrics, pictures and claims.

    config.json  env.json  metrics.jsonl  checkpoints/  *.png  report.json  report.html

`Run` writes, in the first of several processes; nothing else in jaxzoo does. A folder
without report.json is an unfinished run, which the same settings continue.
"""

import dataclasses
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jaxzoo.training import folder as folders
from jaxzoo.training.environment import environment
from jaxzoo.training.hosts import from_first, is_first, wait_for_all
from jaxzoo.training.json_files import (
    differing,
    json_text,
    plain,
    read_object,
    write_json,
)
from jaxzoo.training.lock import FolderInUseError, check, hold, release
from jaxzoo.training.options import Options, refuse_local_files
from jaxzoo.training.page import page
from jaxzoo.training.program import Program
from jaxzoo.training.progress import Progress
from jaxzoo.training.report import Claim, Figure, Report
from jaxzoo.training.sinks import TensorBoard, WandbOffline

if TYPE_CHECKING:  # matplotlib takes 0.3 s to import, and most of a run draws nothing
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["Claim", "Figure", "Report", "Run", "RunFolderError"]


class RunFolderError(Exception):
    """The folder cannot take this run; the message says why and what to do."""


class Run:
    """The open folder of one run.

    Args:
        folder: where everything is written: a local path, or gs://BUCKET/FOLDER as
            text. In a bucket a killed run may lose log lines of the last 10 s, never
            of steps before its newest checkpoint.
        topic: the experiment's topic.
        slug: the experiment's slug.
        title: one line on what it is.
        preset: name of the preset that the settings began from.
        config: the settings, a dataclass.
        fresh: forget an earlier run in the folder, also an unfinished one.
        options: how the run is carried out; None for the defaults.
        mesh: what `train` trains on; None for one device.
        dry_run: what `train` calls with its program in place of running it.

    Raises:
        ValueError: the folder is no folder, or an option needs a local one.
        MissingExtraError: a package is missing that the folder or an option needs.
        RunFolderError: the folder holds something else, an unfinished run with other
            settings, or is in use by another process.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        topic: str,
        slug: str,
        title: str,
        preset: str,
        config: Any,
        fresh: bool = False,
        options: Options | None = None,
        mesh: Mesh | None = None,
        dry_run: Callable[[Program], None] | None = None,
    ):
        self.options = Options() if options is None else options
        self.mesh, self.dry_run = mesh, dry_run
        self.folder = folders.locate(folder)
        refuse_local_files(self.folder, self.options)
        self._lock = self.folder / "lock.json"
        # A text such as "[a, b]" or ":x:" is no markup. One process speaks for all.
        self.console = Console(markup=False, emoji=False, quiet=not is_first())
        self._began = time.monotonic()
        self._head = {"slug": slug, "topic": topic, "title": title, "preset": preset}
        self._config = plain(dataclasses.asdict(config))
        self._environment = environment()
        self._earlier = 0.0  # seconds of the sittings before this one
        self.resumed = False
        self._open_together(fresh)
        self._sinks = self._open_sinks() if is_first() and dry_run is None else []

    def _open_sinks(self) -> list[TensorBoard | WandbOffline]:
        sinks: list[TensorBoard | WandbOffline] = []
        if self.options.tensorboard:
            sinks.append(TensorBoard(self.folder / "tensorboard"))
        if self.options.wandb:
            name = f"{self._head['topic']}/{self._head['slug']}"
            sinks.append(WandbOffline(self.folder, self._config, name, self._rows))
        return sinks

    def close(self) -> None:
        """Completes what lies beside metrics.jsonl; `log` may not be called again."""
        for sink in self._sinks:
            sink.close()
        folders.write_out()

    def _open_together(self, fresh: bool) -> None:
        error: Exception | None = None
        if is_first():
            try:
                self._open(fresh)
            except RunFolderError as met:
                error = met
            except (OSError, ValueError) as met:
                # A bucket's answer comes without an errno, or as ValueError.
                errno = getattr(met, "errno", None)
                error = met if errno else RunFolderError(f"{self.folder}: {met}.")
        told, self.resumed = from_first([error and str(error), self.resumed])
        if error is not None:
            raise error
        if told:
            raise RunFolderError(told)

    def _open(self, fresh: bool) -> None:
        settings = {
            **self._head,
            "config": self._config,
            # It changes the numbers; what else is in the options does not.
            "reproducible": self.options.reproducible,
        }
        folders.write_out()  # of a run of this process that was not closed
        if not folders.in_bucket(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_foreign(settings)
        try:
            hold(self._lock, self.say)
            self.resumed = self._claim_folder(settings, fresh)
        except FolderInUseError as error:
            raise RunFolderError(str(error)) from None
        except RunFolderError:
            release(self._lock)
            raise
        self._earlier = read_object(self.folder / "env.json").get("seconds", 0.0)
        write_json(self.folder / "config.json", settings)
        self._save_environment()

    def _refuse_foreign(self, settings: dict[str, Any]) -> None:
        # Other programs write a config.json too.
        ours = read_object(self.folder / "config.json").keys() == settings.keys()
        if not ours and set(folders.names(self.folder)) - {self._lock.name}:
            raise RunFolderError(
                f"{self.folder} is not empty and is not a run's folder: "
                "name another one by --run-dir."
            )

    def _claim_folder(self, settings: dict[str, Any], fresh: bool) -> bool:
        known = read_object(self.folder / "config.json")
        report = read_object(self.folder / "report.json")
        if known and not report and not fresh:
            difference = differing(known, settings)
            if not difference:
                self._drop_half_line()
                return True
            raise RunFolderError(
                f"{self.folder} holds an unfinished run with other settings "
                f"({difference}): give those to continue it, --fresh to begin again, "
                "or another --run-dir."
            )
        self._remove_what_runs_write(report)
        return False

    def _remove_what_runs_write(self, report: dict[str, Any]) -> None:
        # config.json last: a kill in between leaves the folder of a run.
        figures = [Path(figure["file"]).name for figure in report.get("figures", ())]
        for name in ("report.json", "report.html", *figures):
            (self.folder / name).unlink(missing_ok=True)
        for name in ("checkpoints", "nonfinite", "profile", "tensorboard", "wandb"):
            folders.remove(self.folder / name)
        for name in ("metrics.jsonl", "env.json", "config.json"):
            (self.folder / name).unlink(missing_ok=True)

    def _drop_half_line(self) -> None:
        # A kill in the middle of `log`: the next line would go on in the same one.
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        if text and not text.endswith("\n"):
            folders.replace(path, text[: text.rfind("\n") + 1])

    def _save_environment(self) -> None:
        seconds = self._earlier + time.monotonic() - self._began
        told = {**self._environment, "seconds": seconds}
        folders.write_later(self.folder / "env.json", json_text(told))

    def log(self, fit: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl, and to the places beside it."""
        if not is_first():
            return
        check(self._lock)
        line = json.dumps(plain({"fit": fit, "step": step, **metrics}))
        folders.append(self.folder / "metrics.jsonl", line + "\n")
        for sink in self._sinks:
            sink.log(fit, step, metrics)
        self._save_environment()  # how long this sitting was, wherever it ends

    def history(self, fit: str) -> dict[str, np.ndarray]:
        """What was logged of one fit: each name with its values over the log steps."""
        folders.write_out()
        wait_for_all(f"history of {fit}")  # the first has written it
        rows = [row for row in self._rows() if row["fit"] == fit]
        names = [name for name in rows[0] if name != "fit"] if rows else []
        # None, which NaN became, is NaN again.
        return {
            name: np.array(values, float if None in values else None)
            for name in names
            for values in [[row[name] for row in rows]]
        }

    def forget_after(self, fit: str, step: int) -> None:
        """Drops the lines of a fit beyond a step: they will be computed again."""
        folders.write_out()
        path = self.folder / "metrics.jsonl"
        if is_first() and path.exists():
            rows = [r for r in self._rows() if r["fit"] != fit or r["step"] <= step]
            folders.replace(path, "".join(json.dumps(row) + "\n" for row in rows))
        for sink in self._sinks:
            if isinstance(sink, TensorBoard):
                sink.forget_after(fit, step)

    def _rows(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        rows = []
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # the line that a kill cut short
                continue
        return rows

    def progress(self, name: str, start: int, total: int, show: str | None) -> Progress:
        """A progress bar on this run's terminal, plain lines elsewhere."""
        return Progress(self.console, name, start, total, show)

    def say(self, text: str) -> None:
        """One line to the person who watches."""
        # Not wrapped: a path in it stays whole.
        self.console.print(text, highlight=False, soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Prints a table; the first column is text, the others are numbers."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def figure(
        self, name: str, figure: "MatplotlibFigure", *, title: str, caption: str
    ) -> Figure:
        """Saves a picture as `name`.png and closes it."""
        if not is_first():
            return Figure(f"{name}.png", title, caption)
        # Without its version string matplotlib writes the same bytes for the same plot.
        figure.savefig(
            file := io.BytesIO(),
            format="png",
            dpi=110,
            bbox_inches="tight",
            metadata={"Software": None},
        )
        (self.folder / f"{name}.png").write_bytes(file.getvalue())
        figure.clear()
        return Figure(f"{name}.png", title, caption)

    def finish(self, report: Report) -> bool:
        """Writes report.json and report.html, prints the claims; True if all hold."""
        holds = all(claim.holds for claim in report.claims)
        if not is_first():
            return holds
        record = {
            **self._head,
            "config": self._config,
            "claims": [claim._asdict() for claim in report.claims],
            "metrics": dict(report.metrics),
            "figures": [figure._asdict() for figure in report.figures],
            "seconds": round(self._earlier + time.monotonic() - self._began, 1),
            **self._environment,
            "status": "finished",
        }
        record = plain(record)
        write_json(self.folder / "report.json", record)
        pictures = [figure.file for figure in report.figures]
        with folders.local_copy(self.folder, pictures) as folder:
            html = page([{**record, "folder": folder}], title=self._head["title"])
        folders.replace(self.folder / "report.html", html)
        self.table(
            f"Claims of {self._head['topic']}/{self._head['slug']}",
            ("claim", "measured", "bound", "holds"),
            [claim.row() for claim in report.claims],
        )
        self.say(f"{record['seconds']:.0f} s. Report: {self.folder / 'report.html'}")
        folders.write_out()
        release(self._lock)
        return holds
