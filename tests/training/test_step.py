"""The fit inside one program, against Adam written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose

from jaxzoo.training.step import descend

STEPS = 20
FALLING = 0.1 * 0.5 * (1 + np.cos(np.pi * np.arange(STEPS) / STEPS))


@pytest.mark.parametrize(
    ("rate", "rates"),
    [
        (0.1, FALLING),
        (optax.constant_schedule(0.1), np.full(STEPS, 0.1)),
        (lambda count: 0.01 * count, 0.01 * np.arange(STEPS)),
    ],
    ids=["falls by a cosine", "constant", "rises"],
)
def test_descend_is_adam_at_these_rates(key, rate, rates):
    def loss(params, key):
        return jnp.sum((params - jax.random.normal(key, (3,))) ** 2) / 2

    start = jnp.array([1.0, -2.0, 0.5])
    got = jax.jit(lambda p: descend(loss, p, rate, key, STEPS))(start)

    targets = jax.vmap(lambda k: jax.random.normal(k, (3,)))(
        jax.random.split(key, STEPS)
    )
    p, m, v = (np.asarray(x, np.float64) for x in (start, 0 * start, 0 * start))
    for t, target in enumerate(np.asarray(targets, np.float64), start=1):
        g = p - target
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - rates[t - 1] * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    # 1 - 0.999^t has five digits in float32.
    assert_allclose(got, p, atol=3e-5)
