"""SIGTERM and Ctrl-C at random steps: saved in time, nothing lost, the same bits.

Rows R3 and R4 of the reliability matrix. `python -m tests.training.signals` does them
at length.
"""

import os
import signal
import threading

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
    """Takes a quarter of a second, whatever the batch."""
    drift = jnp.mean(batch)
    w = lax.fori_loop(0, state["turns"], lambda _, w: 0.5 * w + drift, state["w"])
    return {**state, "w": w}, {"loss": jnp.mean(w)}


def signalled_while_the_device_works(run, *, at, signum):
    """Trains with a signal that comes shortly after the batch of step `at` was made."""
    state = {"w": jnp.ones(4096), "turns": jnp.int32(800_000)}
    # By then its call is queued behind the one before it, which has just begun.
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signum))

    def batches(t):
        if t == at:
            timer.start()
        return np.full(8, 0.5, np.float32)

    with pytest.raises(Stopped) as stopped:
        train(run, "fit", slow_step, state, batches, num_steps=9, log_every=1)
    assert stopped.value.signum == signum
    with Checkpoints(run.folder / "checkpoints" / "fit") as checkpoints:
        return checkpoints.latest()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_no_call_begins_after_a_signal(open_run, signum):
    """Else the end would take a call more than R3 allows."""
    assert signalled_while_the_device_works(open_run(), at=3, signum=signum) == 4
