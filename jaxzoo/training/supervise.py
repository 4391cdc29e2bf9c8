"""Starts the processes of a run, says how one was lost, and leaves none behind.

Without jax: a wrong command is answered at once, and nothing of it can go down here.
"""

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxzoo.training.child import EXIT_CRASHED, Child
from jaxzoo.training.hub import Hub, Member, loss
from jaxzoo.training.peers import EXIT_LOST

__all__ = ["main", "supervise"]

EXIT_USAGE, EXIT_SIGTERM, EXIT_SIGINT = 2, 75, 130
# Ends that a process chose: claims hold, one fails, wrong command, stopped.
_CHOSEN = {0, 1, EXIT_USAGE, EXIT_SIGTERM, EXIT_SIGINT}
TICK = 0.05
GRACE = 2.0  # seconds in which the others may end by themselves


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    Exit status: 0 all processes gave 0; 1 claims failed; 2 the command is wrong; 75
    SIGTERM and 130 Ctrl-C, after a checkpoint; 70 a process was lost.

    Args:
        argv: words after the module's name; None takes them from the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:split])
    command = words[split + 1 :]
    if not command:
        _parser().error("no command: give it after --, as in -- python -m ...")
    sys.exit(supervise(options, command))


def supervise(options: argparse.Namespace, command: Sequence[str]) -> int:
    """Runs `command` in all processes, again after a crash if asked to.

    Args:
        options: as the command line gives them.
        command: what each process runs.

    Returns:
        The exit status, see `main`.
    """
    for again in range(options.restarts + 1):
        if again:
            _say(f"Starting all processes again ({again} of {options.restarts}).")
        with _Crew(options, command) as crew:
            status = crew.wait()
        if status != EXIT_CRASHED or crew.stopped:
            break
    return status


