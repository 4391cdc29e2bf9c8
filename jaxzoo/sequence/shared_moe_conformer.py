"""Conformer blocks that share all weights but their routers and norms, with experts.

Consecutive blocks of a group are one block applied again. What sharing takes away in
capacity, a sparsely-gated mixture of experts in place of the last feed-forward gives
back: a frame meets k of n experts, so that n does not change what it costs. Each block
has its own router and its own norms, and so uses the same experts in its own way.

    encoder = SharedConformer(width=32, groups=1, group_size=6, experts=4)
    x, aux = encoder.apply(params, features, where=frames, key=key)    # [B, T, 32]
    loss = ctc + 0.01 * jnp.mean(aux["balance"])
    kd, _ = distillation_loss(x, of_teacher, logits, teacher_logits, where=frames)

`group_size=1, experts=1` is the usual conformer, the teacher. CTC is optax.ctc_loss.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxzoo.core.collectives import AxisName, masked_rows, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "shared_moe_conformer",
    "title": "Parameter-Efficient Conformers via Sharing Sparsely-Gated Experts for "
    "End-to-End Speech Recognition",
    "arxiv": "2209.08326",
    "year": 2022,
    "authors": "Ye Bai, Jie Li, Wenjing Han, Hao Ni, Kaituo Xu, Zhuo Zhang, Cheng Yi, "
    "Xiaorui Wang",
    "where": "The encoder: experts in a conformer block, groups of blocks that share "
    "all but routers and norms, the balance of the experts' load, distillation.",
    "differs": "No released code was found, and the paper's equations were not at "
    "hand: what is not in its abstract follows the usual forms. The last half "
    "feedforward of a block is the mixture, the first is not. Gates are softmax "
    "probabilities, not normalised over the k chosen, so that a router learns with "
    "one expert; frames beyond an expert's capacity pass by. The load balance is that "
    "of Switch Transformers, the router's noise normal with a fixed deviation. "
    "LayerNorm replaces BatchNorm in the convolution, and there are no relative "
    "positions. Hidden states are distilled after the last block alone. The "
    "experiment's tones are learned almost wholly by all encoders: 1.5 % of token "
    "errors shared, 1.4 % with experts (0.10 +- 0.26 points less: the claim holds by "
    "less than its standard error), 1.2 % with experts and no teacher. With more noise "
    "and detuning all encoders failed in 600 steps (92 %): the task was made easier.",
}

__all__ = ["SharedConformer", "balance_loss", "distillation_loss", "top_k_gates"]

_uniform, _zeros = nn.initializers.lecun_uniform(), nn.initializers.zeros_init()
NORMS = 6  # of a block: before its four parts, inside the convolution, and the last


@typed
def top_k_gates(
    logits: Float[ArrayLike, "... experts"], *, k: int = 1
) -> Float[Array, "... experts"]:
    """The weights of a token's k most probable experts, 0 for the others.

    gate_e = softmax(logits)_e, not normalised again, if e is among the k largest, or 0

    Args:
        logits: of a router, with noise added if it is to explore.
        k: experts per token, at most those that there are; the first ones of ties.

    Returns:
        float32, the shape of `logits`, at most k of an entry's numbers not 0.

    Raises:
        ValueError: `k` is below 1 or above the number of experts.

    >>> top_k_gates(jnp.log(jnp.array([0.5, 0.2, 0.3])), k=2).tolist()
    [0.5, 0.0, 0.3]
    """
    check_range("k", k, low=1, high=logits.shape[-1])
    logits = as_float32(logits)
    return jnp.where(_rank(logits) < k, jax.nn.softmax(logits, axis=-1), 0.0)


@typed
def balance_loss(
    logits: Float[ArrayLike, "tokens experts"], *,
    where: Bool[ArrayLike, " tokens"] | None = None,
    k: int = 1, axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:  # fmt: skip
    """How unevenly tokens are spread over experts: 1 if evenly, n / k at worst.

    loss = n / k sum_e f_e p_e,  f_e = share of tokens whose k experts include e

    p_e is the mean probability of e, which the gradient goes by; f_e is a count.

    Args:
        logits: of the router, the same that chose the experts.
        where: True for the tokens that count.
        k: experts per token.
        axis_name: of the devices that share the tokens; None if arrays are whole.

    Returns:
        `(loss, aux)`: float32 scalar; `aux` has "share" `[n]`, which is f, and
        "probability" `[n]`, which is p.

    Raises:
        ValueError: `k` is below 1 or above the number of experts.

    >>> loss, aux = balance_loss(jnp.array([[0.0, 9.0], [0.0, 9.0]]))
    >>> float(loss), aux["share"].tolist()
    (1.9998, [0.0, 1.0])
    """
    experts = logits.shape[1]
    check_range("k", k, low=1, high=experts)
    logits = masked_rows(logits, where)
    valid = jnp.ones(len(logits), bool) if where is None else jnp.asarray(where)
    weight = valid.astype(logits.dtype)
    chosen = (_rank(logits) < k).astype(logits.dtype)
    sums = weight @ chosen, weight @ jax.nn.softmax(logits, axis=-1), jnp.sum(weight)
    *sums, count = psum(sums, axis_name)
    share, probability = (x / jnp.maximum(count, 1.0) for x in sums)
    loss = experts / k * jnp.sum(share * probability)
    aux = {"share": share, "probability": probability}
    return loss, jax.lax.stop_gradient(aux)


@typed
def distillation_loss(
    hidden: Float[ArrayLike, "batch time width"],
    teacher_hidden: Float[ArrayLike, "batch time width"],
    logits: Float[ArrayLike, "batch time tokens"],
    teacher_logits: Float[ArrayLike, "batch time tokens"], *,
    where: Bool[ArrayLike, "batch time"] | None = None,
    weight: float = 1.0, axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:  # fmt: skip
    """What a student does otherwise than its teacher, per frame.

    loss = mean_bt (mean_d (h - h')^2 + weight KL(softmax(y') || softmax(y)))

    Args:
        hidden: the student's, `[B, T, D]`.
        teacher_hidden: h', as wide. Stop its gradient if the teacher is fixed.
        logits: y, for CTC: of tokens and blank, `[B, T, V]`.
        teacher_logits: y'.
        where: True for the frames that count.
        weight: of the divergence, in nats, at least 0.
        axis_name: of the devices that share the batch; None if arrays are whole.

    Returns:
        `(loss, aux)`: float32 scalar, 0 if no frame counts; `aux` has the two terms,
        "hidden" and "kl".

    Raises:
        ValueError: `weight` is below 0 or NaN.
        TypeError: a shape does not fit.

    >>> h, y = jnp.zeros((1, 1, 2)), jnp.zeros((1, 1, 2))
    >>> loss, aux = distillation_loss(h, h + 2.0, y, jnp.array([[[0.0, 1e9]]]))
    >>> float(aux["hidden"]), float(aux["kl"])
    (4.0, 0.6931)
    """
    check_range("weight", weight, low=0.0)
    rows = [as_float32(x) for x in (hidden, teacher_hidden, logits, teacher_logits)]
    valid = jnp.ones(rows[0].shape[:2], bool) if where is None else jnp.asarray(where)
    rows = [jnp.where(valid[..., None], x, 0.0) for x in rows]
    gap = jnp.mean(jnp.square(rows[0] - rows[1]), axis=-1)
    student, teacher = (jax.nn.log_softmax(x, axis=-1) for x in rows[2:])
    kl = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    sums = jnp.sum(gap), jnp.sum(kl), jnp.sum(valid.astype(gap.dtype))
    gap, kl, count = psum(sums, axis_name)
    gap, kl = (x / jnp.maximum(count, 1.0) for x in (gap, kl))
    aux = jax.lax.stop_gradient({"hidden": gap, "kl": kl})
    return gap + weight * kl, aux


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half mixture of experts, norm.

    All that blocks of a group share; what each has for itself comes as an argument.
    Frames beyond the capacity of an expert pass by; without one it takes room for all.
    """

    heads: int = 4  # of the attention; they divide the width
    hidden: int = 128  # of the feed-forward and of each expert
    experts: int = 4  # how many; 1 is a feed-forward
    k: int = 1  # experts per frame
    capacity: float | None = None  # frames per expert, over those of an even spread
    kernel: int = 7  # frames that the convolution spans
    noise: float = 0.1  # standard deviation, added to the router's logits with a key
    dtype: Any = jnp.float32  # of layers; norms, softmax, router, output are float32

    @nn.compact
    def __call__(self, x: Array, own: dict[str, Array], where: Array) -> Any:
        """Frames `[B, T, D]` to the same; "balance" and the experts' "share"."""
        norms = iter(zip(own["scale"], own["shift"], strict=True))

        def norm(x: Array) -> Array:
            scale, shift = (p.reshape(1, 1, -1) for p in next(norms))
            x = x - jnp.mean(x, axis=-1, keepdims=True)
            root = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
            return x * root * scale + shift

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, name=name, dtype=self.dtype, kernel_init=_uniform)

        width, seen = x.shape[-1], where[..., None]
        y = dense(width, "down")(nn.silu(dense(self.hidden, "up")(norm(x))))
        x = x + 0.5 * y.astype(jnp.float32)
        knobs = {"dtype": self.dtype, "name": "attention", "kernel_init": _uniform}
        attend = nn.MultiHeadDotProductAttention(self.heads, **knobs)
        y = attend(norm(x), mask=where[:, None, None])
        x = x + y.astype(jnp.float32)
        y = nn.glu(dense(2 * width, "conv_in")(norm(x)))
        y = self._convolve(jnp.where(seen, y, 0.0))
        y = dense(width, "conv_out")(nn.silu(norm(y.astype(jnp.float32))))
        x = x + y.astype(jnp.float32)
        y, aux = self._experts(norm(x), own, where)
        return norm(x + 0.5 * y), aux

    def _convolve(self, x: Array) -> Array:
        """Each channel with its own kernel; sums are faster than grouped ones."""
        time, before = x.shape[1], (self.kernel - 1) // 2
        taps = self.param("conv", _uniform, (self.kernel, x.shape[-1])).astype(x.dtype)
        x = jnp.pad(x, ((0, 0), (before, self.kernel - 1 - before), (0, 0)))
        parts = [x[:, i : i + time] * taps[i][None, None] for i in range(self.kernel)]
        return functools.reduce(jnp.add, parts)

    def _experts(self, x: Array, own: dict[str, Array], where: Array) -> Any:
        (batch, time, width), n = x.shape, self.experts
        init = nn.initializers.lecun_uniform(batch_axis=0)
        up = self.param("expert_up", init, (n, width, self.hidden))
        down = self.param("expert_down", init, (n, self.hidden, width))
        first = self.param("expert_up_bias", _zeros, (n, 1, self.hidden))
        second = self.param("expert_down_bias", _zeros, (n, 1, width))
        tokens, valid = x.reshape(-1, width), where.reshape(-1)
        logits = tokens @ own["router"] + own["noise"].reshape(-1, n)
        gates = jnp.where(valid[:, None], top_k_gates(logits, k=self.k), 0.0)
        room = len(tokens)
        if self.capacity is not None:
            room = min(room, math.ceil(self.capacity * self.k * room / n))
        # Where in its experts' rooms a token lies: after those before it.
        place = jnp.cumsum(gates > 0, axis=0) - 1
        inside = (gates > 0) & (place < room)
        slot = jnp.where(inside, jnp.arange(n)[None] * room + place, n * room)
        ids = jnp.broadcast_to(jnp.arange(len(tokens))[:, None], slot.shape)
        taken = jnp.zeros(n * room, ids.dtype).at[slot].set(ids, mode="drop")
        given = tokens[taken].reshape(n, room, width).astype(self.dtype)
        h = nn.silu(jnp.einsum("erd,edh->erh", given, up.astype(self.dtype)) + first)
        y = jnp.einsum("erh,ehd->erd", h.astype(self.dtype), down.astype(self.dtype))
        y = (y.astype(jnp.float32) + second).reshape(n * room, width)
        turn = jnp.arange(self.k).reshape(1, 1, -1)
        mine = (_rank(logits)[..., None] == turn) & inside[..., None]
        back = jnp.sum(jnp.where(mine, slot[..., None], 0), axis=1)
        weight = jnp.sum(jnp.where(mine, gates[..., None], 0.0), axis=1)
        y = jnp.sum(y[back] * weight[..., None], axis=1)
        loss, aux = balance_loss(logits, where=valid, k=self.k)
        return y.reshape(batch, time, width), {"balance": loss, "share": aux["share"]}


