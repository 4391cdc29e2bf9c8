"""The room's generative models of images side by side: same networks, same steps.

Each trains on Fashion-MNIST (an MLP, 784-200-200-16 and back) and on sprites of four
known factors. Held-out log-likelihood is importance-sampled, on images that were made
binary once; distances are between features that a small classifier, trained here, has
of samples and of held-out images. Scores of disentanglement are of posterior means on
all sprites.

Claims: parameters are equal within 3%; IWAE's held-out log-likelihood and beta-TCVAE's
MIG are not below the VAE's; MMD-VAE's code says more of the image, and samples of WAE
are nearer to held-out ones.

    python -m experiments.vae.compare full                   # 17 models: 15 minutes
    python -m experiments.vae.compare full --only vae iwae   # these alone

A run that was interrupted goes on with the model at which it stopped.

Expected: bounds of several draws gain 2 nats (-256), a flow for the prior as much; the
best MIG is beta-TCVAE's, 0.27 +- 0.13. What samples are drawn from says more about
their distance than the objective: 6.5 for the VAE, 2.1 if it starts from its codes,
2.3 with the flow; 1.2 and 0.7 for UAE and gradient origin networks, which draw from a
mixture fitted to the codes. WAE-MMD has 8.3, so that this claim fails; SWAE 2.3. MIG
takes codes of a deterministic encoder to be sure, and says nothing of those.

Not here, since they make no images of a vector, or no new objective for it: sequences
(svae, pv_rnn), functions (vano), programs of discrete latents (gflownet_em), retrieval
(vod), maps of few dimensions (vae_charts, diffusion_nets), posteriors of weights
(linearised_implicit_vi), estimators (rsvi, bbvi_gradvar), dae_score, and coupled_vae,
whose posterior is a table. WAE-GAN, the
adversary of gmm_posterior_vae and VLAE's local decoder are left out too: they would add
networks that the others do not have.
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from jax import lax

from experiments.vae._fits import classifier, measure_images, train
from experiments.vae._models import Model, Size, models
from experiments.vae._scores import (
    dci,
    frechet_distance,
    infomec,
    kernel_distance,
    sap,
)
from jaxzoo.data.fashion_mnist import fashion_mnist
from jaxzoo.data.sprites import flat_sprites
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, image_grid, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr
from jaxzoo.vae.beta_tcvae import mig

FASHION = {
    "log_likelihood": "log p(x), nats",
    "sampling_error": "its sampling error",
    "frechet": "Frechet",
    "kernel": "KID",
    "error": "squared error",
    "active": "active units",
    "information": "I(x; z), nats",
    "steps_per_second": "steps/s",
}
SPRITES = {
    "mig": "MIG", "sap": "SAP", "disentangled": "D", "complete": "C",
    "informative": "I", "modular": "InfoM", "explicit": "InfoE", "compact": "InfoC",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    only: tuple[str, ...] = ()
    """Slugs of models, beside the VAE; none: all."""
    seeds: int = 3
    first_seed: int = 0
    latents: int = 16
    hidden: int = 200
    steps: int = 1200
    batch_size: int = 100
    learning_rate: float = 1e-3
    samples: int = 8  # k of IWAE and its kin, even
    sprite_latents: int = 6
    sprite_hidden: int = 64
    sprite_steps: int = 1000
    sprite_rate: float = 3e-3
    images: int = 10_000  # that train
    held_out: int = 1000
    draws: int = 100  # of importance sampling
    classifier_steps: int = 400
    features: int = 32

    def __post_init__(self):
        if self.seeds < 2 or self.samples % 2 or self.latents < 2:
            raise ValueError("seeds >= 2, latents >= 2, an even samples, please")


PRESETS = {
    "smoke": Config(
        only=("vae",), seeds=2, latents=2, hidden=4, steps=2, batch_size=4, samples=2,
        sprite_latents=2, sprite_hidden=4, sprite_steps=2, images=40, held_out=40,
        draws=2, classifier_steps=2, features=4,
    ),
    "full": Config(),
}  # fmt: skip


def fashion(config: Config) -> list[Any]:
    """Grey images `[N, 784]` in [0, 1] and labels, to train on and held out."""
    found = []
    for name, count in (("train", config.images), ("test", config.held_out)):
        part = fashion_mnist().split(name).arrays
        image = part["image"][:count].reshape(-1, 784).astype(np.float32)
        found += [image / np.float32(255.0), part["label"][:count]]
    return found


def measure_sprites(codes: Any, factors: np.ndarray, seed: int) -> dict[str, float]:
    mean, log_std = (np.asarray(a) for a in codes)
    key = jax.random.fold_in(jax.random.key(2), seed)
    score = _mig(key, mean, log_std, factors)
    test = np.random.default_rng(0).uniform(size=len(mean)) < 0.25
    values = (
        float(score), sap(mean, factors, test), *dci(mean, factors, test),
        *infomec(mean, factors, test),
    )  # fmt: skip
    return dict(zip(SPRITES, values, strict=True))


@jax.jit
def _mig(key: jax.Array, mean: Any, log_std: Any, factors: Any) -> jax.Array:
    return mig(key, mean, log_std, factors)[0]


def measured(config: Config, run: Run) -> dict[str, dict[str, np.ndarray]]:
    """By model figures `[seeds]`, its parameters' count and samples of the first."""
    data, (shapes, factors) = fashion(config), flat_sprites(is_upright=True)
    x, test = data[0], data[2]
    sizes = (
        Size(784, config.latents, config.hidden, len(x), config.samples),
        Size(
            256, config.sprite_latents, config.sprite_hidden, len(shapes),
            config.samples,
        ),
    )  # fmt: skip
    both = [models(size) for size in sizes]
    if unknown := set(config.only) - set(both[0]):
        raise ValueError(f"only={sorted(unknown)}: there are {', '.join(both[0])}")
    wanted = {"vae", *config.only} if config.only else set(both[0])
    binary = np.random.default_rng(0).uniform(size=test.shape) < test
    binary = binary.astype(np.float32)
    look = classifier(
        run, data, features=config.features, steps=config.classifier_steps
    )
    known = jax.device_get(jax.jit(look)(test))
    seeds = config.first_seed + np.arange(config.seeds)
    results: dict[str, dict[str, np.ndarray]] = {}
    for name in (name for name in both[0] if name in wanted):
        if not (history := run.history(name)):
            run.say(name)
            found = fashion_figures(
                config, both[0][name], look, seeds, x, test, binary, known
            )
            found |= sprite_figures(config, both[1][name], seeds, shapes, factors)
            run.log(name, 0, found)
            history = run.history(name)
            jax.clear_caches()  # nothing of this model is compiled again
        results[name] = {k: np.asarray(v)[0] for k, v in history.items()}
    return results


