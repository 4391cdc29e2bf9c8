"""Killed at any time, a run goes on to the same bits; one process per run folder.

Rows R1, R2 and R8 of the reliability matrix. `python -m tests.training.kill` does R1
at length.
"""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxzoo.training.checkpoint import Checkpoints, verify
from jaxzoo.training.record import Claim, Report, RunFolderError
from tests.training import forked, kill

STEPS = 25  # five saves, three deletions


@pytest.mark.parametrize(
    ("family", "kills"), [("vae", 7), ("classifier", 7), ("contrastive", 6)]
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, family, kills):
    figures = kill.campaign(family, kills, 0, tmp_path, kills_per_run=kills)
    assert figures.problems == ()
    assert (figures.kills, figures.lost) == (kills, 0)
    print(figures)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    run = kill.Run(folder / "undisturbed", "vae", folder / "cache", STEPS)
    run.sit()
    assert run.leftovers() == []
    return run


@pytest.mark.parametrize("point", kill.CRASH_POINTS)
def test_a_crash_at_each_point_of_a_save(tmp_path, undisturbed, point):
    run = undisturbed._replace(folder=tmp_path / "run")
    for n in (1, 2):
        before = run.committed()
        run.sit(f"{point}:{n}", code=137)
        commits = (run.committed() - before) // kill.LOG_EVERY
        if point == "clean.renamed":
            # The first deletion follows the third commit, later ones each commit.
            assert commits == (2 + n if before == 0 else n)
        else:
            assert commits == (n if point == "save.committed" else n - 1)
        assert run.checkpoints.exists() and verify(run.checkpoints) == []
    run.sit()
    assert run.compare(undisturbed) == []
    begun = run.begun()
    assert begun == sorted(begun)


SAVES = """
import sys; from pathlib import Path
import jax.numpy as jnp
from jaxzoo.training.checkpoint import Checkpoints
with Checkpoints(Path(sys.argv[1]), keep=int(sys.argv[2])) as checkpoints:
    for step in range((checkpoints.latest() or 0) + 1, 7):
        checkpoints.save(step, {"w": jnp.full(300, step)})
        if sys.argv[3] == "sync":
            checkpoints.wait()
"""


@pytest.mark.parametrize(("keep", "how"), [(1, "async"), (3, "sync")])
def test_a_step_is_always_restorable_however_few_are_kept(tmp_path, keep, how):
    """R2 below the loop, which keeps two: a crash at the second pass of each point."""

    def save(point, crash_at=""):
        env = kill.environment(tmp_path / "cache", crash_at)
        return forked.start(["-c", SAVES, tmp_path / point, keep, how], env)

    crashed = {point: save(point, f"{point}:2") for point in kill.CRASH_POINTS}
    for point, process in crashed.items():
        said = process.communicate()
        assert process.returncode == 137, (point, said)
        assert verify(tmp_path / point) == []
        # The first deletion follows commit keep + 1.
        newest = {"save.committed": 2, "clean.renamed": keep + 2}.get(point, 1)
        folders = [path.name for path in (tmp_path / point).iterdir()]
        assert max(int(n) for n in folders if n.isdecimal()) == newest, point
    for point in crashed:
        crashed[point] = save(point)
    for point, process in crashed.items():
        said = process.communicate()
        assert process.returncode == 0, (point, said)
        with Checkpoints(tmp_path / point, keep=keep) as checkpoints:
            assert checkpoints.steps() == list(range(7 - keep, 7)), point
            like = {"w": jax.ShapeDtypeStruct((300,), np.int32)}
            step, tree = checkpoints.restore_latest(like) or (0, {"w": 0})
        assert step == 6 and np.all(tree["w"] == 6), point
        left = [path.suffix for path in (tmp_path / point).iterdir()]
        assert set(left) == {""}, point


def wait_for_sitting(run, process, number):
    while len(run.begun()) < number and process.poll() is None:
        time.sleep(0.01)


@pytest.fixture
def live(undisturbed, tmp_path):
    """A run on which another process sits, as long as the test goes on."""
    run = undisturbed._replace(folder=tmp_path / "run", num_steps=5000)
    process = run.start()
    wait_for_sitting(run, process, 1)
    yield run, process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused(live, undisturbed):
    run, process = live
    lock = json.loads((run.folder / "lock.json").read_text())
    assert (lock["pid"], lock["host"]) == (process.pid, socket.gethostname())
    said = run.sit(code=2)
    assert str(process.pid) in said and socket.gethostname() in said
    assert str(run.folder) in said
    assert json.loads((run.folder / "lock.json").read_text()) == lock
    assert process.poll() is None  # and the first is not disturbed
    assert len(run.begun()) == 1

    process.kill()
    process.wait()
    assert (run.folder / "lock.json").exists()
    commit = run.committed()
    second = run.start()
    wait_for_sitting(run, second, 2)
    lock = json.loads((run.folder / "lock.json").read_text())
    assert lock["pid"] == second.pid
    assert run.begun()[1] == commit
    second.send_signal(signal.SIGKILL)
    second.communicate()


def test_the_lock_goes_with_the_run(open_run, single):
    run = open_run()
    assert json.loads((run.folder / "lock.json").read_text())["pid"] == os.getpid()
    single(run)
    run.finish(Report([Claim("x", 0.0, "0", True)], {}))
    assert not (run.folder / "lock.json").exists()


def test_the_lock_goes_with_the_process(open_run, single, tmp_path):
    """Also where nobody called `finish`, and after an error."""
    code = (
        "import dataclasses, sys; from pathlib import Path\n"
        "from jaxzoo.training.record import Run\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Config: steps: int = 1\n"
        "Run(Path(sys.argv[1]), topic='t', slug='s', title='T', preset='p', "
        "config=Config())\n"
        "raise SystemExit(3)\n"
    )
    folder = tmp_path / "other"
    process = forked.start(["-c", code, folder], kill.environment(tmp_path / "cache"))
    said = process.communicate()
    assert process.returncode == 3, said
    assert (folder / "config.json").exists()
    assert not (folder / "lock.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_lock_that_nobody_holds_is_taken_over(open_run, text):
    folder = open_run("a").folder
    code = "import os, sys; os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    other = folder.with_name("b")
    other.mkdir()
    for name in ("config.json", "env.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    (other / "lock.json").write_text(text)
    run = open_run("b")
    assert run.resumed
    assert json.loads((other / "lock.json").read_text())["pid"] == os.getpid()


def test_a_foreign_lock_file_is_left_alone(open_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    (folder / "lock.json").write_text('{"packages": []}')
    with pytest.raises(RunFolderError, match="is not a run's folder"):
        open_run()
    assert (folder / "lock.json").read_text() == '{"packages": []}'


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_takes_runs(open_run, monkeypatch, code):
    """Some network and FUSE file systems: no lock is no other process."""
    from jaxzoo.training import lock

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    assert not open_run().resumed
