"""Disks that are full or read-only: an error by name, and the step before stays whole.

Rows C6 and C7 of the reliability matrix.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from jaxzoo.training.checkpoint import Checkpoints
from tests.training import saved_states
from tests.training.saved_states import NEWEST, OLDER, is_same

REPO = Path(__file__).resolve().parents[2]

# A fit with two good steps, and copies of it to be damaged.
pristine = pytest.fixture(scope="module")(saved_states.pristine)
copy = pytest.fixture(saved_states.copy)
states = pytest.fixture(scope="module")(saved_states.states)


class Full:
    """Orbax's `save` on a disk that fills up in the middle."""

    def __init__(self, monkeypatch, error):
        whole = ocp.Checkpointer.save

        def save(checkpointer, directory, *args, **kwargs):
            whole(checkpointer, directory, *args, **kwargs)
            raise error

        self.save = save
        monkeypatch.setattr(ocp.Checkpointer, "save", save)


def assert_still_good(folder, states, *, saves=True):
    """The older step is there whole, and nothing of the one that failed."""
    with Checkpoints(folder) as checkpoints:
        assert [p.name for p in folder.iterdir()] == [str(OLDER)]
        found = checkpoints.restore_latest(states[OLDER])
        assert found is not None and found[0] == OLDER
        assert is_same(found[1], states[OLDER])
        if saves:
            checkpoints.save(NEWEST, states[NEWEST])
    if saves:
        with Checkpoints(folder) as checkpoints:
            assert is_same(checkpoints.restore(NEWEST, states[OLDER]), states[NEWEST])


@pytest.fixture
def older_alone(copy):
    folder = copy()
    shutil.rmtree(folder / str(NEWEST))
    return folder


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("at_close", [True, False])
def test_an_error_of_a_save_is_raised(older_alone, states, code, at_close, monkeypatch):
    error = OSError(code, os.strerror(code))
    with monkeypatch.context() as patched:
        Full(patched, error)
        checkpoints = Checkpoints(older_alone)
        checkpoints.save(NEWEST, states[NEWEST])
        with pytest.raises(OSError, match=os.strerror(code)) as raised:
            if at_close:
                checkpoints.__exit__()
            else:
                checkpoints.save(NEWEST + 1, states[NEWEST])
        assert str(older_alone) in str(raised.value)
        assert len(str(raised.value)) < 500
        assert not list(older_alone.glob("*.tmp"))
    assert_still_good(older_alone, states)


@pytest.mark.parametrize("inside", [False, True])
def test_a_path_that_is_a_file(tmp_path, inside):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(OSError, match=str(tmp_path / "c")):
        Checkpoints(tmp_path / "c" / "fit" if inside else tmp_path / "c")
    assert (tmp_path / "c").read_text() == "mine"


# Runs as root of its own name space: what it mounts goes away with it.
SMALL_DISK = """
import os, random, shutil, subprocess, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jaxzoo.training.checkpoint import Checkpoints, verify

disk = Path(sys.argv[1])
folder = disk / "fit"
state = {"w": jnp.arange(8000.0), "b": jnp.ones(3), "step": jnp.int32(1)}
later = jax.tree.map(lambda x: x + 1, state)
rng = random.Random(0)


def good(step, wanted):
    assert verify(folder) == []
    with Checkpoints(folder) as checkpoints:
        assert [p.name for p in folder.iterdir()] == [str(step)], os.listdir(folder)
        found = checkpoints.restore_latest(state)
    assert found is not None and found[0] == step
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted)):
        assert np.array_equal(a, b)


with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state)
failed, messages = 0, set()
for trial in range(40):
    filler = disk / "filler"
    room = rng.randrange(0, 120_000)
    stat = os.statvfs(disk)
    filler.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - room)))
    try:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(2, later)
    except OSError as error:
        failed += 1
        assert str(folder) in str(error) and len(str(error)) < 500, error
        messages.add(str(error))
        good(1, state)
        filler.unlink()
    else:
        filler.unlink()
        assert Checkpoints(folder).steps() == [1, 2]
        shutil.rmtree(folder / "2")
with Checkpoints(folder) as checkpoints:
    checkpoints.save(2, later)  # works once freed
assert Checkpoints(folder).steps() == [1, 2]
shutil.rmtree(folder / "2")

(folder / "7.tmp").mkdir()
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
try:
    Checkpoints(folder)
    raise SystemExit("a folder with a left-over was cleaned on a read-only disk")
except OSError as error:
    assert str(folder) in str(error), error
subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
(folder / "7.tmp").rmdir()
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
good(1, state)
try:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(2, later)
    raise SystemExit("saved on a read-only disk")
except OSError as error:
    assert str(folder) in str(error) and len(str(error)) < 500, error
    messages.add(str(error))
good(1, state)
print(failed, "of 40 failed;", *sorted(messages)[-9:], sep="\\n")
"""


def test_a_disk_that_is_full_or_read_only(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "script.py").write_text(SMALL_DISK)
    inner = 'mount -t tmpfs -o size=400k none "$1" && touch "$1/ok"'
    command = ["unshare", "-rm", "sh", "-c"]
    words = ["sh", str(tmp_path / "disk")]
    try:
        subprocess.run([*command, inner, *words], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no name space with a mount of its own here")
    inner += ' && exec "$2" "$3" "$1"'
    words += [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(
        [*command, inner, *words],
        env={**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 5 < int(done.stdout.split()[0]) < 40, done.stdout
    assert not any((tmp_path / "disk").iterdir())
