"""The rate at which the devices would do all the arithmetic they can."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxzoo.training import program
from jaxzoo.training.chips import chip
from jaxzoo.training.program import full_rate
from jaxzoo.training.step import init_state, update_step


@pytest.fixture
def step_and_state():
    def loss(params, key, batch):
        value = jnp.sum((batch @ params["w"]) ** 2)
        return value, {"loss": value}

    optimizer = optax.sgd(0.1)
    params = {"w": jnp.ones((64, 32))}
    return update_step(loss, optimizer), init_state(
        jax.random.key(0), params, optimizer
    )


STACKED = np.zeros((5, 16, 64), np.float32)  # five steps of sixteen examples


def test_a_cpu_has_no_known_peak(step_and_state):
    step, state = step_and_state
    assert full_rate(step, state, STACKED) == 0.0


def test_it_is_the_peak_over_the_flops_of_one_step(step_and_state, monkeypatch):
    h100 = chip("NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(program, "chip", lambda kind: h100)
    step, state = step_and_state
    rate = full_rate(step, state, STACKED)
    # The product and its gradient by the weights, two FLOPs a multiply-add; the rest
    # is elementwise.
    products = 2 * 2 * 16 * 64 * 32
    assert h100 is not None
    assert h100.flops / (1.2 * products) < rate < h100.flops / products
