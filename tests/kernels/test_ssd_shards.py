"""The scan of Mamba-2 with time split over pretend devices is that of the whole."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from running import QUICKLY

from pallas_kernels.ssd import ssd

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
OVER_TIME = ("x", "dt", "B", "C", "z")


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    batch, length, heads, width, groups, states = 2, 24, 4, 3, 2, 5
    shapes = {
        "x": (batch, length, heads, width),
        "dt": (batch, length, heads),
        "A": (heads,),
        "B": (batch, length, groups, states),
        "C": (batch, length, groups, states),
        "D": (heads,),
        "z": (batch, length, heads, width),
        "dt_bias": (heads,),
        "initial_state": (batch, heads, width, states),
    }
    arrays = {
        k: jnp.asarray(rng.normal(size=v), jnp.float32) for k, v in shapes.items()
    }
    return arrays | {"A": -jnp.exp(arrays["A"]) / 8}


# Documents that end at, next to and far from the borders of parts, or nowhere.
IDS = {
    "none": None,
    "one": np.zeros((2, 24), np.int32),
    "many": np.stack([np.arange(24) // 5, np.arange(24) >= 12]).astype(np.int32),
    "at every border": np.arange(24)[None].repeat(2, 0).astype(np.int32) // 3,
}


def outputs(floats, ids, **knobs):
    return ssd(
        **floats, segment_ids=ids, dt_softplus=True, return_final_state=True, chunk=2,
        **knobs,
    )  # fmt: skip


def loss(floats, ids, weights, **knobs):
    """A sum over this part, and of the final state, which is on every device."""
    y, state = outputs(floats, ids, **knobs)
    total = jnp.sum(jnp.sin(y) * weights)
    if "axis_name" in knobs:
        total = jax.lax.psum(total, knobs["axis_name"])
    return total + jnp.sum(jnp.cos(state)), (y, state)


@functools.cache
def sharded(devices: int, has_ids: bool) -> Any:
    return QUICKLY(split(devices, has_ids))


def split(devices: int, has_ids: bool) -> Any:
    """Value and gradients with time over devices, on each of which it is a part."""
    mesh = jax.make_mesh(
        (devices,), ("t",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    time: Any = P(None, "t")
    floats = {k: time if k in OVER_TIME else P() for k in NAMES}
    ids = time if has_ids else P()
    function = functools.partial(loss, axis_name="t")
    return jax.shard_map(
        jax.value_and_grad(function, has_aux=True), mesh=mesh,
        in_specs=(floats, ids, time), out_specs=((P(), (time, P())), floats),
    )  # fmt: skip


@functools.cache
def dense() -> Any:
    return QUICKLY(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_value_and_gradient_are_those_of_the_whole(devices):
    floats = inputs()
    weights = jnp.cos(jnp.arange(float(floats["x"].size))).reshape(floats["x"].shape)
    for name, ids in IDS.items():
        if ids is None and devices != 4:  # one more program to compile
            continue
        got = sharded(devices, ids is not None)(floats, ids, weights)
        wanted = dense()(floats, ids, weights)
        for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
            np.testing.assert_allclose(
                a, b, atol=1e-5 * np.abs(b).max(), rtol=0, err_msg=name
            )


def test_the_state_travels_as_far_as_it_matters():
    """What the first device holds reaches the last one, unless a document ends."""
    floats = inputs()
    floats |= {"A": floats["A"] / 100}
    ones = jnp.ones_like(floats["x"])
    changed = floats | {"x": floats["x"].at[:, 0].add(1.0)}
    for ids, reaches in ((IDS["one"], True), (IDS["many"], False)):
        a, b = (
            sharded(8, True)(x, ids, ones)[0][1][0][:, -1] for x in (floats, changed)
        )
        assert (np.abs(a - b).max() > 1e-4) == reaches


def test_exchanges_grow_with_the_logarithm_of_the_devices():
    """Of one decay and one state each; all other devices' states are never gathered."""
    floats, ids = inputs(), IDS["one"]
    for devices, hops in ((2, 2), (4, 3), (8, 4)):
        jaxpr = str(
            jax.make_jaxpr(split(devices, True))(
                floats, ids, jnp.ones_like(floats["x"])
            )
        )
        assert "all_gather" not in jaxpr
        # A pair, forward and backward, each time; once the ids at the borders.
        assert 2 * hops < jaxpr.count("= ppermute[") <= 4 * hops + 1
