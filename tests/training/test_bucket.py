"""Run folders in a bucket: nothing half is seen there, whatever ends the process.

`bucket.py` pretends to be Google Cloud Storage.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.training import checkpoint, commit, folder, lock, manifest, nonfinite
from jaxzoo.training.checkpoint import Checkpoints, DamagedCheckpoint, digest, verify
from jaxzoo.training.options import Options
from jaxzoo.training.record import Run, RunFolderError
from jaxzoo.training.sinks import MissingExtraError

SPEC = importlib.util.spec_from_file_location(
    "bucket", Path(__file__).with_name("bucket.py")
)
assert SPEC is not None and SPEC.loader is not None
bucket = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bucket)

FIRST, SECOND = ({"w": jnp.arange(4.0) + i, "b": jnp.full(2, i)} for i in (1, 2))


@pytest.fixture(scope="module")
def served():
    with bucket.serve() as (url, objects), pytest.MonkeyPatch.context() as patch:
        patch.setenv(bucket.URL, url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        bucket.use()
        yield objects


@pytest.fixture
def objects(served, monkeypatch):
    """The objects of an empty bucket: name to (generation, content)."""
    served.clear()
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    yield served
    for file in list(lock._beating):
        lock.release(file)
    folder._waiting.clear()


@pytest.fixture
def open_run(objects):
    def open_one(name="run", **more):
        head = {"topic": "toy", "slug": "tiny", "title": "Tiny", "preset": "full"}
        where = f"gs://runs-bucket/{name}"
        return Run(where, **head, config=bucket.Config(), **more)

    return open_one


def at(objects, name):
    return objects[f"run/{name}"][1].decode()


def lines(objects):
    """How many are in metrics.jsonl."""
    _, content = objects.get("run/metrics.jsonl", (0, b""))
    return len(content.splitlines())


def below(objects, name):
    return {k.removeprefix(name) for k in objects if k.startswith(name)}


@pytest.fixture
def fit(objects):
    """The folder of a fit with two steps."""
    where = folder.locate("gs://runs-bucket/fit")
    with Checkpoints(where) as checkpoints:
        checkpoints.save(1, FIRST)
        checkpoints.save(2, SECOND)
    return where


def flip(objects, name):
    generation, content = objects[name]
    objects[name] = generation, content[:-1] + bytes([content[-1] ^ 1])


def is_same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in b)


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


# Checkpoints.


def test_a_step_comes_back(objects, fit):
    with Checkpoints(fit) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert is_same(checkpoints.restore(1, SECOND), FIRST)
    assert verify(fit) == [] and digest(fit) == digest(fit / "2")


def test_the_manifest_is_written_last(objects, fit):
    step = {n: g for n, (g, _) in objects.items() if n.startswith("fit/2/")}
    assert max(step, key=lambda name: step[name]) == "fit/2/MANIFEST.json"


def test_a_step_without_a_manifest_is_not_there(objects, fit):
    del objects["fit/2/MANIFEST.json"]
    assert commit.committed(fit) == [1]
    with Checkpoints(fit) as checkpoints:
        assert not below(objects, "fit/2/")
        checkpoints.save(2, SECOND)
    assert commit.committed(fit) == [1, 2]


def test_the_manifest_goes_first(objects, fit, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commit, "crash_point", killed)
    with pytest.raises(KeyboardInterrupt):
        commit.discard(fit / "1")
    assert "MANIFEST.json" not in below(objects, "fit/1/")
    assert below(objects, "fit/1/") and commit.committed(fit) == [2]
    assert verify(fit) == []
    Checkpoints(fit)
    assert not below(objects, "fit/1/")


def test_old_steps_go(objects, fit):
    with Checkpoints(fit) as checkpoints:
        checkpoints.save(3, FIRST)
    assert commit.committed(fit) == [2, 3]
    assert not below(objects, "fit/1/")


@pytest.mark.parametrize("name", ["state/w/0", "MANIFEST.json"])
def test_a_damaged_step_is_put_aside(objects, fit, name):
    flip(objects, f"fit/2/{name}")
    assert f"'{name}'" in verify(fit)[0]
    with Checkpoints(fit) as checkpoints:
        with pytest.raises(DamagedCheckpoint, match=name):
            checkpoints.restore(2, FIRST)
        with pytest.warns(UserWarning, match=r"2/MANIFEST.json.damaged"):
            found = checkpoints.restore_latest(FIRST)
    assert found is not None and found[0] == 1 and is_same(found[1], FIRST)
    with Checkpoints(fit) as checkpoints:
        assert "state/w/0" in below(objects, "fit/2/")  # to be looked at
        checkpoints.save(2, SECOND)
        checkpoints.wait()
        assert is_same(checkpoints.restore(2, FIRST), SECOND)
    assert "MANIFEST.json.damaged" not in below(objects, "fit/2/")


@pytest.mark.parametrize("change", ["missing", "more"])
def test_other_files_than_were_saved_are_damage(objects, fit, change):
    if change == "missing":
        del objects["fit/2/state/w/0"]
    else:
        objects["fit/2/state/w/9"] = 1, b"more"
    assert len(verify(fit)) == 1 and "(leaf 'w')" in verify(fit)[0]


def test_the_command_line_takes_a_bucket(objects, fit, capsys):
    assert checkpoint.main(["list", "gs://runs-bucket/fit"]) == 0
    assert capsys.readouterr().out.split() == ["fit/1", "fit/2"]
    assert checkpoint.main(["verify", "gs://runs-bucket/fit/2"]) == 0
    flip(objects, "fit/2/state/w/0")
    assert checkpoint.main(["verify", "gs://runs-bucket/fit"]) == 1
    assert checkpoint.main(["verify", "gs://runs-bucket/nothing"]) == 2


def test_a_save_that_fails_is_a_sentence_and_leaves_nothing(objects, fit, monkeypatch):
    def fails(*_):
        raise OSError("Forbidden: no permission")

    monkeypatch.setattr(checkpoint, "write_manifest", fails)
    with pytest.raises(checkpoint.SaveError, match=r"cannot save to gs://.*Forbidden"):
        with Checkpoints(fit) as checkpoints:
            checkpoints.save(3, FIRST)
    assert not below(objects, "fit/3/")


def test_a_step_that_counts_outlives_an_error_after_it(objects, fit, monkeypatch):
    def fails(_):
        raise OSError("unreachable")

    monkeypatch.setattr(commit, "discard", fails)
    with pytest.raises(checkpoint.SaveError, match="unreachable"):
        with Checkpoints(fit) as checkpoints:
            checkpoints.save(3, FIRST)
    assert commit.committed(fit) == [1, 2, 3] and verify(fit) == []


def test_parts_are_read_back_from_where_they_lie(objects, fit):
    told = {"0:4": manifest.leaf_sha256(SECOND["w"])}
    assert manifest._read_back(fit / "2", "w", told).tolist() == [2, 3, 4, 5]
    with pytest.raises(DamagedCheckpoint, match=r"leaf 'w' \[0:2\]"):
        manifest._read_back(fit / "2", "w", {"0:2": told["0:4"]})


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


# Processes that end as if killed.


@pytest.fixture(scope="module")
def run_it(served, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return functools.partial(start, cache)


@pytest.fixture(scope="module")
def undisturbed(served, run_it):
    """The digest and the lines of a run left alone."""
    served.clear()
    assert run_it("--run-dir", "gs://runs-bucket/whole").returncode == 0
    whole = folder.locate("gs://runs-bucket/whole")
    return digest(whole), served["whole/metrics.jsonl"][1].decode()


def start(cache, *words, processes=1, **env):
    command = [sys.executable, bucket.__file__, "full", *words]
    if processes > 1:
        local = ["-m", "jaxzoo.training.launch", "--local", str(processes), "--"]
        command = [sys.executable, *local, *command]
    env = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        **env,
    }
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("kill", "saved"),
    [
        ({"KILL_AT": "17"}, 10),  # between two saves
        ({"JAXZOO_CRASH_AT": "save.manifest:3"}, 10),
        ({"JAXZOO_CRASH_AT": "clean.renamed:1"}, 15),
    ],
    ids=["steps", "save", "clean"],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    undisturbed, objects, run_it, kill, saved
):
    words = ["--save-every", "0", "--run-dir", "gs://runs-bucket/run"]
    assert run_it(*words, **kill).returncode == 137
    where = folder.locate("gs://runs-bucket/run")
    steps = commit.committed(where / "checkpoints" / "fit")
    assert steps and steps[-1] <= saved
    assert lines(objects) >= steps[-1] // 5
    del objects["run/lock.json"]  # saves the 20 s
    done = run_it(*words)
    assert done.returncode == 0, done.stderr
    assert "Going on with the unfinished run in gs://runs-bucket/run" in done.stdout
    assert verify(where) == []
    assert (digest(where), at(objects, "metrics.jsonl")) == undisturbed


def test_two_processes_share_a_bucket(objects, run_it):
    words = ["--run-dir", "gs://runs-bucket/run", "--mesh", "fsdp=2"]
    done = run_it(*words, processes=2)
    assert done.returncode == 0, done.stderr
    where = folder.locate("gs://runs-bucket/run")
    assert verify(where) == []
    step = where / "checkpoints" / "fit" / "23"
    parts = manifest.read_manifest(step)["parts"]["params/w"]
    assert sorted(parts) == ["0:2,0:3", "2:4,0:3"]
    assert not [n for n in folder.file_names(where) if "parts-" in n]
