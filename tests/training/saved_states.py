"""What the tests of damaged checkpoints share: states of all kinds, saved in two steps.

`pristine`, `copy` and `states` are fixtures where a file of tests makes them its own.
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxzoo.training.checkpoint import Checkpoints, verify
from jaxzoo.training.step import init_state

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


def pristine(tmp_path_factory):
    """A fit's folder with two good steps; copy it before you damage it."""
    folder = tmp_path_factory.mktemp("pristine") / "fit"
    with Checkpoints(folder) as checkpoints:
        for step in (OLDER, NEWEST):
            checkpoints.save(step, make_state(step))
    assert verify(folder) == []
    return folder


def copy(pristine, tmp_path):
    """`copy()` is a fresh copy of `pristine`."""

    def make():
        shutil.rmtree(tmp_path / "fit", ignore_errors=True)
        return Path(shutil.copytree(pristine, tmp_path / "fit"))

    return make


def states():
    return {step: make_state(step) for step in (OLDER, NEWEST)}


def files_of(step_folder):
    return sorted(path for path in step_folder.rglob("*") if path.is_file())


def flip(path, rng):
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


def with_params(state, **params):
    return {**state, "params": {**state["params"], **params}}
