"""DELLA: a latent for every layer of a transformer, multiplied into its attention.

    s_l = tanh(W z_{l-1} + U s_{l-1}),   p(z_l|z_<l) from s_l,   q from [pool(h_l), s_l]
    v <- (sum_r W_v^r v) * (sum_r W_z^r z_l)             in self-attention of layer l
    log p(x) >= E_q log p(x|z_1..z_L) - sum_l E_q KL(q(z_l|z_<l, x) || p(z_l|z_<l))

A decoder of text can do without one latent in its embeddings. Here values reach the
other tokens through a latent in each layer, and each latent knows those below it.

    model = VariationalTransformer(27, depth=2, latents=8)
    noise = jax.random.normal(key, model.latent_shape(len(x)))           # [L, B, D]
    out = model.apply(params, x, noise)                                  # x [B, T]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(out["logits"]), x[..., None], -1)
    moments = [out[n] for n in ("mean", "log_std", "prior_mean", "prior_log_std")]
    loss, aux = della_loss(log_p.sum((1, 2)), *moments)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxzoo.core.stats import mean_where, normal_kl
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "della",
    "title": "Fuse It More Deeply! A Variational Transformer with Layer-Wise Latent "
    "Variable Inference for Text Generation",
    "arxiv": "2207.06130",
    "year": 2022,
    "authors": "Jinyi Hu, Xiaoyuan Yi, Wenhao Li, Maosong Sun, Xing Xie",
    "where": "Eqs. 6 to 9; Embedding of Sec. 3.3, the baseline; the released pooling.",
    "differs": "The pooling and the limits of moments are the released code's; the "
    "paper takes the state of the first token. Not followed is that code's mean of the "
    "KL over layers (w = 1/L), in the loss and in what it reports as ELBO and "
    "perplexity, which are then no bounds, nor its biases, with which p(z_1) is "
    "learnt. The sum over ranks stands within each factor, so R adds no function. No "
    "GPT-2 to begin from, no conditional VAE, no annealing, which most results in the "
    "paper have. The experiment's claims hold, but most of the KL seems a shift of z_1 "
    "alike for all texts: another's latents cost 0.1 nats (0.3 with one; w = 1/L: 4).",
}

__all__ = ["VariationalTransformer", "della_loss", "low_rank_fusion"]


@typed
def low_rank_fusion(
    values: Float[ArrayLike, "b t v"],
    z: Float[ArrayLike, "b d"],
    value_weights: Float[ArrayLike, "r v f"],
    latent_weights: Float[ArrayLike, "r d f"],
) -> Float[Array, "b t f"]:
    """Values of self-attention, multiplied by a map of the latent.

    (sum_r W_v^r v) * (sum_r W_z^r z)

    Args:
        values: of all tokens and heads, `[B, T, V]`, within ±1e6, as all arguments.
        z: the latent of the layer, `[B, D]`. The released layers have a 1 at the end
            of v and of z: biases.
        value_weights: W_v of each rank, `[R, V, F]`.
        latent_weights: W_z of each rank, `[R, D, F]`.

    Returns:
        float32 `[B, T, F]`.

    >>> v, z = jnp.array([[[1.0, 2.0]]]), jnp.array([[3.0]])
    >>> w, u = jnp.eye(2)[None], jnp.array([[[1.0, -1.0]]])
    >>> low_rank_fusion(v, z, w, u).tolist()
    [[[3.0, -6.0]]]
    """
    left = _limited(values) @ jnp.sum(_limited(value_weights), axis=0)
    right = _limited(z) @ jnp.sum(_limited(latent_weights), axis=0)
    return left * right[:, None]


@typed
def della_loss(
    log_likelihood: Float[ArrayLike, " batch"],
    mean: Float[ArrayLike, "layers batch latents"],
    log_std: Float[ArrayLike, "layers batch latents"],
    prior_mean: Float[ArrayLike, "layers batch latents"],
    prior_log_std: Float[ArrayLike, "layers batch latents"],
    *,
    where: Bool[ArrayLike, " batch"] | None = None,
    kl_weight: float | Float[ArrayLike, ""] = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Minus the bound of a chain of latents, averaged over texts.

    mean_b [w sum_l KL(q(z_l|z_<l, x_b) || p(z_l|z_<l)) - log p(x_b|z_1..z_L)]

    Args:
        log_likelihood: log p(x|z) in nats, of the whole text, `[B]`.
        mean: of q(z_l|z_<l, x), `[L, B, D]`, at the z_<l that were drawn.
        log_std: of q, likewise.
        prior_mean: of p(z_l|z_<l), likewise, at the same draws.
        prior_log_std: of p, likewise.
        where: texts that count, `[B]`; masked ones may hold anything.
        kl_weight: w, >= 0; 1 is the bound. The released code averages the KL over
            layers, which is w = 1/L.

    Returns:
        `(loss, aux)`: float32 scalar in nats; in aux "per_example" `[B]`, "kl" of each
        layer `[L, B]`, and "elbo" `[B]`, the bound whatever w is.

    Raises:
        ValueError: `kl_weight` is out of range.

    >>> zero, one = jnp.zeros((2, 1, 1)), jnp.ones((2, 1, 1))
    >>> loss, aux = della_loss(jnp.array([-3.0]), one, zero, zero, zero)
    >>> float(loss), aux["kl"].tolist()
    (4.0, [[0.5], [0.5]])
    """
    check_range("kl_weight", kl_weight, low=0.0, below=float("inf"))
    log_likelihood = as_float32(log_likelihood)
    moments = [as_float32(a) for a in (mean, log_std, prior_mean, prior_log_std)]
    if where is not None:
        # First, so that masked rows reach neither value nor gradient.
        mask = jnp.asarray(where)
        log_likelihood = jnp.where(mask, log_likelihood, 0.0)
        moments = [jnp.where(mask[None, :, None], a, 0.0) for a in moments]
    kl = normal_kl(*moments)
    total = jnp.sum(kl, axis=0)
    each = as_float32(kl_weight) * total - log_likelihood
    aux = {"per_example": each, "kl": kl, "elbo": log_likelihood - total}
    return mean_where(each, where), lax.stop_gradient(aux)


