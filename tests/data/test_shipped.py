"""Damage to shipped files is seen, named, and comes with a remedy."""

from __future__ import annotations

import hashlib
import os
import pathlib
import random
import shutil

import numpy as np
import pytest

from jaxzoo.data import shipped
from jaxzoo.data.emoji import emoji
from jaxzoo.data.fashion_mnist import fashion_mnist
from jaxzoo.data.text import moby_dick, state_of_the_union

FOLDER = pathlib.Path(shipped.__file__).parent / "files"
LOADERS = {
    "emoji32.npz": emoji,
    "fashion_mnist_12k.npz": fashion_mnist,
    "moby_dick.txt": moby_dick,
    "state_of_the_union.txt": state_of_the_union,
}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A function that copies one shipped file to where jaxzoo now looks."""
    monkeypatch.setattr(shipped, "_FOLDER", tmp_path)

    def place(name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copy(FOLDER / name, tmp_path / name))

    return place


def test_every_shipped_file_is_known_and_in_the_notice() -> None:
    names = {p.name for p in FOLDER.iterdir() if p.name != "NOTICE"}
    assert names == set(shipped._KNOWN) == set(LOADERS)
    notice = (FOLDER / "NOTICE").read_text()
    for wanted in (
        *names,
        "Copyright (c) 2017 Zalando SE",
        "Copyright (c) 2017 Miles Johnson",
        "Copyright Twitter, Inc and other contributors",
        "CC-BY-4.0",
        "Permission is hereby granted, free of charge",
    ):
        assert wanted in notice, wanted


@pytest.mark.parametrize("name", sorted(LOADERS))
@pytest.mark.parametrize("damage", ["flip", "flip_first", "truncate", "grow", "empty"])
def test_damage_is_named_with_a_remedy(name, damage, copy) -> None:
    path = copy(name)
    content = bytearray(path.read_bytes())
    rng = random.Random(f"{name} {damage}")
    if damage == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif damage == "flip_first":
        content[0] ^= 1
    elif damage == "truncate":
        del content[rng.randrange(len(content)) :]
    elif damage == "grow":
        content.append(0)
    else:
        content.clear()
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        LOADERS[name]()
    message = str(caught.value)
    assert str(path) in message
    assert "pip install --force-reinstall" in message
    assert f"git checkout -- jaxzoo/data/files/{name}" in message
    cause = "SHA-256" if damage.startswith("flip") else f"has {len(content)} bytes"
    assert cause in message and len(message) < 500


@pytest.mark.parametrize("name", sorted(LOADERS))
def test_missing_file_is_named_with_a_remedy(name, copy) -> None:
    path = copy(name)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing; reinstall") as caught:
        LOADERS[name]()
    assert str(path) in str(caught.value)


def test_damage_after_a_good_load_is_seen(copy) -> None:
    """Even with the old time stamp: nothing is trusted from an earlier load."""
    path = copy("moby_dick.txt")
    moby_dick()
    stamp = path.stat()
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(ValueError, match="is damaged"):
        moby_dick()


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"'\.\./source\.py' is not a shipped file"):
        shipped.read_shipped("../source.py")


def test_no_pickle_is_read(copy, monkeypatch) -> None:
    path = copy("emoji32.npz")
    np.savez(path, image=np.array([{}], dtype=object))
    content = path.read_bytes()
    known = {path.name: (len(content), hashlib.sha256(content).hexdigest())}
    monkeypatch.setattr(shipped, "_KNOWN", known)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        shipped.load_npz("emoji32.npz")
