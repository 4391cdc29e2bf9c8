"""NaN in the state, the batch, the loss and a gradient, under each policy (N9)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxzoo.training.checkpoint import Checkpoints
from jaxzoo.training.loop import MOST_ROLLBACKS, train
from jaxzoo.training.nonfinite import Injection, Policy
from jaxzoo.training.options import Options
from jaxzoo.training.record import Run
from tests.training.conftest import NUM_STEPS, Config, batch_at

BAD = 12  # in the third call of five steps
FIRST = {
    "params": "'params/w' of the state before the step",
    "batch": "'t' of the batch",
    "loss": "'loss' of the metrics",
    "gradient": "'opt_state/0/mu/w' of the state after the step",
}


every_value = pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])


@pytest.fixture
def open_with(tmp_path, monkeypatch):
    """`open_with(policy, inject)` opens the run in tmp_path/run, again and again."""

    def open_one(policy: Policy = "abort", inject="", folder="run", value=np.nan):
        read = Injection.parse

        def parse(text):
            return dataclasses.replace(read(text), value=value)

        monkeypatch.setattr(Injection, "parse", parse)
        return Run(
            tmp_path / folder,
            topic="toy",
            slug="tiny",
            title="Tiny",
            preset="full",
            config=Config(),
            options=Options(non_finite=policy, inject_nan=inject),
        )

    return open_one


def rows(run):
    text = (run.folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def saved(run):
    with Checkpoints(run.folder / "checkpoints" / "fit") as checkpoints:
        return checkpoints.steps()


def stepwise(single, leave_out):
    """The state after all steps but some, one by one."""
    state, step = single.state(), jax.jit(single.step)
    for t in range(NUM_STEPS):
        if t in leave_out:
            state = {**state, "step": state["step"] + 1}
        else:
            state, _ = step(state, single.batches(t))
    return state


def assert_close_state(a, b):
    assert int(a["step"]) == int(b["step"])
    for x, y in zip(
        jax.tree.leaves((a["params"], a["opt_state"])),
        jax.tree.leaves((b["params"], b["opt_state"])),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=2e-5)


@every_value
@pytest.mark.parametrize("where", FIRST)
def test_abort_ends_before_the_parameters_are_touched(where, value, single, open_with):
    run = open_with(inject=f"{where}:{BAD}", value=value)
    with pytest.raises(FloatingPointError) as error:
        single(run, save_every=0.0, ids=lambda t: [t, 2 * t])
    assert f"fit, step {BAD}: {FIRST[where]} is not finite" in str(error.value)
    # What is on the disk is from before.
    assert saved(run) == [5, 10]
    assert [row["step"] for row in rows(run)] == [5, 10]
    box = json.loads((run.folder / "nonfinite" / f"fit-{BAD}.json").read_text())
    assert (box["step"], box["policy"]) == (BAD, "abort")
    assert box["first_bad_leaf"] == FIRST[where]
    assert box["batch_ids"] == [BAD, 2 * BAD]
    with np.load(run.folder / "nonfinite" / box["batch_file"]) as kept:
        assert_array_equal(kept["x"], batch_at(BAD)["x"])


def test_the_same_command_goes_on_once_the_cause_is_gone(single, open_run, open_with):
    undisturbed, metrics = single.undisturbed(open_run)
    with pytest.raises(FloatingPointError):
        single(open_with(inject=f"gradient:{BAD}"), save_every=0.0)
    state = single(run := open_with())
    for a, b in zip(
        jax.tree.leaves(state["params"]),
        jax.tree.leaves(undisturbed["params"]),
        strict=True,
    ):
        assert_array_equal(a, b)
    assert (run.folder / "metrics.jsonl").read_bytes() == metrics


@every_value
@pytest.mark.parametrize("where", FIRST)
def test_skip_leaves_out_the_step_alone(where, value, single, open_with):
    state = single(run := open_with("skip", f"{where}:{BAD}", value=value))
    assert_close_state(state, stepwise(single, {BAD}))
    assert [row["skipped"] for row in rows(run)] == [0, 0, 1, 0, 0]
    # The mean over the other steps of its call.
    assert rows(run)[2]["t"] == np.mean([10, 11, 13, 14])
    assert not (run.folder / "nonfinite").exists()


def test_skip_ends_when_no_step_of_a_call_is_finite(open_with):
    def step(state, batch):
        return state, {"bound": jnp.where(batch["t"] >= 10, jnp.inf, 1.0)}

    def batches(t):
        return {"t": np.float32(t)}

    start = {"n": jnp.zeros(())}
    with pytest.raises(FloatingPointError, match="nor at any step from 10 on"):
        train(open_with("skip"), "fit", step, start, batches, num_steps=23, log_every=5)


@every_value
@pytest.mark.parametrize("where", FIRST)
def test_rollback_passes_over_the_call(where, value, single, open_with):
    run = open_with("rollback", f"{where}:{BAD}", value=value)
    # From the checkpoint before, or where there is none from the start.
    state = single(run, save_every=1000.0 if value > 0 else 0.0)
    assert_close_state(state, stepwise(single, range(10, 15)))
    assert [row["step"] for row in rows(run)] == [5, 10, 20, 23]
    box = json.loads((run.folder / "nonfinite" / f"fit-{BAD}.json").read_text())
    assert box["first_bad_leaf"] == FIRST[where]


def test_a_resumed_run_passes_over_the_same_steps(single, open_with):
    run = open_with("rollback", f"loss:{BAD}")

    def die(t):
        if t == 20:
            raise OSError

    with pytest.raises(OSError):
        single(run, die)
    state = single(run := open_with("rollback", f"loss:{BAD}"))
    whole = single(other := open_with("rollback", f"loss:{BAD}", "other"))
    assert_array_equal(state["params"]["w"], whole["params"]["w"])
    lines = [(r.folder / "metrics.jsonl").read_bytes() for r in (run, other)]
    assert lines[0] == lines[1]


def test_rollbacks_end(open_with):
    def step(state, batch):
        return state, {"bound": jnp.where(batch["t"] % 5 == 4, jnp.nan, 1.0)}

    def batches(t):
        return {"t": np.float32(t)}

    run, start = open_with("rollback"), {"n": jnp.zeros(())}
    with pytest.raises(FloatingPointError, match=f"after {MOST_ROLLBACKS} rollbacks"):
        train(run, "fit", step, start, batches, num_steps=23, log_every=5)
    boxes = {path.name for path in (run.folder / "nonfinite").glob("*[0-9].json")}
    assert boxes == {f"fit-{t}.json" for t in (4, 9, 14, 19)}


@pytest.mark.parametrize("bad", [0, 12, 22])
def test_a_metric_alone_is_named(open_with, bad):
    def step(state, batch):
        bound = jnp.where(batch["t"] == bad, jnp.nan, 1.0)
        return {"n": state["n"] + 1}, {"fine": batch["t"], "bound": bound}

    def batches(t):
        return {"t": np.float32(t)}

    start = {"n": jnp.zeros(())}
    with pytest.raises(FloatingPointError, match=rf"fit, step {bad}: 'bound' of the m"):
        train(open_with(), "fit", step, start, batches, num_steps=23, log_every=5)


def test_one_bad_seed_stops_all(open_with):
    def step(state, batch):
        spoiled = jnp.where(batch["t"] == BAD, jnp.array([0.0, jnp.inf]), 0.0)
        return {"n": state["n"] + spoiled}, {"fine": batch["t"]}

    def batches(t):
        return {"t": np.float32(t)}

    start = {"n": jnp.zeros(2)}
    with pytest.raises(FloatingPointError, match="'n' of the state after the step"):
        train(open_with(), "fit", step, start, batches, num_steps=23, log_every=5)


@pytest.mark.parametrize("text", ["loss", "loss:", "loss:-1", "weights:3", "loss:3.5"])
def test_an_injection_is_read_or_refused(text):
    with pytest.raises(ValueError, match=f"inject-nan '{text}' is not WHERE:STEP"):
        Injection.parse(text)
