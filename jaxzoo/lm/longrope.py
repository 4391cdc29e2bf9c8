"""LongRoPE: how much to slow each pair of features is searched for, not derived.

With head size H, a trained context L and pairs i of frequency f_i = base^(-2i/H), a
token at place n is turned by

    n f_i  for n < n_hat,   n f_i / l_i  for the others,   1 <= l_1 <= ... <= l_(H/2)

(l, n_hat) come from an evolutionary search: it begins with the factors of position
interpolation, NTK and YaRN and with mutations of them, keeps the best ones by the loss
on long texts, and makes children that are in order too: a mutation draws some genes
anew, each between the two beside it, and a crossover takes genes of the other parent
where they keep the order.

    seeds = jnp.stack([plain / f for f in (interpolated, ntk, yarn)])
    factors, aux = evolve(key, loss, seeds, largest=1.25 * 4)
    speeds = lambda places: longrope_frequencies(places, factors, aux["start"])
    body = Transformer(64, 2, 4, frequencies=speeds)

To go further, tune at that length and search again on what was tuned; and for short
texts search once more, and let `choose_factors` take the row for the length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "longrope",
    "title": "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens",
    "arxiv": "2402.13753",
    "year": 2024,
    "authors": "Yiran Ding, Li Lyna Zhang, Chengruidong Zhang, Yuanyuan Xu, Ning "
    "Shang, Jiahang Xu, Fan Yang, Mao Yang",
    "where": "Section 3.1 (the problem and its two non-uniformities), 3.2 (the search "
    "space and Algorithm 1 under the monotonic constraint), 3.3 (search, tune, search "
    "again; factors for short contexts).",
    "differs": "Factors are any numbers and not steps of 0.01. Children keep the order "
    "by how they are drawn: each gene between its neighbours, a gene of the other "
    "parent where it fits; upstream draws again until a child is in order and new. The "
    "population begins with the factors of PI, NTK and YaRN, as in the paper; the "
    "released code takes YaRN's alone, and does not search for the first tokens. Its "
    "attention scale is a function of its own, and the experiment does without, also "
    "for YaRN. The experiment has byte models of two blocks, 128 bytes that become "
    "512, and 92 individuals a search in the place of 1344; the second search is for "
    "twice, not eight times, the tuned length.",
}

__all__ = ["attention_scale", "choose_factors", "evolve", "longrope_frequencies"]

# Tokens at the start that keep their frequencies: the paper's choices.
STARTS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


@typed
def longrope_frequencies(
    places: Int[ArrayLike, "*batch"], factors: Float[ArrayLike, " half"],
    start: Int[ArrayLike, ""] | int = 0, *, base: float = 10000.0,
) -> Float[Array, "*batch half"]:  # fmt: skip
    """Radians by which each pair of each token turns per place.

    base^(-2i/H) for n < n_hat,  base^(-2i/H) / l_i  for the others

    Args:
        places: n, from 0, `[...]`.
        factors: l, `[H/2]`; below 1e-3 they count as that.
        start: n_hat >= 0, tokens that are turned as in training.
        base: of the frequencies that the model was trained with, > 1.

    Returns:
        float32 `[..., H/2]`: what `Transformer(frequencies=...)` wants of a function of
        places.

    Raises:
        ValueError: a number is out of range.

    >>> f = longrope_frequencies(jnp.arange(3), jnp.array([1.0, 4.0]), 1)
    >>> f.tolist()
    [[1.0, 0.01], [1.0, 0.0025], [1.0, 0.0025]]
    """
    check_range("base", base, above=1.0, below=float("inf"))
    check_range("start", start, low=0)
    factors = jnp.maximum(as_float32(factors), 1e-3)
    half = factors.shape[0]
    plain = base ** (-jnp.arange(half, dtype=factors.dtype) / half)
    is_first = jnp.asarray(places) < jnp.asarray(start)
    row = (None,) * is_first.ndim
    return jnp.where(is_first[..., None], plain[row], (plain / factors)[row])


@typed
def evolve(
    key: Key[Array, ""], fitness: Callable[[Array, Array], Any],
    seeds: Float[ArrayLike, "seeds half"], *,
    largest: float, starts: tuple[Any, ...] = STARTS, population: int = 64,
    iterations: int = 40, num_parents: int = 32, num_mutations: int = 16,
    num_crossovers: int = 16, rate: float = 0.3,
) -> tuple[Float[Array, " half"], dict[str, Array]]:  # fmt: skip
    """Searches factors in ascending order, and how many first tokens go without them.

    argmin fitness(l, n_hat)  over  1 <= l_1 <= ... <= l_(H/2) <= largest

    Everything is of static shape and under jit; individuals are measured one after the
    other, `population + iterations (num_mutations + num_crossovers)` of them.

    Args:
        key: a typed key, consumed.
        fitness: `(factors [H/2], start) -> loss`, as on long texts; NaN is the worst.
        seeds: `[S, H/2]`, ascending, cut to [1, largest]: the first, with start 0.
        largest: >= 1; the paper's is 1.25 times the extension, the released 1 + that.
        starts: choices for n_hat, whole numbers >= 0.
        population: individuals at first, >= S: mutations of the seeds beside them.
        iterations: rounds of choice, mutation and crossover, >= 1.
        num_parents: the best, which are kept and have children, in [2, population].
        num_mutations: children of one parent in each round, >= 1.
        num_crossovers: children of two, >= 1; if equal to the better one, a mutation.
        rate: probability that a gene changes, in [0, 1]; of mutations one does anyway.

    Returns:
        `(factors, aux)`: float32 `[H/2]`, ascending. aux holds "start", int32, "loss",
        "seed_losses" `[S]`, and "history" `[iterations + 1]`, the lowest loss so far.

    Raises:
        ValueError: a number is out of range; names it.

    >>> target = jnp.array([1.0, 1.5, 4.0, 4.0])
    >>> fitness = lambda factors, n: jnp.sum((factors - target) ** 2) + jnp.abs(n - 4)
    >>> seeds = jnp.array([[4.0, 4.0, 4.0, 4.0], [1.0, 1.6, 2.5, 4.0]])
    >>> search = jax.jit(lambda key: evolve(key, fitness, seeds, largest=5.0))
    >>> factors, aux = search(jax.random.key(0))
    >>> aux["seed_losses"].tolist(), int(aux["start"]), bool(aux["loss"] < 0.1)
    ([19.25, 6.26], 4, True)
    """
    check_range("largest", largest, low=1.0, below=float("inf"))
    if not starts or min(starts) < 0:
        raise ValueError(f"argument 'starts' is {starts}, expected numbers >= 0.")
    check_range("population", population, low=max(len(seeds), 2))
    check_range("iterations", iterations, low=1)
    check_range("num_parents", num_parents, low=2, high=population)
    check_range("num_mutations", num_mutations, low=1)
    check_range("num_crossovers", num_crossovers, low=1)
    check_range("rate", rate, low=0.0, high=1.0)
    seeds = jnp.clip(as_float32(seeds), 1.0, largest)
    choices, half = jnp.array(starts, jnp.int32), seeds.shape[1]

    def measured(factors: Array, start: Array) -> Array:
        loss = jax.lax.map(lambda one: as_float32(fitness(*one)), (factors, start))
        return jnp.where(jnp.isnan(loss), jnp.inf, loss.astype(factors.dtype))

    def ordered(noise: Array, own: Array, other: Any, takes: Array) -> Array:
        """`own` with some genes drawn anew, or taken from `other` where they fit."""

        def gene(low: Array, x: tuple[Array, ...]) -> tuple[Array, Array]:
            own, high, draw, other, take = x
            drawn = jnp.minimum(low + draw * (high - low), high)
            taken = jnp.where((low <= other) & (other <= high), other, own)
            new = jnp.where(take, drawn if is_new else taken, own)
            return new, new

        is_new = other is None
        above = jnp.concatenate([own[1:], jnp.full(1, largest, own.dtype)])
        genes = (own, above, noise, own if is_new else other, takes)
        return jax.lax.scan(gene, jnp.ones_like(own[0]), genes)[1]

    def mutated(noise: Array, factors: Array, start: Array) -> tuple[Array, Array]:
        """Noise: draws `[H/2]`, whether each gene changes, which one does anyway."""
        draws, chances, (anyway, which) = jnp.split(noise, [half, 2 * half + 1])
        changes = chances < rate
        # One at least, or the child would be its parent. The last gene is the start.
        forced = (anyway * (half + 1)).astype(jnp.int32)
        changes = changes | (jnp.arange(half + 1) == forced)
        new = ordered(draws, factors, None, changes[:-1])
        other = choices[(which * len(starts)).astype(jnp.int32)]
        return new, jnp.where(changes[-1], other, start)

    def crossed(noise: Array, factors: Array, start: Array) -> tuple[Array, Array]:
        """Of the better parent, row 0, and the other one, row 1."""
        chances, again = jnp.split(noise, [half + 1])
        new = ordered(chances[:-1], factors[0], factors[1], chances[:-1] < rate)
        begin = jnp.where(chances[-1] < rate, start[1], start[0])
        is_same = jnp.all(new == factors[0]) & (begin == start[0])
        instead, begin_instead = mutated(again, factors[0], start[0])
        new = jnp.where(is_same, instead, new)
        return new, jnp.where(is_same, begin_instead, begin)

    def best(factors: Array, start: Array, loss: Array) -> tuple[Array, ...]:
        order = jnp.argsort(loss)[:num_parents]
        return factors[order], start[order], loss[order]

    def round_of(parents: tuple[Array, ...], key: Array) -> tuple[Any, Array]:
        factors, start, loss = parents
        count = num_mutations + num_crossovers
        # One draw for all: of the children's genes, then of their parents.
        noise = jax.random.uniform(key, (count, 3 * half + 6), factors.dtype)
        picks, noise = noise[:, :2], noise[:, 2:]
        first = (picks[:, 0] * num_parents).astype(jnp.int32)
        step = 1 + (picks[:, 1] * (num_parents - 1)).astype(jnp.int32)
        some, others = first[:num_mutations], first[num_mutations:]
        pairs = jnp.stack([others, (others + step[num_mutations:]) % num_parents], 1)
        pairs = jnp.sort(pairs, axis=1)
        own = noise[:num_mutations, half + 1 :]
        some = jax.vmap(mutated)(own, factors[some], start[some])
        others = jax.vmap(crossed)(noise[num_mutations:], factors[pairs], start[pairs])
        children = _joined(some, others)
        parents = best(*_joined(parents, (*children, measured(*children))))
        return parents, parents[2][0]

    keys = jax.random.split(key)
    zeros, rest = jnp.zeros(population, jnp.int32), population - len(seeds)
    noise = jax.random.uniform(keys[0], (rest, 2 * half + 3), seeds.dtype)
    copies = seeds[jnp.arange(rest) % len(seeds)]
    more = jax.vmap(mutated)(noise, copies, zeros[:rest])
    factors, start = _joined((seeds, zeros[rest:]), more)
    losses = measured(factors, start)
    parents = best(factors, start, losses)
    first, keys = parents[2][:1], jax.random.split(keys[1], iterations)
    parents, history = jax.lax.scan(round_of, parents, keys)
    factors, start, loss = (x[0] for x in parents)
    aux = {"start": start, "loss": loss, "seed_losses": losses[: len(seeds)]}
    return factors, aux | {"history": jnp.concatenate([first, history])}


@typed
def choose_factors(
    lengths: Int[ArrayLike, "*batch"],
    limits: Int[ArrayLike, " rows"],
    factors: Float[ArrayLike, "rows half"],
) -> tuple[Float[Array, "*batch half"], dict[str, Array]]:
    """The row of a table for texts of these lengths: the first that is long enough.

    Args:
        lengths: tokens, `[...]`.
        limits: the length that each row was searched for, `[R]`, ascending.
        factors: `[R, H/2]`.

    Returns:
        `(factors, aux)`: float32 `[..., H/2]`, the last row's beyond the last limit;
        `aux["index"]`, int32 `[...]`, the row, for a table of starts.

    Raises:
        TypeError: shapes do not fit.

    >>> table = jnp.array([[1.0, 1.0], [1.0, 4.0]])
    >>> lengths, limits = jnp.array([100, 129, 9999]), jnp.array([128, 512])
    >>> choose_factors(lengths, limits, table)[0].tolist()
    [[1.0, 1.0], [1.0, 4.0], [1.0, 4.0]]
    """
    limits = jnp.asarray(limits)
    index = jnp.searchsorted(limits, jnp.asarray(lengths).astype(limits.dtype))
    index = jnp.minimum(index, len(limits) - 1).astype(jnp.int32)
    return jnp.take(as_float32(factors), index, axis=0), {"index": index}


@typed
def attention_scale(
    scale: Float[ArrayLike, "*batch"] | float, *, trained_length: int
) -> Float[Array, "*batch"]:
    """What the released code multiplies queries, and keys, by: logits by its square.

    sqrt(1 + log s / log L)

    Args:
        scale: s, new context over trained context, `[...]`; below 1 it counts as 1.
        trained_length: L >= 2, the context that the model was trained on.

    Returns:
        float32 `[...]`, at least 1: the "su" policy, Hugging Face's default for
        "longrope". The paper has none.

    Raises:
        ValueError: a number is out of range.

    >>> attention_scale(jnp.array([1.0, 4.0, 32.0]), trained_length=4096).tolist()
    [1.0, 1.0801, 1.1902]
    """
    check_range("trained_length", trained_length, low=2)
    if isinstance(scale, float):
        check_range("scale", scale, above=0.0)
    s = jnp.maximum(as_float32(scale), 1.0)
    return jnp.sqrt(1.0 + jnp.log(s) / jnp.log(float(trained_length)))


def _joined(some: Any, more: Any) -> list[Array]:
    return [jnp.concatenate(pair) for pair in zip(some, more, strict=True)]


def _ascending(key: Array, *rows: int) -> Array:
    draws = jax.random.uniform(key, (*rows, 8), minval=1.2, maxval=3.8)
    return jnp.sort(draws, axis=-1)


def _evolve_example(key: Array):
    def fitness(factors: Array, start: Array) -> Array:
        target = jnp.linspace(1.0, 4.0, 8)
        return jnp.sum(jnp.square(jnp.log(factors / target))) + 0.01 * start

    sizes = {"population": 6, "num_parents": 4, "num_mutations": 3, "iterations": 3}
    knobs = sizes | {"largest": 5.0, "num_crossovers": 3}
    return (key, fitness, _ascending(key, 2)), knobs


EXAMPLES = {
    longrope_frequencies: lambda key: (
        (jnp.tile(jnp.arange(8), (2, 1)), _ascending(key), jnp.array(3)), {}
    ),
    evolve: _evolve_example,
    choose_factors: lambda key: (
        (jnp.arange(1, 9) * 8, jnp.array([16, 64]), _ascending(key, 2)), {}
    ),
    attention_scale: lambda key: (
        (jax.random.uniform(key, (8,), minval=1.5, maxval=8.0),),
        {"trained_length": 128},
    ),
}  # fmt: skip
