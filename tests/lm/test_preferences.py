"""ORPO, SimPO and KTO in float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.lm.preferences import kto_loss, orpo_loss, simpo_loss


def s(x):
    return 1.0 / (1.0 + np.exp(-x))


def pairs():
    rng = np.random.default_rng(0)
    values = -10.0 + 2.0 * rng.normal(size=(2, 8))
    return *values, *rng.integers(2, 7, size=(2, 8)).astype(np.float64)


def singles(arrays) -> Any:
    return [jnp.asarray(x, jnp.float32) for x in arrays]


def test_orpo():
    chosen, rejected, c_length, r_length = pairs()
    p, q = np.exp(chosen / c_length), np.exp(rejected / r_length)
    ratio = (p / (1 - p)) / (q / (1 - q))
    wanted = -np.log(p) - 0.3 * np.log(s(np.log(ratio)))
    value, aux = orpo_loss(*singles(pairs()), weight=0.3)
    np.testing.assert_allclose(aux["per_example"], wanted, rtol=1e-5)
    np.testing.assert_allclose(value, wanted.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["log_odds"], np.log(ratio), rtol=1e-5)
    one = jnp.ones(1)  # p = 1 has infinite odds
    assert np.isfinite(orpo_loss(0 * one, -1e4 * one, one, one)[0])


def test_simpo():
    chosen, rejected, c_length, r_length = pairs()
    margin = 2.5 * (chosen / c_length - rejected / r_length)
    value, aux = simpo_loss(*singles(pairs()), beta=2.5, gamma=0.8)
    np.testing.assert_allclose(aux["margin"], margin, rtol=1e-5)
    np.testing.assert_allclose(value, np.mean(-np.log(s(margin - 0.8))), rtol=1e-5)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_kto(shift):
    policy, reference, divergence = np.random.default_rng(1).normal(size=(3, 8))
    divergence += shift
    good = np.arange(8) % 3 == 0
    rewards, baseline = 0.4 * (policy - reference), 0.4 * max(0.0, divergence.mean())
    each = np.where(
        good, 1.5 * (1 - s(rewards - baseline)), 0.5 * (1 - s(baseline - rewards))
    )
    args = singles((policy, reference, divergence))
    args.append(jnp.asarray(good))
    value, aux = kto_loss(*args, beta=0.4, desirable_weight=1.5, undesirable_weight=0.5)
    np.testing.assert_allclose(aux["per_example"], each, rtol=1e-5)
    np.testing.assert_allclose(value, each.mean(), rtol=1e-5)
    np.testing.assert_allclose(aux["baseline"], baseline, rtol=1e-5)


def test_masked_rows_do_not_count():
    keep = np.arange(8) % 3 != 1
    spoilt = singles([np.where(keep, x, np.nan) for x in pairs()])
    few = singles([x[keep] for x in pairs()])
    losses: Any = (orpo_loss, simpo_loss)
    for loss in losses:
        got = loss(*spoilt, where=jnp.asarray(keep))[0]
        np.testing.assert_allclose(got, loss(*few)[0], rtol=1e-6)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="'weight' is -1"):
        orpo_loss(*singles(pairs()), weight=-1.0)
    with pytest.raises(ValueError, match="'gamma'"):
        simpo_loss(*singles(pairs()), gamma=-1.0)
    with pytest.raises(ValueError, match="'undesirable_weight'"):
        rows = jnp.ones(8)
        kto_loss(rows, rows, rows, rows > 0, undesirable_weight=float("nan"))
