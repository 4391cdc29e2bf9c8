"""The line of one process to the hub of its run, and how it learns who is lost."""

import json
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxzoo.training.hub import ASLEEP, BEAT, Member

__all__ = ["EXIT_LOST", "LaunchError", "Line", "shield"]

EXIT_LOST = 76  # another process of the run was lost


class LaunchError(Exception):
    """The processes cannot run together; the message says which one and why.

    Attributes:
        code: exit status that tells the launcher: 2 where the command is wrong, 76
            where a process is missing.
    """

    def __init__(self, message: str, code: int = EXIT_LOST):
        super().__init__(message)
        self.code = code


class Line:
    """This process's end of the line to the hub; a thread keeps it alive.

    Args:
        address: host and port of the hub.
        rank: the number of this process.
        size: number of processes in the run.
        lost: called from the thread with one sentence, once, when another is lost.
        heartbeat: seconds of silence after which a process counts as lost.
        timeout: seconds to wait for the hub.

    Raises:
        LaunchError: nobody listens at `address`.
    """

    def __init__(
        self,
        address: tuple[str, int],
        rank: int,
        size: int,
        *,
        lost: Callable[[str], None],
        heartbeat: float,
        timeout: float,
    ):
        self.at = ""  # how far this process is
        self._rank, self._size = rank, size
        self._lost, self._heartbeat = lost, heartbeat
        self._line = _connect(address, timeout)
        self._sending = threading.Lock()
        self._news = threading.Condition()
        self._members: list[Member] = []
        self._said: dict[str, list[str]] = {}
        self._whole: dict[str, dict[str, Any]] = {}
        self._refused = ""
        self._leaving = False
        host = socket.gethostname()
        member = {"rank": rank, "pid": os.getpid(), "host": host, "at": ""}
        self._send({"member": member, "size": size})
        threading.Thread(target=self._live, daemon=True).start()

    def exchange(self, tag: str, value: Any, timeout: float) -> list[Any]:
        """Gives `value` to all processes and waits for theirs.

        Args:
            tag: what it is, for the error; another one each time.
            value: anything that JSON has.
            timeout: seconds to wait.

        Returns:
            The values of all processes, by rank.

        Raises:
            LaunchError: some did not come; names them.
        """
        self._send({"tag": tag, "value": value})
        with self._news:
            self._news.wait_for(lambda: self._refused or tag in self._whole, timeout)
            if self._refused:
                raise LaunchError(f"{self._refused}.")
            if tag not in self._whole:
                raise LaunchError(self._missing(tag, timeout))
            values = self._whole.pop(tag)
        return [values[str(rank)] for rank in range(self._size)]

    def leave(self, *, clean: bool) -> None:
        """Tells that this process ends; unless `clean`, the others end too."""
        self._leaving = True
        if not clean:  # the others now go because of this process, not it of them
            self._lost = lambda sentence: None
        self._send({"leaves": clean})

    def _missing(self, tag: str, timeout: float) -> str:
        known = {member.rank: str(member) for member in self._members}
        came = {int(rank) for rank in self._said.get(tag, ())}
        ranks = [r for r in range(self._size) if r not in came]
        names = ", ".join(known.get(rank, f"rank {rank}") for rank in ranks)
        return (
            f"{names} of {self._size} processes did not come to the {tag} within "
            f"{timeout:.0f} s: look at what it wrote last, or whether it was started."
        )

    def _send(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                self._line.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # the thread that reads finds the end of the line
            return

    def _live(self) -> None:
        with self._line:
            self._listen()

    def _listen(self) -> None:
        rest, sent, told = b"", 0.0, ""
        heard = ticked = time.monotonic()
        while True:
            ready = select.select([self._line], [], [], BEAT / 5)[0]
            received = _receive(self._line) if ready else None
            now = time.monotonic()
            if received == b"":
                return self._hub_lost("is gone")
            if received is not None or now - ticked > ASLEEP:
                heard = now
            ticked = now
            *texts, rest = (rest + (received or b"")).split(b"\n")
            for text in texts:
                self._take(json.loads(text))
            if now - heard > self._heartbeat:
                return self._hub_lost(f"has not answered for {self._heartbeat:.0f} s")
            # How far it is, it says sooner: that stands in the sentence on its loss.
            news = self.at != told and now - sent > BEAT / 5
            if (news or now - sent > BEAT) and not self._leaving:
                told = self.at
                self._send({"at": told})
                sent = now

    def _take(self, message: dict[str, Any]) -> None:
        with self._news:
            self._refused = message.get("refused", "")
            self._said = message.get("said", {})
            self._whole |= message.get("whole", {})
            now = time.monotonic()
            self._members = [
                Member(**{**member, "heard": now + member["heard"]})
                for member in message.get("members", ())
            ]
            self._news.notify_all()
        for member in self._members:
            if member.rank == self._rank:
                continue
            if member.lost():
                return self._lost(member.loss(member.state))
            if member.silent() > self._heartbeat:
                how = f"has not answered for {self._heartbeat:.0f} s"
                return self._lost(member.loss(how))

    def _hub_lost(self, how: str) -> None:
        if self._leaving or self._refused:
            return
        launcher = os.environ.get("JAXZOO_LAUNCHER")
        known = [member for member in self._members if member.rank == 0]
        if launcher is not None or not known:
            name = f"the launcher (pid {launcher})" if launcher else "rank 0"
            self._lost(f"{name} {how}: start the same command again.")
        else:
            self._lost(known[0].loss(how))


def _connect(address: tuple[str, int], timeout: float) -> socket.socket:
    end = time.monotonic() + timeout
    while True:
        try:
            line = socket.create_connection(address, timeout=BEAT)
        except OSError as error:
            if time.monotonic() > end:
                host, port = address
                raise LaunchError(
                    f"rank 0 did not answer at {host}:{port} within {timeout:.0f} s "
                    f"({error}): look whether it was started."
                ) from None
            time.sleep(0.1)
        else:
            line.settimeout(None)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return line


def shield(host: str, port: int) -> int:
    """Opens a local port that leads to host:port and stays open when that goes down.

    jax ends a process with a C++ stack in the moment in which its connection to
    rank 0 breaks. Behind this port it sees a rank 0 that is silent, and there is time
    to say what happened.
    """
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            near, _ = server.accept()
            threading.Thread(target=lead, args=(near,), daemon=True).start()

    def lead(near: socket.socket) -> None:
        with near, _connect((host, port), timeout=math.inf) as far:
            threading.Thread(target=_pump, args=(far, near), daemon=True).start()
            _pump(near, far)

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]


def _pump(source: socket.socket, sink: socket.socket) -> None:
    while data := _receive(source):
        try:
            sink.sendall(data)
        except OSError:  # the sink is gone, the source shall not notice
            continue


def _receive(line: socket.socket) -> bytes:
    try:
        return line.recv(65536)
    except OSError:
        return b""
