"""Training by workers that each see a part of the batch, simulated on one device.

The workers are an axis of `jax.vmap`, over which the collectives of a method run as
they do over devices; learning rates and seeds are two more axes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments._batches import SeedBatches
from experiments.optim._tasks import Task, best
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.plots import curves, panels
from jaxzoo.training.record import Run

AXIS = "workers"
SHARED = {"count", "bytes_sent", "step"}  # the same in all fits of a grid


class Workers(NamedTuple):
    """How a method's state lies on workers.

    Attributes:
        direction: of their own gradients, with `axis_name=AXIS`.
        axes: of the state: 0 for what each worker has, None for what all share.
    """

    direction: optax.GradientTransformation
    axes: Any


def fit(
    run: Run,
    name: str,
    task: Task,
    method: Workers,
    learning_rates: Sequence[float],
    *,
    steps: int,
    batch_size: int,
    workers: int = 8,
    seeds: int = 3,
    log_every: int = 25,
) -> tuple[dict[str, np.ndarray], float]:
    """Trains a grid of learning rates, which fall linearly to 0, and seeds at once.

    Args:
        run: the open run.
        name: of the fit in the run's record.
        task: what is learned; seed s has its own parameters and order of batches.
        method: what the workers do.
        learning_rates: L of them.
        steps: of each fit.
        batch_size: examples per step, of all workers together.
        workers: how many there are.
        seeds: S.
        log_every: steps between two lines of the record.

    Returns:
        `(scores, sent)`: what `evaluate` gives, each `[L, S]`; the bytes that a worker
        sent in the last step. The history of the run holds "loss" and "bytes_sent"
        `[log steps, L * S]`.
    """
    rates = jnp.asarray(learning_rates, jnp.float32)
    knobs: Any = {"axis_name": AXIS, "axis_size": workers}
    init = jax.vmap(method.direction.init, None, method.axes, **knobs)
    update = jax.vmap(
        method.direction.update, (0, method.axes), (None, method.axes), **knobs
    )

    def start_one(rate: jax.Array, seed: jax.Array) -> Any:
        init_key, run_key = jax.random.split(jax.random.key(seed))
        params = task.init(init_key)
        return {
            "params": params,
            "method": init(params),
            "rate": rate,
            "step": jnp.zeros((), jnp.int32),
            "key": run_key,
        }

    # Steps are counted once for all fits, so that a branch on the count stays one.
    example = jax.eval_shape(start_one, rates[0], jnp.int32(0))
    axes: Any = jax.tree_util.tree_map_with_path(
        lambda path, _: None if _name(path[-1]) in SHARED else 0, example
    )

    def start() -> Any:
        over_seeds = jax.vmap(start_one, (None, 0), axes)
        return jax.vmap(over_seeds, (0, None), axes)(rates, jnp.arange(seeds))

    def one(state: Any, example: Any) -> Any:
        def own(part: Any) -> Any:
            return jax.grad(task.loss, has_aux=True)(
                state["params"], state["key"], part
            )

        parts = jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), example)
        grads, metrics = jax.vmap(own)(parts)
        updates, method_state = update(grads, state["method"])
        rate = state["rate"] * (1.0 - state["step"] / steps)
        params = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
        new = {"params": params, "method": method_state, "step": state["step"] + 1}
        metrics = {
            "loss": jnp.mean(metrics["loss"]),
            "bytes_sent": optax.tree.get(method_state, "bytes_sent"),
        }
        return {**state, **new}, metrics

    def step(state: Any, example: Any) -> Any:
        over_seeds = jax.vmap(one, (axes, 0), (axes, 0))
        over_rates = jax.vmap(over_seeds, (axes, None), (axes, 0))
        state, metrics = over_rates(state, example)
        return state, jax.tree.map(lambda x: x.reshape(-1), metrics)

    batches = SeedBatches(task.source, seeds, batch_size)
    state = train(
        run, name, step, start, batches.at, num_steps=steps, show="loss", batch_axis=1,
        ids=batches.ids, log_every=log_every,
    )  # fmt: skip
    state = local({k: state[k] for k in ("params", "method")})

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    params = jax.tree.map(flat, state["params"])
    scores = jax.jit(lambda p: lax.map(task.evaluate, p))(params)
    shape = (len(learning_rates), seeds)
    scores = {k: np.asarray(v).reshape(shape) for k, v in scores.items()}
    return scores, float(optax.tree.get(state["method"], "bytes_sent"))


def best_fit(
    run: Run, label: str, name: str, task: Task, method: Workers,
    learning_rates: Sequence[float], *,
    steps: int, batch_size: int, workers: int, seeds: int,
) -> tuple[dict[str, Any], tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """`fit` of a method on the task `label`: what its best learning rate came to.

    The arguments are those of `fit`, and the record gets twenty lines.

    Returns:
        `(scores, history)`: what `evaluate` gives, each `[S]`, with the "rate" that
        was best and the "bytes" of a worker's last step; steps and losses
        `[log steps, S]`, for `curves`.
    """
    fit_name = f"{label}_{name.replace(' ', '_')}"
    found, sent = fit(
        run, fit_name, task, method, learning_rates, steps=steps,
        batch_size=batch_size, workers=workers, seeds=seeds,
        log_every=max(1, steps // 20),
    )  # fmt: skip
    at = best(found)
    scores: dict[str, Any] = {k: v[at] for k, v in found.items()}
    scores |= {"rate": learning_rates[at], "bytes": sent}
    history = run.history(fit_name)
    chosen = slice(at * seeds, (at + 1) * seeds)
    return scores, (history["step"], history["loss"][:, chosen])


def means(
    results: dict[str, Any], keys: Sequence[str]
) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    """Rows of a table, and metrics: means over seeds of the scores that are named.

    Args:
        results: the scores of `best_fit` by task, then by method.
        keys: of the scores, in the order of the table's columns.
    """
    rows, metrics = [], {}
    for label, scores in results.items():
        for name, s in scores.items():
            values = {k: float(np.mean(s[k])) for k in keys}
            rows.append((f"{label}, {name}", *(f"{v:.4g}" for v in values.values())))
            metrics |= {f"{label}/{name}/{k}": v for k, v in values.items()}
    return rows, metrics


def loss_panels(histories: dict[str, Any]) -> tuple[Any, Any]:
    """`(figure, axes)`: a panel for each task, with the `history` of its methods."""
    figure, axes = panels(len(histories))
    for ax, (label, series) in zip(axes, histories.items(), strict=True):
        curves(ax, series, xlabel="step", ylabel=f"training loss, {label} (nats)")
        ax.set_yscale("log")
    axes[0].legend(frameon=False)
    return figure, axes


def _name(key: Any) -> str:
    return str(getattr(key, "name", getattr(key, "key", "")))
