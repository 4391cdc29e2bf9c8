"""Launch files: as they run, and run again, with stand-ins for their tools."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.launch.__main__ import COMMAND, EXAMPLES
from experiments.launch.render import Job, host_script, render

ASKED = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "RUNS": "gs://b/r s"}
ASKED |= {"REVISION": "v1", "POLL": "0", "SLURM_JOB_ID": "7"}


def example(file: str) -> str:
    launcher, job = EXAMPLES[file]
    return render(launcher, job)


@pytest.mark.parametrize("file", ["gcloud.sh", "xpk.sh", "slurm.sbatch"])
def test_what_is_not_given_is_asked_for(file):
    """No call before every variable is there; the sentence names the missing one."""
    text = example(file)
    asked = re.findall(r"^: \"\$\{(\w+):\?", text, re.M)
    assert "RUNS" in asked and "REVISION" in asked
    for missing in asked:
        given = {name: ASKED[name] for name in asked if name != missing}
        done = run(text, {**given, "PATH": "/usr/bin:/bin"})
        assert done.returncode != 0
        assert f"set {missing} to" in done.stderr


def run(text: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", text]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def stage(tmp_path):
    """`stage(file, **tools)` runs an example with stand-ins for its tools.

    Each call of a stand-in is a line of `calls`; `answers` holds one exit status a run.
    """

    def play(file: str, answers: list[int], **tools: str):
        for name, body in {"sleep": ":", **tools}.items():
            tool = tmp_path / name
            call = f'printf "%s\\n" "{name} ${{*//$\'\\n\'/;}}" >> calls\n'
            tool.write_text(f"#!/bin/bash\n{call}{body}\n")
            tool.chmod(0o755)
        (tmp_path / "answers").write_text("".join(f"{answer}\n" for answer in answers))
        (tmp_path / "calls").write_text("")
        path = f"{tmp_path}:/usr/bin:/bin"
        text = f"cd {tmp_path}\n{example(file)}"
        done = run(text, {**ASKED, "PATH": path, "HOME": str(tmp_path)})
        return done, (tmp_path / "calls").read_text().splitlines()

    return play


NEXT = "answer=$(head -1 answers); sed -i 1d answers; exit ${answer:-99}"
GCLOUD = f"""case "$*" in
  *queued-resources\\ describe*) cat state 2>/dev/null || exit 1 ;;
  *tpu-vm\\ describe*) [ -e state ] && [ ! -e lost ] && echo READY || echo PREEMPTED ;;
  *\\ create\\ *) echo ACTIVE > state; rm -f lost ;;
  *\\ delete\\ *) rm -f state ;;
  *\\ ssh\\ *) {NEXT} ;;
esac"""


@pytest.mark.parametrize(
    ("answers", "status", "starts"),
    [
        ([0], 0, 1),
        ([1], 1, 1),
        ([2], 2, 1),
        ([75, 0], 0, 2),
        ([75] * 30 + [0], 0, 31),
        ([70, 137, 75, 255, 1], 1, 5),
        ([70] * 40, 70, 21),
    ],
)
def test_gcloud_starts_again_what_was_not_done(stage, answers, status, starts):
    done, calls = stage("gcloud.sh", answers, gcloud=GCLOUD)
    assert done.returncode == status
    assert sum(" ssh " in call for call in calls) == starts
    assert sum(" create " in call for call in calls) == 1


def test_gcloud_asks_for_another_slice_when_the_first_was_taken(stage):
    """1 is also what gcloud says of a slice that is gone: then nothing was measured."""
    taken = GCLOUD.replace(
        NEXT, f"[ -e once ] || {{ touch once lost; echo SUSPENDED > state; }}; {NEXT}"
    )
    done, calls = stage("gcloud.sh", [1, 0], gcloud=taken)
    assert done.returncode == 0
    verbs = [word for call in calls for word in call.split() if word in VERBS]
    assert verbs == ["create", "ssh", "delete", "create", "ssh"]


VERBS = {"create", "delete", "ssh"}


@pytest.mark.parametrize(
    ("answer", "restarts", "queued"),
    [
        (0, 0, 0),
        (1, 0, 0),
        (2, 0, 0),
        (75, 99, 1),
        (70, 0, 1),
        (137, 19, 1),
        (70, 20, 0),
    ],
)
def test_slurm_queues_again_what_was_not_done(
    stage, monkeypatch, answer, restarts, queued
):
    monkeypatch.setitem(ASKED, "SLURM_RESTART_COUNT", str(restarts))
    done, calls = stage("slurm.sbatch", [answer], srun=NEXT, scontrol=":")
    assert done.returncode == answer
    assert [call for call in calls if call.startswith("scontrol")] == (
        ["scontrol requeue 7"] * queued
    )


def test_xpk_gets_the_command_in_one_line(stage):
    done, calls = stage("xpk.sh", [0], xpk='printf "%s" "${@: -1}" > last')
    assert done.returncode == 0, done.stderr
    assert any("--env=RUNS=gs://b/r s" in call for call in calls)
    job = EXAMPLES["xpk.sh"][1]
    joined = host_script(job).replace("\n", "; ")
    assert calls[-1].endswith(f"--command={joined}")


@pytest.mark.parametrize("joined", ["\n", "; "])
def test_the_host_runs_the_command_and_reports_its_status(tmp_path, joined):
    """Lines or semicolons: the same words reach Python, and its status comes back."""
    job = Job(COMMAND, name=f"t{os.getpid()}")
    place = Path(f"/tmp/jaxzoo-{os.getuid()}-{job.label}")
    for name in ("git", "uv"):
        (tmp_path / name).write_text("#!/bin/bash\nexit 0\n")
        (tmp_path / name).chmod(0o755)
    python = place / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    told = '"$@" "${JAXZOO_DISTRIBUTED-none}" "$JAX_COMPILATION_CACHE_DIR"'
    python.write_text(f"#!/bin/bash\nprintf '%s\\n' {told}\nexit 75\n")
    python.chmod(0o755)
    env = {**ASKED, "REPOSITORY": "r", "PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": "/"}
    try:
        done = run(host_script(job).replace("\n", joined), env)
        assert done.returncode == 75, done.stderr
        assert done.stdout.splitlines() == [
            *("-m", "jaxzoo.training.launch", "--", ".venv/bin/python"),
            *(*COMMAND[1:], "--run-dir", f"{ASKED['RUNS']}/{job.label}"),
            *("auto", f"{ASKED['RUNS']}/compile-cache"),
        ]
        named = {**env, "JAXZOO_COORDINATOR": "host-0:1"}  # auto would win over it
        done = run(host_script(job).replace("\n", joined), named)
        assert done.stdout.splitlines()[-2] == "none"
        (tmp_path / "git").write_text("#!/bin/bash\nexit 1\n")
        # No verdict on the claims, so not 1.
        assert run(host_script(job).replace("\n", joined), env).returncode == 70
    finally:
        shutil.rmtree(place)
