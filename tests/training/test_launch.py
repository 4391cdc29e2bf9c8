"""Many processes: one sentence when one is lost, nothing left over, the same bits.

Rows P1 to P3, R3 and R4 of the reliability matrix.
`python -m tests.training.processes` kills at length.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from jaxzoo.training import launch
from tests.training import processes

HEARTBEAT = processes.HEARTBEAT
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bits(cache, tmp_path_factory):
    """The state after an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = processes.Launched(folder, cache)
    assert run.end() == 0, run.err
    assert run.out == run.err == ""  # Gloo's own words are filtered
    return (folder / "state.json").read_text()


@pytest.fixture
def launched(cache, tmp_path):
    """`launched(*options, words=...)` starts the run in tmp_path, again and again."""
    runs = []

    def start(*options, **kwargs):
        runs.append(processes.Launched(tmp_path / "run", cache, *options, **kwargs))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.communicate()


def finishes(launched, bits):
    run = launched()
    assert run.end() == 0, run.err
    assert (run.folder / "state.json").read_text() == bits
    return True


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_with_one_sentence(launched, bits, rank):
    run = launched(words=("--pause", "0.2"))
    pid = run.wait_for(rank, "step 12\n")
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    run.end()
    assert time.monotonic() - began < HEARTBEAT + 5
    assert processes.check_lost(run, rank, pid) == []
    (said,) = run.sentences()
    assert said[4] == "was killed by SIGKILL"
    assert said[6] == "toy" and 5 <= int(said[5]) <= 13
    assert finishes(launched, bits)


def test_two_processes_of_four_devices_compute_what_one_of_eight_does(cache, tmp_path):
    states = []
    for size, devices in ((2, 4), (1, 8)):
        folder = tmp_path / str(size)
        options = ("--devices-per-process", str(devices))
        run = processes.Launched(folder, cache, *options, size=size)
        assert run.end() == 0, run.err
        states.append((folder / "state.json").read_text())
    assert states[0] == states[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_stands_still_is_declared_lost(launched, rank):
    run = launched(words=("--pause", "0.2"))
    pid = run.wait_for(rank, "step 3\n")
    began = time.monotonic()
    os.kill(pid, signal.SIGSTOP)
    run.end()
    assert HEARTBEAT - 1.5 < time.monotonic() - began < HEARTBEAT + 5
    assert processes.check_lost(run, rank, pid) == []
    assert run.sentences()[0][4] == f"has not answered for {HEARTBEAT:.0f} s"


def test_a_pause_of_all_processes_is_no_loss(launched):
    run = launched(words=("--steps", "20", "--pause", "0.1"))
    run.wait_for(1, "step 3\n")
    run.process.send_signal(signal.SIGTSTP)
    time.sleep(HEARTBEAT + 2)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGCONT)
    assert run.end() == 0, run.err


def test_a_process_that_raises_shows_why(launched):
    run = launched(words=("--fail", "5"))
    assert run.end() == 70
    (said,) = run.sentences()
    assert (said[1], said[4]) == ("1", "ended with exit 70")
    assert "RuntimeError: this rank fails" in run.err
    assert run.left_over() == []


def test_an_error_of_one_process_ends_all(launched):
    run = launched(words=("--fail", "5", "--abandon", "2"))
    assert run.end() == 2
    (said,) = run.sentences()
    assert (said[1], said[4]) == ("1", "ended with exit 2")
    assert "rank 1 wrote last:\nerror: the disk is full\n" in run.err
    assert run.left_over() == []


@pytest.mark.parametrize("absent", [0, 1])
def test_the_missing_rank_is_named(launched, absent):
    began = time.monotonic()
    run = launched("--init-timeout", "4", words=("--absent", str(absent)))
    assert run.end() == 70
    assert time.monotonic() - began < 4 + 5
    assert re.search(
        rf"rank {absent} of 2 processes did not come to the start", run.err
    )
    assert not processes.STACK.search(run.err)
    assert run.left_over() == []


