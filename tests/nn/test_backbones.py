"""Promises of the Linen blocks: shapes, determinism, dtypes, leading axes, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxzoo.nn.conv import ConvDecoder, ConvEncoder
from jaxzoo.nn.mlp import MLP, GaussianMLP

CASES = {
    "mlp": (MLP((8, 5)), (4,), (5,)),
    "gaussian_mlp": (GaussianMLP(3, (8,)), (4,), (3,)),
    "conv_encoder": (ConvEncoder(3, (4, 8)), (7, 6, 2), (3,)),
    "conv_decoder": (ConvDecoder((7, 6, 2), (8, 4)), (3,), (7, 6, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes_without_computing_and_same_key_same_parameters(name, key):
    module, inputs, outputs = CASES[name]
    x = jnp.ones((2, *inputs))
    abstract = jax.eval_shape(module.init, key, x)
    params = module.init(key, x)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, module.init(key, x))
    for leaf in jax.tree.leaves(module.apply(params, x)):
        assert leaf.shape == (2, *outputs)


@pytest.mark.parametrize("name", CASES)
def test_all_leading_axes_are_batch(name, key):
    module, inputs, _ = CASES[name]
    x = jax.random.normal(key, (2, 3, *inputs))
    params = module.init(key, x)
    whole = module.apply(params, x)
    flat = module.apply(params, x.reshape(6, *inputs))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(flat), strict=True):
        np.testing.assert_allclose(a.reshape(b.shape), b, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_computes_with_float32_parameters(name, key):
    module, inputs, _ = CASES[name]
    x = jax.random.normal(key, (2, *inputs))
    params = module.init(key, x)
    coarse = module.clone(dtype=jnp.bfloat16)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(coarse.init(key, x)))
    pairs = zip(
        jax.tree.leaves(module.apply(params, x)),
        jax.tree.leaves(coarse.apply(params, x)),
        strict=True,
    )
    for fine, rough in pairs:
        assert not np.array_equal(fine, rough)
        np.testing.assert_allclose(fine, rough.astype(jnp.float32), atol=0.05)


@pytest.mark.parametrize("name", CASES)
def test_a_gradient_step_lowers_a_loss(name, key):
    module, inputs, _ = CASES[name]
    x = jax.random.normal(key, (2, *inputs))
    params = module.init(key, x)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return sum(
            jnp.mean((y - 1) ** 2) for y in jax.tree.leaves(module.apply(params, x))
        )

    before, gradient = loss(params)
    after, _ = loss(
        optax.apply_updates(params, jax.tree.map(lambda g: -0.05 * g, gradient))
    )
    assert after < before
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradient))
