"""Batches of sequences without padding: buckets by length of input and of output.

A batch is padded to its longest member, and has to fit into memory where all of its
members are the longest there are. Random batches of a fixed size lose both ways. Here
`bucket_bins` makes buckets of about equal lengths, `largest_batches` finds the largest
batch of each that fits, and `bucket_batches` fills them.

A batch is a number per example, as that has a fixed shape and can be jitted: all
examples of number 3 are a batch. `padding` says what they cost. Training shuffles them.

Where decoding is autoregressive, `encdec_cost` says what layers cost in the encoder,
which works once, and in the decoder, which works once per token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "bucketed_batching",
    "title": "Training and Inference Efficiency of Encoder-Decoder Speech Models",
    "arxiv": "2503.05931",
    "year": 2025,
    "authors": "Piotr Żelasko, Kunal Dhawan, Daniel Galvez, Krishna C. Puvvada, Ankita "
    "Pasad, Nithin Rao Koluguri, Ke Hu, Vitaly Lavrukhin, Jagadeesh Balam, Boris "
    "Ginsburg",
    "where": "Padding of sampled batches, 2-D bucketing, OOMptimizer, and layers moved "
    "from the decoder to the encoder.",
    "differs": "All examples are batched at once; the released sampler reads a stream. "
    "Tokens per second are not capped. The search asks a model of memory, for all "
    "buckets at once and exactly; the released one runs out of it, to within 5%. "
    "A token is costed as reading the decoder's weights, or as its FLOPs if they "
    "take longer. The experiment draws log-normal lengths, and its model is tiny.",
}

__all__ = [
    "bucket_batches", "bucket_bins", "dynamic_batches", "encdec_cost", "fixed_batches",
    "largest_batches", "padding",
]  # fmt: skip

Lengths = Int[ArrayLike, " examples"]
Bins = Int[ArrayLike, "buckets 2"]
Sizes = Int[ArrayLike, " buckets"]
OneKey = Key[Array, ""]


@typed
def padding(length: Lengths, batch: Lengths) -> dict[str, Array]:
    """What batches cost in padding.

    1 - sum_n length_n / sum_b size_b longest_b

    Args:
        length: frames (or tokens) of each example, at least 0.
        batch: number of the batch of each, in [0, N); examples of -1 are left out.

    Returns:
        "padding", its share of the frames; "batches"; "mean_size", examples per batch;
        and by number, int32 `[N]`, "size" and "longest", 0 where there is no batch.

    >>> cost = padding(jnp.array([4, 1, 3, 3]), jnp.array([0, 0, 1, 1]))
    >>> float(cost["padding"]), float(cost["mean_size"]), cost["longest"].tolist()
    (0.2143, 2.0, [4, 3, 0, 0])
    """
    used, count = jnp.asarray(batch) >= 0, length.shape[0]
    place = jnp.where(used, batch, count)  # one more, which is cut off
    size = jnp.zeros(count + 1, jnp.int32).at[place].add(1)[:count]
    longest = jnp.zeros(count + 1, jnp.int32).at[place].max(length)[:count]
    # As floats: a year of speech has more than 2^31 frames.
    padded = jnp.sum(size.astype(jnp.float32) * longest)
    real = jnp.sum(jnp.where(used, length, 0).astype(jnp.float32))
    batches = jnp.sum(size > 0).astype(jnp.float32)
    share = jnp.where(padded > 0, 1 - real / jnp.maximum(padded, 1.0), 0.0)
    mean_size = jnp.sum(used) / jnp.maximum(batches, 1.0)
    shape = {"mean_size": mean_size, "size": size, "longest": longest}
    return {"padding": share, "batches": batches} | shape


@typed
def fixed_batches(key: OneKey, length: Lengths, *, size: int) -> Lengths:
    """Random batches of a fixed size.

    Args:
        key: a typed key, consumed.
        length: frames of each example; only their number counts.
        size: examples per batch; the last one may be smaller.

    Returns:
        Number of the batch of each example.

    >>> fixed_batches(jax.random.key(0), jnp.ones(5, int), size=3).sort().tolist()
    [0, 0, 0, 1, 1]
    """
    check_range("size", size, low=1)
    return jax.random.permutation(key, jnp.arange(length.shape[0]) // size)


@typed
def dynamic_batches(key: OneKey, length: Lengths, *, cap: int) -> Lengths:
    """Random batches of as many examples as a cap on padded frames allows.

    A batch ends where one more would make size x longest exceed the cap.

    Args:
        key: a typed key, consumed.
        length: frames of each example, at least 0.
        cap: frames per batch, with padding; a longer example is a batch of its own.

    Returns:
        Number of the batch of each example.

    >>> dynamic_batches(jax.random.key(0), jnp.full(5, 3), cap=7).sort().tolist()
    [0, 0, 1, 1, 2]
    """
    check_range("cap", cap, low=1)
    order = jax.random.permutation(key, length.shape[0])

    def step(state, frames):
        batch, size, longest = state
        wider = jnp.maximum(longest, frames)
        full = (size > 0) & ((size + 1.0) * wider > cap)
        size, wider = jnp.where(full, 1, size + 1), jnp.where(full, frames, wider)
        return (batch + full, size, wider), batch + full

    start = (jnp.zeros((), jnp.int32),) * 3
    batch = jax.lax.scan(step, start, jnp.asarray(length)[order].astype(jnp.int32))[1]
    return jnp.zeros_like(batch).at[order].set(batch)


@typed
def bucket_bins(
    length: Lengths, output: Lengths, *, buckets: int, sub_buckets: int = 1
) -> Int[Array, "bins 2"]:
    """Bins of equal total length, and in each of them bins of equal total output.

    Args:
        length: frames of each example of a sample.
        output: tokens of each.
        buckets: bins of frames.
        sub_buckets: bins of tokens in each; 1 is bucketing by frames alone.

    Returns:
        `[buckets * sub_buckets, 2]`, int32: most frames and tokens of each, in order.

    >>> length, output = jnp.array([1, 2, 3, 6]), jnp.array([2, 1, 1, 4])
    >>> bucket_bins(length, output, buckets=2, sub_buckets=2).tolist()
    [[3, 1], [3, 2], [6, 4], [6, 4]]
    """
    for name, value in (("buckets", buckets), ("sub_buckets", sub_buckets)):
        check_range(name, value, low=1)
    length, output = (jnp.asarray(x).astype(jnp.int32) for x in (length, output))
    upper = _quantiles(length, jnp.ones(length.shape, bool), buckets)
    lower = jnp.concatenate([jnp.full(1, -1, jnp.int32), upper[:-1]])

    def inside(low, high):
        return _quantiles(output, (length > low) & (length <= high), sub_buckets)

    tokens = jax.vmap(inside)(lower, upper).ravel()
    return jnp.stack([jnp.repeat(upper, sub_buckets), tokens], axis=1)


@typed
def largest_batches(
    memory: Callable[[Array, Array, Array], Array], bins: Bins, *, cap: float,
    start: int = 32, gap: float = 0.0, limit: int = 65536,
) -> Sizes:  # fmt: skip
    """The largest batch of each bin that fits, by doubling and bisection.

    max { b : memory(b, frames, tokens) <= cap }, of a memory that grows with b

    Args:
        memory: bytes of batches `[K]` of examples with frames `[K]` and tokens `[K]`. A
            measurement goes in by `jax.pure_callback`.
        bins: frames and tokens of each bin, `[K, 2]`.
        cap: bytes there are.
        start: the batch that is tried first.
        gap: how far off the result may be, as a share; the released code has 0.05.
        limit: no batch is larger.

    Returns:
        Examples per batch, int32 `[K]`; 0 where not even one fits.

    >>> linear = lambda b, frames, tokens: 4.0 * b * (frames + tokens)
    >>> largest_batches(linear, jnp.array([[10, 2], [90, 10]]), cap=2000.0).tolist()
    [41, 5]
    """
    check_range("cap", cap)
    check_range("start", start, low=1)
    check_range("gap", gap, low=0.0)
    check_range("limit", limit, low=1)
    bins = jnp.asarray(bins)
    none = jnp.zeros(bins.shape[0], jnp.int32)

    def searching(state):
        fits, too_many, _ = state
        return too_many - fits > jnp.maximum(gap * jnp.minimum(too_many, limit), 1)

    def step(state):
        fits, too_many, now = state
        good = memory(now, bins[:, 0], bins[:, 1]) <= cap
        live = searching(state)
        fits = jnp.where(live & good, now, fits)
        too_many = jnp.where(live & ~good, now, too_many)
        now = jnp.where(too_many > limit, 2 * fits, (fits + too_many) // 2)
        return fits, too_many, jnp.clip(now, 1, limit)

    first = none, none + limit + 1, none + min(start, limit)
    return jax.lax.while_loop(lambda s: jnp.any(searching(s)), step, first)[0]


@typed
def bucket_batches(
    key: OneKey, length: Lengths, output: Lengths, bins: Bins, sizes: Sizes
) -> Lengths:
    """Random batches within buckets, each of the size of its bucket.

    Args:
        key: a typed key, consumed.
        length: frames of each example.
        output: tokens of each.
        bins: most frames and tokens of each bin, `[K, 2]`. An example goes into the
            first that has room for both.
        sizes: examples per batch of each bin, at least 1; bins of 0 take nothing.

    Returns:
        Number of the batch of each example; -1 where no bin has room for it.

    >>> length, output = jnp.array([1, 9, 2, 1, 8, 99]), jnp.ones(6, int)
    >>> bins, sizes = jnp.array([[2, 5], [9, 5]]), jnp.array([2, 1])
    >>> bucket_batches(jax.random.key(0), length, output, bins, sizes).sort().tolist()
    [-1, 0, 0, 1, 2, 3]
    """
    bins, sizes = jnp.asarray(bins), jnp.asarray(sizes)
    count, buckets = length.shape[0], bins.shape[0]
    pairs = jnp.stack([jnp.asarray(length), jnp.asarray(output)], axis=1)
    room = jnp.all(pairs[:, None] <= bins[None], axis=2) & (sizes > 0)[None]
    bucket = jnp.where(jnp.any(room, axis=1), jnp.argmax(room, axis=1), buckets)
    shuffled = jax.random.permutation(key, count)
    order = shuffled[jnp.argsort(bucket[shuffled], stable=True)]
    members = jnp.zeros(buckets + 1, jnp.int32).at[bucket].add(1)
    sizes = jnp.maximum(jnp.append(sizes, 1), 1)
    batches, own = -(-members // sizes), bucket[order]
    place = jnp.arange(count) - (jnp.cumsum(members) - members)[own]
    batch = (jnp.cumsum(batches) - batches)[own] + place // sizes[own]
    batch = jnp.where(own < buckets, batch, -1).astype(jnp.int32)
    return jnp.zeros_like(batch).at[order].set(batch)


@typed
def encdec_cost(
    length: Lengths, output: Lengths, *, encoder_layers: int, decoder_layers: int,
    width: int = 1024, batch: int = 1, rate: float = 312e12, bandwidth: float = 2.0e12,
) -> dict[str, Float[Array, " examples"]]:  # fmt: skip
    """Seconds that an encoder-decoder takes for an example, by FLOPs and weights read.

    L_e (24 d^2 T + 4 d T^2) FLOPs once; L_d 4 d^2 T once, and U times the longer of
    L_d (28 d^2 + 4 d T + 2 d U) FLOPs and of reading L_d 28 d^2 bytes

    Args:
        length: T, frames that the encoder sees.
        output: U, tokens that are decoded one by one.
        encoder_layers: L_e.
        decoder_layers: L_d.
        width: d, in matrices of d^2 and 4 d^2 numbers of 2 bytes.
        batch: examples decoded together, which share the reading.
        rate: FLOP/s, by default an A100's in half precision.
        bandwidth: bytes per second.

    Returns:
        "encoder" and "decoder", seconds per example, and "seconds", their sum.

    >>> knobs = {"encoder_layers": 24, "decoder_layers": 24}
    >>> cost = encdec_cost(jnp.array([125]), jnp.array([40]), **knobs)
    >>> float(1e3 * cost["encoder"][0]), float(1e3 * cost["decoder"][0])
    (0.2469, 14.1332)
    """
    whole = {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    for name, value in (whole | {"width": width, "batch": batch}).items():
        check_range(name, value, low=1)
    for name, value in {"rate": rate, "bandwidth": bandwidth}.items():
        check_range(name, value, low=0.0)
    t, u = as_float32(length), as_float32(output)
    square = float(width) ** 2
    encoder = encoder_layers * (24 * square * t + 4 * width * t * t) / rate
    once = decoder_layers * 4 * square * t / rate
    step = decoder_layers * (28 * square + 4 * width * (t + u / 2)) / rate
    read = decoder_layers * 28 * square / bandwidth / batch
    decoder = once + u * jnp.maximum(step, read)
    return {"encoder": encoder, "decoder": decoder, "seconds": encoder + decoder}


def _quantiles(values: Array, where: Array, parts: int) -> Array:
    """Upper ends of `parts` ranges of values that have the same sum."""
    ordered = jnp.sort(jnp.where(where, values, 0))
    sums = jnp.cumsum(ordered.astype(jnp.float32))
    ends = sums[-1] * jnp.arange(1, parts + 1) / parts
    return ordered[jnp.searchsorted(sums, ends * (1 - 1e-6))]  # rounded sums are equal


def _speech(key: Array) -> tuple[Array, Array]:
    length = jax.random.randint(key, (24,), 1, 90)
    return length, jax.random.permutation(key, length) // 3 + 1


_BINS = np.array([[20, 10], [20, 30], [90, 10], [90, 30]])

EXAMPLES = {
    padding: lambda key: ((_speech(key)[0], jnp.arange(24) // 5 - 1), {}),
    fixed_batches: lambda key: ((key, _speech(key)[0]), {"size": 5}),
    dynamic_batches: lambda key: ((key, _speech(key)[0]), {"cap": 200}),
    bucket_bins: lambda key: (_speech(key), {"buckets": 3, "sub_buckets": 2}),
    largest_batches: lambda key: ((lambda b, t, u: b * (t + u), _BINS), {"cap": 700.0}),
    bucket_batches: lambda key: ((key, *_speech(key), _BINS, np.arange(6, 2, -1)), {}),
    encdec_cost: lambda key: (_speech(key), {"encoder_layers": 2, "decoder_layers": 2}),
}  # fmt: skip