def fashion_figures(
    config: Config, model: Model, look: Any, seeds: np.ndarray, x: np.ndarray,
    test: np.ndarray, binary: np.ndarray, known: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    fit = train(
        model, steps=config.steps, rate=config.learning_rate,
        batch_size=config.batch_size,
    ).lower(seeds, x).compile()  # fmt: skip
    begin = time.perf_counter()
    params = jax.block_until_ready(fit(seeds, x))
    seconds = time.perf_counter() - begin

    @jax.jit
    def every(params: Any, seeds: Any, x: Any, test: Any, binary: Any) -> Any:
        one = functools.partial(measure_images, model, look, draws=config.draws)
        return lax.map(lambda a: one(a[0], a[1], x, test, binary), (params, seeds))

    found, features, images = jax.device_get(every(params, seeds, x, test, binary))
    found["frechet"] = [frechet_distance(f, known) for f in features]
    found["kernel"] = [kernel_distance(f, known) for f in features]
    found["steps_per_second"] = config.steps * len(seeds) / seconds
    first = jax.tree.map(lambda a: a[0], params)
    found["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(first))
    found["samples"] = np.round(255.0 * images[0]).astype(int).tolist()
    return found


def sprite_figures(
    config: Config, model: Model, seeds: np.ndarray, x: np.ndarray, factors: np.ndarray
) -> dict[str, Any]:
    fit = train(
        model, steps=config.sprite_steps, rate=config.sprite_rate,
        batch_size=config.batch_size,
    )  # fmt: skip
    params = fit(seeds, x)
    encode = jax.jit(lambda params, x: lax.map(lambda p: model.encode(p, x), params))
    codes = jax.device_get(encode(params, x))
    scores = [
        measure_sprites([a[i] for a in codes], factors, int(seed))
        for i, seed in enumerate(seeds)
    ]
    return {name: [s[name] for s in scores] for name in SPRITES}


def claims_of(results: dict[str, dict[str, np.ndarray]]) -> list[Claim]:
    vae = results["vae"]
    counts = {k: int(r["parameters"]) for k, r in results.items()}
    off = max(abs(count / counts["vae"] - 1.0) for count in counts.values())
    claims = [
        Claim(
            f"parameters relative to the VAE's {counts['vae']:,}, largest difference",
            off, "<= 0.03", off <= 0.03,
        )
    ]  # fmt: skip
    for name, figure, text, sign in (
        ("iwae", "log_likelihood", "held-out log p(x) of IWAE less the VAE's, nats", 1),
        ("beta_tcvae", "mig", "sprites, MIG of beta-TCVAE less the VAE's", 1),
        ("infovae", "information", "I(x; z) of MMD-VAE less the VAE's, nats", 1),
        ("wae", "frechet", "Frechet distance of WAE less the VAE's", -1),
    ):
        if name in results:
            gain = results[name][figure] - vae[figure]
            holds = bool(sign * gain.mean() >= 0.0)
            bound = ">= 0" if sign > 0 else "<= 0"
            claims.append(Claim(text, float(gain.mean()), bound, holds, stderr(gain)))
    return claims


def pictures(config: Config, run: Run, results: Any, labels: Any) -> list[Figure]:
    names = list(results)
    held_out = fashion(config)[2][:8]
    rows = [held_out, *(results[n]["samples"] / 255.0 for n in names)]
    grid = image_grid(
        [np.reshape(row, (-1, 28, 28)) for row in rows],
        ["held out", *(labels[n] for n in names)],
    )
    shown = {
        "frechet": "Frechet distance", "error": "squared error per image",
        "information": "I(x; z) (nats)", "log_likelihood": "log p(x) (nats)",
    }  # fmt: skip
    tall = 1.0 + 0.26 * len(names)
    bars, axes = panels(len(shown), width=3.0, height=tall)
    _rows(axes, shown, results, labels)
    scores = {"mig": "MIG", "sap": "SAP", "disentangled": "DCI, D", "modular": "InfoM"}
    sprite_bars, axes = panels(len(scores), width=3.0, height=tall)
    _rows(axes, scores, results, labels)
    over = f"Dots are means over {config.seeds} seeds, bars standard errors."
    return [
        run.figure(
            "samples", grid, title="Samples",
            caption="Decoded from draws of what each model samples from, first seed.",
        ),
        run.figure("fashion", bars, title="Fashion-MNIST, held out", caption=over),
        run.figure("sprites", sprite_bars, title="Disentanglement", caption=over),
    ]  # fmt: skip


def _rows(axes: Any, shown: dict[str, str], results: Any, labels: Any) -> None:
    """One axis per figure, one row per model that has it."""
    names = list(results)
    for axis, (figure, label) in zip(axes, shown.items(), strict=True):
        for row, name in enumerate(names):
            if figure in results[name]:
                values = results[name][figure]
                axis.errorbar(
                    values.mean(), row, xerr=stderr(values), fmt="o", capsize=3,
                    color=COLORS[name != "vae"],
                )  # fmt: skip
        axis.set(xlabel=label, yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5))
        axis.set_yticklabels([labels[n] for n in names] if axis is axes[0] else [])


def main(config: Config, run: Run) -> Report:
    results = measured(config, run)
    labels = {k: m.label for k, m in models(Size(784, 2, 2, 2, 2)).items()}
    metrics: dict[str, Any] = {}
    for title, columns in (
        ("Fashion-MNIST, held out", FASHION), ("Sprites", SPRITES),
    ):  # fmt: skip
        rows = []
        for name, result in results.items():
            cells = []
            for figure in columns:
                if figure not in result:
                    cells.append("-")
                    continue
                values = np.atleast_1d(result[figure])
                metrics[f"{name}/{figure}"] = float(values.mean())
                text = f"{values.mean():.3g}"
                if len(values) > 1:
                    metrics[f"{name}/{figure}_stderr"] = stderr(values)
                    text += f" ± {stderr(values):.1g}"
                cells.append(text)
            rows.append((labels[name], *cells))
        head = ("model", *columns.values())
        run.table(f"{title}, {config.seeds} seeds", head, rows)
    return Report(claims_of(results), metrics, pictures(config, run, results, labels))


if __name__ == "__main__":
    experiment(main, PRESETS)
