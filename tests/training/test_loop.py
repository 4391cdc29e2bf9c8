"""The loop: what is logged, exact resume, signals, and one step by hand."""

import itertools
import json
import os
import signal
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxzoo.training.checkpoint import Checkpoints
from jaxzoo.training.loop import Stopped, train
from jaxzoo.training.step import init_state, update_step

ENDS = [5, 10, 15, 20, 23]  # where the compiled calls of the `fit` fixture end
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers_are_restored():
    before = [signal.getsignal(s) for s in SIGNALS]
    yield
    assert [signal.getsignal(s) for s in SIGNALS] == before


def interrupt(*steps, signum=signal.SIGINT):
    """Sends a signal to this process once at each of `steps`."""
    waiting = list(steps)

    def before(t):
        while t in waiting:
            waiting.remove(t)
            os.kill(os.getpid(), signum)

    return before


def rows(run):
    text = (run.folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def assert_same_state(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert_array_equal(x, y)


def test_each_call_is_logged_once_as_the_mean_over_its_steps(fit, open_run):
    state = fit(run := open_run())
    starts = [0, *ENDS[:-1]]
    logged = rows(run)
    assert [row["step"] for row in logged] == ENDS
    assert {row["fit"] for row in logged} == {"fit"}
    seeds = np.arange(fit.seeds) if fit.seeds else 0
    for row, start, end in zip(logged, starts, ENDS, strict=True):
        assert_allclose(row["t"], np.mean(range(start, end)) + seeds, rtol=1e-6)
    assert_array_equal(state["step"], np.full_like(state["step"], 23))


def test_the_logged_loss_is_that_of_the_steps_one_by_one(single, open_run):
    state, losses = single.state(), []
    step = jax.jit(single.step)
    for t in range(23):
        state, metrics = step(state, single.batches(t))
        losses.append(float(metrics["loss"]))
    end = single(run := open_run())
    assert_allclose(end["params"]["w"], state["params"]["w"], rtol=1e-5)
    logged = [row["loss"] for row in rows(run)]
    means = [np.mean(losses[a:b]) for a, b in itertools.pairwise([0, *ENDS])]
    assert_allclose(logged, means, rtol=1e-5)


# A signal at step t stops the run at the end of the call that holds t.
@pytest.mark.parametrize("stops", [(14,), (3, 5, 12, 17, 22)], ids=str)
def test_a_stopped_and_continued_run_is_bit_identical(fit, open_run, stops):
    undisturbed, metrics = fit.undisturbed(open_run)
    run = open_run()
    for t in stops:
        with pytest.raises(Stopped) as stopped:
            fit(run, interrupt(t))
        end = next(e for e in ENDS if e > t)
        assert stopped.value.signum == signal.SIGINT
        assert rows(run)[-1]["step"] == end
        with Checkpoints(run.folder / "checkpoints" / "fit") as checkpoints:
            assert checkpoints.latest() == end
        run = open_run()
        assert run.resumed
    seen = []
    state = fit(run, seen.append)
    assert seen == list(range(next(e for e in ENDS if e > stops[-1]), 23))
    assert_same_state(state, undisturbed)
    assert (run.folder / "metrics.jsonl").read_bytes() == metrics


def test_steps_after_the_checkpoint_of_a_killed_run_are_computed_again(fit, open_run):
    undisturbed, metrics = fit.undisturbed(open_run)
    with pytest.raises(Stopped):
        fit(open_run(), interrupt(3))

    def die(t):
        if t == 18:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        fit(run := open_run(), die)
    assert rows(run)[-1]["step"] > 5
    assert_same_state(fit(open_run()), undisturbed)
    assert (run.folder / "metrics.jsonl").read_bytes() == metrics


def test_a_finished_fit_is_not_computed_again(single, open_run):
    first = single(run := open_run())
    seen = []
    assert_same_state(single(open_run(), seen.append), first)
    assert seen == []
    assert [row["step"] for row in rows(run)] == ENDS


def test_several_fits_of_one_run_do_not_disturb_each_other(single, open_run):
    single(run := open_run(), name="a")
    with pytest.raises(Stopped):
        single(run, interrupt(11), name="b")
    single(run := open_run(), name="a")
    single(run, name="b")
    found = [(row["fit"], row["step"]) for row in rows(run)]
    assert found == [(name, end) for name in "ab" for end in ENDS]


def test_sigterm_stops_too_and_names_itself(single, open_run):
    with pytest.raises(Stopped, match="step 5 of 23 of fit") as stopped:
        single(open_run(), interrupt(2, signum=signal.SIGTERM))
    assert stopped.value.signum == signal.SIGTERM


def test_a_second_ctrl_c_goes_through_at_once(single, open_run):
    with pytest.raises(KeyboardInterrupt):
        single(run := open_run(), interrupt(7, 7))
    with Checkpoints(run.folder / "checkpoints" / "fit") as checkpoints:
        assert checkpoints.latest() is None


def test_saves_on_the_way(single, open_run):
    def die(t):
        if t == 13:
            raise OSError

    with pytest.raises(OSError):
        single(run := open_run(), die, save_every=0.0)
    with Checkpoints(run.folder / "checkpoints" / "fit") as checkpoints:
        assert checkpoints.latest() == 10


def test_works_outside_the_main_thread(single, open_run):
    whole, _ = single.undisturbed(open_run)
    states = []

    def work():
        states.append(single(open_run()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same_state(states[0], whole)


def test_update_step_is_a_step_of_optax_with_the_key_folded_in():
    root, optimizer = jax.random.key(3), optax.adamw(0.1, weight_decay=0.2)
    params: Any = {"w": jnp.array([1.0, -2.0, 3.0])}

    def loss(params, key, batch):
        noise = jax.random.normal(key, (3,))
        value = jnp.sum((params["w"] - batch) ** 2 * jnp.exp(noise))
        return value, {"loss": value, "noise": noise}

    step = jax.jit(update_step(loss, optimizer))
    state = init_state(root, params, optimizer)
    opt_state = optimizer.init(params)
    for t in range(4):
        batch = jnp.full(3, float(t))
        state, metrics = step(state, batch)
        noise = jax.random.normal(jax.random.fold_in(root, t), (3,))
        assert_array_equal(metrics["noise"], noise)
        residual = params["w"] - batch
        assert_allclose(metrics["loss"], np.sum(residual**2 * np.exp(noise)), rtol=1e-5)
        gradient = {"w": 2 * residual * jnp.exp(noise)}
        updates: Any
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = {"w": params["w"] + updates["w"]}
        assert_allclose(state["params"]["w"], params["w"], rtol=1e-5)
    for got, wanted in zip(
        jax.tree.leaves(state["opt_state"]), jax.tree.leaves(opt_state), strict=True
    ):
        assert_allclose(got, wanted, rtol=1e-5)
    assert int(state["step"]) == 4
    assert state["key"] == root


def test_resume_at_every_step_is_bit_identical(single, open_run):
    """Thirty steps, stopped after each: the tree and the lines of one sitting."""

    def sitting(run, before=None):
        def batches(t):
            if before is not None:
                before(t)
            return single.batches(t)

        return train(
            run, "fit", single.step, single.state(), batches, num_steps=30, log_every=1
        )

    undisturbed = sitting(whole := open_run("whole"))
    run = open_run()
    for t in range(29):
        with pytest.raises(Stopped):
            sitting(run, interrupt(t))
        run = open_run()
    assert_same_state(sitting(run), undisturbed)
    text = (run.folder / "metrics.jsonl").read_bytes()
    assert text == (whole.folder / "metrics.jsonl").read_bytes()
