"""A run of many processes: how they start, agree, watch each other and end.

    python -m jaxzoo.training.launch --local 2 -- python -m experiments.vae.iwae

starts them on this machine; without --local it supervises the one process of this host
of a TPU pod or a SLURM job. Inside, the experiment's command calls `initialize` before
jax touches a device, then `agree`; the loop calls `report_step`. The environment says
who a process is: JAXZOO_COORDINATOR (host:port at rank 0, for our own line),
JAXZOO_NUM_PROCESSES and JAXZOO_PROCESS_ID, or JAXZOO_DISTRIBUTED=auto. With neither,
the run has one process and nothing here does anything.
"""

import atexit
import functools
import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jaxzoo.training.child import EXIT_CRASHED
from jaxzoo.training.hub import Hub
from jaxzoo.training.peers import EXIT_LOST, LaunchError, Line, shield

__all__ = [
    "EXIT_LOST",
    "LaunchError",
    "abandon",
    "agree",
    "explain",
    "initialize",
    "report_step",
    "versions_and_code",
]

# What the errors of collectives and of jax's service say when a peer is not there.
_LOST_WORDS = ("gloo", "nccl", "connection", "socket closed", "coordination service")

_line: Line | None = None  # to the hub, once this is one of many processes


class _Place(NamedTuple):
    """Where a process stands: its number, of how many, and where rank 0 is."""

    rank: int
    size: int
    host: str
    port: int
    jax_port: int = 0
    devices: list[int] | None = None


def initialize() -> None:
    """Joins the run's other processes, if the environment names any.

    Call it once, before jax touches a device. From here on the process ends with one
    sentence on stderr and status 76 when another one is lost. Install signal handlers
    after it.

    Raises:
        LaunchError: a process did not come within JAXZOO_INIT_TIMEOUT seconds (300),
            or the environment makes no sense; names the rank or the variable.
    """
    global _line
    heartbeat = _number("JAXZOO_HEARTBEAT", 30.0)
    timeout = _number("JAXZOO_INIT_TIMEOUT", 300.0)
    place = _place(timeout)
    if place is None:
        return
    if "JAXZOO_LAUNCHER" in os.environ:
        _keep_stdout_clean()
    hosts_hub = place.rank == 0 and "JAXZOO_LAUNCHER" not in os.environ
    if hosts_hub:
        Hub("", place.port, place.size).start()
    _line = Line(
        ("127.0.0.1" if hosts_hub else place.host, place.port),
        place.rank,
        place.size,
        lost=functools.partial(_end, hosts_hub),
        heartbeat=heartbeat,
        timeout=timeout,
    )
    with _reserved_port() as reserved:
        port = place.jax_port or reserved.getsockname()[1]
        port = _line.exchange("start", port, timeout)[0]
        _connect_jax(place, port, timeout, heartbeat)
    atexit.register(_leave)


def agree(settings: Mapping[str, Any]) -> None:
    """Compares the settings of all processes with those of rank 0, before step 1.

    Args:
        settings: what must not differ, flat, of types that JSON has; see also
            `versions_and_code`.

    Raises:
        LaunchError: they differ; names the rank, its host, the settings and both
            values, on all processes alike. Or a process did not come.
    """
    if _line is None:
        return
    # As JSON gives it back: a tuple is a list, a path its text.
    plain = json.loads(json.dumps(dict(settings), default=str))
    mine = {"host": socket.gethostname(), "settings": plain}
    timeout = _number("JAXZOO_INIT_TIMEOUT", 300.0)
    first, *others = _line.exchange("comparison of settings", mine, timeout)
    for rank, other in enumerate(others, start=1):
        if difference := _difference(first["settings"], other["settings"]):
            raise LaunchError(
                f"rank {rank} on {other['host']} has {difference}: "
                "give all processes the same command and the same code.",
                code=2,
            )


