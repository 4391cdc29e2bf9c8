"""Many processes: one sentence when one is lost, nothing left over, the same bits.

Rows P1 to P3, P5, R3 and R4 of the reliability matrix.
`python -m tests.training.processes` kills at length.
"""

import contextlib
import importlib.util
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxzoo.training import launch
from jaxzoo.training.child import Child
from jaxzoo.training.hub import Hub
from jaxzoo.training.peers import LaunchError, Line, shield

# By its path: the tests are no package.
SPEC = importlib.util.spec_from_file_location(
    "jaxzoo_tests_processes", Path(__file__).with_name("processes.py")
)
assert SPEC is not None and SPEC.loader is not None
processes = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(processes)

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
    wait_until(lambda: run.left_over() == [], 3)


def wait_until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def pair(cache, tmp_path):
    """`pair(*prefix)` starts two processes without a common launcher, as two hosts."""
    started = []

    def start(*prefix):
        port = free_port()
        for number in (0, 1):
            env = processes.environment(cache) | {
                "JAXZOO_COORDINATOR": f"127.0.0.1:{port}",
                "JAXZOO_NUM_PROCESSES": "2",
                "JAXZOO_PROCESS_ID": str(number),
                "JAXZOO_HEARTBEAT": "4",
            }
            command = [*prefix, sys.executable, processes.__file__]
            command += ["--sit", str(tmp_path), "--pause", "0.2", "--busy"]
            with open(tmp_path / f"{number}.err", "w") as err:
                started.append(subprocess.Popen(command, env=env, stderr=err))
        for rank in (0, 1):
            log = tmp_path / f"{rank}.log"
            wait_until(
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


def free_port():
    """A port that the kernel gives to nobody by itself, until its test binds it."""
    for port in random.sample(range(20000, 32000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


def test_the_port_for_jax_is_kept_from_others_until_its_service_has_it():
    with launch._reserved_port() as reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("", port))
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("127.0.0.1", port))
        with socket.create_server(("", port), reuse_port=True):  # as gRPC does
            socket.create_connection(("127.0.0.1", port), timeout=5).close()


# Processes without jax: what the launcher does with their ends.


def run_script(script, *options, size=2):
    command = [sys.executable, "-m", "jaxzoo.training.launch", "--local", str(size)]
    child = [sys.executable, "-S", "-c", f"import os, sys, time\n{script}"]
    return subprocess.run(
        [*command, *options, "--", *child],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(processes.REPO)},
    )


RANK = "rank = int(os.environ['JAXZOO_PROCESS_ID'])\n"


# Rank 0 goes by the launcher's own SIGTERM, rank 1 follows it.
MET_BY_OUR_SIGNAL = """
import signal
if rank: signal.signal(signal.SIGTERM, lambda *_: time.sleep(0.5) or os._exit(76))
time.sleep(0.5)
if not rank: os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("", 0),
        ("sys.exit(1)", 1),
        ("sys.exit(2)", 2),
        ("sys.exit(75)", 75),
        ("sys.exit(130)", 130),
        ("sys.exit(3)", 70),
        (RANK + "sys.exit(75 * rank)", 75),
        (RANK + MET_BY_OUR_SIGNAL, 143),
        (RANK + "if rank: os.abort()\ntime.sleep(60)", 70),
        (RANK + "if rank: sys.exit('no module')\ntime.sleep(60)", 70),
    ],
)
def test_exit_status(script, code):
    done = run_script(script)
    assert done.returncode == code
    assert done.stderr.count("Start the same command again") == (code == 70)
    if "abort" in script:
        assert re.match(r"rank 1 \(pid \d+ on .*\) was killed by SIGABRT", done.stderr)
    if "no module" in script:
        assert "rank 1 wrote last:\nno module\n" in done.stderr


def test_only_process_0_is_heard():
    done = run_script(RANK + "print('rank', rank)\nprint('oh', file=sys.stderr)")
    assert (done.stdout, done.stderr) == ("rank 0\n", "oh\n")


STACK = """\
E1121 17:13:58.117 7401 coordination_service_agent.cc:288] Polled an error.
F1121 17:13:41.440487    6870 client.h:86] Terminating process because the JAX service
Additional GRPC error information from remote target coordination_service:
:UNAVAILABLE:Stream removed (Socket closed)
=== Source Location Trace: ===
external/xla+/xla/pjrt/distributed/coordination/coordination_service_error_util.cc:64

*** Check failure stack trace: ***
    @     0x7fb7f58f8174  absl::lts_20260526::log_internal::LogMessage::SendToLog()
