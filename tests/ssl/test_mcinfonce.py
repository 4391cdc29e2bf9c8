"""The loss in float64 NumPy, Bessel functions by SciPy, samples by known moments."""

from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.nn.von_mises_fisher import log_bessel, sample_vmf, vmf_log_prob
from jaxzoo.ssl.mcinfonce import credible_retrieval, mcinfonce

KEY = jax.random.key(0)


def directions(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def by_hand(z, positive, negative, c, convention):
    """Minus the log of the mean quotient, example by example; negative [B, M, K, d]."""
    losses = []
    for own, other, rest in zip(z, positive, negative, strict=True):
        quotients = []
        for k in range(len(own)):
            top = np.exp(c * own[k] @ other[k])
            bottom = np.mean([np.exp(c * own[k] @ n[k]) for n in rest])
            if convention == "paper":
                m = len(rest)
                quotients.append(top / ((top + m * bottom) / (m + 1)))
            else:
                quotients.append(top / (top + bottom))
        losses.append(-np.log(np.mean(quotients)))
    return np.array(losses)


Z, POSITIVE = directions(1, 6, 5, 4), directions(2, 6, 5, 4)


@pytest.mark.parametrize("convention", ["official", "paper"])
def test_loss_by_hand(convention):
    given = directions(3, 6, 3, 5, 4)
    others = np.stack([np.delete(POSITIVE, i, axis=0) for i in range(6)])
    options: Any = {"concentration": 7.0, "convention": convention}
    for argument, negative in ((given, given), (None, others)):
        loss, aux = mcinfonce(Z, POSITIVE, argument, **options)
        expected = by_hand(Z, POSITIVE, negative, 7.0, convention)
        assert_allclose(aux["per_example"], expected, rtol=1e-5, atol=2e-6)
        assert_allclose(loss, expected.mean(), rtol=1e-5)
    cosine = np.einsum("bkd,bkd->bk", Z, POSITIVE).mean(1)
    assert_allclose(aux["positive_cosine"], cosine, atol=1e-6)


def test_the_mean_over_samples_is_inside_the_logarithm():
    inside = mcinfonce(Z, POSITIVE, concentration=7.0)[0]
    outside = np.mean(
        [mcinfonce(Z[:, k : k + 1], POSITIVE[:, k : k + 1], concentration=7.0)[0]
         for k in range(5)]
    )  # fmt: skip
    assert inside < outside - 0.1


def test_with_one_sample_the_papers_form_is_info_nce():
    z, positive = Z[:, 0], POSITIVE[:, 0]
    logits = 7.0 * z @ positive.T
    info_nce = np.log(np.exp(logits).sum(1)) - np.diag(logits) - np.log(6)
    loss = mcinfonce(Z[:, :1], POSITIVE[:, :1], concentration=7.0, convention="paper")[
        0
    ]
    assert_allclose(loss, info_nce.mean(), rtol=1e-5)


def test_a_scale_is_learned_and_lengths_do_not_matter():
    loss = partial(mcinfonce, Z, POSITIVE)
    slope = jax.grad(lambda c: loss(concentration=c)[0])(jnp.float32(7.0))
    step = 1e-2
    up, down = (loss(concentration=7.0 + s)[0] for s in (step, -step))
    assert_allclose(slope, (up - down) / (2 * step), rtol=1e-2)
    lengths = 10.0 ** np.random.default_rng(0).uniform(-3, 3, (6, 5, 1))
    scaled = (Z * lengths).astype(np.float32)
    assert_allclose(
        mcinfonce(scaled, POSITIVE, concentration=7.0)[0],
        loss(concentration=7.0)[0],
        rtol=1e-6,
    )


def test_masked_rows_are_neither_anchors_nor_negatives():
    mask = np.array([True, False, True, True, False, True])
    spoilt = np.where(mask[:, None, None], POSITIVE, np.nan)
    loss, aux = mcinfonce(Z, spoilt, where=jnp.asarray(mask))
    expected, _ = mcinfonce(Z[mask], POSITIVE[mask])
    assert_allclose(loss, expected, rtol=1e-6)
    assert_array_equal(aux["per_example"][~mask], 0)
    for kept in (0, 1):  # nobody, and one row without any negative
        where = jnp.arange(6) < kept
        value, gradient = jax.value_and_grad(
            lambda z, where=where: mcinfonce(z, POSITIVE, where=where)[0]
        )(jnp.asarray(Z))
        assert value == 0 and np.all(gradient == 0)


def test_zero_vectors_and_bfloat16():
    def loss(z, positive):
        return mcinfonce(z, positive)[0]

    gradient = jax.grad(loss, (0, 1))
    assert all(
        np.all(np.isfinite(g)) for g in gradient(jnp.zeros(Z.shape), jnp.asarray(Z))
    )
    small = [jnp.asarray(a, jnp.bfloat16) for a in (Z, POSITIVE)]
    assert loss(*small).dtype == jnp.float32
    assert_allclose(loss(*small), loss(*(a.astype(jnp.float32) for a in small)))
    assert gradient(*small)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("order", [0.0, 0.5, 4.0, 14.99, 15.0, 63.0, 255.0])
def test_log_bessel_is_scipys(order):
    x = np.logspace(-6, 9, 80)
    x = x[scipy.special.ive(order, x) > 1e-290]  # SciPy's range ends, ours goes on
    x = x.astype(np.float32).astype(np.float64)
    expected = np.log(scipy.special.ive(order, x)) + x
    single = jnp.asarray(x, jnp.float32)
    got = log_bessel(single, order=order)
    assert_allclose(got, expected, rtol=3e-6, atol=2e-5)
    slope = jax.vmap(jax.grad(partial(log_bessel, order=order)))(single)
    quotient = scipy.special.ive(order + 1, x) / scipy.special.ive(order, x)
    assert_allclose(slope, quotient + order / x, rtol=2e-5, atol=1e-6)


def test_log_bessel_where_scipy_has_no_numbers():
    """Large order: I_n(x) -> (x/2)^n / n!; large x: exp(x) / sqrt(2 pi x)."""
    n = 5000.0
    leading = n * np.log(5.0) - scipy.special.gammaln(n + 1) + 25 / (n + 1)
    assert_allclose(log_bessel(jnp.array(10.0), order=n), leading, rtol=1e-6)
    assert_allclose(log_bessel(jnp.array(1e30), order=3.0), 1e30, rtol=1e-6)


@pytest.mark.parametrize("d", [2, 3, 10, 512])
def test_density_is_scipys(d):
    x, mean = directions(5, 20, d), directions(6, 20, d)
    for kappa in (0.01, 1.0, 30.0, 1000.0):
        if scipy.special.ive(d / 2 - 1, kappa) < 1e-290:
            continue  # SciPy's normaliser is lost
        want = [
            scipy.stats.vonmises_fisher(m, cast(Any, kappa)).logpdf(v)
            for v, m in zip(_unit64(x), _unit64(mean), strict=True)
        ]
        got = vmf_log_prob(x, mean, jnp.full(20, kappa))
        assert_allclose(got, want, rtol=2e-6, atol=2e-4 if kappa > 100 else 2e-5)


def _unit64(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_density_of_a_point_near_a_sharp_mean_keeps_its_digits():
    """In the limit a Gaussian in the tangent plane, of variance 1 / kappa."""
    kappa, angle = 1e10, 2e-5
    x = jnp.array([np.cos(angle), np.sin(angle), 0.0], jnp.float32)
    mean = jnp.array([1.0, 0.0, 0.0])
    expected = np.log(kappa / (2 * np.pi)) - 0.5 * kappa * angle**2
    assert_allclose(vmf_log_prob(x, mean, jnp.float32(kappa)), expected, rtol=1e-5)


def radial_cdf(w, kappa, d):
    grid = np.linspace(-1, 1, 200_001)
    middle = 0.5 * (grid[1:] + grid[:-1])
    mass = np.exp(kappa * (middle - 1)) * (1 - middle**2) ** ((d - 3) / 2)
    total = np.concatenate([[0.0], np.cumsum(mass)])
    return np.interp(w, grid, total / total[-1])


@pytest.mark.parametrize("d, kappa", [(2, 3.0), (3, 0.0), (4, 10.0), (10, 24.0)])
def test_samples_have_the_right_distribution(d, kappa):
    mean = jnp.asarray(directions(7, d))
    draw = jax.jit(partial(sample_vmf, num_samples=20_000))
    z = np.asarray(draw(KEY, mean, jnp.float32(kappa)), np.float64)
    assert_allclose(np.linalg.norm(z, axis=-1), 1.0, atol=3e-6)
    w = z @ np.asarray(mean)
    assert scipy.stats.kstest(w, lambda v: radial_cdf(v, kappa, d)).pvalue > 1e-3
    # Around the mean all directions are alike.
    rest = z - w[:, None] * np.asarray(mean)
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    spread = rest.T @ rest / len(rest)
    expected = (np.eye(d) - np.outer(mean, mean)) / (d - 1)
    assert np.abs(rest.mean(0)).max() < 0.03
    assert np.abs(spread - expected).max() < 0.03


@pytest.mark.parametrize("d, kappa", [(2, 1.0), (3, 2.0), (10, 20.0), (10, 2.0)])
def test_the_gradient_to_the_concentration_is_unbiased(d, kappa):
    """d E[mean.z] / d kappa = A'(kappa), in five standard errors; E[z z] as well."""
    mean = jnp.zeros(d).at[0].set(1.0)

    @jax.jit
    def moved(kappa):
        draw = partial(sample_vmf, KEY, mean, num_samples=100_000)
        z, slope = jax.jvp(draw, (kappa,), (jnp.ones(()),))
        return z[:, 0], slope[:, 0]

    w, slope = (np.asarray(a, np.float64) for a in moved(jnp.float32(kappa)))

    def moments(kappa):
        at = np.linspace(-1, 1, 400_001)[1:-1]
        mass = np.exp(kappa * (at - 1)) * (1 - at**2) ** ((d - 3) / 2)
        return np.array([(mass * at).sum(), (mass * at**2).sum()]) / mass.sum()

    exact = (moments(kappa + 1e-3) - moments(kappa - 1e-3)) / 2e-3
    for draws, wanted in zip((slope, 2 * w * slope), exact, strict=True):
        error = draws.std() / len(draws) ** 0.5
        assert abs(draws.mean() - wanted) < 5 * error + 2e-4 * abs(wanted)


def test_the_gradient_to_the_mean_is_unbiased():
    """E[z] = A(kappa) mean, so that its derivative along a tangent is A times that."""
    mean, along = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 1.0, 0.0])
    draw = partial(sample_vmf, KEY, concentration=jnp.float32(4.0), num_samples=50_000)
    _, slope = jax.jit(lambda m: jax.jvp(lambda m: draw(m), (m,), (along,)))(mean)
    expected = 1 / np.tanh(4.0) - 1 / 4.0
    assert_allclose(np.asarray(slope).mean(0), expected * along, atol=0.01)