def versions_and_code(module: Path) -> dict[str, str]:
    """What a computation depends on beside its settings, for `agree`.

    Args:
        module: the file of the experiment.

    Returns:
        Versions of Python and the packages, digests of the experiment and of jaxzoo.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    found = {f"{name} version": metadata.version(name) for name in packages}
    found["python version"] = platform.python_version()
    found[f"code of {module.name}"] = _digest([module])
    library = Path(__file__).resolve().parents[1]
    found["code of jaxzoo"] = _digest(sorted(library.rglob("*.py")))
    return found


def report_step(fit: str, step: int) -> None:
    """Tells the other processes how far this one is; costs nothing."""
    if _line is not None:
        _line.at = f"{step} of {fit}"


def explain(error: BaseException) -> str | None:
    """Says what an error of a collective means, if a lost process is behind it.

    It waits for the heartbeat: where a process is lost, this one ends meanwhile, with
    the sentence and status 76.

    Returns:
        A sentence if the connection broke between living processes; None if the error
        is about something else.
    """
    text = str(error).lower()
    # An OSError is about a file or a download.
    strange = isinstance(error, OSError) or not any(w in text for w in _LOST_WORDS)
    if _line is None or strange:
        return None
    time.sleep(_number("JAXZOO_HEARTBEAT", 30.0) + 2)
    return (
        "The connection between the processes broke, but all of them answer "
        f"({str(error).splitlines()[0]}). Start the same command again: it goes on "
        "from the last checkpoint."
    )


def abandon(code: int) -> None:
    """Ends this process of many at once with `code`, and all others with status 76.

    For an error that this one alone has seen, such as a full disk at rank 0: the others
    would wait for it in a collective, and it for them in jax's own end. An exception
    that nobody catches comes here by itself. With one process it does nothing.
    """
    if _line is None:
        return
    _line.leave(clean=False)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.5)  # until the hub has told the others
    os._exit(code)


def _difference(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    pairs = {n: (found.get(n, "unset"), wanted.get(n, "unset")) for n in found | wanted}
    return "; ".join(
        f"{name} {here}, rank 0 has {there}"
        for name, (here, there) in pairs.items()
        if here != there
    )


def _place(timeout: float) -> _Place | None:
    address = os.environ.get("JAXZOO_COORDINATOR")
    if address is None:
        auto = os.environ.get("JAXZOO_DISTRIBUTED") == "auto"
        return _detect(timeout) if auto else None
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise LaunchError(f"JAXZOO_COORDINATOR is '{address}', not host:port.", code=2)
    size = int(_number("JAXZOO_NUM_PROCESSES", None))
    rank = int(_number("JAXZOO_PROCESS_ID", None))
    if not 0 <= rank < size:
        raise LaunchError(
            f"JAXZOO_PROCESS_ID is {rank}, not one of 0 to {size - 1}.", code=2
        )
    return _Place(rank, size, host, int(port))


def _detect(timeout: float) -> _Place:
    # Private, and the only way to learn the place without connecting at once.
    from jax._src.clusters import ClusterEnv

    # One process may have all GPUs of a node; SLURM's own answer is one for each.
    named = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    wanted = [int(word) for word in named.split(",")] if named else None
    address, size, rank, devices = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, wanted, None, int(timeout)
    )
    if address is None or size is None or rank is None:
        raise LaunchError(
            "JAXZOO_DISTRIBUTED is auto, but jax finds no TPU pod, SLURM job or "
            "Kubernetes job set here: name the processes by JAXZOO_COORDINATOR.",
            code=2,
        )
    host, _, port = address.rpartition(":")
    ids = None if devices is None else [int(device) for device in devices]
    return _Place(rank, size, host, int(port) + 1, int(port), ids)


def _connect_jax(place: _Place, port: int, timeout: float, heartbeat: float) -> None:
    import jax

    host = place.host
    if place.rank > 0:
        host, port = "127.0.0.1", shield(place.host, port)
    # Its C++ would swallow a SIGTERM that comes before our handler is there.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        f"{host}:{port}",
        place.size,
        place.rank,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout),
        # Ours comes first, jax's ends the process with a C++ stack.
        heartbeat_timeout_seconds=int(10 * heartbeat) + 100,
        shutdown_timeout_seconds=max(300, int(timeout)),
    )


def _keep_stdout_clean() -> None:
    """Sends what C++ prints, such as Gloo, to stderr, which the launcher filters."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(ours, "w", buffering=1, encoding=sys.stdout.encoding)


def _end(hosts_hub: bool, sentence: str) -> None:
    """Ends this process at once: its main thread may wait in a collective for ever."""
    # A launcher of all says it itself, unless it is what was lost.
    if "JAXZOO_LAUNCHER" not in os.environ or sentence.startswith("the launcher"):
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\033[?25h\n")  # the cursor, hidden by a bar
        os.write(2, f"{sentence}\n".encode())
    if hosts_hub:
        time.sleep(0.5)  # until the hub has told the others
    os._exit(EXIT_LOST)


def _leave() -> None:
    # Before jax's own end, which waits minutes for processes that will not come.
    assert _line is not None
    if getattr(sys, "last_value", None) is not None:  # there was a traceback
        abandon(EXIT_CRASHED)
    _line.leave(clean=True)


def _number(name: str, default: float | None) -> float:
    text = os.environ.get(name, default)
    try:
        number = float(text)  # pyright: ignore
    except (TypeError, ValueError):
        raise LaunchError(f"{name} is {text!r}, not a number.", code=2) from None
    return number


def _reserved_port() -> socket.socket:
    """Binds a free port that nobody but jax's service gets while this is open.

    jax wants a number. Between a look for a free one and its bind another program may
    be given it, and a service that cannot bind ends the process by a signal. gRPC binds
    with SO_REUSEPORT, as this does; a socket that does not listen takes no connection.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    if hasattr(socket, "SO_REUSEPORT"):  # not on Windows
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("", 0))
    return reserved


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    from jaxzoo.training.supervise import main

    main()
