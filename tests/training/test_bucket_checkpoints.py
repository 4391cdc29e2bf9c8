"""Checkpoints in a bucket: a step counts by its manifest, written last, first to go."""

import pytest

from jaxzoo.training import checkpoint, commit, folder, manifest
from jaxzoo.training.checkpoint import Checkpoints, DamagedCheckpoint, digest, verify
from tests.training import bucket_tests
from tests.training.bucket_tests import FIRST, SECOND, below, flip, is_same

served = pytest.fixture(scope="module")(bucket_tests.served)
objects = pytest.fixture(bucket_tests.objects)


@pytest.fixture
def fit(objects):
    """The folder of a fit with two steps."""
    where = folder.locate("gs://runs-bucket/fit")
    with Checkpoints(where) as checkpoints:
        checkpoints.save(1, FIRST)
        checkpoints.save(2, SECOND)
    return where


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
