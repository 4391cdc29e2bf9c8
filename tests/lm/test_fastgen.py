"""Profiles, caches and decoding against lists of tokens, head by head, in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.fastgen import (
    POLICIES,
    PUNCTUATION,
    SPECIAL,
    decode_step,
    prefill,
    profile_heads,
)
from jaxzoo.nn.generate import generate
from jaxzoo.nn.head_cache import cache_bytes
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer

PROMPT, NEW, WIDTH = 12, 7, 4


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def chosen(name, present, kinds, scores, count, prompt, r_f, r_l):
    """The set of positions that a policy keeps of `present`, by its name."""
    parts, keep = name.split("+"), set()
    for part in parts:
        if part == "full":
            keep |= set(present)
        elif part == "special":
            keep |= {j for j in present if kinds[j] == SPECIAL}
        elif part == "punctuation":
            keep |= {j for j in present if kinds[j] == PUNCTUATION}
        elif part == "frequent":
            by_score = sorted(present, key=lambda j: -scores[j])
            keep |= set(by_score[: math.ceil(round(r_f * count, 6))])
        elif part == "local":
            keep |= {j for j in present if count - j <= math.ceil(r_l * prompt - 1e-9)}
    return keep


def distance(q, k, name, kinds, r_f, r_l):
    """Equation 1: the map of compressed keys against the map of all, one head.

    Total variation, mean over queries; a query has its own key beside the policy's.
    """
    length = len(q)
    logits = q @ k.T / math.sqrt(q.shape[1])
    logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
    full = softmax(logits)
    scores = full.sum(axis=0)
    everything = list(range(length))
    without = "+".join(p for p in name.split("+") if p != "local") or "none"
    columns = chosen(without, everything, kinds, scores, length, length, r_f, r_l)
    total = 0.0
    for i in range(length):
        keep = columns | {i}
        if "local" in name.split("+"):
            near = math.ceil(r_l * length - 1e-9)
            keep |= {j for j in range(i + 1) if i - j <= near}
        mask = np.array([j in keep for j in everything])
        total += (
            0.5 * np.abs(full[i] - softmax(np.where(mask, logits[i], -np.inf))).sum()
        )
    return total / length, full


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    shape = (2, PROMPT + NEW, 4, WIDTH)
    q, k, v = 1.5 * rng.normal(size=(3, *shape))
    kinds = rng.choice([0, 0, 0, PUNCTUATION], size=shape[:2])
    kinds[:, 0] = SPECIAL
    return q, k, v, kinds


def prompt_of(case, **knobs: Any):
    q, k, v, kinds = case
    arrays: Any = [jnp.asarray(x[:, :PROMPT], jnp.float32) for x in (q, k, v)]
    return prefill(*arrays, kinds=jnp.asarray(kinds[:, :PROMPT]), **knobs)


def step_of(case, t, cache):
    q, k, v, kinds = case
    arrays: Any = [jnp.asarray(x[:, t : t + 1], jnp.float32) for x in (q, k, v)]
    kinds = jnp.asarray(kinds[:, t : t + 1])
    return decode_step(*arrays, kinds=kinds, cache=cache)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 0.95])
def test_profile_is_the_cheapest_policy_within_the_distance(case, threshold):
    q, k, _, kinds = case
    _, cache = prompt_of(case, slots=PROMPT, recovery=threshold)
    lost = np.zeros((2, 4, 5))
    maps = np.zeros((2, 4, PROMPT, PROMPT))
    for b in range(2):
        for n in range(4):
            for c in range(5):
                lost[b, n, c], maps[b, n] = distance(
                    q[b, :PROMPT, n], k[b, :PROMPT, n], POLICIES[c], kinds[b], 0.3, 0.3
                )
    recovered, aux = profile_heads(
        jnp.asarray(maps, jnp.float32), jnp.asarray(kinds[:, :PROMPT]),
        recovery=threshold,
    )  # fmt: skip
    assert_allclose(aux["lost"], lost, atol=2e-6)
    expected = [[next(c for c in range(5) if x[c] <= 1 - threshold) for x in row]
                for row in lost]  # fmt: skip
    assert_array_equal(aux["policy"], expected)
    assert_array_equal(cache.policy, expected)
    assert_allclose(cache.recovered, recovered, atol=2e-6)
    assert np.all(1 - np.asarray(recovered) <= 1 - threshold + 1e-6)
    assert_allclose(aux["scores"], maps.sum(axis=2), rtol=1e-5)


def test_thresholds_choose_different_policies_for_different_heads():
    """One head for each policy, made by hand."""
    length = 20
    kinds = np.zeros((1, length), int)
    kinds[0, 0], kinds[0, 3] = SPECIAL, PUNCTUATION
    maps = np.zeros((5, length, length))
    for i in range(length):
        maps[0, i, 0] += 1.0  # special
        maps[1, i, 3 if i >= 3 else 0] += 1.0  # punctuation
        maps[2, i, min(i, 5)] += 1.0  # one frequent token
        maps[3, i, max(i - 2, 0)] += 1.0  # two before
        maps[4, i, : i + 1] += 1.0 / (i + 1)  # everywhere
    _, aux = profile_heads(jnp.asarray(maps[None], jnp.float32), jnp.asarray(kinds))
    assert_array_equal(aux["policy"], [[0, 1, 2, 3, 4]])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("r_f", "r_l"), [(0.3, 0.3), (0.15, 0.5)])
def test_decoding_is_that_of_lists_of_tokens(case, name, r_f, r_l):
    """Each head keeps a list; what is evicted never comes back."""
    q, k, v, kinds = case
    policy = jnp.full((2, 4), POLICIES.index(name))
    knobs = {"frequent_ratio": r_f, "local_ratio": r_l, "policy": policy}
    mixed, cache = prompt_of(case, slots=PROMPT + NEW, **knobs)
    after_prompt, caches, outputs = mixed, [cache], []
    for t in range(PROMPT, PROMPT + NEW):
        mixed, cache = step_of(case, t, cache)
        caches.append(cache)
        outputs.append(mixed[:, 0])
    for b in range(2):
        for n in range(4):
            lost, full = distance(
                q[b, :PROMPT, n], k[b, :PROMPT, n], name, kinds[b], r_f, r_l
            )
            assert_allclose(after_prompt[b, :, n], full @ v[b, :PROMPT, n], atol=1e-5)
            assert_allclose(caches[0].recovered[b, n], 1 - lost, atol=2e-6)
            scores = np.zeros(PROMPT + NEW)
            scores[:PROMPT] = full.sum(axis=0)
            present = chosen(
                name, list(range(PROMPT)), kinds[b], scores, PROMPT, PROMPT, r_f, r_l
            )
            for t in range(PROMPT, PROMPT + NEW):
                held = caches[t - PROMPT].positions[b, n]
                assert set(np.asarray(held[held >= 0]).tolist()) == present
                seen = sorted(present | {t})
                weights = softmax(k[b, seen, n] @ q[b, t, n] / math.sqrt(WIDTH))
                scores[seen] += weights
                expected = weights @ v[b, seen, n]
                assert_allclose(outputs[t - PROMPT][b, n], expected, atol=1e-5)
                present = chosen(name, seen, kinds[b], scores, t + 1, PROMPT, r_f, r_l)


def test_heads_of_one_call_have_policies_of_their_own(case):
    mixture = jnp.array([[0, 3, 4, 6], [2, 5, 7, 1]])
    _, cache = prompt_of(case, slots=PROMPT + NEW, policy=mixture)
    _, cache = step_of(case, PROMPT, cache)
    for b in range(2):
        for n in range(4):
            _, alone = prompt_of(
                case, slots=PROMPT + NEW, policy=jnp.full((2, 4), mixture[b, n])
            )
            _, alone = step_of(case, PROMPT, alone)
            assert_array_equal(cache.positions[b, n], alone.positions[b, n])


def test_slots_of_evicted_tokens_are_used_again(case):
    """A window lives in one more slot than it has tokens."""
    policy = jnp.full((2, 4), POLICIES.index("local"))
    small = prompt_of(case, slots=5, policy=policy)[1]  # 0.3 of 12 is 4, rounded up
    large = prompt_of(case, slots=PROMPT + NEW, policy=policy)[1]
    for t in range(PROMPT, PROMPT + NEW):
        got, small = step_of(case, t, small)
        expected, large = step_of(case, t, large)
        assert_allclose(got, expected, atol=1e-6)
        assert np.all(np.sum(small.positions >= 0, axis=-1) == 4)


def test_what_does_not_fit_is_nan_and_nothing_else(case):
    policy = jnp.array([[4, 0, 5, 0], [4, 0, 5, 0]])
    _, cache = prompt_of(case, slots=PROMPT, policy=policy)
    mixed, _ = step_of(case, PROMPT, cache)
    assert np.all(np.isnan(mixed[:, 0, 0])) and np.all(np.isfinite(mixed[:, 0, 1:]))
    _, cache = prompt_of(case, slots=PROMPT - 1, policy=policy)
    mixed, _ = step_of(case, PROMPT, cache)
    assert np.all(np.isnan(mixed[:, 0, 0])) and np.all(np.isfinite(mixed[:, 0, 1:]))


def test_queries_that_share_a_key_share_its_cache(case):
    q, k, v, kinds = case
    arrays: Any = [
        jnp.asarray(x[:, :PROMPT], jnp.float32) for x in (q, k[:, :, :2], v[:, :, :2])
    ]
    kinds = jnp.asarray(kinds[:, :PROMPT])
    mixed, cache = prefill(*arrays, kinds=kinds, slots=PROMPT)
    repeated: Any = [jnp.repeat(x, 2, axis=2) for x in arrays[1:]]
    expected, apart = prefill(arrays[0], *repeated, kinds=kinds, slots=PROMPT)
    assert_allclose(mixed, expected, atol=1e-5)
    everything = jnp.full((2, 2), 4)
    _, cache = prefill(*arrays, kinds=kinds, slots=PROMPT, policy=everything)
    _, apart = prefill(
        arrays[0], *repeated, kinds=kinds, slots=PROMPT, policy=jnp.full((2, 4), 4)
    )
    means = apart.scores.reshape(2, 2, 2, PROMPT).mean(axis=2)
    assert_allclose(cache.scores, means, atol=1e-5)


def language(threshold):
    """A model around a threshold; None: the transformer's own cache."""
    kind_of = jnp.zeros(9, int).at[0].set(SPECIAL).at[1].set(PUNCTUATION)
    tokens = jax.random.randint(jax.random.key(0), (2, 10), 1, 9).at[:, 0].set(0)
    body = Transformer(16, 2, 4)
    params = LanguageModel(9, 16, body).init(jax.random.key(1), tokens)

    def model(cache: Any, tokens: jax.Array) -> Any:
        kinds = kind_of[tokens]

        def attend(q, k, v, cache):
            if tokens.shape[1] == 1:
                return decode_step(q, k, v, kinds, cache)
            return prefill(q, k, v, kinds, slots=20, recovery=threshold)

        body = Transformer(16, 2, 4, attend=None if threshold is None else attend)
        return LanguageModel(9, 16, body).apply(params, tokens, cache)

    start = body.empty_cache(2, 20) if threshold is None else None
    return generate(
        jax.random.key(2), model, tokens, state=start, num_tokens=10, temperature=0.7
    )


