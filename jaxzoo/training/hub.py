"""The hub of a run of many processes: who is there, how far each is, who is lost.

One process holds it, rank 0 or the launcher that started them all; the others have a
`peers.Line` to it. jax has a service for this too, but it cannot name the rank that is
missing, and it ends the survivors with a C++ stack. Messages are lines of JSON. No jax
here: the launcher imports this.
"""

import dataclasses
import json
import selectors
import socket
import threading
import time
from typing import Any

__all__ = ["ASLEEP", "BEAT", "Hub", "Member", "loss"]

BEAT = 1.0  # seconds between two signs of life
# Who was stopped or starved itself for this long cannot tell whether others were.
ASLEEP = 4 * BEAT


@dataclasses.dataclass
class Member:
    """What the hub knows of one process.

    Attributes:
        rank: its number.
        pid: its process id.
        host: where it runs.
        at: what it last said it had reached, such as "40 of k50".
        heard: when it last said anything, `time.monotonic()` of the hub.
        state: "here", "left" after a clean end, or how it was lost.
    """

    rank: int
    pid: int
    host: str
    at: str
    heard: float
    state: str = "here"

    def silent(self) -> float:
        """Seconds without a sign of life; 0 once it has left."""
        return 0.0 if self.state == "left" else time.monotonic() - self.heard

    def lost(self) -> bool:
        """Whether it has ended, and not cleanly."""
        return self.state not in {"here", "left"}

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    def loss(self, how: str) -> str:
        """The sentence on its end."""
        return loss(f"{self} {how}", self.at)


def loss(what: str, at: str | None) -> str:
    """The sentence on a process that was lost, `at` being what it had reached."""
    where = f"; its last known step was {at}" if at else "; it was still starting"
    return (
        f"{what}{'' if at is None else where}. "
        "Start the same command again: it goes on from the last checkpoint."
    )


class Hub:
    """Passes on what the processes of a run say, in a thread from `start` on.

    Args:
        host: address to listen at; "" is all of them.
        port: 0 takes a free one.
        size: number of processes in the run.
    """

    def __init__(self, host: str, port: int, size: int):
        self._server = socket.create_server((host, port))
        self.port: int = self._server.getsockname()[1]
        self.members: dict[int, Member] = {}
        self._size = size
        self.lost: list[Member] = []  # the first one is why the others go
        self._said: dict[str, dict[str, Any]] = {}  # tag: rank: value
        self._lines: dict[socket.socket, Member | None] = {}
        self._rests: dict[socket.socket, bytes] = {}  # the line that is not whole yet
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._open = True
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        """Begins to answer; until then who calls waits."""
        self._thread.start()

    def close(self) -> None:
        """Hangs up."""
        self._open = False
        self._thread.join()

    def _serve(self) -> None:
        told = time.monotonic()
        while self._open:
            for key, _ in self._selector.select(0.1):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._read(key.fileobj)
            silent = time.monotonic() - told
            if silent > ASLEEP:
                for member in self.members.values():
                    member.heard = time.monotonic()
            if silent > BEAT:
                self._tell_all()
                told = time.monotonic()
        for line in (*self._lines, self._server):
            line.close()
        self._selector.close()

    def _accept(self) -> None:
        line, _ = self._server.accept()
        line.settimeout(BEAT)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines[line], self._rests[line] = None, b""
        self._selector.register(line, selectors.EVENT_READ)

    def _read(self, line: Any) -> None:
        try:
            received = line.recv(65536)
            *texts, self._rests[line] = (self._rests[line] + received).split(b"\n")
            for text in texts:
                self._take(line, json.loads(text))
        except (OSError, ValueError, KeyError, TypeError):  # reset, or not one of ours
            received = b""
        if received:
            return
        member = self._lines[line]
        self._drop(line)
        if member is not None and member.state == "here":
            self._lose(member, "is gone")

    def _take(self, line: socket.socket, message: dict[str, Any]) -> None:
        member = self._lines[line]
        if member is None:
            self._enter(line, message)
            return
        # Also what lay in the buffer while this process was asleep.
        member.heard = time.monotonic()
        if "at" in message:
            member.at = message["at"]
        elif "tag" in message:
            said = self._said.setdefault(message["tag"], {})
            said[str(member.rank)] = message["value"]
            self._tell_all()
        elif message["leaves"]:
            member.state = "left"
        else:
            self._lose(member, "ended by an error")

    def _enter(self, line: socket.socket, message: dict[str, Any]) -> None:
        new = Member(heard=time.monotonic(), **message["member"])
        known = self.members.get(new.rank)
        if message["size"] != self._size or not 0 <= new.rank < self._size:
            refused = f"{new} wants to be one of {message['size']}, not {self._size}"
        elif known is not None:
            refused = f"{new} comes twice: {known} is there"
        else:
            self.members[new.rank] = self._lines[line] = new
            return
        self._send(line, {"refused": refused})

    def _lose(self, member: Member, how: str) -> None:
        member.state = how
        self.lost.append(member)
        self._tell_all()

    def _tell_all(self) -> None:
        # Ages, since the clocks of two hosts have nothing in common.
        table = [
            {**dataclasses.asdict(member), "heard": -member.silent()}
            for member in [*self.lost, *self.members.values()]
        ]
        message = {
            "members": table,
            "said": {tag: [*values] for tag, values in self._said.items()},
            # Values travel once, when the last one is there.
            "whole": {t: v for t, v in self._said.items() if len(v) == self._size},
        }
        for line, member in self._lines.items():
            if member is not None:
                self._send(line, message)
        for tag in message["whole"]:
            del self._said[tag]

    def _send(self, line: socket.socket, message: dict[str, Any]) -> None:
        try:
            line.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # its end is found where it is read
            return

    def _drop(self, line: socket.socket) -> None:
        self._selector.unregister(line)
        del self._lines[line], self._rests[line]
        line.close()
