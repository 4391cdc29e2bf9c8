"""Run folders in a bucket: nothing half is seen there, whatever ends the process.

`bucket.py` pretends to be Google Cloud Storage.
"""

import json
import os
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxzoo.training import folder, lock, nonfinite
from jaxzoo.training.checkpoint import Checkpoints, verify
from jaxzoo.training.options import Options
from jaxzoo.training.record import Run, RunFolderError
from jaxzoo.training.sinks import MissingExtraError
from tests.training import bucket, bucket_tests
from tests.training.bucket_tests import FIRST, at, below, lines

served = pytest.fixture(scope="module")(bucket_tests.served)
objects = pytest.fixture(bucket_tests.objects)


@pytest.fixture
def open_run(objects):
    def open_one(name="run", **more):
        head = {"topic": "toy", "slug": "tiny", "title": "Tiny", "preset": "full"}
        where = f"gs://runs-bucket/{name}"
        return Run(where, **head, config=bucket.Config(), **more)

    return open_one


# Where a run lies.


@pytest.mark.parametrize(
    "name", ["s3://some/folder", Path("gs://runs-bucket/run"), "gs://runs-bucket"]
)
def test_what_is_no_folder_is_refused(name):
    with pytest.raises(folder.FolderError, match="neither a local path nor"):
        folder.locate(name)


def test_a_local_folder_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder.locate("runs/a") == tmp_path.resolve() / "runs" / "a"
    assert type(folder.locate("a")) is type(tmp_path)


def test_without_gcsfs_the_command_to_install_it_is_told(monkeypatch):
    def missing(_):
        raise ImportError

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[gcs\]"):
        folder.locate("gs://runs-bucket/run")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tensorboard", Options(tensorboard=True)),
        ("wandb", Options(wandb=True)),
        ("profile", Options(profile="1:2")),
    ],
)
def test_what_needs_a_local_folder_is_refused(open_run, name, options):
    with pytest.raises(ValueError, match=f"--{name} writes to a local folder"):
        open_run(options=options)


# The record.


def test_a_whole_run_is_recorded(objects, open_run):
    run = open_run()
    assert run.finish(bucket.main(bucket.Config(), run))
    run.close()
    files = "config.json env.json loss.png metrics.jsonl report.html report.json"
    assert {n for n in below(objects, "run/") if "/" not in n} == set(files.split())
    assert json.loads(at(objects, "report.json"))["claims"][0]["holds"]
    assert "data:image/png;base64," in at(objects, "report.html")
    assert verify(run.folder) == []


def test_lines_wait_until_a_checkpoint_counts_on_them(objects, open_run):
    run = open_run()
    for step in range(3):
        run.log("fit", step, {"loss": step})
    assert lines(objects) < 3
    with Checkpoints(run.folder / "checkpoints" / "fit") as checkpoints:
        checkpoints.save(3, FIRST)
        assert lines(objects) == 3
    run.log("fit", 3, {"loss": 3})
    assert len(run.history("fit")["loss"]) == 4
    run.log("fit", 4, {"loss": 4})
    run.close()
    assert lines(objects) == 5


def test_what_waited_for_long_is_written(objects, open_run, monkeypatch):
    run = open_run()
    monkeypatch.setattr(folder, "LATER", 0.0)
    for step in range(3):
        run.log("fit", step, {"loss": step})
        assert lines(objects) == step + 1


def test_lines_that_are_computed_again_are_dropped(objects, open_run):
    run = open_run()
    for step in (1, 2, 3):
        run.log("fit", step, {"loss": step})
    run.forget_after("fit", 1)
    run.log("fit", 2, {"loss": 7})
    assert run.history("fit")["loss"].tolist() == [1, 7]


def test_a_finished_run_is_cleared_for_the_next(objects, open_run):
    run = open_run()
    run.finish(bucket.main(bucket.Config(), run))
    run.close()
    again = open_run()
    assert not again.resumed
    assert below(objects, "run/") <= {"config.json", "env.json", "lock.json"}


def test_another_folder_is_left_alone(objects, open_run):
    objects["run/thesis.tex"] = 1, b"all of it"
    with pytest.raises(RunFolderError, match="is not a run's folder"):
        open_run()
    assert below(objects, "run/") == {"thesis.tex"}


def test_a_black_box_is_written(objects, open_run):
    run = open_run()
    found = nonfinite.Diagnosis(3, ["'loss'"], {"loss": np.float32(np.nan)})
    batch = np.arange(3.0)
    facts = {"fit": "fit", "policy": "abort", "batch": batch, "ids": None}
    nonfinite.write_black_box(run.folder, found, **facts)
    assert json.loads(at(objects, "nonfinite/fit-3.json"))["step"] == 3
    assert "run/nonfinite/fit-3.npz" in objects
    nonfinite.pass_over(run.folder, "fit", [(5, 10)])
    assert nonfinite.passed_over(run.folder, "fit") == [(5, 10)]


# One process at a time.


def holder(objects):
    return json.loads(at(objects, "lock.json"))


def test_a_folder_that_is_in_use_is_refused(objects, open_run):
    open_run()
    told = []
    file = folder.locate("gs://runs-bucket/run/lock.json")
    with pytest.raises(lock.FolderInUseError, match=f"process {os.getpid()} on "):
        lock._Heartbeat(file, told.append)
    assert len(told) == 1 and "waiting for its heartbeat" in told[0]


def test_a_dead_holder_is_followed(objects, open_run):
    objects["run/lock.json"] = 1, json.dumps({"pid": 1, "host": "gone"}).encode()
    began = time.monotonic()
    run = open_run()
    assert time.monotonic() - began > lock.SILENCE
    assert holder(objects)["pid"] == os.getpid()
    run.close()


def test_of_two_at_once_one_is_refused(objects, monkeypatch):
    file = folder.locate("gs://runs-bucket/run/lock.json")
    seen = folder.objects(file.parent).read("lock.json").result().stamp.generation
    monkeypatch.setattr(lock._Heartbeat, "_wait_for_silence", lambda *_: seen)
    lock.hold(file)
    with pytest.raises(lock.FolderInUseError):
        lock._Heartbeat(file, print)


def test_a_holder_that_was_silent_for_too_long_is_told(objects, open_run):
    run = open_run()
    objects["run/lock.json"] = 10**6, json.dumps({"pid": 1, "host": "b"}).encode()
    time.sleep(4 * lock.BEAT)
    with pytest.raises(lock.FolderInUseError, match="process 1 on b"):
        run.log("fit", 1, {"loss": 1})
    lock.release(run.folder / "lock.json")
    assert holder(objects)["host"] == "b"


def test_a_write_that_met_itself_holds(objects, open_run):
    """The answer to a write was lost: it was sent again, and the object had changed."""
    run = open_run()
    generation, content = objects["run/lock.json"]
    objects["run/lock.json"] = generation + 10**6, content
    time.sleep(4 * lock.BEAT)
    run.log("fit", 1, {"loss": 1})
