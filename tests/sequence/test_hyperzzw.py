"""HyperZZW in float64 loops, and what a Terminator sees and is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.signal import correlate2d
from scipy.special import erfc

import jaxzoo.nn.slow_net as nets
from jaxzoo.sequence.hyperzzw import (
    SFNEBlock,
    Terminator,
    hyperzzw_global,
    hyperzzw_local,
    slow_loss,
)

KNOBS = {"local_sizes": (3, 5, 3, 1), "hidden": 4, "layers": 1, "omega": 0.2}
block = SFNEBlock(4, **KNOBS, groups=2)
# Initial draws take longer to optimise than to run.
QUICK = {"xla_backend_optimization_level": 0}


def wide(x):
    return np.asarray(x, np.float64)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def params():
    """Of a block, with every bias away from the zeros that it begins with."""
    init = jax.jit(block.init, compiler_options=QUICK)
    tree = init(jax.random.key(0), jnp.zeros((2, 4, 4, 4)))
    leaves, form = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    leaves = [x + np.float32(0.1) * rng.normal(size=x.shape) for x in leaves]
    leaves = [np.asarray(x, np.float32) for x in leaves]
    return jax.tree.unflatten(form, leaves)


def test_global_operator_is_a_product_of_weighed_matrices():
    z, values, kernel = normal(3, 4, 4, 2), normal(3, 4, 4, 2, seed=1), normal(4, 4, 2)
    got = hyperzzw_global(z, values, kernel=kernel)
    for b in range(3):
        for c in range(2):
            weights = z[b, :, :, c].astype(np.float64) * kernel[:, :, c]
            assert_allclose(got[b, :, :, c], weights @ values[b, :, :, c], atol=1e-5)


def test_the_bare_product_sees_a_row_and_a_column():
    """Why a block standardises its values: the product alone has no full context."""
    kernel = jnp.ones((4, 4, 1))

    def output(x):
        z = x.reshape(1, 4, 4, 1)
        return hyperzzw_global(z, z, kernel=kernel)[0, 1, 2, 0]

    seen = np.asarray(jax.grad(output)(jnp.ones((4, 4)))) != 0
    expected = np.zeros((4, 4), bool)
    expected[1] = expected[:, 2] = True
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_local_operator_is_a_correlation(size):
    z, kernel = normal(2, 5, 7, 3), normal(size, size, 3, seed=1)
    got = hyperzzw_local(z, kernel)
    for b in range(2):
        for c in range(3):
            image, taps = (x.astype(np.float64) for x in (z[b, ..., c], kernel[..., c]))
            reach = size // 2
            padded = np.pad(image, reach)
            expected = correlate2d(padded, taps, mode="valid")
            assert_allclose(got[b, ..., c], expected, atol=1e-5)


def test_slow_loss_by_hand_and_its_fixed_point():
    kernel, deeper = normal(4, 4, 2), normal(4, 4, 6, seed=1)
    gaps = [
        (kernel[i, j, c % 2] - deeper[i, j, c]) ** 2
        for i in range(4) for j in range(4) for c in range(6)
    ]  # fmt: skip
    loss, aux = slow_loss(kernel, deeper)
    assert_allclose(loss, np.mean(wide(gaps)), rtol=1e-5)
    assert_allclose(np.mean(aux["per_channel"]), loss, rtol=1e-6)
    assert slow_loss(kernel, np.tile(kernel, 3))[0] == 0


def dense(p, x):
    return x @ wide(p["kernel"]) + wide(p["bias"])


def slow_net(p, grid, context=None):
    """One layer, as `KNOBS` has it."""
    axes = [np.linspace(-1, 1, n) for n in grid]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    zero, one = np.split(np.sin(dense(p["sines"], points)), 2, -1)
    x = one * dense(p["slow_0"], zero) + p["bias"][..., None]
    if context is not None:
        places = tuple(range(len(grid)))
        unit = x / np.sqrt((x**2).sum(places, keepdims=True))
        x = (x + 0.1 * unit) * dense(p["fast_0"], context)
    return dense(p["out"], x)


def std(x, axes):
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-5)


def gelu(x):
    return x * erfc(-x / np.sqrt(2)) / 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def adaptive_pool(x, size):
    side, out = x.shape[1], []
    for p in range(size):
        for q in range(size):
            rows = slice(p * side // size, -(-(p + 1) * side // size))
            columns = slice(q * side // size, -(-(q + 1) * side // size))
            out.append(x[:, rows, columns].mean((1, 2)))
    return np.stack(out, 1).reshape(len(x), size, size, -1)


def transcribed(p, z):
    """A block in float64, branch by branch, from the paper and its released code."""
    side, width = z.shape[1], z.shape[3]

    def rgu(name, x):
        k, v = np.split(dense(p[f"{name}_kv"], x), 2, -1)
        q = gelu(std(k * dense(p[f"{name}_q"], v), (1, 2)))
        return dense(p[f"{name}_y"], q + p[f"{name}_bias"][..., None])

    def channel_score(y, name):
        y = y.mean((1, 2))
        return (y * slow_net(p[name], (width,))[:, 0] * y)[:, None, None]

    def product(values):
        weights = np.einsum("bikc->bcik", z * kernel)
        return np.einsum("bcij->bijc", weights @ np.einsum("bkjc->bckj", values))

    def local(i, size, seen, slid):
        context = dense(p[f"reduce_{i}"], adaptive_pool(seen, size)).mean(0)
        context = gelu(dense(p[f"context_{i}"], context))
        taps = slow_net(p[f"local_{i}"], (size, size), context)
        x = np.zeros_like(slid)
        for b in range(len(slid)):
            for c in range(width):
                padded = np.pad(slid[b, ..., c], size // 2)
                x[b, ..., c] = correlate2d(padded, taps[..., c], mode="valid")
        x = x @ wide(p["local_mix"][i])
        return gelu(std(x, (0, 1, 2))) + p["local_shift"][i]

    kernel = slow_net(p["slow_net"], (side, side))
    fast = std(rgu("rgu_slow", z * kernel) + rgu("rgu_fast", z), (1, 2))
    mixed = std(dense(p["mixer"], z), (1, 2))
    chosen = std(z * sigmoid(channel_score(z, "hyper_channel")), (1, 2))
    first, second, third = map(product, (fast, mixed, chosen))
    mean = first.mean(3)
    places = mean * slow_net(p["spatial"], (side, side))[..., 0] * mean
    filtered = z * sigmoid(places[..., None] * channel_score(first, "channel"))
    branches = [
        first, second, third, sigmoid(first) * first, fast, filtered,
        local(0, 3, z, chosen), local(1, 5, chosen, z), local(2, 3, mixed, z),
        local(3, 1, z, mixed),
    ]  # fmt: skip
    x = dense(p["bottleneck"], np.concatenate(branches, -1))
    x = np.concatenate([std(x[..., :2], (0, 1, 2)), std(x[..., 2:], (1, 2))], -1)
    return gelu(x) + p["shift"], kernel


def test_a_block_is_what_a_transcription_in_float64_is():
    z = normal(3, 4, 4, 4)
    got, kernel = jax.jit(block.apply)(params(), z)
    expected, expected_kernel = transcribed(params()["params"], wide(z))
    assert_allclose(kernel, expected_kernel, atol=1e-5)
    assert_allclose(got, expected, atol=1e-4)


def test_every_output_of_a_block_sees_every_pixel():
    z = normal(1, 4, 4, 4)
    output = jax.jit(jax.jacrev(lambda z: block.apply(params(), z)[0][0]))
    assert np.all(np.asarray(output(z)) != 0)


def test_a_block_has_no_residual_connection():
    """Its outputs are standardised sums of branches, whatever the input's size is."""
    z = normal(3, 4, 4, 4)
    run = jax.jit(lambda p, z: block.apply(p, z)[0])
    muted = jax.tree.map(lambda x: x, params())
    inner = {**muted["params"], "bottleneck": {**muted["params"]["bottleneck"]}}
    inner["bottleneck"]["kernel"] = np.zeros_like(inner["bottleneck"]["kernel"])
    silent = run({"params": inner}, z)
    assert_allclose(silent, np.full_like(silent, inner["shift"]), atol=1e-6)


