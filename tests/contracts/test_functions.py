"""The promises that every public function of a method file makes.

Each test runs over every example in the code. A function whose gradient is meant to
differ from the derivative of its value says so by a line "Gradient:" in its docstring.
"""

import importlib
import inspect
import typing
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import (
    CASES,
    DIFFERENTIABLE,
    MODULES,
    SEVERAL,
    assert_close,
    is_float,
    name,
    public_functions,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

every = pytest.mark.parametrize("case", CASES, ids=name)
differentiable = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=name)
masked = pytest.mark.parametrize(
    "case", [c for c in DIFFERENTIABLE if "where" in c.parameters], ids=name
)


@pytest.mark.parametrize("module", MODULES)
def test_every_public_function_has_an_example_and_documentation(module):
    module = importlib.import_module(module)
    functions = public_functions(module)
    examples = getattr(module, "EXAMPLES", None) or {functions[0]: module.example}
    assert set(examples) == set(functions)
    for function in functions:
        doc = function.__doc__ or ""
        assert ">>> " in doc, f"{function.__name__} has no doctest"
        sections = ("Args:", "Returns:")
        assert all(word in doc for word in sections), function.__name__
        keyword_only = [
            p for p in inspect.signature(function).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]  # fmt: skip
        assert len(keyword_only) <= 8, f"{function.__name__} has more than 8 knobs"


@every
def test_eager_and_jit_agree_and_nothing_is_lost_or_traced_again(case):
    traces = []

    def counted(*floats, seed=0):
        traces.append(None)
        return case.on_floats(seed)[0](*floats)

    jitted = jax.jit(counted)
    floats = case.on_floats()[1]
    eager = counted(*floats)
    for leaf in jax.tree.leaves(eager):
        assert not is_float(leaf) or np.all(np.isfinite(leaf))
    assert_close(jitted(*floats), eager, 1e-6)
    before = len(traces)
    jitted(*case.on_floats(1)[1])
    assert len(traces) == before, "other values of the same shapes were traced again"


@every
def test_vmap_is_a_loop(case):
    examples = [case.example(seed) for seed in (0, 1)]
    kwargs = examples[0][1]
    mapped = [i for i, arg in enumerate(examples[0][0]) if hasattr(arg, "dtype")]

    def call(arrays):
        args = list(examples[0][0])
        for i, array in zip(mapped, arrays, strict=True):
            args[i] = array
        return case.function(*args, **kwargs)

    rows = [[args[i] for i in mapped] for args, _ in examples]
    stack = partial(jax.tree.map, lambda *x: jnp.stack(x))
    alone = jax.jit(call)
    together = jax.jit(jax.vmap(call))(stack(*rows))
    assert_close(together, stack(*[alone(row) for row in rows]))


@differentiable
def test_gradients_are_finite_and_survive_remat_and_forward_mode(case):
    scalar, floats = case.objective()
    argnums = tuple(range(len(floats)))
    tangents = tuple(jnp.sin(1.0 + 7.0 * x) for x in floats)

    def modes(*floats, has_forward=True):
        reverse = jax.grad(scalar, argnums)(*floats)
        remat = jax.grad(jax.checkpoint(scalar), argnums)(*floats)
        forward = jax.jvp(scalar, floats, tangents)[1] if has_forward else None
        return reverse, remat, forward

    jitted = jax.jit(modes)
    try:
        gradient, remat, forward = jitted(*floats)
    except TypeError as error:
        # What a layer keeps for its backward pass can only be chosen in a custom_vjp,
        # which has no forward mode: the docstring has to declare it.
        assert "custom_vjp" in str(error) and "Gradient:" in case.function.__doc__
        jitted = jax.jit(partial(modes, has_forward=False))
        gradient, remat, forward = jitted(*floats)
    assert all(np.all(np.isfinite(g)) for g in gradient)
    assert any(np.any(g != 0) for g in gradient)
    assert_close(remat, gradient)
    if forward is not None:
        reverse = sum(jnp.vdot(g, t) for g, t in zip(gradient, tangents, strict=True))
        np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-5)
    for size in (0.0, 1e-30, 1e3, 1e4, 1e30):
        got = jitted(*[size * x for x in floats])[0]
        assert all(np.all(np.isfinite(g)) for g in got), f"inputs times {size:g}"


@differentiable
def test_gradient_is_the_derivative_in_float64(case):
    if "Gradient:" in (case.function.__doc__ or ""):
        return  # declared: an estimator, whose own test holds its formula
    with jax.enable_x64(True):
        scalar, floats = case.objective()
        assert all(x.dtype == jnp.float64 for x in floats)
        # One direction, of length 1, as `jax.test_util.check_grads` takes it: the
        # forward mode agrees with the reverse mode in the test above.
        keys = jax.random.split(jax.random.key(5), len(floats))
        pairs = zip(keys, floats, strict=True)
        tangents = [jax.random.normal(k, x.shape, x.dtype) for k, x in pairs]
        length = np.sqrt(sum(float(jnp.vdot(t, t)) for t in tangents))
        value = jax.jit(jax.value_and_grad(scalar, tuple(range(len(floats)))))

        def moved(step):
            pairs = zip(floats, tangents, strict=True)
            return value(*[x + step / length * t for x, t in pairs])

        gradient = moved(0.0)[1]
        slope = sum(jnp.vdot(g, t) for g, t in zip(gradient, tangents, strict=True))
        step = 1e-4
        difference = (moved(step)[0] - moved(-step)[0]) / (2 * step)
        np.testing.assert_allclose(slope / length, difference, rtol=1e-5, atol=1e-7)


