"""Checkpoints and other trees: each refused by its leaves, or brought back as it was.

Row C5 of the reliability matrix; and digests, which see every leaf of a tree.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxzoo.training.checkpoint import Checkpoints, digest, verify
from tests.training import saved_states
from tests.training.saved_states import (
    NEWEST,
    OLDER,
    is_same,
    make_state,
    with_params,
    without,
)

# A fit with two good steps.
pristine = pytest.fixture(scope="module")(saved_states.pristine)
states = pytest.fixture(scope="module")(saved_states.states)


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
