"""Rescaled frequencies against the paper, and a search that keeps its constraints."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.lm.longrope import (
    attention_scale,
    choose_factors,
    evolve,
    longrope_frequencies,
)
from jaxzoo.lm.yarn import rope_frequencies
from jaxzoo.nn.language_model import LanguageModel
from jaxzoo.nn.transformer import Transformer, rotary

SMALL: dict[str, Any] = {
    "largest": 5.0, "population": 12, "iterations": 6, "num_parents": 6,
    "num_mutations": 5, "num_crossovers": 5,
}  # fmt: skip
SEEDS = jnp.array([[4.0, 4.0, 4.0, 4.0], [1.0, 1.5, 2.5, 4.0]])


def searched(key, fitness, **knobs):
    return jax.jit(lambda k: evolve(k, fitness, SEEDS, **(SMALL | knobs)))(key)


def of_the_paper(places, factors, start, base=10000.0):
    """Section 3.1, one place and one pair after the other."""
    half = len(factors)
    angles = np.zeros((len(places), half))
    for row, n in enumerate(places):
        for i in range(half):
            rescale = 1.0 if n < start else 1.0 / factors[i]
            angles[row, i] = rescale * n / base ** (2 * i / (2 * half))
    return angles


def test_angles_by_the_paper(key):
    factors = np.array([1.0, 1.3, 2.2, 4.9])
    places = np.array([0, 1, 3, 4, 5, 99, 100, 511])
    x = jax.random.normal(key, (1, len(places), 2, 8))

    @jax.jit
    def turned(start):
        f = longrope_frequencies(jnp.array(places), jnp.array(factors), start)
        return f, rotary(x, jnp.array(places)[None], frequencies=f[None])

    for start in (0, 1, 4, 100):
        f, got = turned(jnp.array(start))
        angles = np.asarray(f, np.float64) * places[:, None]
        assert_allclose(angles, of_the_paper(places, factors, start), rtol=1e-5)
        # Turned as the transformer turns them.
        exact = np.asarray(x, np.float64)
        z = (exact[..., :4] + 1j * exact[..., 4:]) * np.exp(1j * angles[None, :, None])
        assert_allclose(got, np.concatenate([z.real, z.imag], -1), atol=1e-4)


def test_factors_of_one_are_plain_rotary(key):
    """And tokens before the start see only tokens before it: nothing has changed."""
    tokens = jax.random.randint(key, (2, 10), 0, 32)

    @jax.jit
    def logits(start):
        def of(frequencies):
            body = Transformer(16, 2, 2, implementation="ref", frequencies=frequencies)
            return LanguageModel(32, 16, body)

        params = of(None).init(key, tokens)
        ones, twos = (
            of(lambda p, f=f: longrope_frequencies(p, jnp.full(4, f), start))
            for f in (1.0, 2.0)
        )
        return [model.apply(params, tokens)[0] for model in (of(None), ones, twos)]

    for start in (0, 3, 64):
        plain, one, slow = logits(jnp.array(start))
        assert_allclose(one, plain, atol=1e-5)
        changed = np.abs(slow - plain).max(axis=(0, 2)) > 1e-5
        assert not changed[:start].any() and (changed[start + 1 :].any() or start == 64)


def test_seeds_are_those_of_interpolation():
    """Equal factors for all pairs and no first tokens: positions are squeezed."""
    knobs: dict[str, Any] = {"width": 16, "trained_length": 64}
    squeezed, _ = rope_frequencies(4.0, method="interpolation", **knobs)
    got = longrope_frequencies(jnp.array(7), jnp.full(8, 4.0))
    assert_allclose(got, squeezed, rtol=1e-6)


def forbidden(factors):
    inside = (factors[0] >= 1.0) & (factors[-1] <= 5.0)
    return ~inside | jnp.any(jnp.diff(factors) < 0)


def test_nobody_breaks_the_order(key):
    """One who did would have the lowest loss, and be found."""

    def fitness(factors, start):
        noise = jnp.sin(1e3 * jnp.sum(factors * jnp.arange(1.0, 5.0)) + start)
        return jnp.where(forbidden(factors), -10.0, noise)

    search = jax.jit(lambda k: evolve(k, fitness, SEEDS, **SMALL))
    for seed in range(10):
        factors, aux = search(jax.random.key(seed))
        assert aux["loss"] >= -1.0 and not forbidden(factors)
        assert (jnp.diff(aux["history"]) <= 0).all()


def test_best_is_measured_and_never_worse_than_the_seeds(key):
    def fitness(factors, start):
        return jnp.sum(jnp.square(factors - 3.0 / factors)) + 0.1 * start

    factors, aux = searched(key, fitness)
    assert_allclose(aux["loss"], fitness(factors, aux["start"]), rtol=1e-6)
    expected = [fitness(seed, 0) for seed in SEEDS]
    assert_allclose(aux["seed_losses"], jnp.stack(expected), rtol=1e-6)
    assert aux["history"].shape == (7,) and aux["history"][-1] == aux["loss"]
    assert aux["loss"] < min(expected)


def test_the_optimum_is_found_with_the_numbers_of_the_paper():
    """Where it is ascending; where it is not, the closest that is."""

    @jax.jit
    def found(target):
        def fitness(factors, start):
            error = jnp.sum(jnp.square(factors - target))
            return error + 0.01 * jnp.abs(start - 16)

        return evolve(jax.random.key(3), fitness, SEEDS, largest=5.0)

    for target, closest in (
        ([1.2, 1.7, 3.1, 4.4], [1.2, 1.7, 3.1, 4.4]),
        ([2.0, 4.0, 2.0, 4.5], [2.0, 3.0, 3.0, 4.5]),  # isotonic regression
    ):
        factors, aux = found(jnp.array(target))
        assert_allclose(factors, closest, atol=0.25)
        assert aux["start"] == 16


def test_children_have_genes_of_both_parents(key):

    def individuals(**knobs):
        seen = []

        def fitness(factors, start):
            jax.debug.callback(lambda f: seen.append(f.tolist()), factors, ordered=True)
            return jnp.sum(factors)

        searched(key, fitness, **knobs)
        jax.effects_barrier()
        return seen

    assert len(individuals()) == 12 + 6 * 10
    both = individuals(
        rate=1.0, population=2, num_parents=2, iterations=1, num_mutations=1,
        num_crossovers=8, starts=(0,),
    )  # fmt: skip
    crossed = np.array(both[3:])
    # [1, 1.5, 2.5, 4] is better; of [4, 4, 4, 4] what is in order replaces its genes.
    assert (crossed == np.array([1.0, 1.5, 4.0, 4.0])).all(axis=1).any()


def test_nan_is_worst(key):
    def fitness(factors, start):
        return jnp.where(factors[0] < 2.0, jnp.nan, factors[0])

    factors, aux = searched(key, fitness)
    assert factors[0] >= 2.0 and jnp.isinf(aux["seed_losses"][1])


def test_the_row_for_a_length():
    limits, table = jnp.array([128, 256, 512]), jnp.arange(12.0).reshape(3, 4)
    lengths = np.array([1, 128, 129, 256, 300, 512, 513, 10**6])
    got, aux = choose_factors(jnp.array(lengths), limits, table)
    rows = [next((i for i, m in enumerate(limits) if n <= m), 2) for n in lengths]
    assert_array_equal(aux["index"], rows)
    assert_array_equal(got, np.asarray(table)[rows])


def test_scale_of_the_released_code():
    expected = [np.sqrt(1 + np.log(s) / np.log(4096)) for s in (1.0, 2.0, 32.0)]
    got = attention_scale(jnp.array([1.0, 2.0, 32.0]), trained_length=4096)
    assert_allclose(got, expected, rtol=1e-6)
    assert attention_scale(0.5, trained_length=4096) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"largest": 0.5}, "'largest' is 0.5"),
        ({"starts": ()}, "'starts' is ()"),
        ({"population": 1}, "'population' is 1"),
        ({"num_parents": 13}, "'num_parents' is 13"),
        ({"rate": 1.5}, "'rate' is 1.5"),
    ],
)
def test_bad_numbers_are_named(key, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        evolve(key, lambda f, s: jnp.sum(f), SEEDS, **(SMALL | change))
    with pytest.raises(ValueError, match="'start' is -1"):
        longrope_frequencies(jnp.arange(3), jnp.ones(2), -1)
