"""`axis_name`: inside `shard_map` and `pmap`, each device holding a part of the batch.

Value and gradient are those of the whole, for every function that takes it.
"""

from functools import partial

import jax
import pytest
from examples import DIFFERENTIABLE, assert_close, assert_named, is_float, name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

coupled = pytest.mark.parametrize(
    "case", [c for c in DIFFERENTIABLE if "axis_name" in c.parameters], ids=name
)


class Parts:
    """The value of a function of a split batch, as a function of its float arrays.

    What has the length of the first argument on its first axis is split.
    """

    def __init__(self, case):
        self.case = case
        self.args, self.kwargs = case.example()
        rows = self.args[0].shape[0]

        def is_split(leaf):
            return hasattr(leaf, "shape") and leaf.shape[:1] == (rows,)

        named = [k for k, v in self.kwargs.items() if hasattr(v, "shape")]
        self.names = [k for k in self.case.parameters if k in named]
        self.arrays = [*self.args, *(self.kwargs[k] for k in self.names)]
        self.specs = [P("data") if is_split(x) else P() for x in self.arrays]
        self.floats = tuple(i for i, x in enumerate(self.arrays) if is_float(x))

    def value(self, *arrays, axis_name: str | None = "data"):
        args, rest = arrays[: len(self.args)], arrays[len(self.args) :]
        kwargs = {**self.kwargs, **dict(zip(self.names, rest, strict=True))}
        output = self.case.function(*args, **kwargs, axis_name=axis_name)
        return output[0] if type(output) is tuple else output

    def whole(self):
        value = partial(self.value, axis_name=None)
        return jax.jit(jax.value_and_grad(value, self.floats))(*self.arrays)


def _mesh(devices):
    auto, some = (AxisType.Auto,), jax.devices()[:devices]
    return jax.make_mesh((devices,), ("data",), axis_types=auto, devices=some)


@coupled
def test_shard_map_gives_value_and_gradient_of_the_whole(case):
    parts = Parts(case)
    assert P("data") in parts.specs, "no argument of the example can be split"
    specs, out = tuple(parts.specs), tuple(parts.specs[i] for i in parts.floats)
    whole = parts.whole()
    for devices in (1, 2, 4, 8):
        knobs = {"mesh": _mesh(devices), "in_specs": specs}
        inside = jax.shard_map(
            jax.value_and_grad(parts.value, parts.floats), out_specs=(P(), out), **knobs
        )
        ways = [inside]
        for check in (True, False):
            mapped = jax.shard_map(parts.value, out_specs=P(), check_vma=check, **knobs)
            ways.append(jax.value_and_grad(mapped, parts.floats))
        together = jax.jit(lambda *x, ways=ways: [way(*x) for way in ways])
        for got in together(*parts.arrays):
            assert_close(got, whole)


@coupled
@pytest.mark.parametrize("devices", [2, 8])
def test_pmap_gives_value_and_averaged_gradient_of_the_whole(case, devices):
    parts = Parts(case)

    def cut(x, spec):
        return x if spec == P() else x.reshape(devices, -1, *x.shape[1:])

    def own(*arrays):
        value, gradients = jax.value_and_grad(parts.value, parts.floats)(*arrays)
        # As everywhere under pmap: what all devices share is averaged, and what is
        # one device's own is `devices` times too large.
        specs = [parts.specs[i] for i in parts.floats]
        pairs = zip(gradients, specs, strict=True)
        scaled = [
            jax.lax.pmean(g, "data") if spec == P() else g / devices
            for g, spec in pairs
        ]
        return value, tuple(scaled)

    in_axes = tuple(None if spec == P() else 0 for spec in parts.specs)
    arrays = [cut(x, s) for x, s in zip(parts.arrays, parts.specs, strict=True)]
    mapped = jax.pmap(own, "data", in_axes=in_axes, devices=jax.devices()[:devices])
    values, gradients = mapped(*arrays)
    value, expected = parts.whole()
    for each in values:
        assert_close(each, value)
    for i, got, wanted in zip(parts.floats, gradients, expected, strict=True):
        got = got[0] if parts.specs[i] == P() else got.reshape(wanted.shape)
        assert_close(got, wanted)


@coupled
def test_an_axis_that_does_not_exist_is_named(case):
    parts = Parts(case)
    call = partial(parts.value, *parts.arrays, axis_name="nowhere")
    assert_named(ValueError, "'axis_name'", call)
