"""Rotary frequencies against the paper and the released code, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.yarn import apply_rope, attention_scale, rope_frequencies
from jaxzoo.nn.transformer import rotary

LLAMA: dict[str, Any] = {"width": 128, "trained_length": 4096}
SMALL: dict[str, Any] = {"width": 16, "trained_length": 256}


def of_the_paper(scale, method, width, length, base=10000.0, alpha=1.0, beta=32.0):
    """One frequency after the other, by wave lengths as in sections 3.1 and 3.2."""
    found = []
    for i in range(width // 2):
        wave = 2 * np.pi * base ** (2 * i / width)
        if method == "none":
            found.append(2 * np.pi / wave)
        elif method == "interpolation":
            found.append(2 * np.pi / wave / scale)
        elif method == "ntk":
            found.append((base * scale ** (width / (width - 2))) ** (-2 * i / width))
        else:
            r = length / wave
            g = 0.0 if r < alpha else 1.0 if r > beta else (r - alpha) / (beta - alpha)
            plain = 2 * np.pi / wave
            found.append((1 - g) * plain / scale + g * plain)
    return np.array(found)


def as_released(scale, width, length, base=10000.0, alpha=1.0, beta=32.0):
    """The ramp over whole pairs, between the two where r crosses beta and alpha."""
    pairs = np.arange(width)  # twice as many as there are: the ramp may end beyond
    plain = base ** (-2 * pairs / width)
    r = length * plain / (2 * np.pi)
    fast = np.flatnonzero(r >= beta)
    slow = np.flatnonzero(r <= alpha)
    low = fast[-1] if len(fast) else 0
    high = slow[0] if len(slow) else width - 1
    keep = 1 - np.clip((pairs - low) / max(high - low, 0.001), 0, 1)
    return (plain / scale * (1 - keep) + plain * keep)[: width // 2]


@pytest.mark.parametrize("method", ["none", "interpolation", "ntk", "yarn"])
@pytest.mark.parametrize("knobs", [LLAMA, SMALL])
@pytest.mark.parametrize("scale", [1.0, 4.0, 31.5])
def test_frequencies_by_the_paper(method, knobs, scale):
    got, _ = rope_frequencies(scale, method=method, convention="paper", **knobs)
    expected = of_the_paper(scale, method, *knobs.values())
    assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("knobs", [LLAMA, SMALL, {"width": 64, "trained_length": 100}])
@pytest.mark.parametrize("extra", [{}, {"base": 500.0, "alpha": 0.8, "beta": 12.0}])
def test_frequencies_as_released(knobs: dict[str, Any], extra: dict[str, Any]):
    got, _ = rope_frequencies(4.0, **knobs, **extra)
    assert_allclose(got, as_released(4.0, *knobs.values(), **extra), rtol=1e-6)


def test_frequencies_that_hugging_face_has():
    """Llama 2's by `_compute_yarn_parameters`: its ramp goes from pair 20 to 46."""
    got, aux = rope_frequencies(8.0, **LLAMA)
    assert_array_equal(np.flatnonzero(aux["ramp"] == 1.0), np.arange(21))
    assert_array_equal(np.flatnonzero(aux["ramp"] == 0.0), np.arange(46, 64))
    assert_allclose(aux["ramp"][33], 0.5, rtol=1e-6)
    assert_allclose(got[33], 1e4 ** (-66 / 128) * (0.5 / 8 + 0.5), rtol=1e-6)
    assert_allclose(attention_scale(8.0), 0.1 * np.log(8.0) + 1.0, rtol=1e-6)


@pytest.mark.parametrize("convention", ["released", "paper"])
def test_fast_pairs_stay_and_slow_ones_are_interpolated(convention):
    got, aux = rope_frequencies(4.0, convention=convention, **LLAMA)
    plain, squeezed = (
        rope_frequencies(4.0, method=method, **LLAMA)[0]
        for method in ("none", "interpolation")
    )
    fast, slow = aux["rotations"] > 32, aux["rotations"] < 1
    assert fast.any() and slow.any() and not (fast | slow).all()
    assert_array_equal(got[fast], plain[fast])
    assert_array_equal(got[slow], squeezed[slow])
    between = ~(fast | slow)
    assert (got[between] >= squeezed[between]).all()
    assert (got[between] <= plain[between]).all()
    assert (jnp.diff(got) < 0).all()


