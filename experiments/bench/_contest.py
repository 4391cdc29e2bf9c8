"""Forward and gradient on the CPU: ours against others', and its memory by length."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from experiments.bench import _timing as timing
from jaxzoo.training.record import Claim, Report, Run

__all__ = ["OURS", "hold"]

OURS = "jaxzoo"


def hold(
    config: Any,
    run: Run,
    name: str,
    shape: str,
    calls: Mapping[str, Callable[[], Any]],
    *,
    flat: Callable[[str, Any], Any],
    bounds: Mapping[str, float],
    memory: Mapping[int, float],
    most: tuple[float, float],
) -> Report:
    """Compares the values of contestants first, then times them in turn.

    Args:
        config: a dataclass with `samples`, `seconds`, `patience`, `noise` and `record`.
        run: the open run.
        name: of the record, `experiments/results/bench/NAME_cpu.json`.
        shape: of the workload, in words.
        calls: by contestant, `OURS` among them; each waits for its result and gives it.
        flat: of a contestant and its result the arrays that are compared.
        bounds: by contestant, of our time over its.
        memory: MiB of temporary memory that ours takes, by length.
        most: of that at the first length, and of its growth from one to the next.

    Raises:
        ArithmeticError: the results differ.
    """
    metrics: dict[str, float] = {"load_before": os.getloadavg()[0]}
    values = {who: flat(who, call()) for who, call in calls.items()}
    for who, arrays in values.items():
        error = max(map(timing.far, arrays, values[OURS]))
        if error > 1e-4:
            raise ArithmeticError(f"{who} and {OURS} differ by {error}.")
        metrics[f"{who}/difference"] = error
    measured = timing.measure(
        calls, samples=config.samples, seconds=config.seconds,
        patience=config.patience, noise=config.noise,
    )  # fmt: skip
    ours, quiet = measured[OURS]["median"], measured["quiet"]
    metrics["quiet"] = quiet
    claims, rows = [], []
    for who in calls:
        median, least = (measured[who][k] for k in ("median", "min"))
        ratio = ours / median
        metrics |= {f"{who}/median_ms": median, f"{who}/min_ms": least}
        metrics[f"{who}/ratio"] = ratio
        rows.append((who, f"{median:.1f}", f"{least:.1f}", f"{ratio:.2f}"))
        if who in bounds and quiet >= timing.QUIET:
            text = f"Forward and gradient, {shape}: our time over that of {who}"
            bound = bounds[who]
            claims.append(Claim(text, ratio, f"<= {bound:.2g}", ratio <= bound))
    head = ("", "median (ms)", "min (ms)", "ours / it")
    run.table(f"{shape}; {quiet} quiet samples of {measured['taken']}", head, rows)
    metrics |= {f"temporary/{n}_MiB": size for n, size in memory.items()}
    lengths, sizes = list(memory), list(memory.values())
    growth = max(b / a for a, b in zip(sizes, sizes[1:], strict=False))
    claims += [
        Claim(
            f"Forward and gradient, {shape}: MiB of temporary memory",
            sizes[0], f"<= {most[0]:g}", sizes[0] <= most[0],
        ),
        Claim(
            f"its growth where the length grows by {lengths[1] // lengths[0]}, up to "
            f"{lengths[-1]}",
            growth, f"<= {most[1]:g}", growth <= most[1],
        ),
    ]  # fmt: skip
    if config.record:
        path = timing.RESULTS / f"{name}_cpu.json"
        timing.write_record(path, dataclasses.asdict(config), claims, metrics)
    return Report(claims, metrics, [])