class VariationalTransformer(nn.Module):
    """A text VAE whose encoder and decoder are one transformer, as in GPT-2.

    The blocks that read the text without a mask also write it, token by token, with
    the latents. Texts begin with nothing: what stands before them is token V.

    Attributes:
        vocabulary: V; tokens are in [0, V).
        width: of the states, a multiple of `heads`.
        depth: L, blocks, and latents.
        heads: of attention.
        latents: D, of a layer.
        rank: R, of the fusion.
        max_length: the most tokens of a text.
        layer_wise: False has one latent of L D numbers instead, its prior standard and
            its posterior from the last layer, added to all embeddings: the baseline.
    """

    vocabulary: int
    width: int = 48
    depth: int = 2
    heads: int = 4
    latents: int = 8
    rank: int = 4
    max_length: int = 64
    layer_wise: bool = True

    def setup(self):
        near = nn.initializers.normal(0.02)
        self.embed = nn.Embed(self.vocabulary + 1, self.width)
        self.places = self.param("places", near, (self.max_length, self.width))
        self.blocks = [_Block(self.width, self.heads) for _ in range(self.depth)]
        self.norm, self.head = nn.LayerNorm(), nn.Dense(self.vocabulary)
        layers, _, size = self.latent_shape(1)
        self.pool = self.param("pool", near, (layers, self.width))
        self.posterior_heads = [nn.Dense(2 * size) for _ in range(layers)]
        if not self.layer_wise:
            self.inject = nn.Dense(self.width)
            return
        # Without biases p(z_1) is standard, and values reach no token but through z.
        self.prior_heads = [nn.Dense(2 * size, use_bias=False) for _ in range(layers)]
        self.recurrent = [nn.Dense(size, use_bias=False) for _ in range(layers)]
        # The sum over ranks has the variance of one layer.
        split = nn.initializers.lecun_normal(batch_axis=(0,))
        shape = (layers, self.rank, self.width, self.width)
        self.fuse_v = self.param("fuse_v", split, shape)
        self.fuse_z = self.param("fuse_z", split, (*shape[:2], size, self.width))

    @nn.nowrap
    def latent_shape(self, batch: int) -> tuple[int, int, int]:
        """Shape of the noise and of the latents: `(L, B, D)`, or `(1, B, L D)`."""
        if self.layer_wise:
            return self.depth, batch, self.latents
        return 1, batch, self.depth * self.latents

    def encode(self, tokens: Int[Array, "b t"]) -> Float[Array, "l b h"]:
        """Pooled states of the layers that have a latent."""
        states = [self._embedded(tokens)]
        for block in self.blocks:
            states.append(block(states[-1], is_causal=False))
        pairs = zip(states[-len(self.pool) :], self.pool, strict=True)
        return jnp.stack([_pooled(h, w) for h, w in pairs])

    def decode(
        self, z: Float[Array, "l b d"], tokens: Int[Array, "b t"]
    ) -> Float[Array, "b t v"]:
        """Logits of each token, given all latents and the tokens before it."""
        before = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=self.vocabulary)
        x = self._embedded(before[:, :-1])
        if not self.layer_wise:
            x = x + self.inject(z[0])[:, None]
        for layer, block in enumerate(self.blocks):
            latent = ()
            if self.layer_wise:
                latent = z[layer], self.fuse_v[layer], self.fuse_z[layer]
            x = block(x, True, latent)
        return self.head(self.norm(x))

    def sample_prior(self, noise: Float[Array, "l b d"]) -> Float[Array, "l b d"]:
        """Latents of p(z_1..z_L), made of standard normal noise."""
        return self._chain(noise, None)["z"]

    def __call__(
        self, tokens: Int[Array, "b t"], noise: Float[Array, "l b d"]
    ) -> dict[str, Array]:
        """Logits and a draw of the latents, with its moments for `della_loss`.

        "logits" `[B, T, V]`; "z", "mean", "log_std", "prior_mean" and "prior_log_std",
        `[L, B, D]` each.
        """
        out = self._chain(noise, self.encode(tokens))
        return out | {"logits": self.decode(out["z"], tokens)}

    def _chain(self, noise: Array, pooled: Array | None) -> dict[str, Array]:
        z = s = jnp.zeros_like(noise[0])
        rows = []
        for layer, e in enumerate(noise):
            prior = jnp.zeros_like(e), jnp.zeros_like(e)
            if self.layer_wise:
                # s_l = tanh(W z_{l-1} + U s_{l-1}), 0 at first.
                s = jnp.tanh(self.recurrent[layer](jnp.concatenate([z, s], axis=-1)))
                prior = _moments(self.prior_heads[layer](s))
            mean, log_std = prior
            if pooled is not None:
                # The baseline's s is 0 and says nothing.
                known = jnp.concatenate([pooled[layer], s], axis=-1)
                mean, log_std = _moments(self.posterior_heads[layer](known))
            z = mean + jnp.exp(log_std) * e
            rows.append((z, mean, log_std, *prior))
        names = "z", "mean", "log_std", "prior_mean", "prior_log_std"
        columns = (jnp.stack(a) for a in zip(*rows, strict=True))
        return dict(zip(names, columns, strict=True))

    def _embedded(self, tokens: Array) -> Array:
        return self.embed(tokens) + self.places[None, : tokens.shape[1]]