def test_renormalisation_passes_gradients_by_its_second_term():
    x = jnp.asarray(normal(1, 3, 3, 2))
    unit = nets._unit
    gradient = jax.grad(lambda x: jnp.sum(unit(x, (1, 2)) * x))(x)
    length = np.sqrt(np.sum(np.square(x), (1, 2), keepdims=True))
    assert_allclose(gradient, np.asarray(x) / length, rtol=1e-5)
    assert np.all(jax.grad(lambda x: jnp.sum(unit(x, (1, 2))))(0 * x) == 1e12)


def test_frequencies_have_the_moments_of_uniform_times_gamma():
    net = nets.SlowNet(1, (4, 4), hidden=4000, layers=2, omega=0.5)
    draw = jax.jit(nets._frequencies(net), static_argnums=1)
    x = np.asarray(draw(jax.random.key(0), (2, 12000))).reshape(2, 3, 4000)
    for layer in range(3):
        shape = 6 / (layer + 1)
        # E g^2 = shape + shape^2; a uniform of half-width 1/sqrt(2) has variance 1/6.
        variance = np.pi**2 * (shape + shape**2) / 6
        assert abs(x[:, layer].var() / variance - 1) < 0.06
        assert abs(x[:, layer].mean()) < 0.1 * variance**0.5


def test_terminator_has_the_blocks_of_a_loop():
    net = Terminator(3, 4, 3, {**KNOBS, "groups": 2})
    inner = params()["params"]
    blocks = [jax.tree.map(lambda x, i=i: x * (1 + 0.1 * i), inner) for i in range(3)]
    head = {"kernel": normal(4, 3), "bias": normal(3)}
    others = jax.tree.map(lambda *pair: np.stack(pair), *blocks[1:])
    tree = {"first": blocks[0], "others": others, "head": head}
    z = normal(2, 4, 4, 4)
    logits, first, others = jax.jit(net.apply)({"params": tree}, z)
    x, kernels = wide(z), []
    for each in blocks:
        x, kernel = transcribed(each, x)
        kernels.append(kernel)
    assert_allclose(first, kernels[0], atol=1e-5)
    assert_allclose(others, kernels[1:], atol=1e-5)
    assert_allclose(logits, dense(head, x.mean((1, 2))), atol=1e-3)


def test_bad_arguments_are_named():
    z = normal(2, 4, 4, 2)
    with pytest.raises(ValueError, match="'kernel' has size 2, expected an odd"):
        hyperzzw_local(z, normal(2, 2, 2))
    with pytest.raises(ValueError, match="'deeper' has 3 channels, expected a mult"):
        slow_loss(normal(4, 4, 2), normal(4, 4, 3))
    with pytest.raises(TypeError, match=r"'z' is float32\[2,3,4,2\]"):
        hyperzzw_global(z[:, :3], z, kernel=normal(4, 4, 2))
