"""Launch files for a pod, all around one script that every host runs.

gcloud, XPK, JobSet and SLURM differ in how they reach the hosts and in how they start
a run again; what a host does is `host_script` in each.

Exit status of the experiment, and what every launcher does with it:
    0 and 1    the claims were measured: done, also where one does not hold
    2, 130     a wrong command, Ctrl-C: a person has to look
    75         told to stop and saved a checkpoint: started again, always
    others     a crash: started again, at most `max_restarts` times
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable

import tyro

from experiments.launch.hardware import Hardware, hardware
from experiments.launch.templates import GCLOUD, JOBSET, SLURM, XPK

__all__ = ["LAUNCHERS", "Job", "JobError", "host_script", "render"]

UV = "0.13.9"
PORT = 8476  # of the coordinator, on host 0


class JobError(ValueError):
    """The job cannot be written as asked; the message says what to give."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One experiment on one slice; what is empty is asked of the shell at start."""

    command: tyro.conf.Suppress[tuple[str, ...]]
    """The command as on a laptop: python -m experiments.TOPIC.SLUG and its words."""
    accelerator: str = "v5e:4x4"
    """Such as v6e:16x16, or h100:8x4 for 8 GPUs on each of 4 hosts."""
    name: str = ""
    """Name of the job and of its folder below --runs; the slug if empty."""
    runs: str = ""
    """Where run folders lie: gs://BUCKET/FOLDER, or a folder that all hosts see."""
    repository: str = "https://github.com/jaxzoo/jaxzoo"
    """The git repository that every host installs."""
    revision: str = ""
    """The commit or tag that every host installs."""
    project: str = ""
    """The Google Cloud project."""
    zone: str = ""
    """The Google Cloud zone."""
    cluster: str = ""
    """The cluster that XPK talks to."""
    image: str = "python:3.13"
    """The container image, with bash, git and curl."""
    spot: bool = True
    """Ask gcloud for a slice that may be taken away, at a lower price."""
    max_restarts: int = 20
    """How often a crashed run is started again; XPK counts preemptions too."""
    grace: int = 300
    """Seconds between the request to stop and the kill; a checkpoint has to fit in."""
    hours: int = 24
    """How long SLURM lets the run have the nodes before it queues it again."""

    @property
    def label(self) -> str:
        """The name, by default the experiment's slug."""
        return self.name or self.command[2].rpartition(".")[2].replace("_", "-")

    @property
    def hardware(self) -> Hardware:
        """The slice that `accelerator` names."""
        return hardware(self.accelerator)


def host_script(job: Job) -> str:
    """What every host runs; RUNS, REPOSITORY and REVISION are in its environment.

    One simple command per line, without comments: XPK joins them by semicolons.
    """
    extra = "tpu" if job.hardware.tpu else "cuda13"
    words = shlex.join((*job.command[1:], "--run-dir"))
    return "\n".join(
        (
            # A failed download says nothing about the claims: it counts as a crash. A
            # request to stop in between has nothing to save.
            "set -eo pipefail",
            "trap 'exit 70' ERR",
            "trap 'exit 75' TERM",
            'export PATH="$HOME/.local/bin:$PATH"',
            "command -v uv >/dev/null"
            f" || curl -LsSf https://astral.sh/uv/{UV}/install.sh | sh",
            f'git init --quiet "/tmp/jaxzoo-$UID-{job.label}"',
            f'cd "/tmp/jaxzoo-$UID-{job.label}"',
            'git fetch --quiet --depth 1 "$REPOSITORY" "$REVISION"',
            "git checkout --quiet --force FETCH_HEAD",
            "uv venv --quiet --allow-existing --python 3.13 .venv",
            f'uv pip install --quiet --editable ".[{extra},gcs]"',
            # jax finds the other hosts, unless the launcher names them.
            '[ -n "${JAXZOO_COORDINATOR:-}" ] || export JAXZOO_DISTRIBUTED=auto',
            'export JAX_COMPILATION_CACHE_DIR="$RUNS/compile-cache"',
            # exec: the signal of the launcher reaches the run, not a shell around it.
            "exec .venv/bin/python -m jaxzoo.training.launch --"
            f' .venv/bin/python {words} "$RUNS/{job.label}"',
        )
    )


def render(launcher: str, job: Job) -> str:
    """The launch file of one of `LAUNCHERS` for a job.

    Raises:
        JobError: a field is missing that the file cannot ask of a shell.
        HardwareError: there is no such slice, or not through this launcher.
    """
    if launcher not in LAUNCHERS:
        known = ", ".join(LAUNCHERS)
        raise JobError(f"no launcher {launcher!r}, there are {known}.")
    _check(job)
    return LAUNCHERS[launcher](job)


