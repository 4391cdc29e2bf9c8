"""The paper's estimators in float64, and a quadratic whose covariance is known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from jaxzoo.core.collectives import varying
from jaxzoo.optim.gradient_noise_scale import (
    adaptive_batch_size,
    noise_scale,
    optimal_learning_rate,
    pareto_fit,
    shard_noise_scale,
)

DIMENSION = 6


def quadratic(seed=0):
    """A Hessian, a mean gradient and a covariance, in float64."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(DIMENSION, DIMENSION))
    hessian = root @ root.T / DIMENSION + 0.1 * np.eye(DIMENSION)
    mix = rng.normal(size=(DIMENSION, DIMENSION))
    return hessian, rng.normal(size=DIMENSION), mix @ mix.T


def product(hessian):
    matrix = jnp.asarray(hessian, jnp.float32)
    return lambda v: matrix @ v


def of_two_batches(small, big, b, larger, h):
    """Appendix A.1, with |v|^2 = v^T H v."""
    square_small, square_big = small @ h @ small, big @ h @ big
    signal = (larger * square_big - b * square_small) / (larger - b)
    noise = (square_small - square_big) / (1 / b - 1 / larger)
    return signal, noise


@pytest.mark.parametrize("with_hessian", [False, True])
def test_two_batches_by_the_paper(with_hessian):
    hessian, mean, _ = quadratic()
    h = hessian if with_hessian else np.eye(DIMENSION)
    rng = np.random.default_rng(1)
    small, big = mean + rng.normal(size=(2, DIMENSION)) * [[0.8], [0.2]]
    signal, noise = of_two_batches(small, big, 4, 64, h)
    value, aux = noise_scale(
        jnp.asarray(small), jnp.asarray(big), batch_small=4, batch_big=64,
        curvature=product(hessian) if with_hessian else None,
    )  # fmt: skip
    assert_allclose(aux["signal"], signal, rtol=1e-5)
    assert_allclose(aux["noise"], noise, rtol=1e-5)
    assert_allclose(value, noise / signal, rtol=1e-5)


@pytest.mark.parametrize("with_hessian", [False, True])
def test_parts_are_the_mean_of_two_batches_over_the_parts(with_hessian):
    hessian, mean, _ = quadratic()
    h = hessian if with_hessian else np.eye(DIMENSION)
    parts = mean + 0.5 * np.random.default_rng(2).normal(size=(8, DIMENSION))
    whole = parts.mean(0)
    pairs = [of_two_batches(g, whole, 4, 32, h) for g in parts]
    signal, noise = np.mean(pairs, axis=0)
    tree = {"a": jnp.asarray(parts[:, :2]), "b": jnp.asarray(parts[:, 2:, None])}

    def split(v):
        return {"a": v[:2], "b": v[2:, None]}

    def curvature(v):
        return split(product(hessian)(jnp.concatenate([v["a"], v["b"].ravel()])))

    value, aux = shard_noise_scale(
        tree, batch_size=4, curvature=curvature if with_hessian else None
    )
    assert_allclose(aux["signal"], signal, rtol=1e-5)
    assert_allclose(aux["noise"], noise, rtol=1e-5)
    assert_allclose(value, noise / signal, rtol=1e-5)


@pytest.mark.parametrize("with_hessian", [False, True])
def test_both_terms_are_unbiased_on_a_quadratic(with_hessian):
    hessian, mean, covariance = quadratic()
    h = hessian if with_hessian else np.eye(DIMENSION)
    curvature = product(hessian) if with_hessian else None
    wanted = {"signal": mean @ h @ mean, "noise": np.trace(h @ covariance)}
    root = jnp.asarray(np.linalg.cholesky(covariance), jnp.float32)
    b, parts, draws = 2, 4, 20_000

    def draw(key):
        normal = jax.random.normal(key, (parts, DIMENSION)) / b**0.5
        g = jnp.asarray(mean, jnp.float32)[None] + normal @ root.T
        of_parts = shard_noise_scale(g, batch_size=b, curvature=curvature)
        pair = noise_scale(
            g[0], g.mean(0), batch_small=b, batch_big=b * parts, curvature=curvature
        )
        return of_parts[1], pair[1]

    keys = jax.random.split(jax.random.key(0), draws)
    for aux in jax.jit(jax.vmap(draw))(keys):
        for name, value in wanted.items():
            values = np.asarray(aux[name], np.float64)
            error = values.std(ddof=1) / draws**0.5
            assert abs(values.mean() - value) < 3 * error, name
            # The test can tell: forgetting the noise in |mean|^2 is 20 errors off.
            assert error < 0.02 * wanted["noise"]


