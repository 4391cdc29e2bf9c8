"""Damaged checkpoints: no flipped bit goes unseen, and the step before stands in.

Rows C1, C2 and C5-C7 of the reliability matrix: bits, files, other trees, full and
read-only disks.
"""

import errno
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
import optax
import orbax.checkpoint as ocp
import pytest

from jaxzoo.training.checkpoint import Checkpoints, DamagedCheckpoint, digest, verify
from jaxzoo.training.step import init_state

REPO = Path(__file__).resolve().parents[2]
OLDER, NEWEST = 30, 40
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))


def make_state(step, optimizer=OPTIMIZER):
    """What the loop saves: float32, bfloat16, int32, a typed key, Adam, scalars."""
    keys = jax.random.split(jax.random.key(step), 4)
    params = {
        "w": jax.random.normal(keys[0], (8, 16)),
        "half": jax.random.normal(keys[1], (16,), jnp.bfloat16),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32),
    }
    state = init_state(keys[2], params, optimizer)
    state["opt_state"] = jax.tree.map(lambda x: x + step, state["opt_state"])
    ids = jax.random.randint(keys[3], (5, 3), 0, 99, jnp.int32)
    extra = {"ids": ids, "keys": jax.random.split(keys[3], 2)}
    return {**state, **extra, "step": jnp.int32(step), "scale": jnp.float32(step / 7)}


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def is_same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        (x.shape, x.dtype, bits(x)) == (y.shape, y.dtype, bits(y)) for x, y in pairs
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A fit's folder with two good steps; copy it before you damage it."""
    folder = tmp_path_factory.mktemp("pristine") / "fit"
    with Checkpoints(folder) as checkpoints:
        for step in (OLDER, NEWEST):
            checkpoints.save(step, make_state(step))
    assert verify(folder) == []
    return folder


@pytest.fixture
def copy(pristine, tmp_path):
    """`copy()` is a fresh copy of `pristine`."""

    def make():
        shutil.rmtree(tmp_path / "fit", ignore_errors=True)
        return Path(shutil.copytree(pristine, tmp_path / "fit"))

    return make


@pytest.fixture(scope="module")
def states():
    return {step: make_state(step) for step in (OLDER, NEWEST)}


def files_of(step_folder):
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


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


def flip(path, rng):
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


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
        damage = verify(folder)
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


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def with_params(state, **params):
    return {**state, "params": {**state["params"], **params}}


OTHER_TREES = {
    "shape": (lambda s: with_params(s, w=jnp.zeros((16, 8))), ["params/w"]),
    "flat": (lambda s: with_params(s, w=jnp.zeros(128)), ["params/w"]),
    "rank": (lambda s: {**s, "scale": jnp.zeros(1)}, ["scale"]),
    "wider": (lambda s: with_params(s, half=jnp.zeros(16)), ["params/half"]),
    "narrower": (
        lambda s: with_params(s, w=jnp.zeros((8, 16), jnp.bfloat16)),
        ["params/w"],
    ),
    "float16": (lambda s: with_params(s, half=jnp.zeros(16, "f2")), ["params/half"]),
    "unsigned": (lambda s: {**s, "ids": jnp.zeros((5, 3), jnp.uint32)}, ["ids"]),
    "float": (lambda s: {**s, "step": jnp.float32(0)}, ["step"]),
    "raw key": (lambda s: {**s, "key": jax.random.key_data(s["key"])}, ["key"]),
    "other key": (lambda s: {**s, "key": jax.random.key(0, impl="rbg")}, ["key"]),
    "number of keys": (lambda s: {**s, "keys": s["keys"][:1]}, ["keys"]),
    "missing": (lambda s: without(s, "ids"), ["ids"]),
    "extra": (lambda s: {**s, "ema": jnp.zeros(3)}, ["ema"]),
    "renamed": (
        lambda s: {**without(s, "scale"), "scales": s["scale"]},
        ["scale:", "scales:"],
    ),
    "nested": (
        lambda s: {**s, "scale": {"scale": s["scale"]}},
        ["scale:", "scale/scale"],
    ),
    "sgd": (lambda s: make_state(0, optax.sgd(0.1, momentum=0.9)), ["opt_state"]),
    "no chain": (lambda s: make_state(0, optax.adam(1e-3)), ["opt_state"]),
    "amsgrad": (
        lambda s: make_state(
            0, optax.chain(optax.clip_by_global_norm(1.0), optax.amsgrad(1e-3))
        ),
        ["opt_state", "nu_max"],
    ),
}


@pytest.mark.parametrize("change", OTHER_TREES)
def test_another_tree_is_refused_by_leaf(pristine, states, change):
    other, names = OTHER_TREES[change]
    like = other(states[NEWEST])
    with Checkpoints(pristine) as checkpoints:
        with pytest.raises(ValueError) as refused:
            checkpoints.restore(NEWEST, like)
        # It is no damage: the step stays where it is.
        with pytest.raises(ValueError):
            checkpoints.restore_latest(like)
        assert checkpoints.steps() == [OLDER, NEWEST]
    sentence = str(refused.value)
    for word in (*names, "stored", "expected"):
        assert word in sentence, sentence
    assert 1 <= sentence.count(": stored ") <= 10
    assert len(sentence) < 1500


