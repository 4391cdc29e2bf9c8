"""SIGTERM and Ctrl-C at random steps: saved in time, nothing lost, the same bits.

Rows R3 and R4 of the reliability matrix. `python -m tests.training.signals` does them
at length.
"""

import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxzoo.training.checkpoint import Checkpoints
from jaxzoo.training.loop import Stopped, train
from tests.training import signals


@pytest.mark.parametrize(("processes", "count"), [(1, 4), (2, 3)])
def test_a_signal_at_a_random_step(tmp_path, processes, count):
    # The suite runs beside it: only what hangs is late here. How soon the end comes
    # is counted in calls below, and held to R3's seconds by the long version.
    figures = signals.campaign(processes, count, 0, tmp_path, patience=20.0)
    assert figures.problems == ()
    assert (sum(figures.signals.values()), figures.lost) == (count, 0)
    print(figures)


def slow_step(state, batch):
    """Takes as long as `turns` says, whatever the batch."""
    drift = jnp.mean(batch)
    w = lax.fori_loop(0, state["turns"], lambda _, w: 0.5 * w + drift, state["w"])
    return {**state, "w": w}, {"loss": jnp.mean(w)}


@pytest.fixture(scope="module")
def slow_state():
    """With it `slow_step` takes a quarter of a second on this machine, about."""
    state = {"w": jnp.ones(64), "turns": jnp.int32(50_000)}
    batch, step = np.full(8, 0.5, np.float32), jax.jit(slow_step)
    jax.block_until_ready(step(state, batch))
    began = time.monotonic()
    jax.block_until_ready(step(state, batch))
    turns = 50_000 * 0.25 / (time.monotonic() - began)
    return {**state, "turns": jnp.int32(turns)}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_no_call_begins_after_a_signal(open_run, slow_state, signum):
    """Else the end would take a call more than R3 allows."""
    run = open_run()
    begun, sent = [], []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signum)

    # Shortly after its batch was made, the call of step 3 is queued behind the one
    # before it, which has just begun.
    timer = threading.Timer(0.02, send)

    def batches(t):
        begun.append(time.monotonic())
        if t == 3:
            timer.start()
        return np.full(8, 0.5, np.float32)

    with pytest.raises(Stopped) as stopped:
        train(run, "fit", slow_step, slow_state, batches, num_steps=40, log_every=1)
    assert stopped.value.signum == signum
    # Where the suite runs beside it the timer may be late, and 4 more than 3.
    assert begun[-1] < sent[0] + 0.1
    with Checkpoints(run.folder / "checkpoints" / "fit") as checkpoints:
        assert checkpoints.latest() == len(begun) < 40