class _Block(nn.Module):
    """Attention, then a GELU layer, each after a norm and beside a path around it."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: Array, is_causal: bool, latent: Any = ()) -> Array:
        parts = jnp.split(nn.Dense(3 * self.width)(nn.LayerNorm()(x)), 3, axis=-1)
        if latent:
            parts[2] = low_rank_fusion(parts[2], *latent)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in parts)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        if is_causal:
            seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
            scores = jnp.where(seen[None, None], scores, -1e30)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + nn.Dense(self.width)(mixed.reshape(x.shape))
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(hidden)


def _pooled(states: Array, weights: Array) -> Array:
    """A mean over tokens `[B, T, H]`, weighted by their scores."""
    scores = nn.gelu(states @ weights)
    return jnp.sum(jax.nn.softmax(scores, axis=1)[..., None] * states, axis=1)


def _moments(x: Array) -> tuple[Array, Array]:
    """Mean and log_std of `[B, 2 D]`, limited as in the released code."""
    mean, log_variance = jnp.split(jnp.clip(x, -5.0, 5.0), 2, axis=-1)
    return mean, 0.5 * log_variance


def _limited(x: ArrayLike, limit: float = 1e6) -> Array:
    return jnp.clip(as_float32(x), -limit, limit)


def _draws(key: Array, *shapes: tuple[int, ...]) -> tuple[Array, ...]:
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))


EXAMPLES = {
    low_rank_fusion: lambda key: (
        _draws(key, (8, 3, 4), (8, 2), (2, 4, 5), (2, 2, 5)), {},
    ),
    della_loss: lambda key: (
        _draws(key, (8,), *[(2, 8, 3)] * 4), {"where": jnp.arange(8) < 6},
    ),
}  # fmt: skip