class SharedConformer(nn.Module):
    """Groups of conformer blocks, each sharing all but routers and norms."""

    width: int  # of the frames
    groups: int  # how many blocks there are weights for
    group_size: int  # how often each is applied, with its own norms and router
    block: Any = None  # attributes of `ConformerBlock`, by name

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], *,
        where: Bool[Array, "b t"] | None = None, key: Key[Array, ""] | None = None,
    ) -> tuple[Array, dict[str, Array]]:  # fmt: skip
        """Features to frames `[B, T, width]`; per block "balance", "share" of each."""
        block = ConformerBlock(**(self.block or {}), name="blocks")
        where = jnp.ones(x.shape[:2], bool) if where is None else where
        x = nn.Dense(self.width, name="embed")(x).astype(jnp.float32)
        lead, n = (self.groups, self.group_size), block.experts
        ones = nn.initializers.ones_init()
        router = nn.initializers.lecun_uniform(batch_axis=(0, 1))
        noise = jnp.zeros((*lead, *x.shape[:2], n))
        if key is not None:
            noise = block.noise * jax.random.normal(key, noise.shape)
        own = {
            "scale": self.param("scale", ones, (*lead, NORMS, self.width)),
            "shift": self.param("shift", _zeros, (*lead, NORMS, self.width)),
            "router": self.param("router", router, (*lead, self.width, n)),
            "noise": noise,
        }
        again = nn.scan(
            lambda block, x, own: block(x, own, where),
            variable_broadcast="params", split_rngs={"params": False},
        )  # fmt: skip
        each = nn.scan(again, variable_axes={"params": 0}, split_rngs={"params": True})
        x, aux = each(block, x, own)
        return x, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), aux)


def _rank(logits: Array) -> Array:
    """How many of the others are larger, or as large and before; there is no sort."""
    one, other, n = logits[..., :, None], logits[..., None, :], logits.shape[-1]
    before = jnp.broadcast_to(jnp.tri(n, k=-1, dtype=bool), (*logits.shape, n))
    return jnp.sum((other > one) | ((other == one) & before), axis=-1)


def _distillation_example(key: Array) -> Any:
    hidden, logits = jnp.split(jax.random.normal(key, (2, 8, 3, 9)), [4], axis=-1)
    where = jnp.arange(3)[None] < 1 + jnp.arange(8)[:, None] % 3
    return (*hidden, *logits), {"where": where}


EXAMPLES = {
    top_k_gates: lambda key: ((jax.random.normal(key, (8, 3, 4)),), {"k": 2}),
    balance_loss: lambda key: (
        (jax.random.normal(key, (16, 4)),), {"where": jnp.arange(16) % 5 < 3, "k": 2}
    ),
    distillation_loss: _distillation_example,
}  # fmt: skip
