"""Several processes train one model: the same bits, one writer, one end.

The model is small; what takes the time is starting processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxzoo.training.checkpoint import digest, verify

REPO = Path(__file__).resolve().parents[2]

NET = '''"""Net: a small network is fitted.

Claims: the loss falls.
"""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxzoo.data.source import Source, batch_indices, take
from jaxzoo.training.command import experiment
from jaxzoo.training.loop import train
from jaxzoo.training.mesh import local
from jaxzoo.training.record import Claim, Report
from jaxzoo.training.step import init_state, update_step


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 24
    learning_rate: float = 0.01


PRESETS = {"full": Config()}
X = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
SOURCE = Source({"x": X, "id": np.arange(40)})


def loss(params, key, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"])
    noise = 0.1 * jax.random.normal(key, hidden.shape)
    value = jnp.mean(((hidden + noise) @ params["out"] - batch["x"]) ** 2)
    return value, {"loss": value, "ids": jnp.mean(batch["id"] * 1.0)}


def rows(t, part):
    time.sleep(float(os.environ.get("SLOW", "0")))
    ids = batch_indices(0, t, num_examples=40, batch_size=16)[part]
    if os.environ.get("TELL"):
        with open(f"{os.environ['TELL']}-{jax.process_index()}", "a") as file:
            print(t, *ids, file=file)
    return take(SOURCE, ids)


def main(config, run):
    optimizer = optax.adamw(config.learning_rate)

    def start():
        keys = jax.random.split(jax.random.key(1), 3)
        params = {
            "in": jax.random.normal(keys[0], (32, 64)) / 6,
            "out": jax.random.normal(keys[1], (64, 32)) / 8,
        }
        return init_state(keys[2], params, optimizer)

    step = update_step(loss, optimizer, reproducible=run.options.reproducible)
    state = train(
        run, "fit", step, start, rows, num_steps=config.steps, log_every=4,
        save_every=float(os.environ.get("SAVE_EVERY", "1000")), show="loss",
        batch_rows=16,
    )
    history = run.history("fit")["loss"]
    norm = float(jnp.sum(local(state)["params"]["in"] ** 2))
    claim = Claim("the loss falls", history[-1] - history[0], "< 0", True)
    return Report([claim], {"norm": norm})


if __name__ == "__main__":
    experiment(main, PRESETS)
'''


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = tmp_path_factory.mktemp("tree")
    package = tree / "experiments" / "toy"
    package.mkdir(parents=True)
    (tree / "experiments" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "net.py").write_text(NET)
    return tree


class Net:
    """The experiment, in some processes with some devices each."""

    def __init__(self, tree: Path, folder: Path):
        self.tree, self.folder = tree, folder

    def start(self, processes, devices, *words, run="run", **env):
        command = [sys.executable, "-m", "experiments.toy.net", "full"]
        command += ["--run-dir", str(self.folder / run), *map(str, words)]
        if processes > 1:
            launch = [sys.executable, "-m", "jaxzoo.training.launch"]
            launch += ["--local", str(processes), "--heartbeat", "5"]
            launch += ["--devices-per-process", str(devices), "--"]
            command = [*launch, *command]
        flags = f"--xla_force_host_platform_device_count={devices}"
        return subprocess.Popen(
            command,
            cwd=self.tree,
            env={
                **os.environ,
                "XLA_FLAGS": flags,
                "PYTHONPATH": f"{self.tree}:{REPO}",
                "JAX_COMPILATION_CACHE_DIR": str(self.tree / "cache"),
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, processes, devices, *words, code=0, **knobs):
        return self.end(self.start(processes, devices, *words, **knobs), code)

    def end(self, process, code):
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        assert "stack trace" not in err and "Traceback" not in err, err
        return out + err

    def digest(self, run="run"):
        assert verify(self.folder / run / "checkpoints") == []
        return digest(self.folder / run / "checkpoints")

    def rows(self, run="run"):
        text = (self.folder / run / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def committed(self, run="run"):
        """The newest step that is saved, 0 for none."""
        folder = self.folder / run / "checkpoints" / "fit"
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def wait_for_step(self, step, run="run"):
        for _ in range(600):
            if self.committed(run) >= step:
                return
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached")


@pytest.fixture
def net(tree, tmp_path):
    return Net(tree, tmp_path)


@pytest.fixture(scope="module")
def alone(tree, tmp_path_factory):
    """One process with four devices, undisturbed: digest and lines of metrics."""
    net = Net(tree, tmp_path_factory.mktemp("alone"))
    net(1, 4, "--reproducible", "--mesh", "fsdp=4")
    return net.digest(), net.rows()


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 2, "fsdp=4"), (4, 1, "data=2,fsdp=2"), (2, 4, "data=8")],
)
def test_processes_times_devices_is_all_the_same(net, alone, processes, devices, mesh):
    told = net(processes, devices, "--reproducible", "--mesh", mesh)
    assert (net.digest(), net.rows()) == alone
    # One process speaks.
    assert told.count("24/24") == 1
    assert told.count("Claims of toy/net") == 1


def test_without_reproducible_it_is_so_to_rounding(net, alone):
    net(2, 1, "--mesh", "fsdp=2")
    net(1, 1, run="one")
    losses = [[row["loss"] for row in net.rows(run)] for run in ("run", "one")]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_each_process_loads_its_rows_and_all_of_them_are_the_batch(net, tmp_path):
    """D1: the ids of each step do not depend on the number of processes."""
    net(2, 2, TELL=str(tmp_path / "two"))
    net(1, 1, TELL=str(tmp_path / "one"), run="one")

    def told(name):
        lines = (tmp_path / name).read_text().splitlines()
        return {int(t): ids for t, *ids in map(str.split, lines)}

    first, second, whole = told("two-0"), told("two-1"), told("one-0")
    assert set(first) == set(second) == set(whole) == set(range(24))
    for t in range(24):
        assert len(first[t]) == len(second[t]) == 8
        assert first[t] + second[t] == whole[t]


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.parametrize(
    ("number", "code", "rank"), [(signal.SIGTERM, 75, 0), (signal.SIGINT, 130, 1)]
)
def test_what_is_stopped_and_then_killed_goes_on_to_the_same_bits(
    net, alone, number, code, rank
):
    """One after the other, since starting all processes is what takes the time."""
    words = ("--reproducible", "--mesh", "fsdp=4")
    knobs = {"SLOW": "0.2", "SAVE_EVERY": "0"}
    process = net.start(2, 2, *words, **knobs)
    net.wait_for_step(4)
    process.send_signal(number)
    assert "Stopped at step" in net.end(process, code)  # the same one for all

    stopped = net.committed()
    process = net.start(2, 2, *words, **knobs)
    net.wait_for_step(stopped + 4)
    victim = sorted(children(process.pid))[rank]
    os.kill(victim, signal.SIGKILL)
    begin = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begin < 5 + 5
    assert process.returncode == 70, out + err
    assert f"rank {rank} (pid {victim}" in err and "SIGKILL" in err and "of fit" in err
    assert "stack trace" not in err and "Traceback" not in err, err

    net(2, 2, *words)
    assert (net.digest(), net.rows()) == alone


def test_other_settings_in_one_process_are_found_before_the_first_step(net):
    program = (
        "import os, sys\n"
        "rate = '0.02' if os.environ['JAXZOO_PROCESS_ID'] == '1' else '0.01'\n"
        "sys.argv += ['--learning-rate', rate]\n"
        "import runpy\n"
        "runpy.run_module('experiments.toy.net', run_name='__main__')\n"
    )
    (net.tree / "skewed.py").write_text(program)
    command = [sys.executable, "-m", "jaxzoo.training.launch", "--local", "2", "--"]
    done = subprocess.run(
        [*command, sys.executable, "skewed.py", "--run-dir", str(net.folder / "run")],
        cwd=net.tree,
        env={**os.environ, "PYTHONPATH": f"{net.tree}:{REPO}", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "has learning_rate 0.02, rank 0 has 0.01" in done.stderr
    assert not (net.folder / "run" / "metrics.jsonl").exists()


def test_a_refused_folder_ends_all_processes(net):
    (net.folder / "run").mkdir()
    (net.folder / "run" / "letter.txt").touch()
    told = net(2, 1, code=2)
    assert told.count("is not empty and is not a run's folder") == 1
