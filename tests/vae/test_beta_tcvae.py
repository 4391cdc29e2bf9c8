"""The decomposition and the gap against quadrature, loops and known answers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import logsumexp
from scipy.stats import norm

from jaxzoo.vae.beta_tcvae import beta_tcvae_loss, kl_decomposition, mig

NAMES = ("mutual_information", "total_correlation", "dimension_wise_kl")


def posteriors(rows: int = 6, latents: int = 2, seed: int = 0) -> Any:
    """z, mean and log_std; latents go together, so that TC is not small."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(rows, 1))
    mean = shared + 0.5 * rng.normal(size=(rows, latents))
    log_std = -0.7 + 0.2 * rng.normal(size=(rows, latents))
    z = mean + np.exp(log_std) * rng.normal(size=mean.shape)
    return z, mean, log_std


def by_loops(z, mean, log_std, weight) -> dict[str, list[float]]:
    """Terms per example; `weight(n, m)` is that of q(z_n|x_m) in the sum."""
    rows, latents = z.shape
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for n in range(rows):
        log_q = norm.logpdf(z[n], mean, np.exp(log_std))
        own = [np.log(weight(n, m)) for m in range(rows)]
        joint: Any = logsumexp([own[m] + log_q[m].sum() for m in range(rows)])
        product: Any = 0.0
        for j in range(latents):
            product += logsumexp([own[m] + log_q[m, j] for m in range(rows)])
        found[NAMES[0]].append(log_q[n].sum() - joint)
        found[NAMES[1]].append(joint - product)
        found[NAMES[2]].append(product - norm.logpdf(z[n]).sum())
    return found


def stratified(rows: int, total: int):
    """Appendix C: M others, the last of which has (N - M) / (N M)."""

    def weight(n: int, m: int) -> float:
        if m == n:
            return 1 / total
        size = rows - 1
        return (total - size) / (total * size) if m == (n + 1) % rows else 1 / size

    return weight


@pytest.mark.parametrize("method", ["weighted", "stratified", "full"])
def test_terms_and_loss_are_those_of_the_equations(method):
    z, mean, log_std = posteriors()
    total = 6 if method == "full" else 40
    weight = {
        "weighted": lambda n, m: 1 / (40 * 6),
        "stratified": stratified(6, 40),
        "full": lambda n, m: 1 / 6,
    }[method]
    expected = by_loops(z, mean, log_std, weight)
    log_likelihood = np.linspace(-3.0, -1.0, 6)
    with jax.enable_x64(True):
        loss, aux = beta_tcvae_loss(
            log_likelihood, z, mean, log_std, num_data=total, alpha=0.5, beta=4.0,
            gamma=2.0, method=method,
        )  # fmt: skip
    for name in NAMES:
        assert_allclose(aux[name], expected[name], rtol=1e-10)
    parts = [np.asarray(expected[name]) for name in NAMES]
    whole = -log_likelihood + 0.5 * parts[0] + 4.0 * parts[1] + 2.0 * parts[2]
    assert_allclose(aux["per_example"], whole, rtol=1e-10)
    assert_allclose(loss, whole.mean(), rtol=1e-10)


def test_parts_are_those_of_quadrature():
    _, mean, log_std = posteriors(rows=4, seed=1)
    std = np.exp(log_std)
    grid = np.linspace(-8.0, 8.0, 801)
    step = grid[1] - grid[0]
    each = norm.pdf(grid[None, :, None], mean[:, None], std[:, None])  # [n, grid, 2]
    joint = np.einsum("na,nb->nab", each[..., 0], each[..., 1])
    q, marginal = joint.mean(0), each.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = joint * (np.log(joint) - np.log(q)[None])
        correlation = q * (
            np.log(q) - np.log(marginal[:, :1]) - np.log(marginal[:, 1:]).T
        )
        apart = marginal * (np.log(marginal) - norm.logpdf(grid)[:, None])
    exact = [
        np.nansum(inside) / 4 * step**2, np.nansum(correlation) * step**2,
        np.nansum(apart) * step,
    ]  # fmt: skip
    kl = np.mean(np.sum((mean**2 + std**2 - 1) / 2 - log_std, axis=1))
    assert_allclose(sum(exact), kl, rtol=1e-6)
    assert min(exact) > 0.1
    value, aux = kl_decomposition(jax.random.key(0), mean, log_std, num_samples=20_000)
    assert_allclose([aux[name] for name in NAMES], exact, atol=0.01)
    assert abs(value - kl) < 4 * aux["stderr"] < 0.04
    assert_allclose(value, sum(aux[name] for name in NAMES), rtol=1e-5)


def test_stratified_sampling_has_no_bias_and_weighted_is_too_low():
    """Of q(z) over all batches of 3 of 6 with their first row fixed."""
    z, mean, log_std = posteriors(rows=6, latents=1, seed=2)
    exact = norm.pdf(z[0, 0], mean[:, 0], np.exp(log_std[:, 0])).mean()
    pairs = [(a, b) for a in range(1, 6) for b in range(1, 6) if a != b]
    batches = np.array([(0, a, b) for a, b in pairs])
    own = norm.logpdf(z[0, 0], mean[0, 0], np.exp(log_std[0, 0]))
    found, methods = {}, ("stratified", "weighted")
    with jax.enable_x64(True):
        for method in methods:

            def information(z, mean, log_std, method: Any = method):
                return beta_tcvae_loss(
                    jnp.zeros(3), z, mean, log_std, num_data=6, method=method
                )[1]["mutual_information"][0]

            arrays = [a[batches] for a in (z, mean, log_std)]
            got = jax.jit(jax.vmap(information))(*arrays)
            found[method] = np.exp(own - np.asarray(got)).mean()
    assert_allclose(found["stratified"], exact, rtol=1e-10)
    assert found["weighted"] < 0.9 * exact


