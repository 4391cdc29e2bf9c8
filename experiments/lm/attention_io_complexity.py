"""I/O complexity of attention: three programs on a machine that counts its transfers.

Claims: naive, FlashAttention's and the small-cache program compute exact attention; the
words that they move are within a factor of 8 of N^2 d^2 / M from M = d^2 and of
N^2 d / sqrt(M) below, with exponents in M of -1 and -1/2; and FlashAttention becomes
the better one within a factor of 4 of M = d^2.

    python -m experiments.lm.attention_io_complexity full    # 1 minute on 2 cores

Expected: one claim does not hold. FlashAttention with its own blocks of M / (4 d) keys
moves 12.7 times N^2 d^2 / M words, as each of 4 N d / M passes loads q and o and stores
o. With blocks as wide as the cache allows it is 7.3 times. The switch comes at 3.3 d^2,
and at 1.3 d^2 with wide blocks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxzoo.lm.attention_io_complexity import small_cache_attention, sweep
from jaxzoo.nn.counted_attention import flash_attention, naive_attention
from jaxzoo.training.command import experiment
from jaxzoo.training.plots import COLORS, panels
from jaxzoo.training.record import Claim, Figure, Report, Run

PROGRAMS: dict[str, Callable[..., Any]] = {
    "naive": naive_attention,
    "flash": flash_attention,
    "flash_widest": functools.partial(flash_attention, tiling="widest"),
    "small_cache": small_cache_attention,
}
NAMES = {
    "naive": "naive",
    "flash": "FlashAttention, M/(4d) keys",
    "flash_widest": "FlashAttention, widest blocks",
    "small_cache": "small-cache program",
}
MARKS = {"naive": "^", "flash": "o", "flash_widest": "s", "small_cache": "D"}


@dataclasses.dataclass(frozen=True)
class Config:
    length: int = 1024
    width: int = 32
    # Sizes of the cache are d^2 times powers of 2.
    smallest: int = -4
    largest: int = 3
    naive_length: int = 256  # the naive program does not depend on the cache
    seed: int = 0

    def __post_init__(self):
        if self.smallest > -1 or self.largest < 1:
            raise ValueError("smallest <= -1 and largest >= 1, please")
        if self.width * 2.0**self.largest > self.length:
            raise ValueError("caches of at most length * width words, please")
        if self.width**2 * 2.0**self.smallest < 5:
            raise ValueError("caches of at least 5 words, please")


PRESETS = {
    "smoke": Config(length=128, width=16, smallest=-3, largest=2, naive_length=32),
    "full": Config(),
}


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = q @ k.T
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return weights @ v / weights.sum(axis=1, keepdims=True)


def execute(config: Config, run: Run, caches: np.ndarray, counted) -> dict[str, Any]:
    """Runs each program wherever it fits: words moved `[caches]`, NaN elsewhere."""
    moved = {name: np.full(len(caches), np.nan) for name in PROGRAMS}
    errors, gaps = dict.fromkeys(PROGRAMS, 0.0), []
    jobs = [
        (name, i)
        for name in PROGRAMS
        for i in range(len(caches))
        if np.isfinite(counted[name][i])
    ]
    # The naive program moves the same number of words whatever the cache: once.
    jobs = [job for job in jobs if job[0] != "naive"] + [("naive", len(caches) - 1)]
    with run.progress("programs", 0, len(jobs), "words") as progress:
        for done, (name, i) in enumerate(jobs):
            length = config.naive_length if name == "naive" else config.length
            rng = np.random.default_rng([config.seed, done])
            # Scores of variance 1, as after the division by sqrt(d).
            q, k, v = rng.normal(size=(3, length, config.width))
            q /= config.width**0.5
            output, aux = PROGRAMS[name](q, k, v, cache=int(caches[i]))
            errors[name] = max(
                errors[name], float(np.abs(output - exact(q, k, v)).max())
            )
            words = float(aux["loads"] + aux["stores"])
            if aux["peak"] > caches[i]:
                raise AssertionError(f"{name} used {aux['peak']} words of {caches[i]}")
            if name == "naive":
                expected = sweep(caches, length=length, width=config.width)[name][i]
            else:
                moved[name][i], expected = words, counted[name][i]
            gaps.append(abs(words - expected))
            run.log(name, int(caches[i]), {"words": words, "error": errors[name]})
            progress.update(done + 1, {"words": words})
    return {"moved": moved, "errors": errors, "gap": max(gaps)}


def pictures(config: Config, run: Run, caches, counted, moved) -> list[Figure]:
    figure, (left, right) = panels(2)
    square = config.width**2
    formula = counted["lower_bound"]
    for (name, label), color in zip(NAMES.items(), COLORS, strict=False):
        values = counted[name] if name == "naive" else moved[name]
        style = {"color": color, "marker": MARKS[name], "ms": 4, "label": label}
        fits = np.isfinite(values)
        left.plot(caches[fits], values[fits], **style)
        if name != "naive":
            right.plot(caches[fits], (values / formula)[fits], **style)
    left.plot(caches, formula, color="black", ls="--", label="formulas")
    left.set(ylabel="words loaded and stored", yscale="log")
    right.axhline(8, color="black", ls=":", lw=1)
    right.text(caches[0], 8.3, "factor of 8", fontsize=8)
    right.set(ylabel="words over the formula (1)", yscale="log")
    right.set_yticks([4, 8, 16, 32], ["4", "8", "16", "32"])
    for ax in (left, right):
        ax.axvline(square, color="0.5", ls=":", lw=1)
        ax.set(xlabel="cache M (words)", xscale="log")
        ax.set_xticks(caches[::2], [str(c) for c in caches[::2]])
        ax.minorticks_off()
    left.legend(frameon=False, fontsize=7)
    left.text(square * 1.05, formula.min(), "M = d²", color="0.4", fontsize=8)
    return [
        run.figure(
            "transfers", figure, title="Words moved for exact attention",
            caption=f"N = {config.length} tokens of width d = {config.width}; counted "
            "by the machine (naive: in closed form). Dashed: N²d²/M from M = d², "
            "N²d/√M below.",
        )
    ]  # fmt: skip


def main(config: Config, run: Run) -> Report:
    square = config.width**2
    powers = np.arange(config.smallest, config.largest + 1)
    caches = (square * 2.0**powers).astype(np.int64)
    counted = sweep(caches, length=config.length, width=config.width)
    for name in PROGRAMS:
        run.forget_after(name, 0)
    executed = execute(config, run, caches, counted)
    moved, error = executed["moved"], max(executed["errors"].values())
    above, below = caches >= square, caches <= square
    claims = [
        Claim(
            "largest error of any program against exact attention", error, "<= 1e-5",
            error <= 1e-5,
        ),
        Claim(
            "words counted by the machine less the closed form, largest",
            executed["gap"], "== 0", executed["gap"] == 0,
        ),
    ]  # fmt: skip
    regimes = {"flash": above, "flash_widest": above, "small_cache": below}
    metrics = {}
    for name, keep in regimes.items():
        ratio = (moved[name] / counted["lower_bound"])[keep]
        largest = float(ratio.max())
        slope = np.polyfit(np.log(caches[keep]), np.log(moved[name][keep]), 1)[0]
        wanted = -0.5 if name == "small_cache" else -1.0
        where = "M <= d^2" if name == "small_cache" else "M >= d^2"
        claims += [
            Claim(
                f"{NAMES[name]}, {where}: words over the formula, largest",
                largest, "in [1/8, 8]", bool(ratio.min() >= 1 / 8 and largest <= 8),
            ),
            Claim(
                f"{NAMES[name]}, {where}: exponent of M",
                float(slope), f"{wanted:g} +- 0.15", bool(abs(slope - wanted) <= 0.15),
            ),
        ]  # fmt: skip
        metrics[f"smallest_ratio/{name}"] = float(ratio.min())
    for name in ("flash", "flash_widest"):
        switch = float(counted[f"switch/{name}"]) / square
        text = f"{NAMES[name]} moves fewer words than the small-cache program from"
        holds = 1 / 4 <= switch <= 4
        claims.append(Claim(f"{text} M / d^2 =", switch, "in [1/4, 4]", holds))
    metrics |= {f"error/{name}": e for name, e in executed["errors"].items()}
    metrics |= {
        f"words/{name}/M{cache}": float(words)
        for name, values in moved.items()
        for cache, words in zip(caches, values, strict=True)
        if np.isfinite(words)
    }
    return Report(claims, metrics, pictures(config, run, caches, counted, moved))


if __name__ == "__main__":
    experiment(main, PRESETS)
