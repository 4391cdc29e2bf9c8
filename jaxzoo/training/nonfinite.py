"""What happens when a number is not finite: decided on the device, told afterwards.

    abort     the state stays as it was before the bad step; a black box tells what was
              bad, and the run ends (the default)
    skip      the bad step changes nothing but the step count; training goes on
    rollback  back to the newest checkpoint; the steps of the call that held the bad one
              are passed over

The guard is part of the compiled call, so that nothing waits for the host. Under "skip"
every step looks at its new state and keeps one of the two. The other policies need not
pay for that: a call looks once, at all metrics and at the state in its end, and gives
back the state before it if anything is bad. Its steps are then made again one by one.
"""

import dataclasses
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxzoo.core.tree import leaf_sha256, named_leaves
from jaxzoo.training.folder import in_bucket, replace
from jaxzoo.training.hosts import is_first

__all__ = [
    "FINE",
    "Diagnosis",
    "Injection",
    "Policy",
    "diagnose",
    "guarded",
    "pass_over",
    "passed_over",
    "write_black_box",
]

Policy = Literal["abort", "skip", "rollback"]
Where = Literal["params", "batch", "loss", "gradient"]
Step = Callable[[Any, Any], tuple[Any, Any]]

FINE = -1  # in place of the number of a step
PARTS = (
    "of the state before the step",
    "of the batch",
    "of the metrics",
    "of the state after the step",
)
LARGEST_BATCH = 2**26  # bytes of a batch that is kept beside the black box


@dataclasses.dataclass(frozen=True)
class Injection:
    """A number that is not finite at one step, to test what follows.

    Attributes:
        where: what it is put into: the parameters before the step, the batch, the
            metrics, or the optimizer's state, as a bad gradient would.
        step: at which step, counted from 0.
        value: NaN or an infinity.
    """

    where: Where
    step: int
    value: float = math.nan

    @classmethod
    def parse(cls, text: str) -> "Injection":
        """Reads "loss:37".

        Raises:
            ValueError: the text is not of that form.
        """
        if not re.fullmatch(rf"({'|'.join(get_args(Where))}):\d+", text):
            raise ValueError(
                f"inject-nan '{text}' is not WHERE:STEP, such as loss:37, with WHERE "
                f"one of {', '.join(get_args(Where))}."
            )
        where, step = text.split(":")
        return cls(where, int(step))  # pyright: ignore[reportArgumentType]

    def into(self, where: Where, tree: Any, number: jax.Array) -> Any:
        """`tree` with the value in its first float leaf, if this is where and when."""
        if where != self.where:
            return tree
        bad = jnp.where(number == self.step, self.value, 0.0)
        leaves, structure = jax.tree.flatten(tree)
        first = next(i for i, leaf in enumerate(leaves) if _is_float(leaf))
        leaves[first] = leaves[first] + bad.astype(leaves[first].dtype)
        return jax.tree.unflatten(structure, leaves)


def _inputs(
    injection: Injection | None, state: Any, batch: Any, number: jax.Array
) -> Any:
    if injection is None:
        return state, batch
    if isinstance(state, dict) and "params" in state:
        params = injection.into("params", state["params"], number)
        state = {**state, "params": params}
    return state, injection.into("batch", batch, number)


def _outputs(injection: Injection | None, new: Any, metrics: Any, number: Any) -> Any:
    if injection is None:
        return new, metrics
    new = injection.into("gradient", new, number)
    return new, injection.into("loss", metrics, number)


def guarded(step: Step, policy: Policy, injection: Injection | None = None) -> Any:
    """Steps in one `lax.scan` that keeps out of the state what is not finite.

    Returns:
        `(state, bad, batches, first) -> (state, bad, metrics, fine)`: `first` is the
        number of the first step, `fine` tells which steps count. Under "skip" `bad`
        stays -1. Otherwise it becomes `first` if a metric or the state at the end is
        not finite; then, and if it was not -1 before, the state is what came in.
    """

    def one(state: Any, inputs: Any) -> Any:
        batch, number = inputs
        new, metrics = step(*_inputs(injection, state, batch, number))
        return _outputs(injection, new, metrics, number)

    def skipping(state: Any, inputs: Any) -> Any:
        new, metrics = one(state, inputs)
        fine = _all_finite((new, metrics))
        kept = _either(fine, new, state)
        if isinstance(new, dict) and "step" in new:
            kept["step"] = new["step"]  # the next step has its own key and batch
        return kept, (metrics, fine)

    def looking(carry: Any, inputs: Any) -> Any:
        # Metrics are looked at here, so that their sum over devices is made here too.
        # After the loop it could meet other exchanges in another order on each host.
        state, fine = carry
        state, metrics = one(state, inputs)
        return (state, fine & _all_finite(metrics)), metrics

    def steps(state: Any, bad: jax.Array, batches: Any, first: jax.Array) -> Any:
        inputs = batches, first + jnp.arange(len(jax.tree.leaves(batches)[0]))
        if policy == "skip":
            state, (metrics, fine) = jax.lax.scan(skipping, state, inputs)
            return state, bad, metrics, fine
        carry, metrics = jax.lax.scan(looking, (state, bad == FINE), inputs)
        after, fine = carry
        bad = jnp.where((bad != FINE) | (fine & _all_finite(after)), bad, first)
        state = _either(bad == FINE, after, state)
        return state, bad, metrics, jnp.ones(len(inputs[1]), bool)

    return steps


