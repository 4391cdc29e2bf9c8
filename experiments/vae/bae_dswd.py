"""Bayesian autoencoders: a prior fitted to 200 digits, and what its posterior gains.

Claims, for a normal prior with moments per weight and for one with moments per layer,
fitted to 200 digits, against N(0, 1): outputs under its draws are at most half as far
from the digits (DSWD), and held-out digits have a higher log-likelihood under the
posterior.

    python -m experiments.vae.bae_dswd full    # 3 seeds: 80 s of CPU

Expected: per weight the distance falls to 0.09 of N(0, 1)'s, per layer to 0.69 only.
A test digit's log-likelihood is 181, per layer 181, per weight 179 nats: no gain. On
validation digits, of other seeds, it is 135, 136 and 147.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.nn import sigmoid

from jaxzoo.core.divergences import random_directions
from jaxzoo.core.sgmcmc import init_sghmc, sghmc_step
from jaxzoo.data.digits import flat_digits
from jaxzoo.nn.mlp import MLP
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, image_grid, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.vae.bae_dswd import (
    GaussianPrior,
    bae_potential,
    continuous_bernoulli_log_prob,
    dswd,
    sample_weights,
)

KINDS = {
    "standard": "N(0, 1)",
    "layer": "moments per layer",
    "weight": "moments per weight",
}


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    first_seed: int = 0
    held_out: Literal["test", "validation"] = "test"
    data: int = 200
    latents: int = 8
    hidden: int = 32
    prior_steps: int = 800
    prior_rate: float = 0.02
    draws: int = 8  # of weights, each with images of its own
    images: int = 25
    directions: int = 64
    ascent: int = 5  # steps of directions per step of the prior
    judged: int = 50  # such steps, where the distance is measured
    burn_in: int = 2000
    kept: int = 20  # weights of the posterior
    thinning: int = 100
    step_size: float = 0.01
    friction: float = 0.05
    batch_size: int = 64
    components: int = 20

    def __post_init__(self):
        if self.seeds < 2 or self.data % self.images or self.components > self.data:
            raise ValueError("seeds >= 2, data a multiple of images, please")


PRESETS = {
    "smoke": Config(
        seeds=2, data=16, latents=2, hidden=4, prior_steps=5, draws=4, images=2,
        directions=4, ascent=1, judged=2, burn_in=5, kept=2, thinning=2, batch_size=4,
        components=2,
    ),
    "full": Config(),
}  # fmt: skip


class Net(NamedTuple):
    """An autoencoder whose weights are one vector: it has one draw to compile."""

    init: Callable[[jax.Array], jax.Array]
    encode: Callable[[jax.Array, jax.Array], Any]
    decode: Callable[[jax.Array, jax.Array], Any]  # to logits
    layers: np.ndarray  # of each weight


def network(config: Config) -> Net:
    encoder = MLP((config.hidden, config.latents), nn.leaky_relu)
    decoder = MLP((config.hidden, 64), nn.leaky_relu)

    def init(key: jax.Array) -> Any:
        x, z = jnp.zeros((1, 64)), jnp.zeros((1, config.latents))
        return encoder.init(key, x), decoder.init(key, z)

    shapes = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    unravel = ravel_pytree(jax.tree.map(lambda a: jnp.zeros(a.shape), shapes))[1]
    sizes = [a.size for a in jax.tree.leaves(shapes)]
    return Net(
        lambda key: ravel_pytree(init(key))[0],
        lambda w, x: encoder.apply(unravel(w)[0], x),
        lambda w, z: decoder.apply(unravel(w)[1], z),
        np.repeat(np.arange(len(sizes)), sizes),
    )


def outputs_of(config: Config, net: Net, key: jax.Array, prior: Any, x: Any) -> Any:
    """Images; each draw of weights sees its own part of x, of `images` digits."""
    parts = x.reshape(-1, config.images, 64)
    w = sample_weights(key, prior, prior.mean, num_samples=len(parts))
    logits = jax.vmap(lambda w, x: net.decode(w, net.encode(w, x)))(w, parts)
    return sigmoid(logits.reshape(x.shape))


def fit_prior(
    config: Config, net: Net, key: jax.Array, per_weight: jax.Array, x: jax.Array
) -> tuple[GaussianPrior, jax.Array]:
    """The prior after Adam on the distance, from N(0, 1), and the distances."""
    rates = optax.cosine_decay_schedule(config.prior_rate, config.prior_steps)
    optimizer = optax.adam(rates)

    def prior(psi: Any) -> GaussianPrior:
        """Moments of a layer, and what single weights add to them."""
        return GaussianPrior(*(psi[0][:, net.layers] + per_weight * psi[1]))

    def step(carry: Any, key: jax.Array) -> Any:
        psi, state, matrix = carry
        keys = jax.random.split(key, 3)
        rows = jax.random.randint(keys[0], (config.draws * config.images,), 0, len(x))
        theta = random_directions(keys[1], dim=64, num_directions=config.directions)

        def loss(psi: Any) -> Any:
            outputs = outputs_of(config, net, keys[2], prior(psi), x[rows])
            return dswd(outputs, x[rows], theta, matrix, num_steps=config.ascent)

        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(psi)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(psi, updates), state, aux["matrix"]), value

    psi = jnp.zeros((2, net.layers[-1] + 1)), jnp.zeros((2, len(net.layers)))
    carry = psi, optimizer.init(psi), jnp.eye(64)
    (psi, *_), values = lax.scan(step, carry, jax.random.split(key, config.prior_steps))
    return prior(psi), values


def sample_posterior(
    config: Config, net: Net, key: jax.Array, prior: Any, start: Any, x: jax.Array
) -> Any:
    """Weights of one chain, `kept` of them on a new first axis."""

    knobs = {"step_size": config.step_size, "friction": config.friction}

    def run(state: Any, key: jax.Array, steps: int, adapt: bool) -> Any:
        def step(i: jax.Array, state: Any) -> Any:
            keys = jax.random.split(jax.random.fold_in(key, i))
            batch = x[jax.random.randint(keys[0], (config.batch_size,), 0, len(x))]

            def potential(w: jax.Array) -> jax.Array:
                logits = net.decode(w, net.encode(w, batch))
                nats = continuous_bernoulli_log_prob(batch, logits)
                return bae_potential(w, prior, nats, num_data=len(x))[0]

            gradient = jax.grad(potential)(state.position)
            return sghmc_step(keys[1], state, gradient, adapt=adapt, **knobs)

        return lax.fori_loop(0, steps, step, state)

    def keep(state: Any, key: jax.Array) -> Any:
        state = run(state, key, config.thinning, False)
        return state, state.position

    keys = jax.random.split(key)
    state = run(init_sghmc(start), keys[0], config.burn_in, True)
    return lax.scan(keep, state, jax.random.split(keys[1], config.kept))[1]


def one_seed(config: Config, key: jax.Array, x: jax.Array, test: jax.Array) -> Any:
    net, keys = network(config), jax.random.split(key, 6)
    x = x[jax.random.permutation(keys[0], len(x))[: config.data]]
    start, flags = net.init(keys[1]), jnp.array([0.0, 1.0])
    fitted, values = lax.map(lambda f: fit_prior(config, net, keys[2], f, x), flags)
    priors = jax.tree.map(lambda a: jnp.concatenate([0.0 * a[:1], a]), fitted)
    twice = jnp.concatenate([x, x])
    theta = random_directions(keys[3], dim=64, num_directions=2 * config.directions)

    def judge(prior: Any) -> Any:
        outputs = outputs_of(config, net, keys[4], prior, twice)
        value, aux = dswd(outputs, twice, theta, num_steps=config.judged)
        chain = sample_posterior(config, net, keys[5], prior, start, x)
        both = jnp.concatenate([test, x])
        logits = lax.map(lambda w: net.decode(w, net.encode(w, both)), chain)
        nats = jax.vmap(continuous_bernoulli_log_prob, (None, 0))(both, logits)
        # The mean of densities over the posterior, and of their logarithms.
        mixed = jax.nn.logsumexp(nats, axis=0) - np.log(config.kept)
        found = {
            "dswd": value, "cosine": aux["cosine"],
            "held_out": jnp.mean(mixed[: len(test)]),
            "single": jnp.mean(nats[:, : len(test)]),
            "train": jnp.mean(mixed[len(test) :]),
        }  # fmt: skip
        w, shown = chain[-1], outputs[:: config.images][:6]
        rebuilt = sigmoid(net.decode(w, net.encode(w, test[:6])))
        return found, shown, rebuilt, net.encode(w, x), w

    return values, lax.map(judge, priors)


def generate(config: Config, codes: np.ndarray, weights: Any) -> Any:
    """Six images from a mixture of codes per kind, and its shares above 1 in 100."""
    from sklearn.mixture import BayesianGaussianMixture  # takes a second to import

    @jax.jit
    def decode(weights: Any, z: jax.Array) -> jax.Array:
        return sigmoid(jax.vmap(network(config).decode)(weights, z))

    mixtures = [
        BayesianGaussianMixture(
            n_components=config.components, random_state=config.first_seed,
            weight_concentration_prior=1.0 / config.components, max_iter=500,
        ).fit(rows)
        for rows in codes
    ]  # fmt: skip
    z = np.stack([mixture.sample(6)[0] for mixture in mixtures]).astype(np.float32)
    used = [int(np.sum(mixture.weights_ > 0.01)) for mixture in mixtures]
    return jax.device_get(decode(weights, z)), used


def pictures(
    config: Config, run: Run, values: Any, found: Any, rows: dict[str, Any]
) -> list[Figure]:
    figure, axes = panels(3, width=4.2)
    parts = np.array_split(np.arange(config.prior_steps), min(40, config.prior_steps))
    steps = [part.mean() for part in parts]
    lines = {
        label: (steps, [values[:, i, part].mean(axis=1) for part in parts])
        for i, label in enumerate(list(KINDS.values())[1:])
    }
    curves(axes[0], lines, xlabel="steps of the prior", ylabel="DSWD to digits, in ink")
    axes[0].set_ylim(bottom=0)
    names = "DSWD at the prior, in ink", "held-out log-likelihood per digit [nats]"
    for ax, name, ylabel in zip(axes[1:], ("dswd", "held_out"), names, strict=True):
        for i, scores in enumerate(found[name].T):
            color = ("0.7", *COLORS)[i]  # as in the left panel
            ax.bar(i, scores.mean(), yerr=stderr(scores), color=color, capsize=4)
            ax.plot([i] * len(scores), scores, "k.", ms=4)
        labels = [label.replace(" per", "\nper") for label in KINDS.values()]
        ax.set(xticks=range(len(KINDS)), xticklabels=labels, ylabel=ylabel)
    means = found["train"].mean(axis=0)
    axes[2].plot(range(len(KINDS)), means, "D", color="0.4", label="training digits")
    axes[2].set_ylim(0, 1.25 * means.max())
    axes[2].legend(frameon=False, loc="upper right")
    shaped = [np.reshape(row, (-1, 8, 8)) for row in rows.values()]
    words = (
        f"Means and standard errors over {config.seeds} seeds, dots the seeds. Left, "
        "while it is fitted, from N(0, 1). Right, under the posterior.",
        "First seed. Outputs, one draw of weights each; reconstructions of held-out "
        "digits, and decoded draws of a mixture of codes, by the chain's last weights.",
    )
    grid = image_grid(shaped, list(rows))
    return [
        run.figure("priors", figure, title="Fitting the prior", caption=words[0]),
        run.figure("images", grid, title="Digits and outputs", caption=words[1]),
    ]


def main(config: Config, run: Run) -> Report:
    (x, _), (test, _) = flat_digits(config.held_out)

    @jax.jit
    def every(seeds: jax.Array, x: jax.Array, test: jax.Array) -> Any:
        keys = jax.vmap(jax.random.key)(seeds)
        return lax.map(lambda key: one_seed(config, key, x, test), keys)

    seeds = config.first_seed + np.arange(config.seeds)
    values, (found, *firsts) = jax.device_get(every(seeds, x, test))
    outputs, rebuilt, codes, last = jax.tree.map(lambda a: a[0], firsts)
    samples, used = generate(config, codes, last)
    claims = []
    for i, kind in ((2, KINDS["weight"]), (1, KINDS["layer"])):
        ratio = found["dswd"][:, i] / found["dswd"][:, 0]
        gain = found["held_out"][:, i] - found["held_out"][:, 0]
        claims += [
            Claim(
                f"outputs under a prior fitted to {config.data} digits, {kind}: DSWD "
                "to them over that under N(0, 1), worst seed",
                float(ratio.max()), "<= 0.5", bool(ratio.max() <= 0.5), stderr(ratio),
            ),
            Claim(
                f"held-out digits: log-likelihood under a prior fitted so, {kind}, "
                "less that under N(0, 1), nats per digit, worst seed",
                float(gain.min()), "> 0", bool(gain.min() > 0), stderr(gain),
            ),
        ]  # fmt: skip
    metrics, table = {}, []
    for i, (kind, label) in enumerate(KINDS.items()):
        scores = {n: v[:, i] for n, v in found.items()}
        metrics |= {f"{kind}/{n}": float(v.mean()) for n, v in scores.items()}
        metrics[f"{kind}/components"] = used[i]
        cells = (f"{v.mean():.3g} ± {stderr(v):.1g}" for v in scores.values())
        table.append((label, *cells))
    run.table(f"Priors, {config.seeds} seeds", ("prior", *found), table)
    rows = {"held out": test[:6]}
    shown = {"outputs": outputs, "rebuilt": rebuilt, "sampled": samples}
    for word, images in shown.items():
        rows |= {f"{word},\nN(0, 1)": images[0], f"{word},\nper weight": images[2]}
    return Report(claims, metrics, pictures(config, run, values, found, rows))


if __name__ == "__main__":
    experiment(main, PRESETS)