def test_a_key_of_another_kind_is_refused(tmp_path):
    like = {"key": jax.random.key(0, impl="unsafe_rbg")}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"key": jax.random.key(0, impl="rbg")})
        checkpoints.wait()
        with pytest.raises(ValueError, match="key: stored"):
            checkpoints.restore(1, like)


def test_at_most_ten_leaves_are_listed(tmp_path):
    state = {f"layer{i:02}": jnp.zeros(i + 1) for i in range(25)}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        like = {name: jnp.zeros(30) for name in state}
        with pytest.raises(ValueError, match="layer00: stored .*15") as refused:
            checkpoints.restore(1, like)
    assert str(refused.value).count(": stored ") == 10


AWKWARD = {
    "a dot": {"a.b": jnp.ones(2), "a": {"b": jnp.zeros(2)}},
    "a slash": {"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}},
    "only a dot": {"a.b": jnp.ones(2), "c": {"d.e": jnp.zeros(2)}},
    "only a slash": {"linear/~/w": jnp.ones(2), "c": jnp.zeros(2)},
    "numbers": {1: jnp.ones(2), 2: jnp.zeros(2)},
    "list": [jnp.ones(2), (jnp.zeros(3), None)],
    "empty": {"a": jnp.zeros((0, 3)), "b": jnp.ones(1), "c": {}, "d": ()},
    "long": {"x" * 300: jnp.ones(2)},
    "dots": {"..": jnp.ones(2)},
    "space": {"a b %20 é": jnp.ones(2)},
    "types": {
        "bool": jnp.array([True, False]),
        "int4": jnp.arange(5, dtype=jnp.int4),
        "int8": jnp.arange(5, dtype=jnp.int8),
        "float8": jnp.arange(5, dtype=jnp.float8_e4m3fn),
        "complex": jnp.arange(5, dtype=jnp.complex64) * 1j,
    },
    "numpy": {"w": np.arange(5, dtype=np.float32), "s": np.int32(7)},
}


@pytest.mark.parametrize("name", AWKWARD)
def test_an_awkward_tree_comes_back_or_is_refused_at_once(tmp_path, name):
    """What cannot be restored must not be reported as saved."""
    tree = AWKWARD[name]
    try:
        with Checkpoints(tmp_path / "c") as checkpoints:
            checkpoints.save(1, tree)
    except (OSError, ValueError):
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["c"]
        return
    assert verify(tmp_path / "c") == []
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert is_same(checkpoints.restore(1, tree), tree)


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


def command_line(*words, code):
    done = subprocess.run(
        [sys.executable, "-m", "jaxzoo.training.checkpoint", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(REPO), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def test_the_command_line(copy, tmp_path, states):
    folder = copy()
    command_line("verify", folder, code=0)
    assert command_line("hash", folder, code=0).strip() == digest(folder)
    listed = command_line("list", folder, code=0)
    assert str(OLDER) in listed and str(NEWEST) in listed
    flip(folder / str(NEWEST) / "state" / "params.w" / "0.0", np.random.default_rng(0))
    out = command_line("verify", folder, code=1)
    assert "'state/params.w/0.0' (leaf 'params/w')" in out
    command_line("hash", folder, code=1)
    command_line("verify", folder / str(OLDER), code=0)
    command_line("verify", tmp_path / "nowhere", code=2)


def test_equal_trees_have_equal_digests(tmp_path, pristine, states):
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(7, states[NEWEST])  # under another number
    assert digest(tmp_path / "a") == digest(pristine) == digest(pristine / str(NEWEST))
    digests = {digest(pristine), digest(pristine / str(OLDER))}
    nudged = np.asarray(states[NEWEST]["params"]["w"]).copy()
    nudged[3, 5] = np.nextafter(nudged[3, 5], np.float32(9))
    others = [
        with_params(states[NEWEST], w=jnp.asarray(nudged)),
        with_params(states[NEWEST], w=states[NEWEST]["params"]["w"].reshape(16, 8)),
        {**without(states[NEWEST], "scale"), "scales": states[NEWEST]["scale"]},
    ]
    for index, other in enumerate(others):
        with Checkpoints(tmp_path / f"o{index}") as checkpoints:
            checkpoints.save(NEWEST, other)
        digests.add(digest(tmp_path / f"o{index}"))
    assert len(digests) == 5


def test_the_digest_does_not_see_the_sharding(tmp_path, pristine, states):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        whole = leaf.shape != (8, 16)
        spec = jax.sharding.PartitionSpec(*(() if whole else ("x",)))
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(NEWEST, jax.tree.map(place, states[NEWEST]))
    assert digest(tmp_path / "a") == digest(pristine)


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