# Without this XLA may skip a rounding to bfloat16 that the function asks for.
as_written = {"xla_allow_excess_precision": False}


@differentiable
def test_small_floats_are_computed_in_float32(case):
    of_floats, floats = case.on_floats()
    jitted = jax.jit(of_floats, compiler_options=as_written)
    for dtype in (jnp.bfloat16, jnp.float16):
        rounded = [x.astype(dtype) for x in floats]
        small = jitted(*rounded)
        exact = jitted(*[x.astype(jnp.float32) for x in rounded])
        for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(exact), strict=True):
            # Samplers return the dtype that they were given and draw in it; all else
            # is float32 and equal to the float32 function of the rounded inputs.
            assert a.dtype in (b.dtype, dtype)
            if a.dtype == b.dtype:
                assert_close(a, b, 1e-5)
            else:
                assert case.parameters.keys() & {"key"}
                assert np.all(np.isfinite(a.astype(jnp.float32)))


@masked
def test_masked_rows_do_not_matter(case):
    args, kwargs = case.example()
    mask = kwargs["where"]
    assert mask.any() and not mask.all(), "the example should mask some rows"

    def hidden(x):
        """True where `x` is masked; the mask lies on its first or its last axes."""
        if x.shape[: mask.ndim] == mask.shape:
            shape = mask.shape + (1,) * (x.ndim - mask.ndim)
        else:
            shape = (1,) * (x.ndim - mask.ndim) + mask.shape
        return jnp.broadcast_to(~mask.reshape(shape), x.shape)

    first, rest = args[0], args[1:]

    def value(x):
        leaves = jax.tree.leaves(case.function(x, *rest, **kwargs))
        return [leaf for leaf in leaves if leaf.ndim == 0][0]

    value_and_grad = jax.jit(jax.value_and_grad(value))
    expected = value_and_grad(jnp.where(hidden(first), 1.0, first))
    for spoilt in (jnp.nan, jnp.inf, 3e38):
        got = value_and_grad(jnp.where(hidden(first), spoilt, first))
        assert_close(got, expected, 1e-6)
        assert np.all(np.asarray(got[1])[hidden(first)] == 0)


@differentiable
def test_sharded_over_eight_devices_equals_whole(case):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    scalar, floats = case.objective()
    step = jax.jit(jax.value_and_grad(scalar, tuple(range(len(floats)))))
    whole = step(*floats)
    spread = 0
    for axis in range(max(x.ndim for x in floats)):
        specs = [
            P(*[None] * axis, "data")
            if axis < x.ndim and x.shape[axis] % 8 == 0
            else P()
            for x in floats
        ]
        if all(spec == P() for spec in specs):
            continue
        spread += 1
        shards = [
            jax.device_put(x, NamedSharding(mesh, spec))
            for x, spec in zip(floats, specs, strict=True)
        ]
        assert_close(jax.block_until_ready(step(*shards)), whole)
    assert spread, "no axis of the example can be split in eight"


# `axis_name`: inside shard_map and pmap, each device holding a part of the batch.

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


# Bad input.


def assert_named(kind, parameter, call):
    with pytest.raises(kind) as info:
        call()
    message = str(info.value)
    assert parameter in message and len(message) <= 400 and "\n" not in message, message


@every
def test_arguments_of_a_wrong_type_are_named(case):
    args, kwargs = case.example()
    names = list(case.parameters)
    for index, arg in enumerate(args):
        wrong = ["text", [1.0, 2.0], {"a": 1.0}, object()]
        if hasattr(arg, "dtype"):
            wrong.append(jnp.ones(arg.shape, jnp.complex64))
            if "Bool[" not in str(case.parameters[names[index]].annotation):
                wrong.append(jnp.ones(arg.shape, bool))
        if names[index] == "key":
            wrong.append(jax.random.PRNGKey(0))
        for value in wrong:
            spoilt = (*args[:index], value, *args[index + 1 :])
            call = partial(case.function, *spoilt, **kwargs)
            assert_named(TypeError, names[index], call)


@pytest.mark.parametrize("case", SEVERAL, ids=name)
def test_shapes_that_do_not_fit_are_named_and_never_broadcast(case):
    args, kwargs = case.example()
    names = list(case.parameters)
    arrays = [i for i, arg in enumerate(args) if is_float(arg)]
    for index in arrays[1:]:
        spoilt = list(args)
        spoilt[index] = args[index][..., None]
        with pytest.raises((TypeError, ValueError)) as info:
            case.function(*spoilt, **kwargs)
        assert any(f"'{names[i]}'" in str(info.value) for i in arrays), info.value


@every
def test_hyperparameters_out_of_range_are_named(case):
    args, kwargs = case.example()
    for parameter in case.parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        members = typing.get_args(parameter.annotation) or (parameter.annotation,)
        if typing.get_origin(parameter.annotation) is typing.Literal:
            wrong = ["nonsense"]
        elif parameter.name == "axis_name":
            continue
        elif "axis" in parameter.name:
            wrong = [99, -99]
        elif float in members:
            wrong = [float("nan")]
        elif int in members:
            wrong = [0, -3]
        else:
            continue
        for value in wrong:
            call = partial(case.function, *args, **{**kwargs, parameter.name: value})
            assert_named(ValueError, f"'{parameter.name}'", call)
        call = partial(case.function, *args, **{**kwargs, parameter.name: "text"})
        assert_named((TypeError, ValueError), f"'{parameter.name}'", call)
    misspelt = partial(case.function, *args, **{**kwargs, "hyperparameter": 1})
    assert_named(TypeError, "hyperparameter", misspelt)