def _either(first: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(first, x, y), a, b)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _all_finite(tree: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    return jnp.stack([jnp.bool_(True), *(jnp.isfinite(x).all() for x in floats)]).all()


class Diagnosis(NamedTuple):
    """What was bad at a step.

    Attributes:
        step: its number, counted from 0.
        leaves: what is not finite, in the order of computation.
        metrics: what the step gave.
    """

    step: int
    leaves: list[str]
    metrics: dict[str, Any]

    def __str__(self) -> str:
        first = self.leaves[0] if self.leaves else "something"
        return f"step {self.step}: {first} is not finite"


def diagnose(
    step: Step, injection: Injection | None, state: Any, batch: Any, number: int
) -> Diagnosis:
    """Makes a bad step again, from the state that was kept before it.

    Args:
        step: the step without its guard.
        injection: of the run.
        state: that before the step.
        batch: the batch of the step under a leading axis of one.
        number: the step's.
    """

    @jax.jit
    def again(state: Any, batch: Any) -> Any:
        now = jnp.int32(number)
        batch = jax.tree.map(lambda leaf: leaf[0], batch)
        before = _inputs(injection, state, batch, now)
        new, metrics = _outputs(injection, *step(*before), now)
        parts = (*before, metrics, new)
        flags = [
            {name: _all_finite(leaf) for name, leaf in named_leaves(part).items()}
            for part in parts
        ]
        return flags, metrics

    flags, metrics = jax.device_get(again(state, batch))
    bad = [
        f"'{name}' {part}" if name else part.removeprefix("of ")
        for part, leaves in zip(PARTS, flags, strict=True)
        for name, fine in leaves.items()
        if not fine
    ]
    return Diagnosis(number, bad, metrics)


def write_black_box(
    folder: Path,
    diagnosis: Diagnosis,
    *,
    fit: str,
    policy: Policy,
    batch: Any,
    ids: Any,
) -> Path:
    """Writes what is needed to look at a bad step later; the first process does.

    Args:
        folder: the run's; the file is `nonfinite/<fit>-<step>.json` in it, and a batch
            of up to 64 MiB lies beside it as `.npz`.
        diagnosis: of `diagnose`.
        fit: name of the fit.
        policy: what was done.
        batch: the batch of the step, NumPy arrays.
        ids: which examples it is made of, or None.

    Returns:
        The path of the JSON file.
    """
    path = folder / "nonfinite" / f"{fit}-{diagnosis.step}.json"
    if not is_first():
        return path
    if not in_bucket(path):
        path.parent.mkdir(exist_ok=True)
    leaves = {name or "batch": np.asarray(x) for name, x in named_leaves(batch).items()}
    small = sum(leaf.nbytes for leaf in leaves.values()) <= LARGEST_BATCH
    if small:
        np.savez(file := io.BytesIO(), **leaves)  # pyright: ignore
        path.with_suffix(".npz").write_bytes(file.getvalue())
    told = {
        "fit": fit,
        "step": diagnosis.step,
        "policy": policy,
        "first_bad_leaf": diagnosis.leaves[0] if diagnosis.leaves else None,
        "bad_leaves": diagnosis.leaves,
        "metrics": {
            name: np.asarray(value).astype(str).tolist()
            for name, value in diagnosis.metrics.items()
        },
        "batch_ids": None if ids is None else np.asarray(ids).tolist(),
        "batch_sha256": {name: leaf_sha256(leaf) for name, leaf in leaves.items()},
        "batch_file": path.with_suffix(".npz").name if small else None,
    }
    path.write_text(json.dumps(told, indent=1) + "\n")
    return path


def passed_over(folder: Path, fit: str) -> list[tuple[int, int]]:
    """The steps that rollbacks of a fit left out: pairs of first and end."""
    path = folder / "nonfinite" / f"{fit}.passed_over.json"
    return [(a, b) for a, b in json.loads(path.read_text())] if path.exists() else []


def pass_over(folder: Path, fit: str, spans: list[tuple[int, int]]) -> None:
    """Notes what `passed_over` tells, so that a resumed run leaves it out too."""
    path = folder / "nonfinite" / f"{fit}.passed_over.json"
    replace(path, json.dumps(spans))
