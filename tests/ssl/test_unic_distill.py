"""The losses in float64, dropping by its frequencies, statistics over a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from jaxzoo.nn.feature_stats import FeatureStats
from jaxzoo.nn.vit import ViT
from jaxzoo.ssl.unic_distill import (
    LadderOfProjectors,
    teacher_dropping,
    token_loss,
    unic_loss,
)

RNG = np.random.default_rng(0)
STUDENT, TARGET = 2 * RNG.normal(size=(2, 6, 5, 7)).astype(np.float32)
LOSSES = RNG.uniform(0.5, 2.0, size=(8, 3)).astype(np.float32)


def numpy_token_loss(student, target, cosine=0.5, smooth_l1=0.5, beta=1.0):
    """One token [D] at a time, in float64."""
    s, y = student.astype(np.float64), target.astype(np.float64)
    similarity = s @ y / (np.sqrt(s @ s) * np.sqrt(y @ y))
    terms = [
        e * e / (2 * beta) if abs(e) < beta else abs(e) - beta / 2 for e in (s - y)
    ]
    return cosine * (1 - similarity) + smooth_l1 * np.mean(terms)


@pytest.mark.parametrize(
    "knobs", [{}, {"cosine": 1.0, "smooth_l1": 0.0}, {"cosine": 0.2, "beta": 0.3}]
)
def test_token_loss_in_float64(knobs):
    expected = [
        np.mean([numpy_token_loss(s, y, **knobs) for s, y in zip(a, b, strict=True)])
        for a, b in zip(STUDENT, TARGET, strict=True)
    ]
    assert_allclose(token_loss(STUDENT, TARGET, **knobs), expected, rtol=1e-5)
    one = token_loss(STUDENT[:, 0], TARGET[:, 0], **knobs)
    expected = [
        numpy_token_loss(s[0], y[0], **knobs)
        for s, y in zip(STUDENT, TARGET, strict=True)
    ]
    assert_allclose(one, expected, rtol=1e-5)


def test_each_term_sees_what_the_other_does_not():
    cosine = {"cosine": 1.0, "smooth_l1": 0.0}
    assert_allclose(token_loss(3 * TARGET, TARGET, **cosine), 0.0, atol=1e-6)
    assert_allclose(token_loss(-TARGET, TARGET, **cosine), 2.0, rtol=1e-6)
    other = token_loss(3 * TARGET, TARGET, cosine=0.0, smooth_l1=1.0)
    assert np.all(other > 0.5)
    assert_allclose(token_loss(TARGET, TARGET), 0.0, atol=1e-6)


def test_zero_vectors_and_huge_ones_have_finite_gradients():
    for student in (np.zeros((2, 3)), np.full((2, 3), 1e-30), np.full((2, 3), 1e30)):
        for target in (np.zeros((2, 3)), np.ones((2, 3))):
            pair = [jnp.asarray(a, jnp.float32) for a in (student, target)]
            value, gradient = jax.value_and_grad(lambda s, y: token_loss(s, y).sum())(
                *pair
            )
            assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_standardised_features_follow_the_released_order():
    """A batch is scaled by what was known before it; deviations have n - 1."""
    rng = np.random.default_rng(1)
    batches = rng.normal(3.0, 5.0, size=(3, 6, 5, 4)).astype(np.float32)
    stats = FeatureStats.start(4)
    mean, std = np.zeros(4), np.ones(4)
    for x, momentum in zip(batches, (1.0, 0.5, 0.1), strict=True):
        expected = (x - mean) / (std + 1e-6)
        assert_allclose(stats.standardize(x), expected, rtol=1e-5, atol=1e-5)
        flat = x.reshape(-1, 4).astype(np.float64)
        mean = (1 - momentum) * mean + momentum * flat.mean(0)
        deviation = np.sqrt(((flat - flat.mean(0)) ** 2).sum(0) / (len(flat) - 1))
        std = (1 - momentum) * std + momentum * (deviation + 1e-6)
        stats = stats.update(x, momentum=momentum)
        assert_allclose(stats.mean, mean, rtol=1e-5)
        assert_allclose(stats.std, std, rtol=1e-5)
    settled = FeatureStats.start(4).update(batches[0], momentum=1.0)
    y = np.asarray(settled.standardize(batches[0])).reshape(-1, 4)
    assert_allclose(y.mean(0), 0.0, atol=1e-5)
    assert_allclose(y.std(0, ddof=1), 1.0, rtol=1e-5)


def test_teachers_get_no_gradient():
    rng = np.random.default_rng(1)

    def loss(features):
        stats = FeatureStats.start(4).update(features, momentum=1.0)
        return jnp.sum(stats.standardize(features) ** 2) + jnp.sum(stats.std)

    x = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    assert np.all(np.asarray(jax.grad(loss)(x)) == 0)


@pytest.mark.parametrize("devices", [2, 8])
def test_statistics_over_devices_are_those_of_the_whole(devices):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(2.0, 3.0, size=(8, 5, 4)), jnp.float32)
    where = jnp.arange(8) < 5
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def update(x, where):
        return FeatureStats.start(4).update(x, momentum=0.3, where=where, axis_name="d")

    parts = jax.jit(
        jax.shard_map(update, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P())
    )(jnp.where(where[:, None, None], x, jnp.nan), where)
    whole = FeatureStats.start(4).update(x[:5], momentum=0.3)
    assert_allclose(parts.mean, whole.mean, rtol=1e-5)
    assert_allclose(parts.std, whole.std, rtol=1e-5)


def test_a_batch_that_says_nothing_moves_nothing():
    stats = FeatureStats(jnp.array([2.0]), jnp.array([3.0]))
    x = jnp.full((4, 1), jnp.nan)
    for where in (jnp.zeros(4, bool), jnp.arange(4) == 1):
        same = stats.update(
            jnp.where(where[:, None], 9.0, x), momentum=0.5, where=where
        )
        assert (float(same.mean[0]), float(same.std[0])) == (2.0, 3.0)


def test_the_hardest_teacher_is_always_kept_and_others_as_often_as_said():
    rng = np.random.default_rng(1)
    losses = jnp.asarray(rng.uniform(size=(20_000, 3)), jnp.float32)
    keep = np.asarray(teacher_dropping(jax.random.key(0), losses, drop=0.3))
    hardest = np.arange(3) == np.asarray(losses).argmax(1)[:, None]
    assert keep[hardest].all()
    # Standard error: sqrt(.3 * .7 / 40000) = 0.0023.
    assert abs(keep[~hardest].mean() - 0.7) < 0.01
    first, second = (
        keep[:, i][~hardest[:, i] & ~hardest[:, j]] for i, j in ((0, 1), (1, 0))
    )
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05, "dropped together"
    everyone = teacher_dropping(jax.random.key(0), losses, drop=0.0)
    assert everyone.all()
    alone = teacher_dropping(jax.random.key(0), losses, drop=1.0)
    assert np.array_equal(alone, hardest)
    ties = teacher_dropping(jax.random.key(0), jnp.ones((5, 3)), drop=1.0)
    assert np.array_equal(ties.sum(1), np.ones(5))


def test_loss_is_the_mean_over_what_was_kept():
    key = jax.random.key(4)
    keep = np.asarray(teacher_dropping(key, LOSSES, drop=0.6))
    assert 8 < keep.sum() < 24
    (value, aux), gradient = jax.value_and_grad(unic_loss, has_aux=True)(
        jnp.asarray(LOSSES), key=key, drop=0.6
    )
    assert_allclose(value, LOSSES[keep].mean(), rtol=1e-6)
    assert_allclose(gradient, keep / keep.sum(), rtol=1e-6)
    assert_allclose(aux["kept"], keep.mean(0), rtol=1e-6)
    assert_allclose(aux["per_teacher"], LOSSES.mean(0), rtol=1e-6)
    own = (LOSSES * keep).sum(1) / keep.sum(1)
    assert_allclose(aux["per_example"], own, rtol=1e-6)
    assert_allclose(unic_loss(LOSSES, drop=0.0)[0], LOSSES.mean(), rtol=1e-6)
    alone, _ = unic_loss(LOSSES, key=key, drop=1.0)
    assert_allclose(alone, LOSSES.max(1).mean(), rtol=1e-6)


def test_masked_examples_are_inert():
    where = jnp.arange(8) < 5
    spoilt = jnp.where(where[:, None], LOSSES, jnp.nan)
    value, aux = unic_loss(spoilt, drop=0.0, where=where)
    assert_allclose(value, LOSSES[:5].mean(), rtol=1e-6)
    assert_allclose(aux["per_teacher"], LOSSES[:5].mean(0), rtol=1e-6)
    value, gradient = jax.value_and_grad(
        lambda x: unic_loss(x, key=jax.random.key(0), where=jnp.zeros(8, bool))[0]
    )(jnp.full((8, 3), jnp.nan))
    assert value == 0 and np.all(np.asarray(gradient) == 0)


def test_one_example_and_bfloat16():
    value, _ = unic_loss(LOSSES[:1], key=jax.random.key(0), drop=1.0)
    assert_allclose(value, LOSSES[0].max(), rtol=1e-6)
    rough = [jnp.asarray(a, jnp.bfloat16) for a in (STUDENT, TARGET)]
    exact = token_loss(*[np.asarray(a, np.float32) for a in rough])
    got = token_loss(*rough)
    assert got.dtype == jnp.float32
    assert_allclose(got, exact, rtol=1e-6)


def test_the_ladder_adds_a_projection_of_every_block():
    vit: Any = ViT(patch=2, width=8, depth=3, heads=2)
    images = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    _, blocks = vit.apply(vit.init(jax.random.key(1), images), images)
    ladder: Any = LadderOfProjectors({"b": 6, "a": 4}, hidden=5, last_hidden=16)
    params = ladder.init(jax.random.key(2), blocks)
    projected = ladder.apply(params, blocks)
    assert jax.tree.map(jnp.shape, projected) == {
        "a": ((2, 4), (2, 4, 4)),
        "b": ((2, 6), (2, 4, 6)),
    }
    p = params["params"]
    assert p["a_up"].shape == (2, 1, 8, 16) and p["a_lower_up"].shape == (2, 2, 8, 5)
    expected = np.zeros((2, 2, 4, 6))  # CLS, repeated; patches
    for i, tokens in enumerate(blocks):
        rung, j = ("b_lower", i) if i < 2 else ("b", 0)
        for kind, x in enumerate((tokens[:, :1].repeat(4, 1), tokens[:, 1:])):
            hidden = jax.nn.gelu(x @ p[f"{rung}_up"][kind, j], approximate=False)
            expected[kind] += hidden @ p[f"{rung}_down"][kind, j]
    assert_allclose(projected["b"][0], expected[0][:, 0], rtol=1e-4, atol=1e-6)
    assert_allclose(projected["b"][1], expected[1], rtol=1e-4, atol=1e-6)
    rough = ladder.clone(dtype=jnp.bfloat16).apply(params, blocks)
    assert rough["b"][1].dtype == jnp.float32
    assert_allclose(rough["b"][1], expected[1], atol=0.01)
    # Every block is under the teacher's direct influence, the first too.
    gradient = jax.grad(
        lambda blocks: sum(
            y.sum() for y in jax.tree.leaves(ladder.apply(params, blocks))
        )
    )(blocks)
    assert np.all(np.any(gradient != 0, axis=-1))


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"'target' is float32\[6,5,6\]"):
        token_loss(STUDENT, TARGET[..., :6])
    with pytest.raises(TypeError, match=r"'target' is float32\[5,5,7\]"):
        token_loss(STUDENT, TARGET[:5])
    with pytest.raises(ValueError, match="'beta' is 0.0"):
        token_loss(STUDENT, TARGET, beta=0.0)
    with pytest.raises(ValueError, match="'key' is None, expected a key as 'drop'"):
        unic_loss(LOSSES)
    with pytest.raises(ValueError, match="'drop' is 1.5"):
        unic_loss(LOSSES, key=jax.random.key(0), drop=1.5)
    with pytest.raises(ValueError, match="'axis_name' is 'rows'"):
        unic_loss(LOSSES, drop=0.0, axis_name="rows")
    stats = FeatureStats.start(4)
    with pytest.raises(TypeError, match="'features' has shape .* last axis of 4"):
        stats.update(STUDENT, momentum=0.5)
    with pytest.raises(ValueError, match="'features' has one token"):
        stats.update(np.ones((1, 4), np.float32), momentum=0.5)
    with pytest.raises(ValueError, match="'momentum' is nan"):
        stats.update(np.ones((2, 4), np.float32), momentum=float("nan"))


def test_dropping_takes_a_schedule():
    def loss(drop):
        return unic_loss(LOSSES, key=jax.random.key(0), drop=drop)[0]

    assert_allclose(jax.jit(loss)(0.3), loss(0.3), rtol=1e-6)
    with pytest.raises(ValueError, match="'key' is None"):
        jax.jit(lambda drop: unic_loss(LOSSES, drop=drop)[0])(0.0)
