"""Disentangled sequential autoencoder: exchange what does not move.

Claims: when two held-out clips of moving sprites exchange f, a classifier that never
saw the model reads the donor's identity, and the motion that was there, on at least 85%
of exchanges each; when a VAE of whole clips exchanges a random half of its code it
reads both on less than 60%. Also shown: deterministic dynamics.

    python -m experiments.vae.dsvae full    # 3 seeds: 2 minutes on 2 cores

Expected: identity is right on 0.93 of exchanges with the full posterior, on 0.98 with
the factorised one, motion on all; both on 0.09 for the VAE. With deterministic dynamics
f holds the motion, which is right on 0.28.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxzoo.core.stats import bernoulli_log_prob, normal_kl
from jaxzoo.data.sprites import draw_sprites
from jaxzoo.nn.mlp import MLP, GaussianMLP
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, image_grid, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.training.step import descend
from jaxzoo.vae.dsvae import SequentialVAE, dsvae_loss, sample_dynamics, swap_content

KINDS = ("full q", "factorised q", "deterministic z")
NAMES = "identity", "motion", "both"
MOTIONS = ("right", "left", "down", "up", "clockwise", "anticlockwise")
PLACES, STEPS = 11, 8  # of a sprite along an axis; of a clip
IDENTITIES = tuple(itertools.product(range(3), (0.16, 0.25)))


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 3
    first_seed: int = 0
    train: int = 3000  # clips
    held_out: int = 600
    static: int = 12
    dynamic: int = 2
    hidden: int = 32  # of LSTMs
    width: int = 128
    code: int = 24  # of the VAE without structure
    steps: int = 2000
    batch_size: int = 48
    learning_rate: float = 3e-3

    def __post_init__(self):
        if self.seeds < 2 or self.held_out % 2:
            raise ValueError("seeds >= 2 and an even number held out, please")


PRESETS = {
    "smoke": Config(
        seeds=2, train=30, held_out=20, static=2, dynamic=2, hidden=4, width=8, code=4,
        steps=5, batch_size=8,
    ),
    "full": Config(),
}  # fmt: skip


def clips(rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
    """Clips `[N, T, 256]` in [0, 1], and the numbers of their identity and motion."""
    identity = rng.integers(len(IDENTITIES), size=count)
    motion = rng.integers(len(MOTIONS), size=count)
    t, sign = np.arange(STEPS)[None], np.where(motion % 2, -1, 1)[:, None]
    middle = PLACES // 2
    line = middle + sign * (t - STEPS // 2), middle + 0 * t
    angle = 2.0 * np.pi * sign * t / STEPS
    circle = (np.rint(middle + 3.0 * f(angle)) for f in (np.cos, np.sin))
    which = (motion // 2)[:, None]
    choices = zip(line, line[::-1], circle, strict=True)
    path = [np.select([which == 0, which == 1, which == 2], c) for c in choices]
    # By one place at most, each frame by itself: nothing else of a path is static.
    x, y = np.stack(path).astype(int) + rng.integers(-1, 2, size=(2, count, STEPS))
    return sprites()[identity[:, None], x, y], identity, motion


@functools.cache
def sprites() -> np.ndarray:
    """Each sprite in each place, `[identities, places, places, 256]`."""
    shape, scale = (np.array(a) for a in zip(*IDENTITIES, strict=True))
    kind, x, y = np.indices((len(shape), PLACES, PLACES)).reshape(3, -1)
    place = np.linspace(0.25, 0.75, PLACES)
    drawn = draw_sprites(shape[kind], scale[kind], 0.0 * x, place[x], place[y])
    return np.float32(drawn / 255.0).reshape(len(shape), PLACES, PLACES, -1)


def read_clips(config: Config, key: jax.Array, x: jax.Array, motion: jax.Array) -> Any:
    """Reads identity by the nearest sprites, and motion by a net trained on clips."""
    net = MLP((64, len(MOTIONS)))
    known = jnp.asarray(sprites().reshape(len(IDENTITIES), -1, x.shape[2]))

    def loss(params: Any, key: jax.Array) -> jax.Array:
        rows = jax.random.randint(key, (config.batch_size,), 0, len(x))
        logits: Any = net.apply(params, x[rows].reshape(config.batch_size, -1))
        own = motion[rows][:, None]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), own, 1))

    start = net.init(key, x[:1].reshape(1, -1))
    params = descend(loss, start, 3e-3, key, config.steps // 4)

    def read(x: jax.Array) -> jax.Array:
        # The distance of each frame to each sprite where it is nearest, less |x|^2.
        products = jnp.einsum("btd,ipd->btip", x, known)
        distances = jnp.sum(jnp.square(known), axis=2)[None, None] - 2.0 * products
        identity = jnp.argmin(jnp.sum(jnp.min(distances, axis=3), axis=1), axis=1)
        logits: Any = net.apply(params, x.reshape(len(x), -1))
        return jnp.stack([identity, jnp.argmax(logits, axis=1)], axis=1)

    return read


def scores(read: Any, mixed: jax.Array, content: Any, motion: Any) -> Any:
    """How often identity, motion and both are read from clips that differ in both."""
    right = read(mixed) == jnp.stack([content[:, 0], motion[:, 1]], axis=-1)
    counts = jnp.all(content != motion, axis=-1)
    right = jnp.concatenate([right, jnp.all(right, axis=-1, keepdims=True)], axis=-1)
    means = jnp.mean(right, axis=0, where=counts[:, None])
    return dict(zip(NAMES, means, strict=True))


def one_model(
    config: Config, kind: jax.Array, key: jax.Array, x: jax.Array, test: jax.Array,
    labels: jax.Array, read: Any,
) -> Any:  # fmt: skip
    """Trains one kind, by its place in `KINDS`, and exchanges contents."""
    sizes = x.shape[2], config.static, config.dynamic, config.hidden, config.width
    net, factorised = SequentialVAE(*sizes), SequentialVAE(*sizes, "factorised")

    cell = functools.partial(net.apply, method="dynamics")

    def posterior(params: Any, x: jax.Array, noise: Any) -> Any:
        """Moments of f and z, and draws of both."""
        f: Any = net.apply(params, x, method="content")
        f_draw = f[:, 0] + jnp.exp(f[:, 1]) * noise[0]

        def draw(net: SequentialVAE) -> Any:
            z: Any = net.apply(params, x, f_draw, method="motion")
            return z, z[:, :, 0] + jnp.exp(z[:, :, 1]) * noise[1]

        def deterministic() -> Any:
            # What follows the first z is the mean, and costs nothing.
            z, first = (a[:, :1] for a in draw(net))
            start = jnp.zeros((len(x), 2 * config.hidden)), 0.0 * first[:, 0]
            own: Any = functools.partial(cell, params)
            path, aux = sample_dynamics(
                jax.random.key(0), own, own(*start)[0], first[:, 0],
                num_steps=STEPS - 1, deterministic=True,
            )  # fmt: skip
            both = (z, aux["moments"]), (first, path)
            return tuple(jnp.concatenate(pair, axis=1) for pair in both)

        ways = lambda: draw(net), lambda: draw(factorised), deterministic
        z, z_draw = lax.switch(kind, ways)
        return f, z, f_draw, z_draw

    def terms(params: Any, key: jax.Array, x: jax.Array) -> Any:
        keys = jax.random.split(key)
        shapes = (len(x), config.static), (len(x), STEPS, config.dynamic)
        noise = [jax.random.normal(*pair) for pair in zip(keys, shapes, strict=True)]
        f, z, f_draw, draw = posterior(params, x, noise)
        output: Any = net.apply(params, f_draw, draw, method="decode")
        prior: Any = net.apply(params, draw, method="prior")
        return dsvae_loss(bernoulli_log_prob(x, output), f, z, prior)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        rows = jax.random.randint(keys[0], (config.batch_size,), 0, len(x))
        return terms(params, keys[1], x[rows])[0]

    keys = jax.random.split(key, 4)
    noise = jnp.zeros((1, config.static)), jnp.zeros((1, 1, config.dynamic))
    inits: Any = [n.init(keys[0], x[:1], *noise)["params"] for n in (net, factorised)]
    start = {"params": inits[1] | inits[0]}
    params = descend(loss, start, config.learning_rate, keys[1], config.steps)

    def encode(x: jax.Array) -> Any:
        return posterior(params, x, (0.0, 0.0))[2:]

    def decode(f: jax.Array, z: jax.Array) -> Any:
        output: Any = net.apply(params, f, z, method="decode")
        return jax.nn.sigmoid(output)

    half = len(test) // 2
    mixed, _ = swap_content(encode, decode, test[:half], test[half:])
    same = jnp.all(read(decode(*encode(test[:half]))) == labels[:half], axis=-1)
    _, aux = terms(params, keys[2], test)
    found = scores(read, mixed, labels[half:], labels[:half])
    found |= {k: jnp.mean(v) for k, v in (aux | {"kept": same}).items()}
    zeros = jnp.zeros((1, 2 * config.hidden)), jnp.zeros((1, config.dynamic))
    own: Any = functools.partial(cell, params)
    drawn, _ = sample_dynamics(keys[3], own, *zeros, num_steps=STEPS)
    invented = decode(encode(test[half : half + 1])[0], drawn)
    return found, jnp.concatenate([mixed[:1], invented])


def unstructured(
    config: Config, key: jax.Array, x: jax.Array, test: jax.Array, labels: jax.Array,
    read: Any,
) -> Any:  # fmt: skip
    """A VAE of whole clips, and exchanges of a random half of its code."""
    encoder = GaussianMLP(config.code, (2 * config.width, config.width), jax.nn.relu)
    decoder = MLP((config.width, 2 * config.width, STEPS * x.shape[2]), jax.nn.relu)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key)
        rows = jax.random.randint(keys[0], (config.batch_size,), 0, len(x))
        flat = x[rows].reshape(config.batch_size, -1)
        moments: Any = encoder.apply(params[0], flat)
        noise = jax.random.normal(keys[1], moments[0].shape)
        output: Any = decoder.apply(params[1], moments[0] + jnp.exp(moments[1]) * noise)
        return jnp.mean(normal_kl(*moments) - bernoulli_log_prob(flat, output))

    keys, empty = jax.random.split(key, 4), jnp.zeros((1, config.code))
    start = encoder.init(keys[0], x[:1].reshape(1, -1)), decoder.init(keys[1], empty)
    params = descend(loss, start, config.learning_rate, keys[2], config.steps)
    moments: Any = encoder.apply(params[0], test.reshape(len(test), -1))
    mean = moments[0]
    half = len(test) // 2
    rank = jnp.argsort(jax.random.uniform(keys[3], (half, config.code)), axis=-1)
    code = jnp.where(rank < config.code // 2, mean[half:], mean[:half])
    outputs: Any = [decoder.apply(params[1], z) for z in (code, mean[:half])]
    mixed, same = (jax.nn.sigmoid(a).reshape(half, *x.shape[1:]) for a in outputs)
    found = scores(read, mixed, labels[half:], labels[:half])
    kept = jnp.mean(jnp.all(read(same) == labels[:half], axis=-1))
    return found | {"kept": kept}, mixed[:1]


def pictures(config: Config, run: Run, results: Any, frames: Any) -> list[Figure]:
    figure, axes = panels(1, width=6.4)
    for i, (name, marker) in enumerate(zip(NAMES, "osD", strict=True)):
        values = [r[name] for r in results.values()]
        axes[0].errorbar(
            np.arange(len(values)) + 0.15 * (i - 1), [v.mean() for v in values],
            [stderr(v) for v in values], color=COLORS[i], marker=marker, ms=6, ls="",
            capsize=3, label=name,
        )  # fmt: skip
    axes[0].axhline(0.85, color="0.5", lw=0.8, ls="--")
    axes[0].set(
        xticks=range(len(results)), xticklabels=list(results), ylim=(0, 1.05),
        ylabel="read as expected (share of exchanges)",
    )  # fmt: skip
    axes[0].legend(frameon=False, loc="lower left")
    labels = ["motion of", "content of", *KINDS, "VAE", f"drawn z,\n{KINDS[0]}"]
    grid = image_grid([np.reshape(r, (-1, 16, 16)) for r in frames], labels)
    return [
        run.figure(
            "exchanges", figure, title="What is read after an exchange",
            caption="The donor's identity, the other clip's motion, and both; means "
            f"and standard errors over {config.seeds} seeds.",
        ),
        run.figure(
            "clips", grid, title="One exchange",
            caption="Two held-out clips, the first's motion with the second's "
            "content (first seed), and that content with a motion of the prior.",
        ),
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    rngs = np.random.default_rng(config.first_seed).spawn(2)
    x, *labels = clips(rngs[0], config.train)
    test, *others = clips(rngs[1], config.held_out)
    truth = np.stack(others, axis=1)

    @jax.jit
    def every(seeds: Any, x: Any, motion: Any, test: Any, labels: Any) -> Any:
        read = read_clips(config, jax.random.key(seeds[0]), x, motion)
        keys, kinds = jax.vmap(jax.random.key)(seeds), len(KINDS)
        order = jnp.repeat(jnp.arange(kinds), len(seeds)), jnp.tile(keys, kinds)
        data = x, test, labels, read
        found, mixed = lax.map(lambda a: one_model(config, a[0], a[1], *data), order)
        found = jax.tree.map(lambda a: a.reshape(kinds, len(seeds)), found)
        plain = lax.map(lambda key: unstructured(config, key, *data), keys)
        accuracy = jnp.mean(read(test) == labels, axis=0)
        return found, mixed[:: len(seeds)], plain, accuracy

    seeds = config.first_seed + np.arange(config.seeds)
    got = jax.device_get(every(seeds, x, labels[1], test, truth))
    found, mixed, (plain, other), accuracy = got
    results = {k: {n: v[i] for n, v in found.items()} for i, k in enumerate(KINDS)}
    results["VAE"] = plain
    claims = []
    for kind, name in itertools.product(KINDS[:2], NAMES[:2]):
        values, whose = results[kind][name], {"identity": "donor", "motion": "other"}
        text = f"{kind}, f exchanged between held-out clips: share with the "
        text += f"{whose[name]} clip's {name}, worst seed"
        worst = float(values.min())
        claims.append(Claim(text, worst, ">= 0.85", worst >= 0.85, stderr(values)))
    text = "VAE of whole clips, random halves exchanged: share with both, best seed"
    best = float(plain["both"].max())
    claims.append(Claim(text, best, "< 0.6", best < 0.6, stderr(plain["both"])))
    names = (*NAMES, "kept", "per_example", "log_likelihood", "kl_f", "kl_z")
    metrics = {f"real/{n}": float(a) for n, a in zip(NAMES, accuracy, strict=False)}
    rows = []
    for kind, values in results.items():
        metrics |= {f"{kind}/{n}": float(v.mean()) for n, v in values.items()}
        cells = (
            f"{values[n].mean():.3g} ± {stderr(values[n]):.1g}" if n in values else "-"
            for n in names
        )
        rows.append((kind, *cells))
    run.table(f"{config.seeds} seeds", ("model", *names), rows)
    frames = [test[0], test[len(test) // 2], *mixed[:, 0], other[0, 0], mixed[0, 1]]
    return Report(claims, metrics, pictures(config, run, results, frames))


if __name__ == "__main__":
    experiment(main, PRESETS)