def test_a_threshold_of_one_writes_what_the_full_cache_writes():
    expected, aux = language(None)
    got, full = language(1.0)
    assert_array_equal(got, expected)
    assert_allclose(full["log_prob"], aux["log_prob"], atol=1e-5)
    assert np.all(full["state"].policy == 4)
    _, small = language(0.5)
    entries, everything = (
        np.sum(x["state"].positions >= 0, axis=-1) for x in (small, full)
    )
    assert everything.shape == (2, 2, 4) and np.all(everything == 19)
    assert entries.sum() < everything.sum()
    assert_allclose(cache_bytes(jnp.asarray(everything), width=4), 2 * 2 * 4 * 19 * 16)


def test_a_tiny_loss_is_no_exact_recovery():
    """1 - 1e-9 is 1 in float32, and a threshold of 1 means all."""
    attention = jnp.eye(4).at[3, 1].set(1e-9)[None, None]
    kinds = jnp.array([[SPECIAL, 0, 0, 0]])
    knobs = {"frequent_ratio": 0.0, "local_ratio": 0.0}
    assert profile_heads(attention, kinds, recovery=1.0, **knobs)[1]["policy"] == 4
    assert profile_heads(attention, kinds, recovery=0.99, **knobs)[1]["policy"] == 0


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"recovery": 1.5}, "'recovery' is 1.5"),
        ({"frequent_ratio": -0.1}, "'frequent_ratio' is -0.1"),
        ({"local_ratio": 2.0}, "'local_ratio' is 2.0"),
        ({"slots": 0}, "'slots' is 0"),
        ({"policy": jnp.full((2, 4), 8)}, "'policy' is 8"),
    ],
)
def test_bad_numbers_are_named(case, knobs, message):
    with pytest.raises(ValueError, match=message):
        prompt_of(case, **({"slots": 12} | knobs))


def test_heads_that_do_not_divide_are_named():
    q, k = jnp.ones((1, 3, 4, 2)), jnp.ones((1, 3, 3, 2))
    with pytest.raises(ValueError, match="'q' has 4 heads"):
        prefill(q, k, k, jnp.zeros((1, 3), int), slots=3)
