"""8-bit optimizer states: a quarter of the bytes, and the loss of 32-bit Adam.

Claims: an outlier changes the codes of its own block alone; on logged Adam states the
mean relative error is at most a third of linear 8-bit's in the same blocks; a small LM
and a digits net end within 1 % of 32-bit Adam's held-out loss at its learning rate,
with state bytes at most 0.27x.

    python -m experiments.optim.blockwise_8bit_optim full

Expected, 40 s of CPU: relative errors of 0.32x and 0.19x linear's for Adam's mean and
mean square; losses of the LM 0.3 % and of the digits net 1.2 +- 1.0 % below 32-bit
Adam's, so that the last one fails in its favour; 0.256x and 0.258x of the bytes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.optim._tasks import byte_lm, digits_mlp, fit
from jaxzoo.nn.blockwise_quantization import dequantize_blockwise, quantize_blockwise
from jaxzoo.optim.blockwise_8bit_optim import adam8bit
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, curves, panels
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr

BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 64  # of the LM: its matrices have 4096 numbers or more
    depth: int = 2
    lm_steps: int = 150
    lm_batch: int = 8
    lm_seeds: int = 3
    hidden: tuple[int, ...] = (256, 512)
    digits_steps: int = 300
    digits_batch: int = 64
    digits_seeds: int = 5
    learning_rate: float = 2e-3
    held_out: int = 64

    def __post_init__(self):
        if min(self.lm_seeds, self.digits_seeds) < 2:
            raise ValueError("seeds >= 2, please")


PRESETS = {
    "smoke": Config(
        depth=1, lm_steps=2, lm_batch=2, lm_seeds=2, hidden=(64, 64), digits_steps=2,
        digits_seeds=2, held_out=2,
    ),
    "full": Config(),
}  # fmt: skip


def outlier_claim() -> Claim:
    x = np.random.default_rng(0).normal(size=(64, 4 * BLOCK)).astype(np.float32)
    spoilt = x.copy()
    spoilt[3, BLOCK + 7] = 1e5
    a, b = (quantize_blockwise(jnp.asarray(y))[0] for y in (x, spoilt))
    changed = np.array(a != b)
    changed[3, BLOCK : 2 * BLOCK] = False
    return Claim(
        f"outlier of 1e5 among {x.size} normal numbers: codes outside its block that "
        "change",
        float(changed.sum()), "<= 0", not changed.any(),
    )  # fmt: skip


def linear(x: np.ndarray, signed: bool) -> np.ndarray:
    """8 bits equally spaced up to the largest number of each block."""
    absmax = np.maximum(np.abs(x).max(1, keepdims=True), 1e-38)
    levels = 127 if signed else 255
    return np.round(x / absmax * levels) / levels * absmax


def quantile(x: np.ndarray, signed: bool) -> np.ndarray:
    """256 codes that the scaled numbers have equally often."""
    absmax = np.maximum(np.abs(x).max(1, keepdims=True), 1e-38)
    unit = x / absmax
    values = np.quantile(unit, (np.arange(256) + 0.5) / 256)
    code = np.searchsorted((values[1:] + values[:-1]) / 2, unit)
    return values[code] * absmax


def dynamic(x: np.ndarray, signed: bool) -> np.ndarray:
    codes, absmax = quantize_blockwise(jnp.asarray(x), signed=signed)
    return np.asarray(dequantize_blockwise(codes, absmax, signed=signed))


METHODS = {"dynamic": dynamic, "linear": linear, "quantile": quantile}


def relative_errors(adam: Any, seeds: int) -> dict[str, dict[str, np.ndarray]]:
    """Mean |x' - x| / |x| over nonzero moments, per moment, method and seed."""
    errors: dict[str, dict[str, np.ndarray]] = {}
    for field, signed in (("mu", True), ("nu", False)):
        errors[field] = {name: np.zeros(seeds) for name in METHODS}
        for seed in range(seeds):
            leaves = [
                np.asarray(leaf[0, seed]).reshape(-1, BLOCK)
                for leaf in jax.tree.leaves(getattr(adam, field))
                if leaf[0, seed].size >= 4096
            ]
            x = np.concatenate(leaves)
            for name, method in METHODS.items():
                there = np.abs(method(x, signed) - x)[x != 0] / np.abs(x[x != 0])
                errors[field][name][seed] = there.mean()
    return errors


def moments(state: Any) -> Any:
    """The state of `scale_by_adam` inside a chain."""

    def is_adam(x: Any) -> bool:
        return isinstance(x, optax.ScaleByAdamState)

    return next(x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))


