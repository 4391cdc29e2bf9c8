"""Groups of attention against the definition, adapters and FLOPs against the paper."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.core.tree import named_leaves
from jaxzoo.lm.longlora import (
    LongLoRAParams,
    forward_flops,
    longlora_params,
    merge_longlora,
    s2_attention,
)
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer
from pallas_kernels.attention import attention, shifted_groups


def drawn(key, length=16, heads=4, key_heads=4, width=6) -> Any:
    shapes = [(2, length, n, width) for n in (heads, key_heads, key_heads)]
    keys = jax.random.split(key, 3)
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


def one_by_one(q, k, v, group, *, is_shifted=True, wraps=False):
    """Query by query: which keys are in its group, and their softmax."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, width = q.shape
    out = np.zeros_like(q)
    for b in range(batch):
        for n in range(heads):
            own = n // (heads // k.shape[2])
            shift = group // 2 if is_shifted and n >= heads // 2 else 0
            for t in range(length):
                start = (t - shift) % length
                order = [(start // group * group + j + shift) for j in range(group)]
                seen = []
                for place in order:
                    s = place % length
                    if wraps or place < length or t < shift:
                        seen.append(s)
                    if s == t:
                        break
                if not wraps and t < shift:
                    seen = [s for s in seen if s <= t]
                logits = k[b, seen, own] @ q[b, t, n] / np.sqrt(width)
                weights = np.exp(logits - logits.max())
                out[b, t, n] = weights / weights.sum() @ v[b, seen, own]
    return out


@pytest.mark.parametrize("group", [2, 4, 8, 16])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_groups_by_the_definition(key, group, key_heads):
    arrays = drawn(key, key_heads=key_heads)
    assert_allclose(
        s2_attention(*arrays, group=group), one_by_one(*arrays, group=group), atol=1e-5
    )
    still = s2_attention(*arrays, group=group, is_shifted=False)
    expected = one_by_one(*arrays, group=group, is_shifted=False)
    assert_allclose(still, expected, atol=1e-5)
    rolled = s2_attention(*arrays, group=group, convention="paper")
    assert_allclose(rolled, one_by_one(*arrays, group=group, wraps=True), atol=1e-5)


@pytest.mark.parametrize("key_heads", [2, 4])
def test_it_is_attention_with_the_segments_of_shifted_groups(key, key_heads):
    arrays = drawn(key, key_heads=key_heads)
    ids = shifted_groups(16, 4, 8, key_heads=key_heads)

    def by_segments(*arrays):
        return attention(
            *arrays, is_causal=True, segment_ids=ids, implementation="ref"
        )  # fmt: skip

    def by_groups(*arrays):
        return s2_attention(*arrays, group=8)

    assert_allclose(by_groups(*arrays), by_segments(*arrays), atol=1e-5)
    weights = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32))
    weights = weights.reshape(arrays[0].shape)
    one, other = (
        jax.grad(lambda x, f=f: jnp.sum(weights * f(*x)))(arrays)
        for f in (by_groups, by_segments)
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), one, other)


def test_a_group_of_all_tokens_is_full_attention(key):
    arrays = drawn(key)
    full = attention(*arrays, is_causal=True, implementation="ref")
    whole = s2_attention(*arrays, group=16, is_shifted=False)
    assert_allclose(whole, full, atol=1e-5)
    # Shifted, the heads that stay are full, and the others cut in the middle.
    moved = s2_attention(*arrays, group=16)
    assert_allclose(moved[:, :, :2], full[:, :, :2], atol=1e-5)
    assert_allclose(moved[:, :8, 2:], full[:, :8, 2:], atol=1e-5)
    assert np.abs(moved - full)[:, 8:, 2:].max() > 0.1


def reach(convention, is_shifted=True, layers=1):
    """Which tokens each one hears of through some layers, `[T, T]`."""

    def through(x):
        for _ in range(layers):
            k = jnp.zeros_like(x)
            heads = s2_attention(
                k, k, x, group=4, is_shifted=is_shifted, convention=convention
            )  # fmt: skip
            x = jnp.broadcast_to(jnp.mean(heads, axis=2, keepdims=True), x.shape)
        return x[0, :, 0, 0]

    start = jnp.ones((1, 12, 2, 1))
    return np.asarray(jax.jacobian(through)(start)[:, 0].sum((-1, -2))) > 0


def test_shifts_let_groups_hear_of_each_other_and_never_of_the_future():
    for convention in ("released", "paper"):
        still = reach(convention, is_shifted=False, layers=3)
        blocks = np.kron(np.eye(3), np.ones((4, 4)))
        assert_array_equal(still, np.tril(blocks) > 0)
    once, often = reach("released"), reach("released", layers=5)
    assert not np.triu(once, 1).any() and not np.triu(often, 1).any()
    assert not once[11, 0] and often[11, 0] and often[4, 3]
    leak = reach("paper")
    assert leak[0, 11] and not np.triu(leak, 1)[2:].any()


