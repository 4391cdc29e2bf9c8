"""Random logits, their softmax in float64, and counts that may come from it."""

import numpy as np
from numpy.testing import assert_allclose


def logits(seed, *shape, scale=1.5):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def softmax(x):
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def assert_drawn_from(counts, probs):
    """No count is five standard deviations off; what cannot be is never drawn."""
    total = counts.sum()
    assert_allclose(probs.sum(), 1, rtol=1e-6)
    assert np.all(counts[probs == 0] == 0)
    spread = np.sqrt(total * probs * (1 - probs))
    assert np.all(np.abs(counts - total * probs) <= 5 * spread + 1)
