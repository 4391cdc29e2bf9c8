"""Stops small trainings by signals at random steps, and compares the bits.

    python -m tests.training.signals --count 50 --seed 0 [--processes 2]

SIGTERM, Ctrl-C and Ctrl-C twice take turns; then the same command goes on. More than
one process are under the launcher, which gets the signals. The last line has the
figures; the exit status is 1 unless each sitting ended in time, with what it had
reached saved, and every run as an undisturbed one does.
"""

import argparse
import dataclasses
import itertools
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.training import forked, kill

KINDS = {"SIGTERM": 75, "SIGINT": 130, "SIGINT twice": 130}  # exit status
TWICE = "SIGINT twice"
AT_ONCE = 1.0  # seconds from a second Ctrl-C to the end
PAUSE = 0.006  # seconds that a batch takes to make
MOST_PROBLEMS = 10


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = kill.NUM_STEPS
    timed: bool = False  # tells how long a first save takes


PRESETS = {"full": Config()}


class Pace(NamedTuple):
    """Seconds that things take in an undisturbed run.

    Attributes:
        compilation: the first call.
        call: a later one, of LOG_EVERY steps.
        save: the first save of a process.
        end: from the experiment's end to that of all processes.
    """

    compilation: float
    call: float
    save: float
    end: float

    def allowed(self, kind: str, compiling: bool) -> float:
        """From the last signal to the end of all processes."""
        if kind == TWICE:
            return AT_ONCE
        call = self.compilation if compiling else self.call
        return 2 * (self.save + call) + 1 + self.end


class Run(kill.Run):
    """As of `kill`, with the number of processes for the family."""

    def start(self, crash_at: str = "", *words: str) -> Any:
        """Starts a sitting; it ends by itself or by a signal."""
        command = [__file__, "--sit", str(self.folder)]
        command += ["--steps", str(self.num_steps), *words]
        env = kill.environment(self.cache, crash_at)
        if self.family == "1":
            return forked.start(command, env)
        launcher = [sys.executable, "-m", "jaxzoo.training.launch", "--local"]
        return subprocess.Popen(
            [*launcher, self.family, "--", sys.executable, *command],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def times(self) -> list[tuple[int, float]]:
        """Step and moment at which each batch was asked for, of all sittings so far."""
        path = self.folder.with_suffix(".times")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        words = [line.split() for line in lines if line.endswith("\n")]
        return [(int(step), float(moment)) for step, moment in words]

    def pace(self) -> Pace:
        """One sitting from the start to the end, with a watch."""
        process = self.start("", "--timed")
        out, err = process.communicate(timeout=120)
        ended = time.monotonic()
        if process.returncode != 0:
            raise AssertionError(f"exit {process.returncode}: {out}{err}")
        asked = [moment for step, moment in self.times() if step % kill.LOG_EVERY == 0]
        compilation, *calls = [b - a for a, b in itertools.pairwise(asked)]
        save, end = map(float, self.folder.with_suffix(".watch").read_text().split())
        return Pace(compilation, statistics.median(calls), save, ended - end)

    def wait_for(self, step: int, process: Any) -> None:
        """Waits until this sitting has asked for the batch of a step."""
        before = len(self.times())
        while process.poll() is None:
            if any(t >= step for t, _ in self.times()[before:]):
                return
            time.sleep(0.005)


class Figures(NamedTuple):
    """What the signals came to.

    Attributes:
        signals: sittings that a signal ended, by kind.
        runs: runs that were finished.
        slowest: most seconds from the last signal to the end, by kind.
        pace: of the undisturbed run.
        lost: steps computed again: after one signal those whose batch was asked for,
            after two those that were committed.
        noisy: ends by a second Ctrl-C with the stack of a thread or of Python's end,
            which is ugly and hurts nothing; after one signal it is a problem.
        problems: whatever differs from the promise.
        seconds: wall clock.
    """

    signals: Mapping[str, int]
    runs: int
    slowest: Mapping[str, float]
    pace: Pace
    lost: int
    noisy: int
    problems: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        kinds = ", ".join(
            f"{number} {kind} (ended in {self.slowest[kind]:.2f} s or less, allowed "
            f"{self.pace.allowed(kind, False):.2f})"
            for kind, number in self.signals.items()
        )
        return (
            f"{kinds}; {self.runs} runs, {self.seconds:.0f} s: equal "
            f"{'NO' if self.problems else 'yes'}, {self.lost} steps lost, {self.noisy} "
            f"noisy ends after Ctrl-C twice, "
            f"{len(self.problems)} problems"
        )


def campaign(
    processes: int, count: int, seed: int, folder: Path, *, patience: float = 0.0
) -> Figures:
    """Signals runs until `count` sittings have ended by one.

    Args:
        processes: of each run; more than one under the launcher.
        count: how many signals, or pairs of them.
        seed: of the steps and the times.
        folder: where the runs lie, empty.
        patience: more seconds for each end, for a machine with other work.
    """
    rng = random.Random(f"{processes} {seed}")
    began = time.monotonic()
    undisturbed = Run(folder / "undisturbed", str(processes), folder / "cache")
    pace = undisturbed.pace()
    problems = undisturbed.compare(undisturbed)
    done, slowest = Counter[str](), dict.fromkeys(KINDS, 0.0)
    runs = lost = noisy = 0
    while done.total() < count and len(problems) < MOST_PROBLEMS:
        run = undisturbed._replace(folder=folder / f"run{runs}")
        left = rng.randint(1, 4)
        while left and done.total() < count and run.committed() < run.num_steps - 30:
            kind = list(KINDS)[done.total() % len(KINDS)]
            ended = _signalled(run, kind, rng)
            found = list(ended.problems)
            if ended.seconds > pace.allowed(kind, ended.compiling) + patience:
                found.append(f"the end took {ended.seconds:.2f} s of {pace}")
            problems += [f"{run.folder.name}, {kind}: {problem}" for problem in found]
            if not ended.compiling:
                slowest[kind] = max(slowest[kind], ended.seconds)
            done[kind], left = done[kind] + 1, left - 1
            lost, noisy = lost + ended.lost, noisy + ended.noisy
        run.sit()
        problems += run.compare(undisturbed)
        runs += 1
        shutil.rmtree(run.folder)
    seconds = time.monotonic() - began
    return Figures(done, runs, slowest, pace, lost, noisy, tuple(problems), seconds)


class _Ended(NamedTuple):
    seconds: float
    compiling: bool
    noisy: bool
    lost: int
    problems: list[str]


def _signalled(run: Run, kind: str, rng: random.Random) -> _Ended:
    """One sitting that a signal ends at a random step, and what is wrong about it."""
    from jaxzoo.training.checkpoint import verify

    commit = run.committed()
    process = run.start()
    # Few signals may meet the compilation, which a sitting begins with.
    first = commit if rng.random() < 0.1 else commit + 2 * kill.LOG_EVERY
    run.wait_for(rng.randrange(first, run.num_steps - 15), process)
    time.sleep(rng.uniform(0, kill.LOG_EVERY * PAUSE))
    reached = run.times()[-1][0]
    process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGINT)
    if kind == TWICE:
        time.sleep(rng.uniform(0.01, 0.15))
        process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    out, err = process.communicate(timeout=120)
    seconds = time.monotonic() - sent
    problems = []
    # Where the second Ctrl-C meets Python's own end, that is by the signal itself: a
    # shell shows both as 130.
    codes = {KINDS[kind], -signal.SIGINT} if kind == TWICE else {KINDS[kind]}
    if process.returncode not in codes:
        problems.append(f"exit {process.returncode}: {out}{err}")
    noisy = "Traceback" in err
    if noisy and kind != TWICE:
        problems.append(f"a traceback: {err}")
    found = run.committed()
    if kind != TWICE and [found] != run.logged()[-1:]:
        problems.append(f"logged to {run.logged()[-1:]}, saved to {found}")
    lost = max(0, (commit if kind == TWICE else reached + 1) - found)
    if lost:
        problems.append(f"saved to {found}, and {reached} was reached from {commit}")
    damaged = verify(run.checkpoints) if run.checkpoints.exists() else []
    compiling = reached < commit + 2 * kill.LOG_EVERY
    return _Ended(seconds, compiling, noisy, lost, problems + damaged)


