"""What a person sees: a live bar on a terminal, plain lines in a pipe."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SCRIPT = """
import time
from rich.console import Console
from jaxzoo.training.progress import Progress

with Progress(Console(markup=False), "fit [a]", START, 100, "bound") as progress:
    for step in range(START + 2, 101, 2):
        time.sleep(0.004)
        progress.update(step, {"bound": [step - 0.5, step + 0.5]})
"""


def command(start=0, script=SCRIPT):
    return [sys.executable, "-c", script.replace("START", str(start))]


def environment(**variables):
    env = {**os.environ, "PYTHONPATH": str(REPO), "TERM": "xterm-256color"}
    return {**env, "COLUMNS": "100", **variables}


def on_a_terminal(words, env):
    """What a process writes to a terminal of its own."""
    pty = pytest.importorskip("pty")  # not on Windows
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        words, stdin=theirs, stdout=theirs, stderr=theirs, env=env
    ) as process:
        os.close(theirs)
        chunks = []
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        assert process.wait() == 0, b"".join(chunks).decode()
    os.close(ours)
    return b"".join(chunks).decode()


def test_a_terminal_shows_a_bar_with_rate_time_left_and_metric():
    seen = on_a_terminal(command(), environment())
    assert "\x1b[" in seen
    frames = [
        re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", f) for f in re.split("[\r\n]+", seen)
    ]
    frames = [frame for frame in frames if "fit [a]" in frame]
    assert len(frames) >= 3  # it moves
    assert re.search(r"\b0/100 compiling", frames[0])
    last = frames[-1].rstrip()
    pattern = r"fit \[a\] ━+ 100/100 (\d+) steps/s  0:00 left  bound 100$"
    found = re.search(pattern, last)
    assert found, last
    assert 50 < int(found[1]) < 600  # 2 steps in at least 4 ms
    assert all(len(frame) <= 100 for frame in frames)


@pytest.mark.parametrize("start", [0, 50])
def test_a_pipe_gets_a_few_plain_lines(start):
    done = subprocess.run(
        command(start), env=environment(COLUMNS="30"), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stderr == "" and "\x1b" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if line]
    assert 2 <= len(lines) <= 6
    pattern = r"fit \[a\]: \d+/100 \d+ steps/s  \d:\d\d left  bound \d+"
    assert all(re.fullmatch(pattern, line) for line in lines)
    steps = [int(line.split()[2].split("/")[0]) for line in lines]
    assert steps == sorted(steps) and steps[0] > start and steps[-1] == 100


def test_a_slow_loop_has_a_rate_and_a_time_left(monkeypatch, capsys):
    from rich.console import Console

    from jaxzoo.training import progress as module

    clock = iter([0.0, 40.0, 80.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with module.Progress(Console(), "fit", 0, 4, None) as progress:
        for step in (1, 2, 3):
            progress.update(step, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "fit: 2/4 0.025 steps/s  1:20 left"
    assert lines[2] == "fit: 3/4 0.025 steps/s  0:40 left"


def test_a_fit_that_was_done_before_is_not_compiling():
    script = SCRIPT.replace("range(START + 2, 101, 2)", "()")
    seen = on_a_terminal(command(100, script), environment())
    assert "100/100 done before" in seen and "compiling" not in seen