def test_equal_weights_give_the_sampled_kl_and_beta_counts_total_correlation_alone():
    z, mean, log_std = posteriors(rows=8, latents=3, seed=3)
    log_p = np.zeros(8)
    ratio = norm.logpdf(z, mean, np.exp(log_std)) - norm.logpdf(z)
    with jax.enable_x64(True):

        def loss(beta):
            return beta_tcvae_loss(log_p, z, mean, log_std, num_data=50, beta=beta)

        one, aux = loss(1.0)
        nine = loss(9.0)[0]
    assert_allclose(one, ratio.sum(axis=1).mean(), rtol=1e-10)
    correlation = np.asarray(aux["total_correlation"]).mean()
    assert_allclose(nine - one, 8 * correlation, rtol=1e-8)
    assert abs(correlation) > 0.1


def test_total_correlation_is_invariant_to_scales_and_0_for_a_product():
    a, b = np.meshgrid([-2.0, 0.0, 2.0], [-1.0, 3.0])
    mean = np.stack([a.ravel(), b.ravel()], axis=1)  # a grid: q(z) is a product
    z = mean + np.random.default_rng(4).normal(size=mean.shape)
    with jax.enable_x64(True):

        def correlation(z, mean, log_std):
            zero = np.zeros(len(z))
            aux = beta_tcvae_loss(zero, z, mean, log_std, method="full")[1]
            return np.asarray(aux["total_correlation"])

        assert_allclose(correlation(z, mean, np.zeros((6, 2))), 0.0, atol=1e-12)
        arrays = posteriors(seed=5)
        plain = correlation(*arrays)
        scale = np.array([[3.0, 0.2]])
        moved = correlation(
            scale * arrays[0] + 1, scale * arrays[1] + 1, arrays[2] + np.log(scale)
        )
    assert_allclose(moved, plain, rtol=1e-9)


def test_gap_is_that_of_quadrature():
    rng = np.random.default_rng(6)
    factors = np.stack([np.repeat([0, 1, 2], 4), np.tile([0, 1], 6)], axis=1)
    mean = np.stack([1.5 * factors[:, 0], factors[:, 1], factors[:, 0] / 2], axis=1)
    mean = mean + 0.1 * rng.normal(size=mean.shape)
    log_std = np.full(mean.shape, -0.9)
    grid = np.linspace(-5.0, 8.0, 2001)
    each = norm.pdf(grid[None, :, None], mean[:, None], np.exp(log_std)[:, None])

    def entropy(density):
        return -np.sum(density * np.log(density + 1e-300), axis=0) * (grid[1] - grid[0])

    expected = np.zeros((3, 2))
    for k in range(2):
        levels = np.unique(factors[:, k])
        given = [entropy(each[factors[:, k] == v].mean(axis=0)) for v in levels]
        expected[:, k] = entropy(each.mean(axis=0)) - np.mean(given, axis=0)
    keys = jax.random.split(jax.random.key(0), 4000)
    one = jax.vmap(lambda k: mig(k, mean, log_std, factors)[1]["information"])
    information = np.asarray(jax.jit(one)(keys)).mean(axis=0)
    assert_allclose(information, expected, atol=0.01)
    score, aux = mig(keys[0], mean, log_std, factors)
    best = np.sort(np.asarray(aux["information"]), axis=0)[::-1]
    gaps = (best[0] - best[1]) / np.log([3.0, 2.0])
    assert_allclose(aux["gap"], gaps, rtol=1e-5)
    assert_allclose(score, gaps.mean(), rtol=1e-5)


def test_gap_is_1_for_a_code_that_is_the_factors_and_0_for_two_copies():
    factors = np.stack([np.repeat([0, 1, 2], 4), np.tile([0, 1, 2, 3], 3)], axis=1)
    low = np.full((12, 3), -3.0)
    code = np.concatenate([factors, np.zeros((12, 1))], axis=1)
    score, aux = mig(jax.random.key(0), code, low, factors, num_samples=12)
    assert_allclose(score, 1.0, atol=1e-4)
    copies = np.stack([factors[:, 0]] * 3, axis=1).astype(float)
    assert abs(mig(jax.random.key(0), copies, low, factors)[0]) < 1e-4
    # A factor that does not vary has no gap and spoils nothing.
    still = np.concatenate([factors[:, :1], np.zeros((12, 1), int)], axis=1)
    score, aux = mig(jax.random.key(0), code, low, still)
    assert_allclose(aux["gap"], [1.0, 0.0], atol=1e-4)


def test_bad_numbers_are_named():
    arrays: Any = np.zeros(4), *np.zeros((3, 4, 2))
    key, thin = jax.random.key(0), np.zeros((4, 1))
    with pytest.raises(ValueError, match="'num_data' is 3"):
        beta_tcvae_loss(*arrays, num_data=3)
    with pytest.raises(ValueError, match="'num_data' is 5"):
        beta_tcvae_loss(*arrays, num_data=5, method="full")
    with pytest.raises(ValueError, match="'beta' is -1.0"):
        beta_tcvae_loss(*arrays, beta=-1.0)
    with pytest.raises(ValueError, match="is 1, expected a number >= 2"):
        beta_tcvae_loss(*[a[:1] for a in arrays], num_data=9, method="stratified")
    with pytest.raises(ValueError, match="'num_samples' is 5"):
        mig(key, arrays[2], arrays[3], thin.astype(int), num_samples=5)
    with pytest.raises(ValueError, match="is 1, expected a number >= 2"):
        mig(key, thin, thin, thin.astype(int))
