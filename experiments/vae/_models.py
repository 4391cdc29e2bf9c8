"""The room's generative models of images behind one face, all of the same two networks.

An encoder to a diagonal Gaussian and a decoder to logits, each with two hidden layers;
what a paper changes is the objective, and for some the prior that samples come from.
Parameters are the same arrays for all but two: a gradient origin network has no encoder
and a wider decoder, VLAE's prior is a flow on top.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import sigmoid

from jaxzoo.core.divergences import random_directions
from jaxzoo.core.mcmc import hmc
from jaxzoo.core.medoids import k_medoids
from jaxzoo.core.stats import bernoulli_log_prob, normal_kl, normal_log_prob
from jaxzoo.nn.mlp import MLP, GaussianMLP
from jaxzoo.vae.autogen import autogen_loss
from jaxzoo.vae.beta_tcvae import beta_tcvae_loss
from jaxzoo.vae.beta_vae_capacity import (
    beta_vae_loss,
    capacity_at,
    capacity_loss,
)
from jaxzoo.vae.generated_loss_vae import augment_batch, iterate_mean
from jaxzoo.vae.geometric_vae import bandwidth, log_volume
from jaxzoo.vae.gmm_posterior_vae import gmm_posterior_loss
from jaxzoo.vae.gradient_origin_network import gon_latent, gon_loss
from jaxzoo.vae.infovae import infovae_loss, prior_divergence
from jaxzoo.vae.iwae import iwae_loss
from jaxzoo.vae.swae import swae_loss
from jaxzoo.vae.tighter_bounds import ciwae_bound, miwae_bound
from jaxzoo.vae.unscented_autoencoder import sample_mixture, uae_loss
from jaxzoo.vae.vae import elbo, reparameterize
from jaxzoo.vae.vlae import AutoregressiveFlow, af_prior_elbo
from jaxzoo.vae.wae import wae_mmd_loss

Codes = tuple[jax.Array, jax.Array]
"""Means and logs of standard deviations, `[batch, latents]`."""


class Size(NamedTuple):
    pixels: int
    latents: int
    hidden: int
    num_data: int
    samples: int  # k of the bounds with several


class Model(NamedTuple):
    """A generative model as pure functions of its parameters."""

    label: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array]
    """Of parameters, a key, grey images `[batch, pixels]`, and the share of training
    that is over."""
    encode: Callable[[Any, jax.Array], Codes]
    decode: Callable[[Any, jax.Array], jax.Array]
    draw: Callable[[Any, jax.Array, Codes, int], jax.Array]
    """Latents to decode for samples: of parameters, a key, the training data's codes,
    and how many."""
    log_prior: Callable[[Any, jax.Array], jax.Array] | None
    """None where the model has no likelihood or no posterior to weigh samples by."""


def normal_prior(_: Any, key: jax.Array, codes: Codes, num: int) -> jax.Array:
    return jax.random.normal(key, (num, codes[0].shape[1]))


def log_normal_prior(_: Any, z: jax.Array) -> jax.Array:
    return normal_log_prob(z)


def mixture_prior(_: Any, key: jax.Array, codes: Codes, num: int) -> jax.Array:
    return sample_mixture(key, codes[0], num_samples=num)[0]


def uniform_prior(_: Any, key: jax.Array, codes: Codes, num: int) -> jax.Array:
    keys = jax.random.split(key)
    # Medoids of a thousand codes: distances are of all pairs.
    mean, log_std = (a[:1000] for a in codes)
    index = k_medoids(mean, num_medoids=min(100, len(mean)))
    rows = jax.random.randint(keys[0], (num,), 0, len(mean))
    chart: dict[str, Any] = {"centroids": mean[index], "log_std": log_std[index]}
    density = functools.partial(log_volume, **chart, rho=bandwidth(mean[index]))
    return hmc(keys[1], density, mean[rows], num_steps=30)[0]


def models(size: Size) -> dict[str, Model]:
    """By slug, or slug and variant."""
    encoder = GaussianMLP(size.latents, (size.hidden, size.hidden))
    decoder = MLP((size.hidden, size.hidden, size.pixels))
    flow = AutoregressiveFlow(size.latents, 32)
    wide = MLP((_wider(size), _wider(size), size.pixels), jax.nn.elu)

    def init(key: jax.Array) -> Any:
        keys = jax.random.split(key)
        start = encoder.init(keys[0], jnp.zeros((1, size.pixels)))
        return {
            "encoder": start,
            "decoder": decoder.init(keys[1], jnp.zeros((1, size.latents))),
        }

    def encode(params: Any, x: jax.Array) -> Codes:
        codes: Any = encoder.apply(params["encoder"], x)
        return codes[0], jnp.clip(codes[1], -8.0, 8.0)

    def decode(params: Any, z: jax.Array) -> jax.Array:
        logits: Any = decoder.apply(params["decoder"], z)
        return logits

    def encode_points(params: Any, x: jax.Array) -> Codes:
        """Of a deterministic encoder: no width to speak of."""
        mean = encode(params, x)[0]
        return mean, jnp.full_like(mean, -8.0)

    def binary(key: jax.Array, x: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, x).astype(jnp.float32)

    def of_bound(objective: Any) -> Any:
        """A loss of log p(x|z), the KL, the codes, z, a key and the time."""

        def loss(params: Any, key: jax.Array, x: jax.Array, done: jax.Array) -> Any:
            keys = jax.random.split(key, 3)
            x = binary(keys[0], x)
            codes = encode(params, x)
            z = reparameterize(keys[1], *codes)[0]
            log_likelihood = bernoulli_log_prob(x, decode(params, z))
            kl = normal_kl(*codes)
            return objective(log_likelihood, kl, codes, z, keys[2], done)

        return loss

    def of_weights(bound: Any) -> Any:
        """A loss of the log importance weights of k draws, `[k, batch]`."""

        def loss(params: Any, key: jax.Array, x: jax.Array, _: jax.Array) -> Any:
            keys = jax.random.split(key)
            x = binary(keys[0], x)
            mean, log_std = encode(params, x)
            shape = (size.samples, *mean.shape)
            z = mean[None] + jnp.exp(log_std)[None] * jax.random.normal(keys[1], shape)
            log_w = bernoulli_log_prob(x, decode(params, z))
            log_w += normal_log_prob(z) - normal_log_prob(z, mean, log_std)
            return bound(log_w)

        return loss

    def capacity(log_p: Any, kl: Any, _: Any, __: Any, ___: Any, done: Any) -> Any:
        # 25 nats from the middle of training on.
        limit = capacity_at(1000.0 * done, warmup_steps=500)
        return capacity_loss(-log_p, kl, limit, gamma=100.0)[0]

    def info(log_p: Any, kl: Any, _: Any, z: Any, key: Any, __: Any) -> Any:
        divergence = prior_divergence(key, z)
        return infovae_loss(log_p, kl, divergence, alpha=1.0, lam=1000.0)[0]

    def total_correlation(log_p: Any, _: Any, codes: Any, z: Any, *__: Any) -> Any:
        return beta_tcvae_loss(log_p, z, *codes, num_data=size.num_data, beta=4.0)[0]

    vae = of_bound(lambda log_p, kl, *_: -jnp.mean(elbo(log_p, kl)))

    def augmented(params: Any, key: jax.Array, x: jax.Array, done: jax.Array) -> Any:
        keys = jax.random.split(key)
        nets = (functools.partial(f, params) for f in (encode, decode))
        variants = iterate_mean(x, *nets, num_iterations=1)[1]
        return vae(params, keys[0], augment_batch(keys[1], x, variants)[0], done)

    def wae(params: Any, key: jax.Array, x: jax.Array, _: jax.Array) -> Any:
        z = encode(params, x)[0]
        prior = jax.random.normal(key, z.shape)
        return wae_mmd_loss(x, sigmoid(decode(params, z)), z, prior)[0]

    def swae(params: Any, key: jax.Array, x: jax.Array, _: jax.Array) -> Any:
        keys = jax.random.split(key)
        z = encode(params, x)[0]
        prior = jax.random.normal(keys[0], z.shape)
        lines = random_directions(keys[1], dim=size.latents, num_directions=50)
        return swae_loss(x, decode(params, z), z, prior, lines)[0]

    def unscented(params: Any, key: jax.Array, x: jax.Array, _: jax.Array) -> Any:
        mean, log_std = encode(params, x)
        factor = jnp.exp(log_std)[..., None] * jnp.eye(size.latents)[None]

        def images(z: jax.Array) -> jax.Array:
            return sigmoid(decode(params, z))

        return uae_loss(key, images, x, mean, factor)[0]

    def whole_batch(params: Any, key: jax.Array, x: jax.Array, _: jax.Array) -> Any:
        codes = encode(params, x)
        z = reparameterize(key, *codes)[0]
        images = sigmoid(decode(params, z))
        return gmm_posterior_loss(x, images, *codes, error="square")[0]

    def flow_bound(params: Any, key: jax.Array, x: jax.Array, _: jax.Array) -> Any:
        keys = jax.random.split(key)
        x = binary(keys[0], x)
        codes = encode(params, x)
        z = reparameterize(keys[1], *codes)[0]
        out: Any = flow.apply(params["flow"], z)
        log_p = bernoulli_log_prob(x, decode(params, z))
        return -jnp.mean(af_prior_elbo(log_p, normal_log_prob(z, *codes), *out))

    def with_flow(key: jax.Array) -> Any:
        start = flow.init(jax.random.fold_in(key, 1), jnp.zeros((1, size.latents)))
        return init(key) | {"flow": start}

    def flow_prior(params: Any, key: jax.Array, codes: Codes, num: int) -> Any:
        noise = normal_prior(params, key, codes, num)
        return flow.apply(params["flow"], noise, method="forward")

    def log_flow_prior(params: Any, z: jax.Array) -> jax.Array:
        out: Any = flow.apply(params["flow"], z.reshape(-1, size.latents))
        return (normal_log_prob(out[0]) + out[1]).reshape(z.shape[:-1])

    def decode_wide(params: Any, z: jax.Array) -> jax.Array:
        logits: Any = wide.apply(params, z)
        return logits

    def origin(params: Any, _: jax.Array, x: jax.Array, __: jax.Array) -> Any:
        def images(z: jax.Array) -> jax.Array:
            return sigmoid(decode_wide(params, z))

        return gon_loss(images, x, latents=size.latents)[0]

    def from_origin(params: Any, x: jax.Array) -> Codes:
        def images(z: jax.Array) -> jax.Array:
            return sigmoid(decode_wide(params, z))

        z = gon_latent(images, x, latents=size.latents)[0]
        return z, jnp.full_like(z, -8.0)

    def gaussian(label: str, loss: Any, draw: Any = normal_prior) -> Model:
        return Model(label, init, loss, encode, decode, draw, log_normal_prior)

    def plain(
        label: str, loss: Any, code: Any = encode_points, draw: Any = None
    ) -> Any:
        return Model(label, init, loss, code, decode, draw or normal_prior, None)

    halves = (2, size.samples // 2)
    return {
        "vae": gaussian("VAE", vae),
        "iwae": gaussian("IWAE", of_weights(lambda w: iwae_loss(w)[0])),
        "tighter_bounds/miwae": gaussian(
            "MIWAE",
            of_weights(
                lambda w: -jnp.mean(miwae_bound(w.reshape(*halves, -1), axis=1))
            ),
        ),
        "tighter_bounds/ciwae": gaussian(
            "CIWAE", of_weights(lambda w: -jnp.mean(ciwae_bound(w)))
        ),
        "beta_vae_capacity/beta": gaussian(
            "beta-VAE, 4", of_bound(lambda log_p, kl, *_: beta_vae_loss(-log_p, kl)[0])
        ),
        "beta_vae_capacity": gaussian("VAE of 25 nats", of_bound(capacity)),
        "autogen": gaussian(
            "AutoGen, m = 1", of_bound(lambda log_p, kl, *_: autogen_loss(log_p, kl)[0])
        ),
        "beta_tcvae": gaussian("beta-TCVAE, 4", of_bound(total_correlation)),
        "infovae": gaussian("MMD-VAE", of_bound(info)),
        "vlae": Model(
            "VAE, flow prior", with_flow, flow_bound, encode, decode, flow_prior,
            log_flow_prior,
        ),
        "geometric_vae": gaussian("VAE, uniform samples", vae, uniform_prior),
        "generated_loss_vae": gaussian("VAE, half of it decoded", augmented),
        "wae": plain("WAE-MMD", wae),
        "swae": plain("SWAE", swae),
        "unscented_autoencoder": plain("UAE", unscented, encode, mixture_prior),
        "gmm_posterior_vae": plain("whole-batch KL", whole_batch, encode),
        "gradient_origin_network": Model(
            "gradient origin", lambda key: _of(wide, key, size), origin, from_origin,
            decode_wide, mixture_prior, None,
        ),
    }  # fmt: skip


def _of(net: MLP, key: jax.Array, size: Size) -> Any:
    return net.init(key, jnp.zeros((1, size.latents)))


def _wider(size: Size) -> int:
    """Units that give two hidden layers and a last one as many weights as both nets."""
    hidden, pixels, latents = size.hidden, size.pixels, size.latents
    total = 2 * hidden**2 + hidden * (2 * pixels + 3 * latents)
    half = (latents + pixels) / 2.0
    return round(math.sqrt(half**2 + total) - half)
