"""The promises of everything that makes an Optax transformation.

It is found by its return annotation. A function with the argument `learning_rate` is a
whole optimizer, and is asked for all of them; `scale_by_...` and wrappers for those
that do not need a step size.
"""

import importlib
import inspect
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from examples import OPTIMIZERS, assert_close, is_float, name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxzoo.training.checkpoint import Checkpoints

WHOLE = [case for case in OPTIMIZERS if "learning_rate" in case.parameters]
every = pytest.mark.parametrize("case", OPTIMIZERS, ids=name)
whole = pytest.mark.parametrize("case", WHOLE, ids=name)
decaying = pytest.mark.parametrize(
    "case", [c for c in WHOLE if "mask" in c.parameters], ids=name
)

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)


def make(case, learning_rate: Any = None, **changes) -> Any:
    args, kwargs = case.example()
    if learning_rate is not None:
        args = (learning_rate, *args[1:])
    return case.function(*args, **{**kwargs, **changes})


def parameters(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(7))
    return {
        "kernel": jax.random.normal(keys[0], (16, 8)).astype(dtype),
        "bias": jax.random.normal(keys[1], (8,)).astype(dtype),
    }


def gradients(step, dtype=jnp.float32):
    def one(leaf, key):
        return jax.random.normal(key, leaf.shape).astype(dtype)

    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), step))
    return jax.tree.map(one, parameters(), {"kernel": keys[0], "bias": keys[1]})


def run(optimizer, steps=3, *, dtype=jnp.float32, grads=gradients) -> Any:
    """Parameters after some steps, the updates of the last one, and the state."""
    params = updates = parameters(dtype)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(grads(step, dtype), state, params)
        params = optax.apply_updates(params, updates)
    return params, updates, state


def minimum(case, loss, start, steps):
    """The least loss over learning rates that fall to 0, each a descent of its own."""

    def descend(rate):
        schedule = optax.linear_schedule(rate, 0.0, steps)
        optimizer = make(case, schedule)

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, steps)
        return loss(params)

    return float(np.nanmin(jax.jit(jax.vmap(descend))(jnp.array(RATES))))


@whole
def test_a_quadratic_is_solved(case):
    target = {"kernel": jnp.linspace(-1.0, 1.0, 8).reshape(4, 2), "bias": jnp.ones(2)}
    scale = {"kernel": jnp.linspace(0.5, 5.0, 8).reshape(4, 2), "bias": jnp.ones(2)}

    def loss(params):
        terms = jax.tree.map(
            lambda x, y, s: jnp.sum(s * (x - y) ** 2), params, target, scale
        )
        return sum(jax.tree.leaves(terms))

    start = jax.tree.map(lambda x: x + 1.0, target)
    assert minimum(case, loss, start, 500) < 1e-3 * float(loss(start))


@whole
def test_the_valley_of_rosenbrock_is_followed(case):
    def loss(x):
        return (1.0 - x[0]) ** 2 + 100.0 * (x[1] - x[0] ** 2) ** 2

    assert minimum(case, loss, jnp.array([-1.0, 1.0]), 3000) < 0.05


@every
def test_state_keeps_its_tree_and_nothing_is_traced_twice(case):
    optimizer, params, traces = make(case), parameters(), []

    @jax.jit
    def update(grads, state):
        traces.append(None)
        return optimizer.update(grads, state, params)

    def described(state):
        return jax.tree.map(lambda x: (x.shape, x.dtype), state)

    state = first = jax.jit(optimizer.init)(params)
    assert described(optimizer.init(params)) == described(first)
    for step in range(3):
        updates, state = update(gradients(step), state)
    assert len(traces) == 1
    assert described(state) == described(first)
    assert described(updates) == described(params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(updates))

    def body(state, step):
        updates, state = optimizer.update(gradients(step), state, params)
        return state, updates

    # A state that is one buffer twice could not be donated.
    donating = jax.jit(lambda g, s: optimizer.update(g, s, params), donate_argnums=1)
    donating(gradients(0), optimizer.init(params))
    last, stacked = jax.lax.scan(body, first, jnp.arange(3))
    assert_close(jax.tree.map(lambda x: x[-1], stacked), updates)
    assert_close(values(last), values(state))


def values(state):
    """The arrays of a state, keys as the numbers that they are made of."""
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(state)
    ]


@whole
def test_eager_and_jit_agree(case):
    optimizer, params = make(case), parameters()
    state = optimizer.init(params)
    eager = optimizer.update(gradients(0), state, params)[0]
    assert_close(jax.jit(optimizer.update)(gradients(0), state, params)[0], eager)


@whole
def test_it_is_its_direction_times_the_learning_rate(case):
    module = importlib.import_module(case.module)
    direction = getattr(module, f"scale_by_{case.function.__name__}", None)
    if direction is None:
        return
    kwargs = case.example()[1]
    known = inspect.signature(direction).parameters
    none = {"weight_decay": 0.0} if "weight_decay" in case.parameters else {}
    plain = optax.chain(
        direction(**{k: v for k, v in kwargs.items() if k in known}),
        optax.scale_by_learning_rate(0.01),
    )
    assert_close(run(make(case, 0.01, **none))[0], run(plain)[0])


