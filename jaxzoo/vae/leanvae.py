"""LeanVAE: a video autoencoder of wavelets, patches and compressed sensing.

A clip is one frame alone and pairs of frames after it. Haar wavelets halve it, patches
of low and high bands are embedded apart, and blocks of a depthwise convolution and a
feedforward layer mix them. Of the features p the latent keeps measurements, mean =
Phi p; the decoder finds p again by unrolled ISTA: from p_0 = Q z,

    r = p_k - rho (Phi p_k - z) Phi,   p_{k+1} = r + G(soft(F(r), theta))

    model = LeanVAE(latents=4, low=8, high=24, patch=(2, 2, 2), channels=1)
    reconstruction, mean, log_variance = model.apply(params, video, noise)
    loss, aux = leanvae_loss(video, reconstruction, mean, log_variance)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import constant, normal, ones
from jax import lax
from jaxtyping import Array, Float

from jaxzoo.core.stats import normal_kl
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "leanvae",
    "title": "LeanVAE: An Ultra-Efficient Reconstruction VAE for Video Diffusion "
    "Models",
    "arxiv": "2503.14325",
    "year": 2025,
    "authors": "Yu Cheng, Fajie Yuan",
    "where": "Wavelets, patches, NAF, the bottleneck and the reconstruction loss, as "
    "in the released code (westlake-repl/LeanVAE).",
    "differs": "Of the paper's text only the abstract could be read, so details are "
    "those of the code: layers are normalised before the feedforward part alone, those "
    "within ISTA have no residual. The loss is divided by 4, there the weight of L1. "
    "Thresholds are kept from falling below 0; weights start as Flax's, there normal "
    "with 0.02. Left out: perceptual and adversarial losses, tiles. In the experiment "
    "clips are of 5 frames of 8x8, after 800 steps, when neither model has converged "
    "(15.0 dB, 14.4 dB for 3-D convolutions with the same learning rate).",
}

__all__ = ["NAF", "CompressedSensing", "LeanVAE", "haar3d", "ihaar3d", "leanvae_loss"]

LARGEST = 1e25  # of pixels: their sums are float32
PAIR = np.array([[1.0, 1.0], [1.0, -1.0]], np.float32)  # rows are low and high
QUAD = np.kron(PAIR, PAIR)
FIRST, REST = (1, 2, 2), (2, 2, 2)  # neighbours that wavelets join
HAAR = {FIRST: QUAD[[0, 2, 1, 3]], REST: np.kron(PAIR, QUAD)}  # width before height


@typed
def haar3d(
    video: Float[ArrayLike, "batch frames height width channels"],
) -> tuple[Float[Array, "b h w first"], Float[Array, "b n h w rest"]]:
    """Haar wavelets of the first frame in space, of pairs of later frames in time too.

    low = a + b,   high = a - b,   along each axis, for neighbours a, b

    Args:
        video: `[B, T, H, W, C]`; T odd, H and W even.

    Returns:
        `(first, rest)`, float32, `[B, H/2, W/2, 4C]` and `[B, (T-1)/2, H/2, W/2, 8C]`.
        The C channels of a band lie together. As in the released code bands are plain
        sums, in the order lll, llh, lhl .. hhh in (time, height, width) for `rest`,
        ll, lh, hl, hh in (width, height) for `first`.

    Raises:
        ValueError: an axis has no such length.

    >>> first, rest = haar3d(jnp.arange(12.0).reshape(1, 3, 2, 2, 1))
    >>> first.ravel().tolist(), rest.ravel().tolist()[:3]
    ([6.0, -4.0, -2.0, 0.0], [60.0, -4.0, -8.0])
    """
    x = as_float32(video)
    frames = zip((x[:, :1], x[:, 1:]), (FIRST, REST), strict=True)
    first, rest = (_turned(_patches(f, axes), HAAR[axes]) for f, axes in frames)
    return first[:, 0], rest


@typed
def ihaar3d(
    first: Float[ArrayLike, "batch h w bands"],
    rest: Float[ArrayLike, "batch n h w more"],
) -> Float[Array, "batch frames height width channels"]:
    """The inverse of `haar3d`: a = (low + high) / 2, b = (low - high) / 2.

    Args:
        first: bands of the first frame, `[B, h, w, 4C]`.
        rest: bands of the other frames, `[B, n, h, w, 8C]`; n may be 0.

    Returns:
        The video, `[B, 1 + 2n, 2h, 2w, C]`, float32.

    Raises:
        ValueError: the channels are not 4 and 8 of the same number.

    >>> ihaar3d(jnp.array([[[[8.0, 0, 0, 0]]]]), jnp.zeros((1, 0, 1, 1, 8))).tolist()
    [[[[[2.0], [2.0]], [[2.0], [2.0]]]]]
    """
    bands, more = first.shape[-1], rest.shape[-1]
    if bands % 4 or 2 * bands != more:
        raise ValueError(f"'first', 'rest': {bands}, {more} channels, expected 4C, 8C")
    parts = zip((first[:, None], rest), (FIRST, REST), strict=True)
    back = [_unpatches(_turned(as_float32(x), HAAR[a].T), a) for x, a in parts]
    return jnp.concatenate([back[0] / 4.0, back[1] / 8.0], axis=1)


@typed
def leanvae_loss(
    video: Float[ArrayLike, "batch frames height width channels"],
    reconstruction: Float[ArrayLike, "batch frames height width channels"],
    mean: Float[ArrayLike, " batch *latent"],
    log_variance: Float[ArrayLike, " batch *latent"],
    *,
    low_weight: float | Float[ArrayLike, ""] = 0.05,
    high_weight: float | Float[ArrayLike, ""] = 0.1,
    kl_weight: float | Float[ArrayLike, ""] = 2.5e-8,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Absolute errors of pixels and of wavelet bands, and the KL of the latent.

    |x - y| + low_weight |low(x - y)| + high_weight |high(x - y)|
    + kl_weight KL(N(mean, e^log_variance) || N(0, I))

    |.| are means, of bands those of the first frame and of later ones added.

    Args:
        video: x, `[B, T, H, W, C]`; T odd and > 1, H and W even. Values here and in
            the reconstruction beyond 1e25 count as 1e25.
        reconstruction: y, in the same shape.
        mean: of the latent, `[B, ...]`.
        log_variance: likewise, kept in [-30, 20].
        low_weight: of the low bands, >= 0; the defaults are the released code's.
        high_weight: of the high bands, >= 0.
        kl_weight: of the KL, summed over the latent, >= 0.

    Returns:
        `(loss, aux)`: float32 scalar; in aux "per_example" and, before they are
        weighted, "l1", "low", "high" and "kl" in nats, `[B]` each.

    Raises:
        ValueError: a weight is negative, or the video has no wavelets.

    >>> x, z = jnp.ones((1, 3, 2, 2, 1)), jnp.zeros((1, 2))
    >>> float(leanvae_loss(x, 0.0 * x, z, z)[0])  # 1 + 0.05 (4 + 8)
    1.6
    """
    weights = {"low": low_weight, "high": high_weight, "kl": kl_weight}
    for name, weight in weights.items():
        check_range(f"{name}_weight", weight, low=0.0)
    check_range("len(video[0])", video.shape[1], low=3)
    pair = (as_float32(a) for a in (video, reconstruction))
    x, y = (jnp.clip(a, -LARGEST, LARGEST) for a in pair)
    first, rest = (jnp.abs(bands) for bands in haar3d(x - y))
    channels, average = x.shape[-1], jax.vmap(jnp.mean)
    m, v = (as_float32(a).reshape(len(x), -1) for a in (mean, log_variance))
    terms = {
        "l1": average(jnp.abs(x - y)),
        "low": average(first[..., :channels]) + average(rest[..., :channels]),
        "high": average(first[..., channels:]) + average(rest[..., channels:]),
        "kl": normal_kl(m, 0.5 * jnp.clip(v, -30.0, 20.0)),
    }
    total = terms["l1"] + sum(as_float32(w) * terms[n] for n, w in weights.items())
    return jnp.mean(total), lax.stop_gradient({"per_example": total, **terms})


