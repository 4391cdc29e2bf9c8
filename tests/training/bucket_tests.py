"""What the tests of buckets share: an empty one, and looks into it.

`served` and `objects` are fixtures where a file of tests makes them its own.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.training import folder, lock
from tests.training import bucket

FIRST, SECOND = ({"w": jnp.arange(4.0) + i, "b": jnp.full(2, i)} for i in (1, 2))


def served():
    """The objects of a server that epath reaches."""
    with bucket.serve() as (url, objects), pytest.MonkeyPatch.context() as patch:
        patch.setenv(bucket.URL, url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        bucket.use()
        yield objects


def objects(served, monkeypatch):
    """The objects of an empty bucket: name to (generation, content)."""
    served.clear()
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    yield served
    for file in list(lock._beating):
        lock.release(file)
    folder._waiting.clear()


def at(objects, name):
    return objects[f"run/{name}"][1].decode()


def lines(objects):
    """How many are in metrics.jsonl."""
    _, content = objects.get("run/metrics.jsonl", (0, b""))
    return len(content.splitlines())


def below(objects, name):
    return {k.removeprefix(name) for k in objects if k.startswith(name)}


def flip(objects, name):
    generation, content = objects[name]
    objects[name] = generation, content[:-1] + bytes([content[-1] ^ 1])


def is_same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in b)
