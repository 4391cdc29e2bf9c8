"""The losses in float64, their known values, and the theory on tables counted out."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from jaxzoo.nn.contrastive import chi_squared_loss, info_nce
from jaxzoo.ssl.contrastive_sufficiency import (
    contrastive_risk,
    downstream_bound,
    f_information,
    optimal_scores,
    sufficiency,
)

RNG = np.random.default_rng(0)
ZA, ZB = RNG.normal(size=(2, 16, 8)).astype(np.float32)
SCALE = jnp.float32(0.4)
JOINT = RNG.dirichlet(np.full(48, 0.5)).reshape(6, 8).astype(np.float32)
CODES, OTHER = np.array([0, 0, 1, 2, 2, 1]), np.array([0, 1, 1, 2, 0, 2, 2, 1])


def log_softmax_diagonal(logits):
    return np.diag(logits) - np.logaddexp.reduce(logits, axis=1)


def info_nce_by_hand(za, zb, log_scale, negatives):
    za, zb = za.astype(np.float64), zb.astype(np.float64)
    n, scale = len(za), np.exp(np.float64(log_scale))
    if negatives == "other_view":
        logits = scale * za @ zb.T
        both = [log_softmax_diagonal(x).mean() for x in (logits, logits.T)]
        return -np.mean(both)
    z = np.concatenate([za, zb])
    logits = scale * z @ z.T
    np.fill_diagonal(logits, -np.inf)
    partner = np.roll(np.arange(2 * n), n)
    chosen = logits[np.arange(2 * n), partner]
    return (np.logaddexp.reduce(logits, axis=1) - chosen).mean()


def chi_squared_by_hand(za, zb, log_scale):
    s = np.exp(np.float64(log_scale)) * za.astype(np.float64) @ zb.T
    spread = (s.var(0).mean() + s.var(1).mean()) / 4
    return -np.diag(s).mean() + s.mean() + spread


LOSSES = {
    "other_view": (
        lambda a, b, s: info_nce_by_hand(a, b, s, "other_view"),
        lambda *x, log_scale, **k: info_nce(*x, log_scale=log_scale, **k)[0],
    ),
    "both_views": (
        lambda a, b, s: info_nce_by_hand(a, b, s, "both_views"),
        lambda *x, log_scale, **k: info_nce(
            *x, log_scale=log_scale, negatives="both_views", **k
        )[0],
    ),
    "chi_squared": (
        chi_squared_by_hand,
        lambda *x, log_scale, **k: chi_squared_loss(*x, log_scale=log_scale, **k)[0],
    ),
}
each = pytest.mark.parametrize("name", LOSSES)


def slope(function, args, index, direction, step=1e-4):
    """A central difference in float64."""
    moved = [list(args), list(args)]
    for sign, values in zip((1, -1), moved, strict=True):
        values[index] = np.float64(args[index]) + sign * step * direction
    return (function(*moved[0]) - function(*moved[1])) / (2 * step)


@each
def test_value_and_slopes_are_those_of_the_formula(name):
    rng = np.random.default_rng(1)
    oracle, loss = LOSSES[name]
    args = (ZA, ZB, SCALE)
    value, got = jax.value_and_grad(lambda a, b, s: loss(a, b, log_scale=s), (0, 1, 2))(
        *map(jnp.asarray, args)
    )
    assert_allclose(value, oracle(*args), rtol=1e-5)
    for index in range(3):
        direction = rng.normal(size=np.shape(args[index]))
        wanted = slope(oracle, args, index, direction)
        # The oracle rounds nothing to float32, so that the difference is clean.
        assert_allclose(np.sum(got[index] * direction), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["other_view", "both_views"])
def test_chunks_change_nothing(name):
    loss = LOSSES[name][1]
    whole = jax.value_and_grad(loss, (0, 1))(ZA, ZB, log_scale=SCALE)
    for chunk in (1, 4, 16):
        parts = jax.value_and_grad(loss, (0, 1))(ZA, ZB, log_scale=SCALE, chunk=chunk)
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), parts, whole
        )


@each
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_over_devices_it_is_the_whole(name, devices):
    loss = LOSSES[name][1]
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    rows: Any = P("d")
    specs = (rows, rows, P())

    def inside(a, b, s):
        more = {} if name == "chi_squared" else {"chunk": 2}
        return loss(a, b, log_scale=s, axis_name="d", **more)

    mapped = jax.shard_map(
        jax.value_and_grad(inside, (0, 1, 2)), mesh=mesh, in_specs=specs,
        out_specs=(P(), specs),
    )  # fmt: skip
    got = jax.jit(mapped)(ZA, ZB, SCALE)
    whole = jax.value_and_grad(lambda a, b, s: loss(a, b, log_scale=s), (0, 1, 2))
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        got, whole(ZA, ZB, SCALE),
    )  # fmt: skip


@each
def test_masks_zero_vectors_and_small_floats(name):
    oracle, loss = LOSSES[name]
    keep = np.arange(16) % 3 > 0
    spoilt = [np.where(keep[:, None], x, np.nan) for x in (ZA, ZB)]
    value = loss(*spoilt, log_scale=SCALE, where=keep)
    assert_allclose(value, oracle(ZA[keep], ZB[keep], SCALE), rtol=1e-5)
    masked = jax.value_and_grad(loss, (0, 1))(
        *map(jnp.asarray, spoilt), log_scale=SCALE, where=np.zeros(16, bool)
    )
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(masked))
    zeros = jnp.zeros((4, 3))
    for x in jax.tree.leaves(jax.grad(loss, (0, 1))(zeros, zeros, log_scale=SCALE)):
        assert np.all(np.isfinite(x))
    small = [jnp.asarray(x, jnp.bfloat16) for x in (ZA, ZB)]
    rounded = [np.asarray(x, np.float32) for x in small]
    assert loss(*small, log_scale=SCALE).dtype == jnp.float32
    assert_allclose(loss(*small, log_scale=SCALE), oracle(*rounded, SCALE), rtol=1e-5)


def test_information_of_perfect_and_of_useless_codes():
    """n distinct pairs told apart beyond doubt hold log n nats, equal ones none."""
    _, aux = info_nce(jnp.eye(8), jnp.eye(8), log_scale=5.0)
    assert_allclose(aux["information"], np.log(8), rtol=1e-5)
    loss, aux = info_nce(jnp.ones((8, 2)), jnp.ones((8, 2)))
    assert_allclose(loss, np.log(8), rtol=1e-5)
    assert_allclose(aux["information"], 0, atol=1e-6)
    assert_allclose(aux["per_example"], np.full(8, np.log(8)), rtol=1e-5)
    alone, _ = info_nce(ZA[:1], ZB[:1])
    assert_allclose(alone, 0, atol=1e-6)


# The theory.


def ratio_by_hand(p):
    p = np.float64(p) / p.sum()
    product = np.outer(p.sum(1), p.sum(0))
    return p / product, product


def information_by_hand(p, divergence):
    r, product = ratio_by_hand(p)
    f = {"kl": lambda t: t * np.log(t), "chi_squared": lambda t: (t - 1) ** 2 / 2}
    return np.sum(product * f[divergence](r))


def coarse_by_hand(p, codes, other):
    table = np.zeros((3, 3))
    np.add.at(table, (codes[:, None], other[None]), np.float64(p))
    return table


@pytest.mark.parametrize("divergence", ["kl", "chi_squared"])
def test_three_forms_are_the_lost_information(divergence):
    assert_allclose(
        f_information(JOINT, divergence=divergence),
        information_by_hand(JOINT, divergence), rtol=1e-5,
    )  # fmt: skip
    lost = information_by_hand(JOINT, divergence) - information_by_hand(
        coarse_by_hand(JOINT, CODES, OTHER), divergence
    )
    assert lost > 0.05
    for form in ("information", "bregman", "variational"):
        knobs: Any = {"num_codes": 3, "divergence": divergence, "form": form}
        got = sufficiency(JOINT, CODES, OTHER, **knobs)
        assert_allclose(got, lost, rtol=1e-4)
        assert_allclose(sufficiency(7 * JOINT, CODES, OTHER, **knobs), lost, rtol=1e-4)
        knobs["num_codes"] = 8
        nothing = sufficiency(JOINT, np.arange(6), np.arange(8), **knobs)
        assert_allclose(nothing, 0, atol=1e-5)


def test_codes_of_one_view_lose_less_than_of_both():
    one, both = (sufficiency(JOINT, CODES, o, num_codes=3) for o in (None, OTHER))
    assert 0 < one < both


@pytest.mark.parametrize("divergence", ["kl", "chi_squared"])
def test_no_scores_of_the_codes_have_a_smaller_risk(divergence):
    rng = np.random.default_rng(1)
    best = optimal_scores(JOINT, CODES, OTHER, num_codes=3, divergence=divergence)
    table = np.zeros((3, 3), np.float32)
    table[CODES[:, None], OTHER[None]] = best

    def risk(table):
        scores = table[CODES][:, OTHER]
        return contrastive_risk(scores, JOINT, divergence=divergence)

    assert_allclose(jax.grad(risk)(jnp.asarray(table)), np.zeros((3, 3)), atol=1e-6)
    for _ in range(20):
        moved = table + rng.normal(size=(3, 3)).astype(np.float32)
        assert risk(jnp.asarray(moved)) > risk(jnp.asarray(table))
    every = optimal_scores(
        JOINT, np.arange(6), np.arange(8), num_codes=8, divergence=divergence
    )
    assert_allclose(
        contrastive_risk(every, JOINT, divergence=divergence),
        -information_by_hand(JOINT, divergence), rtol=1e-4,
    )  # fmt: skip


def test_info_nce_tends_to_the_risk_with_many_negatives():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(6, 8)).astype(np.float32)
    draws = rng.choice(48, size=4096, p=np.float64(JOINT).ravel() / JOINT.sum())
    x, z = np.unravel_index(draws, JOINT.shape)
    loss, _ = info_nce(scores[x], np.eye(8, dtype=np.float32)[z], chunk=512)
    other = contrastive_risk(scores.T, JOINT.T)
    limit = 0.5 * (contrastive_risk(scores, JOINT) + other)
    assert_allclose(loss - np.log(4096), limit, atol=0.05)


@pytest.mark.parametrize("divergence", ["kl", "chi_squared"])
def test_the_bound_holds_for_random_models(divergence):
    rng = np.random.default_rng(1)
    tight = []
    for _ in range(50):
        p = rng.dirichlet(np.full(48, 0.2)).reshape(6, 8) + 1e-6
        p /= p.sum()
        codes, head = rng.integers(0, 3, 6), rng.uniform(-1, 1, 6)
        weights, groups = p.sum(1), np.eye(3)[codes]
        best = (weights * head) @ groups / np.maximum(weights @ groups, 1e-12)
        risk = np.sum(weights * (best[codes] - head) ** 2)
        predictor = head @ p / p.sum(0)
        error = np.sqrt(np.sum(p * (predictor[None] - head[:, None]) ** 2))
        table = jnp.asarray(p, jnp.float32)
        suff = sufficiency(table, codes, num_codes=3, divergence=cast(Any, divergence))
        limit = float(downstream_bound(suff, jnp.float32(error)))
        assert risk <= limit + 1e-6
        tight.append(risk / limit)
    assert max(tight) > 0.2  # and it says something


def test_bad_input_is_named():
    for loss in (info_nce, chi_squared_loss):
        with pytest.raises(TypeError, match="'zb' is float32.15,8., expected"):
            loss(ZA, ZB[:15])
        with pytest.raises(TypeError, match="'zb' is float32.16,7., expected"):
            loss(ZA, ZB[:, :7])
        with pytest.raises(ValueError, match="'axis_name' is 'rows'"):
            loss(ZA, ZB, axis_name="rows")
        with pytest.raises(ValueError, match="'log_scale' is nan"):
            loss(ZA, ZB, log_scale=float("nan"))
    with pytest.raises(ValueError, match="'negatives' is 'none'.*'both_views'"):
        info_nce(ZA, ZB, negatives=cast(Any, "none"))
    with pytest.raises(ValueError, match="'chunk' is 3, expected a divisor of 16"):
        info_nce(ZA, ZB, negatives="both_views", chunk=3)
    with pytest.raises(ValueError, match="'num_codes' is 0"):
        sufficiency(JOINT, CODES, num_codes=0)
    with pytest.raises(TypeError, match="'codes' is int64.5., expected"):
        sufficiency(JOINT, CODES[:5], num_codes=3)
    with pytest.raises(ValueError, match="'bound' is -1"):
        downstream_bound(jnp.ones(2), jnp.ones(2), bound=-1.0)