def model_and_params(key):
    model = LanguageModel(16, 8, Transformer(8, 3, 2, implementation="ref"))
    params = model.init(key, jnp.zeros((1, 4), jnp.int32))
    return model, params


def test_what_is_tuned(key):
    _, params = model_and_params(key)
    trainable = longlora_params(key, params, rank=4)
    blocks = "params/body/blocks"
    names = {f"{blocks}/{x}/kernel" for x in ("query", "key", "value", "out")}
    assert set(trainable.low_rank) == names
    for a, b in trainable.low_rank.values():
        assert a.shape == (3, 8, 4) and b.shape == (3, 4, 8)
        assert not b.any() and 0.9 / 8**0.5 < jnp.max(jnp.abs(a)) <= 1 / 8**0.5
        assert abs(jnp.std(a) * 8**0.5 * 3**0.5 - 1) < 0.2
    assert set(trainable.whole) == {
        "params/embedding", f"{blocks}/norm_1/scale", f"{blocks}/norm_2/scale",
        "params/body/norm/scale",
    }  # fmt: skip
    assert not longlora_params(key, params, whole=()).whole


def test_the_model_is_what_it_was_and_then_what_lora_says(key):
    model, params = model_and_params(key)
    trainable = longlora_params(key, params, rank=4)
    tokens = jax.random.randint(key, (2, 6), 0, 16)
    same = merge_longlora(params, trainable)
    jax.tree.map(assert_array_equal, same, params)
    noise = jax.random.normal(key, (3, 4, 8))
    name = "params/body/blocks/value/kernel"
    a = trainable.low_rank[name][0]
    low_rank = trainable.low_rank | {name: (a, noise)}
    whole = {n: 2.0 * x for n, x in trainable.whole.items()}
    merged = merge_longlora(params, LongLoRAParams(low_rank, whole), alpha=16.0)
    before, after = named_leaves(params), named_leaves(merged)
    update = np.stack([
        4.0 * np.asarray(x, np.float64) @ np.asarray(y, np.float64)
        for x, y in zip(a, noise, strict=True)
    ])  # fmt: skip
    assert_allclose(after[name], before[name] + update, atol=1e-5)
    assert_allclose(after["params/embedding"], 2.0 * before["params/embedding"])
    assert_array_equal(
        after["params/body/blocks/gate/kernel"],
        before["params/body/blocks/gate/kernel"],
    )

    def loss(trainable):
        logits, _ = model.apply(merge_longlora(params, trainable), tokens)
        return jnp.mean(jnp.square(logits))

    gradient = jax.grad(loss)(trainable)
    # At the start the gradient of A is 0, and those of B and of the rest are not.
    for a, b in gradient.low_rank.values():
        assert not a.any() and b.any()
    assert all(x.any() for x in gradient.whole.values())


def test_flops_of_the_paper():
    """Llama 2 7B, in TFLOPs at 8192 and 65536 tokens."""
    llama = {"width": 4096, "depth": 32, "hidden": 11008, "vocabulary": 32000}
    lengths = jnp.array([8192, 65536])
    total, full = forward_flops(lengths, **llama)
    _, first = forward_flops(lengths[:1], group=2048, **llama)
    _, second = forward_flops(lengths[1:], group=16384, **llama)
    expected = {
        "attention": (35.2, 2251.8),
        "projections": (35.2, 281.5),
        "feed_forward": (70.9, 567.4),
        "head": (2.1, 17.2),
    }
    for name, values in expected.items():
        assert_allclose(full[name] / 1e12, values, atol=0.06)
    assert_allclose(total[0] / 1e12, 143.5, atol=0.1)
    assert_allclose(first["attention"] / full["attention"][:1], 0.25)
    assert_allclose(second["attention"] / full["attention"][1:], 0.25)
    assert_allclose(first["scores"], 8192 * 2048)
    short, _ = forward_flops(jnp.array(16), group=64, **llama)
    assert_allclose(short, forward_flops(jnp.array(16), **llama)[0])


def test_bad_arguments_are_named(key):
    arrays = drawn(key)
    for group in (3, 6):
        with pytest.raises(ValueError, match=f"'group' is {group}"):
            s2_attention(*arrays, group=group)
    with pytest.raises(ValueError, match="'q' and 'k' have 4 and 3 heads"):
        s2_attention(*drawn(key, key_heads=3), group=4)
    _, params = model_and_params(key)
    with pytest.raises(ValueError, match="'targets' is"):
        longlora_params(key, params, targets=("q_proj",))
    trainable = longlora_params(key, params)
    with pytest.raises(ValueError, match="'trainable' has 'params/"):
        merge_longlora({"other": jnp.ones(3)}, trainable)
