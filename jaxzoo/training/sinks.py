"""Other places for what a run logs: TensorBoard files, and wandb without a network.

metrics.jsonl stays the record; a sink gets the same lines. Of a metric over seeds it
shows the mean under the metric's name and each seed's value under `name/0`, `name/1`.
"""

import importlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MissingExtraError", "TensorBoard", "WandbOffline"]


class MissingExtraError(ImportError):
    """A package is missing that only this sink needs; the message has the command."""


class TensorBoard:
    """Writes what is logged as TensorBoard event files, one folder per fit.

    A folder per fit, because going on from a step hides what a folder has beyond it.

    Args:
        folder: gets `<fit>/events.out.tfevents...`; `tensorboard --logdir` reads it.

    Raises:
        MissingExtraError: tensorboardX is not installed.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        _extra("tensorboardX", "tensorboard")
        self._events: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary: Any = importlib.import_module("tensorboardX.proto.summary_pb2")
        self._files: Any = importlib.import_module("tensorboardX.event_file_writer")
        self._writers: dict[str, Any] = {}

    def forget_after(self, fit: str, step: int) -> None:
        """Hides what earlier sittings logged of a fit beyond a step.

        It will be computed again, and TensorBoard would show it twice.
        """
        session = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(fit, self._events.Event(step=step + 1, session_log=session))

    def log(self, fit: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the values of one step; on the disk when it returns."""
        values = [{"tag": n, "simple_value": v} for n, v in _scalars(metrics)]
        summary = self._summary.Summary(value=values)
        self._write(fit, self._events.Event(step=step, summary=summary))

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _write(self, fit: str, event: Any) -> None:
        if fit not in self._writers:
            folder = self._folder / fit
            folder.mkdir(parents=True, exist_ok=True)
            # Files are read in the order of their names, which hold whole seconds.
            sitting = len(list(folder.glob("events.out.tfevents.*")))
            # SummaryWriter queues for a thread, also at its flush: a kill would lose
            # lines that a checkpoint already counts on.
            self._writers[fit] = self._files.EventsWriter(
                str(folder / "events"), f".{sitting:04d}"
            )
        event.wall_time = time.time()
        self._writers[fit].write_event(event)
        self._writers[fit].flush()


class WandbOffline:
    """Writes what is logged as one offline run, for a later `wandb sync`.

    Nothing reaches for the network. wandb cannot continue an offline run, so that each
    sitting begins a new one with the lines of those before it and removes theirs.

    Args:
        folder: the run's folder; wandb writes to `wandb/` in it.
        config: the settings.
        name: the name of the run.
        earlier: called once, before the first line: the lines logged so far, each with
            "fit" and "step".

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        name: str,
        earlier: Callable[[], Iterable[Mapping[str, Any]]] = tuple,
    ):
        # Before the import: wandb reports its own errors to its makers otherwise.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._module = _extra("wandb", "wandb")
        self._folder, self._config, self._name = folder, dict(config), name
        self._earlier = earlier
        self._run: Any = None
        self._axes: set[str] = set()

    def log(self, fit: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the values of one step, on a step axis of the fit's own."""
        if self._run is None:
            self._run = self._start()
            for row in self._earlier():
                line = {k: v for k, v in row.items() if k not in ("fit", "step")}
                if (row["fit"], row["step"]) != (fit, step):
                    self._add(row["fit"], row["step"], line)
        self._add(fit, step, metrics)

    def close(self) -> None:
        """Finishes the run; its files are complete then."""
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _start(self) -> Any:
        place = self._folder / "wandb"
        shutil.rmtree(place, ignore_errors=True)
        for kind in ("CACHE", "CONFIG", "DATA"):  # in the home otherwise
            os.environ.setdefault(f"WANDB_{kind}_DIR", str(place / "own"))
        settings = self._module.Settings(
            silent=True, console="off", disable_git=True, save_code=False
        )
        return self._module.init(
            mode="offline",
            project="jaxzoo",
            dir=str(self._folder),
            config=self._config,
            name=self._name,
            settings=settings,
        )

    def _add(self, fit: str, step: int, metrics: Mapping[str, Any]) -> None:
        values = {f"{fit}/{name}": value for name, value in _scalars(metrics)}
        if fit not in self._axes:
            self._axes.add(fit)
            self._run.define_metric(f"{fit}/*", step_metric=f"{fit}/step")
        self._run.log({**values, f"{fit}/step": step})


def _scalars(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, metric in metrics.items():
        values = np.asarray(metric, float).ravel()  # None, which NaN became, is NaN
        yield name, float(values.mean())
        if values.size > 1:
            for seed, value in enumerate(values):
                yield f"{name}/{seed}", float(value)


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise MissingExtraError(
            f'{module} is not installed: pip install "jaxzoo-papers[{extra}]".'
        ) from None
