"""Against the full Hessian in float64, and a sort in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.optim.directional_sharpness import (
    coordinate_clip,
    directional_sharpness,
    loss_along,
)

TARGET = jnp.asarray(np.random.default_rng(9).normal(size=(7, 2)), jnp.float32)
INPUT = jnp.asarray(np.random.default_rng(8).normal(size=(7, 3)), jnp.float32)


def loss(params):
    hidden = jnp.tanh(INPUT @ params["a"])
    return jnp.mean((hidden @ params["b"] - TARGET) ** 2)


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": (4, 2)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in tree.values()])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sharpness_by_the_full_hessian(seed):
    params, update = tree(0), tree(seed)
    blocks: Any = jax.hessian(loss)(params)
    h = np.block(
        [[np.asarray(blocks[i][j]).reshape(params[i].size, -1) for j in params]
         for i in params]
    ).astype(np.float64)  # fmt: skip
    v = flat(update) / np.linalg.norm(flat(update))
    value = directional_sharpness(loss, params, update)
    assert_allclose(value, v @ h @ v, rtol=1e-4)
    twice = jax.tree.map(lambda x: -1e20 * x, update)
    assert_allclose(directional_sharpness(loss, params, twice), value, rtol=1e-4)


def test_known_sharpness_of_a_quadratic_and_none_along_no_update():
    h = np.diag([1.0, 10.0, 100.0]).astype(np.float32)

    def quadratic(x):
        return 0.5 * x @ h @ x

    for i, wanted in enumerate([1.0, 10.0, 100.0]):
        e = jnp.zeros(3).at[i].set(-1e-25)
        assert_allclose(directional_sharpness(quadratic, jnp.ones(3), e), wanted)
    assert directional_sharpness(quadratic, jnp.ones(3), jnp.zeros(3)) == 0
    # Sign updates even out what the gradient puts on the steepest coordinate.
    slope = jax.grad(quadratic)(jnp.ones(3))
    sign = directional_sharpness(quadratic, jnp.ones(3), jnp.sign(slope))
    assert_allclose(sign, 37.0, rtol=1e-6)
    assert directional_sharpness(quadratic, jnp.ones(3), slope) > 98


def test_losses_along_a_direction_and_the_best_step():
    params, update = tree(0), tree(4)
    lengths = np.array([0.1, 0.5, 2.0], np.float32)
    v = jax.tree.map(lambda x: x / np.linalg.norm(flat(update)), update)
    wanted = [
        loss(jax.tree.map(lambda x, d, s=s: x + s * d, params, v)) for s in lengths
    ]
    losses, aux = loss_along(loss, params, update, lengths)
    assert_allclose(losses, wanted, rtol=1e-5)
    gain = float(loss(params)) - min(map(float, wanted))
    assert_allclose(aux["reduction"], max(gain, 0.0), atol=1e-5)

    downhill = jax.tree.map(lambda g: -g, jax.grad(loss)(params))
    _, aux = loss_along(loss, params, downhill, lengths)
    assert aux["reduction"] > 0 and aux["length"] in lengths
    uphill = jax.grad(loss)(params)
    _, aux = loss_along(loss, params, uphill, lengths)
    assert aux["reduction"] == 0 and aux["length"] == 0


def test_the_curvature_of_the_losses_along_an_update_is_the_sharpness():
    params, update = tree(0), tree(5)
    step = 1e-2
    with jax.enable_x64(True):
        wide = [
            jax.tree.map(lambda x: x.astype(jnp.float64), t) for t in (params, update)
        ]
        losses, _ = loss_along(loss, wide[0], wide[1], jnp.array([-step, 0.0, step]))
        second = float(losses[0] - 2 * losses[1] + losses[2]) / step**2
    assert_allclose(directional_sharpness(loss, params, update), second, rtol=1e-3)


def of_the_paper(grads, fraction):
    """The threshold is the first of the sorted magnitudes that is not clipped."""
    sizes = np.sort(np.abs(flat(grads)))[::-1]
    threshold = sizes[int(len(sizes) * fraction)]
    return {
        k: np.sign(x) * np.minimum(np.abs(np.asarray(x, np.float64)), threshold)
        for k, x in grads.items()
    }


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99])
def test_clip_by_the_paper(fraction):
    clip: Any = coordinate_clip(fraction=fraction)
    for seed in range(3):
        grads = tree(seed)
        clipped, _ = clip.update(grads, clip.init(grads))
        wanted = of_the_paper(grads, fraction)
        for k in wanted:
            assert_allclose(clipped[k], wanted[k], rtol=1e-6)
        changed = sum(int(np.sum(clipped[k] != grads[k])) for k in wanted)
        assert changed == int(20 * fraction)


def test_clipped_momentum_of_the_authors_over_five_steps():
    optimizer: Any = optax.chain(
        coordinate_clip(fraction=0.2), optax.ema(0.9, debias=False)
    )
    state, average = optimizer.init(tree(0)), {k: 0.0 for k in tree(0)}
    for seed in range(5):
        grads = tree(seed)
        update, state = optimizer.update(grads, state)
        clipped = of_the_paper(grads, 0.2)
        average = {k: 0.9 * average[k] + 0.1 * clipped[k] for k in average}
        for k in average:
            assert_allclose(update[k], average[k], rtol=1e-5, atol=1e-7)


def test_clipping_without_outliers_or_with_one():
    clip: Any = coordinate_clip(fraction=0.1)
    ones = {"w": jnp.ones(20)}
    assert_array_equal(clip.update(ones, clip.init(ones))[0]["w"], ones["w"])
    one = {"w": jnp.ones(20).at[3].set(-1e30)}
    clipped = clip.update(one, clip.init(one))[0]["w"]
    assert_array_equal(np.abs(clipped), 1.0)
    assert clipped[3] == -1
    none: Any = {}
    assert clip.update(none, clip.init(none))[0] == {}


def test_the_fraction_may_be_traced():
    injected: Any = optax.inject_hyperparams(coordinate_clip)(fraction=0.25)
    grads = tree(0)
    update = jax.jit(injected.update)(grads, injected.init(grads))[0]
    wanted = of_the_paper(grads, 0.25)
    for k in wanted:
        assert_allclose(update[k], wanted[k], rtol=1e-6)


def test_bad_arguments_are_named():
    for fraction in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="argument 'fraction'"):
            coordinate_clip(fraction=fraction)
    with pytest.raises(TypeError, match="argument 'update'"):
        directional_sharpness(jnp.sum, jnp.ones(3), jnp.ones(4))
    with pytest.raises(TypeError, match="argument 'loss'"):
        loss_along(3.0, jnp.ones(3), jnp.ones(3), jnp.ones(2))  # pyright: ignore