def test_all_examples_give_the_exact_noise_scale():
    hessian, mean, _ = quadratic()
    g = mean + np.random.default_rng(3).normal(size=(40, DIMENSION))
    sigma = np.cov(g.T, bias=True)
    centre = g.mean(0)
    simple, aux = shard_noise_scale(jnp.asarray(g), exact=True)
    assert_allclose(aux["noise"], np.trace(sigma), rtol=1e-5)
    assert_allclose(simple, np.trace(sigma) / (centre @ centre), rtol=1e-5)
    noise, _ = shard_noise_scale(jnp.asarray(g), exact=True, curvature=product(hessian))
    wanted = np.trace(hessian @ sigma) / (centre @ hessian @ centre)
    assert_allclose(noise, wanted, rtol=1e-5)


@pytest.mark.parametrize("devices", [2, 8])
def test_local_gradients_inside_shard_map_are_those_of_the_whole(devices):
    """Linear regression: each device differentiates its own examples alone."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(32, DIMENSION)), jnp.float32)
    y = jnp.asarray(rng.normal(size=32), jnp.float32)
    w = jnp.asarray(rng.normal(size=DIMENSION), jnp.float32)
    b = 32 // devices

    def loss(w, x, y):
        return jnp.mean((x @ w - y) ** 2) / 2

    def curvature(v):
        return x.T @ (x @ v) / 32

    pairs = x.reshape(devices, b, -1), y.reshape(devices, b)
    stack = jax.vmap(jax.grad(loss), (None, 0, 0))(w, *pairs)
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    for h in (None, curvature):

        def local(w, x, y, h=h):
            own = jax.grad(loss)(varying(w, "d"), x, y)
            return shard_noise_scale(
                own[None], batch_size=b, curvature=h, axis_name="d"
            )

        out: Any = (P(), P())
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=out
        )
        value, aux = jax.jit(mapped)(w, x, y)
        expected, terms = shard_noise_scale(stack, batch_size=b, curvature=h)
        assert_allclose(value, expected, rtol=1e-5)
        assert_allclose(aux["signal"], terms["signal"], rtol=1e-5)
        assert_allclose(aux["noise"], terms["noise"], rtol=1e-5)


def test_averages_of_the_two_terms_find_the_noise_scale_that_one_step_misses():
    _, mean, covariance = quadratic()
    root = jnp.asarray(np.linalg.cholesky(covariance), jnp.float32)
    ema = optax.ema(0.995)

    def step(state, key):
        g = (
            jnp.asarray(mean, jnp.float32)[None]
            + jax.random.normal(key, (4, DIMENSION)) @ root.T
        )
        value, aux = shard_noise_scale(g)
        means, state = ema.update(aux, state)
        return state, (value, means)

    keys = jax.random.split(jax.random.key(1), 4000)
    zeros: Any = {"signal": jnp.zeros(()), "noise": jnp.zeros(())}
    _, (single, means) = jax.jit(lambda s, k: jax.lax.scan(step, s, k))(
        ema.init(zeros), keys
    )
    wanted = np.trace(covariance) / (mean @ mean)
    averaged = means["noise"][-1] / means["signal"][-1]
    assert_allclose(averaged, wanted, rtol=0.25)
    assert np.mean(~np.isfinite(single)) > 0.05  # no signal seen in a single step


def test_scale_does_not_matter_and_nothing_overflows():
    g = jnp.asarray(np.random.default_rng(5).normal(size=(8, 4)) + 1, jnp.float32)
    value = shard_noise_scale(g)[0]
    for size in (1e-30, 1e30):
        assert_allclose(shard_noise_scale(size * g)[0], value, rtol=1e-5)
    assert np.isinf(shard_noise_scale(0.0 * g)[0])
    same = shard_noise_scale(jnp.ones((8, 4)))
    assert same[0] == 0 and same[1]["noise"] == 0 and same[1]["signal"] == 4


def test_learning_rate_and_batch_size_of_the_paper():
    """A quadratic loss: the best step of a batch, found by search."""
    hessian, mean, covariance = quadratic()
    b_noise = np.trace(hessian @ covariance) / (mean @ hessian @ mean)
    lr_max = mean @ mean / (mean @ hessian @ mean)

    def progress(lr, batch):
        curve = mean @ hessian @ mean + np.trace(hessian @ covariance) / batch
        return lr * (mean @ mean) - lr**2 * curve / 2

    for batch in (1, 8, 64):
        rates = np.linspace(0, lr_max, 100_001)
        found = rates[np.argmax(progress(rates, batch))]
        lr = optimal_learning_rate(
            jnp.float32(b_noise), batch_size=batch, lr_max=float(lr_max)
        )
        assert_allclose(lr, found, rtol=1e-3)
        share = progress(found, batch) / progress(lr_max, 1e12)
        assert_allclose(lr / lr_max, share, rtol=1e-3)
    for rate in (5.0, 400.0):
        batches = np.linspace(1, 200, 100_001)
        cost = batches + b_noise + rate * (1 + b_noise / batches)
        chosen = adaptive_batch_size(jnp.float32(b_noise), exchange_rate=rate)
        assert_allclose(chosen, batches[np.argmin(cost)], rtol=1e-3)
    assert adaptive_batch_size(jnp.float32(-1.0), exchange_rate=1.0) == 0
    assert optimal_learning_rate(jnp.float32(-9.0), batch_size=1, lr_max=0.3) == 0.3


def test_pareto_fit_by_least_squares_and_its_r2():
    rng = np.random.default_rng(6)
    batch = 2.0 ** np.arange(3, 10)
    steps = (30 + 30 * 70 / batch) * np.exp(0.1 * rng.normal(size=7))
    examples = batch * steps
    design = np.stack([1 / steps, 1 / examples], axis=1)
    (min_s, min_e), *_ = np.linalg.lstsq(design, np.ones(7))
    logs, predicted = np.log(steps), np.log(min_s + min_e / batch)
    r2 = 1 - ((logs - predicted) ** 2).sum() / ((logs - logs.mean()) ** 2).sum()
    b_crit, aux = pareto_fit(jnp.asarray(steps), jnp.asarray(examples))
    assert_allclose(b_crit, min_e / min_s, rtol=1e-4)
    assert_allclose(aux["min_steps"], min_s, rtol=1e-4)
    assert_allclose(aux["min_examples"], min_e, rtol=1e-4)
    assert_allclose(aux["r2"], r2, rtol=1e-4)
    # On the fitted curve (S / S_min - 1)(E / E_min - 1) = 1.
    s = min_s + min_e / batch
    assert_allclose((s / min_s - 1) * (batch * s / min_e - 1), 1, rtol=1e-9)


def test_bad_arguments_are_named():
    g = jnp.ones((1, 4))
    with pytest.raises(ValueError, match="'gradients' has one part"):
        shard_noise_scale(g)
    with pytest.raises(ValueError, match="'batch_big' is 4, expected a number > 4"):
        noise_scale(g, g, batch_small=4, batch_big=4)
    with pytest.raises(TypeError, match="argument 'g_big'"):
        noise_scale({"a": g[0]}, {"b": g[0]}, batch_small=1, batch_big=4)
    with pytest.raises(TypeError, match="argument 'g_big'"):
        noise_scale(g, g[0], batch_small=1, batch_big=4)
    with pytest.raises(ValueError, match="argument 'axis_name' is 'rows'"):
        shard_noise_scale(jnp.ones((2, 4)), axis_name="rows")
    with pytest.raises(ValueError, match="argument 'exchange_rate' is -1.0"):
        adaptive_batch_size(jnp.ones(2), exchange_rate=-1.0)
