"""The entropy and its gradient in float64, at repeated and zero eigenvalues too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from jaxzoo.ssl.vne import i_vne_plus, vne, vne_regularised


def sample(batch, width, seed=0):
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) * rng.uniform(0.2, 1.0, width)
    return (rng.normal(size=(batch, width)) @ mix + 0.3).astype(np.float32)


def of_the_paper(h):
    """Entropy by singular values, and dS = -tr((log rho + I) d rho), in float64."""
    h = h.astype(np.float64)
    length = np.linalg.norm(h, axis=1, keepdims=True)
    z = h / length
    u, s, v = np.linalg.svd(z / np.sqrt(len(z)), full_matrices=False)
    keep = s**2 > 1e-12
    p = s[keep] ** 2
    entropy = -(p * np.log(p)).sum()
    log_rho = (v[keep].T * (np.log(p) + 1)) @ v[keep]
    slope = -2 / len(z) * z @ log_rho
    gradient = (slope - z * (slope * z).sum(1, keepdims=True)) / length
    return entropy, gradient, np.sort(s**2)


def assert_near(actual, expected, rtol=1e-4):
    assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@jax.jit
def value_and_grad(h, where=None):
    return jax.value_and_grad(vne, has_aux=True)(h, where=where)


@pytest.mark.parametrize("batch", [2, 7, 12, 13, 40])  # of 12 dimensions
def test_entropy_and_gradient_by_the_paper(batch):
    h = sample(batch, 12)
    entropy, gradient, eigenvalues = of_the_paper(h)
    (value, aux), got = value_and_grad(h)
    assert_allclose(value, entropy, rtol=1e-5)
    assert_allclose(aux["eigenvalues"], eigenvalues, atol=1e-6)
    assert_allclose(aux["effective_rank"], np.exp(entropy), rtol=1e-5)
    assert aux["rank"] == min(batch, 12)
    assert_near(got, gradient)


@pytest.mark.parametrize("batch", [5, 12, 24])
def test_known_answers_at_repeated_eigenvalues(batch):
    """Orthonormal rows: S = log of their number, and no gradient, as S is largest."""
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]
    h = np.resize(q, (batch, 12)).astype(np.float32)
    (value, aux), gradient = value_and_grad(3 * h)
    assert_allclose(value, np.log(min(batch, 12)), rtol=1e-6)
    assert aux["rank"] == min(batch, 12)
    assert_allclose(gradient, 0, atol=1e-6)


def test_repeated_eigenvalues_that_are_not_the_largest_have_the_right_gradient():
    """Rows 3 e1, 1 e2, 1 e3, turned: eigenvalues 3/5, 1/5 and 1/5, and one of 0."""
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    h = q[[0, 0, 0, 1, 2]].astype(np.float32)
    h[0] += 0.05 * q[3].astype(np.float32)
    for rows in (h, np.pad(h, ((0, 0), (0, 4)))):  # N > d, then N < d
        (value, _), gradient = value_and_grad(rows)
        entropy, expected, _ = of_the_paper(rows)
        assert_allclose(value, entropy, rtol=1e-5)
        assert_near(gradient, expected)
        assert np.abs(expected).max() > 0.01


@pytest.mark.parametrize("batch", [8, 30])
def test_a_collapsed_batch_has_no_entropy_and_rank_deficiency_bounds_it(batch):
    h = sample(batch, 12)
    (value, aux), gradient = value_and_grad(np.repeat(h[:1], batch, axis=0))
    assert_allclose(value, 0, atol=1e-5)
    assert aux["rank"] == 1
    assert_allclose(gradient, 0, atol=1e-4)
    flat = h[:, :3] @ sample(3, 12, seed=1)  # rank 3
    (value, aux), gradient = value_and_grad(flat)
    entropy, expected, _ = of_the_paper(flat)
    assert aux["rank"] == 3 and value <= np.log(3) and aux["effective_rank"] <= 3
    assert_allclose(value, entropy, rtol=1e-5)
    assert_near(gradient, expected, rtol=5e-4)


def test_entropy_knows_neither_rotation_nor_length_nor_order():
    h = sample(20, 12)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]
    lengths = np.random.default_rng(1).uniform(1e-3, 1e3, (20, 1))
    other = (lengths * h @ q)[::-1].astype(np.float32)
    assert_allclose(vne(other)[0], vne(h)[0], rtol=1e-5)


def test_isotropy():
    square = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
    assert_allclose(vne(square)[1]["isotropy"], 1, rtol=1e-6)
    line = np.repeat(np.eye(4)[:1], 8, axis=0).astype(np.float32)
    assert_allclose(vne(line)[1]["isotropy"], 0, atol=1e-6)
    h = sample(30, 4)
    z = h / np.linalg.norm(h, axis=1, keepdims=True)
    low, *_, high = np.linalg.eigvalsh(z.T @ z / 30)
    mean = np.linalg.norm(z.mean(0))
    expected = (1 - mean + low / 2) / (1 + mean + high / 2)
    assert_allclose(vne(h)[1]["isotropy"], expected, rtol=1e-5)


def test_i_vne_plus_by_the_paper():
    za, zb = sample(9, 12), sample(9, 12) + 0.3 * sample(9, 12, seed=2)
    loss, aux = i_vne_plus(za, zb, alpha=0.7)
    a, b = (z / np.linalg.norm(z.astype(np.float64), axis=1)[:, None] for z in (za, zb))
    entropies = of_the_paper(za)[0], of_the_paper(zb)[0]
    assert_allclose(aux["similarity"], (a * b).sum(1).mean(), rtol=1e-5)
    assert_allclose(aux["entropy"], np.mean(entropies), rtol=1e-5)
    expected = -(a * b).sum(1).mean() - 0.7 * np.mean(entropies)
    assert_allclose(loss, expected, rtol=1e-5)
    assert_allclose(i_vne_plus(za, zb, alpha=0.0)[0], -aux["similarity"], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.3, -0.3])
def test_regularised_loss_moves_the_entropy_by_the_sign_of_alpha(alpha):
    h = jnp.asarray(sample(16, 12))
    step = jax.jit(jax.grad(lambda h: vne_regularised(h, 2.0, alpha=alpha)[0]))
    value, aux = vne_regularised(h, 2.0, alpha=alpha)
    assert_allclose(value, 2.0 - alpha * of_the_paper(np.asarray(h))[0], rtol=1e-5)
    moved = vne(h - 30.0 * step(h))[0]
    assert (moved - aux["entropy"]) * alpha > 0.01


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("batch, width", [(16, 12), (16, 24)])
def test_over_devices_it_is_the_entropy_of_all_rows(batch, width, devices):
    h = sample(batch, width)
    entropy, gradient, _ = of_the_paper(h)
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def local(h):
        return jax.value_and_grad(lambda h: vne(h, axis_name="d"), has_aux=True)(h)

    out: Any = ((P(), P()), P("d"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=out)
    (value, aux), got = jax.jit(mapped)(h)
    whole = vne(h)[1]
    assert_allclose(value, entropy, rtol=1e-5)
    assert_allclose(aux["eigenvalues"], whole["eigenvalues"], atol=1e-6)
    assert_allclose(aux["isotropy"], whole["isotropy"], rtol=1e-5)
    assert_near(got, gradient)


@pytest.mark.parametrize("width", [12, 4])
def test_masked_rows_are_inert(width):
    h = sample(9, width)
    mask = np.arange(9) % 3 != 1
    spoilt = np.where(mask[:, None], h, np.inf)
    (value, aux), gradient = value_and_grad(spoilt, mask)
    entropy, expected, _ = of_the_paper(h[mask])
    assert_allclose(value, entropy, rtol=1e-5)
    assert_near(gradient[mask], expected)
    assert np.all(gradient[~mask] == 0)


@pytest.mark.parametrize("width", [12, 4])
def test_nothing_left_is_zero_with_a_zero_gradient(width):
    h = sample(9, width)
    for rows, mask in ((h, np.zeros(9, bool)), (0 * h, np.ones(9, bool))):
        (value, aux), gradient = value_and_grad(rows, mask)
        assert value == 0 and aux["rank"] == 0
        assert np.all(gradient == 0)
        loss, aux = i_vne_plus(rows, h, where=mask)
        assert np.isfinite(loss) and aux["similarity"] == 0


def test_a_zero_vector_has_no_gradient_and_spoils_none():
    za, zb = jnp.asarray(sample(9, 12)).at[3].set(0.0), jnp.asarray(sample(9, 12, 1))
    gradients = jax.grad(lambda a, b: i_vne_plus(a, b)[0], (0, 1))(za, zb)
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert np.all(gradients[0][3] == 0) and np.any(gradients[0][4] != 0)


def test_one_row_is_a_pure_state():
    (value, aux), gradient = value_and_grad(sample(1, 12))
    assert_allclose(value, 0, atol=1e-6)
    assert aux["rank"] == 1
    assert_allclose(gradient, 0, atol=1e-5)


def test_bfloat16_is_computed_in_float32():
    h = jnp.asarray(sample(20, 12), jnp.bfloat16)
    value, aux = vne(h)
    assert value.dtype == aux["eigenvalues"].dtype == jnp.float32
    assert_allclose(value, of_the_paper(np.asarray(h, np.float32))[0], rtol=1e-5)


def test_bad_arguments_are_named():
    h = sample(8, 12)
    with pytest.raises(TypeError, match=r"argument 'zb' is float32\[7,12\]"):
        i_vne_plus(h, h[:7])
    with pytest.raises(TypeError, match=r"argument 'zb' is float32\[8,11\]"):
        i_vne_plus(h, h[:, :11])
    with pytest.raises(TypeError, match=r"argument 'where' is bool\[9\]"):
        vne(h, where=np.ones(9, bool))
    with pytest.raises(TypeError, match=r"argument 'loss' is float32\[8,12\]"):
        vne_regularised(h, h, alpha=0.1)
    with pytest.raises(ValueError, match="argument 'alpha' is nan"):
        i_vne_plus(h, h, alpha=float("nan"))
    with pytest.raises(ValueError, match="argument 'axis_name' is 'rows', expected"):
        vne(h, axis_name="rows")