def _check(job: Job) -> None:
    words = job.command
    if words[:2] != ("python", "-m") or not _MODULE.fullmatch(" ".join(words[2:3])):
        raise JobError(
            f"the command is {shlex.join(words)!r}, expected python -m "
            "experiments.TOPIC.SLUG and its words after --."
        )
    if any(word.split("=")[0] == "--run-dir" for word in words):
        raise JobError(
            "the command has a --run-dir, but the run folder is NAME below --runs."
        )
    if not _LABEL.fullmatch(job.label):
        raise JobError(
            f"--name {job.label!r}: expected at most 40 lowercase letters, digits and "
            "dashes, beginning with a letter."
        )
    for field, least in (("max_restarts", 0), ("grace", 60), ("hours", 1)):
        if getattr(job, field) < least:
            flag = field.replace("_", "-")
            raise JobError(f"--{flag} {getattr(job, field)}: expected {least} or more.")


_MODULE = re.compile(r"experiments(\.[a-z]\w*){2}")
_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # what every launcher accepts


def _gcloud(job: Job) -> str:
    accelerator, runtime = job.hardware.gcloud()
    return _fill(
        GCLOUD,
        needs=_needs(job, "project", "zone", "runs", "repository", "revision"),
        name=job.label,
        accelerator=accelerator,
        runtime=runtime,
        spot=" --spot" if job.spot else "",
        host=host_script(job),
        max_restarts=job.max_restarts,
    )


def _xpk(job: Job) -> str:
    return _fill(
        XPK,
        needs=_needs(
            job, "project", "zone", "cluster", "runs", "repository", "revision"
        ),
        name=job.label,
        tpu_type=job.hardware.xpk(),
        image=shlex.quote(job.image),
        host=host_script(job),
        max_restarts=job.max_restarts,
        grace=job.grace,
    )


def _jobset(job: Job) -> str:
    for field in ("runs", "revision"):
        if not getattr(job, field):
            raise JobError(f"jobset needs --{field}: YAML cannot ask a shell for it.")
    part = job.hardware
    return _fill(
        JOBSET,
        name=job.label,
        # A slice is one node pool, and no other set may share it.
        annotations=_EXCLUSIVE if part.tpu else "",
        hosts=part.hosts,
        selector=_indent(_selector(part), 16),
        image=json.dumps(job.image),
        env=_indent(_environment(job, part), 20),
        host=_indent(host_script(job), 22),
        resource="google.com/tpu" if part.tpu else "nvidia.com/gpu",
        per_host=part.per_host,
        max_restarts=job.max_restarts,
        grace=job.grace,
    )


def _selector(part: Hardware) -> str:
    labels = {"gke-accelerator": part.gke}
    if part.tpu:
        labels = {"gke-tpu-accelerator": part.gke, "gke-tpu-topology": part.topology}
    return "\n".join(f"cloud.google.com/{name}: {labels[name]}" for name in labels)


def _environment(job: Job, part: Hardware) -> str:
    values = {"RUNS": job.runs, "REPOSITORY": job.repository, "REVISION": job.revision}
    if not part.tpu:
        # jax finds the hosts of a TPU slice; for GPUs it would ask the cluster's API,
        # which needs a package and a permission, for what is known here.
        values["JAXZOO_COORDINATOR"] = f"{job.label}-host-0-0.{job.label}:{PORT}"
        values["JAXZOO_NUM_PROCESSES"] = str(part.hosts)
    lines = [f"- name: {n}\n  value: {json.dumps(v)}" for n, v in values.items()]
    return "\n".join(lines if part.tpu else [*lines, _PROCESS_ID])


_EXCLUSIVE = """  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
"""
_PROCESS_ID = """- name: JAXZOO_PROCESS_ID
  valueFrom:
    fieldRef:
      fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']"""


def _slurm(job: Job) -> str:
    part = job.hardware
    if part.tpu:
        raise JobError(
            f"slurm starts GPU nodes, not {part.family}: take h100:8x4, say."
        )
    return _fill(
        SLURM,
        needs=_needs(job, "runs", "repository", "revision"),
        name=job.label,
        hosts=part.hosts,
        per_host=part.per_host,
        devices=",".join(str(index) for index in range(part.per_host)),
        hours=job.hours,
        grace=job.grace,
        host=host_script(job),
        max_restarts=job.max_restarts,
    )


LAUNCHERS: dict[str, Callable[[Job], str]] = {
    "gcloud": _gcloud,
    "xpk": _xpk,
    "jobset": _jobset,
    "slurm": _slurm,
}


def _needs(job: Job, *fields: str) -> str:
    """Shell lines that set what the job names and ask for what it leaves open."""

    def line(field: str) -> str:
        variable, value = field.upper(), getattr(job, field)
        if value:
            return f"{variable}={shlex.quote(value)}"
        return f': "${{{variable}:?set {variable} to {_MEANING[field]}}}"'

    return "\n".join(line(field) for field in fields)


_MEANING = {
    "project": "your Google Cloud project",
    "zone": "a zone with this accelerator",
    "cluster": "the cluster of xpk cluster create",
    "runs": "gs://BUCKET/FOLDER or to a folder that all hosts see",
    "revision": "the commit or tag that the hosts install",
}


def _indent(text: str, width: int) -> str:
    return "\n".join(" " * width + line for line in text.splitlines())


def _fill(template: str, **values: object) -> str:
    # One pass: a value that holds @{...} itself stays as it is.
    return re.sub(r"@\{(\w+)\}", lambda found: str(values[found[1]]), template)