def main(config: Config, run: Any) -> Any:
    """The experiment that is stopped: a noisy quadratic under Adam."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from jaxzoo.training.checkpoint import Checkpoints
    from jaxzoo.training.loop import train
    from jaxzoo.training.record import Claim, Report
    from jaxzoo.training.step import init_state, update_step

    def loss(params, key, x):
        noise = 0.1 * jax.random.normal(key, params["w"].shape)
        value = jnp.mean((x @ params["w"] + noise[:1]) ** 2)
        return value, {"loss": value}

    def rows(t, part):
        if jax.process_index() == 0:
            with open(run.folder.with_suffix(".times"), "a") as file:
                file.write(f"{t} {time.monotonic()}\n")
        time.sleep(PAUSE)
        x = np.random.default_rng(t).normal(size=(16, 8)).astype(np.float32)
        return x[part]

    optimizer = optax.adam(1e-2)
    state = init_state(jax.random.key(0), {"w": jnp.ones((8, 4))}, optimizer)
    began = time.monotonic()
    if config.timed:
        with Checkpoints(run.folder.with_name("apart")) as checkpoints:
            checkpoints.save(0, jax.tree.map(np.asarray, {"w": state["params"]["w"]}))
    saved = time.monotonic() - began
    train(
        run, "fit", update_step(loss, optimizer), state, rows, batch_rows=16,
        num_steps=config.steps, log_every=kill.LOG_EVERY, save_every=0.5,
    )  # fmt: skip
    value = float(run.history("fit")["loss"][-1])
    if config.timed and jax.process_index() == 0:
        watch = f"{saved} {time.monotonic()}"
        run.folder.with_suffix(".watch").write_text(watch)
    return Report([Claim("the loss is finite", value, "finite", True)], {"loss": value})


def _command() -> None:
    """The command line: a campaign, or (with --sit) one sitting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=kill.NUM_STEPS, help="with --sit")
    parser.add_argument("--timed", action="store_true", help="with --sit")
    parser.add_argument("--sit", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sit:
        from jaxzoo.training.command import experiment

        words = ["--run-dir", str(options.sit), "--steps", str(options.steps)]
        experiment(main, PRESETS, words + ["--timed"] * options.timed)
    with tempfile.TemporaryDirectory() as folder:
        figures = campaign(options.processes, options.count, options.seed, Path(folder))
    for problem in figures.problems:
        print(problem)
    print(figures)
    sys.exit(1 if figures.problems else 0)


if __name__ == "__main__":
    _command()
