"""LongLoRA: a model is tuned to a longer context in groups, and read as ever.

Shifted sparse attention, in the place of attention while tuning alone: tokens see
those before them in their own group of G, and in half of the heads the groups are
moved by G/2, so that what one group knows reaches the next one. With T tokens, scores
cost G/T of those of full attention.

    x of the second half of the heads rolled by -G/2 along T
    [B, T, N, H] -> [B T/G, G, N, H], causal attention, and back; rolled by G/2

What is tuned is LoRA's update of the kernels of queries, keys, values and outputs, and
embeddings and norms as they are ("LoRA+"):

    W + (alpha / rank) A B,   A ~ U(-1/sqrt(in), 1/sqrt(in)),  B = 0

    trainable = longlora_params(key, params)
    loss = lambda trainable: model_loss(merge_longlora(params, trainable), tokens)

    attend = lambda q, k, v, cache: (s2_attention(q, k, v, group=128), cache)
    body = Transformer(64, 2, 4, frequencies=frequencies, attend=attend)

where `frequencies` are those of position interpolation. The same without a matrix of
scores: `pallas_kernels.attention`, with `segment_ids=shifted_groups(...)`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxzoo.core.tree import named_leaves
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "longlora",
    "title": "LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
    "arxiv": "2309.12307",
    "year": 2024,
    "authors": "Yukang Chen, Shengju Qian, Haotian Tang, Xin Lai, Zhijian Liu, Song "
    "Han, Jiaya Jia",
    "where": "Section 3.2 and Algorithm 1 (shifted sparse attention), 3.3 (trainable "
    "embeddings and norms), the appendix's FLOPs of Llama 2.",
    "differs": "The default cuts the group that wraps around, as the released path by "
    "FlashAttention does; Algorithm 1 and the path without, where the first tokens see "
    "the last ones, are `convention='paper'`. Scores are a matrix per group. Dropout "
    "of LoRA, quantised kernels and other sparse patterns are left out, and memory is "
    "counted and not measured. The experiment tunes byte models of two blocks from "
    "128 to 512 bytes, all with one rate. There LongLoRA comes within 1.6 % of full "
    "tuning, and plain LoRA within 2.9 %, but shifts bring nothing: groups that stay "
    "are better by 0.0010 +- 0.0003 nats, and by 0.004 in a trial from 64 to 256 "
    "bytes, in which LongLoRA was 3.9 % over full tuning.",
}

__all__ = [
    "LongLoRAParams", "forward_flops", "longlora_params", "merge_longlora",
    "s2_attention",
]  # fmt: skip


class LongLoRAParams(NamedTuple):
    """What is tuned, by the names of the model's parameters."""

    # A `[..., in, rank]` and B `[..., rank, out]` of each kernel.
    low_rank: dict[str, tuple[Array, Array]]
    whole: dict[str, Array]  # embeddings and norms as they are; empty for plain LoRA