def size(state: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def compare(
    run: Run, name: str, task: Any, learning_rate: float, **knobs: Any
) -> tuple[dict[str, dict[str, np.ndarray]], float, Any]:
    """Scores of both Adams, the ratio of their moments' bytes, and 32-bit moments."""
    scores, states = {}, {}
    for bits, make in ((32, optax.adam), (8, adam8bit)):
        every, _, state = fit(
            run, f"{name}_{bits}", task, make, [learning_rate], **knobs
        )
        scores[f"{bits}-bit"] = {k: v[0] for k, v in every.items()}
        states[bits] = moments(state)
    ratio = size(states[8][1:]) / size(states[32][1:])
    return scores, ratio, states[32]


def claims_of(name: str, scores: Any, ratio: float) -> list[Claim]:
    ours, theirs = scores["8-bit"]["loss"], scores["32-bit"]["loss"]
    apart = (ours - theirs) / theirs.mean()
    mean = 100 * float(apart.mean())
    return [
        Claim(
            f"{name}: held-out loss of 8-bit Adam above 32-bit Adam's, %, mean over "
            "seeds",
            mean, "<= 1 in size", abs(mean) <= 1, 100 * stderr(apart),
        ),
        Claim(
            f"{name}: bytes of the moments over those in 32 bits",
            ratio, "<= 0.27", ratio <= 0.27,
        ),
    ]  # fmt: skip


def picture(run: Run, errors: Any) -> Figure:
    figure, axes = panels(3, width=4.4)
    place = np.arange(len(METHODS))
    for i, (field, label) in enumerate((("mu", "mean"), ("nu", "mean square"))):
        values = [errors[field][name] for name in METHODS]
        axes[0].bar(
            place + 0.4 * (i - 0.5), [v.mean() for v in values], 0.38,
            yerr=[stderr(v) for v in values], capsize=3, color=COLORS[i],
            label=f"Adam's {label}",
        )  # fmt: skip
    axes[0].set(
        xticks=place, xticklabels=list(METHODS),
        ylabel="mean relative error of logged moments",
    )  # fmt: skip
    axes[0].legend(frameon=False, loc="upper left")
    axes[0].set_ylim(top=1.35 * axes[0].get_ylim()[1])
    names = (
        ("lm", "LM, loss of a batch (nats/byte)"),
        ("digits", "digits, loss of a batch (nats)"),
    )
    for ax, (name, label) in zip(axes[1:], names, strict=True):
        history = {bits: run.history(f"{name}_{bits}") for bits in (32, 8)}
        series = {f"{b}-bit Adam": (h["step"], h["loss"]) for b, h in history.items()}
        curves(ax, series, xlabel="step", ylabel=label)
        ax.set_yscale("log")
    return run.figure(
        "blockwise_8bit_optim", figure, title="Moments in 8 bits",
        caption="Left: relative error of the moments of an LM under three codes of 8 "
        "bits in blocks of 256. Middle and right: training with them. Mean and "
        "standard error over seeds.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    claims = [outlier_claim()]
    lm = byte_lm(
        width=config.width, depth=config.depth, heads=4, held_out=config.held_out
    )
    scores, ratio, adam = compare(
        run, "lm", lm, config.learning_rate, steps=config.lm_steps,
        batch_size=config.lm_batch, seeds=config.lm_seeds, log_every=10,
    )  # fmt: skip
    errors = relative_errors(adam, config.lm_seeds)
    metrics = {}
    for field, by_name in errors.items():
        share = by_name["dynamic"] / by_name["linear"]
        claims.append(
            Claim(
                f"logged {field} of Adam: mean relative error, dynamic over linear",
                float(share.mean()), "<= 1/3", bool(share.mean() <= 1 / 3),
                stderr(share),
            )
        )  # fmt: skip
        metrics |= {f"error/{field}/{k}": float(v.mean()) for k, v in by_name.items()}
    claims += claims_of("LM", scores, ratio)
    metrics |= {f"lm/{k}/loss": float(v["loss"].mean()) for k, v in scores.items()}
    scores, ratio, _ = compare(
        run, "digits", digits_mlp(hidden=config.hidden), config.learning_rate,
        steps=config.digits_steps, batch_size=config.digits_batch,
        seeds=config.digits_seeds, log_every=10,
    )  # fmt: skip
    claims += claims_of("digits", scores, ratio)
    for bits, values in scores.items():
        metrics |= {f"digits/{bits}/{k}": float(v.mean()) for k, v in values.items()}
    run.table(
        "Mean relative error of logged moments",
        ("moment", *METHODS),
        [(f, *(f"{v.mean():.4f}" for v in e.values())) for f, e in errors.items()],
    )
    return Report(claims, metrics, [picture(run, errors)])


if __name__ == "__main__":
    experiment(main, PRESETS)
