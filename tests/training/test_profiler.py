"""Profiling on demand: which calls are traced, and that a trace is there."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxzoo.training.profiler import Profiler, profile_steps


@pytest.fixture
def calls(monkeypatch):
    """What the profiler asks of jax, instead of real traces."""
    asked = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: asked.append("on"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: asked.append("off"))
    return asked


def play(profiler: Profiler, calls, start, end, size):
    """A loop of calls of `size` steps; returns what was said."""
    said = []
    for first in range(start, end, size):
        last = min(first + size, end)
        profiler.before(first, last)
        calls.append((first, last))
        said += [profiler.after(last, jnp.zeros(()))]
    return [sentence for sentence in said if sentence]


@pytest.mark.parametrize(
    ("wanted", "size", "traced"),
    [
        ((100, 110), 50, [(100, 150)]),
        ((99, 110), 50, [(50, 100), (100, 150)]),
        ((100, 150), 50, [(100, 150), (150, 200)]),
        ((0, 0), 50, [(0, 50)]),
        ((3, 5), 1, [(3, 4), (4, 5), (5, 6)]),
        ((190, 900), 50, [(150, 200)]),
    ],
)
def test_the_calls_that_overlap_are_traced(tmp_path, calls, wanted, size, traced):
    with Profiler(wanted[0], wanted[1], tmp_path) as profiler:
        said = play(profiler, calls, 0, 200, size)
    inside = calls[calls.index("on") + 1 : calls.index("off")]
    assert inside == traced
    assert (calls.count("on"), calls.count("off")) == (1, 1)
    assert profiler.traced == (traced[0][0], traced[-1][1] - 1)
    if wanted[1] < 200:
        sentence = f"Steps {traced[0][0]} to {traced[-1][1] - 1} are traced in"
        assert said == [f"{sentence} {tmp_path}."]


def test_steps_that_do_not_run_are_not_traced(tmp_path, calls):
    with Profiler(300, 310, tmp_path) as profiler:
        play(profiler, calls, 0, 200, 50)
    assert profiler.traced is None
    assert "on" not in calls


def test_a_second_fit_is_not_traced_again(tmp_path, calls):
    with Profiler(10, 20, tmp_path) as profiler:
        play(profiler, calls, 0, 100, 50)
        play(profiler, calls, 0, 100, 50)
    assert calls.count("on") == 1


def test_an_error_within_the_trace_ends_it(tmp_path, calls):
    with pytest.raises(KeyboardInterrupt), Profiler(0, 10, tmp_path) as profiler:
        profiler.before(0, 50)
        raise KeyboardInterrupt
    assert calls == ["on", "off"]


def test_a_real_trace_is_written(tmp_path):
    step = jax.jit(lambda x: x @ x)
    with Profiler(0, 1, tmp_path) as profiler:
        profiler.before(0, 2)
        profiler.after(2, step(jnp.eye(64)))
    (trace,) = tmp_path.rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


@pytest.mark.parametrize(
    "text", ["110:100", "100", "a:b", "-1:5", "1:2:3", "", "1.5:2"]
)
def test_bad_steps_are_one_sentence(text):
    with pytest.raises(ValueError, match=re.escape(f"--profile {text!r}: expected")):
        profile_steps(text)
