"""The confidence loss against the equation in float64, one example after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.weak_to_strong import agreement, conf_loss, confidence_weight, pgr


def by_hand(logits, weak, alpha, convention):
    """The mean over examples, hardened classes and the threshold."""
    f = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    share = weak[:, 1].sum() / len(weak) if convention == "released" else 0.5
    t = np.quantile(f[:, 0], share)
    total, classes = 0.0, []
    for p, y in zip(f, weak, strict=True):
        hard = p.argmax() if convention == "argmax" else int(p[0] < t)
        classes.append(hard)
        total += (1 - alpha) * -(y * np.log(p)).sum() + alpha * -np.log(p[hard])
    return total / len(f), np.array(classes), t


def batch(rows=21, classes=2, seed=0):
    rng = np.random.default_rng(seed)
    logits = 2.0 * rng.normal(size=(rows, classes))
    return logits, rng.dirichlet(2.0 * np.arange(1, classes + 1), rows)


@pytest.mark.parametrize("convention", ["released", "paper", "argmax"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.75, 1.0])
def test_the_equation(convention, alpha):
    for seed in range(4):
        logits, weak = batch(seed=seed)
        expected, classes, t = by_hand(logits, weak, alpha, convention)
        loss, aux = conf_loss(logits, weak, alpha=alpha, convention=convention)
        assert_allclose(loss, expected, rtol=1e-5)
        assert_array_equal(np.argmax(aux["hard"], axis=1), classes)
        if convention != "argmax":
            assert_allclose(aux["threshold"], t, rtol=1e-5)


def test_hardened_classes_are_as_frequent_as_weak_labels():
    logits, _ = batch(1000)
    logits += np.array([[3.0, 0.0]])  # a student that nearly always says 0
    for share in (0.2, 0.5, 0.9):
        weak = np.tile([[1.0 - share, share]], (1000, 1))
        hard = conf_loss(logits, weak)[1]["hard"]
        assert_allclose(np.mean(hard[:, 1]), share, atol=2e-3)
    halves = conf_loss(logits, weak, convention="paper")[1]["hard"]
    assert_allclose(np.mean(halves[:, 1]), 0.5, atol=2e-3)
    own = conf_loss(logits, weak, convention="argmax")[1]["hard"]
    assert np.mean(own[:, 1]) < 0.2


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_gradient_is_predictions_less_a_mixed_target(alpha):
    logits, weak = batch()
    _, classes, _ = by_hand(logits, weak, alpha, "released")
    f = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    target = (1 - alpha) * weak + alpha * np.eye(2)[classes]
    got = jax.grad(lambda x: conf_loss(x, weak, alpha=alpha)[0])(logits)
    assert_allclose(got, (f - target) / len(f), rtol=1e-4, atol=1e-7)


def test_three_classes_want_argmax():
    logits, weak = batch(classes=3)
    expected, _, _ = by_hand(logits, weak, 0.4, "argmax")
    loss, aux = conf_loss(logits, weak, alpha=0.4, convention="argmax")
    assert_allclose(loss, expected, rtol=1e-5)
    assert_allclose(loss, jnp.mean(aux["per_example"]), rtol=1e-6)
    with pytest.raises(ValueError, match="'logits' has 3 classes"):
        conf_loss(logits, weak)


def test_masked_examples_have_no_say_in_the_threshold():
    logits, weak = batch()
    where = np.arange(21) % 3 != 0
    part, _ = conf_loss(logits[where], weak[where], alpha=0.5)
    spoilt = np.where(where[:, None], logits, np.nan)
    whole, aux = conf_loss(spoilt, weak, alpha=0.5, where=where)
    assert_allclose(whole, part, rtol=1e-6)
    nothing, _ = conf_loss(logits, weak, where=np.zeros(21, bool))
    assert nothing == 0.0 and aux["hard"].shape == (21, 2)


def test_one_example_is_class_zero():
    logits, weak = batch(1)
    assert conf_loss(logits, weak)[1]["hard"].tolist() == [[1.0, 0.0]]


def test_weight_jumps_as_released_and_is_a_line_in_the_paper():
    progress = np.linspace(0.0, 1.0, 101)
    released = [(1.0 if p > 0.1 else p) * 0.5 for p in progress]
    got = confidence_weight(progress, alpha=0.5)
    assert_allclose(got, released, atol=1e-6)
    line = confidence_weight(progress, warmup=0.2, convention="paper")
    assert_allclose(line, 0.75 * np.minimum(progress / 0.2, 1.0), atol=1e-6)


def test_recovered_gap():
    ones = jnp.ones(4)
    student = jnp.array([0.6, 0.8, 0.7, 0.5])
    got = pgr(0.6 * ones, student, 0.8 * ones)
    assert_allclose(got, [0.0, 1.0, 0.5, -0.5], atol=1e-6)
    assert pgr(ones[0], 2.0 * ones[0], ones[0]) == 0.0  # no gap
    # The same for performances that count errors, of which fewer are better.
    assert_allclose(pgr(1 - 0.6 * ones, 1 - student, 1 - 0.8 * ones), got, atol=1e-6)


def test_agreement_where_the_supervisor_is_wrong():
    rng = np.random.default_rng(0)
    student, weak, labels = rng.integers(0, 3, (3, 200))
    where = rng.random(200) < 0.7
    got, aux = agreement(student, weak, labels, where=where)
    same, wrong = (student == weak)[where], (weak != labels)[where]
    assert_allclose(got, same.mean(), rtol=1e-6)
    assert_allclose(aux["when_wrong"], same[wrong].mean(), rtol=1e-6)
    assert_allclose(aux["when_right"], same[~wrong].mean(), rtol=1e-6)
    perfect, aux = agreement(labels, labels, labels)
    assert perfect == 1.0 and aux["when_wrong"] == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: conf_loss(x, y, alpha=1.5), "'alpha' is 1.5"),
        (lambda x, y: conf_loss(x, y, axis_name="no"), "'axis_name' is 'no'"),
        (lambda x, y: confidence_weight(x, warmup=0.0), "'warmup' is 0"),
        (lambda x, y: confidence_weight(x, alpha=-0.1), "'alpha' is -0.1"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*batch())
