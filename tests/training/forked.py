"""Processes that begin with everything imported: forks of one that waits for orders.

    process = forked.start(["sitting.py", "folder"], env=env)    # subprocess.Popen, but

that jax, Flax, Orbax and the training room are there already, which takes as long as a
small training does. Until jax is asked for a device it has no threads that a fork could
lose. What is forked is a process like any other: it is killed by signals, ends as
Python does, and its exit status is its own.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
CACHE = "JAX_COMPILATION_CACHE_DIR"
MOST = 1 << 17  # bytes of an order
IMPORTED = (
    "flax.linen",
    "matplotlib.pyplot",
    "optax",
    "orbax.checkpoint",
    "jaxzoo.training.command",
    "jaxzoo.training.loop",
    "jaxzoo.training.plots",
)


class Forked:
    """As much of `subprocess.Popen` as the tests use, with text from both pipes."""

    def __init__(self, pid: int, out: int, err: int, status: int):
        self.pid = pid
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """The exit status, minus the signal where one ended it; None while it runs."""
        if self.returncode is None and self._has_ended(0):
            told = os.read(self._status, 16)
            assert told, "the process that forks has ended"
            self.returncode = int(told)
            os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end."""
        if self.returncode is None and not self._has_ended(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What was written to both pipes, to the end."""
        said = {}

        def read(pipe: Any) -> None:
            with pipe:
                said[pipe] = pipe.read()

        pipes = self.stdout, self.stderr
        threads = [
            threading.Thread(target=read, args=[pipe], daemon=True) for pipe in pipes
        ]
        for thread in threads:
            thread.start()
        self.wait(timeout)
        for thread in threads:
            thread.join()
        return said[self.stdout], said[self.stderr]

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _has_ended(self, timeout: float | None) -> bool:
        return bool(select.select([self._status], [], [], timeout)[0])


def start(words: Sequence[Any], env: Mapping[str, str]) -> Any:
    """Starts `python *words` with its output in pipes.

    Args:
        words: a script, or `-c` and a program, and what it finds in `sys.argv`.
        env: its environment. What jax reads there when it is imported is read once for
            all that have it in common, but for the folder of compiled programs.
    """
    words = [str(word) for word in words]
    if sys.platform != "linux":
        pipe = subprocess.PIPE
        command = [sys.executable, *words]
        return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
    names = sorted(name for name in env if name.startswith("JAX_") and name != CACHE)
    orders = _server(tuple((name, env[name]) for name in names))
    pipes = [os.pipe() for _ in range(3)]  # stdout, stderr, exit status
    order = json.dumps({"words": words, "env": dict(env)}).encode()
    socket.send_fds(orders, [order], [end for _, end in pipes])
    for _, end in pipes:
        os.close(end)
    pid = orders.recv(16)
    assert pid, "the process that forks has ended"
    return Forked(int(pid), *(end for end, _ in pipes))


@functools.cache
def _server(settings: tuple[tuple[str, str], ...]) -> socket.socket:
    """The way to the process that forks, which has imported jax with these settings."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env={
                **os.environ,
                **dict(settings),
                "OPENBLAS_NUM_THREADS": "1",  # else NumPy has a thread already
                "PYTHONPATH": f"{REPO}:{os.environ.get('PYTHONPATH', '')}",
            },
            pass_fds=[theirs.fileno()],
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _serve(orders: socket.socket) -> dict[str, Any]:
    """Forks at every order; returns in the fork, with the order."""
    running: dict[int, tuple[int, int]] = {}  # by what tells of their end
    order_comes = orders.fileno()
    while True:
        for ready in select.select([order_comes, *running], [], [])[0]:
            if ready != order_comes:
                pid, status = running.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.write(status, str(code).encode())
                os.close(status)
                os.close(ready)
                continue
            order, (out, err, status), _, _ = socket.recv_fds(orders, MOST, 3)
            if not order:
                sys.exit()
            with warnings.catch_warnings():
                # jax warns of every fork, with threads or without.
                warnings.filterwarnings("ignore", r"os\.fork\(\) was called")
                pid = os.fork()
            if not pid:
                orders.close()
                os.dup2(out, 1)
                os.dup2(err, 2)
            os.close(out)
            os.close(err)
            if not pid:
                return json.loads(order)
            running[os.pidfd_open(pid)] = pid, status
            orders.send(str(pid).encode())


def _become(order: dict[str, Any]) -> None:
    """What `python *words` does once everything is imported."""
    import jax

    os.environ.clear()
    os.environ.update(order["env"])
    jax.config.update(CACHE.lower(), os.environ.get(CACHE))
    script, *_ = sys.argv = order["words"]
    if script == "-c":
        sys.argv = ["-c", *sys.argv[2:]]
        exec(order["words"][1], {"__name__": "__main__"})
    else:
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        sys.exit(f"There are {threads} threads once all is imported: forks lose them.")
    _become(_serve(socket.socket(fileno=int(sys.argv[1]))))
