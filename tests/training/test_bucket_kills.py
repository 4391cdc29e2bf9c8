"""Processes that write into a bucket and end as if killed go on to the same bits."""

import functools
import subprocess
import sys

import pytest

from jaxzoo.training import commit, folder, manifest
from jaxzoo.training.checkpoint import digest, verify
from tests.training import bucket, bucket_tests, forked, kill
from tests.training.bucket_tests import at, lines

served = pytest.fixture(scope="module")(bucket_tests.served)
objects = pytest.fixture(bucket_tests.objects)


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
    command = [bucket.__file__, "full", *words]
    env = {**kill.environment(cache), **env}
    if processes == 1:
        process = forked.start(command, env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(command, process.returncode, out, err)
    local = ["-m", "jaxzoo.training.launch", "--local", str(processes), "--"]
    command = [sys.executable, *local, sys.executable, *command]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("ends", "saved"),
    [
        ({"KILL_AT": "17"}, 10),  # between two saves
        ({"JAXZOO_CRASH_AT": "save.manifest:3"}, 10),
        ({"JAXZOO_CRASH_AT": "clean.renamed:1"}, 15),
    ],
    ids=["steps", "save", "clean"],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    undisturbed, objects, run_it, ends, saved
):
    words = ["--save-every", "0", "--run-dir", "gs://runs-bucket/run"]
    assert run_it(*words, **ends).returncode == 137
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
