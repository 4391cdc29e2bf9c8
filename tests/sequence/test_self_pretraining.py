"""What is hidden, and the loss of what was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxzoo.sequence.self_pretraining import denoising_loss, hide_tokens


def test_each_token_is_hidden_with_the_rate_and_no_other_changes():
    tokens = jnp.tile(jnp.arange(20), (400, 1))
    may = jnp.tile(jnp.arange(20) < 15, (400, 1))
    seen, hidden = hide_tokens(
        jax.random.key(0), tokens, rate=0.3, vocabulary=99, where=may
    )
    assert (np.asarray(seen)[np.asarray(hidden)] == 99).all()
    assert (np.asarray(seen == tokens) == ~np.asarray(hidden)).all()
    assert not hidden[:, 15:].any()
    share = np.asarray(hidden[:, :15]).mean(axis=0)
    assert np.abs(share - 0.3).max() < 4.5 * (0.3 * 0.7 / 400) ** 0.5
    # Independently: neighbours are hidden together as often as chance has it.
    both = np.asarray(hidden[:, :14] & hidden[:, 1:15]).mean()
    assert abs(both - 0.09) < 4.5 * (0.09 * 0.91 / (400 * 14)) ** 0.5


def test_the_loss_is_the_mean_over_what_was_hidden():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(3, 5, 7)), rng.integers(0, 7, (3, 5))
    where = rng.random((3, 5)) < 0.5
    loss, aux = denoising_loss(
        jnp.float32(logits), jnp.asarray(tokens), where=jnp.asarray(where)
    )
    log_total = np.log(np.exp(logits).sum(-1))
    own = np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    expected = log_total - own
    assert loss == pytest.approx(expected[where].mean(), rel=1e-6)
    np.testing.assert_allclose(aux["per_token"], expected * where, atol=1e-6)
    right = logits.argmax(-1) == tokens
    assert aux["accuracy"] == pytest.approx(right[where].mean())
    everything, _ = denoising_loss(jnp.float32(logits), jnp.asarray(tokens))
    assert everything == pytest.approx(expected.mean(), rel=1e-6)


def test_nothing_hidden_is_a_loss_of_0():
    logits, none = jnp.ones((2, 3, 4)), jnp.zeros((2, 3), bool)
    value = jax.value_and_grad(lambda x: denoising_loss(x, none + 0, where=none)[0])
    loss, slope = value(jnp.full_like(logits, jnp.nan))
    assert loss == 0 and (slope == 0).all()
    with pytest.raises(ValueError, match="'rate' is 1.5"):
        hide_tokens(jax.random.key(0), none + 0, rate=1.5, vocabulary=0)
