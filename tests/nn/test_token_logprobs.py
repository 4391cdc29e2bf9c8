"""Log-probabilities by chunks of the vocabulary, against the dense and in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxzoo.nn.token_logprobs import target_logprobs, token_kl, token_logprobs

V, D = 40, 8
NAMES = ("logp", "entropy", "logsumexp")


def inputs(seed=0, columns=V, dtype: Any = jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    hidden = jax.random.normal(keys[0], (2, 3, D)).astype(dtype)
    head = (2.0 * jax.random.normal(keys[1], (D, columns))).astype(dtype)
    return hidden, head, jax.random.randint(keys[2], (2, 3), 0, columns)


def dense(hidden, head, targets):
    """All logits at once, by jax's own log-softmax."""
    logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
    logs = jax.nn.log_softmax(logits)
    logp = jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    return logp, entropy, total, jnp.argmax(logits, -1)


def ours(hidden, head, targets, **kwargs):
    logp, aux = token_logprobs(hidden, head, targets, **kwargs)
    return logp, aux["entropy"], aux["logsumexp"], aux["top"]


def weighted(function, *args, **kwargs):
    """A scalar that each number of the first three results enters with its weight."""
    values = function(*args, **kwargs)[:3]
    weight = jnp.cos(jnp.arange(18.0)).reshape(3, 2, 3)
    return jnp.sum(jnp.stack(values) * weight)


@pytest.mark.parametrize("chunk", [1, 7, 16, 40, 1000])
def test_values_and_gradients_equal_the_dense_ones(chunk):
    hidden, head, targets = inputs()
    got = ours(hidden, head, targets, chunk=chunk)
    wanted = dense(hidden, head, targets)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(functools.partial(weighted, ours, chunk=chunk), (0, 1))
    expected = jax.grad(functools.partial(weighted, dense), (0, 1))(*inputs())
    for a, b in zip(gradient(hidden, head, targets), expected, strict=True):
        # Relative to the largest: sums over the vocabulary cancel in small entries.
        atol = 1e-5 * max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


def test_against_numpy_in_float64():
    hidden, head, targets = (np.asarray(x) for x in inputs(1))
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    picked = np.take_along_axis(np.log(p), targets[..., None], -1)[..., 0]
    logp, aux = token_logprobs(hidden, head, targets, chunk=16)
    np.testing.assert_allclose(logp, picked, rtol=1e-5)
    np.testing.assert_allclose(aux["entropy"], -(p * np.log(p)).sum(-1), rtol=1e-5)
    with jax.enable_x64(True):
        args = tuple(jnp.asarray(x, jnp.float64) for x in (hidden, head))
        check_grads(
            lambda h, w: weighted(ours, h, w, targets, chunk=16), args, order=1,
            modes=("rev",), rtol=1e-6,
        )  # fmt: skip


def test_kl_and_its_gradients_equal_the_dense_ones():
    (hidden, head, _), (other, other_head, _) = inputs(0), inputs(1)

    def plain(hidden, head, other, other_head):
        p, q = (
            jax.nn.log_softmax(a @ b) for a, b in ((hidden, head), (other, other_head))
        )
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    args = (hidden, head, other, other_head)
    weight = jnp.cos(jnp.arange(6.0)).reshape(2, 3)
    for chunk in (7, 40):
        by_chunks = functools.partial(token_kl, chunk=chunk)
        np.testing.assert_allclose(by_chunks(*args), plain(*args), rtol=1e-5)
        got, wanted = (
            jax.grad(lambda *a, f=f: jnp.sum(weight * f(*a)), (0, 1, 2, 3))(*args)
            for f in (by_chunks, plain)
        )
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(token_kl(hidden, head, hidden, head), 0.0, atol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e4, 1e30])
def test_extreme_logits_have_finite_values_and_gradients(size):
    hidden, head, targets = inputs()
    hidden = size * hidden
    logp, aux = token_logprobs(hidden, head, targets, chunk=16)
    assert np.all(np.isfinite(logp)) and np.all(np.isfinite(aux["entropy"]))
    kl = token_kl(hidden, head, -hidden, head, chunk=16)
    assert np.all(np.isfinite(kl))
    for function in (
        lambda h, w: weighted(ours, h, w, targets, chunk=16),
        lambda h, w: jnp.sum(token_kl(h, w, -h, w, chunk=16)),
    ):
        for gradient in jax.grad(function, (0, 1))(hidden, head):
            assert np.all(np.isfinite(gradient))


