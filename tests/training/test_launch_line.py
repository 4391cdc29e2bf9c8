"""The line between processes, inside one: exchanges, losses, and what starts it."""

import os
import signal
import socket
import threading
import time

import pytest

from jaxzoo.training import launch
from jaxzoo.training.child import Child
from jaxzoo.training.hub import Hub
from jaxzoo.training.peers import LaunchError, Line, shield
from tests.training.processes import free_port, wait_until

HOST = socket.gethostname()


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


def test_the_port_for_jax_is_kept_from_others_until_its_service_has_it():
    with launch._reserved_port() as reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("", port))
        with pytest.raises(OSError, match="in use"), socket.socket() as other:
            other.bind(("127.0.0.1", port))
        with socket.create_server(("", port), reuse_port=True):  # as gRPC does
            socket.create_connection(("127.0.0.1", port), timeout=5).close()


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
