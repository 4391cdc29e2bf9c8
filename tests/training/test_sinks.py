"""Sinks: what TensorBoard and wandb would show after any number of sittings."""

import json
import math
import os
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

from jaxzoo.training.sinks import MissingExtraError, TensorBoard, WandbOffline

REPO = Path(__file__).resolve().parents[2]


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves as TensorBoard draws them: files by name, a start hides the rest."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in events(file.read_bytes()):
            if event.session_log.status == SessionLog.START:
                for name in curves:
                    curves[name] = [p for p in curves[name] if p[0] < event.step]
            for value in event.summary.value:
                point = (event.step, value.simple_value)
                curves.setdefault(value.tag, []).append(point)
    return curves


def events(data: bytes):
    # TFRecord: length, its checksum, the message, its checksum.
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_tensorboard_shows_what_was_logged(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.log("fit", 5, {"loss": 0.5, "accuracy": 0.25})
    sink.log("fit", 10, {"loss": math.nan, "accuracy": 0.75})
    # Before it is closed: a kill loses nothing.
    curves = shown(tmp_path / "fit")
    assert curves["accuracy"] == [(5, 0.25), (10, 0.75)]
    assert curves["loss"][0] == (5, 0.5) and math.isnan(curves["loss"][1][1])
    sink.close()


def test_tensorboard_shows_the_mean_and_each_seed(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.log("fit", 5, {"loss": [1.0, 4.0, None]})
    sink.log("fit", 10, {"loss": [1.0, 2.0, 6.0]})
    sink.close()
    curves = shown(tmp_path / "fit")
    assert set(curves) == {"loss", "loss/0", "loss/1", "loss/2"}
    assert curves["loss"][1] == (10, 3.0)
    assert curves["loss/1"] == [(5, 4.0), (10, 2.0)]


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    """Three sittings within a second; the second and third go on from an older step."""
    for start, end in ((0, 8), (4, 12), (9, 16)):
        sink = TensorBoard(tmp_path)
        if start:
            sink.forget_after("fit", start)
        for step in range(start + 1, end + 1):
            sink.log("fit", step, {"loss": 100.0 * start + step})
        sink.close()
    steps, values = zip(*shown(tmp_path / "fit")["loss"], strict=True)
    assert steps == tuple(range(1, 17))
    # Of a step that was computed again, the later sitting counts.
    assert values == (*range(1, 5), *range(405, 410), *range(910, 917))


def test_tensorboard_keeps_the_other_fits_on_a_resume(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.log("first", 100, {"loss": 1.0})
    sink.log("second", 10, {"loss": 2.0})
    sink.forget_after("second", 5)
    sink.log("second", 10, {"loss": 3.0})
    sink.close()
    assert shown(tmp_path / "first")["loss"] == [(100, 1.0)]
    assert shown(tmp_path / "second")["loss"] == [(10, 3.0)]


@pytest.mark.parametrize(
    ("module", "extra", "make"),
    [
        ("tensorboardX", "tensorboard", TensorBoard),
        ("wandb", "wandb", lambda folder: WandbOffline(folder, {}, "name")),
    ],
)
def test_a_missing_extra_is_one_sentence(tmp_path, monkeypatch, module, extra, make):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError) as error:
        make(tmp_path)
    command = f'pip install "jaxzoo-papers[{extra}]"'
    assert str(error.value) == f"{module} is not installed: {command}."


def test_sinks_import_nothing_until_they_are_made():
    code = "import sys, jaxzoo.training.sinks as s; print('wandb' in sys.modules, "
    code += "'tensorboardX' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True
    )
    assert done.stdout == "False False\n", done.stderr


SITTINGS = """
import json, sys
from pathlib import Path
from jaxzoo.training.sinks import WandbOffline
folder = Path(sys.argv[1])
first = [{"fit": "a", "step": 5, "loss": 1.0}, {"fit": "b", "step": 5, "loss": 2.0}]
second = [*first, {"fit": "b", "step": 10, "loss": [1.0, 3.0]}]
for earlier, new in (([], first), (second, second[2:])):
    sink = WandbOffline(folder, {"steps": 10}, "iwae", lambda: earlier)
    for row in new:
        sink.log(row["fit"], row["step"], {"loss": row["loss"]})
    sink.close()
"""


@pytest.fixture(scope="module")
def sittings(tmp_path_factory):
    """Two sittings of wandb in a process whose every way out leads to a trap."""
    place = tmp_path_factory.mktemp("wandb")
    knocks: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as trap:
        address = f"http://127.0.0.1:{trap.getsockname()[1]}"
        threading.Thread(target=_count, args=(trap, knocks), daemon=True).start()
        ways = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WANDB_BASE_URL")
        env = {**os.environ, **{way: address for way in ways}, "HOME": str(place)}
        for name in ("NO_PROXY", "no_proxy", "XDG_CACHE_HOME"):
            env.pop(name, None)
        env["PYTHONPATH"] = os.pathsep.join((str(REPO), *sys.path))
        (place / "run").mkdir()
        command = [sys.executable, "-c", SITTINGS, str(place / "run")]
        done = subprocess.run(
            command, cwd=place, env=env, capture_output=True, text=True, timeout=120
        )
    return done, knocks, place


def _count(trap: socket.socket, knocks: list[Any]) -> None:
    try:
        while True:
            knocks.append(trap.accept()[1])
    except OSError:  # the test is over
        return


def test_wandb_is_silent_and_never_reaches_for_the_network(sittings):
    done, knocks, place = sittings
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert knocks == []
    # Everything lies in the run's folder.
    assert [path.name for path in place.iterdir()] == ["run"]
    assert [path.name for path in (place / "run").iterdir()] == ["wandb"]


def test_wandb_holds_each_line_once_after_a_resume(sittings):
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    (file,) = sittings[2].glob("run/wandb/offline-run-*/run-*.wandb")
    lines, axes = [], {}
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = ((i.key or "/".join(i.nested_key), i) for i in record.history.item)
            line = {name: json.loads(item.value_json) for name, item in items}
            lines.append({n: v for n, v in line.items() if not n.startswith("_")})
        elif record.WhichOneof("record_type") == "metric":
            axes[record.metric.glob_name] = record.metric.step_metric
    assert lines == [
        {"a/loss": 1, "a/step": 5},
        {"b/loss": 2, "b/step": 5},
        {"b/loss": 2, "b/loss/0": 1, "b/loss/1": 3, "b/step": 10},
    ]
    assert axes == {"a/*": "a/step", "b/*": "b/step"}


def records(data: bytes):
    # The log of leveldb, as far as one block goes: checksum, length, kind, message.
    at = 7
    while at + 7 <= len(data) and (
        size := int.from_bytes(data[at + 4 : at + 6], "little")
    ):
        yield data[at + 7 : at + 7 + size]
        at += 7 + size
