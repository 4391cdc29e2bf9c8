"""The promises that every public function of a method file makes.

Each test runs over every example in the code. A function whose gradient is meant to
differ from the derivative of its value says so by a line "Gradient:" in its docstring.
"""

import importlib
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import (
    CASES,
    DIFFERENTIABLE,
    MODULES,
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
def test_eager_jit_and_vmap_agree_and_nothing_is_lost_or_traced_again(case):
    traces = []
    (args, kwargs), (others, _) = (case.example(seed) for seed in (0, 1))
    mapped = [i for i, arg in enumerate(args) if hasattr(arg, "dtype")]

    def call(arrays):
        traces.append(None)
        filled = list(args)
        for i, array in zip(mapped, arrays, strict=True):
            filled[i] = array
        return case.function(*filled, **kwargs)

    rows = [[given[i] for i in mapped] for given in (args, others)]
    eager = call(rows[0])
    for leaf in jax.tree.leaves(eager):
        assert not is_float(leaf) or np.all(np.isfinite(leaf))
    jitted = jax.jit(call)
    alone = [jitted(rows[0])]
    assert_close(alone[0], eager, 1e-6)
    before = len(traces)
    alone.append(jitted(rows[1]))
    assert len(traces) == before, "other values of the same shapes were traced again"
    # By NumPy where it can: of jax's own, each stack would be a program to compile.
    together = jax.jit(jax.vmap(call))(
        [_stack(pair) for pair in zip(*rows, strict=True)]
    )
    assert_close(together, jax.tree.map(lambda *x: np.stack(x), *alone))


def _stack(pair):
    is_key = jnp.issubdtype(pair[0].dtype, jax.dtypes.prng_key)
    return jnp.stack(pair) if is_key else np.stack(pair)


@differentiable
def test_gradients_are_finite_and_survive_forward_mode_remat_and_eight_devices(case):
    scalar, floats = case.objective()
    argnums = tuple(range(len(floats)))
    tangents = tuple(np.sin(1.0 + 7.0 * np.asarray(x)) for x in floats)

    def modes(*floats, has_forward=True):
        forward = jax.jvp(scalar, floats, tangents)[1] if has_forward else None
        return jax.value_and_grad(scalar, argnums)(*floats), forward

    jitted = jax.jit(modes)
    try:
        whole, forward = jitted(*floats)
    except TypeError as error:
        # What a layer keeps for its backward pass can only be chosen in a custom_vjp,
        # which has no forward mode: the docstring has to declare it.
        assert "custom_vjp" in str(error) and "Gradient:" in case.function.__doc__
        jitted = jax.jit(partial(modes, has_forward=False))
        whole, forward = jitted(*floats)
    gradient = jax.device_get(whole[1])
    assert all(np.all(np.isfinite(g)) for g in gradient)
    assert any(np.any(g != 0) for g in gradient)
    if forward is not None:
        reverse = sum(np.vdot(g, t) for g, t in zip(gradient, tangents, strict=True))
        np.testing.assert_allclose(forward, reverse, rtol=1e-4, atol=1e-5)
    for size in (0.0, 1e-30, 1e3, 1e4, 1e30):
        got = jitted(*[np.float32(size) * np.asarray(x) for x in floats])[0][1]
        assert all(np.all(np.isfinite(g)) for g in got), f"inputs times {size:g}"

    # Rematerialized and over devices at once: each axis that is split is a program.
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = jax.jit(jax.value_and_grad(jax.checkpoint(scalar), argnums))
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


@differentiable
def test_gradient_is_the_derivative_in_float64(case):
    if "Gradient:" in (case.function.__doc__ or ""):
        return  # declared: an estimator, whose own test holds its formula
    with jax.enable_x64(True):
        scalar, floats = case.objective()
        assert all(x.dtype == jnp.float64 for x in floats)
        # One direction, of length 1, as `jax.test_util.check_grads` takes it: the
        # forward mode agrees with the reverse mode in the test above.
        rng = np.random.default_rng(5)
        tangents = [rng.normal(size=x.shape) for x in floats]
        length = np.sqrt(sum(np.sum(np.square(t)) for t in tangents))
        # By NumPy: of jax's own, each step would be a program to compile.
        floats = [np.asarray(x) for x in floats]
        value = jax.jit(jax.value_and_grad(scalar, tuple(range(len(floats)))))

        def moved(step):
            pairs = zip(floats, tangents, strict=True)
            return jax.device_get(value(*[x + step / length * t for x, t in pairs]))

        gradient = moved(0.0)[1]
        slope = sum(np.sum(g * t) for g, t in zip(gradient, tangents, strict=True))
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