def test_credible_region_holds_its_share():
    mean = jnp.asarray(directions(8, 2, 5))
    draw = partial(sample_vmf, mean=mean, concentration=jnp.array([5.0, 50.0]))
    samples = draw(KEY, num_samples=4000)
    fresh = draw(jax.random.key(9), num_samples=4000)
    for level in (0.5, 0.95):
        for query in range(2):
            inside = credible_retrieval(samples, mean, fresh[query], level=level)
            assert abs(inside[query].mean() - level) < 0.03
    # The sharper query retrieves less.
    sphere = jnp.asarray(directions(9, 2000, 5))
    found = credible_retrieval(samples, mean, sphere).mean(1)
    assert found[0] > 5 * found[1]
    assert np.all(credible_retrieval(samples, mean, mean, level=1.0)[[0, 1], [0, 1]])


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="'positive' is float32.*batch=6"):
        mcinfonce(Z, POSITIVE[:4])
    with pytest.raises(TypeError, match="'positive' is float32.*d=4"):
        mcinfonce(Z, POSITIVE[..., :3])
    with pytest.raises(ValueError, match="'z' has 1 row, expected 2 or more"):
        mcinfonce(Z[:1], POSITIVE[:1])
    assert np.isfinite(mcinfonce(Z[:1], POSITIVE[:1], POSITIVE[None, 1:])[0])
    with pytest.raises(ValueError, match="'concentration' is -1.0"):
        mcinfonce(Z, POSITIVE, concentration=-1.0)
    with pytest.raises(ValueError, match="'convention' is 'mine'"):
        mcinfonce(Z, POSITIVE, convention=cast(Any, "mine"))
    with pytest.raises(ValueError, match="'axis_name' is 'rows'"):
        mcinfonce(Z, POSITIVE, axis_name="rows")
    with pytest.raises(ValueError, match="'mean' has dimension 1"):
        sample_vmf(KEY, jnp.ones((3, 1)), jnp.ones(3))
    with pytest.raises(ValueError, match="'x' has dimension 1"):
        vmf_log_prob(jnp.ones((3, 1)), jnp.ones((3, 1)), jnp.ones(3))
    with pytest.raises(ValueError, match="'level' is 1.5"):
        credible_retrieval(Z, POSITIVE[:, 0], Z[:, 0], level=1.5)
