"""The cascades of FuseMax against softmax in float64, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from jaxzoo.lm.fusemax import attention, attention_cascade
from jaxzoo.nn.cascade_cost import pass_count
from jaxzoo.nn.einsum_cascade import Cascade, Einsum, execute

EVERY = [(n, late) for n in (3, 2, 1) for late in (False, True)]


def inputs(keys=12, scale=1.0, seed=0):
    rng = np.random.Generator(np.random.Philox(key=seed))
    shapes = {"Q": (4, 5), "K": (4, keys), "V": (3, keys)}
    return {name: scale * rng.standard_normal(s) for name, s in shapes.items()}


def softmax_attention(q, k, v):
    """AV [f, p] of Q [e, p], K [e, m] and V [f, m], in float64."""
    scores = k.T @ q
    weights = np.exp(scores - scores.max(axis=0))
    return v @ (weights / weights.sum(axis=0))


@pytest.mark.parametrize("passes, late", EVERY)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_every_cascade_is_softmax_attention(passes, late, scale):
    tensors = inputs(scale=scale)
    expected = softmax_attention(*tensors.values())
    for tile in (1, 4, 12):
        cascade = attention_cascade(passes, tile, late)
        with jax.enable_x64(True):
            assert_allclose(execute(cascade, tensors), expected, rtol=1e-12)
        small = {name: x.astype(np.float32) for name, x in tensors.items()}
        assert_allclose(execute(cascade, small), expected, atol=1e-5 * scale)


def without(cascade, name, **changes):
    """A cascade less a step, with others put in place of those of the same output."""
    steps = [changes.get(s.output.split("[")[0], s) for s in cascade.steps]
    return cascade._replace(
        steps=tuple(s for s in steps if not s.output.startswith(name + "["))
    )


def test_without_its_correction_the_running_maximum_is_wrong():
    kept = Einsum("RD[m1+1,p]", ("SLD[m1,p]", "RD[m1,p]"), "plus")
    tensors = inputs()
    cascade = without(attention_cascade(1, 4), "SPD", RD=kept)
    expected = softmax_attention(*tensors.values())
    assert np.abs(execute(cascade, tensors) - expected).max() > 0.01


def test_deleting_the_maximum_leaves_two_passes():
    """Softmax without it, Einsums 26 to 28."""
    bare = Einsum("SN[m,p]", ("QK[m,p]",), "exp")
    cascade = without(attention_cascade(3), "GM", SN=bare)
    assert pass_count(cascade, "m") == 2
    tensors = inputs()
    assert_allclose(
        execute(cascade, tensors), softmax_attention(*tensors.values()), atol=1e-5
    )


def test_execute_under_jit_gives_the_gradient_of_softmax_attention():
    tensors = {name: jnp.asarray(x, jnp.float32) for name, x in inputs().items()}

    def plain(t):
        weights = jax.nn.softmax(t["K"].T @ t["Q"], axis=0)
        return jnp.sum(jnp.sin(t["V"] @ weights))

    expected = jax.grad(plain)(tensors)
    for passes in (3, 2, 1):
        cascade = attention_cascade(passes, 4)
        loss = jax.jit(lambda t, c=cascade: jnp.sum(jnp.sin(execute(c, t))))
        got = jax.grad(loss)(tensors)
        for name in tensors:
            assert_allclose(got[name], expected[name], atol=1e-5)


def test_an_iterative_rank_is_a_recurrence():
    """The paper's prefix sum, read at its end, next to a product of all elements."""
    steps = (
        Einsum("S[i+1]", ("S[i]", "A[i]"), "plus"),
        Einsum("T[i+1]", ("T[i]", "S[i+1]"), "times"),
        Einsum("Z[]", ("T[I]",)),
    )
    cascade = Cascade(("A[k]",), steps, "Z[]", (("S", 0.0), ("T", 1.0)))
    a = np.array([1.0, 2.0, -0.5, 3.0])
    expected = np.prod(np.cumsum(a))
    assert_allclose(execute(cascade, {"A": a}), expected, rtol=1e-6)
    assert pass_count(cascade, "k") == pass_count(cascade, "i") == 1


def test_every_operator_and_broadcast():
    a, b = np.array([[1.0, -2.0], [0.5, 4.0], [3.0, 1.0]]), np.array([2.0, -1.0])
    maps = {
        "plus": a + b, "minus": a - b, "times": a * b, "divide": a / b,
        "max": np.maximum(a, b), "sub_exp": np.exp(a - b),
    }  # fmt: skip
    for name, expected in maps.items():
        for reduce, of_rows in (("add", np.sum), ("max", np.max)):
            step = Einsum("C[j]", ("A[i,j]", "B[j]"), name, reduce)
            cascade = Cascade(("A[i,j]", "B[j]"), (step,), "C[j]")
            got = execute(cascade, {"A": a, "B": b})
            assert_allclose(got, of_rows(expected, axis=0), rtol=1e-6)
    for name, expected in (("take", a.T), ("exp", np.exp(a.T))):
        cascade = Cascade(("A[i,j]",), (Einsum("C[j,i]", ("A[i,j]",), name),), "C[j,i]")
        assert_allclose(execute(cascade, {"A": a}), expected, rtol=1e-6)


@pytest.mark.parametrize("passes", [3, 2, 1])
def test_attention_is_that_of_jax(passes):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 3, 4))
    got = attention(q, k, v, passes=passes, tile=2, scale=0.5)
    expected = jax.nn.dot_product_attention(q, k, v, scale=0.5)
    assert_allclose(got, expected, atol=1e-6)