class _Crew:
    """All processes of one attempt; a context manager that leaves none behind."""

    def __init__(self, options: argparse.Namespace, command: Sequence[str]):
        self.stopped: list[int] = []  # the signals that were passed on
        self._received: list[int] = []
        self._heartbeat = options.heartbeat
        local = options.local is not None
        size = options.local if local else 1
        self._hub = Hub("127.0.0.1", 0, size) if local else None
        self._before = {
            signum: signal.signal(signum, self._receive)
            for signum in (signal.SIGINT, signal.SIGTERM)
        }
        self._before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, self._pause)
        self._children: list[Child] = []
        for rank in range(size):
            env = _environment(options, self._hub, rank)
            self._children.append(Child(rank, command, env, options.log))
        # Threads only now: a fork beside them could hang.
        for child in self._children:
            child.read()
        if self._hub is not None:
            self._hub.start()

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.finish()
        if self._hub is not None:
            self._hub.close()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def wait(self) -> int:
        """Until all have ended, or one was lost; the exit status of the run."""
        while any([child.poll() is None for child in self._children]):
            if self._received.count(signal.SIGINT) > 1:
                return EXIT_SIGINT
            self._pass_on()
            if self._lost():
                break
            time.sleep(TICK)
        if self._lost():
            self._settle()
        if lost := self._lost():
            return self._close(lost[0])
        # All have ended; or what seemed lost had only met our signal.
        running = any([child.poll() is None for child in self._children])
        return self.wait() if running else self._status()

    def _receive(self, signum: int, _: Any) -> None:
        self._received.append(signum)

    def _pause(self, *_: Any) -> None:
        # Ctrl-Z: all stand still together, and nobody counts as lost.
        self._send(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._send(signal.SIGCONT)

    def _pass_on(self) -> None:
        for signum in self._received:
            if signum not in self.stopped:
                self.stopped.append(signum)
                self._send(signum)

    def _send(self, signum: int) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send(signum)

    def _lost(self) -> list[Child]:
        """Those that were lost, the first one first; the others only followed."""
        ended = [child.rank for child in self._children if self._is_lost(child)]
        if self._hub is not None and ended:
            told = [member.rank for member in self._hub.lost]
            ended = sorted(ended, key=[*told, *ended].index)
        silent = [
            rank
            for rank, member in self._members().items()
            if member.silent() > self._heartbeat and self._children[rank].code is None
        ]
        # Who ended because of another one says so by its status.
        causes = [r for r in ended if self._children[r].code != EXIT_LOST]
        return [self._children[rank] for rank in [*causes, *silent, *ended]]

    def _settle(self) -> None:
        """Until it is clear which one was first: a line breaks before its process."""
        time.sleep(2 * TICK)
        told = [] if self._hub is None else [m.rank for m in self._hub.lost]
        self._wait_for([self._children[rank] for rank in told[:1]])
        for child in self._children:
            child.poll()

    def _is_lost(self, child: Child) -> bool:
        if child.code is None:
            return False
        if self._ended_by_us(child):
            return False
        if child.code == EXIT_LOST and any(map(self._ended_by_us, self._children)):
            return False
        member = self._members().get(child.rank)
        if child.code not in _CHOSEN or (member is not None and member.lost()):
            return True
        # It failed before it joined the others, who would wait for it.
        alone = self._hub is not None and member is None
        waiting = any(other.code is None for other in self._children)
        late = time.monotonic() - child.ended > GRACE
        return child.code in {1, EXIT_USAGE} and alone and waiting and late

    def _ended_by_us(self, child: Child) -> bool:
        """Whether our signal met it before it could handle one."""
        return child.code is not None and -child.code in self.stopped

    def _members(self) -> dict[int, Member]:
        return {} if self._hub is None else dict(self._hub.members)

    def _close(self, child: Child) -> int:
        """Says how `child` was lost, lets the others end and returns the status."""
        silent = f"has not answered for {self._heartbeat:.0f} s"
        if child.code != EXIT_LOST:
            how = silent if child.code is None else _ending(child.code)
            _say(self._sentence(child, how))
        if sys.stdout.isatty():
            print("\033[?25h", end="", flush=True)  # the cursor, hidden by a bar
        if child.rank > 0 and child.code is not None:
            child.finish()
            if child.err.last:
                _say(f"rank {child.rank} wrote last:\n{''.join(child.err.last)}")
        self._wait_for(self._children)
        # A full disk, say, which starting again does not mend.
        return EXIT_USAGE if child.code == EXIT_USAGE else EXIT_CRASHED

    def _wait_for(self, children: Sequence[Child]) -> None:
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if all([child.poll() is not None for child in children]):
                return
            time.sleep(TICK)

    def _sentence(self, child: Child, how: str) -> str:
        if known := self._members().get(child.rank):
            return known.loss(how)
        where = f"(pid {child.process.pid} on {socket.gethostname()})"
        if self._hub is not None:
            return loss(f"rank {child.rank} {where} {how}", at="")
        # The hub is at rank 0; the processes of other hosts name rank and step.
        return loss(f"this host's process {where} {how}", at=None)

    def _status(self) -> int:
        codes = {child.code for child in self._children}
        if signals := [-code for code in codes if code is not None and code < 0]:
            return 128 + signals[0]
        for status in (EXIT_SIGTERM, EXIT_SIGINT, EXIT_USAGE, 1):
            if status in codes:
                return status
        return 0


def _environment(
    options: argparse.Namespace, hub: Hub | None, rank: int
) -> dict[str, str]:
    env = {
        **os.environ,
        "JAXZOO_HEARTBEAT": str(options.heartbeat),
        "JAXZOO_INIT_TIMEOUT": str(options.init_timeout),
    }
    if hub is None:
        if "JAXZOO_COORDINATOR" not in env:
            env["JAXZOO_DISTRIBUTED"] = "auto"
        return env
    # NPROC: older jax hangs in collectives if the machine has fewer cores than devices.
    env = {"JAX_PLATFORMS": "cpu", "NPROC": "16", **env}
    env.pop("JAXZOO_DISTRIBUTED", None)
    if options.devices_per_process is not None:
        flag = f"--xla_force_host_platform_device_count={options.devices_per_process}"
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flag}"
    return {
        **env,
        "JAXZOO_COORDINATOR": f"127.0.0.1:{hub.port}",
        "JAXZOO_NUM_PROCESSES": str(options.local),
        "JAXZOO_PROCESS_ID": str(rank),
        "JAXZOO_LAUNCHER": str(os.getpid()),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxzoo.training.launch",
        usage="%(prog)s [options] -- COMMAND ...",
        description="Starts a run of many processes and watches over it.",
    )
    add = parser.add_argument
    add("--local", type=_positive, metavar="N", help="processes on this machine")
    add("--devices-per-process", type=_positive, metavar="M", help="pretend CPU ones")
    add("--heartbeat", type=_seconds, default=30.0, metavar="S", help="silence allowed")
    add("--init-timeout", type=_seconds, default=300.0, metavar="S", help="to start in")
    add("--restarts", type=int, default=0, metavar="K", help="times to start again")
    add("--log", type=Path, metavar="DIR", help="keeps all that the processes write")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 2 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds >= 2")
    return seconds


def _ending(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit {code}"


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
