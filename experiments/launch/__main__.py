"""Writes launch files for TPU pods and GPU clusters.

    python -m experiments.launch gcloud --accelerator v5e:4x4 -- COMMAND
    python -m experiments.launch xpk --accelerator v6e:16x16 -- COMMAND
    python -m experiments.launch jobset --runs gs://B/runs --revision TAG -- COMMAND
    python -m experiments.launch slurm --accelerator h100:8x4 -- COMMAND
    python -m experiments.launch --write    the examples beside this file

COMMAND is the same as on a laptop: python -m experiments.TOPIC.SLUG and its words. The
file is printed; nothing is started.
"""

import sys
from pathlib import Path

import tyro

from experiments.launch.hardware import HardwareError
from experiments.launch.render import LAUNCHERS, Job, JobError, render

HERE = Path(__file__).resolve().parent
COMMAND = ("python", "-m", "experiments.vae.iwae", "full")
EXAMPLES = {
    "gcloud.sh": ("gcloud", Job(COMMAND, accelerator="v5e:4x4")),
    "xpk.sh": ("xpk", Job(COMMAND, accelerator="v6e:16x16")),
    "jobset.yaml": (
        "jobset",
        Job(COMMAND, "v5e:4x4", runs="gs://my-bucket/runs", revision="v0.1.0"),
    ),
    "slurm.sbatch": ("slurm", Job(COMMAND, accelerator="h100:8x4")),
}


def main(argv: list[str]) -> int:
    """The command line: 0, or 2 and one sentence for a job that cannot be written."""
    if argv == ["--write"]:
        for file, (launcher, job) in EXAMPLES.items():
            (HERE / file).write_text(render(launcher, job))
        return 0
    cut = argv.index("--") if "--" in argv else len(argv)
    words, command = argv[:cut], tuple(argv[cut + 1 :])
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        print("python -m experiments.launch gcloud --help lists the flags.")
        return 0
    try:
        if words[0] not in LAUNCHERS:
            known = ", ".join(LAUNCHERS)
            raise JobError(f"no launcher {words[0]!r}, there are {known}.")
        job = tyro.cli(
            tyro.conf.OmitArgPrefixes[Job],
            default=Job(command or COMMAND),
            args=words[1:],
            prog=f"python -m experiments.launch {words[0]}",
        )
        print(render(words[0], job), end="")
    except (JobError, HardwareError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