@pytest.mark.parametrize("method", ["interpolation", "ntk", "yarn"])
def test_a_scale_of_at_most_one_is_plain_rotary(method):
    plain, _ = rope_frequencies(1.0, method="none", **SMALL)
    for scale in (1.0, 0.25):
        got, _ = rope_frequencies(scale, method=method, **SMALL)
        assert_allclose(got, plain, rtol=1e-6)
    assert attention_scale(0.25) == 1.0


def test_the_slowest_pair_of_ntk_is_interpolated_and_the_fastest_stays():
    got, _ = rope_frequencies(8.0, method="ntk", **SMALL)
    plain, _ = rope_frequencies(8.0, method="none", **SMALL)
    assert got[0] == plain[0]
    assert_allclose(got[-1], plain[-1] / 8.0, rtol=1e-6)


def test_dynamic_scaling_is_row_by_row():
    lengths = jnp.array([100.0, 256.0, 512.0, 1024.0])
    got, _ = jax.jit(lambda s: rope_frequencies(s, **SMALL))(lengths / 256)
    for row, scale in zip(got, (1.0, 1.0, 2.0, 4.0), strict=True):
        assert_allclose(row, rope_frequencies(scale, **SMALL)[0], rtol=1e-6)
    x = jax.random.normal(jax.random.key(0), (4, 3, 2, 16))
    places = jnp.tile(jnp.arange(3) * 50, (4, 1))
    scale = attention_scale(lengths / 256)
    whole = apply_rope(x, places, got, scale=scale)
    for i in range(4):
        one = apply_rope(x[i : i + 1], places[:1], got[i], scale=float(scale[i]))
        assert_allclose(whole[i], one[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pairing", ["halves", "neighbours"])
def test_pairs_are_complex_numbers_that_turn(pairing):
    x = np.asarray(jax.random.normal(jax.random.key(1), (2, 5, 3, 8)))
    places = np.array([[0, 1, 2, 3, 4], [7, 9, 11, 200, 1000]])
    f, _ = rope_frequencies(4.0, width=8, trained_length=64)
    got = apply_rope(x, places, f, scale=1.2, pairing=pairing)
    exact = x.astype(np.float64)
    a, b = (
        (exact[..., :4], exact[..., 4:])
        if pairing == "halves"
        else (exact[..., ::2], exact[..., 1::2])
    )
    angles = places[:, :, None, None] * np.asarray(f, np.float64)
    turned = 1.2 * (a + 1j * b) * np.exp(1j * angles)
    axis = -1 if pairing == "neighbours" else -2
    expected = np.stack([turned.real, turned.imag], axis).reshape(x.shape)
    assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_it_is_the_rotation_of_the_transformer():
    x = jax.random.normal(jax.random.key(2), (1, 6, 2, 16))
    places = jnp.arange(6)[None]
    plain, _ = rope_frequencies(1.0, **SMALL)
    assert_allclose(apply_rope(x, places, plain), rotary(x, places), atol=1e-5)
    f, _ = rope_frequencies(4.0, **SMALL)
    expected = 1.1 * rotary(x, places, frequencies=f)
    assert_allclose(apply_rope(x, places, f, scale=1.1), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["interpolation", "yarn"])
def test_products_see_distances_alone_and_the_temperature(method):
    q, k = jax.random.normal(jax.random.key(3), (2, 1, 1, 1, 16))
    f, _ = rope_frequencies(4.0, method=method, **SMALL)

    def logit(i, j, scale=1.0):
        turned = [
            apply_rope(x, jnp.array([[place]]), f, scale=scale)
            for x, place in ((q, i), (k, j))
        ]
        return jnp.vdot(*turned)

    assert_allclose(logit(40, 33), logit(7, 0), rtol=1e-4, atol=1e-5)
    sharp = float(attention_scale(4.0))
    assert_allclose(logit(7, 0, sharp), sharp**2 * logit(7, 0), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 7}, "'width' is 7"),
        ({"width": 2, "method": "ntk"}, "'width' is 2"),
        ({"trained_length": 0}, "'trained_length' is 0"),
        ({"base": 1.0}, "'base' is 1.0"),
        ({"beta": 0.5}, "'beta' is 0.5"),
    ],
)
def test_bad_numbers_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        rope_frequencies(2.0, **(SMALL | change))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="'scale' is nan"):
        rope_frequencies(float("nan"), **SMALL)
    with pytest.raises(ValueError, match="'scale' is 0"):
        attention_scale(0.0)
    with pytest.raises(ValueError, match="'frequencies' has 3"):
        apply_rope(jnp.ones((1, 1, 1, 8)), jnp.zeros((1, 1), int), jnp.ones(3))