@typed
def s2_attention(
    q: Float[ArrayLike, "batch length heads width"],
    k: Float[ArrayLike, "batch length key_heads width"],
    v: Float[ArrayLike, "batch length key_heads width"], *, group: int,
    is_shifted: bool = True, convention: Literal["released", "paper"] = "released",
) -> Float[Array, "batch length heads width"]:  # fmt: skip
    """Causal attention within groups, which half of the heads have moved by half.

    softmax over s <= t of the group of t:  q_t . k_s / sqrt(H)

    Args:
        q: queries, turned by their positions, `[B, T, N, H]`, N even.
        k: keys, `[B, T, K, H]`; K divides N, and query head n reads n // (N / K).
        v: values, likewise.
        group: G, even, a divisor of T; all of T is full attention, if not shifted.
        is_shifted: False leaves all groups in place: the paper's pattern 1.
        convention: of the group that the roll makes of the last and the first G/2
            tokens. "released" cuts it in two, as the authors' path by FlashAttention
            does. "paper" keeps it, as Algorithm 1 and their path without: there the
            first G/2 tokens see the last ones, which come after them.

    Returns:
        float32 `[B, T, N, H]`.

    Raises:
        ValueError: a number does not fit; names the argument.

    Eight tokens whose values are their places: means over what each head sees.

    >>> q = jnp.zeros((1, 8, 2, 1))
    >>> v = jnp.broadcast_to(jnp.arange(8.0).reshape(1, 8, 1, 1), q.shape)
    >>> s2_attention(q, q, v, group=4)[0, :, :, 0].T.tolist()
    [[0.0, 0.5, 1.0, 1.5, 4.0, 4.5, 5.0, 5.5], [0.0, 0.5, 2.0, 2.5, 3.0, 3.5, 6.0, 6.5]]
    """
    q, k, v = as_float32(q), as_float32(k), as_float32(v)
    batch, length, heads, width = q.shape
    check_range("group", group, low=2)
    if group % 2 or length % group:
        raise ValueError(
            f"argument 'group' is {group}, expected an even divisor of {length} tokens."
        )
    if heads % 2 or heads % k.shape[2]:
        raise ValueError(
            f"arguments 'q' and 'k' have {heads} and {k.shape[2]} heads, expected an "
            "even number and a divisor of it."
        )
    k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    half, count = group // 2, length // group

    def moved(x: Array, by: int) -> Array:
        if not is_shifted:
            return x
        still, other = jnp.split(x, 2, axis=2)
        return jnp.concatenate([still, jnp.roll(other, by, axis=1)], axis=2)

    q, k, v = (
        moved(x, -half).reshape(batch, count, group, heads, width)
        for x in (_bounded(q), _bounded(k), v)
    )
    rows, columns = jnp.arange(group)[:, None], jnp.arange(group)[None]
    counts = (columns <= rows)[None, None]
    if is_shifted and convention == "released":
        is_last = jnp.arange(count) == count - 1
        wraps = is_last[:, None] & (jnp.arange(heads) >= heads // 2)[None]
        cut = ((rows >= half) & (columns < half))[None, None]
        counts = counts & ~(wraps[:, :, None, None] & cut)
    logits = jnp.einsum("bcthd,bcshd->bchts", q, k) / jnp.sqrt(float(width))
    logits = jnp.where(counts[None], logits, -jnp.inf)
    mixed = jnp.einsum("bchts,bcshd->bcthd", jax.nn.softmax(logits, axis=-1), v)
    return moved(mixed.reshape(batch, length, heads, width), half)


@typed
def longlora_params(
    key: Key[Array, ""], params: PyTree[Float[ArrayLike, "..."]], *, rank: int = 8,
    targets: tuple[str, ...] = ("query", "key", "value", "out"),
    whole: tuple[str, ...] = ("embed", "norm"),
) -> LongLoRAParams:  # fmt: skip
    """What LongLoRA tunes of a model; with B = 0 the model is what it was.

    A ~ U(-1/sqrt(in), 1/sqrt(in)),  B = 0

    Args:
        key: a typed key, consumed.
        params: of the model, as by `LanguageModel.init`.
        rank: of the updates, >= 1.
        targets: layers whose kernels `[..., in, out]` get updates; leading axes are a
            stack of layers, each with its own.
        whole: parameters with one of these in their names are tuned as they are;
            without any it is plain LoRA.

    Returns:
        A pytree of float32, to be given to an optimizer.

    Raises:
        ValueError: `rank` is below 1, or no kernel has one of the names.

    >>> params = {"query": {"kernel": jnp.ones((6, 4))}, "norm": {"scale": jnp.ones(6)}}
    >>> trainable = longlora_params(jax.random.key(0), params, rank=2)
    >>> jax.tree.map(jnp.shape, trainable.low_rank)
    {'query/kernel': ((6, 2), (2, 4))}
    >>> list(trainable.whole)
    ['norm/scale']
    """
    check_range("rank", rank, low=1)
    leaves = named_leaves(params)
    kernels = [
        name for name in leaves
        if name.endswith("/kernel") and name.split("/")[-2] in targets
    ]  # fmt: skip
    if not kernels:
        raise ValueError(f"argument 'targets' is {targets}, expected names of kernels.")

    def factors(name: str, key: Array) -> tuple[Array, Array]:
        *stack, rows, columns = leaves[name].shape
        a = jax.random.uniform(key, (*stack, rows, rank), minval=-1.0, maxval=1.0)
        return a / jnp.sqrt(float(rows)), jnp.zeros((*stack, rank, columns), a.dtype)

    keys = jax.random.split(key, len(kernels))
    low_rank = {n: factors(n, k) for n, k in zip(kernels, keys, strict=True)}
    kept = [n for n in leaves if n not in low_rank and any(w in n for w in whole)]
    return LongLoRAParams(low_rank, {name: as_float32(leaves[name]) for name in kept})


@typed
def merge_longlora(
    params: PyTree[Float[ArrayLike, "..."]], trainable: LongLoRAParams, *,
    alpha: float = 16.0,
) -> PyTree[Float[Array, "..."]]:  # fmt: skip
    """The model with what was tuned in it: to compute a loss, or to keep.

    W + (alpha / rank) A B

    Args:
        params: of the model as it was.
        trainable: by `longlora_params`: what gradients are taken with respect to.
        alpha: > 0; 16 with a rank of 8 in the released code.

    Returns:
        A tree like `params`, float32.

    Raises:
        ValueError: `alpha` is out of range, or a name is not one of `params`.

    >>> params = {"query": {"kernel": jnp.ones((2, 2))}}
    >>> a, b = jnp.ones((2, 1)), jnp.array([[0.0, 0.5]])
    >>> trainable = LongLoRAParams({"query/kernel": (a, b)}, {})
    >>> merge_longlora(params, trainable, alpha=2.0)["query"]["kernel"].tolist()
    [[1.0, 2.0], [1.0, 2.0]]
    """
    check_range("alpha", alpha, above=0.0, below=float("inf"))
    leaves = named_leaves(params)
    for name in (*trainable.low_rank, *trainable.whole):
        if name not in leaves:
            raise ValueError(f"argument 'trainable' has '{name}', not in 'params'.")

    def merged(name: str, leaf: Any) -> Array:
        if name in trainable.whole:
            return as_float32(trainable.whole[name])
        leaf = as_float32(leaf)
        if name not in trainable.low_rank:
            return leaf
        a, b = trainable.low_rank[name]
        return leaf + alpha / a.shape[-1] * (as_float32(a) @ as_float32(b))

    new = [merged(name, leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params), new)


@typed
def forward_flops(
    lengths: Int[ArrayLike, "*batch"], *,
    width: int, depth: int, hidden: int, vocabulary: int, group: int | None = None,
) -> tuple[Float[Array, "*batch"], dict[str, Array]]:  # fmt: skip
    """Floating point operations by which a Llama reads one sequence, as in the paper.

    attention 4 T min(G, T) D L, projections 8 T D^2 L, SwiGLU 6 T D F L, head 2 T D V

    An addition and a product are two; what a causal mask hides counts. The backward
    pass costs twice as much, without the gradients of frozen kernels.

    Args:
        lengths: T, tokens, `[...]`.
        width: D, features of a token.
        depth: L, blocks.
        hidden: F, features inside the SwiGLU.
        vocabulary: V.
        group: G of `s2_attention`; None: full attention.

    Returns:
        `(flops, aux)`: float32 `[...]`. aux holds the parts "attention", "projections",
        "feed_forward" and "head", and "scores", the attention weights of one head of
        one block: T min(G, T), which is what attention keeps in memory if it keeps it.

    Raises:
        ValueError: a number is below 1; names it.

    Llama 2 7B at 8192 tokens, in TFLOPs:

    >>> llama = {"width": 4096, "depth": 32, "hidden": 11008, "vocabulary": 32000}
    >>> flops, aux = forward_flops(jnp.array(8192), group=2048, **llama)
    >>> float(flops / 1e12), float(aux["attention"] / 1e12)
    (117.0464, 8.7961)
    """
    numbers = {"width": width, "depth": depth, "hidden": hidden, "group": group}
    for name, number in (numbers | {"vocabulary": vocabulary}).items():
        check_range(name, 1 if number is None else number, low=1)
    tokens = jnp.asarray(lengths).astype(jnp.float32)
    seen = tokens if group is None else jnp.minimum(tokens, float(group))
    parts = {
        "attention": 4.0 * width * depth * tokens * seen,
        "projections": 8.0 * width**2 * depth * tokens,
        "feed_forward": 6.0 * width * hidden * depth * tokens,
        "head": 2.0 * width * vocabulary * tokens,
    }
    total = sum(parts.values(), jnp.zeros_like(tokens))
    return total, parts | {"scores": tokens * seen}


def _bounded(x: Array) -> Array:
    """As it is, unless products of it would overflow: then shorter, and as sharp."""
    limit, largest = 1e15, jax.lax.stop_gradient(jnp.max(jnp.abs(x), initial=0.0))
    return x * (limit / jnp.maximum(largest, limit))


def _model(key: Array) -> dict[str, Any]:
    kernel = jax.random.normal(key, (2, 8, 4))
    return {"query": {"kernel": kernel}, "norm": {"scale": jnp.ones((2, 8))}}


def _merge_example(key: Array):
    # One kernel alone is a tree too; its name is empty.
    factors = (jnp.ones((8, 2)), 0.1 * jnp.ones((2, 4)))
    kernel = jax.random.normal(key, (8, 4))
    return (kernel, LongLoRAParams({"": factors}, {})), {"alpha": 4.0}


EXAMPLES = {
    s2_attention: lambda key: (
        tuple(jax.random.normal(key, (3, 2, 8, 4, 4))), {"group": 4}
    ),
    longlora_params: lambda key: ((key, _model(jax.random.key(1))), {"rank": 2}),
    merge_longlora: _merge_example,
    forward_flops: lambda key: (
        (jax.random.randint(key, (8,), 1, 64),),
        {"width": 8, "depth": 2, "hidden": 24, "vocabulary": 256, "group": 16},
    ),
}  # fmt: skip
