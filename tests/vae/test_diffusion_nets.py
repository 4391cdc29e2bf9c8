"""The map against an eigenproblem in float64, and against circles and their waves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from numpy.testing import assert_allclose

from jaxzoo.vae.diffusion_nets import (
    DiffusionNet,
    encoder_loss,
    nystrom,
    preimage,
)
from jaxzoo.vae.diffusion_nets import diffusion_maps as eager_diffusion_maps

diffusion_maps: Any = jax.jit(
    eager_diffusion_maps, static_argnames=("dims", "eps", "alpha", "t")
)
NAMES = ("log_density", "eigenvectors", "eigenvalues")


def markov(x, eps, alpha):
    """P and q by loops."""
    n = len(x)
    k = np.array([[np.exp(-((a - b) ** 2).sum() / eps) for b in x] for a in x])
    q = k.sum(axis=1)
    for i in range(n):
        for j in range(n):
            k[i, j] /= (q[i] * q[j]) ** alpha
    return k / k.sum(axis=1, keepdims=True), q


@pytest.mark.parametrize("alpha, t", [(0.0, 0.0), (0.5, 1.0), (1.0, 3.0)])
def test_the_map_is_made_of_right_eigenvectors_of_the_markov_matrix(alpha, t):
    x = np.random.default_rng(0).normal(size=(12, 2)) * [2.0, 0.7]
    p, q = markov(x, 1.5, alpha)
    values, left, right = scipy.linalg.eig(p, left=True, right=True)
    order = np.argsort(-values.real)
    values, right = values.real[order], right.real[:, order]
    stationary = left.real[:, order[0]] / left.real[:, order[0]].sum()
    right /= np.sqrt(stationary @ right**2)
    right *= np.sign(right[np.abs(right).argmax(axis=0), np.arange(12)])
    embedding, aux = diffusion_maps(
        jnp.asarray(x, jnp.float32), dims=3, eps=1.5, alpha=alpha, t=t
    )
    assert_allclose(aux["transition"], p, atol=1e-6)
    assert_allclose(aux["log_density"], np.log(q), atol=1e-5)
    assert_allclose(aux["eigenvalues"], values[1:4], atol=1e-5)
    assert_allclose(aux["eigenvectors"], right[:, 1:4], atol=2e-4)
    assert_allclose(embedding, right[:, 1:4] * values[1:4] ** t, atol=2e-4)


def test_a_circle_maps_to_a_circle_whatever_its_density():
    """alpha = 1 finds cosine and sine of the angle; alpha = 0 sees the density."""
    u = (np.arange(200) + 0.5) / 200 * 2 * np.pi
    angle = u + 0.7 * np.sin(u)  # three times as dense on one side
    x = jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], axis=1), jnp.float32)
    spread = []
    for alpha in (0.0, 1.0):
        psi = np.asarray(diffusion_maps(x, dims=2, eps=0.05, alpha=alpha, t=0.0)[0])
        waves = np.stack([np.ones(200), np.cos(angle), np.sin(angle)], axis=1)
        left = psi - waves @ np.linalg.lstsq(waves, psi, rcond=None)[0]
        spread.append((left**2).sum() / (psi**2).sum())
    assert spread[1] < 1e-3 < 5e-2 < spread[0]


def test_nystrom_gives_the_map_at_the_points_and_the_formula_elsewhere():
    rng = np.random.default_rng(1)
    x, new = 1.5 * rng.normal(size=(15, 2)), rng.normal(size=(4, 2))
    points: Any = jnp.asarray(x, jnp.float32)
    embedding, aux = diffusion_maps(points, dims=2, eps=1.0, alpha=0.5, t=2.0)
    arrays: Any = [aux[k] for k in NAMES]
    knobs: Any = {"eps": 1.0, "alpha": 0.5, "t": 2.0}
    again = nystrom(points, points, *arrays, **knobs)
    assert_allclose(again, embedding, atol=1e-4)
    q = np.exp(np.asarray(arrays[0], np.float64))
    psi, values = (np.asarray(a, np.float64) for a in arrays[1:])
    expected = []
    for a in new:
        p = np.exp(-((a - x) ** 2).sum(axis=1)) / q**0.5
        expected.append((p / p.sum()) @ psi / values * values**2)
    got = nystrom(jnp.asarray(new, jnp.float32), points, *arrays, **knobs)
    assert_allclose(got, expected, atol=1e-4)
    far = nystrom(jnp.full((1, 2), 1e4), points, *arrays, **knobs)
    assert np.all(np.isfinite(far))


def test_the_cost_is_that_of_the_paper_and_the_map_itself_has_none():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(10, 2)), jnp.float32)
    embedding, aux = diffusion_maps(x, dims=3, eps=2.0)
    p, values = aux["transition"], aux["eigenvalues"]
    assert float(encoder_loss(embedding, embedding, p, values, eta=100.0)[0]) < 1e-8
    f = rng.normal(size=(10, 3))
    matrix, l64 = np.asarray(p, np.float64), np.asarray(values, np.float64)
    fit = ((f - np.asarray(embedding)) ** 2).sum() / 10
    constraint = sum(
        (((matrix - l64[j] * np.eye(10)) @ f[:, j]) ** 2).sum() / 10 for j in range(3)
    )
    arrays: Any = (jnp.asarray(f, jnp.float32), embedding, p, values)
    loss, found = encoder_loss(*arrays, eta=7.0)
    assert_allclose(found["fit"], fit, rtol=1e-5)
    assert_allclose(found["constraint"], constraint, rtol=1e-5)
    assert_allclose(loss, fit + 7.0 * constraint, rtol=1e-5)


def test_the_constraint_weighs_an_error_by_its_distance_in_eigenvalue():
    """An error e in the direction psi_k of coordinate j costs (l_k - l_j)^2 e^2."""
    x = jax.random.normal(jax.random.key(0), (20, 2))
    embedding, aux = diffusion_maps(x, dims=6, eps=1.0, alpha=0.0)
    values, psi = aux["eigenvalues"], aux["eigenvectors"]
    for k in (1, 5):
        f = embedding[:, :1] + 0.1 * psi[:, k : k + 1]
        loss, found = encoder_loss(
            f, embedding[:, :1], aux["transition"], values[:1], eta=3.0
        )
        square = float(jnp.mean(jnp.square(psi[:, k]))) * 0.01
        gap = float(values[k] - values[0]) ** 2
        assert_allclose(found["constraint"], gap * square, rtol=2e-3)
        assert_allclose(loss, square * (1 + 3 * gap), rtol=2e-3)


def test_the_gradient_of_the_map_survives_equal_eigenvalues():
    def total(x):
        embedding, aux = diffusion_maps(x, dims=2, eps=1.0)
        return jnp.sum(embedding**3) + jnp.sum(aux["eigenvalues"])

    for x in (jnp.zeros((6, 2)), jnp.eye(6)[:, :2]):
        assert np.all(np.isfinite(jax.jit(jax.grad(total))(x)))


def test_preimages_are_averages_of_near_points():
    rng = np.random.default_rng(3)
    y, psi, x = (
        rng.normal(size=(3, 2)),
        rng.normal(size=(8, 2)),
        rng.normal(size=(8, 3)),
    )
    expected = []
    for a in y:
        w = np.exp(-((a - psi) ** 2).sum(axis=1) / 0.5)
        expected.append(w @ x / w.sum())
    arrays: Any = [jnp.asarray(a, jnp.float32) for a in (y, psi, x)]
    assert_allclose(preimage(*arrays, width=0.5), expected, atol=1e-5)
    back = preimage(arrays[1], *arrays[1:], width=1e-6)
    assert_allclose(back, x, atol=1e-6)


def test_the_net_is_its_two_halves():
    net: Any = DiffusionNet(dims=2, features=3, hidden=(4, 5))
    x = jax.random.normal(jax.random.key(0), (6, 3))

    @jax.jit
    def of(key):
        params = net.init(key, x)
        code = net.apply(params, x, method="encode")
        back = net.apply(params, code, method="decode")
        score = net.apply(params, x, method="outlier_score")
        return code, back, net.apply(params, x), score

    code, back, whole, score = of(jax.random.key(1))
    assert code.shape == (6, 2)
    assert_allclose(back, whole, atol=1e-6)
    assert_allclose(score, ((np.asarray(x) - np.asarray(whole)) ** 2).sum(1), rtol=1e-5)


def test_bad_input_is_named():
    x = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="'dims' is 4"):
        eager_diffusion_maps(x, dims=4, eps=1.0)
    with pytest.raises(ValueError, match="'eps' is 0"):
        eager_diffusion_maps(x, dims=1, eps=0.0)
    with pytest.raises(ValueError, match="'alpha' is 1.5"):
        eager_diffusion_maps(x, dims=1, eps=1.0, alpha=1.5)
    with pytest.raises(ValueError, match="'eta' is -1"):
        encoder_loss(x, x, jnp.eye(4), jnp.ones(2), eta=-1.0)
    with pytest.raises(TypeError, match="argument 'transition'"):
        encoder_loss(x, x, jnp.eye(3), jnp.ones(2))
    with pytest.raises(ValueError, match="'width' is 0"):
        preimage(x, x, x, width=0.0)
