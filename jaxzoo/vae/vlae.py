"""Variational Lossy Autoencoder: what the decoder can see, the latents need not tell.

    p(x|z) = prod_i p(x_i | z, pixels in a window before i)        local decoder
    p(z):  eps = f^-1(z),  eps ~ N(0, I)                           autoregressive flow

A decoder that sees all pixels before i can leave z unused, which costs KL(q(z|x) ||
p(z|x)); one that sees a small window gets from z what is global. Such a prior costs
what inverse autoregressive flow costs for the posterior: with eps = f^-1(z)

    log q(z|x) - log p(z) = [log q(z|x) - log |det deps/dz|] - log N(eps; 0, I)

and the bracket is the density of eps if z ~ q is sent through the flow f^-1.

    eps, log_det = AutoregressiveFlow(latents=8).apply(params["prior"], z)
    logits = LocalDecoder((8, 8, 1), window=(2, 2)).apply(params["decoder"], x, z)
    bound = af_prior_elbo(log_likelihood, log_q, eps, log_det)                # [B]
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxzoo.core.collectives import AxisName, axis_size, psum
from jaxzoo.core.typed import ArrayLike, as_float32, check_range, typed

PAPER = {
    "slug": "vlae",
    "title": "Variational Lossy Autoencoder",
    "arxiv": "1611.02731",
    "year": 2017,
    "authors": "Xi Chen, Diederik P. Kingma, Tim Salimans, Yan Duan, Prafulla "
    "Dhariwal, John Schulman, Ilya Sutskever, Pieter Abbeel",
    "where": "Sections 2.2 (bits back), 3.1 (local windows) and 3.2 (equations 9 to "
    "12); free bits as in Kingma et al., arXiv 1606.04934.",
    "differs": "No code was released: this is the paper's text. Each pixel sees one "
    "window, in one layer, where the paper stacks masked convolutions; scales of the "
    "flow stay between e^-3 and e^3; its soft free bits are left out. The experiment "
    "is of 8x8 digits, binarised at half of the ink, without free bits. There a "
    "decoder that sees all earlier pixels does not leave the latents unused: its KL "
    "is 3.2 nats, not below 0.2, against 3.9 with three pixels seen. It has one layer "
    "of windows of width 64 and 1000 steps; a stronger one was not tried.",
}

__all__ = [
    "AutoregressiveFlow",
    "LocalDecoder",
    "af_prior_elbo",
    "bits_back_length",
    "causal_conv",
    "free_bits",
]


@typed
def causal_conv(
    x: Float[ArrayLike, "batch height width channels"],
    kernel: Float[ArrayLike, "rows columns channels features"],
    *,
    sees_itself: bool = False,
) -> Float[Array, "batch height width features"]:
    """Convolution of which each pixel sees a window of those before it.

    "Before" is above, or to the left in the same row. The pixel itself stands in the
    last row of the kernel, at column `columns // 2`: 2 by 2 is left, above and the one
    between, and for C columns whole images of at most (C + 1) / 2 columns are seen.

    Args:
        x: images NHWC; beyond their border are zeros.
        kernel: `[R, C, channels, features]`; entries at pixels that are not before
            are not used.
        sees_itself: also the pixel itself, as in all layers of a stack but the first.

    Returns:
        float32, of the height and width of `x`.

    >>> x = jnp.array([[1.0, 10.0], [100.0, 0.0]]).reshape(1, 2, 2, 1)
    >>> causal_conv(x, jnp.ones((2, 2, 1, 1)))[0, :, :, 0].tolist()
    [[0.0, 1.0], [1.0, 111.0]]
    """
    x, kernel = as_float32(x), as_float32(kernel)
    (batch, height, width, channels), features = x.shape, kernel.shape[-1]
    rows, columns = kernel.shape[:2]
    centre = columns // 2
    seen = np.ones((rows, columns), bool)
    seen[-1, centre + sees_itself :] = False
    around = ((0, 0), (rows - 1, 0), (centre, columns - 1 - centre), (0, 0))
    padded = jnp.pad(x, around).reshape(batch, -1, channels)
    # A gather of places, [pixels, seen], and a product: faster on a CPU than a masked
    # convolution with a large kernel.
    wide = width + columns - 1
    corners = (np.arange(height)[:, None] * wide + np.arange(width)[None]).ravel()
    offsets = (np.arange(rows)[:, None] * wide + np.arange(columns)[None])[seen]
    patches = padded[:, corners[:, None] + offsets[None]]
    y = patches.reshape(batch, height * width, -1) @ kernel[seen].reshape(-1, features)
    return y.reshape(batch, height, width, features)


@typed
def af_prior_elbo(
    log_likelihood: Float[ArrayLike, "*batch"],
    log_posterior: Float[ArrayLike, "*batch"],
    eps: Float[ArrayLike, "*batch latents"],
    log_det: Float[ArrayLike, "*batch"],
) -> Float[Array, "*batch"]:
    """The bound with an autoregressive flow as the prior (equations 9 to 12).

    log p(x|z) + log N(eps; 0, I) + log |det deps/dz| - log q(z|x)

    It is also the bound of a prior N(0, I) over eps, with the flow of q(z|x) for the
    posterior and a decoder that begins with z = f(eps).

    Args:
        log_likelihood: log p(x|z) in nats, at one sample of z per entry.
        log_posterior: log q(z|x) in nats, likewise.
        eps: f^-1(z), `[..., D]`; beyond +-1e18 it counts as that.
        log_det: log |det deps/dz| in nats.

    Returns:
        The bound in nats, float32. Higher is better.

    >>> bound = af_prior_elbo(
    ...     jnp.array([-20.0]), jnp.array([3.0]), jnp.zeros((1, 2)), jnp.array([0.5])
    ... )
    >>> bound.tolist()  # -20 - log(2 pi) + 0.5 - 3
    [-24.338]
    """
    log_likelihood, log_posterior = map(as_float32, (log_likelihood, log_posterior))
    eps, log_det = as_float32(eps), as_float32(log_det)
    square = jnp.square(jnp.clip(eps, -1e18, 1e18))
    log_base = -0.5 * jnp.sum(square + math.log(2.0 * math.pi), axis=-1)
    return log_likelihood + log_base + log_det - log_posterior


@typed
def free_bits(
    kl: Float[ArrayLike, "batch groups"],
    *,
    lam: float = 0.01,
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """KL that is not paid below `lam` nats per group of latents.

    sum_j max(lam, mean_b KL_bj)

    Args:
        kl: nats of each example and group of latents; if sampled maybe negative.
        lam: nats per group that are free, >= 0.
        axis_name: the axis of `jax.shard_map` or `jax.pmap` that the batch is split
            over; None where arrays are whole.

    Returns:
        `(loss, aux)`: float32 scalar in nats; `aux["kl"]`, the mean KL in full, and
        `aux["is_free"]` `[groups]`, where it is below `lam` and has no gradient.

    Raises:
        ValueError: `lam` is negative, or there is no such axis.

    >>> loss, aux = free_bits(jnp.array([[0.0, 1.0], [0.1, 2.0]]), lam=0.2)
    >>> float(loss), float(aux["kl"])
    (1.7, 1.55)
    """
    check_range("lam", lam, low=0)
    kl = as_float32(kl)
    mean = psum(jnp.sum(kl, axis=0), axis_name) / (kl.shape[0] * axis_size(axis_name))
    loss = jnp.sum(jnp.maximum(mean, lam))
    stop = jax.lax.stop_gradient
    return loss, {"kl": stop(jnp.sum(mean)), "is_free": mean < lam}


@typed
def bits_back_length(
    log_likelihood: Float[ArrayLike, "*batch"],
    log_prior: Float[ArrayLike, "*batch"],
    log_posterior: Float[ArrayLike, "*batch"],
) -> tuple[Float[Array, "*batch"], dict[str, Array]]:
    """Bits to send x by a code of z and one of x given z, less the bits got back.

    [-log p(x|z) - log p(z) + log q(z|x)] / log 2

    On average over z ~ q it is (-log p(x) + KL(q(z|x) || p(z|x))) / log 2: z is worth
    its use only if it saves more than that divergence.

    Args:
        log_likelihood: log p(x|z) in nats, at a sample of z.
        log_prior: log p(z) in nats.
        log_posterior: log q(z|x) in nats.

    Returns:
        `(length, aux)` in bits, float32: `aux["data"]`, `aux["latent"]` and
        `aux["back"]`, length = data + latent - back.

    >>> nats = (jnp.log(jnp.array([p])) for p in (0.25, 0.125, 0.5))
    >>> bits_back_length(*nats)[0].tolist()  # 2 + 3 - 1
    [4.0]
    """
    data, latent, back = (
        -as_float32(x) / math.log(2.0)
        for x in (log_likelihood, log_prior, log_posterior)
    )
    return data + latent - back, {"data": data, "latent": latent, "back": back}


class AutoregressiveFlow(nn.Module):
    """A prior of latents: eps = f^-1(z) in one pass, z = f(eps) latent after latent.

    Each layer has eps_d = (z_d - m_d) exp(-s_d) with m_d and s_d, at first 0, of
    z_1 .. z_{d-1} by a masked network; after each layer the order is turned round.

    Attributes:
        latents: D, 2 or more.
        hidden: width of each layer's network.
        layers: how many.
    """

    latents: int
    hidden: int = 64
    layers: int = 2

    def setup(self) -> None:
        inner = np.arange(self.hidden) % (self.latents - 1) + 1
        place = np.arange(self.latents)
        self.first_mask = place[:, None] < inner[None]  # sees z_1 .. z_inner
        self.last_mask = inner[:, None] <= np.tile(place, 2)[None]
        shapes = {
            "first": (self.latents, self.hidden), "bias": (1, self.hidden),
            "last": (self.hidden, 2 * self.latents), "last_bias": (1, 2 * self.latents),
        }  # fmt: skip
        normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal", batch_axis=0)
        zeros = nn.initializers.zeros_init()
        self.weights = {
            k: self.param(k, normal if k == "first" else zeros, (self.layers, *shape))
            for k, shape in shapes.items()
        }

    def _moments(self, layer: int, z: Array) -> tuple[Array, Array]:
        w = {k: value[layer] for k, value in self.weights.items()}
        hidden = nn.relu(z @ (w["first"] * self.first_mask) + w["bias"])
        out = hidden @ (w["last"] * self.last_mask) + w["last_bias"]
        mean, raw = jnp.split(out, 2, axis=-1)
        return mean, 3.0 * jnp.tanh(raw / 3.0)  # scales between e^-3 and e^3

    def __call__(
        self, z: Float[Array, "batch latents"]
    ) -> tuple[Float[Array, "batch latents"], Float[Array, " batch"]]:
        """Returns eps = f^-1(z) and log |det deps/dz|."""
        log_det = jnp.zeros(z.shape[:-1], z.dtype)
        for layer in range(self.layers):
            mean, log_scale = self._moments(layer, z)
            z = ((z - mean) * jnp.exp(-log_scale))[..., ::-1]
            log_det -= jnp.sum(log_scale, axis=-1)
        return z, log_det

    def forward(self, eps: Float[Array, "batch latents"]) -> Array:
        """Returns z = f(eps): eps ~ N(0, I) makes samples of the prior."""
        z = eps
        for layer in reversed(range(self.layers)):
            noise, z = z[..., ::-1], jnp.zeros_like(z)
            for _ in range(self.latents):  # one more latent is right each time
                mean, log_scale = self._moments(layer, z)
                z = mean + noise * jnp.exp(log_scale)
        return z


class LocalDecoder(nn.Module):
    """Logits of each pixel from z, where it is, and a window of pixels before it.

    Attributes:
        shape: height, width and channels of the images.
        window: rows and columns of `causal_conv`, the only layer that looks around:
            (2, 2) sees three pixels, (H, 2 W - 1) all that come before.
        features: widths of the hidden layers.
        activation: of those.
    """

    shape: tuple[int, int, int]
    window: tuple[int, int]
    features: Sequence[int] = (64, 64)
    activation: Any = nn.relu

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], z: Float[Array, "b latents"]
    ) -> Float[Array, "b h w c"]:
        height, width, channels = self.shape
        first = self.features[0]
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (*self.window, channels, first)
        )
        place = self.param(
            "place", nn.initializers.zeros_init(), (1, height, width, first)
        )
        y = causal_conv(x, kernel) + place
        y += nn.Dense(height * width * first, use_bias=False)(z).reshape(y.shape)
        for size in (*self.features[1:], channels):
            y = nn.Dense(size)(self.activation(y))
        return y


def _bound_example(key: Array):
    terms = jax.random.normal(key, (4, 8, 3))
    return (-5.0 + terms[0, :, 0], terms[1, :, 0], terms[2], terms[3, :, 0]), {}


def _conv_example(key: Array):
    shapes = (8, 4, 5, 2), (2, 3, 2, 3)
    return tuple(jax.random.normal(key, s) for s in shapes), {"sees_itself": True}


EXAMPLES = {
    causal_conv: _conv_example,
    af_prior_elbo: _bound_example,
    free_bits: lambda key: ((jax.random.exponential(key, (8, 4)),), {"lam": 0.7}),
    bits_back_length: lambda key: (tuple(jax.random.normal(key, (3, 8))), {}),
}
