"""The compile cache: on by default, the user's word first, never in the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxzoo.training import compile_cache
from jaxzoo.training.compile_cache import drop_oldest, enable, machine_digest

REPO = Path(__file__).resolve().parents[2]
NAMES = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def settings():
    """As a user's process starts; afterwards as this one was."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_default_is_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    place = tmp_path / "xdg" / "jaxzoo" / "xla" / machine_digest()
    assert enable() == str(place)
    assert jax.config.jax_compilation_cache_dir == str(place)
    assert list(place.iterdir()) == []
    # What lies there will run: it is the user's alone.
    assert place.stat().st_mode & 0o077 == 0
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert enable() == f"{tmp_path}/home/.cache/jaxzoo/xla/{machine_digest()}"


def test_what_the_user_set_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert enable(tmp_path) == "gs://bucket/cache"
    assert jax.config.jax_compilation_cache_dir == "gs://bucket/cache"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert enable(tmp_path) is None
    assert jax.config.jax_compilation_cache_dir is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("obstacle", ["file", "nobody"])
def test_a_folder_that_cannot_be_written_turns_it_off(tmp_path, monkeypatch, obstacle):
    (tmp_path / "file").write_text("")
    if obstacle == "nobody":  # a read-only home; root may write anywhere

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied", str(tmp_path / "nobody"))

        monkeypatch.setattr(Path, "mkdir", refuse)
    said = []
    assert enable(tmp_path / obstacle, say=said.append) is None
    assert jax.config.jax_compilation_cache_dir is None
    (sentence,) = said
    assert sentence.startswith(f"The compile cache is off: {tmp_path / obstacle}")


def test_the_entries_used_longest_ago_go_first(tmp_path):
    for age, name in enumerate("abcd"):  # d was used longest ago
        path = tmp_path / f"{name}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - 50))
    (tmp_path / "other").write_bytes(b"x" * 1000)
    drop_oldest(tmp_path, 400)
    assert len(list(tmp_path.glob("*-cache"))) == 4
    drop_oldest(tmp_path, 250)
    assert {p.name for p in tmp_path.iterdir()} == {"a-cache", "b-cache", "other"}


def test_the_cap_holds_when_the_cache_is_turned_on(tmp_path, monkeypatch):
    place = tmp_path / machine_digest()
    place.mkdir()
    (place / "big-cache").write_bytes(b"x" * 2000)
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 1000)
    assert enable(tmp_path) == str(place)
    assert list(place.iterdir()) == []


def test_another_processor_gets_another_folder(monkeypatch):
    here = machine_digest()
    assert here == machine_digest()
    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "riscv64")
    assert machine_digest() != here


START = """
import json, os, sys, threading
from pathlib import Path
from jaxzoo.training import compile_cache
compile_cache.MIN_SECONDS = 0
compile_cache.enable(Path(sys.argv[1]))
import jax, jax.numpy as jnp
counts = {"hits": 0, "misses": 0}
def count(event, **_):
    for name in counts:
        counts[name] += event == f"/jax/compilation_cache/cache_{name}"
jax.monitoring.register_event_listener(count)
value = jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((8, 8)))
print(json.dumps({**counts, "value": float(value.sum())}))
"""


def test_a_second_start_compiles_nothing(tmp_path):
    def start():
        env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
        command = [sys.executable, "-c", START, str(tmp_path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first, second = start(), start()
    assert first["misses"] > 0 and first["hits"] == 0
    assert second["hits"] == first["misses"] and second["misses"] == 0
    assert second["value"] == first["value"]
