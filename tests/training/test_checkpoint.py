"""Checkpoints: bit for bit, onto another mesh, blind to what was not written whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxzoo.training.checkpoint import Checkpoints, digest, main, verify
from jaxzoo.training.step import init_state


def make_mesh(*shape):
    names = ("x", "y", "z")[: len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert bits(x) == bits(y)


@functools.cache
def state():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": jax.random.normal(keys[0], (8, 16)),
        "half": jax.random.normal(keys[1], (16,), jnp.bfloat16),
        "odd": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    made = init_state(keys[2], params, optimizer)
    made["opt_state"] = jax.tree.map(
        lambda x: x + jnp.arange(x.size, dtype=x.dtype).reshape(x.shape),
        made["opt_state"],
    )
    return {**made, "keys": jax.random.split(keys[2], 4), "step": jnp.int32(7)}


def test_restores_bit_for_bit(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(7, state())
    # Closed: what was announced as saved is on the disk.
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 7
        like = jax.tree.map(jnp.zeros_like, state())
        restored = checkpoints.restore(7, like)
    assert_same(restored, state())
    adam = restored["opt_state"][1][0]
    assert isinstance(adam, optax.ScaleByAdamState)
    assert restored["params"]["half"].dtype == jnp.bfloat16
    assert jnp.issubdtype(restored["key"].dtype, jax.dtypes.prng_key)
    a, b = (jax.random.normal(s["keys"][2]) for s in (restored, state()))
    assert a == b


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (((4, 2), P("x", "y")), ((2, 4), P("x", "y"))),
        (((4, 2), P("x", "y")), ((8,), P(None, "x"))),
        (((8,), P("x")), ((2, 4), P("y", "x"))),
        (((8,), P("x")), None),
    ],
    ids=str,
)
def test_restores_onto_another_sharding(tmp_path, saved, wanted):
    def place(where, tree):
        if where is None:
            return jax.device_put(tree, jax.devices()[0])
        shape, spec = where
        mesh = make_mesh(*shape)

        def one(leaf):
            whole = leaf.shape == (8, 16)
            return jax.device_put(leaf, NamedSharding(mesh, spec if whole else P()))

        return jax.tree.map(one, tree)

    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, place(saved, state()))
    like = place(wanted, jax.tree.map(jnp.zeros_like, state()))
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore(1, like)
    assert_same(restored, state())
    for got, given in zip(
        jax.tree.leaves(restored), jax.tree.leaves(like), strict=True
    ):
        assert got.sharding.is_equivalent_to(given.sharding, got.ndim)
    shard = restored["params"]["w"].addressable_shards[0].data
    assert shard.shape == like["params"]["w"].addressable_shards[0].data.shape


def test_a_half_written_step_does_not_exist(tmp_path):
    """What a kill in the middle of a save leaves behind."""
    tree = {"w": jnp.arange(4.0)}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, tree)
    half = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    (half / "default").mkdir(parents=True)
    (half / "default" / "manifest.ocdbt").write_bytes(b"half")
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 1
        assert_same(checkpoints.restore(1, tree), tree)
        checkpoints.save(2, {"w": tree["w"] + 1})
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.latest() == 2
        assert_same(checkpoints.restore(2, tree), {"w": tree["w"] + 1})


def test_keeps_the_newest(tmp_path):
    tree = {"w": jnp.arange(4.0)}
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": tree["w"] * step})
        checkpoints.save(3, {"w": tree["w"] * 0})  # it is there already
    kept = {p.name for p in (tmp_path / "c").iterdir() if p.name.isdigit()}
    assert kept == {"2", "3"}
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert_same(checkpoints.restore(3, tree), {"w": tree["w"] * 3})


@pytest.mark.parametrize(
    "like",
    [
        {"w": jnp.zeros(5)},
        {"v": jnp.zeros(4)},
        {"w": jnp.zeros(4), "v": jnp.zeros(4)},
    ],
    ids=["shape", "name", "one more"],
)
def test_another_tree_is_refused(tmp_path, like):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"w": jnp.arange(4.0)})
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(ValueError):
        checkpoints.restore(1, like)


def test_what_is_saved_is_what_was_given(tmp_path):
    """A NumPy leaf may be written to while the thread saves."""
    leaf = np.arange(4.0, dtype=np.float32)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"w": leaf})
        leaf += 1
        checkpoints.wait()
        np.testing.assert_array_equal(
            checkpoints.restore(1, {"w": leaf})["w"], np.arange(4)
        )


def test_a_fit_named_by_a_number_is_no_step(tmp_path):
    for step in (20, 100, 3):
        with Checkpoints(tmp_path / "12", keep=3) as checkpoints:
            checkpoints.save(step, {"w": jnp.ones(2)})
    assert verify(tmp_path) == [] and digest(tmp_path) == digest(tmp_path / "12")
    assert main(["list", str(tmp_path)]) == 0


def test_steps_are_listed_by_number(tmp_path, capsys):
    with Checkpoints(tmp_path / "fit", keep=3) as checkpoints:
        for step in (3, 20, 100):
            checkpoints.save(step, {"w": jnp.ones(2)})
    main(["list", str(tmp_path)])
    steps = [line.rpartition("/")[2] for line in capsys.readouterr().out.split()]
    assert steps == ["3", "20", "100"]