@whole
def test_learning_rates_follow_a_schedule_and_can_be_injected(case):
    constant = run(make(case, 0.01))[0]
    assert_close(run(make(case, lambda step: 0.01 + 0.0 * step))[0], constant)

    still = run(make(case, lambda step: 0.0 * step))[0]
    assert_close(still, parameters())

    args, kwargs = case.example()
    numbers = {k for k, p in case.parameters.items() if type(p.default) is float}
    fixed = [k for k in case.parameters if k not in numbers | {"learning_rate"}]
    injected: Any = optax.inject_hyperparams(case.function, static_args=fixed)
    optimizer = injected(0.01, *args[1:], **kwargs)
    assert_close(run(optimizer)[0], constant)
    state = optimizer.init(parameters())
    state.hyperparams["learning_rate"] = jnp.zeros(())
    updates = jax.jit(optimizer.update)(gradients(0), state, parameters())[0]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


@whole
def test_it_composes_with_the_transformations_of_optax(case):
    params, grads = parameters(), gradients(0)
    plain = run(make(case), 1)[1]
    wide = optax.chain(optax.clip_by_global_norm(1e6), make(case))
    assert_close(run(wide, 1)[1], plain)

    only = {"kernel": True, "bias": False}
    masked = run(optax.masked(make(case), only), 1)[1]
    np.testing.assert_array_equal(masked["bias"], grads["bias"])
    labels = {"kernel": "ours", "bias": "none"}
    parts: Any = {"ours": make(case), "none": optax.set_to_zero()}
    several = run(optax.multi_transform(parts, labels), 1)[1]
    assert_close(several["kernel"], masked["kernel"])
    assert not np.any(several["bias"])

    steps = optax.MultiSteps(make(case), every_k_schedule=2)
    twice = run(steps, 2, grads=lambda step, dtype: gradients(0, dtype))
    assert_close(twice[1], plain)

    guarded: Any = optax.apply_if_finite(make(case), max_consecutive_errors=5)
    state = guarded.init(params)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grads)
    update = jax.jit(guarded.update)
    updates, state = update(bad, state, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert_close(update(grads, state, params)[0], plain)


@decaying
def test_weight_decay_minds_its_mask(case):
    def updates(weight_decay):
        mask = {"kernel": True, "bias": False}
        return run(make(case, 0.01, weight_decay=weight_decay, mask=mask), 1)[1]

    with_decay, without = updates(0.1), updates(0.0)
    np.testing.assert_array_equal(with_decay["bias"], without["bias"])
    difference = with_decay["kernel"] - without["kernel"]
    assert float(jnp.vdot(difference, parameters()["kernel"])) < 0


@every
def test_small_floats_have_float32_state(case):
    optimizer = make(case)
    _, updates, state = run(optimizer, 1, dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves(state):
        assert not is_float(leaf) or leaf.dtype == jnp.float32
    for leaf in jax.tree.leaves(updates):
        assert leaf.dtype == jnp.bfloat16

    def rounded(step, dtype):
        return jax.tree.map(lambda x: x.astype(dtype), gradients(step, jnp.bfloat16))

    params = jax.tree.map(lambda x: x.astype(jnp.float32), parameters(jnp.bfloat16))
    exact = optimizer.update(rounded(0, jnp.float32), optimizer.init(params), params)[0]
    assert_close(updates, exact, 2**-7)


@whole
def test_resumed_from_a_checkpoint_it_goes_on_bit_for_bit(case, tmp_path):
    optimizer = make(case)
    params, _, state = run(optimizer, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, {"params": params, "state": state})
        checkpoints.wait()
        like = jax.eval_shape(lambda: {"params": params, "state": state})
        found = checkpoints.restore_latest(like)
    assert found is not None
    restored = found[1]
    update = jax.jit(optimizer.update)
    wanted = update(gradients(2), state, params)
    got = update(gradients(2), restored["state"], restored["params"])
    for a, b in zip(values(got), values(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


@whole
def test_sharded_over_eight_devices_equals_whole(case):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    optimizer = make(case)
    update = jax.jit(optimizer.update)
    expected = run(optimizer, 2)[0]
    for kernel in (P("data", None), P(None, "data")):
        specs = {"kernel": kernel, "bias": P("data")}

        def spread(tree, specs=specs):
            return jax.tree.map(
                lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs
            )

        params = spread(parameters())
        state = jax.jit(optimizer.init)(params)
        for step in range(2):
            updates, state = update(spread(gradients(step)), state, params)
            params = optax.apply_updates(params, updates)
        assert_close(jax.block_until_ready(params), expected)


def wrong_values(parameter):
    """What no optimizer takes for an argument of this name and kind."""
    members = typing.get_args(parameter.annotation) or (parameter.annotation,)
    if typing.get_origin(parameter.annotation) is typing.Literal:
        return ["nonsense"]
    if parameter.name in ("learning_rate", "weight_decay") or parameter.name == "eps":
        return [-1.0, float("nan")]
    if parameter.name in ("b1", "b2", "b3", "beta", "momentum", "decay"):
        return [1.0, -0.1, float("nan")]
    if float in members:
        return [float("nan")]
    if int in members:
        return [0, -3]
    return []


@every
def test_hyperparameters_out_of_range_are_named(case):
    args, kwargs = case.example()
    for index, parameter in enumerate(case.parameters.values()):
        for value in wrong_values(parameter):
            spoilt, changes = list(args), dict(kwargs)
            if parameter.kind is parameter.KEYWORD_ONLY:
                changes[parameter.name] = value
            else:
                spoilt[index] = value
            with pytest.raises(ValueError, match=f"'{parameter.name}'"):
                case.function(*spoilt, **changes)
    with pytest.raises(TypeError, match="hyperparameter"):
        case.function(*args, **kwargs, hyperparameter=1)
