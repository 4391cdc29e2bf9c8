"""The loss and its gradient in float64, over devices, and what it does not accept."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from jaxzoo.ssl.vicreg import variance_term, vicreg_loss

CONVENTIONS = ("official", "paper", "vicregl")
ROWS: Any = P("d")


def views(batch, width, seed=0):
    """Two views: dimensions on either side of the hinge, correlated, off centre."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) / np.sqrt(width) + np.eye(width)
    za = rng.normal(size=(batch, width)) @ mix * rng.uniform(0.3, 1.5, width) + 3
    zb = za + 0.3 * rng.normal(size=(batch, width))
    return za.astype(np.float32), zb.astype(np.float32)


def of_the_paper(za, zb, convention="official"):
    """Equations 1 to 6, and their derivatives, in float64."""
    za, zb = za.astype(np.float64), zb.astype(np.float64)
    batch, width = za.shape
    v_views = {"official": 0.5, "paper": 1.0, "vicregl": 0.5}[convention]
    c_views = {"official": 1.0, "paper": 1.0, "vicregl": 0.5}[convention]
    terms = {"invariance": ((za - zb) ** 2).mean(), "variance": 0.0, "covariance": 0.0}
    gap = 2 * (za - zb) / za.size
    gradients = [25 * gap, -25 * gap]
    for i, z in enumerate((za, zb)):
        std = np.sqrt(z.var(axis=0, ddof=1) + 1e-4)
        cov = np.cov(z, rowvar=False)
        cov = cov - np.diag(np.diag(cov))
        terms["variance"] += v_views * np.maximum(0, 1 - std).mean()
        terms["covariance"] += c_views * (cov**2).sum() / width
        x = z - z.mean(axis=0)
        pushed = np.where(std < 1, -1 / std, 0) / (width * (batch - 1))
        gradients[i] += 25 * v_views * pushed * x
        gradients[i] += c_views * 4 * x @ cov / (width * (batch - 1))
    value = 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]
    return value, terms, gradients


def value_and_grad(za, zb, **kwargs):
    def loss(za, zb):
        return vicreg_loss(za, zb, **kwargs)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(za, zb)


def assert_near(actual, expected, rtol=1e-5):
    assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("batch", [2, 6, 23, 24, 25, 60])  # of 24 dimensions
def test_value_terms_and_gradient_by_the_paper(batch, convention):
    za, zb = views(batch, 24)
    expected, terms, gradients = of_the_paper(za, zb, convention)
    (value, aux), got = value_and_grad(za, zb, convention=convention)
    assert_allclose(value, expected, rtol=1e-5)
    for name, term in terms.items():
        assert_allclose(aux[name], term, rtol=1e-5)
    std = np.stack([z.std(axis=0, ddof=1) for z in (za, zb)])
    assert_allclose(aux["std"], std.mean(), rtol=1e-5)
    for a, b in zip(got, gradients, strict=True):
        assert_near(a, b)


def test_conventions_differ_by_the_factors_of_their_released_codes():
    za, zb = views(12, 24)
    aux = {c: vicreg_loss(za, zb, convention=c)[1] for c in CONVENTIONS}
    official = aux["official"]
    assert_allclose(aux["paper"]["variance"], 2 * official["variance"])
    assert_allclose(aux["paper"]["covariance"], official["covariance"])
    assert_allclose(aux["vicregl"]["variance"], official["variance"])
    assert_allclose(aux["vicregl"]["covariance"], official["covariance"] / 2)


def test_known_answers():
    """Columns of a Hadamard matrix are centred, uncorrelated and of one length."""
    h = np.array([[1, 1], [1, -1]])
    columns = np.kron(np.kron(h, h), h)[:, 1:].astype(np.float32)  # [8, 7]
    scale = np.float32(np.sqrt(7 / 8))  # variance 1 with B - 1
    loss, aux = vicreg_loss(scale * columns, scale * columns, eps=1e-12)
    assert_allclose([loss, aux["covariance"], aux["std"]], [0, 0, 1], atol=1e-6)
    same = np.repeat(columns[:, :1], 7, axis=1)  # one column seven times: C = 8/7
    _, aux = vicreg_loss(same, same)
    assert_allclose(aux["covariance"], 2 * 6 * (8 / 7) ** 2, rtol=1e-6)
    _, aux = vicreg_loss(0 * columns + 5, 0 * columns + 5)  # collapsed
    assert_allclose(aux["variance"], 1 - 0.01, rtol=1e-6)
    assert aux["std"] == 0


