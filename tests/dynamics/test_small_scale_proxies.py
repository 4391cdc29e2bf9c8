"""Sensitivity, logits, fits and the optimizer against float64 of the paper's words."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.dynamics.small_scale_proxies import (
    extrapolate,
    first_unstable_rate,
    independent_adamw,
    lr_sensitivity,
    max_attention_logit,
    scale_by_fan_in,
)
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer, rotary

RNG = np.random.default_rng(0)


def single(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32)


def test_sensitivity_by_loops():
    losses, initial = 1.5 + 4 * RNG.random((3, 2, 7)), 3 + RNG.random((3, 2))
    got = lr_sensitivity(losses.astype(np.float32), initial.astype(np.float32))
    for place in np.ndindex(3, 2):
        best = min(losses[place])
        terms = [min(loss, initial[place]) - best for loss in losses[place]]
        assert_allclose(got[place], sum(terms) / 7, rtol=1e-5)


def test_what_diverged_counts_as_untrained():
    losses = jnp.array([2.0, 1.0, 50.0, jnp.nan, jnp.inf])
    assert_allclose(lr_sensitivity(losses, jnp.array(5.0)), (1 + 0 + 4 + 4 + 4) / 5)
    assert lr_sensitivity(jnp.full(7, 1.3), jnp.array(5.0)) == 0.0
    with pytest.raises(TypeError, match="'initial'"):
        lr_sensitivity(jnp.ones((2, 3)), jnp.ones(3))


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_largest_logit_by_loops(is_causal):
    q, k = RNG.normal(size=(2, 6, 4, 3)), RNG.normal(size=(2, 6, 2, 3))
    got = max_attention_logit(
        q.astype(np.float32), k.astype(np.float32), is_causal=is_causal
    )
    for row in range(2):
        logits = [
            q[row, t, n] @ k[row, s, n // 2] / np.sqrt(3)
            for t in range(6) for s in range(6) for n in range(4)
            if s <= t or not is_causal
        ]  # fmt: skip
        assert_allclose(got[row], max(logits), rtol=1e-5)


def test_the_transformer_keeps_what_it_is_measured_on():
    """Without norms logits are theirs; with norms they are within their bound."""
    tokens = jax.random.randint(jax.random.key(0), (2, 5), 0, 11)
    found = {}
    for qk_norm in (False, True):
        body = Transformer(8, 2, 2, qk_norm=qk_norm, implementation="ref")
        model = LanguageModel(11, 8, body)
        params = model.init(jax.random.key(1), tokens)
        loud: Any = jax.tree_util.tree_map_with_path(
            lambda path, x: 100.0 * x if "'query'" in str(path) else x, params
        )
        _, kept = model.apply(loud, tokens, mutable="intermediates")
        kept: Any = kept["intermediates"]["body"]["blocks"]
        (q,), (k,) = kept["queries"], kept["keys"]
        assert q.shape == (2, 2, 5, 2, 4)  # blocks first
        found[qk_norm] = max_attention_logit(q, k)
        if not qk_norm:
            x = loud["params"]["embedding"][tokens]
            x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
            block = loud["params"]["body"]["blocks"]
            places = jnp.tile(jnp.arange(5), (2, 1))
            first = [
                rotary((x @ block[name]["kernel"][0]).reshape(2, 5, 2, 4), places)
                for name in ("query", "key")
            ]
            assert_allclose(found[False][0], max_attention_logit(*first), rtol=1e-4)
    assert (found[False] > 20).all()
    assert (found[True] <= np.sqrt(4.0) + 1e-3).all()


def test_a_quadratic_is_found_again():
    sizes = np.array([2.4e6, 9.4e6, 2e7, 4e7, 8.4e7, 1.5e8, 3.1e8, 1.2e9])
    x = np.log(sizes)
    coefficients = np.array([[3.0, -0.4, 0.02], [-40.0, 3.1, -0.05], [1.0, 0.5, 0.0]])
    values = np.exp(coefficients @ np.stack([x**0, x, x**2]))
    at = 4.8e9
    expected = np.exp(coefficients @ [1, np.log(at), np.log(at) ** 2])
    got = extrapolate(sizes.astype(np.float32), values.astype(np.float32), at)
    assert_allclose(got, expected, rtol=1e-3)


def test_least_squares_is_numpys():
    sizes = np.array([1e3, 4e3, 1e4, 7e4, 3e5])
    values = np.exp(RNG.normal(size=(4, 5)))
    got = extrapolate(sizes.astype(np.float32), values.astype(np.float32), 1e6)
    for row, value in zip(values, got, strict=True):
        fit = np.polyfit(np.log(sizes), np.log(row), 2)
        assert_allclose(value, np.exp(np.polyval(fit, np.log(1e6))), rtol=1e-3)


def test_the_unstable_rate_is_predicted_from_smaller_models():
    """Logits that grow with rate and size: the next size breaks one rate earlier."""
    rates, sizes = single([1e-3, 1e-2, 1e-1]), single([1e6, 1e7, 1e8])
    logits = 3e6 * rates[:, None] * (sizes / 1e8)[None]
    assert_array_equal(
        first_unstable_rate(rates, logits.T), single([np.inf, 1e-1, 1e-2])
    )
    ahead = extrapolate(sizes, logits, 1e9)
    assert_allclose(ahead, 3e7 * rates, rtol=1e-3)
    assert first_unstable_rate(rates, ahead) == np.float32(1e-3)
    assert first_unstable_rate(rates, single([1, 2, np.nan])) == np.float32(0.1)


def of_the_paper(p, grads, rates, peak, decay, b1=0.9, b2=0.95, eps=1e-8):
    """Adam with a decay that the schedule alone scales, in float64."""
    m = v = np.zeros_like(p)
    for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        p = p - rate * step - rate / peak * decay * p
    return p


def run(optimizer, p, grads) -> Any:
    state = optimizer.init(p)
    for g in grads:
        updates, state = optimizer.update(g, state, p)
        p = optax.apply_updates(p, updates)
    return p


def test_decay_is_that_of_the_schedule_for_every_peak():
    start, grads = RNG.normal(size=(3, 4)), RNG.normal(size=(5, 3, 4))
    shape = np.array([0.0, 0.5, 1.0, 0.6, 0.2])

    def at(peak):
        def schedule(step):
            return peak * jnp.asarray(shape, jnp.float32)[step]

        optimizer = independent_adamw(schedule, peak=peak, weight_decay=0.1)
        return run(
            optimizer, jnp.asarray(start, jnp.float32), jnp.asarray(grads, jnp.float32)
        )

    # The peaks of a grid are one array.
    peaks = jnp.array([1e-3, 0.3])
    found: Any = jax.vmap(at)(peaks)
    for peak, got in zip(np.array(peaks), found, strict=True):
        expected = of_the_paper(start, grads, peak * shape, peak, 0.1)
        assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    constant = independent_adamw(0.3, weight_decay=0.1)
    got = run(
        constant, jnp.asarray(start, jnp.float32), jnp.asarray(grads, jnp.float32)
    )
    expected = of_the_paper(start, grads, np.full(5, 0.3), 0.3, 0.1)
    assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_without_gradients_weights_shrink_alike_under_all_rates():
    still = jnp.zeros((10, 2))
    for rate in (1e-4, 1.0):
        got = run(independent_adamw(rate, weight_decay=0.01), jnp.ones(2), still)
        assert_allclose(got, 0.99**10, rtol=1e-5)


def test_matrices_are_scaled_by_their_fan_in():
    updates = {
        "embedding": jnp.ones((256, 8)),
        "head": jnp.ones((8, 256)),
        "blocks": {"kernel": jnp.ones((3, 32, 8)), "scale": jnp.ones((3, 8))},
    }
    optimizer = scale_by_fan_in(base=16)
    got: Any = optimizer.update(updates, optimizer.init(updates))[0]
    assert (got["head"] == 2.0).all() and (got["blocks"]["kernel"] == 0.5).all()
    assert (got["embedding"] == 1.0).all() and (got["blocks"]["scale"] == 1.0).all()


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'sizes' has 2"):
        extrapolate(jnp.ones(2), jnp.ones((1, 2)), 3.0)
    with pytest.raises(ValueError, match="'at' is 0"):
        extrapolate(jnp.ones(3), jnp.ones(3), 0.0)
    with pytest.raises(ValueError, match="'threshold' is 0"):
        first_unstable_rate(jnp.ones(3), jnp.ones(3), threshold=0.0)
    with pytest.raises(ValueError, match="'keys' has 2 heads"):
        max_attention_logit(jnp.ones((4, 3, 2)), jnp.ones((4, 2, 2)))
    with pytest.raises(ValueError, match="'peak' is None"):
        independent_adamw(lambda step: 0.1)
    with pytest.raises(ValueError, match="'base' is 0"):
        scale_by_fan_in(base=0)
