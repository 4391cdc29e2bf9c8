"""1-bit Adam: signs and scales in place of float32 train as well, if errors come back.

Claims, with 8 simulated workers: on the bytes of a novel losses end within 1 % of
Adam's, on digits within 3 % and the accuracy within 1 point; a compressed step sends at
least 28 times fewer bytes; and it is worse to forget what the signs could not say, or
to compress the gradients that Adam is fed with, from step 0 on.

    python -m experiments.distributed.one_bit_adam full    # 3 seeds: 2 minutes, 2 cores

Expected: on the novel held-out losses of 2.057 against 2.042 nats, 0.71 % above Adam's;
2.32 without error feedback and 2.46 with 1-bit gradients. 7,602 bytes in place of
234,080. On digits 91.5 against 90.6 % right, the held-out loss 0.8 % above Adam's with
a standard error of 3.8 %; the training loss, lower at each method's best rate, leaps
after the warm-up and is higher at equal rates.
"""

import dataclasses
from typing import Any, cast

from experiments.distributed._workers import AXIS, Workers, best_fit, loss_panels, means
from experiments.optim._tasks import Task, byte_lm, digits_mlp
from jaxzoo.distributed.one_bit_adam import OneBitAdamState, scale_by_one_bit_adam
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS
from jaxzoo.training.record import Claim, Figure, Report, Run
from jaxzoo.training.seeds import stderr

AXES = OneBitAdamState(*cast(Any, (None, 0, 0, None)))
NAMES = ("Adam", "1-bit Adam", "no error feedback", "1-bit gradients")


@dataclasses.dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ("novel", "digits")
    seeds: int = 3
    workers: int = 8
    novel_rates: tuple[float, ...] = (1e-2, 2e-2)  # of Adam and of 1-bit Adam alike
    digits_rates: tuple[float, ...] = (3e-3, 1e-2)
    b2: float = 0.99
    warmup: float = 0.25  # of the steps
    lm_steps: int = 400
    lm_batch: int = 16
    window: int = 32  # bytes
    digits_steps: int = 300
    digits_batch: int = 128
    hidden: int = 128

    def __post_init__(self):
        if self.seeds < 2 or "digits" not in self.tasks:
            raise ValueError("seeds >= 2, and the digits, please")


PRESETS = {
    "smoke": Config(
        tasks=("digits",), seeds=2, workers=2, digits_rates=(1e-2,), digits_steps=8,
        digits_batch=16, hidden=16,
    ),
    "full": Config(),
}  # fmt: skip


def methods(config: Config, steps: int) -> dict[str, Workers]:
    """What is compared; `best` rates are looked for among Adam and 1-bit Adam alone."""
    warmup = max(1, int(config.warmup * steps))
    knobs: Any = (
        {"compression": "none"},
        {"warmup": warmup},
        {"warmup": warmup, "error_feedback": False},
        {"warmup": 0, "compression": "gradient"},
    )
    directions: Any = [
        scale_by_one_bit_adam(b2=config.b2, axis_name=AXIS, **k) for k in knobs
    ]
    return {n: Workers(d, AXES) for n, d in zip(NAMES, directions, strict=True)}


def compare(
    config: Config, run: Run, label: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scores per seed at the best rate, and histories, of every method."""
    if label == "novel":
        task: Task = byte_lm(window=config.window)
        rates, steps, size = config.novel_rates, config.lm_steps, config.lm_batch
    else:
        task = digits_mlp(hidden=(config.hidden,))
        rates, steps = config.digits_rates, config.digits_steps
        size = config.digits_batch
    scores, histories = {}, {}
    for name, method in methods(config, steps).items():
        scores[name], histories[name] = best_fit(
            run, label, name, task, method, rates, steps=steps, batch_size=size,
            workers=config.workers, seeds=config.seeds,
        )  # fmt: skip
        scores[name]["train"] = histories[name][1][-1]
        if name == "1-bit Adam":
            # What is left out of it is tried at its own rate.
            rates = (scores[name]["rate"],)
    return scores, histories


def within(scores: dict[str, Any], label: str, key: str, bound: float) -> Claim:
    """A claim that 1-bit Adam loses no more than `bound` to Adam, seeds paired."""
    ours, adam = scores["1-bit Adam"][key], scores["Adam"][key]
    if key == "accuracy":
        gap, unit = adam - ours, "held-out accuracy below Adam's, points"
    else:
        kind = "held-out" if key == "loss" else "training"
        gap, unit = 100 * (ours / adam - 1), f"{kind} loss above Adam's, %"
    measured = float(gap.mean())
    return Claim(
        f"{label}, 1-bit Adam: {unit}, mean over seeds",
        measured, f"<= {bound:g}", measured <= bound, stderr(gap),
    )  # fmt: skip


def claims_of(results: dict[str, Any]) -> list[Claim]:
    digits = results["digits"]
    ratios = [s["Adam"]["bytes"] / s["1-bit Adam"]["bytes"] for s in results.values()]
    claims = []
    if "novel" in results:
        claims = [within(results["novel"], "novel", k, 1.0) for k in ("loss", "train")]
    claims += [
        within(digits, "digits", "loss", 3.0),
        within(digits, "digits", "train", 3.0),
        within(digits, "digits", "accuracy", 1.0),
        Claim(
            "bytes that a worker sends in a step of Adam over those of a compressed "
            "step, the smaller of both nets",
            min(ratios), ">= 28", min(ratios) >= 28,
        ),
    ]  # fmt: skip
    for name in NAMES[2:]:
        for label, scores in results.items():
            gap = scores[name]["loss"] - scores["1-bit Adam"]["loss"]
            claims.append(
                Claim(
                    f"{label}, {name}: held-out loss above 1-bit Adam's, nats",
                    float(gap.mean()), "> 0", bool(gap.mean() > 0), stderr(gap),
                )
            )  # fmt: skip
    return claims


def picture(config: Config, run: Run, histories: dict[str, Any]) -> Figure:
    figure, axes = loss_panels(histories)
    for ax, series in zip(axes, histories.values(), strict=True):
        end = config.warmup * series["Adam"][0][-1]
        ax.axvline(end, color=COLORS[-1], linestyle=":", lw=1)
    return run.figure(
        "one_bit_adam", figure, title="Signs, with and without memory",
        caption=f"Mean and standard error over {config.seeds} seeds, "
        f"{config.workers} workers; the dotted line is the end of the warm-up.",
    )  # fmt: skip


def main(config: Config, run: Run) -> Report:
    results, histories = {}, {}
    for label in config.tasks:
        results[label], histories[label] = compare(config, run, label)
    columns = ("loss", "train", "accuracy", "rate", "bytes")
    rows, metrics = means(results, columns)
    run.table(
        f"Held-out, {config.workers} workers, {config.seeds} seeds",
        (
            "method",
            "loss (nats)",
            "training loss",
            "accuracy (%)",
            "learning rate",
            "bytes per step",
        ),
        rows,
    )
    return Report(claims_of(results), metrics, [picture(config, run, histories)])


if __name__ == "__main__":
    experiment(main, PRESETS)
