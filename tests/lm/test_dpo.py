"""The losses in float64, the policy that is best in a bandit, and sorted pairs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxzoo.lm.dpo import dpo_loss, optimal_policy, plackett_luce_loss


def s(x):
    return 1.0 / (1.0 + np.exp(-x))


def expected(loss, c, r, b, e):
    """Each pair's loss, of log-ratios in float64."""
    h = c - r
    d = np.mean(b * np.concatenate([c, r]))
    if loss == "exo":
        e = e or 1e-3
        p = np.stack([s(b * h), s(-b * h)])
        q = np.array([1 - e, e])[:, None]
        return np.sum(p * np.log(p / q), axis=0)
    if loss == "aot":
        h = np.sort(c) - np.sort(r)
    m = s(b * h / 0.05)
    return {
        "sigmoid": -(1 - e) * np.log(s(b * h)) - e * np.log(s(-b * h)),
        "aot": -(1 - e) * np.log(s(b * h)) - e * np.log(s(-b * h)),
        "robust": (-(1 - e) * np.log(s(b * h)) + e * np.log(s(-b * h))) / (1 - 2 * e),
        "hinge": np.maximum(0, 1 - b * h),
        "ipo": (h - 1 / (2 * b)) ** 2,
        "nca": -np.log(s(b * c)) - 0.5 * np.log(s(-b * c)) - 0.5 * np.log(s(-b * r)),
        "bco": -np.log(s(b * c - d)) - np.log(s(-(b * r - d))),
        "sppo": (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
        "apo_zero": 1 - s(b * c) + s(b * r),
        "apo_down": s(b * c) + 1 - s(b * (c - r)),
        "discopop": -np.log(s(b * h)) * (1 - m) + np.exp(-b * h) * m,
    }[loss]


LOSSES: Any = (
    "sigmoid robust hinge ipo exo nca bco sppo apo_zero apo_down aot discopop".split()
)


def pairs(seed=0, batch=8):
    rng = np.random.default_rng(seed)
    return -10.0 + 2.0 * rng.normal(size=(4, batch))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_in_float64(loss: Any):
    policy_c, policy_r, ref_c, ref_r = pairs()
    args = [jnp.asarray(x, jnp.float32) for x in (policy_c, policy_r, ref_c, ref_r)]
    for e in (0.0, 0.2):
        value, aux = dpo_loss(*args, beta=0.3, loss=loss, label_smoothing=e)
        wanted = expected(loss, policy_c - ref_c, policy_r - ref_r, 0.3, e)
        np.testing.assert_allclose(aux["per_example"], wanted, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(value, wanted.mean(), rtol=2e-5)


def test_what_is_masked_is_as_if_it_were_not_there():
    keep = np.arange(8) % 3 != 1
    few = [jnp.asarray(x[keep], jnp.float32) for x in pairs()]
    spoilt = [jnp.asarray(np.where(keep, x, np.nan), jnp.float32) for x in pairs()]
    for loss in LOSSES:
        value, aux = dpo_loss(*few, loss=loss)
        got, seen = dpo_loss(*spoilt, loss=loss, where=jnp.asarray(keep))
        np.testing.assert_allclose(got, value, rtol=1e-6)
        np.testing.assert_allclose(seen["accuracy"], aux["accuracy"])


def test_at_the_reference_it_is_log_two_and_without_reference_that_is_zero():
    policy_c, policy_r, ref_c, ref_r = (jnp.asarray(x, jnp.float32) for x in pairs())
    value, aux = dpo_loss(policy_c, policy_r, policy_c, policy_r)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert aux["accuracy"] == 0 and not aux["margin"].any()
    zeros = jnp.zeros_like(ref_c)
    assert (
        dpo_loss(policy_c, policy_r)[0] == dpo_loss(policy_c, policy_r, zeros, zeros)[0]
    )


def test_the_gradient_weighs_pairs_by_how_wrong_the_reward_is():
    args = [jnp.asarray(x, jnp.float32) for x in pairs()]
    (up, down), aux = jax.grad(dpo_loss, (0, 1), has_aux=True)(*args, beta=0.5)
    np.testing.assert_allclose(up, -0.5 * aux["weight"] / 8, rtol=1e-5)
    np.testing.assert_allclose(down, 0.5 * aux["weight"] / 8, rtol=1e-5)


def test_divergences_in_float64():
    policy_c, policy_r, ref_c, ref_r = pairs()
    args = [jnp.asarray(x, jnp.float32) for x in (policy_c, policy_r, ref_c, ref_r)]
    u, v = np.exp(policy_c - ref_c), np.exp(policy_r - ref_r)
    # f'(u) of f = u log u, -log u, and u log u - (u + 1) log((u + 1) / 2).
    slopes: Any = {
        "reverse_kl": np.log(u / v),
        "forward_kl": 1 / v - 1 / u,
        "js": np.log(u / (1 + u)) - np.log(v / (1 + v)),
    }
    for divergence, margin in slopes.items():
        value, _ = dpo_loss(*args, divergence=divergence)
        np.testing.assert_allclose(value, np.mean(-np.log(s(0.1 * margin))), rtol=1e-5)


def test_lengths_make_means_over_tokens():
    args = [jnp.asarray(x, jnp.float32) for x in pairs()]
    lengths = (jnp.arange(1.0, 9.0), jnp.full(8, 2.0))
    got, _ = dpo_loss(*args, loss="ipo", lengths=lengths)
    means = [x / n for x, n in zip(args, lengths * 2, strict=True)]
    np.testing.assert_allclose(got, dpo_loss(*means, loss="ipo")[0], rtol=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js"])
def test_the_minimiser_in_a_bandit_is_the_optimal_policy(divergence: Any):
    """All pairs with their Bradley-Terry probabilities, of five arms."""
    rng = np.random.default_rng(0)
    reward, reference = rng.normal(size=5), np.log(rng.dirichlet(np.ones(5)))
    beta, n = 0.5, 5
    first, second = (x.ravel() for x in np.meshgrid(range(n), range(n)))
    weight = jnp.asarray(s(reward[first] - reward[second]), jnp.float32)
    ref = jnp.asarray(reference, jnp.float32)

    def loss(logits):
        policy = jax.nn.log_softmax(logits)
        args = policy[first], policy[second], ref[first], ref[second]
        _, aux = dpo_loss(*args, beta=beta, divergence=divergence)
        return jnp.sum(weight * aux["per_example"])

    tx = optax.lbfgs()

    def step(carry, _):
        logits, state = carry
        value, slope = optax.value_and_grad_from_state(loss)(logits, state=state)
        updates, state = tx.update(
            slope, state, logits, value=value, grad=slope, value_fn=loss
        )
        return (optax.apply_updates(logits, updates), state), None

    start = (ref, tx.init(ref))
    (logits, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 60))(start)
    policy = np.asarray(jax.nn.softmax(logits), np.float64)
    if divergence == "reverse_kl":
        best = np.exp(reference + reward / beta)
        best /= best.sum()
        np.testing.assert_allclose(policy, best, atol=1e-3)
        log_policy, aux = optimal_policy(
            ref, jnp.asarray(reward, jnp.float32), beta=beta
        )
        np.testing.assert_allclose(jnp.exp(log_policy), best, rtol=1e-5)
        kl = np.sum(best * np.log(best / np.exp(reference)))
        np.testing.assert_allclose(aux["kl"], kl, rtol=1e-5)
        np.testing.assert_allclose(aux["reward"], best @ reward, rtol=1e-5)
    else:
        # f'(pi / pi_ref) is the reward up to a constant.
        u = policy / np.exp(reference)
        slope = -1 / u if divergence == "forward_kl" else np.log(u / (1 + u))
        rest = beta * slope - reward
        np.testing.assert_allclose(rest, rest.mean(), atol=2e-2)


def test_rankings_by_their_definition_and_pairs_as_a_special_case():
    policy, reference = np.random.default_rng(1).normal(size=(2, 3, 4)) - 9
    r = 0.3 * (policy - reference)
    wanted = np.zeros(3)
    for k in range(4):
        wanted -= np.log(np.exp(r[:, k]) / np.exp(r[:, k:]).sum(1))
    args = jnp.asarray(policy, jnp.float32), jnp.asarray(reference, jnp.float32)
    value, aux = plackett_luce_loss(*args, beta=0.3)
    np.testing.assert_allclose(aux["per_example"], wanted, rtol=1e-5)
    np.testing.assert_allclose(value, wanted.mean(), rtol=1e-5)
    two = plackett_luce_loss(args[0][:, :2], args[1][:, :2])[0]
    pair = dpo_loss(*(x[:, i] for x in args for i in (0, 1)))[0]
    np.testing.assert_allclose(two, pair, rtol=1e-6)


@pytest.mark.parametrize("loss", ["aot", "bco"])
def test_what_looks_at_the_whole_batch_does_so_on_a_mesh(loss: Any):
    args = [jnp.asarray(x, jnp.float32) for x in pairs(batch=16)]
    keep = jnp.arange(16) % 5 != 0
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def value(*args, axis_name=None):
        return dpo_loss(*args[:4], where=args[4], loss=loss, axis_name=axis_name)[0]

    mapped = jax.shard_map(
        lambda *args: value(*args, axis_name="data"), mesh=mesh,
        in_specs=(P("data"),) * 5, out_specs=P(),
    )  # fmt: skip
    got = jax.jit(jax.value_and_grad(mapped, (0, 1)))(*args, keep)
    wanted = jax.value_and_grad(value, (0, 1))(*args, keep)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_extreme_rewards_keep_gradients_finite():
    args = [1e4 * jnp.asarray(x, jnp.float32) for x in pairs()]
    for loss in LOSSES:
        gradient = jax.grad(lambda *a, n=loss: dpo_loss(*a, loss=n)[0], (0, 1))(*args)
        assert all(np.all(np.isfinite(g)) for g in gradient), loss
    assert dpo_loss(*args, where=jnp.zeros(8, bool))[0] == 0


def test_a_sweep_over_beta_is_one_program():
    pairs = np.random.default_rng(5).normal(size=(4, 6)).astype(np.float32)
    betas = jnp.array([0.1, 1.0, 10.0])
    swept = jax.jit(jax.vmap(lambda beta: dpo_loss(*pairs, beta=beta)[0]))(betas)
    each = [dpo_loss(*pairs, beta=beta)[0] for beta in (0.1, 1.0, 10.0)]
    np.testing.assert_allclose(swept, each, rtol=1e-6)


def test_bad_input_is_named():
    args = [jnp.asarray(x, jnp.float32) for x in pairs()]
    for name, value in (("beta", 0.0), ("beta", -1.0), ("label_smoothing", 0.5)):
        with pytest.raises(ValueError, match=f"'{name}'"):
            dpo_loss(*args, **{name: value})
    with pytest.raises(TypeError, match="'policy_rejected'"):
        dpo_loss(args[0], args[1][:4])
    with pytest.raises(ValueError, match="'loss' is 'dpo'"):
        dpo_loss(*args, loss="dpo")  # pyright: ignore