class NAF(nn.Module):
    """Layers of x + depthwise causal convolution(x), then x + GEGLU(norm(x))."""

    layers: int
    residual: bool = True  # False within ISTA, as in the released code

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w d"]) -> Float[Array, "b t h w d"]:
        width, kept = x.shape[-1], 1.0 if self.residual else 0.0
        around = ((2, 0), (1, 1), (1, 1))
        for _ in range(self.layers):
            mix = nn.Conv(width, (3, 3, 3), padding=around, feature_group_count=width)
            x = kept * x + mix(x)
            h = nn.LayerNorm(epsilon=1e-5)(x)
            h = nn.Dense(2 * (8 * width // 3), use_bias=False)(h)
            h, gate = jnp.split(h, 2, axis=-1)
            h = nn.gelu(gate, approximate=False) * h
            x = kept * x + nn.Dense(width, use_bias=False)(h)
        return x


class CompressedSensing(nn.Module):
    """Few measurements of many features, and unrolled ISTA that finds them again."""

    features: int
    measurements: int
    iterations: int = 2
    layers: int = 2  # of each NAF

    def setup(self):
        shape, count = (self.measurements, self.features), (self.iterations,)
        self.phi = self.param("phi", normal(self.features**-0.5), shape)
        self.q = self.param("q", lambda _: jnp.transpose(self.phi))
        self.step_sizes = self.param("step_sizes", ones, count)
        self.thresholds = self.param("thresholds", constant(0.01), count)
        blocks = [NAF(self.layers, residual=False) for _ in range(2 * self.iterations)]
        self.forward, self.backward = blocks[::2], blocks[1::2]

    def measure(self, p: Float[Array, "*b d"]) -> Float[Array, "*b m"]:
        """Phi p."""
        return p @ self.phi.T

    def recover(self, y: Float[Array, "b t h w m"]) -> Float[Array, "b t h w d"]:
        """From Q y on, gradient steps on 1/2 ||Phi p - y||^2 and shrinkage of F(p)."""
        p = y @ self.q.T
        for i in range(self.iterations):
            p = p - self.step_sizes[i] * ((self.measure(p) - y) @ self.phi)
            codes = self.forward[i](p)
            shrunk = jnp.maximum(jnp.abs(codes) - jnp.maximum(self.thresholds[i], 0), 0)
            p = p + self.backward[i](jnp.sign(codes) * shrunk)
        return p


class LeanVAE(nn.Module):
    """Videos `[B, T, H, W, C]` to `[B, 1 + (T-1)/2p, H/2q, W/2r, latents]` and back."""

    latents: int = 4
    low: int = 128
    high: int = 384
    separate: int = 2  # layers for low and high bands apart, on either side
    fused: int = 4  # layers for both together, on either side
    iterations: int = 2  # of ISTA
    recovery: int = 2  # layers of each NAF there
    patch: tuple[int, int, int] = (2, 4, 4)  # p, q, r of each band
    channels: int = 3

    def setup(self):
        # In pairs: encoder and decoder; first frame and the others; low and high bands.
        widths, (pairs, rows, columns) = (self.low, self.high), self.patch
        self.sizes, size = ((1, rows, columns), self.patch), rows * columns
        size = self.channels * size
        outputs = (size, 3 * size), (pairs * size, 7 * pairs * size)
        self.embed = [[nn.Dense(d) for d in widths] for _ in self.sizes]
        self.unembed = [[nn.Dense(d) for d in both] for both in outputs]
        self.apart = [[NAF(self.separate) for _ in widths] for _ in range(2)]
        self.together = [NAF(self.fused) for _ in range(2)]
        self.spread = nn.Dense(self.latents)
        knobs = self.latents, self.iterations, self.recovery
        self.sensing = CompressedSensing(sum(widths), *knobs)

    def encode(self, video: Float[Array, "b t h w c"]) -> tuple[Array, Array]:
        """Mean and log-variance of the latent."""
        first, rest = haar3d(video)
        columns = []
        for i, band in enumerate(np.s_[: self.channels, self.channels :]):
            parts = zip(self.embed, (first[:, None], rest), self.sizes, strict=True)
            tokens = [e[i](_patches(x[..., band], size)) for e, x, size in parts]
            columns.append(self.apart[0][i](jnp.concatenate(tokens, axis=1)))
        p = self.together[0](jnp.concatenate(columns, axis=-1))
        return self.sensing.measure(p), self.spread(p)

    def decode(self, z: Float[Array, "b t h w d"]) -> Float[Array, "b t h w c"]:
        """The video."""
        p = self.together[1](self.sensing.recover(z))
        split = jnp.split(p, [self.low], axis=-1)
        columns = [naf(x) for naf, x in zip(self.apart[1], split, strict=True)]
        parts = []
        for i, time in enumerate(np.s_[:1, 1:]):
            bands = (
                d(x[:, time]) for d, x in zip(self.unembed[i], columns, strict=True)
            )
            cubes = [_unpatches(band, self.sizes[i]) for band in bands]
            parts.append(jnp.concatenate(cubes, axis=-1))
        return ihaar3d(parts[0][:, 0], parts[1])

    def __call__(self, video: Array, noise: Array) -> tuple[Array, Array, Array]:
        """Reconstruction from mean + std noise, mean, log-variance."""
        mean, log_variance = self.encode(video)
        std = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
        return self.decode(mean + std * noise), mean, log_variance


def _turned(x: Array, matrix: np.ndarray) -> Array:
    parts = x.reshape(*x.shape[:-1], len(matrix), x.shape[-1] // len(matrix))
    turned = jnp.einsum("kp,...pc->...kc", matrix, parts, precision="highest")
    return turned.reshape(x.shape)


def _patches(x: Array, patch: tuple[int, int, int]) -> Array:
    """`[B, T, H, W, C]` to `[B, T/p, H/q, W/r, p q r C]`."""
    (batch, t, h, w, channels), (p, q, r) = x.shape, patch
    if t % p or h % q or w % r:
        raise ValueError(
            f"'video': {t} x {h} x {w} cells, expected multiples of {patch}"
        )
    x = x.reshape(batch, t // p, p, h // q, q, w // r, r, channels)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(*x.shape[:4], p * q * r * channels)


def _unpatches(x: Array, patch: tuple[int, int, int]) -> Array:
    (batch, t, h, w, size), (p, q, r) = x.shape, patch
    channels = size // (p * q * r)
    x = x.reshape(batch, t, h, w, p, q, r, channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(batch, t * p, h * q, w * r, channels)


def _two(key: Array, *shape: int) -> Array:
    return jax.random.normal(key, (2, 8, *shape))


EXAMPLES = {
    haar3d: lambda key: ((_two(key, 3, 2, 4, 1)[0],), {}),
    ihaar3d: lambda key: (haar3d(_two(key, 3, 2, 4, 1)[0]), {}),
    leanvae_loss: lambda key: ((*_two(key, 3, 2, 2, 1), *_two(key, 3)), {}),
}
