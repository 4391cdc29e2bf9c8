"""Kills a process of a training in several of them, at random, until it has finished.

    python -m tests.training.hosts_kill --kills 20 --seed 0

A kill comes at a random time of the start, the compilation, the steps, a save or a
restore, to a random rank. Then the same command goes on. The last line has the figures;
the exit status is 1 unless every run ended as an undisturbed one does.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.training.test_hosts import NET, Net, children

WORDS = ("--reproducible", "--mesh", "fsdp=4")
HEARTBEAT, EXIT_CRASHED = 5, 70
LONGEST = 9.0  # seconds of an undisturbed sitting, about


def plant(tree: Path) -> Path:
    """The experiment, where `python -m experiments.toy.net` finds it."""
    package = tree / "experiments" / "toy"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "net.py").write_text(NET)
    return tree


def main() -> int:
    """The command line: exit status 0, or 1 where something was not as it should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, began = random.Random(options.seed), time.monotonic()
    kills = runs = sittings = 0
    slowest, problems = 0.0, []
    with tempfile.TemporaryDirectory() as folder:
        net = Net(plant(Path(folder) / "tree"), Path(folder))
        net(2, 2, *WORDS, run="whole")
        whole = net.digest("whole"), net.rows("whole")
        while kills < options.kills:
            run, runs = f"run{runs}", runs + 1
            while True:
                process = net.start(2, 2, *WORDS, run=run, SLOW="0.05", SAVE_EVERY="0")
                sittings += 1
                time.sleep(draw.uniform(0.3, LONGEST) if kills < options.kills else 0)
                alive = children(process.pid) if process.poll() is None else []
                if kills < options.kills and alive:
                    os.kill(draw.choice(alive), signal.SIGKILL)
                    kills += 1
                    killed = time.monotonic()
                    out, err = process.communicate(timeout=60)
                    slowest = max(slowest, time.monotonic() - killed)
                    if process.returncode == 0:  # it had finished meanwhile
                        break
                    if process.returncode != EXIT_CRASHED or "SIGKILL" not in err:
                        problems.append(f"exit {process.returncode}: {out}{err}")
                    if "stack trace" in err or "Traceback" in err:
                        problems.append(err)
                    continue
                out, err = process.communicate(timeout=120)
                if process.returncode:
                    problems.append(f"exit {process.returncode}: {out}{err}")
                break
            if (net.digest(run), net.rows(run)) != whole:
                problems.append(f"{run} ended with other bits")
    for problem in problems:
        print(problem)
    print(
        f"{kills} kills in {runs} runs of 2 processes, {sittings} sittings, "
        f"{time.monotonic() - began:.0f} s: equal {'NO' if problems else 'yes'}, "
        f"slowest end of all {slowest:.1f} s, {len(problems)} problems"
    )
    return 1 if problems or slowest > HEARTBEAT + 5 else 0


if __name__ == "__main__":
    sys.exit(main())
