"""What the tests of meshes share: the meshes, and a fit that goes on any of them.

`open_on` is a fixture where a file of tests makes it its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.testing import assert_array_equal

from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local, make_mesh
from jaxzoo.training.record import Run
from jaxzoo.training.step import init_state, update_step

LAYOUTS = ("data={n}", "fsdp={n}", "tensor={n}", "fsdp={half},tensor={rest}")
MESHES = {
    layout.format(n=n, half=max(n // 2, 1), rest=min(n, 2)): n
    for n in (1, 2, 4, 8)
    for layout in LAYOUTS
}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def mesh_of(text):
    return make_mesh(text, jax.devices()[: MESHES[text]])


def loss(params, key, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"] + params["bias"][None])
    target = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    value = jnp.mean((hidden @ params["out"] - target) ** 2)
    return value, {"loss": value}


def start():
    keys = jax.random.split(jax.random.key(1), 3)
    params = {
        "in": jax.random.normal(keys[0], (32, 64)) / 6,
        "bias": jnp.zeros(64),
        "out": jax.random.normal(keys[1], (64, 32)) / 8,
    }
    return init_state(keys[2], params, OPTIMIZER)


def batch_at(t):
    x = np.random.default_rng(t).normal(size=(16, 32))
    return {"x": x.astype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "mesh"


def open_on(tmp_path):
    """`open_on(mesh, folder)` opens a run that trains on a mesh, or on one device."""

    def open_one(text, folder="run"):
        return Run(
            tmp_path / folder,
            topic="toy",
            slug="mesh",
            title="Mesh",
            preset="full",
            config=Config(),
            mesh=None if text is None else mesh_of(text),
        )

    return open_one


def fit(run, *, reproducible=False, before=lambda t: None, **knobs):
    step = update_step(loss, OPTIMIZER, reproducible=reproducible)

    def batches(t):
        before(t)
        return batch_at(t)

    knobs = {"num_steps": 20, "log_every": 5, **knobs}
    return train(run, "fit", step, start, batches, **knobs)


def plain(tree):
    tree = local(tree)
    return {**tree, "key": jax.random.key_data(tree["key"])}


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert_array_equal(np.asarray(x), np.asarray(y))


def losses(run):
    return run.history("fit")["loss"]
