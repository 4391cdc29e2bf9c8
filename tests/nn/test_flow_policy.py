"""The policy against its layers by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose

from jaxzoo.nn.flow_policy import FlowPolicy


def test_logits_and_flow_are_two_parts_of_one_output():
    x, state = jax.random.normal(jax.random.key(0), (2, 4, 3, 2))
    net = FlowPolicy((3, 2), (5,))
    variables = net.init(jax.random.key(1), x[:, 0], state)
    output: Any = net.apply(variables, x[:, 0], state)
    logits, flow = output
    flat = np.concatenate([x[:, 0], np.reshape(state, (4, 6))], axis=1)
    params = jax.tree.map(np.asarray, variables["params"])
    first, last = (params[f"Dense_{i}"] for i in range(2))
    hidden = np.maximum(flat @ first["kernel"] + first["bias"], 0.0)
    out = hidden @ last["kernel"] + last["bias"]
    assert_allclose(flow, out[:, 0], rtol=1e-5, atol=1e-6)
    assert_allclose(logits, out[:, 1:].reshape(4, 3, 2), rtol=1e-5, atol=1e-6)


def test_inputs_of_any_shape_are_flattened():
    x = jnp.ones((2, 3, 4))
    net: Any = FlowPolicy((2, 2))
    variables = net.init(jax.random.key(0), x)
    for same in (x.reshape(2, 12), x.reshape(2, 2, 6)):
        logits, _ = net.apply(variables, same)
        assert_allclose(logits, net.apply(variables, x)[0])
