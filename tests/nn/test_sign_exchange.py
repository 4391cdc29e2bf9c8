"""Signs as bits, and a mean of signs by loops over tensors, workers and servers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.nn.sign_exchange import mean_of_signs, no_errors, pack_signs, unpack_signs

TREE = {"a": (3, 7), "b": (), "c": (20,)}


def test_signs_survive_packing():
    x = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    x[0, :3] = 0.0, -0.0, np.nan
    packed = pack_signs(x)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, 3)
    assert_array_equal(unpack_signs(packed), np.where(x >= 0, 1.0, -1.0))
    assert pack_signs(jnp.ones(9)).tolist() == [255, 128]


def said(x, leaves, alive, power):
    """C(x): signs times the scale of each tensor's living entries."""
    out = np.zeros_like(x)
    for leaf in set(leaves):
        at = (leaves == leaf) & alive
        if np.any(at):
            scale = np.mean(np.abs(x[at]) ** power) ** (1 / power)
            out[at] = np.where(x[at] >= 0, scale, -scale)
    return out


@pytest.mark.parametrize("workers, power", [(1, 1), (3, 2), (4, 1)])
def test_two_messages_are_the_mean_of_what_was_said(workers, power):
    rng = np.random.default_rng(workers)
    leaves = np.repeat(np.arange(3), [21, 1, 20])
    alive = rng.random(42) < 0.7
    x, error = rng.normal(size=(2, workers, 42)).astype(np.float32)
    start = jax.eval_shape(
        jax.vmap(functools.partial(no_errors, axis_name="d"), axis_name="d"),
        {name: jnp.zeros((workers, *shape)) for name, shape in TREE.items()},
    )
    chunk = 8 * -(-42 // (8 * workers))
    assert [e.shape for e in start] == [(workers, workers * chunk), (workers, chunk)]
    fill = workers * chunk - 42
    answer = rng.normal(size=42).astype(np.float32)

    def tree(rows):
        cut = np.split(rows, [21, 22], axis=-1)
        return {
            name: part.reshape((*rows.shape[:-1], *shape))
            for part, (name, shape) in zip(cut, TREE.items(), strict=True)
        }

    exchange = functools.partial(mean_of_signs, power=power, axis_name="d")
    got, left, server, sent = jax.jit(jax.vmap(exchange, axis_name="d"))(
        tree(x), tree(np.tile(alive, (workers, 1))), np.pad(error, ((0, 0), (0, fill))),
        np.pad(answer, (0, fill)).reshape(workers, chunk),
    )  # fmt: skip

    c = np.stack([said(row, leaves, alive, power) for row in x + error])
    s = c.mean(0) + answer
    mean = np.zeros(42, np.float32)
    for i in range(workers):
        part = slice(i * chunk, (i + 1) * chunk)
        mean[part] = said(s[part], leaves[part], alive[part], power)
    for name, wanted in tree(mean).items():
        for row in np.asarray(got[name]):
            assert_allclose(row, wanted, rtol=1e-5, atol=1e-6)
    assert_allclose(left[:, :42], np.where(alive, x + error - c, 0), 1e-5, 1e-6)
    assert_allclose(server.reshape(-1)[:42], np.where(alive, s - mean, 0), 1e-5, 1e-6)
    assert not np.any(left[:, 42:])
    tensors = 3  # that a chunk meets, at most
    assert_array_equal(sent, 2 * (workers - 1) * (chunk // 8 + 4 * tensors))