"""


def test_a_stack_of_cpp_goes_to_the_log_alone(tmp_path):
    script = f"sys.stderr.write('before\\n' + {STACK!r} + 'after\\n')"
    done = run_script(script, "--log", str(tmp_path / "logs"), size=1)
    assert (done.returncode, done.stderr) == (0, "before\nafter\n")
    assert (tmp_path / "logs" / "rank-0.log").read_text() == f"before\n{STACK}after\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--local", "0", "--", "true"], "'0' is not a whole number above 0"),
        (["--local", "2"], "no command"),
        (["--local", "2", "--heartbeat", "1", "--", "true"], "'1' is not a number of"),
        (["--locale", "2", "--", "true"], "unrecognized arguments: --locale"),
    ],
)
def test_a_wrong_command_is_answered_at_once(words, complaint):
    began = time.monotonic()
    command = [sys.executable, "-m", "jaxzoo.training.launch", *words]
    env = {**os.environ, "PYTHONPATH": str(processes.REPO)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and complaint in done.stderr
    assert time.monotonic() - began < 1


def test_the_launcher_has_no_jax():
    code = (
        "import sys, jaxzoo.training.launch, jaxzoo.training.supervise\n"
        "sys.exit('jax' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(processes.REPO)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


# The line, inside one process.


@pytest.fixture
def hub():
    opened = []

    def start(size):
        opened.append(Hub("127.0.0.1", 0, size))
        opened[-1].start()
        return opened[-1]

    yield start
    for hub in opened:
        hub.close()


def join(hub, rank, size, lost=lambda sentence: None, heartbeat=30.0):
    address = ("127.0.0.1", hub.port)
    return Line(address, rank, size, lost=lost, heartbeat=heartbeat, timeout=5)


def test_an_exchange_gives_all_values_by_rank(hub):
    hub = hub(3)
    lines = [join(hub, rank, 3) for rank in range(3)]
    for tag in ("start", "settings"):
        got = {}

        def give(rank, tag=tag, got=got):
            got[rank] = lines[rank].exchange(tag, {"n": 10 * rank}, 5)

        threads = [threading.Thread(target=give, args=(r,)) for r in (2, 0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == {rank: [{"n": 0}, {"n": 10}, {"n": 20}] for rank in range(3)}


def test_an_exchange_names_who_did_not_come(hub):
    hub = hub(4)
    first, _ = join(hub, 0, 4), join(hub, 2, 4)
    with pytest.raises(LaunchError) as caught:
        first.exchange("start", 0, 1.5)
    assert f"rank 1, rank 2 (pid {os.getpid()} on {HOST}), rank 3 of 4" in str(
        caught.value
    )


def test_a_hub_that_is_not_there_is_rank_0_missing():
    with pytest.raises(LaunchError, match=r"rank 0 did not answer at 127.0.0.1:\d+ "):
        Line(("127.0.0.1", free_port()), 1, 2, lost=print, heartbeat=30, timeout=0.5)


def test_a_rank_that_comes_twice_is_refused(hub):
    hub = hub(2)
    join(hub, 1, 2)
    wait_until(lambda: 1 in hub.members, 5)
    with pytest.raises(LaunchError, match=r"rank 1 .* comes twice: rank 1 "):
        join(hub, 1, 2).exchange("start", 0, 5)
    with pytest.raises(LaunchError, match="wants to be one of 3, not 2"):
        join(hub, 0, 3).exchange("start", 0, 5)


@pytest.mark.parametrize("clean", [True, False])
def test_a_clean_end_is_no_loss(hub, clean):
    hub, said = hub(2), []
    join(hub, 0, 2, lost=said.append)
    other = join(hub, 1, 2)
    other.at = "40 of k50"
    wait_until(lambda: 1 in hub.members and hub.members[1].at, 5)
    other.leave(clean=clean)
    time.sleep(2.5)
    assert bool(said) != clean
    if not clean:
        assert said[0] == (
            f"rank 1 (pid {os.getpid()} on {HOST}) ended by an error; its last known "
            "step was 40 of k50. Start the same command again: it goes on from the "
            "last checkpoint."
        )


def test_words_of_a_stranger_do_not_hurt_the_hub(hub):
    hub = hub(1)
    with socket.create_connection(("127.0.0.1", hub.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(1) == b""
    assert join(hub, 0, 1).exchange("start", 7, 5) == [7]


def test_the_shield_stays_open_when_the_far_end_goes():
    server = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(
        ("127.0.0.1", shield("127.0.0.1", server.getsockname()[1]))
    )
    far, _ = server.accept()
    near.sendall(b"there")
    assert far.recv(5) == b"there"
    far.sendall(b"back")
    assert near.recv(4) == b"back"
    far.close()
    server.close()
    near.sendall(b"still")
    near.sendall(b"open")
    near.settimeout(0.5)
    with pytest.raises(TimeoutError):
        near.recv(1)
    near.close()


def test_one_process_needs_none_of_it(monkeypatch):
    for name in ("JAXZOO_COORDINATOR", "JAXZOO_DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    launch.initialize()
    launch.agree({"learning_rate": 0.1})
    launch.report_step("k50", 3)
    assert launch.explain(ValueError("Gloo all-reduce failed")) is None


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("JAXZOO_COORDINATOR", "somewhere", "'somewhere', not host:port"),
        ("JAXZOO_NUM_PROCESSES", "two", "JAXZOO_NUM_PROCESSES is 'two', not a number"),
        ("JAXZOO_PROCESS_ID", "2", "JAXZOO_PROCESS_ID is 2, not one of 0 to 1"),
        ("JAXZOO_HEARTBEAT", "", "JAXZOO_HEARTBEAT is '', not a number"),
    ],
)
def test_a_wrong_environment_is_named(monkeypatch, name, value, complaint):
    monkeypatch.setenv("JAXZOO_COORDINATOR", "127.0.0.1:1")
    monkeypatch.setenv("JAXZOO_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAXZOO_PROCESS_ID", "0")
    monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=complaint):
        launch.initialize()


def test_versions_and_code_see_a_changed_line(tmp_path):
    module = tmp_path / "iwae.py"
    module.write_text("a = 1\n")
    first = launch.versions_and_code(module)
    assert launch.versions_and_code(module) == first
    module.write_text("a = 2\n")
    second = launch.versions_and_code(module)
    assert [n for n in first if first[n] != second[n]] == ["code of iwae.py"]


# jax, where another test has loaded it, warns of any fork in this process.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_child_has_a_group_of_its_own(tmp_path):
    child = Child(0, ["sleep", "60"], dict(os.environ), None)
    child.read()
    assert os.getpgid(child.process.pid) == child.process.pid != os.getpgrp()
    child.finish()
    assert child.poll() == -signal.SIGKILL
