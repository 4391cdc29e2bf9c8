"""Claims of `iwae` that have a closed form: bounds and gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.vae._linear_gaussian import (
    exact_moments,
    gradient_moments,
    score,
    settings,
)
from jaxzoo.core.stats import normal_log_prob
from jaxzoo.training.record import Claim
from jaxzoo.vae.iwae import iwae_bound, iwae_loss, log_weights
from jaxzoo.vae.vae import reparameterize


def bound_of(log_w: jax.Array, k: int) -> jax.Array:
    """L_k per example from K draws: the mean over K / k groups."""
    groups = log_w.reshape(-1, k, *log_w.shape[1:])
    return jnp.mean(iwae_bound(groups, axis=1), axis=0)


def estimator_loss(k, estimator, model, x, mean, log_std, key) -> jax.Array:
    """The loss whose gradient by the encoder is the estimator's."""
    stop = (lambda a: a) if estimator == "iwae" else lax.stop_gradient

    def draw(key):
        z = reparameterize(key, mean, log_std)[0]
        log_q = normal_log_prob(z, stop(mean), stop(log_std))
        return model.log_joint(x, z) - log_q

    log_w = log_weights(key, draw, num_samples=k)
    return iwae_loss(log_w, estimator=estimator)[0]


def linear_gaussian_claims(config: Any) -> tuple[list[Claim], dict[str, float]]:
    """What can be checked against a closed form."""

    def bounds(setting):
        model, x, key = setting
        mean, log_std = model.posterior(x)
        mean, log_std = mean + 0.3, log_std + 0.2  # an encoder that is not exact

        def draw(key):
            z = reparameterize(key, mean, log_std)[0]
            return model.log_joint(x, z) - normal_log_prob(z, mean, log_std)

        log_w = log_weights(key, draw, num_samples=5000, chunk=500)
        chain = [jnp.mean(bound_of(log_w, k)) for k in (1, 5, 50)]
        exact = jnp.mean(model.log_marginal(x))
        return jnp.stack([*chain, exact]), jnp.mean(iwae_bound(log_w)) - exact

    stacked = settings(config.seeds)
    kinds = {"iwae": 5, "stl": 1, "dreg": 5}
    losses = {e: functools.partial(estimator_loss, k, e) for e, k in kinds.items()}

    @jax.jit  # one program: the three share most of their compilation
    def moments(offset):
        draws = config.gradient_draws
        every = losses.items()
        return {e: gradient_moments(loss, stacked, draws, offset) for e, loss in every}

    chain, bias = jax.device_get(jax.jit(lambda s: lax.map(bounds, s))(stacked))
    gaps = np.diff(chain, axis=1)
    gap, worst = float(gaps.min()), float(np.abs(bias).max())
    away, optimum = moments(0.2), moments(0.0)
    # No closed form for k > 1: there the reference is the derivative of the bound.
    scores = {
        "stl": score(away["stl"], exact_moments(stacked, 0.2)),
        "dreg": score(away["dreg"], away["iwae"]),
    }
    largest = max(float(optimum[e].variance.max()) for e in ("stl", "dreg"))
    plain = float(optimum["iwae"].variance.mean())
    claims = [
        Claim(
            "linear-Gaussian: smallest step of L_1 < L_5 < L_50 < log p(x), nats",
            gap, "> 0", gap > 0,
        ),
        Claim(
            "linear-Gaussian: |L_5000 - log p(x)|, worst seed, nats",
            worst, "<= 0.02", worst <= 0.02,
        ),
        Claim(
            "STL (k=1) and DReG (k=5) gradients of the encoder are unbiased: largest "
            "error in standard errors",
            max(scores.values()), "<= 3", max(scores.values()) <= 3,
        ),
        Claim(
            "their largest variance at the true posterior (that of the IWAE gradient "
            f"there: {plain:.2g})",
            largest, "<= 1e-9", largest <= 1e-9,
        ),
    ]  # fmt: skip
    names = ("L_1", "L_5", "L_50", "log_p")
    metrics = {f"linear_gaussian/{n}": chain[:, i].mean() for i, n in enumerate(names)}
    metrics |= {f"estimator_score/{name}": value for name, value in scores.items()}
    return claims, metrics
