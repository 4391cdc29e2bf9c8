"""Any mesh: placement, saved on one and restored on another, the same bits (C3, C4)."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.training.checkpoint import Checkpoints, digest
from jaxzoo.training.loop import Stopped, train
from jaxzoo.training.mesh import (
    batch_shardings,
    make_mesh,
    place,
    put_batch,
    state_shardings,
)
from jaxzoo.training.record import Run
from jaxzoo.training.step import update_step
from tests.training import mesh_fit
from tests.training.mesh_fit import (
    LAYOUTS,
    MESHES,
    OPTIMIZER,
    Config,
    assert_same,
    batch_at,
    fit,
    loss,
    losses,
    mesh_of,
    plain,
    start,
)

REPO = Path(__file__).resolve().parents[2]
open_on = pytest.fixture(mesh_fit.open_on)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A fit on one device: its losses, and its state as NumPy."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run = Run(
        folder, topic="toy", slug="mesh", title="", preset="full", config=Config()
    )
    state = fit(run)
    return losses(run), jax.device_get(plain(state))


@pytest.mark.parametrize("text", [m for m in MESHES if MESHES[m] > 1])
def test_training_on_a_mesh_is_that_on_one_device(text, open_on, alone):
    run = open_on(text)
    state = fit(run)
    assert_allclose(losses(run), alone[0], rtol=1e-6)
    shards = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)}
    assert shards == {MESHES[text]}
    leaves = jax.tree.leaves(plain(state)), jax.tree.leaves(alone[1])
    for x, y in zip(*leaves, strict=True):
        assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same state, saved on every mesh: the folder of each."""
    folder, state = tmp_path_factory.mktemp("saved"), start()
    moments = jax.tree.map(
        lambda x: (
            x if x.dtype != jnp.float32 else x + jnp.arange(x.size).reshape(x.shape)
        ),
        state["opt_state"],
    )
    state = {**state, "opt_state": moments}
    for text in MESHES:
        with Checkpoints(folder / text) as checkpoints:
            checkpoints.save(7, place(mesh_of(text), state))
    return folder, state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_on_one_mesh_restored_on_another(layout, saved):
    folder, state = saved
    names = [m for m in MESHES if m in {
        layout.format(n=n, half=max(n // 2, 1), rest=min(n, 2)) for n in (1, 2, 4, 8)
    }]  # fmt: skip
    wanted = plain(state)
    digests = {digest(folder / name) for name in names}
    assert len(digests) == 1
    for source, target in itertools.product(names, names):
        shardings = state_shardings(mesh_of(target), state)
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state,
            shardings,
        )
        with Checkpoints(folder / source) as checkpoints:
            step, restored = checkpoints.restore_latest(like) or (0, None)
        assert step == 7
        assert_same(plain(restored), wanted)
        got = jax.tree.map(lambda x: x.sharding, restored)
        same = jax.tree.map(
            lambda g, s, x: g.is_equivalent_to(s, x.ndim), got, shardings, state
        )
        assert all(jax.tree.leaves(same))


def test_every_pair_of_layouts_too(saved):
    """Layout to another layout, at eight devices."""
    folder, state = saved
    names = [m for m in MESHES if MESHES[m] == 8]
    for source, target in itertools.permutations(names, 2):
        with Checkpoints(folder / source) as checkpoints:
            restored = checkpoints.restore(7, place(mesh_of(target), start))
        assert_same(plain(restored), plain(state))


@pytest.mark.parametrize(
    ("first", "second"),
    [("fsdp=8", None), (None, "data=8"), ("tensor=4", "fsdp=4,tensor=2")],
)
def test_a_run_goes_on_on_another_mesh(first, second, open_on, alone):
    def stop(t):
        if t == 7:
            os.kill(os.getpid(), 2)

    with pytest.raises(Stopped):
        fit(open_on(first), before=stop)
    run = open_on(second)
    fit(run)
    assert_allclose(losses(run), alone[0], rtol=1e-6)


def test_restored_on_one_device_by_the_same_call(tmp_path):
    """A process that has one CPU device reads what eight devices saved (C4)."""
    state = place(mesh_of("fsdp=4,tensor=2"), start)
    with Checkpoints(tmp_path / "fit") as checkpoints:
        checkpoints.save(3, state)
    program = (
        "import jax\n"
        "from pathlib import Path\n"
        "from jaxzoo.training.checkpoint import Checkpoints\n"
        "from tests.training.mesh_fit import start\n"
        "assert jax.device_count() == 1\n"
        f"with Checkpoints(Path({str(tmp_path / 'fit')!r})) as checkpoints:\n"
        "    step, state = checkpoints.restore_latest(start())\n"
        f"with Checkpoints(Path({str(tmp_path / 'again')!r})) as checkpoints:\n"
        "    checkpoints.save(step, state)\n"
    )
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(REPO)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert digest(tmp_path / "again") == digest(tmp_path / "fit")


def test_each_process_may_load_its_own_rows(open_on):
    asked = []

    def rows(t, part):
        asked.append(part)
        return {"x": batch_at(t)["x"][part]}

    step = update_step(loss, OPTIMIZER)
    knobs: Any = {"num_steps": 5, "log_every": 5}
    run = open_on("data=4")
    state = train(run, "fit", step, start, rows, batch_rows=16, **knobs)
    assert set(map(str, asked)) == {"slice(0, 16, None)"}
    other = train(open_on("data=4", "o"), "fit", step, start, batch_at, **knobs)
    assert_same(plain(state), plain(other))


def test_a_part_of_a_batch_is_put_where_it_belongs():
    mesh, whole = mesh_of("data=4"), np.arange(48.0).reshape(3, 16)
    put = put_batch(mesh, {"x": whole}, 1, slice(0, 16), 16)["x"]
    assert_array_equal(np.asarray(put), whole)
    assert put.sharding.spec == P(None, ("data", "fsdp"))


def test_leaves_are_split_where_they_can_be():
    mesh = mesh_of("fsdp=4,tensor=2")
    shapes = {
        "wide": (64, 128), "odd": (3, 1024), "small": (8, 8), "prime": (31, 37),
        "stack": (5, 64, 32),
    }  # fmt: skip
    tree = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    specs = {n: s.spec for n, s in state_shardings(mesh, tree).items()}
    assert specs == {
        "wide": P("tensor", "fsdp"),
        "odd": P(None, "fsdp"),
        "small": P(None, None),
        "prime": P(None, None),
        "stack": P(None, "fsdp", "tensor"),
    }


def test_a_leaf_may_be_placed_by_name():
    mesh = mesh_of("fsdp=4,tensor=2")
    state = start()

    def specs(name, shape):
        return P("tensor", None) if name.endswith("/in") else None

    placed = state_shardings(mesh, state, specs)
    assert placed["params"]["in"].spec == P("tensor", None)
    assert placed["opt_state"][1][0].mu["in"].spec == P("tensor", None)
    assert placed["params"]["out"].spec == P("fsdp", "tensor")


def test_memory_falls_with_fsdp():
    """Bytes per device of parameters and moments."""

    def bytes_on_first(text):
        state = place(mesh_of(text), start)
        leaves = [x for x in jax.tree.leaves(state) if x.dtype == jnp.float32]
        return sum(leaf.addressable_data(0).nbytes for leaf in leaves)

    whole, split = bytes_on_first("data=8"), bytes_on_first("fsdp=8")
    assert whole == 3 * 4 * (32 * 64 + 64 + 64 * 32)
    assert split == 3 * 4 * (2 * 32 * 64 // 8 + 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "'data' is not AXIS=SIZE"),
        ("model=8", "'model=8' is not AXIS=SIZE with an axis of data, fsdp, tensor"),
        ("data=0", "'data=0' is not AXIS=SIZE"),
        ("data=-2", "'data=-2' is not AXIS=SIZE"),
        ("data=3", "does not fit 8 devices"),
        ("data=-1,fsdp=-1", "does not fit 8 devices"),
        ("data=16,fsdp=-1", "does not fit 8 devices"),
        ("data=-1,fsdp=3", "does not fit 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(text)


def test_a_mesh_takes_the_devices_that_are_left():
    assert dict(make_mesh("fsdp=-1,tensor=2").shape) == {
        "data": 1, "fsdp": 4, "tensor": 2,
    }  # fmt: skip


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match=r"x/y has 6 examples.*data x fsdp = 4"):
        batch_shardings(mesh_of("fsdp=4"), {"x": {"y": np.zeros((6, 2))}}, 0)


def test_one_program_for_all_calls_of_a_size(open_on):
    """A second compilation would double the wait before the first step."""
    traced = []

    def step(state, batch):
        traced.append(1)
        return {"n": state["n"] + jnp.mean(batch["x"])}, {"n": state["n"]}

    run = open_on("data=8")
    train(
        run, "fit", step, lambda: {"n": jnp.zeros(())}, batch_at, num_steps=40,
        log_every=10,
    )  # fmt: skip
    assert len(traced) == 1
