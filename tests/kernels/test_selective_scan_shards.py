"""The selective scan with its sequence split over devices, against the whole."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from running import QUICKLY

from pallas_kernels.selective_scan import selective_scan

LENGTH = 24
ALONG = {"u", "delta", "B", "C", "z", "segment_ids"}


def inputs(kind="real", segments=True) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {
        "u": (2, LENGTH, 4), "delta": (2, LENGTH, 4), "A": (4, 3), "D": (4,),
        "B": (2, LENGTH, 2, 3), "C": (2, LENGTH, 2, 3), "z": (2, LENGTH, 4),
        "delta_bias": (4,), "initial_state": (2, 4, 3),
    }  # fmt: skip
    arrays: dict[str, Any] = {
        k: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for k, shape in shapes.items()
    }
    arrays["A"] = -jnp.exp(arrays["A"] - 1)
    arrays["delta"] = arrays["delta"] - 1
    if kind == "complex":
        arrays["A"] = arrays["A"] + 2j
    if segments:  # changes inside of parts and between them; the rows differ
        ids = np.sort(rng.integers(0, 4, (2, LENGTH)), 1)
        ids[1] = np.arange(LENGTH) // 6
        arrays["segment_ids"] = jnp.asarray(ids, jnp.int32)
    return arrays


def weighed(arrays, weights, **knobs):
    """y and the last state; and weights of them, summed over y alone."""
    y, end = selective_scan(
        **arrays, delta_softplus=True, return_final_state=True, **knobs
    )
    total = jnp.sum(weights["y"] * jnp.sin(y))
    return total, jnp.sum(weights["end"] * jnp.sin(end.real + end.imag)), (y, end)


def weights():
    rng = np.random.default_rng(1)
    shapes = {"y": (2, LENGTH, 4), "end": (2, 4, 3)}
    return {k: jnp.asarray(rng.normal(size=x), jnp.float32) for k, x in shapes.items()}


def of_the_whole(floats, others, **knobs):
    def loss(floats):
        total, last, outputs = weighed({**floats, **others}, weights(), **knobs)
        return total + last, outputs

    return QUICKLY(jax.value_and_grad(loss, has_aux=True))(floats)


def of_the_parts(floats, others, count, check, **knobs):
    mesh = jax.make_mesh((count,), ("time",), axis_types=(AxisType.Auto,))

    def spec(tree):
        return {k: P(None, "time") if k in ALONG else P() for k in tree}

    def local(floats, others, weights):
        total, last, outputs = weighed(
            {**floats, **others}, weights, axis_name="time", **knobs
        )
        return jax.lax.psum(total, "time"), last, outputs

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec(floats), spec(others), {"y": P(None, "time"), "end": P()}),
        out_specs=(P(), P(), (P(None, "time"), P())),
        check_vma=check,
    )

    def loss(floats):
        total, last, outputs = mapped(floats, others, weights())
        return total + last, outputs

    return QUICKLY(jax.value_and_grad(loss, has_aux=True))(floats)


def compare(arrays, count, check=True, whole: Any = "xla", **knobs):
    others = {k: x for k, x in arrays.items() if k == "segment_ids"}
    floats = {k: x for k, x in arrays.items() if k != "segment_ids"}
    wanted = of_the_whole(floats, others, implementation=whole)
    got = of_the_parts(floats, others, count, check, **knobs)
    for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_value_and_gradient_are_those_of_the_whole(count):
    compare(inputs(), count)


@pytest.mark.parametrize(
    "knobs", [{"check": False}, {"implementation": "ref"}], ids=str
)
def test_also(knobs):
    compare(inputs(), 4, **knobs)


def test_a_number_that_is_no_power_of_two_and_no_documents():
    compare(inputs(segments=False), 3)


def test_complex_and_exact():
    compare(inputs("complex"), 2)


def exchanges(count) -> list[str]:
    """The collectives of the forward pass, as jax writes them."""
    arrays = inputs()
    mesh = jax.make_mesh((count,), ("time",), axis_types=(AxisType.Auto,))
    specs = {k: P(None, "time") if k in ALONG else P() for k in arrays}
    mapped = jax.shard_map(
        lambda x: selective_scan(**x, axis_name="time"),
        mesh=mesh, in_specs=(specs,), out_specs=P(None, "time"),
    )  # fmt: skip
    text = str(jax.make_jaxpr(mapped)(arrays))
    return [
        word for word in text.split() if word.startswith(("ppermute", "all_gather"))
    ]


def test_the_number_of_exchanges_is_logarithmic():
    """Decay and state per doubling, the state once more, and one column of ids."""
    for count, rounds in ((2, 1), (4, 2), (8, 3)):
        found = exchanges(count)
        assert len(found) == 2 * rounds + 2
        assert all(word.startswith("ppermute") for word in found)
