"""Algorithm 1 in float64, and unit variances of plain, convolutional and skip nets."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.optim.lsuv import layer_variances, lsuv_init

X = (5.0 * np.random.default_rng(0).normal(size=(64, 12)) + 1.0).astype(np.float32)
KEY = jax.random.key(0)


class Plain(nn.Module):
    bias: float = 0.0
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            start = nn.initializers.constant(self.bias)
            x = nn.relu(nn.Dense(16, bias_init=start)(x))
        return nn.Dense(3)(x)


class Skips(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(3):
            y = nn.BatchNorm(use_running_average=False)(x)
            x = x + nn.Conv(8, (3, 3), use_bias=False)(nn.relu(y))
        return nn.Dense(4)(x.mean((1, 2)))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(12)
        return nn.Dense(5)(layer(nn.relu(layer(x))))


def of_the_paper(kernels, biases, x, tolerance=0.1, max_iter=10):
    """Algorithm 1 in float64, of orthonormal kernels of a ReLU net."""
    x, scales = x.astype(np.float64), []
    for kernel, bias in zip(kernels, biases, strict=True):
        scale = 1.0
        for _ in range(max_iter):
            variance = (scale * x @ kernel + bias).var()
            if abs(variance - 1.0) < tolerance:
                break
            scale /= np.sqrt(variance)
        scales.append(scale)
        x = np.maximum(scale * x @ kernel + bias, 0.0)
    return scales


@pytest.mark.parametrize("bias, max_iter", [(0.0, 10), (0.4, 10), (0.4, 1)])
def test_it_is_algorithm_1(bias, max_iter):
    """With biases that differ between units, one division does not suffice."""

    class Biased(nn.Module):
        @nn.compact
        def __call__(self, x):
            def start(key, shape, dtype):
                return bias * jnp.cos(jnp.arange(shape[0], dtype=dtype))

            for _ in range(3):
                x = nn.relu(nn.Dense(16, bias_init=start)(x))
            return x

    variables, variance = lsuv_init(
        KEY, Biased(), (X,), tolerance=0.01, max_iter=max_iter
    )
    layers: Any = [variables["params"][f"Dense_{i}"] for i in range(3)]
    kernels = [np.asarray(layer["kernel"], np.float64) for layer in layers]
    unit = [k / np.linalg.norm(k, 2) for k in kernels]
    biases = [np.asarray(layer["bias"], np.float64) for layer in layers]
    scales = of_the_paper(unit, biases, X, 0.01, max_iter)
    for kernel, u, scale in zip(kernels, unit, scales, strict=True):
        # 12 or 16 inputs, 16 outputs: the rows are orthonormal times the scale.
        assert_allclose(u @ u.T, np.eye(len(u)), atol=1e-5)
        assert_allclose(np.linalg.norm(kernel, 2), scale, rtol=1e-4)
    if max_iter > 1:
        assert_allclose(list(variance.values()), 1.0, atol=0.01)


@pytest.mark.parametrize(
    "model, shape",
    [(Plain(), (64, 12)), (Plain(depth=30), (64, 12)), (Skips(), (16, 8, 8, 3))],
    ids=["plain", "deep", "skips"],
)
def test_every_layer_has_variance_1_and_the_module_says_so_itself(model, shape):
    x = 4.0 * jax.random.normal(jax.random.key(1), shape) - 2.0
    start = model.init(KEY, x)
    before = layer_variances(model, start, (x,))
    variables, variance = lsuv_init(KEY, model, (x,))
    assert jax.tree.structure(variables) == jax.tree.structure(start)
    after = layer_variances(model, variables, (x,))
    assert list(after) == list(before) == list(variance)
    assert len(after) == sum(
        p[-1].key == "kernel" for p, _ in jax.tree_util.tree_leaves_with_path(start)
    )
    assert any(abs(v - 1) > 0.5 for v in before.values())
    for name, value in after.items():
        assert abs(value - 1) < 0.1, name
        assert_allclose(variance[name], value, rtol=1e-3)


def test_a_kernel_used_twice_is_scaled_at_its_first_use():
    variables, variance = lsuv_init(KEY, Tied(), (X,))
    assert list(variance) == ["Dense_0", "Dense_1"]
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert_allclose(np.var(X @ np.asarray(kernel)), 1.0, rtol=1e-4)
    twice = layer_variances(Tied(), variables, (X,))
    assert_allclose(list(twice.values()), 1.0, rtol=1e-3)


def test_the_same_under_jit_and_for_several_seeds_at_once():
    def start(key):
        return lsuv_init(key, Plain(depth=2), (X,))

    keys = jax.random.split(KEY, 2)
    together = jax.jit(jax.vmap(start))(keys)
    alone = start(keys[1])
    jax.tree.map(
        lambda a, b: assert_allclose(a[1], b, rtol=1e-4, atol=1e-5), together, alone
    )


def test_a_layer_without_variance_stays_orthonormal_and_other_variables_are_kept():
    zeros = jnp.zeros((8, 12))
    variables, variance = lsuv_init(KEY, Plain(depth=1), (zeros,))
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert_allclose(kernel @ kernel.T, np.eye(12), atol=1e-5)
    assert_array_equal(list(variance.values()), 0.0)
    x = jax.random.normal(KEY, (4, 8, 8, 3))
    variables, _ = lsuv_init(KEY, Skips(), (x,))
    assert set(variables) == {"params", "batch_stats"}
    jax.tree.map(
        assert_array_equal,
        variables["batch_stats"],
        Skips().init(KEY, x)["batch_stats"],
    )