def test_small_floats_accumulate_in_float32():
    hidden, head, targets = inputs(dtype=jnp.bfloat16)
    got = ours(hidden, head, targets, chunk=16)
    exact = dense(hidden.astype(jnp.float32), head.astype(jnp.float32), targets)
    for a, b in zip(got[:3], exact[:3], strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    gradients = jax.grad(functools.partial(weighted, ours, chunk=16), (0, 1))(
        hidden, head, targets
    )
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("check", [True, False])
def test_a_split_vocabulary_gives_value_and_gradient_of_the_whole(devices, check):
    mesh = jax.make_mesh(
        (devices,), ("vocabulary",), axis_types=(AxisType.Auto,),
        devices=jax.devices()[:devices],
    )  # fmt: skip
    (hidden, head, targets), (other, other_head, _) = inputs(), inputs(1)
    split, whole = P(None, "vocabulary"), P()

    def parts(hidden, head, targets, other, other_head):
        results = ours(hidden, head, targets, chunk=3, axis_name="vocabulary")
        kl = token_kl(hidden, head, other, other_head, chunk=3, axis_name="vocabulary")
        return *results, kl

    mapped = jax.shard_map(
        parts, mesh=mesh, in_specs=(whole, split, whole, whole, split),
        out_specs=whole, check_vma=check,
    )  # fmt: skip

    def together(hidden, head, targets, other, other_head):
        return *ours(hidden, head, targets), token_kl(hidden, head, other, other_head)

    args = (hidden, head, targets, other, other_head)
    weight = jnp.cos(jnp.arange(24.0)).reshape(4, 2, 3)

    def scalar(function, *args):
        values = function(*args)
        return jnp.sum(jnp.stack([*values[:3], values[4]]) * weight)

    for a, b in zip(jax.jit(mapped)(*args), together(*args), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    where = (0, 1, 3, 4)
    got = jax.jit(jax.grad(functools.partial(scalar, mapped), where))(*args)
    wanted = jax.grad(functools.partial(scalar, together), where)(*args)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_temporary_memory_is_a_tenth_of_the_dense_at_32000_tokens():
    shapes = (
        jax.ShapeDtypeStruct((512, 64), jnp.float32),
        jax.ShapeDtypeStruct((64, 32000), jnp.float32),
        jax.ShapeDtypeStruct((512,), jnp.int32),
    )

    def bytes_of(function):
        def loss(hidden, head, targets):
            return -jnp.mean(function(hidden, head, targets)[0])

        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        analysis: Any = step.lower(*shapes).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert bytes_of(ours) <= 0.1 * bytes_of(dense)


def test_targets_outside_are_told_or_without_weight():
    hidden, head, targets = inputs()
    wrong = targets.at[0, 1].set(V)
    with pytest.raises(ValueError, match="'targets' holds 40, expected integers from"):
        token_logprobs(hidden, head, wrong)

    def loss(hidden, targets):
        logp, _ = token_logprobs(hidden, head, targets, chunk=16)
        return jnp.sum(jnp.where(jnp.isnan(logp), 0.0, logp)), logp

    gradient, logp = jax.jit(jax.grad(loss, has_aux=True))(hidden, wrong)
    assert np.argwhere(np.isnan(logp)).tolist() == [[0, 1]]
    assert np.all(gradient[0, 1] == 0) and np.all(np.isfinite(gradient))
    checked = checkify.checkify(jax.jit(lambda t: loss(hidden, t)[0]))
    error, _ = checked(wrong)
    assert "outside the vocabulary" in str(error.get())
    assert checked(targets)[0].get() is None


def test_bad_input_is_named():
    hidden, head, targets = inputs()
    with pytest.raises(TypeError, match="'head'"):
        token_logprobs(hidden, head.T, targets)
    with pytest.raises(TypeError, match="'targets'"):
        token_logprobs(hidden, head, targets[..., None])
    with pytest.raises(ValueError, match="'chunk' is 0"):
        token_logprobs(hidden, head, targets, chunk=0)
    with pytest.raises(ValueError, match="'axis_name'"):
        token_logprobs(hidden, head, targets, axis_name="nowhere")


def test_of_logits_it_is_log_softmax(key):
    logits = 9.0 * jax.random.normal(key, (3, 5, 11))
    targets = jax.random.randint(key, (3, 5), 0, 11)

    def dense(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]

    np.testing.assert_allclose(
        target_logprobs(logits, targets), dense(logits), rtol=1e-5
    )
    ours, theirs = (
        jax.grad(lambda x, g=g: jnp.sum(jnp.sin(g(x))))(logits)
        for g in (lambda x: target_logprobs(x, targets), dense)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for size in (1e4, -1e4):
        slope = jax.grad(lambda x: target_logprobs(x, targets).sum())(size * logits)
        assert np.all(np.isfinite(slope))
    with pytest.raises(ValueError, match="'targets' holds 11"):
        target_logprobs(logits, jnp.full((3, 5), 11))


def test_constants_inside_jit_are_looked_at(key):
    hidden, head = jax.random.normal(key, (3, 8)), jax.random.normal(key, (8, 5))
    targets = jnp.array([0, 4, 2])
    wrong = targets + 1
    jax.jit(lambda h: token_logprobs(h, head, targets)[0])(hidden)
    with pytest.raises(ValueError, match="'targets' holds 5"):
        jax.jit(lambda h: token_logprobs(h, head, wrong)[0])(hidden)