def test_other_settings_are_named_before_the_first_step(launched, tmp_path):
    run = launched(words=("--differ", "1"))
    assert run.end() == 2
    sentence = f"rank 1 on {HOST} has learning_rate 0.002, rank 0 has 0.001:"
    said = [(tmp_path / "run" / f"{rank}.said").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and said[0].startswith(sentence)
    assert run.err.count(sentence) == 1
    assert not any("step" in path.read_text() for path in run.folder.glob("*.log"))


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_a_signal_reaches_each_process_once(launched, bits, signum, code):
    run = launched(words=("--pause", "0.2"))
    for rank in (0, 1):
        run.wait_for(rank, "step 4\n")
    run.process.send_signal(signum)
    if signum == signal.SIGTERM:
        run.process.send_signal(signum)
    assert run.end() == code, run.err
    logs = [(run.folder / f"{rank}.log").read_text() for rank in (0, 1)]
    assert [log.count(f"signal {int(signum)}\n") for log in logs] == [1, 1]
    steps = [log.rsplit("step ", 1)[1] for log in logs]
    assert steps[0] == steps[1]
    assert run.err == "" and run.left_over() == []
    assert finishes(launched, bits)


def test_a_second_ctrl_c_ends_at_once(launched):
    run = launched(words=("--pause", "30"))
    for rank in (0, 1):
        run.wait_for(rank, "step 1\n")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert run.process.poll() is None
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    assert time.monotonic() - began < 1
    assert run.left_over() == []


def test_all_start_again_after_a_crash(launched, bits):
    run = launched("--restarts", "1", words=("--pause", "0.05"))
    os.kill(run.wait_for(1, "step 5\n"), signal.SIGKILL)
    assert run.end() == 0, run.err
    assert len(run.sentences()) == 1
    assert "Starting all processes again (1 of 1)." in run.err
    assert (run.folder / "state.json").read_text() == bits


def test_the_processes_go_with_their_launcher(launched):
    run = launched(words=("--pause", "0.2"))
    run.wait_for(1, "step 2\n")
    run.process.kill()
    run.end()
    processes.wait_until(lambda: run.left_over() == [], 3)


@pytest.fixture
def pair(cache, tmp_path):
    """`pair(*prefix)` starts two processes without a common launcher, as two hosts."""
    started = []

    def start(*prefix):
        port = processes.free_port()
        for number in (0, 1):
            env = processes.environment(cache) | {
                "JAXZOO_COORDINATOR": f"127.0.0.1:{port}",
                "JAXZOO_NUM_PROCESSES": "2",
                "JAXZOO_PROCESS_ID": str(number),
                "JAXZOO_HEARTBEAT": "4",
            }
            command = [*prefix, sys.executable, str(processes.SITTING)]
            command += [str(tmp_path), "--pause", "0.2", "--busy"]
            with open(tmp_path / f"{number}.err", "w") as err:
                started.append(subprocess.Popen(command, env=env, stderr=err))
        for rank in (0, 1):
            log = tmp_path / f"{rank}.log"
            processes.wait_until(
                lambda log=log: log.exists() and "step 25\n" in log.read_text(), 60
            )
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_launcher_the_survivor_says_it(pair, tmp_path, rank):
    started = pair()
    started[rank].kill()
    assert started[1 - rank].wait(timeout=HEARTBEAT + 5) == launch.EXIT_LOST
    said = (tmp_path / f"{1 - rank}.err").read_text()
    # Gloo writes to stdout, and jax's C++ nothing.
    wanted = (
        rf"rank {rank} \(pid {started[rank].pid} on {HOST}\) is gone; .* step was \d"
    )
    assert re.match(wanted, said) and said.count("\n") == 1


def test_with_one_launcher_per_host_each_says_it_once(pair, tmp_path):
    module = (sys.executable, "-m", "jaxzoo.training.launch", "--heartbeat", "4", "--")
    started = pair(*module)
    pid = int((tmp_path / "0.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    assert [p.wait(timeout=HEARTBEAT + 5) for p in started] == [70, 70]
    own, other = ((tmp_path / f"{rank}.err").read_text() for rank in (0, 1))
    assert own.startswith(f"this host's process (pid {pid} on {HOST}) was killed by")
    assert re.match(rf"rank 0 \(pid {pid} on {HOST}\) is gone; .* step was \d", other)
    assert own.count("\n") == other.count("\n") == 1
