"""Damaged checkpoints: no flipped bit goes unseen, and the step before stands in.

Rows C1 and C2 of the reliability matrix: bits and files.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxzoo.training.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    digest,
    main,
    verify,
)
from tests.training import saved_states
from tests.training.saved_states import NEWEST, OLDER, bits, files_of, flip, is_same

REPO = Path(__file__).resolve().parents[2]

# A fit with two good steps, and copies of it to be damaged.
pristine = pytest.fixture(scope="module")(saved_states.pristine)
copy = pytest.fixture(saved_states.copy)
states = pytest.fixture(scope="module")(saved_states.states)


def leaf_of(path, step_folder):
    """The leaf whose bytes are in a file of Orbax, or None for a file of the tree."""
    parts = path.relative_to(step_folder).parts
    with_folder = len(parts) > 2 and parts[1] != "array_metadatas"
    return parts[1].replace(".", "/") if with_folder else None


def assert_named(sentences, path, step_folder):
    """One of the sentences names the file, and the leaf where it belongs to one."""
    name = path.relative_to(step_folder).as_posix()
    told = [s for s in sentences if f"'{name}'" in s]
    assert told, (name, sentences)
    leaf = leaf_of(path, step_folder)
    assert leaf is None or f"'{leaf}'" in told[0]
    assert all(len(s) < 500 and f"step {step_folder.name}" in s for s in sentences)


def assert_falls_back(folder, like, wanted):
    """The newest step is refused by name, put aside, and the older one comes back."""
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(DamagedCheckpoint) as refused:
            checkpoints.restore(NEWEST, like)
        assert len(str(refused.value)) < 500
        with pytest.warns(UserWarning, match=f"step {NEWEST}") as warned:
            found = checkpoints.restore_latest(like)
        assert len(warned) == 1 and str(refused.value) in str(warned[0].message)
        assert found is not None and found[0] == OLDER
        assert is_same(found[1], wanted)
        assert checkpoints.steps() == [OLDER]
    assert (folder / f"{NEWEST}.damaged").is_dir()
    assert verify(folder) == []


def test_no_flipped_bit_goes_unseen(pristine, copy, states):
    rng = np.random.default_rng(0)
    like = jax.tree.map(jnp.zeros_like, states[OLDER])
    folder = copy()
    step = folder / str(NEWEST)
    files = files_of(step)
    hit, silent = Counter(), 0
    for trial in range(1000):
        path = files[rng.integers(len(files))]
        if path.stat().st_size == 0:
            continue
        good = path.read_bytes()
        flip(path, rng)
        hit[path.name == "MANIFEST.json"] += 1
        damage = verify(step)
        if damage:
            assert len(damage) == 1
            assert_named(damage, path, step)
        else:  # then it must not matter
            silent += 1
            with Checkpoints(folder) as checkpoints:
                assert is_same(checkpoints.restore(NEWEST, like), states[NEWEST])
        if damage and trial % 16 == 0:
            assert_falls_back(folder, like, states[OLDER])
            folder = copy()
        else:
            path.write_bytes(good)
    assert sum(hit.values()) > 900 and hit[True] > 10
    assert silent < 5
    assert verify(folder) == []


def truncate(step, path, other, rng):
    content = path.read_bytes()
    path.write_bytes(content[: rng.integers(len(content))])


def zero(step, path, other, rng):
    content = bytearray(path.read_bytes())
    start = int(rng.integers(max(1, len(content) - 512)))
    start = 0 if not any(content[start : start + 512]) else start
    size = min(512, len(content) - start)
    content[start : start + size] = bytes(size)
    path.write_bytes(content)


def delete(step, path, other, rng):
    path.unlink()


def swap(step, path, other, rng):
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def stale(step, path, other, rng):
    path.write_bytes((step.parent / str(OLDER) / path.relative_to(step)).read_bytes())


def added(step, path, other, rng):
    path.with_name(path.name + "1").write_bytes(other.read_bytes())


def no_manifest(step, path, other, rng):
    (step / "MANIFEST.json").unlink()


def link_out(step, path, other, rng):
    outside = step.parent.parent / f"outside-{path.name}"
    outside.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(outside)


@pytest.mark.parametrize(
    "damage",
    [truncate, zero, delete, swap, stale, added, no_manifest, link_out],
    ids=lambda f: f.__name__,
)
def test_damaged_files_are_named(copy, states, damage):
    rng = np.random.default_rng(1)
    like = states[NEWEST]
    for trial in range(30):
        folder = copy()
        step = folder / str(NEWEST)
        files = [path for path in files_of(step) if path.stat().st_size]
        while True:
            path, other = (files[i] for i in rng.choice(len(files), 2, replace=False))
            old = folder / str(OLDER) / path.relative_to(step)
            if path.read_bytes() != other.read_bytes() and (
                damage is not stale
                or (old.exists() and old.read_bytes() != path.read_bytes())
            ):
                break
        damage(step, path, other, rng)
        sentences = verify(folder)
        named = {added: path.with_name(path.name + "1")}.get(damage, path)
        if damage is no_manifest or (
            damage is swap and "MANIFEST.json" in (path.name, other.name)
        ):
            named = step / "MANIFEST.json"
        if damage is link_out and path.name == "MANIFEST.json" and not sentences:
            continue  # the bytes are those that were saved
        if damage is stale and path.name == "MANIFEST.json":
            assert sentences  # of another step: it names what it does not know
        else:
            assert_named(sentences, named, step)
        if trial % 6 == 0:
            assert_falls_back(folder, like, states[OLDER])


def test_a_step_under_another_number_is_damage(copy, states):
    folder = copy()
    shutil.rmtree(folder / str(NEWEST))
    shutil.copytree(folder / str(OLDER), folder / str(NEWEST))
    assert len(verify(folder)) == 1
    assert_falls_back(folder, states[NEWEST], states[OLDER])


def test_other_bytes_from_a_good_file_are_noticed(copy, states, monkeypatch):
    """The library, the memory or the wire, between the file and the array."""
    whole = ocp.Checkpointer.restore

    def restore(checkpointer, *args, **kwargs):
        state = whole(checkpointer, *args, **kwargs)
        return {**state, "scale": state["scale"] + 1}

    with monkeypatch.context() as patched, Checkpoints(copy()) as checkpoints:
        patched.setattr(ocp.Checkpointer, "restore", restore)
        with pytest.raises(DamagedCheckpoint, match=f"step {NEWEST}.*'scale'"):
            checkpoints.restore(NEWEST, states[NEWEST])


def test_where_all_steps_are_damaged_there_is_none(copy, states):
    folder = copy()
    for step in (OLDER, NEWEST):
        (folder / str(step) / "MANIFEST.json").unlink()
    assert len(verify(folder)) == 2
    with Checkpoints(folder) as checkpoints:
        with pytest.warns(UserWarning) as warned:
            assert checkpoints.restore_latest(states[NEWEST]) is None
        assert len(warned) == 2
        checkpoints.save(OLDER, states[OLDER])  # the numbers are free again
    with Checkpoints(folder) as checkpoints:
        assert is_same(checkpoints.restore(OLDER, states[OLDER]), states[OLDER])


def test_the_manifest_is_what_it_says(pristine, states):
    step = pristine / str(NEWEST)
    manifest = json.loads((step / "MANIFEST.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, NEWEST)
    stored = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(states[NEWEST])[0]
    }
    assert manifest["leaves"].keys() == stored.keys()
    for name, leaf in stored.items():
        facts = manifest["leaves"][name]
        assert facts["sha256"] == hashlib.sha256(bits(leaf)).hexdigest()
    half = manifest["leaves"]["params/half"]
    assert (half["dtype"], half["shape"]) == ("bfloat16", [16])
    found = {path.relative_to(step).as_posix(): path for path in files_of(step)}
    assert manifest["files"].keys() == found.keys() - {"MANIFEST.json"}
    for name, facts in manifest["files"].items():
        content = found[name].read_bytes()
        told = (facts["bytes"], facts["sha256"])
        assert told == (len(content), hashlib.sha256(content).hexdigest())


def test_the_command_line(copy, tmp_path, states, capsys):
    def told(*words, code):
        assert main(list(map(str, words))) == code
        return capsys.readouterr().out

    folder = copy()
    told("verify", folder, code=0)
    assert told("hash", folder, code=0).strip() == digest(folder)
    listed = told("list", folder, code=0)
    assert str(OLDER) in listed and str(NEWEST) in listed
    flip(folder / str(NEWEST) / "state" / "params.w" / "0.0", np.random.default_rng(0))
    told("hash", folder, code=1)
    told("verify", folder / str(OLDER), code=0)
    told("verify", tmp_path / "nowhere", code=2)
    done = subprocess.run(
        [sys.executable, "-m", "jaxzoo.training.checkpoint", "verify", folder],
        env={**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "'state/params.w/0.0' (leaf 'params/w')" in done.stdout


def test_what_a_kill_left_is_cleaned_when_it_opens(copy, states):
    folder = copy()
    shutil.copytree(folder / str(NEWEST), folder / "50.tmp")
    (folder / str(OLDER)).rename(folder / f"{OLDER}.old")
    with Checkpoints(folder) as checkpoints:
        assert {p.name for p in folder.iterdir()} == {str(NEWEST)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = checkpoints.restore_latest(states[OLDER])
        assert found is not None and is_same(found[1], states[NEWEST])
