"""Kills processes of a run of two until it has finished, and compares the bits.

    python -m tests.training.processes --kills 20 --seed 0

Each kill comes at a random time of the start, the exchange, the compilation or the
steps, to rank 0 or 1. The launcher must end all within the heartbeat + 5 s, with one
sentence that names rank, pid, host and last step, without a C++ stack and without a
process left over; then the same command goes on. The last line has the figures.
"""

import argparse
import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.training.kill import environment

REPO = Path(__file__).resolve().parents[2]
SITTING = Path(__file__).with_name("processes_sitting.py")  # what is killed
HEARTBEAT = 4.0
STACK = re.compile(r"Check failure|stack trace|0x[0-9a-f]{6}|terminate called")
SENTENCE = re.compile(
    r"rank (\d) \(pid (\d+) on (\S+)\) (.+?); "
    r"(?:its last known step was (\d+) of (\w+)|it was still starting)\. Start the same"
)


class Launched:
    """A run of small processes under the launcher.

    Args:
        folder: where rank 0 keeps the state, and all write down who they are.
        cache: of compiled programs.
        size: number of processes.
        options: further words for the launcher.
        words: further words for the processes, of `processes_sitting`.
    """

    def __init__(
        self,
        folder: Path,
        cache: Path,
        *options: str,
        size: int = 2,
        words: tuple[str, ...] = (),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for file in folder.glob("*.pid"):
            file.unlink()
        command = [sys.executable, "-m", "jaxzoo.training.launch"]
        command += ["--local", str(size), "--heartbeat", str(HEARTBEAT), *options, "--"]
        command += [sys.executable, str(SITTING), str(folder), *words]
        self.process = subprocess.Popen(
            command,
            env=environment(cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out = self.err = ""

    def pid(self, rank: int) -> int | None:
        """The process id of a rank, once it runs."""
        file = self.folder / f"{rank}.pid"
        text = file.read_text() if file.exists() else ""
        return int(text) if text else None

    def wait_for(self, rank: int, at: str = "", timeout: float = 60) -> int:
        """Waits until a rank has written `at` in its log; returns its process id."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.process.poll() is None:
            log = self.folder / f"{rank}.log"
            pid = self.pid(rank)
            if pid is not None and log.exists() and at in log.read_text():
                return pid
            time.sleep(0.02)
        raise AssertionError(f"rank {rank} did not reach '{at}': {self.end()}")

    def end(self, timeout: float = 60) -> int:
        """Waits for the end; `out` and `err` have what was written."""
        self.out, self.err = self.process.communicate(timeout=timeout)
        return self.process.returncode

    def sentences(self) -> list[re.Match[str]]:
        """The sentences on lost processes."""
        return list(SENTENCE.finditer(self.err))

    def left_over(self) -> list[int]:
        """Processes of this run that are still there."""
        marker = str(self.folder).encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if marker in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


def free_port() -> int:
    """A port that the kernel gives to nobody by itself, until its test binds it."""
    for port in random.sample(range(20000, 32000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    """Waits until `true()`, no longer than `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


class Figures(NamedTuple):
    """What the kills came to.

    Attributes:
        kills: SIGKILLs that met a process of an unfinished run.
        runs: runs that were finished.
        phases: what the killed process was doing.
        slowest: seconds from a kill to the end of all.
        problems: whatever differs from the promise.
    """

    kills: int
    runs: int
    phases: Counter[str]
    slowest: float
    problems: list[str]

    def __str__(self) -> str:
        phases = ", ".join(f"{n} {name}" for name, n in sorted(self.phases.items()))
        return (
            f"{self.kills} kills ({phases}) in {self.runs} runs: all ended within "
            f"{self.slowest:.1f} s of a heartbeat of {HEARTBEAT:.0f} s, "
            f"{len(self.problems)} problems"
        )


def check_lost(run: Launched, rank: int, pid: int) -> list[str]:
    """What is wrong about the end of a run whose `rank` was killed."""
    said = run.sentences()
    problems = []
    if len(said) != 1:
        problems.append(f"{len(said)} sentences: {run.err}")
    elif said[0].groups()[:3] != (str(rank), str(pid), socket.gethostname()):
        problems.append(f"wrong process: {run.err}")
    if STACK.search(run.err + run.out):
        problems.append(f"a C++ stack: {run.err}")
    if run.process.returncode != 70:
        problems.append(f"exit {run.process.returncode}")
    if left := run.left_over():
        problems.append(f"left over: {left}")
    return problems


def alive(pid: int) -> bool:
    """Whether the process is there, and not only its exit status."""
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def campaign(kills: int, seed: int, folder: Path) -> Figures:
    """Kills until `kills` have met, each run with a few of them."""
    rng = random.Random(seed)
    phases: Counter[str] = Counter()
    problems: list[str] = []
    slowest, done, runs = 0.0, 0, 0
    first = Launched(folder / "undisturbed", folder / "cache")
    if first.end() != 0:
        return Figures(0, 0, phases, 0.0, [first.err])
    wanted = (folder / "undisturbed" / "state.json").read_text()
    while done < kills:
        place = folder / f"run{runs}"
        for _ in range(4):
            # A cold cache puts some of the kills into the compilation.
            cache = folder / ("cache" if rng.random() < 0.6 else f"cold{done}")
            run = Launched(place, cache, words=("--pause", "0.03"))
            rank, wait = rng.randrange(2), rng.uniform(0.1, 4.5)
            time.sleep(wait)
            pid = run.pid(rank)
            if pid is None or not alive(pid):
                if (code := run.end()) != 0:
                    problems.append(f"exit {code} without a kill: {run.err}")
                continue
            log = (place / f"{rank}.log").read_text().split("begin")[-1]
            killed = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            if run.end() == 0:  # it was through a moment before
                continue
            slowest = max(slowest, time.monotonic() - killed)
            done += 1
            last = log.split("\n")[-2].split(" ")[0]
            phases[f"after '{last or 'begin'}' of rank {rank}"] += 1
            found = check_lost(run, rank, pid)
            problems += [f"kill {done} at {last}: {p}" for p in found]
        if Launched(place, folder / "cache").end() != 0:
            problems.append(f"run {runs} did not finish")
        elif (place / "state.json").read_text() != wanted:
            problems.append(f"run {runs} ended with other bits")
        runs += 1
        print(f"{done} kills, {len(problems)} problems", flush=True)
    if slowest > HEARTBEAT + 5:
        problems.append(f"an end took {slowest:.1f} s")
    return Figures(done, runs, phases, slowest, problems)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = campaign(options.kills, options.seed, Path(folder))
    for problem in figures.problems:
        print(problem)
    print(figures)
    sys.exit(1 if figures.problems else 0)


if __name__ == "__main__":
    main()
