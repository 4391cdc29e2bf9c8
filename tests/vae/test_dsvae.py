"""The sequential VAE's bound against float64 NumPy, and what its networks may see."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.stats import multivariate_normal

from jaxzoo.core.stats import normal_log_prob
from jaxzoo.vae.dsvae import SequentialVAE, dsvae_loss, sample_dynamics, swap_content


def kl(m: Any, s: Any, n: Any, t: Any) -> Any:
    """Of N(m, s^2) from N(n, t^2), summed."""
    return np.sum(np.log(t / s) + (s**2 + (m - n) ** 2) / (2.0 * t**2) - 0.5)


def test_the_loss_is_minus_the_bound():
    rng = np.random.default_rng(0)
    log_p = rng.normal(size=(4, 3))
    f = rng.normal(size=(4, 2, 5))
    z, prior = 0.5 * rng.normal(size=(2, 4, 3, 2, 2))
    loss, aux = dsvae_loss(log_p, f, z, prior)
    bounds = []
    for b in range(4):
        bound = -kl(f[b, 0], np.exp(f[b, 1]), 0.0, 1.0)
        for t in range(3):
            m, s, n, r = z[b, t, 0], z[b, t, 1], prior[b, t, 0], prior[b, t, 1]
            bound += log_p[b, t] - kl(m, np.exp(s), n, np.exp(r))
        bounds.append(bound)
    assert_allclose(loss, -np.mean(bounds), rtol=1e-5)
    assert_allclose(aux["per_example"], -np.array(bounds), rtol=1e-5)


def test_the_bound_is_the_likelihood_at_the_exact_posterior():
    """x_t = f + z_t + e_t, z a random walk: the mean of losses is -log p(x).

    With the exact q(f|x) and, given the drawn f, z drawn one after the other from the
    exact q(z_t|z_<t, f, x), whose divergences are those of the loss.
    """
    steps, noise = 3, 0.5
    x = np.array([0.4, -0.3, 1.1])
    walk = np.tril(np.ones((steps, steps)))
    prior = walk @ walk.T
    marginal = prior + np.ones((steps, steps)) + noise**2 * np.eye(steps)
    spread: Any = marginal
    log_p = multivariate_normal.logpdf(x, np.zeros(steps), spread)
    gain = np.linalg.solve(marginal, np.ones(steps))
    mean_f, var_f = gain @ x, 1.0 - gain @ np.ones(steps)
    precision = np.linalg.inv(prior) + np.eye(steps) / noise**2
    cov = np.linalg.inv(precision)
    rng, draws = np.random.default_rng(1), 5000
    f = mean_f + var_f**0.5 * rng.normal(size=draws)
    means = cov @ ((x[:, None] - f[None]) / noise**2)
    z = np.zeros((draws, steps))
    moments, priors = np.zeros((2, draws, steps, 2, 1))
    for t in range(steps):
        mean, var = means[t], cov[t, t]
        if t:
            weights = np.linalg.solve(cov[:t, :t], cov[:t, t])
            mean = mean + weights @ (z[:, :t] - means[:t].T).T
            var = var - weights @ cov[:t, t]
        z[:, t] = mean + var**0.5 * rng.normal(size=draws)
        moments[:, t, 0, 0], moments[:, t, 1, 0] = mean, 0.5 * np.log(var)
        priors[:, t, 0, 0] = z[:, t - 1] if t else 0.0
    static = np.tile([[mean_f], [0.5 * np.log(var_f)]], (draws, 1, 1))
    difference = (x[None] - f[:, None] - z)[..., None]
    likelihood = normal_log_prob(difference, log_std=np.full(1, np.log(noise)))
    losses = np.asarray(
        dsvae_loss(likelihood, static, moments, priors)[1]["per_example"]
    )
    assert abs(losses.mean() + log_p) < 4.0 * losses.std() / draws**0.5
    assert losses.std() / draws**0.5 < 0.05


def test_paths_have_the_moments_of_their_prior():
    """z_t = 0.8 z_{t-1} + 0.6 e_t, by a cell that counts its steps."""

    def cell(state: Any, z: Any) -> Any:
        return state + 1.0, jnp.stack([0.8 * z, 0.0 * z + np.log(0.6)], axis=1)

    start = jnp.zeros((20_000, 1)), jnp.full((20_000, 1), 2.0)
    z, aux = sample_dynamics(jax.random.key(0), cell, *start, num_steps=3)
    z = np.asarray(z)[..., 0]
    assert_allclose(z.mean(axis=0), 2.0 * 0.8 ** np.arange(1, 4), atol=0.03)
    variances = 0.36 * np.cumsum(0.64 ** np.arange(3))
    assert_allclose(z.var(axis=0), variances, rtol=0.05)
    assert_allclose(aux["state"], 3.0)
    assert_allclose(aux["moments"][:, 1:, 0, 0], 0.8 * z[:, :-1], rtol=1e-5)
    knobs: Any = {"num_steps": 3, "deterministic": True}
    still, _ = sample_dynamics(jax.random.key(0), cell, *start, **knobs)
    assert_allclose(still[:, :, 0], 2.0 * 0.8 ** np.arange(1, 4)[None] + 0 * z, 1e-5)


@pytest.fixture(scope="module", params=["full", "factorised"])
def built(request):
    net = SequentialVAE(
        6, static=3, dynamic=2, hidden=4, width=5, posterior=request.param
    )
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 4, 6))
    noise = jax.random.normal(keys[1], (2, 3)), jax.random.normal(keys[2], (2, 4, 2))
    params = net.init(keys[3], x, *noise)
    call: Any = jax.jit(net.apply, static_argnames="method")
    return net, params, call, x, noise


def test_each_part_sees_what_its_factor_says(built):
    net, params, call, x, noise = built
    other = x.at[:, 2].add(1.0)
    out, moved = (call(params, a, *noise) for a in (x, other))

    def differs(name: str) -> Any:
        return np.abs(np.asarray(out[name] - moved[name])).reshape(2, 4, -1).max(-1) > 0

    assert np.all(np.abs(out["f"] - moved["f"]).max(axis=(1, 2)) > 0)
    expected = np.full((2, 4), net.posterior == "full")
    expected[:, 2] = True
    assert np.array_equal(differs("z"), expected)
    # A frame is decoded from f and its own z, and f alone may change it everywhere.
    z, f = out["z_draw"], out["f"][:, 0]
    frames, changed = (
        np.asarray(call(params, f, a, method="decode"))
        for a in (z, z.at[:, 1].add(1.0))
    )
    same = np.all(np.isclose(frames, changed, atol=1e-6), axis=-1)
    assert np.array_equal(same, np.arange(4)[None].repeat(2, 0) != 1)


def test_the_prior_is_that_of_the_past_step_by_step(built):
    net, params, call, x, noise = built
    out = call(params, x, *noise)
    state, z = jnp.zeros((2, 8)), jnp.zeros((2, 2))
    for t in range(4):
        state, moments = call(params, state, z, method="dynamics")
        assert_allclose(moments, out["prior"][:, t], rtol=1e-5, atol=1e-6)
        z = out["z_draw"][:, t]
    draw = out["z"][:, :, 0] + jnp.exp(out["z"][:, :, 1]) * noise[1]
    assert_allclose(draw, out["z_draw"], rtol=1e-5)


def test_exchanged_clips_have_the_other_content(built):
    net, params, call, x, _ = built

    def encode(x: Any) -> Any:
        f = call(params, x, method="content")[:, 0]
        return f, call(params, x, f, method="motion")[:, :, 0]

    def decode(f: Any, z: Any) -> Any:
        return call(params, f, z, method="decode")

    x_b = x[:, ::-1] + 0.5
    (f_a, z_a), (f_b, z_b) = encode(x), encode(x_b)
    got = swap_content(encode, decode, x, x_b)
    assert_allclose(got[0], decode(f_b, z_a), atol=1e-5)
    assert_allclose(got[1], decode(f_a, z_b), atol=1e-5)
    assert np.abs(np.asarray(got[0] - decode(f_a, z_a))).max() > 1e-4


def test_bad_input_is_named():
    x = jnp.zeros((2, 3))
    f, z = jnp.zeros((2, 2, 4)), jnp.zeros((2, 3, 2, 1))
    with pytest.raises(TypeError, match="'f'"):
        dsvae_loss(x, f[:, :1], z, z)
    with pytest.raises(TypeError, match="'prior'"):
        dsvae_loss(x, f, z, z[:, :2])
    with pytest.raises(ValueError, match="'num_steps' is 0"):
        sample_dynamics(jax.random.key(0), lambda s, z: (s, z), x, x, num_steps=0)
