"""Kills small trainings with SIGKILL until they have finished, and compares the bits.

    python -m tests.training.kill --kills 200 --seed 0 [--family vae]

Each kill comes at a random time of the start, the steps, a save, its commit or the
deletion of an old step; some sittings end at a named crash point instead. Then the
same command goes on. The last line has the figures; the exit status is 1 unless every
run ended as an undisturbed one does.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.training import forked
from tests.training.forked import REPO

SITTING = Path(__file__).with_name("kill_sitting.py")  # what is killed
FAMILIES = ("vae", "classifier", "contrastive")
CRASH_POINTS = (
    "save.begin",
    "save.arrays",
    "save.manifest",
    "save.commit",
    "save.committed",
    "clean.renamed",
)
NUM_STEPS, LOG_EVERY = 100, 5
BEGIN = "begin"  # what a sitting prints once everything is imported


class Figures(NamedTuple):
    """What the kills came to.

    Attributes:
        kills: SIGKILLs that ended a sitting.
        crashes: sittings that ended at a crash point.
        runs: runs that were finished.
        phases: where a kill or crash was, by what lay in the folder.
        lost: committed steps that were not there any more after a kill.
        again: steps that were logged before a kill and computed again after it.
        problems: whatever an undisturbed run does not leave behind.
        seconds: wall clock.
    """

    kills: int = 0
    crashes: int = 0
    runs: int = 0
    phases: Mapping[str, int] = {}
    lost: int = 0
    again: int = 0
    problems: tuple[str, ...] = ()
    seconds: float = 0.0

    def __str__(self) -> str:
        phases = ", ".join(f"{n} {name}" for name, n in sorted(self.phases.items()))
        return (
            f"{self.kills} kills and {self.crashes} crash points ({phases}) in "
            f"{self.runs} runs, {self.kills + self.crashes} restarts, "
            f"{self.seconds:.0f} s: equal {'NO' if self.problems else 'yes'}, "
            f"{self.lost} committed steps lost, {self.again} steps computed again, "
            f"{len(self.problems)} problems"
        )


class Run(NamedTuple):
    """The folder of one run of a family, and the processes that sit on it.

    Attributes:
        folder: where the run writes; what each sitting began at lies beside it.
        family: one of FAMILIES.
        num_steps: where the run ends.
        cache: of compiled programs, shared by all sittings.
    """

    folder: Path
    family: str
    cache: Path
    num_steps: int = NUM_STEPS

    def start(self, crash_at: str = "") -> Any:
        """Starts a sitting; it ends by itself, by a crash point or by a signal."""
        words = ["--family", self.family, "--steps", self.num_steps]
        env = environment(self.cache, crash_at)
        return forked.start([SITTING, self.folder, *words], env)

    def sit(self, crash_at: str = "", *, code: int = 0) -> str:
        """One sitting to its own end; returns what it printed."""
        process = self.start(crash_at)
        out, err = process.communicate(timeout=120)
        if process.returncode != code:
            raise AssertionError(f"exit {process.returncode}, not {code}: {out}{err}")
        return out + err

    @property
    def checkpoints(self) -> Path:
        """The folder of its fit's checkpoints."""
        return self.folder / "checkpoints" / "fit"

    def committed(self) -> int:
        """The newest committed step, by the names of the folders alone; 0 for none."""
        if not self.checkpoints.exists():
            return 0
        names = [path.name for path in self.checkpoints.iterdir()]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def phase(self) -> str:
        """Where a process that is gone was, by what it left."""
        if not self.checkpoints.exists():
            return "in the start"
        ends = {path.suffix for path in self.checkpoints.iterdir()}
        if ".old" in ends:
            return "in a deletion"
        return "in a save" if ".tmp" in ends else "elsewhere"

    def logged(self) -> list[int]:
        """The steps in metrics.jsonl; a half last line does not count."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    def begun(self) -> list[int]:
        """The step that each sitting began at, of those that came so far."""
        path = self.folder.with_suffix(".begun")
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def finished(self) -> bool:
        """Whether the report is there, the last thing that a run writes."""
        return (self.folder / "report.html").exists()

    def leftovers(self) -> list[str]:
        """What no finished run leaves behind."""
        return [
            str(path.relative_to(self.folder))
            for path in sorted(self.folder.rglob("*"))
            if path.suffix in {".tmp", ".old", ".damaged"}
            or "orbax-checkpoint-tmp" in path.name
            or path.name == "lock.json"
        ]

    def compare(self, undisturbed: "Run", *, locked: bool = False) -> list[str]:
        """How this finished run differs from another: nothing, one hopes.

        Args:
            undisturbed: a run of the same family that nobody killed.
            locked: the last sitting was killed after the report was written, and so
                may leave the lock.
        """
        from jaxzoo.training.checkpoint import digest, verify

        problems = [f"damage: {sentence}" for sentence in verify(self.checkpoints)]
        if digest(self.checkpoints) != digest(undisturbed.checkpoints):
            problems.append("another final tree")
        metrics = [(run.folder / "metrics.jsonl") for run in (self, undisturbed)]
        if metrics[0].read_bytes() != metrics[1].read_bytes():
            problems.append("another metrics.jsonl")
        if self.logged() != list(range(LOG_EVERY, self.num_steps + 1, LOG_EVERY)):
            problems.append(f"logged steps {self.logged()}")
        left = [p for p in self.leftovers() if not (locked and p == "lock.json")]
        problems += [f"left behind: {path}" for path in left]
        return [f"{self.folder.name}: {problem}" for problem in problems]


def environment(cache: Path, crash_at: str = "") -> dict[str, str]:
    """What a sitting needs."""
    found = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAXZOO_CRASH_AT": crash_at,
        "PYTHONPATH": f"{REPO}:{os.environ.get('PYTHONPATH', '')}",
    }
    if not crash_at:
        del found["JAXZOO_CRASH_AT"]
    return found


def campaign(
    family: str,
    kills: int,
    seed: int,
    folder: Path,
    *,
    kills_per_run: int = 8,
    crash_share: float = 0.15,
) -> Figures:
    """Kills runs of one family until `kills` sittings have ended by SIGKILL.

    Args:
        family: one of FAMILIES.
        kills: how many.
        seed: of the times.
        folder: where the runs lie, empty.
        kills_per_run: about how often one run is killed.
        crash_share: of sittings that are given a crash point, on top of the kills.
    """
    rng = random.Random(f"{family} {seed}")
    began = time.monotonic()
    cache = folder / "cache"
    undisturbed = Run(folder / "undisturbed", family, cache)
    started = time.monotonic()
    process = undisturbed.start()  # compiles, and fills the cache
    _wait_for_begin(process)
    import_time = time.monotonic() - started
    process.communicate()
    fit_time = time.monotonic() - started - import_time
    problems = undisturbed.compare(undisturbed)

    phases: Counter[str] = Counter()
    done = crashes = runs = lost = computed_again = 0
    while done < kills:
        run = Run(folder / f"run{runs}", family, cache)
        left = min(kills_per_run, kills - done)
        locked = False
        while not run.finished():
            commit, sittings = run.committed(), len(run.begun())
            logged = max(run.logged(), default=0)
            crash_at = ""
            if left > 0 and rng.random() < crash_share:
                crash_at = f"{rng.choice(CRASH_POINTS)}:{rng.randint(1, 4)}"
            process = run.start(crash_at)
            if left > 0 and not crash_at:
                # A tenth of the kills come in the start, the others over the rest.
                if rng.random() < 0.1:
                    time.sleep(rng.uniform(0, import_time))
                else:
                    _wait_for_begin(process)
                    share = 1 - commit / run.num_steps
                    most = fit_time * min(1.0, 0.2 + 2 * share / (left + 1))
                    time.sleep(rng.uniform(0, most))
                process.send_signal(signal.SIGKILL)
            out, err = process.communicate(timeout=120)
            if process.returncode == -signal.SIGKILL:
                done, left = done + 1, left - 1
                began_a_step = len(run.begun()) > sittings
                phases[run.phase() if began_a_step else "in the start"] += 1
                locked = run.finished()
            elif process.returncode == 137 and crash_at:
                crashes += 1
                phases[run.phase()] += 1
            elif process.returncode != 0:
                problems.append(f"{run.folder.name}: exit {process.returncode}: {err}")
                break
            if len(run.begun()) > sittings:
                lost += max(0, commit - run.begun()[-1])
                computed_again += max(0, logged - run.begun()[-1])
        else:
            problems += run.compare(undisturbed, locked=locked)
        runs += 1
        shutil.rmtree(run.folder)
    seconds = time.monotonic() - began
    return Figures(
        done, crashes, runs, phases, lost, computed_again, tuple(problems), seconds
    )


def total(parts: list[Figures]) -> Figures:
    """The figures of several campaigns, one after the other."""
    return Figures(
        kills=sum(part.kills for part in parts),
        crashes=sum(part.crashes for part in parts),
        runs=sum(part.runs for part in parts),
        phases=sum((Counter(part.phases) for part in parts), Counter()),
        lost=sum(part.lost for part in parts),
        again=sum(part.again for part in parts),
        problems=tuple(problem for part in parts for problem in part.problems),
        seconds=sum(part.seconds for part in parts),
    )


def _wait_for_begin(process: Any) -> None:
    while (line := process.stdout.readline()) and line.strip() != BEGIN:
        pass


def main() -> None:
    """The command line: a campaign."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", choices=FAMILIES)
    options = parser.parse_args()
    families = [options.family] if options.family else FAMILIES
    parts = []
    for index, family in enumerate(families):
        kills = (options.kills + len(families) - 1 - index) // len(families)
        with tempfile.TemporaryDirectory() as folder:
            parts.append(campaign(family, kills, options.seed, Path(folder)))
        print(f"{family}: {parts[-1]}", flush=True)
    figures = total(parts)
    for problem in figures.problems:
        print(problem)
    print(figures)
    sys.exit(1 if figures.problems or figures.lost else 0)


if __name__ == "__main__":
    main()
