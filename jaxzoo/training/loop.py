"""The training loop: steps under `lax.scan`, exact resume, a clean stop on Ctrl-C.

The state is one pytree, `{"params", "opt_state", "step", "key"}`; the batch of step t
is a pure function of t, and the key of step t is `fold_in(key, t)`. So a run that was
stopped and continued computes what an undisturbed one does, bit for bit.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxzoo.training.checkpoint import Checkpoints
from jaxzoo.training.record import Run

__all__ = ["Stopped", "init_state", "train", "update_step"]

State = dict[str, Any]
Batch = Any  # a pytree of arrays
Metrics = dict[str, Any]


class Stopped(Exception):
    """A signal ended the loop after a checkpoint was saved."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


def init_state(
    key: jax.Array, params: Any, optimizer: optax.GradientTransformation
) -> State:
    """The state before the first step; `jax.vmap` it over keys for several seeds."""
    return {
        "params": params,
        "opt_state": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "key": key,
    }


def update_step(
    loss: Callable[[Any, jax.Array, Batch], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """One optimizer step as a pure function of (state, batch).

    Args:
        loss: maps `(params, key, batch)` to a scalar and a dict of scalars to log.
        optimizer: any optax transformation.

    Returns:
        `step(state, batch) -> (state, metrics)`, for `train`; `jax.vmap` it over seeds.
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state["key"], state["step"])
        gradient, metrics = jax.grad(loss, has_aux=True)(state["params"], key, batch)
        updates, opt_state = optimizer.update(
            gradient, state["opt_state"], state["params"]
        )
        new_state = {
            "params": optax.apply_updates(state["params"], updates),
            "opt_state": opt_state,
            "step": state["step"] + 1,
            "key": state["key"],
        }
        return new_state, metrics

    return step


def train(
    run: Run,
    name: str,
    step: Callable[[State, Batch], tuple[State, Metrics]],
    state: State,
    batches: Callable[[int], Batch],
    *,
    num_steps: int,
    log_every: int = 50,
    save_every: float = 20.0,
    show: str | None = None,
) -> State:
    """Runs `num_steps` steps, from the newest checkpoint of this run if there is one.

    Args:
        run: the open run; metrics go to its metrics.jsonl, averaged over `log_every`
            steps, and checkpoints to `checkpoints/<name>`.
        name: what this fit is called; one run may have several.
        step: `(state, batch) -> (state, metrics)`, jittable.
        state: the state at step 0.
        batches: the batch of step t, NumPy arrays; a pure function.
        num_steps: where the fit ends.
        log_every: steps per compiled call; the host looks at nothing in between.
        save_every: seconds between checkpoints.
        show: name of the metric on the progress bar.

    Returns:
        The state after `num_steps` steps.

    Raises:
        Stopped: SIGINT or SIGTERM came; the state of the last whole call is saved. A
            second SIGINT raises KeyboardInterrupt at once.
        FloatingPointError: a metric is not finite; names it and the steps.
    """

    def call(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = jax.lax.scan(step, state, batch)
        return state, jax.tree.map(lambda m: jnp.mean(m, axis=0), metrics)

    compiled = jax.jit(call)
    with Checkpoints(run.folder / "checkpoints" / name) as checkpoints:
        restored = checkpoints.restore_latest(state)
        done, state = restored or (0, state)
        run.forget_after(name, done)
        saved_at = time.monotonic()
        pending: tuple[int, int, Metrics] | None = None  # first step, end, metrics
        with (
            _signals(run.say) as received,
            run.progress(name, done, num_steps, show) as progress,
        ):

            def settle() -> None:
                if pending is not None:
                    _check_finite(name, *pending)
                    metrics = jax.device_get(pending[2])
                    run.log(name, pending[1], metrics)
                    progress.update(pending[1], metrics)

            while done < num_steps:
                # Calls end on multiples of log_every, whatever step a resume began at.
                size = min(log_every - done % log_every, num_steps - done)
                parts = [batches(t) for t in range(done, done + size)]
                batch = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
                state, metrics = compiled(state, batch)
                done += size
                # The call above runs in the background; meanwhile the one before it is
                # logged, so that the device never waits for the disk.
                settle()
                pending = (done - size, done, metrics)
                stopping = bool(received)
                if stopping or time.monotonic() - saved_at > save_every:
                    settle()
                    pending = None
                    checkpoints.save(done, state)
                    saved_at = time.monotonic()
                if stopping and done < num_steps:
                    raise Stopped(
                        f"Stopped at step {done} of {num_steps} of {name}.", received[0]
                    )
            settle()
            checkpoints.save(num_steps, state)
            if received:
                raise Stopped(f"Stopped after {name}.", received[0])
    return state


def _check_finite(name: str, first: int, end: int, metrics: Metrics) -> None:
    for metric, value in metrics.items():
        if not np.all(np.isfinite(value)):
            raise FloatingPointError(
                f"{name}: '{metric}' is not finite between steps {first} and {end}."
            )


@contextmanager
def _signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second SIGINT goes through at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return

    def handle(signum: int, _: Any) -> None:
        if received and signum == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signum)
        say("Stopping after this call of steps; Ctrl-C once more stops at once.")

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