@pytest.mark.parametrize("batch", [24, 31, 32, 33])  # of 32 dimensions
def test_the_gram_form_keeps_its_digits_where_columns_are_nearly_uncorrelated(batch):
    """There the squared variances are most of the sum that they are taken from."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(batch, 32))
    u, _, v = np.linalg.svd(z - z.mean(axis=0), full_matrices=False)
    z = (np.sqrt(batch - 1) * u @ v).astype(np.float32)
    _, terms, _ = of_the_paper(z, z)
    covariance = vicreg_loss(z, z)[1]["covariance"]
    assert_allclose(covariance, terms["covariance"], rtol=1e-5, atol=1e-9)


def test_fewer_examples_than_dimensions_cost_no_matrix_of_dimensions():
    """256 x 2048: 13 GF and 86 MB by the covariance matrices, compiled, not run."""
    z = jax.ShapeDtypeStruct((256, 2048), jnp.float32)
    step = jax.jit(jax.value_and_grad(lambda a, b: vicreg_loss(a, b)[0], (0, 1)))
    compiled = step.lower(z, z).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    assert cost is not None and memory is not None
    assert cost["flops"] < 1.7e9
    assert memory.temp_size_in_bytes < 16e6  # one 2048 x 2048 has 17 MB


def sharded(devices, function, *arrays, check_vma=True):
    mesh = jax.make_mesh(
        (devices,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    out: Any = ((P(), P()), (ROWS, ROWS))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=ROWS, out_specs=out, check_vma=check_vma
    )
    return jax.jit(mapped)(*arrays)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("batch, width", [(16, 24), (16, 16), (16, 12)])
def test_statistics_are_those_of_the_whole_batch(batch, width, devices):
    """16 x 12: each device has fewer examples than dimensions, the whole has not."""
    za, zb = views(batch, width)
    expected, _, gradients = of_the_paper(za, zb)
    (value, aux), got = sharded(
        devices, lambda a, b: value_and_grad(a, b, axis_name="d"), za, zb
    )
    assert_allclose(value, expected, rtol=1e-5)
    whole = value_and_grad(za, zb)[0][1]
    for name in whole:
        assert_allclose(aux[name], whole[name], rtol=1e-5)
    for a, b in zip(got, gradients, strict=True):
        assert_near(a, b)


def test_the_mean_of_the_parts_losses_is_something_else():
    za, zb = views(16, 12)
    parts = [vicreg_loss(za[i : i + 8], zb[i : i + 8])[0] for i in (0, 8)]
    assert abs(float(np.mean(parts)) / of_the_paper(za, zb)[0] - 1) > 0.2


@pytest.mark.parametrize("width", [24, 6])
def test_masked_rows_are_inert(width):
    za, zb = views(12, width)
    mask = np.arange(12) % 3 != 1
    spoilt = [np.where(mask[:, None], z, np.nan) for z in (za, zb)]
    (value, aux), got = value_and_grad(*spoilt, where=mask)
    expected, terms, gradients = of_the_paper(za[mask], zb[mask])
    assert_allclose(value, expected, rtol=1e-5)
    assert_allclose(aux["std"], vicreg_loss(za[mask], zb[mask])[1]["std"], rtol=1e-5)
    for a, b in zip(got, gradients, strict=True):
        assert_near(a[mask], b)
        assert np.all(a[~mask] == 0)


@pytest.mark.parametrize("devices", [2, 8])
def test_a_part_may_be_all_masked(devices):
    za, zb = views(16, 12)
    mask = np.arange(16) < 7
    (value, _), got = sharded(
        devices,
        lambda a, b, m: value_and_grad(a, b, where=m, axis_name="d"),
        za, zb, mask,
    )  # fmt: skip
    expected, _, gradients = of_the_paper(za[mask], zb[mask])
    assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(got, gradients, strict=True):
        assert_near(a[mask], b)


@pytest.mark.parametrize("rows", [0, 1])
def test_with_fewer_than_two_rows_left_there_is_no_variance(rows):
    za, zb = views(8, 12)
    (value, aux), gradients = value_and_grad(za, zb, where=np.arange(8) < rows)
    assert_allclose(aux["invariance"], ((za - zb)[:rows] ** 2).sum() / 12, rtol=1e-5)
    assert aux["variance"] == aux["covariance"] == aux["std"] == 0
    assert_allclose(value, 25 * aux["invariance"])
    assert all(np.all(np.isfinite(g)) for g in gradients)
    assert rows or all(np.all(g == 0) for g in gradients)


def test_zero_vectors_have_a_finite_gradient():
    zero, za = jnp.zeros((8, 12)), jnp.asarray(views(8, 12)[0])
    for pair in ((zero, zero), (zero, za), (za.at[3].set(0.0), za)):
        (value, _), gradients = value_and_grad(*pair)
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(g)) for g in gradients)


def test_bfloat16_is_computed_in_float32():
    za, zb = (jnp.asarray(z, jnp.bfloat16) for z in views(24, 12))
    (value, aux), gradients = value_and_grad(za, zb)
    expected = of_the_paper(np.asarray(za, np.float32), np.asarray(zb, np.float32))
    assert value.dtype == aux["std"].dtype == jnp.float32
    assert_allclose(value, expected[0], rtol=1e-5)
    assert gradients[0].dtype == jnp.bfloat16


def test_variance_term_pushes_a_collapsing_batch_apart():
    z = 0.1 * views(16, 12)[0]
    expected = np.maximum(0, 1 - np.sqrt(z.var(axis=0, ddof=1) + 1e-4)).mean()
    (value, aux), gradient = jax.value_and_grad(variance_term, has_aux=True)(z)
    assert_allclose(value, expected, rtol=1e-5)
    assert_allclose(aux["std"], z.std(axis=0, ddof=1), rtol=1e-5)
    further, _ = variance_term(z - 0.1 * gradient)
    assert further < value
    whole, _ = vicreg_loss(z, z, invariance=0.0, covariance=0.0)
    assert_allclose(whole, 25 * value, rtol=1e-6)


def test_a_batch_of_one_is_refused_and_one_row_per_device_is_not():
    za, zb = views(8, 12)
    with pytest.raises(ValueError, match="argument 'za' has a batch of 1, expected 2"):
        vicreg_loss(za[:1], zb[:1])
    with pytest.raises(ValueError, match="argument 'z' has a batch of 1, .* not defin"):
        variance_term(za[:1])
    (value, _), _ = sharded(8, lambda a, b: value_and_grad(a, b, axis_name="d"), za, zb)
    assert_allclose(value, of_the_paper(za, zb)[0], rtol=1e-5)


def test_bad_arguments_are_named():
    za, zb = views(8, 12)
    with pytest.raises(TypeError, match=r"argument 'zb' is float32\[7,12\]"):
        vicreg_loss(za, zb[:7])
    with pytest.raises(TypeError, match=r"argument 'zb' is float32\[8,11\]"):
        vicreg_loss(za, zb[:, :11])
    with pytest.raises(TypeError, match=r"argument 'where' is bool\[9\]"):
        vicreg_loss(za, zb, where=np.ones(9, bool))
    with pytest.raises(ValueError, match="'convention' is 'swav'.*'official' or 'pap"):
        vicreg_loss(za, zb, convention=cast(Any, "swav"))
    with pytest.raises(ValueError, match="argument 'eps' is 0.0, expected .* >= 1e-12"):
        vicreg_loss(za, zb, eps=0.0)
    with pytest.raises(ValueError, match="argument 'covariance' is -1.0, expected"):
        vicreg_loss(za, zb, covariance=-1.0)
    with pytest.raises(ValueError, match="argument 'axis_name' is 'rows', expected"):
        vicreg_loss(za, zb, axis_name="rows")
